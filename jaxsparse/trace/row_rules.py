"""Rules for equations that are not elementwise: changes of shape, sums and products.

A rule takes a walk, an equation and its operands, and returns the outputs, or None if it cannot be done row by row (see
`row_elementwise`).
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
    EqualRows,
    FullArray,
    Note,
    Notes,
    Outs,
    Rows,
    Value,
    Values,
    array_of,
    materialize,
)

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk


# ---------------------------------------------------------------------------------------------------------------------
# other shapes


def move_rows_axis(eqn: Equation, axis: int, size: int) -> tuple[dict[str, Any], int] | None:
    """(the parameters that change, the axis of the rows in the result), for an equation whose operand gets `size` rows
    along `axis`. None if rows do not stay rows."""
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
    if len(values) != 1 or isinstance(v, FullArray):
        return None
    found = move_rows_axis(eqn, v.axis, 1 if isinstance(v, EqualRows) else v.data.shape[v.axis])
    if found is None:
        return reduce_rows(walk, eqn, v) if isinstance(v, Rows) and eqn.primitive in _REDUCTIONS else None
    changes, axis = found
    keeps_zero = eqn.primitive is not _CUMLOGSUMEXP
    if isinstance(v, EqualRows):
        row = walk.output(eqn, lambda: _jax.bind(eqn, [v.row], **changes)[0], values, axis=axis)
        return [EqualRows(row, axis, v.size, v.zero and keeps_zero, v.notes)]

    def make(part: Part, block: Any) -> Any:
        changes, _ = move_rows_axis(eqn, v.axis, block.shape[v.axis]) or ({}, 0)
        return _jax.bind(eqn, [block], **changes)[0]

    block = walk.by_row(v.node, eqn.outputs[0], axis, [v.data], make, before=v.axis)
    full = v.full and (lambda walk: _jax.bind(eqn, [walk.full_array(v)])[0])
    outside = v.outside if keeps_zero else min(v.outside, UNIFORM)
    return [Rows(block, v.node, axis, outside, v.updated, full, origin=v.first)]


def broadcast(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Broadcasts an array. The output is EqualRows if it has as many rows as a table, or is only scattered."""
    (v,) = values
    if not isinstance(v, FullArray):
        return one_operand(walk, eqn, values)
    shape, dims = eqn.param("shape"), [int(d) for d in eqn.param("broadcast_dimensions")]
    given = v.shape
    new = [a for a in range(len(shape)) if a not in dims or given[dims.index(a)] == 1 != shape[a]]
    table_axes = [a for a in new if shape[a] in walk.plan.table_heights]
    new = [a for a in new if shape[a] != 1]
    if not table_axes and not walk.planning and len(new) == 1:
        use, operand = walk.only_use(eqn.outputs[0]) or (None, 0)
        if use is not None and use.primitive is _jax.SCATTER_ADD and operand == 2:
            table_axes = new
    if not table_axes:
        return None
    axis = table_axes[0]
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    row = walk.output(eqn, lambda: _jax.bind(eqn, [v.array], shape=one)[0], values, axis=axis)
    return [EqualRows(row, axis, shape[axis], is_zero(v), v.notes)]


