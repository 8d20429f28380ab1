"""The order of the examples in an epoch. Any slice of it can be computed without the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEW = 1 << 20  # up to this number of examples, the whole order is in memory
_BLOCK = 1 << 15  # positions computed in one call
_ROUNDS = 8
_FACTORS = {
    32: (0x7FEB352D, 0x846CA68B),
    64: (0xBF58476D1CE4E5B9, 0x94D049BB133111EB),
}  # odd multipliers of well-known integer hashes


class InOrder:
    """0, 1, ..., n - 1."""

    def __getitem__(self, places: slice) -> np.ndarray:
        return np.arange(places.start, places.stop)


class Shuffled:
    """A permutation of 0, ..., n - 1 that depends on `key`, some ints. No array of n numbers is made.

    A Feistel network of eight rounds permutes the numbers that have as many bits as n - 1 (Luby and Rackoff 1988). A
    result of n or more goes through the network again until it is below n (cycle walking, Black and Rogaway 2002); this
    takes less than one more pass on average. The result is a permutation for every key.
    """

    def __init__(self, n: int, key: Sequence[int]) -> None:
        self._n, bits = n, max((n - 1).bit_length(), 2)
        self._sizes = bits - bits // 2, bits // 2  # of the high half and of the low one, in bits
        self._word = 32 if bits <= 32 else 64
        self._dtype = np.dtype(f"uint{self._word}")
        self._factors = np.array(_FACTORS[self._word], self._dtype)
        self._keys = np.random.default_rng(key).integers(0, 2**self._word, _ROUNDS, self._dtype)
        self._last = -1, np.zeros(0, np.int64)  # the last block; one assignment, so that threads see a consistent pair

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop = places.start, min(places.stop, self._n)
        blocks = range(start // _BLOCK, -(-stop // _BLOCK))
        parts = [self._block(b)[max(start - b * _BLOCK, 0) : max(stop - b * _BLOCK, 0)] for b in blocks]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _block(self, number: int) -> np.ndarray:
        last, block = self._last
        if last != number:
            first = number * _BLOCK
            block = self._walk(np.arange(first, min(first + _BLOCK, self._n), dtype=self._dtype))
            self._last = number, block
        return block

    def _walk(self, x: np.ndarray) -> np.ndarray:
        x = self._permute(x)
        outside = np.flatnonzero(x >= self._n)
        while len(outside):
            x[outside] = self._permute(x[outside])
            outside = outside[x[outside] >= self._n]
        return x.astype(np.int64)

    def _permute(self, x: np.ndarray) -> np.ndarray:
        low, kind = self._sizes[1], self._dtype.type
        halves = [x >> kind(low), x & kind((1 << low) - 1)]
        for number, key in enumerate(self._keys):
            changing = number % 2  # this half changes, the other one is the input
            mixed = halves[1 - changing] ^ key
            mixed *= self._factors[0]
            mixed ^= mixed >> kind(self._word // 2 - 1)
            mixed *= self._factors[1]
            mixed >>= kind(self._word - self._sizes[changing])
            halves[changing] ^= mixed
        return (halves[0] << kind(low)) | halves[1]


def order_of(n: int, key: Sequence[int] | None) -> InOrder | Shuffled | np.ndarray:
    """The order of n examples, to be sliced: unchanged without a key, NumPy's permutation for up to 2**20 examples, and
    a `Shuffled` for more."""
    if key is None:
        return InOrder()
    return np.random.default_rng(key).permutation(n) if n <= FEW else Shuffled(n, key)
