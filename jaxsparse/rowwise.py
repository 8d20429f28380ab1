"""`rowwise`: a whole train step, as it is, evaluated on the rows that it reads.

1. The step is traced at full shapes (`tracing`).
2. Walks through its program find out which arrays share which rows (`planning`).
3. The same walks have seen the row ids of all reads. Cut down to what they need, they are a program of its own, whose
   result, sorted and without repeats, is the rows of each table (`choose_rows`).
4. Their blocks are gathered, the program is evaluated on them, and what stands where a table or slot stood is written
   back (`evaluate`). All other rows keep their bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse.planning import Planned, announce, plan_step, rows_of_leaf
from jaxsparse.rows import compact, computed_once, copy_rows, scatter_rows, zero_after
from jaxsparse.tracing import trace_step
from jaxsparse.values import NOBODY, Rows, Whole, array_of
from jaxsparse.walk import Space, Walk


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
        ids = planned.ids([x for x, used in zip(traced.leaves, planned.ids.used, strict=False) if used])
        spaces = {c: choose_rows(planned, c, ids) for c in planned.classes}
        return traced.unflatten(evaluate(planned, traced.leaves, spaces)[0])

    return run


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
        nobody = x == NOBODY
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


def evaluate(planned: Planned, leaves: Sequence[Any], spaces: dict[int, Space]) -> tuple[list[Any], list[jax.Array]]:
    """The step's outputs, on the rows of these spaces, and the blocks that were written back."""
    plan, places = planned.plan, planned.traced.places
    walk = Walk(plan, spaces)
    arrays = [jnp.asarray(x) for x in leaves]
    gathered = {c: _gathered([arrays[i] for i in planned.leaves if planned.leaves[i] == c], spaces[c]) for c in spaces}
    blocks = {c: iter(rows) for c, rows in gathered.items()}
    values = []
    for i, x in enumerate(arrays):
        c = planned.leaves.get(i)
        values.append(Whole(x) if c is None else rows_of_leaf(next(blocks[c]), i, x))
    outs = walk.run(planned.traced.program, values)
    leaf_at = {place: i for i, place in places.items() if i in planned.leaves}
    results = [
        None if j in leaf_at else walk.whole(v) if isinstance(v, Rows) else jnp.asarray(array_of(v))  # type: ignore[misc]
        for j, v in enumerate(outs)
    ]
    # written after everything that is read from the tables has been read
    small = [x for x in results if x is not None and x.size < _SMALL and jnp.issubdtype(x.dtype, jnp.number)]
    after = zero_after(*small, *(x.reshape(-1)[:1] for rows in gathered.values() for x in rows))
    blocks_written = []
    for j, i in leaf_at.items():
        v = outs[j]
        if v is values[i]:
            results[j] = arrays[i]
            continue
        rows = walk.as_rows(v, i, 0)
        assert rows is not None, "its rows are along the first axis, as the plan has found"
        results[j] = scatter_rows(arrays[i], spaces[planned.leaves[i]].ids + after, rows.block)
        blocks_written.append(rows.block)
    return results, blocks_written


def _gathered(arrays: list[jax.Array], space: Space) -> list[jax.Array]:
    """The chosen rows of several arrays, copied in one piece."""
    axes = [_jax.varying_axes([x, space.ids]) for x in arrays]
    always = _jax.vary(space.ids[-1] >= space.num_rows, frozenset().union(*axes))
    return computed_once(lambda: [copy_rows(x, space.ids) for x in arrays], always, axes)


_SMALL = 1 << 12
