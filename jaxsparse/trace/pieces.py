"""Blocks of rows that are computed while they are written, piece by piece.

Most of an update is done row by row: new parameters and slots follow from the old ones and the gradient. A
`DeferredBlock` is such a block before it is computed. `write` computes blocks and writes their rows into the tables. On
CPU it works in pieces that fit into the caches, and stops after the last real row: much of a block may be padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse.ops.rows import gather_rows, gathered_once, in_range, is_stored, scatter_rows

_PIECE = 1 << 18  # bytes


class DeferredBlock:
    """A block (k, ...) that is not computed yet. Each row depends on the same row of other blocks.

    Args:
      ids: int32 (k,), the ids of the rows, as in a Space.
      operands: DeferredBlocks or arrays. If an array does not have k rows, each row depends on all of it.
      make: make(part, *operands) computes the rows of a `Part`.
      leaf: the number of the array that the rows are gathered from, if they are.
      gathered: whether that array has other rows than these.
    """

    def __init__(
        self,
        ids: jax.Array,
        operands: Iterable[Any],
        make: Callable[..., Any],
        shape: tuple[int, ...],
        dtype: Any,
        leaf: int | None = None,
        gathered: bool = False,
    ) -> None:
        self.ids, self.operands, self.make, self.leaf, self.gathered = ids, tuple(operands), make, leaf, gathered
        self.shape, self.ndim, self.dtype = shape, len(shape), dtype
        self._block: Any = None
        self._block_off_cpu: Any = None

    def block(self) -> Any:
        """The whole block. It is kept for the next use, as are the gathered rows that it depends on."""
        if self._block is None:
            for x in pending_blocks([self]):
                if x.gathered and x is not self:
                    x.block()
            self._block = self.compute()
        return self._block

    def compute(self) -> Any:
        """The whole block, not kept: for use in a branch."""
        return self._block if self._block is not None else Part(self.ids).of([self])[0]

    def block_off_cpu(self) -> Any:
        """The whole block, for code that never runs on CPU. It is kept: `write` uses it on TPU and gathers no rows."""
        if self._block is not None:
            return self._block
        if self._block_off_cpu is None:
            self._block_off_cpu = Part(self.ids, on_cpu=False).of([self])[0]
        return self._block_off_cpu


class Part:
    """A part of the rows of blocks.

    Args:
      ids: int32 (n,), the ids of the rows.
      cut: cut(block) gives these rows of a block; an array without rows as it is.
      leaves: {leaf: these rows of it}. Rows of other leaves are gathered.
      on_cpu: whether this may run on CPU.
    """

    def __init__(
        self,
        ids: jax.Array,
        cut: Callable[[Any], Any] = lambda block: block,
        leaves: Mapping[int, Any] | None = None,
        *,
        on_cpu: bool = True,
    ) -> None:
        self.ids, self.cut, self.leaves, self.on_cpu = ids, cut, leaves or {}, on_cpu

    def of(self, blocks: Iterable[Any]) -> list[Any]:
        """These rows of the blocks."""
        blocks, done = list(blocks), dict[Any, Any]()

        def rows(x: Any) -> Any:
            return done[x] if isinstance(x, DeferredBlock) and x in done else self.cut(computed(x))

        for x in pending_blocks(blocks):
            done[x] = x.make(self, *map(rows, x.operands))
        return list(map(rows, blocks))

    def is_real(self, num_rows: int, ndim: int, axis: int = 0) -> jax.Array:
        """Which rows are not padding: bool, of a block's rank, with size 1 except along the rows."""
        return in_range(self.ids, num_rows).reshape([-1 if a == axis else 1 for a in range(ndim)])


def rows_of(array: jax.Array, i: int, ids: jax.Array, *, aligned: bool = False) -> DeferredBlock:
    """The rows at ids of leaf number i. `aligned`: the leaf has these rows and no others."""

    def make(part: Part) -> Any:
        if i in part.leaves:
            return part.leaves[i]
        if aligned:
            return array
        return gather_blocks([array], part.ids)[0] if part.on_cpu else gather_rows(array, part.ids)

    return DeferredBlock(ids, (), make, (*ids.shape, *array.shape[1:]), array.dtype, leaf=i, gathered=not aligned)


def gather_blocks(arrays: list[jax.Array], ids: jax.Array, gathered: Sequence[Any] = ()) -> list[jax.Array]:
    """The rows at ids of several arrays, gathered in one piece. The last id is padding. Not differentiable.

    gathered: blocks that are already gathered off CPU, None for the others. A TPU uses them. A GPU gathers again, which
    is faster than to write and read them: XLA fuses the gather into the uses.
    """
    if not ids.shape[0]:
        return [gather_rows(x, ids) for x in arrays]
    axes = [_jax.varying_axes([x, ids]) for x in arrays]
    true = _jax.vary((ids[-1] | 1) != 0, frozenset().union(*axes))  # XLA does not know that
    like = [jax.ShapeDtypeStruct((*ids.shape, *x.shape[1:]), x.dtype) for x in arrays]
    on_tpu = None
    if any(block is not None for block in gathered):
        pairs = list(zip(arrays, gathered, strict=True))
        on_tpu = lambda gather: [gather(x, ids) if block is None else block for x, block in pairs]  # noqa: E731
    return gathered_once(lambda gather: [gather(x, ids) for x in arrays], like, true, axes, on_tpu)


def computed(x: Any) -> Any:
    """The block, or None if it is not computed yet."""
    return x._block if isinstance(x, DeferredBlock) else x


