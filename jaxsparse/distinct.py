"""The distinct ids of a batch, on the host: how many there are, and in an order that suits the tables.

Every id writes its position into a place of its own and reads back who wrote last, as `rows.coalesce_ids` does on the
device: a few linear passes, where NumPy's sort takes several times as long on many machines. What is left is put in
order by the ids' upper 16 bits, which NumPy does by radix: rows that are near each other in a table are then read and
written one after the other, which is what caches and the translation of addresses want.
"""

from __future__ import annotations

import numpy as np

_PLACES = 1 << 28  # int32s, of which only those that are used take memory: beyond, ids are sorted


class DistinctIds:
    """Finds the distinct ones of some ids.

    Example:
      >>> import numpy as np
      >>> from jaxsparse.distinct import DistinctIds
      >>> DistinctIds(0, 9)(np.array([[3, 9], [9, 0]], np.int32)).tolist()
      [0, 3, 9]
    """

    def __init__(self, lowest: int, highest: int) -> None:
        """For ids of lowest, ..., highest."""
        self._lowest, top = lowest, max(highest - lowest, 0)
        self._shift = max(top.bit_length() - 16, 0)
        self._places = np.empty(top + 1, np.int32) if top < _PLACES else None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Each of the distinct ids once, int32 (k,), ascending but for neighbours of the same upper 16 bits."""
        if self._places is None:
            return np.unique(ids).astype(np.int32)
        at = ids.reshape(-1).astype(np.intp)  # by which NumPy finds its way twice as fast
        at -= self._lowest
        position = np.arange(at.size, dtype=np.int32)
        self._places[at] = position
        unique = at.take(np.flatnonzero(self._places.take(at) == position))
        unique = unique.take(np.argsort((unique >> self._shift).astype(np.uint16), kind="stable"))
        return (unique + self._lowest).astype(np.int32)
