"""svmlight and libsvm files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse.data.readers.lines import BadRowError, Chunk, LineReader, Reader


def read_svmlight(
    paths: Any,
    *,
    num_features: int | None = None,
    zero_based: bool = False,
    query_id: bool = False,
    multilabel: bool = False,
    num_labels: int | None = None,
    chunk_rows: int = 8192,
    bad_lines: Any = None,
) -> Reader:
    """Chunks of svmlight or libsvm files, one example a line: `label qid:q index:value index:value ... # comment`.

    Args:
      paths: a file, or a list of files, gzipped or not.
      num_features: columns of the matrices. By default it is found from the largest index, in one more pass.
      zero_based: whether indices start at 0. By default they start at 1.
      query_id: whether lines have a qid, which becomes a feature. By default qids are ignored.
      multilabel: whether a line has any number of labels, integers of at least 0: "3,7". A line without labels starts
        with a space or with its first feature.
      num_labels: columns of the matrix of labels. By default it is found like num_features.
      chunk_rows: lines in a chunk.
      bad_lines: a file to write bad lines to, as in `js.read_csv`. By default the first bad line raises.

    Returns:
      A reader: an iterable of chunks (x, y, weight). Each `iter()` reads from the beginning. x is a CSR matrix
        (n, num_features), float32; y is float32 (n,); weight is None. With query_id or multilabel, x is a dict:
        "features", the matrix; "qid", int64 (n,); "labels", a CSR matrix (n, num_labels) of ones, and then y is None.
        The reader has num_features and num_labels as attributes.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for a bad line, with file and line number; for a damaged gzip file.

    Example:
      >>> import pathlib, tempfile, jaxsparse as js
      >>> file = pathlib.Path(tempfile.mkdtemp(), "train.svm")
      >>> _ = file.write_text("1 1:0.5 3:2\\n-1 2:1  # a comment\\n")
      >>> for x, y, _ in js.read_svmlight(file):
      ...     print(x.toarray().tolist(), y.tolist())
      [[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]] [1.0, -1.0]
    """
    first = int(not zero_based)
    return _Svmlight(paths, num_features, first, query_id, multilabel, num_labels, chunk_rows, bad_lines)


_LARGEST = float(np.finfo(np.float32).max)
_NUMBERS = b"0123456789+-.eE"


class _Svmlight(LineReader):
    def __init__(
        self,
        paths: Any,
        num_features: int | None,
        first: int,
        query_id: bool,
        multilabel: bool,
        num_labels: int | None,
        chunk_rows: int,
        bad_lines: Any,
    ) -> None:
        super().__init__("read_svmlight", paths, chunk_rows, bad_lines)
        for name, value in (("num_features", num_features), ("num_labels", num_labels)):
            if value is not None and (not isinstance(value, (int, np.integer)) or not 0 < value < MAX_ROWS):
                raise ValueError(message("read_svmlight", name, f"an integer in [1, {MAX_ROWS})", repr(value)))
        if num_labels is not None and not multilabel:
            raise ValueError(message("read_svmlight", "num_labels", "left out without multilabel=True", num_labels))
        self.first, self.query_id, self.multilabel = first, query_id, multilabel
        self.num_features, self.num_labels = num_features, num_labels
        if num_features is None or (multilabel and num_labels is None):
            self._find_sizes()

    def _find_sizes(self) -> None:
        columns = labels = 0
        given = self.num_features, self.num_labels
        self.num_features, self.num_labels = given[0] or MAX_ROWS - 1, given[1] or MAX_ROWS - 1
        self.quiet = True  # later passes report bad lines
        for chunk in self._counted():
            x = chunk.x["features"] if isinstance(chunk.x, dict) else chunk.x
            columns = max(columns, int(x.indices.max(initial=-1)) + 1)
            if self.multilabel:
                labels = max(labels, int(chunk.x["labels"].indices.max(initial=-1)) + 1)
        self.quiet, self.num_examples = False, 0
        self.num_features, self.num_labels = given[0] or max(columns, 1), given[1] or max(labels, 1)

    def parse(self, lines: list[bytes], bad: Callable[[int, str], None]) -> tuple[Chunk, int]:
        try:
            rows = self._parse_fast(lines)
        except (ValueError, OverflowError):  # a line is bad, or has more than label and features
            rows = self._parse_by_line(lines, bad)
        starts, indices, values, labels, qids = rows
        n, as_matrix = len(starts) - 1, scipy.sparse.csr_matrix
        x: Any = as_matrix((values.astype(np.float32), indices, starts), shape=(n, self.num_features))
        x.sort_indices()
        if not (self.query_id or self.multilabel):
            return Chunk(x, np.array(labels, np.float32)), n
        x = {"features": x} | ({"qid": np.array(qids, np.int64)} if self.query_id else {})
        if not self.multilabel:
            return Chunk(x, np.array(labels, np.float32)), n
        ends = np.cumsum([0, *map(len, labels)])
        flat = np.array([label for of_one in labels for label in of_one], np.int64)
        x["labels"] = as_matrix((np.ones(len(flat), np.float32), flat, ends), shape=(n, self.num_labels))
        return Chunk(x), n

    def _parse_fast(self, lines: list[bytes]) -> Any:
        """Parses lines of a label and features, each after one space. Raises ValueError for any other line."""
        if self.query_id or self.multilabel:
            raise ValueError
        fields: list[bytes] = []
        counts = []
        for raw in lines:
            line = (raw[: raw.index(b"#")] if b"#" in raw else raw).strip()
            if not line:
                continue
            between = line.translate(None, _NUMBERS)
            count = len(between) // 2
            if between != b" :" * count:
                raise ValueError
            tokens = line.replace(b":", b" ").split()
            if len(tokens) != 2 * count + 1:
                raise ValueError
            if count and not b"".join(tokens[1::2]).isdigit():  # 1e1 is a number, but no index
                raise ValueError
            fields += tokens
            counts.append(count)
        numbers = np.fromiter(map(float, fields), np.float64, len(fields))
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        is_label = np.zeros(len(numbers), bool)
        is_label[2 * starts[:-1] + np.arange(len(counts))] = True
        labels, rest = numbers[is_label], numbers[~is_label]
        columns, values = rest[::2], rest[1::2]
        if not ((columns >= self.first) & (columns < (self.num_features or 0) + self.first)).all():
            raise ValueError
        indices = columns.astype(np.int64) - self.first
        if (indices + self.first != columns).any() or not (np.abs(numbers) <= _LARGEST).all():
            raise ValueError
        if _twice(indices, starts):
            raise ValueError
        return starts, indices, values, labels, None

    def _parse_by_line(self, lines: list[bytes], bad: Callable[[int, str], None]) -> Any:
        lengths, indices, values, labels, qids = [0], [], [], [], []
        for at, raw in enumerate(lines):
            line = raw.split(b"#", 1)[0]
            if not line.strip():
                continue
            try:
                label, qid, line_indices, line_values = self.parse_line(line)
            except BadRowError as error:
                bad(at, str(error))
                continue
            labels.append(label)
            qids.append(qid)
            lengths.append(len(line_indices))
            indices += line_indices
            values += line_values
        return np.cumsum(lengths), np.array(indices, np.int64), np.array(values, np.float64), labels, qids

    def parse_line(self, line: bytes) -> tuple[Any, int, list[int], list[float]]:
        """The label or labels, qid, indices and values of one line.

        Raises:
          BadRowError: if the line is bad.
        """
        tokens = line.split()
        label: Any
        if self.multilabel:
            has = not line[:1].isspace() and b":" not in tokens[0]
            label = [_integer(token, "the label") for token in tokens.pop(0).split(b",")] if has else []
            self._check(label)
        else:
            label = _number(tokens.pop(0), "the label")
        qid = 0
        if tokens and tokens[0].startswith(b"qid:"):
            qid = _integer(tokens.pop(0)[4:], "the qid")
        elif self.query_id:
            raise BadRowError("it has no qid after the label")
        indices, values = [], []
        for token in tokens:
            index, colon, value = token.partition(b":")
            if not colon:
                raise BadRowError(f"{_shown(token)} is not index:value")
            column = _integer(index, "the index") - self.first
            if not 0 <= column < (self.num_features or 0):
                low, high = self.first, (self.num_features or 0) + self.first - 1
                do = "; if indices begin at 0, give zero_based=True" if column == -1 and self.first else ""
                raise BadRowError(f"index {column + self.first} is outside {low} to {high}{do}")
            indices.append(column)
            values.append(_number(value, f"the value of {column + self.first}"))
        if len(set(indices)) < len(indices):
            raise BadRowError("it has an index twice")
        return label, qid, indices, values

    def _check(self, labels: list[int]) -> None:
        if len(set(labels)) < len(labels):
            raise BadRowError("it has a label twice")
        for label in labels:
            if not 0 <= label < (self.num_labels or 0):
                raise BadRowError(f"label {label} is outside 0 to {(self.num_labels or 0) - 1}")


def _twice(indices: np.ndarray, starts: np.ndarray) -> bool:
    """Whether any row has an index twice."""
    rises = np.diff(indices) > 0
    rises[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < len(indices))] - 1] = True  # from one row to the next
    if rises.all():
        return False
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((indices, rows))
    return bool(((np.diff(indices[order]) == 0) & (np.diff(rows[order]) == 0)).any())


def _number(token: bytes, what: str) -> float:
    try:
        value = float(token) if not token.translate(None, _NUMBERS) else None
    except ValueError:
        value = None
    if value is None or not abs(value) <= _LARGEST:
        raise BadRowError(f"{what} is {_shown(token)}, not a finite number")
    return value


def _integer(token: bytes, what: str) -> int:
    if not token.removeprefix(b"-").isdigit() or len(token) > 18:
        raise BadRowError(f"{what} is {_shown(token)}, not an integer")
    return int(token)


def _shown(token: bytes) -> str:
    return repr(token[:40].decode(errors="replace"))
