"""Plans a step before it runs: which arrays share rows, what is refused, what is announced.

State arrays that are read by rows are tables. Arrays with a row for each row of a table that are combined with it
belong to it: slots, averages. Walks through the program, with stand-ins for the rows, find both, and what is not
done row by row. They are repeated until nothing changes.
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
from jaxsparse.trace.tracing import TracedStep, with_nonempty_shapes
from jaxsparse.trace.values import (
    ZERO,
    EqualRows,
    FullArray,
    Note,
    RefusedError,
    Rows,
    Value,
    notes_of,
    rows_of_leaf,
    rows_of_update,
)
from jaxsparse.trace.walk import Walk


def refused(got: str, do: str) -> RefusedError:
    must = "one that is right on the rows that it reads"
    return RefusedError(message("jit or js.rowwise", "step", must, got, do), got, do)


class NoStateError(RefusedError):
    """Raised if an output with a table's structure is not its new value, but its gradient for example."""

    def __init__(self, path: str) -> None:
        got = f"its gradient, or what is not made of its rows, in the place of {path or 'the table'}"
        do = "Return the new state, or use jax.jit."
        super().__init__(str(refused(got, do)), got, do)


@dataclasses.dataclass(frozen=True)
class Planned:
    """The plan of a program.

    Attributes:
      leaves: {input of which only some rows are computed: its class}.
      classes: {class: number of rows}.
      reads: the reads, in order.
      ids: computes the ids of the reads; its first inputs are those of the program.
      dense: {input that is read by rows but computed in full: the reason}.
      known: the inputs whose distinct ids come with the batch.
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
        """The reads of a class, each with the number of its array of ids. Equal arrays have equal numbers."""
        reads = zip(self.reads, self.ids.numbers, strict=True)
        return [(read, number) for read, number in reads if self.plan.find(read.node) == c]

    def ids_of(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The ids of all reads. `leaves` are all inputs."""
        return self.ids([as_whole(x) for x, used in zip(leaves, self.ids.used, strict=False) if used])


@dataclasses.dataclass(frozen=True)
class PlannedStep(Planned):
    """The plan of a step.

    Attributes:
      full_outputs: the outputs that are full tables, but not the new value of one.
      no_tables: leaves that are always computed in full, without a warning.
      warnings: further lines to announce.
    """

    traced: TracedStep
    full_outputs: list[int]
    no_tables: Collection[int] = ()
    warnings: Sequence[str] = ()

    def why_dense(self, i: int) -> tuple[Reason, str]:
        """Why a leaf of the state is computed in full, and what to write instead if it is or might be a table."""
        v = self.program.inputs[i]
        if (why := self.dense.get(i)) is not None:
            return why, advice_on_whole(self.program, v, why)
        found = None if i in self.no_tables else why_not_read(self.program, v)
        return found or (Reason("not read by rows", ""), "")


def plan_step(traced: TracedStep, leaves: Sequence[Any], no_tables: Collection[int] = ()) -> PlannedStep:
    """Finds which leaves of the state share which rows.

    Args:
      no_tables: leaves that are always computed in full.

    Raises:
      RefusedError: if the step cannot be right on some rows.
    """
    program, places = traced.program, traced.places
    candidates = {i for i, place in places.items() if _may_be_rows(program.inputs[i], program.outputs[place])}
    candidates -= set(no_tables)
    assumed_read: set[int] = set()
    if (nonempty := with_nonempty_shapes(leaves, places)) is not None:  # a batch without ids reads nothing, but would
        assumed_read = settle(traced.retrace(nonempty), nonempty, places, candidates).row_leaves
    settled = settle(program, leaves, places, candidates, assumed_read)
    walked, row_leaves, tables = settled.walked, settled.row_leaves, settled.tables
    for i in sorted(tables & row_leaves):
        v = walked.outs[places[i]]
        if isinstance(v, FullArray) or (isinstance(v, Rows) and v.updated and v.outside == ZERO):
            raise NoStateError(traced.paths[i])
    check(walked, places, traced.paths, tables & row_leaves, row_leaves, settled.lost_updates)
    full_outputs = [
        j for j, v in enumerate(walked.outs) if isinstance(v, Rows) and j not in {places[i] for i in row_leaves}
    ]
    planned = PlannedStep(**vars(settled.planned()), traced=traced, full_outputs=full_outputs, no_tables=no_tables)
    _check_reads(planned)
    return planned


