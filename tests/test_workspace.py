"""The buffers that a step keeps from call to call: who uses them, and that nobody can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

import jaxsparse as js

ROWS, DIM, K = 5_000, 32, 2_100  # a block of K rows is 268,800 bytes: large enough to be kept

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators keep memory themselves")


def loss_fn(params, ids):
    return jnp.mean((params["t"][ids] - 1) ** 2)


@functools.cache
def optimizer(skipped):
    return js.lazy_adam(0.1, skipped=skipped)


def start(rows=ROWS, skipped="freeze"):
    params = {"t": jnp.zeros((rows, DIM))}
    return TrainState.create(apply_fn=None, params=params, tx=optimizer(skipped))


@functools.cache
def steps():
    """The step, and the one without buffers."""
    return js.make_train_step(loss_fn), jax.jit(js.make_train_step(loss_fn, jit=False))


@pytest.fixture
def step():
    """A step that has kept nothing yet, compiled for the shapes of earlier tests."""
    steps()[0]._buffers.clear()
    return steps()[0]


def ids(seed, k=K, rows=ROWS):
    return jnp.asarray(np.random.default_rng(seed).permutation(rows)[:k])


def addresses(step):
    return {x.unsafe_buffer_pointer() for buffers in step._buffers.values() for x in buffers}


@pytest.mark.parametrize("skipped", ["freeze", "replay"])
def test_same_numbers_and_the_same_buffers(skipped, step):
    _, plain = steps()
    one, two = start(skipped=skipped), start(skipped=skipped)
    for i in range(6):
        one, metrics = step(one, ids(i))
        two, want = plain(two, ids(i))
        assert metrics == want
        if i == 0:
            kept = addresses(step)
    assert len(kept) == 4 and addresses(step) == kept  # parameters, two slots, gradients
    jax.tree.map(np.testing.assert_array_equal, js.flush(one).params, js.flush(two).params)


@pytest.mark.parametrize("committed", [False, True])
def test_compiled_once(committed, caplog):
    """Kept buffers must be committed to their device just when the state is, or the second call is another program."""
    step, state = js.make_train_step(loss_fn), start()
    batches = [ids(i) for i in range(3)]
    if committed:
        state, batches = jax.device_put((state, batches), jax.devices()[0])
    with jax.log_compiles():
        for batch in batches:
            state, _ = step(state, batch)
    compiled = [
        record.getMessage() for record in caplog.records if "Compiling jit(with_buffers)" in record.getMessage()
    ]
    assert len(compiled) == 1


def test_small_blocks_are_left_to_xla(step):
    step(start(), ids(0, k=100))
    assert addresses(step) == set()


def test_batches_and_states_of_several_shapes(step):
    _, plain = steps()
    for k, rows in ((K, ROWS), (2 * K, ROWS), (K, 2 * ROWS), (K, ROWS), (K, K)) * 2:
        (got, _), (want, _) = (f(start(rows), ids(1, k, rows)) for f in (step, plain))
        np.testing.assert_array_equal(got.params["t"], want.params["t"])
    assert 0 < len(step._buffers) <= 4


def test_a_failed_call_loses_its_buffers_and_nothing_else():
    step, fails = js.make_train_step(lambda p, batch: loss_fn(p, batch["ids"])), {"ids": ids(0), "more": object()}
    with pytest.raises(TypeError):
        step(start(), fails)
    state, _ = step(start(), {"ids": ids(0)})
    kept = addresses(step)
    deleted = start()
    deleted.params["t"].delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(deleted, {"ids": ids(0)})
    state, metrics = step(state, {"ids": ids(1)})
    assert np.isfinite(metrics["loss"]) and len(addresses(step)) == len(kept)


def test_inside_other_transformations(step):
    batches = jnp.stack([ids(0), ids(1)])
    state, metrics = jax.lax.scan(step, start(), batches)
    want = start()
    for batch in batches:
        want, _ = step(want, batch)
    np.testing.assert_allclose(state.params["t"], want.params["t"], rtol=1e-6)
    assert metrics["loss"].shape == (2,)
