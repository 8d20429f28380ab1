"""`RowSparse`, the row-sparse gradient, and operations on it.

A loss that reads a few rows of a table has a gradient that is zero everywhere else. `RowSparse` keeps the rows that
were read: `rows[i]` is to be added to row `ids[i]` of an array of shape `shape`.

Conventions, in all modules:

* An id outside [0, num_rows) is padding: it names no row, and its entry in `rows` is ignored.
* Ids may repeat, and the repeats add up, unless `unique` says that they do not. A unique block pads its ids with
  num_rows, num_rows + 1, ..., because XLA's unique_indices forbids repeats among the padding too.

Arithmetic on row ids would silently select other rows: optimizers map over the leaves of gradients, and scale, clip,
average or cast them. So ids have an opaque dtype that arithmetic refuses. It is an "extended" dtype of JAX, made by the
extension point for PRNG implementations; jit, scan, cond, vmap, pmap and shard_map carry it. JAX's error messages print
the name of the dtype, or of the type in a mismatched tree, so both names say what to do. Only zeros_like accepts every
dtype; ids are stored with inverted bits, so that a zeroed id is -1, which is padding.
"""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO

from jaxsparse._checks import MAX_ROWS, as_ids, check_num_rows, message
from jaxsparse._jax import opaque_dtype, vary, varying_axes
from jaxsparse.ops.rows import compact, gather_rows, in_range, is_first, is_narrow, running_total, scatter_rows


def _not_a_key(*args: Any) -> Any:
    del args
    raise TypeError("The ids of a js.RowSparse are not random keys. Read them as integers: gradient.ids.")


_OPAQUE: Any = opaque_dtype(
    name="row_ids",
    tag="row ids of a js.RowSparse, not numbers: put the whole optax chain inside js.lazy(...), "
    "or use before=; a norm is js.global_norm; across devices use js.psum / js.pmean",
    refuse=_not_a_key,
)


