"""Rules for equations that read rows, add to rows or set rows: gather, slices, scatter, pad.

A rule takes a walk, an equation and its operands, and returns the outputs, or None if it cannot be done row by row (see
`row_elementwise`). In the table an index names a row; in the block it becomes the position of that row.

On CPU, two cases loop over the ids of an example: a gather that is only summed over an axis of ids (a bag of
embeddings), and a scatter of equal rows along such an axis (its gradient). XLA would first make a row for each id.
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
from jaxsparse.trace.by_entry import Entries, adds_entries, by_pieces, entries_if_wanted, entries_in
from jaxsparse.trace.values import UNIFORM, UNKNOWN, EqualRows, FullArray, Outs, Rows, Summed, Values, array_of

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk

Mode = jax.lax.GatherScatterMode

# t[ids] reads the first or last row where ids are out of range
CLIPPED = frozenset({Mode.CLIP, Mode.PROMISE_IN_BOUNDS})


def gather(walk: Walk, eqn: Equation, values: Values) -> Outs:
    rows, index = values
    if isinstance(index, Rows) and isinstance(rows, FullArray):
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
        sizes = _replaced(sizes, axis, rows.data.shape[axis])
        (block,) = _jax.bind(eqn, [rows.block, at], slice_sizes=sizes)
        return [Rows(block, rows.node, numbers.offset_dims[kept.index(axis)], UNKNOWN, rows.updated)]
    if sizes[axis] != 1:
        return None
    component = tuple(numbers.start_index_map).index(axis)
    ids, mode = at[..., component], eqn.param("mode")
    place = walk.note_read(rows.node, ids, num_rows, rows.updated, mode in CLIPPED)
    if walk.planning and rows.full is not None:  # other ids may be computed from these rows
        return [FullArray(walk.output(eqn, lambda: _jax.bind(eqn, [walk.full_array(rows), at])[0], []))]
    at = at.astype(jnp.int32)
    if mode in CLIPPED:
        at = clip_others(at, component, numbers.start_index_map, shape, sizes)
    fill_value = eqn.param("fill_value") if mode == Mode.FILL_OR_DROP else None
    fill_value = missing_value(rows.data.dtype) if fill_value is None else fill_value
    sum_axis = _only_sum_axis(walk, eqn) if walk.on_one_device and not walk.planning else None
    full_rows = _takes_full_rows(numbers.offset_dims, numbers.collapsed_slice_dims, len(shape), place.ndim)
    if not (full_rows and sum_axis is not None and sum_axis < place.ndim and sizes[1:] == shape[1:]):
        sum_axis = None

    def read(rows: jax.Array, place: jax.Array, at: jax.Array = at, cpu: bool | None = None) -> jax.Array:
        if sum_axis is not None:
            return _sum_of_rows(rows, place, sum_axis, fill_value, cpu)
        changes = {"mode": Mode.FILL_OR_DROP, "fill_value": fill_value}
        changes |= {"unique_indices": False, "indices_are_sorted": False}
        return _jax.bind(eqn, [rows, at.at[..., component].set(place)], **changes)[0]

    if rows.table is not None:
        wide_ids = at_least_int32(ids)
        inside = row_ids(jnp.clip(wide_ids, 0, num_rows - 1) if mode in CLIPPED else wide_ids, num_rows)
        block = rows.block_off_cpu()
        out = jax.lax.platform_dependent(
            cpu=lambda: read(rows.table, inside, cpu=True), default=lambda: read(block, place, cpu=False)
        )
        walk.tables_read.append(out)
        source, places = rows.table, inside
    else:
        out = read(rows.block, place)
        source, places = rows.block, place
    if sum_axis is not None:
        return [Summed(out)]
    entries = None
    if 0 not in numbers.offset_dims and not numbers.operand_batching_dims:
        by_piece = Entries(lambda cut: read(source, cut(places), cut(at)), gathered=True)
        entries = entries_if_wanted(walk, eqn, by_piece)
    return [FullArray(out, entries=entries)]


def _look_up(eqn: Equation, array: FullArray, index: Rows) -> Outs:
    """Reads an array that is no table by indices that have a row for each of a table's."""
    numbers = eqn.param("dimension_numbers")
    if index.axis in numbers.start_indices_batching_dims or index.axis == index.data.ndim - 1:
        return None
    (block,) = _jax.bind(eqn, [array.array, index.block])
    axis = _axes_left(block.shape, numbers.offset_dims)[index.axis]
    full = index.full and (lambda walk: _jax.bind(eqn, [array.array, walk.full_array(index)])[0])
    return [Rows(block, index.node, axis, min(index.outside, UNIFORM), index.updated, full)]


