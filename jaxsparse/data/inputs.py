"""Checks of the values that users pass in: arrays, ids, SciPy matrices, columns of data frames.

A bad value raises here, with the value and its position, so device code checks no values. Nothing is clipped, wrapped,
dropped or made dense. Data frames are recognised by their attributes; no data frame package is imported.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import JAXSparse

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse.data.ragged import pieces


def as_array(x: Any, name: str) -> np.ndarray:
    """x as a NumPy array of any dtype.

    Raises:
      TypeError: if it is sparse, ragged, categorical, has missing values, or columns of several kinds. NumPy would
        convert these to something else than they mean.
    """
    if not isinstance(x, (np.ndarray, list, tuple)):
        _check_kind(x, name)
    elif isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        at = int(np.flatnonzero(np.ma.getmaskarray(x))[0])
        got = f"{x.dtype}, masked at {position_in(at, x.shape)}"
        do = "Fill them, .filled(...), or leave these examples out."
        raise TypeError(message("batches", name, "without missing values", got, do))
    try:
        return np.asarray(x)
    except ValueError:  # rows of several lengths
        must = "an array, or rows of equal length"
        do = "Ragged features are lists of id lists, or SciPy matrices."
        raise TypeError(message("batches", name, must, reprlib.repr(x), do)) from None


def _check_kind(x: Any, name: str) -> None:
    """Raises TypeError for objects whose meaning np.asarray would lose."""
    if scipy.sparse.issparse(x):
        do = f"Make it dense: {name}.toarray(). Matrices are features: they go into x."
        raise TypeError(message("batches", name, "an array", f"a SciPy matrix, {x.format}", do))
    if isinstance(x, JAXSparse):
        do = "Give the SciPy matrix. Batches of it are BCOO."
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
            kind = jax_dtype(values, "batches", at, positions_in(values.shape)).kind
        kinds["ids" if kind in "iu" else "numbers"] = f"{dtype} in {column!r}"
    if len(kinds) > 1:
        do = f"Give features by name: a dict of {name}[column], in which integers are ids."
        raise TypeError(message("batches", name, "a frame of one dtype", " and ".join(kinds.values()), do))


def _check_column(x: Any, name: str) -> None:
    """Raises TypeError for a column of a data frame that is categorical, sparse, or has missing values."""
    dtype = x.dtype
    if str(dtype) == "category":
        do = f"Give its codes, {name}.cat.codes, or js.hash_ids({name}, num_rows)."
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
        do = "Give floating-point numbers as an array or a SciPy matrix."
        raise TypeError(message("batches", name, "lists of integers", f"{reprlib.repr(row)} at position {at}", do))
    return ids


def check_ids(
    ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None, position: Callable[[int], str]
) -> None:
    """Raises, with its position, for an id that is not in [0, num_rows), or in [0, 2**31) without num_rows."""
    size = 2**31
    if num_rows is not None:
        size = num_rows
        if not 0 <= num_rows < MAX_ROWS:
            raise ValueError(message("batches", "num_rows", f"between 0 and {MAX_ROWS - 1}", num_rows))
    if padding_idx is not None and not -(2**31) < padding_idx < 2**31:
        raise ValueError(message("batches", "padding_idx", "within int32", padding_idx))
    for first, piece in pieces(ids):
        if not piece.size or (piece.min() >= 0 and piece.max() < size):
            continue
        bad = (piece < 0) | (piece >= size)
        if padding_idx is not None:
            bad &= piece != padding_idx
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            value = int(piece[at])
            must = f"ids in [0, {num_rows})" if num_rows is not None else "ids in [0, 2**31)"
            do = "Integer arrays are ids; cast them to float if these are numbers. "
            do += "If this id means padding, give it as padding_idx=."
            error = OverflowError if value > 2**31 - 1 else ValueError
            raise error(message("batches", name, must, f"{value} at {position(first + at)}", do))


def check_finite(values: np.ndarray, dtype: np.dtype, name: str, position: Callable[[int], str]) -> None:
    """Raises, with the position, for NaN, inf, and values that become inf in `dtype`, the one on the device."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return
    for first, piece in pieces(values):
        finite = np.isfinite(piece.astype(dtype, copy=False))
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            raise ValueError(message("batches", name, "finite", f"{piece[at]} at {position(first + at)}"))


def jax_dtype(values: np.ndarray, function: str, argument: str, position: Callable[[int], str]) -> np.dtype:
    """The dtype in which JAX keeps the values: 64 bits become 32 unless jax_enable_x64 is on.

    Raises:
      OverflowError: for integers that do not fit.
      TypeError: for a dtype that JAX does not have.
    """
    try:
        dtype = np.dtype(jax.typeof(np.empty(0, values.dtype)).dtype)
    except TypeError:
        got, do = _no_number(values, position)
        raise TypeError(message(function, argument, "of numbers that JAX has a dtype for", got, do)) from None
    if values.dtype.kind in "iu" and dtype != values.dtype:
        limits = np.iinfo(dtype)
        for first, piece in pieces(values) if values.ndim else [(0, values.reshape(-1))]:
            for at in (int(piece.argmax()), int(piece.argmin())) if piece.size else ():
                if not limits.min <= int(piece[at]) <= limits.max:
                    got = f"{piece[at]} at {position(first + at)}"
                    raise OverflowError(message(function, argument, f"within {dtype}", got))
    return dtype


def _no_number(values: np.ndarray, position: Callable[[int], str]) -> tuple[str, str]:
    """For values without a JAX dtype: what they are, and what the user can do."""
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
    return "object", "All values are numbers: cast them, .astype('int32') or .astype('float32')."


def position_in(at: int, shape: tuple[int, ...]) -> str:
    return f"position {at if len(shape) == 1 else tuple(map(int, np.unravel_index(at, shape)))}"


def positions_in(shape: tuple[int, ...]) -> Callable[[int], str]:
    return lambda at: position_in(at, shape)
