"""Brings rows up to date before a step reads them, if its state has a replaying optimizer.

The leaves of a step's arguments go in, and come out with rows that are up to date. A catch-up of full tables is traced
before the step. It is elementwise, so its evaluation on the rows that the step reads is a catch-up of these rows.
Before that, tables that the step uses in full are flushed, as are rows whose missed steps are about to leave the
history.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._checks import message
from jaxsparse._context import rows_of
from jaxsparse.ops.rows import is_stored
from jaxsparse.optim.lazy import named_leaves
from jaxsparse.optim.replaying import Stamps, View, flush_expiring, is_replay_state, map_replaying, replay_states


class Replayed(NamedTuple):
    """The places, among the leaves of a step's arguments, of a replaying optimizer's state and of its parameters."""

    params: Any  # definition of the tree
    params_at: slice
    opt_state: Any  # definition of the tree
    opt_state_at: slice


def find_replayed(tree: Any) -> list[Replayed]:
    """Finds each replaying state in a pytree, and its parameters: in the same TrainState, tuple or dict, or among the
    arguments of the step.

    Raises:
      ValueError: if a state has no such parameters, or several candidates for them.
    """
    found, unmatched = _find(tree, 0)
    if unmatched:
        names = [name for view in unmatched for name in view.stamps]
        got = f"the state of an optimizer with untouched='replay', and not just one tree with its parameters {names}"
        must = "one whose arguments have parameters beside their optimizer's state"
        raise ValueError(message("jit", "step", must, got, "Pass a TrainState, or (params, opt_state)."))
    return found


def _find(node: Any, start: int) -> tuple[list[Replayed], list[View]]:
    """(what was found in a subtree, the states whose parameters are not in it). `start`: the number of its first
    leaf."""
    if is_replay_state(node):
        return [], [View(node)]
    if not replay_states(node):
        return [], []
    keyed = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    found: list[Replayed] = []
    unmatched: list[View] = []
    at, end = [], start
    for _, child in keyed:
        at.append(slice(end, end + len(jax.tree.leaves(child))))
        end = at[-1].stop
    for i, (_, child) in enumerate(keyed):
        inside, views = _find(child, at[i].start)
        found += inside
        candidates = [j for j, (_, other) in enumerate(keyed) if j != i and views and _has_parameters(other, views)]
        if len(candidates) > 1:
            candidates = [j for j in candidates if "params" in jax.tree_util.keystr(keyed[j][0][-1:], simple=True)]
        if len(candidates) == 1:
            (j,) = candidates
            definitions = [jax.tree.structure(keyed[k][1]) for k in (j, i)]
            found.append(Replayed(definitions[0], at[j], definitions[1], at[i]))
        else:
            unmatched += views
    return found, unmatched


def _has_parameters(tree: Any, views: Sequence[View]) -> bool:
    leaves, _ = named_leaves(tree)
    return all(
        name in leaves and getattr(leaves[name], "shape", ())[:1] == stamps.rows.shape
        for view in views
        for name, stamps in view.stamps.items()
    )


def catch_up(replayed: Sequence[Replayed], leaves: Sequence[Any]) -> list[Any]:
    """The leaves with all replayed rows up to date. In a step this is evaluated for the rows that it reads."""

    def change(view: View, params: dict[str, Any]) -> None:
        for name, stamps in view.stamps.items():
            p, slots = params[name], view.slots(name)
            if jnp.ndim(p) == 0:
                continue
            count, chosen = rows_of(p)
            now = jnp.where(chosen, view.state.steps, stamps.rows)
            new = view.catch_up(name, p, stamps.rows, slots)
            params[name], slots = jax.tree.map(lambda n, x: jnp.where(count < 0, x, n), new, (p, slots))  # noqa: B023
            view.put(name, slots, Stamps(now, stamps.whole))

    return _map_replayed(replayed, leaves, lambda params, opt_state, _: map_replaying(change, params, opt_state))


def flush_before(replayed: Sequence[Replayed], leaves: Sequence[Any], by_row: Collection[int]) -> list[Any]:
    """The leaves after a flush of rows that the step itself cannot catch up: all rows of leaves that are not in
    `by_row`, and rows whose missed steps are about to leave the history."""

    def change(params: Any, opt_state: Any, numbers: Any) -> tuple[Any, Any]:
        dense = {name for name, number in named_leaves(numbers)[0].items() if number not in by_row}
        return flush_expiring(params, opt_state, dense)

    return _map_replayed(replayed, leaves, change)


def history_of(replayed: Sequence[Replayed]) -> set[int]:
    """The numbers of the leaves that are history. Steps write into them by index, but they are not tables."""
    numbers = [part.opt_state.unflatten(range(part.opt_state_at.start, part.opt_state_at.stop)) for part in replayed]
    return {number for states in numbers for state in replay_states(states) for number in state.history.values()}


def numbers_of(replayed: Sequence[Replayed]) -> set[int]:
    """The numbers of the leaves that are replayed parameters."""
    return {number for part in replayed for number in range(part.params_at.start, part.params_at.stop)}


def _map_replayed(
    replayed: Sequence[Replayed], leaves: Sequence[Any], change: Callable[..., tuple[Any, Any]]
) -> list[Any]:
    """The leaves after `change` of each replaying optimizer: (params, opt_state, numbers of the params' leaves) ->
    (params, opt_state)."""
    leaves = list(leaves)
    for part in replayed:
        at, opt_state_at = part.params_at, part.opt_state_at
        params, opt_state = part.params.unflatten(leaves[at]), part.opt_state.unflatten(leaves[opt_state_at])
        numbers = part.params.unflatten(range(at.start, at.stop))
        params, opt_state = change(params, opt_state, numbers)
        leaves[at], leaves[opt_state_at] = (jax.tree.leaves(x, is_leaf=is_stored) for x in (params, opt_state))
    return leaves
