"""`accumulate`: one update for several steps' gradients, at the cost of the rows they touched.

optax.MultiSteps adds gradients up in a buffer of the parameters' size and runs its inner transformation under a cond,
which copies tables. Here row-sparse gradients are put end to end, and the state is a different shape after every
mini-step: the number of gradients in it is static, so a jitted step is compiled `steps` times and runs no cond at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse.rows import RowSparse, is_row_sparse, scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AccumulateState:
    """The state of `accumulate(tx, steps)`."""

    inner_state: Any
    pending: Any  # the sum of the gradients since the last update, like them; None right after it
    mini_step: int = dataclasses.field(metadata={"static": True})  # how many are in it


def accumulate(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformationExtraArgs:
    """Updates with the mean of every `steps` gradients: what one batch of `steps` times the size would give.

    In between, updates are zero: dense zeros for dense gradients, no rows at all for row-sparse ones. The mean is of
    equal parts, as the gradients of equally many examples want it.

    Args:
      tx: the transformation to run on the mean, usually `js.lazy(...)`.
      steps: how many gradients make an update.

    Returns:
      A transformation. Its state changes shape with the mini-step: it goes through jit, which compiles `steps`
      programs, but cannot be the carry of a scan. Where the state is donated, JAX warns that the waiting gradients'
      buffers "were not usable": they are freed.

    Raises:
      ValueError: if steps is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx, params = js.accumulate(js.lazy_sgd(1.0), 2), jnp.ones((3, 1))
      >>> state = tx.init(params)
      >>> for row in (1, 2):
      ...     grads = js.RowSparse(jnp.array([row]), jnp.ones((1, 1)), (3, 1))
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params.ravel().tolist())
      [1.0, 1.0, 1.0]
      [1.0, 0.5, 0.5]
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(message("accumulate", "steps", "a positive integer", repr(steps)))
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> AccumulateState:
        return AccumulateState(tx.init(params), None, 0)

    def update_fn(updates: Any, state: AccumulateState, params: Any = None, **extra_args: Any) -> Any:
        total = updates
        if state.mini_step:
            total = jax.tree.map(lambda a, b: a + b, state.pending, updates, is_leaf=is_row_sparse)
        if state.mini_step + 1 < steps:
            nothing = jax.tree.map(_nothing, updates, is_leaf=is_row_sparse)
            return nothing, AccumulateState(state.inner_state, total, state.mini_step + 1)
        mean = jax.tree.map(
            lambda g: scale(g, 1 / steps) if is_row_sparse(g) else g / steps, total, is_leaf=is_row_sparse
        )
        new, inner_state = tx.update(mean, state.inner_state, params, **extra_args)
        return new, AccumulateState(inner_state, None, 0)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _nothing(g: Any) -> Any:
    if is_row_sparse(g):
        return RowSparse(jnp.zeros(0, jnp.int32), jnp.zeros((0, *g.shape[1:]), g.dtype), g.shape, unique=True)
    return jnp.zeros_like(g)
