"""Matrix products and triangular systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.export.elementwise import Rule
from jaxsparse.export.flat import Operation
from jaxsparse.export.sizes import Size
from jaxsparse.export.writer import (
    ATOM,
    MUL,
    UnknownError,
    Value,
    Writer,
    dtype_text,
    numpy_dtype,
    shape_text,
    size_text,
)


def _dot(w: Writer, op: Operation) -> Value:
    (contract_a, contract_b), (batch_a, batch_b) = op.param("dimension_numbers")
    a, b = (w.full(w.value(x)) for x in op.inputs)
    dtype = numpy_dtype(w.flat.dtypes[op.outputs[0]])
    a, b = (x if numpy_dtype(x.dtype) == dtype else _as(x, dtype) for x in (a, b))
    free_a = [i for i in range(len(a.shape)) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(len(b.shape)) if i not in (*contract_b, *batch_b)]
    if not batch_a and len(contract_a) == 1 and len(b.shape) <= 2 and contract_b[0] == 1:
        right = f"{b.at(ATOM)}.T"
    else:
        right = _arranged(b, [*batch_b, *contract_b, *free_b], [*([i] for i in batch_b), contract_b, free_b], MUL + 1)
        if len(b.shape) == 1 and contract_b:  # a vector
            right = b.at(MUL + 1)
    rows_a = [free_a] if batch_a else [[i] for i in free_a]
    left = _arranged(a, [*batch_a, *free_a, *contract_a], [*([i] for i in batch_a), *rows_a, contract_a], MUL)
    text = f"{left} @ {right}"
    is_vector = len(b.shape) == 1 and contract_b
    if (len(free_b) == 1 or is_vector) and (len(free_a) == 1 or not batch_a):
        return w.out(op, text, MUL)
    return w.out(op, f"({text}).reshape{shape_text(w.flat.shapes[op.outputs[0]])}")


def _triangular_solve(w: Writer, op: Operation) -> Value:
    a, b = (w.full(w.value(x)) for x in op.inputs)
    if op.param("conjugate_a") and np.dtype(a.dtype).kind == "c":
        raise UnknownError("triangular_solve of complex numbers")
    text = f"np.{'tril' if op.param('lower') else 'triu'}({a.text})"
    if op.param("unit_diagonal"):
        text = f"np.{'tril' if op.param('lower') else 'triu'}({a.text}, {-1 if op.param('lower') else 1})"
        text = f"{text} + np.eye({size_text(a.shape[-1])}, dtype={dtype_text(a.dtype)})"
    if op.param("left_side"):
        text = _transposed(text) if op.param("transpose_a") else text
        return w.out(op, f"np.linalg.solve({text}, {b.text})")
    text = text if op.param("transpose_a") else _transposed(text)  # x a = b is a' x' = b'
    return w.out(op, _transposed(f"np.linalg.solve({text}, {_transposed(b.text)})"))


def _transposed(text: str) -> str:
    return f"np.swapaxes({text}, -1, -2)"


def _as(x: Value, dtype: Any) -> Value:
    return Value(f"{x.at(ATOM)}.astype(np.{dtype})", ATOM, x.shape, x.dtype, x.shape)


def _arranged(x: Value, order: Sequence[int], groups: Sequence[Sequence[int]], level: int) -> str:
    """x with its axes in this order, and each group of axes merged into one."""
    is_turned, is_joined = list(order) != sorted(order), any(len(group) != 1 for group in groups)
    text = x.at(ATOM if is_turned or is_joined else level)
    if is_turned:
        text = f"{text}.transpose({', '.join(map(str, order))})"
    if is_joined:
        sizes = [_product([x.shape[i] for i in group]) for group in groups]
        if sum(n is None for n in sizes) > 1:
            raise UnknownError("dot_general over several sizes of the input")
        text = f"{text}.reshape{shape_text(tuple(-1 if n is None else n for n in sizes))}"
    return text


def _product(sizes: Sequence[Any]) -> Any:
    """The product of sizes; None if several of them depend on the input."""
    known, formulas = math.prod(n for n in sizes if not isinstance(n, Size)), [n for n in sizes if isinstance(n, Size)]
    if not formulas or not known:
        return known
    if len(formulas) > 1:
        return None
    return Size(tuple((names, factor * known) for names, factor in formulas[0].terms))


RULES: dict[str, Rule] = {"dot_general": _dot, "triangular_solve": _triangular_solve}
