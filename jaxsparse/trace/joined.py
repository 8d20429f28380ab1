"""Rewrites programs that concatenate or stack tables before they read them.

Examples are `jnp.concatenate([t0, t1])[ids]` and `jnp.stack([t0, t1])[f, ids]`. They would make an array with all rows
at each step. So each table is read by its own ids, and each result is taken from the table that has the id. In the
gradient, a scatter into zeros with all rows, cut into parts, becomes a scatter into the zeros of each part.

An array that is used in another way is made as before, and its tables are dense. So it is inside of a scan or cond, and
where it enters one of these or a remat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._context import ROW_NUMBERS, ROWS_OF
from jaxsparse._jax import Equation, Program
from jaxsparse.ops.rows import at_least_int32, in_range, row_ids
from jaxsparse.trace.lines import evaluate, with_line_of
from jaxsparse.trace.rewriting import Rewriting
from jaxsparse.trace.row_reads import CLIPPED, clip_others, missing_value, window_sizes

Mode = jax.lax.GatherScatterMode

_ADD = _jax.primitives("add add_jaxvals")


def read_tables_separately(program: Program, leaves: Sequence[Any], tables: Collection[int]) -> Program:
    """The program with a separate read for each table that is concatenated or stacked; the same program if none is.

    Args:
      leaves: the program's inputs: arrays, or their shapes.
      tables: the numbers of the inputs that may be tables.
    """
    shapes = {_jax.shape(program.inputs[i]) for i in tables} - {()}
    if not _joins(program, shapes):
        return program
    return _jax.trace(lambda leaves: _Rewriting([leaves[i] for i in tables], shapes).run(program, leaves), list(leaves))


def _joins(program: Program, shapes: Collection[tuple[int, ...]]) -> bool:
    """Whether an array of one of these shapes is concatenated or stacked, also inside of calls and remats."""
    return any(
        _joins(_jax.called(eqn), shapes)
        if eqn.primitive in _jax.CALLS
        else _joins(_jax.remat_of(eqn).body, shapes)
        if _jax.is_remat(eqn)
        else (_is_join(eqn) or _is_stack(eqn)) and any(_jax.shape(v) in shapes for v in eqn.inputs)
        for eqn in program.equations
    )


def _is_join(eqn: Equation) -> bool:
    return eqn.primitive is _jax.CONCATENATE and eqn.param("dimension") == 0


def _is_stack(eqn: Equation) -> bool:
    return eqn.primitive.name == "stack" and eqn.param("axis") == 0  # by name: JAX does not list it


class _LazyArray:
    """An array that is computed if something needs all of it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._array = make, None

    @property
    def array(self) -> Any:
        if self._array is None:
            self._array = self._make()
        return self._array


class _Joined(_LazyArray):
    """Concatenated or stacked arrays. tables: whether they are stacked: an index names a table and a row."""

    def __init__(self, make: Callable[[], Any], parts: Sequence[Any], tables: bool = False) -> None:
        super().__init__(make)
        self.parts, self.tables = parts, tables


class _Zeros(_LazyArray):
    """Zeros that a scatter may add to."""


class _Scatter(NamedTuple):
    eqn: Equation
    index: Any
    updates: Any


class _Added(_LazyArray):
    """The sum of scatters into zeros, or its rows from `start` on."""

    def __init__(self, make: Callable[[], Any], scatters: Sequence[_Scatter], start: int = 0) -> None:
        super().__init__(make)
        self.scatters, self.start = scatters, start

    def cut(self, start: int, out: Any) -> _Added:
        """The rows from `start` on, of the shape and dtype of the variable `out`."""
        start, shape, dtype = start + self.start, _jax.shape(out), _jax.dtype(out)
        return _Added(lambda: _add(self.scatters, start, shape, dtype), self.scatters, start)

    def table(self, number: int, out: Any) -> Any:
        """The sum for one of stacked tables, of the shape and dtype of the variable `out`."""
        shape, dtype = (1, *_jax.shape(out)), _jax.dtype(out)
        return jnp.squeeze(_add(self.scatters, self.start + number, shape, dtype, of_table=True), 0)


