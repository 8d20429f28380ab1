"""Computes large arrays piece by piece on CPU, if they have an entry for each id or example and are only summed.

`table[ids] * weights[:, None]`, summed by bag, has a row for each id. XLA's CPU backend makes the whole array before
it sums it. For 100,000 ids that is 27 MB, more than a cache holds; past 32 MB, memory is mapped anew at each call.

`with_entries` notes how the entries of an array are computed from the same entries of other arrays. Where such an
array ends in a sum or a scatter, it is computed in pieces that fit into a cache. The array itself is traced as well;
XLA drops it if nothing else needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Equation
from jaxsparse.trace.row_elementwise import ELEMENTWISE
from jaxsparse.trace.row_rules import move_rows_axis
from jaxsparse.trace.values import FullArray

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk

_LARGE = 1 << 21  # bytes
_PIECE = 1 << 20
_SMALL = 8  # an operand that is cut must be this many times smaller than the result


class Cut(NamedTuple):
    """A range of entries along the first axis: `size` of them from `first` on."""

    first: Any
    size: int

    def __call__(self, x: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size)


class Entries(NamedTuple):
    """How a range of entries of an array is computed.

    make: the entries of a Cut.
    gathered: whether the array depends on a gather. XLA fuses most other arrays into the sum.
    """

    make: Callable[[Cut], Any]
    gathered: bool


def with_entries(
    walk: Walk, eqn: Equation, values: Sequence[FullArray], outs: list[Any]
) -> tuple[list[Any], Entries | None]:
    """An equation's outputs, and how entries of the first output are computed, or None."""
    if len(outs) != 1:
        return outs, None
    large = max((v for v in values if v.entries is not None), key=lambda v: _bytes(v.array), default=None)
    if eqn.primitive is _jax.SCATTER_ADD:
        if values[2].entries is None or not adds_entries(eqn):
            return outs, None
        into, index = values[0].array, values[1].array

        def add(sums: jax.Array, cut: Cut) -> jax.Array:
            return _jax.bind(eqn, [sums, cut(index), entries_in(values[2], cut)])[0]

        return [by_pieces(values[2], add, into, lambda: outs[0])], None
    is_large = _is_large(eqn.outputs[0]) or eqn.primitive is _jax.BROADCAST
    entries = _entries_of(eqn, values) if large or is_large else None
    if entries is None:
        return outs, None
    if is_large:
        return outs, entries_if_wanted(walk, eqn, entries)
    return ([_summed(large, entries, outs[0])] if large and entries.gathered else outs), None


def entries_if_wanted(walk: Walk, eqn: Equation, entries: Entries) -> Entries | None:
    """`entries`, if the equation's output is large and used once, or is a broadcast; otherwise None."""
    v = eqn.outputs[0]
    wanted = eqn.primitive is _jax.BROADCAST or (_is_large(v) and walk.only_use(v))
    return entries if walk.defers and wanted else None


def adds_entries(eqn: Equation) -> bool:
    """Whether a scatter adds one entry after another."""
    numbers = eqn.param("dimension_numbers")
    return 0 not in numbers.update_window_dims and not numbers.operand_batching_dims


def entries_in(v: FullArray, cut: Cut) -> Any:
    """A range of entries of an array."""
    return cut(v.array) if v.entries is None else v.entries.make(cut)


def _is_large(v: Any) -> bool:
    shape = _jax.shape(v)
    return len(shape) > 1 and shape[0] > 1 and _bytes_of(v) >= _LARGE


def _entries_of(eqn: Equation, values: Sequence[FullArray]) -> Entries | None:
    """How entries of an equation's output are computed. None if an operand that is cut is not much smaller than the
    output or than the array that is summed."""
    largest = max([_bytes_of(eqn.outputs[0]), *(_bytes(v.array) for v in values if v.entries is not None)])
    cuts = values[1:] if eqn.primitive is _jax.GATHER else values
    if any(v.entries is None and _SMALL * _bytes(v.array) > largest for v in cuts):
        return None
    primitive, (num_entries, *shape) = eqn.primitive, _jax.shape(eqn.outputs[0]) or (0,)
    gathered = primitive is _jax.GATHER or any(v.entries is not None and v.entries.gathered for v in values)

    def cut_operands(cut: Cut) -> Any:
        # numbers, and arrays that are broadcast, are not cut
        cuts = [entries_in(v, cut) if (jnp.shape(v.array) or (1,))[0] == num_entries else v.array for v in values]
        return _jax.bind(eqn, cuts)[0]

    def look_up(cut: Cut) -> Any:
        return _jax.bind(eqn, [values[0].array, entries_in(values[1], cut)])[0]

    def broadcast(cut: Cut) -> Any:
        stretched = 0 not in eqn.param("broadcast_dimensions") or _jax.shape(eqn.inputs[0])[0] != num_entries
        operand = values[0].array if stretched else entries_in(values[0], cut)
        return _jax.bind(eqn, [operand], shape=(cut.size, *shape))[0]

    def move(cut: Cut) -> Any:
        changes, _ = move_rows_axis(eqn, 0, cut.size) or ({}, 0)
        return _jax.bind(eqn, [entries_in(values[0], cut)], **changes)[0]

    if primitive in ELEMENTWISE:
        return Entries(cut_operands, gathered) if any(v.entries for v in values) else None
    if primitive is _jax.GATHER:
        numbers = eqn.param("dimension_numbers")
        return None if 0 in numbers.offset_dims or numbers.operand_batching_dims else Entries(look_up, gathered)
    if primitive is _jax.BROADCAST:
        return Entries(broadcast, gathered)
    if primitive is _DOT:
        _, batch = eqn.param("dimension_numbers")
        return Entries(cut_operands, gathered) if batch[0] and batch[0][0] == batch[1][0] == 0 else None
    found = move_rows_axis(eqn, 0, num_entries) if primitive in _MOVING and len(values) == 1 else None
    return Entries(move, gathered) if found is not None and found[1] == 0 else None


def _bytes_of(v: Any) -> int:
    return math.prod(_jax.shape(v)) * int(_jax.dtype(v).itemsize)


def _bytes(x: Any) -> int:
    return math.prod(jnp.shape(x)) * int(jnp.result_type(x).itemsize)


def _summed(large: FullArray, entries: Entries, full: jax.Array) -> jax.Array:
    """A small array that is computed from a large one, piece by piece."""

    def put(out: jax.Array, cut: Cut) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, entries.make(cut), cut.first, 0)

    return by_pieces(large, put, jnp.zeros(full.shape, full.dtype), lambda: full)


def by_pieces(
    large: FullArray, turn: Callable[[jax.Array, Cut], jax.Array], start: jax.Array, unsplit: Callable[[], jax.Array]
) -> jax.Array:
    """unsplit(); on CPU, turn(turn(start, cut), cut)... instead, over cuts that cover all entries of `large`."""

    def in_pieces() -> jax.Array:
        num_entries = large.array.shape[0]
        piece_size = min(max(_PIECE * num_entries // (large.array.size * large.array.dtype.itemsize), 1), num_entries)
        out = jax.lax.fori_loop(
            0, num_entries // piece_size, lambda i, out: turn(out, Cut(i * piece_size, piece_size)), start
        )
        remainder = num_entries % piece_size
        return turn(out, Cut(num_entries - remainder, remainder)) if remainder else out

    if not large.array.size:  # a batch without ids
        return unsplit()
    return jax.lax.platform_dependent(cpu=in_pieces, default=unsplit)


(_DOT,) = _jax.primitives("dot_general")
_MOVING = _jax.primitives(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reshape slice squeeze transpose"
)
