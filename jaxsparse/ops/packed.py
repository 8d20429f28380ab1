"""Tables of narrow rows, stored for TPU: several rows side by side in one packed row of 128 columns.

A TPU keeps an array in tiles of 128 columns. XLA stores a table (num_rows, d) by columns if d is no multiple of 128,
and then copies all of it to read or write some of its rows. A packed table is read and written by packed rows; a write
changes only the columns of the rows in question. Arrays (num_rows,) need no packing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from jaxsparse.ops.rows import Storage, distinct_rows, gather_rows, in_range, scatter_rows

LANES = 128  # columns of a tile


@jax.tree_util.register_pytree_with_keys_class
class Packed(Storage):
    """An array (num_rows, d, ...) that `js.pack` has packed. It is a pytree with one leaf, and `np.asarray` unpacks it.

    Attributes:
      data: (packed rows, a multiple of 128). Row i is in packed row i // k, which holds k rows side by side.
      shape, dtype, ndim, size: of the array.
    """

    def __init__(self, data: Any, shape: Sequence[int]) -> None:
        self.data, self.shape = data, tuple(shape)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[int, ...]]:
        return ((jax.tree_util.GetAttrKey("data"), self.data),), self.shape

    @classmethod
    def tree_unflatten(cls, shape: tuple[int, ...], children: Any) -> Packed:
        (data,) = children
        return cls(data, shape)

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def sharding(self) -> Any:
        return self.data.sharding

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        k, width, _ = _layout(self.shape)
        rows = np.asarray(self.data)[:, : k * width].reshape(-1, *self.shape[1:])[: self.shape[0]]
        return np.array(rows, dtype) if copy else np.asarray(rows, dtype)

    def __repr__(self) -> str:
        return f"Packed({getattr(self.dtype, 'name', self.dtype)}{list(self.shape)})"

    def rows(self, ids: jax.Array) -> jax.Array:
        k, width, _ = _layout(self.shape)
        if k == 1:
            return gather_rows(self.data, ids)[:, :width].reshape(*ids.shape, *self.shape[1:])
        packed = gather_rows(self.data, self._packed_ids(ids))
        words = jnp.where(self._is_lane(ids), self._words(packed), 0)
        if width > 1:
            words = words[:, : k * width].reshape(-1, k, width)
        rows = jax.lax.bitcast_convert_type(jax.lax.reduce_or(words, (1,)), self.dtype)
        return rows.reshape(*ids.shape, *self.shape[1:])

    def with_rows(self, ids: jax.Array, rows: jax.Array, read_at: jax.Array | None = None) -> Packed:
        k, width, columns = _layout(self.shape)
        rows = rows.reshape(-1, width)
        if k == 1:
            rows = jnp.pad(rows, ((0, 0), (0, columns - width)))
            return Packed(scatter_rows(self.data, ids, rows), self.shape)
        n, num_packed = ids.shape[0], self.data.shape[0]
        packed_ids, each = self._packed_ids(ids), jnp.arange(n, dtype=jnp.int32)
        at = _firsts(packed_ids, num_packed)
        is_lane = self._is_lane(ids)
        words = self._words(rows)  # which are added to 0, so that a row keeps its bits
        words = jnp.broadcast_to(words, (n, columns)) if width == 1 else jnp.tile(words, (1, k))
        words = jnp.where(is_lane, jnp.pad(words, ((0, 0), (0, columns - words.shape[1]))), 0)
        words = jnp.zeros((n, columns), words.dtype).at[at].add(words, mode="drop")
        changed = jnp.zeros((n, columns), jnp.int8).at[at].add(is_lane.astype(jnp.int8), mode="drop") > 0
        # the gather of `rows`, which XLA makes once
        old = gather_rows(self.data, packed_ids if read_at is None else self._packed_ids(read_at))
        new = jnp.where(changed, jax.lax.bitcast_convert_type(words, self.dtype), old)
        unique = jnp.where(at == each, packed_ids, num_packed + each)
        return Packed(scatter_rows(self.data, unique, new), self.shape)

    def whole(self) -> jax.Array:
        k, width, _ = _layout(self.shape)
        return self.data[:, : k * width].reshape(-1, *self.shape[1:])[: self.shape[0]]

    def of(self, array: Any) -> Packed:
        return pack_array(array)

    def _packed_ids(self, ids: jax.Array) -> jax.Array:
        """The packed row of each id, int32; the number of packed rows for ids that name no row."""
        k, _, _ = _layout(self.shape)
        return jnp.where(in_range(ids, self.shape[0]), ids // k, self.data.shape[0])

    def _words(self, rows: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(rows, jnp.dtype(f"int{8 * self.dtype.itemsize}"))

    def _is_lane(self, ids: jax.Array) -> jax.Array:
        """Which columns of its packed row each row has: bool (n, columns)."""
        k, width, columns = _layout(self.shape)
        return jnp.arange(columns)[None] // width == (ids % k)[:, None]


def pack_array(x: Any) -> Packed:
    """An array (num_rows, ...), or an abstract one, packed."""
    k, _, columns = _layout(x.shape)
    num_packed = -(-x.shape[0] // k)
    if isinstance(x, jax.ShapeDtypeStruct):
        return Packed(jax.ShapeDtypeStruct((num_packed, columns), x.dtype, sharding=x.sharding), x.shape)
    return Packed(_packed(jnp.asarray(x)), x.shape)


def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def is_narrow(x: Any) -> bool:
    """Whether an array is one that XLA copies whole on TPU to read or write some of its rows."""
    shape = getattr(x, "shape", ())
    if is_packed(x) or len(shape) < 2 or 0 in shape or not hasattr(x, "dtype"):
        return False
    whole_words = jnp.issubdtype(x.dtype, jnp.number) and jax.dtypes.itemsize_bits(x.dtype) in (8, 16, 32)
    return whole_words and math.prod(shape[1:]) % LANES != 0


def _layout(shape: Sequence[int]) -> tuple[int, int, int]:
    """How many rows are packed into one, how many numbers a row has, and how many columns a packed one."""
    width = math.prod(shape[1:])
    return max(LANES // width, 1), width, -(-width // LANES) * LANES


@jax.jit
def _packed(x: jax.Array) -> jax.Array:
    k, width, columns = _layout(x.shape)
    x = jnp.pad(x.reshape(x.shape[0], width), ((0, -x.shape[0] % k), (0, 0)))
    x = x.reshape(-1, k * width)
    return jnp.pad(x, ((0, 0), (0, columns - k * width)))


@jax.jit
def unpack_array(x: Packed) -> jax.Array:
    return x.whole()


def _firsts(ids: jax.Array, num_rows: int) -> jax.Array:
    """For each of some ids that are mostly sorted, the position of one that is equal to it, the same for all equal
    ones: int32 (n,), n for ids that name no row."""
    n = ids.shape[0]
    is_real, each = in_range(ids, num_rows), jnp.arange(n, dtype=jnp.int32)

    def in_order() -> jax.Array:
        is_first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
        return jnp.where(is_real, jax.lax.cummax(jnp.where(is_first, each, 0)), n)

    def in_any_order() -> jax.Array:
        _, at = distinct_rows(ids, num_rows, n)
        first = jnp.full(n, n, jnp.int32).at[at].min(each, mode="drop")
        return jnp.where(is_real, first.at[at].get(mode="clip"), n)

    return jax.lax.cond(jnp.all(ids[1:] >= ids[:-1]), in_order, in_any_order)


serialization.register_serialization_state(
    Packed, unpack_array, lambda x, state: pack_array(jnp.asarray(state, x.dtype))
)
