"""The record of a walk through a step's program (`walk.py`): which arrays share rows, and what is not done row by row.

A planning walk fills a `Plan`. `planning` decides by it which arrays are evaluated on some rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jaxsparse.trace.values import Rows

# The place of an equation: the equations that it is inside of, then the equation itself.
Path = tuple[Any, ...]


class Read(NamedTuple):
    """A place where rows are read or, as in the gradient of a read, added."""

    node: int
    after_update: bool | None  # whether it reads rows that the step has updated; None if it adds to rows
    path: Path | None  # None inside of a region, where the ids of all turns are stacked
    clipped: bool  # whether an id out of range reads the first or last row
    source: str


class Reason(NamedTuple):
    """Why something is not done row by row."""

    cause: str  # a primitive, or a few words
    source: str  # the source line, or ""
    closed: bool = False  # whether it is an equation whose inner program this library cannot open

    def __str__(self) -> str:
        return f"{self.cause} at {self.source}" if self.source else self.cause


@dataclasses.dataclass
class Plan:
    """What a walk finds.

    A node is the number of an array of rows: of a leaf of the state, or a larger one of a scatter. A class is a set of
    nodes that share their rows; `find` gives the node that stands for it.

    Args:
      table_heights: the numbers of rows of all tables.
      tableless_scatters: scatters that belong to no table.
      nodes: the numbers of scatters, the same in all walks.
      first_node: the first number for a scatter.
    """

    table_heights: frozenset[int]
    tableless_scatters: frozenset[Path] = frozenset()
    nodes: dict[Path, int] = dataclasses.field(default_factory=dict)
    first_node: int = 0
    scatters: dict[Path, int] = dataclasses.field(default_factory=dict)  # in this walk
    not_by_row: dict[int, Reason] = dataclasses.field(default_factory=dict)  # why a node cannot be Rows
    refused: dict[int, Reason] = dataclasses.field(default_factory=dict)  # why an updated node cannot be Rows
    axes: dict[int, set[Any]] = dataclasses.field(default_factory=dict)  # mapped axes over which a node is summed
    table_sums: dict[Reason, int] = dataclasses.field(default_factory=dict)  # over all rows: {where: node}
    table_sized_arrays: dict[tuple[int, str], None] = dataclasses.field(default_factory=dict)  # (node, source)
    update_sum_sources: dict[str, None] = dataclasses.field(default_factory=dict)
    update_sums: list[tuple[Rows, str]] = dataclasses.field(default_factory=list)  # over the rows of an update
    table_sized_scatters: dict[str, None] = dataclasses.field(default_factory=dict)  # that are not done row by row
    gates: list[tuple[int, Any, str]] = dataclasses.field(default_factory=list)  # (node, counter, source)
    read: set[int] = dataclasses.field(default_factory=set)  # nodes
    kinds: dict[Path, list[Any]] = dataclasses.field(default_factory=dict)  # the kinds of a region's outputs
    _parent: dict[int, int] = dataclasses.field(default_factory=dict)

    def find(self, node: int) -> int:
        """The node that stands for all nodes with the same rows."""
        while (parent := self._parent.get(node, node)) != node:
            node = parent
        return node

    def unify(self, a: int, b: int) -> int:
        a, b = sorted((self.find(a), self.find(b)))  # a leaf stands for scatters
        if a != b:
            self._parent[b] = a
        return a

    def scatter_at(self, path: Path) -> int:
        node = self.nodes.setdefault(path, self.first_node + len(self.nodes))
        self.scatters[path] = node
        return node
