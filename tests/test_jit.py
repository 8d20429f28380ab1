"""js.jit beyond what js.rowwise does: ids on the host, few sizes of blocks, donation, static arguments, nesting."""

import concurrent.futures
import copy
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxsparse as js
from jaxsparse.trace import pieces, planning
from jaxsparse.train.host_rows import _distinct, _look_up
from tests.hlo import compiled_by_default
from tests.marks import slow_but
from tests.stepwise import (
    P0,
    STEP,
    D,
    V,
    batch,
    both_tables,
    compare,
    copied,
    create,
    draw_ids,
    normal,
    of_loss,
    put_back,
)

ADAM = optax.adam(0.1)


class Embed(nn.Module):
    """As in the README: nn.Embed, a stock TrainState, a stock optimizer."""

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(1)(nn.Embed(V, D)(ids).mean(1))[:, 0]


def test_a_linen_model_with_a_stock_state():
    model = Embed()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 30)))
    ids = draw_ids(12, 4)
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), ids), tx=tx)

    def train_step(state, ids, y):
        def loss_fn(params):
            return jnp.mean((state.apply_fn(params, ids) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    sparse, dense = js.jit(train_step), jax.jit(train_step)
    wanted, state = copied(state), copied(state)
    for _ in range(20):
        ids, y = draw_ids(12, 4), normal(12)
        (state, loss), (new, want) = sparse(state, ids, y), dense(wanted, ids, y)
        wanted = put_back(new, wanted, {"embedding": ids})
        np.testing.assert_allclose(loss, want, rtol=1e-4)
    compare("linen", state, wanted, 1e-4)


def test_plain_optax_takes_over_and_hands_back():
    """The state is optax's own."""
    tx = optax.adamw(0.1)
    sparse, dense = js.jit(STEP), jax.jit(STEP)
    state, wanted = copied(create(tx)), create(tx)
    for step in (dense, sparse, dense, sparse):
        arrays = batch()
        before = copied(state)
        assert jax.tree.structure(state) == jax.tree.structure(wanted)
        state, _ = step(state, *arrays)
        new, _ = dense(wanted, *arrays)
        wanted = new if step is dense else put_back(new, wanted, both_tables(*arrays))
        del before
    compare("handed over", state, wanted, 1e-4)


def test_an_epoch_of_shuffled_batches_compiles_few_programs():
    step = js.jit(STEP)
    rng = np.random.default_rng(0)
    state = copied(create(ADAM, {"t": jnp.zeros((5000, D)), "b": jnp.zeros(5000), "w": P0["w"]}))
    for _ in range(40):
        ids = (rng.zipf(1.3, (64, 20)) % 5000).astype(np.int32)
        state, _ = step(state, ids, rng.normal(size=64).astype(np.float32))
    assert step._cache_size() <= 3


@pytest.mark.devices(8)
def test_arrays_of_every_kind():
    """NumPy's, JAX's, lists of js.batches, int64, on another CPU device: the same step."""
    wanted, _ = js.jit(STEP)(copied(create(ADAM)), *batch())
    ids, y = draw_ids(12, 4), normal(12)
    start = copied(create(ADAM))
    wanted, _ = js.jit(STEP)(copied(start), ids, y)
    step = js.jit(STEP)
    compare("NumPy", step(copied(start), np.asarray(ids), np.asarray(y))[0], wanted, 0)
    compare("int64", step(copied(start), np.asarray(ids, np.int64), np.asarray(y))[0], wanted, 0)
    there = jax.devices()[3]
    state, _ = step(jax.device_put(copied(start), there), jax.device_put(ids, there), jax.device_put(y, there))
    assert all(x.devices() == {there} for x in jax.tree.leaves(state))
    compare("another device", state, wanted, 0)
    state, _ = step(jax.device_put(copied(start), there), np.asarray(ids), np.asarray(y))
    compare("state elsewhere", state, wanted, 0)


def test_batches_of_js_batches_are_their_arrays():
    ids = np.asarray(draw_ids(40, 4))
    step = js.jit(of_loss(lambda p, b: js.weighted_mean((p["t"][b.x].sum((1, 2)) - b.y) ** 2, b.weight)))
    dense = jax.jit(of_loss(lambda p, b: js.weighted_mean((p["t"][b.x].sum((1, 2)) - b.y) ** 2, b.weight)))
    state, wanted = copied(create(ADAM)), create(ADAM)
    for one in js.batches(ids, np.arange(40.0), batch_size=16, shuffle=True):
        state, _ = step(state, one)
        new, _ = dense(wanted, one)
        wanted = put_back(new, wanted, {"t": one.x})
    compare("batches", state.params["t"], wanted.params["t"], 1e-4)
    assert len(step._programs) == 1


class Pair(NamedTuple):
    params: dict
    slots: tuple


STATES = {
    "a tuple": lambda p, o: (p, o),
    "a NamedTuple": Pair,
    "a dict with None": lambda p, o: {"params": p, "slots": o, "nothing": None},
}


@pytest.mark.parametrize("name", slow_but(["a tuple"], STATES))
@pytest.mark.parametrize("with_loss", slow_but([True], [True, False]), ids=["with a loss", "alone"])
def test_states(name, with_loss):
    def step(state, ids, y):
        p, o = (state["params"], state["slots"]) if isinstance(state, dict) else state
        loss, g = jax.value_and_grad(lambda p: jnp.mean(p["t"][ids].sum((1, 2)) * y))(p)
        u, o = ADAM.update(g, o, p)
        new = STATES[name](optax.apply_updates(p, u), o)
        return (new, loss) if with_loss else new

    arrays = batch()
    start = STATES[name](P0, ADAM.init(P0))
    got, want = js.jit(step)(copied(start), *arrays), jax.jit(step)(start, *arrays)
    compare(name, got, want, 1e-6)  # from zero slots, rows that are not read do not move in either


def test_several_arguments_are_state():
    @functools.partial(js.jit, donate_argnums=(1, 2))
    def step(ids, params, slots, *, scale):
        g = jax.grad(lambda p: scale * jnp.sum(p["t"][ids] ** 2))(params)
        u, slots = ADAM.update(g, slots, params)
        return {"scale": scale}, optax.apply_updates(params, u), slots

    params, slots = copied(P0), copied(ADAM.init(P0))
    ids = draw_ids(5)
    extra, new, _ = step(ids, params, slots, scale=2.0)
    moved = np.flatnonzero(np.any(np.asarray(new["t"] != P0["t"]), axis=1))
    assert moved.tolist() == sorted(set(np.asarray(ids).tolist())) and extra["scale"] == 2.0
    assert params["t"].is_deleted() and jax.tree.leaves(slots)[1].is_deleted()


def test_static_arguments():
    traced = []

    @functools.partial(js.jit, static_argnames=("double", "power"), static_argnums=3)
    def step(state, ids, double, name, power=2):
        traced.append((double, name, power))
        loss = lambda t: jnp.sum(t[ids] ** power) * (2 if double else 1)  # noqa: E731
        value, g = jax.value_and_grad(loss)(state["t"])
        return {"t": state["t"] - 0.1 * g}, value

    table = {"t": jnp.full((5, 1), 2.0)}
    one = float(step(copied(table), jnp.array([1, 1]), False, "a")[1])
    two = float(step(copied(table), jnp.array([1, 1]), double=True, name="a", power=3)[1])
    assert (one, two) == (8.0, 32.0)
    assert float(step(copied(table), jnp.array([1, 3]), False, "a")[1]) == 8.0
    assert len(set(traced)) == 2 and len(traced) == 2


def test_options_alone_make_a_decorator():
    @js.jit(donate_argnums=0)
    def step(state, ids):
        return state - 0.1 * jax.grad(lambda t: jnp.sum(t[ids] ** 2))(state)

    table, ids = jnp.ones((5, 1)), jnp.array([3])
    lowered = lambda t: jnp.zeros(jax.tree.leaves(step.lower(t, ids).out_info)[0].shape)  # noqa: E731
    assert jax.make_jaxpr(lowered)(table).out_avals[0].shape == lowered(table).shape == (5, 1)  # in another trace
    np.testing.assert_allclose(step(table, ids), jnp.ones((5, 1)).at[3].set(0.8))
    assert table.is_deleted()


def test_arguments_that_the_step_does_not_take():
    step = js.jit(lambda state, ids: state - jax.grad(lambda t: jnp.sum(t[ids]))(state))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        step(jnp.ones((5, 1)), ids=jnp.array([3]), nope=1)


def test_a_callable_whose_signature_python_does_not_know():
    def step(state, ids):
        return state - jax.grad(lambda t: jnp.sum(t[ids]))(state)

    step.__signature__ = "none"
    np.testing.assert_allclose(js.jit(step)(jnp.ones((5, 1)), jnp.array([3])), jnp.ones((5, 1)).at[3].set(0))


def test_one_buffer_at_several_places_of_the_state():
    """As optax.contrib's schedule_free and others start: no buffer can be donated twice."""
    state = copied(create(optax.contrib.schedule_free_adamw(0.1)))
    state = state.replace(opt_state=state.opt_state._replace(z=state.params))
    new, _ = js.jit(STEP)(state, *batch())
    assert np.all(np.isfinite(np.asarray(new.params["t"])))


@pytest.mark.slow
def test_inside_other_transformations():
    arrays = batch()
    wanted, _ = js.jit(STEP)(copied(create(ADAM)), *arrays)
    inside, _ = jax.jit(js.jit(STEP))(create(ADAM), *arrays)
    compare("jax.jit", inside, wanted, 1e-6)
    scanned, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: js.jit(STEP)(s, *arrays), s, None, length=1))(create(ADAM))
    compare("jax.lax.scan", scanned, wanted, 1e-6)


