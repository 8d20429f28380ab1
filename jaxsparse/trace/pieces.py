"""Blocks of rows that are computed when they are written, a piece at a time.

Most of an update is done row by row: new parameters and slots follow from the old ones and the gradient. `Later` is
such a block before it is computed. `write` computes blocks and writes their rows back. On CPU it does so in pieces that
the processor's caches hold, and only as far as there are rows, of which there may be far fewer than there is room for.
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


class Later:
    """A block (k, ...) that is not computed yet, each row of which is made of the same rows of other blocks.

    Args:
      ids: int32 (k,), whose rows they are, as of a Space.
      operands: blocks, of Later or arrays; of an array that has not k rows, all rows are made of all of it.
      make: make(part, *operands), the rows of a part.
      leaf: the number of the array whose rows it is, if it is.
      gathered: whether that array has other rows.
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
        self._elsewhere: Any = None

    def block(self) -> Any:
        """All of it, kept for what needs it next, as are the rows that it was gathered from."""
        if self._block is None:
            for x in needed([self]):
                if x.gathered and x is not self:
                    x.block()
            self._block = self.compute()
        return self._block

    def compute(self) -> Any:
        """All of it, not kept: for branches."""
        return self._block if self._block is not None else Part(self.ids).of([self])[0]

    def elsewhere(self) -> Any:
        """All of it for what no CPU runs. It is kept for `write`, which on TPU uses these rows and gathers none."""
        if self._block is not None:
            return self._block
        if self._elsewhere is None:
            self._elsewhere = Part(self.ids, on_cpu=False).of([self])[0]
        return self._elsewhere


class Part:
    """Some of the rows of blocks.

    Args:
      ids: int32 (n,), whose rows they are.
      cut: cut(block), its rows here; of an array without rows, all of it.
      leaves: rows here of leaves, by number; those of others are gathered.
      on_cpu: whether CPUs may do that.
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
        """The rows of these blocks."""
        blocks, done = list(blocks), dict[Any, Any]()

        def rows(x: Any) -> Any:
            return done[x] if isinstance(x, Later) and x in done else self.cut(known(x))

        for x in needed(blocks):
            done[x] = x.make(self, *map(rows, x.operands))
        return list(map(rows, blocks))

    def is_real(self, num_rows: int, ndim: int, axis: int = 0) -> jax.Array:
        """Which rows are no padding, of a block's rank, size 1 but along the rows."""
        return in_range(self.ids, num_rows).reshape([-1 if a == axis else 1 for a in range(ndim)])


def rows_of(array: jax.Array, i: int, ids: jax.Array, *, aligned: bool = False) -> Later:
    """The rows at ids of leaf number i, which `aligned` has no others."""

    def make(part: Part) -> Any:
        if i in part.leaves:
            return part.leaves[i]
        if aligned:
            return array
        return gather_blocks([array], part.ids)[0] if part.on_cpu else gather_rows(array, part.ids)

    return Later(ids, (), make, (*ids.shape, *array.shape[1:]), array.dtype, leaf=i, gathered=not aligned)


def gather_blocks(arrays: list[jax.Array], ids: jax.Array, made: Sequence[Any] = ()) -> list[jax.Array]:
    """The rows at ids, the last of which is padding, of several arrays, copied in one piece; not differentiable.

    made: those that are there already off CPU, None for the others. A TPU uses them. A GPU does better to gather them
    again than to write and read them: the gather becomes a part of what needs the rows.
    """
    if not ids.shape[0]:
        return [gather_rows(x, ids) for x in arrays]
    axes = [_jax.varying_axes([x, ids]) for x in arrays]
    always = _jax.vary((ids[-1] | 1) != 0, frozenset().union(*axes))  # which XLA does not know
    like = [jax.ShapeDtypeStruct((*ids.shape, *x.shape[1:]), x.dtype) for x in arrays]
    on_tpu = None
    if any(block is not None for block in made):
        pairs = list(zip(arrays, made, strict=True))
        on_tpu = lambda gather: [gather(x, ids) if block is None else block for x, block in pairs]  # noqa: E731
    return gathered_once(lambda gather: [gather(x, ids) for x in arrays], like, always, axes, on_tpu)


def known(x: Any) -> Any:
    """A block, if something has needed it."""
    return x._block if isinstance(x, Later) else x


