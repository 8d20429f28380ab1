"""A traced program with its calls inlined: a list of operations on numbered values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program
from jaxsparse.export.sizes import Points, Size, UnsolvedError
from jaxsparse.trace.lines import source_line


class Number(NamedTuple):
    """A scalar whose value is known when the program is written."""

    value: Any  # a NumPy scalar, or a Size
    dtype: Any

    @property
    def key(self) -> Any:
        bits = self.value if isinstance(self.value, Size) else np.asarray(self.value).tobytes()
        return "number", str(self.dtype), bits


Operand = int | Number


@dataclasses.dataclass(frozen=True)
class Loop:
    """The body of a scan. Values that it reads from outside are numbered as they are outside.

    Attributes:
      carry, slices: numbers of its inputs: the carried values, and one slice of each scanned array.
      outputs: the next carry, then one slice of each stacked result.
    """

    carry: tuple[int, ...]
    slices: tuple[int, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One equation of the program.

    Attributes:
      name: the name of its primitive.
      inputs: numbers of values, or Numbers.
      outputs: numbers of values.
      eqns: the calls around the equation, outermost first, then the equation itself.
      program: the program of the equation. None for an operation that no program contains.
      loop: the body of a scan. None for all others.
    """

    name: str
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    eqns: Sequence[Equation]
    program: Program | None
    loop: Loop | None = None

    @property
    def reads(self) -> set[int]:
        """The numbers of the values that it needs; for a loop, those that its body reads as well."""
        found = {x for x in self.inputs if isinstance(x, int)}
        if self.loop is not None:
            made = {*self.loop.carry, *self.loop.slices}
            for op in self.loop.operations:
                found |= op.reads - made
                made |= {*op.outputs}
            found |= {x for x in self.loop.outputs if isinstance(x, int)} - made
        return found

    def param(self, name: str) -> Any:
        return self.params[name] if name in self.params else self.eqns[-1].param(name)

    @property
    def line(self) -> str:
        return source_line(self.eqns)


@dataclasses.dataclass
class Flat:
    """A program whose values are numbered: its inputs first, then the results of its operations.

    Attributes:
      shapes, dtypes: of each value, by number.
      constants: parameters and arrays that the model closes over, by number.
    """

    num_inputs: int
    outputs: list[Operand]
    operations: list[Operation]
    shapes: list[tuple[Any, ...]]
    dtypes: list[Any]
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)

    def used_constants(self) -> list[int]:
        used: set[Any] = set().union(*(op.reads for op in self.operations)) | {*self.outputs}
        return [number for number in self.constants if number in used]

    def is_read_by_rows(self, number: int) -> bool:
        """Whether a value is only used by gathers of its rows, as a table of embeddings is."""
        users = [op for op in self.operations if number in op.reads]
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
    """A program with its calls inlined."""
    flat = Flat(len(program.inputs), [], [], [], [])
    operands = [_new(flat, v) for v in program.inputs]
    flat.outputs = _inline(flat, program, operands, ())
    return flat


def _new(flat: Flat, v: Any) -> int:
    flat.shapes.append(_jax.shape(v))
    flat.dtypes.append(_jax.dtype(v))
    return len(flat.shapes) - 1


def _inline(flat: Flat, program: Program, operands: Sequence[Operand], around: Sequence[Equation]) -> list[Operand]:
    """Appends a program's operations to `flat`, and returns its outputs.

    Args:
      operands: the program's inputs.
      around: the calls around it, outermost first.
    """
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
        inner = _jax.inlined(eqn) or _jax.expanded(eqn)
        if inner is not None:
            outs = _inline(flat, inner, inputs, eqns)
        elif eqn.primitive is _jax.COND:
            ways = [_inline(flat, branch, inputs[1:], eqns) for branch in _jax.branches(eqn)]
            outs = []
            for v, *each in zip(eqn.outputs, *ways, strict=True):  # all branches are computed; one result is selected
                number = _new(flat, v)
                flat.operations.append(Operation("select_n", {}, (inputs[0], *each), (number,), eqns, None))
                outs.append(number)
        else:
            loop = _loop(flat, eqn, inputs, eqns) if eqn.primitive is _jax.SCAN else None
            made = tuple(_new(flat, v) for v in eqn.outputs)
            flat.operations.append(Operation(_jax.name_of(eqn), eqn.params, tuple(inputs), made, eqns, program, loop))
            outs = list(made)
        known |= dict(zip(eqn.outputs, outs, strict=True))
    return [operand(v) for v in program.outputs]


