"""A run of training that can stop and go on at any step."""

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
    """A run of training: its state, the history of finished epochs, and the loss so far of the current epoch.

    A checkpoint has all of these and the position in the data. Losses are summed in the order of the steps, so the mean
    loss of an epoch is the same with and without an interruption.

    Attributes:
      state: the train state at the start, or that of `load`.
      history: one entry for each finished epoch.
      steps: the number of steps done in the current epoch.
    """

    def __init__(self, state: Any, train_set: Stream, path: Path, seconds: float) -> None:
        self.state, self.history = state, list[dict[str, float]]()
        self._train_set, self._path, self._save_every = train_set, path, seconds
        self._pending, self._last_save, self._since = list[tuple[Any, Any]](), time.monotonic(), time.monotonic()
        self.steps, self._loss_sum, self._weight, self._seconds = 0, 0.0, 0.0, 0.0

    @property
    def epochs_begun(self) -> int:
        """The number of epochs whose examples are all read."""
        return self._train_set.state["epoch"]

    def add(self, loss: Any, weight: Any) -> None:
        """Adds the loss of a step. Called by the step: after Ctrl-C, js.fit may skip the callback of the last one."""
        self._pending.append((loss, weight))
        self.steps += 1
        if len(self._pending) == _MAX_PENDING:
            self._fetch_losses()

    def callback(self, event: FitEvent) -> None:
        """The callback for js.fit: ends epochs, and saves after each one and every `seconds`."""
        if event.end_of_epoch:
            self.end_epoch({k: v for k, v in event.metrics.items() if k not in ("loss", "steps", "seconds")})
        if event.end_of_epoch or time.monotonic() - self._last_save >= self._save_every:
            self.save(event.state)

    def end_epoch(self, measured: dict[str, float]) -> None:
        self._fetch_losses()
        loss = self._loss_sum / self._weight if self._weight else float("nan")
        self.history.append({"loss": loss, "steps": self.steps, "seconds": self._seconds, **measured})
        self.steps, self._loss_sum, self._weight, self._seconds = 0, 0.0, 0.0, 0.0

    def _fetch_losses(self) -> None:
        for loss, weight in jax.device_get(self._pending):
            batch_weight = float(np.sum(weight, dtype=np.float64))
            if batch_weight:
                self._loss_sum, self._weight = self._loss_sum + batch_weight * float(loss), self._weight + batch_weight
        self._pending.clear()
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now

    def save(self, state: Any) -> None:
        self._fetch_losses()
        running = {"steps": self.steps, "total": self._loss_sum, "weight": self._weight, "seconds": self._seconds}
        rest = {"history": self.history, "position": self._train_set.state, "running": running}
        part = self._path.with_name(f"{self._path.name}.part")
        with open(part, "wb") as file:
            file.write(flax.serialization.to_bytes({"state": state, "rest": json.dumps(rest)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)
        self._last_save = time.monotonic()

    def load(self) -> None:
        """Restores the run from its checkpoint.

        Raises:
          ValueError: if the checkpoint is damaged, or of other data.
        """
        self.state, rest = load_checkpoint(self.state, self._path)
        self.history, running = rest["history"], rest["running"]
        self._train_set.state = rest["position"]
        self.steps, self._loss_sum = running["steps"], running["total"]
        self._weight, self._seconds = running["weight"], running["seconds"]


def load_checkpoint(state: Any, path: Path) -> tuple[Any, dict[str, Any]]:
    """The state in a checkpoint, of the structure of `state`, and the other entries.

    Raises:
      ValueError: if the checkpoint is damaged.
    """
    try:
        tree = flax.serialization.from_bytes({"state": state, "rest": ""}, path.read_bytes())
        return tree["state"], json.loads(tree["rest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """A file to write. It replaces `path` when it is complete, and is removed after an error."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "w") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_MAX_PENDING = 100  # losses that are kept on the device before they are summed on the host
