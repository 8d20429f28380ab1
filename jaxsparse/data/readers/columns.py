"""What the columns of a table mean: label, weight, numbers, ids, and what is hashed. The same for every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse._checks import message
from jaxsparse.data.hashing import cross, hash_ids
from jaxsparse.data.readers.lines import BadRowError, Chunk, without

_LARGEST = float(np.finfo(np.float32).max)


class Columns:
    """Which columns there are in a chunk, and as what. Its arguments are those of `js.read_csv`."""

    def __init__(
        self,
        function: str,
        *,
        label: str | None,
        weight: str | None,
        numbers: Sequence[str],
        ids: Sequence[str],
        hashed: Sequence[str],
        crosses: Sequence[Sequence[str]],
        num_rows: int | Mapping[str, int] | None,
        seed: int | Mapping[str, int],
        fill: float | None,
        missing: Any,
    ) -> None:
        for argument, value in (("numbers", numbers), ("ids", ids), ("hashed", hashed), ("crosses", crosses)):
            if isinstance(value, str) or any(isinstance(of, str) == (argument == "crosses") for of in value):
                must = "a list of lists of names" if argument == "crosses" else "a list of names"
                raise TypeError(message(function, argument, must, repr(value)))
        self.function, self.label, self.weight = function, label, weight
        self.numbers, self.ids, self.hashed = tuple(numbers), tuple(ids), tuple(hashed)
        self.crosses = {" x ".join(of): tuple(of) for of in crosses}
        self.fill, self.missing = fill, missing
        if not (self.numbers or self.ids or self.hashed or self.crosses):
            got = "none of them"
            raise ValueError(message(function, "numbers", "given, or ids, hashed or crosses: the features", got))
        twice = {name for name in (*self.ids, *self.hashed) if (*self.ids, *self.hashed).count(name) > 1}
        if twice or ("numbers" in (*self.ids, *self.hashed) and self.numbers):
            raise ValueError(message(function, "hashed", "of other columns than ids, each once", sorted(twice)))
        if fill is not None and not abs(fill) <= _LARGEST:
            raise ValueError(message(function, "fill", "a finite number", fill))
        self.num_rows, self.seed = {}, {}
        for name in (*self.hashed, *self.crosses):
            rows = num_rows.get(name) if isinstance(num_rows, Mapping) else num_rows
            if rows is None:
                do = "It is the number of rows of the table that the hashes go into."
                raise ValueError(message(function, "num_rows", f"given for {name!r}, which is hashed", None, do))
            self.num_rows[name] = rows
            self.seed[name] = seed.get(name, 0) if isinstance(seed, Mapping) else seed
            hash_ids([], rows, self.seed[name])  # raises if they are out of range
        for n, of in enumerate(self.crosses.values()):
            if len(of) < 2:
                raise ValueError(message(function, f"crosses[{n}]", "two names or more", list(of)))

    @property
    def names(self) -> list[str]:
        """Every column that is read."""
        given = [name for name in (self.label, self.weight) if name is not None]
        of_crosses = [name for of in self.crosses.values() for name in of]
        return list(dict.fromkeys([*given, *self.numbers, *self.ids, *self.hashed, *of_crosses]))

    def check(self, path: str, there: Sequence[str]) -> None:
        """Raises ValueError for a column that a file has not, or twice."""
        for name in self.names:
            if list(there).count(name) != 1:
                shown = ", ".join(map(repr, there[:50]))
                count = "no column" if name not in there else "several columns"
                raise ValueError(f"js.{self.function}: {path} has {count} {name!r}. Its columns are {shown}.")

    def chunk(self, get: Callable[[str], Any], number: Callable[[str], np.ndarray]) -> Chunk:
        """The chunk of some rows: get(name) is what js.hash_ids takes, or ids; number(name) is float32 (n,)."""
        x: dict[str, Any] = {}
        if self.numbers:
            x["numbers"] = np.stack([number(name) for name in self.numbers], axis=1)
        x |= {name: get(name) for name in self.ids}
        for name in self.hashed:
            x[name] = hash_ids(get(name), self.num_rows[name], self.seed[name], missing=self.missing)
        for name, of in self.crosses.items():
            x[name] = cross([get(each) for each in of], self.num_rows[name], self.seed[name], missing=self.missing)
        label = None if self.label is None else number(self.label)
        weight = None if self.weight is None else number(self.weight)
        if weight is not None and (weight < 0).any():
            raise ValueError(message(self.function, "weight", "of numbers that are not negative", weight.min()))
        return Chunk(x, label, weight)

    def fill_of(self, name: str) -> float | None:
        """What a missing number counts as."""
        return self.fill if name in self.numbers else None


def convert(
    columns: Columns,
    values: dict[str, list[Any]],
    count: int,
    as_numbers: Callable[[list[Any], float | None], np.ndarray],
    as_ids: Callable[[list[Any]], Any],
    checks: Mapping[str, Any],
) -> tuple[Chunk, int, dict[int, str]]:
    """The chunk of columns of Python's objects, without the rows that are bad; its examples; and what is bad, and why.

    Args:
      columns: what they are.
      values: by name, `count` of each.
      count: the rows.
      as_numbers: (values, fill) -> float32 (n,), and as_ids, of a whole column; both raise ValueError.
      checks: "numbers", "ids" and "hashed": (a column) -> a function of one of its values that raises BadRowError if it
        cannot be that. That of numbers returns whether it is missing.
    """
    bad: dict[int, str] = {}
    for _ in range(2):
        try:
            return _chunk(columns, values, as_numbers, as_ids) if count else Chunk({}), count, bad
        except (ValueError, TypeError, OverflowError):
            bad = _bad_rows(columns, values, checks)
            if not bad:
                raise
            values = {name: without(column, bad) for name, column in values.items()}
            count -= len(bad)
    raise AssertionError


def _chunk(columns: Columns, values: dict[str, list[Any]], as_numbers: Any, as_ids: Any) -> Chunk:
    ids = {name: as_ids(values[name]) for name in columns.ids}
    number = lambda name: as_numbers(values[name], columns.fill_of(name))  # noqa: E731
    return columns.chunk(lambda name: ids[name] if name in ids else values[name], number)


def _bad_rows(columns: Columns, values: dict[str, list[Any]], checks: Mapping[str, Any]) -> dict[int, str]:
    bad: dict[int, str] = {}
    of_crosses = [name for of in columns.crosses.values() for name in of]
    given = [name for name in (columns.label, columns.weight) if name is not None]
    roles = [("numbers", (*given, *columns.numbers)), ("ids", columns.ids), ("hashed", (*columns.hashed, *of_crosses))]
    for role, names in roles:
        for name in names:
            check = checks[role](values[name])
            for at, value in enumerate(values[name]):
                try:
                    if check(value) and columns.fill_of(name) is None:
                        raise BadRowError("is empty; fill= is what missing numbers count as")
                    if name == columns.weight and value is not None and float(value) < 0:
                        raise BadRowError(f"is a weight, and {value} is negative")
                except BadRowError as error:
                    bad.setdefault(at, f"column {name!r} {error}")
    return bad


def finite(numbers: Any) -> np.ndarray:
    """float32 (n,); ValueError if one is not finite there."""
    numbers = np.asarray(numbers, np.float64)
    if not (np.abs(numbers) <= _LARGEST).all():
        raise ValueError
    return numbers.astype(np.float32)


def check_finite(value: float, shown: Any) -> None:
    if not abs(value) <= _LARGEST:
        raise BadRowError(f"is {shown!r}, no finite number")
