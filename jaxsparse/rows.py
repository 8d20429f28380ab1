"""`RowSparse`, the row-sparse gradient, and the four things one does with it.

A loss that reads a few rows of a table has a gradient that is zero everywhere else. `RowSparse` keeps the rows that
were read: `rows[i]` is to be added to row `ids[i]` of an array of shape `shape`.

Conventions, here and everywhere downstream:

* An id outside [0, num_rows) is padding: it stands for no row, whatever `rows` holds beside it.
* Ids may repeat, and the repeats add up, unless `unique` says that they do not. A unique block pads its ids with
  num_rows, num_rows + 1, ..., because XLA's unique_indices forbids repeats among the padding too.

Ids are not numbers. Optimizers map over the leaves of gradients, and a map that scales, clips, averages or casts an
id moves the gradient to another row in silence. So ids are stored under an opaque dtype which arithmetic refuses (an
"extended" dtype of JAX, made by its own extension point for PRNG implementations: it is the public way to such a dtype,
and jit, scan, cond, vmap, pmap and shard_map carry it). The dtype's name is the advice that the refusal prints. The one
map that no dtype refuses is zeros_like; the words are stored inverted, so that a zeroed word is id -1, which is
padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxsparse._checks import MAX_ROWS, as_ids, check_num_rows, message
from jaxsparse._jax import is_traced, opaque_dtype, vary, varying_axes


def _not_a_key(*args: Any) -> Any:
    del args
    raise TypeError("The ids of a js.RowSparse are not random keys. Read them as integers: gradient.ids.")


_OPAQUE: Any = opaque_dtype(
    name="row_ids",
    tag="row ids of a js.RowSparse, not numbers: put the whole optax chain inside js.lazy(...), "
    "or use before=; across devices use js.psum / js.pmean",
    refuse=_not_a_key,
)


def _seal(ids: jax.Array) -> jax.Array:
    """int32 (...,) -> opaque (...,)."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(~ids, jnp.uint32)[..., None], impl=_OPAQUE)


def _unseal(sealed: jax.Array) -> jax.Array:
    """opaque (...,) -> int32 (...,)."""
    return ~jax.lax.bitcast_convert_type(jax.random.key_data(sealed)[..., 0], jnp.int32)


