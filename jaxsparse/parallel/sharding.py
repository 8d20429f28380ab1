"""Tables split over the devices of a mesh, and batches from several hosts.

The only mechanism is shardings. A step gathers the rows of a batch, updates them and scatters them back (rowwise.py),
and jax.jit partitions this program over a mesh. If the rows of a table are split over an axis, each device gathers the
rows of its part; these are summed over the axis into the block of the batch; all devices along the axis update the
block; and each scatters the rows of its part. So no id is dropped, and no table is gathered. Norms are right, because
the program is that of one device. A device holds its part of the tables, and O(batch).

A step moves the ids, and one block of each array that has the table's rows (three for Adam), whatever num_rows is. No
buffer can overflow, unlike where each id is sent to the device of its row. The cost: each device handles all ids and
updates the whole block. So a table n times as large fits on n devices, but a step is not faster. For speed, split the
batch over another axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsparse._checks import chosen_paths, message
from jaxsparse._jax import is_traced
from jaxsparse.ops.rows import check_arrays
from jaxsparse.optim.lazy import plan_update

# Any: the type stubs of tree definitions have no methods
_flatten: Any = jax.tree.flatten
_flatten_with_path: Any = jax.tree_util.tree_flatten_with_path


def shard_rows(state: Any, mesh: Any, tables: str | Sequence[str] | Callable[[str, Any], bool], axis: str) -> Any:
    """Splits the rows of a state's tables over a mesh axis. All other arrays are on every device.

    The arrays of the optimizer that have a row for each row of a table are split like the table. If num_rows is not a
    multiple of the axis's size, rows of zeros are added at the end. The parameter keeps them, so Flax modules need
    num_embeddings=js.padded_rows(num_rows, size).

    Row r is on device r // (num_rows / size) of the axis. If small ids are frequent, the first device has most of the
    rows that are read; results and traffic are the same. `js.spread_ids` spreads them.

    Args:
      state: a TrainState, or another object with params, opt_state, tx and replace. It may be traced:
        jax.jit(lambda key: js.shard_rows(create(key), mesh, ...)) makes a state that is too large for one device.
      mesh: a jax.sharding.Mesh with any axis types.
      tables: the parameters to split: parts of their paths as of jax.tree_util.keystr, or a function of (path, leaf).
      axis: the mesh axis.

    Returns:
      The state, for js.make_train_step, js.flush, js.evaluate and others.

    Raises:
      ValueError: if `axis` is not an axis of the mesh, a name fits no parameter, or the optimizer does not act on each
        row by itself.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> params = {"table": jnp.ones((5, 2)), "w": jnp.ones(2)}
      >>> state = TrainState.create(apply_fn=None, params=params, tx=js.lazy_adam(1e-3))
      >>> mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
      >>> state = js.shard_rows(state, mesh, tables="table", axis="rows")
      >>> state.params["table"].shape, state.params["table"].sharding.spec
      ((6, 2), P('rows',))
    """
    if axis not in mesh.axis_names:
        raise ValueError(message("shard_rows", "axis", f"one of the mesh's {mesh.axis_names}", repr(axis)))
    check_arrays("shard_rows", state)
    flat, tree = _flatten_with_path(state.params)
    leaves = [x for _, x in flat]
    flags = chosen_paths("shard_rows", tables, [jax.tree_util.keystr(path) for path, _ in flat], leaves)

    def put(x: Any, by_row: bool) -> Any:
        x = jnp.asarray(x)
        if by_row:
            num_added = -x.shape[0] % mesh.shape[axis]
            x = jnp.pad(x, [(0, num_added)] + [(0, 0)] * (x.ndim - 1)) if num_added else x
        sharding = NamedSharding(mesh, PartitionSpec(axis) if by_row else PartitionSpec())
        if is_traced(x) and AxisType.Auto in mesh.axis_types:
            return jax.lax.with_sharding_constraint(x, sharding)
        return jax.device_put(x, sharding)

    by_row = {i for i, flag in enumerate(flags) if flag}
    tx = optax.with_extra_args_support(state.tx)
    grads, opt_state = jax.eval_shape(lambda *arrays: arrays, leaves, state.opt_state)
    planned = plan_update(tx, tree, grads, opt_state, tree.unflatten(grads), {}, by_row)
    slots, slot_tree = _flatten(state.opt_state)
    params = [put(x, flag) for x, flag in zip(leaves, flags, strict=True)]
    slots = [put(x, i in planned.leaves) for i, x in enumerate(slots, len(leaves))]
    others = jax.tree.map(lambda x: put(x, False), state.replace(params=None, opt_state=None))
    return others.replace(params=tree.unflatten(params), opt_state=slot_tree.unflatten(slots))


def padded_rows(num_rows: int, shards: int) -> int:
    """The smallest multiple of `shards` that is at least num_rows.

    Example:
      >>> import jaxsparse as js
      >>> js.padded_rows(1_000_003, 8)
      1000008
    """
    return -(-num_rows // shards) * shards


def spread_ids(ids: Any, num_rows: int, shards: int) -> Any:
    """Renames ids so that neighbours are on different shards: id r becomes (r % shards) * n + r // shards, with n =
    ceil(num_rows / shards).

    Ids are often sorted by frequency, and a table is split into ranges of rows, so one shard would have most of the
    rows that are read. Rename the ids in the data or in the model.

    Args:
      ids: integers, NumPy or JAX, of any shape. Ids outside [0, num_rows) stay outside [0, padded_rows).
      num_rows: rows of the table before padding.
      shards: the number of devices that the table is split over.

    Returns:
      Ids of the same shape, below padded_rows(num_rows, shards). Different ids stay different. 8- and 16-bit ids become
      int32.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> js.spread_ids(np.arange(7), 7, 3).tolist()
      [0, 3, 6, 1, 4, 7, 2]
    """
    rows = padded_rows(num_rows, shards) // shards
    ids = ids if ids.dtype.itemsize >= 4 else ids.astype(np.int32)  # new ids may be larger
    new = ids % shards * rows + ids // shards
    where = jnp.where if isinstance(ids, jax.Array) else np.where
    return where((ids >= 0) & (ids < num_rows), new, where(ids < num_rows, ids, ids + (rows * shards - num_rows)))


def global_batch(batch: Any, mesh: Any, axis: str) -> Any:
    """Makes global arrays, split over a mesh axis, from each host's part of a batch.

    Args:
      batch: a batch of js.batches(..., shard=(jax.process_index(), jax.process_count())), with or without devices=.
      mesh: a mesh over the devices of all hosts.
      axis: the mesh axis that the leading axis of each leaf is split over.

    Returns:
      The batch: for jax.shard_map if it was made with devices=, otherwise for jax.jit.

    Raises:
      ValueError: if there are several hosts, BCOO leaves and no devices=: each host numbers its rows from 0.

    Example:
      >>> import jax, jaxsparse as js
      >>> mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
      >>> (batch,) = js.batches([[3], [0]], [0., 1.], num_rows=4, batch_size=2)
      >>> js.global_batch(batch, mesh, "data").x.sharding.spec
      P('data',)
    """
    hosts, stacked = jax.process_count(), np.ndim(batch.weight) == 2
    if hosts > 1 and not stacked and any(isinstance(x, BCOO) for x in jax.tree.leaves(batch.x, is_leaf=_is_bcoo)):
        do = "Pass devices=jax.local_device_count() to js.batches, and map the step with jax.shard_map."
        raise ValueError(message("global_batch", "batch", "without BCOO leaves, or with devices=", "BCOO leaves", do))
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def _is_bcoo(x: object) -> bool:
    return isinstance(x, BCOO)
