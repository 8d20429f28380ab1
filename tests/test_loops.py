"""evaluate, predict and fit."""

import dataclasses
import os
import signal
import threading

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax.training.train_state import TrainState
from tqdm import tqdm

import jaxsparse as js
from jaxsparse.train import loops

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


@pytest.mark.parametrize("loop", ["predict", "evaluate"])
def test_the_position_of_the_batches_does_not_matter_and_is_not_moved(loop):
    batches = js.batches(IDS, Y, batch_size=8)

    def run():
        if loop == "predict":
            return js.predict(apply_fn, new_state(), batches)
        return js.evaluate(metric_fn, new_state(), batches)["mse"]

    want = run()
    assert batches.state["epoch"] == batches.state["step"] == 0
    next(iter(batches))  # a look
    np.testing.assert_array_equal(run(), want)
    batches.state = batches.state | {"epoch": 3, "step": 2}
    np.testing.assert_array_equal(run(), want)
    assert (batches.state["epoch"], batches.state["step"]) == (3, 2) and len(list(batches)) == 1
    for number, _ in enumerate(batches, 1):  # in the middle of an epoch
        np.testing.assert_array_equal(run(), want)
        assert batches.state["step"] == number % 3
    assert number == 3


def test_evaluate_takes_one_order_of_shuffled_batches():
    batches = js.batches(IDS, Y, batch_size=8, shuffle=True, drop_remainder=True)
    first = js.evaluate(metric_fn, new_state(), batches)
    assert first == js.evaluate(metric_fn, new_state(), batches)
    list(batches)
    assert first != js.evaluate(metric_fn, new_state(), batches)


def test_predict_refuses_other_batches_and_other_outputs():
    with pytest.raises(TypeError, match=r"'batches'.*js.predict.*what js.batches or js.stream returns. Got list"):
        js.predict(apply_fn, new_state(), [IDS])
    for wrong, got in [(lambda p, x: jnp.sum(p["t"]), r"shape \(\)"), (lambda p, x: (x, x), "tuple")]:
        with pytest.raises(TypeError, match=r"'apply_fn'.*js.predict.*an array \(8, ...\).*Got " + got):
            js.predict(wrong, new_state(), js.batches(IDS, batch_size=8))


NO_DICT = [
    (loss_fn, r"returns shape \(\) .*Give it a name"),
    (lambda p, b: (1.0, 2.0), "returns tuple"),
    (lambda p, b: {"mse": 0.0, "errors": b.y}, r"'errors' of shape \(8,\)"),
    (lambda p, b: {"nested": {"mse": jnp.float32(0)}}, "'nested' of dict"),
]


@pytest.mark.parametrize(("wrong", "got"), NO_DICT)
def test_metrics_are_a_dict_of_scalars(wrong, got):
    batches = js.batches(IDS, Y, batch_size=8)
    with pytest.raises(TypeError, match=rf"'metric_fn'.*js.evaluate must be .*a dict of scalars.*{got}"):
        js.evaluate(wrong, new_state(), batches)
    trained = []
    for validation in (batches, list(batches), iter(list(batches))):  # of the last, nothing is known before
        with pytest.raises(TypeError, match=rf"'metrics'.*js.fit must be .*a dict of scalars.*{got}") as raised:
            js.fit(STEP, new_state(), batches, validation=validation, metrics=wrong, progress=False)
        trained.append(int(raised.value.state.step))
    assert trained == [0, 0, 3]


def test_evaluate_without_batches_and_without_weight():
    with pytest.raises(ValueError, match=r"'batches'.*js.evaluate.*at least one batch.*no examples"):
        js.evaluate(metric_fn, new_state(), js.batches(IDS[:0], Y[:0], batch_size=8))
    with pytest.raises(ValueError, match=r"'batches'.*at least one batch.*21 examples fill no batch of 22"):
        js.evaluate(metric_fn, new_state(), js.batches(IDS, Y, batch_size=22, drop_remainder=True))
    with pytest.raises(ValueError, match=r"'batches'.*at least one batch.*used up"):
        js.evaluate(metric_fn, new_state(), iter([]))
    got = js.evaluate(metric_fn, new_state(), js.batches(IDS, Y, batch_size=8, weight=np.zeros(N)))
    assert got.keys() == {"mse", "bias"} and np.isnan([*got.values()]).all()


