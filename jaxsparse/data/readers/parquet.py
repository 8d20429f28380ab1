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
    """Chunks of Parquet files and Arrow IPC files (Feather 2). Needs pyarrow: pip install 'jaxsparse[arrow]'.

    Args:
      paths: a file, or a list of files.
      label: the column of the targets, which are numbers.
      weight: the column of the example weights.
      numbers: columns of numbers or booleans. They become one feature, "numbers", float32 (n, len(numbers)).
      ids: columns of integers of at least 0, or of lists of them. Each becomes a feature: int64 (n,), or a list of n
        arrays.
      hashed: columns of strings, bytes, integers, dictionaries of these, or lists of them. Each becomes a feature,
        js.hash_ids(column, num_rows, seed). Each value of a dictionary is hashed once.
      crosses: lists of columns. Each becomes a feature "a x b", js.cross(columns, num_rows, seed).
      num_rows: rows of the tables that hashed features index: an int, or a dict of ints by feature name.
      seed: of the hashes: an int, or a dict of ints by feature name.
      fill: the value of a null in `numbers`. By default a null raises.
      missing: the value as which a null is hashed. By default a null raises.
      chunk_rows: the largest number of rows in a chunk. A chunk is within one row group.

    Returns:
      A reader: an iterable of chunks (x, y, weight). Each `iter()` reads from the beginning. x is a dict of features by
        name; y and weight are float32 (n,), or None without `label` or `weight`.

    Raises:
      ImportError: without pyarrow.
      FileNotFoundError: if a file does not exist.
      ValueError: for a null, a number that is not finite, or a negative id, with file, row group and row; if a column
        does not exist or is of another type; if a file is damaged, or neither Parquet nor Arrow.

    Example:
      >>> import jaxsparse as js
      >>> reader = lambda: js.read_parquet("day_0.parquet", label="click", hashed=["ad"], num_rows=2**20)
    """
    roles = Columns(
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
    return _Parquet(paths, roles, chunk_rows)


class _Parquet(Reader):
    def __init__(self, paths: Any, roles: Columns, chunk_rows: int) -> None:
        super().__init__("read_parquet", paths, chunk_rows)
        self.roles = roles
        try:
            self.arrow = importlib.import_module("pyarrow")
        except ImportError as error:
            raise ImportError("js.read_parquet needs pyarrow: pip install 'jaxsparse[arrow]'.") from error

    def chunks(self, path: str) -> Iterator[tuple[Chunk, int]]:
        for where, first, batch in self.batches(path):
            rows = _Rows(self.roles, batch, f"js.read_parquet: {path}, {where}", first)
            yield self.roles.chunk(rows.column, rows.number), len(batch)

    def batches(self, path: str) -> Iterator[tuple[str, int, Any]]:
        """For each record batch: its row group, its first row there, and the batch."""
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
        self.roles.check(path, schema.names)
        text = ("string", "large_string", "binary")
        as_dictionary = [name for name in self.roles.hashed if str(schema.field(name).type) in text]
        with parquet.ParquetFile(path, read_dictionary=as_dictionary) as file:
            for group in range(file.num_row_groups):
                yield (
                    f"row group {group}",
                    file.iter_batches(self.chunk_rows, row_groups=[group], columns=self.roles.names),
                )

    def _ipc(self, path: str) -> Iterator[tuple[str, Any]]:
        with self.arrow.OSFile(path, "rb") as source:
            file = self.arrow.ipc.open_file(source)
            self.roles.check(path, file.schema.names)
            for number in range(file.num_record_batches):
                yield f"record batch {number}", [file.get_batch(number)]


class _Rows:
    """Some rows of a file, and their place in it for errors."""

    def __init__(self, roles: Columns, batch: Any, where: str, first: int) -> None:
        self.roles, self.batch, self.where, self.first = roles, batch, where, first

    def error(self, row: Any, name: str, reason: str) -> ValueError:
        return ValueError(f"{self.where}, row {self.first + int(row)}: column {name!r} {reason}")

    def number(self, name: str) -> np.ndarray:
        column, fill = self.batch.column(name), self.roles.fill_of(name)
        kind = str(column.type)
        if not kind.startswith(("int", "uint", "float", "double", "half", "decimal", "bool")):
            raise self.error(0, name, f"is of {kind}, not of numbers")
        if column.null_count and fill is None:
            at = np.flatnonzero(np.asarray(column.is_null()))[0]
            raise self.error(at, name, "is null; give fill=, the value of a null number")
        column = column.cast("int8") if kind == "bool" else column
        values = np.array(column.cast("double", safe=False).to_numpy(zero_copy_only=False))
        if column.null_count:
            values[np.asarray(column.is_null())] = fill
        bad = ~(np.abs(values) <= np.finfo(np.float32).max) | ((values < 0) & (name == self.roles.weight))
        if bad.any():
            at = np.flatnonzero(bad)[0]
            reason = "and a weight" if np.isfinite(values[at]) and values[at] < 0 else "not a finite number"
            raise self.error(at, name, f"is {values[at]}, {reason}")
        return finite(values)

    def column(self, name: str) -> Any:
        column = self.batch.column(name)
        flat, starts = column, np.arange(len(column) + 1)
        if is_list := str(column.type).startswith(("list<", "large_list<")):
            flat, starts = column.flatten(), np.asarray(column.offsets)
            starts = starts - starts[0]
        for values, of_values in ((column, np.arange(len(column))), (flat, starts)):
            if values.null_count and (self.roles.missing is None or name in self.roles.ids or values is not flat):
                at = np.flatnonzero(np.asarray(values.is_null()))[0]
                row = np.searchsorted(of_values, at, side="right") - 1
                raise self.error(
                    row,
                    name,
                    "is null"
                    + ("" if name in self.roles.ids else "; give missing=, the value as which a null is hashed"),
                )
        if name not in self.roles.ids:
            return column
        kind = str(flat.type)
        if not kind.startswith(("int", "uint")):
            raise self.error(0, name, f"is of {column.type}, not of integers: give it as hashed or numbers")
        ids = flat.to_numpy(zero_copy_only=False)
        if (bad := (ids < 0) | (ids > 2**63 - 1)).any():
            at = np.flatnonzero(bad)[0]
            raise self.error(np.searchsorted(starts, at, side="right") - 1, name, f"has {ids[at]}, which is not an id")
        ids = ids.astype(np.int64)
        return np.split(ids, starts[1:-1]) if is_list else ids
