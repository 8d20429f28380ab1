"""Tables that a program puts below each other before it reads them: `jnp.concatenate([t0, t1])[ids]`, and tables of one
shape that it stacks: `jnp.stack([t0, t1])[f, ids]`, each of them being one row of the first axis.

One array with all their rows would be made at each step. So the program is rewritten: each table is read by the ids
that are its own, and what all of them are read for is chosen among these reads. The same is done for the gradient: what
is added into zeros with all rows, and cut into parts, is added into the zeros of each part.

Where such an array is used in another way, it is made, as it was. Inside of a scan or cond, and where it is handed to
one of these or to a remat, it is made too. Its tables are dense then.
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
from jaxsparse.trace.lines import evaluate, in_place_of
from jaxsparse.trace.rewriting import Rewriting
from jaxsparse.trace.row_reads import CLIPPED, clip_others, nothing, window_sizes

Mode = jax.lax.GatherScatterMode

_ADD = _jax.primitives("add add_jaxvals")


def read_apart(program: Program, leaves: Sequence[Any], tables: Collection[int]) -> Program:
    """The program in which tables that are put below each other are read one by one; itself if there are none.

    Args:
      leaves: arrays, or their shapes, for the program's inputs.
      tables: the numbers of those that may be tables.
    """
    shapes = {_jax.shape(program.inputs[i]) for i in tables} - {()}
    if not _joins(program, shapes):
        return program
    return _jax.trace(lambda leaves: _Rewriting([leaves[i] for i in tables], shapes).run(program, leaves), list(leaves))


def _joins(program: Program, shapes: Collection[tuple[int, ...]]) -> bool:
    """Whether an array of one of these shapes is put below others, as far as calls and remats are looked into."""
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


class _Unmade:
    """An array that is made when something needs it as a whole."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._array = make, None

    @property
    def array(self) -> Any:
        if self._array is None:
            self._array = self._make()
        return self._array


class _Joined(_Unmade):
    """Arrays below each other. tables: each of them is one table, a row being named by two axes."""

    def __init__(self, make: Callable[[], Any], parts: Sequence[Any], tables: bool = False) -> None:
        super().__init__(make)
        self.parts, self.tables = parts, tables


class _Zeros(_Unmade):
    """Zeros of which `_Added` may be made."""


class _Scatter(NamedTuple):
    eqn: Equation
    index: Any
    updates: Any


class _Added(_Unmade):
    """What is added into zeros, or its rows from `start` on."""

    def __init__(self, make: Callable[[], Any], scatters: Sequence[_Scatter], start: int = 0) -> None:
        super().__init__(make)
        self.scatters, self.start = scatters, start

    def cut(self, start: int, out: Any) -> _Added:
        """Those from another row on, for the variable that they are."""
        start, shape, dtype = start + self.start, _jax.shape(out), _jax.dtype(out)
        return _Added(lambda: _add(self.scatters, start, shape, dtype), self.scatters, start)

    def table(self, number: int, out: Any) -> Any:
        """That of a number, for the variable that it is."""
        shape, dtype = (1, *_jax.shape(out)), _jax.dtype(out)
        return jnp.squeeze(_add(self.scatters, self.start + number, shape, dtype, of_table=True), 0)


