"""The few shapes of a stream's batches. A batch that does not fit one shape gets the next; nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse._checks import message, warn
from jaxsparse.data.distinct import DistinctIds, Scratch, capacity_for, locate_ids, round_up, sorted_distinct
from jaxsparse.data.features import Lists

Cuts = list[Any]  # some examples: one array, or tuple of arrays, for each feature


class Rungs:
    """The sizes that batches are padded to. Rung 0 has the learnt sizes, rung 1 twice these, rung 2 eight times, and
    each further rung four times the one before. All features of a batch are on the same rung: one shape to compile for.

    Attributes:
      sizes: on rung 0, by feature: the entries of a matrix, the length of id lists, 0 for other features.
      capacities: on rung 0, by feature: how many distinct ids fit; 0 for features without ids, or if not counted.
      used: the number of batches made on each rung.
    """

    def __init__(self, features: Sequence[Any], length: int, scratch: Scratch | None, is_fixed: bool) -> None:
        self._features, self._length, self._scratch, self._is_fixed = features, length, scratch, is_fixed
        self.sizes, self.capacities, self.used = [0] * len(features), [0] * len(features), [0, 0, 0]

    def learn(
        self, batches: list[list[Cuts]], fillers: Cuts, sizes: Sequence[int | None], capacities: Sequence[int | None]
    ) -> None:
        """Sets the sizes that are not given. These batches (cuts for each device) fit, and others like them."""
        needs = [self._needs(shards) for shards in batches]
        self.sizes = [_learnt_size(of, given) for of, given in zip(zip(*needs, strict=True), sizes, strict=True)]
        if self._scratch is not None:
            max_distinct = [-1] * len(self.sizes)
            for shards, need in zip(batches, needs, strict=True):
                padded = self._pad(shards, self._lowest(need, [0] * len(max_distinct)), fillers)
                max_distinct = [
                    max(k, *map(len, found), -1) for k, found in zip(max_distinct, self._distinct(padded), strict=True)
                ]
            given = zip(max_distinct, capacities, strict=True)
            self.capacities = [
                0 if k < 0 else capacity_for(k) if capacity is None else capacity for k, capacity in given
            ]

    def make(self, shards: list[Cuts], fillers: Cuts) -> tuple[list[list[Any]], list[list[DistinctIds | None]]]:
        """The padded features for each device, on the lowest rung that they fit, and their distinct ids."""
        needs, rung = self._needs(shards), -1
        found: list[list[np.ndarray]] = [[] for _ in self._features]
        while (lowest := self._lowest(needs, [1 + max(map(len, of)) if of else 0 for of in found])) > rung:
            rung = lowest  # padding may add one distinct id
            self._check(needs, rung)
            padded = self._pad(shards, rung, fillers)
            found = self._distinct(padded)
        self._count(rung)
        known: list[list[DistinctIds | None]] = [[None] * len(found) for _ in shards]
        for n, (feature, of) in enumerate(zip(self._features, found, strict=True)):
            if of and self._scratch is not None:
                ids, capacity = [feature.ids(leaves[n]) for leaves in padded], self.capacities[n] * _factor(rung)
                for of_shard, distinct in zip(known, locate_ids(of, ids, capacity, self._scratch), strict=True):
                    of_shard[n] = distinct
        return padded, known

    def _needs(self, shards: list[Cuts]) -> list[int]:
        return [max(map(f.size_of, of)) for f, of in zip(self._features, zip(*shards, strict=True), strict=True)]

    def _lowest(self, needs: Sequence[int], distinct: Sequence[int]) -> int:
        rung = 0
        while any(
            need > size * _factor(rung)
            for need, size in zip((*needs, *distinct), (*self.sizes, *self.capacities), strict=True)
        ):
            rung += 1
        return rung

    def _pad(self, shards: list[Cuts], rung: int, fillers: Cuts) -> list[list[Any]]:
        sizes = [size * _factor(rung) for size in self.sizes]
        return [
            [
                f.pad(*of)
                for f, *of in zip(self._features, cuts, [self._length] * len(cuts), sizes, fillers, strict=True)
            ]
            for cuts in shards
        ]

    def _distinct(self, padded: list[list[Any]]) -> list[list[np.ndarray]]:
        """The distinct ids of each feature on each device; empty for features without ids, and without a scratch."""
        if self._scratch is None:
            return [[] for _ in self._features]
        ids = [[f.ids(x) for x in of] for f, of in zip(self._features, zip(*padded, strict=True), strict=True)]
        return [[sorted_distinct(x.reshape(-1)) for x in of if x is not None] for of in ids]

    def _check(self, needs: Sequence[int], rung: int) -> None:
        if rung and self._is_fixed:
            n = next(n for n, need in enumerate(needs) if need > self.sizes[n])
            argument = "length" if isinstance(self._features[n], Lists) else "nse"
            must = f"at least {needs[n]} with shard, for a batch of {self._features[n].name}"
            do = "All hosts need the same sizes, so this host cannot take a larger one. The first chunks need less."
            raise ValueError(message("stream", argument, must, self.sizes[n], do))

    def _count(self, rung: int) -> None:
        if rung >= len(self.used):
            self.used += [0] * (rung + 1 - len(self.used))
            warn(
                "js.stream: a batch needs more than eight times the sizes of the first ones. The step compiles again. "
                f"Give larger sizes, nse=, length= or distinct=. They are {self.sizes}, {self.capacities}."
            )
        self.used[rung] += 1


def _learnt_size(needs: Sequence[int], given: int | None) -> int:
    if given is not None or not max(needs):
        return given or 0
    return round_up(needs[0]) if len(set(needs)) == 1 else capacity_for(max(needs))


def _factor(rung: int) -> int:
    return 4**rung // 2 if rung else 1