@jax.tree_util.register_pytree_with_keys_class
class RowSparse:
    """A row-sparse array: `rows[i]` adds to row `ids[i]`, every other row is zero.

    Args:
      ids: integers, shape (k,). Ids outside [0, num_rows) are padding.
      rows: shape (k, *shape[1:]), the parameter's dtype.
      shape: the dense shape, (num_rows, ...).
      unique: whether the ids, padding included, are known not to repeat.

    Raises:
      TypeError: if `ids` are not integers.
      ValueError: if the shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> g = js.RowSparse(jnp.array([1, 1, 3]), jnp.array([[.1], [.1], [5.]]), shape=(3, 1))
      >>> g                          # id 3 is padding
      RowSparse(ids=int32[3], rows=float32[3,1], shape=(3, 1))
      >>> g.todense().tolist()
      [[0.0], [0.20000000298023224], [0.0]]
      >>> (jnp.ones((3, 1)) + g).tolist()
      [[1.0], [1.2000000476837158], [1.0]]
    """

    __array_ufunc__ = None  # so that numpy_array + row_sparse reaches __radd__ instead of an object array

    def __init__(self, ids: Any, rows: Any, shape: tuple[int, ...], *, unique: bool = False) -> None:
        ids, rows = as_ids("RowSparse", "ids", ids), jnp.asarray(rows)
        if ids.ndim != 1 or rows.shape != ids.shape + tuple(shape[1:]):
            raise ValueError(
                message(
                    "RowSparse",
                    "rows",
                    f"of shape (k, {', '.join(map(str, shape[1:]))}) for ids (k,)",
                    f"{ids.shape=}, {rows.shape=}",
                )
            )
        check_num_rows("RowSparse", "shape", shape[0] + ids.shape[0])
        if ids.dtype.itemsize > 4 or ids.dtype == jnp.uint32:  # a wide id must not wrap round into a real row
            ids = jnp.where((ids >= 0) & (ids < MAX_ROWS), ids, shape[0])
        self._ids = _seal(ids.astype(jnp.int32))
        self.rows = rows
        self.shape = tuple(shape)
        self.unique = unique

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        children = ((jax.tree_util.GetAttrKey("ids"), self._ids), (jax.tree_util.GetAttrKey("rows"), self.rows))
        return children, (self.shape, self.unique)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> RowSparse:
        self = object.__new__(cls)
        self._ids, self.rows = children
        self.shape, self.unique = aux
        return self

    @property
    def ids(self) -> jax.Array:
        """The row ids as integers: int32, shape (k,)."""
        return _unseal(self._ids)

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        def short(x: Any) -> str:
            return f"{x.dtype}[{','.join(map(str, x.shape))}]" if hasattr(x, "dtype") else repr(x)

        ids = f"int32[{','.join(map(str, self._ids.shape))}]" if hasattr(self._ids, "shape") else repr(self._ids)
        return (
            f"RowSparse(ids={ids}, rows={short(self.rows)}, shape={self.shape}{', unique=True' if self.unique else ''})"
        )

    def todense(self) -> jax.Array:
        """The dense array, shape `shape`: O(num_rows) memory, for tests and for looking."""
        return jnp.zeros(self.shape, self.dtype) + self

    def to_bcoo(self) -> BCOO:
        """As a BCOO with one sparse dimension; padding keeps BCOO's contract (index = num_rows, data = 0)."""
        ids = self.ids
        real = in_range(ids, self.num_rows)
        rows = jnp.where(real.reshape(real.shape + (1,) * (self.ndim - 1)), self.rows, 0)
        return BCOO((rows, jnp.where(real, ids, self.num_rows)[:, None]), shape=self.shape)

    @classmethod
    def from_bcoo(cls, x: BCOO) -> RowSparse:
        """Of a BCOO with n_batch = 0 and n_sparse = 1.

        Raises:
          ValueError: for any other BCOO layout.
        """
        if x.n_batch != 0 or x.n_sparse != 1:
            raise ValueError(
                message(
                    "RowSparse.from_bcoo",
                    "x",
                    "a BCOO with n_batch=0 and n_sparse=1",
                    f"n_batch={x.n_batch}, n_sparse={x.n_sparse}",
                )
            )
        return cls(x.indices[:, 0], x.data, x.shape)

    def __radd__(self, dense: Any) -> jax.Array:
        """dense + self, in dense's dtype: what `optax.apply_updates` calls. O(k) when `dense` is donated.

        Where self is the wider type (float32 updates of a bfloat16 table), the sum is made in self's dtype and cast
        once, as optax.apply_updates does; casting the update first would round twice.
        """
        dense = jnp.asarray(dense)
        if dense.shape != self.shape:
            raise ValueError(message("RowSparse.__radd__", "dense", f"of shape {self.shape}", dense.shape))
        if jnp.promote_types(dense.dtype, self.dtype) == dense.dtype:
            rows = self.rows.astype(dense.dtype)
            return dense.at[self.ids].add(rows, mode="drop", unique_indices=self.unique, wrap_negative_indices=False)
        block = coalesce(self)
        return scatter_rows(dense, block.ids, (gather_rows(dense, block.ids) + block.rows).astype(dense.dtype))

    def __add__(self, other: Any) -> Any:
        """self + other: another RowSparse of this shape (the ids are put end to end), or a dense array."""
        if not isinstance(other, RowSparse):
            return self.__radd__(other)
        if other.shape != self.shape:
            raise ValueError(message("RowSparse.__add__", "other", f"of shape {self.shape}", other.shape))
        return concatenate_blocks([self, other])


def is_row_sparse(x: object) -> bool:
    """Whether `x` is a RowSparse: the is_leaf of every tree map here."""
    return isinstance(x, RowSparse)


def at_least_int32(ids: jax.Array) -> jax.Array:
    """Ids to compare with the sizes of arrays, which int8 would wrap."""
    return ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)


def row_ids(ids: jax.Array, num_rows: int) -> jax.Array:
    """Ids of any integer type as int32, every id outside [0, num_rows) as num_rows: padding."""
    ids = at_least_int32(ids)
    return jnp.where(in_range(ids, num_rows), ids, num_rows).astype(jnp.int32)


def in_range(ids: jax.Array, num_rows: int) -> jax.Array:
    """Which ids stand for a row: bool, the shape of ids."""
    return (ids >= 0) & (ids < num_rows)


def concatenate_blocks(blocks: list[RowSparse]) -> RowSparse:
    """The sum of several RowSparse of one shape, their ids put end to end: ids (k1 + k2 + ...,)."""
    if len(blocks) == 1:
        return blocks[0]
    return RowSparse(
        jnp.concatenate([b.ids for b in blocks]),
        jnp.concatenate([b.rows for b in blocks]),
        blocks[0].shape,
    )


