"""What equations do with some rows of an array that are not elementwise: other shapes, sums, products.

Rules are as in `row_elementwise`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _jax
from jaxsparse._jax import Equation
from jaxsparse.trace.lines import UNKNOWN_SOURCE
from jaxsparse.trace.pieces import Part
from jaxsparse.trace.row_elementwise import ELEMENTWISE, barrier, bitcast, elementwise, is_zero
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
    ready,
)

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk


# ---------------------------------------------------------------------------------------------------------------------
# other shapes


def moved(eqn: Equation, axis: int, size: int) -> tuple[dict[str, Any], int] | None:
    """Of an equation with one operand, whose rows along `axis` are replaced by `size` others: the parameters that
    change, and the axis of the result. None where rows do not stay rows."""
    before, after = _jax.shape(eqn.inputs[0]), _jax.shape(eqn.outputs[0])
    primitive, param = eqn.primitive, eqn.param

    def with_size(given: Sequence[Any], i: int) -> tuple[Any, ...]:
        return (*given[:i], size, *given[i + 1 :])

    if primitive in _REDUCTIONS:
        return None if axis in param("axes") else ({}, axis - sum(a < axis for a in param("axes")))
    if primitive is _TRANSPOSE:
        return {}, tuple(param("permutation")).index(axis)
    if primitive is _jax.BROADCAST:
        new = int(param("broadcast_dimensions")[axis])
        return ({"shape": with_size(param("shape"), new)}, new) if after[new] == before[axis] else None
    if primitive is _SQUEEZE:
        dims = param("dimensions")
        return None if axis in dims else ({}, axis - sum(a < axis for a in dims))
    if primitive is _RESHAPE:
        for new, length in enumerate(after):
            if length == before[axis] and math.prod(after[:new]) == math.prod(before[:axis]):
                return ({"new_sizes": with_size(param("new_sizes"), new)}, new) if not param("dimensions") else None
        return None
    if primitive is _SLICE:
        start, limit, strides = param("start_indices")[axis], param("limit_indices")[axis], param("strides")
        all_rows = start == 0 and limit == before[axis] and (strides is None or strides[axis] == 1)
        return ({"limit_indices": with_size(param("limit_indices"), axis)}, axis) if all_rows else None
    if primitive is _REV:
        return None if axis in param("dimensions") else ({}, axis)
    return None if param("axis") == axis else ({}, axis)  # cumulative


_REDUCTIONS = _jax.primitives("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")
_CUMULATIVE = _jax.primitives("cumlogsumexp cummax cummin cumprod cumsum")
_RESHAPE, _REV, _SLICE, _SQUEEZE, _TRANSPOSE = (
    p for name in "reshape rev slice squeeze transpose".split() for p in _jax.primitives(name)
)
(_CUMLOGSUMEXP,) = _jax.primitives("cumlogsumexp")


def one_operand(walk: Walk, eqn: Equation, values: Values) -> Outs:
    v = values[0]
    if len(values) != 1 or isinstance(v, Whole):
        return None
    found = moved(eqn, v.axis, 1 if isinstance(v, Same) else v.made.shape[v.axis])
    if found is None:
        return over_rows(walk, eqn, v) if isinstance(v, Rows) and eqn.primitive in _REDUCTIONS else None
    changes, axis = found
    keeps_zero = eqn.primitive is not _CUMLOGSUMEXP
    if isinstance(v, Same):
        row = walk.output(eqn, lambda: _jax.bind(eqn, [v.row], **changes)[0], values, axis=axis)
        return [Same(row, axis, v.size, v.zero and keeps_zero, v.notes)]

    def make(part: Part, block: Any) -> Any:
        changes, _ = moved(eqn, v.axis, block.shape[v.axis]) or ({}, 0)
        return _jax.bind(eqn, [block], **changes)[0]

    block = walk.by_row(v.node, eqn.outputs[0], axis, [v.made], make, before=v.axis)
    whole = v.whole and (lambda walk: _jax.bind(eqn, [walk.whole(v)])[0])
    outside = v.outside if keeps_zero else min(v.outside, UNIFORM)
    return [Rows(block, v.node, axis, outside, v.updated, whole, origin=v.first)]


def broadcast(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Of an array: a Same where it makes equal rows for a table, or equal rows that are only scattered."""
    (v,) = values
    if not isinstance(v, Whole):
        return one_operand(walk, eqn, values)
    shape, dims = eqn.param("shape"), [int(d) for d in eqn.param("broadcast_dimensions")]
    given = v.shape
    new = [a for a in range(len(shape)) if a not in dims or given[dims.index(a)] == 1 != shape[a]]
    tall = [a for a in new if shape[a] in walk.plan.heights]
    new = [a for a in new if shape[a] != 1]
    if not tall and not walk.planning and len(new) == 1:
        use, operand = walk.only_use(eqn.outputs[0]) or (None, 0)
        if use is not None and use.primitive is _jax.SCATTER_ADD and operand == 2:
            tall = new
    if not tall:
        return None
    axis = tall[0]
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    row = walk.output(eqn, lambda: _jax.bind(eqn, [v.array], shape=one)[0], values, axis=axis)
    return [Same(row, axis, shape[axis], is_zero(v), v.notes)]


