"""Rows of different lengths in flat arrays. The arrays may be larger than memory: no function reads all of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE = 1 << 18  # numbers that are checked at a time


def pieces(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of values (n, ...), each flattened, with its start in the flat array."""
    width = max(int(np.prod(values.shape[1:], dtype=np.int64)), 1)
    for first in range(0, len(values), max(PIECE // width, 1)):
        yield first * width, values[first : first + max(PIECE // width, 1)].reshape(-1)


def rows_of(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """values[rows]. np.take is several times as fast, but copies an array that is not contiguous."""
    return np.take(values, rows, axis=0) if values.flags.c_contiguous and values.flags.aligned else values[rows]


class Ragged:
    """Row i is array[starts[i] : starts[i + 1]], for each of some flat arrays. These are not copied, so they may be
    memory-mapped. `take` returns rows as a tuple (*flat arrays, lengths).
    """

    def __init__(self, arrays: tuple[np.ndarray, ...], starts: np.ndarray) -> None:
        self.arrays, self.starts = arrays, starts

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._spans(rows)[1]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        starts, lengths = self._spans(rows)
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return *(rows_of(array, at) for array in self.arrays), lengths

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = rows_of(self.starts, rows).astype(np.int64, copy=False)
        return starts, rows_of(self.starts, rows + 1).astype(np.int64, copy=False) - starts


def take(cut: Any, rows: np.ndarray) -> Any:
    """Some rows of a cut: an array, or a tuple of `Ragged.take`."""
    return rows_of(cut, rows) if isinstance(cut, np.ndarray) else as_ragged(cut).take(rows)


def as_ragged(cut: tuple[np.ndarray, ...]) -> Ragged:
    return Ragged(cut[:-1], np.concatenate([[0], np.cumsum(cut[-1])]))
