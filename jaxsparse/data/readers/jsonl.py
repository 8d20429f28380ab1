"""JSON lines files: one object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.data.readers.columns import Columns, check_finite, convert, finite
from jaxsparse.data.readers.lines import BadRowError, Chunk, LineReader, Reader


def read_jsonl(
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
    chunk_rows: int = 16384,
    bad_lines: Any = None,
) -> Reader:
    """Chunks of JSON lines files. Each line is an object; its keys are the columns.

    Args:
      paths: a file, or a list of files, gzipped or not.
      label: the key of the targets, which are numbers.
      weight: the key of the example weights.
      numbers: keys of numbers or booleans. They become one feature, "numbers", float32 (n, len(numbers)).
      ids: keys of integers of at least 0, or of lists of them. Each becomes a feature: int64 (n,), or a list of n
        arrays.
      hashed: keys of strings or integers, or of lists of them. Each becomes a feature,
        js.hash_ids(values, num_rows, seed).
      crosses: lists of keys. Each becomes a feature "a x b", js.cross(values, num_rows, seed).
      num_rows: rows of the tables that hashed features index: an int, or a dict of ints by feature name.
      seed: of the hashes: an int, or a dict of ints by feature name.
      fill: the value of a null in `numbers`. By default such a line is bad. A missing key is always bad.
      missing: the value as which a null is hashed. By default such a line is bad.
      chunk_rows: lines in a chunk.
      bad_lines: a file to write bad lines to, as in `js.read_csv`.

    Returns:
      A reader: an iterable of chunks (x, y, weight). Each `iter()` reads from the beginning. x is a dict of features by
        name; y and weight are float32 (n,), or None without `label` or `weight`.

    Raises:
      FileNotFoundError, TypeError, ValueError: as `js.read_csv`. A line whose object has a key twice is bad, too.

    Example:
      >>> import pathlib, tempfile, jaxsparse as js
      >>> file = pathlib.Path(tempfile.mkdtemp(), "train.jsonl")
      >>> _ = file.write_text('{"y": 1, "words": ["spam", "egg"]}\\n{"y": 0, "words": []}\\n')
      >>> for x, y, _ in js.read_jsonl(file, label="y", hashed=["words"], num_rows=1000):
      ...     print([ids.tolist() for ids in x["words"]], y.tolist())
      [[960, 638], []] [1.0, 0.0]
    """
    roles = Columns(
        "read_jsonl",
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
    return _Jsonl(paths, roles, chunk_rows, bad_lines)


class _Jsonl(LineReader):
    def __init__(self, paths: Any, roles: Columns, chunk_rows: int, bad_lines: Any) -> None:
        super().__init__("read_jsonl", paths, chunk_rows, bad_lines)
        self.roles = roles
        hashed = lambda values: _Hashed(values, roles.missing is not None)  # noqa: E731
        ids = lambda values: _Kinds(values, False)  # noqa: E731
        self.checks = {"numbers": lambda _: _is_number, "ids": ids, "hashed": hashed}

    def parse(self, lines: list[bytes], bad: Callable[[int, str], None]) -> tuple[Chunk, int]:
        names = self.roles.names
        rows, at, wrong = [], [], {}
        for n, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = _DECODER.decode(line.decode())
                rows.append([row[name] for name in names])
                at.append(n)
            except UnicodeDecodeError:
                wrong[n] = "it is not in UTF-8"
            except BadRowError as error:
                wrong[n] = str(error)
            except (ValueError, RecursionError) as error:
                wrong[n] = f"it is not JSON: {error}"
            except (KeyError, TypeError, IndexError):
                absent = [name for name in names if name not in row] if isinstance(row, dict) else None
                wrong[n] = "it is not an object" if absent is None else f"it has no {absent[0]!r}"
        by_name = list(zip(*rows, strict=True)) or [()] * len(names)
        values = {name: list(column) for name, column in zip(names, by_name, strict=True)}
        chunk, count, bad_values = convert(self.roles, values, len(rows), _numbers, _ids, self.checks)
        wrong |= {at[n]: reason for n, reason in bad_values.items()}
        for n in sorted(wrong):
            bad(n, wrong[n])
        return chunk, count


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRowError(f"it has the key {twice!r} twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _numbers(values: list[Any], fill: float | None) -> np.ndarray:
    if fill is not None:
        values = [fill if value is None else value for value in values]
    if not set(map(type, values)) <= {int, float, bool}:
        raise ValueError
    return finite(values)


def _ids(values: list[Any]) -> Any:
    kinds = set(map(type, values))
    flat = values if list not in kinds else [value for row in values for value in row]
    if (list in kinds and len(kinds) > 1) or not set(map(type, flat)) <= {int}:
        raise ValueError
    ids = np.array(flat, np.int64)
    if (ids < 0).any():
        raise ValueError
    return np.split(ids, np.cumsum(list(map(len, values)))[:-1]) if list in kinds else ids


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    if type(value) not in (int, float, bool):
        raise BadRowError(f"is {_shown(value)}, not a number")
    check_finite(value, value)
    return False


class _Kinds:
    """Checks that all values of a column are like its first one that is not null: of the same type in `kinds`, or
    lists of it."""

    kinds: tuple[type, ...] = (int,)
    must = "integers from 0 to 2**63 - 1"
    low, high = 0, 2**63

    def __init__(self, values: list[Any], may_be_missing: bool) -> None:
        self.may_be_missing = may_be_missing
        self.is_list = isinstance(next((value for value in values if value is not None), None), list)
        self.kind: type | None = None

    def __call__(self, value: Any) -> None:
        is_list = isinstance(value, list)
        for one in value if is_list else [value]:
            if one is None and self.may_be_missing:
                continue
            wrong = type(one) not in self.kinds or (self.kind or type(one)) is not type(one)
            if wrong or (type(one) is int and not self.low <= one < self.high):
                raise BadRowError(f"is {_shown(value)}, where there are {self._expected()}")
            if type(one) is str and not one.isascii():
                _check_text(one)
            self.kind = type(one)
        if self.is_list is not is_list:
            raise BadRowError(f"is {_shown(value)}, where there are {self._expected()}")

    def _expected(self) -> str:
        expected = {str: "strings", int: self.must}[self.kind] if self.kind in (str, int) else self.must
        return f"lists of {expected}" if self.is_list else expected


class _Hashed(_Kinds):
    kinds = (str, int)
    must = "strings, or integers of 64 bits"
    low, high = -(2**63), 2**64


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"is {_shown(value)}, which has a lone surrogate") from None


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
