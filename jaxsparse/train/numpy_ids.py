"""The row ids of a step, computed with NumPy.

Most steps make their ids of the batch by a few operations on integers. On a CPU a program of JAX's waits for the step
that runs there, and on an accelerator its result has to be fetched. NumPy does neither, so the host sorts the ids of a
step while the step before runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program


def numpy_function(program: Program, numbers: Sequence[int]) -> Callable[[Sequence[Any]], list[np.ndarray]] | None:
    """The program as a NumPy function of its inputs.

    Args:
      numbers: of the outputs, equal for those that are equal; these are computed once.

    Returns:
      A function of the arrays, NumPy's or JAX's on a CPU, that returns the outputs; None if some equation is not one
      of few operations on integers and bools.
    """
    given: dict[Any, np.ndarray] = {}
    steps: list[tuple[Callable[..., Any], list[Any], Any]] = []

    def operand(v: Any) -> Any:
        if not _jax.is_literal(v):
            return v
        key = object()
        given[key] = np.asarray(_jax.literal_value(v), _jax.dtype(v))
        return key

    def add(program: Program) -> bool:
        for v, constant in program.constants.items():
            if not _is_integral(v):
                return False
            given[v] = np.asarray(constant)
        return all(map(add_equation, program.equations))

    def add_equation(eqn: Equation) -> bool:
        if not all(map(_is_integral, [*eqn.inputs, *eqn.outputs])):
            return False
        inner = _jax.inlined(eqn)
        if inner is not None:
            if len(inner.inputs) != len(eqn.inputs):
                return False
            steps.extend((_same, [operand(v)], w) for v, w in zip(eqn.inputs, inner.inputs, strict=True))
            added = add(inner)
            steps.extend((_same, [operand(v)], w) for v, w in zip(inner.outputs, eqn.outputs, strict=True))
            return added
        make = _OPERATIONS.get(eqn.primitive)
        function = make(eqn) if make is not None else None
        if function is None:
            return False
        steps.append((function, list(map(operand, eqn.inputs)), eqn.outputs[0]))
        return True

    if not all(map(_is_integral, program.inputs)) or not add(program):
        return None
    inputs = [(v, np.dtype(_jax.dtype(v))) for v in program.inputs]
    first = dict(zip(reversed(numbers), map(operand, reversed(program.outputs)), strict=True))
    outputs = [first[number] for number in numbers]
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if step[2] in needed:
            needed.update(step[1])
            kept.append(step)
    kept.reverse()

    def run(arrays: Sequence[Any]) -> list[np.ndarray]:
        values = dict(given)
        for (v, dtype), x in zip(inputs, arrays, strict=True):
            values[v] = np.asarray(x).astype(dtype, copy=False)
        with np.errstate(over="ignore"):  # as XLA
            for function, operands, out in kept:
                values[out] = function(*[values[v] for v in operands])
        return [values[v] for v in outputs]

    return run


def _is_integral(v: Any) -> bool:
    dtype = _jax.dtype(v)
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and (
        dtype == np.bool_ or np.issubdtype(dtype, np.integer)
    )


def _same(x: Any) -> Any:
    return x


def _select(which: Any, if_false: Any, if_true: Any) -> Any:
    return np.where(which, if_true, if_false) if which.any() else if_false  # the usual case: no id is negative


def _remainder(x: Any, by: Any) -> Any:
    """With the sign of x; x, if that is divided by zero."""
    none = by == 0
    return np.where(none, x, np.fmod(x, np.where(none, 1, by))) if none.any() else np.fmod(x, by)


def _clamp(low: Any, x: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)


def _broadcast(eqn: Equation) -> Callable[..., Any] | None:
    shape, dimensions = eqn.param("shape"), eqn.param("broadcast_dimensions")
    if not all(isinstance(n, int) for n in shape):
        return None
    sizes = dict(zip(dimensions, _jax.shape(eqn.inputs[0]), strict=True))
    middle = tuple(sizes.get(axis, 1) for axis in range(len(shape)))
    return lambda x: np.broadcast_to(x.reshape(middle), shape)


def _convert(eqn: Equation) -> Callable[..., Any] | None:
    dtype = np.dtype(eqn.param("new_dtype"))
    return lambda x: x.astype(dtype, copy=False)


def _reshape(eqn: Equation) -> Callable[..., Any]:
    shape = _jax.shape(eqn.outputs[0])
    return lambda x: x.reshape(shape)


def _slice(eqn: Equation) -> Callable[..., Any] | None:
    starts, limits = eqn.param("start_indices"), eqn.param("limit_indices")
    steps = eqn.param("strides") or (1,) * len(starts)
    cut = tuple(map(slice, starts, limits, steps))
    return lambda x: x[cut]


def _iota(eqn: Equation) -> Callable[..., Any] | None:
    shape, axis, dtype = _jax.shape(eqn.outputs[0]), eqn.param("dimension"), np.dtype(eqn.param("dtype"))
    line = np.arange(shape[axis], dtype=dtype).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return lambda: np.broadcast_to(line, shape)


_PLAIN = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "clamp": _clamp, "rem": _remainder,
}  # fmt: skip
_MADE: dict[str, Callable[[Equation], Callable[..., Any] | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda eqn: lambda *xs: np.concatenate(xs, axis=eqn.param("dimension")),
    "convert_element_type": _convert,
    "iota": _iota,
    "reshape": lambda eqn: _reshape(eqn) if eqn.params.get("dimensions") is None else None,
    "select_n": lambda eqn: _select if _jax.dtype(eqn.inputs[0]) == np.bool_ else None,
    "slice": _slice,
    "squeeze": _reshape,
    "transpose": lambda eqn: lambda x: x.transpose(eqn.param("permutation")),
}
# By primitive: the NumPy function of an equation's inputs, or None if there is none.
_OPERATIONS = {
    primitive: make
    for names, make in [*((name, lambda _, f=function: f) for name, function in _PLAIN.items()), *_MADE.items()]
    for primitive in _jax.primitives(names)
}
