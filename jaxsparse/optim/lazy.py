"""`lazy(inner)`: any optax transformation at the cost of the rows that a gradient touches.

A transformation goes in, and one that accepts RowSparse gradients comes out. Its update is traced at full shapes, where
a RowSparse stands for an array that is zero outside its rows. It is then evaluated on these rows only, in the arrays of
the state too. So norms, clipping, schedules, masks and weight decay are right without any code for sparsity, and
transformations that look across rows are found in the program.

In a step under js.jit or js.rowwise gradients are arrays, and lazy(inner) is inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _jax
from jaxsparse._checks import check_transformation, message
from jaxsparse._context import tracing
from jaxsparse.ops.row_sparse import RowSparse, coalesce, is_row_sparse
from jaxsparse.ops.rows import check_arrays, is_stored
from jaxsparse.trace.pieces import rows_of, write
from jaxsparse.trace.planning import Planned, check, refused, settle, warn_once
from jaxsparse.trace.trained import trained_rows
from jaxsparse.trace.values import FullArray, RefusedError, Rows, array_of, rows_of_leaf, rows_of_update
from jaxsparse.trace.walk import Space, Walk

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods
_flatten_with_path: Any = jax.tree_util.tree_flatten_with_path


def lazy(inner: optax.GradientTransformation, *, rows: Any = None) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax transformation, usually a whole chain, to take row-sparse gradients at the cost of their rows.

    Rows that a gradient does not name keep their parameters and their state, bit for bit: no momentum, no decay. Step
    counters are global: bias correction uses the number of updates, not the number of times a row was touched. torch's
    SparseAdam and TensorFlow Addons' LazyAdam do the same. If a gradient names every row, the result is that of dense
    `inner`. The state is that of `inner`.

    Put the whole chain inside: `js.lazy(optax.chain(optax.clip_by_global_norm(1.), optax.adamw(1e-3)))`. A
    transformation outside would map over row ids, and raises.

    Args:
      inner: a transformation that acts on each row of a table by itself. Those that look across rows (trust ratios,
        Adafactor, SM3), and those that wait for a later step (MultiSteps), raise at the first update.
      rows: which rows are trained: ids or a mask (num_rows,) if there is one table, or a dictionary of them, whose keys
        are parts of the paths of parameters. All other rows keep their bits, and norms leave out their gradients.

    Returns:
      A transformation. Its updates are RowSparse for RowSparse gradients; `optax.apply_updates` applies them. Donate
      the state, or a step copies it.

    Raises:
      TypeError: if inner is no transformation; from update, if parameters or state are packed (`js.pack`).
      ValueError: from update, if a gradient's shape is not its parameter's, or if inner does not act on each row by
        itself; the message names the line.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.lazy(optax.sgd(1.0))
      >>> params = jnp.ones((4, 1))
      >>> grads = js.RowSparse(jnp.array([2, 2]), jnp.array([[.25], [.25]]), (4, 1))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates).ravel().tolist()
      [1.0, 1.0, 0.5, 1.0]
    """
    check_transformation("lazy", "inner", inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, tree = _flatten(updates, is_leaf=is_row_sparse)
        if not any(map(is_row_sparse, grads)):
            if rows is not None:
                do = "In a step under js.jit or js.rowwise, give it to that."
                raise ValueError(message("lazy", "rows", "left out where no gradient is a RowSparse", "it", do))
            return inner.update(updates, state, params, **extra_args)
        do = "A packed state is for js.jit or js.make_train_step; here, give js.unpack(params) and js.unpack(state)."
        check_arrays("lazy", params, "params", do)
        check_arrays("lazy", state, "state", do)
        try:
            values = [None] * len(grads) if params is None else tree.flatten_up_to(params)
        except ValueError:
            got = f"{jax.tree.structure(params)} for {tree}"
            raise ValueError(message("lazy", "params", "a tree like the gradient", got)) from None
        for i, (g, p) in enumerate(zip(grads, values, strict=True)):
            if is_row_sparse(g) and p is not None and jnp.shape(p) != g.shape:
                must = f"of the parameter's shape, {jnp.shape(p)}"
                at = jax.tree_util.keystr(_flatten_with_path(updates, is_leaf=is_row_sparse)[0][i][0])
                raise ValueError(message("lazy", "updates", must, f"{g.shape}{f' at {at}' if at else ''}"))
        with jax.named_scope("lazy_coalesce"):
            grads = [coalesce(g) if is_row_sparse(g) else g for g in grads]
            if rows is not None:
                paths = [jax.tree_util.keystr(p) for p, _ in _flatten_with_path(updates, is_leaf=is_row_sparse)[0]]
                tables = {i: (paths[i], g.num_rows, i) for i, g in enumerate(grads) if is_row_sparse(g)}
                dense = [path for i, path in enumerate(paths) if i not in tables]
                trained = trained_rows("lazy", rows, tables, dense)
                grads = [trained[i].restricted(g) if i in trained else g for i, g in enumerate(grads)]
        with jax.named_scope("lazy_update"):
            return _update(inner, tree, grads, state, params, extra_args)

    def init_fn(params: Any) -> Any:
        state = inner.init(params)
        if rows is not None and any(map(_replays, jax.tree.leaves(state, is_leaf=_replays))):
            do = "Its rows move on where they are not read. Use untouched='freeze'."
            raise ValueError(message("lazy", "rows", "left out where an optimizer replays", "both", do))
        return state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _replays(state: Any) -> bool:
    return getattr(state, "replays", False) is True


def _update(inner: Any, tree: Any, grads: list[Any], state: Any, params: Any, extra_args: dict[str, Any]) -> Any:
    """inner.update with some gradients that are RowSparse with unique ids."""
    by_row = {i for i, g in enumerate(grads) if is_row_sparse(g)}
    slots, slot_tree = _flatten(state)
    shapes = [jax.ShapeDtypeStruct(g.shape, g.dtype) if i in by_row else g for i, g in enumerate(grads)]
    planned = plan_update(inner, tree, shapes, state, params, extra_args, by_row)
    arrays = [
        x.rows if i in by_row else jnp.asarray(x) for i, x in enumerate([*grads, *slots, *jax.tree.leaves(params)])
    ]
    ids = {planned.leaves[i]: grads[i].ids for i in by_row}
    spaces = {c: Space(ids[c], planned.classes[c], {}) for c in ids}
    walk = Walk(planned.plan, spaces, defers=not (planned.plan.axes or _jax.varying_axes([arrays, ids])))

    def block(i: int) -> Any:
        if i not in by_row:
            return walk.leaf(arrays[i], i)
        given, num_rows = (
            rows_of(arrays[i], i, walk.ids(i), aligned=True),
            walk.num_rows(i),
        )  # padding rows may hold anything
        return walk.by_row(i, arrays[i], 0, [given], lambda part, x: jnp.where(part.is_real(num_rows, x.ndim), x, 0))

    def value(i: int) -> Any:
        if i not in planned.leaves:
            return FullArray(arrays[i])
        return rows_of_update(block(i), i) if i in by_row else rows_of_leaf(block(i), i, arrays[i])

    values = [value(i) for i in range(len(arrays))]
    outs = walk.run(planned.program, values)
    results: list[Any] = [
        None if i in planned.leaves else walk.full_array(v) if isinstance(v, Rows) else jnp.asarray(array_of(v))
        for i, v in enumerate(outs)
    ]
    for c, space in spaces.items():
        old = {i: arrays[i] for i in planned.leaves if planned.leaves[i] == c}
        new = walk.changed_blocks({i: (values[i], outs[i]) for i in old if i < len(outs)})
        written = write(new, old, space.ids, space.num_rows, by_row & old.keys())
        for i in old.keys() & set(range(len(outs))):
            results[i] = RowSparse(ids[c], written[i], grads[i].shape, unique=True) if i in by_row else written[i]
    return tree.unflatten(results[: len(grads)]), slot_tree.unflatten(results[len(grads) :])


def plan_update(
    inner: Any, tree: Any, grads: Sequence[Any], state: Any, params: Any, extra_args: dict[str, Any], by_row: set[int]
) -> Planned:
    """The plan of inner.update. The program's inputs are the leaves of gradient, state and params; its outputs are the
    leaves of updates and state. Arrays may be abstract.

    Args:
      tree, grads: the structure and the leaves of the gradient.
      by_row: the numbers of the leaves that are zero except in some rows.

    Raises:
      ValueError: if inner does not act on each row by itself.
    """
    slots, slot_tree = _flatten(state)
    values, values_tree = _flatten(params)

    def update(*leaves: Any) -> list[Any]:
        first, rest = leaves[: len(grads)], leaves[len(grads) :]
        old, p = rest[: len(slots)], values_tree.unflatten(rest[len(slots) :])
        with tracing():
            updates, new = inner.update(tree.unflatten(first), slot_tree.unflatten(old), p, **extra_args)
        new_leaves, new_tree = _flatten(new)
        if new_tree != slot_tree:
            must = "a transformation whose state keeps its structure"
            raise ValueError(message("lazy", "inner", must, f"{slot_tree}, then {new_tree}"))
        return [*tree.flatten_up_to(updates), *new_leaves]

    leaves = [*grads, *slots, *values]
    program = _jax.trace(update, *leaves)
    places = {i: i for i in range(len(grads) + len(slots))}
    can = {i for i in places if i >= len(grads) and jnp.ndim(leaves[i])}
    can = {i for i in can if _jax.shape(program.outputs[i]) == leaves[i].shape}
    first = len(grads) + len(slots)  # of the parameters
    rows = {i: [first + i] if values else [] for i in by_row}
    settled = settle(program, leaves, places, can, updates=rows)
    planned, walked = settled.planned(), settled.walked
    try:
        for why in (settled.dense_reasons[i] for i in by_row & settled.dense_reasons.keys()):
            raise refused(str(why), "It looks across rows.")
        if len({planned.leaves[i] for i in by_row}) < len(by_row):
            raise refused("one that adds the gradients of two tables", "It looks across rows.")
        paths = {i: jax.tree_util.keystr(path) for i, (path, _) in enumerate(_flatten_with_path(state)[0], len(grads))}
        check(walked, places, paths, set(), settled.row_leaves, settled.lost_updates)
    except RefusedError as error:
        must = "a transformation that acts on each row by itself"
        raise ValueError(message("lazy", "inner", must, error.got, error.do)) from None
    warn_once("js.lazy", planned)
    return planned


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """({name: leaf} in the order of the leaves, the tree's definition). A RowSparse or a `Storage` is one leaf.

    Names leave out flax's boxes around parameters (linen's Partitioned, nnx's Variable), because init and update may be
    called with and without boxes.
    """
    flat, definition = _flatten_with_path(tree, is_leaf=_is_one)
    named = {_name(path): leaf for path, leaf in flat}
    if len(named) < len(flat):  # {"a.b": x, "a": {"b": y}}
        named = {_name(path, simple=False): leaf for path, leaf in flat}
    return named, definition


def _is_one(x: Any) -> bool:
    return is_row_sparse(x) or is_stored(x)


def per_leaf(make: Any, params: Any) -> Any:
    """{name: make(leaf)}: a part of the state with an entry for each parameter.

    It is not a tree like params, because flax would give its arrays the partitioning of params, which have another
    rank. Without leaves, `params` is returned: optax.tree_utils.tree_map_params calls init with such placeholders.
    """
    leaves, _ = named_leaves(params)
    return {name: make(leaf) for name, leaf in leaves.items()} if leaves else params


def _name(path: Any, simple: bool = True) -> str:
    keys = tuple(k for k in path if str(k) != ".value")
    return jax.tree_util.keystr(keys, simple=simple, separator="." if simple else "") or "array"
