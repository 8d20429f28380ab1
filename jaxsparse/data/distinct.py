"""The distinct ids of an array, and the position of each id among them. NumPy, on the host."""

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
    """The distinct ids of an array, and the position of each of its elements among them.

    Both arrays have the leading axis of the array, so a batch can be split along it over devices. After another split,
    such as into micro-batches, the distinct ids are no longer known: `shape` differs from that of `positions`.

    Attributes:
      ids: int32 (n, m). Flattened: the distinct ids in increasing order, then padding, -2**31.
      positions: int32, the array's shape (n, ...), for a BCOO (nse,): the position of each id in the flat `ids`.
      shape: the shape of `positions` when the ids were counted.
      size: the first `size` elements of the flat `ids` count.

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
    """A lookup array from id to position, which is reused in each call. It has one element for each row, but only few
    of its memory pages are touched. Only the thread that holds `lock` may use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._array = np.empty(1, np.int32)  # never empty, so that `take` works

    def __reduce__(self) -> Any:
        return Scratch, ()  # in another process: a lock of its own, and nothing looked up yet

    def positions(self, unique: np.ndarray) -> np.ndarray:
        """An array whose element at each of these ids, all of them >= 0, is its position in `unique`."""
        if len(unique) and unique[-1] >= len(self._array):
            self._array = np.empty(int(unique[-1]) + 1, np.int32)
        self._array[unique] = np.arange(len(unique), dtype=np.int32)
        return self._array


def sorted_distinct(ids: np.ndarray) -> np.ndarray:
    """The distinct ids among ids (k,), in increasing order. np.unique is much slower."""
    ordered = np.sort(ids)
    new = np.empty(len(ordered), bool)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def round_up(n: int) -> int:
    """n rounded up to one of eight sizes between two powers of 2: at most an eighth more than n, and at least 1."""
    step = 1 << max(int(n).bit_length() - 4, 0)
    return max(-(-int(n) // step) * step, 1)


def capacity_for(count: int) -> int:
    """A number of distinct ids that is enough for batches like one with `count` of them, and one more for padding."""
    return round_up(count + count // 16 + 3 * math.isqrt(count) + 1)


def distinct_ids(shards: list[np.ndarray], capacity: int, scratch: Scratch) -> list[DistinctIds]:
    """The `DistinctIds` of each shard, all of the same size.

    Args:
      shards: int32 (n, ...), of one shape.
      capacity: the size. If a shard has this many distinct ids or more, the size is that for all ids being distinct,
        which is also the maximum: each size in between would be one more shape to compile for.
    """
    found = [sorted_distinct(ids.reshape(-1)) for ids in shards]
    return locate_ids(found, shards, capacity if max(map(len, found)) < capacity else shards[0].size + 1, scratch)


def locate_ids(found: list[np.ndarray], shards: list[np.ndarray], capacity: int, scratch: Scratch) -> list[DistinctIds]:
    """The `DistinctIds` of each shard. `found` has the distinct ids of each, fewer than `capacity`."""
    capacity = min(capacity, shards[0].size + 1)
    return [_locate(unique, ids, capacity, scratch) for unique, ids in zip(found, shards, strict=True)]


def _locate(unique: np.ndarray, ids: np.ndarray, capacity: int, scratch: Scratch) -> DistinctIds:
    if len(unique) and not 0 <= unique[0] <= unique[-1] < _LOOKUP_LIMIT:
        positions = np.searchsorted(unique, ids).astype(np.int32)
    else:
        with scratch.lock:
            positions = scratch.positions(unique).take(ids)
    n = len(ids)
    padded_ids = np.full((n, -(-capacity // max(n, 1))), NO_ID, np.int32)
    padded_ids.reshape(-1)[: len(unique)] = unique
    return DistinctIds(padded_ids, positions, ids.shape, capacity)


_LOOKUP_LIMIT = 1 << 28  # larger ids are found by a search: the lookup array would take gigabytes