def scale(g: RowSparse, factor: Any) -> RowSparse:
    """g with its rows multiplied by a scalar."""
    rows = (g.rows * factor).astype(g.dtype)
    return RowSparse(g.ids, rows, g.shape, unique=g.unique)


def gather_rows(x: jax.Array, ids: jax.Array) -> jax.Array:
    """x[ids], zero where an id is padding. x (num_rows, ...), ids (k,) -> (k, ...)."""
    if x.shape[0] == 0:  # XLA refuses to gather from nothing
        return jnp.zeros(ids.shape + x.shape[1:], x.dtype)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(ids.ndim, ids.ndim + x.ndim - 1)), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    # no indexing, which has nothing to do with x where there are no ids
    return jax.lax.gather(x, ids[..., None], numbers, (1, *x.shape[1:]), mode="fill", fill_value=0)


def copy_rows(x: jax.Array, ids: jax.Array) -> jax.Array:
    """gather_rows, not to be differentiated, for rows that nothing else is computed from in the same loop.

    XLA's CPU backend makes a plain copy of rows 4 bytes at a time; what it has to calculate with, it loads in vectors,
    which is two to three times as fast. So every word is or-ed with n (n + 1) % 2, which XLA does not know to be 0.
    """
    rows = gather_rows(x, ids)
    simple = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    if jax.default_backend() != "cpu" or not simple or rows.dtype.itemsize not in (2, 4, 8):
        return rows
    word = jnp.dtype(f"int{8 * rows.dtype.itemsize}")
    zero = (ids * (ids + 1) & 1).astype(word).reshape(ids.shape + (1,) * (rows.ndim - 1))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(rows, word) | zero, x.dtype)


def computed_once(
    make: Callable[[], list[jax.Array]], always: jax.Array, axes: Sequence[Iterable[Any]] = ()
) -> list[jax.Array]:
    """make(), computed here and in one piece. `always` is a traced bool that is true; where it is not, zeros. `axes`:
    the mapped axes that each array varies over, as far as shard_map checks that.

    On CPU, XLA takes a gather apart from what is done with its rows if there is more than one use of that, and does it
    over again for each use. It cannot look through a cond.
    """
    if jax.default_backend() != "cpu" or not is_traced(always):
        return make()

    def zeros() -> list[jax.Array]:
        out = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(make)]
        return [vary(x, over) for x, over in itertools.zip_longest(out, axes, fillvalue=())]

    return jax.lax.cond(always, make, zeros)


