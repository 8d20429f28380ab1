"""Named lazy optimizers: each is `lazy(optax...)` with the settings of the optax optimizer of this name.

`untouched=` says what happens to rows without a gradient. "freeze": nothing; the parameter and its moments stay, as in
torch's SparseAdam and every other lazy Adam. "replay": what the dense optimizer does to them, computed when the row is
next needed; see `replaying.py`.

`before=` is a transformation of the coalesced gradient that runs first, such as `optax.clip_by_global_norm(1.0)`.
Outside, in an optax.chain, it would get row ids, and raises.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import check_choice
from jaxsparse._names import OF_ADAM, OF_OPTIMIZERS, other_names
from jaxsparse.optim.before import checked_before
from jaxsparse.optim.catch_up import Adam, Decay, check_adam, check_rates
from jaxsparse.optim.lazy import lazy
from jaxsparse.optim.replaying import replay

UNTOUCHED = ("freeze", "replay")
RENAMED = {"skipped": "untouched"}
OF_SGD = OF_OPTIMIZERS | {"weight_decay": "Use before=optax.add_decayed_weights(...)."}
OF_RMSPROP = OF_SGD | {"alpha": "Write decay=.", "rho": "Write decay=."}


@other_names("lazy_adam", OF_ADAM, renamed=RENAMED)
def lazy_adam(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    untouched: str = "freeze",
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on the rows that a gradient touches; all other rows are frozen, or replayed when they are needed.

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
      untouched: what happens to rows without a gradient. "freeze": nothing. "replay": what dense optax.adam does: their
        momentum moves them. A row is brought up to date before it is next read, by js.jit, js.rowwise and
        js.make_train_step. In a step under plain jax.jit call js.refresh, and before evaluation or export js.flush. A
        row that is not up to date is NaN after its next update.
      before: a transformation of the coalesced gradient, run first: `before=optax.clip_by_global_norm(1.0)`. Outside,
        in an optax.chain, it would get row ids, and raises.

    Returns:
      A transformation for dense and row-sparse gradients: `js.lazy(optax.chain(before, optax.adam(...)))`; with
      "replay", its state also has an int32 for each row and about 2 MB of history.

    Raises:
      TypeError, ValueError: with untouched="replay", if b1, b2, eps are not Python numbers with b1 < b2, or eps_root or
        nesterov is set, or `before` cannot be replayed: it keeps state by row or changes zeros, as decay does.

    After "replay" and js.flush, parameters and moments are those of dense optax.adam to float32 rounding, for any
    schedule and any number of skipped steps. Catch-up sums are interpolated in sqrt(v) / eps at 4 to 16 nodes, as b1
    and b2 want it, with a relative error below 1e-6 from the first step on (b1=.9: b2=.999, .98, .95; .95/.99,
    .99/.999), and 1e-4 at worst where b2 is as near to b1 as .9/.91. Moments of 16-bit tables are float32.

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
    check_choice("lazy_adam", "untouched", untouched, UNTOUCHED)
    adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    if untouched == "freeze":
        return lazy_chain("lazy_adam", before, adam)
    check_adam("lazy_adam", b1, b2, eps, eps_root, nesterov)
    return replay("lazy_adam", _wide(adam), Adam(b1, b2, eps), learning_rate, before=before)


@other_names("lazy_adamw", OF_ADAM, renamed=RENAMED)
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
    untouched: str = "freeze",
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay, on the rows that a gradient touches.

    As `lazy_adam`, with p = p - lr (... + weight_decay p). With untouched="freeze" only touched rows decay, and only in
    the steps that touch them: a rare row decays less than under dense optax.adamw. With "replay" every row decays in
    every step, as there.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov: as in `lazy_adam`.
      weight_decay: the decay rate, multiplied by the learning rate, as in optax.adamw.
      mask: which parameters decay: a tree of bools, or a function of the parameters that makes one.
      untouched: what happens to rows without a gradient: "freeze" or "replay", as in `lazy_adam`.
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
    check_choice("lazy_adamw", "untouched", untouched, UNTOUCHED)
    if untouched == "freeze":
        return lazy_chain("lazy_adamw", before, adamw)
    check_adam("lazy_adamw", b1, b2, eps, eps_root, nesterov)
    decays = not isinstance(weight_decay, int | float) or weight_decay != 0
    rule = Adam(b1, b2, eps, plain=mask is not None or not decays, decayed=decays)
    return replay("lazy_adamw", _wide(adamw), rule, learning_rate, before=before, weight_decay=weight_decay, mask=mask)


@other_names("lazy_sgd", OF_SGD, renamed=RENAMED)
def lazy_sgd(
    learning_rate: Any,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    untouched: str = "freeze",
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent on the rows that a gradient touches, with momentum if asked.

    trace = g + momentum trace; p = p - lr trace. The momentum of a row is frozen until the row is touched again. With
    untouched="replay" it moves the row and dies away, as under dense optax.sgd.

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      momentum: the decay rate of the trace; None for none.
      nesterov: Nesterov momentum, as in optax.sgd.
      accumulator_dtype: dtype of the trace; the parameter's by default.
      untouched: what happens to rows without a gradient: "freeze" or "replay", as in `lazy_adam`.
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
    check_choice("lazy_sgd", "untouched", untouched, UNTOUCHED)
    sgd = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    if untouched == "freeze":
        return lazy_chain("lazy_sgd", before, sgd)
    check_rates("lazy_sgd", momentum=momentum)
    return replay(
        "lazy_sgd",
        sgd,
        Decay(() if momentum is None else (("trace", momentum),), nesterov),
        learning_rate,
        before=before,
    )


@other_names("lazy_rmsprop", OF_RMSPROP, renamed=RENAMED)
def lazy_rmsprop(
    learning_rate: Any,
    decay: float = 0.9,
    eps: float = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    untouched: str = "freeze",
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp on the rows that a gradient touches: nu = decay nu + (1 - decay) g^2; p = p - lr g / sqrt(nu + eps).

    Args:
      learning_rate: a number, or an optax schedule of the number of updates before this one.
      decay, eps, initial_scale, eps_in_sqrt, centered, momentum, nesterov, bias_correction: as in optax.rmsprop.
      untouched: what happens to rows without a gradient. "freeze": nothing. "replay": their averages decay, and their
        momentum moves them, as under dense optax.rmsprop.
      before: a transformation of the coalesced gradient, run first.

    Returns:
      A transformation for dense and row-sparse gradients.

    Raises:
      TypeError: with untouched="replay", if decay or momentum is not a Python number.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy_rmsprop(0.1, decay=0.75)
      >>> grads = js.RowSparse(jnp.array([1]), jnp.ones((1, 1)), (2, 1))
      >>> updates, _ = tx.update(grads, tx.init(jnp.ones((2, 1))))
      >>> [round(float(p), 4) for p in optax.apply_updates(jnp.ones((2, 1)), updates)[:, 0]]
      [1.0, 0.8]

    References:
      Hinton, "Overview of mini-batch gradient descent", 2012
    """
    rmsprop = optax.rmsprop(
        learning_rate, decay, eps, initial_scale, eps_in_sqrt, centered, momentum, nesterov, bias_correction
    )
    check_choice("lazy_rmsprop", "untouched", untouched, UNTOUCHED)
    if untouched == "freeze":
        return lazy_chain("lazy_rmsprop", before, rmsprop)
    check_rates("lazy_rmsprop", decay=decay, momentum=momentum)
    rates = [
        ("nu", decay),
        *([("mu", decay)] if centered else []),
        *([] if momentum is None else [("trace", momentum)]),
    ]
    return replay("lazy_rmsprop", rmsprop, Decay(tuple(rates), nesterov, scaled=False), learning_rate, before=before)


def lazy_chain(
    function: str, before: optax.GradientTransformation | None, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`lazy(chain(before, inner))` for the named optimizer js.{function}."""
    return lazy(inner if before is None else optax.chain(checked_before(function, before), inner))


def _wide(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam with moments of at least float32: in bfloat16, nu neither decays by 0.999 nor remembers many steps of it."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        return adam.update(widen(updates), state, params)

    return optax.GradientTransformation(lambda params: adam.init(widen(params)), update_fn)