def test_counters_and_random_keys_of_the_state():
    """The ids of a step may be drawn: the state holds a key, which is split, and negatives are rows that it reads."""

    def step(state, ids):
        key, now = jax.random.split(state["key"])
        drawn = jax.random.randint(now, (6,), 0, V)

        def loss(t):
            return jnp.sum(t[ids] * t[drawn[: ids.shape[0]]]) + jnp.sum(t[drawn] ** 2)

        value, g = jax.value_and_grad(loss)(state["t"])
        return {"t": state["t"] - 0.1 * g, "key": key, "n": state["n"] + 1}, (value, drawn)

    sparse, dense = js.jit(step), jax.jit(step)
    state = {"t": jnp.array(P0["t"]), "key": jax.random.key(0), "n": 0}
    wanted = {"t": P0["t"], "key": jax.random.key(0), "n": 0}
    for n in range(3):
        ids = draw_ids(5)
        state, (value, drawn) = sparse(state, ids)
        wanted, (want, wanted_drawn) = dense(wanted, ids)
        np.testing.assert_array_equal(drawn, wanted_drawn)
        np.testing.assert_allclose(value, want, rtol=1e-4)
        np.testing.assert_allclose(state["t"], wanted["t"], rtol=1e-4, atol=1e-5)
        assert int(state["n"]) == n + 1


