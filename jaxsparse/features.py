"""The kinds of features that a batch is made of: what each is, how large a batch of it gets, and how one is cut. Host
side only.

This is where values are looked at. What cannot work raises here, with the value and where it stands; the device code
behind it need not check anything. Nothing is clipped, wrapped or dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from jaxsparse._checks import MAX_ROWS, message


class Sizes:
    """A few static sizes for a run: the largest that is expected, in eighths of an octave, and three quarters and half
    of that.

    What needs more than the largest gets its own size. Where all batches need the same, all get the same.
    """

    def __init__(self, needs: Sequence[int | None], fixed: int | None = None) -> None:
        known = [n for n in needs if n is not None]
        self.largest = round_up(max(known, default=1)) if fixed is None else fixed
        self.fixed = fixed is not None

    def fit(self, need: int) -> int:
        if self.fixed:
            return self.largest
        rungs = (-(-self.largest // 2), -(-3 * self.largest // 4), self.largest)
        return next((rung for rung in rungs if rung >= need), round_up(need))


def as_full(need: int, examples: int, length: int) -> int:
    """What a full shard would need where `examples` of its `length` need this much, so that the last batch gets no
    shape of its own."""
    return need if examples == length else max(need, -(-need * length // max(examples, 1)))


def round_up(n: int) -> int:
    """The next of eight sizes an octave: at most an eighth more than n, and at least 1."""
    step = 1 << max(int(n).bit_length() - 4, 0)
    return max(-(-int(n) // step) * step, 1)


class Sparse:
    """A SciPy matrix: BCOO batches."""

    def __init__(self, matrix: Any, name: str, nse: int | None, check_finite: bool) -> None:
        self.csr, self.name, self.nse = canonical_csr(matrix, "batches", name), name, nse
        if check_finite and not np.isfinite(self.csr.data).all():
            at = int(np.flatnonzero(~np.isfinite(self.csr.data))[0])
            row = int(np.searchsorted(self.csr.indptr, at, side="right")) - 1
            raise ValueError(
                message("batches", name, "finite", f"{self.csr.data[at]} at row {row}, column {self.csr.indices[at]}")
            )
        self.num_examples = self.csr.shape[0]
        self.lengths = np.diff(self.csr.indptr).astype(np.int64)
        self.counter = _Counter(self.csr.shape[1])

    def sizes(self, parts: list[np.ndarray]) -> Sizes:
        return Sizes([int(self.lengths[part].sum()) for part in parts], self.nse)

    def fit(self, sizes: Sizes, parts: list[np.ndarray], length: int) -> int:
        entries = [int(self.lengths[part].sum()) for part in parts]
        if self.nse is not None and max(entries) > self.nse:
            batch = f"the batch of examples {parts[0][:3].tolist()}..."
            must = f"at least {max(entries)}, the entries of {self.name} in {batch}"
            raise ValueError(message("batches", "nse", must, self.nse, "Raise nse, or leave it out."))
        return sizes.fit(max(as_full(n, len(part), length) for n, part in zip(entries, parts, strict=True)))

    def distinct(self, part: np.ndarray) -> list[int | None]:
        return [None, self.counter(_columns(self.csr, part))]  # of data, of indices

    def take(self, part: np.ndarray, length: int, size: int, spare: int) -> BCOO:
        del spare
        data, indices = entries(self.csr, part, length, size)
        return bcoo(data, indices, (length, self.csr.shape[1]))


class Lists:
    """Lists of ids: (B, L) padded."""

    def __init__(self, lists: Any, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        if num_rows is None:
            do = "It is the number of rows of the table that the ids go into."
            raise ValueError(message("batches", "num_rows", f"given, because {name} is a list of id lists", None, do))
        self.name, self.num_examples = name, len(lists)
        self.lengths = np.fromiter((len(row) for row in lists), np.int64, len(lists))
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        flat = np.concatenate(
            [np.asarray(row) if len(row) else np.zeros(0, np.int32) for row in lists] or [np.zeros(0, np.int32)]
        )
        if not np.issubdtype(flat.dtype, np.integer):
            raise TypeError(message("batches", name, "lists of integers", f"{flat.dtype=}"))

        def position(at: int) -> str:
            row = int(np.searchsorted(self.starts, at, side="right")) - 1
            return f"position {at - self.starts[row]} of list {row}"

        self.flat = _checked_ids(flat, name, num_rows, padding_idx, position)
        self.padding = num_rows if padding_idx is None else padding_idx
        self.counter = _Counter(num_rows)

    def sizes(self, parts: list[np.ndarray]) -> Sizes:
        return Sizes([int(self.lengths[part].max(initial=1)) for part in parts])

    def fit(self, sizes: Sizes, parts: list[np.ndarray], length: int) -> int:
        del length
        return sizes.fit(max(int(self.lengths[part].max(initial=1)) for part in parts))

    def distinct(self, part: np.ndarray) -> list[int | None]:
        return [self.counter(self.flat[_spans(self.starts[part], self.lengths[part])])]

    def take(self, part: np.ndarray, length: int, size: int, spare: int) -> np.ndarray:
        del spare
        out = np.full((length, size), self.padding, np.int32)
        lengths = self.lengths[part]
        out[: len(part)][np.arange(size) < lengths[:, None]] = self.flat[_spans(self.starts[part], lengths)]
        return out


class Ids:
    """An array of ids."""

    def __init__(self, ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        self.name, self.num_examples = name, len(ids)

        def position(at: int) -> str:
            return f"position {tuple(map(int, np.unravel_index(at, ids.shape)))}"

        self.ids = _checked_ids(ids.reshape(-1), name, num_rows, padding_idx, position).reshape(ids.shape)
        self.padding = padding_idx
        top = int(ids.max(initial=0)) + 1
        self.counter = _Counter(top if num_rows is None else num_rows)

    def sizes(self, parts: list[np.ndarray]) -> None:
        del parts

    def fit(self, sizes: None, parts: list[np.ndarray], length: int) -> None:
        del sizes, parts, length

    def distinct(self, part: np.ndarray) -> list[int | None]:
        return [
            self.counter(self.ids[part].reshape(-1)) + self.ids[:1].size
        ]  # padding may repeat another shard's example

    def take(self, part: np.ndarray, length: int, size: None, spare: int) -> np.ndarray:
        del size
        return _pad(self.ids[part], length, self.ids[spare] if self.padding is None else self.padding)


class Array:
    """Any other array."""

    def __init__(self, values: np.ndarray, name: str, check_finite: bool) -> None:
        if values.ndim < 1:
            raise ValueError(message("batches", name, "an array of shape (n, ...)", f"shape {values.shape}"))
        if check_finite and np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
            raise ValueError(message("batches", name, "finite", where_bad(values, ~np.isfinite(values))))
        self.values, self.name, self.num_examples = _jax_dtype(values, "batches", name), name, len(values)

    def sizes(self, parts: list[np.ndarray]) -> None:
        del parts

    def fit(self, sizes: None, parts: list[np.ndarray], length: int) -> None:
        del sizes, parts, length

    def distinct(self, part: np.ndarray) -> list[int | None]:
        del part
        return [None]

    def take(self, part: np.ndarray, length: int, size: None, spare: int) -> np.ndarray:
        del size
        return _pad(self.values[part], length, self.values[spare])


class _Counter:
    """Counts distinct ids in O(len(ids)): every id writes its position, and the ones that find their own are the
    distinct ones."""

    def __init__(self, num_ids: int) -> None:
        self.num_ids = num_ids
        self.seen: np.ndarray | None = None

    def __call__(self, ids: np.ndarray) -> int:
        if self.num_ids > 1 << 26:  # 256 MB of scratch: rather sort
            return len(np.unique(ids))
        if self.seen is None:
            self.seen = np.zeros(self.num_ids + 1, np.int32)
        positions = np.arange(len(ids), dtype=np.int32)
        at = np.where((ids >= 0) & (ids < self.num_ids), ids, self.num_ids)
        self.seen[at] = positions
        return int(np.count_nonzero(self.seen[at] == positions))


def is_feature(x: object) -> bool:
    return isinstance(x, (Sparse, Lists, Ids, Array))


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
    array = np.asarray(x)
    if array.dtype == object or (array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating)):
        do = "Use a SciPy matrix, an array, or a list of id lists."
        raise TypeError(message("batches", path, "numbers", f"{type(x).__name__} of {array.dtype=}", do))
    if array.ndim and np.issubdtype(array.dtype, np.integer):
        return Ids(array, path, num_rows, padding_idx)
    return Array(array, path, check_finite)


def where_bad(values: np.ndarray, bad: np.ndarray) -> str:
    if not bad.any():
        return f"shape {values.shape}"
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{values[at]} at position {at if len(at) > 1 else at[0]}"


def _pad(values: np.ndarray, length: int, fill: Any) -> np.ndarray:
    """values (k, ...) with `fill` up to (length, ...)."""
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
    csr = matrix.tocsr()
    if csr.nnz:
        bad = (csr.indices < 0) | (csr.indices >= csr.shape[1])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
            raise ValueError(
                message(
                    function, argument, f"of column indices in [0, {csr.shape[1]})", f"{csr.indices[at]} in row {row}"
                )
            )
    if csr is matrix or np.shares_memory(csr.data, matrix.data):
        csr = csr.copy()
    csr.sum_duplicates()  # sorts too; keeps explicit zeros
    csr.data = _jax_dtype(csr.data, function, argument)
    return csr


def _jax_dtype(values: np.ndarray, function: str, argument: str) -> np.ndarray:
    """In the dtype that JAX keeps them in: 64 bits become 32 unless jax_enable_x64 is on. Integers that do not fit
    raise."""
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if np.issubdtype(values.dtype, np.integer) and values.size:
        limits, flat = np.iinfo(dtype), values.reshape(-1)
        for at in (int(flat.argmax()), int(flat.argmin())):
            if not limits.min <= int(flat[at]) <= limits.max:
                raise OverflowError(message(function, argument, f"within {dtype}", f"{flat[at]} at position {at}"))
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


def _columns(csr: Any, rows: np.ndarray) -> np.ndarray:
    starts = csr.indptr[rows].astype(np.int64)
    return csr.indices[_spans(starts, csr.indptr[rows + 1] - starts)]


def entries(csr: Any, rows: np.ndarray, length: int, nse: int) -> tuple[np.ndarray, np.ndarray]:
    """data (nse,) and indices (nse, 2) of some rows, as rows 0, 1, ... of `length`, padded with (length, num_columns)
    and 0."""
    starts = csr.indptr[rows].astype(np.int64)
    lengths = csr.indptr[rows + 1] - starts
    at = _spans(starts, lengths)
    data = np.zeros(nse, csr.data.dtype)
    indices = np.empty((nse, 2), np.int32)
    data[: len(at)] = csr.data[at]
    indices[: len(at), 0] = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
    indices[: len(at), 1] = csr.indices[at]
    indices[len(at) :] = (length, csr.shape[1])
    return data, indices