class Settled(NamedTuple):
    """The result of `settle`: which leaves are Rows."""

    walked: Walked
    tables: set[int]  # leaves that are read by rows
    row_leaves: set[int]  # leaves that are Rows: tables and their slots
    dense_reasons: dict[int, Reason]  # why other candidates are not
    lost_updates: dict[int, Reason]  # why updates that reach no table are not

    def planned(self) -> Planned:
        program, plan = self.walked.program, self.walked.plan
        leaves = {i: plan.find(i) for i in sorted(self.row_leaves)}
        classes = {c: _jax.shape(program.inputs[i])[0] for i, c in leaves.items()}
        dense = {i: why for i, why in self.dense_reasons.items() if i in self.tables and why is not _ALONG_COLUMNS}
        return Planned(program, plan, leaves, classes, self.walked.reads, self.walked.ids, dense, [])


def settle(
    program: Program,
    leaves: Sequence[Any],
    places: dict[int, int],
    candidates: Collection[int],
    assumed_read: Collection[int] = (),
    *,
    updates: Mapping[int, Sequence[int]] | None = None,
    unfit_leaves: Callable[[Walked, set[int]], dict[int, Reason]] = lambda walked, row_leaves: {},
) -> Settled:
    """Walks through a program until it is known which leaves are Rows.

    Args:
      candidates: the leaves that may be Rows.
      assumed_read: the leaves that count as read by rows.
      updates: {leaf that is a gradient of some rows: leaves with the same rows}. All of them are Rows.
      unfit_leaves: a function of a walk and the leaves, why some of these cannot be Rows.
    """
    nodes: dict[Any, int] = {}
    tableless_scatters: frozenset[Any] = frozenset()
    candidates, updates = set(candidates), updates or {}
    gradient_leaves = {i for update, others in updates.items() for i in (update, *others)}

    def walk(row_leaves: set[int]) -> Walked:
        heights = frozenset(_jax.shape(program.inputs[i])[0] for i in row_leaves)
        plan = Plan(heights, tableless_scatters, nodes, len(leaves))
        return Walked(plan, program, leaves, row_leaves, places, updates)

    def slots_of(tables: set[int], walked: Walked, leaves: set[int], only_updated: bool = False) -> set[int]:
        """The leaves whose new values have the rows of a table."""
        find, outs = walked.plan.find, ((i, walked.outs[places[i]]) for i in leaves)
        rows = {i: v for i, v in outs if isinstance(v, Rows) and v.axis == 0 and (v.updated or not only_updated)}
        classes = {find(i) for i in tables}
        return {i for i, v in rows.items() if find(v.node) in classes}

    guessed_slots: set[int] = set()  # if they are right, that saves a walk
    if gradient_leaves:
        tables = gradient_leaves
    else:
        first = walk(candidates)
        tables = set(assumed_read) | candidates & first.plan.read  # read themselves, not only combined with tables
        guessed_slots = slots_of(tables, first, candidates, only_updated=True)
    row_leaves, dense_reasons, lost_updates = tables | guessed_slots, dict[int, Reason](), dict[int, Reason]()
    while True:
        walked = walk(row_leaves)
        plan, find = walked.plan, walked.plan.find
        reasons = {find(n): why for n, why in plan.not_by_row.items()}
        reasons |= {find(i): why for i, why in unfit_leaves(walked, row_leaves).items()}
        other_outs = ((i, walked.outs[place]) for i, place in places.items() if i not in row_leaves)
        reasons |= {find(v.node): _ALONG_COLUMNS for i, v in other_outs if isinstance(v, Rows) and v.axis != 0}
        named = {find(n) for n in (*plan.read, *assumed_read, *updates)}
        unread = Reason("not read by rows", "")
        without = {i for i in row_leaves if find(i) in reasons or find(i) not in named}
        new_reasons = {i: reasons.get(find(i), unread) for i in without}
        if new_reasons and guessed_slots:  # the guess may be the reason
            row_leaves, guessed_slots = set(tables), set()
            continue
        guessed_slots = set()
        dense_reasons |= new_reasons
        row_tables, dense = tables - set(dense_reasons), set(dense_reasons)
        with_table = {find(i) for i in row_tables}
        new_row_leaves = (row_leaves | slots_of(row_tables, walked, candidates - dense)) - dense
        new_tableless: frozenset[Any] = frozenset()
        if not new_reasons:  # of dense tables, or lost on the way
            lost_updates |= {n: why for n, why in plan.refused.items() if find(n) not in with_table}
            new_tableless = frozenset(path for path, n in plan.scatters.items() if find(n) not in with_table)
        if new_row_leaves == row_leaves and not new_tableless and not new_reasons:
            return Settled(walked, tables, row_leaves, dense_reasons, lost_updates)
        row_leaves, tableless_scatters = new_row_leaves, tableless_scatters | new_tableless


