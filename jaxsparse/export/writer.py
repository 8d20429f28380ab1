"""Python source for a program: values as expressions, and the lines that assign them to names."""

from __future__ import annotations

import builtins
import dataclasses
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.export import helpers
from jaxsparse.export.flat import Flat, Number, Operand, Operation, all_operations
from jaxsparse.export.sizes import Size
from jaxsparse.trace.lines import source_frame

# Precedence of Python's operators, weakest first
COMPARE, OR, XOR, AND, SHIFT, ADD, MUL, UNARY, POWER, ATOM = range(10)
WIDTH = 100  # the longest expression, in characters

Shape = tuple[Any, ...]  # of ints and Sizes


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the program as a Python expression.

    Attributes:
      text: the expression.
      level: the precedence of its outermost operator.
      shape: the shape of the value in the program.
      actual: the shape of the expression, which NumPy broadcasts to `shape`. () for Python scalars.
      weak: whether the expression is a Python scalar, which takes the dtype of the other operand.
      columns: the values that are stacked along the last axis, where the value is such a stack.
      made_by: the operation that computes the value, and its operands.
      bounds: (low, high) of integers that predict checks to be in [low, high).
      is_stored: whether the value is an array in a .npy file.
      rows_as: for a table, the dtype to which its rows are converted; "bfloat16" for a table stored as uint16.
      number: the value, where it is a known scalar.
      bag: for rows of a table by ids (B, L): the arguments of the helper `bags`.
      rows_of: for rows table[ids], the table and the ids.
      is_sorted: whether the value is ids in ascending order.
    """

    text: str
    level: int
    shape: Shape
    dtype: Any
    actual: Shape
    weak: bool = False
    columns: list[Value] | None = None
    made_by: tuple[Operation, list[Value]] | None = None
    bounds: tuple[Any, Any] | None = None
    is_stored: bool = False
    rows_as: str | None = None
    number: Any = None
    bag: str | None = None
    rows_of: tuple[Value, Value] | None = None
    is_sorted: bool = False

    def at(self, level: int) -> str:
        """The expression as an operand at this precedence, in parentheses if needed."""
        return self.text if self.level >= level else f"({self.text})"

    @property
    def is_name(self) -> bool:
        return self.text.isidentifier()


def size_text(size: Any, level: int = 0) -> str:
    if not isinstance(size, Size):
        return str(size)
    is_sum, is_name = len(size.terms) > 1, str(size).isidentifier()
    return f"({size})" if (ADD if is_sum else ATOM if is_name else MUL) < level else str(size)


def shape_text(shape: Shape) -> str:
    """As a Python tuple."""
    return f"({', '.join(map(size_text, shape))}{',' * (len(shape) == 1)})"


def axes_text(axes: Sequence[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(tuple(map(int, axes)))


def numpy_dtype(dtype: Any) -> np.dtype:
    """The dtype in which NumPy computes: float32 for bfloat16 and other floats that NumPy lacks."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        raise UnknownError(f"arrays of {dtype}")
    if jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).kind != "f":
        return np.dtype(np.float32)
    if np.dtype(dtype).kind not in "biufc":
        raise UnknownError(f"arrays of {dtype}")
    return np.dtype(dtype)


def dtype_text(dtype: Any) -> str:
    dtype = numpy_dtype(dtype)
    return "bool" if dtype.kind == "b" else f"np.{dtype}"


class UnknownError(Exception):
    """An equation or array that cannot be written in NumPy. Args: what it is and, for an equation, its source line."""


def number_text(x: Any, dtype: Any) -> str:
    """A scalar as a Python literal, with as many digits as its dtype needs."""
    if isinstance(x, Size):
        return size_text(x)
    if np.dtype(dtype) == bool:
        return str(bool(x))
    if jnp.issubdtype(dtype, jnp.integer):
        return str(int(x))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UnknownError(f"numbers of {dtype}")
    value = numpy_dtype(dtype).type(x)
    if not np.isfinite(value):
        return "np.nan" if np.isnan(value) else "np.inf" if value > 0 else "-np.inf"
    text = repr(float(str(value)))
    return text.removesuffix(".0") + ".0" if text.endswith(".0") else text


