"""Tables split over the devices of a mesh, and batches from several hosts.

There is nothing to it but shardings. A step gathers the rows of a batch, updates them, and scatters them
back (rowwise.py); jax.jit over a mesh partitions that as it stands. Where a table's rows are split over an axis, every
device takes the rows that it has from its own part, these are added up over the axis into the block that the batch
needs, all devices along the axis update it, and each writes back the rows that it has. So no id is dropped and no table
is ever gathered, whatever the ids; a norm is the norm, because the program is the one of a single device; and a device
holds its part of the tables and O(batch).

What moves in a step is one block of every array that has the table's rows (three for Adam) and the ids, whatever
num_rows is. Of the two known ways to route, this is the one without capacities and fallbacks. Its cost: every device
looks at all ids and updates the whole block, so with n devices a table n times as large fits, but a step is no faster;
split the batch over another axis for that.
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

# their stubs give a tree definition no methods
_flatten: Any = jax.tree.flatten
_flatten_with_path: Any = jax.tree_util.tree_flatten_with_path


def shard_rows(state: Any, mesh: Any, tables: str | Sequence[str] | Callable[[str, Any], bool], axis: str) -> Any:
    """A state with the rows of its tables split over a mesh axis, and all else on every device.

    With a table go all arrays of the optimizer that have one row for each of its rows: slots, stamps. Where
    num_rows is no multiple of the axis's size, rows of zeros are added, which no id names: the parameter is that much
    taller from then on (flax modules want to be told: num_embeddings=js.padded_rows(num_rows, size)).

    Row r is on device r // (num_rows / size) of the axis. Frequent rows of small ids are all on the first one, then,
    which does no harm to correctness or traffic; `js.spread_ids` spreads them.

    Args:
      state: a TrainState, or another object with params, opt_state, tx and replace; of arrays, or traced: under
        jax.jit, jit(lambda key: js.shard_rows(create(key), mesh, ...)) makes a state that no single device could hold.
      mesh: a jax.sharding.Mesh with any axis types.
      tables: which parameters: parts of their paths as jax.tree_util.keystr writes them, or a function of
        (path, leaf).
      axis: the mesh axis.

    Returns:
      The state, for js.make_train_step, js.flush, js.evaluate and the like.

    Raises:
      ValueError: if `axis` is not an axis of the mesh, or a name fits no parameter, or an optimizer does not act on
        each row by itself.

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
            more = -x.shape[0] % mesh.shape[axis]
            x = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) if more else x
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
    """The smallest multiple of `shards` that is not below num_rows.

    Example:
      >>> import jaxsparse as js
      >>> js.padded_rows(1_000_003, 8)
      1000008
    """
    return -(-num_rows // shards) * shards


def spread_ids(ids: Any, num_rows: int, shards: int) -> Any:
    """Ids renamed so that neighbours are on different shards: id r becomes (r % shards) * n + r // shards, n being
    ceil(num_rows / shards).

    Ids are often sorted by frequency, or numbered one feature after another, and a table is split into runs of rows.
    Renamed like this, in the data or in the model, r and r + 1 are on shards that follow each other.

    Args:
      ids: integers, NumPy or JAX, of any shape. Those outside [0, num_rows) stay outside [0, padded_rows).
      num_rows: of the table before padding.
      shards: the number of devices that the table is split over.

    Returns:
      Ids of the same shape, below padded_rows(num_rows, shards), no two alike that were not; narrow types become int32.

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
    """This host's part of a batch, with the parts of all other hosts, as arrays split over a mesh axis.

    Args:
      batch: what js.batches(..., shard=(jax.process_index(), jax.process_count())) gives, with or without devices=.
      mesh: a mesh over the devices of all hosts.
      axis: the mesh axis to split the leading axis of all leaves over.

    Returns:
      The batch. Made with devices=, it is for jax.shard_map, otherwise for jax.jit.

    Raises:
      ValueError: for BCOO leaves from several hosts that were made without devices=: their row numbers are the host's.

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
