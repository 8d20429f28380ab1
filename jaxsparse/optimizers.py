"""Named lazy optimizers: short aliases of `lazy(optax...)` with long docstrings."""

from __future__ import annotations

from typing import Any

import optax

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
    adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return lazy(adam if before is None else optax.chain(before, adam))
