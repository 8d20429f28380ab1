"""Comma- and tab-separated files."""

from __future__ import annotations

import csv
import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse._checks import message
from jaxsparse._names import OF_PANDAS, other_names
from jaxsparse.data.hashing import Fields, Table
from jaxsparse.data.readers.columns import Columns, check_finite, convert, finite
from jaxsparse.data.readers.digits import integers
from jaxsparse.data.readers.lines import BadRowError, Blocks, Chunk, Reader, open_file, read


@other_names("read_csv", OF_PANDAS)
def read_csv(
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
    columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    quote: str | None = '"',
    chunk_rows: int = 16384,
    bad_lines: Any = None,
) -> Reader:
    """Chunks of comma- or tab-separated files.

    Args:
      paths: a file, or a list of files with the same columns, in UTF-8; gzipped or not.
      label: the column of the targets, which are numbers.
      weight: the column of the example weights.
      numbers: columns of numbers. They become one feature, "numbers", float32 (n, len(numbers)).
      ids: columns of integers of at least 0. Each becomes a feature, int64 (n,).
      hashed: columns of strings. Each becomes a feature, js.hash_ids(column, num_rows, seed). An empty field is "".
      crosses: lists of columns. Each becomes a feature "a x b", js.cross(columns, num_rows, seed).
      num_rows: rows of the tables that hashed features index: an int, or a dict of ints by feature name.
      seed: of the hashes: an int, or a dict of ints by feature name. If columns share a table, give them different
        seeds; otherwise "1" in one column has the same row as "1" in another.
      fill: the value of an empty field in `numbers`. By default such a line is bad.
      columns: the column names, for files without a line of names.
      delimiter: by default a tab if the file's name has .tsv or .tab in it, otherwise a comma.
      quote: the quote character of fields that contain delimiters or line ends; None for no quoting.
      chunk_rows: lines in a chunk.
      bad_lines: a file to write bad lines to: place, reason, tab, line. `num_bad` counts them, and a warning ends the
        pass. By default the first bad line raises.

    Returns:
      A reader: an iterable of chunks (x, y, weight). Each `iter()` reads from the beginning. x is a dict of features by
        name; y and weight are float32 (n,), or None without `label` or `weight`.

    Raises:
      FileNotFoundError: if a file does not exist.
      TypeError: if a list of names is not one.
      ValueError: for a bad line, with file and line number; if a column does not exist; for a damaged gzip file.

    Example:
      Criteo's click logs have a label, 13 numbers and 26 categories, and no line of names.

      >>> import pathlib, tempfile, jaxsparse as js
      >>> names = ["click", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
      >>> file = pathlib.Path(tempfile.mkdtemp(), "day_0.tsv")
      >>> _ = file.write_text("1\\t" + "5\\t" * 13 + "\\t".join(["68fd1e64"] * 26) + "\\n")
      >>> reader = js.read_csv(
      ...     file, columns=names, label="click", numbers=names[1:14], hashed=names[14:], num_rows=1000, fill=0.0
      ... )
      >>> for x, y, _ in reader:
      ...     print(x["numbers"].shape, x["C1"].tolist(), len(x), y.tolist())
      (1, 13) [809] 27 [1.0]
    """
    roles = Columns(
        "read_csv",
        label=label,
        weight=weight,
        numbers=numbers,
        ids=ids,
        hashed=hashed,
        crosses=crosses,
        num_rows=num_rows,
        seed=seed,
        fill=fill,
        missing=None,
    )
    return _Csv(paths, roles, columns, delimiter, quote, chunk_rows, bad_lines)


