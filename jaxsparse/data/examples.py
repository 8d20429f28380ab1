"""Features, targets and weights of the same examples, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsparse._checks import message
from jaxsparse.data.features import Array, Weights, check_num_rows, make_features


class Examples:
    """The checked examples of a `js.batches`, or of a chunk of a `js.stream`.

    Attributes:
      features: the leaves of x, each an instance of a class of `features.py`.
      tree: the structure of x.
      y, weight: an `Array` and `Weights`, or None.
      num_examples: the number of examples.
    """

    def __init__(self, x: Any, y: Any, weight: Any, per_name: dict[str, Any], check_finite: bool) -> None:
        names: set[str] = set()
        self.features, self.tree = jax.tree.flatten(make_features(x, "x", None, per_name, check_finite, names))
        check_names(per_name, names)
        if not self.features:
            raise ValueError(message("batches", "x", "at least one feature", "an empty dict"))
        num_rows, first = per_name["num_rows"], self.features[0]
        if num_rows is not None and not isinstance(num_rows, Mapping):
            check_num_rows(self.features, num_rows)
        self.num_examples = first.num_examples
        for feature in self.features[1:]:
            if feature.num_examples != self.num_examples:
                must = f"of {self.num_examples} examples, as {first.name} is"
                raise ValueError(message("batches", feature.name, must, feature.num_examples))
        self.y = None if y is None else Array(y, "y", check_finite)
        self.weight = None if weight is None else Weights(weight, check_finite)
        for other in (self.y, self.weight):
            if other is not None and other.num_examples != self.num_examples:
                must = f"of {self.num_examples} examples, as x is"
                raise ValueError(message("batches", other.name, must, other.num_examples))


def check_integers(per_name: dict[str, Any], function: str = "batches", least: int | None = None) -> None:
    for argument, value in per_name.items():
        for v in value.values() if isinstance(value, Mapping) else [value]:
            if v is not None and not is_int(v):
                raise TypeError(message(function, argument, "an integer, or a dict of them", repr(v)))
            if v is not None and least is not None and v < least:
                raise ValueError(message(function, argument, f"at least {least}", v))


def check_names(per_name: dict[str, Any], names: set[str], function: str = "batches") -> None:
    for argument, value in per_name.items():
        for name in set(value) - names if isinstance(value, Mapping) else ():
            raise ValueError(message(function, argument, f"keyed by the features of x, {sorted(names)}", repr(name)))


def check_sizes(function: str, batch_size: Any, devices: Any, shard: Any, seed: Any) -> tuple[int, int]:
    """Returns the index and count of the shard. Raises for sizes that do not fit together."""
    if not is_int(batch_size) or batch_size < 1:
        raise ValueError(message(function, "batch_size", "an integer of at least 1", batch_size))
    index, count = _check_shard(function, shard, batch_size)
    if devices is not None and (not is_int(devices) or devices < 1 or batch_size // count % devices):
        size = f"batch_size, {batch_size}" if shard is None else f"batch_size / count, {batch_size // count}"
        raise ValueError(message(function, "devices", f"a divisor of {size}", devices))
    if not is_int(seed) or seed < 0:
        raise ValueError(message(function, "seed", "an integer of at least 0", seed))
    return index, count


def _check_shard(function: str, shard: Any, batch_size: int) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    must = f"a pair (index, count), 0 <= index < count, count a divisor of batch_size, {batch_size}"
    if not isinstance(shard, tuple) or len(shard) != 2 or not all(map(is_int, shard)):
        raise TypeError(message(function, "shard", must, repr(shard)))
    index, count = map(int, shard)
    if not 0 <= index < count or batch_size % max(count, 1):
        raise ValueError(message(function, "shard", must, shard))
    return index, count


def is_int(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)
