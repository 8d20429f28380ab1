"""What a value of a train step is while only some rows of its tables are computed.

Every value has the shape that it has in the traced program. `Whole` has all of it. `Rows` has the block of rows that
were chosen of a table's, along one axis, and knows what the other rows are. `Same` has one row, all others being equal
to it: a broadcast that nobody needs yet, of which nothing table-sized is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._jax import vary, varying_axes
from jaxsparse.ops.rows import as_whole
from jaxsparse.trace.pieces import Later

# What the rows of a `Rows` are outside of its block: anything; what the padding rows at the block's end are; zero.
UNKNOWN, UNIFORM, ZERO = range(3)


NOBODY = 2**31 - 1  # the id of what a branch that is not taken would have read


class Note(NamedTuple):
    """Something that an array was made from, which decides what it may be used for.

    kind: "whole sum" (over all rows of a table), "part sum" (over the chosen rows of an update), "counter" (an integer
    of the state, or what is made of it), "remainder" (a counter's, after division), "gate" (a comparison of a counter).
    """

    kind: str
    what: Any  # a source line of a sum, the number of a counter


Notes = frozenset[Note]
NOTHING: Notes = frozenset()


class Unmade:
    """An array that is made when something needs it, in the trace that it belongs to. While planning, few are needed:
    those that row ids are made of.

    Args:
      needs: what it is made of, arrays and others of these, which are made before.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, make: Callable[[], Any], needs: Iterable[Any]) -> None:
        self.shape, self.ndim, self.dtype = tuple(shape), len(shape), dtype
        self._make: Callable[[], Any] | None = make
        self._needs, self._array = [x for x in needs if isinstance(x, Unmade)], None

    @property
    def array(self) -> Any:
        stack = [self]  # no recursion: a chain of them is as long as the program
        while stack:
            x = stack[-1]
            if missing := [y for y in x._needs if y._make is not None]:
                stack += missing
                continue
            if x._make is not None:
                x._array, x._make, x._needs = x._make(), None, []
            stack.pop()
        return self._array


def ready(x: Any) -> Any:
    """An array, made if it is not yet."""
    return x.array if isinstance(x, Unmade) else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """An array, all of it: `made`, or what makes it."""

    made: Any
    notes: Notes = dataclasses.field(default=NOTHING, metadata={"static": True})
    # the equation that computed as many rows as a table has, if one did
    made_by: Any = dataclasses.field(default=None, metadata={"static": True})
    zero: bool = dataclasses.field(default=False, metadata={"static": True})  # known to be
    # how it is made in pieces (`by_entry.Entries`), if its one use may want that
    entries: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def array(self) -> Any:
        return ready(self.made)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.made.shape if isinstance(self.made, Unmade) else jnp.shape(self.made)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an array that has as many as a table, along `axis`.

    `made` is the block, or what makes it (`pieces.Later`, or an Unmade). `node` names these rows in the plan, where
    nodes with the same rows are joined. `updated`: a scatter is among what it was made from, so that rows outside
    the block, which are frozen, get nothing of it. Not known any more behind a region's end: `whole`, which
    computes the array itself, while only state is among what it was made from; `add_to`, which adds it to another
    block with the same rows, where it is nothing but a scatter-add into zeros; `origin`, the first of a chain of
    reshaped, cast and elementwise changed Rows; `table`, the array itself, in which reads are made on CPU.
    """

    made: Any
    node: int
    axis: int = 0
    outside: int = UNKNOWN
    updated: bool = False
    whole: Callable[[Any], Any] | None = None  # of a walk, which remembers
    add_to: Callable[[Any], Any] | None = None
    origin: Rows | None = None
    table: Any = None

    @property
    def block(self) -> Any:
        """The rows that were chosen."""
        return self.made.block() if isinstance(self.made, Later) else ready(self.made)

    def elsewhere(self) -> Any:
        """The block, for what no CPU runs."""
        return self.made.elsewhere() if isinstance(self.made, Later) else ready(self.made)

    @property
    def first(self) -> Rows:
        return self.origin or self


def _flatten_rows(rows: Rows) -> tuple[tuple[Any], tuple[int, int, int, bool]]:
    return (rows.block,), (rows.node, rows.axis, rows.outside, rows.updated)


jax.tree_util.register_pytree_node(Rows, _flatten_rows, lambda aux, blocks: Rows(blocks[0], *aux))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """An array of which all rows along `axis` are equal: `row` has size 1 there, where the array has `size`. `made` is
    the row, or what makes it."""

    made: Any
    axis: int = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    zero: bool = dataclasses.field(default=False, metadata={"static": True})
    notes: Notes = dataclasses.field(default=NOTHING, metadata={"static": True})

    @property
    def row(self) -> Any:
        return ready(self.made)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.shape_of(self.size)

    def shape_of(self, size: int) -> tuple[int, ...]:
        """Of the row, so many times."""
        shape = tuple(self.made.shape)
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])

    def times(self, size: int) -> jax.Array:
        """The row, so many times."""
        return jnp.broadcast_to(self.row, self.shape_of(size))

    def along(self, axis: int) -> Same:
        """Of zeros: the same, as equal rows along another axis."""
        if axis == self.axis:
            return self
        shape = list(jnp.shape(self.row))
        shape[self.axis], size, shape[axis] = self.size, shape[axis], 1
        row = vary(jnp.zeros(shape, self.row.dtype), varying_axes(self.row))
        return Same(row, axis, size, self.zero, self.notes)

    @property
    def outside(self) -> int:
        return ZERO if self.zero else UNIFORM


@dataclasses.dataclass(frozen=True, eq=False)
class Summed:
    """What a gather returns whose output is only summed: the sum, which the next equation is to hand on."""

    total: Any


Value = Any  # Whole, Rows, Same or Summed

# What a rule takes, and what it makes: None where it cannot be done row by row.
Values = Sequence[Value]
Outs = list[Value] | None


def array_of(v: Value) -> Any:
    """All of a Whole or Same."""
    return v.times(v.size) if isinstance(v, Same) else v.array


def notes_of(*values: Value) -> Notes:
    """What arrays were made from; Rows have no notes, what enters them is looked at where it does."""
    return NOTHING.union(*(v.notes for v in values if not isinstance(v, Rows)))


class RefusedError(ValueError):
    """A step that cannot be right on the rows that it reads."""

    def __init__(self, text: str, got: str, do: str) -> None:
        super().__init__(text)
        self.got, self.do = got, do


def rows_of_leaf(block: jax.Array, i: int, leaf: jax.Array, table: jax.Array | None = None) -> Rows:
    """Some rows of a leaf of the state. `table`: the leaf, where it is to be read there."""
    return Rows(block, i, whole=lambda walk: as_whole(leaf), table=table)


def rows_of_update(block: jax.Array, i: int) -> Rows:
    """Some rows of an array that is zero elsewhere."""
    return Rows(block, i, outside=ZERO, updated=True)
