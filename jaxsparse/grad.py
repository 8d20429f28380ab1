"""`value_and_grad` and `grad`: as in JAX, with row-sparse gradients where the function only reads rows.

The function is traced once. `reads.find_reads` tells which leaves are only read by rows; each of their reads becomes
`read(leaf) + delta` with the leaf a constant, and the program is differentiated with respect to the deltas (zeros,
which XLA removes) and to all other leaves. A delta's cotangent and the ids of its read are the row-sparse gradient;
several reads are put end to end.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import chosen_paths, message
from jaxsparse._jax import Program, vary, varying_axes
from jaxsparse.batch import find_batches
from jaxsparse.interpret import RowIds, WithDeltas
from jaxsparse.reads import Columns, Known, Read, Table, find_reads
from jaxsparse.rows import RowSparse, concatenate_blocks, distinct_ids, row_ids, zero_after
from jaxsparse.tracing import is_tracing


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
        (path, leaf), or names, one of which is a part of the path: those leaves and no others, even where they are
        not used at all. The path is as jax.tree_util.keystr has it: "['params']['Embed_0']['embedding']".

    Returns:
      A function of fun's arguments that returns (value, gradient), or ((value, aux), gradient), as jax.value_and_grad
      does. In the gradient, a leaf that is only read by rows is a `RowSparse` whatever its size; every other leaf is
      the array that jax.grad gives. A leaf that is not used at all is zeros.

    Raises:
      TypeError: if `fun` does not return a real scalar, or an argument to differentiate has leaves that are not
        floating.
      ValueError: if `tables` names a leaf that is used as a whole, with the line that does it, or no leaf at all.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"table": jnp.ones((5, 2)), "w": jnp.array([1., 2.])}
      >>> loss = lambda params, ids: jnp.sum(params["table"][ids] @ params["w"])
      >>> value, grads = js.value_and_grad(loss)(params, jnp.array([3, 0, 3]))
      >>> grads["table"].ids.tolist(), grads["table"].rows.tolist(), grads["w"].tolist()
      ([3, 0, 3], [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], [3.0, 3.0])
    """

    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        if is_tracing():  # a step under js.jit or js.rowwise is as a whole evaluated on the rows that it reads
            return jax.value_and_grad(fun, argnums, has_aux)(*args, **kwargs)
        traced = trace(fun, argnums, has_aux, args, kwargs)
        sparse = traced.sparse_leaves(tables)
        reads = [r for r in traced.reads if r.leaf in sparse]
        arrays = {i: traced.leaves[i] for i in sparse}
        others = [x for i, x in enumerate(traced.leaves) if i not in arrays]

        def run(deltas: list[Any], others: list[Any]) -> Any:
            it = iter(others)
            inputs = [Table(i, arrays[i].dtype) if i in arrays else next(it) for i in range(len(traced.leaves))]
            program = WithDeltas(arrays, deltas)
            value, *aux = program.run(traced.program, inputs)
            return value, (aux, program.ids)

        deltas = vary([jnp.zeros(r.out.shape, r.out.dtype) for r in reads], traced.axes)
        (value, (aux, ids)), (by_delta, by_leaf) = jax.value_and_grad(run, (0, 1), has_aux=True)(deltas, others)
        it = iter(by_leaf)
        with jax.named_scope("row_gradients"):
            ids = _after((value, aux, by_leaf), ids)
            gradient = [
                _row_sparse(i, arrays[i], reads, ids, by_delta) if i in arrays else next(it)
                for i in range(len(traced.leaves))
            ]
        gradients = traced.unflatten(gradient)
        return ((value, traced.aux(aux)) if has_aux else value), gradients

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


class Traced:
    """A traced function: its program, the leaves it was traced at, and how its leaves are used."""

    def __init__(
        self,
        program: Program,
        leaves: list[Any],
        unflatten: Callable[[list[Any]], Any],
        aux: Callable[[list[Any]], Any],
        known: Callable[[Any], Known | None],
        paths: list[str],
    ) -> None:
        self.program, self.leaves, self.unflatten, self.aux, self.paths = program, leaves, unflatten, aux, paths
        self.axes = varying_axes(leaves)
        candidates = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        self.reads, self.dense = find_reads(program, candidates, known)

    def distinct(self, leaf: int) -> int | None:
        """A bound on the number of distinct ids in the reads of a leaf, if there is one smaller than their number."""
        return distinct_ids([(r.distinct, math.prod(r.ids)) for r in self.reads if r.leaf == leaf])

    def values(self, leaf: int) -> jax.Array | None:
        """All rows that the reads of a leaf name, and no others, if there is a shorter list of them than the ids."""
        values = [r.values for r in self.reads if r.leaf == leaf]
        return None if not values or any(v is None for v in values) else jnp.concatenate(values)

    def sparse_leaves(self, tables: Tables = None) -> list[int]:
        """The leaves that get row-sparse gradients."""
        read = {r.leaf for r in self.reads}
        if tables is None:
            return [i for i in range(len(self.leaves)) if i in read and i not in self.dense]
        flags = chosen_paths("value_and_grad", tables, self.paths, self.leaves)
        chosen = [i for i, flag in enumerate(flags) if flag]
        for i in chosen:
            if i in self.dense:
                got = f"{self.paths[i]}, which {self.dense[i].cause} uses as a whole at {self.dense[i].source}"
                raise ValueError(message("value_and_grad", "tables", "leaves that are only read by rows", got))
            if self.leaves[i].ndim < 1:
                raise ValueError(message("value_and_grad", "tables", "leaves that have rows", self.paths[i]))
        return chosen