def _seal(ids: jax.Array) -> jax.Array:
    """Ids in the opaque dtype: int32 (...,) -> opaque (...,)."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(~ids, jnp.uint32)[..., None], impl=_OPAQUE)


def _unseal(sealed: jax.Array) -> jax.Array:
    """Ids as integers: opaque (...,) -> int32 (...,)."""
    return ~jax.lax.bitcast_convert_type(jax.random.key_data(sealed)[..., 0], jnp.int32)


class _Advice(type):
    def __repr__(cls) -> str:
        return (
            f"<class 'jaxsparse.{cls.__name__}', a row-sparse gradient: put the whole optax chain inside js.lazy(...); "
            "in a map of your own, name the parameters first, jax.tree.map(f, params, grads)>"
        )


@jax.tree_util.register_pytree_with_keys_class
class RowSparse(metaclass=_Advice):
    """A row-sparse array: `rows[i]` adds to row `ids[i]`, every other row is zero.

    Args:
      ids: integers, shape (k,). Ids outside [0, num_rows) are padding.
      rows: shape (k, *shape[1:]), the parameter's dtype.
      shape: the dense shape, (num_rows, ...).
      unique: whether the ids, padding included, are known not to repeat.

    It can be added to a dense array of its shape, subtracted from one, and multiplied with and divided by a scalar.
    Under jax.vmap, as in `jax.vmap(js.grad(loss), (None, 0))`, `ids` and `rows` have leading axes, with one gradient
    for each example; `shape` is that of one gradient.

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
      >>> (jnp.ones((3, 1)) - 10 * g).tolist()
      [[1.0], [-1.0], [1.0]]
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

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{self} is no array. Its rows are g.rows, the dense array is g.todense().")

    def __getattr__(self, name: str) -> NoReturn:
        do = "It has ids, rows, shape and dtype, js.global_norm(g) is its norm, and g.todense() the dense array."
        raise AttributeError(f"A js.RowSparse has no {name!r}. {do}", name=name, obj=self)

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
        """The dense array, of shape `shape` after any axes of vmap. O(num_rows) memory: for tests and for printing."""
        if self.rows.ndim > self.ndim:
            return jax.vmap(RowSparse.todense)(self)
        return jnp.zeros(self.shape, self.dtype) + self

    def sum(self, axis: int = 0) -> RowSparse:
        """The sum over the leading axis of jax.vmap: the ids of all examples are concatenated.

        Example:
          >>> import jax, jax.numpy as jnp, jaxsparse as js
          >>> gradients = jax.vmap(js.grad(lambda t, i: jnp.sum(t[i])), (None, 0))
          >>> per_example = gradients(jnp.zeros((3, 1)), jnp.array([[0], [0]]))
          >>> per_example.todense().shape, per_example.sum(0).todense().ravel().tolist()
          ((2, 3, 1), [2.0, 0.0, 0.0])
        """
        if axis != 0 or self.rows.ndim != self.ndim + 1:
            got = f"axis={axis} of {self}"
            do = "Norms and other sums are over g.rows, where ids are unique, or over g.todense()."
            raise ValueError(message("RowSparse.sum", "axis", "0, the axis of examples under jax.vmap", got, do))
        return RowSparse(self.ids.reshape(-1), self.rows.reshape(-1, *self.shape[1:]), self.shape)

    def to_bcoo(self) -> BCOO:
        """A BCOO with one sparse dimension. Padding is as in BCOO: index = num_rows, data = 0."""
        g = coalesce(self) if is_narrow(self.dtype) else self  # BCOO sums repeated ids in their own dtype
        ids, rows = g.ids, _without_padding(g)
        real = in_range(ids, self.num_rows)
        return BCOO((rows, jnp.where(real, ids, self.num_rows)[:, None]), shape=self.shape)

    @classmethod
    def from_bcoo(cls, x: BCOO) -> RowSparse:
        """A RowSparse from a BCOO with n_batch = 0 and n_sparse = 1.

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

        If self has the wider dtype (float32 updates of a bfloat16 table), the sum is computed in that dtype and cast
        once, as in optax.apply_updates; casting the update first would round twice. Repeated ids of 16-bit types are
        summed in float32.
        """
        dense = jnp.asarray(dense)
        _check_no_examples(self)
        if dense.shape != self.shape:
            raise ValueError(message("RowSparse.__radd__", "dense", f"of shape {self.shape}", dense.shape))
        if jnp.promote_types(dense.dtype, self.dtype) == dense.dtype and (self.unique or not is_narrow(dense.dtype)):
            rows = self.rows.astype(dense.dtype)
            return dense.at[self.ids].add(rows, mode="drop", unique_indices=self.unique, wrap_negative_indices=False)
        block = coalesce(self)
        return scatter_rows(dense, block.ids, (gather_rows(dense, block.ids) + block.rows).astype(dense.dtype))

    def __add__(self, other: Any) -> Any:
        """self + other: another RowSparse of this shape (their ids are concatenated), or a dense array."""
        if not isinstance(other, RowSparse):
            return self.__radd__(other)
        if other.shape != self.shape:
            raise ValueError(message("RowSparse.__add__", "other", f"of shape {self.shape}", other.shape))
        _check_no_examples(self)
        _check_no_examples(other)
        return concatenate_blocks([self, other])

    def __mul__(self, factor: Any) -> RowSparse:
        """self * factor for a scalar factor. factor * self, self / factor and -self work too."""
        return self._scaled(jnp.multiply, factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> RowSparse:
        return self._scaled(jnp.divide, factor)

    def __neg__(self) -> RowSparse:
        return self * -1

    def __rsub__(self, dense: Any) -> jax.Array:
        return dense + -self

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def _scaled(self, operator: Any, factor: Any) -> RowSparse:
        if isinstance(factor, RowSparse) or jnp.ndim(factor):
            got = f"{factor!r}" if isinstance(factor, RowSparse) else f"an array of shape {jnp.shape(factor)}"
            do = "Put the whole optax chain inside js.lazy(...), or work on g.rows."
            raise TypeError(message("RowSparse.__mul__", "factor", "a scalar", got, do))
        out = object.__new__(RowSparse)
        out._ids, out.rows, out.shape, out.unique = self._ids, operator(self.rows, factor), self.shape, self.unique
        return out


def is_row_sparse(x: object) -> bool:
    """Whether `x` is a RowSparse: the is_leaf= of tree maps over gradients."""
    return isinstance(x, RowSparse)


def _without_padding(g: RowSparse) -> jax.Array:
    """g.rows, zero where an id is padding."""
    real = in_range(g.ids, g.num_rows)
    return jnp.where(real.reshape(real.shape + (1,) * (g.ndim - 1)), g.rows, 0)


def _check_no_examples(g: RowSparse) -> None:
    if g.rows.ndim != g.ndim:
        do = "Add them up with g.sum(0), or make them dense with g.todense()."
        raise ValueError(message("RowSparse", "rows", "one gradient", f"one for each example: {g}", do))


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares: optax.tree.norm for gradients with RowSparse leaves.

    Args:
      tree: arrays and RowSparse.

    Returns:
      A real scalar, in float32 or wider. Under jax.vmap, one for each example.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> g = js.RowSparse(jnp.array([1, 1, 3]), jnp.array([[1.], [2.], [5.]]), shape=(3, 1))  # 3 is padding
      >>> js.global_norm({"t": g, "w": jnp.array([4.])}).item()
      5.0

    optax.tree.norm would square the ids, so it raises: under jax.jit with this advice, otherwise with "Cannot call
    abstract method real".
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_row_sparse)
    arrays = [jnp.asarray(_without_padding(coalesce(x)) if is_row_sparse(x) else x) for x in leaves]
    return optax.tree.norm([x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays])


