"""Finds the user's source line of an equation, for messages, and keeps that line on equations that replace it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxsparse import _jax
from jaxsparse._checks import is_library
from jaxsparse._jax import Equation, Program

_CELL = re.compile(r"[/\\\\]ipykernel_\d+[/\\\\]")  # the file that a notebook's kernel names for a cell


UNKNOWN_SOURCE = "unknown source"


def _users_frame(eqn: Equation) -> tuple[str, int, str] | None:
    return next((frame for frame in _jax.source_frames(eqn) if not is_library(frame[0])), None)


def source_frame(eqns: Sequence[Equation]) -> tuple[str, int, str] | None:
    """(file, line, function) of the user's code that made the last equation: the innermost frame outside the libraries.

    Each equation is inside the one before. The frames of an equation in a nested jit, such as jnp.take's, end at that
    jit, so outer equations are looked at too.
    """
    return next((frame for eqn in reversed(eqns) if (frame := _users_frame(eqn)) is not None), None)


def source_line(eqns: Sequence[Equation]) -> str:
    """`source_frame` as text: "file:line (function)"."""
    frame = source_frame(eqns)
    if frame is None:
        return UNKNOWN_SOURCE
    file, line, function = frame
    return f"{file_name(file)}:{line} ({function})"


def file_name(file: str) -> str:
    """The file's name, or "cell" for a notebook's cell."""
    return "cell" if _CELL.search(file) else file


def with_line_of(eqns: Sequence[Equation], fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args), a pytree of arrays. Its equations get the source line of the last of `eqns`, as `source_line` has
    it."""
    return _jax.at_line_of(next(filter(_users_frame, reversed(eqns)), eqns[-1]), fun, *args)


def evaluate(program: Program, eqns: Sequence[Equation], values: Sequence[Any]) -> list[Any]:
    """Evaluates the last of these equations outside of the others, which held it, and keeps its source line."""
    *calls, eqn = eqns
    if not calls or _users_frame(eqn) is not None:
        return _jax.evaluate(program, eqn, values)
    return with_line_of(eqns, lambda values: _jax.evaluate(program, eqn, values), list(values))
