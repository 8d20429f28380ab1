"""Evaluating a traced train step on some rows of its tables.

`Walk` goes through the step's program, equation by equation, from values to values (`values.py`). What an equation does
with Rows is a rule of `row_rules`, `row_reads` or `row_regions`; without Rows it is evaluated as it is.

The same walk is made twice. The first time it plans: blocks are stand-ins, and what is found out goes into a `Plan`:
which arrays share their rows, which row ids are read, and what is not done row by row. The second time the blocks are
the rows that those ids name.
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
from jaxsparse.trace.pieces import Later, Part, rows_of
from jaxsparse.trace.plan import Path, Plan, Read, Reason
from jaxsparse.trace.uses import INLINED, Frame, only_use, uses_of
from jaxsparse.trace.values import (
    NOBODY,
    ZERO,
    Rows,
    Same,
    Summed,
    Unmade,
    Value,
    Whole,
    array_of,
    notes_of,
    ready,
)


class Space(NamedTuple):
    """The rows that were chosen for all arrays that share them."""

    ids: jax.Array  # int32 (k,), distinct; the last of them, at least one, are num_rows, num_rows + 1, ...
    num_rows: int
    # where in `ids` the ids of a read are, k for no row, if that is known already; else `ids` are in order
    positions: dict[Path, jax.Array]
    trained: jax.Array | None = None  # bool (k,), which of them are; None if all are


class Walk:
    """One way through a program; see the module's docstring.

    Args:
      plan: what is found out, or was.
      spaces: for each class of nodes the rows that were chosen; None while planning.
      alone: whether the program is one device's, and is not to be split over several.
      later: whether blocks that are made row by row are computed when something needs them.
      stand_ins: while planning, what stands for the ids of a block: int32 (k,), on which all depends that does on them.
    """

    def __init__(
        self,
        plan: Plan,
        spaces: dict[int, Space] | None = None,
        within: tuple[Equation, ...] = (),
        depth: int = 0,
        alone: bool = True,
        later: bool = False,
        stand_ins: Any = None,
    ) -> None:
        self.plan, self.spaces, self.within, self.depth, self.alone = plan, spaces, within, depth, alone
        self.later, self.stand_ins = later, stand_ins
        self.tables_read: list[jax.Array] = []  # what was read in tables themselves
        self.reads: list[tuple[Read, jax.Array]] = []
        self._wholes: dict[Any, Any] = {}
        self._frames: list[Frame] = []  # of the programs that call each other, the innermost last

    @property
    def planning(self) -> bool:
        return self.spaces is None

    def run(self, program: Program, values: Sequence[Value]) -> list[Value]:
        """The values of the outputs, given those of the inputs."""
        self._frames.append(Frame(program, self.within[-1:], uses_of(program)))
        env: dict[Any, Value] = {v: Whole(c) for v, c in program.constants.items()}
        env.update(zip(program.inputs, values, strict=True))

        def read(v: Any) -> Value:
            return Whole(_jax.literal_value(v)) if _jax.is_literal(v) else env[v]

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
            return [Rows(self.ids(v.node), v.node, whole=lambda walk: jnp.arange(num_rows, dtype=jnp.int32))]
        if primitive in INLINED:
            return self.run(_jax.called(eqn), values)
        if any(isinstance(v, Summed) for v in values):
            assert primitive is _jax.REDUCE_SUM, "the one use that was found is a sum"
            return [Whole(values[0].total)]
        some_rows, all_whole = (any(isinstance(v, Rows) for v in values), all(isinstance(v, Whole) for v in values))
        if some_rows and primitive not in row_reads.RULES:
            self._note_gates(eqn, values)
        region = row_regions.remat if _jax.is_remat(eqn) else row_regions.REGIONS.get(primitive)
        rule = _RULES.get(primitive, _RULES.get(primitive.name))
        if region and (not all_whole or self._is_tall(eqn)):
            outs = region(self, eqn, [self._made_here(v) for v in values])
        elif _jax.summed_axes(eqn) is not None and not all_whole:
            outs = row_rules.across_devices(self, eqn, values)
        elif rule is not None and not all_whole:
            outs = rule(self, eqn, values)
        elif primitive is _jax.BROADCAST:
            outs = row_rules.broadcast(self, eqn, values)
        elif primitive is _PAD:
            outs = row_reads.pad(self, eqn, values)
        else:
            outs = None
        if outs is not None:
            return outs
        return self._not_by_row(eqn, values) if some_rows else self._whole(program, eqn, values)

    def _whole(self, program: Program, eqn: Equation, values: Sequence[Any]) -> list[Value]:
        """An equation as it is."""
        converts, casts = eqn.primitive is _jax.CONVERT, _jax.summed_axes(eqn) == ()
        zero = (converts or casts) and row_elementwise.is_zero(values[0])  # is still known to be 0
        if zero and converts and not values[0].zero and _jax.shape(eqn.outputs[0]) == ():
            return [Whole(np.zeros((), _jax.dtype(eqn.outputs[0])))]
        outs, entries = self._evaluated(program, eqn, values), None
        if self.later and not self.planning and all(isinstance(v, Whole) for v in values):
            outs, entries = by_entry.followed(self, eqn, values, outs)
        notes = row_elementwise.notes_out(eqn, values)
        tall = any(set(_jax.shape(v)) & self.plan.heights for v in eqn.outputs)
        if tall and eqn.primitive in row_reads.CHANGES and self.path not in self.plan.loose:
            self.plan.whole_scatters[f"{eqn.primitive} at {self.source}"] = None
        # XLA makes a view of given rows from those that are taken
        view = eqn.primitive in _VIEWS and isinstance(values[0], Whole) and values[0].made_by is None
        return [Whole(x, notes, eqn if tall and not view else None, zero, entries) for x in outs]

    def _evaluated(self, program: Program, eqn: Equation, values: Sequence[Any]) -> list[Any]:
        def evaluate() -> list[Any]:
            return _jax.evaluate(program, eqn, [array_of(v) for v in values])

        if not self._waits:
            return evaluate()
        together = self.when_needed((), None, evaluate, values)
        return [
            Unmade(_jax.shape(v), _jax.dtype(v), lambda i=i: together.array[i], [together])  # type: ignore[misc]
            for i, v in enumerate(eqn.outputs)
        ]

    @property
    def _waits(self) -> bool:
        """Whether arrays are made when something needs them: not inside a region, which is a trace of its own."""
        return self.planning and self.depth == 0

    def when_needed(self, shape: Sequence[int], dtype: Any, make: Callable[[], Any], values: Sequence[Value]) -> Any:
        """make(), an array that is made of these values; while planning it is made when something needs it."""
        return Unmade(shape, dtype, make, [v.made for v in values]) if self._waits else make()

    def output(self, eqn: Equation, make: Callable[[], Any], values: Sequence[Value], **of_row: Any) -> Any:
        """As `when_needed`, an equation's output; `axis`: of which it is one row along this axis."""
        shape, dtype = list(_jax.shape(eqn.outputs[0])), _jax.dtype(eqn.outputs[0])
        for axis in of_row.values():
            shape[axis] = 1
        return self.when_needed(shape, dtype, make, values)

    def block(self, node: int, eqn: Equation, axis: int, make: Callable[[], Any], values: Sequence[Value]) -> Any:
        """As `when_needed`, the rows of a class of an equation's output, along `axis`."""
        shape = _jax.shape(eqn.outputs[0])
        shape = (*shape[:axis], self.ids(node).shape[0], *shape[axis + 1 :])
        return self.when_needed(shape, _jax.dtype(eqn.outputs[0]), make, values)

    def _made_here(self, v: Value) -> Value:
        """A value that enters a region. While planning all that may be needed there is made before."""
        if not isinstance(v, Rows):
            return dataclasses.replace(v, made=ready(v.made))
        if not self._waits or v.whole is None:
            return dataclasses.replace(v, made=v.block, add_to=None if self._waits else v.add_to)
        whole = self.whole(v)
        return dataclasses.replace(v, made=v.block, whole=lambda walk: whole)

    def _not_by_row(self, eqn: Equation, values: list[Value]) -> list[Value]:
        """An equation that has no rule: what enters it is no Rows in the next walk."""
        for v in values:
            if isinstance(v, Rows):
                where = self.plan.refused if v.updated else self.plan.not_by_row
                where.setdefault(v.node, Reason(str(eqn.primitive), self.source, row_regions.is_closed(eqn)))
        if not self.planning:
            raise AssertionError(f"a rule is missing in the second walk only: {eqn.primitive} at {self.source}")
        zeros = lambda v: lambda: _jax.zeros_like_output(v)  # noqa: E731
        return [Whole(self.when_needed(_jax.shape(v), _jax.dtype(v), zeros(v), ())) for v in eqn.outputs]

    def note_refused(self, node: int, cause: str) -> None:
        """Notes that an update of these rows is not done row by row."""
        self.plan.refused.setdefault(node, Reason(cause, self.source))

    def note_whole_sum(self, node: int, eqn: Equation) -> None:
        self.plan.whole_sums[Reason(str(eqn.primitive), self.source)] = node

    def _note_gates(self, eqn: Equation, values: list[Value]) -> None:
        """A comparison of a counter that meets rows decides in which steps something happens to them; so does a counter
        that chooses among them."""
        node = next(v.node for v in values if isinstance(v, Rows))
        chooses = eqn.primitive is _jax.COND or eqn.primitive is _jax.SELECT
        for note in notes_of(*values):
            if note.kind == "gate" or (chooses and note in notes_of(values[0])):
                self.plan.gates.append((node, note.what, self.source))

    def _is_tall(self, eqn: Equation) -> bool:
        """Whether something inside of an equation has as many rows as a table."""
        return any(
            set(_jax.shape(v)) & self.plan.heights or self._is_tall(inner)
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
        """The one equation that uses a variable of the program, and the operand that it is there; through calls, in
        and out. None if there are several, or it leaves the outermost program."""
        return only_use(self._frames, v)

    def inside(self) -> Walk:
        """For a region's program: its reads are its own, and leave it as outputs."""
        return Walk(self.plan, self.spaces, self.within, self.depth + 1, self.alone, stand_ins=self.stand_ins)

    # -----------------------------------------------------------------------------------------------------------------
    # the rows of a class

    def ids(self, node: int) -> Any:
        return self.stand_ins if self.spaces is None else self.spaces[self.plan.find(node)].ids

    def whole(self, rows: Rows) -> Any:
        """The array itself, of which only state is made; computed once in each region."""
        assert rows.whole is not None, "what is not made of state alone has no other rows"
        if rows.whole not in self._wholes:
            self._wholes[rows.whole] = rows.whole(self)
        return self._wholes[rows.whole]

    def is_real(self, rows: Rows) -> jax.Array:
        """Which of the block's rows are no padding, of the block's rank, size 1 but along the rows."""
        return Part(self.ids(rows.node)).is_real(self.num_rows(rows.node), rows.made.ndim, rows.axis)

    def changed(self, leaves: dict[int, tuple[Value, Value]]) -> dict[int, Any]:
        """The new blocks of leaves, given as they were and are, where they are others."""
        new: dict[int, Any] = {}
        for i, (before, after) in leaves.items():
            if after is not before:
                rows = self.as_rows(after, i, 0)
                assert rows is not None, "its rows are along the first axis, as the plan has found"
                new[i] = rows.made
        return new

    def num_rows(self, node: int) -> int:
        return 0 if self.spaces is None else self.spaces[self.plan.find(node)].num_rows

    def leaf(self, array: jax.Array, i: int) -> Any:
        """The chosen rows of a leaf."""
        made = rows_of(array, i, self.ids(i))
        return made if self.later else made.block()

    def by_row(
        self, node: int, out: Any, axis: int, operands: Sequence[Any], make: Callable[..., Any], before: int = 0
    ) -> Any:
        """The block of an equation's output `out`, with rows along `axis`, each made of the same rows of the operands.

        Args:
          node: whose rows.
          operands: blocks, made or not, with their rows along `axis` or along `before`, or arrays without rows.
          make: as of a Later.
        """
        ids = self.ids(node)
        if self._waits:
            shape = (*_jax.shape(out)[:axis], *ids.shape, *_jax.shape(out)[axis + 1 :])
            return Unmade(shape, _jax.dtype(out), lambda: make(Part(ids), *map(ready, operands)), operands)
        if axis or before or not self.later:
            return make(Part(ids), *(x.block() if isinstance(x, Later) else x for x in operands))
        return Later(ids, operands, make, (*ids.shape, *_jax.shape(out)[1:]), _jax.dtype(out))

    def _rows_of(self, eqn: Equation, v: Value) -> list[Value]:
        """Of `tracing.rows_of`."""
        (num_rows,) = _jax.shape(eqn.outputs[1]) or (0,)
        if not isinstance(v, Rows) or v.axis != 0:  # no arrays of JAX's: XLA leaves out what is only for rows
            none = Whole(np.zeros((), bool)) if not num_rows else Same(np.zeros(1, bool), 0, num_rows, zero=True)
            return [Whole(np.int32(-1)), none]
        if v.updated and v.outside != ZERO:
            self.plan.not_by_row.setdefault(v.node, Reason("its gradient is not zero in rows that are not read", ""))
        # while planning, of no stand-ins: what is caught up is made of these rows, and refused in ids by its own name
        real = jnp.zeros(self.stand_ins.shape, bool) if self.planning else self.ids(v.node) < num_rows
        return [Whole(jnp.sum(real, dtype=jnp.int32)), Rows(real, v.node, outside=ZERO)]

    def take(self, array: Any, node: int, axis: int) -> jax.Array:
        """The chosen rows of an array that has one for each of a table's; zeros at the block's end."""
        return gather_rows(jnp.asarray(array), self.ids(node)) if axis == 0 else _take(array, self.ids(node), axis)

    def as_rows(self, v: Value, node: int, axis: int) -> Rows | None:
        """A value with rows along `axis` as Rows of a class; None if its rows are along another axis."""
        if isinstance(v, Rows):
            if v.axis != axis:
                return None
            self.plan.unify(v.node, node)
            return v
        if isinstance(v, Same) and (v.axis == axis or v.zero):
            v = v.along(axis)
            shape, dtype = v.shape_of(self.ids(node).shape[0]), v.made.dtype
            if self.later and axis == 0:
                block: Any = Later(self.ids(node), (), lambda part: v.times(len(part.ids)), shape, dtype)
            else:
                block = self.when_needed(shape, dtype, lambda: v.times(shape[axis]), [v])
            return Rows(block, node, axis, v.outside, whole=lambda walk: array_of(v))
        if isinstance(v, Whole) and v.made_by is not None:
            self.plan.made_whole[node, f"{v.made_by.primitive} at {source_line((*self.within, v.made_by))}"] = None
        shape = v.shape_of(1) if isinstance(v, Same) else v.shape
        shape = (*shape[:axis], self.ids(node).shape[0], *shape[axis + 1 :])
        block = self.when_needed(shape, v.made.dtype, lambda: self.take(array_of(v), node, axis), [v])
        return Rows(block, node, axis, whole=lambda walk: array_of(v))

    def note_read(
        self, node: int, ids: jax.Array, num_rows: int, late: bool | None, clipped: bool, static: bool = False
    ) -> jax.Array:
        """Notes that rows are read or added to, and tells where in the block they are.

        Args:
          node: whose rows.
          ids: integers; outside [0, num_rows) they are no row or, `clipped`, the first or last one.
          late: as in `Read`.
          static: whether these rows are read at each step, which alone makes no table.

        Returns:
          int32, the shape of ids; the block's size where there is no row.
        """
        if not static:
            self.plan.read.add(node)
        ids = _int32(ids, num_rows)
        path = self.path if self.depth == 0 else None
        if self.spaces is None:
            least = np.int32(-NOBODY - 1)
            known = jax.lax.clamp(least, ids, np.int32(NOBODY - 1))  # none is taken for the id of nobody
            self.reads.append((Read(node, late, path, clipped, self.source), known.reshape(-1)))
            return ids
        space = self.spaces[self.plan.find(node)]
        at = self._look_up(space, ids, num_rows, path, clipped)
        if late is None and space.trained is not None:
            at = jnp.where(space.trained.at[at].get(mode="fill", fill_value=False), at, space.ids.shape[0])
        return at

    @staticmethod
    def _look_up(space: Space, ids: jax.Array, num_rows: int, path: Path | None, clipped: bool) -> jax.Array:
        if path is not None and path in space.positions:
            return space.positions[path].reshape(ids.shape)
        size = space.ids.shape[0]
        at = jnp.searchsorted(space.ids, ids, method="scan_unrolled").astype(jnp.int32)
        at = jnp.where((space.ids.at[at].get(mode="clip") == ids) & (ids < num_rows), at, size)
        if clipped:  # the first and the last row are there if they are wanted
            last = jnp.sum(space.ids < num_rows, dtype=jnp.int32) - 1
            at = jnp.where(ids < 0, 0, jnp.where(ids >= num_rows, last, at))
        return at


def _take(array: Any, ids: jax.Array, axis: int) -> jax.Array:
    return jnp.take(jnp.asarray(array), ids, axis=axis, mode="fill", fill_value=0, unique_indices=True)


def _int32(ids: jax.Array, num_rows: int) -> jax.Array:
    """ids as int32: what does not fit is as far outside of the rows as num_rows or -1."""
    if ids.dtype.itemsize >= 4 and ids.dtype != jnp.int32:
        ids = jnp.where(ids > num_rows, jnp.asarray(num_rows, ids.dtype), ids)
        if jnp.issubdtype(ids.dtype, jnp.signedinteger):
            ids = jnp.where(ids < -1, jnp.asarray(-1, ids.dtype), ids)
    return ids.astype(jnp.int32)


_VIEWS = _jax.primitives("broadcast_in_dim convert_element_type reshape squeeze transpose")
(_PAD,) = _jax.primitives("pad")
_RULES = row_rules.RULES | row_reads.RULES
