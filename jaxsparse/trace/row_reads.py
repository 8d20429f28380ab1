"""Reads of rows, and what adds to rows or writes them: gather, dynamic_slice, scatter, dynamic_update_slice.

In all of them an index names a row. In the block it becomes the row's position there, along whatever axis the rows are.
On CPU two things are made one id of an example after another, because XLA would make an array with a row for each id of
the batch first: a sum over an axis of ids that is all that becomes of a gather (a bag of embeddings), and a scatter of
equal rows along such an axis (the gradient of such a sum).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Equation
from jaxsparse.ops.rows import add_in_order, add_rows, at_least_int32, is_crowded, is_narrow, read_rows, row_ids
from jaxsparse.trace import row_elementwise, row_rules
from jaxsparse.trace.by_entry import Entries, adds_entries, by_pieces, made, noted
from jaxsparse.trace.values import UNIFORM, UNKNOWN, Outs, Rows, Same, Summed, Values, Whole, array_of

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk

Mode = jax.lax.GatherScatterMode

# t[ids] reads the first or last row where ids are out of range
CLIPPED = frozenset({Mode.CLIP, Mode.PROMISE_IN_BOUNDS})


def gather(walk: Walk, eqn: Equation, values: Values) -> Outs:
    rows, index = values
    if isinstance(index, Rows) and isinstance(rows, Whole):
        return _look_up(eqn, rows, index)
    if not isinstance(rows, Rows) or isinstance(index, Rows):
        return None
    axis, shape, numbers = rows.axis, _jax.shape(eqn.inputs[0]), eqn.param("dimension_numbers")
    num_rows, sizes = shape[axis], tuple(eqn.param("slice_sizes"))
    at = array_of(index)
    if axis in numbers.operand_batching_dims:
        return None
    if axis not in numbers.start_index_map:  # all rows, of some columns
        if sizes[axis] != num_rows:
            return None
        kept = _axes_left(shape, numbers.collapsed_slice_dims, numbers.operand_batching_dims)
        sizes = _replaced(sizes, axis, rows.made.shape[axis])
        (block,) = _jax.bind(eqn, [rows.block, at], slice_sizes=sizes)
        return [Rows(block, rows.node, numbers.offset_dims[kept.index(axis)], UNKNOWN, rows.updated)]
    if sizes[axis] != 1:
        return None
    component = tuple(numbers.start_index_map).index(axis)
    ids, mode = at[..., component], eqn.param("mode")
    place = walk.note_read(rows.node, ids, num_rows, rows.updated, mode in CLIPPED)
    if walk.planning and rows.whole is not None:  # other ids may be made of these rows
        return [Whole(walk.output(eqn, lambda: _jax.bind(eqn, [walk.whole(rows), at])[0], []))]
    at = at.astype(jnp.int32)
    if mode in CLIPPED:
        at = clip_others(at, component, numbers.start_index_map, shape, sizes)
    fill = eqn.param("fill_value") if mode == Mode.FILL_OR_DROP else None
    fill = nothing(rows.made.dtype) if fill is None else fill
    along = _summed_along(walk, eqn) if walk.alone and not walk.planning else None
    whole_rows = _whole_rows(numbers.offset_dims, numbers.collapsed_slice_dims, len(shape), place.ndim)
    if not (whole_rows and along is not None and along < place.ndim and sizes[1:] == shape[1:]):
        along = None

    def read(rows: jax.Array, place: jax.Array, at: jax.Array = at, cpu: bool | None = None) -> jax.Array:
        if along is not None:
            return _sum_of_rows(rows, place, along, fill, cpu)
        changes = {"mode": Mode.FILL_OR_DROP, "fill_value": fill, "unique_indices": False, "indices_are_sorted": False}
        return _jax.bind(eqn, [rows, at.at[..., component].set(place)], **changes)[0]

    if rows.table is not None:
        wide = at_least_int32(ids)
        inside = row_ids(jnp.clip(wide, 0, num_rows - 1) if mode in CLIPPED else wide, num_rows)
        block = rows.elsewhere()
        out = jax.lax.platform_dependent(
            cpu=lambda: read(rows.table, inside, cpu=True), default=lambda: read(block, place, cpu=False)
        )
        walk.tables_read.append(out)
        source, places = rows.table, inside
    else:
        out = read(rows.block, place)
        source, places = rows.block, place
    if along is not None:
        return [Summed(out)]
    entries = None
    if 0 not in numbers.offset_dims and not numbers.operand_batching_dims:
        by_piece = Entries(lambda cut: read(source, cut(places), cut(at)), gathered=True)
        entries = noted(walk, eqn, by_piece)
    return [Whole(out, entries=entries)]


def _look_up(eqn: Equation, array: Whole, index: Rows) -> Outs:
    """What rows of indices read in an array that is no table."""
    numbers = eqn.param("dimension_numbers")
    if index.axis in numbers.start_indices_batching_dims or index.axis == index.made.ndim - 1:
        return None
    (block,) = _jax.bind(eqn, [array.array, index.block])
    axis = _axes_left(block.shape, numbers.offset_dims)[index.axis]
    whole = index.whole and (lambda walk: _jax.bind(eqn, [array.array, walk.whole(index)])[0])
    return [Rows(block, index.node, axis, min(index.outside, UNIFORM), index.updated, whole)]


def clip_others(
    at: jax.Array, component: int, axes: Sequence[int], shape: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """Indices whose other components are moved into the array, as XLA does it."""
    for i, axis in enumerate(axes):
        if i != component:
            at = at.at[..., i].set(jnp.clip(at[..., i], 0, shape[axis] - sizes[axis]))
    return at


def nothing(dtype: Any) -> Any:
    """What is read where there is no row, as jnp.take has it."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    if jnp.issubdtype(dtype, jnp.bool_):
        return True
    return jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.iinfo(dtype).max


