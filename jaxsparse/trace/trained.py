"""The argument `rows=`: which rows of a table are trained. All other rows keep their bits in parameter and slots.

`trained_rows` takes what the user gave, ids or masks by name, and returns a `TrainedRows` for each class of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import message
from jaxsparse.ops.row_sparse import RowSparse


class TrainedRows:
    """The trained rows of a table. The ids of these or of all other rows are kept, whichever are fewer.

    Args:
      function, name: names for messages.
      rows: integers in [0, num_rows), or bool (num_rows,).
    """

    def __init__(self, function: str, name: str, rows: Any, num_rows: int) -> None:
        rows, must = np.asarray(rows), f"ids of rows, or a mask (num_rows,), of a table of {num_rows} rows"
        at = f"rows[{name!r}]" if name else "rows"
        if rows.dtype == bool and rows.shape == (num_rows,):
            chosen = np.flatnonzero(rows)
        elif np.issubdtype(rows.dtype, np.integer) or not rows.size:
            chosen = np.unique(rows.astype(np.int64))
        else:
            raise TypeError(message(function, at, must, f"{rows.dtype} of shape {rows.shape}"))
        if chosen.size and not 0 <= chosen[0] <= chosen[-1] < num_rows:
            raise ValueError(message(function, at, must, f"ids from {chosen[0]} to {chosen[-1]}"))
        self._are_trained = 2 * len(chosen) <= num_rows
        ids = chosen if self._are_trained else np.setdiff1d(np.arange(num_rows), chosen, assume_unique=True)
        self._ids = ids.astype(np.int32)

    def is_trained(self, ids: jax.Array) -> jax.Array:
        """Which ids are of trained rows: bool, the shape of ids."""
        if not len(self._ids):
            return jnp.full(ids.shape, not self._are_trained)
        known = jnp.asarray(self._ids)
        at = jnp.searchsorted(known, ids, method="scan_unrolled")
        return (known.at[at].get(mode="clip") == ids) == self._are_trained

    def restricted(self, g: RowSparse) -> RowSparse:
        """A gradient with unique ids, in which the ids of other rows become padding."""
        k = g.ids.shape[0]
        padding = g.num_rows + k + jnp.arange(k, dtype=jnp.int32)
        return RowSparse(jnp.where(self.is_trained(g.ids), g.ids, padding), g.rows, g.shape, unique=True)


def trained_rows(
    function: str, rows: Any, tables: Mapping[int, tuple[str, int, int]], others: Sequence[str] = ()
) -> dict[int, TrainedRows]:
    """The trained rows by class.

    Args:
      rows: ids or a mask, if there is one class; or a dictionary of them, whose keys are parts of paths.
      tables: {number: (path, number of rows, class)} of the arrays with rows.
      others: the paths of dense arrays, for messages.
    """
    if rows is None:
        return {}
    do = "Name tables by a part of their path: rows={'words': ids}."
    classes = {c for _, _, c in tables.values()}
    if not isinstance(rows, Mapping):
        if len(classes) != 1:
            raise ValueError(
                message(
                    function, "rows", "a dictionary where there is not just one table", f"{len(classes)} tables", do
                )
            )
        rows = {"": rows}
    found: dict[int, TrainedRows] = {}
    for name, given in rows.items():
        meant = {c: n for path, n, c in tables.values() if name in path}
        if not meant:
            dense = [path for path in others if name in path]
            got = f"{name!r}, which is " + (f"the dense {dense[0]}" if dense else "a part of none")
            raise ValueError(
                message(function, "rows", f"parts of the paths {[p for p, _, _ in tables.values()]}", got, do)
            )
        for c, n in meant.items():
            if c in found:
                raise ValueError(message(function, "rows", "one entry for tables that share their rows", repr(name)))
            found[c] = TrainedRows(function, name, given, n)
    return found