def multi_operand(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """pad, split, concatenate, stack, unstack, sort and top_k, along another axis than the rows."""
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
        return None  # stacked tables, which do not share their rows
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


def reduce_rows(walk: Walk, eqn: Equation, rows: Rows) -> Outs:
    """A reduction over all rows."""
    primitive, (out,) = eqn.primitive, eqn.outputs
    if primitive not in _NEUTRAL:
        return None
    num_rows = _jax.shape(eqn.inputs[0])[rows.axis]

    def reduced(block: Callable[[], Any]) -> Any:
        return walk.output(eqn, lambda: _jax.bind(eqn, [block()])[0], [rows])

    def with_uniform_rest() -> Any:
        """The reduction if all rows outside of the block equal the last one of it, which is padding."""
        is_real = walk.is_real(rows)
        num_others = num_rows - jnp.sum(is_real)
        if primitive is not _jax.REDUCE_SUM:
            first = jax.lax.slice_in_dim(rows.block, 0, 1, axis=rows.axis)
            return _jax.bind(eqn, [jnp.where(is_real | (num_others > 0), rows.block, first)])[0]
        row = jax.lax.slice_in_dim(rows.block, rows.data.shape[rows.axis] - 1, None, axis=rows.axis)
        (inside,), (one,) = _jax.bind(eqn, [jnp.where(is_real, rows.block, 0)]), _jax.bind(eqn, [row])
        return (inside + one * num_others.astype(one.dtype)).astype(_jax.dtype(out))

    if rows.outside == ZERO and primitive is _jax.REDUCE_SUM:
        return [FullArray(reduced(lambda: rows.block))]
    if rows.outside >= UNIFORM:
        return [FullArray(walk.output(eqn, with_uniform_rest, [rows]))]
    if rows.updated:  # frozen rows get no update
        neutral = np.asarray(_NEUTRAL[primitive](rows.data.dtype), rows.data.dtype)
        notes = _note_update_sum(walk, eqn, rows)
        return [FullArray(reduced(lambda: jnp.where(walk.is_real(rows), rows.block, neutral)), notes)]
    if rows.full is not None:
        walk.note_table_sum(rows.node, eqn)
        return [FullArray(reduced(lambda: walk.full_array(rows)), frozenset({Note("table sum", walk.source)}))]
    return None


def _note_update_sum(walk: Walk, eqn: Equation, rows: Rows) -> Notes:
    """Notes a sum over the chosen rows of an update. Returns the notes of its result."""
    source = f"{eqn.primitive} at {walk.source}"
    walk.plan.update_sums.append((rows, source))
    if jnp.issubdtype(rows.data.dtype, jnp.bool_):
        return NOTHING
    if walk.source != UNKNOWN_SOURCE:  # a metric of this library's own step is not announced
        walk.plan.update_sum_sources[source] = None
    return frozenset({Note("update sum", source)})


def _lowest(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


_NEUTRAL: dict[Any, Callable[[Any], Any]] = dict(
    zip(
        (p for name in "sum max min and or".split() for p in _jax.primitives(f"reduce_{name}")),
        (lambda dtype: 0, _lowest, _highest, lambda dtype: True, lambda dtype: False),
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

    def bind(block: Any, other_block: Any) -> Any:
        return _jax.bind(eqn, [block, other_block] if side == 0 else [other_block, block])[0]

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
        if not zero and (
            of_update is None or _jax.shape(eqn.outputs[0])
        ):  # only a norm may be over the rows that are read
            return None
        notes = NOTHING if zero or of_update is None else _note_update_sum(walk, eqn, of_update)
        both = rows, partner
        return [FullArray(walk.output(eqn, functools.partial(product, both, True), both), notes)]
    if isinstance(other, Rows):
        return None
    free = [a for a in range(rows.data.ndim) if a not in contracted[side] and a not in batch[side]]
    before = len(_jax.shape(eqn.inputs[1 - side])) - len(contracted[0]) - len(batch[0]) if side == 1 else 0
    out_axis = len(batch[0]) + before + free.index(axis)
    # no `full`: a sum of it over all rows, as in a tied softmax, needs the full table
    outside = ZERO if rows.outside == ZERO else UNKNOWN
    block = walk.block(rows.node, eqn, out_axis, lambda: bind(rows.block, array_of(other)), values)
    return [Rows(block, rows.node, out_axis, outside, rows.updated)]


def _with_zeros(walk: Walk, rows: Rows) -> Any:
    """The block, with zeros in its padding rows, which may be infinite: 0 times infinity is NaN."""
    if rows.outside == ZERO:
        return rows.block
    return jnp.where(walk.is_real(rows), rows.block, 0)


def across_devices(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Sums over mapped axes, and casts that declare over which of them a value varies."""
    axes = _jax.summed_axes(eqn)
    outs: list[Value] = []
    for v, operand in zip(values, eqn.inputs, strict=True):
        given = (lambda v=v: v.block) if isinstance(v, Rows) else (lambda v=v: materialize(v.data))  # type: ignore[misc]
        shape = v.shape if isinstance(v, FullArray) else v.data.shape
        bound = lambda given=given: _jax.bind(eqn, [given()])[0]  # noqa: E731
        made = walk.lazy_array(shape, _jax.dtype(operand), bound, [v])
        if not isinstance(v, Rows):
            outs.append(
                EqualRows(made, v.axis, v.size, v.zero, v.notes)
                if isinstance(v, EqualRows)
                else FullArray(made, v.notes)
            )
            continue
        full = None
        if axes:
            walk.plan.axes.setdefault(v.node, set()).update(axes)
        elif v.full is not None:
            full = lambda walk, v=v: _jax.bind(eqn, [walk.full_array(v)])[0]  # noqa: E731
        outs.append(Rows(made, v.node, v.axis, v.outside, v.updated, full, origin=v.first))
    return outs


def sharding_hint(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Ignores a sharding constraint: rows have the sharding of the block."""
    del walk, eqn
    return list(values)


RULES: dict[Any, Callable[[Walk, Equation, Values], Outs]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_jax.primitives("bitcast_convert_type"), bitcast),
    "optimization_barrier": barrier,
    **dict.fromkeys(("sharding_constraint", "reshard"), sharding_hint),
    **dict.fromkeys(_REDUCTIONS | _CUMULATIVE | {_RESHAPE, _REV, _SLICE, _SQUEEZE, _TRANSPOSE}, one_operand),
    **dict.fromkeys((_PAD, _CONCATENATE, _SORT, _TOP_K), multi_operand),
    **dict.fromkeys(("split", "stack", "unstack"), multi_operand),  # by name: JAX does not list them
    _jax.BROADCAST: broadcast,
    **dict.fromkeys(_jax.primitives("dot_general"), dot),
}
