"""A CSR matrix in a folder of memory-mapped arrays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse.data.csr import Csr
from jaxsparse.data.ragged import pieces

_DTYPES = {"data": None, "indices": np.dtype(np.int32), "indptr": np.dtype(np.int64), "shape": np.dtype(np.int64)}


def save_csr(path: str | os.PathLike[str], matrix: Any) -> None:
    """Writes a matrix for `open_csr`. Its parts are written one by one and need not fit into memory together.

    The folder has data.npy, indices.npy (int32), indptr.npy (int64) and shape.npy, for numpy.load. Indices of a row are
    sorted and duplicates summed. The folder is written under a temporary name and renamed at the end, so it is complete
    or absent.

    Args:
      path: the folder to make. It must not exist.
      matrix: a SciPy sparse matrix, or an iterable of matrices that are stacked row-wise.

    Raises:
      FileExistsError: if there is something at `path`.
      TypeError: if a part is no SciPy matrix, or of a dtype that JAX does not have.
      ValueError: if parts differ in columns or dtype, or there are none.
      OverflowError: if the number of columns, or of rows in all, does not fit int32.

    Example:
      >>> import tempfile, scipy.sparse, jaxsparse as js
      >>> folder = tempfile.mkdtemp() + "/x"
      >>> js.save_csr(folder, (scipy.sparse.eye_array(2, 5, k=i, format="csr") for i in range(3)))
      >>> x = js.open_csr(folder)
      >>> x.shape, x.indices.tolist()
      ((6, 5), [0, 1, 1, 2, 2, 3])
    """
    folder = Path(path)
    if folder.exists():
        raise FileExistsError(message("save_csr", "path", "a new folder", f"{folder}, which exists,", "Remove it."))
    parts = [matrix] if scipy.sparse.issparse(matrix) else matrix
    if not isinstance(parts, Iterable) or isinstance(matrix, np.ndarray):
        must = "a SciPy sparse matrix, or an iterable of them"
        raise TypeError(message("save_csr", "matrix", must, type(matrix).__name__))
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write(partial, parts)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(folder: Path, parts: Iterable[Any]) -> None:
    rows, nnz, first = 0, 0, None
    with (
        _Npy(folder / "data.npy") as data,
        _Npy(folder / "indices.npy") as indices,
        _Npy(folder / "indptr.npy") as ends,
    ):
        ends.write(np.zeros(1, np.int64))
        for number, part in enumerate(parts):
            name = f"matrix[{number}]"
            csr = Csr(part, "save_csr", name)
            first = csr if first is None else first
            if csr.shape[1] != first.shape[1]:
                must = f"of {first.shape[1]} columns, as matrix[0] is"
                raise ValueError(message("save_csr", name, must, csr.shape[1]))
            if csr.dtype != first.dtype:
                raise ValueError(message("save_csr", name, f"of {first.dtype}, as matrix[0] is", csr.dtype))
            data.write_all(csr.rows.arrays[0], csr.dtype)
            indices.write_all(csr.rows.arrays[1], np.dtype(np.int32))
            for _, piece in pieces(csr.rows.starts[1:]):
                ends.write(piece.astype(np.int64) + nnz)
            rows, nnz = rows + csr.shape[0], nnz + csr.nnz
            if rows >= MAX_ROWS:
                must = f"of fewer than {MAX_ROWS} rows in all"
                raise OverflowError(message("save_csr", "matrix", must, f"{rows} up to {name}"))
    if first is None:
        raise ValueError(message("save_csr", "matrix", "at least one SciPy matrix", "none"))
    with _Npy(folder / "shape.npy") as shape:
        shape.write(np.array([rows, first.shape[1]], np.int64))


class _Npy:
    """A growing .npy file of one axis. The length in its header is written at the end, into reserved space."""

    def __init__(self, path: Path) -> None:
        self._path, self._length = path, 0
        self._dtype: np.dtype | None = None  # that of the first values

    def __enter__(self) -> _Npy:
        self._file: BinaryIO = open(self._path, "wb")
        return self

    def write(self, values: np.ndarray) -> None:
        if self._dtype is None:
            self._dtype = values.dtype
            self._header()
        self._file.write(np.ascontiguousarray(values).data)
        self._length += len(values)

    def write_all(self, values: np.ndarray, dtype: np.dtype) -> None:
        self.write(np.zeros(0, dtype))  # the dtype, even if there are no values
        for _, piece in pieces(values):
            self.write(piece.astype(dtype, copy=False))

    def __exit__(self, *error: object) -> None:
        with self._file:
            if error[0] is None and self._dtype is not None:
                self._file.seek(0)
                self._header()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _header(self) -> None:
        assert self._dtype is not None
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def open_csr(path: str | os.PathLike[str]) -> scipy.sparse.csr_array:
    """Opens a matrix that `save_csr` wrote, memory-mapped: data are read when they are used.

    Args:
      path: the folder.

    Returns:
      A scipy.sparse.csr_array with read-only arrays. `js.batches` uses it without a copy. SciPy's own operations may
      copy the indices, because indptr is int64 and indices are int32.

    Raises:
      FileNotFoundError: if a file of the folder is missing.
      ValueError: if a file is not one of save_csr. Both errors name the file.

    Example:
      >>> import tempfile, scipy.sparse, jaxsparse as js
      >>> folder = tempfile.mkdtemp() + "/x"
      >>> js.save_csr(folder, scipy.sparse.eye_array(3))
      >>> len(js.batches(js.open_csr(folder), batch_size=2))
      2
    """
    arrays = dict(_opened(Path(path)))
    shape = arrays.pop("shape")
    if len(shape) != 2 or shape.min() < 0:
        must = "a folder whose shape.npy has two sizes"
        raise ValueError(message("open_csr", "path", must, f"{shape.tolist()} in {path}"))
    nnz = len(arrays["data"])
    for name, length in {"indices": nnz, "indptr": int(shape[0]) + 1}.items():
        if len(arrays[name]) != length:
            must, got = f"a folder whose {name}.npy has {length} numbers", f"{len(arrays[name])} in {path}"
            raise ValueError(message("open_csr", "path", must, got))
    if arrays["indptr"][-1] != nnz:
        must, got = f"a folder whose indptr.npy ends with {nnz}", f"{arrays['indptr'][-1]} in {path}"
        raise ValueError(message("open_csr", "path", must, got))
    matrix = scipy.sparse.csr_array(tuple(map(int, shape)), dtype=arrays["data"].dtype)
    matrix.data, matrix.indices, matrix.indptr = arrays["data"], arrays["indices"], arrays["indptr"]  # not converted
    return matrix


def _opened(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name, dtype in _DTYPES.items():
        file = folder / f"{name}.npy"
        if not file.exists():
            do = "Write it again with js.save_csr."
            raise FileNotFoundError(message("open_csr", "path", "a whole folder of js.save_csr", f"no {file}", do))
        try:
            array = np.load(file, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(message("open_csr", "path", "a folder of .npy files", f"{file}: {error}")) from None
        if array.ndim != 1 or array.dtype != (dtype or array.dtype):
            must, got = f"a folder whose {name}.npy is {dtype or 'of numbers'} (n,)", f"{array.dtype} {array.shape}"
            raise ValueError(message("open_csr", "path", must, f"{got} in {file}"))
        yield name, np.asarray(array)
