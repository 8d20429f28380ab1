"""`params_ema(inner, decay)`: an exponential moving average of the parameters, at the cost of the rows that are read.

A transformation goes in, and one whose state also has the average comes out; `ema_params` reads the average. The dense
average moves in all rows at each step. The parameters of a row that is not read do not change, so k steps at once are

    e = e + (1 - decay^k) (p - e).

Each row has a stamp, the number of the update up to which it is averaged. An update gets the parameters after all
earlier updates, and averages its rows with them. Its own result is averaged by the next update of the row, or by
`ema_params`. So the average includes whatever happens to the parameters after the update, and their rounding.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import check_transformation, message
from jaxsparse._context import rows_of
from jaxsparse.ops.row_sparse import is_row_sparse
from jaxsparse.optim.lazy import named_leaves, per_leaf
from jaxsparse.optim.replaying import replay_states

_FROZEN = "an optimizer that leaves skipped rows alone, as the average takes it"
_INSTEAD = "Use untouched='freeze', or optax.incremental_update on what js.flush returns."


class ParamsEmaState(flax.struct.PyTreeNode):
    """The state of `params_ema`: the average of each row before the update that its stamp names."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    inner_state: Any
    ema: Any  # like params, at least float32
    stamps: Any  # {name of the parameter: shape=(num_rows,), dtype=jnp.int32}
    decay: float = flax.struct.field(pytree_node=False)
    debias: bool = flax.struct.field(pytree_node=False)


def params_ema(
    inner: optax.GradientTransformation, decay: float, *, debias: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters beside an optimizer, for evaluation: `js.ema_params`.

    After each step, for the new parameters p,

        ema = decay ema + (1 - decay) p,

    in all rows, at the cost of the rows that a step reads. A row that is not read does not change, and its steps are
    applied when it is next read, or when `js.ema_params` is called. The average of 16-bit parameters is float32.

    Put it around the whole chain, and inside of `js.lazy`: `js.lazy(js.params_ema(optax.adamw(1e-3), 0.999))`. The
    updates are those of inner. An update averages the parameters that it gets. So anything that a step does to them
    after the update, such as a projection, is in the average too. If you change rows between two steps, the average
    takes the new values for all steps since the row was last read.

    Args:
      inner: an optax transformation, usually a whole chain.
      decay: between 0 and 1, a Python number.
      debias: False: the average starts from the initial parameters, as in timm and torch. True: it starts from zero and
        is divided by 1 - decay^count, as in optax.ema, so that the initial parameters are not in it.

    Returns:
      A transformation. Its state has the average, and an int32 for each row of each parameter.

    Raises:
      TypeError: if inner is no transformation, or decay no Python number; from update, if a gradient is a RowSparse.
      ValueError: if decay is not between 0 and 1; from init, if inner replays skipped rows; from update without params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.params_ema(optax.sgd(1.0), 0.5)
      >>> @js.jit
      ... def step(state, ids):
      ...   table, opt_state = state
      ...   gradient = jax.grad(lambda table: jnp.sum(table[ids]))(table)
      ...   updates, opt_state = tx.update(gradient, opt_state, table)
      ...   return optax.apply_updates(table, updates), opt_state
      >>> table, opt_state = jnp.zeros((3, 1)), tx.init(jnp.zeros((3, 1)))
      >>> for row in (0, 1, 1):
      ...   table, opt_state = step((table, opt_state), jnp.array([row]))
      >>> table.ravel().tolist()
      [-1.0, -2.0, 0.0]
      >>> [round(float(x), 3) for x in js.ema_params(opt_state, table)[:, 0]]  # row 0 has been -1 for three steps
      [-0.875, -1.25, 0.0]

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30 (1992)
      torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn, timm's ModelEma
    """
    check_transformation("params_ema", "inner", inner)
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        do = "All steps have the same: with optax.inject_hyperparams, list it in static_args."
        raise TypeError(message("params_ema", "decay", "a Python number", type(decay).__name__, do))
    if not 0 < decay < 1:
        raise ValueError(message("params_ema", "decay", "between 0 and 1", decay))
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> ParamsEmaState:
        inner_state = inner.init(params)
        if replay_states(inner_state):
            raise ValueError(message("params_ema", "inner", _FROZEN, "one with untouched='replay'", _INSTEAD))

        def start(p: Any) -> jax.Array:
            dtype = jnp.promote_types(jnp.result_type(p), jnp.float32)
            return jnp.zeros(jnp.shape(p), dtype) if debias else jnp.array(p, dtype)  # a copy, to be donated

        stamps = per_leaf(lambda p: jnp.zeros(jnp.shape(p)[:1], jnp.int32), params)
        ema = jax.tree.map(start, params)
        return ParamsEmaState(jnp.zeros((), jnp.int32), inner_state, ema, stamps, float(decay), debias)

    def update_fn(updates: Any, state: ParamsEmaState, params: Any = None, **extra_args: Any) -> Any:
        if any(map(is_row_sparse, jax.tree.leaves(updates, is_leaf=is_row_sparse))):
            do = "Put it inside: js.lazy(js.params_ema(optax.adam(1e-3), 0.999))."
            raise TypeError(message("params_ema", "updates", "of arrays", "a js.RowSparse", do))
        if params is None:
            raise ValueError(message("params_ema", "params", "the parameters", "None", "Pass params to update."))
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        ema = named_leaves(state.ema)[1].unflatten(_averages_now("params_ema", state, params).values())

        def stamp(name: str, p: Any) -> jax.Array:
            count, chosen = rows_of(p)  # not the count in all rows: that is no array with the rows of a table
            return jnp.where(chosen | (count < 0), state.count, state.stamps[name])

        stamps = {name: stamp(name, p) for name, p in named_leaves(params)[0].items()}
        count = optax.safe_increment(state.count)
        return updates, state.replace(count=count, inner_state=inner_state, ema=ema, stamps=stamps or state.stamps)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ema_params(opt_state: Any, params: Any) -> Any:
    """The average of the parameters that `params_ema` keeps, in all rows, after the last step.

    Evaluate with it in place of the parameters: `state.replace(params=js.ema_params(state.opt_state, state.params))`.
    Training goes on with the old state and parameters. The average is in new arrays, and costs about one dense step.

    Args:
      opt_state: an optimizer's state with one `params_ema` in it, at any depth.
      params: the parameters of this optimizer.

    Returns:
      A tree like params, at least float32. With debias=True it is the parameters before the first update. If params_ema
      is under one label of an optax.partition, parameters of other labels are returned as they are.

    Raises:
      TypeError: if opt_state has no such state, or several.
      ValueError: if the average is of other parameters, or opt_state is of an optimizer with untouched="replay".

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx, params = js.params_ema(optax.sgd(1.0), 0.75), {"w": jnp.zeros(2)}
      >>> updates, opt_state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> average = js.ema_params(opt_state, optax.apply_updates(params, updates))
      >>> [round(float(x), 3) for x in average["w"]]
      [-0.25, -0.25]
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(x)]
    if len(found) != 1:
        do = "Make the optimizer with js.params_ema, around all others."
        raise TypeError(message("ema_params", "opt_state", "one with one js.params_ema", f"{len(found)} of them", do))
    if replay_states(opt_state):
        must, got = f"of {_FROZEN}", "of one with untouched='replay'"
        raise ValueError(message("ema_params", "opt_state", must, got, _INSTEAD))
    (state,) = found
    values, tree = named_leaves(params)
    kept = {name: values[name] for name in named_leaves(state.ema)[0] if name in values}
    # a parameter of another label of optax.partition has no average
    return tree.unflatten((values | _read(state.replace(inner_state=None), kept)).values())