def arrays_in(blocks: Iterable[Any]) -> list[Any]:
    """The arrays that are known, of which these blocks are made."""
    blocks = list(blocks)
    found = [y for x in needed(blocks) for y in x.operands] + blocks
    return [y for y in map(known, found) if y is not None and jnp.ndim(y)]


def needed(blocks: Iterable[Any]) -> list[Later]:
    """What is to be computed for these blocks, operands first."""
    order: dict[Any, None] = {}
    stack = [x for x in blocks if known(x) is None]
    while stack:
        x = stack[-1]
        missing = [y for y in x.operands if known(y) is None and y not in order]
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
    """The arrays of a class with their new rows.

    Args:
      new: blocks (k, ...) by the number of the array.
      arrays: all arrays of the class by number: (num_rows, ...), of which the rows at ids are replaced.
      ids: int32 (k,), as of a Space.
      num_rows: of the arrays.
      aligned: numbers of arrays (k, ...), which are replaced by the blocks.
      trained: bool (k,), which of the rows are written; None if all are.
    """

    def at_once() -> dict[int, jax.Array]:
        made = {x.leaf: x._elsewhere for x in needed(new.values()) if x.leaf is not None}
        leaves = sorted(made.keys() - aligned)
        rows = gather_blocks([arrays[i] for i in leaves], ids, [made[i] for i in leaves])
        blocks = dict(zip(leaves, rows, strict=True))
        out = Part(ids, leaves=blocks).of(new.values())
        return dict(arrays) | {
            i: x if i in aligned else scatter_rows(arrays[i], ids, x) for i, x in zip(new, out, strict=True)
        }

    if not new:
        return dict(arrays)
    if trained is not None:
        size = ids.shape[0]
        ids = jnp.where(trained, ids, num_rows + size + jnp.arange(size, dtype=jnp.int32))
    row = max(math.prod(arrays[i].shape[1:]) * arrays[i].dtype.itemsize for i in new)
    many = max(_PIECE // max(row, 1), 64)
    one_type = all(new[i].dtype == arrays[i].dtype for i in aligned & new.keys())
    if (
        ids.shape[0] < 4 * many
        or not one_type
        or any(map(is_stored, arrays.values()))
        or _jax.varying_axes([*arrays.values(), ids])
    ):
        return at_once()
    by_pieces = functools.partial(_by_pieces, new, arrays, ids, num_rows, aligned, many)
    return jax.lax.platform_dependent(cpu=by_pieces, default=at_once)


def _by_pieces(
    new: Mapping[int, Any],
    arrays: Mapping[int, jax.Array],
    ids: jax.Array,
    num_rows: int,
    aligned: Set[int],
    many: int,
) -> dict[int, jax.Array]:
    size = ids.shape[0]
    each = jnp.arange(size, dtype=jnp.int32)
    end = jnp.max(jnp.where(in_range(ids, num_rows), each + 1, 0))
    leaves = sorted({x.leaf for x in needed(new.values()) if x.leaf is not None})

    def piece(carry: tuple[jax.Array, dict[int, jax.Array]]) -> tuple[jax.Array, dict[int, jax.Array]]:
        done, written = carry
        first = jnp.minimum(done, size - many)  # the last piece meets rows that are done

        def cut(block: Any) -> Any:
            if not jnp.ndim(block) or block.shape[0] != size:
                return block
            return jax.lax.dynamic_slice_in_dim(block, first, many)

        is_done = cut(each) < done
        here = jnp.where(is_done, num_rows + 2 * size + each[:many], cut(ids))
        now = {**arrays, **written}
        # copied, or XLA reads it again after it was written
        old = gathered_once(
            lambda gather: [cut(now[i]) if i in aligned else gather(now[i], here) for i in leaves],
            [jax.ShapeDtypeStruct((many, *now[i].shape[1:]), now[i].dtype) for i in leaves],
            done >= 0,
        )
        part = Part(here, cut, dict(zip(leaves, old, strict=True)))
        for i, block in zip(new, part.of(new.values()), strict=True):
            if i in aligned:
                kept = jnp.where(is_done.reshape(-1, *(1,) * (block.ndim - 1)), cut(now[i]), block)
                written[i] = jax.lax.dynamic_update_slice_in_dim(written[i], kept, first, 0)
            else:
                written[i] = scatter_rows(written[i], here, block)
        return first + many, written

    start = jnp.int32(0), {i: arrays[i] for i in new}
    return dict(arrays) | jax.lax.while_loop(lambda carry: carry[0] < end, piece, start)[1]