class _Rewriting(Rewriting):
    """One way through a program. tables: its inputs that may be; shapes: of these."""

    def __init__(self, tables: Sequence[Any], shapes: Collection[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes
        self._tables = list(tables)  # and what they are cast to
        self._heights: set[int] = set()  # of tables that are below each other

    def run(self, program: Program, values: Sequence[Any]) -> list[Any]:
        return [_array(v) for v in self.walk(program, values)]

    def step(self, program: Program, eqn: Equation, values: list[Any]) -> list[Any]:
        primitive = eqn.primitive
        first: Any = values[0] if values else None
        if primitive in _jax.CALLS and _jax.called_name(eqn) not in (ROWS_OF, ROW_NUMBERS):
            return self.walk(_jax.called(eqn), values)

        if _jax.is_remat(eqn) and _joins((remat := _jax.remat_of(eqn)).body, self._shapes):
            arrays = [_array(v) for v in values]
            return list(remat.again(lambda: self.run(remat.body, arrays))())
        within = self.within

        def as_it_is() -> list[Any]:
            return evaluate(program, within, [_array(v) for v in values])

        def later() -> Any:
            return as_it_is()[0]

        if _is_join(eqn) and any(isinstance(v, _Joined) or self._is_table(v) for v in values):
            self._heights.add(_jax.shape(eqn.outputs[0])[0])
            return [_Joined(later, [part for v in values for part in _parts(v)])]
        if _is_stack(eqn) and any(map(self._is_table, values)):
            self._heights.add(len(values))
            parts = in_place_of(within, lambda xs: [jnp.expand_dims(x, 0) for x in xs], list(map(_array, values)))
            return [_Joined(later, parts, tables=True)]
        if primitive is _jax.GATHER and isinstance(first, _Joined) and _reads_rows(eqn, first.tables):
            return [
                in_place_of(within, functools.partial(_read, eqn, first.tables), list(first.parts), _array(values[1]))
            ]
        if primitive is _jax.BROADCAST and _jax.shape(eqn.outputs[0])[:1] and _is_zero(first):
            return [_Zeros(later)] if _jax.shape(eqn.outputs[0])[0] in self._heights else as_it_is()
        if primitive is _jax.SCATTER_ADD and isinstance(first, _Zeros) and _adds_to_rows(eqn):
            return [_Added(later, [_Scatter(eqn, _array(values[1]), _array(values[2]))])]
        if primitive in _ADD and all(isinstance(v, _Added) and v.start == first.start for v in values):
            return [_Added(later, [scatter for v in values for scatter in v.scatters], first.start)]
        if isinstance(first, _Added) and (cuts := _cuts(eqn)) is not None:
            return [first.cut(start, v) for start, v in zip(cuts, eqn.outputs, strict=True)]
        if isinstance(first, _Added) and primitive.name == "unstack" and eqn.param("axis") == 0:
            return in_place_of(within, lambda: [first.table(n, v) for n, v in enumerate(eqn.outputs)])
        outs = as_it_is()
        if primitive is _jax.CONVERT and self._is_table(first):
            self._tables += outs
        return outs

    def _is_table(self, v: Any) -> bool:
        return any(v is table for table in self._tables)


def _array(v: Any) -> Any:
    return v.array if isinstance(v, _Unmade) else v


def _parts(v: Any) -> Sequence[Any]:
    return v.parts if isinstance(v, _Joined) else [_array(v)]


def _is_zero(v: Any) -> bool:
    return not _jax.is_traced(v) and not isinstance(v, _Unmade) and jnp.ndim(v) == 0 and not v


def _reads_rows(eqn: Equation, of_tables: bool) -> bool:
    named, sizes = eqn.param("dimension_numbers").start_index_map, eqn.param("slice_sizes")
    return all(axis in named and sizes[axis] == 1 for axis in ((0, 1) if of_tables else (0,)))


def _adds_to_rows(eqn: Equation) -> bool:
    return 0 in eqn.param("dimension_numbers").scatter_dims_to_operand_dims and window_sizes(eqn)[0] == 1


def _cuts(eqn: Equation) -> list[int] | None:
    """From which row on each output has rows of the input, if that is what this equation does."""
    if eqn.primitive.name == "split" and eqn.param("axis") == 0:  # by name: JAX does not list it
        return [sum(eqn.param("sizes")[:i]) for i in range(len(eqn.outputs))]
    if eqn.primitive is not _jax.SLICE:
        return None
    starts, ends, strides = eqn.param("start_indices"), eqn.param("limit_indices"), eqn.param("strides")
    whole = not any(starts[1:]) and tuple(ends[1:]) == _jax.shape(eqn.inputs[0])[1:]
    return [starts[0]] if whole and (strides is None or set(strides) == {1}) else None


def _read(eqn: Equation, of_tables: bool, parts: Sequence[Any], at: Any) -> Any:
    """A gather from arrays below each other, as one from each of them."""
    numbers, mode = eqn.param("dimension_numbers"), eqn.param("mode")
    shape, out = _jax.shape(eqn.inputs[0]), eqn.outputs[0]
    component = tuple(numbers.start_index_map).index(0)
    at, ids = at_least_int32(at), at_least_int32(at[..., component])
    if mode in CLIPPED:
        ids = jnp.clip(ids, 0, shape[0] - 1)
        at = clip_others(at, component, numbers.start_index_map, shape, eqn.param("slice_sizes"))
    fill = eqn.param("fill_value") if mode == Mode.FILL_OR_DROP else None
    fill = nothing(_jax.dtype(out)) if fill is None else fill
    batch = [a for a in range(len(_jax.shape(out))) if a not in numbers.offset_dims]
    total, start = jnp.full(_jax.shape(out), fill, _jax.dtype(out)), 0
    for part in parts:
        own = in_range(ids - start, jnp.shape(part)[0])
        where = at.at[..., component].set(row_ids(ids - start, jnp.shape(part)[0]).astype(at.dtype))
        if of_tables:
            where = _of_table(where, own, numbers.start_index_map, shape[1])
        changes = {"mode": Mode.FILL_OR_DROP, "fill_value": 0, "indices_are_sorted": False, "unique_indices": False}
        (read,) = _jax.bind(eqn, [part, where], **changes)
        total = jnp.where(jax.lax.broadcast_in_dim(own, read.shape, batch), read, total)
        start += jnp.shape(part)[0]
    return total


def _of_table(at: Any, own: Any, axes: Sequence[int], num_rows: int) -> Any:
    """Indices that name no row where the table is another one."""
    row = tuple(axes).index(1)
    return at.at[..., row].set(jnp.where(own, at[..., row], num_rows))


def _add(
    scatters: Sequence[_Scatter], start: int, shape_of_cut: tuple[int, ...], dtype: Any, of_table: bool = False
) -> Any:
    """The rows from `start` on of what is added into zeros: as many as the shape has."""
    out, many = jnp.zeros(shape_of_cut, dtype), shape_of_cut[0]
    for eqn, index, updates in scatters:
        numbers, shape = eqn.param("dimension_numbers"), _jax.shape(eqn.inputs[0])
        component = tuple(numbers.scatter_dims_to_operand_dims).index(0)
        at, ids = at_least_int32(index), at_least_int32(index[..., component])
        if eqn.param("mode") == Mode.CLIP:
            ids = jnp.clip(ids, 0, shape[0] - 1)
            at = clip_others(at, component, numbers.scatter_dims_to_operand_dims, shape, window_sizes(eqn))
        where = at.at[..., component].set(row_ids(ids - start, many).astype(at.dtype))
        if of_table and 1 in numbers.scatter_dims_to_operand_dims:
            own = in_range(ids - start, many)
            where = _of_table(where, own, numbers.scatter_dims_to_operand_dims, shape[1])
        changes = {"mode": Mode.FILL_OR_DROP, "indices_are_sorted": False, "unique_indices": False}
        (out,) = _jax.bind(eqn, [out, where, updates], **changes)
    return out