def test_lower_tells_what_runs():
    state = create(ADAM)
    ids, y = batch()
    step = js.jit(STEP)
    assert "scatter" in step.lower(state, ids, y).as_text()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (state, ids, y))
    memory = compiled_by_default(step.lower(*abstract)).memory_analysis()
    assert memory.alias_size_in_bytes > 3 * V * D * 4
    assert step.__name__ == STEP.__name__


@given(
    hnp.arrays(np.int32, 30, elements=st.integers(-8, 17)),
    hnp.arrays(np.int32, 7, elements=st.integers(-8, 17)),
    st.booleans(),
    st.booleans(),
)
def test_rows_that_the_host_chooses(a, b, clip_a, clip_b):
    num_rows = 10
    unique, outside = _distinct([a, b], num_rows, [clip_a, clip_b])
    named = [
        np.clip(x, 0, num_rows - 1) if clip else x[(x >= 0) & (x < num_rows)] for x, clip in ((a, clip_a), (b, clip_b))
    ]
    np.testing.assert_array_equal(unique, np.unique(np.concatenate(named)))
    assert outside == bool(np.any((a < 0) | (a >= num_rows)) or np.any((b < 0) | (b >= num_rows)))
    scratch = np.full(num_rows, -1, np.int32)
    scratch[unique] = np.arange(len(unique))
    at = _look_up(scratch, a, 99, num_rows if outside else None, clip_a)
    for i, place in zip((np.clip(a, 0, num_rows - 1) if clip_a else a).tolist(), at.tolist(), strict=True):
        assert unique[place] == i if 0 <= i < num_rows else place == 99


