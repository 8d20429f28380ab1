"""Pure functions of BCOO batches: dot, sum, mean, concatenate. They also accept dense arrays.

Padding is as in BCOO: an entry whose index equals the dimension's size is padding, with data 0. Here an entry with any
index out of range is padding too, whatever its data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxsparse._checks import MAX_ROWS, check_bcoo, check_float, message
from jaxsparse.ops.embedding import segment_sum, sum_by_bag
from jaxsparse.ops.row_sparse import is_row_sparse
from jaxsparse.ops.rows import at_least_int32, in_range


def dot(x: Any, w: Any) -> jax.Array:
    """The product x @ w of a sparse input and a dense weight: out[i] = sum_j x[i, j] w[j].

    The gradient with respect to w has non-zero rows only at x's column ids, and js.value_and_grad keeps it that way;
    the gradient with respect to x.data is <g[i], w[j]> at x's entries only.

    Args:
      x: BCOO (n, m) or (m,), or a dense array, for which this is jnp.tensordot(x, w, axes=1).
      w: dense, shape (m,) or (m, ...).

    Returns:
      Shape x.shape[:-1] + w.shape[1:], dtype the promotion of x's and w's. 16-bit products are summed in float32.

    Raises:
      TypeError: if x is neither BCOO nor dense, or w is not a dense floating array.
      ValueError: if the inner dimensions differ, or the BCOO has batch or dense dimensions.

    Example:
      >>> import numpy as np, scipy.sparse, jax.numpy as jnp, jaxsparse as js
      >>> x = js.from_scipy(scipy.sparse.csr_matrix(np.array([[0., 2., 0.], [1., 0., 0.]])))
      >>> js.dot(x, jnp.array([[1., 10.], [2., 20.], [3., 30.]])).tolist()
      [[4.0, 40.0], [1.0, 10.0]]
    """
    if not _is_dense(w):
        raise TypeError(message("dot", "w", "a dense array", type(w).__name__, "Only x may be sparse."))
    w = jnp.asarray(w)
    if _is_dense(x):
        x = jnp.asarray(x)
    else:
        check_bcoo("dot", "x", x, (1, 2))
        check_float("dot", "w", w)
    if w.ndim < 1 or w.shape[:1] != x.shape[-1:]:
        raise ValueError(message("dot", "w", f"of shape (x.shape[-1], ...) for {x.shape=}", f"{w.shape=}"))
    if not isinstance(x, BCOO):
        return jnp.tensordot(x, w, axes=1)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    num_out, num_rows = x.shape[0] if x.ndim == 2 else 1, w.shape[0]
    rows = at_least_int32(x.indices[:, 0]) if x.ndim == 2 else jnp.zeros(x.nse, jnp.int32)
    by_axis, real = _real_entries(x.indices, x.shape)
    cols = jnp.where(real, by_axis[-1], num_rows).astype(jnp.int32)  # padding: the number of columns
    data = jnp.where(cols < num_rows, x.data, 0).astype(jnp.promote_types(dtype, jnp.float32))
    out = segment_sum(w, cols, data, rows, num_out, ordered=x.indices_sorted).astype(dtype)
    return out if x.ndim == 2 else out[0]


def sum(x: Any, axis: int | None = None) -> jax.Array:
    """The sum over an axis, or over everything.

    Args:
      x: BCOO (n, m) or (m,), or a dense array, for which this is jnp.sum.
      axis: the axis to sum over; None for all.

    Returns:
      A dense array; for an (n, m) input axis=0 gives m elements. Its dtype is that of jnp.sum: x's dtype, with small
      integers and bool as 32 bits.

    Raises:
      TypeError: if x is neither BCOO nor dense.
      ValueError: if x has no such axis.

    Example:
      >>> import numpy as np, scipy.sparse, jaxsparse as js
      >>> x = js.from_scipy(scipy.sparse.csr_matrix(np.array([[0., 2., 1.], [1., 0., 0.]])))
      >>> js.sum(x, axis=1).tolist(), js.sum(x, axis=0).tolist(), js.sum(x).item()
      ([3.0, 1.0], [1.0, 2.0, 1.0], 4.0)
    """
    if _is_dense(x):
        return jnp.sum(jnp.asarray(x), axis=axis)
    check_bcoo("sum", "x", x, (1, 2))
    return _total("sum", x, axis).astype(_dtype_of(jnp.sum, x))


def mean(x: Any, axis: int | None = None) -> jax.Array:
    """The mean over an axis, or over everything. Elements that are not stored count as zero.

    Args, returns and errors are those of `js.sum`; integers give floats.

    Example:
      >>> import numpy as np, scipy.sparse, jaxsparse as js
      >>> js.mean(js.from_scipy(scipy.sparse.csr_matrix(np.array([[0., 2.], [1., 0.]]))), axis=0).tolist()
      [0.5, 1.0]
    """
    if _is_dense(x):
        return jnp.mean(jnp.asarray(x), axis=axis)
    check_bcoo("mean", "x", x, (1, 2))
    size = math.prod(x.shape) if axis is None else x.shape[_axis("mean", axis, x.ndim)]
    return (_total("mean", x, axis) / float(size)).astype(_dtype_of(jnp.mean, x))  # size may be past int32


def concatenate(xs: Sequence[Any], axis: int = 0) -> Any:
    """Concatenates BCOO matrices: axis=1 for more features, axis=0 for more examples.

    Args:
      xs: BCOO matrices that agree in the other dimension, or dense arrays only, for which this is jnp.concatenate.
      axis: 0 or 1.

    Returns:
      A BCOO. Its dtype is the promotion of the inputs' dtypes, its nse the sum of theirs. Padding stays padding: an
      index that equals the size of its input would name a real column of the result, so it is set to the result's size.

    Raises:
      TypeError: if dense and BCOO are mixed.
      ValueError: if xs is empty, the other dimensions differ, or there is no such axis.

    Example:
      >>> import numpy as np, scipy.sparse, jaxsparse as js
      >>> x = js.from_scipy(scipy.sparse.csr_matrix(np.eye(2)))
      >>> js.concatenate([x, x], axis=1).todense().tolist()
      [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    """
    if not xs:
        raise ValueError(message("concatenate", "xs", "a sequence of at least one matrix", "none"))
    if all(_is_dense(x) for x in xs):
        return jnp.concatenate([jnp.asarray(x) for x in xs], axis=axis)
    for i, x in enumerate(xs):
        if _is_dense(x):
            do = "Make it sparse too: jax.experimental.sparse.BCOO.fromdense(x, nse=...)."
            raise TypeError(message("concatenate", "xs", "all BCOO or all dense", f"a dense array at position {i}", do))
        check_bcoo("concatenate", f"xs[{i}]", x)
    axis = _axis("concatenate", axis, 2)
    others = [x.shape[1 - axis] for x in xs]
    if len(set(others)) > 1:
        raise ValueError(message("concatenate", "xs", f"of equal size along axis {1 - axis}", f"{others}"))
    ends = list(itertools.accumulate(x.shape[axis] for x in xs))
    if ends[-1] > MAX_ROWS:
        raise ValueError(message("concatenate", "xs", f"at most {MAX_ROWS} long together along axis {axis}", ends[-1]))
    shape = (ends[-1], others[0]) if axis == 0 else (others[0], ends[-1])
    parts = []
    for x, start in zip(xs, [0, *ends], strict=False):
        indices, real = _real_entries(x.indices, x.shape)
        indices[axis] += start
        parts.append(jnp.stack([jnp.where(real, i, size) for i, size in zip(indices, shape, strict=True)], axis=1))
    dtype = jnp.result_type(*(x.dtype for x in xs))
    return BCOO((jnp.concatenate([x.data.astype(dtype) for x in xs]), jnp.concatenate(parts)), shape=shape)


def _is_dense(x: Any) -> bool:
    return hasattr(x, "__array__") and not is_row_sparse(x)  # BCOO, BCSR and SciPy matrices have no __array__


def _real_entries(indices: jax.Array, shape: Sequence[Any]) -> tuple[list[jax.Array], jax.Array]:
    """(the indices of entries for each axis, which entries are real: in range along all axes)."""
    by_axis = [at_least_int32(indices[:, i]) for i in range(len(shape))]
    real = jnp.ones(indices.shape[0], bool)
    for i, size in zip(by_axis, shape, strict=True):
        real &= in_range(i, size)
    return by_axis, real


def _total(function: str, x: BCOO, axis: int | None) -> jax.Array:
    """The sum over an axis, in at least 32 bits."""
    dtype = _dtype_of(jnp.sum, x)
    wide = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype
    indices, real = _real_entries(x.indices, x.shape)
    data = jnp.where(real, x.data, 0).astype(wide)
    if axis is None or _axis(function, axis, x.ndim) == x.ndim - 1 == 0:
        return jnp.sum(data)
    kept = 1 - _axis(function, axis, x.ndim)
    return sum_by_bag(data, indices[kept], x.shape[kept])


def _dtype_of(reduction: Any, x: BCOO) -> Any:
    """The dtype that `reduction` gives a dense array of x's dtype."""
    return jax.eval_shape(reduction, jax.ShapeDtypeStruct((1,), x.dtype)).dtype


def _axis(function: str, axis: int, ndim: int) -> int:
    if not isinstance(axis, int | np.integer) or not -ndim <= axis < ndim:
        raise ValueError(message(function, "axis", f"an integer between {-ndim} and {ndim - 1}", axis))
    return int(axis) % ndim
