"""Makes a train step of a loss: gradients, their combination across devices, and the update.

A loss function goes in. A function step(state, batch) -> (state, metrics) comes out. It is `js.jit` or `js.rowwise` of
the usual three lines, plus metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse._context import rows_of
from jaxsparse._jax import vary, varying_axes
from jaxsparse.train.jit import jit as js_jit
from jaxsparse.train.rowwise import rowwise


def make_train_step(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, axis_name: Any = None, jit: bool = True
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function step(state, batch, *args) -> (state, metrics) that costs what the rows of the batch cost.

    Args:
      loss_fn: loss_fn(params, batch, *args) -> a scalar, or (scalar, aux) with `has_aux`. The scalar is the mean over
        the weighted examples of the batch: `js.weighted_mean(losses, batch.weight)`.
      has_aux: whether loss_fn returns (scalar, aux). aux, such as new batch statistics, comes back as metrics["aux"].
        Pass its value of the previous step through *args.
      axis_name: the mapped axis, under jax.pmap or shard_map. Losses and gradients are averaged over it. A device
        counts by the sum of its `batch.weight`, or as 1 if the batch has no weight. So n devices with parts of a batch
        agree with one device and the whole batch, even if a device has no example. aux is not combined.
      jit: whether to compile here, with the state donated. Pass False to compile outside, for example
        `jax.pmap(step, axis_name="batch", donate_argnums=0)`.

    Returns:
      The step. `state` is a flax TrainState, or any pytree with params and apply_gradients. It is donated, so use the
      returned one. The metrics are "loss"; "grad_norm", the norm of the gradient before any clipping in the optimizer;
      "rows_touched", the number of distinct rows over all row-sparse parameters; and "aux". With `jit` the step is one
      of `js.jit`, otherwise one of `js.rowwise`.

    Raises:
      TypeError: if `state` has no params.
      ValueError: as in `js.jit`; or, with untouched="replay", if row ids are made from rows that are not up to date.

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
        if not hasattr(state, "params"):
            must, do = "a TrainState, or another object with params", "Make one with TrainState.create(...)."
            raise TypeError(message("make_train_step", "state", must, type(state).__name__, do))
        rows = [rows_of(p)[0] for p in jax.tree.leaves(state.params)]

        def loss_and_aux(params: Any) -> Any:
            out = loss_fn(params, batch, *args)
            return out if has_aux else (out, None)

        with jax.named_scope("loss_and_gradients"):
            params = vary(
                state.params, varying_axes((batch, args))
            )  # gradients of each device, combined by weight below
            (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params)
        if axis_name is not None:
            with jax.named_scope("combine_devices"):
                loss, grads = _weighted_mean_of_devices((loss, grads), batch, axis_name)
        metrics = {
            "loss": loss,
            "grad_norm": jnp.sqrt(sum(map(_square, jax.tree.leaves(grads)), jnp.float32(0))),
            "rows_touched": sum((jnp.maximum(n, 0) for n in rows), jnp.int32(0)),
        }
        with jax.named_scope("update"):
            state = _apply_gradients(state, grads, loss)
        return state, metrics | ({"aux": aux} if has_aux else {})

    return js_jit(train_step) if jit else rowwise(train_step)


def _apply_gradients(state: Any, grads: Any, loss: jax.Array) -> Any:
    """state.apply_gradients. An optimizer that takes extra arguments gets the loss as `value`."""
    tx = getattr(state, "tx", None)
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return state.apply_gradients(grads=grads)
    with_value = optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, value=loss))
    return state.replace(tx=with_value).apply_gradients(grads=grads).replace(tx=tx)


def _square(g: jax.Array) -> jax.Array:
    """The sum of squares. vdot avoids a temporary array of squares."""
    every = tuple(range(g.ndim))
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return -jax.lax.dot_general(g, -g, ((every, every), ((), ())), preferred_element_type=wide)


def _weighted_mean_of_devices(tree: Any, batch: Any, axis_name: Any) -> Any:
    """The mean over the weighted examples of all devices. `tree` has each device's mean over its own examples; it may
    be 0/0 on a device without weighted examples, which is left out."""
    weight = getattr(batch, "weight", None)
    device_weight = jnp.float32(1) if weight is None else jnp.sum(weight, dtype=jnp.float32)
    total = jax.lax.psum(device_weight, axis_name)
    share = device_weight / jnp.where(total == 0, 1, total)
    scaled = jax.tree.map(lambda x: jnp.where(device_weight == 0, 0, x) * share.astype(x.dtype), tree)
    return jax.lax.psum(scaled, axis_name)