@pytest.mark.cpu("a GPU sorts ids in the program, for any number of distinct ones")
@pytest.mark.parametrize("abstract", [False, True])
def test_what_lower_compiles_is_called_like_the_step(abstract):
    """With as many rows as it was compiled for, and no more."""
    step, tx = js.jit(STEP), optax.adam(0.1)
    few = draw_ids(12, 4) % 9, normal(12)
    want, wanted = step(copied(create(tx)), *few)
    args = (create(tx), *few)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args) if abstract else args
    program = step.lower(*args).compile()
    got, value = program(copied(create(tx)), *few)
    compare("state", (got, value), (want, wanted), 1e-6)
    many = jnp.arange(48).reshape(12, 4), normal(12)
    if abstract:
        compare("many", program(copied(create(tx)), *many), step(copied(create(tx)), *many), 1e-6)
    else:
        with pytest.raises(ValueError, match=r"'batch'.*distinct rows.*compiled for.*48"):
            program(copied(create(tx)), *many)


def test_explain_a_step():
    state = create(optax.adam(0.1))
    said = js.explain(js.jit(STEP))(state, *batch())
    lines = str(said).splitlines()
    assert said[".params['t']"].rows_read == 48 and said[".params['b']"].rows_read == 12
    assert ".params['t']  row-sparse: 1 read of 48 of 57 rows at" in lines[2]
    assert (
        ".opt_state[0].mu['t']  row-sparse: by the rows of .params['t']. Rows that are not read are left alone."
        in lines
    )
    assert ".opt_state[0].mu['w']  dense: not read by rows" in lines
    assert len(lines) == len(jax.tree.leaves(state))
    empty = js.explain(js.jit(of_loss(lambda p, ids: jnp.sum(p["t"][ids]))))(state, jnp.zeros(0, jnp.int32))
    assert empty[".params['t']"].row_sparse and empty[".params['t']"].rows_read == 0


def test_several_threads():
    """Each with a state of its own, as under jax.jit."""
    step, rows = js.jit(STEP), {"t": jnp.zeros((3000, D)), "b": jnp.zeros(3000), "w": P0["w"]}
    rng = np.random.default_rng(0)
    batches = [[(rng.integers(0, 3000, (400, 5)), rng.normal(size=400)) for _ in range(6)] for _ in range(3)]

    def train(arrays):
        state = copied(create(ADAM, rows))
        for ids, y in arrays:
            state, _ = step(state, ids.astype(np.int32), y.astype(np.float32))
        return state

    wanted = [train(arrays) for arrays in batches]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for state, want in zip(pool.map(train, batches), wanted, strict=True):
            compare("thread", state, want, 1e-6)


@pytest.mark.slow
def test_the_same_step_on_one_device_after_another():
    rows = {"t": jnp.zeros((9000, D)), "b": jnp.zeros(9000), "w": P0["w"]}
    step = js.jit(STEP)
    for device in (jax.devices()[1], jax.devices()[0], None):
        state = copied(create(ADAM, rows))
        arrays = draw_ids(1200, 4), normal(1200)
        if device is not None:
            state, arrays = jax.device_put(state, device), jax.device_put(arrays, device)
        state, _ = step(state, *arrays)
        assert state.params["t"].devices() == {device or jax.devices()[0]}


