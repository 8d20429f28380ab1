"""Where in the user's program an equation is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxsparse import _jax
from jaxsparse._checks import is_library
from jaxsparse._jax import Equation, Program

_CELL = re.compile(r"[/\\\\]ipykernel_\d+[/\\\\]")  # a notebook's; the file is there for a debugger only


UNKNOWN_SOURCE = "unknown source"


def _users_frame(eqn: Equation) -> tuple[str, int, str] | None:
    return next((frame for frame in _jax.source_frames(eqn) if not is_library(frame[0])), None)


def source_frame(eqns: Sequence[Equation]) -> tuple[str, int, str] | None:
    """(file, line, function) where the user's program made the last of these equations, each of which is inside the one
    before: the innermost frame outside the libraries. The frames of an equation in a nested jit, jnp.take's for one,
    end at that jit."""
    return next((frame for eqn in reversed(eqns) if (frame := _users_frame(eqn)) is not None), None)


def source_line(eqns: Sequence[Equation]) -> str:
    """`source_frame` in words."""
    frame = source_frame(eqns)
    if frame is None:
        return UNKNOWN_SOURCE
    file, line, function = frame
    return f"{file_name(file)}:{line} ({function})"


def file_name(file: str) -> str:
    """A file, or that it is a notebook's cell."""
    return "cell" if _CELL.search(file) else file


def in_place_of(eqns: Sequence[Equation], fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args), a pytree of arrays, whose equations have the line of the last of these, as `source_line` finds it."""
    return _jax.at_line_of(next(filter(_users_frame, reversed(eqns)), eqns[-1]), fun, *args)


def evaluate(program: Program, eqns: Sequence[Equation], values: Sequence[Any]) -> list[Any]:
    """The last of these equations, each of which is inside the one before, where it is not inside of them any more."""
    *calls, eqn = eqns
    if not calls or _users_frame(eqn) is not None:
        return _jax.evaluate(program, eqn, values)
    return in_place_of(eqns, lambda values: _jax.evaluate(program, eqn, values), list(values))
