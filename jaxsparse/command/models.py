"""The models of `python -m jaxsparse train`: parameters, a dict of arrays, and outputs (B,) for x (B, num_columns)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxsparse.ops.bcoo import dot

HIDDEN = 64


def init(model: str, num_columns: int, dim: int, key: Any) -> dict[str, jax.Array]:
    """The initial parameters, float32."""
    keys = jax.random.split(key, 3)
    params = {"bias": jnp.zeros(())}
    if model in ("linear", "fm"):
        params["weights"] = jnp.zeros(num_columns)
    if model in ("fm", "mlp"):
        params["table"] = 0.01 * jax.random.normal(keys[0], (num_columns, dim))
    if model == "mlp":
        params["hidden"] = jax.random.normal(keys[1], (dim, HIDDEN)) / dim**0.5
        params["hidden_bias"] = jnp.zeros(HIDDEN)
        params["out"] = jax.random.normal(keys[2], (HIDDEN,)) / HIDDEN**0.5
    return params


def apply(model: str, params: dict[str, jax.Array], x: BCOO) -> jax.Array:
    """The outputs of a model, (B,).

    linear: x w + b. fm: the same plus sum_{j < k} <v_j, v_k> x_j x_k, which is half of
    (sum_j v_j x_j)^2 - sum_j v_j^2 x_j^2, summed over the columns of v. mlp: one hidden layer over sum_j x_j v_j.
    """
    if model == "linear":
        return dot(x, params["weights"]) + params["bias"]
    total = dot(x, params["table"])  # (B, dim)
    if model == "fm":
        squares = BCOO((x.data**2, x.indices), shape=x.shape)
        pairs = jnp.sum(total**2 - dot(squares, params["table"] ** 2), axis=1) / 2
        return dot(x, params["weights"]) + pairs + params["bias"]
    hidden = jax.nn.relu(total @ params["hidden"] + params["hidden_bias"][None, :])
    return hidden @ params["out"] + params["bias"]