def test_a_batch_without_weight_counts_as_one():
    mse = lambda params, batch: {"mse": jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)}  # noqa: E731
    pairs = [(IDS[:8], Y[:8]), (IDS[8:], Y[8:])]
    got = js.evaluate(mse, new_state(), pairs)["mse"]
    error = (np.asarray(TABLE)[IDS].sum(1) - Y) ** 2
    np.testing.assert_allclose(got, (error[:8].mean() + error[8:].mean()) / 2, rtol=1e-5)


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
        np.testing.assert_allclose(history[epoch]["loss"], np.average(losses[-3:], weights=[8, 8, 5]), rtol=1e-6)
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


# ---- the loss of an epoch


def frozen(loss):
    """A step that only tells the loss."""
    return lambda state, batch: (state, {"loss": loss(batch)})


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples():
    y = np.zeros(101, np.float32)
    y[-1] = 1
    step = frozen(lambda batch: js.weighted_mean(batch.y, batch.weight))
    for options in {}, {"devices": 4}:
        _, history = js.fit(step, None, js.batches(np.arange(101), y, batch_size=100, **options), progress=False)
        assert history[0]["loss"] == pytest.approx(1 / 101)
    weight = np.ones(101, np.float32)
    weight[-1] = 100
    _, history = js.fit(step, None, js.batches(np.arange(101), y, batch_size=20, weight=weight), progress=False)
    assert history[0]["loss"] == pytest.approx(0.5)
    weight[-21:] = 0  # the loss of a batch without weight may be 0/0
    step = frozen(lambda batch: jnp.sum(batch.y * batch.weight) / jnp.sum(batch.weight))
    batches = js.batches(np.arange(101), y, batch_size=20, weight=weight)
    assert js.fit(step, None, batches, stop_on_nan=True, progress=False)[1][0]["loss"] == 0
    _, history = js.fit(frozen(lambda loss: loss), None, [0.0, 1.0, 2.0], progress=False)
    assert history[0]["loss"] == 1


def test_losses_of_several_devices():
    """One number for each, as of jax.pmap."""
    _, history = js.fit(frozen(lambda n: jnp.full(8, n)), None, [1.0, 2.0], progress=False)
    assert history[0]["loss"] == 1.5


@pytest.mark.parametrize("at", [1, 7, 10, 25])
def test_a_nan_loss_stops_a_run_that_wants_it(at):
    losses = [np.nan if n == at else 1.0 for n in range(1, 28)]
    step = lambda state, loss: (state + 1, {"loss": jnp.float32(loss)})  # noqa: E731
    with pytest.raises(FloatingPointError, match=f"loss of step {at} of epoch 1 is NaN") as raised:
        js.fit(step, 0, losses, epochs=2, stop_on_nan=True, progress=False)
    assert at <= raised.value.state < at + 10 and raised.value.history[0]["steps"] == raised.value.state
    state, history = js.fit(step, 0, losses, epochs=2, progress=False)
    assert state == 54 and np.isnan(history[1]["loss"])


# ---- the state is not lost


class DataError(Exception):
    pass


def failing(batches, after, error):
    for number, batch in enumerate(batches):
        if number == after:
            raise error
        yield batch


def in_metrics(params, batch):
    raise DataError


def in_callback(event):
    if event.step == 2:
        raise DataError