# for example the bias of a layer of whose outputs an example reads one: its "rows" are columns of the layer's weights
_ALONG_COLUMNS = Reason("another array of the state has its rows along another axis", "")


def _may_be_rows(v: Any, out: Any) -> bool:
    """Whether a leaf of the state has rows, and its new value has its shape and dtype."""
    shape, dtype = _jax.shape(v), _jax.dtype(v)
    numbers = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    return len(shape) > 0 and shape[0] > 1 and numbers and (_jax.shape(out), _jax.dtype(out)) == (shape, dtype)


class Walked:
    """A planning walk in which the leaves `row_leaves` are Rows: its plan, outputs, reads and their ids."""

    def __init__(
        self,
        plan: Plan,
        program: Program,
        leaves: Sequence[Any],
        row_leaves: set[int],
        places: dict[int, int],
        updates: Mapping[int, Sequence[int]],
    ) -> None:
        self.plan, self.program = plan, program
        for update, other in ((i, j) for i, others in updates.items() for j in others):
            plan.unify(update, other)
        stand_ins = [_stand_in(x) if i in row_leaves else None for i, x in enumerate(leaves)]

        def ids_of_reads(leaves: list[Any], stand_ins: list[Any], for_ids: Any) -> list[Any]:
            walk = Walk(plan, stand_ins=for_ids)
            values = [
                FullArray(x, _notes_of_leaf(i, x, places))
                if s is None
                else rows_of_update(s, i)
                if i in updates
                else rows_of_leaf(s, i, x)
                for i, (x, s) in enumerate(zip(leaves, stand_ins, strict=True))
            ]
            outs = walk.run(program, values)
            for i, place in places.items():  # the new value of a leaf has the leaf's rows
                v = outs[place]
                if i in row_leaves and isinstance(v, Rows):
                    plan.unify(i, v.node)
                    if v.axis != 0:
                        plan.not_by_row.setdefault(i, Reason("it is returned with its rows along another axis", ""))
            kept = [v.first for v in (outs[place] for place in places.values()) if isinstance(v, Rows)]
            self.state_sums = [source for rows, source in plan.update_sums if any(rows.first is x for x in kept)]
            self.update_sums = [(rows.node, source) for rows, source in plan.update_sums]
            plan.update_sums.clear()
            self.outs = [_without_arrays(v) for v in outs]
            self.reads = [read for read, _ in walk.reads]
            return [ids for _, ids in walk.reads]

        self.ids = _jax.Needed(ids_of_reads, (list(leaves), stand_ins, jax.ShapeDtypeStruct((_BLOCK,), jnp.int32)))
        self.needs_rows = any(self.ids.used[len(leaves) :])


