"""The kinds of features in a batch: SciPy matrices, lists of ids, arrays of ids, other arrays. Host side only.

Each class has these methods and attributes:

    need(parts)      the size, entries or list length, that a batch of these shards needs
    cut(part)        the examples of a shard, unpadded
    pad(cut, ...)    the cut, padded to a shard of a batch; padding repeats `filler`, the cut of one example
    ids(padded)      the ids in it, or None
    nse              a fixed size, or None
    size_of(cut)     streams: the size that a cut needs
    kind             streams: what all chunks must agree on
    key              streams: the name in the dict x

`inputs.py` checks the values.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from jaxsparse._checks import message
from jaxsparse.data.csr import Csr, row_of
from jaxsparse.data.distinct import capacity_for, round_up
from jaxsparse.data.inputs import (
    as_array,
    check_finite,
    check_ids,
    id_list,
    jax_dtype,
    positions_in,
)
from jaxsparse.data.ragged import Ragged, pieces, rows_of


class Sizes:
    """Two static sizes for a run. Level 0 fits four of five batches, level 1 all that were sampled.

    The two are equal where they would be close, or where the size is fixed. If only some batches were sampled, level 1
    has a margin. A batch that needs more gets two, four, ... times the size of level 1.
    """

    def __init__(self, needs: Sequence[int], fixed: int | None, is_every_batch: bool) -> None:
        is_one_size, largest_need = fixed is not None or len(set(needs)) < 2, max(needs, default=1)
        largest = round_up(largest_need) if is_one_size or is_every_batch else capacity_for(largest_need)
        largest = largest if fixed is None else fixed
        usual = largest if is_one_size else round_up(sorted(needs)[len(needs) * 4 // 5])
        self.sizes = (usual if 4 * usual < 3 * largest else largest, largest)

    def level(self, need: int) -> int:
        return next((level for level, size in enumerate(self.sizes) if size >= need), LEVELS - 1)

    def fit(self, need: int, level: int) -> int:
        size = self.sizes[level]
        while size < need:
            size = max(2 * size, 1)
        return size


LEVELS = 2


class Feature:
    """Base class: a feature whose size is the same in all batches."""

    key: str | None = None
    nse: int | None = None

    def need(self, parts: list[np.ndarray]) -> int:
        del parts
        return 0

    def size_of(self, cut: Any) -> int:
        del cut
        return 0

    def bare(self) -> Any:
        """A copy without the examples: pads the cuts of other chunks."""
        other = copy.copy(self)
        other.__dict__ = {name: x for name, x in vars(self).items() if name not in ("csr", "rows", "values")}
        return other


class Sparse(Feature):
    """A SciPy matrix. Batches are BCOO (B, num_columns)."""

    def __init__(self, matrix: Any, name: str, nse: int | None, is_checked: bool) -> None:
        self.csr, self.name, self.nse = Csr(matrix, "batches", name), name, nse
        if is_checked:
            check_finite(self.csr.rows.arrays[0], self.csr.dtype, name, self.csr.entry_at)
        self.num_examples, self._columns = self.csr.shape

    def need(self, parts: list[np.ndarray]) -> int:
        entries = max(int(self.csr.rows.lengths(part).sum()) for part in parts)
        if self.nse is not None and entries > self.nse:
            must = f"at least {entries}, the entries of {self.name} in the batch from example {parts[0][0]} on"
            raise ValueError(message("batches", "nse", must, self.nse, "Raise nse, or leave it out."))
        return entries

    def cut(self, part: np.ndarray) -> Any:
        return self.csr.take(part)

    def size_of(self, cut: Any) -> int:
        return max(len(cut[0]), 1)

    @property
    def kind(self) -> str:
        return f"a matrix of {self._columns} columns and {self.csr.dtype}"

    def pad(self, cut: Any, length: int, size: int, filler: Any) -> BCOO:
        del filler
        shape = length, self._columns
        return bcoo(*entries(cut, shape, size), shape)

    def ids(self, padded: BCOO) -> np.ndarray:
        return np.asarray(padded.indices[:, 1])


class Lists(Feature):
    """Lists of ids. Batches are int32 (B, L), padded."""

    def __init__(self, lists: Any, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        rows = [id_list(row, name, i) for i, row in enumerate(lists)]
        if num_rows is None:
            do = "It is the number of rows of the table that the ids go into."
            raise ValueError(message("batches", "num_rows", f"given, because {name} is a list of id lists", None, do))
        self.name, self.num_examples = name, len(rows)
        starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))])
        # uint64 and int64 concatenate to float64, which is exact for valid ids
        flat = np.concatenate([row for row in rows if len(row)] or [np.zeros(0, np.int32)])

        def position(at: int) -> str:
            return f"position {at - starts[row_of(starts, at)]} of list {row_of(starts, at)}"

        check_ids(flat, name, num_rows, padding_idx, position)
        self.rows = Ragged((flat.astype(np.int32),), starts)
        self.padding = num_rows if padding_idx is None else padding_idx

    def need(self, parts: list[np.ndarray]) -> int:
        return max(int(self.rows.lengths(part).max(initial=1)) for part in parts)

    def cut(self, part: np.ndarray) -> Any:
        return self.rows.take(part)

    def size_of(self, cut: Any) -> int:
        return int(cut[-1].max(initial=1))

    @property
    def kind(self) -> str:
        return "id lists"

    def pad(self, cut: Any, length: int, size: int, filler: Any) -> np.ndarray:
        del filler
        out, (flat, lengths) = np.full((length, size), self.padding, np.int32), cut
        out[: len(lengths)][np.arange(size) < lengths[:, None]] = flat
        return out

    def ids(self, padded: np.ndarray) -> np.ndarray:
        return padded


class Ids(Feature):
    """An array of ids. Batches are int32 (B, ...)."""

    def __init__(self, ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        self.name, self.num_examples, self.values = name, len(ids), ids
        check_ids(ids, name, num_rows, padding_idx, positions_in(ids.shape))
        self.padding = padding_idx

    def cut(self, part: np.ndarray) -> np.ndarray:
        return rows_of(self.values, part).astype(np.int32, copy=False)

    @property
    def kind(self) -> str:
        return f"ids of shape {('n', *self.values.shape[1:])}"

    def pad(self, cut: np.ndarray, length: int, size: int, filler: Any) -> np.ndarray:
        del size
        return _pad(cut, length, filler if self.padding is None else self.padding)

    def ids(self, padded: np.ndarray) -> np.ndarray:
        return padded


class Array(Feature):
    """Any other array. Batches are (B, ...)."""

    def __init__(self, values: Any, name: str, is_checked: bool) -> None:
        self.values = as_array(values, name)
        position = positions_in(self.values.shape)
        self.dtype = jax_dtype(self.values, "batches", name, position)
        if self.values.ndim < 1:
            raise ValueError(message("batches", name, "an array of shape (n, ...)", f"shape {self.values.shape}"))
        if is_checked:
            check_finite(self.values, self.dtype, name, position)
        self.name, self.num_examples = name, len(self.values)

    def cut(self, part: np.ndarray) -> np.ndarray:
        return rows_of(self.values, part).astype(self.dtype, copy=False)

    @property
    def kind(self) -> str:
        return f"{self.dtype} of shape {('n', *self.values.shape[1:])}"

    def pad(self, cut: np.ndarray, length: int, size: int, filler: Any) -> np.ndarray:
        del size
        return _pad(cut, length, filler)

    def ids(self, padded: np.ndarray) -> None:
        del padded


class Weights(Array):
    """The weights of the examples."""

    def __init__(self, values: Any, is_checked: bool) -> None:
        super().__init__(values, "weight", is_checked)
        must, shape = "real, of shape (n,) and not negative", self.values.shape
        if len(shape) != 1 or jnp.issubdtype(self.dtype, jnp.complexfloating):
            raise ValueError(message("batches", "weight", must, f"shape {shape} of {self.dtype}"))
        for first, piece in pieces(self.values):
            if (piece < 0).any():
                at = int(np.flatnonzero(piece < 0)[0])
                raise ValueError(message("batches", "weight", must, f"{piece[at]} at position {first + at}"))


def make_features(
    x: Any, path: str, key: str | None, per_name: dict[str, Any], is_checked: bool, names: set[str]
) -> Any:
    """x with each leaf wrapped in its class."""
    if isinstance(x, Mapping) and not scipy.sparse.issparse(x):  # a DOK matrix is both
        return {k: make_features(v, f"{path}[{k!r}]", k, per_name, is_checked, names) for k, v in x.items()}
    if key is not None:
        names.add(key)
    num_rows, padding_idx, nse = (v.get(key) if isinstance(v, Mapping) else v for v in per_name.values())
    feature = _feature(x, path, num_rows, padding_idx, nse, is_checked)
    feature.key = key
    if isinstance(per_name["num_rows"], Mapping) and num_rows is not None:
        check_num_rows([feature], num_rows)
    return feature


def _feature(x: Any, path: str, num_rows: Any, padding_idx: Any, nse: Any, is_checked: bool) -> Any:
    if scipy.sparse.issparse(x):
        return Sparse(x, path, nse, is_checked)
    if isinstance(x, (list, tuple)) and (not x or any(isinstance(row, (list, tuple, np.ndarray)) for row in x)):
        return Lists(x, path, num_rows, padding_idx)
    array = as_array(x, path)
    if array.ndim and array.dtype.kind in "iu":
        return Ids(array, path, num_rows, padding_idx)
    return Array(array, path, is_checked)


def check_num_rows(features: Sequence[Any], num_rows: int) -> None:
    """Checks one num_rows for these features. It applies to ids, or else to matrices, whose columns are rows of the
    table.

    Raises:
      ValueError: if a matrix has more columns.
      TypeError: if there are neither ids nor matrices.
    """
    if any(isinstance(f, (Ids, Lists)) for f in features):
        return
    matrices = [f for f in features if isinstance(f, Sparse)]
    for f in matrices:
        if f.csr.shape[1] > num_rows:
            must = f"at least {f.csr.shape[1]}, the number of columns of {f.name}"
            raise ValueError(message("batches", "num_rows", must, num_rows, "A column is a row of the table."))
    if not matrices:
        must = "left out, or given for ids: integers, lists of them, or the columns of a SciPy matrix"
        got = f"{num_rows} for {', '.join(f'{f.name} of {f.dtype}' for f in features)}"
        do = "Cast ids to integers: .astype('int32'). Missing ids make floats of a column: fill them first."
        raise TypeError(message("batches", "num_rows", must, got, do))


def _pad(values: np.ndarray, length: int, filler: Any) -> np.ndarray:
    """values (k, ...) with `fill` up to (length, ...)."""
    if len(values) == length:
        return values
    out = np.empty((length, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    out[len(values) :] = filler
    return out


@functools.lru_cache
def _bcoo_structure(shape: tuple[int, int]) -> Any:
    return jax.tree.structure(BCOO((jnp.zeros(0), jnp.zeros((0, 2), jnp.int32)), shape=shape, indices_sorted=True))


def bcoo(data: np.ndarray, indices: np.ndarray, shape: tuple[int, int]) -> BCOO:
    """A BCOO of NumPy arrays. BCOO's constructor would copy them to the default device."""
    return jax.tree.unflatten(_bcoo_structure(shape), [data, indices])


def entries(
    cut: tuple[np.ndarray, np.ndarray, np.ndarray], shape: tuple[int, int], nse: int
) -> tuple[np.ndarray, np.ndarray]:
    """data (nse,) and indices (nse, 2) of a cut of a `Csr`. Padding has data 0 and index = shape."""
    given, columns, lengths = cut
    k = len(given)
    data = np.zeros(nse, given.dtype)
    indices = np.empty((nse, 2), np.int32)
    data[:k] = given
    indices[:k, 0] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    indices[:k, 1] = columns
    indices[k:] = shape
    return data, indices
