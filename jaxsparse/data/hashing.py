"""Row ids from strings, bytes and 64-bit integers, by hashing. Host side.

Columns of data frames are recognised by their attributes; no data frame package is imported.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse._names import OF_NUM_ROWS, other_names
from jaxsparse.data.murmur import hash_bytes, hash_integers, hash_words


class Table:
    """Fields of a file as slices of its bytes, without a Python string for each.

    Args:
      buffer, starts, lengths: as of `hash_bytes`; (n, columns).
      seeds: by column, the seeds of columns to be hashed. All are hashed in one pass over the file, in half the time.
    """

    def __init__(self, buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seeds: Mapping[int, int]) -> None:
        self.buffer, self.starts, self.lengths, self._seeds = buffer, starts, lengths, seeds
        self._hashes: np.ndarray | None = None

    def hashes(self, column: int, seed: int) -> np.ndarray:
        """uint32 (n,)."""
        if self._seeds.get(column) != seed:
            return hash_bytes(self.buffer, self.starts[:, column], self.lengths[:, column], seed)
        columns = list(self._seeds)
        if self._hashes is None:
            seeds = np.tile(np.array(list(self._seeds.values()), np.uint32), len(self.starts))
            starts, lengths = (of[:, columns].reshape(-1) for of in (self.starts, self.lengths))
            self._hashes = hash_bytes(self.buffer, starts, lengths, seeds).reshape(-1, len(columns))
        return self._hashes[:, columns.index(column)]


@dataclasses.dataclass(frozen=True)
class Fields:
    """A column of a `Table`."""

    table: Table
    column: int


@other_names("hash_ids", OF_NUM_ROWS)
def hash_ids(values: Any, num_rows: int, seed: int = 0, *, missing: Any = None) -> Any:
    """Row ids of strings, bytes or large integers: MurmurHash3 (x86, 32 bits) of each value, modulo num_rows.

    Strings are hashed as UTF-8, bytes unchanged, integers as 8 bytes, little-endian, two's complement. So 5 has the
    same id in each integer dtype, and "5" has another one. Ids are those of
    `mmh3.hash(value, seed, signed=False) % num_rows`, on every machine and in every version.

    Args:
      values: strings, bytes or integers, all of one type: a NumPy array of any shape, a list, a column of pandas or
        polars, an Arrow array; or a list of lists of them. Each category of a categorical or Arrow dictionary is hashed
        once; hashes of pandas categories are cached.
      num_rows: rows of the table, in [1, 2**31 - 1). Of n distinct values, n below num_rows, a share
        of about n / num_rows collides with another one.
      seed: in [0, 2**32). Another seed gives other collisions.
      missing: the value as which None, NaN and NA are hashed, of the same type as the others: "" for strings, say. By
        default missing values raise.

    Returns:
      int32, of values' shape; a list of int32 arrays for a list of lists.

    Raises:
      TypeError: if values are of other types, or of several.
      ValueError: if a value is missing and `missing` is not given, or num_rows or seed is out of range.
      OverflowError: if an integer does not fit 64 bits.

    Example:
      >>> import jaxsparse as js
      >>> js.hash_ids(["spam", "egg", "spam"], 1000).tolist()
      [960, 638, 960]
      >>> [ids.tolist() for ids in js.hash_ids([[7, 8], [], [7]], 1000)]
      [[267, 271], [], [267]]

    References:
      Appleby, MurmurHash3 (SMHasher); Weinberger et al., "Feature hashing for large scale multitask learning"
    """
    _check_range("hash_ids", num_rows, seed)
    if hasattr(values, "chunks") and hasattr(values, "type"):  # of Arrow
        values = values.combine_chunks()
    if isinstance(values, (list, tuple)) and isinstance(next(iter(values), None), (list, tuple, np.ndarray)):
        for at, row in enumerate(values):
            if not isinstance(row, (list, tuple, np.ndarray)):
                raise TypeError(message("hash_ids", "values", "a list of lists", f"{row!r} at position {at}"))
        lengths = list(map(len, values))
        flat = [value for row in values for value in (row.tolist() if isinstance(row, np.ndarray) else row)]
        ids = hash_ids(flat, num_rows, seed, missing=missing) if flat else np.zeros(0, np.int32)
        return np.split(ids, np.cumsum(lengths)[:-1])
    if hasattr(values, "offsets") and hasattr(values, "flatten"):  # lists of Arrow
        if values.null_count:
            raise ValueError(message("hash_ids", "values", "without missing lists", f"{values.null_count} of them"))
        starts = np.asarray(values.offsets)
        ids = hash_ids(values.flatten(), num_rows, seed, missing=missing)
        return np.split(ids, starts[1:-1] - starts[0]) if len(values) else []
    hashes, shape = _hashed("hash_ids", "values", values, seed, missing)
    return _modulo(hashes, num_rows).reshape(shape)


def cross(columns: Sequence[Any], num_rows: int, seed: int = 0, *, missing: Any = None) -> np.ndarray:
    """Row ids of combinations of columns, such as "country x device". Different combinations may collide.

    The 32-bit hashes of an example's values, in the order of the columns, are hashed as 4-byte little-endian words:
    `mmh3.hash(struct.pack("<2I", hash_of_a, hash_of_b), seed, signed=False) % num_rows`.

    Args:
      columns: two or more columns, each as for `js.hash_ids`, all of the same shape.
      num_rows: rows of the table.
      seed: in [0, 2**32).
      missing: as for `js.hash_ids`, or a list with one value for each column.

    Returns:
      int32, of the columns' shape.

    Raises:
      TypeError: as `js.hash_ids`.
      ValueError: for fewer than two columns, or several shapes; and as `js.hash_ids`.

    Example:
      >>> import jaxsparse as js
      >>> js.cross([["de", "fr", "de"], [1, 1, 2]], 1000).tolist()
      [296, 430, 499]
    """
    _check_range("cross", num_rows, seed)
    if isinstance(columns, Mapping) or hasattr(columns, "columns"):  # iterating would give the names
        do = "Give its columns: [frame[name] for name in names]."
        raise TypeError(message("cross", "columns", "a list of columns", type(columns).__name__, do))
    if len(columns) < 2 or isinstance(columns, (str, bytes)):
        raise ValueError(message("cross", "columns", "two columns or more", len(columns), "For one: js.hash_ids."))
    fill_values = missing if isinstance(missing, (list, tuple)) else [missing] * len(columns)
    if len(fill_values) != len(columns):
        raise ValueError(message("cross", "missing", f"one value, or {len(columns)} in a list", len(fill_values)))
    words: list[np.ndarray] = []
    shapes: list[tuple[int, ...]] = []
    for n, (column, fill_value) in enumerate(zip(columns, fill_values, strict=True)):
        hashes, shape = _hashed("cross", f"columns[{n}]", column, seed, fill_value)
        if shapes and shape != shapes[0]:
            raise ValueError(message("cross", f"columns[{n}]", f"of shape {shapes[0]}, as columns[0] is", shape))
        words.append(hashes)
        shapes.append(shape)
    return _modulo(hash_words(words, seed), num_rows).reshape(shapes[0])


def _check_range(function: str, num_rows: Any, seed: Any) -> None:
    for argument, value, low, high in (("num_rows", num_rows, 1, MAX_ROWS), ("seed", seed, 0, 2**32)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value < high:
            raise ValueError(message(function, argument, f"an integer in [{low}, {high})", repr(value)))


def _modulo(hashes: np.ndarray, num_rows: int) -> np.ndarray:
    n = np.uint32(num_rows)
    return (hashes - hashes // n * n).astype(np.int32)  # NumPy's % is seven times as slow


def _hashed(function: str, name: str, values: Any, seed: int, missing: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """The 32-bit hashes of a column, flattened, and its shape."""
    column = _Column(function, name, missing)
    hashes, is_missing = column.hashes(values, seed)
    is_array = hasattr(values, "shape") and hasattr(values, "dtype")  # of NumPy or JAX, or a column
    shape = np.shape(values) if is_array or np.isscalar(values) else (len(hashes),)
    if is_missing is not None and is_missing.any():
        if missing is None:
            at = int(np.flatnonzero(is_missing)[0])
            do = 'Give missing=, the value that they are hashed as: "" for strings, -1 for integers, say.'
            must = "without missing values"
            raise ValueError(message(function, name, must, f"one at position {at}, {is_missing.sum()} in all,", do))
        hashes = np.where(is_missing, _Column(function, "missing", None).hashes([missing], seed)[0], hashes)
    return hashes, shape


class _Column:
    """Hashes the values of a column; its names are for errors."""

    def __init__(self, function: str, name: str, missing: Any) -> None:
        self.function, self.name, self.missing = function, name, missing

    def hashes(self, values: Any, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The hashes, flattened, and a mask of missing values, or None if there are none."""
        if isinstance(values, Fields):
            return values.table.hashes(values.column, seed), None
        if isinstance(values, (list, tuple)):
            return self.of_objects(list(values), seed)
        if hasattr(values, "buffers") and hasattr(values, "type"):
            return self.of_arrow(values, seed)
        if hasattr(values, "chunks") and hasattr(values, "type"):
            return self.of_arrow(values.combine_chunks(), seed)
        if isinstance(values, (Mapping, np.ma.MaskedArray)) or hasattr(values, "columns"):
            got = type(values).__name__
            do = "Give one of its columns." if got != "MaskedArray" else "Fill it, .filled(...), with what missing is."
            raise TypeError(message(self.function, self.name, "a column: strings, bytes or integers", got, do))
        if hasattr(values, "to_physical"):
            return self.of_polars(values, seed)
        categorical = getattr(values, "cat", values)  # of a pandas Series
        if hasattr(categorical, "categories") and hasattr(categorical, "codes"):
            codes = np.asarray(categorical.codes)
            return _hashes_of_codes(self.of_categories(categorical.categories, seed), codes, codes < 0)
        if hasattr(values, "isna") and hasattr(values, "dropna") and values.ndim == 1:  # pandas
            is_missing = np.asarray(values.isna())
            if is_missing.any():
                hashes = np.zeros(len(is_missing), np.uint32)
                hashes[~is_missing] = self.hashes(values.dropna(), seed)[0]
                return hashes, is_missing
        array = np.asarray(values)
        return self.of_array(array.reshape(-1), seed)

    def of_array(self, array: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        kind = array.dtype.kind
        if kind in "iu":
            return hash_integers(array, seed), None
        if kind == "S":  # NumPy strips zeros at the end of bytes
            width = array.dtype.itemsize
            buffer = np.frombuffer(array.tobytes() + bytes(4), np.uint8)
            lengths = np.strings.str_len(array)
            return hash_bytes(buffer, np.arange(len(array), dtype=np.int64) * width, lengths, seed), None
        if kind == "U" and array.size:
            points = np.ascontiguousarray(array).view(np.uint32 if array.dtype.isnative else array.dtype.str[0] + "u4")
            if array.dtype.itemsize and points.max(initial=0) < 128:  # ASCII is UTF-8
                return self.of_array(points.astype(np.uint8).view(f"S{array.dtype.itemsize // 4}"), seed)
        if kind in "OUT":
            return self.of_objects(array.tolist(), seed)
        if array.size == 0:
            return _NO_HASHES, None
        do = "Cast it to integers: .astype('int64')." if kind in "fb" else ""
        do += " Missing values make floats of integers: read the column as 'Int64'." if kind == "f" else ""
        raise TypeError(message(self.function, self.name, "strings, bytes or integers", array.dtype, do.strip()))

    def of_objects(self, values: list[Any], seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        for separator in ("\0", b"\0"):
            try:
                parts = range(0, len(values), _CHUNK)
                return np.concatenate(
                    [self.of_strings(separator, values[at : at + _CHUNK], seed) for at in parts] or [_NO_HASHES]
                ), None
            except TypeError:  # not all of them are strings, or bytes
                pass
        kinds = set(map(type, values))
        if _all_of_type(kinds, (int, np.integer)):
            return hash_integers(self.integers(values), seed), None
        types = np.fromiter(map(id, map(type, values)), np.int64, len(values))
        is_missing = np.isin(types, [id(kind) for kind in kinds if kind.__name__ in ("NoneType", "NAType", "NaTType")])
        floats = [id(kind) for kind in kinds if issubclass(kind, (float, np.floating))]
        for at in np.flatnonzero(np.isin(types, floats)):
            is_missing[at] = values[at] != values[at]
        present_at = np.flatnonzero(~is_missing)
        present = [values[at] for at in present_at]
        if not _has_one_type(present):
            self.raise_mixed(values, present_at)
        hashes = np.zeros(len(values), np.uint32)
        hashes[present_at] = self.of_objects(present, seed)[0]
        return hashes, is_missing

    def raise_mixed(self, values: list[Any], present_at: np.ndarray) -> None:
        first, kinds = type(values[present_at[0]]), (str, bytes, (int, np.integer))
        kind: Any = next((kind for kind in kinds if _all_of_type({first}, kind)), ())
        at = int(
            next(
                (at for at in present_at if not isinstance(values[at], kind) or isinstance(values[at], bool)),
                present_at[0],
            )
        )
        must = "strings, bytes or integers, all of one kind"
        raise TypeError(message(self.function, self.name, must, f"{values[at]!r} at position {at}"))

    def of_strings(self, separator: Any, values: list[Any], seed: int) -> np.ndarray:
        """Hashes of strings or bytes, which are joined with zeros between them."""
        if separator == b"\0" and not _all_of_type(set(map(type, values)), bytes):
            raise TypeError  # bytes.join would also take other objects with a buffer
        joined = separator.join(values)
        try:
            data = joined.encode() if isinstance(joined, str) else joined
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON allows
            got = repr(joined[max(error.start - 10, 0) : error.end + 10])
            raise ValueError(message(self.function, self.name, "strings that UTF-8 can encode", got)) from None
        buffer = np.frombuffer(data + bytes(4), np.uint8)
        ends = np.flatnonzero(buffer[: len(data)] == 0)
        if len(ends) != len(values) - 1:  # some values have zeros
            encoded = [value.encode() if isinstance(value, str) else value for value in values]
            ends = np.cumsum([len(value) + 1 for value in encoded])[:-1] - 1
        starts = np.concatenate([[0], ends + 1])
        return hash_bytes(buffer, starts, np.append(ends, len(data)) - starts, seed)

    def integers(self, values: list[Any]) -> np.ndarray:
        try:
            return np.array(values, np.int64)
        except OverflowError:
            low, high = min(map(int, values)), max(map(int, values))
            if low < -(2**63) or high >= 2**64:
                bad = low if low < -(2**63) else high
                got = f"{bad} at position {values.index(bad)}"
                raise OverflowError(message(self.function, self.name, "integers of 64 bits", got)) from None
            return np.array([int(value) % 2**64 for value in values], np.uint64)

    def of_categories(self, categories: Any, seed: int) -> np.ndarray:
        """The hash of each category, cached for as long as the categories exist."""
        key = id(categories), seed
        cached = _CATEGORY_HASHES.get(key)
        if cached is None or cached[0]() is not categories:
            try:
                reference = weakref.ref(categories, lambda _: _CATEGORY_HASHES.pop(key, None))
            except TypeError:
                return self.hashes(categories, seed)[0]
            cached = _CATEGORY_HASHES[key] = reference, self.hashes(categories, seed)[0]
        return cached[1]

    def of_polars(self, series: Any, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        is_missing = series.is_null().to_numpy()
        if str(series.dtype).startswith(("Categorical", "Enum")):
            distinct = series.drop_nulls().unique()
            numbers = distinct.to_physical().to_numpy()
            order = np.argsort(numbers)
            hashes = self.of_objects(distinct.cast(str).to_list(), seed)[0][order]
            codes = np.searchsorted(numbers[order], series.to_physical().fill_null(0).to_numpy())
            return _hashes_of_codes(hashes, np.minimum(codes, len(order) - 1), is_missing)
        if str(series.dtype) in ("String", "Binary", "Object"):
            return self.of_objects(series.to_list(), seed)
        if series.dtype.is_integer() and is_missing.any():
            series = series.fill_null(0)
        return self.of_array(series.to_numpy(), seed)[0], is_missing

    def of_arrow(self, array: Any, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        is_missing = np.asarray(array.is_null()) if array.null_count else None
        kind = str(array.type)
        if hasattr(array, "dictionary"):
            codes = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
            hashes, is_missing_value = self.hashes(array.dictionary, seed)
            if is_missing_value is not None and len(is_missing_value):
                is_missing = is_missing_value[codes] if is_missing is None else is_missing | is_missing_value[codes]
            return _hashes_of_codes(hashes, codes, is_missing)
        if kind in ("string", "large_string", "binary", "large_binary"):
            _, offsets, data = array.buffers()
            wide = np.int64 if kind.startswith("large") else np.int32
            given = np.frombuffer(offsets, wide) if offsets is not None else np.zeros(1, wide)
            ends: np.ndarray = given[array.offset : array.offset + len(array) + 1].astype(np.int64)
            first, last = (int(ends[0]), int(ends[-1])) if len(array) else (0, 0)
            buffer = np.zeros(last - first + 4, np.uint8)
            if last > first:
                buffer[:-4] = np.frombuffer(data, np.uint8)[first:last]
            return hash_bytes(buffer, ends[:-1] - first, np.diff(ends), seed), is_missing
        if kind in ("string_view", "binary_view"):
            return self.of_arrow(array.cast(f"large_{kind.removesuffix('_view')}"), seed)
        if kind.startswith(("int", "uint")) and is_missing is not None:
            array = array.fill_null(0)
        return self.of_array(array.to_numpy(zero_copy_only=False), seed)[0], is_missing


_CHUNK = 1 << 14  # values that are joined at a time; they fit into the CPU cache
_NO_HASHES = np.zeros(0, np.uint32)
_CATEGORY_HASHES: dict[tuple[int, int], tuple[weakref.ref[Any], np.ndarray]] = {}


def _all_of_type(kinds: set[type], kind: Any) -> bool:
    return all(issubclass(k, kind) and k is not bool for k in kinds)


def _has_one_type(values: list[Any]) -> bool:
    kinds = set(map(type, values))
    return any(_all_of_type(kinds, kind) for kind in (str, bytes, (int, np.integer)))


def _hashes_of_codes(
    hashes: np.ndarray, codes: np.ndarray, is_missing: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The hash of each code's category. Hashes at missing codes are arbitrary."""
    if not len(hashes):
        return np.zeros(len(codes), np.uint32), is_missing
    return hashes[codes], is_missing  # -1, a missing code, reads the last one
