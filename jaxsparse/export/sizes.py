"""Sizes that depend on the input: a program traced at several sizes, and the formula of each number in it.

Tracing with symbolic sizes refuses len(x) and much else that Python does with a shape. Traced at several sizes, a model
may do what it likes, as long as the same equations come out, with numbers in them that are linear in each size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


class UnsolvedError(Exception):
    """Numbers that no formula gives."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A sum of products, as 8 * b + 1.

    Attributes:
      terms: (names, factor), the factors being no zeros.
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
      names: of the sizes, the first being the one that others may be multiplied with.
      start: of each, one that the model is meant for.
    """

    def __init__(self, names: Sequence[str], start: Sequence[int]) -> None:
        self.names, self._start = list(names), list(start)
        self._changes: list[tuple[int, ...]] = [()]
        self._changes += [(i,) for i in range(len(names))]
        self._changes += [(0, i) for i in range(1, len(names))]
        self.all = [self._at(changed) for changed in self._changes]
        self.all += [[x + 2 for x in start]] if names else []  # only to see that the formulas hold

    def _at(self, changed: Sequence[int]) -> list[int]:
        return [x + (i in changed) for i, x in enumerate(self._start)]

    def solve(self, numbers: Sequence[int]) -> int | Size:
        """The formula of a number, of which these are the values at the points.

        Raises:
          UnsolvedError: if there is none.
        """
        first = numbers[0]
        if all(x == first for x in numbers):
            return first
        found: dict[tuple[int, ...], int] = {}  # by what was changed, in differences from the start
        for changed, x in zip(self._changes, numbers, strict=False):
            found[changed] = x - sum(found[part] for part in {(), *((i,) for i in changed)} if part in found)
        factors: dict[tuple[int, ...], int] = dict.fromkeys(self._changes, 0)
        for changed, factor in found.items():  # of (b - b0) (l - l0)
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
        """The same in parameters of equations, which are numbers, tuples of these, and much else."""
        first = values[0]
        if isinstance(first, (int, np.integer)) and not isinstance(first, bool):
            return self.solve([int(x) for x in values])
        if isinstance(first, tuple) and type(first) is tuple:
            if len({len(x) for x in values}) > 1:
                raise UnsolvedError
            return tuple(map(self.solve_all, zip(*values, strict=True)))
        return first
