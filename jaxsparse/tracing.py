"""Tracing a train step at full shapes, so that all that Python does with shapes is right."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._jax import Program


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step's program, whose inputs are the leaves of its arguments.

    Attributes:
      places: for a leaf of the state, by its number, the number of the output that it becomes.
      donated: the leaves of all arguments that are given as state.
      paths: of these.
    """

    program: Program
    leaves: list[Any]
    places: dict[int, int]
    donated: set[int]
    paths: dict[int, str]
    unflatten: Callable[[list[Any]], Any]
    again: Callable[[list[Any]], Program]  # traced at other shapes


_TRACING: contextvars.ContextVar[bool] = contextvars.ContextVar("tracing", default=False)


def is_tracing() -> bool:
    """Whether a step is being traced, in which all arrays have their full shapes: js.value_and_grad and js.lazy, which
    would choose the rows themselves, have nothing to do there."""
    return _TRACING.get()


def trace_step(step: Callable[..., Any], args: Any, kwargs: Any, state_argnums: int | Sequence[int]) -> TracedStep:
    numbers = [state_argnums] if isinstance(state_argnums, int) else list(state_argnums)
    for n in numbers:
        if not -len(args) <= n < len(args):
            do = "Pass it by position."
            must = f"positions among the {len(args)} positional arguments"
            raise TypeError(message("rowwise", "state_argnums", must, n, do))
    numbers = [n % len(args) for n in numbers]
    leaves, tree = jax.tree.flatten((args, kwargs))
    out_tree: list[Any] = []

    def flat_step(*leaves: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(tree, leaves)
        token = _TRACING.set(True)
        try:
            out = step(*args, **kwargs)
        finally:
            _TRACING.reset(token)
        out_leaves, out_tree[:] = jax.tree.flatten(out)[0], [jax.tree.structure(out)]
        out_tree.append(out)
        return out_leaves

    program = _jax.trace(flat_step, *leaves)
    structure, out = out_tree
    out = jax.tree.unflatten(structure, range(structure.num_leaves))
    starts = [len(jax.tree.leaves(args[:n])) for n in range(len(args))]
    with_paths = jax.tree_util.tree_flatten_with_path(args)[0]
    donated = [i for n in numbers for i in range(starts[n], starts[n] + len(jax.tree.leaves(args[n])))]
    places: dict[int, int] = {}
    for n, found in _states_in(out, {n: args[n] for n in numbers}).items():
        places.update((starts[n] + i, place) for i, place in enumerate(jax.tree.leaves(found)))
    return TracedStep(
        program,
        leaves,
        places,
        set(donated),
        {i: jax.tree_util.keystr(with_paths[i][0][1:]) for i in donated},
        lambda outs: jax.tree.unflatten(structure, outs),
        lambda leaves: _jax.trace(flat_step, *leaves),
    )


def _states_in(out: Any, states: dict[int, Any]) -> dict[int, Any]:
    """The parts of a step's output that are the new states, by the argument's number."""
    structure: Any = jax.tree.structure
    wanted = {n: structure(state) for n, state in states.items()}
    if len(states) == 1 and [structure(out)] == list(wanted.values()):
        return dict.fromkeys(states, out)
    parts = list(out) if isinstance(out, tuple) else [out]
    found = {}
    for n, tree in wanted.items():
        at = next((i for i, part in enumerate(parts) if structure(part) == tree), None)
        if at is not None:
            found[n], parts = parts[at], parts[at + 1 :]
    if not found:
        must = "one that returns its new state, or a tuple with it, in the structure that it was given"
        do = "Name the arguments that are state with donate_argnums (js.jit) or state_argnums (js.rowwise)."
        raise TypeError(message("rowwise", "step", must, f"no output like {list(wanted.values())}", do))
    return found
