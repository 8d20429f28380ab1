"""The average of parameters: in every row that of the dense formula, though a step costs the rows that it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import jaxsparse as js
from tests.devices import mesh_of
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but

V, D, DECAY, STEPS = 30, 3, 0.9, 20
RNG = np.random.default_rng(0)
IDS = RNG.zipf(1.6, (STEPS, 4)) % V
IDS[7, 0] = IDS[18, 0] = V - 1  # a row that is read twice, far apart; most are read once, or not at all
INNERS = {
    "sgd": lambda: optax.sgd(0.1),
    "adam": lambda: optax.adam(0.1),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
}
ROADS = {
    "jit": js.jit,
    "rowwise": lambda step: jax.jit(js.rowwise(step)),
    "lazy": lambda step: jax.jit(step, donate_argnums=0),
    "dense": jax.jit,
}


def new_params(dtype=jnp.float32, num_rows=V):
    rng = np.random.default_rng(1)
    shapes = {"t": (num_rows, D), "bias": (num_rows,), "w": (D,), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def loss_fn(params, ids):
    t, bias, w, scale = (params[name].astype(jnp.float32) for name in ("t", "bias", "w", "scale"))
    return jnp.mean((scale * (t[ids] @ w) + bias[ids] - 1) ** 2)


def step_of(tx, grad=jax.grad, loss_fn=loss_fn, after=lambda params: params):
    def step(state, ids):
        params, opt_state = state
        updates, opt_state = tx.update(grad(loss_fn)(params, ids), opt_state, params)
        return after(optax.apply_updates(params, updates)), opt_state

    return step


def made(road, tx, **kwargs):
    """The step on a road."""
    return ROADS[road](step_of(js.lazy(tx), js.grad, **kwargs) if road == "lazy" else step_of(tx, **kwargs))


def exactly(tree):
    return jax.tree.map(np.float64, tree)


def follow(step, tx, params, ids=IDS, debias=False):
    """Takes steps, and holds the average after each against the dense one in float64, of the parameters as they were.

    Returns the last state.
    """
    want = jax.tree.map(lambda p: 0 * p if debias else p, exactly(params))
    state = params, tx.init(params)
    assert_close(js.ema_params(state[1], state[0]), exactly(params))
    for count, batch in enumerate(ids, 1):
        state = step(state, jnp.asarray(batch))
        want = jax.tree.map(lambda e, p: DECAY * e + (1 - DECAY) * np.float64(p), want, state[0])
        total = 1 - DECAY**count if debias else 1
        assert_close(js.ema_params(state[1], state[0]), jax.tree.map(lambda e: e / total, want))  # noqa: B023
    return state


def assert_close(got, want):
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.parametrize("inner", slow_but(["clip"], INNERS))
@pytest.mark.parametrize("road", slow_but(["jit"], ROADS))
def test_the_average_is_the_dense_one(road, inner):
    tx = js.params_ema(INNERS[inner](), DECAY)
    params, opt_state = follow(made(road, tx), tx, new_params())
    stamps = np.asarray(opt_state.stamps["t"])
    last = np.array([max(np.flatnonzero((row == IDS).any(1)), default=0) for row in range(V)])
    np.testing.assert_array_equal(stamps, STEPS - 1 if road == "dense" else last)
    assert (np.asarray(opt_state.stamps["w"]) == STEPS - 1).all() and opt_state.stamps["scale"] == STEPS - 1
    plain = made(road, INNERS[inner]())  # which makes the same parameters
    want = new_params(), INNERS[inner]().init(new_params())
    for ids in IDS:
        want = plain(want, jnp.asarray(ids))
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state.inner_state), want)


@pytest.mark.slow
@pytest.mark.parametrize("road", ["jit", "lazy"])
def test_debias_leaves_the_initial_parameters_out(road):
    tx = js.params_ema(INNERS["adam"](), DECAY, debias=True)
    follow(made(road, tx), tx, new_params(), debias=True)


@pytest.mark.slow
@pytest.mark.parametrize("road", slow_but(["jit"], ["jit", "lazy", "dense"]))
def test_parameters_of_16_bits_have_an_average_of_32(road):
    """Of what they are, rounded as they are."""
    tx = js.params_ema(js.stochastic_rounding(INNERS["adam"]()), DECAY)
    follow(made(road, tx), tx, new_params(jnp.bfloat16))


@pytest.mark.parametrize("road", ["jit", "dense"])
def test_what_a_step_does_behind_the_update_is_in_the_average(road):
    tx = js.params_ema(INNERS["sgd"](), DECAY)
    project = lambda params: jax.tree.map(lambda p: jnp.clip(p, -0.5, 0.5), params)  # noqa: E731
    start = project(new_params())
    follow(made(road, tx, after=project), tx, start, IDS[:8])


def test_a_table_that_is_read_as_a_whole_too():
    """All of its rows are up to date after each step, and the other's are not."""

    def loss(params, ids):
        return loss_fn(params, ids) + 0.01 * jnp.sum(jnp.tanh(params["t"] @ params["t"].T))

    tx = js.params_ema(INNERS["sgd"](), DECAY)
    with pytest.warns(UserWarning, match=r"'t'\] is dense, with its slots"):
        _, opt_state = follow(made("jit", tx, loss_fn=loss), tx, new_params(), IDS[:6])
    assert (opt_state.stamps["t"] == 5).all() and not opt_state.stamps["bias"].all()


