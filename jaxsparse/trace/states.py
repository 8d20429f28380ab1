"""Which arguments of a step are state: those that come back as a part of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Program
from jaxsparse.trace.uses import INLINED


def named_states(out: Any, args: Sequence[Any], numbers: Sequence[int], program: Program) -> dict[int, Any]:
    """The parts of a step's output that are the new states of the arguments `numbers`, in their order: of those with a
    state's structure the first whose arrays are like the state's, or the first. `out` has the outputs' numbers for
    leaves."""
    found: dict[int, Any] = {}
    for n in numbers:
        same = [part for part in _free_parts(out, found) if _structure(part) == _structure(args[n])]
        part = next((part for part in same if _kinds(part, program) == _kinds(args[n])), next(iter(same), None))
        if part is not None:
            found[n] = part
    return found


def found_states(out: Any, args: Sequence[Any], starts: Sequence[int], program: Program) -> dict[int, Any]:
    """The parts of a step's output that are the new states of arguments, by number.

    An argument comes back as a part of its structure and shapes. What is no tree, or shares its structure and shapes
    with another argument, has to be made into it row by row or element by element, too: so predictions are not taken
    for new labels, nor one of two tables for the other.

    State is the first argument; if that is a key or a counter, or does not come back, the first that is a tree; and
    what has an array of a shape that these have, as slots do. `starts` are the numbers of the arguments' first leaves.
    """
    origins = _origins(program)
    alike = [(_structure(x), _shapes(x)) for x in args]

    def continues(n: int, part: Any) -> bool:
        return all(starts[n] + k in origins[j] for k, j in enumerate(jax.tree.leaves(part)))

    found: dict[int, Any] = {}
    for n, x in enumerate(args):
        strict = alike.count(alike[n]) > 1 or (n > 0 and not _is_tree(x))
        for part in _free_parts(out, found):
            same = _structure(part) == _structure(x) and _shapes(part, program) == _shapes(x)
            same &= _is_tree(x) or _kinds(part, program) == _kinds(x)
            if same and (not strict or continues(n, part)):
                found[n] = part
                break
    leaves = {n: jax.tree.leaves(args[n]) for n in found}
    states = [n for n in found if n == 0]
    if not any(jnp.issubdtype(jnp.result_type(x), jnp.floating) for n in states for x in leaves[n]):
        states += [n for n in found if n and _is_tree(args[n])][:1]
    shapes = {shape for n in states for shape in _shapes(args[n])} - {()}
    return {n: part for n, part in found.items() if n in states or shapes & set(_shapes(args[n]))}


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _is_tree(x: Any) -> bool:
    return not jax.tree_util.all_leaves([x])


def _kinds(tree: Any, program: Program | None = None) -> list[tuple[Any, Any]]:
    """Shapes and dtypes, of arrays or of a program's outputs by number."""
    leaves = jax.tree.leaves(tree)
    if program is None:
        return [(x[0], x[1]) for x in map(_jax.kind_of_array, leaves)]
    return [(_jax.shape(program.outputs[j]), _jax.dtype(program.outputs[j])) for j in leaves]


def _shapes(tree: Any, program: Program | None = None) -> list[Any]:
    return [shape for shape, _ in _kinds(tree, program)]


def _free_parts(out: Any, found: dict[int, Any]) -> list[Any]:
    """A step's output, what is in it, if it is a tuple, list or dictionary, and so on; the outer ones first, without
    those that have been found to be something already."""
    parts = [out]
    for part in parts:  # which grows
        if isinstance(part, tuple | list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
    taken = {j for part in found.values() for j in jax.tree.leaves(part)}
    return [part for part in parts if (own := set(jax.tree.leaves(part))) and not own & taken]


def _origins(program: Program) -> list[frozenset[int]]:
    """For each output, which inputs of its shape it is made of with equations that keep the shape all the way."""

    def run(program: Program, given: Sequence[frozenset[int]]) -> list[frozenset[int]]:
        made: dict[Any, frozenset[int]] = dict(zip(program.inputs, given, strict=True))

        def of(v: Any) -> frozenset[int]:
            return frozenset() if _jax.is_literal(v) else made.get(v, frozenset())

        for eqn in program.equations:
            if eqn.primitive in INLINED:
                outs = run(_jax.called(eqn), [of(v) for v in eqn.inputs])
            else:
                outs = [
                    frozenset().union(*(of(v) for v in eqn.inputs if _jax.shape(v) == _jax.shape(out)))
                    for out in eqn.outputs
                ]
            made.update(zip(eqn.outputs, outs, strict=True))
        return [of(v) for v in program.outputs]

    return run(program, [frozenset({i}) for i in range(len(program.inputs))])
