"""`stochastic_rounding(inner)`: any optax transformation for 16-bit parameters, without a float32 copy of them.

bfloat16 has 8 significant bits. Parameters between 1 and 2 are multiples of 2^-7 = 0.008. If sums are rounded to
nearest, an update of 0.001 is lost at every step. If a sum is rounded up or down at random, in proportion to its
distance from the two neighbours, the update is kept on average.

The noise is a hash of seed, step, leaf, row and position in the row. So it is computed only for the rows that a step
reads, and is the same in a dense step, in a row-sparse step and on all devices.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import check_transformation, message
from jaxsparse._context import row_numbers
from jaxsparse.ops.row_sparse import is_row_sparse


class StochasticRoundingState(NamedTuple):
    """The number of updates, and the state of the wrapped transformation."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    inner_state: Any


def stochastic_rounding(inner: optax.GradientTransformation, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Rounds new parameters of 16 bits (bfloat16, float16) up or down at random, so that small updates are not lost.

    p + u, made in float32, lies between two neighbours a < b of the parameter's type. The new parameter is

        b with probability (p + u - a) / (b - a), and a otherwise,

    whose mean is p + u. inner gets 16-bit gradients and parameters as float32. So its moments are float32, as if there
    were a float32 copy of the table. Other parameters are updated by inner alone.

    Use it in any optax step; under `js.jit` it costs what the rows cost. With `js.lazy`, put it inside, around the
    whole chain: `js.lazy(js.stochastic_rounding(optax.adamw(1e-3)))`.

    Args:
      inner: an optax transformation, usually a whole chain.
      seed: an integer. Each seed gives other noise.

    Returns:
      A transformation. Its updates of 16-bit parameters are float32, the new parameter minus the old one.
      `optax.apply_updates` adds them in float32, and so gives exactly the new parameter.

    Raises:
      TypeError: if inner is no transformation; from update, if a gradient is a RowSparse.
      ValueError: from update without params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> def train(tx, steps=100):
      ...     @js.jit
      ...     def step(state, ids):
      ...         table, opt_state = state
      ...         gradient = jax.grad(lambda table: jnp.sum(table[ids]))(table)
      ...         updates, opt_state = tx.update(gradient, opt_state, table)
      ...         return optax.apply_updates(table, updates), opt_state
      ...     state = jnp.ones((4, 1000), jnp.bfloat16), tx.init(jnp.ones((4, 1000), jnp.bfloat16))
      ...     for _ in range(steps):
      ...         state = step(state, jnp.array([2]))
      ...     return [round(float(x), 2) for x in state[0].astype(jnp.float32).mean(1)]
      >>> train(optax.sgd(1e-3))  # rounded to nearest, 1 - 0.001 is 1
      [1.0, 1.0, 1.0, 1.0]
      >>> train(js.stochastic_rounding(optax.sgd(1e-3)))
      [1.0, 1.0, 0.9, 1.0]

    References:
      Gupta et al., "Deep learning with limited numerical precision", https://arxiv.org/abs/1502.02551
      FBGEMM's stochastic_rounding, torchao's bf16_stochastic_round
    """
    check_transformation("stochastic_rounding", "inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> StochasticRoundingState:
        return StochasticRoundingState(jnp.zeros((), jnp.int32), inner.init(_widened(params, params)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if any(map(is_row_sparse, jax.tree.leaves(updates, is_leaf=is_row_sparse))):
            do = "Put it inside: js.lazy(js.stochastic_rounding(optax.adam(1e-3)))."
            raise TypeError(message("stochastic_rounding", "updates", "of arrays", "a js.RowSparse", do))
        if params is None:
            do = "Pass params to update."
            raise ValueError(message("stochastic_rounding", "params", "the parameters", "None", do))
        count, inner_state = state
        wide = _widened(params, params)
        updates, inner_state = inner.update(_widened(updates, params), inner_state, wide, **extra_args)
        leaves, tree = jax.tree.flatten(updates)
        param_leaves, wide_leaves = jax.tree.leaves(params), jax.tree.leaves(wide)
        step = _mixed(_mixed(jnp.uint32(seed % 2**32)) ^ count.astype(jnp.uint32))
        for i, (u, p, param) in enumerate(zip(leaves, wide_leaves, param_leaves, strict=True)):
            if _is_16_bit(param):
                new = _rounded(p + u, _noise(_mixed(step + jnp.uint32(i)), p), param.dtype)
                leaves[i] = jnp.where(jnp.isfinite(p + u), new - p, u)
        return jax.tree.unflatten(tree, leaves), StochasticRoundingState(optax.safe_increment(count), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_16_bit(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.dtype(x.dtype).itemsize == 2


def _widened(tree: Any, params: Any) -> Any:
    """A tree like params, with 16-bit leaves as float32."""
    return jax.tree.map(lambda p, x: x.astype(jnp.float32) if _is_16_bit(p) else x, params, tree)


def _rounded(x: jax.Array, noise: jax.Array, dtype: Any) -> jax.Array:
    """float32 values rounded to a neighbour in a 16-bit type, up with the probability that `noise` (uint32) decides."""
    wide, narrow = jnp.finfo(jnp.float32), jnp.finfo(dtype)
    eps, smallest = float(narrow.eps), max(float(narrow.tiny), float(wide.tiny / narrow.eps))  # XLA has no subnormals
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)  # of 2, at most |x|
    spacing = jnp.maximum(power, smallest) * eps  # of neighbours: x / spacing is exact, also with the noise added
    dropped_bits = wide.nmant - narrow.nmant
    fraction = (noise >> (32 - dropped_bits)).astype(jnp.float32) * 2.0**-dropped_bits  # in [0, 1)
    return jnp.floor(x / spacing + fraction) * spacing


def _noise(key: jax.Array, x: jax.Array) -> jax.Array:
    """Random bits, uint32, of x's shape. Those of a row depend on its row number, not on its position in x."""
    if not x.ndim:
        return key
    row = _mixed(_mixed(row_numbers(x).astype(jnp.uint32)) ^ key).reshape(-1, *[1] * (x.ndim - 1))
    place = jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32).reshape(1, *x.shape[1:])
    return _mixed(row + place * jnp.uint32(0x9E3779B9))


def _mixed(h: jax.Array) -> jax.Array:
    """Mixes bits, so that each bit of the result depends on all bits of h: the last step of MurmurHash3."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
