"""Lazy optimizers that never move a row without a gradient: Adagrad, by element and by row, and FTRL.

Their dense versions also change only the rows that a gradient touches, so there is nothing to replay. The Adagrads
accept `untouched=` like other optimizers; both values do the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import check_choice, message
from jaxsparse._names import other_names
from jaxsparse.ops.rows import is_stored
from jaxsparse.optim.optimizers import OF_SGD, RENAMED, UNTOUCHED, lazy_chain


@other_names("lazy_adagrad", OF_SGD, renamed=RENAMED)
def lazy_adagrad(
    learning_rate: Any,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    *,
    untouched: str = "freeze",
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad on the rows that a gradient touches: s = s + g^2; p = p - lr g / sqrt(s + eps).

    A row without a gradient does not move under Adagrad, so this is dense optax.adagrad at the cost of the rows
    touched.

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      initial_accumulator_value: what s starts from.
      eps: added inside the root, as in optax.adagrad.
      untouched: "freeze" or "replay", which are the same here.
      before: a transformation of the coalesced gradient, run first.

    Returns:
      A transformation for dense and row-sparse gradients: `js.lazy(optax.chain(before, optax.adagrad(...)))`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy_adagrad(0.1, initial_accumulator_value=0.0)
      >>> grads = js.RowSparse(jnp.array([1]), jnp.full((1, 1), 5.), (2, 1))
      >>> updates, _ = tx.update(grads, tx.init(jnp.ones((2, 1))))
      >>> [round(float(p), 4) for p in optax.apply_updates(jnp.ones((2, 1)), updates)[:, 0]]
      [1.0, 0.9]

    References:
      Duchi et al., "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 2011
    """
    check_choice("lazy_adagrad", "untouched", untouched, UNTOUCHED)
    return lazy_chain("lazy_adagrad", before, optax.adagrad(learning_rate, initial_accumulator_value, eps))


class RowwiseAdagradState(NamedTuple):
    """The state of `lazy_rowwise_adagrad`'s scaling."""

    sum_of_squares: Any  # like params, shape (num_rows,), float32


