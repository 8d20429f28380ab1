"""Finds the line that makes an array dense, and what to write instead, for warnings and `js.explain`.

A program and one of its inputs go in. A `Reason` (primitive and source line) and a sentence of advice come out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program
from jaxsparse.trace.lines import UNKNOWN_SOURCE, source_line
from jaxsparse.trace.plan import Reason
from jaxsparse.trace.row_regions import is_closed
from jaxsparse.trace.uses import INLINED

LARGE = 1 << 16  # rows of a table that is worth a warning if no ids read it

_CONVERT, _TRANSPOSE = _jax.primitives("convert_element_type copy"), _jax.primitives("transpose")
_MOVES, _WHILE = _CONVERT | _TRANSPOSE, _jax.primitives("while")
# of all rows, but still rows that may be read
_ACROSS = _jax.primitives("scatter scatter_add scatter_mul cumsum cumprod cummax cummin rev sort")
_FOLLOWED = INLINED | _MOVES | _ACROSS | _WHILE | {_jax.COND, _jax.SCAN}  # and remat, which has two forms
_DOT = _jax.primitives("dot_general")
_OTHER_READS = _jax.primitives("slice reshape squeeze pad select_n gather dynamic_slice")

_TAKE = "jnp.take(table, ids, axis=0)"
_OUTPUT = "For an output layer, js.sampled_softmax computes the logits of few rows."
_INPUT = f"If what it is multiplied by is one-hot, read rows, {_TAKE}; if it is sparse, js.dot takes it as a BCOO."
_READ = f"Read rows by ids, {_TAKE}."
_WHILE_LOOP = "How often it turns, and so which rows it reads, is not known: use jax.lax.scan, or read rows before it."
_ALSO = f"It is read by rows elsewhere: what uses all of it makes it dense. Use rows of ids there too, {_TAKE}."


class _Use(NamedTuple):
    eqn: Equation
    operand: int
    axis: int  # of the operand, the first axis of the variable
    within: tuple[Equation, ...]


def first_use(program: Program, v: Any) -> Reason | None:
    """The first equation that computes with a variable."""
    for use in _uses(program, v, 0, (), followed=_jax.CALLS):
        return _reason(use)
    return None


def closed_advice(why: Reason) -> str:
    """What to do if the reason is an equation whose inner program cannot be opened."""
    if not why.closed:
        return ""
    return f"This library cannot open a {why.cause} with jax {jax.__version__}: read the rows outside of it."


def advice_on_whole(program: Program, v: Any, why: Reason) -> str:
    """What to do about an input that is read by rows, but computed in full for this reason."""
    if why.closed or not why.source:
        return closed_advice(why)
    if why.cause in map(str, _WHILE):
        return _WHILE_LOOP
    uses = _uses(program, v, 0, ())
    is_output = any(use.eqn.primitive in _DOT and not _contracts(use) for use in uses)
    return _OUTPUT if is_output else _ALSO


def why_not_read(program: Program, v: Any) -> tuple[Reason, str] | None:
    """(the line that might read rows, what to write), for a large input that is not read by ids. None if there is no
    such line."""
    shape = _jax.shape(v)
    is_large = shape and shape[0] >= LARGE and shape[0] > max(shape[1:2], default=1)
    if not is_large or not jnp.issubdtype(_jax.dtype(v), jnp.floating):
        return None
    for use in _uses(program, v, 0, ()):
        advice = ""
        if use.eqn.primitive in _DOT:
            advice = _INPUT if _contracts(use) else _OUTPUT
        elif use.eqn.primitive in _OTHER_READS:
            advice = _READ
        if advice and (reason := _reason(use)).source != UNKNOWN_SOURCE:
            return reason, advice
    return None


def _reason(use: _Use) -> Reason:
    return Reason(str(use.eqn.primitive), source_line((*use.within, use.eqn)), is_closed(use.eqn))


def _contracts(use: _Use) -> bool:
    """Whether a product sums over the rows."""
    return use.axis in use.eqn.param("dimension_numbers")[0][use.operand]


def _uses(
    program: Program, v: Any, axis: int, within: tuple[Equation, ...], followed: Collection[Any] = _FOLLOWED
) -> Iterator[_Use]:
    """The equations that use a variable, in order. Equations of the primitives `followed` are looked through."""
    return (use for use in _uses_and_outputs(program, v, axis, within, followed) if isinstance(use, _Use))


def _uses_and_outputs(
    program: Program, v: Any, axis: int, within: tuple[Equation, ...], followed: Collection[Any]
) -> Iterator[_Use | tuple[int, int]]:
    """The same, and (output, axis) for each output of the program that the variable becomes."""
    yield from ((number, axis) for number, out in enumerate(program.outputs) if out is v)
    users = ((eqn, i) for eqn in program.equations for i, operand in enumerate(eqn.inputs) if operand is v)
    for user, i in users:
        if user.primitive in _MOVES | _ACROSS and user.primitive in followed:
            at = list(user.param("permutation")).index(axis) if user.primitive in _TRANSPOSE else axis
            if i == 0:  # not what is written into another array
                yield from _uses_and_outputs(program, user.outputs[0], at, within, followed)
        elif inner := _inside(user, i, followed):
            for body, operand in inner:
                for use in _uses_and_outputs(body, operand, axis, (*within, user), followed):
                    if isinstance(use, _Use):
                        yield use
                    elif user.primitive in INLINED:
                        number, at = use
                        yield from _uses_and_outputs(program, user.outputs[number], at, within, followed)
        else:
            yield _Use(user, i, axis, within)


def _inside(eqn: Equation, i: int, followed: Collection[Any]) -> list[tuple[Program, Any]]:
    """(program, its input) for each program in an equation that gets operand i unchanged. An array that is scanned over
    enters without its first axis, so it is not followed."""
    if eqn.primitive not in followed and not (followed is _FOLLOWED and _jax.is_remat(eqn)):
        return []
    if eqn.primitive is _jax.COND:
        return [(branch, branch.inputs[i - 1]) for branch in _jax.branches(eqn)] if i else []
    if eqn.primitive is _jax.SCAN:
        scan = _jax.scan_of(eqn)
        return [(scan.body, scan.body.inputs[i])] if i < scan.num_consts + scan.num_carry else []
    if eqn.primitive in _WHILE:
        test, body, num_test, num_body = _jax.while_of(eqn)
        if i < num_test:
            return [(test, test.inputs[i])]
        carried = i - num_test - num_body
        return [(body, body.inputs[i - num_test]), *([(test, test.inputs[num_test + carried])] if carried >= 0 else [])]
    inner = _jax.inlined(eqn)
    return [] if inner is None else [(inner, inner.inputs[i])]