def _loop(flat: Flat, eqn: Equation, inputs: Sequence[Operand], eqns: Sequence[Equation]) -> Loop:
    """The body of a scan."""
    scan = _jax.scan_of(eqn)
    body_inputs = [_new(flat, v) for v in scan.body.inputs[scan.num_consts :]]
    before, flat.operations = flat.operations, []
    outputs = _inline(flat, scan.body, [*inputs[: scan.num_consts], *body_inputs], eqns)
    operations, flat.operations = flat.operations, before
    carry, slices = body_inputs[: scan.num_carry], body_inputs[scan.num_carry :]
    return Loop(tuple(carry), tuple(slices), tuple(operations), tuple(outputs))


def all_operations(operations: Sequence[Operation]) -> Iterator[Operation]:
    """Operations, those of loop bodies before the loop."""
    for op in operations:
        yield from all_operations(op.loop.operations if op.loop else ())
        yield op


class DiffersError(Exception):
    """The program differs between sizes of the input. Args: what differs, and where."""


def merged(flats: Sequence[Flat], points: Points) -> Flat:
    """The program of which `flats` are traces at several sizes, with formulas for the sizes.

    Raises:
      DiffersError: if the traces are not of one program.
    """
    first = flats[0]
    for ops in zip(*(all_operations(flat.operations) for flat in flats), strict=False):
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

    def operation(ops: Sequence[Operation]) -> Operation:
        op = ops[0]
        where = lambda: op.line  # noqa: E731
        params = {name: solved([each.params[name] for each in ops], where) for name in op.params}
        inputs = tuple(operand(each, where) for each in zip(*(each.inputs for each in ops), strict=True))
        loop = op.loop
        if loop is not None:
            loops = [each.loop for each in ops if each.loop is not None]
            body = tuple(map(operation, zip(*(each.operations for each in loops), strict=True)))
            outs = tuple(operand(each, where) for each in zip(*(each.outputs for each in loops), strict=True))
            loop = dataclasses.replace(loop, operations=body, outputs=outs)
        return dataclasses.replace(op, params=params, inputs=inputs, loop=loop)

    operations = list(map(operation, zip(*(flat.operations for flat in flats), strict=True)))
    end = lambda: "its outputs"  # noqa: E731
    shapes = [solved(each, end) for each in zip(*(flat.shapes for flat in flats), strict=True)]
    outputs = [operand(each, end) for each in zip(*(flat.outputs for flat in flats), strict=True)]
    return dataclasses.replace(first, operations=operations, shapes=shapes, outputs=outputs)


def without_repeats(flat: Flat) -> Flat:
    """The program without unused operations and without operations that repeat an earlier one."""
    same: dict[int, Operand] = {}
    done: dict[Any, tuple[int, ...]] = {}
    kept = []
    for op in (_with_operands(op, same) for op in flat.operations):
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
            needed |= op.reads
    return dataclasses.replace(flat, operations=last[::-1], outputs=outs)


def _renamed(operands: Sequence[Operand], known: dict[int, Operand]) -> tuple[Operand, ...]:
    return tuple(known.get(x, x) if isinstance(x, int) else x for x in operands)


def _with_operands(op: Operation, known: dict[int, Operand]) -> Operation:
    """The operation with other operands, in its body as well."""
    loop = op.loop
    if loop is not None:
        body = tuple(_with_operands(each, known) for each in loop.operations)
        loop = dataclasses.replace(loop, operations=body, outputs=_renamed(loop.outputs, known))
    return dataclasses.replace(op, inputs=_renamed(op.inputs, known), loop=loop)


def _key(op: Operation) -> Any:
    """Equal for operations with equal results."""
    if op.loop is not None:
        return op.outputs
    inputs = tuple(x.key if isinstance(x, Number) else x for x in op.inputs)
    return (
        op.name,
        inputs,
        tuple((name, repr(value)) for name, value in sorted(op.params.items()) if "jaxpr" not in name),
    )


VIEWS = {"reshape", "broadcast_in_dim", "squeeze", "transpose", "stop_gradient", "copy"}
SMALL = 1024  # arrays of up to so many elements are computed at export even if they are larger than their operands


def folded(flat: Flat) -> Flat:
    """The program with everything computed that depends on parameters alone. Conversions of tables are kept: the
    written model converts the rows that it reads."""
    constants, kept = dict(flat.constants), []
    numbers: dict[int, Operand] = {}  # values that became scalars
    views: dict[int, Operation] = {}  # of constants: free at run time, so they stay in the source

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

    for op in (_with_operands(op, numbers) for op in flat.operations):
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
