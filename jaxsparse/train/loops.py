"""`fit`: runs a step over epochs of batches, with validation and a callback.

A step, a state and batches go in; the last state and a history come out. If a run ends early, the state is returned or
attached to the exception: the caller's own state was donated to the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxsparse._checks import message
from jaxsparse._names import OF_FIT, other_names
from jaxsparse.data.pipeline import Batches
from jaxsparse.data.stream import Stream
from jaxsparse.train.evaluation import advice_on_none, check_scalars, means, one_epoch, weight_of
from jaxsparse.train.refresh import flush


@dataclasses.dataclass(frozen=True)
class FitEvent:
    """What the callback of `js.fit` is told after each step and after each epoch.

    Attributes:
      state: the state so far. It is donated to the next step, so save or copy what you keep.
      epoch: the number of the epoch, from 0.
      step: how many steps of this epoch are done.
      metrics: after a step, the metrics that it returned; they are on the device, so reading one waits for the step.
        After an epoch, its entry in the history.
      history: the entries of the completed epochs.
      end_of_epoch: True after an epoch and its validation, False after a step.
    """

    state: Any
    epoch: int
    step: int
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    end_of_epoch: bool


@other_names("fit", OF_FIT)
def fit(
    step: Callable[..., Any],
    state: Any,
    batches: Any,
    *,
    epochs: int = 1,
    args: Sequence[Any] = (),
    rng: Any = None,
    validation: Any = None,
    metrics: Callable[..., dict[str, Any]] | None = None,
    callback: Callable[[FitEvent], Any] | None = None,
    stop_on_nan: bool = False,
    progress: bool = True,
) -> tuple[Any, list[dict[str, float]]]:
    """Runs a step over epochs of batches, with a progress bar and, after each epoch, js.flush and validation.

    Args:
      step: a step of `js.make_train_step`, or any step(state, batch, ...) -> (state, metrics) whose metrics have a
        "loss", the mean over the examples of the batch.
      state: the state to start from. It is donated to the step: use the returned one.
      batches: a `js.Batches` or `js.Stream`, or any iterable of batches that can be iterated anew. The run starts at
        the position of the first two, also after a run that was interrupted or stopped.
      epochs: how many epochs to run. A resumed one counts as one.
      args: further arguments of the step: step(state, batch, *args). `js.make_train_step` calls
        loss_fn(params, batch, *args).
      rng: a jax.random key. Each step gets its own key after `args`: jax.random.fold_in(rng, n). n is `state.step`
        before the step, or 0, 1, ... if the state has no step. So a resumed run goes on with the same keys.
      validation: batches to evaluate `metrics` on after each epoch.
      metrics: metric_fn of `js.evaluate`; required with validation, and only there. A metric named "loss" replaces the
        training loss in the history.
      callback: callback(event) is called with a `js.FitEvent` after each step and after each epoch. If it returns
        True, the run ends.
      stop_on_nan: whether a NaN loss raises. Losses are read every ten steps and at the end of an epoch, so a few more
        steps may have run by then.
      progress: whether to show the bar.

    Returns:
      The state, and a dict for each epoch: "loss", the mean over its examples; "steps"; "seconds"; and the validation's
        metrics. In the mean a batch counts by the sum of its `batch.weight`, or as 1 if it has no weight. An epoch that
        ended early has an entry for its steps, without validation.
      Ctrl-C ends a run after the current step, like a callback that returns True, with a warning. A second Ctrl-C does
        not wait for the step.

    Raises:
      TypeError: if the step, metrics or callback return something else.
      ValueError: if only one of validation and metrics is given, or an epoch has no batches.
      FloatingPointError: with stop_on_nan, if the loss of a batch that has weight is NaN.
      Exception: any exception of the step, the batches, metrics or the callback. It has the attributes `state` and
        `history`, the latest ones, because the given state is deleted.

    Example:
      >>> import flax, jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> loss_fn = lambda params, batch: js.weighted_mean((params["t"][batch.x] - batch.y) ** 2, batch.weight)
      >>> batches = js.batches(jnp.arange(6) // 2, jnp.arange(6) % 3, batch_size=4, shuffle=True)
      >>> new = lambda: TrainState.create(apply_fn=None, params={"t": jnp.zeros(3)}, tx=js.lazy_sgd(0.5))
      >>> step = js.make_train_step(loss_fn)
      >>> state, history = js.fit(step, new(), batches, epochs=3, progress=False)
      >>> len(history), history[-1]["steps"], history[-1]["loss"] < history[0]["loss"]
      (3, 2, True)

      Early stopping, and a checkpoint after each epoch, with the position in the data beside it:

      >>> saved = {}
      >>> def callback(event):
      ...     if event.end_of_epoch:
      ...         saved["state"], saved["position"] = flax.serialization.to_bytes(event.state), batches.state
      ...         losses = [entry["loss"] for entry in event.history]
      ...         return len(losses) > 2 and min(losses[-2:]) > 0.99 * min(losses[:-2])  # no better for two epochs
      >>> state, history = js.fit(step, new(), batches, epochs=100, callback=callback, progress=False)
      >>> len(history) < 100
      True
      >>> batches.state = saved["position"]
      >>> state, _ = js.fit(step, flax.serialization.from_bytes(new(), saved["state"]), batches, progress=False)
    """
    run = _Run(step, state, tuple(args), rng, callback, stop_on_nan, progress)
    is_ours = isinstance(batches, (Batches, Stream))
    run.position = batches.state if is_ours else None
    try:
        _check(batches, epochs, state, validation, metrics)
        with run.interrupts:
            for number in range(epochs):
                if run.epoch(batches, number, epochs, validation, metrics):
                    break
    except BaseException as error:
        run.add_entry()
        if not isinstance(error, KeyboardInterrupt) or run.is_state_deleted():
            run.attach_state(error)
            raise
        text = f"js.fit was interrupted {run.progress_text}. It returns the state and the history so far."
        warnings.warn(text, stacklevel=2)
        if is_ours:
            batches.state = run.position  # the last batch may have been taken without a step
    if is_ours:
        batches.state = batches.state  # otherwise an epoch that ended early would start again
    return run.state, run.history


class _Run:
    """One call of `fit`. It holds the latest state and history, also if the run ends early."""

    def __init__(
        self, step: Any, state: Any, args: tuple[Any, ...], rng: Any, callback: Any, stop_on_nan: bool, progress: bool
    ) -> None:
        self.state, self.progress_text = state, "before the first step"
        self.history: list[dict[str, float]] = []
        self.position: Any = None  # in js.batches or js.stream, after the last step
        self.interrupts = _Interrupts()
        self._step, self._args, self._rng, self._callback = step, args, rng, callback
        self._stop_on_nan, self._progress = stop_on_nan, progress
        self._losses, self._has_entry = _Losses(), False  # of the current epoch
        self._step_number: int | None = None  # of the next step: its key is folded with it

    def epoch(self, batches: Any, number: int, epochs: int, validation: Any, metrics: Any) -> bool:
        """Runs an epoch and returns whether the callback stops the run."""
        losses = self._losses = _Losses()
        self._has_entry = False
        with tqdm(batches, desc=f"epoch {number + 1}/{epochs}", unit="step", disable=not self._progress) as bar:
            for batch in bar:
                args = self._next_args()
                with self.interrupts.defer():
                    reported = self._train(batch, args)
                    self.position = None if self.position is None else batches.state
                    self.progress_text = f"in epoch {number + 1} of {epochs}, after step {losses.steps} of it"
                # each read of a loss waits for the step
                if (self._progress and losses.steps in (1, 3)) or losses.steps % 10 == 0:
                    self._fetch_losses(number)
                    bar.set_postfix(loss=f"{losses.last:.4f}")
                if self._call_callback(number, reported, end_of_epoch=False):
                    self.add_entry()
                    return True
            if not losses.steps:
                got = f"none in epoch {number + 1} of {epochs}"
                raise ValueError(message("fit", "batches", "at least one batch an epoch", got, advice_on_none(batches)))
            self._fetch_losses(number)
            entry = self.add_entry()
            if metrics is not None:
                with self.interrupts.defer():
                    self.state = flush(self.state)
                measured = means(metrics, self.state, validation, "fit", "metrics", "validation")
                bar.set_postfix({name: f"{value:.4f}" for name, value in [("loss", entry["loss"]), *measured.items()]})
                entry |= measured
        return self._call_callback(number, entry, end_of_epoch=True)

    def _next_args(self) -> tuple[Any, ...]:
        if self._rng is None:
            return self._args
        if self._step_number is None:
            step = getattr(self.state, "step", None)
            self._step_number = 0 if step is None or callable(step) else int(np.asarray(step).reshape(-1)[0])
        self._step_number += 1
        return (*self._args, _fold_in(self._rng, np.uint32(self._step_number - 1)))

    def _train(self, batch: Any, args: tuple[Any, ...]) -> dict[str, Any]:
        out = self._step(self.state, batch, *args)
        must = 'a function that returns (state, metrics), metrics a dict with a "loss"'
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(message("fit", "step", must, f"one that returns {type(out).__name__}"))
        self.state, reported = out
        if not isinstance(reported, Mapping) or "loss" not in reported:
            got = list(reported) if isinstance(reported, Mapping) else type(reported).__name__
            do = 'Return (state, {"loss": loss}).'
            raise TypeError(message("fit", "step", must, f"metrics that are {got}", do))
        self._losses.add(reported["loss"], weight_of(batch))
        return dict(reported)

    def _fetch_losses(self, number: int) -> None:
        self._losses.fetch()
        if self._stop_on_nan and self._losses.first_nan is not None:
            at = f"step {self._losses.first_nan} of epoch {number + 1}"
            raise FloatingPointError(f"js.fit: the loss of {at} is NaN. stop_on_nan=False would go on.")

    def _call_callback(self, number: int, metrics: dict[str, Any], end_of_epoch: bool) -> bool:
        """Calls the callback. Returns whether it stops the run."""
        if self._callback is None:
            return False
        steps, history = self._losses.steps, self.history
        answer = self._callback(FitEvent(self.state, number, steps, metrics, history, end_of_epoch))
        is_array = isinstance(answer, (np.ndarray, jax.Array)) and answer.shape == () and answer.dtype == np.bool_
        if not (answer is None or isinstance(answer, (bool, np.bool_)) or is_array):
            must = "a function that returns True to stop, or else None or False"
            raise TypeError(message("fit", "callback", must, f"one that returns {type(answer).__name__}"))
        return bool(answer)

    def add_entry(self) -> dict[str, float]:
        """Adds the history entry of an epoch that has steps and no entry yet."""
        entry = self._losses.entry()
        if self._losses.steps and not self._has_entry:
            self.history.append(entry)
            self._has_entry = True
        return entry

    def is_state_deleted(self) -> bool:
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(self.state))

    def attach_state(self, error: BaseException) -> None:
        """Attaches the state to an exception, because the caller's own state was donated."""
        note = f"js.fit: error.state and error.history are the state and the history {self.progress_text}."
        if self.is_state_deleted():
            note = f"js.fit: the state was donated to what failed {self.progress_text}. Go on from a checkpoint."
        error.__dict__.update(state=self.state, history=self.history)
        error.add_note(note)


class _Losses:
    """The losses of an epoch. They are read every few steps, because reading waits for the device."""

    def __init__(self) -> None:
        self.steps, self.last, self._start = 0, float("nan"), time.perf_counter()
        self.first_nan: int | None = None  # the step
        self._pending: list[tuple[Any, Any]] = []  # not read yet
        self._total = self._weight = 0.0

    def add(self, loss: Any, weight: Any) -> None:
        self._pending.append((loss, weight))
        self.steps += 1

    def fetch(self) -> None:
        for at, (loss, weights) in enumerate(jax.device_get(self._pending), self.steps - len(self._pending) + 1):
            self.last = float(np.mean(loss))  # under pmap, one for each device
            weight = float(np.sum(weights, dtype=np.float64))
            if weight:  # without any, the mean may be 0/0
                self._total, self._weight = self._total + weight * self.last, self._weight + weight
                if np.isnan(self.last) and self.first_nan is None:
                    self.first_nan = at
        self._pending = []

    def entry(self) -> dict[str, float]:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # if the device failed, only the losses until then count
            self.fetch()
        mean = self._total / self._weight if self._weight else float("nan")
        return {"loss": mean, "steps": self.steps, "seconds": time.perf_counter() - self._start}


_fold_in = jax.jit(jax.random.fold_in)


class _Interrupts:
    """Handles Ctrl-C during a run. Inside `defer` it takes effect after the block, because the state is donated to the
    step and would be lost. A second Ctrl-C takes effect at once."""

    def __init__(self) -> None:
        self._before, self._is_deferring, self._num_signals = signal.getsignal(signal.SIGINT), False, 0
        self._is_handled = callable(self._before) and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._is_handled:
            signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *error: object) -> None:
        if self._is_handled:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *args: Any) -> None:
        self._num_signals += self._is_deferring
        if self._num_signals != 1:
            self._interrupt(*args)

    def _interrupt(self, *args: Any) -> None:
        if callable(self._before):
            self._before(*args)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        self._is_deferring = True
        try:
            yield
        finally:
            num_signals, self._is_deferring, self._num_signals = self._num_signals, False, 0
            if num_signals == 1:
                self._interrupt(signal.SIGINT, None)


def _check(batches: Any, epochs: int, state: Any, validation: Any, metrics: Any) -> None:
    """Checks arguments before the first step, not after hours of training."""
    if (validation is None) != (metrics is None):
        raise ValueError(message("fit", "metrics", "given with validation, and only there", metrics))
    for argument, given in {"batches": batches, "validation": validation}.items():
        kind = type(given)
        if epochs > 1 and hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            got, do = f"a {kind.__name__} for {epochs} epochs", "Give js.batches or a list."
            raise ValueError(message("fit", argument, "iterable anew for each epoch", got, do))
        if isinstance(given, (Batches, list, tuple)) and not len(given):
            raise ValueError(message("fit", argument, "at least one batch an epoch", "none", advice_on_none(given)))
    if isinstance(validation, (Batches, Stream, list, tuple)):
        batch = next(iter(one_epoch(validation)))
        check_scalars(jax.jit(metrics).eval_shape(state.params, batch), "fit", "metrics")
