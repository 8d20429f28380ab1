"""`rowwise`: a whole train step, as it is, evaluated on the rows that it reads.

1. The step is traced at full shapes, so that all that Python does with shapes is right.
2. Arrays of the state that are read by rows are tables. What else of the state has a row for each of a table's rows,
   and meets it, belongs to it: slots, averages. Which those are, and what is not done row by row, comes out of walks
   through the program with stand-ins for the rows, until nothing changes any more (`plan_step`).
3. The same walk has seen the row ids of all reads. Cut down to what they need, it is a program of its own, and its
   result, sorted and without repeats, is the rows of each table (`choose_rows`).
4. Their blocks are gathered, the program is evaluated on them, and what stands where a table or slot stood is written
   back (`evaluate`). All other rows keep their bits.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._jax import Program
from jaxsparse.rows import compact, computed_once, copy_rows, scatter_rows, zero_after
from jaxsparse.values import Note, RefusedError, Rows, Whole, array_of, notes_of
from jaxsparse.walk import Plan, Read, Space, Walk


def rowwise(step: Callable[..., Any], *, state_argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """A train step that does what `step` does on the rows that it reads, and leaves all other rows alone.

    It is for use inside of jax.jit, jax.pmap, jax.shard_map, or as the body of a jax.lax.scan over batches; `js.jit`
    compiles as well. Donate the state, or it is copied at each step. What is row-sparse, and what is refused, is
    described with `js.jit`.

    Args:
      step: step(state, ...) -> state, or (state, ...): any pytrees, and any optax transformation.
      state_argnums: which arguments are state. Each of them is an output of the step, alone or in a tuple in the order
        of the arguments.

    Returns:
      A function of the step's arguments that returns what the step returns.

    Raises:
      ValueError: if the step cannot be right on the rows that it reads, with its line.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = optax.adam(0.1)
      >>> def step(state, ids):
      ...     table, opt_state = state
      ...     gradient = jax.grad(lambda table: jnp.sum(table[ids] ** 2))(table)
      ...     updates, opt_state = tx.update(gradient, opt_state, table)
      ...     return optax.apply_updates(table, updates), opt_state
      >>> table = jnp.ones((4, 1))
      >>> batches = jnp.array([[0, 1], [1, 1]])
      >>> body = lambda state, ids: (js.rowwise(step)(state, ids), 0)
      >>> (table, _), _ = jax.lax.scan(body, (table, tx.init(table)), batches)
      >>> [round(x, 2) for x in table.ravel().tolist()]  # row 0 was read by one batch, row 1 by both
      [0.9, 0.8, 1.0, 1.0]
    """

    @functools.wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        traced = trace_step(step, args, kwargs, state_argnums)
        planned = plan_step(traced, traced.leaves)
        announce(planned)
        if planned.ids.has_effects:
            raise refused("row ids that come from a callback or print", "Draw them before the step, and pass them in.")
        ids = planned.ids([x for x, used in zip(traced.leaves, planned.ids.used, strict=False) if used])
        spaces = {c: choose_rows(planned, c, ids) for c in planned.classes}
        return traced.unflatten(evaluate(planned, traced.leaves, spaces))

    return run


def refused(got: str, do: str) -> RefusedError:
    return RefusedError(message("rowwise", "step", "one that is right on the rows that it reads", got, do))


# ---------------------------------------------------------------------------------------------------------------------
# trace


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step's program, whose inputs are the leaves of its arguments.

    Attributes:
      places: for a leaf of the state, by its number, the number of the output that it becomes.
      donated: the leaves of all arguments that are given as state.
      paths: of these.
    """

    program: Program
    leaves: list[Any]
    places: dict[int, int]
    donated: set[int]
    paths: dict[int, str]
    unflatten: Callable[[list[Any]], Any]
    again: Callable[[list[Any]], Program]  # traced at other shapes


