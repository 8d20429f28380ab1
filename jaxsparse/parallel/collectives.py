"""Sums and means across devices of trees that hold row-sparse gradients.

`lax.psum` of two devices' ids would be the id of a third row (and is refused). Row-sparse leaves are gathered instead,
and added up in device order, so that the sum has the same bits on every device. The bytes moved depend on the batch,
not on num_rows.

Unless told not to, jax.shard_map checks over which mapped axes each array varies. There, jax.grad psums the gradients
of arrays that do not vary. RowSparse gradients cannot be psum-ed. So the differentiated arrays are made varying first
(`_jax.vary`), each device has its own gradients, as under pmap, and they are combined here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsparse._jax import all_gather
from jaxsparse.ops.row_sparse import coalesce, is_row_sparse, sum_of_devices


def psum(tree: Any, axis_name: Any) -> Any:
    """The sum of `tree` over a mapped axis.

    Args:
      tree: any pytree; a RowSparse of ids (k,) becomes one of min(n * k, num_rows) unique ids, n being the axis's size,
        other leaves are lax.psum's.
      axis_name: of jax.pmap or shard_map.

    Returns:
      The tree, the same on all devices.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> g = jax.vmap(lambda i: js.RowSparse(i[None], jnp.ones((1, 1)), (4, 1)))(jnp.array([2, 3]))
      >>> jax.vmap(lambda g: js.psum(g, "batch").todense(), axis_name="batch")(g)[0].ravel().tolist()
      [0.0, 0.0, 1.0, 1.0]
    """

    def one(leaf: Any) -> Any:
        if not is_row_sparse(leaf):
            return jax.lax.psum(leaf, axis_name)
        block = coalesce(leaf)
        ids, rows = all_gather(block.ids[None], axis_name), all_gather(block.rows[None], axis_name)
        return sum_of_devices(ids, rows, leaf.shape)

    return jax.tree.map(one, tree, is_leaf=is_row_sparse)


def pmean(tree: Any, axis_name: Any) -> Any:
    """The mean of `tree` over a mapped axis: psum divided by the axis's size, for RowSparse leaves as for dense ones.

    Args, returns and errors are those of `js.psum`. Where devices hold different numbers of examples a mean of means is
    not the mean; js.make_train_step weighs them.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> g = jax.vmap(lambda i: js.RowSparse(i[None], jnp.ones((1, 1)), (4, 1)))(jnp.array([2, 3]))
      >>> jax.vmap(lambda g: js.pmean(g, "batch").todense(), axis_name="batch")(g)[0].ravel().tolist()
      [0.0, 0.0, 0.5, 0.5]
    """
    size = jax.lax.axis_size(axis_name)

    return jax.tree.map(lambda x: x / size, psum(tree, axis_name), is_leaf=is_row_sparse)


def in_auto_mode(fun: Callable[..., Any], state: Any, *args: Any) -> Any:
    """fun(state, *args) -> (a tree like state, others), over a mesh of any axis types: in Explicit ones JAX wants to be
    told the sharding of every gather, here those of the state say it all."""
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves((state, args)) if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return fun(state, *args)
    kinds = zip(meshes[0].axis_names, meshes[0].axis_types, strict=True)
    axes = tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)
    anywhere = NamedSharding(meshes[0], PartitionSpec())
    of_each = jax.tree.map(lambda x: jax.typeof(x).sharding, state)
    of_state = jax.tree.map(lambda s: anywhere if s.mesh.empty else s, of_each)  # NumPy's are on no mesh
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=(of_state, anywhere))(state, *args)
