"""Tells a function whether it is traced in a step, and which rows the step computes.

`tracing` marks the trace of a step. `rows_of` and `row_numbers` are calls in the traced program that `trace/walk.py`
recognises by name and replaces by the rows of the step.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Marks the tracing of a program that will be evaluated on rows."""
    token = _TRACING.set(True)
    try:
        yield
    finally:
        _TRACING.reset(token)


_TRACING: contextvars.ContextVar[bool] = contextvars.ContextVar("tracing", default=False)


def is_tracing() -> bool:
    """Whether a step is being traced. Arrays then have their full shapes, and the step chooses the rows, not
    js.value_and_grad or js.lazy."""
    return _TRACING.get()


@contextlib.contextmanager
def one_gather_per_bag() -> Iterator[None]:
    """Marks the trace of a program that people will read: a bag is one gather and one sum, whatever its length."""
    token = _ONE_GATHER.set(True)
    try:
        yield
    finally:
        _ONE_GATHER.reset(token)


_ONE_GATHER: contextvars.ContextVar[bool] = contextvars.ContextVar("one_gather", default=False)


def is_one_gather_per_bag() -> bool:
    """Whether a bag is one gather and one sum."""
    return _ONE_GATHER.get()


ROWS_OF = "jaxsparse_rows_of"  # the name by which trace/walk.py recognises rows_of


def rows_of(x: Any) -> tuple[jax.Array, jax.Array]:
    """The rows of an array (n, ...) that the step computes: their number, int32 (), and a mask, bool (n,).

    If the step computes all rows, or outside of a step: -1, and a mask of False.
    """
    return _ROWS_OF(x)


def _rows_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.int32(-1), jnp.zeros(x.shape[:1], bool)


_rows_of.__name__ = ROWS_OF
_ROWS_OF = jax.jit(_rows_of)


ROW_NUMBERS = "jaxsparse_row_numbers"  # the name by which trace/walk.py recognises row_numbers


def row_numbers(x: Any) -> jax.Array:
    """The row numbers of an array, int32 (n,). In a step that computes some rows, the numbers of these rows."""
    return _ROW_NUMBERS(x)


def _row_numbers(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[0], dtype=jnp.int32)


_row_numbers.__name__ = ROW_NUMBERS
_ROW_NUMBERS = jax.jit(_row_numbers)