def _whole_rows(window: Any, rows_axis: Any, table_ndim: int, ids_ndim: int) -> bool:
    """Whether a gather or scatter is one of whole rows, their dimensions last."""
    return tuple(rows_axis) == (0,) and tuple(window) == tuple(range(ids_ndim, ids_ndim + table_ndim - 1))


def _summed_along(walk: Walk, eqn: Equation) -> int | None:
    """The axis over which the sum is taken that is all that becomes of an equation's output."""
    use, _ = walk.only_use(eqn.outputs[0]) or (None, 0)
    if use is None or use.primitive is not _jax.REDUCE_SUM or len(use.param("axes")) != 1:
        return None
    return int(use.param("axes")[0])


def _sum_of_rows(block: jax.Array, place: jax.Array, along: int, fill: Any, cpu: bool | None) -> jax.Array:
    """sum(block[place], along), NaN or `fill` being read where place is outside the block. cpu: whether this is for
    CPUs only, or never."""
    turns = jnp.moveaxis(place, along, 0)  # (L, ...)

    def read(i: Any) -> jax.Array:
        return read_rows(block, _turn(turns, i), fill)

    def one_by_one() -> jax.Array:
        return _repeat(len(turns) - 1, lambda i, total: total + read(i + 1), read(0))

    def at_once() -> jax.Array:
        return jnp.sum(read_rows(block, place, fill), axis=along)

    if cpu is None and len(turns):
        return jax.lax.platform_dependent(cpu=one_by_one, default=at_once)
    return one_by_one() if cpu and len(turns) else at_once()


def _turn(turns: jax.Array, i: Any) -> jax.Array:
    """turns[i], for i in range. jnp's indexing costs ten times as long to trace."""
    return jax.lax.index_in_dim(turns, i, keepdims=False) if isinstance(i, int) else turns[i]


def _repeat(many: int, turn: Callable[[Any, Any], Any], start: Any) -> Any:
    """fori_loop from 0, written out while that is not too long to compile: XLA puts more together then."""
    if many > _UNROLL:
        return jax.lax.fori_loop(0, many, turn, start)
    for i in range(many):
        start = turn(i, start)
    return start