def test_settings_of_jax_are_those_of_the_call():
    step = js.jit(lambda t, ids: (t - jax.grad(lambda t: jnp.sum(t[ids]))(t), jnp.arange(3)))
    ids = jnp.array([1])
    assert step(jnp.zeros((V, D)), ids)[1].dtype == jnp.int32
    with jax.enable_x64(True):
        assert step(jnp.zeros((V, D), jnp.float32), ids)[1].dtype == jnp.int64


def test_a_copy_of_a_step():
    step = js.jit(STEP)
    step(copied(create(ADAM)), *batch())
    again = copy.deepcopy(step)
    assert again._cache_size() == 0
    again(copied(create(ADAM)), *batch())


# ---------------------------------------------------------------------------------------------------------------------
# what is large is updated so many rows at a time


def averaged(state, ids):
    """A state with averages of the parameters, as in many programs."""
    params, opt_state, average = state
    loss, gradient = jax.value_and_grad(lambda p: jnp.mean(jnp.tanh(p["t"][ids]) @ p["w"]) + p["b"][ids].sum())(params)
    updates, opt_state = PIECES["adam, clipped"].update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: (0.9 * a + 0.1 * p).astype(a.dtype), average, params)
    return (params, opt_state, average), loss


def plain(tx):
    def step(state, ids):
        params, opt_state, average = state
        loss, gradient = jax.value_and_grad(
            lambda p: jnp.mean(jnp.tanh(p["t"][ids]).astype(jnp.float32) @ p["w"]) + p["b"][ids].sum()
        )(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, average), loss

    return step


PIECES = {
    "adam, clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
    "sgd": optax.sgd(0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adagrad(0.1), 3),
    "factored by row": optax.chain(
        optax.stateless(lambda u, p: jax.tree.map(lambda g: g / (1 + jnp.sum(g**2, -1, keepdims=True)), u)),
        optax.sgd(0.1, momentum=0.9),
    ),
    "replay": js.lazy_adamw(0.1, weight_decay=0.1, untouched="replay"),
}
STEPS = {name: (plain(tx), tx) for name, tx in PIECES.items()}
STEPS["averages"] = averaged, PIECES["adam, clipped"]


IN_PIECES = [*((name, jnp.float32) for name in STEPS), ("adam, clipped", jnp.bfloat16)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), slow_but([("sgd", jnp.float32)], IN_PIECES))
def test_in_pieces(name, dtype, monkeypatch):
    """The same as at once, whatever part of the block is rows."""
    rng = np.random.default_rng(0)
    t = jnp.asarray(rng.normal(size=(2000, 4)), dtype)
    params = {"t": t, "b": jnp.ones(2000), "w": jnp.ones(4)}
    step, tx = STEPS[name]
    batches = [rng.integers(0, high, (100, 5)).astype(np.int32) for high in (2000, 257, 1)]
    results, loops = [], []
    for piece in (0, 1 << 18):
        monkeypatch.setattr(pieces, "_PIECE", piece)
        program = js.jit(step)
        state = copied((params, tx.init(params), params if name == "averages" else None))
        losses = []
        for ids in batches:
            state, loss = program(state, ids)
            losses.append(loss)
        loops.append(program.lower(state, batches[0]).as_text().count("stablehlo.while"))
        results.append((state, jnp.stack(losses)))
    assert loops[0] > loops[1]
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(
                *(np.asarray(z, np.float32) for z in (x, y)), rtol=tolerance, atol=tolerance / 10
            )
        else:
            assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), x, y))
    left_alone = np.setdiff1d(np.arange(2000), np.concatenate([b.ravel() for b in batches]))
    assert name == "replay" or np.array_equal(results[0][0][0]["t"][left_alone], t[left_alone])


# ---------------------------------------------------------------------------------------------------------------------
# which arguments are state


def read_loss(table, ids):
    return jnp.sum(table[ids] ** 2)


def new_state(table, slots, ids):
    updates, slots = ADAM.update(jax.grad(read_loss)(table, ids), slots, table)
    return optax.apply_updates(table, updates), slots