def test_a_decay_near_one_for_many_steps():
    """1 - decay^k, to float32's last bits: a row that is not read for a million steps."""
    decay, many = 1 - 1e-6, 10**6
    for debias, start in ((False, 1.0), (True, 0.0)):
        tx = js.params_ema(optax.sgd(0.1), decay, debias=debias)
        state = tx.init(jnp.ones((2, 1)))
        for count in (1, 1000, many):
            got = js.ema_params(state.replace(count=jnp.int32(count)), 3 * jnp.ones((2, 1)))
            want = 3 if debias else 3 + decay**count * (start - 3)
            np.testing.assert_allclose(got - 1, np.full((2, 1), want - 1), rtol=1e-6, atol=2e-7)


@pytest.mark.slow
@pytest.mark.parametrize("road", ["jit", "lazy"])
def test_nothing_as_large_as_a_table(road):
    tx, params = js.params_ema(INNERS["clip"](), DECAY), new_params(num_rows=50_000)
    lowered = made(road, tx).lower((params, tx.init(params)), jnp.arange(12))
    assert "50000x3xf32" in lowered.as_text()
    assert not large_arrays(compiled_by_default(lowered).as_text(), 50_000)


def test_reading_changes_nothing():
    """And the state may be anywhere in that of an optimizer."""
    tx = optax.chain(js.params_ema(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), DECAY), optax.identity())
    state = TrainState.create(apply_fn=None, params=new_params(), tx=tx)
    before = exactly((state.params, state.opt_state))
    average = js.ema_params(state.opt_state, state.params)
    assert not {x.unsafe_buffer_pointer() for x in jax.tree.leaves(average)} & {
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.params)
    }
    jax.tree.map(np.testing.assert_array_equal, exactly((state.params, state.opt_state)), before)
    jax.tree.map(np.testing.assert_array_equal, average, state.params)


