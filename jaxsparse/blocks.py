"""The rows that a batch reads, taken out of their tables before the forward pass and put back after the update.

A step over a table of 10M rows that reads 20,000 of them is a dense step over a table of 20,000 rows. So the ids are
worked out first, the distinct ones chosen, and these rows of the table, of its slots and of everything else that has a
row for each of the table's rows are gathered into a small state. On this state the step is an ordinary one: the program
reads from the block, jax.value_and_grad gives the block's gradient, and the optimizer, as it is, updates the block.
Then the rows are scattered back, in place.

In between, rows that a replaying optimizer left behind are brought up to date; and across devices the ids are gathered
first, so that all devices have the same block, and its gradient is combined like that of any dense parameter: the bytes
moved depend on the batch, not on the tables.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._jax import all_gather, vary
from jaxsparse.by_row import find_row_leaves
from jaxsparse.grad import Traced
from jaxsparse.interpret import Block, Interpreter, OverBlocks
from jaxsparse.lazy import Scratches, named_leaves
from jaxsparse.reads import Table
from jaxsparse.replaying import Stamps, View, flush_in_time, map_replaying, replay_states
from jaxsparse.rows import coalesce_ids, computed_once, copy_rows, scatter_rows, zero_after

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods


class Chosen(NamedTuple):
    """The distinct rows of one parameter that the batch reads."""

    leaf: int  # which of the traced leaves it is
    ids: jax.Array  # int32 (size,), unique, padded with num_rows, ...
    scratch: jax.Array  # int32 (num_rows,): where in the block each id is; see rows.positions
    fits: jax.Array  # bool (): whether all of them are in it


def choose_rows(
    traced: Traced, params: Any, opt_state: Any, axis_name: Any = None
) -> tuple[dict[str, Chosen], Any, Any]:
    """The distinct rows, over all devices, that a traced loss reads of each parameter with a row-sparse gradient.

    Returns:
      These by the parameter's name, and params and opt_state, where scratch has been written to, and rows have been
      brought up to date that are used as a whole or that history would not remember much longer.

    Raises:
      ValueError: if such a parameter has no lazy optimizer, or row ids depend on the rows of a replaying one.
    """
    names = list(named_leaves(params)[0])
    sparse = traced.sparse_leaves()
    replaying = replayed(opt_state)
    if replaying:
        dense = {name for i, name in enumerate(names) if i not in sparse}
        params, opt_state = flush_in_time(params, opt_state, dense)
    ids, needed = _row_ids(traced, sparse, vary(jax.tree.leaves(params), traced.axes))
    for i in needed & set(sparse):
        if names[i] in replaying:
            got = f"ids made from the rows of parameter {names[i]}"
            do = "They are needed before these rows can be brought up to date: use skipped='freeze' here."
            raise ValueError(message("make_train_step", "loss_fn", "one whose row ids do not depend on them", got, do))
    scratches, chosen = Scratches(opt_state), {}
    for i in sparse:
        num_rows = traced.leaves[i].shape[0]
        scratch = scratches.of(names[i], num_rows)
        values = traced.values(i) if axis_name is None else None
        all_ids = ids[i] if values is None else values
        chosen[names[i]] = _choose(i, all_ids, traced.distinct(i), num_rows, scratch[names[i]], axis_name)
        scratch[names[i]] = chosen[names[i]].scratch
    return chosen, params, scratches.opt_state()


def _choose(
    leaf: int, ids: jax.Array, distinct: int | None, num_rows: int, scratch: jax.Array, axis_name: Any
) -> Chosen:
    if axis_name is not None:
        ids = all_gather(ids, axis_name)
        distinct = distinct and distinct * jax.lax.axis_size(axis_name)
    size = min(x for x in (ids.shape[0], num_rows, distinct) if x is not None)
    if size == 0:
        nothing = jnp.zeros((0,), jnp.int32)
        return Chosen(leaf, nothing, scratch, jnp.bool_(True))
    unique, fits, scratch = coalesce_ids(ids, num_rows, size, scratch)
    return Chosen(leaf, unique, scratch, fits)


def _row_ids(traced: Traced, sparse: list[int], leaves: list[Any]) -> tuple[dict[int, jax.Array], set[int]]:
    """The ids (k,) of all reads of each of these leaves, and the leaves that ids depend on."""

    def ids_of(*leaves: jax.Array) -> list[jax.Array]:
        program = Interpreter({i: leaves[i] for i in sparse})
        inputs = [Table(i, x.dtype) if i in sparse else x for i, x in enumerate(leaves)]
        program.run(traced.program, inputs)
        of_reads = [r.leaf for r in traced.reads if r.leaf in sparse]
        reads = [(leaf, ids.reshape(-1)) for leaf, (ids, _) in zip(of_reads, program.ids, strict=True)]
        empty = jnp.zeros((0,), jnp.int32)
        return [jnp.concatenate([empty, *(ids for leaf, ids in reads if leaf == i)]) for i in sparse]

    ids, used = _jax.evaluate_outputs(ids_of, leaves)
    return dict(zip(sparse, ids, strict=True)), {i for i, is_used in enumerate(used) if is_used}


def replayed(opt_state: Any) -> set[str]:
    """The parameters whose optimizer replays."""
    return {name for state in replay_states(opt_state) for name in View(state).stamps}


class Blocks:
    """The way from the state to the small state, through the loss over it, and back."""

    def __init__(self, traced: Traced, tx: Any, params: Any, opt_state: Any, axis_name: Any = None) -> None:
        self.traced = traced
        self.chosen, self.params, self.opt_state = choose_rows(traced, params, opt_state, axis_name)
        self._fit = jnp.all(jnp.array([chosen.fits for chosen in self.chosen.values()], bool))
        by_name, tree = named_leaves(self.params)
        self._names = list(by_name)
        flags = [name in self.chosen for name in by_name]
        self._owners = find_row_leaves(tx, tree, list(by_name.values()), flags)

    def small(self) -> tuple[Any, Any]:
        """params and opt_state of the rows that were chosen, brought up to date where their optimizer replays."""
        leaves, tree = _flatten((self.params, self.opt_state))
        owners = self._row_owners()

        def gathered() -> list[Any]:
            return [copy_rows(x, self.chosen[k].ids) for x, k in zip(leaves, owners, strict=True) if k is not None]

        blocks = iter(computed_once(gathered, self._fit))
        rows = tree.unflatten(x if k is None else next(blocks) for x, k in zip(leaves, owners, strict=True))

        def change(view: View, params: dict[str, Any]) -> None:
            caught_up = {}
            for name in view.among(self.chosen):
                caught_up[name] = view.catch_up(name, params[name], view.stamps[name].rows, view.slots(name))
                params[name] = caught_up[name][0]
            # the update writes stamps and history, of which it reads nothing, after they have been read here
            steps = view.state.steps + zero_after(*(p for p, _ in caught_up.values()))
            view.state = dataclasses.replace(view.state, steps=steps)
            for name, (_, slots) in caught_up.items():
                view.put(name, slots, Stamps(jnp.broadcast_to(steps + 1, view.stamps[name].rows.shape), steps))

        return map_replaying(change, *rows)

    def loss(self, params: Any) -> Any:
        """(value, aux) of the traced loss, tables being blocks.

        If the batch was wrong about how many distinct ids it has, so that some found no room in a block, the value is
        NaN, and so are all gradients.
        """
        traced, by_name = self.traced, named_leaves(params)[0]
        whole, replaying = vary(named_leaves(self.params)[0], traced.axes), replayed(self.opt_state)
        arrays = {c.leaf: whole[name] for name, c in self.chosen.items() if name not in replaying}
        blocks = {c.leaf: Block(by_name[name], c.scratch) for name, c in self.chosen.items()}
        inputs = [Table(i, traced.leaves[i].dtype) if i in blocks else x for i, x in enumerate(by_name.values())]
        value, *aux = OverBlocks(arrays, blocks).run(traced.program, inputs)
        return value * jnp.where(self._fit, 1, jnp.nan).astype(value.dtype), traced.aux(aux)

    def rows_in(self, *small: Any) -> list[Any]:
        """The blocks of floats among the leaves of small params, or of small params and opt_state."""
        leaves = jax.tree.leaves(small)
        owners = self._row_owners()[: len(leaves)]
        return [
            x for x, k in zip(leaves, owners, strict=True) if k is not None and jnp.issubdtype(x.dtype, jnp.floating)
        ]

    def _row_owners(self) -> list[str | None]:
        """For each leaf of (params, opt_state) the parameter whose chosen rows it has in the small state, or None."""
        of_params = [name if name in self.chosen else None for name in self._names]
        return of_params + [None if i is None else self._names[i] for i in self._owners]

    def put_back(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """All of params and opt_state, with the rows of these small ones."""
        new, tree = named_leaves(params)
        old = named_leaves(self.params)[0]
        params = tree.unflatten(
            scatter_rows(old[k], self.chosen[k].ids, x) if k in self.chosen else x for k, x in new.items()
        )
        leaves, opt_tree = _flatten(self.opt_state)
        new_leaves, new_tree = _flatten(opt_state)
        assert new_tree == opt_tree, f"the optimizer's state was {opt_tree} and is {new_tree}"
        is_scratch = _jax.ByIdentity((chosen.scratch, True) for chosen in self.chosen.values())
        opt_state = opt_tree.unflatten(
            n if i is None else x if is_scratch(x) else scatter_rows(x, self.chosen[self._names[i]].ids, n)
            for x, n, i in zip(leaves, new_leaves, self._owners, strict=True)
        )
        before = list(map(View, replay_states(self.opt_state)))

        def restore(view: View, params: dict[str, Any]) -> None:
            was = before.pop(0)
            for name in view.among(self.chosen):  # only these rows were brought up to date
                view.put(name, view.slots(name), Stamps(view.stamps[name].rows, was.stamps[name].whole))

        return map_replaying(restore, params, opt_state)
