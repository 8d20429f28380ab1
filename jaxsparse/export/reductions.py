"""Reductions, cumulative reductions, sorting and top_k."""

from __future__ import annotations

import numpy as np

from jaxsparse.export.elementwise import Rule
from jaxsparse.export.flat import Operation
from jaxsparse.export.writer import ATOM, UnknownError, Value, Writer, axes_text, dtype_text, numpy_dtype

_METHODS = {"reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min", "reduce_prod": "prod", "reduce_or": "any"}
_METHODS |= {"reduce_and": "all"}
_RUNNING = {"cumsum": "np.add", "cumprod": "np.multiply", "cummax": "np.maximum", "cummin": "np.minimum"}
_RUNNING |= {"cumlogsumexp": "np.logaddexp"}


def _reduce(w: Writer, op: Operation) -> Value:
    axes = [int(axis) for axis in op.param("axes")]
    x = w.value(op.inputs[0])
    if (bag := _bag(w, op, x, axes)) is not None:
        return bag
    x = w.full(x)
    if not axes:
        return w.out(op, x.text, x.level)
    if op.name in ("reduce_or", "reduce_and") and np.dtype(x.dtype) != bool:
        raise UnknownError(f"{op.name} of {x.dtype}")
    options = [axes_text(axes)] if len(axes) < len(x.shape) else []
    if op.name in ("reduce_sum", "reduce_prod") and numpy_dtype(x.dtype).kind in "iu":  # which NumPy widens
        options.append(f"dtype={dtype_text(x.dtype)}")
    return w.out(op, f"{x.at(ATOM)}.{_METHODS[op.name]}({', '.join(options)})")


def _bag(w: Writer, op: Operation, x: Value, axes: list[int]) -> Value | None:
    """The sum of the rows of each bag, if these rows have no other use."""
    is_bag = op.name == "reduce_sum" and axes == [1] and x.made_by is not None and not x.is_name
    if not is_bag or x.made_by is None or x.bag is None:
        return None
    return w.out(op, f"{w.helper('bags')}({x.bag})")


def _arg(w: Writer, op: Operation) -> Value:
    x, (axis,) = w.full(w.value(op.inputs[0])), op.param("axes")
    return w.out(op, f"{x.at(ATOM)}.{op.name}({int(axis)}).astype({dtype_text(op.param('index_dtype'))})")


def _running(w: Writer, op: Operation) -> Value:
    x, axis = w.full(w.value(op.inputs[0])), int(op.param("axis"))
    back = f"[{':, ' * axis}::-1]" if op.param("reverse") else ""
    text = f"{_RUNNING[op.name]}.accumulate({x.at(ATOM) if back else x.text}{back}, {axis}"
    is_wide = op.name in ("cumsum", "cumprod") and numpy_dtype(x.dtype).kind in "iu"
    return w.out(op, f"{text}{f', dtype={dtype_text(x.dtype)}' if is_wide else ''}){back}")


def _sort(w: Writer, op: Operation) -> list[Value]:
    values = [w.full(w.value(x)) for x in op.inputs]
    axis, keys = int(op.param("dimension")), int(op.param("num_keys"))
    if len(values) == 1:
        return [w.out(op, f"np.sort({values[0].text}, {axis})")]
    if keys == 1:
        key = w.named(values[0], "keys") if w.uses(op.outputs[0]) else values[0]
        text = f'np.argsort({key.text}, {axis}, kind="stable")'
    else:
        values[:keys] = [w.named(value, "keys") for value in values[:keys]]
        text = f"np.lexsort([{', '.join(value.text for value in values[keys - 1 :: -1])}], {axis})"
    order = w.named(w.out(op, text), "order")
    outs = []
    for number, value in enumerate(values):
        by = value.made_by
        if by is not None and by[0].name == "iota" and int(by[0].param("dimension")) == axis:
            outs.append(w.out(op, f"{order.text}.astype({dtype_text(value.dtype)})", number=number))
        else:
            outs.append(w.out(op, f"np.take_along_axis({value.text}, {order.text}, {axis})", number=number))
    return outs


def _top_k(w: Writer, op: Operation) -> list[Value]:
    x = w.named(w.full(w.value(op.inputs[0])), "scores")
    axis, k = int(op.params.get("axis", -1)) % len(x.shape), int(op.param("k"))
    at = w.named(w.out(op, f"{w.helper('top')}({x.text}, {k}, {axis})"), "top_ids")
    values = w.out(op, f"np.take_along_axis({x.text}, {at.text}, {axis})")
    return [values, w.out(op, f"{at.text}.astype({dtype_text(w.flat.dtypes[op.outputs[1]])})", number=1)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_METHODS, _reduce),
    **dict.fromkeys(_RUNNING, _running),
    "argmax": _arg,
    "argmin": _arg,
    "sort": _sort,
    "top_k": _top_k,
}
