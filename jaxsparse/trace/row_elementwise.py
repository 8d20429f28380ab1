"""Rules for elementwise equations, and the notes on what arrays depend on.

A rule is a function of (walk, equation, values) that returns the values of the equation's outputs. It returns None if
the equation cannot be done row by row. At least one value is Rows or EqualRows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxsparse import _jax
from jaxsparse._jax import Equation
from jaxsparse.trace.pieces import Part
from jaxsparse.trace.values import (
    NOTHING,
    UNIFORM,
    UNKNOWN,
    ZERO,
    EqualRows,
    FullArray,
    Note,
    Notes,
    Outs,
    Rows,
    Value,
    Values,
    array_of,
    notes_of,
)

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk


# ---------------------------------------------------------------------------------------------------------------------
# elementwise

ELEMENTWISE = _jax.primitives(
    "abs acos acosh add add_jaxvals and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type "
    "copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log "
    "log1p logistic lt max min mul ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan "
    "tanh xor"
)
# zero where the first operand is zero
_KEEP_ZERO = _jax.primitives(
    "abs asin asinh atan atanh bitcast_convert_type cbrt ceil conj convert_element_type copy div erf erf_inv expm1 "
    "floor imag integer_pow log1p neg real reduce_precision rem round sign sin sinh sqrt square stop_gradient tan tanh"
)
_ZERO_IF_ANY = _jax.primitives("mul and")
_ZERO_IF_ALL = _jax.primitives("add add_jaxvals max min or sub xor")
_ADD = _jax.primitives("add add_jaxvals")
_SCALE = _jax.primitives("mul div")
_COMPARE = _jax.primitives("eq ge gt le lt ne")
(_POWER,) = _jax.primitives("integer_pow")


def elementwise(walk: Walk, eqn: Equation, values: Values) -> Outs:
    first = 1 if eqn.primitive is _jax.SELECT else 0  # rows that are selected come before the rows that select
    rows = next((v for v in [*values[first:], *values[:first]] if isinstance(v, Rows)), None)
    return _elementwise_same(walk, eqn, values) if rows is None else _elementwise_rows(walk, eqn, values, rows)


def _elementwise_rows(walk: Walk, eqn: Equation, values: Values, like: Rows) -> Outs:
    """Evaluates an equation on the blocks of its operands. Rows are taken of full arrays with as many as a table."""
    operands: list[Rows] = []
    for v, operand in zip(values, eqn.inputs, strict=True):
        shape = _jax.shape(operand)
        if isinstance(v, FullArray) and (shape == () or shape[like.axis] == 1 != _jax.shape(eqn.outputs[0])[like.axis]):
            outside = ZERO if is_zero(v) else UNIFORM  # a scalar, or broadcast like one
            operands.append(Rows(v.data, like.node, like.axis, outside, full=lambda walk, v=v: v.array))  # type: ignore[misc]
            continue
        block = walk.as_rows(v, like.node, like.axis)
        if block is None:
            return None
        operands.append(block)
    updated = any(x.updated for x in operands)
    notes = notes_of(*values)
    if updated and eqn.primitive in _SCALE and any(note.kind == "table sum" for note in notes):
        walk.note_refused(like.node, f"an update that is scaled by a sum over all rows of a table: {eqn.primitive}")
    outside = _outside(eqn, [x.outside for x in operands])
    full: Callable[[Any], Any] | None = None
    if all(x.full is not None for x in operands):
        full = lambda walk: _jax.bind(eqn, [walk.full_array(x) for x in operands])[0]  # noqa: E731
    if eqn.primitive in _ADD and (added := _added(walk, operands)) is not None:
        return [added]
    given = [v for v in values if isinstance(v, Rows)]
    origin = like.first if all(v is like for v in given) else None
    # unknown rows may be infinite, and 0 times infinity is NaN
    unclear = outside == ZERO and any(x.outside == UNKNOWN for x in operands)
    unclear = unclear and jnp.issubdtype(_jax.dtype(eqn.outputs[0]), jnp.inexact)
    num_rows, axis = walk.num_rows(like.node), like.axis

    def make(part: Part, *blocks: Any) -> Any:
        (out,) = _jax.bind(eqn, blocks)
        return jnp.where(part.is_real(num_rows, out.ndim, axis), out, 0) if unclear else out

    out = walk.by_row(like.node, eqn.outputs[0], axis, [x.data for x in operands], make)
    return [Rows(out, like.node, like.axis, outside, updated, full, origin=origin)]


def _added(walk: Walk, operands: Sequence[Rows]) -> Rows | None:
    """A sum with a scatter into zeros: the scatter adds to the other side instead, in place."""
    a, b = operands
    if b.add_to is None:
        a, b = b, a
    if b.add_to is None or a.data.dtype != b.data.dtype or a.data.shape != b.data.shape:
        return None
    first, second = a.add_to, b.add_to
    add_to = None if first is None else lambda block: second(first(block))
    block = walk.lazy_array(a.data.shape, a.data.dtype, lambda: second(a.block), [a])
    return Rows(block, a.node, a.axis, min(a.outside, b.outside), updated=True, add_to=add_to)


def _outside(eqn: Equation, outside: Sequence[int]) -> int:
    zero = [level == ZERO for level in outside]
    if eqn.primitive in _ZERO_IF_ANY:
        keeps = any(zero)
    elif eqn.primitive in _ZERO_IF_ALL:
        keeps = all(zero)
    elif eqn.primitive is _jax.SELECT:
        keeps = all(zero[1:])
    else:
        keeps = eqn.primitive in _KEEP_ZERO and zero[0] and not (eqn.primitive is _POWER and eqn.param("y") <= 0)
    return ZERO if keeps else min(UNIFORM, *outside)


def bitcast(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """A bitcast to a type of the same width is elementwise."""
    return elementwise(walk, eqn, values) if _jax.shape(eqn.inputs[0]) == _jax.shape(eqn.outputs[0]) else None


def barrier(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """optimization_barrier. While planning, each output is its operand: ids do not depend on the other operands."""
    if walk.planning:
        return list(values)
    outs = _jax.bind(eqn, [v.block if isinstance(v, Rows) else v.data for v in values])
    return [dataclasses.replace(v, data=x) for v, x in zip(values, outs, strict=True)]


def _elementwise_same(walk: Walk, eqn: Equation, values: Values) -> Outs:
    like = next(v for v in values if isinstance(v, EqualRows))
    for v, operand in zip(values, eqn.inputs, strict=True):
        if (v.axis != like.axis) if isinstance(v, EqualRows) else _jax.shape(operand) != ():
            return None

    def make() -> Any:
        return _jax.bind(eqn, [v.row if isinstance(v, EqualRows) else array_of(v) for v in values])[0]  # type: ignore[arg-type]

    row = walk.output(eqn, make, values, axis=like.axis)
    levels = [v.outside if isinstance(v, EqualRows) else ZERO if is_zero(v) else UNIFORM for v in values]  # type: ignore[union-attr]
    return [EqualRows(row, like.axis, like.size, _outside(eqn, levels) == ZERO, notes_out(eqn, values))]


def _is_number(v: Value) -> bool:
    return isinstance(v, FullArray) and isinstance(v.data, np.ndarray | np.generic | int | float)


def is_zero(v: Value) -> bool:
    """Whether an array is known to be zero. Arrays on a device are not looked at."""
    return isinstance(v, FullArray) and (v.zero or (_is_number(v) and not np.any(v.array)))


# ---------------------------------------------------------------------------------------------------------------------
# what arrays depend on


def notes_out(eqn: Equation, values: Values) -> Notes:
    """The notes of an equation's outputs."""
    notes = notes_of(*values)
    if not notes:
        return NOTHING
    is_bool = jnp.issubdtype(_jax.dtype(eqn.outputs[0]), jnp.bool_)
    if eqn.primitive in _COMPARE or (eqn.primitive is _jax.CONVERT and is_bool):  # a comparison is no statistic
        kept = (n for n in notes if n.kind != "update sum")
        return frozenset(Note("gate", n.what) if n.kind in ("counter", "remainder") else n for n in kept)
    if eqn.primitive is _jax.SELECT and _jax.shape(eqn.outputs[0]) == ():
        return _notes_of_choice(values)
    if eqn.primitive is _REM:
        return notes | {Note("remainder", n.what) for n in notes_of(values[0]) if n.kind == "counter"}
    if len(values) == 2 and not all(_sums(v) for v in values):
        # a factor, or a term added to an array, makes an update, not a statistic in the state
        is_array, by_number = _jax.shape(eqn.outputs[0]) != (), any(map(_is_number, values))
        scales = eqn.primitive in _SCALE and (is_array or not by_number)
        if scales or (is_array and (eqn.primitive in _ADD or eqn.primitive is _SUB)):
            return frozenset(n for n in notes if n.kind != "update sum")
    return notes


def _notes_of_choice(values: Values) -> Notes:
    """The notes of a selected number. If one choice is 0, a counter that selects turns something off or resets it."""
    gates = frozenset(n for n in notes_of(values[0]) if n.kind == "gate")
    others = notes_of(*values) - gates | notes_of(*values[1:])
    if not any(is_zero(v) for v in values[1:]):
        return others
    return others | gates | {Note("remainder", n.what) for n in gates}


def _sums(v: Value) -> bool:
    return any(n.kind in ("update sum", "table sum") for n in notes_of(v))


(_REM,) = _jax.primitives("rem")
(_SUB,) = _jax.primitives("sub")
