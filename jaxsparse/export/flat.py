"""A traced program without calls in it: one list of operations, with numbers for its values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program
from jaxsparse.export.sizes import Points, Size, UnsolvedError
from jaxsparse.trace.lines import source_line


class Number(NamedTuple):
    """A number that stands in a program."""

    value: Any  # a NumPy scalar, or a Size
    dtype: Any

    @property
    def key(self) -> Any:
        bits = self.value if isinstance(self.value, Size) else np.asarray(self.value).tobytes()
        return "number", str(self.dtype), bits


Operand = int | Number


@dataclasses.dataclass(frozen=True)
class Operation:
    """One equation of the program.

    Attributes:
      name: of its primitive.
      inputs, outputs: numbers of values; Numbers among the inputs.
      eqns: it, and before it the calls that it is inside of.
      program: the one that it is in. None where there is no such equation in any.
    """

    name: str
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    eqns: Sequence[Equation]
    program: Program | None

    def param(self, name: str) -> Any:
        return self.params[name] if name in self.params else self.eqns[-1].param(name)

    @property
    def line(self) -> str:
        return source_line(self.eqns)


@dataclasses.dataclass
class Flat:
    """A program whose values have numbers: first its inputs, then what it makes.

    Attributes:
      shapes, dtypes: of values, by number.
      constants: values that are known: of parameters and of arrays that the model holds, by number.
    """

    num_inputs: int
    outputs: list[Operand]
    operations: list[Operation]
    shapes: list[tuple[Any, ...]]
    dtypes: list[Any]
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)

    def used_constants(self) -> list[int]:
        used = {x for op in self.operations for x in op.inputs if isinstance(x, int)} | {*self.outputs}
        return [number for number in self.constants if number in used]

    def is_read_by_rows(self, number: int) -> bool:
        """Whether a value is used for nothing but rows of it, as a table of embeddings is."""
        users = [op for op in self.operations if number in op.inputs]
        return number not in self.outputs and all(self._reads_rows(op, number) for op in users)

    def _reads_rows(self, op: Operation, number: int) -> bool:
        if op.name != "gather" or op.inputs[0] != number or op.inputs[1] == number:
            return False
        d, ids, shape = op.param("dimension_numbers"), op.inputs[1], self.shapes[number]
        rank = len(self.shapes[ids]) - 1 if isinstance(ids, int) else 0
        return (
            tuple(d.collapsed_slice_dims) == tuple(d.start_index_map) == (0,)
            and not d.operand_batching_dims
            and tuple(op.param("slice_sizes")[1:]) == tuple(shape[1:])
            and tuple(d.offset_dims) == tuple(range(rank, rank + len(shape) - 1))
        )


def flatten(program: Program) -> Flat:
    """A program with all that it calls put in its place."""
    flat = Flat(len(program.inputs), [], [], [], [])
    operands = [_new(flat, v) for v in program.inputs]
    flat.outputs = _inline(flat, program, operands, ())
    return flat


def _new(flat: Flat, v: Any) -> int:
    flat.shapes.append(_jax.shape(v))
    flat.dtypes.append(_jax.dtype(v))
    return len(flat.shapes) - 1


def _inline(flat: Flat, program: Program, operands: Sequence[Operand], around: Sequence[Equation]) -> list[Operand]:
    """What a program's outputs are, given its inputs."""
    known: dict[Any, Operand] = dict(zip(program.inputs, operands, strict=True))
    for v, x in program.constants.items():
        if _jax.shape(v) == () and not jax.dtypes.issubdtype(_jax.dtype(v), jax.dtypes.extended):
            known[v] = Number(np.asarray(x)[()], _jax.dtype(v))
        else:
            known[v] = _new(flat, v)
            flat.constants[len(flat.shapes) - 1] = x

    def operand(v: Any) -> Operand:
        return (
            Number(np.asarray(_jax.literal_value(v), _jax.dtype(v))[()], _jax.dtype(v))
            if _jax.is_literal(v)
            else known[v]
        )

    for eqn in program.equations:
        inputs, eqns = [operand(v) for v in eqn.inputs], (*around, eqn)
        inner = _jax.inlined(eqn)
        if inner is not None:
            outs = _inline(flat, inner, inputs, eqns)
        elif eqn.primitive is _jax.COND:
            ways = [_inline(flat, branch, inputs[1:], eqns) for branch in _jax.branches(eqn)]
            outs = []
            for v, *each in zip(eqn.outputs, *ways, strict=True):  # all are computed, and one is taken
                number = _new(flat, v)
                flat.operations.append(Operation("select_n", {}, (inputs[0], *each), (number,), eqns, None))
                outs.append(number)
        else:
            made = tuple(_new(flat, v) for v in eqn.outputs)
            flat.operations.append(Operation(_jax.name_of(eqn), eqn.params, tuple(inputs), made, eqns, program))
            outs = list(made)
        known |= dict(zip(eqn.outputs, outs, strict=True))
    return [operand(v) for v in program.outputs]