# how a step is written: what it takes and returns of table and slots
ORDERS = {
    "(p, o) -> p, o": new_state,
    "(o, p) -> p, o": lambda o, p, ids: new_state(p, o, ids),
    "(o, p) -> loss, o, p": lambda o, p, ids: (read_loss(p, ids), *new_state(p, o, ids)[::-1]),
    "(key, p, o) -> (p, o), key": lambda key, p, o, ids: (new_state(p, o, ids), key),
    "(p, o) -> {p, o}": lambda p, o, ids: dict(zip("po", new_state(p, o, ids), strict=True)),
    "(None, o, p) -> o, p, None": lambda none, o, p, ids: (*new_state(p, o, ids)[::-1], none),
}
QUICK_ORDERS = ["(p, o) -> p, o", "(o, p) -> loss, o, p", "(key, p, o) -> (p, o), key", "(p, o) -> {p, o}"]


@pytest.mark.parametrize("donate", slow_but([False], [False, True]))
@pytest.mark.parametrize("order", slow_but(QUICK_ORDERS, ORDERS))
def test_states_in_any_order(order, donate):
    given = {"p": jnp.ones((50, 2)), "key": jax.random.key(0), "None": None}
    given["o"] = ADAM.init(given["p"])
    names = order[1 : order.index(")")].split(", ")
    args = [copied(given[name]) for name in names]
    states = [n for n, name in enumerate(names) if name != "key"] if donate else None
    step = js.jit(ORDERS[order], donate_argnums=states)
    ids = np.array([3, 1, 3])
    plan = step.plan(*args, ids)
    assert len(plan.leaves) == 3
    out = step(*args, ids)
    want, slots = new_state(given["p"], given["o"], ids)
    got = [x for x in jax.tree.leaves(out) if x.shape == (50, 2)]
    for x in got:
        assert min(float(jnp.max(jnp.abs(x - y))) for y in (want, slots[0].mu, slots[0].nu)) < 1e-6
    assert len(got) == 3 and all(x.is_deleted() for x in jax.tree.leaves([args[names.index(n)] for n in "po"]))


def test_a_batch_that_comes_back_is_no_state():
    step = js.jit(lambda p, o, batch: (*new_state(p, o, batch["ids"]), batch, batch["y"]))
    batch = {"ids": jnp.array([1, 2]), "y": jnp.ones(7)}
    table = jnp.ones((50, 2))
    step(table, ADAM.init(table), batch)
    assert table.is_deleted() and not batch["y"].is_deleted() and not batch["ids"].is_deleted()


def test_state_by_name():
    step = js.jit(new_state)
    table = jnp.ones((50, 2))
    got, _ = step(ids=np.array([3]), slots=ADAM.init(table), table=copied(table))
    np.testing.assert_allclose(got, new_state(table, ADAM.init(table), np.array([3]))[0], rtol=1e-6)


def test_a_gradient_is_no_state():
    """It has the structure of its parameters: it must not be written into them."""
    gradient = jax.value_and_grad(read_loss)
    table = jnp.ones((50, 2))
    with pytest.warns(UserWarning, match="no argument comes back as an output"):
        _, got = js.jit(gradient)(table, np.array([3, 3]))
    np.testing.assert_array_equal(got, jax.grad(read_loss)(table, np.array([3, 3])))
    assert not table.is_deleted()
    with pytest.raises(
        ValueError, match=r"its gradient, or what is not made of its rows, in the place of the table.*jax\.jit"
    ):
        js.jit(gradient, donate_argnums=0)(table, np.array([3]))


def announced(table, ids):
    return table.at[ids].add(1.0) + 0 * table.sum(), {"loss": 0.0}  # dense, and said so


def by_lazy(table):
    gradient = js.RowSparse(jnp.array([3]), jnp.ones((1, 2)), (50, 2))
    tx = js.lazy(optax.stateless(lambda u, p: u + 0 * jnp.sum(p)))
    return tx.update(gradient, tx.init(table), table)[0].rows  # js.lazy


THREE = np.array([3])
CALLS = {
    "js.jit": lambda table: js.jit(announced)(table, THREE),  # js.jit
    "lower": lambda table: js.jit(announced).lower(table, THREE),  # lower
    "js.rowwise": lambda table: jax.jit(js.rowwise(announced))(table, THREE),  # js.rowwise
    "js.fit": lambda table: js.fit(js.jit(announced), table, [THREE], progress=False),  # js.fit
    "js.lazy": by_lazy,
    "js.lazy in jit": jax.jit(by_lazy),
}


