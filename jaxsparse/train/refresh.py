"""Brings the rows of a replaying optimizer (untouched="replay") up to date, and converts its state from and to optax.

A state goes in and a state comes out. `refresh` is for steps under plain jax.jit, before the gradient is taken. `flush`
is for all rows, before parameters are evaluated, exported or handed to optax. Steps under `js.jit`, `js.rowwise` and
`js.make_train_step` need no `refresh`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse._context import is_tracing
from jaxsparse.optim.lazy import named_leaves
from jaxsparse.optim.replaying import Stamps, View, flush_leaves, is_replay_state, replay_states
from jaxsparse.train.rowwise import on_rows, prepare_step


def refresh(loss_fn: Callable[..., Any], *, has_aux: bool = False, axis_name: Any = None) -> Callable[..., Any]:
    """A function refresh(state, batch, *args) -> state that brings the rows up to date that loss_fn is about to read.

    It is for steps written by hand with an optimizer of untouched="replay". Call it first in the step, with the same
    batch. It costs what the rows cost. It does nothing for optimizers that freeze the rows without a gradient.

    Args:
      loss_fn: loss_fn(params, batch, *args), as in js.make_train_step. Only its reads are evaluated.
      has_aux: whether loss_fn returns (scalar, aux).
      axis_name: the mapped axis, under jax.pmap or shard_map: rows that any device reads are refreshed on all.

    Returns:
      The function. `state` is a TrainState, or any object with params, opt_state and replace, or a pair (params,
      opt_state), or a dictionary with these names. The returned state is of the same kind.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx, params = js.lazy_sgd(1.0, momentum=0.5, untouched="replay"), jnp.zeros((3, 1))
      >>> loss_fn = lambda table, ids: jnp.sum(table[ids])
      >>> opt_state = tx.init(params)
      >>> for row in (0, 1, 0):
      ...     params, opt_state = js.refresh(loss_fn)((params, opt_state), jnp.array([row]))
      ...     print(params.ravel().tolist())
      ...     updates, opt_state = tx.update(js.grad(loss_fn)(params, jnp.array([row])), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      [0.0, 0.0, 0.0]
      [-1.0, 0.0, 0.0]
      [-1.5, -1.0, 0.0]
    """

    def read_step(state: Any, batch: Any, *args: Any) -> Any:
        loss_fn(split_state(state, "refresh")[0], batch, *args)
        return state  # a step begins with rows that are up to date

    def refresh_fn(state: Any, batch: Any, *args: Any) -> Any:
        if is_tracing() or not replay_states(split_state(state, "refresh")[1]):
            return state
        with jax.named_scope("refresh"):
            axes = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
            prepared = prepare_step(read_step, (state, batch, *args), {}, 0).only_outputs()
            traced = prepared.planned.traced
            return traced.unflatten(on_rows(prepared, traced.leaves, axes))

    return refresh_fn


def flush(state: Any) -> Any:
    """Brings every row of every table up to date: to the value that the dense optimizer has after as many steps.

    Call it before parameters are evaluated on other rows, exported, or handed to plain optax. It changes nothing for
    optimizers that freeze the rows without a gradient, and nothing if it is called twice. It costs about one dense
    step, works in chunks, and needs a few MB besides the state.

    Args:
      state: a TrainState, or any object with params, opt_state and replace, or a pair (params, opt_state), or a
        dictionary with these names. It is donated, like a step's: use the returned one.

    Returns:
      The state, of the same kind.

    Raises:
      TypeError: if it is not such a state.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> tx = js.lazy_sgd(1.0, momentum=0.5, untouched="replay")
      >>> state = TrainState.create(apply_fn=None, params={"t": jnp.zeros((3, 1))}, tx=tx)
      >>> step = js.make_train_step(lambda params, ids: jnp.sum(params["t"][ids]))
      >>> for row in (0, 1, 1):
      ...     state, _ = step(state, jnp.array([row]))
      >>> js.flush(state).params["t"].ravel().tolist()
      [-1.75, -2.5, 0.0]
    """
    params, opt_state, rebuild = split_state(state, "flush")
    if not replay_states(opt_state):
        return state
    mesh, specs = _row_shardings(params, opt_state)
    if mesh is None:
        return rebuild(*_flush_all(params, opt_state))
    local = jax.shard_map(_flush_rows, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return rebuild(*jax.jit(local, donate_argnums=(0, 1))(params, opt_state))


def _flush_rows(params: Any, opt_state: Any) -> tuple[Any, Any]:
    return flush_leaves(params, opt_state, lambda name, view: jnp.bool_(True))


_flush_all = jax.jit(_flush_rows, donate_argnums=(0, 1))


def _row_shardings(params: Any, opt_state: Any) -> tuple[Any, Any]:
    """(the mesh, the specs of all leaves), if the leaves are on several devices, and slots and stamps are split like
    their parameter, so that each device can bring its own rows up to date. Otherwise (None, None)."""
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), (params, opt_state))
    meshes: set[Any] = {getattr(s, "mesh", None) for s in jax.tree.leaves(shardings, is_leaf=lambda s: s is None)}
    if len(meshes) != 1 or None in meshes or next(iter(meshes)).size == 1:
        return None, None
    by_name = named_leaves(params)[0]
    for view in map(View, replay_states(opt_state)):
        for name, stamps in view.stamps.items():
            rows = [by_name[name], stamps.rows, *view.slots(name).values()]
            if len({x.sharding.shard_shape(x.shape)[:1] for x in rows}) > 1:
                return None, None
    return meshes.pop(), jax.tree.map(lambda s: s.spec, shardings)


def check_flushed(function: str, opt_state: Any) -> None:
    """Raises ValueError if some rows are not up to date. The state must not be traced."""
    for replaying in replay_states(opt_state):
        view = View(replaying)
        for name, (_, whole) in view.stamps.items():
            if int(whole) != int(replaying.steps):
                got = f"one whose parameter {name} has rows that were last brought up to date after step {int(whole)} "
                got += f"of {int(replaying.steps)}"
                raise ValueError(message(function, "state", "up to date", got, "Call state = js.flush(state) before."))


def to_optax_state(opt_state: Any) -> Any:
    """Converts the state of a js optimizer to that of plain optax's, with which dense training can go on.

    Args:
      opt_state: the state of a js optimizer, or one that has such states in it (chain, partition, ...). If the
        optimizer replays, call js.flush before.

    Returns:
      The wrapped optimizer's state: inner's for `js.lazy(inner)`, optax.adam's for `js.lazy_adam`, and that of
      optax.chain(before, optax.adam(...)) with `before=`.

    Raises:
      ValueError: if rows of a replaying optimizer are not up to date.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = jnp.ones((3, 2))
      >>> state = js.to_optax_state(js.lazy_adam(0.1, untouched="replay").init(params))
      >>> jax.tree.structure(state) == jax.tree.structure(optax.adam(0.1).init(params))
      True
    """

    def optax_state(state: Any) -> Any:
        if is_replay_state(state):
            check_flushed("to_optax_state", state)
            return state.wrapped
        return state

    return jax.tree.map(optax_state, opt_state, is_leaf=is_replay_state)


def from_optax_state(tx: Any, opt_state: Any, params: Any) -> Any:
    """Converts a state of plain optax to that of a js optimizer: the inverse of `to_optax_state`.

    Args:
      tx: the js optimizer, or a transformation with js optimizers in it.
      opt_state: the state of the plain optax optimizer with the same settings.
      params: the parameters.

    Returns:
      A state of tx, in which all rows are up to date.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> params = jnp.ones((3, 2))
      >>> tx = js.lazy_adam(0.1, untouched="replay")
      >>> state = js.from_optax_state(tx, optax.adam(0.1).init(params), params)
      >>> jax.tree.structure(state) == jax.tree.structure(tx.init(params))
      True
    """

    def lazy_state(template: Any, given: Any) -> Any:
        if is_replay_state(template):
            parts = jax.tree.leaves(given, is_leaf=_is_adam)
            steps = next((part.count for part in parts if _is_adam(part)), jnp.int32(0))

            def current(stamps: dict[str, Stamps]) -> dict[str, Stamps]:
                return {k: Stamps(s.rows, jnp.copy(steps)) for k, s in stamps.items()}  # copies, each to be donated

            return dataclasses.replace(
                template,
                wrapped=given,
                plain=current(template.plain),
                decayed=current(template.decayed),
                steps=jnp.copy(steps),
            )
        return given

    return jax.tree.map(lazy_state, tx.init(params), opt_state, is_leaf=is_replay_state)


def _is_adam(x: object) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def split_state(state: Any, function: str) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """(params, opt_state, a function of new ones that returns a state of the same kind)."""
    if isinstance(state, tuple) and len(state) == 2:
        return *state, lambda params, opt_state: (params, opt_state)
    if isinstance(state, dict) and state.keys() >= {"params", "opt_state"}:
        changed = lambda params, opt_state: state | {"params": params, "opt_state": opt_state}  # noqa: E731
        return state["params"], state["opt_state"], changed
    if all(hasattr(state, name) for name in ("params", "opt_state", "replace")):
        return (
            state.params,
            state.opt_state,
            lambda params, opt_state: state.replace(params=params, opt_state=opt_state),
        )
    must = "a TrainState or a pair (params, opt_state), or a dictionary with these names"
    raise TypeError(message(function, "state", must, type(state).__name__))
