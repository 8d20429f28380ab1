"""Parses columns of small integers, the most frequent numbers, without a Python object for each."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 13
_ONES = 0x0101010101010101
_TENS, _HUNDREDS = np.uint64(10), np.uint64(0x000000FF000000FF)
_HIGH, _LOW = np.uint64(100 + (1_000_000 << 32)), np.uint64(1 + (10_000 << 32))


def integers(buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fill: float | None) -> np.ndarray | None:
    """float64 values of fields of up to 8 digits with an optional minus, or empty ones if `fill` is given. None if any
    field is something else.

    Eight digits are one 64-bit word, the first digit lowest. Three multiplications combine its digits to pairs, groups
    of four, and all eight (Lemire, "Quickly parsing eight digits", 2018).

    Args:
      buffer: uint8, with at least 8 bytes after the last field.
      starts: int64, of any shape.
      lengths: int64, of that shape.
      fill: the value of an empty field.
    """
    rows = max(_CHUNK // max(starts[:1].size, 1), 1)  # at a time, so that temporaries stay in the CPU cache
    if len(starts) > rows:
        parts = []
        for at in range(0, len(starts), rows):
            part = integers(buffer, starts[at : at + rows], lengths[at : at + rows], fill)
            if part is None:
                return None
            parts.append(part)
        return np.concatenate(parts)
    minus = (buffer[starts] == ord("-")) & (lengths > 0)
    if has_minus := bool(minus.any()):
        starts, lengths = starts + minus, lengths - minus
    is_empty = lengths == 0
    if (lengths.max(initial=0) > 8) or (is_empty & minus).any() or (fill is None and is_empty.any()):
        return None
    words: np.ndarray = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))  # the word that starts at each byte
    behind = (8 * (8 - lengths.clip(1))).astype(np.uint64)
    digits = (words[starts] ^ np.uint64(ord("0") * _ONES)) << behind  # drops bytes after the field, zeros before it
    if (((digits + np.uint64(6 * _ONES)) | digits) & np.uint64(0xF0 * _ONES))[~is_empty].any():
        return None
    digits = digits * _TENS + (digits >> np.uint64(8))
    digits = (digits & _HUNDREDS) * _HIGH + ((digits >> np.uint64(16)) & _HUNDREDS) * _LOW
    values = (digits >> np.uint64(32)).astype(np.float64)
    if is_empty.any():
        values[is_empty] = fill
    return np.where(minus, -values, values) if has_minus else values