def arrays_in(blocks: Iterable[Any]) -> list[Any]:
    """The computed arrays that these blocks depend on."""
    blocks = list(blocks)
    found = [y for x in pending_blocks(blocks) for y in x.operands] + blocks
    return [y for y in map(computed, found) if y is not None and jnp.ndim(y)]


def pending_blocks(blocks: Iterable[Any]) -> list[DeferredBlock]:
    """The blocks that must be computed for these blocks, operands first."""
    order: dict[Any, None] = {}
    stack = [x for x in blocks if computed(x) is None]
    while stack:
        x = stack[-1]
        missing = [y for y in x.operands if computed(y) is None and y not in order]
        if missing:
            stack += missing
        else:
            order.setdefault(stack.pop())
    return list(order)


def write(
    new: Mapping[int, Any],
    arrays: Mapping[int, jax.Array],
    ids: jax.Array,
    num_rows: int,
    aligned: Set[int] = frozenset(),
    trained: jax.Array | None = None,
) -> dict[int, jax.Array]:
    """The arrays of a class after their rows at `ids` are replaced.

    Args:
      new: {number of an array: its new block (k, ...)}.
      arrays: {number: array (num_rows, ...)}, all arrays of the class.
      ids: int32 (k,), as in a Space.
      num_rows: the number of rows of the arrays.
      aligned: the numbers of arrays (k, ...), which are replaced by their blocks as a whole.
      trained: bool (k,), which of the rows are written; None for all.
    """

    def unsplit() -> dict[int, jax.Array]:
        parts = pending_blocks(new.values())
        gathered = {x.leaf: x._block_off_cpu for x in parts if x.leaf is not None}
        old = parts + [y for x in parts for y in x.operands if isinstance(y, DeferredBlock)]
        is_read = lambda x: x._block is not None or x._block_off_cpu is not None  # noqa: E731
        read_at = {x.leaf: x.ids for x in old if x.leaf is not None and is_read(x)}
        leaves = sorted(gathered.keys() - aligned)
        rows = gather_blocks([arrays[i] for i in leaves], ids, [gathered[i] for i in leaves])
        blocks = dict(zip(leaves, rows, strict=True))
        out = Part(ids, leaves=blocks).of(new.values())
        return dict(arrays) | {
            i: x if i in aligned else scatter_rows(arrays[i], ids, x, read_at.get(i))
            for i, x in zip(new, out, strict=True)
        }

    if not new:
        return dict(arrays)
    if trained is not None:
        size = ids.shape[0]
        ids = jnp.where(trained, ids, num_rows + size + jnp.arange(size, dtype=jnp.int32))
    row_bytes = max(math.prod(arrays[i].shape[1:]) * arrays[i].dtype.itemsize for i in new)
    piece_rows = max(_PIECE // max(row_bytes, 1), 64)
    one_type = all(new[i].dtype == arrays[i].dtype for i in aligned & new.keys())
    if (
        ids.shape[0] < 4 * piece_rows
        or not one_type
        or any(map(is_stored, arrays.values()))
        or _jax.varying_axes([*arrays.values(), ids])
    ):
        return unsplit()
    by_pieces = functools.partial(_by_pieces, new, arrays, ids, num_rows, aligned, piece_rows)
    return jax.lax.platform_dependent(cpu=by_pieces, default=unsplit)


def _by_pieces(
    new: Mapping[int, Any],
    arrays: Mapping[int, jax.Array],
    ids: jax.Array,
    num_rows: int,
    aligned: Set[int],
    piece_rows: int,
) -> dict[int, jax.Array]:
    size = ids.shape[0]
    positions = jnp.arange(size, dtype=jnp.int32)
    end = jnp.max(jnp.where(in_range(ids, num_rows), positions + 1, 0))
    leaves = sorted({x.leaf for x in pending_blocks(new.values()) if x.leaf is not None})

    def piece(carry: tuple[jax.Array, dict[int, jax.Array]]) -> tuple[jax.Array, dict[int, jax.Array]]:
        done, written = carry
        first = jnp.minimum(done, size - piece_rows)  # the last piece overlaps rows that are done

        def cut(block: Any) -> Any:
            if not jnp.ndim(block) or block.shape[0] != size:
                return block
            return jax.lax.dynamic_slice_in_dim(block, first, piece_rows)

        is_done = cut(positions) < done
        piece_ids = jnp.where(is_done, num_rows + 2 * size + positions[:piece_rows], cut(ids))
        current = {**arrays, **written}
        # gathered once, or XLA would read the rows again after they are written
        old = gathered_once(
            lambda gather: [cut(current[i]) if i in aligned else gather(current[i], piece_ids) for i in leaves],
            [jax.ShapeDtypeStruct((piece_rows, *current[i].shape[1:]), current[i].dtype) for i in leaves],
            done >= 0,
        )
        part = Part(piece_ids, cut, dict(zip(leaves, old, strict=True)))
        for i, block in zip(new, part.of(new.values()), strict=True):
            if i in aligned:
                kept_rows = jnp.where(is_done.reshape(-1, *(1,) * (block.ndim - 1)), cut(current[i]), block)
                written[i] = jax.lax.dynamic_update_slice_in_dim(written[i], kept_rows, first, 0)
            else:
                written[i] = scatter_rows(written[i], piece_ids, block)
        return first + piece_rows, written

    start = jnp.int32(0), {i: arrays[i] for i in new}
    return dict(arrays) | jax.lax.while_loop(lambda carry: carry[0] < end, piece, start)[1]
