"""What a batch is, and what js.batches knows of it beyond its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
from jax.experimental.sparse import BCOO

from jaxsparse._jax import ByIdentity


class Leaf(NamedTuple):
    """An array of x, and what is known of it."""

    array: Any
    matrix: tuple[int, ...] | None  # the shape of the matrix whose indices these are
    distinct: int | None
    ordered: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch, a pytree.

    Attributes:
      x: what `js.batches` was given, cut to this batch: BCOO (B, num_features) for a SciPy matrix, int32 (B, L) for id
        lists, arrays (B, ...) for arrays, a dict of these for a dict.
      y: the targets, (B, ...), or None.
      weight: float32 (B,): 0 on padding, elsewhere 1 or the weight that was given. Multiply the examples' losses by it:
        `js.weighted_mean(losses, batch.weight)`.
      distinct: static. For each leaf of x, an upper bound on the number of distinct values it holds, or None. It is
        what was counted of this x: a batch with another x wants distinct=(None,) * its number of leaves, or its
        gradients may be NaN.
      ordered: for each leaf of x that holds ids, NumPy's int32 (k,), all its values and no others, in order (padding at
        the end); for the indices of a BCOO, all columns that have entries; otherwise None. js.batches has them, as what
        its counting leaves behind, and a step on CPU is faster for them. They are no part of the pytree, but of these
        very arrays: a batch made of this one, by jax.device_put, jax.tree.map or dataclasses.replace, has none, and
        neither has an array that was put into x.
    """

    x: Any
    y: Any
    weight: Any
    distinct: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    _found: ClassVar[tuple[Leaf, ...]] = ()

    @property
    def ordered(self) -> tuple[Any, ...] | None:
        if not self._found:
            return None
        found = ByIdentity((leaf.array, leaf) for leaf in self._found)
        now = [(found(array), matrix) for array, matrix in _arrays(self.x)]
        return tuple(leaf.ordered if leaf and leaf.matrix == matrix else None for leaf, matrix in now)

    def with_ordered(self, ordered: Iterable[Any] | None) -> Batch:
        batch = dataclasses.replace(self)
        found = zip(_arrays(batch.x), ordered, strict=True) if ordered else ()
        leaves = [Leaf(array, matrix, None, values) for (array, matrix), values in found if values is not None]
        object.__setattr__(batch, "_found", tuple(leaves))
        return batch

    def leaves(self) -> list[Leaf]:
        """The arrays of x, with what is known of each."""
        arrays = _arrays(self.x)
        every = zip(arrays, self.distinct, self.ordered or [None] * len(arrays), strict=True)
        return [Leaf(array, matrix, distinct, ordered) for (array, matrix), distinct, ordered in every]


def _arrays(x: Any) -> list[tuple[Any, tuple[int, ...] | None]]:
    """The arrays of x in a pytree's order, and the shape of the matrix whose indices they are, or None."""
    return [
        (array, feature.shape if isinstance(feature, BCOO) and array is feature.indices else None)
        for feature in jax.tree.leaves(x, is_leaf=lambda x: isinstance(x, BCOO))
        for array in jax.tree.leaves(feature)
    ]


def find_batches(tree: Any) -> list[Batch]:
    """The batches in a pytree, in its order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_batch) if _is_batch(x)]


def order_batches(tree: Any, ordered: Iterable[Any]) -> Any:
    """A pytree whose batches have these for `ordered`."""
    it = iter(ordered)
    return jax.tree.map(lambda x: x.with_ordered(next(it)) if _is_batch(x) else x, tree, is_leaf=_is_batch)


def without_counts(tree: Any) -> Any:
    """A pytree whose batches are their arrays only: what else they know is static, and another in each batch."""
    if not any(_is_batch(x) for x in jax.tree.leaves(tree, is_leaf=_is_batch)):
        return tree

    def one(x: Any) -> Any:
        return dataclasses.replace(x, distinct=(None,) * len(x.distinct)) if _is_batch(x) else x

    return jax.tree.map(one, tree, is_leaf=_is_batch)


def _is_batch(x: object) -> bool:
    return isinstance(x, Batch)
