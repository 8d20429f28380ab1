"""The rows that a step reads, chosen in its program: where ids are on an accelerator, in a user's jax.jit, on several
devices, and where a batch knows its distinct ids."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse.ops.rows import compact, distinct_rows, in_range, is_first, look_up
from jaxsparse.trace.known_ids import Coded, coded_ids
from jaxsparse.trace.planning import Planned
from jaxsparse.trace.values import NOBODY
from jaxsparse.trace.walk import Space


def reads_of(planned: Planned, c: int) -> dict[int, bool]:
    """For a class of rows, the numbers of its distinct id arrays, and whether some read of each is clipped."""
    found: dict[int, bool] = {}
    for read, number in planned.reads_in(c):
        found[number] = found.get(number, False) or read.clipped
    return found


def axes_of(planned: Planned, c: int) -> set[Any]:
    """The mapped axes over which a class's rows are added up. All devices along them need the same rows."""
    return {axis for node, axes in planned.plan.axes.items() if planned.plan.find(node) == c for axis in axes}


class Ids(NamedTuple):
    """The ids of all reads.

    arrays: of each read.
    codes: of each read, if that is known.
    wrong: whether what was said of the ids is wrong, bool (): then they name no rows.
    """

    arrays: list[jax.Array]
    codes: list[Coded | None]
    wrong: jax.Array | None

    def checked(self, x: Any, given: Sequence[Any]) -> Any:
        """The array, with NaN if the batch's distinct ids are wrong. An array that was given is not changed."""
        wrong = self.wrong
        if wrong is None or not jnp.issubdtype(x.dtype, jnp.inexact) or any(x is y for y in given):
            return x
        return jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), x)


def ids_of(planned: Planned, leaves: Sequence[Any], axes: Sequence[Any] = ()) -> Ids:
    """Of a step's leaves. `axes`: as of `choose_rows`."""
    arrays = planned.ids_of(leaves)
    if not planned.known:
        return Ids(arrays, [None] * len(arrays), None)
    codes, wrong = coded_ids(planned.ids, leaves, planned.known)
    over = {axis for c in planned.classes for axis in axes_of(planned, c)}
    for axis in sorted(over.union(axes, _jax.varying_axes(wrong)), key=str):
        wrong = jnp.any(_jax.all_gather(wrong[None], axis))
    return Ids(arrays, codes, wrong)


def knows_all(planned: Planned, leaves: Sequence[Any]) -> bool:
    """Whether the distinct ids of all reads are known of these leaves of a step."""
    found: list[Coded | None] = []

    def look(leaves: Sequence[Any]) -> None:
        found[:] = ids_of(planned, leaves).codes

    if planned.known:
        jax.eval_shape(look, list(leaves))
    nodes = zip(planned.reads, found, strict=False)
    return bool(found) and all(code for read, code in nodes if planned.plan.find(read.node) in planned.classes)


