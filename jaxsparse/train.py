"""The training step: gradients, combination across devices, update, in one jitted and donated function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse.collectives import psum
from jaxsparse.grad import value_and_grad
from jaxsparse.lazy import coalesce_gradients
from jaxsparse.rows import in_range, is_row_sparse, scale


def make_train_step(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, axis_name: Any = None, jit: bool = True
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function step(state, batch, *args) -> (state, metrics) that costs what the rows of the batch cost.

    Args:
      loss_fn: loss_fn(params, batch, *args) -> a scalar, or (scalar, aux) with `has_aux`. The scalar is the mean over
        the examples of the batch that have weight: `js.weighted_mean(losses, batch.weight)`.
      has_aux: whether loss_fn returns (scalar, aux). aux, say new batch statistics, comes back as metrics["aux"]; what
        it needs of the previous step goes in through *args.
      axis_name: the mapped axis, under jax.pmap or shard_map. Losses and gradients are combined over it, each device
        counting by the sum of its `batch.weight` (equally, if the batch has no weight), so that n devices with a split
        batch agree with one device and the whole batch, a device with no example included. aux stays each device's own.
      jit: compile here, donating the state. False to compile outside, for example
        `jax.pmap(step, axis_name="batch", donate_argnums=0)`.

    Returns:
      The step. `state` is a flax TrainState, or any object with params, opt_state, replace and apply_gradients; it is
      donated, so use the returned one. metrics: "loss"; "grad_norm", the norm of the gradient before the optimizer's
      own clipping; "rows_touched", the number of distinct rows, over all row-sparse parameters; and "aux".

    Raises:
      ValueError: if a parameter is read by rows and its optimizer is not lazy.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> loss_fn = lambda params, ids: jnp.mean((params["table"][ids] - 1.) ** 2)
      >>> params = {"table": jnp.zeros((6, 1))}
      >>> state = TrainState.create(apply_fn=None, params=params, tx=js.lazy_adam(0.5))
      >>> step = js.make_train_step(loss_fn)
      >>> state, metrics = step(state, jnp.array([4, 1, 4]))
      >>> metrics["loss"].item(), metrics["rows_touched"].item()
      (1.0, 2)
    """

    def train_step(state: Any, batch: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        with jax.named_scope("loss_and_gradients"):
            value, grads = value_and_grad(loss_fn, has_aux=has_aux)(state.params, batch, *args)
        loss, aux = value if has_aux else (value, None)
        if axis_name is not None:
            with jax.named_scope("combine_devices"):
                loss, grads = _weighted_mean_of_devices((loss, grads), batch, axis_name)
        with jax.named_scope("coalesce"):
            grads, opt_state = coalesce_gradients(grads, state.opt_state)
        with jax.named_scope("metrics"):
            leaves = jax.tree.leaves(grads, is_leaf=is_row_sparse)
            touched = [jnp.sum(in_range(g.ids, g.num_rows), dtype=jnp.int32) for g in leaves if is_row_sparse(g)]
            metrics = {
                "loss": loss,
                "grad_norm": optax.tree.norm([g.rows if is_row_sparse(g) else g for g in leaves]),
                "rows_touched": sum(touched, jnp.int32(0)),
            }
        with jax.named_scope("update"):
            state = state.replace(opt_state=opt_state).apply_gradients(grads=grads)
        return state, metrics | ({"aux": aux} if has_aux else {})

    return jax.jit(train_step, donate_argnums=0) if jit else train_step


def _weighted_mean_of_devices(tree: Any, batch: Any, axis_name: Any) -> Any:
    """The mean over all examples that have weight, of each device's mean over its own; a device without any counts
    nothing."""
    weight = getattr(batch, "weight", None)
    own = jnp.float32(1) if weight is None else jnp.sum(weight, dtype=jnp.float32)
    total = jax.lax.psum(own, axis_name)
    share = own / jnp.where(total == 0, 1, total)

    def part(x: Any) -> Any:
        if is_row_sparse(x):
            return scale(_cleared(x, own), share)
        return jnp.where(own == 0, 0, x) * share.astype(x.dtype)

    return psum(jax.tree.map(part, tree, is_leaf=is_row_sparse), axis_name)


def _cleared(g: Any, own: jax.Array) -> Any:
    """g with zero rows where a device has no example, whose loss may be 0/0."""
    rows = jnp.where(own == 0, 0, g.rows)
    return jax.tree.unflatten(jax.tree.structure(g), [jax.tree.leaves(g)[0], rows])
