"""The roles of columns, for all formats: label, weight, numbers, ids, hashed columns and crosses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse._checks import message
from jaxsparse.data.hashing import cross, hash_ids
from jaxsparse.data.readers.lines import BadRowError, Chunk, without

_LARGEST = float(np.finfo(np.float32).max)


class Columns:
    """The role of each column that is read. The arguments are those of `js.read_csv`."""

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
            got = "no features"
            raise ValueError(message(function, "numbers", "given, or ids, hashed or crosses", got))
        twice = {name for name in (*self.ids, *self.hashed) if (*self.ids, *self.hashed).count(name) > 1}
        if twice or ("numbers" in (*self.ids, *self.hashed) and self.numbers):
            raise ValueError(message(function, "hashed", "columns that are not among ids, each once", sorted(twice)))
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
        """The names of all columns that are read."""
        given = [name for name in (self.label, self.weight) if name is not None]
        of_crosses = [name for of in self.crosses.values() for name in of]
        return list(dict.fromkeys([*given, *self.numbers, *self.ids, *self.hashed, *of_crosses]))

    def check(self, path: str, there: Sequence[str]) -> None:
        """Raises ValueError if a file does not have a column, or has it twice."""
        for name in self.names:
            if list(there).count(name) != 1:
                shown = ", ".join(map(repr, there[:50]))
                count = "no column" if name not in there else "several columns"
                raise ValueError(f"js.{self.function}: {path} has {count} {name!r}. Its columns are {shown}.")

    def chunk(self, get: Callable[[str], Any], number: Callable[[str], np.ndarray]) -> Chunk:
        """The chunk of some rows. get(name) is ids, or values for js.hash_ids; number(name) is float32 (n,)."""
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
        """The value of an empty number, or None if it is an error."""
        return self.fill if name in self.numbers else None


def convert(
    columns: Columns,
    values: dict[str, list[Any]],
    count: int,
    as_numbers: Callable[[list[Any], float | None], np.ndarray],
    as_ids: Callable[[list[Any]], Any],
    checks: Mapping[str, Any],
) -> tuple[Chunk, int, dict[int, str]]:
    """Makes a chunk of columns of Python objects. Returns (chunk without bad rows, its examples, {bad row: reason}).

    Args:
      columns: the roles.
      values: by column name, a list of `count` values.
      count: the number of rows.
      as_numbers: (values of a column, fill) -> float32 (n,); raises ValueError.
      as_ids: values of a column -> ids; raises ValueError.
      checks: for "numbers", "ids" and "hashed": a function of a column that returns a check of one value. The check
        raises BadRowError for a bad value. That of numbers returns whether the value is missing.
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
                        raise BadRowError("is empty; give fill=, the value of an empty number")
                    if name == columns.weight and value is not None and float(value) < 0:
                        raise BadRowError(f"is a weight, and {value} is negative")
                except BadRowError as error:
                    bad.setdefault(at, f"column {name!r} {error}")
    return bad


def finite(numbers: Any) -> np.ndarray:
    """numbers as float32 (n,). Raises ValueError if one is not finite in float32."""
    numbers = np.asarray(numbers, np.float64)
    if not (np.abs(numbers) <= _LARGEST).all():
        raise ValueError
    return numbers.astype(np.float32)


def check_finite(value: float, shown: Any) -> None:
    if not abs(value) <= _LARGEST:
        raise BadRowError(f"is {shown!r}, not a finite number")