def test_a_failure_hands_the_state_over():
    batches = js.batches(IDS, Y, batch_size=8)
    checks = {"validation": iter(list(batches)), "metrics": in_metrics}
    for data, options, steps in [
        (failing(batches, 2, DataError()), {}, 2),
        (batches, {"callback": in_callback}, 2),
        (batches, checks, 3),
    ]:
        given = new_state()
        with pytest.raises(DataError) as raised:
            js.fit(STEP, given, data, progress=False, **options)
        assert given.params["t"].is_deleted()
        error = raised.value
        assert int(error.state.step) == steps and np.isfinite(error.state.params["t"]).all()
        assert [entry["steps"] for entry in error.history] == [steps] and error.history[0]["loss"] > 0
        note = error.__notes__[-1]  # after what JAX may have added
        assert (
            f"error.state and error.history are the state and the history in epoch 1 of 1, after step {steps}" in note
        )
        js.fit(STEP, error.state, batches, progress=False)  # goes on


def test_a_step_that_takes_the_state_with_it_says_so():
    def step(state, batch):
        STEP(state, batch)
        raise DataError

    with pytest.raises(DataError) as raised:
        js.fit(step, new_state(), js.batches(IDS, Y, batch_size=8), progress=False)
    assert "Go on from a checkpoint" in raised.value.__notes__[0]
    for wrong, got in [(lambda s, b: s, "returns TrainState"), (lambda s, b: (s, 1.0), "metrics that are float")]:
        with pytest.raises(TypeError, match=f"'step'.*returns \\(state, metrics\\).*{got}"):
            js.fit(wrong, new_state(), js.batches(IDS, Y, batch_size=8), progress=False)


def interrupted(state, batch):
    """Ctrl-C in the middle of a step, which has been given the memory of the state."""
    out = STEP(state, batch)
    if int(out[0].step) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return out


@pytest.mark.parametrize("after", [1, 5])
def test_a_batch_that_came_before_an_interrupt_is_not_lost(monkeypatch, after):
    """Ctrl-C between the batch and its step: the position is that of the state."""

    class Bar(tqdm):
        def __iter__(self):
            for batch in super().__iter__():
                came.append(batch)
                if len(came) == after:
                    raise KeyboardInterrupt
                yield batch

    for new in (lambda: js.batches(IDS, Y, batch_size=8)), (lambda: js.stream(lambda: [(IDS, Y)], batch_size=8)):
        came, batches = [], new()
        with monkeypatch.context() as patched, pytest.warns(UserWarning, match="interrupted"):
            patched.setattr(loops, "tqdm", Bar)
            state, _ = js.fit(STEP, new_state(), batches, epochs=2, progress=False)
        assert int(state.step) == after - 1
        assert (batches.state["epoch"], batches.state["step"]) == divmod(after - 1, 3)
        got = js.fit(STEP, state, batches, epochs=2 - batches.state["epoch"], progress=False)[0]
        want = js.fit(STEP, new_state(), new(), epochs=2, progress=False)[0]
        assert int(got.step) == 6
        np.testing.assert_array_equal(got.params["t"], want.params["t"])


def test_an_interrupt_gives_the_state_back_after_its_step():
    batches = js.batches(IDS, Y, batch_size=8)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="interrupted in epoch 2 of 9, after step 2 of it. It returns the state"):
        state, history = js.fit(interrupted, new_state(), batches, epochs=9, progress=False)
    assert int(state.step) == 5 and [entry["steps"] for entry in history] == [3, 2]
    assert (batches.state["epoch"], batches.state["step"]) == (1, 2)
    assert signal.getsignal(signal.SIGINT) is handler
    want = js.fit(STEP, new_state(), js.batches(IDS, Y, batch_size=8), epochs=2, progress=False)[0]
    got = js.fit(STEP, state, batches, progress=False)[0]  # goes on there
    assert int(got.step) == 6
    np.testing.assert_array_equal(got.params["t"], want.params["t"])