class _Rewriting(Rewriting):
    """A walk through a program. tables: the inputs that may be tables; shapes: their shapes."""

    def __init__(self, tables: Sequence[Any], shapes: Collection[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes
        self._tables = list(tables)  # and casts of them
        self._heights: set[int] = set()  # of concatenated or stacked arrays

    def run(self, program: Program, values: Sequence[Any]) -> list[Any]:
        return [_array(v) for v in self.walk(program, values)]

    def step(self, program: Program, eqn: Equation, values: list[Any]) -> list[Any]:
        primitive = eqn.primitive
        first: Any = values[0] if values else None
        if primitive in _jax.CALLS and _jax.called_name(eqn) not in (ROWS_OF, ROW_NUMBERS):
            return self.walk(_jax.called(eqn), values)

        if _jax.is_remat(eqn) and _joins((remat := _jax.remat_of(eqn)).body, self._shapes):
            arrays = [_array(v) for v in values]
            return list(remat.wrap(lambda: self.run(remat.body, arrays))())
        within = self.within

        def evaluated() -> list[Any]:
            return evaluate(program, within, [_array(v) for v in values])

        def first_output() -> Any:
            return evaluated()[0]

        if _is_join(eqn) and any(isinstance(v, _Joined) or self._is_table(v) for v in values):
            self._heights.add(_jax.shape(eqn.outputs[0])[0])
            return [_Joined(first_output, [part for v in values for part in _parts(v)])]
        if _is_stack(eqn) and any(map(self._is_table, values)):
            self._heights.add(len(values))
            parts = with_line_of(within, lambda xs: [jnp.expand_dims(x, 0) for x in xs], list(map(_array, values)))
            return [_Joined(first_output, parts, tables=True)]
        if primitive is _jax.GATHER and isinstance(first, _Joined) and _reads_rows(eqn, first.tables):
            return [
                with_line_of(within, functools.partial(_read, eqn, first.tables), list(first.parts), _array(values[1]))
            ]
        if primitive is _jax.BROADCAST and _jax.shape(eqn.outputs[0])[:1] and _is_zero(first):
            return [_Zeros(first_output)] if _jax.shape(eqn.outputs[0])[0] in self._heights else evaluated()
        if primitive is _jax.SCATTER_ADD and isinstance(first, _Zeros) and _adds_to_rows(eqn):
            return [_Added(first_output, [_Scatter(eqn, _array(values[1]), _array(values[2]))])]
        if primitive in _ADD and all(isinstance(v, _Added) and v.start == first.start for v in values):
            return [_Added(first_output, [scatter for v in values for scatter in v.scatters], first.start)]
        if isinstance(first, _Added) and (cuts := _cuts(eqn)) is not None:
            return [first.cut(start, v) for start, v in zip(cuts, eqn.outputs, strict=True)]
        if isinstance(first, _Added) and primitive.name == "unstack" and eqn.param("axis") == 0:
            return with_line_of(within, lambda: [first.table(n, v) for n, v in enumerate(eqn.outputs)])
        outs = evaluated()
        if primitive is _jax.CONVERT and self._is_table(first):
            self._tables += outs
        return outs

    def _is_table(self, v: Any) -> bool:
        return any(v is table for table in self._tables)


def _array(v: Any) -> Any:
    return v.array if isinstance(v, _LazyArray) else v


def _parts(v: Any) -> Sequence[Any]:
    return v.parts if isinstance(v, _Joined) else [_array(v)]


def _is_zero(v: Any) -> bool:
    return not _jax.is_traced(v) and not isinstance(v, _LazyArray) and jnp.ndim(v) == 0 and not v


def _reads_rows(eqn: Equation, of_tables: bool) -> bool:
    named, sizes = eqn.param("dimension_numbers").start_index_map, eqn.param("slice_sizes")
    return all(axis in named and sizes[axis] == 1 for axis in ((0, 1) if of_tables else (0,)))


def _adds_to_rows(eqn: Equation) -> bool:
    return 0 in eqn.param("dimension_numbers").scatter_dims_to_operand_dims and window_sizes(eqn)[0] == 1


def _cuts(eqn: Equation) -> list[int] | None:
    """The first row of each output in the input, if the equation cuts the input into parts; otherwise None."""
    if eqn.primitive.name == "split" and eqn.param("axis") == 0:  # by name: JAX does not list it
        return [sum(eqn.param("sizes")[:i]) for i in range(len(eqn.outputs))]
    if eqn.primitive is not _jax.SLICE:
        return None
    starts, ends, strides = eqn.param("start_indices"), eqn.param("limit_indices"), eqn.param("strides")
    all_columns = not any(starts[1:]) and tuple(ends[1:]) == _jax.shape(eqn.inputs[0])[1:]
    return [starts[0]] if all_columns and (strides is None or set(strides) == {1}) else None


def _read(eqn: Equation, of_tables: bool, parts: Sequence[Any], at: Any) -> Any:
    """A gather from concatenated or stacked arrays, as a gather from each of them."""
    numbers, mode = eqn.param("dimension_numbers"), eqn.param("mode")
    shape, out = _jax.shape(eqn.inputs[0]), eqn.outputs[0]
    component = tuple(numbers.start_index_map).index(0)
    at, ids = at_least_int32(at), at_least_int32(at[..., component])
    if mode in CLIPPED:
        ids = jnp.clip(ids, 0, shape[0] - 1)
        at = clip_others(at, component, numbers.start_index_map, shape, eqn.param("slice_sizes"))
    fill_value = eqn.param("fill_value") if mode == Mode.FILL_OR_DROP else None
    fill_value = missing_value(_jax.dtype(out)) if fill_value is None else fill_value
    batch = [a for a in range(len(_jax.shape(out))) if a not in numbers.offset_dims]
    out_rows, start = jnp.full(_jax.shape(out), fill_value, _jax.dtype(out)), 0
    for part in parts:
        in_part = in_range(ids - start, jnp.shape(part)[0])
        where = at.at[..., component].set(row_ids(ids - start, jnp.shape(part)[0]).astype(at.dtype))
        if of_tables:
            where = _of_table(where, in_part, numbers.start_index_map, shape[1])
        changes = {"mode": Mode.FILL_OR_DROP, "fill_value": 0, "indices_are_sorted": False, "unique_indices": False}
        (read,) = _jax.bind(eqn, [part, where], **changes)
        out_rows = jnp.where(jax.lax.broadcast_in_dim(in_part, read.shape, batch), read, out_rows)
        start += jnp.shape(part)[0]
    return out_rows


def _of_table(at: Any, in_part: Any, axes: Sequence[int], num_rows: int) -> Any:
    """Indices, made to name no row where they name another table."""
    row = tuple(axes).index(1)
    return at.at[..., row].set(jnp.where(in_part, at[..., row], num_rows))


def _add(
    scatters: Sequence[_Scatter], start: int, shape_of_cut: tuple[int, ...], dtype: Any, of_table: bool = False
) -> Any:
    """The rows from `start` on of the sum of scatters into zeros, as many as the shape has."""
    out, num_rows = jnp.zeros(shape_of_cut, dtype), shape_of_cut[0]
    for eqn, index, updates in scatters:
        numbers, shape = eqn.param("dimension_numbers"), _jax.shape(eqn.inputs[0])
        component = tuple(numbers.scatter_dims_to_operand_dims).index(0)
        at, ids = at_least_int32(index), at_least_int32(index[..., component])
        if eqn.param("mode") == Mode.CLIP:
            ids = jnp.clip(ids, 0, shape[0] - 1)
            at = clip_others(at, component, numbers.scatter_dims_to_operand_dims, shape, window_sizes(eqn))
        where = at.at[..., component].set(row_ids(ids - start, num_rows).astype(at.dtype))
        if of_table and 1 in numbers.scatter_dims_to_operand_dims:
            in_part = in_range(ids - start, num_rows)
            where = _of_table(where, in_part, numbers.scatter_dims_to_operand_dims, shape[1])
        changes = {"mode": Mode.FILL_OR_DROP, "indices_are_sorted": False, "unique_indices": False}
        (out,) = _jax.bind(eqn, [out, where, updates], **changes)
    return out