@pytest.mark.slow
def test_modules_of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, rngs=rngs)

    model = Model(nnx.Rngs(0))
    graph = nnx.graphdef(model)
    optimizer = nnx.Optimizer(model, js.lazy(js.params_ema(optax.sgd(0.1), DECAY)), wrt=nnx.Param)
    want = np.float64(model.embed.embedding[...])
    for ids in IDS[:4]:
        grad = js.grad(lambda params, ids: jnp.sum(nnx.merge(graph, params, copy=True).embed(ids) ** 2))
        optimizer.update(model, grad(nnx.state(model, nnx.Param), jnp.asarray(ids)))
        want = DECAY * want + (1 - DECAY) * np.float64(model.embed.embedding[...])
    average = nnx.merge(graph, js.ema_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(average.embed.embedding[...], want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("debias", slow_but([True], [False, True]))
def test_rows_come_and_go(debias):
    """A run whose table grows and is put into another order, against the one that had its rows from the start."""
    tx, more = js.params_ema(INNERS["adam"](), DECAY, debias=debias), V + 10
    step, order = made("jit", tx), np.random.default_rng(2).permutation(more)

    def end(params, change):
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        state = follow_on(step, (state.params, state.opt_state), IDS[:6])
        params, opt_state = follow_on(step, change(state), np.argsort(order)[IDS[6:12] + 10])
        return js.ema_params(opt_state, params)

    def grown(state):
        for name in ("t", "bias"):
            state = js.grow(state, f"['{name}']", more, init=whole[name][V:], tx=tx)
        return in_order(state)

    def in_order(state):
        for name in ("t", "bias"):
            state = js.remap(state, f"['{name}']", order, tx=tx)
        return state

    whole = new_params(num_rows=more)
    short = whole | {name: whole[name][:V] for name in ("t", "bias")}
    got, want = end(jax.tree.map(jnp.array, short), grown), end(jax.tree.map(jnp.array, whole), in_order)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)
    assert not np.allclose(got["t"], whole["t"][order], atol=1e-2)


@pytest.mark.slow
def test_the_average_of_a_split_table_is_split():
    mesh = mesh_of((2,), ("rows",))
    tx = js.lazy(js.params_ema(INNERS["clip"](), DECAY))
    step, averages = js.make_train_step(loss_fn), []
    for split in (False, True):
        state = TrainState.create(apply_fn=None, params=new_params(), tx=tx)
        if split:
            state = js.shard_rows(state, mesh, tables=["'t'", "bias"], axis="rows")
            ema, stamps = state.opt_state.ema, state.opt_state.stamps
            assert {x.sharding.spec for x in (ema["t"], ema["bias"], stamps["t"])} == {PartitionSpec("rows")}
        for ids in IDS[:6]:
            state, _ = step(state, jnp.asarray(ids))
        averages.append(js.ema_params(state.opt_state, state.params))
    assert averages[1]["t"].sharding.spec[0] == "rows"
    assert_close(averages[1], averages[0])


def follow_on(step, state, ids):
    for batch in ids:
        state = step(state, jnp.asarray(batch))
    return state


@pytest.mark.slow
def test_under_pmap():
    """Two devices, each with half of the examples, and one with all: the same average."""
    params, tx = new_params(), js.lazy(js.params_ema(optax.adam(0.1), DECAY))
    one = TrainState.create(apply_fn=None, params=params, tx=tx)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    step = js.make_train_step(loss_fn)
    split = jax.pmap(js.make_train_step(loss_fn, axis_name="data", jit=False), axis_name="data")
    for batch in IDS[6:9]:
        one, two = step(one, batch)[0], split(two, batch.reshape(2, 2))[0]
    want = js.ema_params(one.opt_state, one.params)
    for device in range(2):
        state = jax.tree.map(lambda x: x[device], two)  # noqa: B023
        assert_close(js.ema_params(state.opt_state, state.params), want)


@pytest.mark.slow
def test_inside_of_partition():
    """The average of one label; parameters of another are as they are."""
    labels = {"t": "averaged", "bias": "averaged", "w": "not", "scale": "not"}
    averaged = js.params_ema(optax.adam(0.1), DECAY)
    params, want = new_params(), exactly(new_params())
    tx = js.lazy(optax.partition({"averaged": averaged, "not": optax.sgd(0.1)}, labels))
    outside = optax.partition({"averaged": js.lazy(averaged), "not": optax.sgd(0.1)}, labels)
    step = made("jit", tx)
    by_hand = jax.jit(step_of(outside, js.grad))
    state = params, tx.init(params)
    other = jax.tree.map(jnp.copy, params), outside.init(params)
    for batch in IDS[6:9]:
        state, other = step(state, batch), by_hand(other, jnp.asarray(batch))
        want = {k: DECAY * want[k] + (1 - DECAY) * np.float64(p) if k in "t bias" else p for k, p in state[0].items()}
    for got in (state, other):
        assert_close(js.ema_params(got[1], got[0]), want)


def test_errors():
    params = new_params()
    tx = js.params_ema(optax.sgd(0.1), DECAY)
    opt_state = tx.init(params)
    with pytest.raises(TypeError, match=r"'inner' argument of js\.params_ema must be an optax transformation"):
        js.params_ema(0.1, DECAY)
    with pytest.raises(TypeError, match=r"'decay'.*a Python number.*list it in static_args"):
        js.params_ema(optax.sgd(0.1), jnp.float32(0.9))
    for decay in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"'decay'.*between 0 and 1. Got"):
            js.params_ema(optax.sgd(0.1), decay)
    with pytest.raises(ValueError, match=r"'params' argument of js\.params_ema.*Pass params"):
        tx.update(params, opt_state)
    grads = js.grad(loss_fn)(params, jnp.array([3]))
    with pytest.raises(TypeError, match=r"Put it inside: js\.lazy\(js\.params_ema"):
        js.params_ema(js.lazy_sgd(0.1), DECAY).update(grads, opt_state, params)
    replaying = js.lazy_sgd(0.1, 0.9, untouched="replay")
    with pytest.raises(ValueError, match=r"'inner'.*leaves skipped rows alone.*Use untouched='freeze', or"):
        js.params_ema(optax.chain(replaying), DECAY).init(params)
    with pytest.raises(ValueError, match=r"'opt_state'.*leaves skipped rows alone.*Use untouched='freeze', or"):
        js.ema_params((opt_state, replaying.init(params)), params)
    for none_or_two in (optax.sgd(0.1).init(params), (opt_state, opt_state)):
        with pytest.raises(TypeError, match=r"'opt_state'.*one with one js\.params_ema. Got [02] of them"):
            js.ema_params(none_or_two, params)
    with pytest.raises(ValueError, match=r"'params' argument of js\.ema_params.*Pass all parameters"):
        js.ema_params(opt_state, {"t": params["t"]})
    with pytest.raises(ValueError, match=r"'params' argument of js\.params_ema.*Pass all parameters"):
        tx.update(params, opt_state, params | {"t": params["t"][1:]})