def test_an_interrupt_elsewhere():
    batches = js.batches(IDS, Y, batch_size=8)
    with pytest.warns(UserWarning, match="interrupted in epoch 1 of 1, after step 2"):
        state, history = js.fit(STEP, new_state(), failing(batches, 2, KeyboardInterrupt()), progress=False)
    assert int(state.step) == 2 and [entry["steps"] for entry in history] == [2]
    with pytest.warns(UserWarning, match="interrupted before the first step"):
        assert js.fit(STEP, None, failing(batches, 0, KeyboardInterrupt()), progress=False) == (None, [])

    def twice(state, batch):
        STEP(state, batch)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt) as raised:
        js.fit(twice, new_state(), batches, progress=False)
    assert "Go on from a checkpoint" in raised.value.__notes__[0]


def test_fit_in_a_thread():
    """Where signals cannot be handled."""
    came = []
    run = lambda: came.append(js.fit(STEP, new_state(), js.batches(IDS, Y, batch_size=8), progress=False))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert int(came[0][0].step) == 3


# ---- args, keys and the callback


def test_the_step_gets_args_and_another_key_each_time():
    def noisy(params, batch, scale, key):
        keep = jax.random.bernoulli(key, 0.5, batch.weight.shape)
        return js.weighted_mean(scale * keep * (apply_fn(params, batch.x) - batch.y) ** 2, batch.weight)

    step, key = js.make_train_step(noisy), jax.random.key(3)
    new = lambda: js.batches(IDS, Y, batch_size=8)  # noqa: E731
    state, history = js.fit(step, new_state(), new(), epochs=2, args=(0.1,), rng=key, progress=False)
    want, losses = new_state(), []
    for n, batch in enumerate([*new()] * 2):
        want, metrics = step(want, batch, 0.1, jax.random.fold_in(key, n))
        losses.append(float(metrics["loss"]))
    np.testing.assert_array_equal(state.params["t"], want.params["t"])
    assert history[1]["loss"] == pytest.approx(np.average(losses[3:], weights=[8, 8, 5]))
    assert len(set(losses)) == 6
    # in two runs the same: the keys go by state.step
    half, _ = js.fit(step, new_state(), new(), args=(0.1,), rng=key, progress=False)
    again, _ = js.fit(step, half, new(), args=(0.1,), rng=key, progress=False)
    np.testing.assert_array_equal(again.params["t"], state.params["t"])
    # a state without step, and args without a key
    draws = []
    js.fit(lambda s, b, key: (s, {"loss": draws.append(key) or 0.0}), None, [1, 2], rng=key, progress=False)
    assert draws == [jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)]
    js.fit(lambda s, b, *args: (s, {"loss": draws.append(args) or 0.0}), None, [1], args=[4, 5], progress=False)
    assert draws[-1] == (4, 5)


def test_the_callback_is_told_and_stops():
    events = []

    def callback(event):
        events.append(dataclasses.replace(event, state=int(event.state.step), history=len(event.history)))
        return stop_at is not None and np.bool_((event.epoch, event.step, event.end_of_epoch) == stop_at)

    batches = js.batches(IDS, Y, batch_size=8)
    options = {"epochs": 3, "validation": batches, "metrics": metric_fn, "callback": callback, "progress": False}
    stop_at = None
    _, history = js.fit(STEP, new_state(), batches, **options)
    told = [(e.state, e.epoch, e.step, e.history, e.end_of_epoch) for e in events]
    assert told[:5] == [
        (1, 0, 1, 0, False),
        (2, 0, 2, 0, False),
        (3, 0, 3, 0, False),
        (3, 0, 3, 1, True),
        (4, 1, 1, 1, False),
    ]
    assert len(told) == 12 and {"loss", "grad_norm", "rows_touched"} == events[0].metrics.keys()
    assert events[3].metrics == history[0] and "mse" in history[0]

    stop_at = (1, 3, True)
    state, history = js.fit(STEP, new_state(), batches, **options)
    assert int(state.step) == 6 and len(history) == 2 and "mse" in history[1]
    stop_at = (1, 2, False)
    state, history = js.fit(STEP, new_state(), batches, **options)
    assert int(state.step) == 5 and [entry["steps"] for entry in history] == [3, 2] and "mse" not in history[1]
    with pytest.raises(TypeError, match=r"'callback'.*returns True to stop.*returns str"):
        js.fit(STEP, new_state(), batches, callback=lambda event: "saved", progress=False)


