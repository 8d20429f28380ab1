"""Evaluates metrics over a data set, and predicts for every example.

A function, a state and batches go in. `evaluate` returns the means over all examples; `predict` returns one array for
all examples, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import message
from jaxsparse.data.pipeline import Batches
from jaxsparse.data.stream import Stream
from jaxsparse.ops.metrics import Auc, area
from jaxsparse.ops.rows import is_stored
from jaxsparse.train.refresh import check_flushed
from jaxsparse.train.rowwise import on_rows, prepare_step


def evaluate(metric_fn: Callable[..., dict[str, Any]], state: Any, batches: Any) -> dict[str, float]:
    """The means of some metrics over the examples of one epoch.

    Args:
      metric_fn: metric_fn(params, batch) -> a dict of scalars, each a mean over the examples of the batch that have
        weight. A value may also be that of `js.auc`, which is then computed over all examples at once.
      state: an object with the parameters in `state.params`.
      batches: a `js.Batches` or `js.Stream`, of which it takes one whole epoch without moving its position, or an
        iterable of batches.

    Returns:
      The metrics. A batch counts by the sum of its `batch.weight`, or as 1 if it has no weight. NaN if the sum over
        all batches is 0.

    Raises:
      TypeError: if metric_fn returns anything else.
      ValueError: if there are no batches; or, with untouched="replay", if the state needs js.flush.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> state = TrainState.create(apply_fn=None, params={"b": jnp.float32(1)}, tx=js.lazy_sgd(0.1))
      >>> batches = js.batches([[0], [1], [2]], [1., 2., 6.], num_rows=3, batch_size=2)
      >>> metric_fn = lambda params, batch: {"error": js.weighted_mean(batch.y - params["b"], batch.weight)}
      >>> js.evaluate(metric_fn, state, batches)
      {'error': 2.0}
    """
    return means(metric_fn, state, batches, "evaluate", "metric_fn", "batches")


def means(metric_fn: Any, state: Any, batches: Any, function: str, fn_argument: str, argument: str) -> dict[str, float]:
    check_flushed(function, getattr(state, "opt_state", None))
    compiled = jax.jit(reading_rows(metric_fn))
    totals: dict[str, float] = {}
    auc_parts: dict[str, list[Auc]] = {}
    weight, batch = 0.0, None
    for batch in one_epoch(batches):
        batch_weight = float(np.asarray(weight_of(batch)).sum(dtype=np.float64))
        weight += batch_weight
        if batch_weight:
            for name, value in check_scalars(compiled(state.params, batch), function, fn_argument).items():
                if isinstance(value, Auc):
                    auc_parts.setdefault(name, []).append(jax.device_get(value))
                totals[name] = 0.0 if isinstance(value, Auc) else totals.get(name, 0.0) + batch_weight * float(value)
    if batch is None:
        raise ValueError(message(function, argument, "at least one batch", "none", advice_on_none(batches)))
    if not weight:
        totals = dict.fromkeys(compiled.eval_shape(state.params, batch), 0.0)
    of_batches = {name: total / weight if weight else float("nan") for name, total in totals.items()}
    return of_batches | {name: area(parts) for name, parts in auc_parts.items()}


def reading_rows(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` for parameters that may be packed: it reads rows of packed tables."""

    def step(params: Any, *args: Any) -> Any:
        return params, fun(params, *args)

    def run(params: Any, *args: Any) -> Any:
        if not any(map(is_stored, jax.tree.leaves(params, is_leaf=is_stored))):
            return fun(params, *args)
        prepared = prepare_step(step, (params, *args), {}, 0)
        traced = prepared.planned.traced
        return traced.unflatten(on_rows(prepared, traced.leaves))[1]

    return run


