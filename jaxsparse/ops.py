"""Pure functions over BCOO: dot, sum, mean, concatenate. A dense array is welcome wherever a BCOO is.

BCOO's own padding contract holds throughout: an entry whose index equals the dimension's size is padding, its data 0.
The product treats an entry with any index out of range as padding, so it never touches a row of the weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxsparse._checks import check_bcoo, check_float, message
from jaxsparse.embedding import segment_sum
from jaxsparse.rows import in_range


def dot(x: Any, w: Any) -> jax.Array:
    """The product x @ w of a sparse input and a dense weight: out[i] = sum_j x[i, j] w[j].

    The gradient with respect to w has non-zero rows only at x's column ids, and js.value_and_grad keeps it that way;
    the gradient with respect to x.data is <g[i], w[j]> at x's entries only.

    Args:
      x: BCOO (n, m) or (m,), or a dense array, for which this is jnp.dot.
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
    if isinstance(w, BCOO):
        raise TypeError(message("dot", "w", "a dense array", "BCOO", "Only x may be sparse."))
    w = jnp.asarray(w)
    if _is_dense(x):
        return jnp.dot(jnp.asarray(x), w)
    check_bcoo("dot", "x", x, (1, 2))
    check_float("dot", "w", w)
    if w.ndim < 1 or w.shape[0] != x.shape[-1]:
        raise ValueError(message("dot", "w", f"of shape ({x.shape[-1]}, ...) for x of shape {x.shape}", f"{w.shape=}"))
    dtype = jnp.promote_types(x.dtype, w.dtype)
    rows = x.indices[:, 0] if x.ndim == 2 else jnp.zeros(x.nse, jnp.int32)
    num_out = x.shape[0] if x.ndim == 2 else 1
    real = in_range(rows, num_out) & in_range(x.indices[:, -1], w.shape[0])
    cols = jnp.where(real, x.indices[:, -1], w.shape[0])
    data = jnp.where(real, x.data, 0).astype(jnp.promote_types(dtype, jnp.float32))
    out = segment_sum(w, cols, data, rows, num_out, ordered=x.indices_sorted).astype(dtype)
    return out if x.ndim == 2 else out[0]


def sum(x: Any, axis: int | None = None) -> jax.Array:
    """The sum over an axis, or over everything.

    Args:
      x: BCOO (n, m) or (m,), or a dense array, for which this is jnp.sum.
      axis: the axis to sum over; None for all.

    Returns:
      A dense array of x's dtype; axis=0 of an (n, m) input has m elements.

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
    real = jnp.ones(x.nse, bool)
    for i, size in enumerate(x.shape):
        real &= in_range(x.indices[:, i], size)
    data = jnp.where(real, x.data, 0)
    if axis is None:
        return jnp.sum(data, dtype=x.dtype)
    axis = _axis("sum", axis, x.ndim)
    if x.ndim == 1:
        return jnp.sum(data, dtype=x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    kept = 1 - axis
    return jax.ops.segment_sum(data.astype(wide), x.indices[:, kept], num_segments=x.shape[kept]).astype(x.dtype)


def mean(x: Any, axis: int | None = None) -> jax.Array:
    """The mean over an axis, or over everything; what is not stored counts as zero.

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
    return sum(x, axis) / size


def concatenate(xs: Sequence[Any], axis: int = 0) -> Any:
    """Puts BCOO matrices side by side (axis=1: more features) or below each other (axis=0: more examples).

    Args:
      xs: BCOO matrices that agree in the other dimension, or dense arrays only, for which this is jnp.concatenate.
      axis: 0 or 1.

    Returns:
      A BCOO of dtype the promotion of the parts', nse the sum of theirs. Padding stays padding: an index equal to the
      size of its part would name a real column of the whole, so it is moved to the whole's own size.

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
    shape = (ends[-1], others[0]) if axis == 0 else (others[0], ends[-1])
    indices = []
    for x, start in zip(xs, [0, *ends], strict=False):
        real = in_range(x.indices[:, 0], x.shape[0]) & in_range(x.indices[:, 1], x.shape[1])
        moved = x.indices.at[:, axis].add(start)
        indices.append(jnp.where(real[:, None], moved, jnp.array(shape, x.indices.dtype)))
    dtype = jnp.result_type(*(x.dtype for x in xs))
    return BCOO((jnp.concatenate([x.data.astype(dtype) for x in xs]), jnp.concatenate(indices)), shape=shape)


def _is_dense(x: Any) -> bool:
    return not isinstance(x, BCOO) and hasattr(x, "ndim") and hasattr(x, "dtype") and not hasattr(x, "tocsr")


def _axis(function: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(message(function, "axis", f"between {-ndim} and {ndim - 1}", axis))
    return axis % ndim
