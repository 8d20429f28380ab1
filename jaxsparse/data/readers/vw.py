"""Vowpal Wabbit's text files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

from jaxsparse._checks import MAX_ROWS, message
from jaxsparse.data.murmur import hash_bytes
from jaxsparse.data.readers.lines import BadRowError, Chunk, LineReader, Reader


def read_vw(
    paths: Any,
    *,
    num_rows: int,
    labeled: bool = True,
    chunk_rows: int = 16384,
    bad_lines: Any = None,
) -> Reader:
    """Chunks of Vowpal Wabbit's text: `label [importance] ['tag] |namespace[:scale] feature[:value] ... |other ...`.

    Columns are those of VW with its default hash and -b b, for num_rows = 2**b: MurmurHash3 of the feature's name,
    seeded by the hash of its namespace. If a name is all digits, its number is added to that hash instead. VW's
    constant feature is left out: it is the model's bias. Tags are ignored.

    Args:
      paths: a file, or a list of files, gzipped or not.
      num_rows: columns of the matrices. Hashes are taken modulo num_rows.
      labeled: whether lines have labels. If not, y is None, and labels are ignored.
      chunk_rows: lines in a chunk.
      bad_lines: a file to write bad lines to, as in `js.read_csv`.

    Returns:
      A reader: an iterable of chunks (x, y, weight). Each `iter()` reads from the beginning. x is a CSR matrix
        (n, num_rows), float32; features with the same column are summed. y and weight, the importance, are float32
        (n,).

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for a bad line, with file and line number: no simple label, an initial prediction, a feature without a
        name, a value that is not a finite number, a carriage return inside; for a damaged gzip file.

    Example:
      >>> import pathlib, tempfile, jaxsparse as js
      >>> file = pathlib.Path(tempfile.mkdtemp(), "train.vw")
      >>> _ = file.write_text("1 2.0 'first|a x:2 12 |b:0.5 x\\n-1 |a x\\n")
      >>> for x, y, weight in js.read_vw(file, num_rows=2**20):
      ...     print(x[0].indices.tolist(), x[0].data.tolist(), y.tolist(), weight.tolist())
      [143313, 354750, 579720] [0.5, 1.0, 2.0] [1.0, -1.0] [2.0, 1.0]

    References:
      Vowpal Wabbit, "Input format"
    """
    return _Vw(paths, num_rows, labeled, chunk_rows, bad_lines)


class _Vw(LineReader):
    def __init__(self, paths: Any, num_rows: Any, labeled: bool, chunk_rows: int, bad_lines: Any) -> None:
        super().__init__("read_vw", paths, chunk_rows, bad_lines)
        if not isinstance(num_rows, (int, np.integer)) or not 0 < num_rows < MAX_ROWS:
            raise ValueError(message("read_vw", "num_rows", f"an integer in [1, {MAX_ROWS})", repr(num_rows)))
        self.num_rows, self.labeled = int(num_rows), labeled
        self.namespaces: dict[bytes, int] = {b"": 0}  # their hashes

    def parse(self, lines: list[bytes], bad: Callable[[int, str], None]) -> tuple[Chunk, int]:
        names: list[bytes] = []
        values: list[float] = []
        seeds: list[int] = []
        lengths, labels, weights = [0], [], []
        for at, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                if b"\r" in line.rstrip(b"\r\n"):
                    raise BadRowError("it has a carriage return in it: lines end with a line feed")
                head, *spaces = line.split(b"|")
                if not spaces:
                    raise BadRowError("it has no | before the features")
                label, weight = self.parse_head(head)
                namespaces: list[tuple[list[bytes], list[float], int]] = [
                    self.parse_namespace(space) for space in spaces
                ]
            except BadRowError as error:
                bad(at, str(error))
                continue
            labels.append(label)
            weights.append(weight)
            for names_of, values_of, seed in namespaces:
                names += names_of
                values += values_of
                seeds += [seed] * len(names_of)
            lengths.append(sum(len(names_of) for names_of, _, _ in namespaces))
        columns = _hashed(names, np.array(seeds, np.uint32)) % np.uint32(self.num_rows)
        n, matrix = len(labels), scipy.sparse.csr_matrix
        data = np.array(values, np.float64).astype(np.float32)
        x: Any = matrix((data, columns.astype(np.int64), np.cumsum(lengths)), shape=(n, self.num_rows))
        x.sum_duplicates()
        return Chunk(x, np.array(labels, np.float32) if self.labeled else None, np.array(weights, np.float32)), n

    def parse_head(self, head: bytes) -> tuple[float, float]:
        """The label and importance, from the part before the features."""
        tokens = head.split()
        if tokens and (tokens[-1].startswith(b"'") or not head[-1:].isspace()):
            tokens.pop()  # the tag
        if not tokens:
            if self.labeled:
                raise BadRowError("it has no label; give labeled=False for lines without labels")
            return 0.0, 1.0
        if len(tokens) > 2:
            raise BadRowError("it has more than label and importance; initial predictions are not supported")
        label = _number(tokens[0], "the label")
        weight = _number(tokens[1], "the importance") if len(tokens) > 1 else 1.0
        if weight < 0:
            raise BadRowError("its importance is negative")
        return label, weight

    def parse_namespace(self, space: bytes) -> tuple[list[bytes], list[float], int]:
        """The names, values and hash of a namespace."""
        tokens, scale, name = space.split(), 1.0, b""
        if space[:1].strip():
            name, colon, value = tokens.pop(0).partition(b":")
            scale = _number(value, f"the scale of {_shown(name)}") if colon else 1.0
        if name not in self.namespaces:
            self.namespaces[name] = int(_hashed([name], np.zeros(1, np.uint32))[0])
        names, values = [], []
        for token in tokens:
            feature, colon, value = token.partition(b":")
            if not feature:
                raise BadRowError(f"{_shown(token)} has no name")
            names.append(feature)
            values.append(scale * _number(value, f"the value of {_shown(feature)}") if colon else scale)
        return names, values, self.namespaces[name]


def _hashed(names: list[bytes], seeds: np.ndarray) -> np.ndarray:
    """VW's hashes. The hash of a name that is all digits is its number plus the seed, in 32 bits."""
    buffer = np.frombuffer(b"".join(names) + bytes(4), np.uint8)
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    hashes = hash_bytes(buffer, np.cumsum(lengths) - lengths, lengths, seeds)
    for at, name in enumerate(names):
        if name.isdigit():
            hashes[at] = (int(name[-4000:]) + int(seeds[at])) & 0xFFFFFFFF
    return hashes


def _number(token: bytes, what: str) -> float:
    try:
        value = float(token) if b"_" not in token else float("nan")
    except ValueError:
        value = float("nan")
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise BadRowError(f"{what} is {_shown(token)}, not a finite number")
    return value


def _shown(token: bytes) -> str:
    return repr(token[:40].decode(errors="replace"))
