"""Evaluates a traced train step on some rows of its tables.

`Walk` goes through the step's program, equation by equation. Values (`values.py`) of the inputs go in, values of the
outputs come out. An equation with Rows is done by a rule of `row_rules`, `row_reads` or `row_regions`; any other is
evaluated as it is.

The walk is made twice. The first walk plans: blocks are stand-ins, and a `Plan` records which arrays share rows, which
row ids are read, and what is not done row by row. In the second walk the blocks are the rows that those ids name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _jax
from jaxsparse._context import ROW_NUMBERS, ROWS_OF
from jaxsparse._jax import Equation, Program
from jaxsparse.ops.rows import gather_rows
from jaxsparse.trace import by_entry, row_elementwise, row_reads, row_regions, row_rules
from jaxsparse.trace.lines import source_line
from jaxsparse.trace.pieces import DeferredBlock, Part, rows_of
from jaxsparse.trace.plan import Path, Plan, Read, Reason
from jaxsparse.trace.uses import INLINED, Frame, only_use, uses_of
from jaxsparse.trace.values import (
    NOBODY,
    ZERO,
    EqualRows,
    FullArray,
    LazyArray,
    Rows,
    Summed,
    Value,
    array_of,
    materialize,
    notes_of,
)


class Space(NamedTuple):
    """The rows that are chosen for the arrays of a class."""

    ids: jax.Array  # int32 (k,), distinct; padded with num_rows, num_rows + 1, ..., one of these at least
    num_rows: int
    # the positions in `ids` of the ids of a read, k for no row; without them `ids` are sorted and searched
    positions: dict[Path, jax.Array]
    trained: jax.Array | None = None  # bool (k,), which rows are trained; None if all are


class Walk:
    """One walk through a program; see the module's docstring.

    Args:
      plan: is filled while planning, and read in the second walk.
      spaces: {class: its chosen rows}; None while planning.
      within: the equations that the program is inside of.
      depth: how many regions the program is inside of.
      on_one_device: whether the program runs on one device, and will not be split over several.
      defers: whether blocks that are made row by row are computed when they are needed.
      stand_ins: while planning, int32 (k,) in place of the ids of a block.
    """

    def __init__(
        self,
        plan: Plan,
        spaces: dict[int, Space] | None = None,
        within: tuple[Equation, ...] = (),
        depth: int = 0,
        on_one_device: bool = True,
        defers: bool = False,
        stand_ins: Any = None,
    ) -> None:
        self.plan, self.spaces, self.within, self.depth, self.on_one_device = plan, spaces, within, depth, on_one_device
        self.defers, self.stand_ins = defers, stand_ins
        self.tables_read: list[jax.Array] = []  # read in full tables, on CPU
        self.reads: list[tuple[Read, jax.Array]] = []
        self._full_arrays: dict[Any, Any] = {}
        self._frames: list[Frame] = []  # of nested programs, the innermost last

    @property
    def planning(self) -> bool:
        return self.spaces is None

    def run(self, program: Program, values: Sequence[Value]) -> list[Value]:
        """The values of the outputs, given those of the inputs."""
        self._frames.append(Frame(program, self.within[-1:], uses_of(program)))
        env: dict[Any, Value] = {v: FullArray(c) for v, c in program.constants.items()}
        env.update(zip(program.inputs, values, strict=True))

        def read(v: Any) -> Value:
            return FullArray(_jax.literal_value(v)) if _jax.is_literal(v) else env[v]

        for eqn in program.equations:
            self.within += (eqn,)
            operands = [read(v) for v in eqn.inputs]
            outs = self._step(program, eqn, operands)
            env.update(zip(eqn.outputs, outs, strict=True))
            self.within = self.within[:-1]
        self._frames.pop()
        return [read(v) for v in program.outputs]

    def _step(self, program: Program, eqn: Equation, values: list[Value]) -> list[Value]:
        primitive = eqn.primitive
        if _jax.called_name(eqn) == ROWS_OF:
            return self._rows_of(eqn, values[0])
        if _jax.called_name(eqn) == ROW_NUMBERS and isinstance(v := values[0], Rows) and v.axis == 0:
            (num_rows,) = _jax.shape(eqn.outputs[0])
            return [Rows(self.ids(v.node), v.node, full=lambda walk: jnp.arange(num_rows, dtype=jnp.int32))]
        if primitive in INLINED:
            return self.run(_jax.called(eqn), values)
        if any(isinstance(v, Summed) for v in values):
            assert primitive is _jax.REDUCE_SUM, "the one use that was found is a sum"
            return [FullArray(values[0].total)]
        some_rows, all_full = any(isinstance(v, Rows) for v in values), all(isinstance(v, FullArray) for v in values)
        if some_rows and primitive not in row_reads.RULES:
            self._note_gates(eqn, values)
        region = row_regions.remat if _jax.is_remat(eqn) else row_regions.REGIONS.get(primitive)
        rule = _RULES.get(primitive, _RULES.get(primitive.name))
        if region and (not all_full or self._is_tall(eqn)):
            outs = region(self, eqn, [self._enter_region(v) for v in values])
        elif _jax.summed_axes(eqn) is not None and not all_full:
            outs = row_rules.across_devices(self, eqn, values)
        elif rule is not None and not all_full:
            outs = rule(self, eqn, values)
        elif primitive is _jax.BROADCAST:
            outs = row_rules.broadcast(self, eqn, values)
        elif primitive is _PAD:
            outs = row_reads.pad(self, eqn, values)
        else:
            outs = None
        if outs is not None:
            return outs
        return self._not_by_row(eqn, values) if some_rows else self._evaluate_full(program, eqn, values)

    def _evaluate_full(self, program: Program, eqn: Equation, values: Sequence[Any]) -> list[Value]:
        """Evaluates an equation as it is."""
        converts, casts = eqn.primitive is _jax.CONVERT, _jax.summed_axes(eqn) == ()
        zero = (converts or casts) and row_elementwise.is_zero(values[0])  # stays known to be 0
        if zero and converts and not values[0].zero and _jax.shape(eqn.outputs[0]) == ():
            return [FullArray(np.zeros((), _jax.dtype(eqn.outputs[0])))]
        outs, entries = self._evaluated(program, eqn, values), None
        if self.defers and not self.planning and all(isinstance(v, FullArray) for v in values):
            outs, entries = by_entry.with_entries(self, eqn, values, outs)
        notes = row_elementwise.notes_out(eqn, values)
        tall = any(set(_jax.shape(v)) & self.plan.table_heights for v in eqn.outputs)
        if tall and eqn.primitive in row_reads.CHANGES and self.path not in self.plan.tableless_scatters:
            self.plan.table_sized_scatters[f"{eqn.primitive} at {self.source}"] = None
        # a view of an array costs no table: XLA applies it to the rows that are taken
        view = eqn.primitive in _VIEWS and isinstance(values[0], FullArray) and values[0].made_by is None
        return [FullArray(x, notes, eqn if tall and not view else None, zero, entries) for x in outs]

    def _evaluated(self, program: Program, eqn: Equation, values: Sequence[Any]) -> list[Any]:
        def evaluate() -> list[Any]:
            return _jax.evaluate(program, eqn, [array_of(v) for v in values])

        if not self._is_lazy:
            return evaluate()
        outputs = self.lazy_array((), None, evaluate, values)
        return [
            LazyArray(_jax.shape(v), _jax.dtype(v), lambda i=i: outputs.array[i], [outputs])  # type: ignore[misc]
            for i, v in enumerate(eqn.outputs)
        ]

    @property
    def _is_lazy(self) -> bool:
        """Whether arrays are LazyArrays: while planning, but not inside a region, which is a trace of its own."""
        return self.planning and self.depth == 0

    def lazy_array(self, shape: Sequence[int], dtype: Any, make: Callable[[], Any], values: Sequence[Value]) -> Any:
        """make(), an array that depends on these values; a LazyArray while planning."""
        return LazyArray(shape, dtype, make, [v.data for v in values]) if self._is_lazy else make()

    def output(self, eqn: Equation, make: Callable[[], Any], values: Sequence[Value], **of_row: Any) -> Any:
        """An equation's output, as `lazy_array`. With `axis`, one row of it along this axis."""
        shape, dtype = list(_jax.shape(eqn.outputs[0])), _jax.dtype(eqn.outputs[0])
        for axis in of_row.values():
            shape[axis] = 1
        return self.lazy_array(shape, dtype, make, values)

    def block(self, node: int, eqn: Equation, axis: int, make: Callable[[], Any], values: Sequence[Value]) -> Any:
        """A node's block of an equation's output, along `axis`, as `lazy_array`."""
        shape = _jax.shape(eqn.outputs[0])
        shape = (*shape[:axis], self.ids(node).shape[0], *shape[axis + 1 :])
        return self.lazy_array(shape, _jax.dtype(eqn.outputs[0]), make, values)

    def _enter_region(self, v: Value) -> Value:
        """A value that enters a region. While planning, its arrays are computed before."""
        if not isinstance(v, Rows):
            return dataclasses.replace(v, data=materialize(v.data))
        if not self._is_lazy or v.full is None:
            return dataclasses.replace(v, data=v.block, add_to=None if self._is_lazy else v.add_to)
        full = self.full_array(v)
        return dataclasses.replace(v, data=v.block, full=lambda walk: full)

    def _not_by_row(self, eqn: Equation, values: list[Value]) -> list[Value]:
        """Notes that an equation has no rule. Its operands are no Rows in the next walk."""
        for v in values:
            if isinstance(v, Rows):
                where = self.plan.refused if v.updated else self.plan.not_by_row
                where.setdefault(v.node, Reason(str(eqn.primitive), self.source, row_regions.is_closed(eqn)))
        if not self.planning:
            raise AssertionError(f"a rule is missing in the second walk only: {eqn.primitive} at {self.source}")
        zeros = lambda v: lambda: _jax.zeros_like_output(v)  # noqa: E731
        return [FullArray(self.lazy_array(_jax.shape(v), _jax.dtype(v), zeros(v), ())) for v in eqn.outputs]

    def note_refused(self, node: int, cause: str) -> None:
        """Notes that an update of a node is not done row by row."""
        self.plan.refused.setdefault(node, Reason(cause, self.source))

    def note_table_sum(self, node: int, eqn: Equation) -> None:
        self.plan.table_sums[Reason(str(eqn.primitive), self.source)] = node

    def _note_gates(self, eqn: Equation, values: list[Value]) -> None:
        """Notes operands by which a counter decides in which steps rows change: a comparison of one that is combined
        with rows, or one that selects them."""
        node = next(v.node for v in values if isinstance(v, Rows))
        chooses = eqn.primitive is _jax.COND or eqn.primitive is _jax.SELECT
        for note in notes_of(*values):
            if note.kind == "gate" or (chooses and note in notes_of(values[0])):
                self.plan.gates.append((node, note.what, self.source))

    def _is_tall(self, eqn: Equation) -> bool:
        """Whether an array inside of an equation has as many rows as a table."""
        return any(
            set(_jax.shape(v)) & self.plan.table_heights or self._is_tall(inner)
            for program in _jax.held_programs(eqn) or ()
            for inner in program.equations
            for v in inner.outputs
        )

    @property
    def source(self) -> str:
        return source_line(self.within)

    @property
    def path(self) -> Path:
        return tuple(eqn.key for eqn in self.within)

    def only_use(self, v: Any) -> tuple[Equation, int] | None:
        """(the only equation that uses a variable, the operand that it is), through calls. None if there are several
        uses, or the variable is an output of the outermost program."""
        return only_use(self._frames, v)

    def inside(self) -> Walk:
        """A walk for a region's program. Its reads are its own and become outputs of the region."""
        return Walk(self.plan, self.spaces, self.within, self.depth + 1, self.on_one_device, stand_ins=self.stand_ins)

    def ids(self, node: int) -> Any:
        return self.stand_ins if self.spaces is None else self.spaces[self.plan.find(node)].ids

    def full_array(self, rows: Rows) -> Any:
        """The full array, which depends on state alone; computed once in each region."""
        assert rows.full is not None, "an array that does not depend on state alone has no full array"
        if rows.full not in self._full_arrays:
            self._full_arrays[rows.full] = rows.full(self)
        return self._full_arrays[rows.full]

    def is_real(self, rows: Rows) -> jax.Array:
        """Which rows of the block are not padding: bool, of the block's rank, with size 1 except along the rows."""
        return Part(self.ids(rows.node)).is_real(self.num_rows(rows.node), rows.data.ndim, rows.axis)

    def changed_blocks(self, leaves: dict[int, tuple[Value, Value]]) -> dict[int, Any]:
        """{leaf: its new block}, of leaves that have changed. `leaves`: {leaf: (value before, value after)}."""
        new: dict[int, Any] = {}
        for i, (before, after) in leaves.items():
            if after is not before:
                rows = self.as_rows(after, i, 0)
                assert rows is not None, "planning has found its rows along the first axis"
                new[i] = rows.data
        return new

    def num_rows(self, node: int) -> int:
        return 0 if self.spaces is None else self.spaces[self.plan.find(node)].num_rows

    def leaf(self, array: jax.Array, i: int) -> Any:
        """The chosen rows of a leaf."""
        made = rows_of(array, i, self.ids(i))
        return made if self.defers else made.block()

    def by_row(
        self, node: int, out: Any, axis: int, operands: Sequence[Any], make: Callable[..., Any], before: int = 0
    ) -> Any:
        """A node's block of an equation's output `out`, along `axis`. Each row depends on that row of the operands.

        Args:
          operands: blocks, deferred or not, with rows along `axis` or along `before`; or arrays without rows.
          make: as in `DeferredBlock`.
        """
        ids = self.ids(node)
        if self._is_lazy:
            shape = (*_jax.shape(out)[:axis], *ids.shape, *_jax.shape(out)[axis + 1 :])
            return LazyArray(shape, _jax.dtype(out), lambda: make(Part(ids), *map(materialize, operands)), operands)
        if axis or before or not self.defers:
            return make(Part(ids), *(x.block() if isinstance(x, DeferredBlock) else x for x in operands))
        return DeferredBlock(ids, operands, make, (*ids.shape, *_jax.shape(out)[1:]), _jax.dtype(out))

    def _rows_of(self, eqn: Equation, v: Value) -> list[Value]:
        """The rule for `_context.rows_of`."""
        (num_rows,) = _jax.shape(eqn.outputs[1]) or (0,)
        if not isinstance(v, Rows) or v.axis != 0:  # NumPy arrays, so that XLA drops what is only for rows
            none = (
                FullArray(np.zeros((), bool)) if not num_rows else EqualRows(np.zeros(1, bool), 0, num_rows, zero=True)
            )
            return [FullArray(np.int32(-1)), none]
        if v.updated and v.outside != ZERO:
            self.plan.not_by_row.setdefault(v.node, Reason("its gradient is not zero in rows that are not read", ""))
        # planning uses no stand-ins here: ids that depend on rows to be caught up are refused with their own message
        real = jnp.zeros(self.stand_ins.shape, bool) if self.planning else self.ids(v.node) < num_rows
        return [FullArray(jnp.sum(real, dtype=jnp.int32)), Rows(real, v.node, outside=ZERO)]

    def take(self, array: Any, node: int, axis: int) -> jax.Array:
        """The chosen rows of an array with a row for each of a table's; zeros in padding rows."""
        return gather_rows(jnp.asarray(array), self.ids(node)) if axis == 0 else _take(array, self.ids(node), axis)

    def as_rows(self, v: Value, node: int, axis: int) -> Rows | None:
        """A value as Rows of a node, along `axis`; None if its rows are along another axis."""
        if isinstance(v, Rows):
            if v.axis != axis:
                return None
            self.plan.unify(v.node, node)
            return v
        if isinstance(v, EqualRows) and (v.axis == axis or v.zero):
            v = v.along(axis)
            shape, dtype = v.shape_of(self.ids(node).shape[0]), v.data.dtype
            if self.defers and axis == 0:
                block: Any = DeferredBlock(self.ids(node), (), lambda part: v.times(len(part.ids)), shape, dtype)
            else:
                block = self.lazy_array(shape, dtype, lambda: v.times(shape[axis]), [v])
            return Rows(block, node, axis, v.outside, full=lambda walk: array_of(v))
        if isinstance(v, FullArray) and v.made_by is not None:
            self.plan.table_sized_arrays[node, f"{v.made_by.primitive} at {source_line((*self.within, v.made_by))}"] = (
                None
            )
        shape = v.shape_of(1) if isinstance(v, EqualRows) else v.shape
        shape = (*shape[:axis], self.ids(node).shape[0], *shape[axis + 1 :])
        block = self.lazy_array(shape, v.data.dtype, lambda: self.take(array_of(v), node, axis), [v])
        return Rows(block, node, axis, full=lambda walk: array_of(v))

    def note_read(
        self, node: int, ids: jax.Array, num_rows: int, after_update: bool | None, clipped: bool, static: bool = False
    ) -> jax.Array:
        """Notes that rows of a node are read or added to. Returns their positions in the block.

        Args:
          ids: integers. Outside [0, num_rows) they name no row or, with `clipped`, the first or last one.
          after_update: as in `Read`.
          static: whether the ids are constants. Such reads alone make no table.

        Returns:
          int32, the shape of ids; the block's size for ids that name no row.
        """
        if not static:
            self.plan.read.add(node)
        ids = _int32(ids, num_rows)
        path = self.path if self.depth == 0 else None
        if self.spaces is None:
            least = np.int32(-NOBODY - 1)
            known = jax.lax.clamp(least, ids, np.int32(NOBODY - 1))  # so that no id equals NOBODY
            self.reads.append((Read(node, after_update, path, clipped, self.source), known.reshape(-1)))
            return ids
        space = self.spaces[self.plan.find(node)]
        at = self._look_up(space, ids, num_rows, path, clipped)
        if after_update is None and space.trained is not None:
            at = jnp.where(space.trained.at[at].get(mode="fill", fill_value=False), at, space.ids.shape[0])
        return at

    @staticmethod
    def _look_up(space: Space, ids: jax.Array, num_rows: int, path: Path | None, clipped: bool) -> jax.Array:
        if path is not None and path in space.positions:
            return space.positions[path].reshape(ids.shape)
        size = space.ids.shape[0]
        at = jnp.searchsorted(space.ids, ids, method="scan_unrolled").astype(jnp.int32)
        at = jnp.where((space.ids.at[at].get(mode="clip") == ids) & (ids < num_rows), at, size)
        if clipped:  # the block has the first and last row if ids are clipped to them
            last = jnp.sum(space.ids < num_rows, dtype=jnp.int32) - 1
            at = jnp.where(ids < 0, 0, jnp.where(ids >= num_rows, last, at))
        return at


def _take(array: Any, ids: jax.Array, axis: int) -> jax.Array:
    return jnp.take(jnp.asarray(array), ids, axis=axis, mode="fill", fill_value=0, unique_indices=True)


def _int32(ids: jax.Array, num_rows: int) -> jax.Array:
    """Ids as int32. Those that do not fit become num_rows or -1, which name no row either."""
    if ids.dtype.itemsize >= 4 and ids.dtype != jnp.int32:
        ids = jnp.where(ids > num_rows, jnp.asarray(num_rows, ids.dtype), ids)
        if jnp.issubdtype(ids.dtype, jnp.signedinteger):
            ids = jnp.where(ids < -1, jnp.asarray(-1, ids.dtype), ids)
    return ids.astype(jnp.int32)


_VIEWS = _jax.primitives("broadcast_in_dim convert_element_type reshape squeeze transpose")
(_PAD,) = _jax.primitives("pad")
_RULES = row_rules.RULES | row_reads.RULES