@jax.jit
def _read(state: ParamsEmaState, params: dict[str, Any]) -> dict[str, Any]:
    ema = _averages_now("ema_params", state, params)

    def corrected(e: jax.Array, p: Any) -> jax.Array:
        weight = _weight(state.decay, state.count, e.dtype)
        return jnp.where(weight > 0, e / jnp.where(weight > 0, weight, 1), jnp.asarray(p, e.dtype))

    return {name: corrected(ema[name], p) if state.debias else ema[name] for name, p in params.items()}


def _is_state(x: object) -> bool:
    return isinstance(x, ParamsEmaState)


def _averages_now(function: str, state: ParamsEmaState, params: Any) -> dict[str, jax.Array]:
    """{name: average before update number `count`}, in the order of state.ema."""
    values, averages = named_leaves(params)[0], named_leaves(state.ema)[0]
    if {name: jnp.shape(p) for name, p in values.items()} != {name: jnp.shape(e) for name, e in averages.items()}:
        must, got = "those that the average is kept of", "other names or shapes"
        raise ValueError(message(function, "params", must, got, "Pass all parameters that the optimizer is made for."))

    def advance(name: str, e: jax.Array) -> jax.Array:
        weight = _weight(state.decay, state.count - state.stamps[name], e.dtype)
        weight = weight.reshape(weight.shape + (1,) * (e.ndim - weight.ndim))
        return e + weight * (jnp.asarray(values[name], e.dtype) - e)

    return {name: advance(name, e) for name, e in averages.items()}


def _weight(decay: float, steps: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay^steps, exact to rounding for any decay and number of steps."""
    real = jnp.finfo(dtype).dtype
    return -jnp.expm1(steps.astype(real) * jnp.asarray(math.log(decay), real))