def several(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """pad, split, concatenate, stack, unstack, sort, top_k: along another axis than that of the rows."""
    like = next((v for v in values if isinstance(v, Rows)), None)
    if like is None:
        return None
    axis, primitive = like.axis, eqn.primitive
    if primitive is _PAD:
        if like is not values[0] or isinstance(values[1], Rows) or eqn.param("padding_config")[axis] != (0, 0, 0):
            return None
        (block,) = _jax.bind(eqn, [like.block, array_of(values[1])])
        outside = like.outside if is_zero(values[1]) else min(like.outside, UNIFORM)
        return [Rows(block, like.node, axis, outside, like.updated)]
    along = next(eqn.params[name] for name in ("dimension", "axis") if name in eqn.params)
    stacked = primitive.name == "stack"
    if along == axis and not stacked:
        return None
    if stacked and along == 0 and len({walk.plan.find(v.node) for v in values if isinstance(v, Rows)}) > 1:
        return None  # tables of which a read names one: they do not share their rows
    operands = [walk.as_rows(v, like.node, axis) for v in values]
    if any(x is None for x in operands):
        return None
    outside = min(x.outside for x in operands if x is not None)
    outside = min(outside, UNIFORM) if primitive is _TOP_K else outside
    updated = any(x.updated for x in operands if x is not None)
    blocks = _jax.bind(eqn, [x.block for x in operands if x is not None])
    axis += (stacked and along <= axis) - (primitive.name == "unstack" and along < axis)
    return [Rows(block, like.node, axis, outside, updated) for block in blocks]


_PAD, _CONCATENATE, _SORT, _TOP_K = (p for name in "pad concatenate sort top_k".split() for p in _jax.primitives(name))

# ---------------------------------------------------------------------------------------------------------------------
# sums and products over rows


def over_rows(walk: Walk, eqn: Equation, rows: Rows) -> Outs:
    """A reduction over the rows themselves, all of them."""
    primitive, (out,) = eqn.primitive, eqn.outputs
    if primitive not in _NEUTRAL:
        return None
    num_rows = _jax.shape(eqn.inputs[0])[rows.axis]

    def reduced(block: Callable[[], Any]) -> Any:
        return walk.output(eqn, lambda: _jax.bind(eqn, [block()])[0], [rows])

    def with_others() -> Any:
        """Of rows the last of which is padding, and like each of those outside of the block."""
        is_real = walk.is_real(rows)
        num_others = num_rows - jnp.sum(is_real)
        if primitive is not _jax.REDUCE_SUM:
            first = jax.lax.slice_in_dim(rows.block, 0, 1, axis=rows.axis)
            return _jax.bind(eqn, [jnp.where(is_real | (num_others > 0), rows.block, first)])[0]
        row = jax.lax.slice_in_dim(rows.block, rows.made.shape[rows.axis] - 1, None, axis=rows.axis)
        (inside,), (one,) = _jax.bind(eqn, [jnp.where(is_real, rows.block, 0)]), _jax.bind(eqn, [row])
        return (inside + one * num_others.astype(one.dtype)).astype(_jax.dtype(out))

    if rows.outside == ZERO and primitive is _jax.REDUCE_SUM:
        return [Whole(reduced(lambda: rows.block))]
    if rows.outside >= UNIFORM:
        return [Whole(walk.output(eqn, with_others, [rows]))]
    if rows.updated:  # frozen rows get no update
        neutral = np.asarray(_NEUTRAL[primitive](rows.made.dtype), rows.made.dtype)
        notes = _note_part_sum(walk, eqn, rows)
        return [Whole(reduced(lambda: jnp.where(walk.is_real(rows), rows.block, neutral)), notes)]
    if rows.whole is not None:
        walk.note_whole_sum(rows.node, eqn)
        return [Whole(reduced(lambda: walk.whole(rows)), frozenset({Note("whole sum", walk.source)}))]
    return None


def _note_part_sum(walk: Walk, eqn: Equation, rows: Rows) -> Notes:
    """Of a sum over the rows that were chosen of an update: what its result was made from."""
    source = f"{eqn.primitive} at {walk.source}"
    walk.plan.part_sums.append((rows, source))
    if jnp.issubdtype(rows.made.dtype, jnp.bool_):
        return NOTHING
    if walk.source != UNKNOWN_SOURCE:  # and no metric of this library's own step
        walk.plan.part_sources[source] = None
    return frozenset({Note("part sum", source)})


def _least(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _most(dtype: Any) -> Any:
    return jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


_NEUTRAL: dict[Any, Callable[[Any], Any]] = dict(
    zip(
        (p for name in "sum max min and or".split() for p in _jax.primitives(f"reduce_{name}")),
        (lambda dtype: 0, _least, _most, lambda dtype: True, lambda dtype: False),
        strict=True,
    )
)


def dot(walk: Walk, eqn: Equation, values: Values) -> Outs:
    side = 0 if isinstance(values[0], Rows) else 1
    rows, other = values[side], values[1 - side]
    if not isinstance(rows, Rows):
        return None
    contracted, batch = eqn.param("dimension_numbers")
    axis = rows.axis

    def bind(mine: Any, theirs: Any) -> Any:
        return _jax.bind(eqn, [mine, theirs] if side == 0 else [theirs, mine])[0]

    def product(both: Sequence[Rows], with_zeros: bool) -> Any:
        return bind(*(_with_zeros(walk, x) if with_zeros else x.block for x in both))

    for pairs in (contracted, batch):
        if axis not in pairs[side]:
            continue
        partner = walk.as_rows(other, rows.node, pairs[1 - side][pairs[side].index(axis)])
        if partner is None:
            return None
        zero = ZERO in (rows.outside, partner.outside)
        if pairs is batch:
            outside = ZERO if zero else UNKNOWN
            updated = rows.updated or partner.updated
            both, at = (rows, partner), batch[side].index(axis)
            block = walk.block(rows.node, eqn, at, functools.partial(product, both, zero), both)
            return [Rows(block, rows.node, at, outside, updated)]
        of_update = rows if rows.updated else partner if partner.updated else None
        if not zero and (of_update is None or _jax.shape(eqn.outputs[0])):  # a norm is over the rows that are read
            return None
        notes = NOTHING if zero or of_update is None else _note_part_sum(walk, eqn, of_update)
        both = rows, partner
        return [Whole(walk.output(eqn, functools.partial(product, both, True), both), notes)]
    if isinstance(other, Rows):
        return None
    free = [a for a in range(rows.made.ndim) if a not in contracted[side] and a not in batch[side]]
    before = len(_jax.shape(eqn.inputs[1 - side])) - len(contracted[0]) - len(batch[0]) if side == 1 else 0
    out_axis = len(batch[0]) + before + free.index(axis)
    # without a whole: what sums this over all rows, as a tied softmax does, uses the table as a whole
    outside = ZERO if rows.outside == ZERO else UNKNOWN
    block = walk.block(rows.node, eqn, out_axis, lambda: bind(rows.block, array_of(other)), values)
    return [Rows(block, rows.node, out_axis, outside, rows.updated)]


def _with_zeros(walk: Walk, rows: Rows) -> Any:
    """The block, with zeros in its padding rows where they may be anything: 0 times NaN is NaN."""
    if rows.outside == ZERO:
        return rows.block
    return jnp.where(walk.is_real(rows), rows.block, 0)


def across_devices(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Sums over mapped axes, and casts that say over which of them a value varies."""
    axes = _jax.summed_axes(eqn)
    outs: list[Value] = []
    for v, operand in zip(values, eqn.inputs, strict=True):
        given = (lambda v=v: v.block) if isinstance(v, Rows) else (lambda v=v: ready(v.made))  # type: ignore[misc]
        shape = v.shape if isinstance(v, Whole) else v.made.shape
        bound = lambda given=given: _jax.bind(eqn, [given()])[0]  # noqa: E731
        made = walk.when_needed(shape, _jax.dtype(operand), bound, [v])
        if not isinstance(v, Rows):
            outs.append(Same(made, v.axis, v.size, v.zero, v.notes) if isinstance(v, Same) else Whole(made, v.notes))
            continue
        whole = None
        if axes:
            walk.plan.axes.setdefault(v.node, set()).update(axes)
        elif v.whole is not None:
            whole = lambda walk, v=v: _jax.bind(eqn, [walk.whole(v)])[0]  # noqa: E731
        outs.append(Rows(made, v.node, v.axis, v.outside, v.updated, whole, origin=v.first))
    return outs


def placed(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """A wish where an array is to be: rows are where the block is."""
    del walk, eqn
    return list(values)


RULES: dict[Any, Callable[[Walk, Equation, Values], Outs]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_jax.primitives("bitcast_convert_type"), bitcast),
    "optimization_barrier": barrier,
    **dict.fromkeys(("sharding_constraint", "reshard"), placed),
    **dict.fromkeys(_REDUCTIONS | _CUMULATIVE | {_RESHAPE, _REV, _SLICE, _SQUEEZE, _TRANSPOSE}, one_operand),
    **dict.fromkeys((_PAD, _CONCATENATE, _SORT, _TOP_K), several),
    **dict.fromkeys(("split", "stack", "unstack"), several),  # by name: JAX does not list them
    _jax.BROADCAST: broadcast,
    **dict.fromkeys(_jax.primitives("dot_general"), dot),
}
