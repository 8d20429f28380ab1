"""What elementwise equations do with some rows of an array, and what arrays are noted to be made from.

A rule is a function of (walk, equation, values) that returns the values of the equation's outputs, or None where it
cannot be done row by row. Some value is Rows or Same.
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
    Note,
    Notes,
    Outs,
    Rows,
    Same,
    Value,
    Values,
    Whole,
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
    first = 1 if eqn.primitive is _jax.SELECT else 0  # the result is of what is chosen among, before what chooses
    rows = next((v for v in [*values[first:], *values[:first]] if isinstance(v, Rows)), None)
    return _elementwise_same(walk, eqn, values) if rows is None else _elementwise_rows(walk, eqn, values, rows)


def _elementwise_rows(walk: Walk, eqn: Equation, values: Values, like: Rows) -> Outs:
    """Blocks of all operands; what has one row for each of a table's has its rows taken."""
    operands: list[Rows] = []
    for v, operand in zip(values, eqn.inputs, strict=True):
        shape = _jax.shape(operand)
        if isinstance(v, Whole) and (shape == () or shape[like.axis] == 1 != _jax.shape(eqn.outputs[0])[like.axis]):
            outside = ZERO if is_zero(v) else UNIFORM  # a scalar, or stretched as one
            operands.append(Rows(v.made, like.node, like.axis, outside, whole=lambda walk, v=v: v.array))  # type: ignore[misc]
            continue
        block = walk.as_rows(v, like.node, like.axis)
        if block is None:
            return None
        operands.append(block)
    updated = any(x.updated for x in operands)
    notes = notes_of(*values)
    if updated and eqn.primitive in _SCALE and any(note.kind == "whole sum" for note in notes):
        walk.note_refused(like.node, f"an update that is scaled by a sum over all rows of a table: {eqn.primitive}")
    outside = _outside(eqn, [x.outside for x in operands])
    whole: Callable[[Any], Any] | None = None
    if all(x.whole is not None for x in operands):
        whole = lambda walk: _jax.bind(eqn, [walk.whole(x) for x in operands])[0]  # noqa: E731
    if eqn.primitive in _ADD and (added := _added(walk, operands)) is not None:
        return [added]
    given = [v for v in values if isinstance(v, Rows)]
    origin = like.first if all(v is like for v in given) else None
    # what is unknown may be infinite, and 0 times that is NaN
    unclear = outside == ZERO and any(x.outside == UNKNOWN for x in operands)
    unclear = unclear and jnp.issubdtype(_jax.dtype(eqn.outputs[0]), jnp.inexact)
    num_rows, axis = walk.num_rows(like.node), like.axis

    def make(part: Part, *blocks: Any) -> Any:
        (out,) = _jax.bind(eqn, blocks)
        return jnp.where(part.is_real(num_rows, out.ndim, axis), out, 0) if unclear else out

    out = walk.by_row(like.node, eqn.outputs[0], axis, [x.made for x in operands], make)
    return [Rows(out, like.node, like.axis, outside, updated, whole, origin=origin)]


def _added(walk: Walk, operands: Sequence[Rows]) -> Rows | None:
    """A sum in which one side is a scatter into zeros: scattered into the other side instead, in place."""
    a, b = operands
    if b.add_to is None:
        a, b = b, a
    if b.add_to is None or a.made.dtype != b.made.dtype or a.made.shape != b.made.shape:
        return None
    first, second = a.add_to, b.add_to
    add_to = None if first is None else lambda block: second(first(block))
    block = walk.when_needed(a.made.shape, a.made.dtype, lambda: second(a.block), [a])
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
    """To a type of the same width it is elementwise."""
    return elementwise(walk, eqn, values) if _jax.shape(eqn.inputs[0]) == _jax.shape(eqn.outputs[0]) else None


def barrier(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """optimization_barrier: of each operand itself. Ids that pass it do not need what passes it beside them."""
    if walk.planning:
        return list(values)
    outs = _jax.bind(eqn, [v.block if isinstance(v, Rows) else v.made for v in values])
    return [dataclasses.replace(v, made=x) for v, x in zip(values, outs, strict=True)]


def _elementwise_same(walk: Walk, eqn: Equation, values: Values) -> Outs:
    like = next(v for v in values if isinstance(v, Same))
    for v, operand in zip(values, eqn.inputs, strict=True):
        if (v.axis != like.axis) if isinstance(v, Same) else _jax.shape(operand) != ():
            return None

    def make() -> Any:
        return _jax.bind(eqn, [v.row if isinstance(v, Same) else array_of(v) for v in values])[0]  # type: ignore[arg-type]

    row = walk.output(eqn, make, values, axis=like.axis)
    levels = [v.outside if isinstance(v, Same) else ZERO if is_zero(v) else UNIFORM for v in values]  # type: ignore[union-attr]
    return [Same(row, like.axis, like.size, _outside(eqn, levels) == ZERO, notes_out(eqn, values))]


def _is_number(v: Value) -> bool:
    return isinstance(v, Whole) and isinstance(v.made, np.ndarray | np.generic | int | float)


def is_zero(v: Value) -> bool:
    """Whether an array is known to be the number 0, which is not asked of arrays on a device."""
    return isinstance(v, Whole) and (v.zero or (_is_number(v) and not np.any(v.array)))


# ---------------------------------------------------------------------------------------------------------------------
# what arrays were made from


def notes_out(eqn: Equation, values: Values) -> Notes:
    """The notes of an equation's outputs."""
    notes = notes_of(*values)
    if not notes:
        return NOTHING
    is_bool = jnp.issubdtype(_jax.dtype(eqn.outputs[0]), jnp.bool_)
    if eqn.primitive in _COMPARE or (eqn.primitive is _jax.CONVERT and is_bool):  # a choice is no statistic
        kept = (n for n in notes if n.kind != "part sum")
        return frozenset(Note("gate", n.what) if n.kind in ("counter", "remainder") else n for n in kept)
    if eqn.primitive is _jax.SELECT and _jax.shape(eqn.outputs[0]) == ():
        return _notes_of_choice(values)
    if eqn.primitive is _REM:
        return notes | {Note("remainder", n.what) for n in notes_of(values[0]) if n.kind == "counter"}
    if len(values) == 2 and not all(_sums(v) for v in values):
        # what scales something, or is added to an array, is an update, and no statistic that is kept
        is_array, by_number = _jax.shape(eqn.outputs[0]) != (), any(map(_is_number, values))
        scales = eqn.primitive in _SCALE and (is_array or not by_number)
        if scales or (is_array and (eqn.primitive in _ADD or eqn.primitive is _SUB)):
            return frozenset(n for n in notes if n.kind != "part sum")
    return notes


def _notes_of_choice(values: Values) -> Notes:
    """Of a choice between numbers. Where one is 0, what is chosen by a counter turns something off, or starts again."""
    gates = frozenset(n for n in notes_of(values[0]) if n.kind == "gate")
    others = notes_of(*values) - gates | notes_of(*values[1:])
    if not any(is_zero(v) for v in values[1:]):
        return others
    return others | gates | {Note("remainder", n.what) for n in gates}


def _sums(v: Value) -> bool:
    return any(n.kind in ("part sum", "whole sum") for n in notes_of(v))


(_REM,) = _jax.primitives("rem")
(_SUB,) = _jax.primitives("sub")
