"""What is known of a step before it runs: which arrays share which rows, what is refused, what is announced.

Arrays of the state that are read by rows are tables. What else of the state has a row for each of a table's rows, and
meets it, belongs to it: slots, averages. Which those are, and what is not done row by row, comes out of walks through
the program with stand-ins for the rows, until nothing changes any more.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._jax import Program
from jaxsparse.tracing import TracedStep
from jaxsparse.values import Note, RefusedError, Rows, Value, Whole, notes_of
from jaxsparse.walk import Plan, Read, Walk


def refused(got: str, do: str) -> RefusedError:
    return RefusedError(message("rowwise", "step", "one that is right on the rows that it reads", got, do))


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is known of a step before it runs.

    Attributes:
      leaves: the leaves of the state of which only some rows are computed, with their class.
      classes: the number of rows of each class.
      reads: the reads, in order.
      ids: evaluates the ids of the reads; its first inputs are the leaves of the arguments.
      dense: the tables that are not row-sparse, with the reason.
      whole_outputs: outputs that are whole tables, and not where these stood.
    """

    traced: TracedStep
    plan: Plan
    leaves: dict[int, int]
    classes: dict[int, int]
    reads: list[Read]
    ids: _jax.Needed
    dense: dict[int, str]
    whole_outputs: list[int]


def plan_step(traced: TracedStep, leaves: Sequence[Any]) -> Planned:
    """Finds out which leaves of the state share which rows.

    Raises:
      RefusedError: if the step cannot be right on some rows.
    """
    program, places = traced.program, traced.places
    shapes = [_jax.shape(v) for v in program.inputs]
    can = {i for i, place in places.items() if _may_be_rows(program.inputs[i], program.outputs[place])}
    would: set[int] = set()
    if (filled := _without_zeros(leaves, places)) is not None:  # a batch without ids reads nothing, but would
        would = _settle(traced.again(filled), filled, places, can, set()).chosen
    settled = _settle(program, leaves, places, can, would)
    walked, chosen, tables, plan = settled.walked, settled.chosen, settled.tables, settled.walked.plan
    _check(walked, traced, tables & chosen, chosen, settled.lost)
    planned = Planned(
        traced,
        plan,
        {i: plan.find(i) for i in sorted(chosen)},
        {plan.find(i): shapes[i][0] for i in chosen},
        walked.reads,
        walked.ids,
        {i: why for i, why in settled.banned.items() if i in tables},
        [j for j, v in enumerate(walked.outs) if isinstance(v, Rows) and j not in {places[i] for i in chosen}],
    )
    _check_reads(planned)
    return planned


class _Settled(NamedTuple):
    """Which leaves are Rows, when nothing changes any more."""

    walked: _Walked
    tables: set[int]  # leaves that are read themselves
    chosen: set[int]  # and what belongs to them
    banned: dict[int, str]  # why leaves are not
    lost: dict[int, str]  # why updates of no table are not


def _settle(
    program: Program, leaves: Sequence[Any], places: dict[int, int], can: set[int], would: set[int]
) -> _Settled:
    """Args: `can`, the leaves that may be Rows; `would`, those that are, whether they are read or not."""
    nodes: dict[Any, int] = {}
    loose: frozenset[Any] = frozenset()

    def walk(chosen: set[int]) -> _Walked:
        heights = frozenset(_jax.shape(program.inputs[i])[0] for i in chosen)
        return _Walked(Plan(heights, loose, nodes, len(leaves)), program, leaves, chosen, places)

    tables = would | can & walk(can).plan.read  # read themselves, not only joined to what is
    chosen, banned, lost = set(tables), dict[int, str](), dict[int, str]()
    while True:
        walked = walk(chosen)
        plan, find = walked.plan, walked.plan.find
        reasons = {find(n): why for n, why in plan.not_by_row.items()}
        named = {find(n) for n in (*plan.read, *would)}
        now = {i: reasons.get(find(i), "") for i in chosen if find(i) in reasons or find(i) not in named}
        banned |= now
        with_table = {find(i) for i in tables - set(banned)}
        grown = set()
        for i in can - set(banned):
            out = walked.outs[places[i]]
            if isinstance(out, Rows) and out.axis == 0 and find(out.node) in with_table:
                grown.add(i)
        new = (chosen | grown) - set(banned)
        loose_now: frozenset[Any] = frozenset()
        if not now:  # scatters that reach no table as rows: of dense tables, or lost on the way
            lost |= {n: why for n, why in plan.refused.items() if find(n) not in with_table}
            loose_now = frozenset(path for path, n in plan.scatters.items() if find(n) not in with_table)
        if new == chosen and not loose_now and not now:
            return _Settled(walked, tables, chosen, banned, lost)
        chosen, loose = new, loose | loose_now


