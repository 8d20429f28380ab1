"""Pallas kernels that read and write rows of a table on TPU by one DMA each. They are off by default.

XLA's scatter on a TPU moves a tile of 8 rows for each row that it writes. A DMA moves the row. The kernels compile
ahead of time for TPU v4, v5e, v5p and v6e, and give XLA's results in Pallas's interpret mode. They have never been run
on a device, so steps use them only where the environment says JAXSPARSE_TPU_ROW_DMA=1 while they are traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._checks import message
from jaxsparse._jax import pallas

FLAG = "JAXSPARSE_TPU_ROW_DMA"
_LANES = 128  # columns of a tile
_MAX_COLUMNS = 4096  # of a row: two pieces of rows must fit on the chip
_PIECE = 256  # rows that are on their way at once
_UNROLL = 8


def use_kernel(kernel: Callable[[bool], Any], xla: Callable[[], Any], *tables: Any) -> Any:
    """kernel(False) on TPU if the kernels are switched on and support these tables; otherwise xla().

    The argument says whether Pallas interprets the kernel. `JAXSPARSE_TPU_ROW_DMA=interpret` switches that on, on any
    platform, for tests.
    """
    wanted = os.environ.get(FLAG, "0")
    if wanted not in ("0", "1", "interpret"):
        raise ValueError(message("jit", FLAG, '"0", "1" or "interpret"', repr(wanted)))
    in_shard_map = jax.sharding.get_abstract_mesh().manual_axes  # its checks refuse kernels
    if wanted == "0" or in_shard_map or not all(map(is_supported, tables)):
        return xla()
    if wanted == "interpret":
        return kernel(True)
    return jax.lax.platform_dependent(tpu=lambda: kernel(False), default=xla)


def is_supported(x: Any) -> bool:
    """Whether rows of x can be moved one by one: an array (num_rows, d) of 32-bit numbers, d a multiple of 128."""
    return (
        isinstance(x, jax.Array)
        and x.ndim == 2
        and x.shape[0] > 0
        and x.dtype in (jnp.float32, jnp.int32, jnp.uint32)
        and 0 < x.shape[1] <= _MAX_COLUMNS
        and x.shape[1] % _LANES == 0
    )


def gather(x: jax.Array, ids: jax.Array, *, interpret: Any = False) -> jax.Array:
    """x[ids], zero where an id is out of range. Not differentiable.

    Args:
      x: (num_rows, d), one that `is_supported`.
      ids: int32 (n,).
      interpret: whether Pallas interprets the kernel, on any platform; or its InterpretParams.

    Returns:
      (n, d), of x's dtype.
    """
    pl, pltpu = pallas()
    num_rows, dim = x.shape

    def kernel(ids: Any, x: Any, out: Any, arrived: Any) -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

        def copy(at: Any, i: Any) -> Any:
            return pltpu.make_async_copy(x.at[pl.ds(at, 1), :], out.at[pl.ds(i, 1), :], arrived)

        _each(ids, num_rows, copy)

    return _call(kernel, x, ids, [], jax.ShapeDtypeStruct((ids.shape[0], dim), x.dtype), "gather_rows", interpret)


def write(x: jax.Array, ids: jax.Array, rows: jax.Array, *, interpret: Any = False) -> jax.Array:
    """x with rows written at ids, those out of range left out; in place where x is donated. Not differentiable.

    Args:
      x: (num_rows, d), one that `is_supported`.
      ids: int32 (n,). Those in range are distinct.
      rows: (n, d), of x's dtype.
      interpret: whether Pallas interprets the kernel, on any platform; or its InterpretParams.
    """
    pl, pltpu = pallas()

    def kernel(ids: Any, rows: Any, _: Any, x: Any, arrived: Any) -> None:
        def copy(at: Any, i: Any) -> Any:
            return pltpu.make_async_copy(rows.at[pl.ds(i, 1), :], x.at[pl.ds(at, 1), :], arrived)

        _each(ids, x.shape[0], copy)

    return _call(kernel, x, ids, [rows], jax.ShapeDtypeStruct(x.shape, x.dtype), "write_rows", interpret)


def _each(ids: Any, num_rows: int, copy: Callable[[Any, Any], Any]) -> None:
    """Starts copy(id, place) for each id of a piece that is in range, then waits until all have arrived."""
    pl, _ = pallas()

    def each(do: Callable[[Any], None]) -> None:
        def turn(i: Any, _: None) -> None:
            at = ids[0, 0, i]

            @pl.when((at >= 0) & (at < num_rows))
            def _in_range() -> None:
                do(copy(at, i))

        jax.lax.fori_loop(0, ids.shape[-1], turn, None, unroll=_UNROLL)

    each(lambda dma: dma.start())
    each(lambda dma: dma.wait())


def _call(
    kernel: Callable[..., None],
    x: jax.Array,
    ids: jax.Array,
    rows: list[jax.Array],
    like: jax.ShapeDtypeStruct,
    name: str,
    interpret: Any,
) -> jax.Array:
    """Calls the kernel for one piece of ids after another. Its arguments are the ids, rows to write, x, the result."""
    pl, pltpu = pallas()
    n, dim = ids.shape[0], x.shape[1]
    many = _PIECE if dim <= _MAX_COLUMNS // 4 else _PIECE // 2
    turns = -(-n // many)
    ids = jnp.pad(ids, (0, turns * many - n), constant_values=x.shape[0]).reshape(turns, 1, many)
    ids_here = pl.BlockSpec((1, 1, many), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)
    piece = pl.BlockSpec((many, dim), lambda i: (i, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=(turns,),
        in_specs=[ids_here, *[piece] * len(rows), whole],
        out_specs=whole if rows else piece,
        out_shape=like,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases={2: 0} if rows else {},
        interpret=interpret,
        name=f"jaxsparse_{name}",
    )(ids, *rows, x)
