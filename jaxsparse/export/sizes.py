"""Formulas for sizes that depend on the input, found from traces at several sizes.

Tracing with symbolic sizes refuses len(x) and other uses of a shape as a Python number. Traces at several sizes allow
them, as long as all traces have the same equations, and the numbers in these are linear in each size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


class UnsolvedError(Exception):
    """No formula gives these numbers."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A sum of products of sizes, such as 8 * b + 1.

    Attributes:
      terms: (names, factor), with factors other than zero.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]

    def __str__(self) -> str:
        text = ""
        for names, factor in self.terms:
            parts = [str(abs(factor))] if abs(factor) != 1 or not names else []
            sign = "-" if factor < 0 else "+"
            text += (
                f" {sign} {' * '.join([*parts, *names])}" if text else "-" * (factor < 0) + " * ".join([*parts, *names])
            )
        return text

    __repr__ = __str__


class Points:
    """The sizes at which a program is traced.

    Args:
      names: the names of the sizes. A formula may have products of the first one and another.
      start: the sizes of the example.
    """

    def __init__(self, names: Sequence[str], start: Sequence[int]) -> None:
        self.names, self._start = list(names), list(start)
        self._changes: list[tuple[int, ...]] = [()]
        self._changes += [(i,) for i in range(len(names))]
        self._changes += [(0, i) for i in range(1, len(names))]
        self.all = [self._at(changed) for changed in self._changes]
        self.all += [[x + 2 for x in start]] if names else []  # to check the formulas

    def _at(self, changed: Sequence[int]) -> list[int]:
        return [x + (i in changed) for i, x in enumerate(self._start)]

    def solve(self, numbers: Sequence[int]) -> int | Size:
        """The formula of a number, given its values at all points.

        Raises:
          UnsolvedError: if there is none.
        """
        first = numbers[0]
        if all(x == first for x in numbers):
            return first
        found: dict[tuple[int, ...], int] = {}  # by the sizes that are changed: the difference that this makes
        for changed, x in zip(self._changes, numbers, strict=False):
            found[changed] = x - sum(found[part] for part in {(), *((i,) for i in changed)} if part in found)
        factors: dict[tuple[int, ...], int] = dict.fromkeys(self._changes, 0)
        for changed, factor in found.items():  # from products of (b - b0), (l - l0) to products of b, l
            for kept in {(), changed, *((i,) for i in changed)}:
                others = [i for i in changed if i not in kept]
                factors[kept] += factor * math.prod(-self._start[i] for i in others)
        terms = sorted(
            ((key, factor) for key, factor in factors.items() if factor), key=lambda term: (-len(term[0]), term[0])
        )
        for at, x in zip(self.all, numbers, strict=True):
            if sum(factor * math.prod(at[i] for i in key) for key, factor in terms) != x:
                raise UnsolvedError
        return Size(tuple((tuple(self.names[i] for i in key), factor) for key, factor in terms))

    def solve_all(self, values: Sequence[Any]) -> Any:
        """`solve` for parameters of equations: for ints, also in tuples. Anything else is the first value."""
        first = values[0]
        if isinstance(first, (int, np.integer)) and not isinstance(first, bool):
            return self.solve([int(x) for x in values])
        if isinstance(first, tuple) and type(first) is tuple:
            if len({len(x) for x in values}) > 1:
                raise UnsolvedError
            return tuple(map(self.solve_all, zip(*values, strict=True)))
        return first