@pytest.mark.parametrize("name", CALLS)
def test_warnings_are_at_the_users_line(name, monkeypatch):
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    with pytest.warns(UserWarning) as said:
        CALLS[name](jnp.ones((50, 2)))
    line = pathlib.Path(__file__).read_text().splitlines()[said[0].lineno - 1]
    assert said[0].filename == __file__ and line.endswith(f"# {name.removesuffix(' in jit')}")


def test_what_is_no_array():
    """As in an Equinox module, some of whose leaves are functions."""
    state = {"t": jnp.ones((50, 2)), "act": jnp.tanh}
    step = lambda state, ids: state | {"t": 2 * state["t"]}  # noqa: E731
    for call in (js.jit(step), js.rowwise(step), lambda state, ids: js.jit(step)(state, ids=ids)):
        with pytest.raises(
            TypeError, match=r"arrays and numbers\. Got a \w+ at argument \[0\]\['act'\].*static_argnums"
        ):
            call(state, np.array([3]))


def test_two_states_of_one_structure():
    """They are told apart by what their outputs are made of; what cannot be told apart is refused, or not updated."""
    ids, tables = jnp.array([1, 2, 2]), (jnp.arange(64.0).reshape(16, 4) + 1, -jnp.ones((16, 4)))

    def averaged(p, e, ids):
        p = p - 0.1 * jax.grad(read_loss)(p, ids)
        return p, 0.9 * e + 0.1 * p

    def swapped(p, e, ids):
        return averaged(p, e, ids)[::-1]

    def put_back(new, old):
        return jnp.where(np.isin(np.arange(16), ids)[:, None], new, old)

    want = [put_back(new, old) for new, old in zip(averaged(*tables, ids), tables, strict=True)]
    got = js.jit(averaged)(*copied(tables), ids)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), list(got), want)
    with pytest.raises(ValueError, match="output 1, which has a row for each of a table's"):
        js.jit(swapped)(*copied(tables), ids)

    def each_the_other(a, b, ids):
        return b - 0.1 * jax.grad(read_loss)(b, ids), a - 0.1 * jax.grad(read_loss)(a, ids)

    want = [put_back(new, old) for new, old in zip(each_the_other(*tables, ids), tables[::-1], strict=True)]
    got = js.jit(each_the_other)(*copied(tables), ids)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), list(got), want)


def trained_on(p, o, ids, y):
    """A step that returns its predictions, of the shape of its labels and of a bias."""

    def loss(p):
        prediction = p["t"][ids].sum(-1) + p["b"]
        return jnp.mean((prediction - y) ** 2), prediction

    (value, prediction), grads = jax.value_and_grad(loss, has_aux=True)(p)
    updates, o = ADAM.update(grads, o, p)
    return optax.apply_updates(p, updates), o, value, prediction


def test_predictions_are_no_labels():
    p = {"t": jnp.ones((50, 2)), "b": jnp.zeros(16)}
    ids, y = jnp.arange(16) % 5, jnp.arange(16.0)
    for _ in range(2):
        p, _, _, prediction = js.jit(trained_on)(p, ADAM.init(p), ids, y)
    assert prediction.shape == (16,) and not y.is_deleted() and not ids.is_deleted()


def test_predictions_are_no_table():
    """Of as many ids as the table has rows."""
    ids = np.array([1, 2, 2] * 5 + [1])
    with pytest.warns(UserWarning, match="no argument comes back as an output"):
        for table in (jnp.arange(64.0).reshape(16, 4), {"t": jnp.arange(64.0).reshape(16, 4)}):
            got = js.jit(lambda t, ids: jax.tree.map(lambda t: t[ids] * 2, t))(table, ids)
            jax.tree.map(lambda got, t: np.testing.assert_array_equal(got, t[ids] * 2), got, table)
            assert not any(x.is_deleted() for x in jax.tree.leaves(table))


