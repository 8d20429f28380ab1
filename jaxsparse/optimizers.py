"""Named lazy optimizers: short aliases of `lazy(optax...)` with long docstrings, and two that optax does not have.

All of them take `before=`: a transformation of the coalesced gradient, run first, `optax.clip_by_global_norm(1.0)` say.
Chaining it outside is refused, because there it would meet row ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse.lazy import lazy


def lazy_adam(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on the rows that a gradient touches; all other rows and their moments are frozen.

    For each touched row, g being the sum of the gradients of all occurrences of its id, and t the number of updates so
    far, this one included, whether or not they touched this row:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)

    eps stands outside the bias-corrected root, as in optax.adam and torch.optim.Adam. torch.optim.SparseAdam,
    TensorFlow Addons' LazyAdam and MXNet use lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps'): the same with eps' =
    eps sqrt(1 - b2^t).

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      b1, b2: decay rates of the two moments.
      eps, eps_root: added outside and inside the root.
      mu_dtype: dtype of the first moment; the parameter's by default.
      nesterov: Nesterov momentum, as in optax.adam.
      before: a transformation of the coalesced gradient, run first: `before=optax.clip_by_global_norm(1.0)`. Chaining
        it outside is refused: there it would meet row ids.

    Returns:
      A transformation for dense and row-sparse gradients: `js.lazy(optax.chain(before, optax.adam(...)))`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy_adam(0.1)
      >>> params = jnp.ones((2, 1))
      >>> state = tx.init(params)
      >>> for row in (0, 1, 0):
      ...     grads = js.RowSparse(jnp.array([row]), jnp.ones((1, 1)), (2, 1))
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(p), 4) for p in params[:, 0]]
      [0.8142, 0.9256]

    References:
      Kingma and Ba, "Adam: a method for stochastic optimization", https://arxiv.org/abs/1412.6980
    """
    return _lazy(before, optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov))


def lazy_adamw(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay, on the rows that a gradient touches.

    As `lazy_adam`, with p = p - lr (... + weight_decay p). Only touched rows decay, and only in the steps that touch
    them: a rare row decays less than under dense optax.adamw, which decays every row in every step.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov: as in `lazy_adam`.
      weight_decay: the decay rate, multiplied by the learning rate, as in optax.adamw.
      mask: which parameters decay: a tree of bools, or a function of the parameters that makes one.
      before: a transformation of the coalesced gradient, run first.

    Returns:
      A transformation for dense and row-sparse gradients: `js.lazy(optax.chain(before, optax.adamw(...)))`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy_adamw(0.1, weight_decay=0.5)
      >>> params = jnp.ones((2, 1))
      >>> grads = js.RowSparse(jnp.array([1]), jnp.ones((1, 1)), (2, 1))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(float(p), 4) for p in optax.apply_updates(params, updates)[:, 0]]
      [1.0, 0.85]

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", https://arxiv.org/abs/1711.05101
    """
    adamw = optax.adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov)
    return _lazy(before, adamw)


def lazy_sgd(
    learning_rate: Any,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent on the rows that a gradient touches, with momentum if asked.

    trace = g + momentum trace; p = p - lr trace. A row's momentum waits, frozen, until the row is touched again.

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      momentum: the decay rate of the trace; None for none.
      nesterov: Nesterov momentum, as in optax.sgd.
      accumulator_dtype: dtype of the trace; the parameter's by default.
      before: a transformation of the coalesced gradient, run first.

    Returns:
      A transformation for dense and row-sparse gradients: `js.lazy(optax.chain(before, optax.sgd(...)))`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy_sgd(0.5)
      >>> grads = js.RowSparse(jnp.array([1, 1]), jnp.ones((2, 1)), (2, 1))
      >>> updates, _ = tx.update(grads, tx.init(jnp.ones((2, 1))))
      >>> optax.apply_updates(jnp.ones((2, 1)), updates).ravel().tolist()
      [1.0, 0.0]

    References:
      Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013
    """
    return _lazy(before, optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype))


def lazy_adagrad(
    learning_rate: Any,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    *,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad on the rows that a gradient touches: s = s + g^2; p = p - lr g / sqrt(s + eps).

    A row without a gradient does not move under Adagrad, so this is dense optax.adagrad at the cost of the rows
    touched.

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      initial_accumulator_value: what s starts from.
      eps: added inside the root, as in optax.adagrad.
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
    return _lazy(before, optax.adagrad(learning_rate, initial_accumulator_value, eps))


class RowwiseAdagradState(NamedTuple):
    """The state of `lazy_rowwise_adagrad`'s scaling."""

    sum_of_squares: Any  # like params, shape (num_rows,), float32


def lazy_rowwise_adagrad(
    learning_rate: Any,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-8,
    *,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad with one accumulator a row: s = s + mean_d(g^2); p = p - lr g / (sqrt(s) + eps).

    The accumulators take 1 / d of a table's memory. Dense leaves are treated alike, by their first axis.

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      initial_accumulator_value: what s starts from.
      eps: added to the root.
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

    def init_fn(params: Any) -> RowwiseAdagradState:
        return RowwiseAdagradState(
            jax.tree.map(lambda p: jnp.full(jnp.shape(p)[:1], initial_accumulator_value, jnp.float32), params)
        )

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
    return _lazy(before, optax.chain(by_row, optax.scale_by_learning_rate(learning_rate)))


class FtrlState(NamedTuple):
    """The state of `lazy_ftrl`."""

    z: Any  # like params: the sum of gradients, less what the learning rates' changes are worth
    n: Any  # like params: the sum of squared gradients


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

    The parameters are a function of z and n: start them at zero. A row without a gradient does not move, so this is
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

    return _lazy(before, optax.GradientTransformation(init_fn, update_fn))


def _lazy(
    before: optax.GradientTransformation | None, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    return lazy(inner if before is None else optax.chain(before, inner))
