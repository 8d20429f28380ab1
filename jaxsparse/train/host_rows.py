"""The rows that a step reads, chosen on the host before it runs: with NumPy, which sorts much faster than XLA."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse.data.distinct import Scratch, sorted_distinct
from jaxsparse.trace.plan import Path
from jaxsparse.trace.planning import Planned
from jaxsparse.trace.values import NOBODY
from jaxsparse.trace.walk import Space
from jaxsparse.train.device_rows import reads_of


class HostRows:
    """The distinct rows of each class, chosen on the host, and where in them each id is.

    The ids come as one array for each different computation of ids in the step, numbered by `numbers`, for each class.
    """

    def __init__(self, planned: Planned) -> None:
        self._by_class = [(c, num_rows, list(reads_of(planned, c).items())) for c, num_rows in planned.classes.items()]
        self._numbers = list(planned.ids.numbers)
        # by class: how ids are looked up, an array of them and whether they are clipped; and for places of reads which
        self._ways: list[list[tuple[int, bool]]] = []
        self._paths: list[list[tuple[Path, int]]] = []
        for c, _, arrays in self._by_class:
            index = {number: i for i, (number, _) in enumerate(arrays)}
            reads = [
                (read.path, (index[number], read.clipped))
                for read, number in planned.reads_in(c)
                if read.path is not None
            ]
            ways = list(dict.fromkeys(way for _, way in reads))
            self._ways.append(ways)
            self._paths.append([(path, ways.index(way)) for path, way in reads])
        self._can = not planned.plan.axes
        self._sizes: list[list[int]] = [[] for _ in self._by_class]
        self._scratch = Scratch()  # its lock is that of the sizes as well: steps may be called from several threads

    def sees(self, used: list[Any]) -> bool:
        """Whether ids made of these arrays are sorted on the host."""
        return self._can and all(map(_jax.is_on_host, used))

    def wanted(self, ids: list[Any]) -> list[list[Any]]:
        """Each different id array of all reads once, by class."""
        by_number = dict(zip(self._numbers, ids, strict=True))
        return [[by_number[number] for number, _ in arrays] for _, _, arrays in self._by_class]

    def choose(self, ids: list[list[Any]], sizes: Sequence[int] = ()) -> tuple[list[Any], list[list[Any]]]:
        """For each class, its rows: int32 (k,), padded with num_rows, num_rows + 1, ...; and for each way of looking
        ids up where they are, k for those that are no row. k is as in `sizes`, if these are given.

        Raises:
          ValueError: if there are more distinct rows than that.
        """
        with self._scratch.lock:
            return self._choose(ids, sizes)

    def _choose(self, ids: list[list[Any]], sizes: Sequence[int]) -> tuple[list[Any], list[list[Any]]]:
        rows, positions = [], []
        for n, ((_, num_rows, arrays), given) in enumerate(zip(self._by_class, ids, strict=True)):
            parts = [np.asarray(x) for x in given]
            unique, outside = _distinct(parts, num_rows, [clipped for _, clipped in arrays])
            size = sizes[n] if sizes else self._size(n, len(unique), min(sum(x.size for x in parts), num_rows))
            if len(unique) >= size:
                do = "Lower the step for abstract arguments, or call the step itself, which compiles what it needs."
                must = f"of at most {size - 1} distinct rows, as many as this program was compiled for"
                raise ValueError(message("jit", "batch", must, len(unique), do))
            padded = np.empty(size, np.int32)
            padded[: len(unique)] = unique
            padded[len(unique) :] = np.arange(num_rows, num_rows + size - len(unique), dtype=np.int32)
            rows.append(padded)
            scratch = self._scratch.positions(unique)
            found: dict[Any, np.ndarray] = {}
            for i, clip in self._ways[n]:  # alike for ids that are all rows
                key = i, clip and outside
                if key not in found:
                    found[key] = _look_up(scratch, parts[i], size, num_rows if outside else None, clip)
            positions.append([found[i, clip and outside] for i, clip in self._ways[n]])
        return rows, positions

    def _size(self, n: int, distinct: int, most: int) -> int:
        """The number of rows of a block: at least this many and one of padding. There are few sizes, because each is
        compiled for; from the third on, a size is one and a half times another."""
        sizes = self._sizes[n]
        for size in sizes:
            if distinct < size <= (1.25 if len(sizes) < 3 else 1.6) * distinct + 64:
                return size
        grain = max(16, 1 << max(distinct.bit_length() - 4, 0))
        size = -(-(distinct + 1 + grain // 2) // grain) * grain
        if len(sizes) >= 2:
            size = next(size for k in itertools.count() if (size := int(64 * 1.5**k)) > distinct)
        self._sizes[n] = sorted([*sizes, min(size, most + 1)])
        return min(size, most + 1)

    def largest(self, ids: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
        """The largest results of `choose`, abstractly: all ids distinct."""
        rows = []
        for (_, num_rows, _), given in zip(self._by_class, ids, strict=True):
            size = min(sum(x.size for x in given), num_rows) + 1
            rows.append(jax.ShapeDtypeStruct((size,), jnp.int32))
        shapes = [[given[i].shape for i, _ in ways] for given, ways in zip(ids, self._ways, strict=True)]
        return rows, [[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in of_class] for of_class in shapes]

    def spaces(self, rows: list[Any], positions: list[list[Any]]) -> dict[int, Space]:
        """The results of `choose`, in the form that the step takes."""
        out = {}
        for (c, num_rows, _), ids, places, paths in zip(self._by_class, rows, positions, self._paths, strict=True):
            out[c] = Space(ids, num_rows, {path: places[i] for path, i in paths})
        return out


def _distinct(parts: list[np.ndarray], num_rows: int, clipped: list[bool]) -> tuple[np.ndarray, bool]:
    """(the distinct rows that ids name, in order; whether some ids name no row). If `clipped`, an id out of range names
    the first or last row."""
    unique = sorted_distinct(parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts]))
    first, last = np.searchsorted(unique, [0, num_rows])
    outside = first > 0 or last < len(unique)
    if outside:
        ends = []
        for x, is_clipped in zip(parts, clipped, strict=True):
            if is_clipped:
                ends += [0] * bool(np.any(x < 0))
                ends += [num_rows - 1] * bool(np.any((x >= num_rows) & (x != NOBODY)))
        unique = sorted_distinct(np.concatenate([unique[first:last], np.array(ends, np.int32)]))
    return unique, outside


def _look_up(scratch: np.ndarray, ids: np.ndarray, size: int, num_rows: int | None, clipped: bool) -> np.ndarray:
    """The position of each id among the rows. `num_rows` is given if some ids may name no row."""
    if num_rows is None:
        return scratch.take(ids)  # twice as fast as scratch[ids]
    if clipped:
        ids = np.where(ids == NOBODY, ids, np.clip(ids, 0, num_rows - 1))
    inside = (ids >= 0) & (ids < num_rows)
    return np.where(inside, scratch.take(np.where(inside, ids, 0)), np.int32(size))
