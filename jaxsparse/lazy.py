"""`lazy(inner)`: any optax transformation at the cost of the rows that a gradient touches.

lazy is the outermost transformation. In an update it coalesces every RowSparse leaf, gathers that leaf's rows of each
state array that has one row per table row (mu, nu, trace, ...) and of the parameter, calls `inner.update` once on the
whole tree, in which those leaves are now (k, ...) blocks and dense leaves are what they were, and scatters the state's
rows back. Because `inner` sees coalesced blocks, norms, clipping, schedules, masks and weight decay inside it are right
without knowing about sparsity: the norm of the blocks is the norm of the dense gradient. Padding rows are zero in
gradient, state and parameter.

Which state arrays have one row per table row, and whether `inner` acts by row at all, is found out in `by_row.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._checks import message
from jaxsparse.by_row import check_by_row, find_row_leaves
from jaxsparse.rows import RowSparse, coalesce, gather_rows, is_row_sparse, scatter_rows

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods
_flatten_with_path: Any = jax.tree_util.tree_flatten_with_path


class LazyState(NamedTuple):
    """The state of `lazy(inner)`."""

    wrapped: Any  # inner's state; its arrays keep their full (num_rows, ...) shapes
    scratch: Any  # {name of the leaf: int32 (num_rows,)}: what coalescing writes to; its values mean nothing


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
        draw by shape (noise) raise at the first update, where `inner` is tried on small tables: see `by_row.py`.

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
        return LazyState(state, per_leaf(lambda p: jnp.zeros(jnp.shape(p)[:1], jnp.int32), params))

    def update_fn(updates: Any, state: LazyState, params: Any = None, **extra_args: Any) -> tuple[Any, LazyState]:
        grads, tree = _flatten(updates, is_leaf=is_row_sparse)
        values = [None] * len(grads) if params is None else tree.flatten_up_to(params)
        for i, (g, p) in enumerate(zip(grads, values, strict=True)):
            if is_row_sparse(g) and p is not None and p.shape != g.shape:
                raise ValueError(
                    message("lazy", "updates", f"of the parameter's shape, {p.shape}", f"{g.shape} at leaf {i}")
                )
        with jax.named_scope("lazy_coalesce"):
            updates, scratch = coalesce_with(updates, state.scratch)
            grads = tree.flatten_up_to(updates)

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
        return tree.unflatten(out), LazyState(new_tree.unflatten(new_slots), scratch)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """{name: leaf} in the order of the leaves, a RowSparse being one, and the tree's definition.

    The boxes that flax puts around parameters (linen's Partitioned, nnx's Variable) do not count for the name: they may
    come and go between init and update.
    """
    flat, definition = _flatten_with_path(tree, is_leaf=is_row_sparse)
    return {_name(path): leaf for path, leaf in flat}, definition


def per_leaf(make: Any, params: Any) -> Any:
    """{name: make(leaf)}: a part of the state that has something for each parameter.

    It is no tree like params, because flax would give its arrays the partitioning of params, whose rank is another.
    What
    has no leaves stays as it is: optax.tree_utils.tree_map_params lets init run on such a mark.
    """
    leaves, _ = named_leaves(params)
    return {name: make(leaf) for name, leaf in leaves.items()} if leaves else params


def coalesce_with(grads: Any, scratch: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
    """Every RowSparse of `grads` coalesced with its scratch, and the scratch that replaces the donated one."""
    leaves, tree = named_leaves(grads)
    scratch = dict(scratch)
    for name, g in leaves.items():
        if is_row_sparse(g):
            leaves[name], scratch[name] = coalesce(g, scratch[name])
    return tree.unflatten(leaves.values()), scratch


class Scratches:
    """The coalescing scratch of every parameter, in the state of its lazy optimizer, however deep."""

    def __init__(self, opt_state: Any) -> None:
        self._states, self._tree = _flatten(opt_state, is_leaf=_is_lazy_state)
        self._states = [s._replace(scratch=dict(s.scratch)) if _is_lazy_state(s) else s for s in self._states]

    def of(self, name: str, num_rows: int) -> dict[str, jax.Array]:
        """The scratch that holds the parameter's, under its name.

        Raises:
          ValueError: if the parameter has no lazy optimizer.
        """
        for s in self._states:
            if _is_lazy_state(s) and name in s.scratch and s.scratch[name].shape == (num_rows,):
                return s.scratch
        must = f"of a lazy optimizer, because parameter {name} is read by rows"
        do = "Wrap the whole chain: js.lazy(optax.chain(...))."
        raise ValueError(message("make_train_step", "state", must, "another", do))

    def opt_state(self) -> Any:
        """The optimizer's state with these scratches."""
        return self._tree.unflatten(self._states)


def coalesce_gradients(grads: Any, opt_state: Any) -> tuple[Any, Any]:
    """Every RowSparse of `grads` coalesced, with the scratch of the `lazy` that will take it.

    Raises:
      ValueError: if some RowSparse leaf has no lazy optimizer.
    """
    leaves, tree = named_leaves(grads)
    scratches = Scratches(opt_state)
    for name, g in leaves.items():
        if is_row_sparse(g):
            scratch = scratches.of(name, g.num_rows)
            leaves[name], scratch[name] = coalesce(g, scratch[name])
    return tree.unflatten(leaves.values()), scratches.opt_state()


def _accumulates(x: object) -> bool:
    return isinstance(x, (optax.MultiStepsState, optax.ApplyEvery))


def _is_lazy_state(x: object) -> bool:
    return isinstance(x, LazyState)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(tuple(k for k in path if str(k) != ".value"), simple=True, separator=".") or "array"
