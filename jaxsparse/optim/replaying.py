"""`untouched="replay"`: rows that a step does not touch move on as they would under the dense optimizer.

The state of a replaying optimizer is that of the optax optimizer, a stamp for each table row (the step after which the
row was last brought up to date) and a history of the steps (`catch_up.py`). A row must be brought up to date before the
forward pass reads it. js.jit, js.rowwise and js.make_train_step do so; under plain jax.jit `refresh` does. An update of
rows that are not up to date makes them NaN, or raises outside of jit. `flush` brings every row up to date.

A replaying state is found in an optimizer's state at any depth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse._context import is_tracing, rows_of
from jaxsparse._jax import is_traced
from jaxsparse.ops.row_sparse import RowSparse, coalesce, is_row_sparse
from jaxsparse.ops.rows import as_array, gather_rows, in_range, is_stored, scatter_rows, zero_after
from jaxsparse.optim import catch_up
from jaxsparse.optim.before import check_by_row, checked_before
from jaxsparse.optim.lazy import lazy, named_leaves, per_leaf

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods

_CHUNK = 1 << 18  # elements that flush processes at a time


def _counting(tx: optax.GradientTransformation) -> type:
    """The type of a transformation's state, if optax does not export it.

    Evaluated abstractly: an import must not start JAX's backends, because jax.distributed.initialize has to come first.
    """
    return type(jax.eval_shape(tx.init, {}))


# {state of optax: its fields that are slots}
_SLOT_STATES: dict[type, tuple[str, ...]] = {
    optax.ScaleByAdamState: ("mu", "nu"),
    optax.TraceState: ("trace",),
    optax.ScaleByRmsState: ("nu",),
    _counting(optax.scale_by_rms(bias_correction=True)): ("nu",),
    optax.ScaleByRStdDevState: ("mu", "nu"),
    _counting(optax.scale_by_stddev(bias_correction=True)): ("mu", "nu"),
}


class Stamps(NamedTuple):
    """The steps up to which a parameter is up to date. For each row the later of the two counts."""

    rows: jax.Array  # int32 (num_rows,): the step after which the row was last brought up to date
    whole: jax.Array  # int32 (): the step after which all rows last were


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplayState:
    """The state of a replaying optimizer."""

    wrapped: Any  # the state of inner, or of chain(before, inner)
    plain: Any  # {name of the leaf: Stamps}, for parameters without weight decay
    decayed: Any  # the same for parameters with weight decay
    steps: jax.Array  # int32 (), the number of steps so far
    history: Any  # the rule's arrays
    rule: Any = dataclasses.field(metadata={"static": True})
    replays: ClassVar[bool] = True


_SAVED = [field.name for field in dataclasses.fields(ReplayState) if not field.metadata.get("static")]
flax.serialization.register_serialization_state(
    ReplayState,
    lambda state: {name: flax.serialization.to_state_dict(getattr(state, name)) for name in _SAVED},
    lambda state, saved: dataclasses.replace(
        state, **{name: flax.serialization.from_state_dict(getattr(state, name), saved[name]) for name in _SAVED}
    ),
)


def replay(
    function: str,
    inner: optax.GradientTransformation,
    rule: Any,
    learning_rate: Any,
    *,
    before: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`lazy(chain(before, inner))`, with stamps and history in its state.

    Args:
      function: the named optimizer, for messages.
      inner: an optimizer of optax whose state and zero-gradient steps `rule` describes.
      rule: `catch_up.Adam` or `catch_up.Decay`.
      learning_rate: inner's: a number, or a schedule of the number of updates before this one.
      before: a transformation of the gradient without state by row, that makes zeros of zeros.
      weight_decay, mask: inner's.
    """
    frozen = lazy(inner if before is None else optax.chain(checked_before(function, before), inner))

    def init_fn(params: Any) -> ReplayState:
        if before is not None:
            check_by_row(function, before, params)
        stamps = per_leaf(lambda p: Stamps(jnp.zeros(jnp.shape(p)[:1], jnp.int32), jnp.zeros((), jnp.int32)), params)
        decays = _decays(rule.decayed, mask, params)
        return ReplayState(
            wrapped=frozen.init(params),
            plain={k: v for k, v in stamps.items() if not decays[k]} if decays else stamps,
            decayed={k: v for k, v in stamps.items() if decays[k]} if decays else stamps,
            steps=jnp.zeros((), jnp.int32),
            history=rule.init(),
            rule=rule,
        )

    def update_fn(updates: Any, state: ReplayState, params: Any = None, **extra_args: Any) -> Any:
        leaves, tree = named_leaves(updates)
        stamps, now = state.plain | state.decayed, state.steps + 1
        leaves = {name: coalesce(g) if is_row_sparse(g) else g for name, g in leaves.items()}
        for name, g in leaves.items():
            rows, whole = stamps[name]
            if is_tracing():  # rows that are read were brought up to date before; all other parameters were flushed
                count, chosen = rows_of(rows)  # the gradient of a batch without ids is a zero that has no rows
                chosen |= rows_of(g)[1]  # the stamps belong to the rows of the gradient
                stamps[name] = Stamps(jnp.where(chosen, now, rows), jnp.where(count < 0, now, whole))
                continue
            is_stale = whole != state.steps
            if is_row_sparse(g):
                is_stale &= jnp.any(in_range(g.ids, g.num_rows) & (gather_rows(rows, g.ids) != state.steps))
                stamp = jnp.broadcast_to(now + zero_after(is_stale.astype(jnp.float32)), g.ids.shape)
                stamps[name] = Stamps(scatter_rows(rows, g.ids, stamp), whole)
            else:
                stamps[name] = Stamps(rows, now)
            leaves[name] = _refuse_stale(g, is_stale)
        updates, wrapped = frozen.update(tree.unflatten(leaves.values()), state.wrapped, params, **extra_args)
        rate = learning_rate(_count(state)) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, jnp.float32)
        return updates, dataclasses.replace(
            state,
            wrapped=wrapped,
            plain={name: stamps[name] for name in state.plain},
            decayed={name: stamps[name] for name in state.decayed},
            steps=now,
            history=rule.record(state.history, now, rate, rate * jnp.asarray(weight_decay, jnp.float32)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def is_replay_state(x: object) -> bool:
    return isinstance(x, ReplayState)


def replay_states(opt_state: Any) -> list[ReplayState]:
    """The states of replaying optimizers in an optimizer's state, at any depth."""
    return [s for s in jax.tree.leaves(opt_state, is_leaf=is_replay_state) if is_replay_state(s)]


class View:
    """A ReplayState by parameter: read it, change it in place, and build the state again."""

    def __init__(self, state: ReplayState) -> None:
        self.state = state
        self.stamps: dict[str, Stamps] = state.plain | state.decayed
        self._parts, self._tree = _flatten(state.wrapped, is_leaf=lambda x: type(x) in _SLOT_STATES)
        self._slots = {
            slot: named_leaves(getattr(part, slot)) for part in self._parts for slot in _SLOT_STATES.get(type(part), ())
        }

    def slots(self, name: str) -> dict[str, jax.Array]:
        """A parameter's slots."""
        return {slot: arrays[name] for slot, (arrays, _) in self._slots.items()}

    def put(self, name: str, slots: dict[str, jax.Array], stamps: Stamps) -> None:
        """Replaces a parameter's slots and stamps."""
        for slot, (arrays, _) in self._slots.items():
            arrays[name] = slots[slot]
        self.stamps[name] = stamps

    def catch_up(
        self, name: str, p: jax.Array, stamps: jax.Array, slots: dict[str, jax.Array], history: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rows of a parameter and of its slots, with these stamps, as they are now."""
        state = self.state
        last = jnp.maximum(stamps, self.stamps[name].whole)
        return state.rule.catch_up(history or state.history, name in state.decayed, last, state.steps, p, slots)

    def names_in(self, names: Collection[str]) -> list[str]:
        """The names of its parameters that are in `names`, in the same order in every process."""
        return [name for name in self.stamps if name in names]

    def rebuilt(self) -> ReplayState:
        parts = list(self._parts)
        for i, part in enumerate(parts):
            for slot in _SLOT_STATES.get(type(part), ()):
                arrays, tree = self._slots[slot]
                parts[i] = parts[i]._replace(**{slot: tree.unflatten(arrays.values())})
        return dataclasses.replace(
            self.state,
            wrapped=self._tree.unflatten(parts),
            plain={name: self.stamps[name] for name in self.state.plain},
            decayed={name: self.stamps[name] for name in self.state.decayed},
        )


def map_replaying(change: Callable[[View, dict[str, Any]], None], params: Any, opt_state: Any) -> tuple[Any, Any]:
    """(params, opt_state) after change(view, params by name) of each replaying optimizer's state. `change` changes both
    in place."""
    by_name, tree = named_leaves(params)
    states, state_tree = _flatten(opt_state, is_leaf=is_replay_state)
    for i, state in enumerate(states):
        if is_replay_state(state):
            view = View(state)
            change(view, by_name)
            states[i] = view.rebuilt()
    return tree.unflatten(by_name.values()), state_tree.unflatten(states)


def flush_leaves(params: Any, opt_state: Any, due: Callable[[str, View], Any]) -> tuple[Any, Any]:
    """Brings all rows up to date of the parameters for which `due(name, view)`, a bool that may be traced, is true.

    It gathers, updates and scatters chunks of rows, so a donated table is never copied. For a parameter that is not due
    the loop has no turns, so a step without anything to flush pays nothing.
    """

    def change(view: View, params: dict[str, Any]) -> None:
        for name, (_, whole) in view.stamps.items():
            params[name] = _flush(view, name, as_array(params[name]), due(name, view) & (whole != view.state.steps))

    return map_replaying(change, params, opt_state)


def flush_expiring(params: Any, opt_state: Any, dense: Collection[str] = ()) -> tuple[Any, Any]:
    """Flushes parameters with missed steps that are about to leave the history, and always the parameters `dense`."""

    def due(name: str, view: View) -> Any:
        oldest = catch_up.HISTORY - view.state.rule.window - 2
        return jnp.bool_(True) if name in dense else view.state.steps - view.stamps[name].whole >= oldest

    return flush_leaves(params, opt_state, due)


def _flush(view: View, name: str, p: Any, is_due: jax.Array) -> Any:
    (stamps, whole), steps = view.stamps[name], view.state.steps
    if p.ndim == 0 or p.shape[0] == 0:  # a scalar's gradient is never row-sparse: it is never behind
        view.put(name, view.slots(name), Stamps(stamps, jnp.where(is_due, steps, whole)))
        return p
    rows = min(p.shape[0], max(1, _CHUNK // max(1, math.prod(p.shape[1:]))))

    def body(i: jax.Array, carry: Any) -> Any:
        p, slots, stamps, history = carry
        ids = i * rows + jnp.arange(rows, dtype=jnp.int32)
        block, at, moments = jax.tree.map(lambda x: gather_rows(x, ids), (p, stamps, slots), is_leaf=is_stored)
        block, moments = view.catch_up(name, block, at, moments, history)
        new = block, moments, jnp.broadcast_to(steps + zero_after(block), ids.shape)
        # Without the barrier XLA would scatter before all gathers are done, and so copy the table. It would also take
        # history for a constant of the loop, and copy it because it is donated and written to afterwards.
        new, history = jax.lax.optimization_barrier((new, history))
        written = jax.tree.map(lambda x, n: scatter_rows(x, ids, n), (p, slots, stamps), new, is_leaf=is_stored)
        return *written, history

    turns = jnp.where(is_due, -(-p.shape[0] // rows), 0)
    carry = p, view.slots(name), stamps, view.state.history
    p, slots, stamps, history = jax.lax.fori_loop(0, turns, body, carry)
    view.state = dataclasses.replace(view.state, history=history)
    view.put(name, slots, Stamps(stamps, jnp.where(is_due, steps, whole)))
    return p


def _refuse_stale(g: Any, is_stale: jax.Array) -> Any:
    if not is_traced(is_stale):
        if is_stale:
            do = "Call js.refresh(loss_fn)(state, batch) before the gradient is taken, or use js.make_train_step."
            raise ValueError(
                message(
                    "update", "updates", "of rows that were brought up to date before the forward pass", "stale", do
                )
            )
        return g
    if not is_row_sparse(g):
        return jnp.where(is_stale, jnp.nan, g).astype(g.dtype)
    return RowSparse(g.ids, jnp.where(is_stale, jnp.nan, g.rows), g.shape, unique=True)


def _count(state: ReplayState) -> jax.Array:
    """The update count that inner's schedule uses."""
    kind = optax.ScaleByScheduleState
    parts = jax.tree.leaves(state.wrapped, is_leaf=lambda x: isinstance(x, kind))
    return next((part.count for part in parts if isinstance(part, kind)), state.steps)


def _decays(any_decay: bool, mask: Any, params: Any) -> dict[str, bool]:
    """{name of a parameter: whether it has weight decay}."""
    if not any_decay or mask is None or not jax.tree.leaves(params):
        return dict.fromkeys(named_leaves(params)[0], any_decay)
    chosen = mask(params) if callable(mask) else mask
    return named_leaves(jax.tree.map(lambda m, part: jax.tree.map(lambda _: bool(m), part), chosen, params))[0]
