"""NumPy twins of the public functions: dense, in float64, and slow where that is clearer.

They share no line and no idea with the library: a bag is a Python list of positions, a BCOO is its dense array.
"""

import itertools

import numpy as np


def dense(x):
    """A BCOO as a dense array; an entry with any index out of range stands for nothing, repeats add up."""
    out = np.zeros(x.shape, np.float64)
    for index, value in zip(np.asarray(x.indices).tolist(), np.asarray(x.data, np.float64), strict=True):
        if all(0 <= i < size for i, size in zip(index, x.shape, strict=True)):
            out[tuple(index)] += value
    return out


def dot(x, w):
    return np.tensordot(dense(x), np.asarray(w, np.float64), axes=1)


def sum(x, axis=None):
    return np.sum(dense(x), axis=axis)


def mean(x, axis=None):
    return np.mean(dense(x), axis=axis)


def concatenate(xs, axis=0):
    return np.concatenate([dense(x) for x in xs], axis=axis)


def lookup(table, ids, padding_idx=None, mode="fill"):
    table, ids = np.asarray(table, np.float64), np.asarray(ids)
    out = np.zeros(ids.shape + table.shape[1:])
    for at in np.ndindex(ids.shape):
        out[at] = 0 if ids[at] == padding_idx else _row(table, int(ids[at]), mode)
    return out


def bag(
    table,
    ids,
    *,
    offsets=None,
    segment_ids=None,
    num_bags=None,
    weights=None,
    combiner="mean",
    padding_idx=None,
    include_last_offset=False,
    mode="fill",
):
    table = np.asarray(table, np.float64)
    bags = positions(ids, offsets, segment_ids, num_bags, include_last_offset)
    ids = np.asarray(ids).reshape(-1).tolist()
    weights = [1.0] * len(ids) if weights is None else np.asarray(weights, np.float64).reshape(-1).tolist()
    out = np.zeros((len(bags), *table.shape[1:]))
    for b, members in enumerate(bags):
        read = [i for i in members if ids[i] != padding_idx]
        if not read:
            continue
        rows = [_row(table, ids[i], mode) for i in read]
        w = [weights[i] for i in read]
        if combiner == "max":
            out[b] = np.max(rows, axis=0)
            continue
        total = np.sum([x * row for x, row in zip(w, rows, strict=True)], axis=0)
        norm = {"sum": 1.0, "mean": np.sum(w), "sqrtn": np.sqrt(np.sum(np.square(w)))}[combiner]
        out[b] = total / norm if norm else np.where(np.isnan(total), np.nan, 0)  # an id outside the table outweighs 0/0
    return out


def positions(ids, offsets=None, segment_ids=None, num_bags=None, include_last_offset=False):
    """Which positions of ids.reshape(-1) each bag holds, for each of the three layouts."""
    shape = np.shape(ids)
    if offsets is not None:
        bounds = [*np.asarray(offsets).tolist(), *([] if include_last_offset else [shape[0]])]
        return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    if segment_ids is not None:
        return [[i for i, s in enumerate(np.asarray(segment_ids).tolist()) if s == b] for b in range(num_bags)]
    return [list(range(b * shape[1], (b + 1) * shape[1])) for b in range(shape[0])]


def _row(table, i, mode):
    if mode == "clip":
        i = min(max(i, 0), len(table) - 1)
    return table[i] if 0 <= i < len(table) else np.full(table.shape[1:], np.nan)
