"""SciPy matrices as CSR with sorted, distinct indices. A matrix that has these is used without a copy, and checked in
pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse.data.inputs import jax_dtype
from jaxsparse.data.ragged import PIECE, Ragged


class Csr:
    """A CSR matrix whose rows have increasing indices.

    Attributes:
      rows: data and indices, in their given dtypes.
      shape: (rows, columns).
      dtype: the dtype that JAX keeps the data in.
    """

    def __init__(self, matrix: Any, function: str, argument: str) -> None:
        csr = _canonical(matrix, function, argument)
        self.shape = int(csr.shape[0]), int(csr.shape[1])
        self.nnz = int(csr.indptr[-1])
        self.rows = Ragged((csr.data[: self.nnz], csr.indices[: self.nnz]), csr.indptr)
        # SciPy slices rows in half the time, but converts all indices if indices and indptr differ in dtype
        is_one_dtype = csr.indices.dtype == csr.indptr.dtype and csr.indptr.dtype in (np.int32, np.int64)
        self._scipy = csr if is_one_dtype else None
        self.dtype = jax_dtype(self.rows.arrays[0], function, argument, self.entry_at)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Data, indices and lengths of some rows."""
        if self._scipy is None:
            data, indices, lengths = self.rows.take(rows)
        else:
            part = self._scipy[rows]
            data, indices, lengths = part.data, part.indices, np.diff(part.indptr)
        return data.astype(self.dtype, copy=False), indices.astype(np.int32, copy=False), lengths

    def entry_at(self, at: int) -> str:
        return f"row {row_of(self.rows.starts, at)}, column {self.rows.arrays[1][at]}"


def row_of(indptr: np.ndarray, at: int) -> int:
    return int(np.searchsorted(indptr, at, side="right")) - 1


def _canonical(matrix: Any, function: str, argument: str) -> Any:
    """The matrix as CSR with sorted indices and no duplicates. The caller's matrix is not changed."""
    if not scipy.sparse.issparse(matrix):
        do = "Dense arrays need no conversion."
        raise TypeError(message(function, argument, "a SciPy sparse matrix", type(matrix).__name__, do))
    if matrix.ndim != 2:
        raise ValueError(message(function, argument, "of two dimensions", f"shape {matrix.shape}"))
    for size in matrix.shape:
        if size >= MAX_ROWS:
            raise OverflowError(message(function, argument, f"of dimensions below {MAX_ROWS}", f"shape {matrix.shape}"))
    # SciPy's constructors do not check indices, and its conversions then write out of bounds
    if matrix.format in ("csr", "csc") and _is_sorted(matrix, function, argument) and matrix.format == "csr":
        return matrix
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()  # sorts too; keeps explicit zeros
    return csr


def _is_sorted(matrix: Any, function: str, argument: str) -> bool:
    """Whether the indices of each row of a CSR, or column of a CSC, increase. Raises if an index is out of bounds."""
    major, minor = (0, 1) if matrix.format == "csr" else (1, 0)
    indptr, indices, size = matrix.indptr, matrix.indices, matrix.shape[minor]
    if len(indptr) != matrix.shape[major] + 1 or len(indices) != len(matrix.data):
        got = f"lengths {len(indptr)}, {len(indices)} and {len(matrix.data)} for shape {matrix.shape}"
        raise ValueError(message(function, argument, "of arrays indptr, indices and data with matching lengths", got))
    axes, increases = ("row", "column"), True
    for first in range(0, len(indptr) - 1, PIECE):
        ends = indptr[first : first + PIECE + 1]
        if (first == 0 and ends[0] != 0) or (ends[1:] < ends[:-1]).any() or ends[-1] > len(indices):
            must = "of an indptr that begins with 0, does not decrease and ends within the indices"
            raise ValueError(message(function, argument, must, f"another from {axes[major]} {first} on"))
        for start in range(int(ends[0]), int(ends[-1]), PIECE):
            stop = min(start + PIECE, int(ends[-1]))
            piece = indices[start:stop]
            if piece.min() < 0 or piece.max() >= size:
                at = start + int(np.flatnonzero((piece < 0) | (piece >= size))[0])
                must, where = f"of {axes[minor]} indices in [0, {size})", f"{axes[major]} {row_of(indptr, at)}"
                raise ValueError(message(function, argument, must, f"{indices[at]} in {where}"))
            increases = increases and _increases(indices, ends, start, stop)
    return increases


def _increases(indices: np.ndarray, ends: np.ndarray, start: int, stop: int) -> bool:
    """Whether each index from start to stop is larger than the one before it, or the first of its row."""
    before = max(start - 1, 0)
    rises = indices[before + 1 : stop] > indices[before : stop - 1]  # of before + 1, before + 2, ...
    firsts = ends[np.searchsorted(ends, before + 1) : np.searchsorted(ends, stop)]
    rises[firsts - (before + 1)] = True
    return bool(rises.all())