def _without_arrays(v: Value) -> Value:
    """A value without its arrays, which are of no use after the trace."""
    if isinstance(v, Rows):
        return Rows(None, v.node, v.axis, v.outside, v.updated, None if v.full is None else lambda walk: None)
    if isinstance(v, EqualRows):
        return dataclasses.replace(v, data=None)
    return FullArray(None, notes_of(v))


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
    row_leaves: set[int],
    lost_updates: dict[int, Reason],
) -> None:
    """Raises RefusedError for what cannot be right on some rows. Args are as in `settle` and `Settled`."""
    plan, find = walked.plan, walked.plan.find
    classes = {find(i) for i in row_leaves}
    across = "It looks across rows, as LAMB, LARS and Adafactor do. Keep it for dense parameters, with "
    across += "optax.partition, and give tables an optimizer that does not, such as optax.adamw. Of a metric of "
    across += "gradients, sums, means, norms, max and min over rows work: make others of js.grad's rows."
    for node, why in plan.refused.items():
        if find(node) in classes:
            raise refused(str(why), across)
    for i in tables:  # a gradient that is not by row would reach its table as a full array
        missing = [*lost_updates.values(), *plan.table_sized_scatters]
        if missing and not any(find(n) == find(i) for n in plan.scatters.values()):
            raise refused(str(missing[0]), across)
    for place in places.values():
        for note in sorted(notes_of(walked.outs[place])):
            if note.kind == "update sum":
                raise refused(f"state made of a sum over the rows of an update: {note.what}", across)
    for source in walked.state_sums:
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
        if isinstance(v, Rows) and v.full is None and j not in {places.get(i) for i in row_leaves}:
            variables = walked.program.inputs[leaf_at.get(j, 0)], walked.program.outputs[j]
            before, after = map(_jax.dtype, variables)
            if j in leaf_at and before != after:
                do = "Cast gradients to their parameters' dtype, or make the optimizer's state in the wider one."
                raise refused(f"{paths[leaf_at[j]]}, which is {before} and comes back as {after}", do)
            got = f"output {j}, which has a row for each of a table's, and is not where a table or slot was"
            raise refused(got, "Return it as a part of the state, or not at all.")


def _check_reads(planned: PlannedStep) -> None:
    """Raises unless ids are known before the step, and rows read after an update are also read before it."""
    find = planned.plan.find
    if planned.ids.has_effects:  # the effect would happen twice
        raise refused("row ids that come from a callback or print", "Draw them before the step, and pass them in.")
    reads = list(zip(planned.reads, planned.ids.numbers, strict=True))
    early = {(find(r.node), number) for r, number in reads if r.after_update is False}
    for read, number in reads:
        if read.after_update and find(read.node) in planned.classes and (find(read.node), number) not in early:
            got = f"rows that are read after an update by other ids than before it, at {read.source}"
            raise refused(got, "These are several steps: put js.rowwise around each, or make it the body of the scan.")


_ANNOUNCED: set[str] = set()


def announce(planned: PlannedStep) -> None:
    """Warns, once for each line, of what costs as much as a table."""
    traced = planned.traced
    why_dense = {i: planned.why_dense(i) for i in sorted(traced.places.keys() - planned.leaves.keys())}
    lines = [
        f"{traced.paths[i] or 'the state'} is dense, with its slots: {why}. {advice}".rstrip()
        for i, (why, advice) in why_dense.items()
        if i in planned.dense or advice
    ]
    lines += planned.warnings
    lines += [f"output {j} is a copy of a whole table, or made of one." for j in planned.full_outputs]
    if not traced.places:
        do = "return the new state, in the structure that it was given, or leave this function to jax.jit."
        lines.append(f"no argument comes back as an output, so that nothing is updated on its rows: {do}")
    elif not planned.leaves:
        lines.append("no array of the state is read by rows: the step costs what it does under jax.jit.")
    warn_once(traced.name, planned, lines)


def warn_once(name: str, planned: Planned, lines: Sequence[str] = ()) -> None:
    """Warns, once each, of these lines and of what a program computes for all rows of a table."""
    plan, lines = planned.plan, list(lines)
    lines += [f"{source} is over all rows of a table, which this step computes." for source in plan.table_sums]
    few = "makes an array with a row for each of a table's, of which few are used."
    lines += [f"{source} {few}" for node, source in plan.table_sized_arrays if plan.find(node) in planned.classes]
    counted = "is over the rows that are read: those that are left alone count nothing in it."
    lines += [f"{source} {counted}" for source in plan.update_sum_sources]
    for line in (f"{name}: {line}" for line in lines):
        if line not in _ANNOUNCED:
            _ANNOUNCED.add(line)
            warn(line)
