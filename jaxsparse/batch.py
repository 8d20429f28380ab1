"""From SciPy matrices and id lists on the host to static-shape batches on the device.

Shapes are static on the device and sizes are not in the data, so everything is padded, by BCOO's contract (index =
size, data = 0) for sparse matrices and with padding_idx (or num_rows) for id lists. Examples that fill up a batch are
empty there, and elsewhere repeat one of the batch, so that no new row is touched and nothing new can overflow; their
weight is 0. How much: `Sizes` has a few sizes for a whole run, one where all batches are alike. How many distinct
values an integer array holds matters to the cost of a step, so it is counted here and carried, rounded up likewise, as
a static field of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxsparse._checks import message
from jaxsparse.features import Array, Sizes, as_full, bcoo, canonical_csr, entries, is_feature, make_features, where_bad


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
      distinct: static. For each leaf of x, an upper bound on the number of distinct values it holds, or None.
    """

    x: Any
    y: Any
    weight: Any
    distinct: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})


def from_scipy(matrix: Any, nse: int | None = None) -> BCOO:
    """A SciPy sparse matrix as a BCOO with static shapes.

    Duplicates are summed, explicit zeros are kept, the entries are ordered by row and column. Padding has index = shape
    and data 0.

    Args:
      matrix: any SciPy sparse matrix or array of two dimensions, with indices of any integer type.
      nse: the number of entries to pad to; by default as many as there are.

    Returns:
      A BCOO of the matrix's shape: data (nse,), indices int32 (nse, 2).

    Raises:
      TypeError: if `matrix` is no SciPy sparse matrix.
      ValueError: if `nse` is smaller than the number of entries, or a stored index is outside the shape.
      OverflowError: if a dimension does not fit int32.

    Example:
      >>> import numpy as np, scipy.sparse, jaxsparse as js
      >>> x = js.from_scipy(scipy.sparse.csr_matrix(np.array([[0., 2.], [1., 0.]])), nse=3)
      >>> x.data.tolist(), x.indices.tolist()
      ([2.0, 1.0, 0.0], [[0, 1], [1, 0], [2, 2]])
    """
    csr = canonical_csr(matrix, "from_scipy", "matrix")
    nse = csr.nnz if nse is None else nse
    if nse < csr.nnz:
        do = "A smaller nse would lose entries."
        raise ValueError(message("from_scipy", "nse", f"at least the number of stored entries, {csr.nnz}", nse, do))
    data, indices = entries(csr, np.arange(csr.shape[0]), csr.shape[0], nse)
    return jax.tree.map(jnp.asarray, bcoo(data, indices, csr.shape))


def batches(
    x: Any,
    y: Any = None,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    drop_remainder: bool = False,
    num_rows: int | Mapping[str, int] | None = None,
    padding_idx: int | Mapping[str, int] | None = None,
    weight: Any = None,
    nse: int | Mapping[str, int] | None = None,
    devices: int | None = None,
    check_finite: bool = False,
) -> Batches:
    """Batches of one static shape: every example once an epoch, another order each epoch, resumable.

    Args:
      x: the examples, n of them: a SciPy sparse matrix (n, num_features); integers (n, L) or (n,), which are ids; a
        list of n lists of ids, which become (B, L), L being the batch's longest, rounded up to one of a few sizes; any
        other array (n, ...); or a dict of these, nested at will.
      y: the targets, (n, ...), or None.
      batch_size: examples a batch; the last batch of an epoch is padded up to it with weight 0.
      shuffle: another order each epoch, all of them from `seed`.
      seed: of the orders.
      drop_remainder: leave out the last batch where it is not full.
      num_rows: the size of the table that ids go into: an int, or one by feature name. Ids are checked against it.
        Lists of ids need it.
      padding_idx: what pads lists of ids, an int or one by feature name; give embedding_bag or embedding_lookup the
        same one. num_rows by default. An id equal to it is legal in the data and means padding there too.
      weight: a weight for each example, (n,); 1 by default.
      nse: entries a batch of a SciPy matrix is padded to, an int or one by feature name. By default one of a few sizes.
      devices: if given, every leaf of a batch gets a leading axis of this size, one slice of batch_size / devices
        examples for each device: what jax.pmap maps over.
      check_finite: whether NaN and inf in x, y and weight are errors.

    Returns:
      A `Batches`: each iteration over it is one epoch of `Batch`.

    Raises:
      TypeError: for an x that is none of the above.
      ValueError: for sizes that do not fit together, ids outside [0, num_rows), nse too small, or, with check_finite,
        NaN and inf.
      OverflowError: for ids past the int32 range.

    Example:
      >>> import jaxsparse as js
      >>> batches = js.batches([[3, 0], [], [1, 2]], [0., 1., 1.], num_rows=4, batch_size=2)
      >>> for batch in batches:
      ...     print(batch.x.tolist(), batch.y.tolist(), batch.weight.tolist())
      [[3, 0], [4, 4]] [0.0, 1.0] [1.0, 1.0]
      [[1, 2], [4, 4]] [1.0, 1.0] [1.0, 0.0]
    """
    return Batches(
        x,
        y,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_remainder=drop_remainder,
        num_rows=num_rows,
        padding_idx=padding_idx,
        weight=weight,
        nse=nse,
        devices=devices,
        check_finite=check_finite,
    )


