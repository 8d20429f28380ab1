"""Gather and scatter: rows and other slices of arrays by ids."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from jaxsparse.export.elementwise import Rule
from jaxsparse.export.flat import Operation
from jaxsparse.export.sizes import Size
from jaxsparse.export.writer import ATOM, UnknownError, Value, Writer, number_text, numpy_dtype, shape_text, size_text

_SCATTERS = {"scatter-add": "np.add", "scatter-mul": "np.multiply", "scatter-min": "np.minimum"}
_SCATTERS |= {"scatter-max": "np.maximum", "scatter": "None", "scatter_add": "np.add"}


def _mode(op: Operation) -> str:
    mode = GatherScatterMode.from_any(op.param("mode"))
    return "fill" if mode == GatherScatterMode.FILL_OR_DROP else "clip" if mode == GatherScatterMode.CLIP else "any"


def _fill(op: Operation, dtype: Any) -> str:
    value = op.params.get("fill_value")
    if value is None:  # JAX's own choice
        kind = numpy_dtype(dtype).kind
        limits = np.iinfo(dtype) if kind in "iu" else None
        value = np.nan if kind == "f" else True if limits is None else limits.min if kind == "i" else limits.max
    return number_text(value, dtype)


def _gather(w: Writer, op: Operation) -> Value:
    table, places = (w.value(x) for x in op.inputs)
    d, mode = op.param("dimension_numbers"), _mode(op)
    sizes, fill = op.param("slice_sizes"), _fill(op, w.flat.dtypes[op.outputs[0]])
    rank = len(places.shape) - 1  # of ids
    axis = int(d.start_index_map[0]) if d.start_index_map else -1
    others = [i for i in range(len(table.shape)) if i != axis]
    simple = (
        len(d.start_index_map) == 1
        and tuple(d.collapsed_slice_dims) == (axis,)
        and not d.operand_batching_dims
        and all(sizes[i] == table.shape[i] for i in others)
        and tuple(d.offset_dims) == tuple(i if i < axis else i - 1 + rank for i in others)
    )
    if table.rows_as is None:
        table = w.full(table)
    if simple and axis == 0:
        return _rows(w, op, table, _ids(w, places), mode, fill)
    if simple and mode == "any" and (ids := _from_the_end(_ids(w, places), table.shape[axis])) is not None:
        return w.out(op, f"np.take({table.text}, {ids.text}, {axis})")
    names = ["offset_dims", "collapsed_slice_dims", "start_index_map"]
    names += ["operand_batching_dims", "start_indices_batching_dims"] if d.operand_batching_dims else []
    numbers = ", ".join(f"{name}={tuple(map(int, getattr(d, name)))}" for name in names)
    options = f", fill={fill}" * (mode == "fill")
    call = f"({table.text}, {w.full(places).text}, {shape_text(sizes)}, {numbers}{options})"
    return w.out(op, w.helper("gather") + call)


def _ids(w: Writer, places: Value) -> Value:
    """The ids of start indices that have one component each."""
    if places.columns and len(places.columns) == 1:
        return places.columns[0]
    places = w.full(places)
    column = f"{places.at(ATOM)}[..., 0]"
    shape = places.shape[:-1]
    return dataclasses.replace(places, text=column, level=ATOM, shape=shape, actual=shape, made_by=None)


def _rows(w: Writer, op: Operation, table: Value, ids: Value, mode: str, fill: str) -> Value:
    """table[ids]."""
    is_plain = _inside(ids, table.shape[0])
    if not is_plain and mode == "any" and (numbers := _from_the_end(ids, table.shape[0])) is not None:
        is_plain, ids = True, numbers
    arguments = f"{table.text}, {ids.text}"
    if not is_plain:
        arguments += f", fill={fill}" if mode == "fill" else ", clip=True"
    is_bits = table.rows_as == "bfloat16"
    if is_plain and not is_bits:
        out = w.out(op, f"{table.at(ATOM)}[{ids.text}]")
        out.rows_of = (table, ids) if table.rows_as is None else None
    else:
        out = w.out(op, f"{w.helper('rows_of_bfloat16' if is_bits else 'rows')}({arguments})")
    dtype = numpy_dtype(w.flat.dtypes[op.outputs[0]])
    if table.rows_as and not (is_bits and dtype == np.float32):
        out.text += f".astype(np.{dtype})"
    out.bag = arguments if len(ids.shape) == 2 and table.rows_as is None and dtype == np.float32 else None
    return out


def _inside(ids: Value, num_rows: Any) -> bool:
    if ids.bounds is None:
        return False
    low, above = ids.bounds
    if isinstance(above, Size) or isinstance(num_rows, Size):
        return low == 0 and above == num_rows
    return low >= 0 and above <= num_rows


def _from_the_end(ids: Value, num_rows: Any) -> Value | None:
    """i, for ids where(i < 0, i + num_rows, i): NumPy also counts negative ids from the end. None for other ids."""
    if ids.made_by is None:
        return None
    op, values = ids.made_by
    if op.name != "select_n" or len(values) != 3:
        return None
    less, plain, moved = values
    if less.made_by is None or moved.made_by is None or not plain.is_name:
        return None
    (test, (x, zero)), (plus, (y, n)) = less.made_by, moved.made_by
    is_it = test.name == "lt" and plus.name == "add" and x.text == y.text == plain.text and zero.text == "0"
    return plain if is_it and n.number is not None and n.number == num_rows else None


def _sparse_product(w: Writer, op: Operation, ids: Value, new: Value, size: str) -> Value | None:
    """sum_by(ids, table[columns] * values[:, None], n) of a sparse input, without an array of all the rows."""
    if not ids.is_sorted or new.is_name or new.made_by is None or new.made_by[0].name != "mul":
        return None
    for rows, values in (new.made_by[1], new.made_by[1][::-1]):
        if rows.rows_of is None or rows.is_name or not values.columns or len(values.columns) != 1:
            continue
        (table, columns), (factors,) = rows.rows_of, values.columns
        if len(table.shape) == 2 and table.dtype == factors.dtype == np.float32:
            arguments = f"{ids.text}, {columns.text}, {factors.text}, {table.text}, {size}"
            return w.out(op, f"{w.helper('dot')}({arguments})")
    return None


def _scatter(w: Writer, op: Operation) -> Value:
    out, places, new = (w.value(x) for x in op.inputs)
    d, mode, function = op.param("dimension_numbers"), _mode(op), _SCATTERS[op.name]
    rank = len(places.shape) - 1
    simple = (
        tuple(d.scatter_dims_to_operand_dims) == tuple(d.inserted_window_dims) == (0,)
        and not d.operand_batching_dims
        and mode != "clip"
        and tuple(d.update_window_dims) == tuple(range(rank, rank + len(out.shape) - 1))
        and tuple(new.shape[rank:]) == tuple(out.shape[1:])
    )
    is_zeros = out.number is not None and not isinstance(out.number, Size) and out.number == 0
    if simple and rank == 1 and function == "np.add" and is_zeros:
        ids = w.full(_ids(w, places))
        if (product := _sparse_product(w, op, ids, new, size_text(out.shape[0]))) is not None:
            return product
        return w.out(op, f"{w.helper('sum_by')}({ids.text}, {w.full(new).text}, {size_text(out.shape[0])})")
    names = ["update_window_dims", "inserted_window_dims", "scatter_dims_to_operand_dims"]
    names += ["operand_batching_dims", "scatter_indices_batching_dims"] if d.operand_batching_dims else []
    numbers = ", ".join(f"{name}={tuple(map(int, getattr(d, name)))}" for name in names)
    options = ", clip=True" * (mode == "clip")
    if op.name == "scatter" and op.params.get("update_jaxpr") is not None:
        raise UnknownError("scatter of what a function makes")
    call = f"({function}, {w.full(out).text}, {w.full(places).text}, {w.full(new).text}, {numbers}{options})"
    return w.out(op, w.helper("scatter") + call)


RULES: dict[str, Rule] = {"gather": _gather, **dict.fromkeys(_SCATTERS, _scatter)}
