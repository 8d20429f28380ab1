"""Broadcasting, reshaping, slicing, concatenation, padding and iota."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxsparse.export.elementwise import Rule
from jaxsparse.export.flat import Operation
from jaxsparse.export.writer import ATOM, Shape, UnknownError, Value, Writer, dtype_text, shape_text, size_text


def _spread(w: Writer, op: Operation, x: Value, places: Sequence[int]) -> Value:
    """x with its axes at these places of the output, and axes of size 1 elsewhere."""
    shape = w.flat.shapes[op.outputs[0]]
    actual = (1,) * (len(x.shape) - len(x.actual)) + tuple(x.actual)
    new: list[Any] = [1] * len(shape)
    for place, size in zip(places, actual, strict=True):
        new[place] = size
    used = list(places)[len(x.shape) - len(x.actual) :]  # the places of the axes that the expression has
    text, level, out_actual = x.text, x.level, x.actual
    if used and used != list(range(len(shape) - len(used), len(shape))):
        index = ", ".join(":" if place in used else "None" for place in range(used[0], len(shape)))
        text, level, out_actual = f"{x.at(ATOM)}[{index}]", ATOM, tuple(new[used[0] :])
    out = dataclasses.replace(
        x, text=text, level=level, shape=shape, actual=out_actual, made_by=None, columns=None, bag=None, rows_of=None
    )
    is_column = shape == (*x.shape, 1) and list(places) == list(range(len(x.shape)))
    out.columns = [_once(w, op, x)] if is_column else None
    return out


def _once(w: Writer, op: Operation, x: Value) -> Value:
    """x as a column of the output: under a name, unless it is used once."""
    return x if w.uses(op.outputs[0]) == 1 and not (x.weak or x.actual != x.shape) else w.named(w.full(x))


def _broadcast(w: Writer, op: Operation) -> Value:
    return _spread(w, op, w.value(op.inputs[0]), op.param("broadcast_dimensions"))


def _reshape(w: Writer, op: Operation) -> Value:
    x, shape = w.value(op.inputs[0]), w.flat.shapes[op.outputs[0]]
    if op.params.get("dimensions") is not None:
        raise UnknownError("reshape with dimensions")
    if x.columns and len(x.columns) == 1 and tuple(shape) == tuple(x.shape[:-1]):
        return dataclasses.replace(x.columns[0])
    places = _only_ones_added(x.shape, shape)
    if places is not None and len(shape) > len(x.shape):
        return _spread(w, op, x, places)
    x = w.full(x)
    return w.out(op, f"{x.at(ATOM)}.reshape{shape_text(shape) if len(shape) != 1 else f'({size_text(shape[0])})'}")


def _only_ones_added(before: Shape, after: Shape) -> list[int] | None:
    """The places of the axes of `before` in `after`, if that only adds axes of size 1; otherwise None."""
    places, left = [], list(before)
    for i in reversed(range(len(after))):
        if left and left[-1] == after[i]:
            places.append(i)
            left.pop()
        elif after[i] != 1:
            return None
    return None if left else places[::-1]


def _squeeze(w: Writer, op: Operation) -> Value:
    x, axes = w.value(op.inputs[0]), [int(axis) for axis in op.param("dimensions")]
    if x.columns and len(x.columns) == 1 and axes == [len(x.shape) - 1]:
        return dataclasses.replace(x.columns[0])
    cut = x.made_by and x.made_by[0].name == "slice" and not x.is_name
    if cut and x.made_by is not None:
        slicing, (source,) = x.made_by
        starts = slicing.param("start_indices")
        index = _index(slicing, source.shape)
        index = [size_text(starts[i]) if i in axes else part for i, part in enumerate(index)]
        return w.out(op, _indexed(w.full(source), index))
    x = w.full(x)
    return w.out(op, _indexed(x, ["0" if i in axes else ":" for i in range(len(x.shape))]))


def _index(op: Operation, shape: Shape) -> list[str]:
    """The index of a slice, an entry for each axis."""
    starts, ends = op.param("start_indices"), op.param("limit_indices")
    steps = op.param("strides") or (1,) * len(shape)
    index = []
    for size, start, end, step in zip(shape, starts, ends, steps, strict=True):
        part = f"{'' if start == 0 else size_text(start)}:{'' if end == size else size_text(end)}"
        index.append(part if step == 1 else f"{part}:{step}")
    return index


def _indexed(x: Value, index: list[str]) -> str:
    while index and index[-1] == ":":
        index = index[:-1]
    return f"{x.at(ATOM)}[{', '.join(index)}]" if index else x.text


def _slice(w: Writer, op: Operation) -> Value:
    x = w.value(op.inputs[0])
    out = w.out(op, _indexed(w.full(x), _index(op, x.shape)))
    starts, ends = op.param("start_indices"), op.param("limit_indices")
    steps = op.param("strides") or (1,) * len(x.shape)
    keeps_other_axes = all(
        start == 0 and end == size for start, end, size in zip(starts[:-1], ends[:-1], x.shape[:-1], strict=True)
    )
    if x.columns is not None and keeps_other_axes and all(step == 1 for step in steps):
        columns = x.columns[int(starts[-1]) : int(ends[-1])]
        out.columns = [w.named(column) for column in columns]
    return out


def _transpose(w: Writer, op: Operation) -> Value:
    x, order = w.full(w.value(op.inputs[0])), [int(axis) for axis in op.param("permutation")]
    if order == [1, 0]:
        return w.out(op, f"{x.at(ATOM)}.T")
    return w.out(op, f"{x.at(ATOM)}.transpose({', '.join(map(str, order))})")


def _rev(w: Writer, op: Operation) -> Value:
    x = w.full(w.value(op.inputs[0]))
    axes = [int(axis) for axis in op.param("dimensions")]
    return w.out(op, _indexed(x, ["::-1" if i in axes else ":" for i in range(len(x.shape))]))


def _list(values: Sequence[Value]) -> str:
    return f"[{', '.join(value.text for value in values)}]"


def _concatenate(w: Writer, op: Operation) -> Value:
    values, axis = [w.value(x) for x in op.inputs], int(op.param("dimension"))
    out = w.out(op, f"np.concatenate({_list([w.full(value) for value in values])}, {axis})")
    if axis == len(out.shape) - 1 and all(value.columns is not None for value in values):
        columns = [column for value in values for column in value.columns or ()]
        out.columns = columns if w.uses(op.outputs[0]) == 1 else [w.named(column) for column in columns]
    return out


def _stack(w: Writer, op: Operation) -> Value:
    values, axis = [w.value(x) for x in op.inputs], int(op.param("axis"))
    out = w.out(op, f"np.stack({_list([w.full(value) for value in values])}, {axis})")
    if axis == len(out.shape) - 1:
        out.columns = [_once(w, op, value) for value in values]
    return out


def _split(w: Writer, op: Operation) -> list[Value]:
    x, axis = w.named(w.full(w.value(op.inputs[0])), "joined"), int(op.param("axis"))
    outs, start = [], 0
    for number, size in enumerate(op.param("sizes")):
        index = [":"] * axis + [f"{start or ''}:{start + int(size)}"]
        outs.append(w.out(op, _indexed(x, index), number=number))
        start += int(size)
    return outs


def _pad(w: Writer, op: Operation) -> Value:
    x, value = w.full(w.value(op.inputs[0])), w.value(op.inputs[1])
    config = op.param("padding_config")
    if any(low < 0 or high < 0 or between for low, high, between in config):
        raise UnknownError("pad that cuts off, or pads between numbers")
    widths = ", ".join(f"({low}, {high})" for low, high, _ in config)
    return w.out(op, f"np.pad({x.text}, ({widths}{',' * (len(config) == 1)}), constant_values={value.text})")


def _tile(w: Writer, op: Operation) -> Value:
    x = w.full(w.value(op.inputs[0]))
    return w.out(op, f"np.tile({x.text}, {shape_text(op.param('reps'))})")


def _iota(w: Writer, op: Operation) -> Value:
    shape, axis = w.flat.shapes[op.outputs[0]], int(op.param("dimension"))
    text = f"np.arange({size_text(shape[axis])}, dtype={dtype_text(op.param('dtype'))})"
    behind = len(shape) - axis - 1
    text += f"[:{', None' * behind}]" * (behind > 0)
    return w.out(op, text, actual=(shape[axis], *(1,) * behind))


def _dynamic_slice(w: Writer, op: Operation) -> Value:
    x, starts = w.full(w.value(op.inputs[0])), [w.value(start) for start in op.inputs[1:]]
    sizes = op.param("slice_sizes")
    texts = [start.text for start in starts]
    places = f"({', '.join(texts)}{',' * (len(texts) == 1)})"
    return w.out(op, f"{w.helper('part')}({x.text}, {places}, {shape_text(sizes)})")


def _dynamic_update_slice(w: Writer, op: Operation) -> Value:
    x, new = (w.full(w.value(x)) for x in op.inputs[:2])
    texts = [w.value(start).text for start in op.inputs[2:]]
    places = f"({', '.join(texts)}{',' * (len(texts) == 1)})"
    return w.out(op, f"{w.helper('with_part')}({x.text}, {new.text}, {places})")


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _slice,
    "transpose": _transpose,
    "rev": _rev,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "pad": _pad,
    "iota": _iota,
    "tile": _tile,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
