"""The distinct ids that js.batches finds on the host, and the step that gathers these rows without looking for them."""

import dataclasses
import functools
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO

import jaxsparse as js
from jaxsparse.batch import find_batches, order_batches
from jaxsparse.blocks import _row_ids
from jaxsparse.features import sorted_distinct
from jaxsparse.grad import trace
from tests.test_batch import KINDS, V, rng_of

ROWS, BATCH, LENGTH = 3_000, 32, 6
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators look for distinct ids themselves")


@given(st.sampled_from([1, 300, 2**31]), st.integers(0, 200), st.integers(0, 9))
def test_distinct_ids(span, n, seed):
    ids = rng_of(seed).integers(-span, span, (n, 3)).astype(np.int32)
    ids[1::2] = ids[::2][: len(ids[1::2])]
    before, found = ids.copy(), sorted_distinct(ids)
    assert found.dtype == np.int32 and found.tolist() == sorted(set(ids.ravel().tolist()))
    np.testing.assert_array_equal(ids, before)


@given(
    st.sampled_from([k for k in KINDS if k != "dense"]), st.integers(1, 40), st.sampled_from([1, 7, 64]),
    st.sampled_from([None, 0, V, -1]), st.sampled_from([None, (0, 1), (1, 7)]), st.integers(0, 9),
)  # fmt: skip
def test_ordered_are_the_values_of_each_leaf_of_ids(kind, n, batch_size, padding_idx, shard, seed):
    if shard and batch_size % shard[1]:
        shard = None
    num_rows = V if kind in ("lists", "dict") else None
    options = {"num_rows": num_rows, "padding_idx": padding_idx, "shard": shard, "shuffle": bool(seed % 2)}
    for batch in js.batches(KINDS[kind](rng_of(seed), n), batch_size=batch_size, seed=seed, **options):
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch.x)[0]]
        parts = zip(paths, jax.tree.leaves(batch.x), batch.distinct, batch.ordered, strict=True)
        for path, leaf, bound, ordered in parts:
            matrix = kind == "csr" or "words" in path
            assert (ordered is not None) == (leaf.dtype == jnp.int32 and leaf.size > 0), path
            if ordered is not None:
                assert ordered.dtype == np.int32 and ordered.ndim == 1
                assert len(ordered) <= bound if matrix else len(ordered) == bound
                assert sorted(set(ordered.tolist())) == np.unique(leaf[:, 1] if matrix else leaf).tolist()


def test_ordered_belong_to_one_object():
    """A batch made of it may have another x, so it has none; a pickled one has the same x."""
    (batch,) = js.batches(np.array([[3, 1], [1, 0]]), batch_size=2)
    assert set(batch.ordered[0].tolist()) == {0, 1, 3}
    for other in (jax.tree.map(lambda x: x, batch), jax.device_put(batch), dataclasses.replace(batch, x=batch.x + 1)):
        assert other.ordered is None
    assert pickle.loads(pickle.dumps(batch)).ordered[0].tolist() == batch.ordered[0].tolist()
    assert "ordered" not in repr(batch) and len(jax.tree.leaves(batch)) == 2
    assert next(iter(js.batches(np.arange(4), batch_size=4, devices=2))).ordered is None
    (again,) = find_batches(order_batches((batch.x, jax.device_put(batch)), [batch.ordered]))
    assert again.ordered == batch.ordered


IDS = rng_of(0).zipf(1.3, (3 * BATCH, LENGTH)) % ROWS