def test_a_checkpoint_of_the_callback_goes_on_bit_identically():
    saved = {}

    def callback(event):
        if (event.epoch, event.step, event.end_of_epoch) == (1, 1, False):
            saved["state"], saved["position"] = flax.serialization.to_bytes(event.state), batches.state

    batches = js.batches(IDS, Y, batch_size=8, shuffle=True)
    state, _ = js.fit(STEP, new_state(), batches, epochs=3, callback=callback, progress=False)
    again = js.batches(IDS, Y, batch_size=8, shuffle=True)
    again.state = saved["position"]
    loaded = flax.serialization.from_bytes(new_state(), saved["state"])
    resumed, history = js.fit(STEP, loaded, again, epochs=2, progress=False)
    assert [entry["steps"] for entry in history] == [2, 3]
    np.testing.assert_array_equal(resumed.params["t"], state.params["t"])


# ---- an epoch without steps


@pytest.mark.parametrize(("data", "says"), [
    (lambda: iter([]), "none in epoch 1 of 1 .*used up"),
    (list, "Got none"),
    (lambda: js.batches(IDS[:0], Y[:0], batch_size=8), "no examples"),
    (lambda: js.batches(IDS, Y, batch_size=22, drop_remainder=True), "21 examples fill no batch of 22: lower"),
])  # fmt: skip
def test_an_epoch_without_steps_raises(data, says):
    with pytest.raises(ValueError, match=f"'batches' argument of js.fit must be at least one batch.*{says}"):
        js.fit(STEP, new_state(), data(), progress=False)
    with pytest.raises(ValueError, match=r"'validation' argument of js.fit must be at least one batch"):
        batches = js.batches(IDS, Y, batch_size=8)
        js.fit(STEP, new_state(), batches, validation=data(), metrics=metric_fn, progress=False)


def test_a_position_at_the_end_of_an_epoch_is_said():
    batches = js.batches(IDS, Y, batch_size=8)
    batches.state = {**batches.state, "step": len(batches)}
    with pytest.raises(ValueError, match=r"at least one batch an epoch. Got .* position was at the end of an epoch"):
        js.fit(STEP, new_state(), batches, progress=False)
    js.fit(STEP, new_state(), batches, progress=False)  # the next epoch


def test_what_is_used_up_after_an_epoch_raises():
    class Once:  # not known to be used up before it is
        def __init__(self, batches):
            self.batches = iter(batches)

        def __iter__(self):
            return self.batches

    batches = js.batches(IDS, Y, batch_size=8)
    for once in (batch for batch in batches), zip(batches, batches, strict=True), iter(list(batches)):
        with pytest.raises(ValueError, match=r"'batches'.*iterable anew for each epoch. Got a .* for 2 epochs"):
            js.fit(STEP, new_state(), once, epochs=2, progress=False)
    with pytest.raises(ValueError, match=r"'validation'.*iterable anew"):
        js.fit(STEP, new_state(), batches, epochs=2, validation=iter([]), metrics=metric_fn, progress=False)
    with pytest.raises(ValueError, match=r"'batches'.*at least one batch an epoch. Got none in epoch 2 of 2") as raised:
        js.fit(STEP, new_state(), Once(batches), epochs=2, progress=False)
    assert int(raised.value.state.step) == 3 and len(raised.value.history) == 1
    assert len(js.fit(STEP, new_state(), iter(list(batches)), progress=False)[1]) == 1  # one epoch of an iterator
