"""`lazy(inner)`: any optax transformation at the cost of the rows that a gradient touches.

lazy is the outermost transformation. In an update it coalesces every RowSparse leaf, gathers that leaf's rows of each
state array that has one row per table row (mu, nu, trace, ...) and of the parameter, calls `inner.update` once on the
whole tree, in which those leaves are now (k, ...) blocks and dense leaves are what they were, and scatters the state's
rows back. Because `inner` sees coalesced blocks, norms, clipping, schedules, masks and weight decay inside it are right
without knowing about sparsity: the norm of the blocks is the norm of the dense gradient. Padding rows are zero in
gradient, state and parameter.

Which state arrays have one row per table row, and whether `inner` acts by row at all, is found out in `rowwise.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse.rows import RowSparse, coalesce, gather_rows, is_row_sparse, scatter_rows
from jaxsparse.rowwise import check_by_row, find_row_leaves

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods
_flatten_with_path: Any = jax.tree_util.tree_flatten_with_path


class LazyState(NamedTuple):
    """The state of `lazy(inner)`."""

    wrapped: Any  # inner's state; its arrays keep their full (num_rows, ...) shapes
    scratch: Any  # like params, int32 (num_rows,): what coalescing writes to; its values mean nothing between steps


def lazy(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax transformation, usually a whole chain, to take row-sparse gradients at the cost of their rows.

    Rows that a gradient does not name keep their parameters and their state, bit for bit: no momentum, no decay. Step
    counters are global: bias correction uses the number of updates, not the number of times a row was touched. Both are
    what torch's SparseAdam and TensorFlow Addons' LazyAdam do. With every row touched, the result is that of dense
    `inner`.

    Put everything inside, `js.lazy(optax.chain(optax.clip_by_global_norm(1.), optax.adamw(1e-3)))`: outside, a
    transformation that maps over gradients meets row ids and refuses.

    Args:
      inner: acts on each table row by itself. Transformations that look across rows (trust ratios, Adafactor, SM3) or
        draw by shape (noise) raise at the first update, where `inner` is tried on small tables: see `rowwise.py`.

    Returns:
      A transformation whose updates are RowSparse where gradients are, for `optax.apply_updates` and everything that
      calls it. Its state holds inner's, plus an int32 per row of each parameter, which must be donated along for a step
      to cost O(rows).

    Raises:
      ValueError: from update, if a gradient's shape is not its parameter's, or inner keeps state that is not by row.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy(optax.sgd(1.0))
      >>> params = jnp.ones((4, 1))
      >>> grads = js.RowSparse(jnp.array([2, 2]), jnp.array([[.25], [.25]]), (4, 1))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates).ravel().tolist()
      [1.0, 1.0, 0.5, 1.0]
    """
    inner = optax.with_extra_args_support(inner)
    row_leaves: dict[Any, list[int | None]] = {}
    checked: set[Any] = set()

    def init_fn(params: Any) -> LazyState:
        state = inner.init(params)
        for part in jax.tree.leaves(state, is_leaf=_accumulates):
            if _accumulates(part):
                do = "It would mix the rows of different steps. Use js.accumulate(js.lazy(...), steps)."
                raise ValueError(message("lazy", "inner", "a transformation of one step", type(part).__name__, do))
        return LazyState(state, jax.tree.map(_scratch, params))

    def update_fn(updates: Any, state: LazyState, params: Any = None, **extra_args: Any) -> tuple[Any, LazyState]:
        grads, tree = _flatten(updates, is_leaf=is_row_sparse)
        scratch = tree.flatten_up_to(state.scratch)
        values = [None] * len(grads) if params is None else tree.flatten_up_to(params)
        for i, (g, p) in enumerate(zip(grads, values, strict=True)):
            if is_row_sparse(g) and p is not None and p.shape != g.shape:
                raise ValueError(
                    message("lazy", "updates", f"of the parameter's shape, {p.shape}", f"{g.shape} at leaf {i}")
                )
        with jax.named_scope("lazy_coalesce"):
            for i, g in enumerate(grads):
                if is_row_sparse(g):
                    grads[i], scratch[i] = coalesce(g, scratch[i])

        leaves = [g if p is None else p for g, p in zip(grads, values, strict=True)]
        flags = [is_row_sparse(g) for g in grads]
        key = (tree, tuple((g.shape, g.dtype, f) for g, f in zip(grads, flags, strict=True)))
        if key not in row_leaves:
            row_leaves[key] = find_row_leaves(inner, tree, leaves, flags)
        call = (key, params is None, tuple(sorted(extra_args)))
        if any(flags) and call not in checked:
            check_by_row(inner, tree, leaves, flags, with_params=params is not None, extra_args=extra_args)
            checked.add(call)
        slots, slot_tree = _flatten(state.wrapped)
        if len(slots) != len(row_leaves[key]):
            must = f"the state that init made, of {len(row_leaves[key])} leaves"
            raise ValueError(message("lazy", "state", must, f"{len(slots)} leaves"))

        with jax.named_scope("lazy_gather"):
            blocks = [
                x if i is None else gather_rows(x, grads[i].ids) for x, i in zip(slots, row_leaves[key], strict=True)
            ]
            at = [
                gather_rows(jnp.asarray(p), g.ids) if is_row_sparse(g) and p is not None else p
                for p, g in zip(values, grads, strict=True)
            ]
        with jax.named_scope("lazy_update"):
            dense = tree.unflatten([g.rows if is_row_sparse(g) else g for g in grads])
            new, wrapped = inner.update(
                dense, slot_tree.unflatten(blocks), None if params is None else tree.unflatten(at), **extra_args
            )
        with jax.named_scope("lazy_scatter"):
            new_slots, new_tree = _flatten(wrapped)
            if new_tree != slot_tree:
                raise ValueError(
                    message(
                        "lazy",
                        "inner",
                        "a transformation whose state keeps its structure",
                        f"{slot_tree}, then {new_tree}",
                    )
                )
            new_slots = [
                n if i is None else scatter_rows(x, grads[i].ids, n)
                for x, n, i in zip(slots, new_slots, row_leaves[key], strict=True)
            ]
        out = [
            RowSparse(g.ids, u, g.shape, unique=True, distinct=g.distinct) if is_row_sparse(g) else u
            for g, u in zip(grads, tree.flatten_up_to(new), strict=True)
        ]
        return tree.unflatten(out), LazyState(new_tree.unflatten(new_slots), tree.unflatten(scratch))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def coalesce_gradients(grads: Any, opt_state: Any) -> tuple[Any, Any]:
    """Every RowSparse of `grads` coalesced, with the scratch of the `lazy` that will take it, wherever in `opt_state`
    that is.

    Raises:
      ValueError: if some RowSparse leaf has no lazy optimizer.
    """
    by_path, tree = _flatten_with_path(grads, is_leaf=is_row_sparse)
    if not any(is_row_sparse(g) for _, g in by_path):
        return grads, opt_state
    states, state_tree = _flatten(opt_state, is_leaf=_is_lazy_state)
    lazies = [i for i, s in enumerate(states) if _is_lazy_state(s)]
    scratch = {i: dict(jax.tree_util.tree_flatten_with_path(states[i].scratch)[0]) for i in lazies}
    out = []
    for path, leaf in by_path:
        g = leaf
        if is_row_sparse(g):
            fits = (i for i in lazies if path in scratch[i] and scratch[i][path].shape == g.shape[:1])
            owner = next(fits, None)
            if owner is None:
                name = jax.tree_util.keystr(path)
                do = "Wrap the whole chain: js.lazy(optax.chain(...))."
                raise ValueError(
                    message(
                        "make_train_step",
                        "state",
                        f"of a lazy optimizer, because params{name} is read by rows",
                        "another",
                        do,
                    )
                )
            g, scratch[owner][path] = coalesce(g, scratch[owner][path])
        out.append(g)
    for i in lazies:
        flat = jax.tree_util.tree_flatten_with_path(states[i].scratch)
        states[i] = states[i]._replace(scratch=jax.tree.unflatten(flat[1], [scratch[i][path] for path, _ in flat[0]]))
    return tree.unflatten(out), state_tree.unflatten(states)


def _accumulates(x: object) -> bool:
    return isinstance(x, (optax.MultiStepsState, optax.ApplyEvery))


def _is_lazy_state(x: object) -> bool:
    return isinstance(x, LazyState)


def _scratch(param: Any) -> jax.Array:
    """The coalescing scratch of a parameter: of every one, since init cannot know which will be read by rows."""
    return jnp.zeros(jnp.shape(param)[:1], jnp.int32)
