"""The functions that written models call. export_numpy copies the source of those that a model needs."""

import pathlib

import numpy as np


def load(name):
    """An array saved beside this file, memory-mapped: only the rows that are read come into memory."""
    return np.asarray(np.load(pathlib.Path(__file__).parent / f"{name}.npy", mmap_mode="r"))


def array(x, name, dtype, *shape):
    """x as an array of this dtype and shape. A size of None may be any number."""
    x, dtype = np.asarray(x), np.dtype(dtype)
    if x.ndim != len(shape) or any(n is not None and n != size for n, size in zip(shape, x.shape)):
        raise ValueError(f"{name} must be of shape {str(shape).replace('None', 'any')}. Got {x.shape} instead.")
    if x.size == 0 or x.dtype == dtype:
        return x.astype(dtype, copy=False)
    if x.dtype.kind not in ("biuf" if dtype.kind == "f" else "b" if dtype.kind == "b" else "iu"):
        raise TypeError(f"{name} must be of numbers that fit {dtype}. Got {x.dtype} instead.")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= int(x.min()) <= int(x.max()) <= np.iinfo(dtype).max:
        raise OverflowError(f"{name} must fit {dtype}. Got numbers from {x.min()} to {x.max()} instead.")
    return x.astype(dtype)


def csr(x, name, dtype, num_rows, num_columns):
    """The values, rows and columns of the entries of a CSR matrix, and its number of rows."""
    parts = ("data", "indices", "indptr")
    if isinstance(x, dict):
        x = tuple(x[part] for part in parts)
    elif all(hasattr(x, part) for part in parts):
        if getattr(x, "format", "csr") != "csr":
            raise TypeError(f"{name} must be a CSR matrix. Got {x.format} instead: call .tocsr().")
        x = tuple(getattr(x, part) for part in parts)
    data, indices, indptr = x
    indptr = array(indptr, f"{name}.indptr", np.int64, None)
    if not len(indptr) or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any() or indptr[-1] > len(indices):
        raise ValueError(f"{name}.indptr must start with 0, not decrease, and end within the indices.")
    if num_rows is not None and num_rows != len(indptr) - 1:
        raise ValueError(f"{name} must have {num_rows} rows. Got {len(indptr) - 1} instead.")
    data = array(data[: indptr[-1]], f"{name}.data", dtype, int(indptr[-1]))
    indices = array(indices[: indptr[-1]], f"{name}.indices", np.int32, int(indptr[-1]))
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_columns:
        raise ValueError(
            f"{name}.indices must be in [0, {num_columns}). Got {indices.min()} to {indices.max()} instead."
        )
    rows = np.repeat(np.arange(len(indptr) - 1, dtype=np.int32), np.diff(indptr))
    return data, rows, indices, len(indptr) - 1


def rows(table, ids, fill=None, clip=False):
    """table[ids]. An id outside of the table reads `fill`, or with clip the nearest row."""
    if fill is None and not clip:
        return table[ids]
    if np.ndim(ids) == 0:
        return rows(table, np.reshape(ids, 1), fill, clip)[0]
    nearest = np.minimum(np.maximum(ids, 0), len(table) - 1)
    out = table[nearest]
    if not clip and (outside := ids != nearest).any():
        out[outside] = fill
    return out


def rows_of_bfloat16(table, ids, fill=None, clip=False):
    """table[ids] as float32, of a bfloat16 table stored as uint16: the upper halves of float32."""
    halves = rows(table, ids, None if fill is None else 0, clip)
    out = np.left_shift(halves, 16, dtype=np.uint32).view(np.float32)
    if fill is not None and fill != 0:
        out[(ids < 0) | (ids >= len(table))] = fill
    return out