_UNROLL = 64


def dynamic_slice(walk: Walk, eqn: Equation, values: Values) -> Outs:
    rows, starts = values[0], values[1:]
    if not isinstance(rows, Rows) or any(isinstance(v, Rows) for v in starts):
        return None
    axis, sizes = rows.axis, tuple(eqn.param("slice_sizes"))
    num_rows, many, arrays = _jax.shape(eqn.inputs[0])[axis], sizes[axis], [array_of(v) for v in starts]
    if many == num_rows:
        sizes = _replaced(sizes, axis, rows.made.shape[axis])
        (block,) = _jax.bind(eqn, [rows.block, *arrays], slice_sizes=sizes)
        return [Rows(block, rows.node, axis, rows.outside, rows.updated)]
    place = walk.note_read(rows.node, _from(arrays[axis], many, num_rows), num_rows, rows.updated, clipped=False)
    if walk.planning and rows.whole is not None:
        return [Whole(walk.output(eqn, lambda: _jax.bind(eqn, [walk.whole(rows), *arrays])[0], []))]
    read = jnp.take(rows.block, place, axis=axis, mode="fill")
    arrays[axis] = jnp.zeros_like(arrays[axis])
    return [Whole(x) for x in _jax.bind(eqn, [read, *arrays])]


def _from(start: Any, many: int, num_rows: int) -> jax.Array:
    """The ids of so many rows from one on, which XLA moves into the table."""
    return jnp.clip(start, 0, num_rows - many).astype(jnp.int32) + jnp.arange(many, dtype=jnp.int32)


