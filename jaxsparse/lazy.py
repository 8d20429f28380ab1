"""`lazy(inner)`: any optax transformation at the cost of the rows that a gradient touches.

lazy is the outermost transformation. In an update it coalesces every RowSparse leaf, gathers that leaf's rows of each
state array that has one row per table row (mu, nu, trace, ...) and of the parameter, calls `inner.update` once on the
whole tree, in which those leaves are now (k, ...) blocks and dense leaves are what they were, and scatters the state's
rows back. Because `inner` sees coalesced blocks, norms, clipping, schedules, masks and weight decay inside it are right
without knowing about sparsity: the norm of the blocks is the norm of the dense gradient. Padding rows are zero in
gradient, state and parameter.

Which state arrays have one row per table row is asked of `inner.init` itself: it is evaluated abstractly for two
made-up numbers of rows, and what changes with them is told from what does not. Comparing shapes with the real num_rows
instead would take a block of k = num_rows, or a hidden layer of that width, for a table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse.rows import RowSparse, coalesce, gather_rows, is_row_sparse, scatter_rows

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
      inner: acts on each table row by itself. Transformations that look across rows (trust ratios, Adafactor, SM3) are
        not lazy-able; where their state shows it they raise.

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

    def init_fn(params: Any) -> LazyState:
        return LazyState(inner.init(params), jax.tree.map(_scratch, params))

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

        key = (tree, tuple((g.shape, g.dtype, is_row_sparse(g)) for g in grads))
        if key not in row_leaves:
            row_leaves[key] = _row_leaves(inner, tree, grads, values)
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
            owner = next((i for i in lazies if path in scratch[i]), None)
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


def _is_lazy_state(x: object) -> bool:
    return isinstance(x, LazyState)


def _scratch(param: Any) -> jax.Array:
    """The coalescing scratch of a parameter: of every one, since init cannot know which will be read by rows."""
    return jnp.zeros(jnp.shape(param)[:1], jnp.int32)


# Made-up numbers of rows that no real dimension is likely to equal; the second evaluation exposes one that does. The
# third has wider rows as well: what changes with the width, but not with the number of rows, looks across rows.
_PROBES = ((1_000_003, 0), (1_500_007, 0), (1_000_003, 1))


def _row_leaves(inner: Any, tree: Any, grads: list[Any], values: list[Any]) -> list[int | None]:
    """For every leaf of inner's state, which parameter's rows it has one row for, or None."""

    def evaluate(probe: tuple[int, int]) -> list[tuple[int, ...]]:
        structs = []
        for i, (g, p) in enumerate(zip(grads, values, strict=True)):
            shape = (probe[0] + i, *(d + probe[1] for d in g.shape[1:])) if is_row_sparse(g) else jnp.shape(g)
            structs.append(jax.ShapeDtypeStruct(shape, jnp.result_type(g.dtype if p is None else p)))
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(inner.init, tree.unflatten(structs)))]

    out: list[int | None] = []
    for one, more, wider in zip(*map(evaluate, _PROBES), strict=True):
        if one == more == wider:
            out.append(None)
            continue
        leaf = one[0] - _PROBES[0][0]
        if one == more or more[0] - _PROBES[1][0] != leaf or one[1:] != more[1:] or not 0 <= leaf < len(grads):
            got = (
                f"one with state of shape {one} for tables of {_PROBES[0][0]} rows and {more} for {_PROBES[1][0]} rows"
            )
            do = "Use a transformation without statistics across rows; adam, adagrad and rmsprop have none."
            raise ValueError(message("lazy", "inner", "a transformation that acts on each row by itself", got, do))
        out.append(leaf)
    return out