class DiffersError(Exception):
    """Programs that are not the same one at several sizes. Args: what differs, and where."""


def merged(flats: Sequence[Flat], points: Points) -> Flat:
    """One program of those traced at these points, whose sizes are formulas.

    Raises:
      DiffersError: if there is none.
    """
    first = flats[0]
    for ops in zip(*(flat.operations for flat in flats), strict=False):
        if len({(op.name, len(op.inputs), op.outputs) for op in ops}) > 1:
            raise DiffersError("the equations depend on the size of the input", ops[0].line)
    if len({(len(flat.operations), tuple(flat.constants)) for flat in flats}) > 1:
        raise DiffersError("the number of equations depends on the size of the input", "its end")
    for number, x in first.constants.items():
        arrays = [flat.constants[number] for flat in flats]
        if not all(x is y or (np.shape(x) == np.shape(y) and np.array_equal(x, y, equal_nan=True)) for y in arrays):
            raise DiffersError("an array that the model holds depends on the size of the input", "one of its constants")

    def solved(values: Sequence[Any], where: Callable[[], str]) -> Any:
        try:
            return points.solve_all(values)
        except UnsolvedError:
            raise DiffersError(
                f"numbers such as {values[0]} are not linear in the size of the input", where()
            ) from None

    def operand(each: Sequence[Operand], where: Callable[[], str]) -> Operand:
        x = each[0]
        if isinstance(x, Number):
            if any(not isinstance(y, Number) for y in each):
                raise DiffersError("the equations depend on the size of the input", where())
            if len({y.key for y in each if isinstance(y, Number)}) == 1:
                return x
            values = [float(y.value) for y in each if isinstance(y, Number)]
            if not all(value.is_integer() for value in values):
                raise DiffersError(f"numbers such as {values[0]} depend on the size of the input", where())
            return Number(solved([int(value) for value in values], where), x.dtype)
        if len({y if isinstance(y, int) else -1 for y in each}) > 1:
            raise DiffersError("the equations depend on the size of the input", where())
        return x

    operations = []
    for ops in zip(*(flat.operations for flat in flats), strict=True):
        op = ops[0]
        where = lambda op=op: op.line  # noqa: E731
        params = {name: solved([each.params[name] for each in ops], where) for name in op.params}
        inputs = tuple(operand(each, where) for each in zip(*(each.inputs for each in ops), strict=True))
        operations.append(dataclasses.replace(op, params=params, inputs=inputs))
    end = lambda: "its outputs"  # noqa: E731
    shapes = [solved(each, end) for each in zip(*(flat.shapes for flat in flats), strict=True)]
    outputs = [operand(each, end) for each in zip(*(flat.outputs for flat in flats), strict=True)]
    return dataclasses.replace(first, operations=operations, shapes=shapes, outputs=outputs)