def static_slice(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Rows of fixed numbers, `t[0]` or `t[:4]`, are read where other ids are read as well."""
    (rows,) = values
    outs = row_rules.one_operand(walk, eqn, values)
    if outs is not None or not isinstance(rows, Rows) or _jax.shape(eqn.outputs[0])[rows.axis] > _FEW:
        return outs
    if rows.updated:  # jnp.roll of a gradient moves rows that nothing reads
        return None
    axis, start, limit = rows.axis, list(eqn.param("start_indices")), list(eqn.param("limit_indices"))
    strides = list(eqn.param("strides") or [1] * len(start))
    num_rows, ids = _jax.shape(eqn.inputs[0])[axis], jnp.arange(start[axis], limit[axis], strides[axis], jnp.int32)
    place = walk.note_read(rows.node, ids, num_rows, False, clipped=False, static=True)
    if walk.planning and rows.whole is not None:
        return [Whole(walk.output(eqn, lambda: _jax.bind(eqn, [walk.whole(rows)])[0], []))]
    start[axis], limit[axis], strides[axis] = 0, len(ids), 1
    changes = {"start_indices": tuple(start), "limit_indices": tuple(limit), "strides": tuple(strides)}

    def read(block: jax.Array) -> jax.Array:
        return _jax.bind(eqn, [jnp.take(block, place, axis=axis, mode="fill")], **changes)[0]

    if rows.table is None:
        return [Whole(read(rows.block))]
    block = rows.elsewhere()
    out = jax.lax.platform_dependent(cpu=lambda: _jax.bind(eqn, [rows.table])[0], default=lambda: read(block))
    walk.tables_read.append(out)
    return [Whole(out)]


_FEW = 1 << 12  # rows of fixed numbers: with more of them, a table is dense

# ---------------------------------------------------------------------------------------------------------------------


def pad(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Of few rows with zeros: the gradient of a slice, which adds to rows of fixed numbers."""
    new, filler = values
    config, shape = list(eqn.param("padding_config")), _jax.shape(eqn.outputs[0])
    tall = [a for a, c in enumerate(config) if shape[a] in walk.plan.heights and tuple(c) != (0, 0, 0)]
    if not tall or not isinstance(new, Whole) or not row_elementwise.is_zero(filler):
        return None
    axis, size = tall[0], new.shape[tall[0]]
    (low, high, between), config[axis] = config[axis], (0, 0, 0)
    if low < 0 or high < 0 or size > _FEW:
        return None
    ids = jnp.arange(low, shape[axis] - high, between + 1, jnp.int32)

    def put(block: jax.Array, place: jax.Array) -> jax.Array:
        (rows,) = _jax.bind(eqn, [new.array, filler.array], padding_config=tuple(config))
        rows = jnp.moveaxis(rows, axis, 0)
        return jnp.moveaxis(jnp.moveaxis(block, axis, 0).at[place].add(rows, mode="drop"), 0, axis)

    def zeros() -> Any:
        zero = jnp.zeros((*shape[:axis], 1, *shape[axis + 1 :]), _jax.dtype(eqn.outputs[0]))
        return _jax.vary(zero, _jax.varying_axes(new.array))

    into = Same(walk.output(eqn, zeros, [new], axis=axis), axis, shape[axis], zero=True)
    return _changed(walk, into, ids, shape[axis], put, [new], adds=True, clipped=False)


def scatter(walk: Walk, eqn: Equation, values: Values) -> Outs:
    into, index, updates = values
    if isinstance(into, Whole) or any(isinstance(v, Rows) for v in (index, updates)):
        return None
    shape, numbers = _jax.shape(eqn.inputs[0]), eqn.param("dimension_numbers")
    if isinstance(into, Same) and into.zero and into.axis not in numbers.scatter_dims_to_operand_dims:
        tall = [a for a in numbers.scatter_dims_to_operand_dims if shape[a] in walk.plan.heights]
        into = into.along(tall[0]) if tall else into
    axis = into.axis
    if axis not in numbers.scatter_dims_to_operand_dims or axis in numbers.operand_batching_dims:
        return None
    sizes = window_sizes(eqn)
    if sizes[axis] != 1:
        return None
    component = tuple(numbers.scatter_dims_to_operand_dims).index(axis)
    at = array_of(index)
    ids, clipped = at[..., component], eqn.param("mode") == Mode.CLIP
    if clipped:
        at = clip_others(at, component, numbers.scatter_dims_to_operand_dims, shape, sizes)
    adds = eqn.primitive is _jax.SCATTER_ADD
    adds_rows = (
        adds
        and not walk.planning
        and walk.alone  # otherwise each of the small scatters would be added up over the devices
        and _whole_rows(numbers.update_window_dims, numbers.inserted_window_dims, len(shape), at.ndim - 1)
    )
    repeated = adds_rows and isinstance(updates, Same) and updates.axis < at.ndim - 1
    in_pieces = adds and isinstance(updates, Whole) and updates.entries is not None and adds_entries(eqn)

    def put(block: jax.Array, place: jax.Array) -> jax.Array:
        where = at.astype(jnp.int32).at[..., component].set(place)
        wide = jnp.promote_types(block.dtype, jnp.float32) if adds and is_narrow(block.dtype) else block.dtype

        def with_new(block: jax.Array, where: jax.Array, new: Any) -> jax.Array:
            if adds:
                return jax.lax.scatter_add(block, where, new.astype(wide), numbers, mode=Mode.FILL_OR_DROP)
            changes = {"mode": Mode.FILL_OR_DROP, "indices_are_sorted": False, "unique_indices": False}
            return _jax.bind(eqn, [block, where, new], **changes)[0]

        def as_they_come() -> jax.Array:
            return with_new(block.astype(wide), where, array_of(updates))

        def at_once() -> jax.Array:
            if not (adds_rows and is_crowded(place, block)):
                return as_they_come()
            in_order = lambda: add_in_order(block.astype(wide), place, array_of(updates))  # noqa: E731
            return jax.lax.platform_dependent(cuda=in_order, default=as_they_come)

        def one_by_one() -> jax.Array:
            turns, row = jnp.moveaxis(place, updates.axis, 0), jnp.squeeze(updates.row, updates.axis).astype(wide)

            def add(i: Any, sums: jax.Array) -> jax.Array:
                return add_rows(sums, _turn(turns, i), row)

            return _repeat(len(turns), add, _jax.vary(block.astype(wide), _jax.varying_axes(row)))

        if in_pieces:
            add = lambda sums, cut: with_new(sums, cut(where), made(updates, cut))  # noqa: E731
            out = by_pieces(updates, add, block.astype(wide), at_once)
        else:
            out = jax.lax.platform_dependent(cpu=one_by_one, default=at_once) if repeated else at_once()
        return out.astype(block.dtype)

    return _changed(walk, into, ids, shape[axis], put, [updates], adds=adds, clipped=clipped)


def window_sizes(eqn: Equation) -> list[int]:
    """Of a scatter: how large what one index adds to is, along each axis."""
    shape, numbers = _jax.shape(eqn.inputs[0]), eqn.param("dimension_numbers")
    sizes = [1] * len(shape)
    window = _axes_left(shape, numbers.inserted_window_dims, numbers.operand_batching_dims)
    for a, dim in zip(window, numbers.update_window_dims, strict=True):
        sizes[a] = _jax.shape(eqn.inputs[2])[dim]
    return sizes


def dynamic_update_slice(walk: Walk, eqn: Equation, values: Values) -> Outs:
    into, update, *starts = values
    if isinstance(into, Whole) or any(isinstance(v, Rows) for v in (update, *starts)):
        return None
    axis, shape, new = into.axis, _jax.shape(eqn.inputs[0]), _jax.shape(eqn.inputs[1])
    if new[axis] == shape[axis] or _replaced(new, axis, shape[axis]) != tuple(shape):
        return None
    ids = _from(array_of(starts[axis]), new[axis], shape[axis])

    def put(block: jax.Array, place: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(array_of(update), axis, 0)
        return jnp.moveaxis(jnp.moveaxis(block, axis, 0).at[place].set(rows, mode="drop"), 0, axis)

    return _changed(walk, into, ids, shape[axis], put, [update], adds=False, clipped=False)


def _changed(
    walk: Walk,
    into: Rows | Same,
    ids: Any,
    num_rows: int,
    put: Callable[[Any, Any], Any],
    new: Values,
    *,
    adds: bool,
    clipped: bool,
) -> Outs:
    """Rows of which those that ids name are changed by put(block, place), made of new values."""
    path = walk.path
    if isinstance(into, Same):
        if path in walk.plan.loose:
            return None
        node = walk.plan.scatter_at(path)
        size, outside = walk.ids(node).shape[0], into.outside
        shape = into.shape_of(size)
    else:
        node, shape, outside = into.node, into.made.shape, into.outside

    def before() -> Any:
        if isinstance(into, Rows):
            return into.block
        block = into.times(size)
        if walk.planning:  # which rows it has is not known, and no row ids can be made of what they hold
            along = [-1 if axis == into.axis else 1 for axis in range(block.ndim)]
            block = jnp.where(walk.ids(node).reshape(along) == 0, block, block)
        return block

    place = walk.note_read(node, ids, num_rows, late=None, clipped=clipped)
    add_to = (lambda block: put(block, place)) if adds and isinstance(into, Same) and into.zero else None
    updated = adds or isinstance(into, Same) or into.updated  # rows that are set, a padding row, are no update
    block = walk.when_needed(shape, into.made.dtype, lambda: put(before(), place), [into, *new])
    return [Rows(block, node, into.axis, outside, updated, add_to=add_to)]


def _axes_left(shape: Sequence[int], *without: Sequence[int]) -> list[int]:
    return [axis for axis in range(len(shape)) if not any(axis in axes for axes in without)]


def _replaced(sizes: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


CHANGES: dict[Any, Callable[[Walk, Equation, Values], Outs]] = {
    **dict.fromkeys(_jax.primitives("scatter scatter_add scatter_max scatter_min scatter_mul"), scatter),
    **dict.fromkeys(_jax.primitives("dynamic_update_slice"), dynamic_update_slice),
}
RULES = {_jax.GATHER: gather, _jax.DYNAMIC_SLICE: dynamic_slice, _jax.SLICE: static_slice} | CHANGES
