"""`assert_rowwise`: whether a transformation may be made lazy."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxsparse.by_row import check_by_row, find_row_leaves


def assert_rowwise(inner: optax.GradientTransformation, params: Any = None) -> None:
    """Raises if `js.lazy(inner)` would not do to touched rows what dense `inner` does to them.

    `inner` is run on small tables of random numbers, once whole and once on two of their rows, and updates and state
    are compared. js.lazy does the same at its first update; this tells beforehand.

    Args:
      inner: the transformation, usually a chain.
      params: a tree like the parameters, for transformations with masks or labels; every leaf that has rows is taken as
        a table. One table of rank 2 by default.

    Raises:
      ValueError: naming the update or the state that differs, or the state that is not kept by row.

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
    flags = [len(x.shape) > 0 for x in leaves]
    inner = optax.with_extra_args_support(inner)
    find_row_leaves(inner, tree, leaves, flags)
    check_by_row(inner, tree, leaves, flags)