def trace(fun: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, args: Any, kwargs: Any) -> Traced:
    """Traces `fun` with respect to the arguments in `argnums`; everything else is closed over."""
    several = not isinstance(argnums, int)
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    for n in numbers:
        if not -len(args) <= n < len(args):
            do = "Pass it by position."
            raise TypeError(
                message("value_and_grad", "argnums", f"positions among the {len(args)} positional arguments", n, do)
            )
    numbers = [n % len(args) for n in numbers]
    leaves, treedef = jax.tree.flatten([args[n] for n in numbers])
    leaves = vary([_check_leaf(x) for x in leaves], varying_axes((args, kwargs)))
    shape_of_aux: list[Any] = []

    def flat_fun(*leaves: Any) -> Any:
        full = list(args)
        for n, arg in zip(numbers, jax.tree.unflatten(treedef, leaves), strict=True):
            full[n] = arg
        out = fun(*full, **kwargs)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                message(
                    "value_and_grad", "fun", "a function that returns (scalar, aux), as has_aux=True says", repr(out)
                )
            )
        value, aux = out if has_aux else (out, None)
        _check_value(value)
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        arrays = [_jax.is_array_or_number(x) for x in aux_leaves]
        shape_of_aux[:] = [aux_tree, [None if a else x for a, x in zip(arrays, aux_leaves, strict=True)], arrays]
        return [value, *(x for a, x in zip(arrays, aux_leaves, strict=True) if a)]

    known = _known_arrays((args, kwargs))  # now: fun may change dicts that it is given
    program = _jax.trace(flat_fun, *leaves)

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
    traced = Traced(program, leaves, unflatten, aux, known, paths)
    _warn_of_closed_regions(traced)
    return traced


_WARNED: set[str] = set()  # source lines


def _warn_of_closed_regions(traced: Traced) -> None:
    """Once for each line that makes a gradient dense only because this library cannot open what is there."""
    for i, use in traced.dense.items():
        if use.closed and use.source not in _WARNED:
            _WARNED.add(use.source)
            path = traced.paths[i] or "the parameter"
            warnings.warn(f"The gradient of {path} is dense: {use.cause} at {use.source}. {use.advice}", stacklevel=2)


def _check_leaf(x: Any) -> Any:
    if not hasattr(x, "dtype") and not isinstance(x, float):
        raise TypeError(
            message("value_and_grad", "argnums", "arguments whose leaves are floating arrays", type(x).__name__)
        )
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        do = "Pass integers and keys in another argument."
        raise TypeError(
            message(
                "value_and_grad", "argnums", "arguments whose leaves are floating arrays", f"a leaf of {x.dtype=}", do
            )
        )
    return x


def _check_value(value: Any) -> None:
    got: Any = jax.typeof(value) if _jax.is_array_or_number(value) else type(value).__name__
    if getattr(got, "shape", None) != () or not jnp.issubdtype(got.dtype, jnp.floating):
        do = "Reduce it to one number; return (scalar, aux) with has_aux=True."
        raise TypeError(message("value_and_grad", "fun", "a function that returns a real scalar", got, do))


def _known_arrays(arguments: Any) -> Callable[[Any], Known | None]:
    """What the batches among the arguments know of their integer arrays."""
    known: list[tuple[Any, Known]] = []
    for batch in find_batches(arguments):
        for array, matrix, distinct, ordered in batch.leaves():
            if distinct is not None and matrix is not None and ordered is not None:
                known.append((array, Known(distinct, columns=Columns(ordered, matrix))))
            elif distinct is not None:
                known.append((array, Known(distinct, ordered)))
    return _jax.ByIdentity(known)


def _after(results: Any, ids: Sequence[RowIds]) -> list[RowIds]:
    """The ids, made to depend on the results.

    An update writes rows into the donated table at these ids. Where its gradient does not depend on some read of the
    table (a loss that is linear in the rows, a metric, another parameter's gradient), nothing else says that the read
    comes first.
    """
    zero = zero_after(*(x for x in jax.tree.leaves(results) if jnp.issubdtype(jnp.result_type(x), jnp.number)))
    return [(each + zero, weights) for each, weights in ids]


def _row_sparse(
    leaf: int, table: Any, reads: Sequence[Read], ids: Sequence[RowIds], cotangents: Sequence[Any]
) -> RowSparse:
    """The gradient of one leaf, of all its reads."""
    blocks = []
    for read, (read_ids, weights), g in zip(reads, ids, cotangents, strict=True):
        if read.leaf != leaf:
            continue
        rows = g
        if g.ndim < read_ids.ndim + table.ndim - 1:  # a bag: its cotangent is that of every id in it
            rows = jnp.broadcast_to(jnp.expand_dims(g, read_ids.ndim - 1), read_ids.shape + table.shape[1:])
            if weights is not None:
                rows = rows * weights.reshape(weights.shape + (1,) * (table.ndim - 1))
        rows = rows.reshape(-1, *table.shape[1:]).astype(table.dtype)
        blocks.append(
            RowSparse(row_ids(read_ids, table.shape[0]).reshape(-1), rows, table.shape, distinct=read.distinct)
        )
    if not blocks:  # chosen with tables=, and not used at all
        return RowSparse(jnp.zeros(0, jnp.int32), jnp.zeros((0, *table.shape[1:]), table.dtype), table.shape)
    return concatenate_blocks(blocks)
