"""`pack`: stores a state's tables of narrow rows for TPU. And the warnings that a table should be packed or donated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxsparse._checks import chosen_paths, message, warn
from jaxsparse.ops.packed import is_narrow, is_packed, pack_array, unpack_array
from jaxsparse.optim.replaying import replay_states

MIN_ROWS = 1 << 16  # of a table that is packed without being named


def pack(tree: Any, tables: Any = None) -> Any:
    """A state whose tables are packed for TPU, where a step would copy them whole otherwise.

    On TPU, XLA copies tables whose rows are no multiple of 128 numbers at each step that reads some of their rows;
    `js.jit` warns of that, and `js.explain` says of which. A packed row has 128 // d rows of d numbers beside each
    other; rows of more than 128 numbers are padded to the next multiple. So memory stays the same where d divides 128,
    and is 128 / 96 times as much at d = 96. `js.jit`, `js.rowwise`, `js.make_train_step`, `js.evaluate` and
    `js.predict` take a packed state in place of the other; what they are given (a step, a loss, a metric) sees arrays
    (num_rows, ...) as before. What it uses as a whole is unpacked for it, and so is, with a warning, what row ids are
    made of and what a step does not return. To everything else, `js.unpack` first. What flax.serialization saves of a
    packed state is what it saves of the unpacked one.

    Args:
      tree: a pytree of parameters and the optimizer's state together: a TrainState, for one; or of parameters alone,
        before `tx.init`. Arrays (num_rows, d, ...), or abstract ones.
      tables: which leaves: parts of their paths, as in `js.value_and_grad`, or a function of (path, leaf). None: all
        of at least 65,536 rows. Of these, those are packed whose rows are no multiple of 128 numbers.

    Returns:
      The tree, with `Packed` in their places; its other leaves are those of the given one. On other platforms it is
      right too, and slower.

    Raises:
      ValueError: if `tables` names no leaf, or a table's rows are on several devices.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> packed = js.pack({"t": jnp.ones((1000, 16)), "w": jnp.ones(16)}, tables="t")
      >>> packed["t"], packed["t"].data.shape
      (Packed(float32[1000, 16]), (125, 128))
      >>> js.unpack(packed)["t"].shape
      (1000, 16)
    """
    with_paths, definition = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    paths, leaves = [jax.tree_util.keystr(path) for path, _ in with_paths], [x for _, x in with_paths]
    if tables is None:
        chosen = [is_narrow(x) and x.shape[0] >= MIN_ROWS for x in leaves]
    else:
        chosen = chosen_paths("pack", tables, paths, leaves)
    history = {id(x) for state in replay_states(tree) for x in state.history.values()}  # has steps for rows
    out = []
    for path, x, is_chosen in zip(paths, leaves, chosen, strict=True):
        out.append(pack_array(x) if is_chosen and is_narrow(x) and id(x) not in history else x)
        sharding = getattr(x, "sharding", None)
        if out[-1] is not x and sharding is not None and not sharding.is_fully_replicated:
            do = "Give a table over several devices rows of a multiple of 128 numbers."
            raise ValueError(
                message("pack", "tree", "one whose tables are whole on each device", f"{path}: {sharding}", do)
            )
    return jax.tree.unflatten(definition, out)


def copied_whole(x: Any, platform: str) -> bool:
    """Whether a step that reads rows of an array has to copy all of it: what `pack` is for."""
    return platform == "tpu" and is_narrow(x)


def warn_of_copies(name: str, tables: dict[str, Any], platform: str) -> None:
    """Warns once of the arrays, by path, that a step copies whole."""
    paths = [path for path, x in tables.items() if copied_whole(x, platform)]
    if paths and (name, *paths) not in _WARNED:
        _WARNED.add((name, *paths))
        size = sum(x.size * x.dtype.itemsize for path, x in tables.items() if path in paths) / 1e6
        do = "Pack them before the first step: state = js.pack(state)."
        warn(f"{name}: on TPU, XLA copies {', '.join(paths)} at each step, {size:,.0f} MB to and fro. {do}")


def megabytes(*arrays: Any) -> str:
    return f"{sum(x.size * x.dtype.itemsize for x in arrays) / 1e6:,.1f} MB"


def warn_of_no_donation(name: str, paths: Sequence[str], arrays: Sequence[Any]) -> None:
    """Warns once of the arrays, by path, that a step copies because they are not donated."""
    if paths and (name, "not donated", *paths) not in _WARNED:
        _WARNED.add((name, "not donated", *paths))
        which = ", ".join(path or "the state" for path in paths[:3]) + ", ..." * (len(paths) > 3)
        do = "Leave donate_argnums out, unless the old state is needed after the step."
        warn(f"{name}: the state is not donated, so each step copies {which}: {megabytes(*arrays)}. {do}")


_WARNED: set[tuple[str, ...]] = set()


def unpack(tree: Any) -> Any:
    """A tree that `js.pack` has packed, as it was: with arrays (num_rows, ...).

    Args:
      tree: any pytree.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.unpack(js.pack(jnp.arange(6.).reshape(3, 2), tables=lambda path, x: True)).tolist()
      [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    return jax.tree.map(lambda x: unpack_array(x) if is_packed(x) else x, tree, is_leaf=is_packed)