NAMES = {
    "gather": "read", "reduce_sum": "total", "reduce_max": "highest", "reduce_min": "lowest", "scatter-add": "total",
    "select_n": "chosen", "concatenate": "joined", "exp": "powers", "logistic": "share", "eq": "is_equal",
    "ne": "is_other", "lt": "is_less", "le": "is_at_most", "gt": "is_more", "ge": "is_at_least", "and": "is_both",
    "or": "is_either", "not": "is_not", "argmax": "best", "sort": "in_order", "iota": "numbers", "reduce_or": "is_any",
    "reduce_and": "is_all", "transpose": "turned", "reshape": "reshaped",
}  # fmt: skip


Line = tuple[str, str, Any]  # the assigned name, the expression or a whole `def`, the frame of the user's program


class Writer:
    """Writes the lines of `predict`.

    Args:
      flat: the program.
      reserved: names that may not be used, such as those of sizes.
      rules: for each name of a primitive, the function (writer, operation) -> Value, or a list of them.

    Attributes:
      helpers: the names of the helpers that the lines call.
      lines: the lines so far.
    """

    def __init__(self, flat: Flat, reserved: Sequence[str], rules: Mapping[str, Callable[..., Any]]) -> None:
        self.flat, self._rules = flat, rules
        self.helpers: set[str] = set()
        self.lines: list[Line] = []
        self._frame: Any = None
        self._taken = {"np", "pathlib", "predict", "x", "model", *keyword.kwlist, *dir(builtins), *vars(helpers)}
        self._taken |= {*reserved, *map(str.lower, reserved)}
        self._values: dict[int, Value] = {}
        self._uses: dict[int, int] = {}
        operations = list(all_operations(flat.operations))
        operands = [x for op in operations for x in (*op.inputs, *(op.loop.outputs if op.loop else ()))]
        for x in operands + flat.outputs:
            if isinstance(x, int):
                self._uses[x] = self._uses.get(x, 0) + 1

    def new_name(self, hint: str) -> str:
        """An unused name: the hint, with a number if it is taken."""
        base = re.sub(r"\W+", "_", hint).strip("_") or "value"
        base = f"_{base}" if base[0].isdigit() else base
        name, number = base, 1
        while name in self._taken or name.lower() in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken |= {name, name.lower()}
        return name

    def helper(self, name: str) -> str:
        self.helpers.add(name)
        return name

    def uses(self, x: Operand) -> int:
        return self._uses.get(x, 0) if isinstance(x, int) else 0

    def known(self, x: int, value: Value) -> None:
        self._values[x] = value

    def value(self, x: Operand) -> Value:
        if isinstance(x, Number):
            text, number = number_text(x.value, x.dtype), x.value
            level = UNARY if text.startswith("-") else ATOM
            if isinstance(number, Size):
                level = ATOM if text.isidentifier() else MUL if len(number.terms) == 1 else ADD
            return Value(text, level, (), x.dtype, (), weak=True, number=number)
        return self._values[x]

    def named(self, value: Value, hint: str = "h") -> Value:
        """The value, assigned to a name from now on. Known scalars stay literals."""
        if not value.is_name and not (value.weak and value.number is not None):
            name = self.new_name(hint)
            self.lines.append((name, value.text, self._frame))
            value.text, value.level = name, ATOM
        return value

    def strong(self, value: Value) -> Value:
        """The value with its dtype: a Python scalar becomes a NumPy scalar."""
        if not value.weak:
            return value
        text = f"{'np.bool_' if np.dtype(value.dtype) == bool else dtype_text(value.dtype)}({value.text})"
        return dataclasses.replace(value, text=text, level=ATOM, weak=False)

    def full(self, value: Value) -> Value:
        """The value with its dtype, broadcast to its shape."""
        if value.actual == value.shape:
            return self.strong(value)
        shape = shape_text(value.shape)
        if value.weak:
            text = f"np.full({shape}, {value.text}, {dtype_text(value.dtype)})"
            if value.number is not None and not isinstance(value.number, Size) and value.number == 0:
                text = f"np.zeros({shape}, {dtype_text(value.dtype)})"
        else:
            text = f"np.broadcast_to({value.text}, {shape})"
        return dataclasses.replace(value, text=text, level=ATOM, actual=value.shape, weak=False)

    def write_all(self, operations: Sequence[Operation]) -> None:
        """Writes operations in their order.

        Raises:
          UnknownError: with the source line of an operation without a rule.
        """
        for op in operations:
            try:
                if op.name not in self._rules:
                    raise UnknownError(op.name)
                self._write(op, self._rules[op.name])
            except UnknownError as unknown:
                raise unknown if len(unknown.args) == 2 else UnknownError(unknown.args[0], op.line) from None

    def body(self, operations: Sequence[Operation], outputs: Sequence[Operand]) -> tuple[list[Line], list[Value]]:
        """The lines that a body needs, apart from those written so far, and its outputs."""
        before, frame, self.lines = self.lines, self._frame, []
        self.write_all(operations)
        values = [self.full(self.value(x)) for x in outputs]
        lines = self.needed_lines(", ".join(value.text for value in values))
        self.lines, self._frame = before, frame
        return lines, values

    def _write(self, op: Operation, rule: Callable[..., Any]) -> None:
        """Writes one operation. Its rule gives a value for each of its outputs."""
        self._frame = source_frame(op.eqns)
        made = self._made(op, rule)
        if any(len(value.text) > WIDTH for value in made):
            for x in op.inputs:
                if len(self.value(x).text) > 24:
                    self.named(self.value(x), self._hint(x))
            made = self._made(op, rule)
        for x, value in zip(op.outputs, made, strict=True):
            self._values[x] = value
            cheap = value.is_name or value.weak
            if not cheap and (self.uses(x) > 1 or len(value.text) > WIDTH):
                self.named(value, NAMES.get(op.name, "h"))

    def _made(self, op: Operation, rule: Callable[..., Any]) -> list[Value]:
        made = rule(self, op)
        values = made if isinstance(made, list) else [made]
        for value in values:
            value.made_by = value.made_by or (op, [self.value(x) for x in op.inputs])
        return values

    def _hint(self, x: Operand) -> str:
        by = self.value(x).made_by
        return NAMES.get(by[0].name, "h") if by else "h"

    def out(self, op: Operation, text: str, level: int = ATOM, actual: Shape | None = None, number: int = 0) -> Value:
        """The value of an operation's output, by default the first."""
        x = op.outputs[number]
        shape = self.flat.shapes[x]
        return Value(text, level, shape, self.flat.dtypes[x], shape if actual is None else actual)

    def needed_lines(self, text: str) -> list[Line]:
        """The lines on which an expression depends, in their order."""
        needed, kept = names_in(text), []
        for name, expression, frame in reversed(self.lines):
            if name in needed:
                needed |= names_in(expression)
                kept.append((name, expression, frame))
        return kept[::-1]

    def renumbered(self, lines: list[Line], result: str) -> tuple[list[Line], str]:
        """The lines and the returned expression, with names numbered without gaps."""
        others = self._taken - {name for name, _, _ in self.lines}
        new: dict[str, str] = {}
        counts: dict[str, int] = {}
        for name, _, _ in lines:
            base = re.sub(r"_\d+$", "", name)
            while (number := counts.get(base, 0) + 1) and (to := base if number == 1 else f"{base}_{number}") in others:
                counts[base] = number
            counts[base], new[name] = number, to

        def renamed(text: str) -> str:
            return re.sub(_NAME, lambda found: new.get(found[0], found[0]), text)

        return [(new[name], renamed(text), frame) for name, text, frame in lines], renamed(result)


_NAME = r"(?<![\w.])[A-Za-z_]\w*"


def names_in(text: str) -> set[str]:
    return set(re.findall(_NAME, text))


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape to which NumPy broadcasts these shapes."""
    rank = max(map(len, shapes), default=0)
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*aligned, strict=True))
