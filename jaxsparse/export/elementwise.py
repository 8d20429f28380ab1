"""Elementwise operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse.export import writer
from jaxsparse.export.flat import Operation
from jaxsparse.export.sizes import Size
from jaxsparse.export.writer import ADD, AND, ATOM, COMPARE, MUL, OR, SHIFT, UNARY, XOR, UnknownError, Value, Writer

Rule = Callable[[Writer, Operation], Any]

_SIGNS = {
    "add": ("+", ADD), "sub": ("-", ADD), "mul": ("*", MUL), "div": ("/", MUL), "and": ("&", AND), "or": ("|", OR),
    "xor": ("^", XOR), "eq": ("==", COMPARE), "ne": ("!=", COMPARE), "lt": ("<", COMPARE), "le": ("<=", COMPARE),
    "gt": (">", COMPARE), "ge": (">=", COMPARE), "shift_left": ("<<", SHIFT), "shift_right_arithmetic": (">>", SHIFT),
    "add_any": ("+", ADD),
}  # fmt: skip
_FUNCTIONS = {
    name: f"np.{name}"
    for name in "exp exp2 log log1p expm1 sin cos tan sinh cosh tanh floor ceil sqrt cbrt sign square".split()
} | {
    "asin": "np.arcsin", "acos": "np.arccos", "atan": "np.arctan", "asinh": "np.arcsinh", "acosh": "np.arccosh",
    "atanh": "np.arctanh", "abs": "np.abs", "is_finite": "np.isfinite", "max": "np.maximum", "min": "np.minimum",
    "pow": "np.power", "rem": "np.fmod", "atan2": "np.arctan2",
}  # fmt: skip
_HELPERS = {"logistic": "sigmoid", "erf": "erf", "erfc": "erfc"}


def values_of(w: Writer, op: Operation) -> tuple[list[Value], Any]:
    """The operands of an operation, at least one of them not a Python scalar, and their broadcast shape."""
    values = [w.value(x) for x in op.inputs]
    if all(value.weak for value in values):
        values[0] = w.strong(values[0])
    return values, writer.broadcast([value.actual for value in values])


def _infix(w: Writer, op: Operation) -> Value:
    values, actual = values_of(w, op)
    a, b = values
    sign, level = _SIGNS[op.name]
    if (known := _known(w, op, a, b)) is not None:
        return known
    if op.name == "div" and not jnp.issubdtype(a.dtype, jnp.inexact):
        return w.out(op, f"{w.helper('truncated_division')}({a.text}, {b.text})", actual=actual)
    left = level + 1 if level == COMPARE else level
    return w.out(op, f"{a.at(left)} {sign} {b.at(level + 1)}", level, actual)


def _known(w: Writer, op: Operation, a: Value, b: Value) -> Value | None:
    """A result that needs no computation: a comparison of ids with bounds that predict has checked, or `and` or `or`
    with a known operand."""
    if op.name in ("and", "or") and np.dtype(a.dtype) == bool:
        for one, other in ((a, b), (b, a)):
            if one.number is not None and bool(one.number) is (op.name == "and"):
                return dataclasses.replace(other, shape=w.flat.shapes[op.outputs[0]], made_by=None)
    if a.bounds is not None and b.number is not None:
        low, above = a.bounds
        if (op.name == "ge" and _is(b.number, low)) or (op.name == "lt" and _is(b.number, above)):
            out = w.out(op, "True", actual=())
            return dataclasses.replace(out, weak=True, number=True)
    return None


def _is(x: Any, y: Any) -> bool:
    return x == y if isinstance(x, Size) or isinstance(y, Size) else int(x) == int(y)


def _called(function: str) -> Rule:
    def rule(w: Writer, op: Operation) -> Value:
        values, actual = values_of(w, op)
        if op.name == "max" and any(_is_lowest(value) for value in values):  # jax.nn.softmax has max(-inf, x)
            (other,) = (value for value in values if not _is_lowest(value))
            return dataclasses.replace(other, shape=w.flat.shapes[op.outputs[0]], made_by=None)
        name = w.helper(function) if "." not in function else function
        return w.out(op, f"{name}({', '.join(value.text for value in values)})", actual=actual)

    return rule


def _is_lowest(value: Value) -> bool:
    x = value.number
    return x is not None and not isinstance(x, Size) and bool(x == -np.inf)


def _neg(w: Writer, op: Operation) -> Value:
    (x,), actual = values_of(w, op)
    return w.out(op, f"-{x.at(UNARY + 1)}", UNARY, actual)


def _not(w: Writer, op: Operation) -> Value:
    (x,), actual = values_of(w, op)
    return w.out(op, f"~{x.at(UNARY + 1)}", UNARY, actual)


def _rsqrt(w: Writer, op: Operation) -> Value:
    (x,), actual = values_of(w, op)
    return w.out(op, f"1 / np.sqrt({x.text})", MUL, actual)


def _integer_pow(w: Writer, op: Operation) -> Value:
    (x,), actual = values_of(w, op)
    y = int(op.param("y"))
    if y == 2:
        return w.out(op, f"np.square({x.text})", actual=actual)
    if y in (3, 4):  # np.power is slow
        return w.out(op, " * ".join([w.named(x).text] * y), MUL, actual)
    if y < 0:
        return w.out(op, f"1 / {x.at(ATOM)} ** {-y}" if y < -1 else f"1 / {x.at(MUL + 1)}", MUL, actual)
    return w.out(op, f"{x.at(ATOM)} ** {y}", writer.POWER, actual)


def _total_order(w: Writer, op: Operation) -> Value:
    values, actual = values_of(w, op)
    sign, _ = _SIGNS[op.name.removesuffix("_to")]
    ordered = [f"{w.helper('ordered')}({w.strong(value).text})" for value in values]
    return w.out(op, f" {sign} ".join(ordered), COMPARE, actual)


def _round(w: Writer, op: Operation) -> Value:
    (x,), actual = values_of(w, op)
    if int(op.param("rounding_method")) == 1:
        return w.out(op, f"np.rint({x.text})", actual=actual)
    return w.out(op, f"{w.helper('round_away')}({x.text})", actual=actual)


def _shift_right_logical(w: Writer, op: Operation) -> Value:
    (a, b), actual = values_of(w, op)
    if np.dtype(a.dtype).kind != "u":
        raise UnknownError("shift_right_logical of signed integers")
    return w.out(op, f"{a.at(SHIFT)} >> {b.at(SHIFT + 1)}", SHIFT, actual)


def _same(w: Writer, op: Operation) -> Value:
    (x,) = (w.value(x) for x in op.inputs)
    return dataclasses.replace(x, dtype=w.flat.dtypes[op.outputs[0]])


def _convert(w: Writer, op: Operation) -> Value:
    x, dtype = w.value(op.inputs[0]), w.flat.dtypes[op.outputs[0]]
    if x.is_stored and w.flat.is_read_by_rows(op.outputs[0]):  # the rows of a table are converted when they are read
        before, after = writer.numpy_dtype(x.dtype), writer.numpy_dtype(dtype)
        rows_as = x.rows_as or (None if before == after else str(after))
        return dataclasses.replace(x, dtype=dtype, rows_as=rows_as)
    if x.weak and isinstance(x.number, Size):
        return dataclasses.replace(x, dtype=dtype)
    if writer.numpy_dtype(x.dtype) == writer.numpy_dtype(dtype):
        return dataclasses.replace(x, dtype=dtype)
    x = w.strong(x)
    return w.out(op, f"{x.at(ATOM)}.astype({writer.dtype_text(dtype)})", actual=x.actual)


def _reduce_precision(w: Writer, op: Operation) -> Value:
    if int(op.param("exponent_bits")) < 8 or int(op.param("mantissa_bits")) < 23:
        raise UnknownError("reduce_precision to less than float32")
    return _same(w, op)


def _clamp(w: Writer, op: Operation) -> Value:
    low, x, high = (w.value(x) for x in op.inputs)
    x = w.strong(x)
    actual = writer.broadcast([low.actual, x.actual, high.actual])
    return w.out(op, f"np.clip({x.text}, {low.text}, {high.text})", actual=actual)


def _select(w: Writer, op: Operation) -> Value:
    which, *cases = (w.value(x) for x in op.inputs)
    if which.number is not None and not isinstance(which.number, Size):
        return dataclasses.replace(cases[int(which.number)], shape=w.flat.shapes[op.outputs[0]], made_by=None)
    actual = writer.broadcast([value.actual for value in (which, *cases)])
    if len(cases) > 2:
        texts = ", ".join(w.full(case).text for case in cases)
        return w.out(op, f'np.choose({which.text}, [{texts}], mode="clip")', actual=actual)
    if all(case.weak for case in cases):
        cases[0] = w.strong(cases[0])
    return w.out(op, f"np.where({which.text}, {cases[1].text}, {cases[0].text})", actual=actual)


def _bitcast(w: Writer, op: Operation) -> Value:
    x, dtype = w.full(w.value(op.inputs[0])), w.flat.dtypes[op.outputs[0]]
    if np.dtype(x.dtype).itemsize != np.dtype(dtype).itemsize or np.dtype(dtype).kind not in "iuf" + "b":
        raise UnknownError(f"bitcast_convert_type of {x.dtype} to {dtype}")
    return w.out(op, f"{x.at(ATOM)}.view({writer.dtype_text(dtype)})")


RULES: dict[str, Rule] = {
    **dict.fromkeys(_SIGNS, _infix),
    **{name: _called(function) for name, function in (_FUNCTIONS | _HELPERS).items()},
    "neg": _neg,
    "not": _not,
    "rsqrt": _rsqrt,
    "integer_pow": _integer_pow,
    "round": _round,
    **dict.fromkeys(("le_to", "lt_to"), _total_order),
    "shift_right_logical": _shift_right_logical,
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "clamp": _clamp,
    "select_n": _select,
    "bitcast_convert_type": _bitcast,
    **dict.fromkeys(("stop_gradient", "copy", "copy_p", "sharding_constraint", "pvary", "name"), _same),
}
