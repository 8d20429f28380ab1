"""The kinds of features that a batch is made of: what each is, how large a batch of it gets, and how one is cut. Host
side only.

Each has `need`, the size that a batch of these shards needs; `cut`, the examples of a shard; `pad`, the cut as one
shard of a batch; `ids`, what is ids in that; and `nse`, a size that is fixed.

This is where values are looked at. What cannot work raises here, with the value and where it stands; the device code
behind it need not check anything. Nothing is clipped, wrapped or dropped.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse.distinct import round_up


class Sizes:
    """A few static sizes for a run: the largest that is expected, in eighths of an octave, and three quarters and half
    of that: levels 2, 1 and 0. One size for all levels where all needs are alike, or where it is fixed.

    What needs more than the largest gets its own size.
    """

    def __init__(self, needs: Sequence[int], fixed: int | None) -> None:
        largest = round_up(max(needs, default=1)) if fixed is None else fixed
        alike = fixed is not None or len(set(needs)) < 2
        self.sizes = (largest,) * LEVELS if alike else (-(-largest // 2), -(-3 * largest // 4), largest)

    def level(self, need: int) -> int:
        return next((level for level, size in enumerate(self.sizes) if size >= need), LEVELS - 1)

    def fit(self, need: int, level: int) -> int:
        return self.sizes[level] if need <= self.sizes[level] else round_up(need)


LEVELS = 3


class Sparse:
    """A SciPy matrix: BCOO batches."""

    def __init__(self, matrix: Any, name: str, nse: int | None, check_finite: bool) -> None:
        self.csr, self.name, self.nse = canonical_csr(matrix, "batches", name), name, nse
        if check_finite and not np.isfinite(self.csr.data).all():
            at = int(np.flatnonzero(~np.isfinite(self.csr.data))[0])
            raise ValueError(message("batches", name, "finite", f"{self.csr.data[at]} at {_entry(self.csr, at)}"))
        self.num_examples = self.csr.shape[0]
        self.lengths = np.diff(self.csr.indptr).astype(np.int64)

    def need(self, parts: list[np.ndarray]) -> int:
        entries = max(int(self.lengths[part].sum()) for part in parts)
        if self.nse is not None and entries > self.nse:
            must = f"at least {entries}, the entries of {self.name} in the batch from example {parts[0][0]} on"
            raise ValueError(message("batches", "nse", must, self.nse, "Raise nse, or leave it out."))
        return entries

    def cut(self, part: np.ndarray) -> Any:
        return self.csr[part]

    def pad(self, cut: Any, length: int, size: int, spare: int) -> BCOO:
        del spare
        return bcoo(*entries(cut, length, size), (length, self.csr.shape[1]))

    def ids(self, padded: BCOO) -> np.ndarray:
        return np.asarray(padded.indices[:, 1])


class Lists:
    """Lists of ids: (B, L) padded."""

    nse = None

    def __init__(self, lists: Any, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        rows = [_id_list(row, name, i) for i, row in enumerate(lists)]
        if num_rows is None:
            do = "It is the number of rows of the table that the ids go into."
            raise ValueError(message("batches", "num_rows", f"given, because {name} is a list of id lists", None, do))
        self.name, self.num_examples = name, len(rows)
        self.lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        # floats, where uint64 stands beside int64: exact for every id that is legal
        flat = np.concatenate([row for row in rows if len(row)] or [np.zeros(0, np.int32)])

        def position(at: int) -> str:
            row = int(np.searchsorted(self.starts, at, side="right")) - 1
            return f"position {at - self.starts[row]} of list {row}"

        self.flat = _checked_ids(flat, name, num_rows, padding_idx, position)
        self.padding = num_rows if padding_idx is None else padding_idx

    def need(self, parts: list[np.ndarray]) -> int:
        return max(int(self.lengths[part].max(initial=1)) for part in parts)

    def cut(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths[part]
        return self.flat[_spans(self.starts[part], lengths)], lengths

    def pad(self, cut: tuple[np.ndarray, np.ndarray], length: int, size: int, spare: int) -> np.ndarray:
        del spare
        out, (flat, lengths) = np.full((length, size), self.padding, np.int32), cut
        out[: len(lengths)][np.arange(size) < lengths[:, None]] = flat
        return out

    def ids(self, padded: np.ndarray) -> np.ndarray:
        return padded


class Ids:
    """An array of ids."""

    nse = None

    def __init__(self, ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        self.name, self.num_examples = name, len(ids)
        flat = _checked_ids(ids.reshape(-1), name, num_rows, padding_idx, lambda at: _position(at, ids.shape))
        self.values = flat.reshape(ids.shape)
        self.padding = padding_idx

    def need(self, parts: list[np.ndarray]) -> int:
        del parts
        return 0

    def cut(self, part: np.ndarray) -> np.ndarray:
        return np.take(self.values, part, axis=0)  # several times as fast as self.values[part]

    def pad(self, cut: np.ndarray, length: int, size: int, spare: int) -> np.ndarray:
        del size
        return _pad(cut, length, self.values[spare] if self.padding is None else self.padding)

    def ids(self, padded: np.ndarray) -> np.ndarray:
        return padded


class Array:
    """Any other array."""

    nse = None

    def __init__(self, values: Any, name: str, check_finite: bool) -> None:
        given = _as_array(values, name)
        self.values = _jax_dtype(given, "batches", name, lambda at: _position(at, given.shape))
        if given.ndim < 1:
            raise ValueError(message("batches", name, "an array of shape (n, ...)", f"shape {given.shape}"))
        # after the cast: what overflows float32 is inf on the device
        if check_finite and jnp.issubdtype(given.dtype, jnp.inexact) and not np.isfinite(self.values).all():
            raise ValueError(message("batches", name, "finite", where_bad(given, ~np.isfinite(self.values))))
        self.name, self.num_examples = name, len(given)

    def need(self, parts: list[np.ndarray]) -> int:
        del parts
        return 0

    def cut(self, part: np.ndarray) -> np.ndarray:
        return np.take(self.values, part, axis=0)

    def pad(self, cut: np.ndarray, length: int, size: int, spare: int) -> np.ndarray:
        del size
        return _pad(cut, length, self.values[spare])

    def ids(self, padded: np.ndarray) -> None:
        del padded


def make_features(
    x: Any, path: str, key: str | None, per_name: dict[str, Any], check_finite: bool, names: set[str]
) -> Any:
    """x with every feature wrapped in its class."""
    if isinstance(x, Mapping):
        return {k: make_features(v, f"{path}[{k!r}]", k, per_name, check_finite, names) for k, v in x.items()}
    if key is not None:
        names.add(key)
    num_rows, padding_idx, nse = (v.get(key) if isinstance(v, Mapping) else v for v in per_name.values())
    if scipy.sparse.issparse(x):
        return Sparse(x, path, nse, check_finite)
    if isinstance(x, (list, tuple)) and (not x or any(isinstance(row, (list, tuple, np.ndarray)) for row in x)):
        return Lists(x, path, num_rows, padding_idx)
    array = _as_array(x, path)
    if array.ndim and array.dtype.kind in "iu":
        return Ids(array, path, num_rows, padding_idx)
    return Array(array, path, check_finite)


def where_bad(values: np.ndarray, bad: np.ndarray) -> str:
    if not bad.any():
        return f"shape {values.shape}"
    at = int(np.flatnonzero(bad)[0])
    return f"{values.reshape(-1)[at]} at {_position(at, values.shape)}"


def _position(at: int, shape: tuple[int, ...]) -> str:
    return f"position {at if len(shape) == 1 else tuple(map(int, np.unravel_index(at, shape)))}"


def _entry(csr: Any, at: int) -> str:
    return f"row {int(np.searchsorted(csr.indptr, at, side='right')) - 1}, column {csr.indices[at]}"


def _as_array(x: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(x)
    except ValueError:  # rows of several lengths
        must = "an array, or rows of one length"
        do = "Ragged features are lists of id lists, or SciPy matrices."
        raise TypeError(message("batches", name, must, reprlib.repr(x), do)) from None


def _id_list(row: Any, name: str, at: int) -> np.ndarray:
    ids = _as_array(row, name)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        do = "Numbers that are no ids go into an array or a SciPy matrix."
        raise TypeError(message("batches", name, "lists of integers", f"{reprlib.repr(row)} at position {at}", do))
    return ids


def _pad(values: np.ndarray, length: int, fill: Any) -> np.ndarray:
    """values (k, ...) with `fill` up to (length, ...)."""
    if len(values) == length:
        return values
    out = np.empty((length, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    out[len(values) :] = fill
    return out


def _checked_ids(
    ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None, position: Callable[[int], str]
) -> np.ndarray:
    """Flat ids as int32, or the error that says which one is wrong and where."""
    bad = (ids < 0) | (ids > 2**31 - 1)
    if num_rows is not None:
        if not 0 <= num_rows < MAX_ROWS:
            raise ValueError(message("batches", "num_rows", f"between 0 and {MAX_ROWS - 1}", num_rows))
        bad |= ids >= num_rows
    if padding_idx is not None:
        if not -(2**31) < padding_idx < 2**31:
            raise ValueError(message("batches", "padding_idx", "within int32", padding_idx))
        bad &= ids != padding_idx
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        value = int(ids[at])
        must = f"ids in [0, {num_rows})" if num_rows is not None else "ids in [0, 2**31)"
        do = (
            "Integer arrays are ids; cast them to float if these are numbers. Rows that mean padding want padding_idx=."
        )
        error = OverflowError if value > 2**31 - 1 else ValueError
        raise error(message("batches", name, must, f"{value} at {position(at)}", do))
    return ids.astype(np.int32)


def canonical_csr(matrix: Any, function: str, argument: str) -> Any:
    """The matrix as CSR with sorted indices and no duplicates; the caller's own is left as it is."""
    if not scipy.sparse.issparse(matrix):
        raise TypeError(
            message(
                function, argument, "a SciPy sparse matrix", type(matrix).__name__, "Dense arrays need no conversion."
            )
        )
    if matrix.ndim != 2:
        raise ValueError(message(function, argument, "of two dimensions", f"shape {matrix.shape}"))
    for size in matrix.shape:
        if size >= MAX_ROWS:
            raise OverflowError(message(function, argument, f"of dimensions below {MAX_ROWS}", f"shape {matrix.shape}"))
    if matrix.format in ("csr", "csc"):  # SciPy's constructors do not look, and its conversions then write anywhere
        major, minor = (0, 1) if matrix.format == "csr" else (1, 0)
        bad = (matrix.indices < 0) | (matrix.indices >= matrix.shape[minor])
        if bad.any():
            at, axes = int(np.flatnonzero(bad)[0]), ("row", "column")
            where = f"{axes[major]} {int(np.searchsorted(matrix.indptr, at, side='right')) - 1}"
            must = f"of {axes[minor]} indices in [0, {matrix.shape[minor]})"
            raise ValueError(message(function, argument, must, f"{matrix.indices[at]} in {where}"))
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()  # sorts too; keeps explicit zeros
    csr.data = _jax_dtype(csr.data, function, argument, lambda at: _entry(csr, at))
    return csr