def scatter_rows(x: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """x with rows written at the unique `ids`, padding left out. In place when x is donated."""
    return x.at[ids].set(rows, mode="drop", unique_indices=True, wrap_negative_indices=False)


def zero_after(*arrays: jax.Array) -> jax.Array:
    """The integer 0, int32 (), made to depend on these arrays.

    What is added to it happens after they are there, for XLA as for us. Where an array is donated, read, and then
    written at places or with values that do not depend on what was read, XLA copies it to be safe, and it drops
    optimization barriers before it decides that. So the order is put into the data: a 32-bit word has at most 32 ones,
    and XLA does not know.
    """
    total = sum((jnp.sum(jnp.real(x)).astype(jnp.float32) for x in arrays), jnp.float32(0))
    return jax.lax.population_count(jax.lax.bitcast_convert_type(total, jnp.int32)) >> 6


def coalesce(g: RowSparse) -> RowSparse:
    """Adds up the rows of repeated ids: a RowSparse with unique ids in order, of min(k, num_rows) rows.

    Sums of 16-bit rows are made in float32. The result is a function of ids and rows alone, the same on every replica.
    """
    if g.unique:
        return g
    ids, num_rows, k = g.ids, g.num_rows, g.ids.shape[0]
    size = min(k, num_rows)
    if not size:  # no ids, or no rows that they could name
        return RowSparse(ids[:0], g.rows[:0], g.shape, unique=True)
    real = in_range(ids, num_rows)
    order = jnp.argsort(jnp.where(real, ids, num_rows), stable=True)
    ordered = jnp.where(real, ids, num_rows)[order]
    new = is_first(ordered, num_rows)
    rank = jnp.zeros_like(order, jnp.int32).at[order].set(_running_total(new.astype(jnp.int32)) - 1)
    rows = g.rows.astype(jnp.promote_types(g.dtype, jnp.float32))
    sums = jax.ops.segment_sum(rows, jnp.where(real, rank, size), num_segments=size)
    return RowSparse(compact(ordered, new, num_rows, size), sums.astype(g.dtype), g.shape, unique=True)


def distinct_rows(ids: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The distinct rows that ids name, and where each id is among them.

    Args:
      ids: int32 (k,), k > 0; outside [0, num_rows) they are no row.
      size: how many distinct ones there is room for, all of them.

    Returns:
      int32 (size,), padded with num_rows, num_rows + 1, ...: in no order on CPU, where sorting is slow; and int32 (k,),
      `size` for what is no row.
    """

    def by_sorting() -> tuple[jax.Array, jax.Array]:
        ordered = jnp.sort(jnp.where(in_range(ids, num_rows), ids, num_rows))
        unique = compact(ordered, is_first(ordered, num_rows), num_rows, size)
        return unique, look_up(unique, ids, num_rows)

    return jax.lax.platform_dependent(cpu=lambda: _distinct_by_hash(ids, num_rows, size), default=by_sorting)


def look_up(unique: jax.Array, ids: jax.Array, num_rows: int) -> jax.Array:
    """Where ids (k,) are among `unique` (n,), which has them all, in order: int32 (k,), n for what is no row."""
    at = jnp.searchsorted(unique, ids, method="scan_unrolled").astype(jnp.int32)
    return jnp.where(in_range(ids, num_rows), at, unique.shape[0])


def _distinct_by_hash(ids: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Each id writes its place into a bucket of its own, and reads back which of equal ids was the last. Ids of
    different rows in one bucket are told apart by reading the id there; the losers go on with another hash, until there
    are none: two or three turns with eight buckets an id."""
    k = ids.shape[0]
    bits = max((8 * k - 1).bit_length(), 4)
    place, real = jnp.arange(k, dtype=jnp.int32), in_range(ids, num_rows)

    def turn(state: Any) -> Any:
        number, same_as, left = state
        factor = jnp.uint32(2654435769) * (2 * number.astype(jnp.uint32) + 1)  # odd
        bucket = jax.lax.shift_right_logical(ids.astype(jnp.uint32) * factor, jnp.uint32(32 - bits)).astype(jnp.int32)
        last = jnp.zeros(1 << bits, jnp.int32).at[jnp.where(left, bucket, 1 << bits)].set(place, mode="drop")
        last = last.at[bucket].get(mode="promise_in_bounds")
        found = left & (ids.at[last].get(mode="promise_in_bounds") == ids)
        return number + 1, jnp.where(found, last, same_as), left & ~found

    start = jnp.int32(0), vary(place, varying_axes(ids)), real
    _, same_as, _ = jax.lax.while_loop(lambda state: jnp.any(state[2]), turn, start)
    chosen = real & (same_as == place)
    unique, slot = compact_with_slots(ids, chosen, num_rows, size)
    return unique, jnp.where(real, slot.at[same_as].get(mode="promise_in_bounds"), size)


def is_first(ordered: jax.Array, num_rows: int) -> jax.Array:
    """Which of some ids in order are those of rows, and not repeated: bool (k,)."""
    return (ordered < num_rows) & jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])


def compact(ids: jax.Array, chosen: jax.Array, num_rows: int, size: int) -> jax.Array:
    """The chosen ids in their order, at most `size` of them, padded to (size,) with num_rows, num_rows + 1, ..."""
    return compact_with_slots(ids, chosen, num_rows, size)[0]


def compact_with_slots(ids: jax.Array, chosen: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The chosen ids as of `compact`, and where in it each of them is."""
    slot = _running_total(chosen.astype(jnp.int32)) - 1
    padding = num_rows + jnp.arange(size, dtype=jnp.int32)
    return padding.at[jnp.where(chosen, slot, size)].set(ids, mode="drop"), slot


def _running_total(x: jax.Array) -> jax.Array:
    """cumsum of (k,), in pieces: where x is split over a mesh, XLA would slide one window of k over all of it."""
    k, piece = x.shape[0], 16
    if k <= piece:
        return jnp.cumsum(x)
    within = jnp.cumsum(jnp.pad(x, (0, -k % piece)).reshape(-1, piece), axis=1)
    before = _running_total(within[:, -1]) - within[:, -1]
    return (within + before[:, None]).reshape(-1)[:k]
