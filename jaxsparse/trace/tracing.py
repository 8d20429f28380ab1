"""Traces a train step at full shapes: a step and its arguments go in, a `TracedStep` comes out.

At full shapes all Python code in the step that looks at shapes is right. The program is evaluated on some rows later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsparse import _jax
from jaxsparse._checks import Modules, message
from jaxsparse._context import tracing
from jaxsparse._jax import Program
from jaxsparse.ops.rows import as_shape, is_stored
from jaxsparse.trace.joined import read_tables_separately
from jaxsparse.trace.stacked import NO_STACKED, Stacked, read_flat
from jaxsparse.trace.states import found_states, named_states


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step's program, whose inputs are the leaves of its arguments.

    Attributes:
      leaves: arrays, or `Storage` objects such as packed tables.
      places: {number of a leaf of the state: number of the output that is its new value}.
      donated: the numbers of the leaves of all arguments that are state.
      paths: the paths of these leaves.
      name: the step's name, for messages.
      unflatten: makes the step's output from the program's outputs.
      retrace: traces the step for leaves of other shapes.
      stacked: the inputs of the program that have one axis where the leaves have two.
    """

    program: Program
    leaves: list[Any]
    places: dict[int, int]
    donated: set[int]
    paths: dict[int, str]
    name: str
    unflatten: Callable[[list[Any]], Any]
    retrace: Callable[[list[Any]], Program]
    stacked: Stacked = NO_STACKED

    def with_flat_tables(self, stacked: Stacked) -> TracedStep:
        """The step with another program, in which these leaves have one axis for tables and rows."""

        def retrace(leaves: list[Any]) -> Program:
            leaves = stacked.unflattened(leaves)
            return read_flat(self.retrace(leaves), leaves, self.places, stacked)

        program = read_flat(self.program, list(map(as_shape, self.leaves)), self.places, stacked)
        return dataclasses.replace(self, program=program, retrace=retrace, stacked=stacked)


def check_arguments(args: Any, kwargs: Any) -> None:
    """Raises TypeError unless all leaves are arrays and numbers."""
    for path, x in jax.tree_util.tree_flatten_with_path((args, kwargs))[0]:
        if not (_jax.is_array_or_number(x) or isinstance(x, jax.ShapeDtypeStruct)):
            got = f"a {type(x).__name__} at argument {jax.tree_util.keystr(path[1:])}"
            do = (
                "Name the argument in static_argnums of js.jit, or take the module apart before, and put it together "
                "inside (eqx.partition and eqx.combine, nnx.split and nnx.merge)."
            )
            raise TypeError(message("jit or js.rowwise", "step", "called with arrays and numbers", got, do))


def trace_step(
    step: Callable[..., Any],
    args: Any,
    kwargs: Any,
    state_argnums: int | Sequence[int] | None,
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = lambda leaves: leaves,
) -> TracedStep:
    """Traces step(*args, **kwargs).

    Args:
      state_argnums: as in `rowwise`.
      prepare: a function of the leaves, whose result the step gets in their place.
    """
    check_arguments(args, kwargs)
    leaves = jax.tree.leaves((args, kwargs), is_leaf=is_stored)
    args, kwargs = jax.tree.map(as_shape, (args, kwargs), is_leaf=is_stored)
    numbers = [state_argnums] if isinstance(state_argnums, int) else list(state_argnums or ())
    for n in numbers:
        if not -len(args) <= n < len(args):
            do = "Pass it by position."
            must = f"positions among the {len(args)} positional arguments"
            raise TypeError(message("jit or js.rowwise", "donate_argnums or state_argnums", must, n, do))
    numbers = [n % len(args) for n in numbers]
    shapes, tree = jax.tree.flatten((args, kwargs))
    out_tree: list[Any] = []

    def flat_step(*leaves: Any) -> list[Any]:
        with tracing():
            args, kwargs = jax.tree.unflatten(tree, prepare(leaves))
            modules = Modules((args, kwargs))
            out = step(*args, **kwargs)
            modules.check_unchanged("jit or js.rowwise")
        out_leaves, tree_of_out = jax.tree.flatten(out)
        out_tree[:] = [tree_of_out]
        return out_leaves

    program = _jax.trace(flat_step, *shapes)
    (structure,) = out_tree
    starts = [len(jax.tree.leaves(args[:n])) for n in range(len(args))]
    with_paths = jax.tree_util.tree_flatten_with_path(args)[0]
    leaves_of = {n: range(starts[n], starts[n] + len(jax.tree.leaves(args[n]))) for n in range(len(args))}
    out = jax.tree.unflatten(structure, range(structure.num_leaves))
    if state_argnums is None:
        found = found_states(out, args, starts, program)
        numbers = list(found)
    else:
        found = named_states(out, args, numbers, program)
        if numbers and not found:
            must = "one that returns its new state, in the structure that it was given"
            do = "Name the arguments that are state with donate_argnums (js.jit) or state_argnums (js.rowwise)."
            raise TypeError(message("jit or js.rowwise", "step", must, f"no output like argument {numbers}", do))
    places = {i: j for n, state in found.items() for i, j in zip(leaves_of[n], jax.tree.leaves(state), strict=True)}
    donated = [i for n in numbers for i in leaves_of[n]]
    return TracedStep(
        read_tables_separately(program, shapes, places),
        leaves,
        places,
        set(donated),
        {i: jax.tree_util.keystr(with_paths[i][0][1:]) for i in donated},
        getattr(step, "__qualname__", type(step).__name__),
        lambda outs: jax.tree.unflatten(structure, outs),
        lambda leaves: read_tables_separately(_jax.trace(flat_step, *leaves), leaves, places),
    )


def with_nonempty_shapes(leaves: Sequence[Any], places: dict[int, int]) -> list[Any] | None:
    """The leaves as shapes, with sizes of 0 replaced by 1 except in the state: a batch without ids gets one. None if no
    size is 0."""
    kinds = [_jax.kind_of_array(x) for x in leaves]
    if not any(0 in shape for i, (shape, _, _) in enumerate(kinds) if i not in places):
        return None
    return [
        x if i in places else jax.ShapeDtypeStruct(tuple(max(d, 1) for d in shape), dtype, weak_type=weak)
        for i, (x, (shape, dtype, weak)) in enumerate(zip(leaves, kinds, strict=True))
    ]