class _Csv(Reader):
    def __init__(
        self,
        paths: Any,
        roles: Columns,
        names: Sequence[str] | None,
        delimiter: str | None,
        quote: str | None,
        chunk_rows: int,
        bad_lines: Any,
    ) -> None:
        super().__init__("read_csv", paths, chunk_rows, bad_lines)
        for argument, value in (("delimiter", delimiter), ("quote", quote)):
            if value is not None and (not isinstance(value, str) or len(value) != 1):
                raise ValueError(message("read_csv", argument, "one character", repr(value)))
        self.roles, self.names, self.delimiter, self.quote = roles, names, delimiter, quote

    def chunks(self, path: str) -> Iterator[tuple[Chunk, int]]:
        is_tab = any(f".{kind}" in path.lower() for kind in ("tsv", "tab"))
        delimiter = self.delimiter or ("\t" if is_tab else ",")
        with read("read_csv", path, lambda: open_file(path)) as file:
            yield from self.blocks(path, Blocks("read_csv", path, file), delimiter)

    def blocks(self, path: str, lines: Blocks, delimiter: str) -> Iterator[tuple[Chunk, int]]:
        """The chunks of an open file, and the examples of each."""
        first, names = 1, self.names
        while names is None:
            line = lines.take(1)
            if not line:
                raise ValueError(f"js.read_csv: {path} is empty. Give columns=, if it has no line of names.")
            rows = _Rows(line, lines, delimiter, self.quote, first)
            for (number, raw), row, reason in rows.parsed:
                if reason:
                    raise ValueError(f"js.read_csv: {path}, line {number}: {reason}. The line is {raw!r}.")
                names = row
            first = rows.line
        self.roles.check(path, names)
        at = {name: list(names).index(name) for name in self.roles.names}
        while block := lines.take(self.chunk_rows):
            count, chunk = self.parse_fast(block, delimiter, len(names), at)
            if chunk is not None:
                yield chunk, count
                first += count
            else:
                rows = _Rows(block, lines, delimiter, self.quote, first)
                yield self.parse_by_row(path, rows, len(names), at)
                first = rows.line

    def parse_fast(self, block: bytes, delimiter: str, width: int, at: dict[str, int]) -> tuple[int, Chunk | None]:
        """The number of lines in a block, and their chunk; None for the chunk if a line is bad or has quotes. Hashed
        fields stay slices of the block."""
        joined = block if block.endswith(b"\n") else block + b"\n"
        if b"\r" in joined:
            joined = joined.replace(b"\r\n", b"\n")
        count = joined.count(b"\n")
        quoted = self.quote is not None and self.quote.encode() in joined
        if quoted or b"\r" in joined or b"\n\n" in joined or joined[:1] == b"\n" or not delimiter.isascii():
            return count, None
        buffer = np.frombuffer(joined + bytes(8), np.uint8)
        ends = np.flatnonzero((buffer == ord(delimiter)) | (buffer == ord("\n")))
        if len(ends) != count * width or (buffer[ends[width - 1 :: width]] != ord("\n")).any():
            return count, None  # each line has `width` fields
        starts = np.concatenate([[0], ends[:-1] + 1]).reshape(-1, width)
        lengths = ends.reshape(-1, width) - starts
        table = Table(buffer, starts, lengths, {at[name]: self.roles.seed[name] for name in self.roles.hashed})
        columns = [at[name] for name in self.roles.numbers]
        all_numbers = integers(buffer, starts[:, columns], lengths[:, columns], self.roles.fill)

        @functools.cache
        def fields() -> list[str]:
            return joined[:-1].decode().replace("\n", delimiter).split(delimiter)

        def number(name: str) -> np.ndarray:
            if all_numbers is not None and name in self.roles.numbers:
                return all_numbers[:, self.roles.numbers.index(name)].astype(np.float32)
            n, fill = at[name], self.roles.fill_of(name)
            found = integers(buffer, starts[:, n], lengths[:, n], fill)
            return _numbers(fields()[n::width], fill) if found is None else found.astype(np.float32)

        try:
            if not joined.isascii():
                joined.decode()  # raises ValueError unless it is UTF-8
            ids = {name: _ids(fields()[at[name] :: width]) for name in self.roles.ids}
            return count, self.roles.chunk(lambda name: ids.get(name, Fields(table, at[name])), number)
        except (ValueError, OverflowError):
            return count, None

    def parse_by_row(self, path: str, rows: _Rows, width: int, at: dict[str, int]) -> tuple[Chunk, int]:
        good, where, wrong = [], [], []
        for lines, row, reason in rows.parsed:
            if reason:
                wrong.append((lines, reason))
            elif len(row) != width:
                wrong.append((lines, f"{len(row)} fields, where there are {width} columns"))
            else:
                good.append(row)
                where.append(lines)
        by_column = list(zip(*good, strict=True)) or [()] * width
        values = {name: list(by_column[n]) for name, n in at.items()}
        chunk, count, bad = convert(self.roles, values, len(good), _numbers, _ids, _CHECKS)
        for (line, raw), reason in sorted(wrong + [(where[n], reason) for n, reason in bad.items()]):
            self.bad(path, line, reason, raw)
        return chunk, count


