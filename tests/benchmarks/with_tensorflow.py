"""TensorFlow: reads whose gradients are IndexedSlices, in a tf.function, and optimizers that update by row.

Runs in an environment of its own, see `__main__.py`. Bags are of tf.nn.embedding_lookup_sparse with int32 ids: a third
less time than tf.gather and a mean. Adam is TensorFlow Addons' LazyAdam, the others are Keras' legacy optimizers; the
new SGD takes ten times as long.
"""

from typing import Any

import numpy as np

from tests.benchmarks import workloads
from tests.benchmarks.workloads import ADAM, EPS, FTRL, RATES, Case, Made


def make(contestant: str, case: Case) -> Made:
    import tensorflow as tf

    del contestant
    ids, labels, values = workloads.make_batches(case)
    arrays = ids, labels, labels if values is None else values
    batches = [tuple(map(tf.constant, batch)) for batch in zip(*arrays, strict=True)]
    table, head = tf.Variable(workloads.initial_table(case)), tf.Variable(workloads.initial_head(case))
    variables, optimizer = [table, head] if case.has_head else [table], _optimizer(case)
    places = tf.constant(np.argwhere(np.ones((case.batch, case.length))), tf.int64)

    def combined(ids: Any, weights: Any, combiner: str) -> Any:
        ids, weights = (
            None if x is None else tf.SparseTensor(places, tf.reshape(x, [-1]), [case.batch, case.length])
            for x in (ids, weights)
        )
        return tf.nn.embedding_lookup_sparse(table, ids, weights, combiner=combiner)

    def logits(ids: Any, values: Any) -> Any:
        if case.model == "bag":
            return tf.linalg.matvec(combined(ids, None, "mean"), head)
        if case.model == "fields":
            return tf.linalg.matvec(tf.reshape(tf.gather(table, ids), (case.batch, -1)), head)
        sums = combined(ids, values, "sum")
        return tf.linalg.matvec(tf.tanh(sums), head) if case.has_head else sums[:, 0]

    @tf.function
    def train_step(ids: Any, labels: Any, values: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits(ids, values)))
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return lambda i: train_step(*batches[i]).numpy(), lambda ids: tf.gather(table, ids).numpy()


def _optimizer(case: Case) -> Any:
    import tensorflow as tf
    import tensorflow_addons as tfa

    legacy, rate = tf.keras.optimizers.legacy, RATES.get(case.rule)
    if case.rule == "adam":
        return tfa.optimizers.LazyAdam(ADAM["lr"], ADAM["b1"], ADAM["b2"], ADAM["eps"])
    if case.rule == "adagrad":
        return legacy.Adagrad(rate, initial_accumulator_value=0.0, epsilon=EPS)
    if case.rule == "ftrl":
        settings = {"l1_regularization_strength": FTRL["l1"], "beta": FTRL["beta"]}
        return legacy.Ftrl(rate, initial_accumulator_value=0.0, **settings)
    return legacy.SGD(rate)
