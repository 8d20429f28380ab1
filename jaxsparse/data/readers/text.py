"""Text files with a label and a text in each line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from jaxsparse._checks import message
from jaxsparse.data.hashing import hash_ids
from jaxsparse.data.readers.lines import BadRowError, Chunk, LineReader, Reader


def read_text(
    paths: Any,
    *,
    num_rows: int,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    labeled: bool = True,
    chunk_rows: int = 4096,
    bad_lines: Any = None,
) -> Reader:
    """Chunks of files whose lines are a label, a tab and a text, as bags of words.

    A word is a run of letters, digits and underscores (`\\w+`), in lower case. Its column is
    js.hash_ids(word, num_rows, seed). Each of the k columns of a text has the value 1 / sqrt(k), so rows have norm 1.

    Args:
      paths: a file, or a list of files, gzipped or not, in UTF-8.
      num_rows: columns of the matrices.
      seed: of the hashes.
      labels: the names of the classes, if labels are names; y is the position of the name. By default labels are
        numbers.
      labeled: whether lines have labels. If not, y is None, and a label before a tab is ignored.
      chunk_rows: lines in a chunk.
      bad_lines: a file to write bad lines to, as in `js.read_csv`.

    Returns:
      A reader: an iterable of chunks (x, y, weight). Each `iter()` reads from the beginning. x is a CSR matrix
        (n, num_rows), float32; y is float32 (n,); weight is None.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for a bad line (no tab, an unknown label, no UTF-8), with file and line number; for a damaged gzip
        file.

    Example:
      >>> import pathlib, tempfile, jaxsparse as js
      >>> file = pathlib.Path(tempfile.mkdtemp(), "mails.txt")
      >>> _ = file.write_text("ham\\tSee you at noon\\nspam\\tWin! Win! Win!\\n")
      >>> for x, y, _ in js.read_text(file, labels=["ham", "spam"], num_rows=1000):
      ...     print(x[1].indices.tolist(), x.data.tolist(), y.tolist())
      [610] [0.5, 0.5, 0.5, 0.5, 1.0] [0.0, 1.0]
    """
    return _Text(paths, num_rows, seed, labels, labeled, chunk_rows, bad_lines)


class _Text(LineReader):
    def __init__(
        self, paths: Any, num_rows: Any, seed: Any, labels: Any, labeled: bool, chunk_rows: int, bad_lines: Any
    ) -> None:
        super().__init__("read_text", paths, chunk_rows, bad_lines)
        hash_ids([], num_rows, seed)  # raises if they are out of range
        if labels is not None and (isinstance(labels, str) or not all(isinstance(name, str) for name in labels)):
            raise TypeError(message("read_text", "labels", "a list of names", repr(labels)))
        self.num_rows, self.seed, self.labeled = int(num_rows), seed, labeled
        self.labels = None if labels is None else {name: float(n) for n, name in enumerate(labels)}

    def parse(self, lines: list[bytes], bad: Callable[[int, str], None]) -> tuple[Chunk, int]:
        words: list[str] = []
        lengths, ys = [0], []
        for at, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                y, text = self.parse_line(line.rstrip(b"\r\n"))
            except BadRowError as error:
                bad(at, str(error))
                continue
            text_words = _WORD.findall(text.lower())
            words += text_words
            lengths.append(len(text_words))
            ys.append(y)
        n, starts = len(ys), np.cumsum(lengths)
        columns = hash_ids(words, self.num_rows, self.seed)
        x: Any = scipy.sparse.csr_matrix((np.ones(len(columns), np.float32), columns, starts), (n, self.num_rows))
        x.sum_duplicates()
        distinct = np.diff(x.indptr)
        x.data = np.repeat(1 / np.sqrt(np.maximum(distinct, 1)), distinct).astype(np.float32)
        return Chunk(x, np.array(ys, np.float32) if self.labeled else None), n

    def parse_line(self, raw: bytes) -> tuple[float, str]:
        """The label and text of a line."""
        if b"\r" in raw:
            raise BadRowError("it has a carriage return in it: lines end with a line feed")
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            raise BadRowError("it is not in UTF-8") from None
        label, tab, text = line.partition("\t")
        y = self.label_of(label.strip()) if tab else None
        if not self.labeled:
            return 0.0, line if y is None else text
        if not tab:
            raise BadRowError("it has no tab between label and text")
        if y is None:
            must = "a number" if self.labels is None else f"a label: those are {', '.join(map(repr, self.labels))}"
            raise BadRowError(f"{label[:40]!r} is not {must}")
        return y, text

    def label_of(self, text: str) -> float | None:
        """The number of a label, or None if it is not one."""
        return label_number(text) if self.labels is None else self.labels.get(text)


def label_number(text: str) -> float | None:
    """The number that a text spells, or None."""
    try:
        value = float(text) if text.isascii() and "_" not in text else float("nan")
    except ValueError:
        return None
    return value if abs(value) <= float(np.finfo(np.float32).max) else None


_WORD = re.compile(r"\w+")
