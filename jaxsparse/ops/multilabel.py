"""Losses and ranking metrics for targets with many labels.

Logits or scores go in, with targets as a BCOO (B, num_labels) that is never made dense. A value for each example comes
out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import scipy.sparse
from jax.experimental.sparse import BCOO

from jaxsparse._checks import check_bcoo, check_float, message
from jaxsparse.ops.embedding import embedding_lookup, sum_by_bag
from jaxsparse.ops.rows import at_least_int32, in_range


def multilabel_loss(logits: Any, y: Any) -> jax.Array:
    """Sigmoid cross-entropy over all labels, with sparse targets:

        loss[i] = sum_k log(1 + exp(logits[i, k])) - y[i, k] logits[i, k]

    Args:
      logits: floating, (B, num_labels).
      y: BCOO (B, num_labels), with 1 where a label applies, or any target in [0, 1]; for example a SciPy matrix in
        `js.batches`. Or a dense array.

    Returns:
      A loss for each example, (B,), in float32 or wider: the sum over labels. Divide by num_labels for the mean.

    Raises:
      TypeError: if logits are not floating, or y is neither BCOO nor dense.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, numpy as np, scipy.sparse, jaxsparse as js
      >>> y = js.from_scipy(scipy.sparse.csr_matrix(np.array([[0., 1., 0.], [0., 0., 0.]])))
      >>> [round(loss, 4) for loss in js.multilabel_loss(jnp.zeros((2, 3)), y).tolist()]
      [2.0794, 2.0794]
    """
    logits, y = _of_one_shape("multilabel_loss", "logits", logits, y)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    negative_losses = jnp.sum(jax.nn.softplus(logits), axis=1)
    if not isinstance(y, BCOO):
        return negative_losses - jnp.sum(y.astype(logits.dtype) * logits, axis=1)
    rows, columns, values = _entries(y, logits.dtype)
    label_logits = logits.at[rows, columns].get(mode="fill", fill_value=0)
    return negative_losses - sum_by_bag(values * label_logits, rows, logits.shape[0])


def sampled_multilabel_loss(
    table: Any,
    hidden: Any,
    y: Any,
    key: Any,
    *,
    num_samples: int,
    bias: Any = None,
    draw: Callable[[Any, int, int], Any] | None = None,
    log_probability: Callable[[Any, int], Any] | None = None,
) -> jax.Array:
    """An estimate of `js.multilabel_loss` from the rows of an example's labels and of a sample of all labels: the
    gradient of an output layer over many labels stays row-sparse.

    With logits o_k = <table[k], hidden> + bias[k], the labels Y of an example (the entries of y), and a sample S,

        loss = sum_{k in Y} softplus(o_k) - y_k o_k  +  sum_{k in S, not in Y} softplus(o_k) / (num_samples P(k))

    Its mean over samples is the loss over all labels; the same holds for the gradient.

    Args:
      table: (num_labels, d).
      hidden: (B, d).
      y: BCOO (B, num_labels) without duplicate entries, as in batches of SciPy matrices.
      key: a jax.random key for the draw: a new one for each step.
      num_samples: labels to draw, with replacement, the same for the whole batch.
      bias: (num_labels,), or None.
      draw: (key, num_samples, num_labels) -> labels (num_samples,); uniform by default.
      log_probability: (labels, num_labels) -> log P of each under `draw`; required with it.

    Returns:
      A loss for each example, (B,), in float32 or wider.

    Raises:
      TypeError: if y is no BCOO.
      ValueError: for shapes that do not fit, num_samples below 1, or one of draw and log_probability without the other.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, scipy.sparse, jaxsparse as js
      >>> y = js.from_scipy(scipy.sparse.csr_matrix(np.eye(2, 1000, 7)))
      >>> loss_fn = jax.jit(js.sampled_multilabel_loss, static_argnames="num_samples")
      >>> loss = loss_fn(jnp.zeros((1000, 4)), jnp.ones((2, 4)), y, jax.random.key(0), num_samples=64)
      >>> [round(each / 1000, 2) for each in loss.tolist()]  # log(2) for each label
      [0.69, 0.69]
    """
    f = "sampled_multilabel_loss"
    table, hidden = jnp.asarray(table), jnp.asarray(hidden)
    check_float(f, "hidden", hidden)
    if hidden.ndim != 2 or hidden.shape[1:] != table.shape[1:]:
        got = f"{table.shape=}, {hidden.shape=}"
        raise ValueError(message(f, "hidden", "of shape (B, d), with table (num_labels, d)", got))
    num_labels, batch_size = table.shape[0], hidden.shape[0]
    check_bcoo(f, "y", y)
    if y.shape != (batch_size, num_labels):
        raise ValueError(message(f, "y", f"of shape (B, num_labels), {(batch_size, num_labels)}", y.shape))
    if (draw is None) != (log_probability is None):
        raise ValueError(message(f, "log_probability", "given with draw, and only then", log_probability))
    if num_samples < 1:
        raise ValueError(message(f, "num_samples", "at least 1", num_samples))
    draw, log_probability = draw or _uniform_draw, log_probability or _uniform_log_probability
    sampled = jax.lax.stop_gradient(draw(key, num_samples, num_labels))  # (S,)

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    hidden = hidden.astype(wide)
    rows, columns, values = _entries(y, wide)  # (nse,)
    read = functools.partial(embedding_lookup, ids=columns, padding_idx=num_labels)
    label_logits = jnp.sum(read(table).astype(wide) * hidden.at[rows].get(mode="fill", fill_value=0), axis=-1)  # (nse,)
    sampled_logits = hidden @ embedding_lookup(table, sampled).astype(wide).T  # (B, S)
    if bias is not None:
        label_logits = label_logits + read(bias).astype(wide)
        sampled_logits = sampled_logits + embedding_lookup(bias, sampled).astype(wide)[None, :]

    def importance(labels: jax.Array) -> jax.Array:
        return jnp.exp(-log_probability(labels, num_labels).astype(wide)) / num_samples

    ordered = jnp.sort(sampled)
    drawn = jnp.searchsorted(ordered, columns, side="right") - jnp.searchsorted(ordered, columns, side="left")
    in_sample = drawn.astype(wide) * importance(
        jnp.minimum(columns, num_labels - 1)
    )  # their share of the sum over the sample
    entry_losses = (1 - in_sample) * jax.nn.softplus(label_logits) - values * label_logits
    of_entries = jnp.where(rows < batch_size, entry_losses, 0)
    of_sample = jnp.sum(jax.nn.softplus(sampled_logits) * importance(sampled)[None, :], axis=1)
    return of_sample + sum_by_bag(of_entries, rows, batch_size)


def precision_at_k(scores: Any, y: Any, k: int) -> jax.Array:
    """Precision at k: the share of the k labels with the highest scores that apply.

    Args:
      scores: (B, num_labels). For equal scores the lower label comes first.
      y: BCOO or dense (B, num_labels), greater than 0 where a label applies.
      k: at most num_labels.

    Returns:
      A number for each example, (B,), float32; 0 if no label applies, NaN if a score is. As a metric for `js.evaluate`
      write `js.weighted_mean(precision, batch.weight)`.

    Raises:
      TypeError: if scores are not floating, or y is neither BCOO nor dense.
      ValueError: if the shapes differ, or k is not in [1, num_labels].

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.precision_at_k(jnp.array([[0.1, 0.9, 0.5]]), jnp.array([[1, 1, 0]]), 2).tolist()
      [0.5]
    """
    relevant, _ = _ranked("precision_at_k", scores, y, k)
    return jnp.mean(jnp.where(jnp.isnan(relevant), relevant, relevant > 0), axis=1)


def ndcg_at_k(scores: Any, y: Any, k: int) -> jax.Array:
    """NDCG at k: the discounted cumulative gain of the k labels with the highest scores, over the largest possible one:

        DCG = sum_{j < k} y[label at rank j] / log2(j + 2)

    Args:
      scores: (B, num_labels). For equal scores the lower label comes first.
      y: BCOO or dense (B, num_labels): the relevance of each label, at least 0. A BCOO has no duplicate entries.
      k: at most num_labels.

    Returns:
      A number for each example, (B,), float32; 0 if no label applies, otherwise NaN if a score is NaN.

    Raises:
      TypeError, ValueError: as `js.precision_at_k`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.ndcg_at_k(jnp.array([[0.1, 0.9, 0.5]]), jnp.array([[0, 1, 1]]), 2).tolist()
      [1.0]

    References:
      Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques"; sklearn.metrics.ndcg_score with
      ignore_ties=True
    """
    relevant, best = _ranked("ndcg_at_k", scores, y, k)
    discount = 1 / jnp.log2(jnp.arange(k, dtype=jnp.float32) + 2)[None, :]
    ideal = jnp.sum(best * discount, axis=1)
    return jnp.where(ideal > 0, jnp.sum(relevant * discount, axis=1) / jnp.where(ideal > 0, ideal, 1), 0)


def _ranked(f: str, scores: Any, y: Any, k: int) -> tuple[jax.Array, jax.Array]:
    """(y at the k labels of the highest scores, the k largest values of y): float32 (B, k) each."""
    scores, y = _of_one_shape(f, "scores", scores, y)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(message(f, "k", f"in [1, {scores.shape[1]}], the labels that there are", k))
    top = jax.lax.top_k(scores, k)[1]  # (B, k)
    unranked = jnp.where(jnp.isnan(scores).any(axis=1, keepdims=True), jnp.nan, jnp.float32(0))
    if not isinstance(y, BCOO):
        y = y.astype(jnp.float32)
        return jnp.take_along_axis(y, top, axis=1) + unranked, jax.lax.top_k(y, k)[0]
    size = scores.shape[0]
    rows, columns, values = _entries(y, jnp.float32)
    is_top = top.at[rows].get(mode="fill", fill_value=-1) == columns[:, None]  # (nse, k)
    relevant = sum_by_bag(jnp.where(is_top, values[:, None], 0), rows, size)
    order = jnp.lexsort((-values, rows))
    rows, values = rows[order], values[order]
    rank = jnp.arange(len(rows)) - jnp.searchsorted(rows, rows)  # within its row
    best = jnp.zeros((size, k), jnp.float32).at[rows, rank].set(values, mode="drop")
    return relevant + unranked, jnp.maximum(best, 0)


def _of_one_shape(f: str, argument: str, logits: Any, y: Any) -> tuple[jax.Array, Any]:
    logits = jnp.asarray(logits)
    check_float(f, argument, logits)
    if isinstance(y, BCOO) or scipy.sparse.issparse(y) or not hasattr(y, "shape"):
        check_bcoo(f, "y", y)
    else:
        y = jnp.asarray(y)
    if logits.ndim != 2 or y.shape != logits.shape:
        raise ValueError(
            message(f, "y", f"of the shape of {argument}, (B, num_labels)", f"{logits.shape=}, {y.shape=}")
        )
    return logits, y


def _entries(y: BCOO, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows, columns, values) of the entries, (nse,) each; padding has row B, column num_labels and value 0."""
    rows, columns = (at_least_int32(y.indices[:, i]) for i in range(2))
    real = in_range(rows, y.shape[0]) & in_range(columns, y.shape[1])
    return (
        jnp.where(real, rows, y.shape[0]),
        jnp.where(real, columns, y.shape[1]),
        jnp.where(real, y.data, 0).astype(dtype),
    )


def _uniform_draw(key: Any, num_samples: int, num_labels: int) -> jax.Array:
    return jax.random.randint(key, (num_samples,), 0, num_labels)


def _uniform_log_probability(labels: jax.Array, num_labels: int) -> jax.Array:
    return -jnp.log(jnp.full(labels.shape, num_labels, jnp.float32))