def bags(table, ids, fill=None, clip=False):
    """The sum of the rows of each bag. ids (B, L) -> (B, ...)."""
    step = max(1, 1024 // max(1, ids.shape[1]))  # bags at a time, so that their rows fit in the processor's cache
    sums = [rows(table, ids[i : i + step], fill, clip).sum(1) for i in range(0, max(1, len(ids)), step)]
    return sums[0] if len(sums) == 1 else np.concatenate(sums)


def sum_by(ids, values, n):
    """The sum of the values of each id: ids (N,), values (N, ...) -> (n, ...)."""
    out = np.zeros((n, *values.shape[1:]), values.dtype)
    inside = (ids >= 0) & (ids < n)
    if not inside.all():
        ids, values = ids[inside], values[inside]
    np.add.at(out, ids, values)
    return out


def dot(rows, columns, values, table, n):
    """The product of a sparse matrix of n rows, its entries sorted by row, and a table."""
    out, ends = np.empty((n, table.shape[1]), table.dtype), np.searchsorted(rows, np.arange(n + 1))
    for i in range(n):
        some = slice(ends[i], ends[i + 1])
        out[i] = values[some] @ table[columns[some]]
    return out


def gather(
    x,
    places,
    sizes,
    offset_dims,
    collapsed_slice_dims,
    start_index_map,
    operand_batching_dims=(),
    start_indices_batching_dims=(),
    fill=None,
):
    """jax.lax.gather, with its arguments: slices of these sizes, which start at `places`."""
    rank = places.ndim - 1 + len(offset_dims)
    batch_axes = [i for i in range(rank) if i not in offset_dims]
    window_axes = [i for i in range(x.ndim) if i not in collapsed_slice_dims and i not in operand_batching_dims]
    index, inside = [], np.True_
    for axis in range(x.ndim):
        at = np.zeros((1,) * rank, np.intp)
        if axis in start_index_map:
            start, last = places[..., start_index_map.index(axis)], x.shape[axis] - sizes[axis]
            inside = inside & along((start >= 0) & (start <= last), batch_axes, rank)
            at = at + along(np.clip(start, 0, last), batch_axes, rank)
        if axis in operand_batching_dims:
            batch = batch_axes[start_indices_batching_dims[operand_batching_dims.index(axis)]]
            at = at + along(np.arange(x.shape[axis]), [batch], rank)
        if axis in window_axes:
            at = at + along(np.arange(sizes[axis]), [offset_dims[window_axes.index(axis)]], rank)
        index.append(at)
    out = x[tuple(index)]
    return out if fill is None or inside.all() else np.where(inside, out, fill)


def scatter(
    function,
    x,
    places,
    new,
    update_window_dims,
    inserted_window_dims,
    scatter_dims_to_operand_dims,
    operand_batching_dims=(),
    scatter_indices_batching_dims=(),
    clip=False,
):
    """jax.lax.scatter, with its arguments: x with `new` written at `places`, or combined with x by a ufunc."""
    rank = new.ndim
    batch_axes = [i for i in range(rank) if i not in update_window_dims]
    window_axes = [i for i in range(x.ndim) if i not in inserted_window_dims and i not in operand_batching_dims]
    index, inside = [], np.ones((1,) * rank, bool)
    for axis in range(x.ndim):
        at = np.zeros((1,) * rank, np.intp)
        size = new.shape[update_window_dims[window_axes.index(axis)]] if axis in window_axes else 1
        if axis in scatter_dims_to_operand_dims:
            start, last = places[..., scatter_dims_to_operand_dims.index(axis)], x.shape[axis] - size
            start = np.clip(start, 0, last) if clip else start
            inside = inside & along((start >= 0) & (start <= last), batch_axes, rank)
            at = at + along(start, batch_axes, rank)
        if axis in operand_batching_dims:
            batch = batch_axes[scatter_indices_batching_dims[operand_batching_dims.index(axis)]]
            at = at + along(np.arange(x.shape[axis]), [batch], rank)
        if axis in window_axes:
            at = at + along(np.arange(size), [update_window_dims[window_axes.index(axis)]], rank)
        index.append(at)
    kept, out = np.broadcast_to(inside, new.shape), x.copy()
    where = tuple(np.broadcast_to(at, new.shape)[kept] for at in index)
    if function is None:
        out[where] = new[kept]
    else:
        function.at(out, where, new[kept])
    return out


def along(values, axes, rank):
    """values as an array of `rank` axes, its own axes at `axes` and all others of size 1."""
    shape = [1] * rank
    for axis, n in zip(axes, values.shape):
        shape[axis] = n
    return values.reshape(shape)


def part(x, starts, sizes):
    """The slice of x that starts at `starts`, moved inside x if needed: jax.lax.dynamic_slice."""
    starts = [min(max(int(start), 0), n - size) for start, n, size in zip(starts, x.shape, sizes)]
    return x[tuple(slice(start, start + size) for start, size in zip(starts, sizes))]


def with_part(x, new, starts):
    """x with `new` written at `starts`: jax.lax.dynamic_update_slice."""
    out = x.copy()
    part(out, starts, new.shape)[...] = new
    return out


def top(x, k, axis):
    """The indices of the k largest, of equal ones the first: jax.lax.top_k."""
    last = x.shape[axis] - 1
    order = last - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    return np.take(order, np.arange(k), axis)


def scan(step, length, carry, arrays, stacked, reverse=False):
    """jax.lax.scan: the last carry and the stacked results. step(*carry, *slices) -> (*carry, *results)."""
    for i in range(length)[::-1] if reverse else range(length):
        outs = step(*carry, *(x[i] for x in arrays))
        carry = outs[: len(carry)]
        for x, out in zip(stacked, outs[len(carry) :]):
            x[i] = out
    return (*carry, *stacked)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def erf(x):
    """The error function, with an error below 2e-8."""
    s, y = np.square(np.asarray(x, np.float64)), np.asarray(x, np.float64)
    p = [1.12837916588, -0.376126269036, 0.112835974635, -0.0268543287959, 0.00518931194254, -0.000801885499198]
    p += [7.88249710881e-05]
    return np.where(np.abs(y) < 1, y * polynomial(s, p), np.sign(y) * (1 - erfc(np.abs(y)))).astype(x.dtype)


def erfc(x):
    """1 - erf(x), with a relative error below 2e-8."""
    y = np.abs(np.asarray(x, np.float64))
    t = 1 / (1 + y / 2)
    p = [0.282094795064, 0.282093776789, 0.246883879834, 0.175324075377, 0.0934147485307, -0.059050910107]
    p += [0.131850040384, -0.454563718423, 0.493385742043, -0.234605490702, 0.0431730659397]
    tail = np.exp(-y * y) * t * polynomial(t, p)
    return np.where(x < 0, 2 - tail, tail).astype(x.dtype)


def polynomial(x, factors):
    out = factors[-1]
    for factor in factors[-2::-1]:
        out = out * x + factor
    return out


def ordered(x):
    """Integers in the total order of floats: -nan < -inf < ... < -0.0 < 0.0 < ... < inf < nan."""
    bits = x.view(f"i{x.itemsize}")
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def round_away(x):
    """The nearest integers; halves are rounded away from zero."""
    return np.copysign(np.floor(np.abs(x) + np.abs(x).dtype.type(0.5)), x)


def truncated_division(a, b):
    """a / b of integers, rounded towards zero."""
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a))
