"""evaluate, predict and fit."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax.training.train_state import TrainState

import jaxsparse as js

N, V = 21, 10
IDS = np.random.default_rng(0).integers(0, V, (N, 3))
Y = np.random.default_rng(1).normal(size=N).astype(np.float32)
TABLE = jnp.asarray(np.random.default_rng(2).normal(size=V), jnp.float32)
TX = js.lazy_adagrad(0.5)


def apply_fn(params, ids):
    return params["t"][ids].sum(1)


def loss_fn(params, batch):
    return js.weighted_mean((apply_fn(params, batch.x) - batch.y) ** 2, batch.weight)


def metric_fn(params, batch):
    return {"mse": loss_fn(params, batch), "bias": js.weighted_mean(apply_fn(params, batch.x) - batch.y, batch.weight)}


STEP = js.make_train_step(loss_fn)


def new_state():
    return TrainState.create(apply_fn=None, params={"t": jnp.copy(TABLE)}, tx=TX)


def test_predict_keeps_order_and_drops_padding():
    want = np.asarray(TABLE)[IDS].sum(1)
    for size in (1, 8, 21, 50):
        got = js.predict(apply_fn, new_state(), js.batches(IDS, batch_size=size))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    # examples of weight 0 are examples
    weightless = js.batches(IDS, batch_size=8, weight=np.zeros(N))
    np.testing.assert_allclose(js.predict(apply_fn, new_state(), weightless), want, rtol=1e-6)
    x = scipy.sparse.random(N, V, 0.3, "csr", np.float32, rng=np.random.default_rng(3))
    got = js.predict(lambda p, x: js.dot(x, p["t"][:, None]), new_state(), js.batches(x, batch_size=4))
    np.testing.assert_allclose(got[:, 0], x @ np.asarray(TABLE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"shuffle": True}, {"drop_remainder": True}, {"devices": 2}])
def test_predict_refuses_what_would_lose_order_or_examples(settings):
    with pytest.raises(ValueError, match=r"'batches'.*all examples in their order"):
        js.predict(apply_fn, new_state(), js.batches(IDS, batch_size=8, **settings))
    with pytest.raises(ValueError, match=r"'batches'.*at least one example"):
        js.predict(apply_fn, new_state(), js.batches(IDS[:0], batch_size=8))


def test_evaluate_weighs_examples():
    weight = np.random.default_rng(3).uniform(size=N).astype(np.float32)
    weight[16:] = 0  # the last batch has none
    got = js.evaluate(metric_fn, new_state(), js.batches(IDS, Y, batch_size=8, weight=weight))
    error = np.asarray(TABLE)[IDS].sum(1) - Y
    np.testing.assert_allclose(got["mse"], np.average(error**2, weights=weight), rtol=1e-5)
    np.testing.assert_allclose(got["bias"], np.average(error, weights=weight), rtol=1e-4)


def test_fit_is_the_loop_one_would_write(capsys):
    batches = js.batches(IDS, Y, batch_size=8, shuffle=True)
    validation = js.batches(IDS, Y, batch_size=8)
    state, history = js.fit(STEP, new_state(), batches, epochs=3, validation=validation, metrics=metric_fn)
    assert "epoch 3/3" in capsys.readouterr().err
    want, losses = new_state(), []
    again = js.batches(IDS, Y, batch_size=8, shuffle=True)
    for epoch in range(3):
        for batch in again:
            want, metrics = STEP(want, batch)
            losses.append(metrics["loss"])
        assert history[epoch]["steps"] == 3 and history[epoch]["seconds"] > 0
        np.testing.assert_allclose(history[epoch]["loss"], np.mean(losses[-3:]), rtol=1e-6)
        assert history[epoch]["mse"] == pytest.approx(js.evaluate(metric_fn, want, validation)["mse"])
    np.testing.assert_array_equal(state.params["t"], want.params["t"])
    assert history[-1]["mse"] < history[0]["mse"]


def test_fit_quiet_resumed_and_wrong(capsys):
    batches = js.batches(IDS, Y, batch_size=8)
    batches.state = batches.state | {"step": 2}
    _, history = js.fit(STEP, new_state(), batches, progress=False)
    assert history[0]["steps"] == 1 and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"'metrics'.*with validation"):
        js.fit(STEP, new_state(), batches, validation=batches)