def check_scalars(metrics: Any, function: str, argument: str) -> Mapping[str, Any]:
    """Returns the metrics of a batch, or their abstract values. Raises TypeError unless they are a dict of scalars."""
    must = "a function that returns a dict of scalars"
    if not isinstance(metrics, Mapping):
        got = f"shape {metrics.shape}" if hasattr(metrics, "shape") else type(metrics).__name__
        do = 'Give it a name: lambda params, batch: {"loss": loss_fn(params, batch)}.'
        raise TypeError(message(function, argument, must, f"one that returns {got}", do))
    for name, value in metrics.items():
        if isinstance(value, Auc):
            continue
        shape = getattr(value, "shape", None)
        if shape != ():
            got = f"{name!r} of {type(value).__name__ if shape is None else f'shape {shape}'}"
            do = "Take the mean over the examples: js.weighted_mean(values, batch.weight)."
            raise TypeError(message(function, argument, must, got, do))
    return metrics


def one_epoch(batches: Any) -> Any:
    return batches.one_epoch() if isinstance(batches, (Batches, Stream)) else batches


def weight_of(batch: Any) -> Any:
    """An array whose sum is the weight of a batch. It is summed later, because reading a value waits for the device."""
    weight = getattr(batch, "weight", None)
    if isinstance(weight, jax.Array) and not weight.is_fully_addressable:  # other hosts hold a part of it
        return _sum(weight)
    return 1.0 if weight is None else weight


@jax.jit
def _sum(weight: jax.Array) -> jax.Array:
    return jnp.sum(weight, dtype=jnp.float32)


def advice_on_none(batches: Any) -> str:
    """What to do about an epoch without batches."""
    if isinstance(batches, Stream):
        return "Its examples fill no batch: lower batch_size or drop_remainder=False."
    if not isinstance(batches, Batches):
        return "An iterator is used up after one pass: give js.batches or a list."
    if not batches.num_examples:
        return "They have no examples."
    if not len(batches):
        size = batches.state["batch_size"]
        return (
            f"Their {batches.num_examples} examples fill no batch of {size}: lower batch_size or drop_remainder=False."
        )
    return "Their position was at the end of an epoch."


def predict(apply_fn: Callable[..., Any], state: Any, batches: Batches | Stream) -> np.ndarray:
    """A model's outputs for every example, in the order of the data, without padding.

    Args:
      apply_fn: apply_fn(params, x) -> an array (B, ...).
      state: an object with the parameters in `state.params`.
      batches: of `js.batches` or `js.stream`, without shuffle, drop_remainder, devices and shard. The prediction starts
        at the first example and does not move their position.

    Returns:
      A NumPy array (n, ...).

    Raises:
      TypeError: if batches are of neither, or apply_fn returns no array (B, ...).
      ValueError: if the batches leave examples out or have another order; or, with untouched="replay", if the state
        needs js.flush.

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
    if not isinstance(batches, (Batches, Stream)):
        raise TypeError(message("predict", "batches", "what js.batches or js.stream returns", type(batches).__name__))
    settings = batches.state
    wrong = [f"{name}=True" for name in ("shuffle", "drop_remainder") if settings[name]]
    wrong += ["shard"] if batches.is_part else []
    wrong += [] if batches.num_devices is None else [f"devices={batches.num_devices}"]
    if wrong:
        got, do = f"batches with {', '.join(wrong)}", "Make batches of their own for predictions."
        raise ValueError(message("predict", "batches", "all examples in their order", got, do))
    compiled, parts = jax.jit(reading_rows(apply_fn)), []
    for batch, count in batches.counted_epoch():
        outputs = compiled(state.params, batch.x)
        if getattr(outputs, "shape", ())[:1] != (settings["batch_size"],):
            got = f"shape {outputs.shape}" if hasattr(outputs, "shape") else type(outputs).__name__
            size = settings["batch_size"]
            must = f"a function that returns an array ({size}, ...), a row for each example of a batch"
            raise TypeError(message("predict", "apply_fn", must, got))
        parts.append(np.asarray(outputs)[:count])
    if not parts:
        raise ValueError(message("predict", "batches", "at least one example", "none"))
    return np.concatenate(parts)