def _may_be_rows(v: Any, out: Any) -> bool:
    """Whether a leaf of the state has rows, and becomes an array like itself."""
    shape, dtype = _jax.shape(v), _jax.dtype(v)
    numbers = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    return len(shape) > 0 and shape[0] > 1 and numbers and (_jax.shape(out), _jax.dtype(out)) == (shape, dtype)


def _without_zeros(leaves: Sequence[Any], places: dict[int, int]) -> list[Any] | None:
    """Abstract leaves with one example or id where a batch has none; None where it has some of all."""
    kinds = [_jax.kind_of_array(x) for x in leaves]
    if not any(0 in shape for i, (shape, _, _) in enumerate(kinds) if i not in places):
        return None
    return [
        x if i in places else jax.ShapeDtypeStruct(tuple(max(d, 1) for d in shape), dtype, weak_type=weak)
        for i, (x, (shape, dtype, weak)) in enumerate(zip(leaves, kinds, strict=True))
    ]


class _Walked:
    """A planning walk, in which `chosen` leaves are Rows: its plan, the values of its outputs, and its ids."""

    def __init__(
        self, plan: Plan, program: Program, leaves: Sequence[Any], chosen: set[int], places: dict[int, int]
    ) -> None:
        self.plan = plan
        stand_ins = [_stand_in(x) if i in chosen else None for i, x in enumerate(leaves)]

        def ids_of_reads(leaves: list[Any], stand_ins: list[Any]) -> list[Any]:
            walk = Walk(plan)
            values = [
                Whole(x, _notes_of_leaf(i, x, places)) if s is None else rows_of_leaf(s, i, x)
                for i, (x, s) in enumerate(zip(leaves, stand_ins, strict=True))
            ]
            outs = walk.run(program, values)
            for i, place in places.items():  # what stands at a leaf's place has its rows
                v = outs[place]
                if i in chosen and isinstance(v, Rows):
                    plan.unify(i, v.node)
                    if v.axis != 0:
                        plan.not_by_row.setdefault(i, "it is returned with its rows along another axis")
            kept = [v.first for v in (outs[place] for place in places.values()) if isinstance(v, Rows)]
            self.kept_sums = [source for rows, source in plan.part_sums if any(rows.first is other for other in kept)]
            plan.part_sums.clear()
            self.outs = [_without_arrays(v) for v in outs]
            self.reads = [read for read, _ in walk.reads]
            return [ids for _, ids in walk.reads]

        self.ids = _jax.Needed(ids_of_reads, (list(leaves), stand_ins))
        self.needs_rows = any(self.ids.used[len(leaves) :])


def _without_arrays(v: Value) -> Value:
    """What is known of a value, for after the trace."""
    if isinstance(v, Rows):
        return Rows(None, v.node, v.axis, v.outside, v.updated, None if v.whole is None else lambda walk: None)
    return Whole(None, notes_of(v))


def _stand_in(x: Any) -> jax.Array:
    return _jax.vary(jnp.zeros((3, *x.shape[1:]), x.dtype), _jax.varying_axes(x))


def rows_of_leaf(block: jax.Array, i: int, leaf: jax.Array) -> Rows:
    """Some rows of a leaf of the state."""
    return Rows(block, i, whole=lambda walk: leaf)


