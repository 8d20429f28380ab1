"""Evaluating a traced program with some of its parameters held back, and their reads made in another way.

`Interpreter` evaluates the program as it is and notes the row ids of each read of a held-back leaf, in the order in
which `reads.find_reads` lists them. `WithDeltas` makes every read `read(leaf) + delta`, the leaf itself being a
constant, so that gradients stop at what was read: for gradients that leave as RowSparse. `OverBlocks` reads from a
block of a few rows instead of from the leaf: for the step, which knows where the rows go afterwards.

A region that JAX differentiates as a whole (remat, a scan, a cond) is made again, with its deltas as further inputs and
its ids as further outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._jax import Equation, Program
from jaxsparse.embedding import block_lookup, block_padded_sum
from jaxsparse.reads import (
    BAG,
    CALL,
    CAST,
    CLIPPED,
    COND,
    GATHER,
    REMAT,
    SCAN,
    SLICE,
    STOP,
    Finder,
    Summed,
    Table,
    kind_of,
    only_summed,
    rows_named,
)
from jaxsparse.rows import gather_rows, positions, row_ids

GatherScatterMode = jax.lax.GatherScatterMode

# The ids of a read and, for the padded sum, the weights its cotangent is to be multiplied by.
RowIds = tuple[jax.Array, jax.Array | None]


class Block(NamedTuple):
    """Some rows of a leaf, as `rows.coalesce_ids` chose them."""

    rows: jax.Array  # (size, ...)
    scratch: jax.Array  # int32 (num_rows,): where in it each of them is


class Interpreter:
    """Evaluates the program, `arrays` being the leaves that are held back, and lists the row ids of their reads."""

    clipped: frozenset[Any] = CLIPPED

    def __init__(self, arrays: dict[int, Any]) -> None:
        self.arrays = arrays
        self.ids: list[RowIds] = []
        self._outside: list[Summed] = [lambda number, axis: False]  # of the calls that are being walked through

    def run(self, program: Program, args: Sequence[Any]) -> list[Any]:
        """The outputs; tables among them as arrays. `args` holds a Table where a leaf is held back."""
        return [self._array(x) if isinstance(x, Table) else x for x in self._walk(program, args)]

    def _array(self, table: Table) -> Any:
        return _cast(self.arrays[table.leaf], table)

    def _walk(self, program: Program, args: Sequence[Any]) -> list[Any]:
        env = program.constants | dict(zip(program.inputs, args, strict=True))
        for eqn in program.equations:
            values = [_jax.read(env, v) for v in eqn.inputs]
            env.update(zip(eqn.outputs, self._step(program, eqn, values), strict=True))
        return [_jax.read(env, v) for v in program.outputs]

    def _step(self, program: Program, eqn: Equation, values: list[Any]) -> list[Any]:
        tables = [v if isinstance(v, Table) else None for v in values]
        if not any(tables):
            return _jax.evaluate(program, eqn, values)
        kind = kind_of(eqn, tables)
        table = next(t for t in tables if t)
        if kind == CAST:
            return [table.cast(eqn.param("new_dtype"))]
        if kind == STOP:
            return [jax.lax.stop_gradient(self._array(table))]
        if kind in (GATHER, SLICE, BAG):
            return [self._read(program, eqn, kind, table, values)]
        if kind == CALL:
            outside = self._outside[-1]
            self._outside.append(lambda n, axis: only_summed(program, eqn.outputs[n], axis, outside))
            out = self._walk(_jax.called(eqn), values)
            self._outside.pop()
            return out
        regions = {REMAT: self._remat, SCAN: self._scan, COND: self._cond}
        assert kind in regions, f"{kind=}: find_reads and the interpreter disagree"
        return regions[kind](eqn, values)

    def _read(self, program: Program, eqn: Equation, kind: str, table: Table, values: list[Any]) -> Any:
        num_rows, weights = _jax.shape(eqn.inputs[0])[0], None
        if kind == SLICE:
            size = eqn.param("slice_sizes")[0]
            ids = jnp.clip(values[1], 0, num_rows - size) + jnp.arange(size)  # as lax.dynamic_slice clamps
            ids = row_ids(ids, num_rows)
        else:
            ids = rows_named(eqn, kind, values[1][..., 0] if kind == GATHER else values[1], self.clipped)
            weights = values[2] if len(values) == 3 else None
        self.ids.append((ids, weights))
        return _cast(self._rows(program, eqn, kind, table, values), table)

    def _rows(self, program: Program, eqn: Equation, kind: str, table: Table, values: list[Any]) -> Any:
        """What the read that was noted last gives, before casts."""
        del kind
        return _jax.evaluate(program, eqn, [self.arrays[table.leaf], *values[1:]])[0]

    def _within(self, deltas: Sequence[Any]) -> Interpreter:
        """The interpreter for a region, given its share of the deltas."""
        del deltas
        return type(self)(self.arrays)

    def _deltas(self, number: int) -> list[Any]:
        """The deltas of the next reads, of which there are `number`."""
        del number
        return []

    def _apart(self, programs: Sequence[Program], values: Sequence[Any]) -> tuple[list[list[Any]], list[Any], Any]:
        """For a region: the deltas of each of its programs, the values that are no tables, and how to put the two kinds
        of values together again inside."""
        held = [v if isinstance(v, Table) else None for v in values]
        deltas = []
        for inner in programs:
            finder = Finder()
            finder.walk(inner, held)
            deltas.append(self._deltas(len(finder.reads)))

        def together(rest: Sequence[Any]) -> list[Any]:
            it = iter(rest)
            return [t if t else next(it) for t in held]

        return deltas, [v for v in values if not isinstance(v, Table)], together

    def _remat(self, eqn: Equation, values: list[Any]) -> list[Any]:
        remat = _jax.remat_of(eqn)
        (deltas,), rest, together = self._apart([remat.body], values)
        tables: list[Any] = []

        def body(deltas: list[Any], rest: list[Any]) -> Any:
            sub = self._within(deltas)
            outs = sub._walk(remat.body, together(rest))
            tables[:] = [x if isinstance(x, Table) else None for x in outs]
            return [x for x in outs if not isinstance(x, Table)], sub.ids

        outs, ids = remat.again(body)(deltas, rest)
        self.ids += ids
        it = iter(outs)
        return [t if t else next(it) for t in tables]

    def _scan(self, eqn: Equation, values: list[Any]) -> list[Any]:
        scan = _jax.scan_of(eqn)
        (deltas,), rest, together = self._apart([scan.body], values)
        first, end = scan.num_consts, scan.num_consts + scan.num_carry
        fixed = rest[: len(rest) - len(values) + first]  # no table is beyond the constants

        def body(state: Any, turn: Any) -> Any:
            xs, deltas = turn
            sub = self._within(deltas)
            outs = sub._walk(scan.body, together([*fixed, *state, *xs]))
            return outs[: scan.num_carry], (outs[scan.num_carry :], sub.ids)

        carried = zip(values[first:end], scan.body.inputs[first:end], strict=True)
        start = [jnp.asarray(x, _jax.dtype(v)) for x, v in carried]
        state, (ys, ids) = scan.again(body, start, (values[end:], deltas))
        self.ids += ids
        return [*state, *ys]

    def _cond(self, eqn: Equation, values: list[Any]) -> list[Any]:
        branches = _jax.branches(eqn)
        deltas, rest, together = self._apart(branches, values[1:])

        def run(i: int, deltas: list[Any], rest: list[Any]) -> Any:
            sub = self._within(deltas)
            return sub.run(branches[i], together(rest)), sub.ids

        reads = [jax.eval_shape(lambda *args, i=i: run(i, *args)[1], deltas[i], rest) for i in range(len(branches))]

        def branch(i: int) -> Callable[..., Any]:
            def fun(deltas: list[list[Any]], rest: list[Any]) -> Any:
                outs, ids = run(i, deltas[i], rest)
                # what another branch would have read is padding here: its cotangents are zero, and it names no row
                return outs, [ids if j == i else jax.tree.map(_padding, reads[j]) for j in range(len(branches))]

            return fun

        outs, ids = jax.lax.switch(values[0], [branch(i) for i in range(len(branches))], deltas, rest)
        self.ids += [read for of_branch in ids for read in of_branch]
        return list(outs)


class WithDeltas(Interpreter):
    """Every read has one of `deltas` added to it: one a read, in program order, each of the shape ids + row."""

    clipped = frozenset({GatherScatterMode.CLIP})

    def __init__(self, arrays: dict[int, Any], deltas: Sequence[Any]) -> None:
        super().__init__(arrays)
        self.deltas: Iterator[Any] = iter(deltas)

    def _read(self, program: Program, eqn: Equation, kind: str, table: Table, values: list[Any]) -> Any:
        out = super()._read(program, eqn, kind, table, values)
        delta = next(self.deltas)
        if kind == GATHER:  # vmap may have put the row's dimensions before those of the ids
            tail, first = eqn.param("dimension_numbers").offset_dims, iter(range(out.ndim))
            lead = out.ndim - len(tail)
            delta = jnp.transpose(delta, [lead + tail.index(i) if i in tail else next(first) for i in range(out.ndim)])
        return out + delta

    def _within(self, deltas: Sequence[Any]) -> Interpreter:
        return WithDeltas(self.arrays, deltas)

    def _deltas(self, number: int) -> list[Any]:
        return [next(self.deltas) for _ in range(number)]


class OverBlocks(Interpreter):
    """Every read of a leaf is a read of its block, which must hold all its rows that the program reads."""

    def __init__(self, arrays: dict[int, Any], blocks: dict[int, Block]) -> None:
        super().__init__(arrays)  # without those that are not up to date outside their block
        self.blocks = blocks

    def _array(self, table: Table) -> Any:
        if table.leaf not in self.arrays:
            got = "one that also returns a table as a whole, or uses it behind stop_gradient"
            do = "With skipped='replay' only the rows that a batch reads are up to date. Leave it out, or flush first."
            raise ValueError(message("make_train_step", "loss_fn", "one that only reads rows", got, do))
        return super()._array(table)

    def _rows(self, program: Program, eqn: Equation, kind: str, table: Table, values: list[Any]) -> Any:
        block, (ids, weights) = self.blocks[table.leaf], self.ids[-1]
        at = positions(ids, block.scratch, block.rows.shape[0])
        if kind == BAG:
            return block_padded_sum(block.rows, at, weights)
        if kind == SLICE:
            return gather_rows(block.rows, at)
        numbers, last = eqn.param("dimension_numbers"), at.ndim - 1
        tail = numbers.offset_dims
        in_order = tail == tuple(range(at.ndim, at.ndim + len(tail)))

        def read(rows: jax.Array, at: jax.Array) -> jax.Array:
            offsets = tuple(range(at.ndim, at.ndim + len(tail))) if in_order else tail
            return jax.lax.gather(
                rows,
                at[..., None],
                dimension_numbers=numbers._replace(offset_dims=offsets),
                slice_sizes=eqn.param("slice_sizes"),
                mode=GatherScatterMode.FILL_OR_DROP,  # ids that are to be clipped were clipped above
                fill_value=eqn.param("fill_value"),
            )

        kept = at
        if eqn.param("mode") == GatherScatterMode.PROMISE_IN_BOUNDS:
            named = row_ids(values[1][..., 0], _jax.shape(eqn.inputs[0])[0])
            kept = jnp.where(named == ids, at, block.rows.shape[0])
        if in_order:
            summed = last > 0 and only_summed(program, eqn.outputs[0], last, self._outside[-1])
            apart = summed and not table.casts
            return block_lookup(read, block.rows, at, kept, apart)
        rows = read(block.rows, at)  # vmap has put the row's dimensions before those of the ids
        return jnp.where(jnp.expand_dims(kept == at, tail), rows, jax.lax.stop_gradient(rows))

    def _within(self, deltas: Sequence[Any]) -> Interpreter:
        return OverBlocks(self.arrays, self.blocks)


def _cast(x: Any, table: Table) -> Any:
    """x with the casts that were made of the whole table, each in its turn: two may round twice."""
    for dtype in table.casts:
        x = x.astype(dtype)
    return x


def _padding(struct: Any) -> jax.Array:
    """Ids that name no row, or weights that nothing is multiplied by."""
    return jnp.full(struct.shape, -1 if jnp.issubdtype(struct.dtype, jnp.integer) else 0, struct.dtype)
