"""`rowwise`: evaluates an unchanged train step on the rows that it reads.

1. The step is traced at full shapes (`tracing`).
2. Walks through its program find which arrays share which rows, and the row ids of all reads (`planning`).
3. The part of the program that computes the ids runs first. The distinct ids are the rows of a table (`choose_rows`).
4. These rows are gathered into blocks, the program is evaluated on the blocks, and the new rows of tables and slots are
   written back (`evaluate`). All other rows keep their bits.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse.ops.rows import as_array, as_shape, as_whole, is_stored, zero_after
from jaxsparse.optim.up_to_date import Replayed, catch_up, find_replayed, flush_before, history_of, numbers_of
from jaxsparse.parallel.collectives import in_auto_mode
from jaxsparse.trace.known_ids import find_known
from jaxsparse.trace.pieces import arrays_in, computed, write
from jaxsparse.trace.planning import NoStateError, PlannedStep, announce, plan_step, refused
from jaxsparse.trace.stacked import LostError, find_stacked
from jaxsparse.trace.tracing import TracedStep, trace_step
from jaxsparse.trace.trained import TrainedRows, trained_rows
from jaxsparse.trace.values import FullArray, RefusedError, Rows, array_of, rows_of_leaf
from jaxsparse.trace.walk import Space, Walk
from jaxsparse.train.device_rows import choose_rows, ids_of


def rowwise(
    step: Callable[..., Any], *, state_argnums: int | Sequence[int] | None = None, rows: Any = None
) -> Callable[..., Any]:
    """A train step that does what `step` does on the rows that it reads, and leaves all other rows alone.

    Use it inside of jax.jit, jax.pmap or jax.shard_map, or as the body of a jax.lax.scan over batches. `js.jit`
    compiles as well. Donate the state, or each step copies it. A traced function cannot see whether its arguments are
    donated, so there is no warning; `js.explain(jax.jit(js.rowwise(step)))(state, batch)` tells, also for jax.pmap. See
    `js.jit` for what is row-sparse and what is refused.

    Args:
      step: step(state, ...) -> state, or (state, ...): any pytrees, and any optax transformation.
      state_argnums: which arguments are state. Each must come back as a part of the output, with the same structure.
        None: the step's state is found as in `js.jit`.
      rows: as in `js.jit`.

    Returns:
      A function of the step's arguments that returns what the step returns.

    Raises:
      ValueError: if the step cannot be right on the rows that it reads; the message names the line.

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
        prepared = prepare_step(step, args, kwargs, state_argnums, rows)
        announce(prepared.planned)
        if (seen := _SEEN.get()) is not None:
            seen.append(prepared.planned)
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_stored)
        return prepared.planned.traced.unflatten(on_rows(prepared, leaves))

    _PLANS[run] = lambda *args, **kwargs: prepare_step(step, args, kwargs, state_argnums, rows).planned
    return run


# {function that `rowwise` returned: a function of its arguments that returns the plan}
_PLANS: weakref.WeakKeyDictionary[Any, Callable[..., PlannedStep]] = weakref.WeakKeyDictionary()


def plan_of(fun: Callable[..., Any]) -> Callable[..., PlannedStep] | None:
    """For `js.explain`: a function of fun's arguments that returns the plan; None unless `fun` is one of `rowwise`."""
    return _PLANS.get(fun)


