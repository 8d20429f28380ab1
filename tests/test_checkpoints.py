"""A run that is saved at any moment, loaded into a fresh state, and goes on, is the run that was not: bit for bit."""

import functools
import signal

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.optim.replaying import replay_states
from tests.devices import mesh_of
from tests.marks import slow_but

V, D, STEPS, AT = 30, 3, 6, 3
SCHEDULE = optax.cosine_decay_schedule(0.1, 20)
CLIP = optax.clip_by_global_norm(1.0)
RNG = np.random.default_rng(0)
IDS, Y = RNG.zipf(1.3, (STEPS * 8, 4)) % V, RNG.normal(size=STEPS * 8).astype(np.float32)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)


def new_params():
    """Nested as linen has them, because names of parameters are joined from keys; and a name with a slash."""
    return {
        "params": {"Embed_0": {"embedding": jnp.array(TABLE)}, "wide/deep": jnp.array(TABLE[:, 0])},
        "head": jnp.ones(D),
    }


def loss_fn(params, batch):
    rows = params["params"]["Embed_0"]["embedding"][batch.x].sum(1) @ params["head"]
    wide = params["params"]["wide/deep"][batch.x[:, 0]]
    return js.weighted_mean((rows + wide - batch.y) ** 2, batch.weight)


def stock(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}


def two_words(state, batch):
    loss, grads = js.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}


LABELS = {"params": {"Embed_0": "rows", "wide/deep": "rest"}, "head": "rest"}
ANEW = ("jit, adamw", "jit, replay", "replay adamw")  # whose step is another one after loading, as in another process
MADE = lambda: js.make_train_step(loss_fn)  # noqa: E731
CASES = {
    "jit, adamw": (lambda: js.jit(stock), lambda: optax.chain(CLIP, optax.adamw(SCHEDULE))),
    "jit, injected": (lambda: js.jit(stock), lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE)),
    "jit, average": (lambda: js.jit(stock), lambda: js.params_ema(optax.adam(SCHEDULE), 0.9)),
    "lazy": (lambda: jax.jit(two_words, donate_argnums=0), lambda: js.lazy(optax.chain(CLIP, optax.adam(0.1)))),
    "rowwise adagrad": (MADE, lambda: js.lazy_rowwise_adagrad(0.1, before=CLIP)),
    "ftrl": (MADE, lambda: js.lazy_ftrl(0.1)),
    "jit, replay": (lambda: js.jit(stock), lambda: js.lazy_sgd(SCHEDULE, 0.9, untouched="replay")),
    "replay adamw": (MADE, lambda: js.lazy_adamw(SCHEDULE, weight_decay=0.1, untouched="replay", before=CLIP)),
    "replay in groups": (
        MADE,
        lambda: optax.partition(
            {"rows": js.lazy_sgd(0.1, 0.9, untouched="replay"), "rest": js.lazy_rmsprop(0.01, untouched="replay")},
            LABELS,
        ),
    ),
}


@functools.cache
def program(name, process):
    """The step and the optimizer, of which each process has its own."""
    del process
    make, tx = CASES[name]
    return make(), tx()


def start(name, process=0):
    return TrainState.create(apply_fn=None, params=new_params(), tx=program(name, process)[1])


def batches():
    return js.batches(IDS, Y, batch_size=8, shuffle=True, seed=1, num_rows=V)


def by_bytes(state, fresh, path):
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


def by_dictionaries(state, fresh, path):
    saved = jax.tree.map(np.array, flax.serialization.to_state_dict(state))
    return flax.serialization.from_state_dict(fresh, saved)


def by_orbax(state, fresh, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "state", jax.tree.map(jnp.asarray, fresh))


WAYS = {"bytes": by_bytes, "dictionaries": by_dictionaries, "orbax": by_orbax}


@functools.cache
def through(name):
    """The run that is not interrupted: its state after each step, on the host."""
    state, states = start(name), []
    for batch in batches():
        state, _ = program(name, 0)[0](state, batch)
        states.append(jax.tree.map(np.array, state))
    return states


def equal(got, want):
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, x.replace(apply_fn=None, tx=None)) for x in (got, want)))


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize("way", slow_but(["bytes", "dictionaries"], WAYS))
@pytest.mark.parametrize("name", slow_but(["jit, replay"], CASES))
def test_a_state_goes_on_where_it_was_saved(name, way, tmp_path):
    """As a whole TrainState, saved and loaded as it comes."""
    state, want = jax.tree.map(jnp.array, through(name)[AT - 1]), through(name)[-1]
    stamps = [x for part in replay_states(state.opt_state) for x in (part.plain | part.decayed).values()]
    late = [x for x in stamps if x.whole < AT and jnp.min(x.rows) < AT]
    assert ("replay" in name) == bool(late)  # it has rows that are not up to date
    process = int(name in ANEW)
    loaded = WAYS[way](state, start(name, process), tmp_path)
    equal(loaded, state)
    for i, batch in enumerate(batches()):
        if i >= AT:
            loaded, _ = program(name, process)[0](loaded, batch)
    equal(loaded, want)


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize("way", ["bytes", "orbax"])
@pytest.mark.parametrize("name", slow_but(["jit, replay"], ["jit, replay", "lazy"]))
def test_fit_that_was_interrupted_goes_on_in_another_process(name, way, tmp_path):
    """The state that an interrupt gives back, and the position in the data."""
    step, data = program(name, 0)[0], batches()

    def interrupted(state, batch):
        out = step(state, batch)
        if int(out[0].step) == AT + STEPS:
            signal.raise_signal(signal.SIGINT)
        return out

    want, _ = js.fit(step, start(name), batches(), epochs=3, progress=False)
    with pytest.warns(UserWarning, match="interrupted in epoch 2 of 3"):
        state, _ = js.fit(interrupted, start(name), data, epochs=3, progress=False)
    loaded = WAYS[way](state, start(name, process=1), tmp_path)
    again = batches()
    again.state = data.state
    got, _ = js.fit(program(name, 1)[0], loaded, again, epochs=2, progress=False)
    assert int(got.step) == 3 * STEPS
    equal(got, want)


@pytest.mark.slow  # two more programs, on a mesh
def test_a_split_state_comes_back_split(tmp_path):
    name, mesh = "jit, replay", mesh_of((2,), ("rows",))
    step = program(name, 0)[0]
    make = lambda: js.shard_rows(start(name), mesh, tables=["embedding", "wide"], axis="rows")  # noqa: E731
    state, saved = make(), None
    for i, batch in enumerate(batches()):
        if i == AT:
            saved = jax.tree.map(jnp.copy, state)
        state, _ = step(state, batch)
    loaded = by_orbax(saved, make(), tmp_path)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert x.sharding == y.sharding
    for i, batch in enumerate(batches()):
        if i >= AT:
            loaded, _ = step(loaded, batch)
    equal(loaded, state)