def concatenate_blocks(blocks: list[RowSparse]) -> RowSparse:
    """The sum of several RowSparse of one shape, with concatenated ids (k1 + k2 + ...,)."""
    if len(blocks) == 1:
        return blocks[0]
    return RowSparse(
        jnp.concatenate([b.ids for b in blocks]),
        jnp.concatenate([b.rows for b in blocks]),
        blocks[0].shape,
    )


def coalesce(g: RowSparse) -> RowSparse:
    """Sums the rows of repeated ids: a RowSparse with sorted unique ids and min(k, num_rows) rows.

    16-bit rows are summed in float32. A GPU sums repeated ids in any order, unless XLA_FLAGS has
    --xla_gpu_deterministic_ops=true.
    """
    _check_no_examples(g)
    if g.unique:
        return g
    if not min(g.ids.shape[0], g.num_rows):  # no ids, or no rows that they could name
        return RowSparse(g.ids[:0], g.rows[:0], g.shape, unique=True)
    unique, place = _ranked(g.ids, g.num_rows)
    rows = g.rows.astype(jnp.promote_types(g.dtype, jnp.float32))
    sums = jax.ops.segment_sum(rows, place, num_segments=unique.shape[0])
    return RowSparse(unique, sums.astype(g.dtype), g.shape, unique=True)


def sum_of_devices(ids: jax.Array, rows: jax.Array, shape: tuple[int, ...]) -> RowSparse:
    """The sum of blocks of unique ids, int32 (n, k), with rows (n, k, ...): a RowSparse with sorted unique ids.

    One block is added after another. So a GPU, which sums repeated ids in any order, gets the same bits each time.
    """
    n, k = ids.shape
    if not min(n * k, shape[0]):
        return RowSparse(ids[0], rows[0], shape, unique=True)
    unique, place = _ranked(ids.reshape(n * k), shape[0])
    size = unique.shape[0]
    place = place.reshape(n, k)
    place = jnp.where(place < size, place, size + jnp.arange(k, dtype=jnp.int32))
    wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))

    def add(i: jax.Array, sums: jax.Array) -> jax.Array:
        return sums.at[place[i]].add(wide[i], mode="drop", unique_indices=True, wrap_negative_indices=False)

    zeros = vary(jnp.zeros((size, *rows.shape[2:]), wide.dtype), varying_axes(wide))
    sums = jax.lax.fori_loop(0, n, add, zeros)
    return RowSparse(unique, sums.astype(rows.dtype), shape, unique=True)


def _ranked(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """(the sorted distinct rows that ids (k,) name, the position of each id among them).

    The rows are int32 (size,), size = min(k, num_rows), padded with num_rows, num_rows + 1, ... The positions are int32
    (k,), `size` for ids that name no row.
    """
    size, real = min(ids.shape[0], num_rows), in_range(ids, num_rows)
    order = jnp.argsort(jnp.where(real, ids, num_rows), stable=True)
    ordered = jnp.where(real, ids, num_rows)[order]
    new = is_first(ordered, num_rows)
    rank = jnp.zeros_like(order, jnp.int32).at[order].set(running_total(new.astype(jnp.int32)) - 1)
    return compact(ordered, new, num_rows, size), jnp.where(real, rank, size)
