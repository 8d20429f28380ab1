"""Batches that know their distinct ids: the same rows as without, in smaller blocks; and NaN where it is not so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxsparse as js
from jaxsparse.data.distinct import NO_ID, Scratch, capacity_for, distinct_ids
from jaxsparse.trace.known_ids import Coded, Shared
from jaxsparse.train.device_rows import _part, ids_of
from tests.marks import slow_but

V, D, N, B = 300, 4, 96, 32
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 60, (N, 5))
LISTS = [row[:k].tolist() for row, k in zip(IDS, RNG.integers(0, 5, N), strict=True)]
Y = RNG.integers(0, 2, N)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
HEADS = {"a": IDS, "b": IDS[:, 0], "dense": RNG.normal(size=(N, 2))}


@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 6), st.integers(0, 5)), elements=st.integers(-3, 20)))
def test_distinct_ids(ids):
    (found,) = distinct_ids([ids], capacity_for(4), Scratch())
    unique, inverse = np.unique(ids, return_inverse=True)
    flat = found.ids.reshape(-1)
    assert flat[: len(unique)].tolist() == unique.tolist() and set(flat[len(unique) :].tolist()) <= {-(2**31)}
    assert found.positions.ravel().tolist() == inverse.ravel().tolist() and found.positions.shape == ids.shape
    assert found.shape == ids.shape and len(found.ids) == len(ids)
    assert len(unique) < found.size <= max(ids.size + 1, 1) and flat.size >= found.size


def test_shards_have_one_size_and_a_batch_with_more_has_its_own():
    few, many = np.zeros((4, 8), np.int32), np.arange(32, dtype=np.int32).reshape(4, 8)
    assert [x.size for x in distinct_ids([few, few], 5, Scratch())] == [5, 5]
    assert [x.size for x in distinct_ids([few, many], 5, Scratch())] == [33, 33]


def test_texts_of_any_length_need_three_programs():
    """As the e-mails are: few long ones, most words of a batch distinct, more so in some batches than in most."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4, 1, 1500).astype(int) + 1, 2000)
    ids = np.concatenate([rng.choice(1 << 16, n, replace=False) % (1 << rng.integers(8, 17)) for n in lengths])
    x = scipy.sparse.csr_matrix((np.ones(len(ids)), ids, np.r_[0, np.cumsum(lengths)]), (1500, 1 << 16))
    x.sum_duplicates()
    batches = js.batches(x, batch_size=16, shuffle=True)
    shapes = {tuple(jax.tree.leaves(jax.tree.map(np.shape, batch))) for _ in range(3) for batch in batches}
    assert 1 < len(shapes) <= 3


def squared(rows, batch):
    return js.weighted_mean(jnp.sum(rows, -1) ** 2, batch.weight)


def csr():
    return scipy.sparse.random(N, V, 0.05, format="csr", random_state=0)


