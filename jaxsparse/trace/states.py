"""Finds which arguments of a step are state: those that come back as a part of its output.

The functions take the step's output, its arguments and its program. They return, for each state, the part of the output
that is its new value. So users need not say which argument is the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Program
from jaxsparse.trace.uses import INLINED


def named_states(out: Any, args: Sequence[Any], numbers: Sequence[int], program: Program) -> dict[int, Any]:
    """The parts of a step's output that are the new states of the arguments `numbers`, by number.

    A part must have the structure of the state. The first part whose shapes and dtypes also agree is taken, or else the
    first part. The leaves of `out` are the numbers of the program's outputs.
    """
    found: dict[int, Any] = {}
    for n in numbers:
        same = [part for part in _unclaimed_parts(out, found) if _structure(part) == _structure(args[n])]
        part = next((part for part in same if _kinds(part, program) == _kinds(args[n])), next(iter(same), None))
        if part is not None:
            found[n] = part
    return found


def found_states(out: Any, args: Sequence[Any], starts: Sequence[int], program: Program) -> dict[int, Any]:
    """The parts of a step's output that are the new states of arguments, by number.

    An argument comes back as a part with its structure and shapes. If the argument is a single array, or has the
    structure and shapes of another argument, the part must also be computed from it by equations that keep the shape.
    So predictions are not mistaken for new labels, nor one of two tables for the other.

    The first argument is state. If it is a key or a counter, or does not come back, the first tree is state instead.
    Other arguments that come back are state if one of their arrays has a shape that occurs in these, as slots have.
    `starts` are the numbers of the arguments' first leaves.
    """
    origins = _origins(program)
    kinds = [(_structure(x), _shapes(x)) for x in args]

    def is_made_of(n: int, part: Any) -> bool:
        return all(starts[n] + k in origins[j] for k, j in enumerate(jax.tree.leaves(part)))

    found: dict[int, Any] = {}
    for n, x in enumerate(args):
        must_be_made_of = kinds.count(kinds[n]) > 1 or (n > 0 and not _is_tree(x))
        for part in _unclaimed_parts(out, found):
            same = _structure(part) == _structure(x) and _shapes(part, program) == _shapes(x)
            same &= _is_tree(x) or _kinds(part, program) == _kinds(x)
            if same and (not must_be_made_of or is_made_of(n, part)):
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


def _unclaimed_parts(out: Any, found: dict[int, Any]) -> list[Any]:
    """A step's output and all its nested tuples, lists and dictionaries, outer ones first. Parts in `found` are left
    out."""
    parts = [out]
    for part in parts:  # the loop extends the list
        if isinstance(part, tuple | list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
    claimed = {j for part in found.values() for j in jax.tree.leaves(part)}
    return [part for part in parts if (leaf_numbers := set(jax.tree.leaves(part))) and not leaf_numbers & claimed]


def _origins(program: Program) -> list[frozenset[int]]:
    """For each output, the inputs that it is computed from by equations that keep the shape."""

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
