"""MurmurHash3 (x86, 32 bits) of many values at once, in NumPy.

A value is a sequence of 32-bit words; the last word may be incomplete. Values are sorted by length, longest first. Step
n mixes word n into the values that have it, which are the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CHUNK = 1 << 14  # values at a time, so that temporaries stay in the CPU cache


def hash_integers(values: np.ndarray, seed: int) -> np.ndarray:
    """Hashes, uint32 (n,), of integers (n,) as 8 bytes, little-endian, two's complement."""
    out = np.empty(len(values), np.uint32)
    for at in range(0, len(values), _CHUNK):
        part = values[at : at + _CHUNK]
        part = part if part.dtype == np.uint64 else part.astype(np.int64)
        words = np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).view("<u4").reshape(-1, 2)
        out[at : at + _CHUNK] = hash_words([words[:, 0], words[:, 1]], seed)
    return out


def hash_words(words: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Hashes, uint32 (n,), of n values of len(words) words each. words[k] (n,) has word k of all values."""
    state = np.full(len(words[0]), seed, np.uint32)
    for word in words:
        state = _with_word(state, word)
    return _finished(state, np.uint32(4 * len(words)))


def hash_bytes(buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seed: int | np.ndarray) -> np.ndarray:
    """Hashes, uint32 (n,), of the values buffer[starts[i] : starts[i] + lengths[i]].

    Args:
      buffer: uint8, with at least 4 bytes after the last value.
      starts: int64 (n,).
      lengths: int64 (n,).
      seed: 32 bits, or uint32 (n,).
    """
    seeds = np.broadcast_to(np.asarray(seed, np.uint32), starts.shape)
    words: np.ndarray = np.ndarray(
        (max(len(buffer) - 3, 0),), "<u4", buffer, strides=(1,)
    )  # the word that starts at each byte
    out = np.empty(len(starts), np.uint32)
    for at in range(0, len(starts), _CHUNK):
        length = lengths[at : at + _CHUNK]
        narrow = length.astype(np.uint16) if length.max() < 2**16 else length  # NumPy has a radix sort for 16 bits
        order = np.argsort(narrow, kind="stable")[::-1]  # the longest first
        length, start = length[order], starts[at : at + _CHUNK][order]
        whole = length // 4
        state = seeds[at : at + _CHUNK][order]
        for n in range(int(whole[0])):
            count = len(whole) - int(np.searchsorted(whole[::-1], n, side="right"))  # values with more than n words
            state[:count] = _with_word(state[:count], words[start[:count] + 4 * n])
        rest = length - 4 * whole
        tail = np.flatnonzero(rest)
        last = words[(start + 4 * whole)[tail]] & _MASKS[rest[tail]]
        state[tail] ^= _scrambled(last)
        out[at + order] = _finished(state, length.astype(np.uint32))
    return out


_MASKS = np.array([0, 0xFF, 0xFFFF, 0xFFFFFF], np.uint32)


def _with_word(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    state = _rotated(state ^ _scrambled(word), 13)
    state *= np.uint32(5)
    state += np.uint32(0xE6546B64)
    return state


def _scrambled(word: np.ndarray) -> np.ndarray:
    return _rotated(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _rotated(x: np.ndarray, by: int) -> np.ndarray:
    out = x << np.uint32(by)
    out |= x >> np.uint32(32 - by)
    return out


def _finished(state: np.ndarray, num_bytes: np.ndarray | np.uint32) -> np.ndarray:
    state ^= num_bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        state ^= state >> np.uint32(shift)
        if factor != 1:
            state *= np.uint32(factor)
    return state