def trace_step(step: Callable[..., Any], args: Any, kwargs: Any, state_argnums: int | Sequence[int]) -> TracedStep:
    numbers = [state_argnums] if isinstance(state_argnums, int) else list(state_argnums)
    for n in numbers:
        if not -len(args) <= n < len(args):
            do = "Pass it by position."
            must = f"positions among the {len(args)} positional arguments"
            raise TypeError(message("rowwise", "state_argnums", must, n, do))
    numbers = [n % len(args) for n in numbers]
    leaves, tree = jax.tree.flatten((args, kwargs))
    out_tree: list[Any] = []

    def flat_step(*leaves: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(tree, leaves)
        out = step(*args, **kwargs)
        out_leaves, out_tree[:] = jax.tree.flatten(out)[0], [jax.tree.structure(out)]
        out_tree.append(out)
        return out_leaves

    program = _jax.trace(flat_step, *leaves)
    structure, out = out_tree
    out = jax.tree.unflatten(structure, range(structure.num_leaves))
    starts = [len(jax.tree.leaves(args[:n])) for n in range(len(args))]
    with_paths = jax.tree_util.tree_flatten_with_path(args)[0]
    donated = [i for n in numbers for i in range(starts[n], starts[n] + len(jax.tree.leaves(args[n])))]
    places: dict[int, int] = {}
    for n, found in _states_in(out, {n: args[n] for n in numbers}).items():
        places.update((starts[n] + i, place) for i, place in enumerate(jax.tree.leaves(found)))
    return TracedStep(
        program,
        leaves,
        places,
        set(donated),
        {i: jax.tree_util.keystr(with_paths[i][0][1:]) for i in donated},
        lambda outs: jax.tree.unflatten(structure, outs),
        lambda leaves: _jax.trace(flat_step, *leaves),
    )


def _states_in(out: Any, states: dict[int, Any]) -> dict[int, Any]:
    """The parts of a step's output that are the new states, by the argument's number."""
    wanted = {n: jax.tree.structure(state) for n, state in states.items()}
    if len(states) == 1 and [jax.tree.structure(out)] == list(wanted.values()):
        return dict.fromkeys(states, out)
    parts = list(out) if isinstance(out, tuple) else [out]
    found = {}
    for n, structure in wanted.items():
        at = next((i for i, part in enumerate(parts) if jax.tree.structure(part) == structure), None)
        if at is not None:
            found[n], parts = parts[at], parts[at + 1 :]
    if not found:
        must = "one that returns its new state, or a tuple with it, in the structure that it was given"
        do = "Name the arguments that are state with donate_argnums (js.jit) or state_argnums (js.rowwise)."
        raise TypeError(message("rowwise", "step", must, f"no output like {list(wanted.values())}", do))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# plan


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is known of a step before it runs.

    Attributes:
      leaves: the leaves of the state of which only some rows are computed, with their class.
      classes: the number of rows of each class.
      reads: the reads, in order.
      ids: evaluates the ids of the reads; its first inputs are the leaves of the arguments.
      dense: the tables that are not row-sparse, with the reason.
    """

    traced: TracedStep
    plan: Plan
    leaves: dict[int, int]
    classes: dict[int, int]
    reads: list[Read]
    ids: _jax.Needed
    dense: dict[int, str]


def plan_step(traced: TracedStep, leaves: Sequence[Any]) -> Planned:
    """Finds out which leaves of the state share which rows.

    Raises:
      RefusedError: if the step cannot be right on some rows.
    """
    program, places = traced.program, traced.places
    shapes = [_jax.shape(v) for v in program.inputs]
    can = {i for i, place in places.items() if _may_be_rows(program.inputs[i], program.outputs[place])}
    nodes: dict[Any, int] = {}
    loose: frozenset[Any] = frozenset()

    def walk(chosen: set[int], program: Program = program, leaves: Sequence[Any] = leaves) -> _Walked:
        heights = frozenset(shapes[i][0] for i in chosen)
        plan = Plan(heights, loose, nodes, first_node=len(shapes))
        return _Walked(plan, program, leaves, chosen, places)

    # read themselves, not only joined to what is; a batch without ids reads nothing, but would
    tables = can & walk(can).plan.read
    if (filled := _without_zeros(leaves, places)) is not None:
        again = traced.again(filled)
        tables |= can & walk(can, again, filled).plan.read
    chosen, banned, lost = set(tables), dict[int, str](), dict[int, str]()
    while True:
        walked = walk(chosen)
        plan = walked.plan
        find = plan.find
        reasons = {find(n): why for n, why in plan.not_by_row.items()}
        named = {find(n) for n in plan.read} | {find(i) for i in tables}
        now = {i: reasons.get(find(i), "") for i in chosen if find(i) in reasons or find(i) not in named}
        banned |= now
        with_table = {find(i) for i in tables - set(banned)}
        grown = set()
        for i in can - set(banned):
            out = walked.outs[places[i]]
            if isinstance(out, Rows) and find(out.node) in with_table:
                grown.add(i)
        new = (chosen | grown) - set(banned)
        loose_now: frozenset[Any] = frozenset()
        if not now:  # scatters that reach no table as rows: of dense tables, or lost on the way
            lost |= {n: why for n, why in plan.refused.items() if find(n) not in with_table}
            loose_now = frozenset(path for path, n in plan.scatters.items() if find(n) not in with_table)
        if new == chosen and not loose_now and not now:
            break
        chosen, loose = new, loose | loose_now
    _check(walked, traced, tables & chosen, chosen, lost)
    classes = {plan.find(i): shapes[i][0] for i in chosen}
    planned = Planned(
        traced,
        plan,
        {i: plan.find(i) for i in sorted(chosen)},
        classes,
        walked.reads,
        walked.ids,
        {i: why for i, why in banned.items() if i in tables},
    )
    _check_reads(planned)
    walked.forget()
    return planned


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
                Whole(x, _notes_of_leaf(i, x, places)) if s is None else Rows(s, i, whole=lambda x=x: x)
                for i, (x, s) in enumerate(zip(leaves, stand_ins, strict=True))
            ]
            self.outs = walk.run(program, values)
            self.inputs = values
            self.reads = [read for read, _ in walk.reads]
            return [ids for _, ids in walk.reads]

        self.ids = _jax.Needed(ids_of_reads, (list(leaves), stand_ins))
        self.needs_rows = any(self.ids.used[len(leaves) :])

    def forget(self) -> None:
        """What belonged to the trace."""
        self.plan.part_sums.clear()
        del self.outs, self.inputs


def _stand_in(x: Any) -> jax.Array:
    return _jax.vary(jnp.zeros((3, *x.shape[1:]), x.dtype), _jax.varying_axes(x))


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
        if lost and not any(find(n) == find(i) for n in plan.scatters.values()):
            raise refused(next(iter(lost.values())), across)
    kept = [walked.outs[place] for place in places.values()]
    kept_rows = [v.first for v in kept if isinstance(v, Rows)]
    for v in kept:
        for note in sorted(notes_of(v)):
            if note.kind == "part sum":
                raise refused(f"state made of a sum over the rows of an update: {note.what}", across)
    for rows, source in plan.part_sums:
        if any(rows.first is other for other in kept_rows):
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
    """Rows that are read after an update must have been read before it as well: others are another step's."""
    find = planned.plan.find
    reads = list(zip(planned.reads, planned.ids.numbers, strict=True))
    early = {(find(r.node), number) for r, number in reads if r.late is False}
    for read, number in reads:
        if read.late and find(read.node) in planned.classes and (find(read.node), number) not in early:
            got = f"rows that are read after an update by other ids than before it, at {read.source}"
            raise refused(got, "These are several steps: put js.rowwise around each, or make it the body of the scan.")


_ANNOUNCED: set[str] = set()


def announce(planned: Planned) -> None:
    """Warns of what costs as much as a table, once for each line."""
    find, paths = planned.plan.find, planned.traced.paths
    said = [
        f"{paths[i]} is dense, with its slots: {why or 'it is not read by rows'}." for i, why in planned.dense.items()
    ]
    said += [f"{source} is over all rows of a table, which this step computes." for source in planned.plan.whole_sums]
    for node, source in planned.plan.made_whole:
        if find(node) in planned.classes:
            said.append(f"{source} makes an array with a row for each of a table's, of which few are used.")
    if not planned.leaves:
        said.append("No array of the state is read by rows in this step: it costs what it does under jax.jit.")
    for line in said:
        if line not in _ANNOUNCED:
            _ANNOUNCED.add(line)
            warnings.warn(line, stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# run


def reads_of(planned: Planned, c: int) -> dict[int, bool]:
    """For a class, the numbers of its distinct arrays of ids, and whether some read of each is clipped."""
    found: dict[int, bool] = {}
    for read, number in zip(planned.reads, planned.ids.numbers, strict=True):
        if planned.plan.find(read.node) == c:
            found[number] = found.get(number, False) or read.clipped
    return found


def choose_rows(planned: Planned, c: int, ids: list[jax.Array]) -> Space:
    """The distinct rows of a class that these ids of all reads name."""
    num_rows, parts = planned.classes[c], []
    by_number = dict(zip(planned.ids.numbers, ids, strict=True))
    for number, clipped in reads_of(planned, c).items():
        x = by_number[number]
        nobody = x == jnp.iinfo(jnp.int32).max
        inside = jnp.clip(x, 0, num_rows - 1) if clipped else x
        parts.append(jnp.where(nobody | (inside < 0) | (inside >= num_rows), num_rows, inside))
    everything = jnp.concatenate([jnp.zeros(0, jnp.int32), *parts])
    axes = {axis for node, axes in planned.plan.axes.items() if planned.plan.find(node) == c for axis in axes}
    for axis in sorted(axes, key=str):
        everything = _jax.all_gather(everything, axis)
    size = min(everything.shape[0], num_rows) + 1
    if everything.shape[0] == 0:
        return Space(jnp.full(1, num_rows, jnp.int32), num_rows, {})
    ordered = jnp.sort(everything)
    new = (ordered < num_rows) & jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return Space(compact(ordered, new, num_rows, size)[0], num_rows, {})


def evaluate(planned: Planned, leaves: Sequence[Any], spaces: dict[int, Space]) -> list[Any]:
    """The step's outputs, on the rows of these spaces."""
    plan, places = planned.plan, planned.traced.places
    walk = Walk(plan, spaces)
    arrays = [jnp.asarray(x) for x in leaves]
    gathered = {c: _gathered([arrays[i] for i in planned.leaves if planned.leaves[i] == c], spaces[c]) for c in spaces}
    blocks = {c: iter(rows) for c, rows in gathered.items()}
    values = []
    for i, x in enumerate(arrays):
        c = planned.leaves.get(i)
        values.append(Whole(x) if c is None else Rows(next(blocks[c]), i, whole=lambda x=x: x))
    outs = walk.run(planned.traced.program, values)
    leaf_at = {place: i for i, place in places.items() if i in planned.leaves}
    results = [
        None if j in leaf_at else v.whole() if isinstance(v, Rows) else jnp.asarray(array_of(v))  # type: ignore[misc]
        for j, v in enumerate(outs)
    ]
    # written after everything that is read from the tables has been read
    small = [x for x in results if x is not None and x.size < _SMALL and jnp.issubdtype(x.dtype, jnp.number)]
    after = zero_after(*small, *(x.reshape(-1)[:1] for rows in gathered.values() for x in rows))
    for j, i in leaf_at.items():
        v = outs[j]
        if v is values[i]:
            results[j] = arrays[i]
            continue
        rows = walk.as_rows(v, i, 0)
        assert rows is not None, "its rows are along the first axis, as the plan has found"
        results[j] = scatter_rows(arrays[i], spaces[planned.leaves[i]].ids + after, rows.block)
    return results


def _gathered(arrays: list[jax.Array], space: Space) -> list[jax.Array]:
    """The chosen rows of several arrays, copied in one piece."""
    axes = [_jax.varying_axes([x, space.ids]) for x in arrays]
    always = _jax.vary(space.ids[-1] >= space.num_rows, frozenset().union(*axes))
    return computed_once(lambda: [copy_rows(x, space.ids) for x in arrays], always, axes)


_SMALL = 1 << 12