# name: x, options of js.batches, the rows that a loss is made of, whether the ids are followed
PROGRAMS = {
    "t[ids]": (IDS, {}, lambda t, b: t[b.x].sum(1), True),
    "take that clips": (IDS, {}, lambda t, b: jnp.take(t, b.x + 5, axis=0, mode="clip").sum(1), True),
    "negative ids": (IDS, {}, lambda t, b: t[b.x - V].sum(1), True),
    "hashed ids": (IDS, {}, lambda t, b: t[(b.x * 7 + 3) % 97].sum(1), True),
    "an offset that is an array": (IDS, {}, lambda t, b: t[(b.x + b.weight.sum().astype(int)) % V].sum(1), True),
    "examples of weight 0": (IDS, {}, lambda t, b: bag(t, jnp.where(b.weight[:, None] > 0, b.x, V)), True),
    "columns": (IDS, {}, lambda t, b: t[b.x[:, 0]] + t[b.x[:, 1:3]].sum(1), True),
    "a column under vmap": (IDS, {}, lambda t, b: jax.vmap(lambda ids: t[ids[1]])(b.x), True),
    "transposed": (IDS, {}, lambda t, b: t[b.x.T[::-1]].sum(0), True),
    "ids and others": (IDS, {}, lambda t, b: t[b.x].sum(1) + t[jnp.arange(3)].sum(), False),
    "sorted ids": (IDS, {}, lambda t, b: t[jnp.sort(b.x, 1)].sum(1), False),
    "a number before hashed ids": (IDS, {}, lambda t, b: t[jnp.where(b.x[:, :1] > 30, 30, b.x % 40)].sum(1), True),
    "a number by another array": (IDS, {}, lambda t, b: t[jnp.where(b.y[:, None] > 0, 30, b.x % 40)].sum(1), True),
    "in a scan": (IDS, {}, lambda t, b: jax.lax.scan(lambda c, ids: (c, t[ids]), 0, b.x.T)[1].sum(0), False),
    "features together": (HEADS, {}, lambda t, b: t[jnp.concatenate([b.x["a"], b.x["b"][:, None]], 1)].sum(1), True),
    "features hashed together": (
        HEADS,
        {},
        lambda t, b: t[jnp.concatenate([b.x["a"], b.x["b"][:, None]], 1) % 40].sum(1),
        True,
    ),
    "masked in a jit": (IDS, {}, lambda t, b: t[jax.jit(lambda ids: jnp.where(ids > 30, ids, 30))(b.x)].sum(1), True),
    "a feature twice": (IDS, {}, lambda t, b: t[jnp.concatenate([b.x, b.x], 1)].sum(1), True),
    "features of one table": (HEADS, {}, lambda t, b: t[b.x["a"]].sum(1) + t[b.x["b"]], True),
    "lists": (LISTS, {}, lambda t, b: bag(t, b.x), True),
    "lists padded with -1": (LISTS, {"padding_idx": -1}, lambda t, b: js.embedding_bag(t, b.x, padding_idx=-1), True),
    "-1 is the last row": (LISTS, {"padding_idx": -1}, lambda t, b: t[b.x].sum(1), True),
    "a matrix": (csr(), {}, lambda t, b: js.dot(b.x, t), True),
}


def bag(table, ids):
    return js.embedding_bag(table, ids, padding_idx=V)


def state_of(tx):
    return TrainState.create(apply_fn=None, params={"t": jnp.asarray(TABLE), "w": jnp.ones(())}, tx=tx)


def steps_of(rows):
    def loss_fn(params, batch):
        return squared(rows(params["t"], batch), batch) * params["w"]

    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    def two_words(state, batch):
        loss, grads = js.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    return {
        "rowwise": (jax.jit(js.rowwise(step), **QUICKLY), optax.adam),
        "jit": (js.jit(step), optax.adam),
        "two words": (jax.jit(two_words, **QUICKLY), js.lazy_adam),
    }


def without(batch):
    return dataclasses.replace(batch, distinct=None)


QUICK = ("a matrix",)


