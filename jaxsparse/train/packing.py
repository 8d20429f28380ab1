"""`pack` and `unpack` for the tables of a state, and the warnings that tables should be packed or donated.

A state goes in; a state comes out whose tables of narrow rows are stored so that a TPU can read and write single rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxsparse._checks import chosen_paths, message, warn
from jaxsparse.ops.packed import is_narrow, is_packed, pack_array, unpack_array
from jaxsparse.optim.replaying import replay_states

MIN_ROWS = 1 << 16  # of a table that is packed without being named


def pack(tree: Any, tables: Any = None) -> Any:
    """Packs the tables of a state for TPU, where each step would otherwise copy them in full.

    On TPU, XLA copies a table whose rows are not a multiple of 128 numbers at each step that reads some of its rows.
    `js.jit` warns of that, and `js.explain` names the tables. A packed row holds 128 // d rows of d numbers side by
    side. Rows of more than 128 numbers are padded to the next multiple. So memory stays the same if d divides 128, and
    is 128 / 96 times as much for d = 96.

    `js.jit`, `js.rowwise`, `js.make_train_step`, `js.evaluate` and `js.predict` accept a packed state. Their step, loss
    or metric sees arrays (num_rows, ...) as before. A table that it uses in full is unpacked for it.
    So is, with a warning, a table that row ids depend on, or that the step does not return. For everything else, call
    `js.unpack` first. flax.serialization saves a packed state as it saves the unpacked one.

    Args:
      tree: a pytree with parameters and the optimizer's state, such as a TrainState; or parameters alone, before
        `tx.init`. Its leaves are arrays (num_rows, d, ...), or abstract ones.
      tables: which leaves: parts of their paths, as in `js.value_and_grad`, or a function of (path, leaf). None: all
        leaves of at least 65,536 rows. Those whose rows are a multiple of 128 numbers stay as they are.

    Returns:
      The tree with a `Packed` for each packed table. Other leaves are not copied. Results are right on other platforms
      too, but steps are slower there.

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
    history = {
        id(x) for state in replay_states(tree) for x in state.history.values()
    }  # its first axis is steps, not rows
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
    """Whether a step that reads rows of an array copies all of it, which `pack` avoids."""
    return platform == "tpu" and is_narrow(x)


def warn_of_copies(name: str, tables: dict[str, Any], platform: str) -> None:
    """Warns once of the arrays, by path, that a step copies in full."""
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
    """The inverse of `js.pack`: a tree with arrays (num_rows, ...).

    Args:
      tree: any pytree.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.unpack(js.pack(jnp.arange(6.).reshape(3, 2), tables=lambda path, x: True)).tolist()
      [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    return jax.tree.map(lambda x: unpack_array(x) if is_packed(x) else x, tree, is_leaf=is_packed)