class _Rows:
    """The rows that begin in a block of lines. The last row may need lines after the block.

    Attributes:
      parsed: for each row ((number of its first line, its bytes), its fields, reason why it is bad or ""). Empty lines
        are left out.
      line: the number of the line after the rows.
    """

    def __init__(self, block: bytes, more: Iterable[bytes], delimiter: str, quote: str | None, first: int) -> None:
        block_lines = io.BytesIO(block).readlines()
        self.raw: list[bytes] = []
        self.line = first
        quoting = {"quoting": csv.QUOTE_NONE} if quote is None else {"quotechar": quote}
        lines = self.lines(itertools.chain(block_lines, more))
        rows = csv.reader(lines, delimiter=delimiter, strict=True, **quoting)  # type: ignore[arg-type]
        self.parsed: list[Any] = []
        while self.line < first + len(block_lines):
            row, reason = None, ""
            try:
                row = next(rows, None)
            except csv.Error as error:
                reason = f"{error}"
            raw, self.raw = self.raw, []
            line, self.line = self.line, self.line + len(raw)
            row_bytes = raw[0] if len(raw) == 1 else b"".join(raw)
            if row == [] and not row_bytes.strip():
                continue
            if not reason and not row_bytes.isascii():
                try:
                    row_bytes.decode()
                except UnicodeDecodeError:
                    reason = "it is not in UTF-8"
            self.parsed.append(((line, row_bytes), row, reason))

    def lines(self, given: Iterable[bytes]) -> Iterator[str]:
        for raw in given:
            self.raw.append(raw)
            yield raw.decode(errors="surrogateescape")


def _numbers(values: list[str], fill: float | None) -> np.ndarray:
    if fill is not None and "" in values:
        values = [value or str(fill) for value in values]
    _check_plain(values)
    try:
        return finite(np.fromiter(map(float, values), np.float64, len(values)))
    except ValueError:
        if fill is None or all(map(str.strip, values)):
            raise
        return _numbers([value.strip() for value in values], fill)  # a field of spaces is empty


def _ids(values: list[str]) -> np.ndarray:
    _check_plain(values)
    ids = np.array(list(map(int, values)), np.int64)
    if (ids < 0).any():
        raise ValueError
    return ids


def _check_plain(values: list[str]) -> None:
    """Raises ValueError for numbers in Python syntax only, such as 1_000."""
    joined = "".join(values)
    if "_" in joined or not joined.isascii():
        raise ValueError


def _is_number(value: str) -> bool:
    if not value.strip():
        return True
    try:
        _check_plain([value])
        number = float(value)
    except ValueError:
        raise BadRowError(f"is {value!r}, not a number") from None
    check_finite(number, value)
    return False


def _is_id(value: str) -> None:
    try:
        _ids([value])
    except (ValueError, OverflowError):
        raise BadRowError(f"is {value!r}, not an integer from 0 to 2**63 - 1") from None


_CHECKS = {"numbers": lambda _: _is_number, "ids": lambda _: _is_id, "hashed": lambda _: lambda value: None}
