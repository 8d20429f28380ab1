"""What walks through a step's program find out (`walk.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jaxsparse.trace.values import Rows

# Where an equation is: the equations that it is inside of, and itself.
Path = tuple[Any, ...]


class Read(NamedTuple):
    """A place where rows are read or, as in the gradient of a read, added."""

    node: int
    late: bool | None  # reads what the step has updated; None: adds
    path: Path | None  # None inside of a region, where ids are stacked
    clipped: bool  # an id out of range reads the first or last row
    source: str


class Reason(NamedTuple):
    """Why something is not done row by row."""

    cause: str  # a primitive, or a few words
    source: str  # its line; "" if there is none
    closed: bool = False  # it holds a program of a kind that this library does not look into

    def __str__(self) -> str:
        return f"{self.cause} at {self.source}" if self.source else self.cause


@dataclasses.dataclass
class Plan:
    """What a walk finds out.

    Args:
      heights: the numbers of rows of all tables.
      loose: scatters that belong to no table.
      nodes: numbers of scatters, the same in all walks; leaves have their own, smaller ones.
    """

    heights: frozenset[int]
    loose: frozenset[Path] = frozenset()
    nodes: dict[Path, int] = dataclasses.field(default_factory=dict)
    first_node: int = 0
    scatters: dict[Path, int] = dataclasses.field(default_factory=dict)  # of this walk
    not_by_row: dict[int, Reason] = dataclasses.field(default_factory=dict)  # why nodes cannot be Rows
    refused: dict[int, Reason] = dataclasses.field(default_factory=dict)  # the same, of what is updated
    axes: dict[int, set[Any]] = dataclasses.field(default_factory=dict)  # mapped axes that nodes are summed over
    whole_sums: dict[Reason, int] = dataclasses.field(default_factory=dict)  # with a node
    made_whole: dict[tuple[int, str], None] = dataclasses.field(default_factory=dict)
    part_sources: dict[str, None] = dataclasses.field(default_factory=dict)
    part_sums: list[tuple[Rows, str]] = dataclasses.field(default_factory=list)  # over rows of what is updated
    whole_scatters: dict[str, None] = dataclasses.field(default_factory=dict)  # into as many rows as a table has
    gates: list[tuple[int, Any, str]] = dataclasses.field(default_factory=list)  # node, counter, source
    read: set[int] = dataclasses.field(default_factory=set)
    kinds: dict[Path, list[Any]] = dataclasses.field(default_factory=dict)  # of what leaves a region, without arrays
    _parent: dict[int, int] = dataclasses.field(default_factory=dict)

    def find(self, node: int) -> int:
        """The one node that stands for all that share its rows."""
        while (parent := self._parent.get(node, node)) != node:
            node = parent
        return node

    def unify(self, a: int, b: int) -> int:
        a, b = sorted((self.find(a), self.find(b)))  # a leaf rather than a scatter
        if a != b:
            self._parent[b] = a
        return a

    def scatter_at(self, path: Path) -> int:
        node = self.nodes.setdefault(path, self.first_node + len(self.nodes))
        self.scatters[path] = node
        return node