def without_repeats(flat: Flat) -> Flat:
    """The program without operations that nothing needs, or that do again what another does."""
    same: dict[int, Operand] = {}
    done: dict[Any, tuple[int, ...]] = {}
    kept = []
    for op in (dataclasses.replace(op, inputs=_renamed(op.inputs, same)) for op in flat.operations):
        outputs = done.setdefault(_key(op), op.outputs)
        if outputs is op.outputs:
            kept.append(op)
        else:
            same |= dict(zip(op.outputs, outputs, strict=True))
    outs = list(_renamed(flat.outputs, same))
    needed, last = {x for x in outs if isinstance(x, int)}, []
    for op in reversed(kept):
        if needed & set(op.outputs):
            last.append(op)
            needed |= {x for x in op.inputs if isinstance(x, int)}
    return dataclasses.replace(flat, operations=last[::-1], outputs=outs)


def _renamed(operands: Sequence[Operand], known: dict[int, Operand]) -> tuple[Operand, ...]:
    return tuple(known.get(x, x) if isinstance(x, int) else x for x in operands)


def _key(op: Operation) -> Any:
    inputs = tuple(x.key if isinstance(x, Number) else x for x in op.inputs)
    return (
        op.name,
        inputs,
        tuple((name, repr(value)) for name, value in sorted(op.params.items()) if "jaxpr" not in name),
    )


VIEWS = {"reshape", "broadcast_in_dim", "squeeze", "transpose", "stop_gradient", "copy"}
SMALL = 1024  # numbers that are made from smaller ones before, and not when the model is used


def folded(flat: Flat) -> Flat:
    """The program in which all is computed that depends on parameters alone, but for conversions of tables: rows are
    taken first."""
    constants, kept = dict(flat.constants), []
    numbers: dict[int, Operand] = {}  # what became a number
    views: dict[int, Operation] = {}  # of what is known; they cost nothing, and say more than an array of another name

    def value(x: Operand) -> Any:
        if isinstance(x, Number):
            return x.value
        if x not in constants and x in views:
            constants_of_views[x] = compute(views[x])[0] if x not in constants_of_views else constants_of_views[x]
            return constants_of_views[x]
        return constants[x]

    constants_of_views: dict[int, Any] = {}

    def compute(op: Operation) -> list[Any]:
        assert op.program is not None
        return _jax.evaluate(op.program, op.eqns[-1], [jax.numpy.asarray(value(x)) for x in op.inputs])

    for op in (dataclasses.replace(op, inputs=_renamed(op.inputs, numbers)) for op in flat.operations):
        arrays = [x for x in op.inputs if isinstance(x, int)]
        is_known = op.program is not None and all(x in constants or x in views for x in arrays)
        is_known = is_known and not any(isinstance(x, Number) and isinstance(x.value, Size) for x in op.inputs)
        shapes = [flat.shapes[x] for x in op.outputs]
        is_known = is_known and "Size" not in _types((op.params, tuple(shapes)))
        size_in = sum(math.prod(flat.shapes[x]) for x in arrays) if is_known else 0
        size_out = sum(math.prod(shape) for shape in shapes) if is_known else 0
        if not is_known or size_out > max(size_in, SMALL) or (not arrays and size_out > 1):
            kept.append(op)
        elif op.name in VIEWS and arrays and size_out == size_in and shapes != [()]:
            kept.append(op)
            views[op.outputs[0]] = op
        elif op.name == "convert_element_type" and size_out > SMALL and flat.is_read_by_rows(op.outputs[0]):
            kept.append(op)
        else:
            for number, x in zip(op.outputs, compute(op), strict=True):
                if np.shape(x) == ():
                    numbers[number] = Number(np.asarray(x)[()], flat.dtypes[number])
                else:
                    constants[number] = x
    outs = list(_renamed(flat.outputs, numbers))
    return without_repeats(dataclasses.replace(flat, operations=kept, outputs=outs, constants=constants))


def _types(x: Any) -> set[str]:
    if isinstance(x, dict):
        return set().union(*map(_types, x.values()))
    if isinstance(x, tuple):
        return set().union(*map(_types, x))
    return {type(x).__name__}
