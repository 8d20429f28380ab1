"""`value_and_grad` and `grad`: as in JAX, but with row-sparse gradients of parameters that are only read by rows.

A function goes in; a function that returns its value and a gradient with RowSparse leaves comes out. Both are traced
once, at full shapes, and evaluated like a step (`rowwise.py`), on the rows that are read. If a table's gradient is not
zero in all other rows, it is dense.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import check_no_modules, chosen_paths, message, warn
from jaxsparse._context import is_tracing, tracing
from jaxsparse._jax import vary, varying_axes
from jaxsparse.ops.row_sparse import RowSparse
from jaxsparse.ops.rows import gather_rows, is_stored, zero_after
from jaxsparse.trace.dense import LARGE, advice_on_whole, closed_advice, first_use, why_not_read
from jaxsparse.trace.joined import read_tables_separately
from jaxsparse.trace.known_ids import known_of_traced
from jaxsparse.trace.plan import Reason
from jaxsparse.trace.planning import Planned, Walked, settle
from jaxsparse.trace.stacked import find_stacked
from jaxsparse.trace.tracing import with_nonempty_shapes
from jaxsparse.trace.values import ZERO, EqualRows, FullArray, Rows, array_of, rows_of_leaf
from jaxsparse.trace.walk import Walk
from jaxsparse.train.device_rows import choose_rows, ids_of


def value_and_grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, tables: Tables = None
) -> Callable[..., Any]:
    """A function that evaluates `fun` and its gradient, row-sparse where `fun` only reads rows.

    Args:
      fun: returns a real scalar, or with `has_aux` a pair (scalar, aux). It is traced; only the arguments in `argnums`
        become tracers, all others pass through untouched.
      argnums: which positional arguments to differentiate with respect to: pytrees of floating arrays.
      has_aux: whether `fun` returns (scalar, aux).
      tables: which leaves get row-sparse gradients. None: those that are only read by rows. Otherwise a function of
        (path, leaf), or parts of paths: those leaves and no others, even if they are not used at all. Paths are as
        jax.tree_util.keystr writes them: "['params']['Embed_0']['embedding']".

    Returns:
      A function of fun's arguments that returns (value, gradient), or ((value, aux), gradient), as jax.value_and_grad
      does. In the gradient, a leaf that is only read by rows is a `RowSparse`, whatever its size. It has a row for each
      distinct id, and padding: one row more than there are ids in all. Every other leaf is the array that jax.grad
      gives. If it has 65,536 rows or more and might be row-sparse, a warning says what to write instead, once for each
      leaf and line. A leaf that is not used at all is zeros.

    Raises:
      TypeError: if `fun` does not return a real scalar, or an argument to differentiate has leaves that are not
        floating, or nnx modules, for which there is `js.nnx.value_and_grad`.
      ValueError: if `tables` names a leaf that is used as a whole, with the line that does it, or no leaf at all.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"table": jnp.ones((5, 2)), "w": jnp.array([1., 2.])}
      >>> loss = lambda params, ids: jnp.sum(params["table"][ids] @ params["w"])
      >>> value, grads = js.value_and_grad(loss)(params, jnp.array([3, 0, 3]))
      >>> grads["table"]  # room for each id to be another row
      RowSparse(ids=int32[4], rows=float32[4,2], shape=(5, 2), unique=True)
      >>> grads["table"].todense()[jnp.array([0, 3])].tolist(), grads["w"].tolist()
      ([[1.0, 2.0], [2.0, 4.0]], [3.0, 3.0])
    """

    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        if is_tracing():  # js.jit and js.rowwise evaluate the whole step on the rows that it reads
            _numbers(argnums, args)
            return jax.value_and_grad(fun, argnums, has_aux)(*args, **kwargs)
        planned = plan_gradient(fun, argnums, has_aux, args, kwargs, tables)
        _warn_of_dense(planned, chosen=tables is not None)
        _warn_of_stacked(planned)
        leaves, inputs = planned.leaves_of_arguments, planned.inputs
        ids = ids_of(planned, inputs)
        spaces = {c: choose_rows(planned, c, ids) for c in planned.classes}
        values = [
            rows_of_leaf(gather_rows(x, spaces[planned.leaves[i]].ids), i, x, x)
            if i in planned.leaves
            else FullArray(x)
            for i, x in enumerate(inputs)
        ]
        walk = Walk(planned.plan, spaces)
        outs = walk.run(planned.program, values)
        arrays = [
            None if isinstance(v, Rows) and v.full is None else ids.checked(_full_array(walk, v), leaves) for v in outs
        ]
        gradient, others = outs[1 : 1 + len(leaves)], [arrays[0], *arrays[1 + len(leaves) :]]
        with jax.named_scope("row_gradients"):
            after = _zero_after([*others, *(arrays[1 + i] for i in range(len(leaves)) if i not in planned.leaves)])
            grads = [
                _row_sparse(walk, gradient[i], spaces[planned.leaves[i]].ids + after, i, x)
                if i in planned.leaves
                else _empty_gradient(x)
                if i in planned.unused
                else arrays[1 + i]
                for i, x in enumerate(leaves)
            ]
        value = (others[0], planned.aux(others[1:])) if has_aux else others[0]
        return value, planned.unflatten(grads)

    return value_and_grad_fun


def grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, tables: Tables = None
) -> Callable[..., Any]:
    """A function that evaluates the gradient of `fun`, row-sparse where `fun` only reads rows.

    Arguments and errors are those of `js.value_and_grad`.

    Returns:
      A function of fun's arguments that returns the gradient, or with `has_aux` the pair (gradient, aux), as jax.grad
      does.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.grad(lambda table, ids: jnp.sum(table[ids] ** 2))(jnp.ones((5, 1)), jnp.array([3])).todense().tolist()
      [[0.0], [0.0], [0.0], [2.0], [0.0]]
    """
    both = value_and_grad(fun, argnums, has_aux, tables=tables)

    def grad_fun(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return grad_fun


# None, names, or a function of (path, leaf).
Tables = str | Sequence[str] | Callable[[str, Any], bool] | None


@dataclasses.dataclass(frozen=True)
class PlannedGradient(Planned):
    """The plan of a function and its gradient. The program's outputs are the value, the gradient's leaves, and the
    arrays of aux.

    Attributes:
      leaves_of_arguments: the leaves of the arguments to differentiate: the first inputs of the program.
      inputs: all inputs: these leaves, and the arrays of batches that carry their distinct ids.
      paths: the paths of these leaves.
      unused: the leaves that `tables` names but that are not read.
      unflatten: makes the gradient from its leaves.
      aux: makes aux from its arrays.
    """

    leaves_of_arguments: list[Any]
    inputs: list[Any]
    paths: list[str]
    unused: set[int]
    unflatten: Callable[[list[Any]], Any]
    aux: Callable[[list[Any]], Any]

    def why_dense(self, i: int) -> Reason:
        """Why the gradient of a leaf is an array."""
        found = self.dense.get(i) or self._not_read(i)[0] or first_use(self.program, self.program.inputs[i])
        return found or Reason("not used", "")

    def advice(self, i: int) -> str:
        """What to write instead, so that the gradient of a large table is row-sparse; "" if there is nothing to say."""
        v, why = self.program.inputs[i], self.why_dense(i)
        if i not in self.dense or why.closed:
            return closed_advice(why) or self._not_read(i)[1]
        return advice_on_whole(self.program, v, why) if _jax.shape(v)[0] >= LARGE else ""

    def _not_read(self, i: int) -> tuple[Reason | None, str]:
        return why_not_read(self.program, self.program.inputs[i]) or (None, "")


def plan_gradient(
    fun: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, args: Any, kwargs: Any, tables: Tables
) -> PlannedGradient:
    """Traces `fun` and its gradient with respect to the arguments in `argnums`; everything else is closed over."""
    several = not isinstance(argnums, int)
    numbers = _numbers(argnums, args)
    with_paths = jax.tree_util.tree_flatten_with_path([args[n] for n in numbers], is_leaf=is_stored)[0]
    treedef = jax.tree.structure([args[n] for n in numbers])
    leaves: Any = [_check_leaf(x, jax.tree_util.keystr(path[1:])) for path, x in with_paths]
    leaves = vary(leaves, varying_axes((args, kwargs)))
    shape_of_aux: list[Any] = []

    def both(leaves: Sequence[Any], args: Any, kwargs: Any) -> list[Any]:
        def value_and_aux(leaves: list[Any]) -> Any:
            full = list(args)
            for n, arg in zip(numbers, jax.tree.unflatten(treedef, leaves), strict=True):
                full[n] = arg
            out = fun(*full, **kwargs)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                must = "a function that returns (scalar, aux), as has_aux=True says"
                raise TypeError(message("value_and_grad", "fun", must, repr(out)))
            value, aux = out if has_aux else (out, None)
            _check_value(value)
            aux_leaves, aux_tree = jax.tree.flatten(aux)
            arrays = [_jax.is_array_or_number(x) for x in aux_leaves]
            shape_of_aux[:] = [aux_tree, [None if a else x for a, x in zip(arrays, aux_leaves, strict=True)], arrays]
            return value, [x for a, x in zip(arrays, aux_leaves, strict=True) if a]

        (value, aux), gradient = jax.value_and_grad(value_and_aux, has_aux=True)(list(leaves))
        return [value, *gradient, *aux]

    def unflatten(gradient: list[Any]) -> Any:
        out = jax.tree.unflatten(treedef, gradient)
        return tuple(out) if several else out[0]

    def aux(arrays: list[Any]) -> Any:
        tree, static, is_array = shape_of_aux
        it = iter(arrays)
        return jax.tree.unflatten(tree, [next(it) if a else x for a, x in zip(is_array, static, strict=True)])

    by_path = [jax.tree_util.tree_flatten_with_path(args[n])[0] for n in numbers]
    argument = (lambda n: f"[{n}]") if several else (lambda n: "")
    paths = [argument(n) + jax.tree_util.keystr(path) for n, a in zip(numbers, by_path, strict=True) for path, _ in a]
    chosen = None if tables is None else chosen_paths("value_and_grad", tables, paths, leaves)
    candidates = {i for i, x in enumerate(leaves) if x.ndim and x.shape[0] and (chosen is None or chosen[i])}
    places = {i: 1 + i for i in range(len(leaves))}
    with tracing():
        known, arrays, with_arrays = known_of_traced(args, kwargs, len(leaves))
        program = _jax.trace(lambda leaves, arrays: both(leaves, *with_arrays(arrays)), leaves, arrays)
        program = read_tables_separately(program, [*leaves, *arrays], candidates)
        assumed_read = _would_be_read(both, leaves, args, kwargs, places, candidates)
    settled = settle(
        program,
        [*leaves, *arrays],
        places,
        candidates,
        assumed_read,
        unfit_leaves=functools.partial(_unfit_leaves, places),
    )
    unused = set()
    for i in (i for i, flag in enumerate(chosen or ()) if flag and i not in settled.row_leaves):
        why = settled.dense_reasons.get(i) or first_use(program, program.inputs[i])
        if why is not None:
            got = f"{paths[i]}, which {why.cause} uses as a whole at {why.source}"
            raise ValueError(message("value_and_grad", "tables", "leaves that are only read by rows", got))
        if leaves[i].ndim < 1:
            raise ValueError(message("value_and_grad", "tables", "leaves that have rows", paths[i]))
        unused.add(i)
    return PlannedGradient(
        **vars(settled.planned()) | {"known": known},
        inputs=[*leaves, *arrays],
        leaves_of_arguments=leaves,
        paths=paths,
        unused=unused,
        unflatten=unflatten,
        aux=aux,
    )


def _numbers(argnums: int | Sequence[int], args: Any) -> list[int]:
    """Which arguments to differentiate with respect to."""
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    for n in numbers:
        if not -len(args) <= n < len(args):
            must = f"positions among the {len(args)} positional arguments"
            raise TypeError(message("value_and_grad", "argnums", must, n, "Pass it by position."))
    check_no_modules("value_and_grad", "argnums", [args[n] for n in numbers])
    return [n % len(args) for n in numbers]


def _would_be_read(
    both: Callable[..., list[Any]],
    leaves: list[Any],
    args: Any,
    kwargs: Any,
    places: dict[int, int],
    candidates: set[int],
) -> set[int]:
    """The leaves that would be read by rows if the batch had ids. Without ids the program has no reads."""
    others, tree = jax.tree.flatten((args, kwargs))
    if not any(hasattr(x, "dtype") and 0 in jnp.shape(x) for x in others):
        return set()
    known = {i for i, x in enumerate(others) if hasattr(x, "dtype")}
    nonempty = with_nonempty_shapes([x for i, x in enumerate(others) if i in known], {})

    def traced(leaves: list[Any], arrays: list[Any]) -> list[Any]:
        it = iter(arrays)
        return both(leaves, *jax.tree.unflatten(tree, [next(it) if i in known else x for i, x in enumerate(others)]))

    try:
        program = _jax.trace(traced, leaves, nonempty)
    except Exception:  # the function needs the given shapes, or values
        return set()
    program = read_tables_separately(program, [*leaves, *(nonempty or ())], candidates)
    settled = settle(
        program, [*leaves, *(nonempty or ())], places, candidates, unfit_leaves=functools.partial(_unfit_leaves, places)
    )
    return settled.row_leaves


def _unfit_leaves(places: dict[int, int], walked: Walked, chosen: set[int]) -> dict[int, Reason]:
    """The leaves whose gradient is not zero outside the rows that are read."""
    find, plan, found = walked.plan.find, walked.plan, dict[int, Reason]()

    def of_class(node: int, why: Reason) -> dict[int, Reason]:
        return {i: why for i in chosen if find(i) == find(node)}

    for node, why in plan.refused.items():
        found |= of_class(node, why)
    for node, source in walked.update_sums:
        found |= of_class(node, Reason(f"a sum over all rows of what has a gradient in it: {source}", ""))
    for number in walked.ids.outputs_with_effects:  # they would happen twice
        read = walked.reads[number]
        found |= of_class(read.node, Reason("row ids that come from a callback or print", read.source))
    for i in chosen:
        out = walked.outs[places[i]]
        zero = out.zero if isinstance(out, EqualRows) else isinstance(out, Rows) and out.outside == ZERO
        if not zero or (isinstance(out, Rows) and (out.axis != 0 or find(out.node) != find(i))):
            sums = [why for why, node in plan.table_sums.items() if find(node) == find(i)]
            others = [why for node, why in plan.not_by_row.items() if find(node) == find(i)]
            unknown = Reason("its gradient is not zero in rows that are not read", "")
            found[i] = next(iter([*sums, *others]), unknown)
    for j, out in enumerate(walked.outs):
        if isinstance(out, Rows) and out.full is None and j not in places.values():
            found |= of_class(out.node, Reason("it is returned", ""))
    return found


_WARNED: set[str] = set()  # lines


def _warn_of_dense(planned: PlannedGradient, *, chosen: bool) -> None:
    """Warns once for each line that makes a table's gradient dense though it is read by rows, or might be; and for each
    line whose primitive this library cannot look into.

    Args:
      row_leaves: whether the caller has chosen the leaves.
    """
    for i in sorted(set(range(len(planned.paths))) - planned.leaves.keys() - planned.unused):
        why, advice = planned.why_dense(i), planned.advice(i)
        key = why.source if why.closed else f"{planned.paths[i]}: {why}"
        if advice and (why.closed or not chosen) and key not in _WARNED:
            _WARNED.add(key)
            warn(f"The gradient of {planned.paths[i] or 'the parameter'} is dense: {why}. {advice}")


def _warn_of_stacked(planned: PlannedGradient) -> None:
    """Warns once for each line that reads a row of one of several tables in one array: a RowSparse has no such ids."""
    found = find_stacked(planned.program, {i: 1 + i for i in range(len(planned.paths))}, in_regions=True)
    for i, shape in found.shapes.items():
        sources = [read.source for read in planned.reads if read.node == i] or [planned.why_dense(i).source]
        if len(shape) < 3 or i in planned.unused or sources[0] in (*_WARNED, ""):
            continue
        _WARNED.add(sources[0])
        what = f"The gradient of {planned.paths[i] or 'the parameter'} {shape} has whole tables in it"
        do = "Leave such a step to js.jit, which works on the rows that are read."
        warn(f"{what}: it is read by table and row at {sources[0]}, which no id of a RowSparse can name. {do}")


def _check_leaf(x: Any, path: str) -> Any:
    must, at = "arguments whose leaves are floating arrays", f" at {path}" if path else ""
    if is_stored(x):
        do = "A packed state is for js.jit or js.make_train_step; here, differentiate js.unpack(params)."
        raise TypeError(message("value_and_grad", "argnums", must, f"a {type(x).__name__} table{at}", do))
    if not hasattr(x, "dtype") and not isinstance(x, float):
        do = "Pass what is no parameter in another argument, or close over it (eqx.partition, nnx.split)."
        raise TypeError(message("value_and_grad", "argnums", must, f"a {type(x).__name__}{at}", do))
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        do = "Pass integers and keys in another argument."
        raise TypeError(message("value_and_grad", "argnums", must, f"a leaf of dtype {x.dtype}{at}", do))
    return x


def _check_value(value: Any) -> None:
    got: Any = jax.typeof(value) if _jax.is_array_or_number(value) else type(value).__name__
    if getattr(got, "shape", None) != () or not jnp.issubdtype(got.dtype, jnp.floating):
        do = "Reduce it to one number; return (scalar, aux) with has_aux=True."
        raise TypeError(message("value_and_grad", "fun", "a function that returns a real scalar", got, do))


def _full_array(walk: Walk, v: Any) -> Any:
    return walk.full_array(v) if isinstance(v, Rows) else jnp.asarray(array_of(v))


def _row_sparse(walk: Walk, v: Any, ids: jax.Array, i: int, leaf: jax.Array) -> RowSparse:
    """The gradient of a table, from the value `v` of the program's output."""
    rows = walk.as_rows(v, i, 0)
    assert rows is not None, "its rows are along the first axis, as the plan has found"
    return RowSparse(ids, rows.block, leaf.shape, unique=True)


def _empty_gradient(leaf: jax.Array) -> RowSparse:
    return RowSparse(jnp.zeros(0, jnp.int32), jnp.zeros((0, *leaf.shape[1:]), leaf.dtype), leaf.shape, unique=True)


def _zero_after(results: list[Any]) -> jax.Array:
    """The integer 0, computed after these arrays.

    An update writes rows into the donated table at these ids. The gradient may not depend on some read of the table:
    the loss is linear in the rows, or the read is for a metric or for another parameter's gradient. This makes the
    write wait for the read.
    """
    return zero_after(*(x for x in results if x is not None and jnp.issubdtype(jnp.result_type(x), jnp.number)))