class Batches:
    """What `js.batches` returns. `len()` is the number of batches an epoch.

    Each `iter()` starts an epoch at its beginning: the one that comes next, or the same one again if its iteration was
    left early. To go on where a run stopped, save `state` beside the checkpoint and set it before iterating.

    Attributes:
      state: the position as a dict of ints: epoch, step (of the batch to come next), and the settings that the order
        depends on. Setting it raises ValueError if those settings differ.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_remainder: bool,
        num_rows: Any,
        padding_idx: Any,
        weight: Any,
        nse: Any,
        devices: int | None,
        check_finite: bool,
    ) -> None:
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(message("batches", "batch_size", "an integer of at least 1", batch_size))
        if devices is not None and (devices < 1 or batch_size % devices):
            raise ValueError(message("batches", "devices", f"a divisor of batch_size, {batch_size}", devices))
        per_name = {"num_rows": num_rows, "padding_idx": padding_idx, "nse": nse}
        names: set[str] = set()
        self._features = make_features(x, "x", None, per_name, check_finite, names)
        for argument, value in per_name.items():
            for name in set(value) - names if isinstance(value, Mapping) else ():
                raise ValueError(
                    message("batches", argument, f"keyed by the features of x, {sorted(names)}", repr(name))
                )
        leaves = jax.tree.leaves(self._features, is_leaf=is_feature)
        if not leaves:
            raise ValueError(message("batches", "x", "at least one feature", "an empty dict"))
        self._num_examples = leaves[0].num_examples
        for leaf in leaves[1:]:
            if leaf.num_examples != self._num_examples:
                must = f"of {self._num_examples} examples, as {leaves[0].name} is"
                raise ValueError(message("batches", leaf.name, must, leaf.num_examples))
        self._y = None if y is None else Array(np.asarray(y), "y", check_finite)
        self._weight = None if weight is None else Array(np.asarray(weight).astype(np.float32), "weight", check_finite)
        for other in (self._y, self._weight):
            if other is not None and other.num_examples != self._num_examples:
                raise ValueError(
                    message("batches", other.name, f"of {self._num_examples} examples, as x is", other.num_examples)
                )
        if self._weight is not None and (self._weight.values.ndim != 1 or (self._weight.values < 0).any()):
            raise ValueError(
                message(
                    "batches",
                    "weight",
                    "of shape (n,) and not negative",
                    where_bad(self._weight.values, self._weight.values < 0),
                )
            )
        self._batch_size, self._shuffle, self._seed = int(batch_size), bool(shuffle), int(seed)
        self._drop_remainder, self._devices = bool(drop_remainder), devices
        self._epoch = self._step = self._start = 0
        few = [
            (order, step)
            for order in map(self._order, range(_LOOK_AHEAD if shuffle else 1))
            for step in range(len(self))
        ]
        self._sizes = self._map(lambda f: f.sizes([part for order, step in few for part in self._chunk(order, step)]))
        first = [part for order, step in few[:_LOOK_AHEAD] for part in self._chunk(order, step)]
        self._distinct = [Sizes(counts) for counts in zip(*map(self._count, first), strict=True)]

    def __len__(self) -> int:
        full, rest = divmod(self._num_examples, self._batch_size)
        return full + (rest > 0 and not self._drop_remainder)

    @property
    def num_examples(self) -> int:
        return self._num_examples

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "step": self._step, **self._settings()}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        for name, value in self._settings().items():
            if int(state[name]) != value:
                raise ValueError(message("batches", "state", f"saved with {name}={value}", f"{name}={state[name]}"))
        if not (int(state["epoch"]) >= 0 and 0 <= int(state["step"]) <= len(self)):
            raise ValueError(message("batches", "state", f"a position of an epoch of {len(self)} batches", dict(state)))
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
        self._start = self._step

    def _settings(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "shuffle": int(self._shuffle),
            "batch_size": self._batch_size,
            "drop_remainder": int(self._drop_remainder),
            "num_examples": self._num_examples,
        }

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self._epoch, self._start
        self._start = 0
        order = self._order(epoch)
        for step in range(start, len(self)):
            batch = self._batch(self._chunk(order, step))
            self._epoch, self._step = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            yield batch
        if start >= len(self):  # an empty epoch, or a position at the end of one
            self._epoch, self._step = epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._num_examples)
        return np.random.default_rng([self._seed, epoch]).permutation(self._num_examples)

    def _chunk(self, order: np.ndarray, step: int) -> list[np.ndarray]:
        """The examples of a batch, one array for each device."""
        part = self._batch_size // (self._devices or 1)
        first = step * self._batch_size
        return [
            order[first + i * part : min(first + (i + 1) * part, first + self._batch_size)]
            for i in range(self._devices or 1)
        ]

    def _map(self, f: Callable[..., Any], *rest: Any) -> Any:
        return jax.tree.map(f, self._features, *rest, is_leaf=is_feature)

    def _count(self, part: np.ndarray) -> list[int | None]:
        """For each leaf of x, how many distinct values a full shard like this part holds."""
        return [c for f in jax.tree.leaves(self._features, is_leaf=is_feature) for c in f.distinct(part)]

    def _batch(self, parts: list[np.ndarray]) -> Batch:
        length, spare = self._batch_size // len(parts), int(parts[0][0])
        sizes = self._map(lambda f, sizes: f.fit(sizes, parts, length), self._sizes)
        shards = []
        for part in parts:
            weight = np.zeros(length, np.float32)
            weight[: len(part)] = 1 if self._weight is None else self._weight.values[part]
            x = self._map(lambda f, size, part=part: f.take(part, length, size, spare), sizes)
            shards.append((x, None if self._y is None else self._y.take(part, length, None, spare), weight))
        distinct: list[int | None] = []
        sizes_of_x = [int(leaf.size) for leaf in jax.tree.leaves(shards[0][0])]
        counted = list(zip(*map(self._count, parts), strict=True))  # by leaf, then by shard
        for size, expected, counts in zip(sizes_of_x, self._distinct, counted, strict=True):
            full = [as_full(c, len(part), length) for c, part in zip(counts, parts, strict=True) if c is not None]
            # beside what was counted: the row numbers of a BCOO, and what marks padding
            distinct.append(min(size, expected.fit(max(full)) + length + 2) if full else None)
        x, y, weight = (
            jax.tree.map(lambda *leaves: np.stack(leaves), *shards)
            if self._devices
            else jax.tree.map(jnp.asarray, shards[0])
        )
        return Batch(x, y, weight, distinct=tuple(distinct))


_LOOK_AHEAD = 4  # epochs for sizes, batches for counts
