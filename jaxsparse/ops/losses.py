"""Losses for padded batches, unbalanced labels and large vocabularies.

`weighted_mean` reduces the losses of a batch whose padding has weight 0. `inverse_frequency_weights` gives weights for
rare classes. `sampled_softmax` is a cross-entropy whose gradient stays row-sparse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import as_ids, message
from jaxsparse.ops.embedding import embedding_lookup
from jaxsparse.ops.rows import at_least_int32, in_range


def weighted_mean(values: Any, weight: Any) -> jax.Array:
    """sum(weight * values) / sum(weight), or 0 if all weights are 0, as on a device that holds only padding.

    Values with weight 0, even NaN, change neither the result nor its gradient.

    Args:
      values: one value for each example, shape (B,), floating.
      weight: shape (B,), usually `batch.weight`.

    Returns:
      A scalar of values' dtype.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.weighted_mean(jnp.array([1., 3., jnp.nan]), jnp.array([1., 1., 0.])).item()
      2.0
    """
    values, weight = jnp.asarray(values), jnp.asarray(weight)
    if values.shape != weight.shape:
        raise ValueError(
            message("weighted_mean", "weight", f"of the shape of values, {values.shape}", f"{weight.shape=}")
        )
    weight = weight.astype(values.dtype)
    total = jnp.sum(weight)
    return jnp.sum(jnp.where(weight == 0, 0, values) * weight) / jnp.where(total == 0, 1, total)


def inverse_frequency_weights(labels: Any, num_classes: int | None = None) -> np.ndarray:
    """A weight for each class: log(total / count). Host side.

    scikit-learn's class_weight="balanced" is total / (num_classes * count) instead. A class that is half as frequent
    gets twice the weight there, and log(2) more here.

    Args:
      labels: integers >= 0, any shape.
      num_classes: the number of classes; the largest label + 1 by default.

    Returns:
      float32 (num_classes,). A class that does not occur has weight 0, and so does a class that is the only one. Use
      them as weights of examples: `js.batches(..., weight=weights[labels])`.

    Raises:
      TypeError: if labels are not integers.
      ValueError: if a label is outside [0, num_classes).

    Example:
      >>> import jaxsparse as js
      >>> [round(float(w), 4) for w in js.inverse_frequency_weights([0, 0, 0, 2])]
      [0.2877, 0.0, 1.3863]
    """
    labels = np.asarray(as_ids("inverse_frequency_weights", "labels", labels)).reshape(-1)
    top = int(labels.max(initial=-1)) + 1
    num_classes = top if num_classes is None else num_classes
    if top > num_classes or labels.min(initial=0) < 0:
        got = f"{int(labels.min())} to {top - 1}"
        raise ValueError(message("inverse_frequency_weights", "labels", f"in [0, {num_classes})", got))
    counts = np.bincount(labels, minlength=num_classes)
    return np.where(counts > 0, np.log(max(len(labels), 1) / np.maximum(counts, 1)), 0).astype(np.float32)


def sampled_softmax(
    table: Any,
    hidden: Any,
    labels: Any,
    key: Any,
    *,
    num_samples: int,
    bias: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    draw: Callable[[Any, int, int], Any] | None = None,
    log_probability: Callable[[Any, int], Any] | None = None,
    remove_accidental_hits: bool = True,
) -> jax.Array:
    """Cross-entropy over a large vocabulary, from the rows of the labels and of a sample of classes: the gradient of a
    tied output layer stays row-sparse.

    With logits o_k = <table[k], hidden> + bias[k] - log(num_samples P(k)), over the label and the sampled classes only:

        loss = logsumexp(o_label, o_sampled) - o_label

    With the correction by the expected count, the gradient approaches that of the full softmax. The table is read at
    labels and samples only, so its gradient is row-sparse.

    Args:
      table: (num_classes, d).
      hidden: (B, d).
      labels: integers (B,) in [0, num_classes), or (B, n) for several labels of an example; o_label is their mean.
      key: a jax.random key for the draw, a new one for each step: jax.random.fold_in(key, step). With one key, every
        step has the same negatives.
      num_samples: classes to draw, with replacement, the same for the whole batch.
      bias: (num_classes,), or None.
      ignore_index: a label that is left out and touches no row. An example without any other label has loss 0.
      label_smoothing: the share of the target that is spread evenly over the label and the sampled classes.
      draw: (key, num_samples, num_classes) -> classes (num_samples,). The default is log-uniform, for classes that are
        sorted by frequency.
      log_probability: (classes, num_classes) -> log P of each under `draw`; required with it.
      remove_accidental_hits: whether to leave out sampled classes that are the label of the example.

    Returns:
      A loss for each example, (B,), in float32 or wider; NaN, without a gradient, if a label is out of range.

    Raises:
      TypeError: if labels are not integers.
      ValueError: for shapes that do not fit, or one of draw and log_probability without the other.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> table, hidden, labels = jnp.ones((1000, 4)), jnp.ones((2, 4)), jnp.array([3, 999])
      >>> js.sampled_softmax(table, hidden, labels, jax.random.key(0), num_samples=64).shape
      (2,)

    References:
      Bengio and Senecal, "Adaptive importance sampling to accelerate training of a neural probabilistic language
      model"; tf.nn.sampled_softmax_loss
    """
    f = "sampled_softmax"
    table, hidden, labels = jnp.asarray(table), jnp.asarray(hidden), at_least_int32(as_ids(f, "labels", labels))
    if hidden.ndim != 2 or hidden.shape[1:] != table.shape[1:] or labels.shape[:1] != hidden.shape[:1]:
        got = f"{table.shape=}, {hidden.shape=}, {labels.shape=}"
        raise ValueError(message(f, "hidden", "of shape (B, d), with table (num_classes, d) and labels (B,)", got))
    if labels.ndim > 2:
        raise ValueError(message(f, "labels", "of shape (B,) or (B, n)", labels.shape))
    if (draw is None) != (log_probability is None):
        raise ValueError(message(f, "log_probability", "given with draw, and only then", log_probability))
    num_classes, labels = table.shape[0], labels[:, None] if labels.ndim == 1 else labels
    draw, log_probability = draw or log_uniform_draw, log_probability or log_uniform_log_probability
    sampled = jax.lax.stop_gradient(draw(key, num_samples, num_classes))  # (S,)

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    hidden, log_samples = hidden.astype(wide), float(np.log(num_samples))
    is_given = labels != ignore_index  # (B, n)
    real = is_given & in_range(labels, num_classes)
    read = functools.partial(embedding_lookup, ids=jnp.where(real, labels, num_classes), padding_idx=num_classes)
    label_logits = jnp.sum(read(table).astype(wide) * hidden[:, None], axis=-1)  # (B, n)
    sampled_logits = hidden @ embedding_lookup(table, sampled).astype(wide).T  # (B, S)
    if bias is not None:
        label_logits = label_logits + read(bias).astype(wide)
        sampled_logits = sampled_logits + embedding_lookup(bias, sampled).astype(wide)[None, :]
    label_logits = label_logits - log_probability(jnp.where(real, labels, 0), num_classes).astype(wide) - log_samples
    sampled_logits = sampled_logits - (log_probability(sampled, num_classes).astype(wide) + log_samples)[None, :]
    is_negative = jnp.ones(sampled_logits.shape, bool)
    if remove_accidental_hits:
        is_negative = ~jnp.any(sampled[None, None, :] == labels[:, :, None], axis=1)
    logits = jnp.concatenate([label_logits, sampled_logits], axis=1)
    is_candidate = jnp.concatenate([real, is_negative], axis=1)
    target = _mean_where(label_logits, real)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * _mean_where(logits, is_candidate)
    loss = jax.nn.logsumexp(jnp.where(is_candidate, logits, -jnp.inf), axis=1) - target
    loss = jnp.where(jnp.any(real, axis=1), loss, 0)
    return jnp.where(jnp.any(is_given & ~real, axis=1), jnp.nan, loss)


def _mean_where(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """The mean of the chosen elements of each row, and 0 if none is chosen."""
    count = jnp.maximum(jnp.sum(chosen, axis=1, dtype=x.dtype), 1)
    return jnp.sum(jnp.where(chosen, x, 0), axis=1) / count


def log_uniform_draw(key: Any, num_samples: int, num_classes: int) -> jax.Array:
    """Classes (num_samples,), with replacement, with P(k) = log((k + 2) / (k + 1)) / log(num_classes + 1)."""
    power = jax.random.uniform(key, (num_samples,)) * float(np.log(num_classes + 1))
    return jnp.clip(jnp.exp(power).astype(jnp.int32) - 1, 0, num_classes - 1)


def log_uniform_log_probability(classes: Any, num_classes: int) -> jax.Array:
    """log P of each class under `log_uniform_draw`."""
    return jnp.log(jnp.log1p(1 / (classes.astype(jnp.float32) + 1)) / float(np.log(num_classes + 1)))