def _jax_dtype(values: np.ndarray, function: str, argument: str, position: Callable[[int], str]) -> np.ndarray:
    """In the dtype that JAX keeps them in: 64 bits become 32 unless jax_enable_x64 is on. Integers that do not fit
    raise, and so do dtypes that JAX has not."""
    try:
        dtype = jax.typeof(np.empty(0, values.dtype)).dtype
    except TypeError:
        raise TypeError(message(function, argument, "of numbers that JAX has a dtype for", f"{values.dtype}")) from None
    if values.dtype.kind in "iu" and values.size:
        limits, flat = np.iinfo(dtype), values.reshape(-1)
        for at in (int(flat.argmax()), int(flat.argmin())):
            if not limits.min <= int(flat[at]) <= limits.max:
                raise OverflowError(message(function, argument, f"within {dtype}", f"{flat[at]} at {position(at)}"))
    return values.astype(dtype, copy=False)


@functools.lru_cache
def _bcoo_structure(shape: tuple[int, int]) -> Any:
    return jax.tree.structure(BCOO((jnp.zeros(0), jnp.zeros((0, 2), jnp.int32)), shape=shape, indices_sorted=True))


def bcoo(data: np.ndarray, indices: np.ndarray, shape: tuple[int, int]) -> BCOO:
    """A BCOO that holds the NumPy arrays themselves: its constructor would move them to the default device."""
    return jax.tree.unflatten(_bcoo_structure(shape), [data, indices])


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions starts[i], starts[i] + 1, ..., starts[i] + lengths[i] - 1, for every i, in one array."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def entries(csr: Any, length: int, nse: int) -> tuple[np.ndarray, np.ndarray]:
    """data (nse,) and indices (nse, 2) of a matrix of up to `length` rows, padded with 0 and (length, num_columns)."""
    k = csr.nnz
    data = np.zeros(nse, csr.data.dtype)
    indices = np.empty((nse, 2), np.int32)
    data[:k] = csr.data
    indices[:k, 0] = np.repeat(np.arange(csr.shape[0], dtype=np.int32), np.diff(csr.indptr))
    indices[:k, 1] = csr.indices
    indices[k:] = (length, csr.shape[1])
    return data, indices
