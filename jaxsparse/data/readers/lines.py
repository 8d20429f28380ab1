"""Text files, gzipped or not, read in chunks of numbered lines; and bad lines, which raise or go into a file."""

from __future__ import annotations

import gzip
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxsparse._checks import message, warn


class Chunk(NamedTuple):
    """Some examples of a file, for `js.stream`, or js.batches(chunk.x, chunk.y, ...).

    Attributes:
      x: the features: a SciPy CSR matrix (n, num_features), or a dict of features by name.
      y: the targets (n,), float32, or None.
      weight: float32 (n,), or None.
    """

    x: Any
    y: Any = None
    weight: Any = None


class BadRowError(ValueError):
    """A line or row that is bad, with the reason."""


class Reader:
    """An iterable of the chunks of some files. Each `iter()` reads from the beginning, one chunk at a time. With
    bad_lines, end a pass before the next one starts.

    Attributes:
      num_examples: the number of examples read in the last pass.
      num_bad: the number of lines that the last pass wrote to bad_lines.
    """

    def __init__(self, function: str, paths: Any, chunk_rows: Any, bad_lines: Any = None) -> None:
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        self.function, self.paths = function, [os.fspath(path) for path in paths]
        if not self.paths:
            raise ValueError(message(function, "paths", "a file, or a list of some", "an empty list"))
        for path in self.paths:
            if not os.path.isfile(path):
                got = f"{path!r}, which {'is not a file' if os.path.exists(path) else 'does not exist'},"
                raise FileNotFoundError(message(function, "paths", "files that can be read", got))
        if not isinstance(chunk_rows, int) or chunk_rows < 1:
            raise ValueError(message(function, "chunk_rows", "an integer of at least 1", repr(chunk_rows)))
        self.chunk_rows, self.num_examples, self.num_bad = chunk_rows, 0, 0
        self.bad_lines = None if bad_lines is None else os.fspath(bad_lines)
        if self.bad_lines is not None and any(map(self._is_bad_lines, self.paths)):
            raise ValueError(message(function, "bad_lines", "another file than those that are read", self.bad_lines))
        self._bad_file: BinaryIO | None = None
        self.quiet = False  # whether this pass ignores bad lines

    def _is_bad_lines(self, path: str) -> bool:
        there = self.bad_lines is not None and os.path.exists(self.bad_lines)
        return there and os.path.samefile(path, str(self.bad_lines))

    def __iter__(self) -> Iterator[Chunk]:
        self.num_examples = self.num_bad = 0
        if self.bad_lines is None:
            yield from self._counted()
            return
        with open(self.bad_lines, "wb") as self._bad_file:
            yield from self._counted()
        if self.num_bad:
            warn(f"js.{self.function}: {self.num_bad} bad lines were left out. They are in {self.bad_lines}.")

    def _counted(self) -> Iterator[Chunk]:
        for path in self.paths:
            for chunk, n in self.chunks(path):
                if n:
                    self.num_examples += n
                    yield chunk

    def chunks(self, path: str) -> Iterator[tuple[Chunk, int]]:
        """The chunks of one file, and the examples of each."""
        raise NotImplementedError

    def bad(self, path: str, line: int, reason: str, raw: bytes) -> None:
        """Writes a bad line to bad_lines, or raises."""
        if self.quiet:
            return
        where = f"{path}, line {line}: {reason}"
        if self._bad_file is None:
            do = "Mend the line, or give bad_lines= a file for bad lines."
            shown = raw.decode(errors="replace").rstrip("\r\n")
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise ValueError(f"js.{self.function}: {where}. The line is {shown!r}. {do}")
        self.num_bad += 1
        self._bad_file.write(where.encode() + b"\t" + raw.rstrip(b"\r\n") + b"\n")


class LineReader(Reader):
    """Base class for formats with one example a line: override `parse`."""

    def chunks(self, path: str) -> Iterator[tuple[Chunk, int]]:
        first = 1
        for lines in in_lines(self.function, path, self.chunk_rows):
            bad: Callable[[int, str], None] = lambda i, why: self.bad(path, first + i, why, lines[i])  # noqa: B023, E731
            yield self.parse(lines, bad)
            first += len(lines)

    def parse(self, lines: list[bytes], bad: Callable[[int, str], None]) -> tuple[Chunk, int]:
        """The chunk of these lines, and its examples. Calls bad(position, reason) for each line that it leaves out."""
        raise NotImplementedError


def in_lines(function: str, path: str, count: int) -> Iterator[list[bytes]]:
    """Lists of up to `count` lines, with their line ends."""
    with read(function, path, lambda: open_file(path)) as file:
        lines = itertools.chain(_first_line(file), file)
        while part := read(function, path, lambda: list(itertools.islice(lines, count))):
            yield part


class Blocks:
    """The lines of an open file, in blocks of bytes or one by one."""

    def __init__(self, function: str, path: str, file: Any) -> None:
        self._more = lambda: read(function, path, lambda: file.read(_BLOCK_BYTES))
        self._data, self._start = self._more().removeprefix(_BYTE_ORDER_MARK), 0
        self._ends, self._line = (
            _ends(self._data),
            0,
        )  # line ends in the data, and the number of lines returned

    def take(self, count: int) -> bytes:
        """The next `count` lines with their line ends, or fewer at the end of the file."""
        if len(self._ends) - self._line < count:
            parts = [self._data[self._start :]]
            have = len(self._ends) - self._line
            while have < count and (more := self._more()):
                parts.append(more)
                have += more.count(b"\n")
            self._data, self._start = b"".join(parts), 0
            self._ends, self._line = _ends(self._data), 0
        start, self._line = self._start, self._line + count
        if self._line > len(self._ends):
            self._line, self._start = len(self._ends), len(self._data)
        else:
            self._start = int(self._ends[self._line - 1]) + 1
        return self._data[start : self._start]

    def __iter__(self) -> Iterator[bytes]:
        while line := self.take(1):
            yield line


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs write it before the first line
_BLOCK_BYTES = 1 << 20  # bytes that are read at a time


def _ends(data: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))


def _first_line(file: Any) -> Iterator[bytes]:
    """The first line, without the byte order mark."""
    line = file.readline().removeprefix(_BYTE_ORDER_MARK)
    if line:
        yield line


def read(function: str, path: str, reading: Callable[[], Any]) -> Any:
    """reading(), with an error that names the file if it is a damaged gzip file."""
    try:
        return reading()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"js.{function}: {path} is a damaged gzip file: {error}") from error


def open_file(path: str) -> Any:
    """Opens a file in bytes, and unzips it if it starts like gzip, whatever its name."""
    with open(path, "rb") as file:
        start = file.read(2)
    zipped = start == b"\x1f\x8b"
    if not start and str(path).endswith(".gz"):  # an empty gzip file has 20 bytes
        raise gzip.BadGzipFile("it has no bytes at all")
    return gzip.open(path, "rb") if zipped else open(path, "rb")


def without(rows: Sequence[Any], positions: Iterable[int]) -> list[Any]:
    left_out = set(positions)
    return [row for i, row in enumerate(rows) if i not in left_out]
