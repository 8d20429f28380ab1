"""The few shapes of a stream's batches. What does not fit one gets the next; nothing is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse._checks import message, warn
from jaxsparse.data.distinct import DistinctIds, Scratch, placed, room_for, round_up, sorted_distinct
from jaxsparse.data.features import Lists

Cuts = list[Any]  # of some examples, one for each feature


class Rungs:
    """Sizes for all features together, so that a rung is one shape: those of the first, two and eight times them, and
    four times as much from there on.

    Attributes:
      sizes: of each feature, on the first rung: the entries of a matrix, the length of id lists, and 0 for others.
      rooms: of each feature, for its distinct ids; 0 where there are none, or where they are not looked for.
      used: how many batches were made on each rung.
    """

    def __init__(self, features: Sequence[Any], length: int, scratch: Scratch | None, is_fixed: bool) -> None:
        self._features, self._length, self._scratch, self._is_fixed = features, length, scratch, is_fixed
        self.sizes, self.rooms, self.used = [0] * len(features), [0] * len(features), [0, 0, 0]

    def learn(
        self, batches: list[list[Cuts]], spares: Cuts, sizes: Sequence[int | None], rooms: Sequence[int | None]
    ) -> None:
        """Sets the sizes that are not given so that these batches (cuts for each device) fit, and others like them."""
        needs = [self._needs(shards) for shards in batches]
        self.sizes = [_first(of, given) for of, given in zip(zip(*needs, strict=True), sizes, strict=True)]
        if self._scratch is not None:
            most = [-1] * len(self.sizes)
            for shards, need in zip(batches, needs, strict=True):
                padded = self._pad(shards, self._lowest(need, [0] * len(most)), spares)
                most = [max(k, *map(len, found), -1) for k, found in zip(most, self._distinct(padded), strict=True)]
            given = zip(most, rooms, strict=True)
            self.rooms = [0 if k < 0 else room_for(k) if room is None else room for k, room in given]

    def make(self, shards: list[Cuts], spares: Cuts) -> tuple[list[list[Any]], list[list[DistinctIds | None]]]:
        """For each device the features of its examples, on the lowest rung that they fit, and their distinct ids."""
        needs, rung = self._needs(shards), -1
        found: list[list[np.ndarray]] = [[] for _ in self._features]
        while (lowest := self._lowest(needs, [1 + max(map(len, of)) if of else 0 for of in found])) > rung:
            rung = lowest  # on which there may be more padding than before, and one distinct id more
            self._check(needs, rung)
            padded = self._pad(shards, rung, spares)
            found = self._distinct(padded)
        self._count(rung)
        known: list[list[DistinctIds | None]] = [[None] * len(found) for _ in shards]
        for n, (feature, of) in enumerate(zip(self._features, found, strict=True)):
            if of and self._scratch is not None:
                ids, room = [feature.ids(leaves[n]) for leaves in padded], self.rooms[n] * _factor(rung)
                for own, distinct in zip(known, placed(of, ids, room, self._scratch), strict=True):
                    own[n] = distinct
        return padded, known

    def _needs(self, shards: list[Cuts]) -> list[int]:
        return [max(map(f.size_of, of)) for f, of in zip(self._features, zip(*shards, strict=True), strict=True)]

    def _lowest(self, needs: Sequence[int], distinct: Sequence[int]) -> int:
        rung = 0
        while any(
            need > size * _factor(rung)
            for need, size in zip((*needs, *distinct), (*self.sizes, *self.rooms), strict=True)
        ):
            rung += 1
        return rung

    def _pad(self, shards: list[Cuts], rung: int, spares: Cuts) -> list[list[Any]]:
        sizes = [size * _factor(rung) for size in self.sizes]
        return [
            [f.pad(*of) for f, *of in zip(self._features, cuts, [self._length] * len(cuts), sizes, spares, strict=True)]
            for cuts in shards
        ]

    def _distinct(self, padded: list[list[Any]]) -> list[list[np.ndarray]]:
        """Of each feature that has ids, the distinct ones on each device; of others, and without a scratch, none."""
        if self._scratch is None:
            return [[] for _ in self._features]
        ids = [[f.ids(x) for x in of] for f, of in zip(self._features, zip(*padded, strict=True), strict=True)]
        return [[sorted_distinct(x.reshape(-1)) for x in of if x is not None] for of in ids]

    def _check(self, needs: Sequence[int], rung: int) -> None:
        if rung and self._is_fixed:
            n = next(n for n, need in enumerate(needs) if need > self.sizes[n])
            argument = "length" if isinstance(self._features[n], Lists) else "nse"
            must = f"at least {needs[n]} with shard, for a batch of {self._features[n].name}"
            do = "All hosts need the same sizes, so there is no larger one. The first chunks have less."
            raise ValueError(message("stream", argument, must, self.sizes[n], do))

    def _count(self, rung: int) -> None:
        if rung >= len(self.used):
            self.used += [0] * (rung + 1 - len(self.used))
            warn(
                "js.stream: a batch needs more than eight times the sizes of the first ones, and one more shape is "
                f"compiled for. Give larger sizes: nse=, length= or distinct=. They were {self.sizes}, {self.rooms}."
            )
        self.used[rung] += 1


def _first(needs: Sequence[int], given: int | None) -> int:
    if given is not None or not max(needs):
        return given or 0
    return round_up(needs[0]) if len(set(needs)) == 1 else room_for(max(needs))


def _factor(rung: int) -> int:
    return 4**rung // 2 if rung else 1
