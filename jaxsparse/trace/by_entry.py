"""Large arrays that have an entry for each id of a batch, or each example, and are only summed: made in pieces.

`table[ids] * weights[:, None]`, summed by bag, is an array of as many rows as there are ids, which XLA's CPU backend
makes as a whole before it sums it, as it does the one that a gradient adds to rows. For 100,000 ids each takes 27 MB,
which no cache holds; past 32 MB, temporaries are mapped anew at each call. So it is noted by which equations entries of
such an array are made of the same entries of others (`followed`), and where it ends, in a sum or a scatter, it is made
on CPU a piece after another, none larger than a cache. The array itself is traced as well: XLA leaves out what nothing
needs.
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
from jaxsparse.trace.row_rules import moved
from jaxsparse.trace.values import Whole

if TYPE_CHECKING:
    from jaxsparse.trace.walk import Walk

_LARGE = 1 << 21  # bytes
_PIECE = 1 << 20
_SMALL = 8  # times smaller than an array that is made of it


class Cut(NamedTuple):
    """So many entries, along the first axis."""

    first: Any
    size: int

    def __call__(self, x: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size)


class Entries(NamedTuple):
    """How entries of an array are made.

    make: of a Cut.
    gathered: whether some array was indexed for it; XLA makes one loop of most of what else is only summed.
    """

    make: Callable[[Cut], Any]
    gathered: bool


def followed(walk: Walk, eqn: Equation, values: Sequence[Whole], outs: list[Any]) -> tuple[list[Any], Entries | None]:
    """An equation's outputs, of arrays of which some are made in pieces, and how the first one may be."""
    if len(outs) != 1:
        return outs, None
    large = max((v for v in values if v.entries is not None), key=lambda v: _bytes(v.array), default=None)
    if eqn.primitive is _jax.SCATTER_ADD:
        if values[2].entries is None or not adds_entries(eqn):
            return outs, None
        into, index = values[0].array, values[1].array

        def add(sums: jax.Array, cut: Cut) -> jax.Array:
            return _jax.bind(eqn, [sums, cut(index), made(values[2], cut)])[0]

        return [by_pieces(values[2], add, into, lambda: outs[0])], None
    is_large = _is_large(eqn.outputs[0]) or eqn.primitive is _jax.BROADCAST
    entries = _entries_of(eqn, values) if large or is_large else None
    if entries is None:
        return outs, None
    if is_large:
        return outs, noted(walk, eqn, entries)
    return ([_summed(large, entries, outs[0])] if large and entries.gathered else outs), None


def noted(walk: Walk, eqn: Equation, entries: Entries) -> Entries | None:
    """The entries of an equation's output, if it is large, and used once, or nothing has to be calculated for it."""
    v = eqn.outputs[0]
    wanted = eqn.primitive is _jax.BROADCAST or (_is_large(v) and walk.only_use(v))
    return entries if walk.later and wanted else None


def adds_entries(eqn: Equation) -> bool:
    """Whether a scatter adds one entry after another."""
    numbers = eqn.param("dimension_numbers")
    return 0 not in numbers.update_window_dims and not numbers.operand_batching_dims


def made(v: Whole, cut: Cut) -> Any:
    """Entries of an array."""
    return cut(v.array) if v.entries is None else v.entries.make(cut)


def _is_large(v: Any) -> bool:
    shape = _jax.shape(v)
    return len(shape) > 1 and shape[0] > 1 and _bytes_of(v) >= _LARGE


def _entries_of(eqn: Equation, values: Sequence[Whole]) -> Entries | None:
    """Of an equation's output, if all that is cut for it is small beside it, or beside what is summed."""
    largest = max([_bytes_of(eqn.outputs[0]), *(_bytes(v.array) for v in values if v.entries is not None)])
    cuts = values[1:] if eqn.primitive is _jax.GATHER else values
    if any(v.entries is None and _SMALL * _bytes(v.array) > largest for v in cuts):
        return None
    primitive, (many, *shape) = eqn.primitive, _jax.shape(eqn.outputs[0]) or (0,)
    gathered = primitive is _jax.GATHER or any(v.entries is not None and v.entries.gathered for v in values)

    def cut_all(cut: Cut) -> Any:
        # a number, or an array that is stretched as one, is as it is
        cuts = [made(v, cut) if (jnp.shape(v.array) or (1,))[0] == many else v.array for v in values]
        return _jax.bind(eqn, cuts)[0]

    def look_up(cut: Cut) -> Any:
        return _jax.bind(eqn, [values[0].array, made(values[1], cut)])[0]

    def broadcast(cut: Cut) -> Any:
        stretched = 0 not in eqn.param("broadcast_dimensions") or _jax.shape(eqn.inputs[0])[0] != many
        operand = values[0].array if stretched else made(values[0], cut)
        return _jax.bind(eqn, [operand], shape=(cut.size, *shape))[0]

    def move(cut: Cut) -> Any:
        changes, _ = moved(eqn, 0, cut.size) or ({}, 0)
        return _jax.bind(eqn, [made(values[0], cut)], **changes)[0]

    if primitive in ELEMENTWISE:
        return Entries(cut_all, gathered) if any(v.entries for v in values) else None
    if primitive is _jax.GATHER:
        numbers = eqn.param("dimension_numbers")
        return None if 0 in numbers.offset_dims or numbers.operand_batching_dims else Entries(look_up, gathered)
    if primitive is _jax.BROADCAST:
        return Entries(broadcast, gathered)
    if primitive is _DOT:
        _, batch = eqn.param("dimension_numbers")
        return Entries(cut_all, gathered) if batch[0] and batch[0][0] == batch[1][0] == 0 else None
    found = moved(eqn, 0, many) if primitive in _MOVING and len(values) == 1 else None
    return Entries(move, gathered) if found is not None and found[1] == 0 else None


def _bytes_of(v: Any) -> int:
    return math.prod(_jax.shape(v)) * int(_jax.dtype(v).itemsize)


def _bytes(x: Any) -> int:
    return math.prod(jnp.shape(x)) * int(jnp.result_type(x).itemsize)


def _summed(large: Whole, entries: Entries, whole: jax.Array) -> jax.Array:
    """A small array that is made of a large one."""

    def put(out: jax.Array, cut: Cut) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, entries.make(cut), cut.first, 0)

    return by_pieces(large, put, jnp.zeros(whole.shape, whole.dtype), lambda: whole)


def by_pieces(
    large: Whole, turn: Callable[[jax.Array, Cut], jax.Array], start: jax.Array, at_once: Callable[[], jax.Array]
) -> jax.Array:
    """at_once(); on CPU turn(turn(start, cut), cut)..., for cuts that are all entries of a large array."""

    def one_by_one() -> jax.Array:
        many = large.array.shape[0]
        each = min(max(_PIECE * many // (large.array.size * large.array.dtype.itemsize), 1), many)
        out = jax.lax.fori_loop(0, many // each, lambda i, out: turn(out, Cut(i * each, each)), start)
        left = many % each
        return turn(out, Cut(many - left, left)) if left else out

    return jax.lax.platform_dependent(cpu=one_by_one, default=at_once)


(_DOT,) = _jax.primitives("dot_general")
_MOVING = _jax.primitives(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reshape slice squeeze transpose"
)
