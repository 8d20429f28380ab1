"""Finds the uses of a variable of a program, through nested calls.

Rules ask `only_use` whether an array has one use, a sum for example, so that the array itself need not be made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program

INLINED = _jax.CALLS | _jax.primitives("custom_jvp_call custom_vjp_call")

# {variable: its uses}. A use is an equation and the operand; or None and the number of the program's output.
Uses = dict[Any, list[tuple[Equation | None, int]]]


class Frame(NamedTuple):
    program: Program
    caller: Sequence[Equation]  # the call of the program; empty for the outermost program
    uses: Uses


def uses_of(program: Program) -> Uses:
    uses: Uses = {}
    users: list[tuple[Equation | None, Sequence[Any]]] = [(eqn, eqn.inputs) for eqn in program.equations]
    for user, operands in [*users, (None, program.outputs)]:
        for i, v in enumerate(operands):
            if not _jax.is_literal(v):
                uses.setdefault(v, []).append((user, i))
    return uses


def only_use(frames: Sequence[Frame], v: Any) -> tuple[Equation, int] | None:
    uses = frames[-1].uses.get(v, [])
    if len(uses) != 1:
        return None
    user, i = uses[0]
    if user is None:
        called = frames[-1].caller and len(frames) > 1
        return only_use(frames[:-1], frames[-1].caller[0].outputs[i]) if called else None
    if user.primitive in INLINED:
        inner = _jax.called(user)
        return only_use([*frames, Frame(inner, [user], uses_of(inner))], inner.inputs[i])
    return user, i
