"""Rewrites programs that read stacked tables: F tables in one array (F, V, d), read by table and row.

Examples: `t[f, ids]`, `t.reshape(F * V, d)[f * V + ids]`, `jax.vmap(lambda t, i: t[i])(t, ids)`, `nn.vmap(nn.Embed)`.
All other code has rows along the first axis, where this array has tables. So the program, its gradient and its slots
are rewritten to an array (F * V, d). If the array is used in another way, the step stays as it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import MAX_ROWS
from jaxsparse._context import ROW_NUMBERS, ROWS_OF, rows_of
from jaxsparse._jax import Equation, Program
from jaxsparse.ops.rows import at_least_int32, in_range
from jaxsparse.trace.lines import evaluate, with_line_of
from jaxsparse.trace.rewriting import Rewriting
from jaxsparse.trace.row_elementwise import ELEMENTWISE
from jaxsparse.trace.row_reads import CLIPPED, clip_others, window_sizes

Mode = jax.lax.GatherScatterMode

Rule = tuple[Callable[..., Any], bool] | None

_REDUCTIONS = _jax.primitives("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or")
_DOT, _RESHAPE, _SQUEEZE, _UPDATE_SLICE = (
    primitive
    for name in "dot_general reshape squeeze dynamic_update_slice".split()
    for primitive in _jax.primitives(name)
)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The inputs of a program that are stacked tables or their slots, with their shapes."""

    shapes: dict[int, tuple[int, ...]]

    def flat(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves with one axis for tables and rows. Leaves may be abstract."""
        flat = [_reshaped(x, _merged(self.shapes[i])) if i in self.shapes else x for i, x in enumerate(leaves)]
        # without a barrier XLA reads rows in one shape, writes them in the other, and copies tables on a GPU
        return [
            jax.lax.optimization_barrier(x) if i in self.shapes and isinstance(x, jax.Array) else x
            for i, x in enumerate(flat)
        ]

    def unflattened(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves with two axes for tables and rows again."""
        return [_reshaped(x, self.shapes[i]) if i in self.shapes else x for i, x in enumerate(leaves)]


NO_STACKED = Stacked({})


def find_stacked(program: Program, places: dict[int, int], in_regions: bool = False) -> Stacked:
    """The leaves of a step's state that are read by table and row, and their possible slots. `in_regions`: whether
    reads inside of a scan, cond or remat count."""
    state_shapes = {}
    for i, j in places.items():
        v, out = program.inputs[i], program.outputs[j]
        if (_jax.shape(v), _jax.dtype(v)) == (_jax.shape(out), _jax.dtype(out)) and len(_jax.shape(v)) > 1:
            state_shapes[i] = _jax.shape(v)
    candidates = {s for s in state_shapes.values() if len(s) > 2 and min(s[:2]) > 1 and math.prod(s[:2]) < MAX_ROWS}
    leading_shapes = (
        {shape[:2] for shape in _read_shapes(program, candidates, _jax.held_programs if in_regions else _called)}
        if candidates
        else set()
    )
    return Stacked({i: shape for i, shape in state_shapes.items() if shape[:2] in leading_shapes})


def _called(eqn: Equation) -> list[Program]:
    return [_jax.called(eqn)] if eqn.primitive in _jax.CALLS else []


def _read_shapes(
    program: Program, shapes: Collection[tuple[int, ...]], inside: Callable[[Equation], Sequence[Program] | None]
) -> set[tuple[int, ...]]:
    """Which of these shapes have arrays that are read by table and row, or reshaped to one axis for both."""
    found = set()
    for eqn in program.equations:
        for held in inside(eqn) or ():
            found |= _read_shapes(held, shapes, inside)
        shape = _jax.shape(eqn.inputs[0]) if eqn.inputs else ()
        merges = eqn.primitive is _RESHAPE and shape in shapes and _jax.shape(eqn.outputs[0]) == _merged(shape)
        reads = (eqn.primitive is _jax.GATHER and _reads(eqn)) or (
            eqn.primitive is _jax.DYNAMIC_SLICE and eqn.param("slice_sizes")[:2] == (1, 1)
        )
        if merges or (reads and shape in shapes):
            found.add(shape)
    return found


def read_flat(program: Program, leaves: Sequence[Any], places: dict[int, int], stacked: Stacked) -> Program:
    """The program with one axis for tables and rows in its stacked inputs and their new values. `leaves` have two."""
    flat = {places[i] for i in stacked.shapes}

    def run(leaves: Sequence[Any]) -> list[Any]:
        outs = _Rewriting(stacked.shapes).run(program, leaves)
        return [_flat(x) if j in flat else _stacked(x) for j, x in enumerate(outs)]

    return _jax.trace(run, stacked.flat(leaves))


def _merged(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0] * shape[1], *shape[2:])


