"""A training that stops at any step, and goes on there."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import flax.serialization
import jax
import numpy as np

from jaxsparse.data.stream import Stream
from jaxsparse.train.loops import FitEvent


class Run:
    """A training as far as it is: the state, the epochs that are over, and what is known of the one under way.

    A checkpoint has all of that and the position in the data, so that the losses of an epoch, too, are the same whether
    it was interrupted or not: they are added up in the order of the steps.

    Attributes:
      state: that of the beginning, or of `load`.
      history: the entries of the epochs that are over.
      steps: those that are done of the epoch under way.
    """

    def __init__(self, state: Any, train_set: Stream, path: Path, seconds: float) -> None:
        self.state, self.history = state, list[dict[str, float]]()
        self._train_set, self._path, self._every = train_set, path, seconds
        self._new, self._saved, self._since = list[tuple[Any, Any]](), time.monotonic(), time.monotonic()
        self.steps, self._total, self._weight, self._seconds = 0, 0.0, 0.0, 0.0

    @property
    def epochs_begun(self) -> int:
        """Those whose examples are all read."""
        return self._train_set.state["epoch"]

    def add(self, loss: Any, weight: Any) -> None:
        """After a step, and with it: what a callback is told of may be one less where Ctrl-C came."""
        self._new.append((loss, weight))
        self.steps += 1
        if len(self._new) == _LOOKED_AT:
            self._look()

    def callback(self, event: FitEvent) -> None:
        """Of js.fit."""
        if event.end_of_epoch:
            self.end_epoch({k: v for k, v in event.metrics.items() if k not in ("loss", "steps", "seconds")})
        if event.end_of_epoch or time.monotonic() - self._saved >= self._every:
            self.save(event.state)

    def end_epoch(self, measured: dict[str, float]) -> None:
        self._look()
        loss = self._total / self._weight if self._weight else float("nan")
        self.history.append({"loss": loss, "steps": self.steps, "seconds": self._seconds, **measured})
        self.steps, self._total, self._weight, self._seconds = 0, 0.0, 0.0, 0.0

    def _look(self) -> None:
        for loss, weight in jax.device_get(self._new):
            own = float(np.sum(weight, dtype=np.float64))
            if own:
                self._total, self._weight = self._total + own * float(loss), self._weight + own
        self._new.clear()
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now

    def save(self, state: Any) -> None:
        self._look()
        running = {"steps": self.steps, "total": self._total, "weight": self._weight, "seconds": self._seconds}
        rest = {"history": self.history, "position": self._train_set.state, "running": running}
        part = self._path.with_name(f"{self._path.name}.part")
        with open(part, "wb") as file:
            file.write(flax.serialization.to_bytes({"state": state, "rest": json.dumps(rest)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)
        self._saved = time.monotonic()

    def load(self) -> None:
        """What was saved.

        Raises:
          ValueError: if that is damaged, or of other data.
        """
        self.state, rest = load_checkpoint(self.state, self._path)
        self.history, running = rest["history"], rest["running"]
        self._train_set.state = rest["position"]
        self.steps, self._total = running["steps"], running["total"]
        self._weight, self._seconds = running["weight"], running["seconds"]


def load_checkpoint(state: Any, path: Path) -> tuple[Any, dict[str, Any]]:
    """A state like this one, and what else is in the checkpoint.

    Raises:
      ValueError: if that is damaged.
    """
    try:
        tree = flax.serialization.from_bytes({"state": state, "rest": ""}, path.read_bytes())
        return tree["state"], json.loads(tree["rest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """A file to write, which is there when it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "w") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_LOOKED_AT = 100  # losses that wait on the device