@other_names("lazy_rowwise_adagrad", OF_SGD, renamed=RENAMED)
def lazy_rowwise_adagrad(
    learning_rate: Any,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-8,
    *,
    untouched: str = "freeze",
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad with one accumulator a row: s = s + mean_d(g^2); p = p - lr g / (sqrt(s) + eps).

    The accumulators take 1 / d of a table's memory. Dense leaves are treated alike, by their first axis.

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      initial_accumulator_value: what s starts from.
      eps: added to the root.
      untouched: "freeze" or "replay", which are the same here.
      before: a transformation of the coalesced gradient, run first.

    Returns:
      A transformation for dense and row-sparse gradients.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy_rowwise_adagrad(0.1)
      >>> grads = js.RowSparse(jnp.array([1]), jnp.array([[3., 4.]]), (2, 2))
      >>> updates, _ = tx.update(grads, tx.init(jnp.ones((2, 2))))
      >>> [[round(float(x), 4) for x in row] for row in optax.apply_updates(jnp.ones((2, 2)), updates)]
      [[1.0, 1.0], [0.9151, 0.8869]]

    References:
      FBGEMM's EXACT_ROWWISE_ADAGRAD; Gupta et al., "Training recommender systems at scale",
      https://arxiv.org/abs/2010.11305
    """
    check_choice("lazy_rowwise_adagrad", "untouched", untouched, UNTOUCHED)

    def init_fn(params: Any) -> RowwiseAdagradState:
        def start(p: Any) -> jax.Array:
            return jnp.full(jnp.shape(p)[:1], initial_accumulator_value, jnp.float32)

        return RowwiseAdagradState(jax.tree.map(start, params, is_leaf=is_stored))

    def update_fn(updates: Any, state: RowwiseAdagradState, params: Any = None) -> tuple[Any, RowwiseAdagradState]:
        del params

        def accumulate(g: jax.Array, s: jax.Array) -> jax.Array:
            return s + jnp.mean(jnp.square(g.astype(jnp.float32)), axis=tuple(range(1, g.ndim)))

        def scale(g: jax.Array, s: jax.Array) -> jax.Array:
            root = jnp.sqrt(s) + eps
            return (g / root.reshape(root.shape + (1,) * (g.ndim - root.ndim))).astype(g.dtype)

        sums = jax.tree.map(accumulate, updates, state.sum_of_squares)
        return jax.tree.map(scale, updates, sums), RowwiseAdagradState(sums)

    by_row = optax.GradientTransformation(init_fn, update_fn)
    return lazy_chain("lazy_rowwise_adagrad", before, optax.chain(by_row, optax.scale_by_learning_rate(learning_rate)))


class FtrlState(NamedTuple):
    """The state of `lazy_ftrl`."""

    z: Any  # like params: the sum of g - sigma w
    n: Any  # like params: the sum of squared gradients


@other_names("lazy_ftrl", OF_SGD | {"alpha": "Write learning_rate=."})
def lazy_ftrl(
    learning_rate: float,
    beta: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
    *,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FTRL-Proximal on the rows that a gradient touches: the classic for sparse linear models, with exact zeros.

    For each coordinate w of a touched row:

        sigma = (sqrt(n + g^2) - sqrt(n)) / lr        z = z + g - sigma w        n = n + g^2
        w = 0 if |z| <= l1 else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2)

    The parameters are a function of z and n, so start them at zero. A row without a gradient does not move, so this is
    dense FTRL at the cost of the rows touched.

    Args:
      learning_rate: a number (alpha); the rate of a coordinate is lr / (beta + sqrt(n)).
      beta: smooths the first steps.
      l1: the strength of the L1 penalty, which gives exact zeros.
      l2: the strength of the L2 penalty.
      before: a transformation of the coalesced gradient, run first.

    Returns:
      A transformation for dense and row-sparse gradients; its update needs the parameters.

    Raises:
      TypeError: if the learning rate is a schedule, for which z has no meaning.
      ValueError: from update, without parameters.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx, params = js.lazy_ftrl(0.1, l1=1.0), jnp.zeros((3, 1))
      >>> grads = js.RowSparse(jnp.array([0, 1]), jnp.array([[.5], [3.]]), (3, 1))
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [round(float(p), 4) for p in optax.apply_updates(params, updates)[:, 0]]
      [0.0, -0.05, 0.0]

    References:
      McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013, algorithm 1
    """
    if callable(learning_rate):
        raise TypeError(
            message("lazy_ftrl", "learning_rate", "a number", "a schedule", "Its rate falls by itself, with n.")
        )

    def init_fn(params: Any) -> FtrlState:
        return FtrlState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates: Any, state: FtrlState, params: Any = None) -> tuple[Any, FtrlState]:
        if params is None:
            raise ValueError(message("lazy_ftrl", "params", "given to update", None, "tx.update(grads, state, params)"))

        def weight(z: jax.Array, n: jax.Array) -> jax.Array:
            shrunk = jnp.sign(z) * jnp.maximum(jnp.abs(z) - l1, 0)
            return -shrunk / ((beta + jnp.sqrt(n)) / learning_rate + l2)

        n = jax.tree.map(lambda n, g: n + g * g, state.n, updates)
        z = jax.tree.map(
            lambda z, g, n0, n1, w: z + g - (jnp.sqrt(n1) - jnp.sqrt(n0)) / learning_rate * w,
            state.z,
            updates,
            state.n,
            n,
            params,
        )
        return jax.tree.map(lambda z, n, w: weight(z, n) - w, z, n, params), FtrlState(z, n)

    return lazy_chain("lazy_ftrl", before, optax.GradientTransformation(init_fn, update_fn))
