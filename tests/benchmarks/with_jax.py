"""jaxsparse, and optax without it: the same losses, the optimizer lazy or dense.

The state is a stock TrainState and donated, batches are of js.batches and on the device before anything is timed.
"linen" is the program nobody changed: flax's nn.Embed and a mean instead of js.embedding_bag. "js.jit" is a stock step,
with optax's own optimizer where there is one, on NumPy's arrays; "arrays" is js.make_train_step on them. "words" is the
step that is written with js.value_and_grad and js.lazy under jax.jit, which knows nothing of its ids but how many there
are; "words js.jit" the same under js.jit. The sorting of ids is in all of these times. "words batches" is "words" on
batches of js.batches, which know their distinct ids, as those of "jaxsparse" do.
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
        skipped = {"untouched": "replay" if case.optimizer == "adam_replay" else "freeze"} if lazy else {}
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

    def two_words(state: TrainState, batch: js.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads = js.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": loss}

    stock = contestant == "js.jit"
    steps = {
        "optax": lambda: jax.jit(dense_step, donate_argnums=0),
        "js.jit": lambda: js.jit(dense_step),
        "words": lambda: jax.jit(two_words, donate_argnums=0),
        "words batches": lambda: jax.jit(two_words, donate_argnums=0),
        "words js.jit": lambda: js.jit(two_words),
    }
    train_step = steps.get(contestant, lambda: js.make_train_step(loss_fn))()
    lazy = not dense and not (stock and case.rule in ("adam", "adagrad", "sgd"))
    batches, state = list(make_data(case)), make_state(case, make_optimizer(case, lazy=lazy))
    if contestant in ("js.jit", "arrays", "words", "words js.jit"):
        batches = [dataclasses.replace(jax.tree.map(np.asarray, batch), distinct=None) for batch in batches]

    def step(i: int) -> jax.Array:
        nonlocal state
        state, metrics = jax.block_until_ready(train_step(state, batches[i]))
        return metrics["loss"]

    def rows(ids: np.ndarray) -> np.ndarray:
        nonlocal state
        state = js.flush(state)
        return np.asarray(state.params["table"][ids])

    return step, rows
