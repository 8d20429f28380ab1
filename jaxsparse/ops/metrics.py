"""Metrics of a whole data set that are not means over its batches: the area under the ROC curve.

Scores and labels of a batch go in; an `Auc` comes out. `js.evaluate` combines the `Auc`s of all batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import message
from jaxsparse._jax import is_traced
from jaxsparse.ops.losses import weighted_mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Auc:
    """What `js.auc` returns: a pytree whose float() is the area.

    Attributes:
      scores, labels, weight: arrays of one shape.
    """

    scores: Any
    labels: Any
    weight: Any

    def __float__(self) -> float:
        return area([self])

    def __repr__(self) -> str:
        if not all(isinstance(x, np.ndarray | jax.Array) and not is_traced(x) for x in jax.tree.leaves(self)):
            return f"Auc(scores={self.scores}, labels={self.labels}, weight={self.weight})"
        return f"Auc({float(self):.4f}, of {np.size(self.scores)} examples; float() gives the number)"


def auc(scores: Any, labels: Any, weight: Any = None) -> Auc:
    """The area under the ROC curve: the probability that a positive example outranks a negative one. Ties count half.

    As a metric of `js.evaluate` it is exact and over the whole set: the scores of all examples are kept on the host (9
    bytes each) and sorted at the end. Elsewhere call float() on it.

    Args:
      scores: (B,), logits or any increasing function of them.
      labels: (B,), greater than 0 for positive examples: 1 and 0, or 1 and -1.
      weight: (B,), usually `batch.weight`; 1 by default. Examples of weight 0 are left out.

    Returns:
      An `Auc`. The area is NaN if there are no positive or no negative examples, or if a score, label or weight is NaN.

    Raises:
      ValueError: if the shapes differ, or NumPy labels stand before NumPy scores, as in scikit-learn's roc_auc_score.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> float(js.auc(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])))
      0.75
    """
    if isinstance(scores, np.ndarray) and isinstance(labels, np.ndarray):  # reading a JAX array waits for its device
        _check_order(scores, labels)
    scores, labels = jnp.asarray(scores), jnp.asarray(labels)
    weight = jnp.ones(scores.shape, jnp.float32) if weight is None else jnp.asarray(weight)
    for name, x in (("labels", labels), ("weight", weight)):
        if x.shape != scores.shape:
            raise ValueError(message("auc", name, f"of the shape of scores, {scores.shape}", x.shape))
    weight = jnp.where(jnp.isnan(labels) & (weight != 0), jnp.nan, weight)  # neither positive nor negative
    return Auc(scores, labels > 0, weight)


def _check_order(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError if the labels come first, as in scikit-learn: the area would be wrong, but look right."""
    of_scores, of_labels = (np.unique(x[x == x]) for x in (scores, labels))  # without NaN
    if len(of_scores) <= 2 < len(of_labels):
        got, do = f"{len(of_labels)} of them, and {len(of_scores)} scores", "Write js.auc(scores, labels)."
        raise ValueError(message("auc", "labels", "of two values, behind the scores", got, do))


def area(parts: Sequence[Auc]) -> float:
    """The area over all examples of some batches."""
    flat = [[np.asarray(x).reshape(-1) for x in (part.scores, part.labels, part.weight)] for part in parts]
    scores, labels, weight = (np.concatenate(of) for of in zip(*flat, strict=True))
    scores, labels, weight = (x[~(weight <= 0)] for x in (scores.astype(np.float64), labels, weight.astype(np.float64)))
    if np.isnan(scores).any() or np.isnan(weight).any():
        return float("nan")
    order = np.argsort(scores, kind="stable")
    scores, labels, weight = scores[order], labels[order], weight[order]
    starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1])[: len(scores)])  # of runs of equal scores
    positive = np.add.reduceat(np.where(labels, weight, 0), starts) if len(starts) else np.zeros(0)
    negative = np.add.reduceat(np.where(labels, 0, weight), starts) if len(starts) else np.zeros(0)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / pairs) if pairs else float("nan")


def binary_metrics(logits: Any, labels: Any, weight: Any = None) -> dict[str, Any]:
    """Log loss, accuracy and area under the ROC curve of a binary classifier, for `js.evaluate`.

    Args:
      logits: floating, (B,).
      labels: (B,), greater than 0 for positive examples: 1 and 0, or 1 and -1.
      weight: (B,), usually `batch.weight`; 1 by default.

    Returns:
      "loss", the mean sigmoid cross-entropy in nats; "accuracy", that of logits > 0; and "auc", an `Auc`. `js.evaluate`
      returns each for the whole set.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> state = TrainState.create(apply_fn=None, params=jnp.array([-1., 2.]), tx=js.lazy_sgd(0.1))
      >>> batches = js.batches([[0], [1], [1]], [0., 1., 1.], num_rows=2, batch_size=2)
      >>> logits = lambda w, x: js.embedding_bag(w, x, combiner="sum", padding_idx=2)
      >>> metrics = js.evaluate(lambda w, b: js.binary_metrics(logits(w, b.x), b.y, b.weight), state, batches)
      >>> {name: round(value, 4) for name, value in metrics.items()}
      {'accuracy': 1.0, 'auc': 1.0, 'loss': 0.189}
    """
    inputs = auc(logits, labels, weight)
    sign = jnp.where(inputs.labels, -1, 1).astype(inputs.scores.dtype)
    losses = jax.nn.softplus(sign * inputs.scores)
    is_correct = ((inputs.scores > 0) == inputs.labels).astype(losses.dtype)
    accuracy = weighted_mean(is_correct, inputs.weight)
    return {"loss": weighted_mean(losses, inputs.weight), "accuracy": accuracy, "auc": inputs}
