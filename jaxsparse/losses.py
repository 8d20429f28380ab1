"""What a loss over padded batches needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._checks import message


def weighted_mean(values: Any, weight: Any) -> jax.Array:
    """sum(weight * values) / sum(weight), and 0 where there is no weight at all: a device that holds only padding.

    Values under weight 0 are left out, NaN included, in value and gradient.

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
