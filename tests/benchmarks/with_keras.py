"""Keras on JAX: Embedding, mean over the bag and a linear head, in the stateless training loop of its own guide.

Its gradients and its Adam are dense on this backend.
"""

import os
from functools import partial
from typing import Any

import jax
import numpy as np

from tests.benchmarks import workloads
from tests.benchmarks.workloads import ADAM, Case, Made


def make(contestant: str, case: Case) -> Made:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    del contestant
    embedding = keras.layers.Embedding(case.num_rows, case.dim, embeddings_initializer="zeros")
    head = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([embedding, keras.layers.GlobalAveragePooling1D(), head])
    model.build((case.batch, case.length))
    embedding.embeddings.assign(workloads.initial_table(case))
    head.kernel.assign(workloads.initial_head(case)[:, None])
    optimizer = keras.optimizers.Adam(ADAM["lr"], ADAM["b1"], ADAM["b2"], epsilon=ADAM["eps"])
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.BinaryCrossentropy(from_logits=True)

    def loss_fn(params: Any, ids: Any, labels: Any) -> Any:
        return loss_of(labels, model.stateless_call(params, [], ids)[0])

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Any, slots: Any, ids: Any, labels: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, ids, labels)
        return *optimizer.stateless_apply(slots, grads, params), loss

    state = [[variable.value for variable in of.variables] for of in (model, optimizer)]
    ids, labels, _ = workloads.make_batches(case)
    batches = jax.device_put([(i, y[:, None]) for i, y in zip(ids, labels, strict=True)])

    def step(i: int) -> Any:
        *state[:], loss = jax.block_until_ready(train_step(*state, *batches[i]))
        return loss

    return step, lambda ids: np.asarray(state[0][0][ids])
