"""Writing a program down: values as Python expressions, and the lines that name them."""

from __future__ import annotations

import builtins
import dataclasses
import keyword
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.export import helpers
from jaxsparse.export.flat import Flat, Number, Operand, Operation
from jaxsparse.export.sizes import Size
from jaxsparse.trace.lines import source_frame

# How strongly a Python expression holds together
COMPARE, OR, XOR, AND, SHIFT, ADD, MUL, UNARY, POWER, ATOM = range(10)
WIDTH = 100  # of an expression

Shape = tuple[Any, ...]  # of ints and Sizes


@dataclasses.dataclass(eq=False)
class Value:
    """What an expression says.

    Attributes:
      text: the expression.
      level: how strongly it holds together.
      shape: of the value.
      actual: of what the expression gives, which NumPy broadcasts to `shape`. () of Python numbers.
      weak: whether it is a Python number, which takes the dtype of what it meets.
      columns: where the last axis is put together of values without that axis, these.
      made_by: the operation and the values that it was made of.
      bounds: of integers that are checked when they come in, the least and what is above all.
      is_stored: whether it is an array beside the source.
      rows_as: of a table, what its rows are to be converted to; "bfloat16" where it is that, stored as uint16.
      number: what it is, where that is one number that is known.
      bag: of rows of a table by ids (B, L): the table, the ids and what else says how they are taken.
      rows_of: of rows table[ids], the table and the ids.
      is_sorted: whether it is ids that do not decrease.
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
        """The expression where it has to hold together as strongly as this."""
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
    """The one in which NumPy computes: what it does not have of small floats is float32."""
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
    """What cannot be written down. Args: what it is."""


def number_text(x: Any, dtype: Any) -> str:
    """A number as a Python literal, with no more digits than its dtype tells apart."""
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


Line = tuple[str, str, Any]  # name that is set, expression, frame of the user's program


class Writer:
    """The lines of `predict`, as they are written.

    Args:
      flat: the program.
      reserved: names that are taken, of sizes for one.

    Attributes:
      helpers: the names of those that the lines call.
      lines: what was written.
    """

    def __init__(self, flat: Flat, reserved: Sequence[str]) -> None:
        self.flat = flat
        self.helpers: set[str] = set()
        self.lines: list[Line] = []
        self._frame: Any = None
        self._taken = {"np", "pathlib", "predict", "x", "model", *keyword.kwlist, *dir(builtins), *vars(helpers)}
        self._taken |= {*reserved, *map(str.lower, reserved)}
        self._values: dict[int, Value] = {}
        self._uses: dict[int, int] = {}
        for x in [x for op in flat.operations for x in op.inputs] + flat.outputs:
            if isinstance(x, int):
                self._uses[x] = self._uses.get(x, 0) + 1

    def new_name(self, hint: str) -> str:
        """A name that is not taken, as much like this one as can be."""
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
        """The value, which is a name, or a number, from now on."""
        if not value.is_name and not (value.weak and value.number is not None):
            name = self.new_name(hint)
            self.lines.append((name, value.text, self._frame))
            value.text, value.level = name, ATOM
        return value

    def strong(self, value: Value) -> Value:
        """The value with its dtype."""
        if not value.weak:
            return value
        text = f"{'np.bool_' if np.dtype(value.dtype) == bool else dtype_text(value.dtype)}({value.text})"
        return dataclasses.replace(value, text=text, level=ATOM, weak=False)

    def full(self, value: Value) -> Value:
        """The value in its shape and dtype."""
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

    def write(self, op: Operation, rule: Callable[..., Any]) -> None:
        """One operation, by the rule that makes values of it: one for each of its outputs."""
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
        """An output of an operation."""
        x = op.outputs[number]
        shape = self.flat.shapes[x]
        return Value(text, level, shape, self.flat.dtypes[x], shape if actual is None else actual)

    def needed_lines(self, text: str) -> list[Line]:
        """The lines that an expression needs, in their order."""
        needed, kept = names_in(text), []
        for name, expression, frame in reversed(self.lines):
            if name in needed:
                needed |= names_in(expression)
                kept.append((name, expression, frame))
        return kept[::-1]

    def renumbered(self, lines: list[Line], result: str) -> tuple[list[Line], str]:
        """Lines, and what is returned, in which names are numbered without gaps."""
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
    """The shape that NumPy makes of these."""
    rank = max(map(len, shapes), default=0)
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*aligned, strict=True))
