"""Checks the argument `before=` of the named optimizers: a transformation of the gradient, not an optimizer.

`before` is tried on a gradient that is the same number everywhere. One that changes its sign is an optimizer, and
raises. For replay, zeros must stay zeros, and no state may have a row for each row of a parameter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse._checks import check_transformation, message


def checked_before(function: str, before: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`before`, with an init that raises for an optimizer. `function`: the named optimizer, for messages."""
    check_transformation(function, "before", before)

    def init_fn(params: Any) -> Any:
        _check_direction(function, before, params)
        return before.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, optax.with_extra_args_support(before).update)


def _check_direction(function: str, before: optax.GradientTransformation, params: Any) -> None:
    """Raises ValueError if `before` changes the gradient's sign, as an optimizer does."""
    sign_changed = [path for path, x in _result_of(before, params, 0.1) if (x < 0).all()]
    if sign_changed:
        got = "one that turns them round, as an optimizer or a learning rate does"
        do = "That belongs behind: js.lazy(optax.chain(optax.adam(1e-3), ...))."
        raise ValueError(message(function, "before", "one that leaves gradients their direction", got, do))


def check_by_row(function: str, before: optax.GradientTransformation, params: Any) -> None:
    """Raises ValueError unless `before` makes zeros of zeros and keeps no array of the parameters' shapes."""
    shapes = [jnp.shape(p) for p in jax.tree.leaves(params) if jnp.ndim(p)]
    state = jax.eval_shape(before.init, params)
    kept = [x.shape for x in jax.tree.leaves(state) if x.shape and x.shape in shapes]
    do = (
        "A row without gradient would move on by it. Only what leaves zeros alone and keeps nothing for a row can come "
        "before, clipping say; weight decay is weight_decay= of js.lazy_adamw."
    )
    if kept:
        got = f"one with state of shape {kept[0]}"
        raise ValueError(message(function, "before", "without state by row for untouched='replay'", got, do))
    not_zero = [path for path, x in _result_of(before, params, 0) if (x != 0).any()]
    if not_zero:
        got = "one that makes something else of them" + (f", at {not_zero[0]}" if not_zero[0] else "")
        raise ValueError(message(function, "before", "one that makes zeros of zeros for untouched='replay'", got, do))


def _result_of(before: optax.GradientTransformation, params: Any, gradient: float) -> list[tuple[str, np.ndarray]]:
    """[(path, result of `before`)] for a gradient that is this number everywhere, and small parameters that are 0.5.
    Empty if `before` raises on these; then the real call shows its errors."""
    try:
        with jax.ensure_compile_time_eval():
            small = jax.tree.map(
                lambda p: jnp.full(tuple(min(n, 2) for n in jnp.shape(p)), 0.5, jnp.result_type(p)), params
            )
            updates = jax.tree.map(lambda p: jnp.full_like(p, gradient), small)
            made, _ = optax.with_extra_args_support(before).update(updates, before.init(small), small)
            leaves = jax.tree_util.tree_flatten_with_path(made)[0]
            return [(jax.tree_util.keystr(path), np.asarray(x)) for path, x in leaves if x.size]
    except Exception:
        return []
