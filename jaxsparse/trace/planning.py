"""What is known of a step before it runs: which arrays share which rows, what is refused, what is announced.

Arrays of the state that are read by rows are tables. Other arrays with a row for each of a table's rows that meet it
belong to it: slots, averages. Walks through the program with stand-ins for the rows find these, and what is not by
row, until nothing changes any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message, warn
from jaxsparse._jax import Program
from jaxsparse.ops.rows import as_whole
from jaxsparse.trace.dense import advice_on_whole, why_not_read
from jaxsparse.trace.known_ids import Known
from jaxsparse.trace.plan import Plan, Read, Reason
from jaxsparse.trace.tracing import TracedStep, without_zeros
from jaxsparse.trace.values import (
    ZERO,
    Note,
    RefusedError,
    Rows,
    Same,
    Value,
    Whole,
    notes_of,
    rows_of_leaf,
    rows_of_update,
)
from jaxsparse.trace.walk import Walk


def refused(got: str, do: str) -> RefusedError:
    must = "one that is right on the rows that it reads"
    return RefusedError(message("jit or js.rowwise", "step", must, got, do), got, do)


class NoStateError(RefusedError):
    """What comes back in the structure of a table is its gradient, or something else that is not made of its rows."""

    def __init__(self, path: str) -> None:
        got = f"its gradient, or what is not made of its rows, in the place of {path or 'the table'}"
        do = "Return the new state, or use jax.jit."
        super().__init__(str(refused(got, do)), got, do)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is known of a program before it runs.

    Attributes:
      leaves: the inputs of which only some rows are computed, with their class.
      classes: the number of rows of each class.
      reads: the reads, in order.
      ids: evaluates the ids of the reads; its first inputs are the program's.
      dense: inputs that are read by rows, and computed as a whole all the same, with the reason.
      known: inputs whose distinct ids are given beside them.
    """

    program: Program
    plan: Plan
    leaves: dict[int, int]
    classes: dict[int, int]
    reads: list[Read]
    ids: _jax.Needed
    dense: dict[int, Reason]
    known: list[Known]

    def reads_in(self, c: int) -> list[tuple[Read, int]]:
        """The reads of a class, each with the number of the array of its ids, which is equal for equal ones."""
        reads = zip(self.reads, self.ids.numbers, strict=True)
        return [(read, number) for read, number in reads if self.plan.find(read.node) == c]

    def ids_of(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The ids of the reads, given all inputs."""
        return self.ids([as_whole(x) for x, used in zip(leaves, self.ids.used, strict=False) if used])


@dataclasses.dataclass(frozen=True)
class PlannedStep(Planned):
    """Of a step.

    Attributes:
      whole_outputs: outputs that are whole tables, and not where these stood.
      no_tables: leaves that are whole in any case, which is no news.
      said: what else is to be announced.
    """

    traced: TracedStep
    whole_outputs: list[int]
    no_tables: Collection[int] = ()
    said: Sequence[str] = ()

    def why_dense(self, i: int) -> tuple[Reason, str]:
        """Why a leaf of the state is computed as a whole, and what to write instead, if it is a table or might be."""
        v = self.program.inputs[i]
        if (why := self.dense.get(i)) is not None:
            return why, advice_on_whole(self.program, v, why)
        found = None if i in self.no_tables else why_not_read(self.program, v)
        return found or (Reason("not read by rows", ""), "")


def plan_step(traced: TracedStep, leaves: Sequence[Any], no_tables: Collection[int] = ()) -> PlannedStep:
    """Finds out which leaves of the state share which rows.

    Args:
      no_tables: leaves that are whole in any case.

    Raises:
      RefusedError: if the step cannot be right on some rows.
    """
    program, places = traced.program, traced.places
    can = {i for i, place in places.items() if _may_be_rows(program.inputs[i], program.outputs[place])}
    can -= set(no_tables)
    would: set[int] = set()
    if (filled := without_zeros(leaves, places)) is not None:  # a batch without ids reads nothing, but would
        would = settle(traced.again(filled), filled, places, can).chosen
    settled = settle(program, leaves, places, can, would)
    walked, chosen, tables = settled.walked, settled.chosen, settled.tables
    for i in sorted(tables & chosen):
        v = walked.outs[places[i]]
        if isinstance(v, Whole) or (isinstance(v, Rows) and v.updated and v.outside == ZERO):
            raise NoStateError(traced.paths[i])
    check(walked, places, traced.paths, tables & chosen, chosen, settled.lost)
    whole = [j for j, v in enumerate(walked.outs) if isinstance(v, Rows) and j not in {places[i] for i in chosen}]
    planned = PlannedStep(**vars(settled.planned()), traced=traced, whole_outputs=whole, no_tables=no_tables)
    _check_reads(planned)
    return planned


class Settled(NamedTuple):
    """Which leaves are Rows, when nothing changes any more."""

    walked: Walked
    tables: set[int]  # leaves that are read themselves
    chosen: set[int]  # and what belongs to them
    banned: dict[int, Reason]  # why leaves are not
    lost: dict[int, Reason]  # why updates of no table are not

    def planned(self) -> Planned:
        program, plan = self.walked.program, self.walked.plan
        leaves = {i: plan.find(i) for i in sorted(self.chosen)}
        classes = {c: _jax.shape(program.inputs[i])[0] for i, c in leaves.items()}
        dense = {i: why for i, why in self.banned.items() if i in self.tables and why is not _ALONG_COLUMNS}
        return Planned(program, plan, leaves, classes, self.walked.reads, self.walked.ids, dense, [])


def settle(
    program: Program,
    leaves: Sequence[Any],
    places: dict[int, int],
    can: Collection[int],
    would: Collection[int] = (),
    *,
    updates: Mapping[int, Sequence[int]] | None = None,
    unfit: Callable[[Walked, set[int]], dict[int, Reason]] = lambda walked, chosen: {},
) -> Settled:
    """Walks through a program until it is known which leaves are Rows.

    Args:
      can: the leaves that may be.
      would: those that are, whether they are read or not.
      updates: those that are, as the gradient of some rows, each with others that have its rows.
      unfit: further reasons of a walk why chosen leaves cannot be Rows.
    """
    nodes: dict[Any, int] = {}
    loose: frozenset[Any] = frozenset()
    can, updates = set(can), updates or {}
    given = {i for update, others in updates.items() for i in (update, *others)}

    def walk(chosen: set[int]) -> Walked:
        heights = frozenset(_jax.shape(program.inputs[i])[0] for i in chosen)
        return Walked(Plan(heights, loose, nodes, len(leaves)), program, leaves, chosen, places, updates)

    def beside(tables: set[int], walked: Walked, leaves: set[int], only_updated: bool = False) -> set[int]:
        """Leaves whose new values have the rows of a table."""
        find, outs = walked.plan.find, ((i, walked.outs[places[i]]) for i in leaves)
        rows = {i: v for i, v in outs if isinstance(v, Rows) and v.axis == 0 and (v.updated or not only_updated)}
        classes = {find(i) for i in tables}
        return {i for i, v in rows.items() if find(v.node) in classes}

    guess: set[int] = set()  # of what belongs to the tables, which saves a walk where it is right
    if given:
        tables = given
    else:
        first = walk(can)
        tables = set(would) | can & first.plan.read  # read themselves, not only joined to what is
        guess = beside(tables, first, can, only_updated=True)
    chosen, banned, lost = tables | guess, dict[int, Reason](), dict[int, Reason]()
    while True:
        walked = walk(chosen)
        plan, find = walked.plan, walked.plan.find
        reasons = {find(n): why for n, why in plan.not_by_row.items()}
        reasons |= {find(i): why for i, why in unfit(walked, chosen).items()}
        elsewhere = ((i, walked.outs[place]) for i, place in places.items() if i not in chosen)
        reasons |= {find(v.node): _ALONG_COLUMNS for i, v in elsewhere if isinstance(v, Rows) and v.axis != 0}
        named = {find(n) for n in (*plan.read, *would, *updates)}
        unread = Reason("not read by rows", "")
        now = {i: reasons.get(find(i), unread) for i in chosen if find(i) in reasons or find(i) not in named}
        if now and guess:  # which may be the reason
            chosen, guess = set(tables), set()
            continue
        guess = set()
        banned |= now
        with_table = {find(i) for i in tables - set(banned)}
        new = (chosen | beside(tables - set(banned), walked, can - set(banned))) - set(banned)
        loose_now: frozenset[Any] = frozenset()
        if not now:  # scatters that reach no table as rows: of dense tables, or lost on the way
            lost |= {n: why for n, why in plan.refused.items() if find(n) not in with_table}
            loose_now = frozenset(path for path, n in plan.scatters.items() if find(n) not in with_table)
        if new == chosen and not loose_now and not now:
            return Settled(walked, tables, chosen, banned, lost)
        chosen, loose = new, loose | loose_now


# of the bias of a layer, say, of whose outputs an example reads one: its "rows" are the columns of the layer's weights
_ALONG_COLUMNS = Reason("another array of the state has its rows along another axis", "")


def _may_be_rows(v: Any, out: Any) -> bool:
    """Whether a leaf of the state has rows, and becomes an array like itself."""
    shape, dtype = _jax.shape(v), _jax.dtype(v)
    numbers = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    return len(shape) > 0 and shape[0] > 1 and numbers and (_jax.shape(out), _jax.dtype(out)) == (shape, dtype)


class Walked:
    """A planning walk, in which `chosen` leaves are Rows: its plan, the values of its outputs, and its ids."""

    def __init__(
        self,
        plan: Plan,
        program: Program,
        leaves: Sequence[Any],
        chosen: set[int],
        places: dict[int, int],
        updates: Mapping[int, Sequence[int]],
    ) -> None:
        self.plan, self.program = plan, program
        for update, other in ((i, j) for i, others in updates.items() for j in others):
            plan.unify(update, other)
        stand_ins = [_stand_in(x) if i in chosen else None for i, x in enumerate(leaves)]

        def ids_of_reads(leaves: list[Any], stand_ins: list[Any], for_ids: Any) -> list[Any]:
            walk = Walk(plan, stand_ins=for_ids)
            values = [
                Whole(x, _notes_of_leaf(i, x, places))
                if s is None
                else rows_of_update(s, i)
                if i in updates
                else rows_of_leaf(s, i, x)
                for i, (x, s) in enumerate(zip(leaves, stand_ins, strict=True))
            ]
            outs = walk.run(program, values)
            for i, place in places.items():  # what stands at a leaf's place has its rows
                v = outs[place]
                if i in chosen and isinstance(v, Rows):
                    plan.unify(i, v.node)
                    if v.axis != 0:
                        plan.not_by_row.setdefault(i, Reason("it is returned with its rows along another axis", ""))
            kept = [v.first for v in (outs[place] for place in places.values()) if isinstance(v, Rows)]
            self.kept_sums = [source for rows, source in plan.part_sums if any(rows.first is other for other in kept)]
            self.part_sums = [(rows.node, source) for rows, source in plan.part_sums]
            plan.part_sums.clear()
            self.outs = [_without_arrays(v) for v in outs]
            self.reads = [read for read, _ in walk.reads]
            return [ids for _, ids in walk.reads]

        self.ids = _jax.Needed(ids_of_reads, (list(leaves), stand_ins, jax.ShapeDtypeStruct((_BLOCK,), jnp.int32)))
        self.needs_rows = any(self.ids.used[len(leaves) :])


def _without_arrays(v: Value) -> Value:
    """What is known of a value, for after the trace."""
    if isinstance(v, Rows):
        return Rows(None, v.node, v.axis, v.outside, v.updated, None if v.whole is None else lambda walk: None)
    if isinstance(v, Same):
        return dataclasses.replace(v, made=None)
    return Whole(None, notes_of(v))


_BLOCK = 3  # rows of a stand-in


def _stand_in(x: Any) -> Any:
    shape, axes = (_BLOCK, *x.shape[1:]), _jax.varying_axes(x)
    return _jax.vary(jnp.zeros(shape, x.dtype), axes) if axes else jax.ShapeDtypeStruct(shape, x.dtype)


def _notes_of_leaf(i: int, x: Any, places: dict[int, int]) -> frozenset[Note]:
    is_counter = i in places and jnp.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.integer)
    return frozenset({Note("counter", i)}) if is_counter else frozenset()


def check(
    walked: Walked,
    places: dict[int, int],
    paths: dict[int, str],
    tables: set[int],
    chosen: set[int],
    lost: dict[int, Reason],
) -> None:
    """Refuses what cannot be right on some rows. The other args are as of `settle` and `Settled`."""
    plan, find = walked.plan, walked.plan.find
    classes = {find(i) for i in chosen}
    across = (
        "It looks across rows, as LAMB, LARS and Adafactor do. Keep it for dense parameters, with optax.partition, "
    )
    across += "and give tables an optimizer that does not, such as optax.adamw."
    for node, why in plan.refused.items():
        if find(node) in classes:
            raise refused(str(why), across)
    for i in tables:  # a gradient that went through what is not by row would reach its table as a whole array
        missing = [*lost.values(), *plan.whole_scatters]
        if missing and not any(find(n) == find(i) for n in plan.scatters.values()):
            raise refused(str(missing[0]), across)
    for place in places.values():
        for note in sorted(notes_of(walked.outs[place])):
            if note.kind == "part sum":
                raise refused(f"state made of a sum over the rows of an update: {note.what}", across)
    for source in walked.kept_sums:
        raise refused(f"a sum over all rows of what is kept in the state: {source}", across)
    cyclic = {i for i, place in places.items() if Note("remainder", i) in notes_of(walked.outs[place])}
    for node, counter, source in plan.gates:
        if counter in cyclic and find(node) in classes:
            got = f"a counter that goes round, {paths[counter]}, which decides when rows change, at {source}"
            do = "Rows that are read in other steps would miss it. For larger batches use a lax.scan inside the step."
            raise refused(got, do)
    if walked.needs_rows:
        raise refused("row ids that depend on rows that the step has changed", "Make the ids before the update.")
    leaf_at = {place: i for i, place in places.items()}
    for j, v in enumerate(walked.outs):
        if isinstance(v, Rows) and v.whole is None and j not in {places.get(i) for i in chosen}:
            before, after = (
                _jax.dtype(x) for x in (walked.program.inputs[leaf_at.get(j, 0)], walked.program.outputs[j])
            )
            if j in leaf_at and before != after:
                do = "Cast gradients to their parameters' dtype, or make the optimizer's state in the wider one."
                raise refused(f"{paths[leaf_at[j]]}, which is {before} and comes back as {after}", do)
            got = f"output {j}, which has a row for each of a table's, and is not where a table or slot was"
            raise refused(got, "Return it as a part of the state, or not at all.")


def _check_reads(planned: PlannedStep) -> None:
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


def announce(planned: PlannedStep) -> None:
    """Warns of what costs as much as a table, once for each line."""
    traced = planned.traced
    why_dense = {i: planned.why_dense(i) for i in sorted(traced.places.keys() - planned.leaves.keys())}
    said = [
        f"{traced.paths[i] or 'the state'} is dense, with its slots: {why}. {advice}".rstrip()
        for i, (why, advice) in why_dense.items()
        if i in planned.dense or advice
    ]
    said += planned.said
    said += [f"output {j} is a copy of a whole table, or made of one." for j in planned.whole_outputs]
    if not traced.places:
        do = "return the new state, in the structure that it was given, or leave this function to jax.jit."
        said.append(f"no argument comes back as an output, so that nothing is updated on its rows: {do}")
    elif not planned.leaves:
        said.append("no array of the state is read by rows: the step costs what it does under jax.jit.")
    warn_once(traced.name, planned, said)


def warn_once(name: str, planned: Planned, said: Sequence[str] = ()) -> None:
    """Warns of these lines, and of what a program computes for all rows of a table, once for each line."""
    find, said = planned.plan.find, list(said)
    said += [f"{source} is over all rows of a table, which this step computes." for source in planned.plan.whole_sums]
    for node, source in planned.plan.made_whole:
        if find(node) in planned.classes:
            said.append(f"{source} makes an array with a row for each of a table's, of which few are used.")
    counted = "is over the rows that are read: those that are left alone count nothing in it."
    said += [f"{source} {counted}" for source in planned.plan.part_sources]
    for line in (f"{name}: {line}" for line in said):
        if line not in _ANNOUNCED:
            _ANNOUNCED.add(line)
            warn(line)