@pytest.mark.parametrize("name", slow_but(QUICK, PROGRAMS))
def test_the_same_as_without(name):
    x, options, rows, _ = PROGRAMS[name]
    steps = steps_of(rows)
    ways = ("rowwise", "two words")  # js.jit runs what rowwise is

    @functools.partial(jax.jit, **QUICKLY)  # one program compiles in half of the time of four
    def every_way(known, unknown, batch):
        known = {way: steps[way][0].__wrapped__(known[way], batch) for way in ways}
        unknown = {way: steps[way][0].__wrapped__(unknown[way], without(batch)) for way in ways}
        return known, unknown

    known, unknown = ({way: state_of(steps[way][1](0.1)) for way in ways} for _ in range(2))
    for batch in js.batches(x, Y, batch_size=B, num_rows=V, **options):
        got, want = every_way(known, unknown, batch)
        known, unknown = ({way: state for way, (state, _) in each.items()} for each in (got, want))
        for way in ways:
            np.testing.assert_allclose(got[way][1], want[way][1], rtol=1e-6, err_msg=way)
    for way in ways:
        for a, b in zip(jax.tree.leaves(known[way]), jax.tree.leaves(unknown[way]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=way)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_block_has_the_size_of_what_is_known(name):
    x, options, rows, followed = PROGRAMS[name]
    (batch, *_) = js.batches(x, Y, batch_size=B, num_rows=V, **options)
    gradient = jax.eval_shape(js.grad(lambda t, b: squared(rows(t, b), b)), jnp.asarray(TABLE), batch)
    ids = jax.tree.leaves(batch.distinct, is_leaf=lambda x: isinstance(x, js.DistinctIds))
    size = sum(x.size for x in ids)
    # a value for what a mask puts there, and one row of padding
    assert (gradient.rows.shape[0] <= min(size + 1, V) + 1) == (followed or size + 2 > V), gradient


@pytest.mark.parametrize("way", ["rowwise", "jit", "two words"])
@pytest.mark.parametrize("name", slow_but(["t[ids]"], ["t[ids]", "lists", "a matrix", "columns"]))
def test_what_is_not_so_is_nan_and_changes_no_row(name, way):
    x, options, rows, _ = PROGRAMS[name]
    (first, second, *_) = js.batches(x, Y, batch_size=B, num_rows=V, **options)
    batch = dataclasses.replace(first, x=jax.tree.map(lambda x: x[::-1], first.x))
    if jax.tree.map(jnp.shape, first.distinct) == jax.tree.map(jnp.shape, second.distinct):
        batch = dataclasses.replace(first, distinct=second.distinct)
    step, tx = steps_of(rows)[way]
    state, loss = step(state_of(tx(0.1)), batch)
    assert np.isnan(loss) and np.isnan(state.params["w"])
    assert np.array_equal(state.params["t"], TABLE)


def test_a_position_outside_is_nan_too():
    (batch, *_) = js.batches(IDS, batch_size=B, num_rows=V)
    positions = batch.distinct.positions.at[0, 0].set(10**6).at[1, 1].set(-1)
    batch = dataclasses.replace(batch, distinct=dataclasses.replace(batch.distinct, positions=positions))
    step, tx = steps_of(PROGRAMS["t[ids]"][2])["jit"]
    state, loss = step(state_of(tx(0.1)), batch)
    assert np.isnan(loss) and np.array_equal(state.params["t"], TABLE)


CUTS = {
    "micro-batches": lambda b: jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), b),
    "a part": lambda b: jax.tree.map(lambda x: x[: B // 2], b),
    "twice": lambda b: jax.tree.map(lambda x: jnp.concatenate([x, x]), b),
}


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize("change", slow_but(["a part"], CUTS))
@pytest.mark.parametrize("way", slow_but(["jit"], ["rowwise", "jit", "two words"]))
def test_a_batch_cut_in_another_way_knows_nothing(change, way):
    (batch, *_) = js.batches(IDS, batch_size=B, num_rows=V)
    batch = CUTS[change](batch)

    def rows(table, batch):
        return table[batch.x].sum(-2)

    step, tx = steps_of(rows)[way]
    (known, loss), (unknown, want) = step(state_of(tx(0.1)), batch), step(state_of(tx(0.1)), without(batch))
    assert float(loss) == float(want) and np.array_equal(known.params["t"], unknown.params["t"])


@pytest.mark.slow
def test_micro_batches_in_a_scan_and_batches_in_a_scan_of_steps():
    batches = list(js.batches(IDS, batch_size=B, num_rows=V))
    step, tx = steps_of(PROGRAMS["t[ids]"][2])["rowwise"]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    one, _ = jax.lax.scan(step.__wrapped__, state_of(tx(0.1)), stacked)
    other = state_of(tx(0.1))
    for batch in batches:
        other, _ = step(other, batch)
    np.testing.assert_allclose(one.params["t"], other.params["t"], rtol=1e-6)


def test_several_hosts_do_not_count():
    """A host would have to look at the ids of all others."""
    for batch in js.batches(IDS, batch_size=B, num_rows=V, shard=(0, 2)):
        assert batch.distinct is None


@pytest.mark.slow
def test_rows_that_a_mask_leaves_out_are_left_alone():
    (batch, *_) = js.batches(IDS, batch_size=B, num_rows=V)
    mask = (jnp.arange(B) % 2 == 0)[:, None]
    steps = steps_of(lambda t, b: bag(t, jnp.where(mask, b.x, V)))
    for step, tx in steps.values():
        state = state_of(tx(0.1))
        state, _ = step(state, batch)
        state, _ = step(state, dataclasses.replace(batch, weight=0 * batch.weight))  # momentum moves what is read
        changed = np.flatnonzero((np.asarray(state.params["t"]) != TABLE).any(1))
        assert set(changed) == set(np.unique(IDS[:B:2]))


@pytest.mark.slow
def test_what_no_row_id_is_made_of_may_be_something_else():
    (batch, *_) = js.batches({"ids": IDS, "label": IDS[:, 0]}, batch_size=B, num_rows=V)
    batch = dataclasses.replace(batch, x={**batch.x, "label": batch.x["label"] % 2})
    step, tx = steps_of(lambda t, b: t[b.x["ids"]].sum(1) * b.x["label"][:, None])["rowwise"]
    (known, loss), (unknown, want) = step(state_of(tx(0.1)), batch), step(state_of(tx(0.1)), without(batch))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(known.params["t"], unknown.params["t"], rtol=1e-6)


@pytest.mark.slow  # on three roads
def test_an_id_of_31_bits():
    ids = np.array([2**31 - 1, 5, 7, 9])
    (batch,) = js.batches(ids, batch_size=4)
    for step, tx in steps_of(lambda t, b: t[b.x % 64]).values():
        (known, loss), (unknown, want) = step(state_of(tx(0.1)), batch), step(state_of(tx(0.1)), without(batch))
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        np.testing.assert_allclose(known.params["t"], unknown.params["t"], rtol=1e-6)


@pytest.mark.slow  # on three roads; what is cut along the first axis is above
def test_cut_along_another_axis():
    """Where not every distinct id is in the array any more, rows that are not read are left alone."""
    (batch,) = js.batches(IDS[:B] % 3 + np.arange(5) * 3, batch_size=B, num_rows=V)
    batch = jax.tree.map(lambda x: x[:, :2] if x.ndim == 2 else x, batch)
    for step, tx in steps_of(lambda t, b: t[b.x].sum(1)).values():
        (known, loss), (unknown, want) = step(state_of(tx(0.1)), batch), step(state_of(tx(0.1)), without(batch))
        assert float(loss) == float(want) and np.array_equal(known.params["t"], unknown.params["t"])


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", slow_but([True], [True, False]))
def test_devices_with_states_of_their_own(check_vma):
    """A loss that is the same on all devices stays so: what is wrong on one is wrong on all."""
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    (batch,) = js.batches(IDS[:B], batch_size=B, num_rows=V, devices=2)

    def step(table, batch):
        loss, gradient = jax.value_and_grad(lambda t: squared(t[batch.x].sum(1), batch))(table)
        return table - gradient, jax.lax.pmean(loss, "d")

    def one(tables, batch):
        table, loss = js.rowwise(step)(tables[0], jax.tree.map(lambda x: x[0], batch))
        return table[None], loss

    run = jax.shard_map(
        one, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, jax.sharding.PartitionSpec()), check_vma=check_vma
    )
    tables = jnp.stack([TABLE, TABLE])
    (known, loss), (unknown, want) = jax.jit(run)(tables, batch), jax.jit(run)(tables, without(batch))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(known, unknown, rtol=1e-6)
    wrong = dataclasses.replace(batch, x=jnp.asarray(batch.x).at[0, 0, 0].add(1))
    tables_after, loss = jax.jit(run)(tables, wrong)
    assert np.isnan(loss) or not check_vma
    assert np.array_equal(tables_after[0], TABLE)


@pytest.mark.parametrize(
    ("values", "in_order"),
    [([3, 9, NO_ID, V], True), ([3, 9, V, V], True), ([3, 3], False), ([9, 3], False), ([V, 3], False)],
)
def test_values_in_order_are_distinct_rows_as_they_are(values, in_order):
    values = jnp.array(values, jnp.int32)
    code = Coded(Shared(values), values != NO_ID, Shared(jnp.zeros(4, jnp.int32)), True)
    assert bool(_part(values, False, V, code).in_order(V)) == in_order


@pytest.mark.slow
def test_a_mask_of_other_data_leaves_values_in_order():
    (batch, *_) = js.batches(csr(), Y, batch_size=B)
    planned = js.jit(lambda p, b: (p - jax.grad(lambda p: js.dot(b.x, p).sum())(p), 0)).plan(TABLE, batch)
    ids = ids_of(planned, [TABLE, *jax.tree.leaves(batch)])
    code = next(c for c in ids.codes if c is not None)
    assert bool(_part(code.values.array, False, V, code).in_order(V))
