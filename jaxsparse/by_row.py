"""Whether a transformation acts on each table row by itself, and which of its state has one row per table row.

Both are asked of the transformation itself. `find_row_leaves` evaluates `inner.init` abstractly for made-up numbers of
rows and sees which state arrays change with them: comparing shapes with the real num_rows instead would take a block
of k = num_rows, or a hidden layer of that width, for a table. `check_by_row` runs `inner` on whole small tables and on
blocks of their rows. A norm of the gradient over a whole table is no obstacle: rows outside the block have no
gradient, so the block has the same norm. A norm of the parameters is one (LAMB, LARS), and so are means over rows,
statistics kept across them, and draws that depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import message

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods

# Made-up numbers of rows that no real dimension is likely to equal; the second evaluation exposes one that does. The
# third has wider rows as well: what changes with the width, but not with the number of rows, looks across rows.
_PROBES = ((1_000_003, 0), (1_500_007, 0), (1_000_003, 1))


def find_row_leaves(inner: Any, tree: Any, leaves: Sequence[Any], flags: Sequence[bool]) -> list[int | None]:
    """For every leaf of inner's state, which parameter's rows it has one row for, or None.

    Args:
      inner: the transformation.
      tree, leaves: the parameters' structure and arrays, of which only shape and dtype are used.
      flags: which of them are tables.

    Raises:
      ValueError: if some state is made for a table as a whole.
    """

    def evaluate(probe: tuple[int, int]) -> list[tuple[int, ...]]:
        structs = []
        for i, (x, is_table) in enumerate(zip(leaves, flags, strict=True)):
            shape = (probe[0] + i, *(d + probe[1] for d in x.shape[1:])) if is_table else jnp.shape(x)
            structs.append(jax.ShapeDtypeStruct(shape, jnp.result_type(x)))
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(inner.init, tree.unflatten(structs)))]

    out: list[int | None] = []
    for one, more, wider in zip(*map(evaluate, _PROBES), strict=True):
        if one == more == wider:
            out.append(None)
            continue
        leaf = one[0] - _PROBES[0][0]
        if one == more or more[0] - _PROBES[1][0] != leaf or one[1:] != more[1:] or not 0 <= leaf < len(leaves):
            got = (
                f"one with state of shape {one} for tables of {_PROBES[0][0]} rows and {more} for {_PROBES[1][0]} rows"
            )
            do = "Use a transformation without statistics across rows; adam, adagrad and rmsprop have none."
            raise ValueError(message("lazy", "inner", "a transformation that acts on each row by itself", got, do))
        out.append(leaf)
    return out


_ROWS, _TOUCHED = 7, np.array([1, 4])
_SCALES = (0.1, 1e-3, 1e3, 3.0)  # of the gradients, a step each: some clip above a size, some below


def check_by_row(
    inner: Any,
    tree: Any,
    leaves: Sequence[Any],
    flags: Sequence[bool],
    *,
    with_params: bool = True,
    extra_args: dict[str, Any] | None = None,
) -> None:
    """Raises ValueError if `inner` treats rows 1 and 4 of a small table otherwise when it sees these two alone.

    Arguments are those of `find_row_leaves`; of the leaves only rank and dtype are used. Numbers among the further
    arguments of update are replaced by ones. What a transformation does only later, or only to large tables, it cannot
    see.
    """
    rng = np.random.default_rng(0)
    only_touched = np.isin(np.arange(_ROWS), _TOUCHED)

    def draw(scale: float) -> list[Any]:
        out = []
        for leaf, is_table in zip(leaves, flags, strict=True):
            shape = tuple(min(d, 3) for d in jnp.shape(leaf))
            shape = (_ROWS, *shape[1:]) if is_table else shape
            out.append(jnp.asarray(scale * rng.normal(size=shape), jnp.result_type(leaf)))
        return out

    def take(x: Any) -> Any:
        return jnp.concatenate([x[_TOUCHED], jnp.zeros_like(x[:1])])  # two rows, and one of padding, as lazy makes them

    def parts(xs: list[Any]) -> Any:
        return tree.unflatten([take(x) if t else x for x, t in zip(xs, flags, strict=True)])

    def keep_touched(x: Any) -> Any:
        return jnp.where(only_touched.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

    def one(x: Any) -> Any:
        return jnp.ones(jnp.shape(x), jnp.result_type(x)) if hasattr(x, "dtype") or isinstance(x, (int, float)) else x

    compared = []
    try:
        with jax.ensure_compile_time_eval():
            values = draw(1.0)
            update = jax.jit(partial(inner.update, **jax.tree.map(one, extra_args or {})))
            params, block_params = (tree.unflatten(values), parts(values)) if with_params else (None, None)
            state = inner.init(tree.unflatten(values))
            owners = find_row_leaves(inner, tree, values, flags)
            for scale in _SCALES:
                _, state = update(tree.unflatten(draw(scale)), state, params)
                grads = [keep_touched(g) if t else g for g, t in zip(draw(scale), flags, strict=True)]
                slots, slot_tree = _flatten(state)
                block = slot_tree.unflatten([x if i is None else take(x) for x, i in zip(slots, owners, strict=True)])
                want = update(tree.unflatten(grads), state, params)
                both = want, update(parts(grads), block, block_params)
                compared.append(jax.tree.map(_concrete, both))
    except Exception:
        return  # it needs more than this, a mapped axis say; what is wrong with it shows where it is really called

    for (want, want_state), (got, got_state) in compared:
        for path, a, b, t in zip(_paths(want), jax.tree.leaves(want), jax.tree.leaves(got), flags, strict=True):
            _compare(f"the update{path and f' of parameter {path}'}", *((a[_TOUCHED], b[:2]) if t else (a, b)))
        states = jax.tree.leaves(want_state), jax.tree.leaves(got_state)
        for path, a, b, i in zip(_paths(want_state), *states, owners, strict=True):
            if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                _compare(f"state {path}", *((a, b) if i is None else (a[_TOUCHED], b[:2])))


def _concrete(x: Any) -> Any:
    """x, and an error if it is a tracer: of a rate, say, that optax.inject_hyperparams has in its own traced state."""
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _compare(what: str, want: Any, got: Any) -> None:
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    size = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))  # squares of 1e3 overflow float16
    if want.shape != got.shape or not np.allclose(want, got, rtol=1e-4, atol=1e-6 * size):
        broke = f"one for which {what} differs when other rows of the table are out of sight"
        do = "It looks across rows, or draws by shape; keep it for dense parameters, with optax.partition."
        raise ValueError(message("lazy", "inner", "a transformation that acts on each row by itself", broke, do))
