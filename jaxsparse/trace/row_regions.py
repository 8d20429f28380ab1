"""Rules for equations that hold programs: cond, scan, while, remat.

A rule walks through the inner program and rebuilds the equation around it. Rows go in as blocks, closed over or
carried. The ids that are read inside come out as further outputs. Values that are carried, or come out of several
branches, must be of one kind: Rows of one class, EqualRows, or full arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program
from jaxsparse.trace.uses import INLINED
from jaxsparse.trace.values import NOBODY, EqualRows, FullArray, Outs, Rows, Value, Values, array_of, notes_of

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk


def _inside(walk: Walk, program: Program, values: Values) -> tuple[list[Value], list[Any], list[jax.Array]]:
    """(the outputs of a region's program, the reads in it, the ids of these reads)."""
    inner = walk.inside()
    outs = [_portable(v) for v in inner.run(program, values)]
    return outs, [read for read, _ in inner.reads], [ids for _, ids in inner.reads]


def _portable(v: Value) -> Value:
    """A value that may leave a region: its array is a JAX array."""
    if isinstance(v, FullArray):
        return FullArray(jnp.asarray(v.array), v.notes)
    return Rows(v.block, v.node, v.axis, v.outside, v.updated) if isinstance(v, Rows) else v


def _like(v: Value, kind: Value, walk: Walk) -> Value:
    """v, as the same kind of value as `kind`, which has the same shape."""
    if isinstance(kind, Rows):
        rows = walk.as_rows(v, kind.node, kind.axis)
        assert rows is not None, "kinds were unified before"
        return Rows(rows.block, kind.node, kind.axis, kind.outside, kind.updated)
    if isinstance(kind, EqualRows):
        return EqualRows(v.row, kind.axis, kind.size, kind.zero, kind.notes)
    return FullArray(jnp.asarray(array_of(v)), kind.notes)


def _kind(walk: Walk, a: Value, b: Value) -> Value | None:
    """The kind that fits both values, without its array; None if there is none."""
    rows = next((v for v in (a, b) if isinstance(v, Rows)), None)
    if rows is not None:
        both = [walk.as_rows(v, rows.node, rows.axis) for v in (a, b)]
        if both[0] is None or both[1] is None:
            return None
        outside, updated = min(x.outside for x in both), any(x.updated for x in both)  # type: ignore[union-attr]
        return Rows(None, walk.plan.find(rows.node), rows.axis, outside, updated)
    notes = notes_of(a, b)
    if isinstance(a, EqualRows) and isinstance(b, EqualRows) and a.axis == b.axis:
        return EqualRows(None, a.axis, a.size, a.zero and b.zero, notes)
    return FullArray(None, notes)


def _signature(kinds: Values) -> Any:
    return jax.tree.structure(kinds, is_leaf=lambda x: x is None)


def remat(walk: Walk, eqn: Equation, values: Values) -> Outs:
    found = _jax.remat_of(eqn)
    reads: list[Any] = []

    def body() -> Any:
        outs, reads[:], ids = _inside(walk, found.body, values)
        return outs, ids

    outs, ids = found.wrap(body)()
    walk.reads += zip(reads, ids, strict=True)
    return list(outs)


def cond(walk: Walk, eqn: Equation, values: Values) -> Outs:
    index, operands = values[0], values[1:]  # the index has no axes, and so no rows
    branches = _jax.branches(eqn)
    reads: list[list[Any]] = [[] for _ in branches]

    def run_branch(number: int) -> Any:
        outs, reads[number], ids = _inside(walk, branches[number], operands)
        return outs, ids

    kinds, ids_of = _known_kinds(walk), [[] for _ in branches]  # type: ignore[var-annotated]
    if kinds is None:
        found = [jax.eval_shape(lambda n=n: run_branch(n)) for n in range(len(branches))]  # type: ignore[misc]
        kinds = [_common_kind(walk, outs) for outs in zip(*(outs for outs, _ in found), strict=True)]
        if any(kind is None for kind in kinds):
            return None
        walk.plan.kinds[walk.path], ids_of = kinds, [ids for _, ids in found]
    notes = notes_of(index)

    def branch(number: int) -> Any:
        outs, ids = run_branch(number)
        all_ids = [[jnp.full(x.shape, NOBODY, x.dtype) for x in other] for other in ids_of]
        all_ids[number] = ids
        return [_like(v, kind, walk) for v, kind in zip(outs, kinds, strict=True)], all_ids

    outs, ids = jax.lax.switch(
        array_of(index),
        [lambda n=n: branch(n) for n in range(len(branches))],  # type: ignore[misc]
    )
    for some_reads, some_ids in zip(reads, ids, strict=True):
        walk.reads += zip(some_reads, some_ids, strict=True)
    return [_with_notes(v, notes) for v in outs]


def _with_notes(v: Value, notes: Any) -> Value:
    return FullArray(v.array, v.notes | notes) if isinstance(v, FullArray) and notes else v


def _common_kind(walk: Walk, outs: Values) -> Value | None:
    """The kind that fits the outputs of all branches, which are abstract."""
    kinds: list[Value | None] = []

    def common(*outs: Value) -> jax.Array:
        kind: Value | None = _kind(walk, outs[0], outs[0])
        so_far = outs[0]
        for v in outs[1:]:
            kind = _kind(walk, so_far, v)
            if kind is None:
                break
            so_far = _like(so_far, kind, walk)
        kinds.append(kind)
        return jnp.zeros(())

    jax.eval_shape(common, *outs)
    return kinds[0]


def scan(walk: Walk, eqn: Equation, values: Values) -> Outs:
    found = _jax.scan_of(eqn)
    consts, carry, xs = _split_operands(values, found.num_consts, found.num_carry)
    if any(isinstance(v, Rows) for v in xs):
        return None
    arrays = [array_of(v) for v in xs]
    reads: list[Any] = []

    def body(carry: Values, x: Sequence[jax.Array]) -> Any:
        outs, reads[:], ids = _inside(walk, found.body, [*consts, *carry, *map(FullArray, x)])
        return outs[: len(carry)], (outs[len(carry) :], ids)

    def loop_with(kinds: list[Value]) -> tuple[list[Value | None], Any]:
        """(the kinds that come out of the body, the scan with a carry of `kinds`). The scan is right if both agree."""
        found_kinds: list[Value | None] = []

        def turn(carry: Values, x: Sequence[jax.Array]) -> Any:
            new, (ys, ids) = body(carry, x)
            found_kinds[:] = _kinds_after(walk, kinds, carry, new)
            settled = _signature(found_kinds) == _signature(kinds)
            ys = [FullArray(array_of(y), y.notes) if isinstance(y, EqualRows) else y for y in ys]
            return [_like(v, kind, walk) for v, kind in zip(new if settled else carry, kinds, strict=True)], (ys, ids)

        start = [_like(v, kind, walk) for v, kind in zip(carry, kinds, strict=True)]
        return found_kinds, found.run(turn, start, arrays)

    settled = _settle_carry(walk, carry, loop_with)
    if settled is None:
        return None
    end, (ys, ids) = settled
    walk.reads += [(read, x.reshape(-1)) for read, x in zip(reads, ids, strict=True)]
    stacked = [Rows(y.block, y.node, y.axis + 1, y.outside, y.updated) if isinstance(y, Rows) else y for y in ys]
    return [*end, *stacked]


def while_loop(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """The number of turns of a while loop is unknown, so no rows can be read in it."""
    test, body, num_test, num_body = _jax.while_of(eqn)
    for_test, for_body, carry = _split_operands(values, num_test, num_body)
    read = False

    def run(program: Program, values: Values) -> Values:
        nonlocal read
        outs, reads, _ = _inside(walk, program, values)
        read = read or bool(reads)
        return outs

    def loop_with(kinds: list[Value]) -> tuple[list[Value | None], Any]:
        found_kinds: list[Value | None] = []

        def turn(carry: list[Value]) -> list[Value]:
            new = run(body, [*for_body, *carry])
            found_kinds[:] = _kinds_after(walk, kinds, carry, new)
            settled = _signature(found_kinds) == _signature(kinds)
            return [_like(v, kind, walk) for v, kind in zip(new if settled else carry, kinds, strict=True)]

        start = [_like(v, kind, walk) for v, kind in zip(carry, kinds, strict=True)]
        return found_kinds, jax.lax.while_loop(lambda carry: run(test, [*for_test, *carry])[0].array, turn, start)

    end = _settle_carry(walk, carry, loop_with)
    return None if read or end is None else list(end)


def _split_operands(values: Values, first: int, second: int) -> tuple[list[Value], list[Value], list[Value]]:
    return list(values[:first]), list(values[first : first + second]), list(values[first + second :])


def _known_kinds(walk: Walk) -> list[Value] | None:
    """The kinds of a region's outputs, as planning has found them; None while planning."""
    if walk.planning:
        return None
    kinds, find = walk.plan.kinds[walk.path], walk.plan.find
    return [dataclasses.replace(k, node=find(k.node)) if isinstance(k, Rows) else k for k in kinds]


def _settle_carry(
    walk: Walk, carry: list[Value], loop_with: Callable[[list[Value]], tuple[list[Value | None], Any]]
) -> Any | None:
    """A loop whose body keeps the kinds of its carry; None if there are no such kinds. Planning searches for them.

    Args:
      loop_with: (the kinds after a turn, the loop), for a carry of given kinds.
    """
    kinds: list[Any] = _known_kinds(walk) or [_kind(walk, v, v) for v in carry]
    for _ in range(_SETTLES):
        now, loop = loop_with(kinds)
        if any(kind is None for kind in now):
            return None
        if _signature(now) == _signature(kinds):
            walk.plan.kinds[walk.path] = kinds
            return loop
        kinds = now
    return None


def _kinds_after(walk: Walk, kinds: list[Value], carry: Values, new: Values) -> list[Value | None]:
    """The kinds of a carry after a turn. None where the values before and after the turn fit no common kind."""
    pairs = zip(kinds, carry, new, strict=True)
    return [kind if after is before else _kind(walk, before, after) for kind, before, after in pairs]


_SETTLES = 10  # each turn of the search makes some kind less special

REGIONS: dict[Any, Callable[[Walk, Equation, Values], Outs]] = {
    _jax.COND: cond,
    _jax.SCAN: scan,
    **dict.fromkeys(_jax.primitives("while"), while_loop),
}
_OPEN = frozenset(REGIONS) | INLINED


def is_closed(eqn: Equation) -> bool:
    """Whether an equation without a rule holds a program that reads rows, or one that cannot be inspected."""
    held = None if eqn.primitive in _OPEN else _jax.held_programs(eqn)
    return held is not None and (not held or any(map(_reads, held)))


def _reads(program: Program) -> bool:
    return any(
        eqn.primitive in (_jax.GATHER, _jax.DYNAMIC_SLICE) or any(map(_reads, _jax.held_programs(eqn) or ()))
        for eqn in program.equations
    )
