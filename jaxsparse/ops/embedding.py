"""Embedding lookups and bags: pure functions of a table and ids.

Both are `out = S @ table` with a sparse matrix S (batch, num_rows): one non-zero in a row for a lookup, several for a
bag.

    lookup         ids (...)                                 -> (..., d), of a table (num_rows, d)
    bag, padded    ids (B, L), short bags hold padding_idx   [[3, 1, P], [P, P, P], [4, 0, 2]]: bags 3 1, none, 4 0 2
    bag, offsets   ids (N,) and where each bag starts        [3, 1, 4, 0, 2], offsets [0, 2, 2]: the same three
    bag, segments  ids (N,) and the bag of each id           [3, 1, 4, 0, 2], segment_ids [0, 0, 2, 2, 2]: the same

Ids that are left out (padding_idx, ids of no bag) read 0 and touch no row: they are replaced by num_rows, which is
padding in the gradient. Any other id outside [0, num_rows) is a mistake, and `mode` says what it does. "fill" (the
default; "drop" does the same here) makes the whole bag NaN, without a gradient. "clip" takes the nearest row.
"promise_in_bounds" leaves it to XLA. Negative ids are out of range; they do not count from the end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import as_ids, check_choice, check_float, check_table, message
from jaxsparse._context import is_one_gather_per_bag, is_tracing
from jaxsparse._names import other_names
from jaxsparse.ops.rows import at_least_int32, gather_rows, in_range, row_ids

_MODES = ("fill", "drop", "clip", "promise_in_bounds")
_COMBINERS = ("sum", "mean", "sqrtn", "max")
_OF_TORCH = {
    "input": "Write ids=; the table comes first.",
    "weight": "torch's weight is table= here, the first argument; weights of samples are weights=.",
    "sparse": "Gradients are row-sparse in js.jit, js.make_train_step and js.value_and_grad.",
}
_OF_BAGS = _OF_TORCH | {"per_sample_weights": "Write weights=."}
_UNROLL = 64  # bags of more ids are one gather and a sum, because unrolling would take long to compile


@other_names("embedding_lookup", _OF_TORCH)
def embedding_lookup(table: Any, ids: Any, *, padding_idx: int | None = None, mode: str = "fill") -> jax.Array:
    """Rows of a table: out[...] = table[ids[...]].

    Args:
      table: shape (num_rows, ...), floating.
      ids: integers of any shape.
      padding_idx: ids equal to it read 0 and are never touched. Any integer, inside the table or not.
      mode: what an id outside [0, num_rows) reads: "fill" or "drop" NaN, "clip" the nearest row, "promise_in_bounds"
        undefined.

    Returns:
      Shape ids.shape + table.shape[1:], table's dtype.

    Raises:
      TypeError: if ids or padding_idx are not integers, or the table is not floating.
      ValueError: for an unknown mode.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.embedding_lookup(jnp.array([[1., 2.], [3., 4.]]), jnp.array([1, 0, 7]), padding_idx=7).tolist()
      [[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]
    """
    check_order("embedding_lookup", table, ids)
    table, ids = jnp.asarray(table), as_ids("embedding_lookup", "ids", ids)
    check_table("embedding_lookup", table)
    check_mode("embedding_lookup", mode)
    safe, kept, outside = _resolve("embedding_lookup", ids, table.shape[0], padding_idx, mode)
    return _poison(gather_rows(table, safe), outside & kept, mode)


@other_names("embedding_bag", _OF_BAGS)
def embedding_bag(
    table: Any,
    ids: Any,
    *,
    offsets: Any = None,
    segment_ids: Any = None,
    num_bags: int | None = None,
    weights: Any = None,
    combiner: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    mode: str = "fill",
) -> jax.Array:
    """Combines the rows of each bag: out[b] = combine of w_i * table[ids_i] over the i in bag b.

    ==========  ======================================
    "sum"       sum(w e)
    "mean"      sum(w e) / sum(w), 0 where that is 0/0
    "sqrtn"     sum(w e) / sqrt(sum(w**2)), likewise
    "max"       max(e), column by column, NaN above all; takes no weights
    ==========  ======================================

    For equal elements, the gradient of "max" goes to the first. An empty bag is 0 for every combiner, without a
    gradient.

    Args:
      table: shape (num_rows, ...), floating.
      ids: integers, (B, L) padded, or (N,) with either `offsets` or `segment_ids`.
      offsets: integers (B,), not decreasing, the first of them 0. Bag b is ids[offsets[b]:offsets[b+1]]; the last bag
        ends with the ids. If the first offset is not 0, `mode` says what happens to every bag.
      segment_ids: integers (N,): the bag of each id; entries outside [0, num_bags) are left out.
      num_bags: the number of bags B, a Python int; required with segment_ids, and only there.
      weights: per-sample weights, the shape of ids.
      combiner: "sum", "mean", "sqrtn" or "max".
      padding_idx: ids equal to it are left out. Any integer, inside the table or not.
      include_last_offset: whether offsets has B + 1 entries, the last of which is the end of the last bag, as in torch.
      mode: what an id outside [0, num_rows) does to its bag. "fill" or "drop": the bag is NaN and has no gradient.
        "clip": the nearest row is taken. "promise_in_bounds": undefined.

    Returns:
      Shape (B, *table.shape[1:]), table's dtype. 16-bit tables are summed in float32.

    Raises:
      TypeError: if ids or padding_idx are not integers, or table or weights not floating.
      ValueError: if the layout's arguments contradict each other, or weights come with "max".

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> table = jnp.arange(1., 11.).reshape(5, 2)
      >>> ids, offsets = jnp.array([3, 1, 1, 1, 4, 0]), jnp.array([0, 0, 3, 3, 6])
      >>> js.embedding_bag(table, ids, offsets=offsets, combiner="sum").tolist()
      [[0.0, 0.0], [13.0, 16.0], [0.0, 0.0], [13.0, 16.0], [0.0, 0.0]]

    References:
      torch.nn.EmbeddingBag (layouts, max), tf.nn.embedding_lookup_sparse (mean, sqrtn).
    """
    f = "embedding_bag"
    check_order(f, table, ids)
    table, ids = jnp.asarray(table), as_ids(f, "ids", ids)
    check_table(f, table)
    check_choice(f, "combiner", combiner, _COMBINERS)
    check_mode(f, mode)
    if offsets is not None and segment_ids is not None:
        raise ValueError(message(f, "segment_ids", "None when offsets are given", "both", "Give one layout."))
    ragged = offsets is not None or segment_ids is not None
    if ragged and ids.ndim != 1:
        raise ValueError(message(f, "ids", "of shape (N,) with offsets or segment_ids", f"{ids.shape=}"))
    if not ragged and ids.ndim != 2:
        do = "One-dimensional ids need offsets= or segment_ids=; single ids without bags want js.embedding_lookup."
        raise ValueError(message(f, "ids", "of shape (B, L)", f"{ids.shape=}", do))
    if (num_bags is None) != (segment_ids is None):
        raise ValueError(message(f, "num_bags", "given with segment_ids, and only there", num_bags))
    if num_bags is not None and not (isinstance(num_bags, int | np.integer) and num_bags >= 0):
        do = "It is a shape, which cannot be traced: under jax.jit, make it static."
        raise ValueError(message(f, "num_bags", "a Python int, 0 or more", num_bags, do))
    if include_last_offset and offsets is None:
        raise ValueError(message(f, "include_last_offset", "False without offsets", include_last_offset))
    if weights is not None:
        if combiner == "max":
            raise ValueError(message(f, "weights", "None with combiner='max'", "weights", "Use sum, mean or sqrtn."))
        weights = jnp.asarray(weights)
        check_float(f, "weights", weights)
        if weights.shape != ids.shape:
            raise ValueError(message(f, "weights", f"of the shape of ids, {ids.shape}", f"{weights.shape=}"))

    bags: jax.Array | None = None
    has_ids_before_first: Any = False
    if offsets is not None:
        offsets = as_ids(f, "offsets", offsets)
        if offsets.ndim != 1 or (include_last_offset and offsets.shape[0] < 1):
            raise ValueError(
                message(f, "offsets", "of shape (B,), or (B + 1,) with include_last_offset", f"{offsets.shape=}")
            )
        num_bags = offsets.shape[0] - include_last_offset
        starts = at_least_int32(offsets)
        bags = jnp.cumsum(jnp.zeros(ids.shape, jnp.int32).at[starts].add(1, mode="drop")) - 1
        if num_bags:  # ids before the first offset are in no bag: a mistake
            has_ids_before_first = (offsets[0] != 0) & (ids.shape[0] > 0)
    elif segment_ids is not None:
        bags = segment_ids = as_ids(f, "segment_ids", segment_ids)
        if bags.shape != ids.shape:
            raise ValueError(message(f, "segment_ids", f"of the shape of ids, {ids.shape}", f"{segment_ids.shape=}"))

    safe, kept, outside = _resolve(f, ids, table.shape[0], padding_idx, mode)
    if bags is None:
        bad = jnp.any(outside & kept, axis=1)
        out = (
            _padded_max(table, safe, kept)
            if combiner == "max"
            else _combine(
                lambda w: padded_sum(table, safe, w), lambda w: jnp.sum(w, axis=1), weights, kept, combiner, table
            )
        )
    else:
        assert num_bags is not None
        bags = row_ids(bags, num_bags)
        kept &= bags < num_bags
        safe = jnp.where(kept, safe, table.shape[0])
        bad = jax.ops.segment_max((outside & kept).astype(jnp.int32), bags, num_segments=num_bags) > 0
        bad |= has_ids_before_first
        out = _segment_max(table, safe, kept, bags, num_bags) if combiner == "max" else _combine(
            lambda w: segment_sum(table, safe, w, bags, num_bags),
            lambda w: sum_by_bag(w, bags, num_bags), weights, kept, combiner, table,
        )  # fmt: skip
    return _poison(out, bad, mode)


def check_order(function: str, table: Any, ids: Any) -> None:
    """Raises TypeError for torch's order of arguments, the ids first."""
    first, second = getattr(table, "dtype", None), getattr(ids, "dtype", None)
    if first is None or second is None:
        return
    if jnp.issubdtype(first, jnp.integer) and jnp.issubdtype(second, jnp.floating):
        got, do = f"ids, {first}, and then a table, {second},", "torch has the ids first. Write (table, ids)."
        raise TypeError(message(function, "table", "the first one", got, do))


def check_mode(function: str, mode: str) -> None:
    """Raises ValueError for an unknown mode; for torch's mode= of EmbeddingBag it names combiner=."""
    if mode in _COMBINERS:
        do = f"torch's mode= is combiner= of js.embedding_bag: combiner={mode!r}."
        must = "one of " + ", ".join(map(repr, _MODES)) + ", what an id outside of the table reads"
        raise ValueError(message(function, "mode", must, repr(mode), do))
    check_choice(function, "mode", mode, _MODES)


def _resolve(
    function: str, ids: jax.Array, num_rows: int, padding_idx: Any, mode: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids as int32, with num_rows for ids that read nothing; whether each is not padding; whether each is outside)."""
    ids = at_least_int32(ids)
    kept = jnp.ones(ids.shape, bool)
    if padding_idx is not None:
        if not isinstance(padding_idx, int | np.integer | jax.Array):
            raise TypeError(message(function, "padding_idx", "an integer or None", repr(padding_idx)))
        limits = jnp.iinfo(ids.dtype)
        if isinstance(padding_idx, jax.Array) or limits.min <= padding_idx <= limits.max:  # else no id can equal it
            kept = ids != jnp.asarray(padding_idx, ids.dtype)
    outside = ~in_range(ids, num_rows)
    if mode == "clip":
        ids = jnp.clip(ids, 0, max(num_rows - 1, 0))
        outside = jnp.zeros_like(outside)
    return jnp.where(kept, row_ids(ids, num_rows), num_rows), kept, outside


def _poison(out: jax.Array, bad: jax.Array, mode: str) -> jax.Array:
    """NaN where an id was outside the table."""
    if mode not in ("fill", "drop"):
        return out
    return jnp.where(bad.reshape(bad.shape + (1,) * (out.ndim - bad.ndim)), jnp.nan, out)


def _wide(table: jax.Array) -> Any:
    return jnp.promote_types(table.dtype, jnp.float32)


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """x (n, ...) with trailing axes to broadcast against `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _combine(total: Any, count: Any, weights: Any, kept: jax.Array, combiner: str, table: jax.Array) -> jax.Array:
    """sum(w e), divided by sum(w) for "mean" and by sqrt(sum(w**2)) for "sqrtn"; 0/0 = 0 in value and gradient."""
    if weights is None:
        out, norm = total(None), None
        if combiner != "sum":
            norm = count(kept.astype(_wide(table)))
    else:
        w = jnp.where(kept, weights, 0).astype(_wide(table))
        out, norm = total(w), None
        if combiner != "sum":
            norm = count(w if combiner == "mean" else w * w)
    if norm is not None:
        zero = norm == 0
        norm = jnp.where(zero, 1, norm)
        # A division: times 1 / 41, the mean of 41 equal rows is not that row.
        quotient = out / _spread(jnp.sqrt(norm) if combiner == "sqrtn" else norm, out)
        out = jnp.where(_spread(zero, out), 0, quotient)
    return out.astype(table.dtype)


def padded_sum(table: jax.Array, ids: jax.Array, weights: jax.Array | None) -> jax.Array:
    """sum over l of weights[:, l] * table[ids[:, l]], ids in range or num_rows. (B, L) -> (B, ...), at least float32.

    A sum of L gathers is one pass over the batch; one (B, L, d) gather and a reduction is ten times slower on CPU.
    """
    wide, length = _wide(table), ids.shape[1]
    # a traced step or gradient without weights gets one gather; trace/row_reads.py makes L of it on CPU
    if not 0 < length <= _UNROLL or (is_tracing() and weights is None) or is_one_gather_per_bag():
        rows = gather_rows(table, ids).astype(wide)  # (B, L, ...)
        return jnp.sum(rows if weights is None else rows * _spread(weights, rows), axis=1)
    out = jnp.zeros((ids.shape[0], *table.shape[1:]), wide)
    for i in range(length):
        row = gather_rows(table, ids[:, i]).astype(wide)
        out = out + (row if weights is None else row * _spread(weights[:, i], row))
    return out


def segment_sum(
    table: jax.Array,
    ids: jax.Array,
    weights: jax.Array | None,
    bags: jax.Array,
    num_bags: int,
    *,
    ordered: bool = False,
) -> jax.Array:
    """sum over the i of each bag of weights[i] * table[ids[i]]. (N,) -> (num_bags, ...), at least float32."""
    rows = gather_rows(table, ids)
    rows = rows.astype(jnp.promote_types(_wide(table), rows.dtype if weights is None else weights.dtype))
    if weights is not None:
        rows = rows * _spread(weights, rows)
    return sum_by_bag(rows, bags, num_bags, ordered=ordered)


def sum_by_bag(x: jax.Array, bags: jax.Array, num_bags: int, *, ordered: bool = False) -> jax.Array:
    """out[b] = sum of x[i] over the i with bags[i] = b. (N, ...) -> (num_bags, ...)."""
    if num_bags == 0:  # JAX can scatter into nothing, but not differentiate it
        return jnp.zeros((0, *x.shape[1:]), x.dtype)
    return jax.ops.segment_sum(x, bags, num_segments=num_bags, indices_are_sorted=ordered)


def _padded_max(table: jax.Array, ids: jax.Array, kept: jax.Array) -> jax.Array:
    if ids.size == 0:  # zeros that are read from the table, so that its gradient is row-sparse for an empty batch too
        return padded_sum(table, ids, None).astype(table.dtype)
    rows = gather_rows(table, ids)  # (B, L, ...)
    values, real = jax.lax.stop_gradient(rows), _spread(kept, rows)
    top = jnp.max(jnp.where(real, values, -jnp.inf), axis=1, keepdims=True)
    wins = real & ((values == top) | jnp.isnan(values))  # never padding, not even where all the rest is -inf
    out = jnp.take_along_axis(rows, jnp.argmax(wins, axis=1, keepdims=True), axis=1)[:, 0]  # the first that wins
    return jnp.where(_spread(jnp.any(kept, axis=1), out), out, 0)


def _segment_max(table: jax.Array, ids: jax.Array, kept: jax.Array, bags: jax.Array, num_bags: int) -> jax.Array:
    n = ids.shape[0]
    if n == 0 or num_bags == 0:
        return jnp.zeros((num_bags, *table.shape[1:]), table.dtype)
    rows = gather_rows(table, ids)  # (N, ...)
    values = jax.lax.stop_gradient(rows)
    bags = jnp.where(kept, bags, num_bags)
    top = gather_rows(jax.ops.segment_max(values, bags, num_segments=num_bags), bags)
    wins = (values == top) | jnp.isnan(values)
    position = _spread(jnp.arange(n), rows)
    first = jax.ops.segment_min(jnp.where(wins, position, n), bags, num_segments=num_bags)  # (num_bags, ...)
    filled = jax.ops.segment_max(kept.astype(jnp.int32), bags, num_segments=num_bags) > 0
    out = jnp.take_along_axis(rows, jnp.clip(first, 0, n - 1), axis=0)
    return jnp.where(_spread(filled, out), out, 0)
