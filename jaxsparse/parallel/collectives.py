"""Sums and means across devices of trees that hold row-sparse gradients.

`lax.psum` would add row ids, so it is refused for row-sparse gradients. They are gathered instead and summed in device
order, so each device has the same bits. The bytes moved depend on the batch, not on num_rows.

With check_vma=True, the default, jax.shard_map knows over which mapped axes an array varies, and jax.grad psums the
gradients of arrays that do not vary. RowSparse gradients cannot be psum-ed. So the differentiated arrays are made
varying first (`_jax.vary`): each device has its own gradients, as under pmap, and they are combined here.
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
      tree: any pytree. A RowSparse of ids (k,) becomes one of min(n * k, num_rows) unique ids, n being the size of the
        axis. Other leaves are summed by lax.psum.
      axis_name: a mapped axis of jax.pmap or jax.shard_map.

    Returns:
      The summed tree, equal on all devices.

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
    """The mean of `tree` over a mapped axis: `js.psum` divided by the size of the axis.

    Arguments, result and errors are those of `js.psum`. If devices hold different numbers of examples, this is not the
    mean over examples; js.make_train_step(axis_name=...) weighs the devices.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> g = jax.vmap(lambda i: js.RowSparse(i[None], jnp.ones((1, 1)), (4, 1)))(jnp.array([2, 3]))
      >>> jax.vmap(lambda g: js.pmean(g, "batch").todense(), axis_name="batch")(g)[0].ravel().tolist()
      [0.0, 0.0, 0.5, 0.5]
    """
    size = jax.lax.axis_size(axis_name)

    return jax.tree.map(lambda x: x / size, psum(tree, axis_name), is_leaf=is_row_sparse)


def in_auto_mode(fun: Callable[..., Any], state: Any, *args: Any) -> Any:
    """Calls fun(state, *args) -> (a tree like state, others) with the Explicit axes of a mesh as Auto axes.

    On Explicit axes, JAX needs the sharding of each gather as an argument. Here those of the state determine all.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves((state, args)) if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return fun(state, *args)
    kinds = zip(meshes[0].axis_names, meshes[0].axis_types, strict=True)
    axes = tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)
    replicated = NamedSharding(meshes[0], PartitionSpec())
    shardings_of_leaves = jax.tree.map(lambda x: jax.typeof(x).sharding, state)
    shardings_of_state = jax.tree.map(
        lambda s: replicated if s.mesh.empty else s, shardings_of_leaves
    )  # NumPy arrays are on no mesh
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=(shardings_of_state, replicated))(state, *args)