def choose_rows(planned: Planned, c: int, ids: Ids, axes: Sequence[Any] = (), *, on_one_device: bool = True) -> Space:
    """The distinct rows of a class that the ids of all reads name.

    Args:
      axes: further mapped axes along which all devices need the same rows, besides those the step adds up over.
      on_one_device: as in `Walk`.
    """
    num_rows, reads = planned.classes[c], planned.reads_in(c)
    arrays = dict(zip(planned.ids.numbers, ids.arrays, strict=True))
    codes = dict(zip(planned.ids.numbers, ids.codes, strict=True))
    parts: dict[Any, _Part] = {}  # arrays of ids, or of few values that several arrays have
    part_of: dict[int, Any] = {}
    for number, clipped in reads_of(planned, c).items():
        code = codes[number]
        part_of[number] = number if code is None else (code.values, clipped)
        part = _part(arrays[number] if code is None else code.values.array, clipped, num_rows, code)
        parts[part_of[number]] = part.joined(parts.get(part_of[number]))
    rows = {key: part.rows(num_rows, ids.wrong) for key, part in parts.items()}
    everything = jnp.concatenate([jnp.zeros(0, jnp.int32), *rows.values()])
    over = axes_of(planned, c).union(axes)
    for axis in sorted(over, key=str):
        everything = _jax.all_gather(everything, axis)
    if everything.shape[0] == 0:
        return Space(jnp.full(1, num_rows, jnp.int32), num_rows, {})
    size = min(everything.shape[0], num_rows) + 1
    # the ids of a turn of a loop, or of one device of several, are looked up, among rows in order
    looked_up = bool(over) or not on_one_device or any(read.path is None for read, _ in reads)
    if looked_up:
        ordered = jnp.sort(everything)
        unique = compact(ordered, is_first(ordered, num_rows), num_rows, size)
        at = {key: look_up(unique, x, num_rows) for key, x in rows.items() if parts[key].code is not None}
    else:
        (first, *others) = parts.values()
        if first.code is not None and not others and size > everything.shape[0]:
            unique, places = jax.lax.cond(
                first.in_order(num_rows),
                lambda: _as_they_are(everything, num_rows),
                lambda: distinct_rows(everything, num_rows, size),
            )
        else:
            unique, places = distinct_rows(everything, num_rows, size)
        ends = itertools.accumulate(x.shape[0] for x in rows.values())
        at = {key: places[end - x.shape[0] : end] for (key, x), end in zip(rows.items(), ends, strict=True)}
    positions: dict[Any, jax.Array] = {}
    for read, number in reads:
        key = part_of[number]
        if read.path is None or key not in at:
            continue
        where = at[key]
        if not read.clipped:  # another read may clip these ids
            where = jnp.where(in_range(parts[key].given, num_rows), where, size)
        code = codes[number]
        positions[read.path] = where if code is None else where.at[code.places.array].get(mode="promise_in_bounds")
    return Space(unique, num_rows, positions)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Ids of reads.

    Attributes:
      given: as the step makes them, int32 (m,).
      inside: the same, clipped into the table where reads are clipped.
      code: set if they are the values of coded ids.
      named: which of these some read names, bool (m,); None for all.
    """

    given: jax.Array
    inside: jax.Array
    code: Coded | None
    named: jax.Array | None

    def joined(self, other: _Part | None) -> _Part:
        """This part joined with another part of the same values."""
        if other is None:
            return self
        named = None if self.named is None or other.named is None else self.named | other.named
        return dataclasses.replace(self, named=named)

    def rows(self, num_rows: int, wrong: jax.Array | None) -> jax.Array:
        """The rows that they are, num_rows for those that are none."""
        rows = self._rows(num_rows)
        for known in (None if wrong is None else ~wrong, self.named):
            rows = rows if known is None else jnp.where(known, rows, num_rows)
        return rows

    def in_order(self, num_rows: int) -> jax.Array:
        """Whether rows are strictly increasing, with ids that name no row at the end."""
        rows = self._rows(num_rows)
        return jnp.all((rows[1:] > rows[:-1]) | (rows[1:] == num_rows))

    def _rows(self, num_rows: int) -> jax.Array:
        real = in_range(self.inside, num_rows)
        return jnp.where(real if self.code is None else real & self.code.is_id, self.inside, num_rows)


def _part(ids: jax.Array, clipped: bool, num_rows: int, code: Coded | None) -> _Part:
    inside = jnp.where(ids == NOBODY, num_rows, jnp.clip(ids, 0, num_rows - 1)) if clipped else ids
    if code is None or code.all_named:
        return _Part(ids, inside, code, None)
    named = jnp.zeros(ids.shape, bool).at[code.places.array].set(True, mode="promise_in_bounds")
    return _Part(ids, inside, code, named)


def _as_they_are(rows: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """What `distinct_rows` returns, with size k + 1, for rows (k,) that are distinct except for repeats of num_rows."""
    k = rows.shape[0]
    each = jnp.arange(k + 1, dtype=jnp.int32)
    unique = jnp.where(jnp.append(rows, num_rows) < num_rows, jnp.append(rows, num_rows), num_rows + each)
    return unique, jnp.where(rows < num_rows, each[:-1], k + 1)
