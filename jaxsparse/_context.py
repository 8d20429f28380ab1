"""What code knows of the step that it is traced in: that arrays have their full shapes, and which rows are computed."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Around the tracing of what is to be evaluated on rows."""
    token = _TRACING.set(True)
    try:
        yield
    finally:
        _TRACING.reset(token)


_TRACING: contextvars.ContextVar[bool] = contextvars.ContextVar("tracing", default=False)


def is_tracing() -> bool:
    """Whether a step is being traced, in which all arrays have their full shapes: js.value_and_grad and js.lazy, which
    would choose the rows themselves, have nothing to do there."""
    return _TRACING.get()


@contextlib.contextmanager
def bags_at_once() -> Iterator[None]:
    """Around the tracing of what is written down for a reader: a bag is one read and one sum, however long it is."""
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


_AT_ONCE: contextvars.ContextVar[bool] = contextvars.ContextVar("at_once", default=False)


def is_at_once() -> bool:
    return _AT_ONCE.get()


ROWS_OF = "jaxsparse_rows_of"  # the name under which a walk knows rows_of


def rows_of(x: Any) -> tuple[jax.Array, jax.Array]:
    """Where a step computes some rows of an array (n, ...), how many, int32 (), and which, bool (n,). Where it computes
    all of them, and outside of such a step, -1 and none."""
    return _ROWS_OF(x)


def _rows_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.int32(-1), jnp.zeros(x.shape[:1], bool)


_rows_of.__name__ = ROWS_OF
_ROWS_OF = jax.jit(_rows_of)


ROW_NUMBERS = "jaxsparse_row_numbers"  # the name under which a walk knows row_numbers


def row_numbers(x: Any) -> jax.Array:
    """The numbers of an array's rows, int32 (n,): a step that computes some of its rows has theirs."""
    return _ROW_NUMBERS(x)


def _row_numbers(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[0], dtype=jnp.int32)


_row_numbers.__name__ = ROW_NUMBERS
_ROW_NUMBERS = jax.jit(_row_numbers)
