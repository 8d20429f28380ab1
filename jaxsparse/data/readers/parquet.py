"""Parquet and Arrow files, by pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.data.readers.columns import Columns, finite
from jaxsparse.data.readers.lines import Chunk, Reader


def read_parquet(
    paths: Any,
    *,
    label: str | None = None,
    weight: str | None = None,
    numbers: Sequence[str] = (),
    ids: Sequence[str] = (),
    hashed: Sequence[str] = (),
    crosses: Sequence[Sequence[str]] = (),
    num_rows: int | Mapping[str, int] | None = None,
    seed: int | Mapping[str, int] = 0,
    fill: float | None = None,
    missing: Any = None,
    chunk_rows: int = 65536,
) -> Reader:
    """Chunks of Parquet files, and of Arrow's own (Feather 2, IPC files). It wants pyarrow: jaxsparse[arrow].

    Args:
      paths: a file, or a list of files.
      label: the column of the targets, numbers.
      weight: the column of the examples' weights.
      numbers: columns of numbers or booleans: together the feature "numbers", float32 (n, len(numbers)).
      ids: columns of integers from 0 on, or of lists of them, each a feature: int64 (n,), or a list of n arrays.
      hashed: columns of strings, bytes, integers or dictionaries of these, or of lists of them, each a feature:
        js.hash_ids(column, num_rows, seed). Of dictionaries each value is hashed once.
      crosses: lists of columns, each a feature "a x b": js.cross(columns, num_rows, seed).
      num_rows: rows of the tables that hashes go into, an int or one by feature name.
      seed: of the hashes, an int or one by feature name.
      fill: what a null among `numbers` counts as; by default it is an error.
      missing: what a null is hashed as; by default it is an error.
      chunk_rows: rows a chunk, at most; a chunk is of one row group.

    Returns:
      A reader, an iterable of chunks (x, y, weight), each pass from the beginning. x is a dict of features by name, y
        and weight are float32 (n,), or None without `label` or `weight`.

    Raises:
      ImportError: without pyarrow.
      FileNotFoundError: if a file is not there.
      ValueError: for nulls, numbers that are not finite and negative ids, with file, row group and row; for columns
        that are not there or of another type; and for files that are damaged or neither Parquet nor Arrow.

    Example:
      >>> import jaxsparse as js
      >>> reader = lambda: js.read_parquet("day_0.parquet", label="click", hashed=["ad"], num_rows=2**20)
    """
    of = Columns(
        "read_parquet",
        label=label,
        weight=weight,
        numbers=numbers,
        ids=ids,
        hashed=hashed,
        crosses=crosses,
        num_rows=num_rows,
        seed=seed,
        fill=fill,
        missing=missing,
    )
    return _Parquet(paths, of, chunk_rows)


class _Parquet(Reader):
    def __init__(self, paths: Any, of: Columns, chunk_rows: int) -> None:
        super().__init__("read_parquet", paths, chunk_rows)
        self.of = of
        try:
            self.arrow = importlib.import_module("pyarrow")
        except ImportError as error:
            raise ImportError("js.read_parquet wants pyarrow: pip install 'jaxsparse[arrow]'.") from error

    def chunks(self, path: str) -> Iterator[tuple[Chunk, int]]:
        for where, first, batch in self.batches(path):
            rows = _Rows(self.of, batch, f"js.read_parquet: {path}, {where}", first)
            yield self.of.chunk(rows.column, rows.number), len(batch)

    def batches(self, path: str) -> Iterator[tuple[str, int, Any]]:
        """Each record batch, where it is, and its first row there."""
        where = "its schema"
        try:
            with open(path, "rb") as file:
                is_arrow = file.read(6) == b"ARROW1"
            for where, group in self._ipc(path) if is_arrow else self._groups(path):
                first = 0
                for batch in group:
                    for at in range(0, len(batch), self.chunk_rows):
                        yield where, first + at, batch.slice(at, self.chunk_rows)
                    first += len(batch)
        except (self.arrow.lib.ArrowException, OSError) as error:
            raise ValueError(f"js.read_parquet: {path}, {where}: {error}") from error

    def _groups(self, path: str) -> Iterator[tuple[str, Any]]:
        parquet = importlib.import_module("pyarrow.parquet")
        schema = parquet.read_schema(path)
        self.of.check(path, schema.names)
        text = ("string", "large_string", "binary")
        as_dictionary = [name for name in self.of.hashed if str(schema.field(name).type) in text]
        with parquet.ParquetFile(path, read_dictionary=as_dictionary) as file:
            for group in range(file.num_row_groups):
                yield (
                    f"row group {group}",
                    file.iter_batches(self.chunk_rows, row_groups=[group], columns=self.of.names),
                )

    def _ipc(self, path: str) -> Iterator[tuple[str, Any]]:
        with self.arrow.OSFile(path, "rb") as source:
            file = self.arrow.ipc.open_file(source)
            self.of.check(path, file.schema.names)
            for number in range(file.num_record_batches):
                yield f"record batch {number}", [file.get_batch(number)]


class _Rows:
    """Some rows of a file, and where they are in it."""

    def __init__(self, of: Columns, batch: Any, where: str, first: int) -> None:
        self.of, self.batch, self.where, self.first = of, batch, where, first

    def error(self, row: Any, name: str, reason: str) -> ValueError:
        return ValueError(f"{self.where}, row {self.first + int(row)}: column {name!r} {reason}")

    def number(self, name: str) -> np.ndarray:
        column, fill = self.batch.column(name), self.of.fill_of(name)
        kind = str(column.type)
        if not kind.startswith(("int", "uint", "float", "double", "half", "decimal", "bool")):
            raise self.error(0, name, f"is of {kind}, no numbers")
        if column.null_count and fill is None:
            at = np.flatnonzero(np.asarray(column.is_null()))[0]
            raise self.error(at, name, "is null; fill= is what missing numbers count as")
        column = column.cast("int8") if kind == "bool" else column
        values = np.array(column.cast("double", safe=False).to_numpy(zero_copy_only=False))
        if column.null_count:
            values[np.asarray(column.is_null())] = fill
        bad = ~(np.abs(values) <= np.finfo(np.float32).max) | ((values < 0) & (name == self.of.weight))
        if bad.any():
            at = np.flatnonzero(bad)[0]
            reason = "and a weight" if np.isfinite(values[at]) and values[at] < 0 else "no finite number"
            raise self.error(at, name, f"is {values[at]}, {reason}")
        return finite(values)

    def column(self, name: str) -> Any:
        column = self.batch.column(name)
        flat, starts = column, np.arange(len(column) + 1)
        if is_list := str(column.type).startswith(("list<", "large_list<")):
            flat, starts = column.flatten(), np.asarray(column.offsets)
            starts = starts - starts[0]
        for values, of_values in ((column, np.arange(len(column))), (flat, starts)):
            if values.null_count and (self.of.missing is None or name in self.of.ids or values is not flat):
                at = np.flatnonzero(np.asarray(values.is_null()))[0]
                row = np.searchsorted(of_values, at, side="right") - 1
                raise self.error(
                    row, name, "is null" + ("" if name in self.of.ids else "; missing= is what it counts as")
                )
        if name not in self.of.ids:
            return column
        kind = str(flat.type)
        if not kind.startswith(("int", "uint")):
            raise self.error(0, name, f"is of {column.type}, no integers: put it among hashed, or numbers")
        ids = flat.to_numpy(zero_copy_only=False)
        if (bad := (ids < 0) | (ids > 2**63 - 1)).any():
            at = np.flatnonzero(bad)[0]
            raise self.error(np.searchsorted(starts, at, side="right") - 1, name, f"has {ids[at]}, no id")
        ids = ids.astype(np.int64)
        return np.split(ids, starts[1:-1]) if is_list else ids