def _notes_of_leaf(i: int, x: Any, places: dict[int, int]) -> frozenset[Note]:
    is_counter = i in places and jnp.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.integer)
    return frozenset({Note("counter", i)}) if is_counter else frozenset()


def _check(walked: _Walked, traced: TracedStep, tables: set[int], chosen: set[int], lost: dict[int, str]) -> None:
    """Refuses what cannot be right on some rows."""
    plan, places, find = walked.plan, traced.places, walked.plan.find
    classes = {find(i) for i in chosen}
    across = "It looks across rows. Keep it for dense parameters, with optax.partition."
    for node, why in plan.refused.items():
        if find(node) in classes:
            raise refused(why, across)
    for i in tables:  # a gradient that went through what is not by row would reach its table as a whole array
        missing = [*lost.values(), *plan.whole_scatters]
        if missing and not any(find(n) == find(i) for n in plan.scatters.values()):
            raise refused(missing[0], across)
    for place in places.values():
        for note in sorted(notes_of(walked.outs[place])):
            if note.kind == "part sum":
                raise refused(f"state made of a sum over the rows of an update: {note.what}", across)
    for source in walked.kept_sums:
        raise refused(f"a sum over all rows of what is kept in the state: {source}", across)
    cyclic = {i for i, place in places.items() if Note("remainder", i) in notes_of(walked.outs[place])}
    for node, counter, source in plan.gates:
        if counter in cyclic and find(node) in classes:
            got = f"a counter that goes round, {traced.paths[counter]}, which decides when rows change, at {source}"
            do = "Rows that are read in other steps would miss it. For larger batches use a lax.scan inside the step."
            raise refused(got, do)
    if walked.needs_rows:
        raise refused("row ids that depend on rows that the step has changed", "Make the ids before the update.")
    for j, v in enumerate(walked.outs):
        if isinstance(v, Rows) and v.whole is None and j not in {places[i] for i in chosen}:
            got = f"output {j}, which has a row for each of a table's, and is not where a table or slot was"
            raise refused(got, "Return it as a part of the state, or not at all.")


def _check_reads(planned: Planned) -> None:
    """Ids must be known before the step; what is read after an update must have been read before it as well."""
    find = planned.plan.find
    if planned.ids.has_effects:  # it would happen twice
        raise refused("row ids that come from a callback or print", "Draw them before the step, and pass them in.")
    reads = list(zip(planned.reads, planned.ids.numbers, strict=True))
    early = {(find(r.node), number) for r, number in reads if r.late is False}
    for read, number in reads:
        if read.late and find(read.node) in planned.classes and (find(read.node), number) not in early:
            got = f"rows that are read after an update by other ids than before it, at {read.source}"
            raise refused(got, "These are several steps: put js.rowwise around each, or make it the body of the scan.")


_ANNOUNCED: set[str] = set()


def announce(planned: Planned) -> None:
    """Warns of what costs as much as a table, once for each line."""
    find, traced = planned.plan.find, planned.traced
    said = [f"{traced.paths[i]} is dense, with its slots: {why}." for i, why in planned.dense.items()]
    said += [f"{source} is over all rows of a table, which this step computes." for source in planned.plan.whole_sums]
    for node, source in planned.plan.made_whole:
        if find(node) in planned.classes:
            said.append(f"{source} makes an array with a row for each of a table's, of which few are used.")
    for source in planned.plan.part_sources:
        said.append(f"{source} is over the rows that are read: those that are left alone count nothing in it.")
    said += [f"output {j} is a copy of a whole table, or made of one." for j in planned.whole_outputs]
    if not planned.leaves:
        said.append("no array of the state is read by rows: the step costs what it does under jax.jit.")
    for line in (f"{traced.name}: {line}" for line in said):
        if line not in _ANNOUNCED:
            _ANNOUNCED.add(line)
            warnings.warn(line, stacklevel=3)