def clip_others(
    at: jax.Array, component: int, axes: Sequence[int], shape: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """Indices, all components but one clipped into the array, as XLA clips them."""
    for i, axis in enumerate(axes):
        if i != component:
            at = at.at[..., i].set(jnp.clip(at[..., i], 0, shape[axis] - sizes[axis]))
    return at


def missing_value(dtype: Any) -> Any:
    """What a read of no row returns, as in jnp.take."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    if jnp.issubdtype(dtype, jnp.bool_):
        return True
    return jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.iinfo(dtype).max


def _takes_full_rows(window: Any, rows_axis: Any, table_ndim: int, ids_ndim: int) -> bool:
    """Whether a gather or scatter takes full rows, with their dimensions last."""
    return tuple(rows_axis) == (0,) and tuple(window) == tuple(range(ids_ndim, ids_ndim + table_ndim - 1))


def _only_sum_axis(walk: Walk, eqn: Equation) -> int | None:
    """The axis of the sum that is the only use of an equation's output; None if there is no such sum."""
    use, _ = walk.only_use(eqn.outputs[0]) or (None, 0)
    if use is None or use.primitive is not _jax.REDUCE_SUM or len(use.param("axes")) != 1:
        return None
    return int(use.param("axes")[0])


def _sum_of_rows(block: jax.Array, place: jax.Array, sum_axis: int, fill_value: Any, cpu: bool | None) -> jax.Array:
    """sum(block[place], sum_axis). Places outside the block read `fill_value`. cpu: True if this is for CPU only, False
    if it is never for CPU."""
    turns = jnp.moveaxis(place, sum_axis, 0)  # (L, ...)

    def read(i: Any) -> jax.Array:
        return read_rows(block, _index(turns, i), fill_value)

    def sequential() -> jax.Array:
        return _loop(len(turns) - 1, lambda i, total: total + read(i + 1), read(0))

    def vectorized() -> jax.Array:
        return jnp.sum(read_rows(block, place, fill_value), axis=sum_axis)

    if cpu is None and len(turns):
        return jax.lax.platform_dependent(cpu=sequential, default=vectorized)
    return sequential() if cpu and len(turns) else vectorized()


def _index(turns: jax.Array, i: Any) -> jax.Array:
    """turns[i], for i in range. jnp's indexing takes ten times as long to trace."""
    return jax.lax.index_in_dim(turns, i, keepdims=False) if isinstance(i, int) else turns[i]


def _loop(count: int, turn: Callable[[Any, Any], Any], start: Any) -> Any:
    """fori_loop from 0. Short loops are unrolled, so that XLA fuses more."""
    if count > _UNROLL:
        return jax.lax.fori_loop(0, count, turn, start)
    for i in range(count):
        start = turn(i, start)
    return start


_UNROLL = 64


def dynamic_slice(walk: Walk, eqn: Equation, values: Values) -> Outs:
    rows, starts = values[0], values[1:]
    if not isinstance(rows, Rows) or any(isinstance(v, Rows) for v in starts):
        return None
    axis, sizes = rows.axis, tuple(eqn.param("slice_sizes"))
    num_rows, count, arrays = _jax.shape(eqn.inputs[0])[axis], sizes[axis], [array_of(v) for v in starts]
    if count == num_rows:
        sizes = _replaced(sizes, axis, rows.data.shape[axis])
        (block,) = _jax.bind(eqn, [rows.block, *arrays], slice_sizes=sizes)
        return [Rows(block, rows.node, axis, rows.outside, rows.updated)]
    place = walk.note_read(rows.node, _ids_from(arrays[axis], count, num_rows), num_rows, rows.updated, clipped=False)
    if walk.planning and rows.full is not None:
        return [FullArray(walk.output(eqn, lambda: _jax.bind(eqn, [walk.full_array(rows), *arrays])[0], []))]
    read = jnp.take(rows.block, place, axis=axis, mode="fill")
    arrays[axis] = jnp.zeros_like(arrays[axis])
    return [FullArray(x) for x in _jax.bind(eqn, [read, *arrays])]


def _ids_from(start: Any, count: int, num_rows: int) -> jax.Array:
    """The ids of `count` rows from `start` on, clipped into the table as XLA clips them."""
    return jnp.clip(start, 0, num_rows - count).astype(jnp.int32) + jnp.arange(count, dtype=jnp.int32)


def static_slice(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Reads rows of constant ids, `t[0]` or `t[:4]`. They are read by rows if other ids are read as well."""
    (rows,) = values
    outs = row_rules.one_operand(walk, eqn, values)
    if outs is not None or not isinstance(rows, Rows) or _jax.shape(eqn.outputs[0])[rows.axis] > _MAX_STATIC_ROWS:
        return outs
    if rows.updated:  # jnp.roll of a gradient moves rows that nothing reads
        return None
    axis, start, limit = rows.axis, list(eqn.param("start_indices")), list(eqn.param("limit_indices"))
    strides = list(eqn.param("strides") or [1] * len(start))
    num_rows, ids = _jax.shape(eqn.inputs[0])[axis], jnp.arange(start[axis], limit[axis], strides[axis], jnp.int32)
    place = walk.note_read(rows.node, ids, num_rows, False, clipped=False, static=True)
    if walk.planning and rows.full is not None:
        return [FullArray(walk.output(eqn, lambda: _jax.bind(eqn, [walk.full_array(rows)])[0], []))]
    start[axis], limit[axis], strides[axis] = 0, len(ids), 1
    changes = {"start_indices": tuple(start), "limit_indices": tuple(limit), "strides": tuple(strides)}

    def read(block: jax.Array) -> jax.Array:
        return _jax.bind(eqn, [jnp.take(block, place, axis=axis, mode="fill")], **changes)[0]

    if rows.table is None:
        return [FullArray(read(rows.block))]
    block = rows.block_off_cpu()
    out = jax.lax.platform_dependent(cpu=lambda: _jax.bind(eqn, [rows.table])[0], default=lambda: read(block))
    walk.tables_read.append(out)
    return [FullArray(out)]


_MAX_STATIC_ROWS = 1 << 12  # a slice of more rows makes its table dense


def pad(walk: Walk, eqn: Equation, values: Values) -> Outs:
    """Pads a few rows with zeros: the gradient of a slice, which adds to rows of constant ids."""
    new, filler = values
    config, shape = list(eqn.param("padding_config")), _jax.shape(eqn.outputs[0])
    table_axes = [a for a, c in enumerate(config) if shape[a] in walk.plan.table_heights and tuple(c) != (0, 0, 0)]
    if not table_axes or not isinstance(new, FullArray) or not row_elementwise.is_zero(filler):
        return None
    axis, size = table_axes[0], new.shape[table_axes[0]]
    (low, high, between), config[axis] = config[axis], (0, 0, 0)
    if low < 0 or high < 0 or size > _MAX_STATIC_ROWS:
        return None
    ids = jnp.arange(low, shape[axis] - high, between + 1, jnp.int32)

    def put(block: jax.Array, place: jax.Array) -> jax.Array:
        (rows,) = _jax.bind(eqn, [new.array, filler.array], padding_config=tuple(config))
        rows = jnp.moveaxis(rows, axis, 0)
        return jnp.moveaxis(jnp.moveaxis(block, axis, 0).at[place].add(rows, mode="drop"), 0, axis)

    def zeros() -> Any:
        zero = jnp.zeros((*shape[:axis], 1, *shape[axis + 1 :]), _jax.dtype(eqn.outputs[0]))
        return _jax.vary(zero, _jax.varying_axes(new.array))

    into = EqualRows(walk.output(eqn, zeros, [new], axis=axis), axis, shape[axis], zero=True)
    return _changed(walk, into, ids, shape[axis], put, [new], adds=True, clipped=False)


def scatter(walk: Walk, eqn: Equation, values: Values) -> Outs:
    into, index, updates = values
    if isinstance(into, FullArray) or any(isinstance(v, Rows) for v in (index, updates)):
        return None
    shape, numbers = _jax.shape(eqn.inputs[0]), eqn.param("dimension_numbers")
    if isinstance(into, EqualRows) and into.zero and into.axis not in numbers.scatter_dims_to_operand_dims:
        table_axes = [a for a in numbers.scatter_dims_to_operand_dims if shape[a] in walk.plan.table_heights]
        into = into.along(table_axes[0]) if table_axes else into
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
    adds_full_rows = (
        adds
        and not walk.planning
        and walk.on_one_device  # otherwise each of the small scatters would be added up over the devices
        and _takes_full_rows(numbers.update_window_dims, numbers.inserted_window_dims, len(shape), at.ndim - 1)
    )
    adds_equal_rows = adds_full_rows and isinstance(updates, EqualRows) and updates.axis < at.ndim - 1
    in_pieces = adds and isinstance(updates, FullArray) and updates.entries is not None and adds_entries(eqn)

    def put(block: jax.Array, place: jax.Array) -> jax.Array:
        where = at.astype(jnp.int32).at[..., component].set(place)
        wide = jnp.promote_types(block.dtype, jnp.float32) if adds and is_narrow(block.dtype) else block.dtype

        def with_new(block: jax.Array, where: jax.Array, new: Any) -> jax.Array:
            if adds:
                return jax.lax.scatter_add(block, where, new.astype(wide), numbers, mode=Mode.FILL_OR_DROP)
            changes = {"mode": Mode.FILL_OR_DROP, "indices_are_sorted": False, "unique_indices": False}
            return _jax.bind(eqn, [block, where, new], **changes)[0]

        def unsorted() -> jax.Array:
            return with_new(block.astype(wide), where, array_of(updates))

        def vectorized() -> jax.Array:
            if not (adds_full_rows and is_crowded(place, block)):
                return unsorted()
            in_order = lambda: add_in_order(block.astype(wide), place, array_of(updates))  # noqa: E731
            return jax.lax.platform_dependent(cuda=in_order, default=unsorted)

        def sequential() -> jax.Array:
            turns, row = jnp.moveaxis(place, updates.axis, 0), jnp.squeeze(updates.row, updates.axis).astype(wide)

            def add(i: Any, sums: jax.Array) -> jax.Array:
                return add_rows(sums, _index(turns, i), row)

            return _loop(len(turns), add, _jax.vary(block.astype(wide), _jax.varying_axes(row)))

        if in_pieces:
            add = lambda sums, cut: with_new(sums, cut(where), entries_in(updates, cut))  # noqa: E731
            out = by_pieces(updates, add, block.astype(wide), vectorized)
        else:
            out = jax.lax.platform_dependent(cpu=sequential, default=vectorized) if adds_equal_rows else vectorized()
        return out.astype(block.dtype)

    return _changed(walk, into, ids, shape[axis], put, [updates], adds=adds, clipped=clipped)


def window_sizes(eqn: Equation) -> list[int]:
    """The shape of the window that one index of a scatter adds to."""
    shape, numbers = _jax.shape(eqn.inputs[0]), eqn.param("dimension_numbers")
    sizes = [1] * len(shape)
    window = _axes_left(shape, numbers.inserted_window_dims, numbers.operand_batching_dims)
    for a, dim in zip(window, numbers.update_window_dims, strict=True):
        sizes[a] = _jax.shape(eqn.inputs[2])[dim]
    return sizes


def dynamic_update_slice(walk: Walk, eqn: Equation, values: Values) -> Outs:
    into, update, *starts = values
    if isinstance(into, FullArray) or any(isinstance(v, Rows) for v in (update, *starts)):
        return None
    axis, shape, new = into.axis, _jax.shape(eqn.inputs[0]), _jax.shape(eqn.inputs[1])
    if new[axis] == shape[axis] or _replaced(new, axis, shape[axis]) != tuple(shape):
        return None
    ids = _ids_from(array_of(starts[axis]), new[axis], shape[axis])

    def put(block: jax.Array, place: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(array_of(update), axis, 0)
        return jnp.moveaxis(jnp.moveaxis(block, axis, 0).at[place].set(rows, mode="drop"), 0, axis)

    return _changed(walk, into, ids, shape[axis], put, [update], adds=False, clipped=False)


def _changed(
    walk: Walk,
    into: Rows | EqualRows,
    ids: Any,
    num_rows: int,
    put: Callable[[Any, Any], Any],
    new: Values,
    *,
    adds: bool,
    clipped: bool,
) -> Outs:
    """Rows after put(block, place) has changed those that the ids name. `new`: the values that it puts there."""
    path = walk.path
    if isinstance(into, EqualRows):
        if path in walk.plan.tableless_scatters:
            return None
        node = walk.plan.scatter_at(path)
        size, outside = walk.ids(node).shape[0], into.outside
        shape = into.shape_of(size)
    else:
        node, shape, outside = into.node, into.data.shape, into.outside

    def before() -> Any:
        if isinstance(into, Rows):
            return into.block
        block = into.times(size)
        if walk.planning:  # its rows are unknown, so no row ids may depend on their contents
            along = [-1 if axis == into.axis else 1 for axis in range(block.ndim)]
            block = jnp.where(walk.ids(node).reshape(along) == 0, block, block)
        return block

    place = walk.note_read(node, ids, num_rows, after_update=None, clipped=clipped)
    add_to = (lambda block: put(block, place)) if adds and isinstance(into, EqualRows) and into.zero else None
    updated = adds or isinstance(into, EqualRows) or into.updated  # setting rows, of padding say, is no update
    block = walk.lazy_array(shape, into.data.dtype, lambda: put(before(), place), [into, *new])
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