_SEEN: contextvars.ContextVar[list[PlannedStep] | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def plans_seen() -> Iterator[list[PlannedStep]]:
    """For `js.explain`: collects the plans of the steps that are traced within this context."""
    seen: list[PlannedStep] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def on_rows(
    prepared: Prepared, leaves: Sequence[Any], axes: Sequence[Any] = (), *, on_one_device: bool = True
) -> list[Any]:
    """The step's outputs for these leaves of its arguments.

    Args:
      axes: further mapped axes along which all devices need the same rows, besides those that the step sums over.
      on_one_device: as in `Walk`.
    """
    return over_any_mesh(
        prepared.planned, leaves, lambda leaves, _: evaluate_by_ids(prepared, leaves, axes, on_one_device=on_one_device)
    )


def over_any_mesh(
    planned: PlannedStep, leaves: Sequence[Any], fun: Callable[[list[Any], Any], list[Any]], others: Any = None
) -> list[Any]:
    """fun(leaves, others), the step's outputs. The state keeps its shardings. `others`: any pytree."""
    places = planned.traced.places
    other_numbers = [i for i in range(len(leaves)) if i not in places]

    def run(states: list[Any], other_leaves: list[Any], others: Any) -> tuple[list[Any], list[Any]]:
        by_number = dict(zip([*places, *other_numbers], [*states, *other_leaves], strict=True))
        outs = fun([by_number[i] for i in range(len(leaves))], others)
        return [outs[j] for j in places.values()], [x for j, x in enumerate(outs) if j not in places.values()]

    states, other_outs = in_auto_mode(run, [leaves[i] for i in places], [leaves[i] for i in other_numbers], others)
    outs = dict(zip(places.values(), states, strict=True))
    it = iter(other_outs)
    return [outs[j] if j in outs else next(it) for j in range(len(planned.traced.program.outputs))]


def evaluate_by_ids(
    prepared: Prepared, leaves: Sequence[Any], axes: Sequence[Any] = (), *, on_one_device: bool = True
) -> list[Any]:
    """`evaluate` on the rows that the ids of the reads name. `axes`, `on_one_device`: as in `on_rows`."""
    planned, leaves = prepared.planned, list(map(as_array, leaves))
    ids = ids_of(planned, leaves, axes)
    spaces = {c: choose_rows(planned, c, ids, axes, on_one_device=on_one_device) for c in planned.classes}
    outs = evaluate(prepared, leaves, spaces, on_one_device=on_one_device)
    tables = {planned.traced.places[i] for i in planned.leaves}
    return [x if j in tables else ids.checked(x, leaves) for j, x in enumerate(outs)]


class Prepared(NamedTuple):
    """A planned step, the replaying optimizers in its state, and its trained rows."""

    planned: PlannedStep
    replayed: list[Replayed]
    trained: dict[int, TrainedRows]  # by class

    def only_outputs(self) -> Prepared:
        """The step without computations (or prints) that its outputs do not need. It reads the same rows."""
        return self._replace(planned=dataclasses.replace(self.planned, program=_jax.needed_only(self.planned.program)))


def prepare_step(
    step: Callable[..., Any], args: Any, kwargs: Any, state_argnums: int | Sequence[int] | None, rows: Any = None
) -> Prepared:
    """Traces a step that begins with a catch-up of replayed parameters, and plans it."""
    with _jax.auto_mesh() as is_changed:
        if is_changed:
            args, kwargs = jax.tree.map(_jax.abstract, (args, kwargs))
        return _prepare(step, args, kwargs, state_argnums, rows)


def _prepare(
    step: Callable[..., Any], args: Any, kwargs: Any, state_argnums: int | Sequence[int] | None, rows: Any
) -> Prepared:
    replayed = find_replayed(jax.tree.map(as_shape, (args, kwargs), is_leaf=is_stored))
    prepare = functools.partial(catch_up, replayed)
    traced = trace_step(step, args, kwargs, state_argnums, prepare)
    try:
        planned = _plan(traced, history_of(replayed), rows)
    except NoStateError:
        if state_argnums is not None:
            raise
        traced = trace_step(step, args, kwargs, (), prepare)
        planned = plan_step(traced, list(map(as_shape, traced.leaves)), history_of(replayed))
    traced = planned.traced
    warnings = [*planned.warnings, *_unpacked(planned, args, kwargs)]
    planned = dataclasses.replace(planned, known=find_known((args, kwargs)), warnings=warnings)
    used_by_ids = {i for i, used in enumerate(planned.ids.used) if used}
    for i in numbers_of(replayed) & planned.leaves.keys() & used_by_ids:
        got = f"row ids made of rows of {traced.paths[i]}"
        raise refused(got, "They are needed before these rows can be brought up to date: use untouched='freeze' here.")
    tables = {i: (traced.paths[i], planned.classes[c], c) for i, c in planned.leaves.items()}
    dense = [path for i, path in traced.paths.items() if i not in tables]
    trained = trained_rows("jit or js.rowwise", rows, tables, dense)
    if trained and replayed:
        do = "Use untouched='freeze'."
        raise ValueError(message("jit or js.rowwise", "rows", "left out where an optimizer replays", "both", do))
    return Prepared(planned, replayed, trained)


def _plan(traced: TracedStep, history: set[int], rows: Any) -> PlannedStep:
    """The plan of a step. Stacked tables are read by table and row if possible."""
    leaves = list(map(as_shape, traced.leaves))
    places = {i: j for i, j in traced.places.items() if not is_stored(traced.leaves[i])}
    stacked, why = find_stacked(traced.program, places), "rows= names rows of its first axis"
    if stacked.shapes and rows is None:
        try:
            planned = plan_step(traced.with_flat_tables(stacked), stacked.flat(leaves), history)
        except LostError as error:
            why = str(error)
        except RefusedError as error:
            why = error.got
        else:
            reasons = [str(reason) for i, reason in planned.dense.items() if i in stacked.shapes]
            if any(planned.ids.used[i] for i in stacked.shapes):
                reasons.append("ids are made of it")
            if not reasons and stacked.shapes.keys() & planned.leaves.keys():
                return planned
            why = next(iter(reasons), "not read by rows")
    elif not stacked.shapes:
        stacked, why = find_stacked(traced.program, places, in_regions=True), "that is in a scan, cond or remat"
    planned = plan_step(traced, leaves, history)
    tables = sorted(stacked.shapes.keys() & planned.leaves.keys() & planned.plan.read)
    said = f"is read by table and row, and each of its tables is one row here: {why}."
    return dataclasses.replace(planned, warnings=[f"{traced.paths[i]} {said}" for i in tables])


def _unpacked(planned: PlannedStep, args: Any, kwargs: Any) -> list[str]:
    """Warnings of packed leaves that each step unpacks in full: row ids depend on them, or they are no state."""
    with_paths = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_stored)[0]
    places, used, warnings = planned.traced.places, planned.ids.used, []
    for i, (path, x) in enumerate(with_paths):
        if is_stored(x) and (i not in places or used[i]):
            why = "row ids are made of it" if used[i] else "it is no state, which comes back"
            name = f"{type(x).__name__} {jax.tree_util.keystr(path[1:])}"
            warnings.append(f"{name} is unpacked whole at each step: {why}. Pass js.unpack of it.")
    return warnings


