"""The distinct ids of arrays, and where each id is among them: found on the host, with NumPy."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistinctIds:
    """The distinct ids in an array, and where each of its elements is among them.

    Both arrays have the leading axis of the array itself, so that a batch can be split along it over devices. Split in
    another way, for micro-batches say, it is not known any more which ids are distinct: `shape` tells.

    Attributes:
      ids: int32 (n, m), read row after row: the distinct ids in order, then -2**31.
      positions: int32 of the array's shape (n, ...), of a BCOO's entries (nse,): of each id, where it is in `ids`.
      shape: the positions' when the ids were counted.
      size: how many elements of `ids` count.

    Example:
      >>> import jaxsparse as js
      >>> (batch,) = js.batches([[3, 0], [3, 3]], num_rows=4, batch_size=2)
      >>> batch.distinct.ids.ravel()[:2].tolist(), batch.distinct.positions.tolist()
      ([0, 3], [[1, 0], [1, 1]])
    """

    ids: Any
    positions: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})


NO_ID = -(2**31)


class Scratch:
    """Where ids are among distinct ones, by looking them up in an array that is kept from call to call: few of its
    pages are used. For one thread at a time: the one that holds `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._array = np.empty(1, np.int32)  # something to read for ids that are no row

    def positions(self, unique: np.ndarray) -> np.ndarray:
        """An array that has at each of these ids, none of them negative, where it is."""
        if len(unique) and unique[-1] >= len(self._array):
            self._array = np.empty(int(unique[-1]) + 1, np.int32)
        self._array[unique] = np.arange(len(unique), dtype=np.int32)
        return self._array


def sorted_distinct(ids: np.ndarray) -> np.ndarray:
    """The distinct ones of ids (k,), in order. np.unique, which looks for more, takes much longer."""
    ordered = np.sort(ids)
    new = np.empty(len(ordered), bool)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def round_up(n: int) -> int:
    """The next of eight sizes an octave: at most an eighth more than n, and at least 1."""
    step = 1 << max(int(n).bit_length() - 4, 0)
    return max(-(-int(n) // step) * step, 1)


def room_for(count: int) -> int:
    """For so many distinct ids in one batch, a size that is enough for others like it, and one more."""
    return round_up(count + count // 16 + 3 * math.isqrt(count) + 1)


def distinct_ids(shards: list[np.ndarray], room: int, scratch: Scratch) -> list[DistinctIds]:
    """The `DistinctIds` of each shard, all of one size.

    Args:
      shards: int32 (n, ...), of one shape.
      room: the size. If some shard has as many distinct ids or more, there is room for all ids to be distinct, and it
        is never larger than that: any size in between is one more shape to compile for.
    """
    found = [sorted_distinct(ids.reshape(-1)) for ids in shards]
    return placed(found, shards, room if max(map(len, found)) < room else shards[0].size + 1, scratch)


def placed(found: list[np.ndarray], shards: list[np.ndarray], room: int, scratch: Scratch) -> list[DistinctIds]:
    """The `DistinctIds` of each shard, of which the distinct ids were found, fewer than `room`."""
    room = min(room, shards[0].size + 1)
    return [_among(unique, ids, room, scratch) for unique, ids in zip(found, shards, strict=True)]


def _among(unique: np.ndarray, ids: np.ndarray, room: int, scratch: Scratch) -> DistinctIds:
    if len(unique) and not 0 <= unique[0] <= unique[-1] < _LOOKED_UP:
        positions = np.searchsorted(unique, ids).astype(np.int32)
    else:
        with scratch.lock:
            positions = scratch.positions(unique).take(ids)
    n = len(ids)
    table = np.full((n, -(-room // max(n, 1))), NO_ID, np.int32)
    table.reshape(-1)[: len(unique)] = unique
    return DistinctIds(table, positions, ids.shape, room)


_LOOKED_UP = 1 << 28  # larger ids are searched for: the array would have some gigabytes
