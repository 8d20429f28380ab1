"""`assert_rowwise`: whether a transformation may be made lazy."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxsparse.optim.lazy import plan_update


def assert_rowwise(inner: optax.GradientTransformation, params: Any = None) -> None:
    """Raises if `js.lazy(inner)` would not do to touched rows what dense `inner` does to them.

    The program of `inner.update` is read, as js.lazy reads it at its first update; this tells beforehand.

    Args:
      inner: the transformation, usually a chain.
      params: a tree like the parameters, for transformations with masks or labels; every leaf that has rows is taken as
        a table. One table of rank 2 by default.

    Raises:
      ValueError: with what looks across rows, and its line.

    Example:
      >>> import optax, jaxsparse as js
      >>> js.testing.assert_rowwise(optax.adamw(1e-3))
      >>> try:
      ...     js.testing.assert_rowwise(optax.lamb(1e-3))
      ... except ValueError as error:
      ...     print(str(error)[:88])
      The 'inner' argument of js.lazy must be a transformation that acts on each row by itself
    """
    params = jax.ShapeDtypeStruct((5, 3), "float32") if params is None else params
    leaves, tree = jax.tree.flatten(params)
    by_row = {i for i, x in enumerate(leaves) if x.ndim}
    inner = optax.with_extra_args_support(inner)
    plan_update(inner, tree, leaves, jax.eval_shape(inner.init, params), params, {}, by_row)