def _reshaped(x: Any, shape: Sequence[int]) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype, weak_type=x.weak_type)
    return jnp.reshape(x, shape)


class LostError(Exception):
    """Raised if a program keeps or draws something for each entry of the first axis, not for each row."""


def _raise_lost() -> Any:
    raise LostError("the optimizer keeps or draws something for each row of the first axis")


class _StackedArray:
    """An array in two forms: `stacked`, with axes for tables and for rows, and `flat`, with one axis for both. Each
    form is computed when it is needed."""

    def __init__(self, shape: Sequence[int], stacked: Callable[[], Any] | None, flat: Callable[[], Any] | None) -> None:
        self.shape, self._made = tuple(shape), {}  # type: ignore[var-annotated]
        self._is_flat, self.ndim = stacked is None, len(self.shape)
        self._make = {
            "stacked": stacked or (lambda: jnp.reshape(self.flat, self.shape)),
            "flat": flat or (lambda: jnp.reshape(self.stacked, _merged(self.shape))),
        }

    def _get(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make[name]()
        return self._made[name]

    def stacked_at(self, eqns: Sequence[Equation]) -> Any:
        """`stacked`, with the source line of the last of `eqns`: warnings name that line."""
        if self._is_flat and "stacked" not in self._made:
            self._made["stacked"] = with_line_of(eqns, lambda x: jnp.reshape(x, self.shape), self.flat)
        return self.stacked

    @property
    def stacked(self) -> Any:
        return self._get("stacked")

    @property
    def flat(self) -> Any:
        return self._get("flat")


def _stacked(v: Any) -> Any:
    return v.stacked if isinstance(v, _StackedArray) else v


def _flat(v: Any) -> Any:
    return v.flat if isinstance(v, _StackedArray) else jnp.reshape(v, _merged(jnp.shape(v)))


class _Rewriting(Rewriting):
    """A walk through a program. shapes: {stacked input: its shape}."""

    def __init__(self, shapes: dict[int, tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes
        self._leading_shapes = {shape[:2] for shape in shapes.values()}

    def run(self, program: Program, leaves: Sequence[Any]) -> list[Any]:
        shapes = self._shapes
        values = [_StackedArray(shapes[i], None, lambda x=x: x) if i in shapes else x for i, x in enumerate(leaves)]  # type: ignore[misc]
        return self.walk(program, values)

    def step(self, program: Program, eqn: Equation, values: list[Any]) -> list[Any]:
        primitive, name, within = eqn.primitive, _jax.called_name(eqn), self.within
        any_stacked = any(isinstance(v, _StackedArray) for v in values)
        if name == ROWS_OF and any_stacked:
            return self._rows_of(values[0])
        if name == ROW_NUMBERS and any_stacked:
            return [_StackedArray(values[0].shape[:1], _raise_lost, None)]
        if primitive in _jax.CALLS and name not in (ROWS_OF, ROW_NUMBERS):
            return self.walk(_jax.called(eqn), values)

        def evaluated() -> list[Any]:
            return evaluate(
                program, within, [v.stacked_at(within) if isinstance(v, _StackedArray) else v for v in values]
            )

        rule = self._rule(eqn, values) if any_stacked or primitive in (_jax.BROADCAST, _RESHAPE) else None
        if rule is None:
            return evaluated()
        make, gives_stacked = rule

        def made() -> Any:
            return with_line_of(within, make, *[v.flat if isinstance(v, _StackedArray) else v for v in values])

        if not gives_stacked:
            return [made()]
        return [_StackedArray(_jax.shape(eqn.outputs[0]), None if any_stacked else (lambda: evaluated()[0]), made)]

    def _rows_of(self, v: _StackedArray) -> list[Any]:
        """The rule for `_context.rows_of`: the number of rows, and a mask that raises LostError when it is used."""
        return [rows_of(v.flat)[0], _StackedArray(v.shape[:1], _raise_lost, None)]

    def _rule(self, eqn: Equation, values: list[Any]) -> Rule:
        """(the equation on flat arrays, whether its output is stacked too); None if it is not done on flat arrays."""
        primitive, shape = eqn.primitive, _jax.shape(eqn.outputs[0])
        has_tables, is_stacked = shape[:2] in self._leading_shapes, isinstance(values[0], _StackedArray)
        if primitive in ELEMENTWISE and has_tables:
            return _elementwise(eqn, values, shape)
        if primitive is _jax.BROADCAST and has_tables:
            return _broadcast(eqn, values[0], shape)
        if primitive in _REDUCTIONS and is_stacked:
            axes = sorted(eqn.param("axes"))
            if axes[:2] == [0, 1]:
                return lambda x: _jax.bind(eqn, [x], axes=(0, *(a - 1 for a in axes[2:])))[0], False
            if axes and axes[0] > 1:
                return lambda x: _jax.bind(eqn, [x], axes=tuple(a - 1 for a in axes))[0], True
        if primitive is _RESHAPE:
            if is_stacked and values[0].ndim > 1 and shape == _merged(values[0].shape):
                return lambda x: x, False
            before = values[0].shape if is_stacked else jnp.shape(values[0])
            if has_tables and (before[:2] == shape[:2] if is_stacked else before == _merged(shape)):
                return lambda x: jnp.reshape(x, _merged(shape)), True
        if primitive is _SQUEEZE and has_tables and is_stacked and min(eqn.param("dimensions"), default=0) > 1:
            return lambda x: jnp.reshape(x, _merged(shape)), True
        if primitive is _jax.GATHER and is_stacked and not isinstance(values[1], _StackedArray) and _reads(eqn):
            return lambda x, at: _gather(eqn, x, at), False
        if (
            primitive is _jax.SCATTER_ADD
            and is_stacked
            and not any(isinstance(v, _StackedArray) for v in values[1:])
            and _adds(eqn)
        ):
            return lambda x, at, new: _scatter(eqn, x, at, new), True
        if primitive is _DOT and all(isinstance(v, _StackedArray) for v in values):
            every, none = tuple(range(len(values[0].shape))), ((), ())
            if eqn.param("dimension_numbers") == ((every, every), none):
                numbers = ((every[:-1], every[:-1]), none)
                return lambda x, y: _jax.bind(eqn, [x, y], dimension_numbers=numbers)[0], False
        if primitive is _jax.DYNAMIC_SLICE and is_stacked and eqn.param("slice_sizes")[:2] == (1, 1):
            return lambda x, *starts: _slice(eqn, x, starts), False
        if primitive is _UPDATE_SLICE and is_stacked and _jax.shape(eqn.inputs[1])[:2] == (1, 1):
            return lambda x, new, *starts: _set_slice(eqn, x, new, starts), True
        return None


def _elementwise(eqn: Equation, values: list[Any], shape: tuple[int, ...]) -> Rule:
    shapes = [v.shape if isinstance(v, _StackedArray) else jnp.shape(v) for v in values]
    if any(s and s[:2] not in (shape[:2], (1, 1)) for s in shapes):
        return None

    def make(*xs: Any) -> Any:
        flat = [x if x.ndim < len(s) or not s else jnp.reshape(x, _merged(s)) for x, s in zip(xs, shapes, strict=True)]
        return _jax.bind(eqn, flat)[0]

    return make, True


def _broadcast(eqn: Equation, v: Any, shape: tuple[int, ...]) -> Rule:
    at, before = tuple(eqn.param("broadcast_dimensions")), v.shape if isinstance(v, _StackedArray) else jnp.shape(v)
    if isinstance(v, _StackedArray):
        if at[:2] != (0, 1) or before[:2] != shape[:2]:
            return None
        new = (0, *(a - 1 for a in at[2:]))
        return lambda x: _jax.bind(eqn, [x], shape=_merged(shape), broadcast_dimensions=new)[0], True
    if any(a < 2 and n != 1 for a, n in zip(at, before, strict=True)):
        return None
    column_dims = [k for k, a in enumerate(at) if a > 1]

    def make(x: Any) -> Any:
        x = x if len(column_dims) == len(at) else jnp.reshape(x, [before[k] for k in column_dims])
        return _jax.bind(eqn, [x], shape=_merged(shape), broadcast_dimensions=tuple(at[k] - 1 for k in column_dims))[0]

    return make, True


def _reads(eqn: Equation) -> bool:
    n = eqn.param("dimension_numbers")
    named = {0, 1} & {*n.start_index_map}
    return bool(named) and {0, 1} <= named | {*n.operand_batching_dims} and eqn.param("slice_sizes")[:2] == (1, 1)


def _adds(eqn: Equation) -> bool:
    n = eqn.param("dimension_numbers")
    named = {0, 1} & {*n.scatter_dims_to_operand_dims}
    return bool(named) and {0, 1} <= named | {*n.operand_batching_dims} and window_sizes(eqn)[:2] == [1, 1]


def _window(ndim: int, collapsed: Sequence[int], batching: Sequence[int], dims: Sequence[int]) -> tuple[Any, Any, Any]:
    """The window of a gather or scatter on the flat array.

    Returns:
      The collapsed axes; the window's dimensions in the array that is read or added; and the dimensions there that the
      axes of tables and rows had.
    """
    at = dict(zip([a for a in range(ndim) if a not in collapsed and a not in batching], dims, strict=True))
    dropped = sorted(at[a] for a in (0, 1) if a in at)
    window_dims = tuple(k - sum(g < k for g in dropped) for a, k in at.items() if a > 1)
    return (0, *(a - 1 for a in collapsed if a > 1)), window_dims, dropped


def _slice(eqn: Equation, x: jax.Array, starts: Sequence[Any]) -> jax.Array:
    at, sizes = _start(_jax.shape(eqn.inputs[0]), starts), eqn.param("slice_sizes")
    return jnp.reshape(jax.lax.dynamic_slice(x, at, (1, *sizes[2:])), sizes)


def _set_slice(eqn: Equation, x: jax.Array, new: jax.Array, starts: Sequence[Any]) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, new[0], _start(_jax.shape(eqn.inputs[0]), starts))


def _start(shape: Sequence[int], starts: Sequence[Any]) -> list[Any]:
    table, row = (jnp.clip(jnp.asarray(k), 0, n - 1).astype(jnp.int32) for k, n in zip(starts, shape[:2], strict=False))
    return [table * shape[1] + row, *(jnp.asarray(k).astype(jnp.int32) for k in starts[2:])]


def _merge(
    at: Any,
    axes: Sequence[int],
    batching: Sequence[int],
    batching_at: Sequence[int],
    shape: Sequence[int],
    clipped: bool,
) -> tuple[jax.Array, tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Indices of a table and a row as indices of the flat array.

    Returns:
      The indices, out of range where they name no row; the axes that they index; and the batching dimensions.
    """
    at = at_least_int32(at)
    part = []
    for axis in (0, 1):
        if axis in axes:
            x = at[..., list(axes).index(axis)]
        else:
            x = jax.lax.broadcasted_iota(at.dtype, at.shape[:-1], batching_at[list(batching).index(axis)])
        part.append(jnp.clip(x, 0, shape[axis] - 1) if clipped else x)
    inside = in_range(part[0], shape[0]) & in_range(part[1], shape[1])
    merged = jnp.where(inside, part[0] * shape[1] + part[1], shape[0] * shape[1])
    others = [k for k, axis in enumerate(axes) if axis > 1]
    index = jnp.concatenate([merged[..., None], at[..., jnp.array(others, int)]], -1) if others else merged[..., None]
    batch_axes = [k for k, axis in enumerate(batching) if axis > 1]
    dims = {
        "batching": tuple(batching[k] - 1 for k in batch_axes),
        "batching_at": tuple(batching_at[k] for k in batch_axes),
    }
    return index, (0, *(axes[k] - 1 for k in others)), dims


def _gather(eqn: Equation, x: jax.Array, at: jax.Array) -> jax.Array:
    n, mode, shape = eqn.param("dimension_numbers"), eqn.param("mode"), _jax.shape(eqn.inputs[0])
    index, axes, dims = _merge(
        at, n.start_index_map, n.operand_batching_dims, n.start_indices_batching_dims, shape, mode in CLIPPED
    )
    sizes = (1, *eqn.param("slice_sizes")[2:])
    if mode in CLIPPED:
        index = clip_others(index, 0, axes, x.shape, sizes)
    collapsed, window_dims, _ = _window(len(shape), n.collapsed_slice_dims, n.operand_batching_dims, n.offset_dims)
    numbers = n._replace(
        offset_dims=window_dims,
        start_index_map=axes,
        collapsed_slice_dims=collapsed,
        operand_batching_dims=dims["batching"],
        start_indices_batching_dims=dims["batching_at"],
    )
    changes = {"dimension_numbers": numbers, "slice_sizes": sizes, "unique_indices": False, "indices_are_sorted": False}
    return jnp.reshape(_jax.bind(eqn, [x, index], **changes)[0], _jax.shape(eqn.outputs[0]))


def _scatter(eqn: Equation, x: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
    n, shape, clipped = eqn.param("dimension_numbers"), _jax.shape(eqn.inputs[0]), eqn.param("mode") == Mode.CLIP
    axes = n.scatter_dims_to_operand_dims
    index, new_axes, dims = _merge(at, axes, n.operand_batching_dims, n.scatter_indices_batching_dims, shape, clipped)
    if clipped:
        index = clip_others(index, 0, new_axes, x.shape, [1, *window_sizes(eqn)[2:]])
    collapsed, window_dims, dropped = _window(
        len(shape), n.inserted_window_dims, n.operand_batching_dims, n.update_window_dims
    )
    numbers = n._replace(
        update_window_dims=window_dims,
        scatter_dims_to_operand_dims=new_axes,
        inserted_window_dims=collapsed,
        operand_batching_dims=dims["batching"],
        scatter_indices_batching_dims=dims["batching_at"],
    )
    new = jnp.squeeze(new, tuple(dropped))
    changes = {"dimension_numbers": numbers, "unique_indices": False, "indices_are_sorted": False}
    return _jax.bind(eqn, [x, index, new], **changes)[0]
