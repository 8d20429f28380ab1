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

    A feature is the column that VW gives it with its default hashes and -b b, where num_rows is 2**b: MurmurHash3 of
    its name, seeded by that of its namespace; names of digits are numbers, added to the namespace's. VW's constant is
    not among them: it is the model's bias. Tags are read over.

    Args:
      paths: a file, or a list of files, gzipped or not.
      num_rows: columns of the matrices, which hashes are taken modulo of.
      labeled: whether lines have labels. Otherwise y is None, and labels are read over.
      chunk_rows: lines that are read at a time.
      bad_lines: a file that bad lines are put into, as of `js.read_csv`.

    Returns:
      A reader, an iterable of chunks (x, y, weight), each pass from the beginning: x is a CSR matrix (n, num_rows) in
        float32, in which features of one column are added up, y and the importance weight are float32 (n,).

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: for a bad line, with file and line: no simple label, an initial prediction, a feature without a name,
        a value that is no finite number, a carriage return that is not at its end. And for damaged gzip files.

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
                    raise BadRowError("there is no | before its features")
                label, weight = self.head(head)
                own: list[tuple[list[bytes], list[float], int]] = [self.space(space) for space in spaces]
            except BadRowError as error:
                bad(at, str(error))
                continue
            labels.append(label)
            weights.append(weight)
            for of, of_values, seed in own:
                names += of
                values += of_values
                seeds += [seed] * len(of)
            lengths.append(sum(len(of) for of, _, _ in own))
        columns = _hashed(names, np.array(seeds, np.uint32)) % np.uint32(self.num_rows)
        n, matrix = len(labels), scipy.sparse.csr_matrix
        data = np.array(values, np.float64).astype(np.float32)
        x: Any = matrix((data, columns.astype(np.int64), np.cumsum(lengths)), shape=(n, self.num_rows))
        x.sum_duplicates()
        return Chunk(x, np.array(labels, np.float32) if self.labeled else None, np.array(weights, np.float32)), n

    def head(self, head: bytes) -> tuple[float, float]:
        """Label and importance, of what stands before the features."""
        tokens = head.split()
        if tokens and (tokens[-1].startswith(b"'") or not head[-1:].isspace()):
            tokens.pop()  # the tag
        if not tokens:
            if self.labeled:
                raise BadRowError("it has no label; labeled=False reads lines without")
            return 0.0, 1.0
        if len(tokens) > 2:
            raise BadRowError("there is more than label and importance: initial predictions are not read")
        label = _number(tokens[0], "the label")
        weight = _number(tokens[1], "the importance") if len(tokens) > 1 else 1.0
        if weight < 0:
            raise BadRowError("its importance is negative")
        return label, weight

    def space(self, space: bytes) -> tuple[list[bytes], list[float], int]:
        """Names, values and the hash of a namespace."""
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
    """VW's hashes: those of names of digits are these numbers, in 32 bits, and the seeds."""
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
        raise BadRowError(f"{what} is {_shown(token)}, no finite number")
    return value


def _shown(token: bytes) -> str:
    return repr(token[:40].decode(errors="replace"))
