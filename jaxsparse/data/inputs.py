"""What comes in from the host, looked at: arrays, ids, SciPy matrices, and columns of data frames.

This is where values are looked at. What cannot work raises here, with the value and where it stands; the device code
behind it need not check anything. Nothing is clipped, wrapped, dropped or made dense. Data frames are known by what
they have, not by their package, which need not be there.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jax.experimental.sparse import JAXSparse

from jaxsparse._checks import MAX_ROWS, message


def as_array(x: Any, name: str) -> np.ndarray:
    """x as a NumPy array, of whatever dtype.

    Raises:
      TypeError: if it is sparse, or ragged, or has missing values, or categories, or columns of several kinds: what
        NumPy would make of these is not what they mean.
    """
    if not isinstance(x, (np.ndarray, list, tuple)):
        _check_kind(x, name)
    try:
        return np.asarray(x)
    except ValueError:  # rows of several lengths
        must = "an array, or rows of one length"
        do = "Ragged features are lists of id lists, or SciPy matrices."
        raise TypeError(message("batches", name, must, reprlib.repr(x), do)) from None


def _check_kind(x: Any, name: str) -> None:
    """Raises TypeError for what means more than the array that NumPy makes of it."""
    if scipy.sparse.issparse(x):
        do = f"Make it dense: {name}.toarray(). Matrices are features: they go into x."
        raise TypeError(message("batches", name, "an array", f"a SciPy matrix, {x.format}", do))
    if isinstance(x, JAXSparse):
        do = "Give the SciPy matrix that it was made of; the batches are BCOO."
        raise TypeError(message("batches", name, "an array or a SciPy matrix", f"a {type(x).__name__} of JAX", do))
    if hasattr(x, "columns") and hasattr(x, "dtypes"):
        _check_frame(x, name)
    elif not isinstance(getattr(x, "dtype", np.dtype(object)), np.dtype):
        _check_column(x, name)


def _check_frame(frame: Any, name: str) -> None:
    """Raises TypeError for a data frame whose columns are not numbers of one kind."""
    kinds = {}
    for n, (column, dtype) in enumerate(zip(frame.columns, frame.dtypes, strict=True)):
        kind = getattr(dtype, "kind", "O")
        if not isinstance(dtype, np.dtype) or kind not in "biufc":
            at = f"{name}[{column!r}]"
            values = as_array(frame.iloc[:, n] if hasattr(frame, "iloc") else frame[column], at)
            kind = as_jax_dtype(values, "batches", at, positions_in(values.shape)).dtype.kind
        kinds["ids" if kind in "iu" else "numbers"] = f"{dtype} in {column!r}"
    if len(kinds) > 1:
        do = f"Give features by name: a dict of {name}[column], in which integers are ids."
        raise TypeError(message("batches", name, "a frame of one dtype", " and ".join(kinds.values()), do))


def _check_column(x: Any, name: str) -> None:
    """Raises TypeError for a column of a data frame that is categorical, sparse, or has missing values."""
    dtype = x.dtype
    if str(dtype) == "category":
        do = f"Give the codes, {name}.cat.codes, or cast it to numbers."
        raise TypeError(message("batches", name, "of numbers", "a categorical", do))
    if str(dtype).startswith("Sparse"):
        do = "Give the SciPy matrix of the sparse columns, frame.sparse.to_coo(), or .sparse.to_dense() of this one."
        raise TypeError(message("batches", name, "dense, or a SciPy matrix", f"a sparse column, {dtype}", do))
    missing = np.asarray(x.isna()) if callable(getattr(x, "isna", None)) else np.zeros(1, bool)
    if missing.any():
        got = f"{dtype}, missing at {position_in(int(np.flatnonzero(missing)[0]), missing.shape)}"
        do = "Fill them, .fillna(...), or leave these examples out."
        raise TypeError(message("batches", name, "without missing values", got, do))


def id_list(row: Any, name: str, at: int) -> np.ndarray:
    ids = as_array(row, name)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        do = "Numbers that are no ids go into an array or a SciPy matrix."
        raise TypeError(message("batches", name, "lists of integers", f"{reprlib.repr(row)} at position {at}", do))
    return ids


def checked_ids(
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
    csr.data = as_jax_dtype(csr.data, function, argument, lambda at: entry_at(csr, at))
    return csr


def as_jax_dtype(values: np.ndarray, function: str, argument: str, position: Callable[[int], str]) -> np.ndarray:
    """In the dtype that JAX keeps them in: 64 bits become 32 unless jax_enable_x64 is on. Integers that do not fit
    raise, and so do dtypes that JAX has not."""
    try:
        dtype = jax.typeof(np.empty(0, values.dtype)).dtype
    except TypeError:
        got, do = _no_number(values, position)
        raise TypeError(message(function, argument, "of numbers that JAX has a dtype for", got, do)) from None
    if values.dtype.kind in "iu" and values.size:
        limits, flat = np.iinfo(dtype), values.reshape(-1)
        for at in (int(flat.argmax()), int(flat.argmin())):
            if not limits.min <= int(flat[at]) <= limits.max:
                raise OverflowError(message(function, argument, f"within {dtype}", f"{flat[at]} at {position(at)}"))
    return values.astype(dtype, copy=False)


def _no_number(values: np.ndarray, position: Callable[[int], str]) -> tuple[str, str]:
    """What these values are, for JAX has no dtype for them, and what to do about it."""
    strings = "Give each string a number: np.unique(values, return_inverse=True)[1]."
    if values.dtype.kind in "USTmMV":
        return str(values.dtype), strings if values.dtype.kind in "UST" else "Cast it to numbers."
    if values.dtype != object:
        return str(values.dtype), "Cast it: .astype('float32')."
    numbers = (int, float, np.number, np.bool_)
    for at, value in enumerate(values.reshape(-1)):
        missing = value is None or type(value).__name__ in ("NAType", "NaTType")
        missing = missing or (isinstance(value, float) and np.isnan(value))
        if missing or not isinstance(value, numbers):
            do = "Cast it to numbers."
            if missing:
                do = "Fill missing values, or leave these examples out."
            elif isinstance(value, str):
                do = strings
            elif isinstance(value, (list, tuple, np.ndarray)):
                do = "Ragged ids are a list of lists: .tolist(), with num_rows=."
            return f"object, {reprlib.repr(value)} at {position(at)}", do
    return "object", "All of it is numbers: cast it, .astype('int32') or .astype('float32')."


def where_bad(values: np.ndarray, bad: np.ndarray) -> str:
    if not bad.any():
        return f"shape {values.shape}"
    at = int(np.flatnonzero(bad)[0])
    return f"{values.reshape(-1)[at]} at {position_in(at, values.shape)}"


def position_in(at: int, shape: tuple[int, ...]) -> str:
    return f"position {at if len(shape) == 1 else tuple(map(int, np.unravel_index(at, shape)))}"


def positions_in(shape: tuple[int, ...]) -> Callable[[int], str]:
    return lambda at: position_in(at, shape)


def entry_at(csr: Any, at: int) -> str:
    return f"row {int(np.searchsorted(csr.indptr, at, side='right')) - 1}, column {csr.indices[at]}"