def test_metrics_are_no_state():
    """An array before the state, of which there is as much as of what comes back first."""

    def step(x, ids, p, o):
        return jnp.mean(x), *new_state(p, o, ids)

    x, table = jnp.ones(3), jnp.ones((50, 2))
    program = js.jit(step)
    assert len(program.plan(x, jnp.array([1]), table, ADAM.init(table)).leaves) == 3
    program(x, jnp.array([1]), table, ADAM.init(table))
    assert table.is_deleted() and not x.is_deleted()


def test_numbers_among_the_operands_of_a_block():
    """An optimizer's rate may be a number of Python's: what is not an array is not waited for, and is used as it is."""
    ids, rows = jnp.array([0, 2, 4]), jnp.ones((3, 2))
    later = pieces.DeferredBlock(ids, [rows, 0.5], lambda part, x, rate: x * rate, rows.shape, rows.dtype)
    assert all(x is rows for x in pieces.arrays_in([later, rows]))
    np.testing.assert_array_equal(later.block(), rows / 2)


def test_an_array_of_the_state_may_be_in_another_argument():
    """A target network starts as a copy, whose arrays are those of the state."""
    table, ids = jnp.ones((V, D)), jnp.array([1, 2])

    def step(table, target, ids):
        return table - jax.grad(lambda t: jnp.sum(t[ids] * target[ids] * 2))(table)

    np.testing.assert_array_equal(js.jit(step)(jnp.copy(table), table, ids), jax.jit(step)(table, table, ids))
    shared = jnp.copy(table)
    np.testing.assert_array_equal(js.jit(step)(shared, shared, ids), jax.jit(step)(table, table, ids))
    np.testing.assert_array_equal(shared, table)  # and it is there


@pytest.mark.parametrize("clipped", [False, True])
def test_a_first_batch_that_names_no_row(clipped):
    """All of it is padding, or moved into the table."""
    mode = "clip" if clipped else "fill"
    step = js.jit(lambda t, ids: t - jax.grad(lambda t: jnp.sum(t.at[ids].get(mode=mode, fill_value=0)))(t))
    got = step(jnp.zeros((5, 2)), np.array([7, -9, 5]))
    np.testing.assert_array_equal(got[:, 0], [-1, 0, 0, 0, -2] if clipped else np.zeros(5))


def scaled(state, ids):
    """Flax's loss scaling, as in its examples: where a gradient is not finite, nothing changes but the scale."""
    table, opt_state, scale = state
    scale, finite, loss, grads = scale.value_and_grad(lambda t: jnp.sum((t[ids] * 3).astype(jnp.float32)))(table)
    updates, new = ADAM.update(grads, opt_state, table)
    chosen = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (optax.apply_updates(table, updates), new), (table, opt_state)
    )
    return (*chosen, scale), loss


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_loss_scaling(dtype):
    ids, table = np.array([2, 5, 2]), jnp.ones((16, 4), dtype)
    start = table, ADAM.init(table.astype(jnp.float32)), DynamicScale(scale=jnp.float32(256.0))
    state, loss = js.jit(scaled)(copied(start), ids)
    want, want_loss = jax.jit(scaled)(start, ids)
    jax.tree.map(np.testing.assert_array_equal, (state, loss), (want, want_loss))
    assert (np.asarray(state[0] != 1).any(1).nonzero()[0] == [2, 5]).all()
    state = state[0], state[1], state[2].replace(scale=jnp.float32(3e38))  # three times that is infinite
    after, _ = js.jit(scaled)(copied(state), ids)
    jax.tree.map(np.testing.assert_array_equal, after[:2], state[:2])
    assert after[2].scale == jnp.float32(1.5e38)


def test_a_slot_that_comes_back_in_another_dtype():
    """Gradients of DynamicScale are float32, and moments made for a table of 16 bits become so."""
    table = jnp.ones((16, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"mu, which is bfloat16 and comes back as float32.*Cast gradients"):
        js.jit(scaled)((table, ADAM.init(table), DynamicScale()), np.array([1]))