def evaluate(
    prepared: Prepared, leaves: Sequence[Any], spaces: dict[int, Space], *, on_one_device: bool = True
) -> list[Any]:
    """The step's outputs, on the rows of these spaces."""
    planned, places = prepared.planned, prepared.planned.traced.places
    spaces = {
        c: s._replace(trained=prepared.trained[c].is_trained(s.ids)) if c in prepared.trained else s
        for c, s in spaces.items()
    }
    arrays = flush_before(prepared.replayed, list(map(as_array, leaves)), planned.leaves)
    arrays = planned.traced.stacked.flat(arrays)
    defers = on_one_device and not _jax.varying_axes([arrays, [space.ids for space in spaces.values()]])
    walk = Walk(planned.plan, spaces, on_one_device=on_one_device, defers=defers)
    values = [
        rows_of_leaf(walk.leaf(x, i), i, x, x if defers and not is_stored(x) else None)
        if i in planned.leaves
        else FullArray(as_whole(x))
        for i, x in enumerate(arrays)
    ]
    outs = walk.run(planned.program, values)
    leaf_at = {place: i for i, place in places.items() if i in planned.leaves}
    results = [
        None if j in leaf_at else walk.full_array(v) if isinstance(v, Rows) else jnp.asarray(array_of(v))  # type: ignore[misc]
        for j, v in enumerate(outs)
    ]
    # tables are written after all reads from them
    leaves_of = {c: [i for i in leaf_at.values() if planned.leaves[i] == c] for c in spaces}
    new = {c: walk.changed_blocks({i: (values[i], outs[places[i]]) for i in leaves_of[c]}) for c in spaces}
    blocks = [v.data for v in values if isinstance(v, Rows)] + [x for c in new for x in arrays_in(new[c].values())]
    small = [x for x in _numeric(results) if x.size < _SMALL or walk.tables_read]
    after = zero_after(*small, *(x.reshape(-1)[:1] for x in _numeric(map(computed, blocks))))
    for c, space in spaces.items():
        old = {i: arrays[i] for i in leaves_of[c]}
        for i, x in write(new[c], old, space.ids + after, space.num_rows, trained=space.trained).items():
            results[places[i]] = x
    for i, shape in planned.traced.stacked.shapes.items():
        results[places[i]] = jnp.reshape(jnp.asarray(results[places[i]]), shape)
    for i, x in enumerate(leaves):
        if is_stored(x) and i in places and i not in planned.leaves:
            unchanged = results[places[i]] is array_of(values[i])
            results[places[i]] = arrays[i] if unchanged else x.of(results[places[i]])
    return results


_SMALL = 1 << 12


def _numeric(arrays: Iterable[Any]) -> list[Any]:
    return [x for x in arrays if x is not None and jnp.issubdtype(x.dtype, jnp.number)]
