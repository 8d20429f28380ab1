"""The training step, gradients, combination across devices and update in one function; and the loops around it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxsparse._checks import message
from jaxsparse._jax import vary, varying_axes
from jaxsparse.jit import jit as js_jit
from jaxsparse.pipeline import Batches
from jaxsparse.refresh import check_flushed, flush
from jaxsparse.rowwise import rowwise
from jaxsparse.tracing import rows_of


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
      The step. `state` is a flax TrainState, or any pytree with params and apply_gradients; it is donated, so use the
      returned one. metrics: "loss"; "grad_norm", the norm of the gradient before the optimizer's
      own clipping; "rows_touched", the number of distinct rows, over all row-sparse parameters; and "aux". With `jit`
      the step is one of `js.jit`; without, of `js.rowwise`.

    Raises:
      ValueError: as of `js.jit`; or if, with skipped="replay", row ids are made of rows that are not up to date.

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
        rows = [rows_of(p)[0] for p in jax.tree.leaves(state.params)]

        def loss_and_aux(params: Any) -> Any:
            out = loss_fn(params, batch, *args)
            return out if has_aux else (out, None)

        with jax.named_scope("loss_and_gradients"):
            own = vary(state.params, varying_axes((batch, args)))  # each device's, to be combined by weight
            (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(own)
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
    """state.apply_gradients, whose optimizer gets the loss as `value` if it takes further arguments."""
    tx = getattr(state, "tx", None)
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return state.apply_gradients(grads=grads)
    with_value = optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, value=loss))
    return state.replace(tx=with_value).apply_gradients(grads=grads).replace(tx=tx)


def _square(g: jax.Array) -> jax.Array:
    """The sum of squares, as an inner product: of these XLA keeps no array of squares."""
    every = tuple(range(g.ndim))
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return -jax.lax.dot_general(g, -g, ((every, every), ((), ())), preferred_element_type=wide)


def _weighted_mean_of_devices(tree: Any, batch: Any, axis_name: Any) -> Any:
    """The mean over all examples that have weight, of each device's mean over its own; a device without any, whose loss
    may be 0/0, counts nothing."""
    weight = getattr(batch, "weight", None)
    own = jnp.float32(1) if weight is None else jnp.sum(weight, dtype=jnp.float32)
    total = jax.lax.psum(own, axis_name)
    share = own / jnp.where(total == 0, 1, total)
    return jax.lax.psum(jax.tree.map(lambda x: jnp.where(own == 0, 0, x) * share.astype(x.dtype), tree), axis_name)


def evaluate(metric_fn: Callable[..., dict[str, Any]], state: Any, batches: Any) -> dict[str, float]:
    """The means of some metrics over the examples of one epoch.

    Args:
      metric_fn: metric_fn(params, batch) -> a dict of scalars, each a mean over the examples of the batch that have
        weight.
      state: what has the parameters, in `state.params`.
      batches: an iterable of batches, usually a `js.Batches`.

    Returns:
      The metrics, each batch counting by the sum of its weights; NaN if there is no weight at all.

    Raises:
      ValueError: with skipped="replay", if the state needs js.flush.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> state = TrainState.create(apply_fn=None, params={"b": jnp.float32(1)}, tx=js.lazy_sgd(0.1))
      >>> batches = js.batches([[0], [1], [2]], [1., 2., 6.], num_rows=3, batch_size=2)
      >>> metric_fn = lambda params, batch: {"error": js.weighted_mean(batch.y - params["b"], batch.weight)}
      >>> js.evaluate(metric_fn, state, batches)
      {'error': 2.0}
    """
    check_flushed("evaluate", getattr(state, "opt_state", None))
    compiled = jax.jit(metric_fn)
    totals: dict[str, float] = {}
    weight = 0.0
    for batch in batches:
        own = float(np.asarray(batch.weight).sum(dtype=np.float64))
        weight += own
        if own:
            for name, value in compiled(state.params, batch).items():
                totals[name] = totals.get(name, 0.0) + own * float(value)
    return {name: total / weight if weight else float("nan") for name, total in totals.items()}


def predict(apply_fn: Callable[..., Any], state: Any, batches: Batches) -> np.ndarray:
    """What a model says of every example, in the order of the data, padding dropped.

    Args:
      apply_fn: apply_fn(params, x) -> an array (B, ...).
      state: what has the parameters, in `state.params`.
      batches: of `js.batches`, without shuffle, drop_remainder and devices, at the beginning of an epoch.

    Returns:
      A NumPy array (n, ...).

    Raises:
      ValueError: if the batches leave examples out or have another order; or, with skipped="replay", if the state needs
        js.flush.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> state = TrainState.create(apply_fn=None, params=jnp.arange(4.), tx=js.lazy_sgd(0.1))
      >>> batches = js.batches([[3], [1, 2], [0]], num_rows=4, batch_size=2)
      >>> apply_fn = lambda table, ids: js.embedding_bag(table, ids, combiner="sum", padding_idx=4)
      >>> js.predict(apply_fn, state, batches).tolist()
      [3.0, 3.0, 0.0]
    """
    check_flushed("predict", getattr(state, "opt_state", None))
    at = batches.state
    if at["shuffle"] or at["drop_remainder"] or at["step"] or batches.num_devices is not None or batches.is_part:
        got = f"{at}, devices={batches.num_devices}, part of a shard: {batches.is_part}"
        do = "Make batches of their own for predictions."
        raise ValueError(message("predict", "batches", "all examples in their order, from the first", got, do))
    compiled, out = jax.jit(apply_fn), []
    left = batches.num_examples
    for batch in batches:
        out.append(np.asarray(compiled(state.params, batch.x))[:left])
        left -= len(out[-1])
    if not out:
        raise ValueError(message("predict", "batches", "at least one example", "none"))
    return np.concatenate(out)


def fit(
    step: Callable[..., Any],
    state: Any,
    batches: Any,
    *,
    epochs: int = 1,
    validation: Any = None,
    metrics: Callable[..., dict[str, Any]] | None = None,
    progress: bool = True,
) -> tuple[Any, list[dict[str, float]]]:
    """Runs a step over epochs of batches, with a progress bar and validation after each, before which it calls
    js.flush.

    Args:
      step: of `js.make_train_step`, or any step(state, batch) -> (state, metrics) whose metrics have a "loss".
      state: the state to start from. It is donated to the step: use the returned one.
      batches: a `js.Batches`, whose position it goes on from, or any iterable of batches that can be iterated anew.
      epochs: how many to run, a resumed one counting as one.
      validation: batches to evaluate `metrics` on after each epoch.
      metrics: metric_fn of `js.evaluate`; required with validation, and only there.
      progress: whether to show the bar.

    Returns:
      The state, and a dict for each epoch: "loss", the mean over its steps, "steps", "seconds", and the validation's
        metrics.

    Raises:
      ValueError: if only one of validation and metrics is given.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> loss_fn = lambda params, batch: js.weighted_mean((params["t"][batch.x] - batch.y) ** 2, batch.weight)
      >>> batches = js.batches(jnp.arange(6), jnp.ones(6), batch_size=4, shuffle=True)
      >>> state = TrainState.create(apply_fn=None, params={"t": jnp.zeros(6)}, tx=js.lazy_sgd(1.0))
      >>> state, history = js.fit(js.make_train_step(loss_fn), state, batches, epochs=3, progress=False)
      >>> len(history), history[-1]["steps"], history[-1]["loss"] < history[0]["loss"]
      (3, 2, True)
    """
    if (validation is None) != (metrics is None):
        raise ValueError(message("fit", "metrics", "given with validation, and only there", metrics))
    history: list[dict[str, float]] = []
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        with tqdm(batches, desc=f"epoch {epoch + 1}/{epochs}", unit="step", disable=not progress) as bar:
            for batch in bar:
                state, reported = step(state, batch)
                losses.append(reported["loss"])
                if (progress and len(losses) in (1, 3)) or len(losses) % 10 == 0:  # early numbers, then few: each waits
                    bar.set_postfix(loss=f"{np.mean(losses[-1]):.4f}")
            said = {"loss": float(np.mean(jax.device_get(losses))) if losses else float("nan")}
            said |= {"steps": len(losses), "seconds": time.perf_counter() - start}
            if metrics is not None:
                state = flush(state)
                measured = evaluate(metrics, state, validation)
                bar.set_postfix({name: f"{value:.4f}" for name, value in [("loss", said["loss"]), *measured.items()]})
                said |= measured
        history.append(said)
    return state, history
