"""The training step, gradients, combination across devices and update in one function; and the loops around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxsparse._checks import message
from jaxsparse._jax import vary
from jaxsparse.accumulate import AccumulateState
from jaxsparse.blocks import Blocks
from jaxsparse.collectives import psum
from jaxsparse.grad import trace, value_and_grad
from jaxsparse.lazy import coalesce_gradients, named_leaves
from jaxsparse.parallel import in_auto_mode
from jaxsparse.pipeline import Batches
from jaxsparse.refresh import check_flushed, flush, refresh
from jaxsparse.rows import RowSparse, in_range, is_row_sparse, scale
from jaxsparse.workspace import StepWithWorkspace


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
      The step. `state` is a flax TrainState, or any object with params, opt_state, tx, replace and apply_gradients; it
      is donated, so use the returned one. metrics: "loss"; "grad_norm", the norm of the gradient before the optimizer's
      own clipping; "rows_touched", the number of distinct rows, over all row-sparse parameters; and "aux". With `jit`
      the step has `lower`, as jitted functions have, and keeps memory between calls where that pays (workspace.py).

    Raises:
      ValueError: if a parameter is read by rows and its optimizer is not lazy, or refuses row-sparse gradients; or if,
        with skipped="replay", loss_fn sees rows of a table that are not up to date: as row ids, or behind
        stop_gradient.

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

    def with_temporaries(state: Any, batch: Any, *args: Any) -> tuple[Any, dict[str, Any], list[Any]]:
        if any(_accumulates(s) for s in jax.tree.leaves(state.opt_state, is_leaf=_accumulates)):
            return *_step_on_gradients(loss_fn, has_aux, axis_name, state, batch, args), []
        with jax.named_scope("choose_rows"):
            traced = trace(loss_fn, 0, has_aux, (state.params, batch, *args), {})
            blocks = Blocks(traced, state.tx, state.params, state.opt_state, axis_name)
            _check_optimizer(state, blocks)
        with jax.named_scope("gather"):
            params, opt_state = blocks.small()
        with jax.named_scope("loss_and_gradients"):
            (loss, aux), grads = jax.value_and_grad(blocks.loss, has_aux=True)(vary(params, traced.axes))
        if axis_name is not None:
            with jax.named_scope("combine_devices"):
                loss, grads = _weighted_mean_of_devices((loss, grads), batch, axis_name)
        touched = [(c.ids, traced.leaves[c.leaf].shape[0]) for c in blocks.chosen.values()]
        metrics = _metrics(loss, jax.tree.leaves(grads), touched)
        with jax.named_scope("update"):
            new = state.replace(params=params, opt_state=opt_state).apply_gradients(grads=grads)
        with jax.named_scope("scatter"):
            params, opt_state = blocks.put_back(new.params, new.opt_state)
        # slots first: in this order of the kept buffers XLA (jax 0.10) updates all of Adam's blocks in place
        temporaries = [*blocks.rows_in(new.params, new.opt_state)[::-1], *blocks.rows_in(grads)]
        metrics |= {"aux": aux} if has_aux else {}
        return new.replace(params=params, opt_state=opt_state), metrics, temporaries

    def train_step(state: Any, batch: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        return with_temporaries(state, batch, *args)[:2]

    step = in_auto_mode(train_step)
    return StepWithWorkspace(with_temporaries, step) if jit else step


def _check_optimizer(state: Any, blocks: Blocks) -> None:
    """Whatever the optimizer has to say against row-sparse gradients, which in the step it does not meet."""

    def update(params: Any, opt_state: Any) -> Any:
        leaves, tree = named_leaves(params)
        for name, p in leaves.items():
            if name in blocks.chosen:
                leaves[name] = RowSparse(jnp.zeros(1, jnp.int32), jnp.zeros((1, *p.shape[1:]), p.dtype), p.shape)
        return state.tx.update(tree.unflatten(leaves.values()), opt_state, params)[0]

    if blocks.chosen:
        jax.eval_shape(update, state.params, state.opt_state)


def _step_on_gradients(
    loss_fn: Callable[..., Any], has_aux: bool, axis_name: Any, state: Any, batch: Any, args: Any
) -> tuple[Any, dict[str, Any]]:
    """The step for an optimizer that keeps gradients for later: these have to be RowSparse."""
    state = refresh(loss_fn, has_aux=has_aux, axis_name=axis_name)(state, batch, *args)
    value, grads = value_and_grad(loss_fn, has_aux=has_aux)(state.params, batch, *args)
    loss, aux = value if has_aux else (value, None)
    if axis_name is not None:
        loss, grads = _weighted_mean_of_devices((loss, grads), batch, axis_name)
    grads, opt_state = coalesce_gradients(grads, state.opt_state)
    leaves = jax.tree.leaves(grads, is_leaf=is_row_sparse)
    touched = [(g.ids, g.num_rows) for g in leaves if is_row_sparse(g)]
    metrics = _metrics(loss, [g.rows if is_row_sparse(g) else g for g in leaves], touched)
    state = state.replace(opt_state=opt_state).apply_gradients(grads=grads)
    return state, metrics | ({"aux": aux} if has_aux else {})


def _metrics(loss: jax.Array, grads: list[jax.Array], touched: list[tuple[jax.Array, int]]) -> dict[str, Any]:
    """What a step reports, of coalesced gradients and the ids of each table with its number of rows.

    The norm is one of inner products: of these XLA keeps no array of squares.
    """
    squares = [-jnp.vdot(g, -g, preferred_element_type=jnp.promote_types(g.dtype, jnp.float32)) for g in grads]
    rows = [jnp.sum(in_range(ids, num_rows), dtype=jnp.int32) for ids, num_rows in touched]
    return {
        "loss": loss,
        "grad_norm": jnp.sqrt(sum(squares, jnp.float32(0))),
        "rows_touched": sum(rows, jnp.int32(0)),
    }


def _accumulates(x: object) -> bool:
    return isinstance(x, AccumulateState)


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
