"""The kinds of value in a train step of which only some rows are computed.

Every value stands for an array of the traced program. A `FullArray` has all of it. `Rows` has the block of chosen rows,
along one axis, and knows what the other rows are. `EqualRows` has one row that all others equal: a broadcast that is
not made, so that no table-sized array is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._jax import vary, varying_axes
from jaxsparse.ops.rows import as_whole
from jaxsparse.trace.pieces import DeferredBlock

# The rows of a `Rows` outside of its block: unknown; all equal to the padding rows at the block's end; zero.
UNKNOWN, UNIFORM, ZERO = range(3)

NOBODY = 2**31 - 1  # names no row: stands for the ids in a branch that is not taken


class Note(NamedTuple):
    """One thing that an array depends on, and that restricts what the array may be used for.

    kind: "table sum" (over all rows of a table), "update sum" (over the chosen rows of an update), "counter" (an
    integer of the state), "remainder" (of a counter, after division), "gate" (a comparison of a counter).
    """

    kind: str
    what: Any  # a source line of a sum, the number of a counter


Notes = frozenset[Note]
NOTHING: Notes = frozenset()


class LazyArray:
    """An array that is computed when it is first needed. Planning needs few arrays: those that row ids depend on.

    Args:
      needs: the operands of `make`. Those that are LazyArrays are computed first.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, make: Callable[[], Any], needs: Iterable[Any]) -> None:
        self.shape, self.ndim, self.dtype = tuple(shape), len(shape), dtype
        self._make: Callable[[], Any] | None = make
        self._needs, self._array = [x for x in needs if isinstance(x, LazyArray)], None

    @property
    def array(self) -> Any:
        stack = [self]  # no recursion: a chain may be as long as the program
        while stack:
            x = stack[-1]
            if missing := [y for y in x._needs if y._make is not None]:
                stack += missing
                continue
            if x._make is not None:
                x._array, x._make, x._needs = x._make(), None, []
            stack.pop()
        return self._array


def materialize(x: Any) -> Any:
    """The array; a LazyArray is computed."""
    return x.array if isinstance(x, LazyArray) else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FullArray:
    """A full array. `data` is the array, or a LazyArray."""

    data: Any
    notes: Notes = dataclasses.field(default=NOTHING, metadata={"static": True})
    # the equation that computed it, if it has as many rows as a table
    made_by: Any = dataclasses.field(default=None, metadata={"static": True})
    zero: bool = dataclasses.field(default=False, metadata={"static": True})  # all of it
    # how it is computed in pieces (`by_entry.Entries`), if its only use may want that
    entries: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def array(self) -> Any:
        return materialize(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape if isinstance(self.data, LazyArray) else jnp.shape(self.data)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Some rows, along `axis`, of an array that has as many rows as a table.

    Attributes:
      data: the block of rows, a `DeferredBlock` or a LazyArray.
      node: names these rows in the plan, where nodes with the same rows are unified.
      outside: the rows outside of the block: UNKNOWN, UNIFORM or ZERO.
      updated: whether it depends on a scatter. Rows outside of the block are frozen and get no update.
      full: computes the full array, if that depends on state alone.
      add_to: adds it to another block with the same rows, if it is a scatter-add into zeros.
      origin: the first Rows of a chain of reshapes, casts and elementwise operations.
      table: the full array, if reads on CPU are made in it.

    The last four are None for what leaves a region.
    """

    data: Any
    node: int
    axis: int = 0
    outside: int = UNKNOWN
    updated: bool = False
    full: Callable[[Any], Any] | None = None  # of a walk, which keeps the result
    add_to: Callable[[Any], Any] | None = None
    origin: Rows | None = None
    table: Any = None

    @property
    def block(self) -> Any:
        """The chosen rows."""
        return self.data.block() if isinstance(self.data, DeferredBlock) else materialize(self.data)

    def block_off_cpu(self) -> Any:
        """The block, for code that never runs on CPU."""
        return self.data.block_off_cpu() if isinstance(self.data, DeferredBlock) else materialize(self.data)

    @property
    def first(self) -> Rows:
        return self.origin or self


def _flatten_rows(rows: Rows) -> tuple[tuple[Any], tuple[int, int, int, bool]]:
    return (rows.block,), (rows.node, rows.axis, rows.outside, rows.updated)


jax.tree_util.register_pytree_node(Rows, _flatten_rows, lambda aux, blocks: Rows(blocks[0], *aux))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EqualRows:
    """An array whose rows along `axis` are all equal. `row` has size 1 there, the array has `size`. `data` is the row
    or a LazyArray."""

    data: Any
    axis: int = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    zero: bool = dataclasses.field(default=False, metadata={"static": True})
    notes: Notes = dataclasses.field(default=NOTHING, metadata={"static": True})

    @property
    def row(self) -> Any:
        return materialize(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.shape_of(self.size)

    def shape_of(self, size: int) -> tuple[int, ...]:
        """The shape of `size` equal rows."""
        shape = tuple(self.data.shape)
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])

    def times(self, size: int) -> jax.Array:
        """An array of `size` equal rows."""
        return jnp.broadcast_to(self.row, self.shape_of(size))

    def along(self, axis: int) -> EqualRows:
        """Zeros as equal rows along another axis."""
        if axis == self.axis:
            return self
        shape = list(jnp.shape(self.row))
        shape[self.axis], size, shape[axis] = self.size, shape[axis], 1
        row = vary(jnp.zeros(shape, self.row.dtype), varying_axes(self.row))
        return EqualRows(row, axis, size, self.zero, self.notes)

    @property
    def outside(self) -> int:
        return ZERO if self.zero else UNIFORM


@dataclasses.dataclass(frozen=True, eq=False)
class Summed:
    """The result of a gather whose output is only summed: the sum. The equation that sums returns `total`."""

    total: Any


Value = Any  # FullArray, Rows, EqualRows or Summed

# The operands and the outputs of a rule. None: the equation cannot be done row by row.
Values = Sequence[Value]
Outs = list[Value] | None


def array_of(v: Value) -> Any:
    """The array that a FullArray or EqualRows stands for."""
    return v.times(v.size) if isinstance(v, EqualRows) else v.array


def notes_of(*values: Value) -> Notes:
    """The notes of all values. Rows have none: operands are checked where they meet rows."""
    return NOTHING.union(*(v.notes for v in values if not isinstance(v, Rows)))


class RefusedError(ValueError):
    """Raised for a step that cannot be evaluated on the rows that it reads."""

    def __init__(self, text: str, got: str, do: str) -> None:
        super().__init__(text)
        self.got, self.do = got, do


def rows_of_leaf(block: jax.Array, i: int, leaf: jax.Array, table: jax.Array | None = None) -> Rows:
    """Some rows of a leaf of the state. `table`: the leaf, if reads on CPU are made in it."""
    return Rows(block, i, full=lambda walk: as_whole(leaf), table=table)


def rows_of_update(block: jax.Array, i: int) -> Rows:
    """Some rows of an array that is zero elsewhere."""
    return Rows(block, i, outside=ZERO, updated=True)