# What of the table a program reads. First, where the values of the whole of batch.x say it; then, where they do not.
BY_VALUES = {
    "itself": lambda t, x: t[x],
    "take": lambda t, x: jnp.take(t, x, axis=0),
    "bag": lambda t, x: js.embedding_bag(t, x, combiner="mean"),
    "bag_padded": lambda t, x: js.embedding_bag(t, x, combiner="sum", padding_idx=1),
    "max_bag": lambda t, x: js.embedding_bag(t, x, combiner="max", padding_idx=1),
    "lookup": lambda t, x: js.embedding_lookup(t, x, padding_idx=1),
    "arithmetic": lambda t, x: t[(7 * x + 3) % ROWS],
    "halves": lambda t, x: t[x // 2],
    "masked": lambda t, x: t[jnp.where(x > 5, x, 0)],
    "from_the_end": lambda t, x: t[-x],
    "clipped": lambda t, x: t[jnp.clip(x, 3, 40)],
    "out_of_range": lambda t, x: t[x + ROWS - 10],
    "filled": lambda t, x: t.at[x + ROWS - 10].get(mode="fill", fill_value=0.5),
    "promised": lambda t, x: t.at[x].get(mode="promise_in_bounds"),
    "rearranged": lambda t, x: t[x.T.reshape(-1, 2)[::-1][:, None]],
    "narrow": lambda t, x: t[(x % 100).astype(jnp.uint8)],
    "wide": lambda t, x: t[x.astype(jnp.uint32)],
    "twice": lambda t, x: t[x].sum() + 2 * t[x // 3].mean(),
    "vmapped": lambda t, x: jax.vmap(lambda row: t[row].sum(0))(x),
    "remat": jax.checkpoint(lambda t, x: t[x] ** 2),
    "jitted": jax.jit(lambda t, x: t[x + 1] ** 2),
}
NOT_BY_VALUES = {
    "columns": lambda t, x: t[x[:, :2]],
    "one_example": lambda t, x: t[x[3]],
    "chosen": lambda t, x: t[x[jnp.array([1, 5])]],
    "offsets": lambda t, x: t[(x + jnp.arange(LENGTH)[None]) % ROWS],
    "two_arrangements": lambda t, x: t[jnp.where(x > x[::-1], x, 0)],
    "sorted": lambda t, x: t[jnp.sort(x, axis=0)],
    "constant": lambda t, x: t[jnp.array([5, 7])],
    "one_more": lambda t, x: t[x].sum() + t[jnp.array(4)].sum(),
    "cond": lambda t, x: jax.lax.cond(x[0, 0] > 0, lambda: jnp.sum(t[x]), lambda: jnp.sum(t[x // 2])),
    "scan": lambda t, x: jax.lax.scan(lambda c, i: (c + t[i].sum(), None), 0.0, x)[0],
    "by_another": lambda t, x: t[jnp.where(jnp.arange(LENGTH)[None] < 2, x, 0)],
    "floats": lambda t, x: t[(x * 0.5).astype(jnp.int32)],
    "by_a_scalar": lambda t, x: t[(x + x.max()) % ROWS],
}


# The same of a matrix, batch.x.
MATRIX_BY_VALUES = {
    "dot": lambda t, x: js.dot(x, t),
    "twice": lambda t, x: js.dot(x, t).sum() + js.dot(2 * x, t).mean(),
    "other_data": lambda t, x: js.dot(BCOO((x.data**2, x.indices), shape=x.shape), t),
    "remat": jax.checkpoint(lambda t, x: js.dot(x, t) ** 2),
    "jitted": jax.jit(lambda t, x: js.dot(x, t)),
    "stopped": lambda t, x: js.dot(x, t) + jax.lax.stop_gradient(js.dot(x, t)),
}
MATRIX_NOT_BY_VALUES = {
    "longer": lambda t, x: js.dot(BCOO((x.data, x.indices), shape=(BATCH + 1, ROWS)), t),
    "narrower": lambda t, x: js.dot(BCOO((x.data, x.indices), shape=(BATCH - 9, ROWS)), t),
    "moved": lambda t, x: js.dot(BCOO((x.data, x.indices // 2), shape=x.shape), t),
    "concatenated": lambda t, x: js.dot(js.concatenate([x, x], axis=0), t),
    "sliced": lambda t, x: js.dot(BCOO((x.data[5:], x.indices[5:]), shape=x.shape), t),
    "columns": lambda t, x: t.at[x.indices[:, 1]].get(mode="fill", fill_value=0),
    "rows": lambda t, x: t.at[x.indices[:, 0]].get(mode="fill", fill_value=0),
    "scan": lambda t, x: jax.lax.scan(lambda c, w: (c + w * js.dot(x, t).sum(), None), 0.0, jnp.arange(3.0))[0],
}


def loss_of(read):
    return lambda params, batch: jnp.mean((read(params["t"], batch.x) - params["b"]) ** 2)


def start():
    return {"t": jnp.asarray(rng_of(1).normal(size=(ROWS, 3)), jnp.float32), "b": jnp.float32(0.3)}


def rows_named(reads, batches):
    """For each read and batch, the rows that its values name, None where there are no values, and those of its ids."""
    params = start()
    leaf = list(params).index("b")  # jax.tree.leaves sorts: b, t

    def one(name, batch):
        traced = trace(loss_of(reads[name]), 0, False, (params, batch), {})
        assert leaf not in traced.dense, name
        assert trace(loss_of(reads[name]), 0, False, (params, jax.device_put(batch)), {}).values(leaf) is None, name
        ids, _ = _row_ids(traced, [leaf], jax.tree.leaves(params))
        return traced.values(leaf), ids[leaf]

    # a batch knows its values where it is no tracer: all is constant in this program
    return jax.jit(lambda: {name: [one(name, batch) for batch in batches] for name in reads})()


def hold_rows(found, by_values):
    """A row too many would be moved by Adam's moments, a row too few would read another."""
    for values, ids in found:
        assert (values is not None) == by_values
        if values is not None:
            assert values.size < ids.size
            rows, every = (np.unique(x[(x >= 0) & (x < ROWS)]).tolist() for x in map(np.asarray, (values, ids)))
            assert rows == every


rows_of_ids = functools.cache(lambda: rows_named(BY_VALUES | NOT_BY_VALUES, list(js.batches(IDS, batch_size=BATCH))))


@pytest.mark.parametrize("name", BY_VALUES | NOT_BY_VALUES)
def test_rows_read_from_values(name):
    hold_rows(rows_of_ids()[name], name in BY_VALUES)


def matrix_batches(seed=0):
    """Rows of all lengths, two batches and a half."""
    rng = rng_of(seed)
    lengths = rng.integers(0, 9, BATCH * 5 // 2)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns = rng.zipf(1.3, starts[-1]) % ROWS
    x = scipy.sparse.csr_matrix((rng.normal(size=starts[-1]), columns, starts), (len(lengths), ROWS))
    return js.batches(x.astype(np.float32), batch_size=BATCH)


rows_of_matrices = functools.cache(lambda: rows_named(MATRIX_BY_VALUES | MATRIX_NOT_BY_VALUES, list(matrix_batches())))


@pytest.mark.parametrize("name", MATRIX_BY_VALUES | MATRIX_NOT_BY_VALUES)
def test_rows_read_from_the_columns_of_a_matrix(name):
    hold_rows(rows_of_matrices()[name], name in MATRIX_BY_VALUES)


def swap(x):
    x["a"], x["b"] = x["b"], x["a"]


CHANGES = {  # of the dict that a batch has for x, which nothing can forbid
    "put_in": lambda x: x.update(a=(x["a"] + 17) % ROWS),
    "swapped": swap,
    "renamed": lambda x: x.update(A=x.pop("b")),
    "indices_of_a_matrix": lambda x: x.update(a=x["m"].indices),
    "matrix_of_the_indices": lambda x: x.update(m=BCOO((x["m"].data, x["m"].indices), shape=(BATCH - 1, ROWS))),
}


def all_but_slow(cases, fast):
    """Cases as parameters: a step of each compiles twice."""
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


@on_cpu
@pytest.mark.parametrize(
    ("name", "inside"),
    all_but_slow(itertools.product(CHANGES, [False, True]), [("put_in", True), ("matrix_of_the_indices", False)]),
)
def test_a_batch_whose_dict_is_changed(name, inside):
    """What was found of one array must not be taken for what another holds."""
    ids, m = IDS[:BATCH], scipy.sparse.random(BATCH, ROWS, 2e-4, "csr", np.float32, rng=rng_of(3))
    x = {"a": ids, "b": (ids + 1000) % ROWS, "m": m}  # no more distinct ones in one than in the other

    def loss_fn(params, batch):
        if inside:
            CHANGES[name](batch.x)
        read = params["t"].at[batch.x["a"]].get(mode="fill", fill_value=0)
        return jnp.mean((read - params["b"]) ** 2) + jnp.mean(js.dot(batch.x["m"], params["t"]) ** 2)

    def train(without):
        (batch,) = map(without, js.batches(x, batch_size=BATCH))
        if not inside:
            CHANGES[name](batch.x)
        state = TrainState.create(apply_fn=None, params=start(), tx=js.lazy_adam(0.1))
        state, metrics = js.make_train_step(loss_fn)(state, batch)
        return state, [metrics]

    (state, metrics), want = train(lambda batch: batch), train(jax.device_put)
    assert np.isfinite(metrics[0]["loss"])
    hold_same(state, metrics, *want)


@on_cpu
@pytest.mark.parametrize("name", ["twice", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dot", "moved"))])
def test_the_same_step_over_matrices_with_and_without(name):
    read = (MATRIX_BY_VALUES | MATRIX_NOT_BY_VALUES)[name]
    state, reported, _ = run(read, js.lazy_adam(0.1), batches=matrix_batches())
    want, expected, _ = run(read, js.lazy_adam(0.1), without=jax.device_put, batches=matrix_batches())
    hold_same(state, reported, want, expected)


def run(read, tx, without=lambda batch: batch, batches=None):
    state, reported = TrainState.create(apply_fn=None, params=start(), tx=tx), []
    batches = js.batches(IDS, batch_size=BATCH) if batches is None else batches
    step, batches = js.make_train_step(loss_of(read)), list(map(without, batches))
    for batch in batches:
        state, metrics = step(state, batch)
        reported.append(jax.device_get(metrics))
    return js.flush(state), reported, step.lower(state, batches[0]).compile().as_text()


@on_cpu
@pytest.mark.parametrize(
    ("skipped", "name"),
    all_but_slow(
        itertools.product(["freeze", "replay"], ["bag_padded", "out_of_range", "clipped", "columns", "cond"]),
        [("freeze", "bag_padded"), ("freeze", "columns"), ("replay", "out_of_range")],
    ),
)
def test_the_same_step_with_and_without(skipped, name):
    read, tx = (BY_VALUES | NOT_BY_VALUES)[name], js.lazy_adam(0.1, skipped=skipped)
    state, reported, text = run(read, tx)
    want, expected, other = run(read, tx, without=jax.device_put)
    hold_same(state, reported, want, expected)
    assert (looks_for_them(text), looks_for_them(other)) == (name not in BY_VALUES, True)


def hold_same(state, reported, want, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state.params, want.params)
    for got, metrics in zip(reported, expected, strict=True):
        assert got["rows_touched"] == metrics["rows_touched"]
        np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-5)


def looks_for_them(text):
    """Whether as many ids as the programs above read are written into the scratch of the table."""
    k = BATCH * LENGTH
    return bool(re.search(rf"\(\S+ s32\[{ROWS}\], \S+ s32\[({k}|{k // 3}|{2 * k}),1\]", text))
