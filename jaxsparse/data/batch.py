"""What a batch is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


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
      distinct: like x, the `DistinctIds` of what is ids there. A step that is given the batch need not look for the
        distinct ids itself. Where x is changed, leave it out: dataclasses.replace(batch, x=x, distinct=None). A step
        whose ids are not what it says returns NaN, and changes no row.
    """

    x: Any
    y: Any
    weight: Any
    distinct: Any = None
