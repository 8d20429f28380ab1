"""jaxsparse, and optax without it: the same losses, the optimizer lazy or dense.

The state is a stock TrainState and donated, batches are of js.batches and on the device before anything is timed.
"linen" is the program nobody changed: flax's nn.Embed and a mean instead of js.embedding_bag. js.batches finds the
distinct ids of a batch on the host, which is not in a step's time, but in `host.py`'s: "counted" is a step that is told
their number only, and "arrays" one that is told nothing, as for arrays that are not of js.batches. "js.jit" is a stock
step, with optax's own optimizer where there is one, on NumPy's arrays: its sorting of ids on the host is in the time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from flax.training.train_state import TrainState

import jaxsparse as js
from tests.benchmarks import workloads
from tests.benchmarks.workloads import ADAM, EPS, FTRL, RATES, Case, Made


def logits(case: Case, params: Any, x: Any) -> jax.Array:
    table = params["table"]
    if case.model == "bag":
        return js.embedding_bag(table, x, combiner="mean") @ params["head"]
    if case.model == "fields":
        return js.embedding_lookup(table, x).reshape(case.batch, -1) @ params["head"]
    sums = js.dot(x, table)
    return jnp.tanh(sums) @ params["head"] if case.has_head else sums[:, 0]


def linen_logits(case: Case, params: Any, x: Any) -> jax.Array:
    embed = nn.Embed(case.num_rows, case.dim)
    return embed.apply({"params": {"embedding": params["table"]}}, x).mean(1) @ params["head"]


def make_optimizer(case: Case, *, lazy: bool) -> optax.GradientTransformation:
    rule, rate = case.rule, RATES.get(case.rule)
    if rule == "adam":
        skipped = {"skipped": "replay" if case.optimizer == "adam_replay" else "freeze"} if lazy else {}
        return (js.lazy_adam if lazy else optax.adam)(ADAM["lr"], ADAM["b1"], ADAM["b2"], ADAM["eps"], **skipped)
    if rule == "adagrad":
        return (js.lazy_adagrad if lazy else optax.adagrad)(rate, 0.0, EPS**2)  # inside the root
    if rule == "sgd":
        return (js.lazy_sgd if lazy else optax.sgd)(rate)
    return js.lazy_rowwise_adagrad(rate, 0.0, EPS) if rule == "rowwise_adagrad" else js.lazy_ftrl(rate, **FTRL)


def make_data(case: Case) -> js.Batches:
    ids, labels, values = workloads.make_batches(case)
    x = ids.reshape(-1, case.length)
    if values is not None:
        starts = np.arange(0, ids.size + 1, case.length)
        x = scipy.sparse.csr_matrix((values.ravel(), ids.ravel(), starts), (labels.size, case.num_rows))
    return js.batches(x, labels.ravel(), batch_size=case.batch)


def make_loss(case: Case, program: Callable[..., jax.Array] = logits) -> Callable[..., jax.Array]:
    def loss_fn(params: Any, batch: js.Batch) -> jax.Array:
        losses = optax.sigmoid_binary_cross_entropy(program(case, params, batch.x), batch.y)
        return js.weighted_mean(losses, batch.weight)

    return loss_fn


def make_state(case: Case, tx: optax.GradientTransformation) -> TrainState:
    head = {"head": jnp.array(workloads.initial_head(case))} if case.has_head else {}
    params = {"table": jnp.array(workloads.initial_table(case)), **head}
    return TrainState.create(apply_fn=None, params=params, tx=tx)


def make(contestant: str, case: Case) -> Made:
    loss_fn, dense = make_loss(case, linen_logits if contestant == "linen" else logits), contestant == "optax"

    def dense_step(state: TrainState, batch: js.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": loss}

    stock = contestant == "js.jit"
    train_step = js.jit(dense_step) if stock else js.make_train_step(loss_fn)
    train_step = jax.jit(dense_step, donate_argnums=0) if dense else train_step
    lazy = not dense and not (stock and case.rule in ("adam", "adagrad", "sgd"))
    batches, state = list(make_data(case)), make_state(case, make_optimizer(case, lazy=lazy))
    if stock:
        batches = jax.tree.map(np.asarray, batches)
    if contestant == "counted":
        batches = jax.device_put(batches)
    if contestant == "arrays":
        batches = [dataclasses.replace(batch, distinct=(None,) * len(batch.distinct)) for batch in batches]

    def step(i: int) -> jax.Array:
        nonlocal state
        state, metrics = jax.block_until_ready(train_step(state, batches[i]))
        return metrics["loss"]

    def rows(ids: np.ndarray) -> np.ndarray:
        nonlocal state
        state = js.flush(state)
        return np.asarray(state.params["table"][ids])

    return step, rows
