"""From SciPy matrices and id lists on the host to batches of static shapes on the device.

Data vary in size and compiled programs do not, so batches are padded. Padding of a sparse matrix has index = shape and
data = 0, as in BCOO. Padding of id lists is padding_idx, or num_rows. Examples that fill up the last batch have weight
0: empty lists and rows, and in arrays copies of an example of the batch, so that no other row is touched and no new
value can overflow. `Sizes` has the few sizes of a run. All features of a batch use the same level of their sizes:
otherwise each combination would be one more shape to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxsparse._checks import message
from jaxsparse._names import OF_LOADERS, other_names
from jaxsparse.data.batch import Batch, assemble_batch, weights
from jaxsparse.data.csr import Csr
from jaxsparse.data.distinct import Scratch, capacity_for, distinct_ids, sorted_distinct
from jaxsparse.data.examples import Examples, check_integers, check_sizes, is_int
from jaxsparse.data.features import LEVELS, Sizes, bcoo, entries
from jaxsparse.data.order import InOrder, Shuffled, order_of


def from_scipy(matrix: Any, nse: int | None = None) -> BCOO:
    """A SciPy sparse matrix as a BCOO with static shapes.

    Duplicates are summed, explicit zeros are kept, entries are sorted by row and column. Padding has index = shape and
    data = 0.

    Args:
      matrix: any SciPy sparse matrix or array of two dimensions, with indices of any integer type.
      nse: the number of entries to pad to; by default the number of stored entries.

    Returns:
      A BCOO of the matrix's shape: data (nse,), indices int32 (nse, 2).

    Raises:
      TypeError: if `matrix` is not a SciPy sparse matrix.
      ValueError: if `nse` is smaller than the number of entries, or a stored index is outside the shape.
      OverflowError: if a dimension does not fit int32.

    Example:
      >>> import numpy as np, scipy.sparse, jaxsparse as js
      >>> x = js.from_scipy(scipy.sparse.csr_matrix(np.array([[0., 2.], [1., 0.]])), nse=3)
      >>> x.data.tolist(), x.indices.tolist()
      ([2.0, 1.0, 0.0], [[0, 1], [1, 0], [2, 2]])
    """
    csr = Csr(matrix, "from_scipy", "matrix")
    nse = csr.nnz if nse is None else nse
    if not is_int(nse) or nse < csr.nnz:
        do = "A smaller nse would lose entries."
        raise ValueError(message("from_scipy", "nse", f"at least the number of stored entries, {csr.nnz}", nse, do))
    cut = csr.take(np.arange(csr.shape[0]))
    return jax.tree.map(jnp.asarray, bcoo(*entries(cut, csr.shape, nse), csr.shape))


@other_names("batches", OF_LOADERS)
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
    shard: tuple[int, int] | None = None,
    check_finite: bool = False,
) -> Batches:
    """Batches of static shapes, for any number of epochs. An epoch has each example once. A run can stop and go on.

    Args:
      x: n examples: a SciPy sparse matrix (n, num_features); an integer array (n,) or (n, L), which is ids; a list of n
        lists of ids, which become (B, L), L being the longest of the batch, rounded up to one of a few sizes; any other
        array (n, ...); or a dict of these, which may be nested. Columns of data frames work as arrays if they are
        numbers without missing values. With n = 0 there are no batches.
      y: the targets, an array (n, ...), or None.
      batch_size: examples in a batch (B). The last batch of an epoch is padded with examples of weight 0.
      shuffle: whether each epoch has another order.
      seed: determines all orders.
      drop_remainder: whether to leave out a last batch that is not full.
      num_rows: rows of the table that the ids index: an int, or a dict of ints by feature name. Ids are checked
        against it. Lists of ids need it. An int applies to the ids in x; if there are none, to its matrices, which must
        not have more columns.
      padding_idx: the id that pads lists of ids: an int, or a dict of ints by feature name; num_rows by default. Give
        js.embedding_bag or js.embedding_lookup the same one. In the data, an id equal to it is padding, too.
      weight: a weight for each example, (n,), at least 0; 1 by default.
      nse: entries that a batch of a SciPy matrix is padded to: an int, or a dict of ints by feature name. By default
        one of a few sizes.
      devices: if given, each leaf of a batch has a leading axis of this size, with batch_size / devices examples for
        each device: the axis that jax.pmap maps over.
      shard: if given, (index, count): this host makes slice `index` of `count` equal slices of each batch, split over
        its `devices`. With (jax.process_index(), jax.process_count()), and all else the same on each host, each
        example is on one host, and all hosts make the same number of steps with the same shapes. Such batches do not
        carry distinct ids, because those depend on the ids of all hosts.
      check_finite: whether NaN and inf in x, y and weight are errors.

    Returns:
      A `Batches`. Each iteration over it is one epoch of `Batch`; batches[i] is batch i of the epoch. Arrays, and CSR
        matrices with sorted indices, are not copied, also if they are memory-mapped. Do not change them while they are
        in use.

    Raises:
      TypeError: if x is none of the above, if sizes or ids are not integers, or if num_rows is given without ids. For a
        data frame it names the column.
      ValueError: if sizes do not fit together, an id is outside [0, num_rows), a matrix has more than num_rows columns,
        nse is too small, or, with check_finite, a value is NaN or inf.
      OverflowError: if an id does not fit int32.

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
        shard=shard,
        check_finite=check_finite,
    )


class Batches:
    """What `js.batches` returns. `len()` is the number of batches in an epoch.

    Each `iter()` is one epoch. If an iteration ends early, the next one starts the same epoch again. To go on where a
    run stopped, save `state` with the checkpoint and set it before iterating: the epoch then starts at that batch. An
    epoch is over when its last batch has been returned.

    batches[i] is batch i of the current epoch. It may be called from several threads and does not change `state`, so
    loaders that ask by number work: a thread pool, grain's MapDataset, torch's DataLoader with batch_size=None. Between
    epochs, set the next one for another order: batches.state = {**batches.state, "epoch": epoch, "step": 0}. Worker
    processes get a copy by pickle, examples included.

    Attributes:
      state: the position, a dict of ints: epoch, step (the next batch), and the settings that determine the order.
        Setting it raises ValueError if those settings differ.
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
        shard: tuple[int, int] | None,
        check_finite: bool,
    ) -> None:
        index, count = check_sizes("batches", batch_size, devices, shard, seed)
        per_name = {"num_rows": num_rows, "padding_idx": padding_idx, "nse": nse}
        check_integers(per_name)
        self._examples = Examples(x, y, weight, per_name, check_finite)
        features = self._features = self._examples.features
        self._num_examples = self._examples.num_examples
        self._batch_size, self._shuffle, self._seed = int(batch_size), bool(shuffle), int(seed)
        self._drop_remainder, self._devices = bool(drop_remainder), devices
        slices = devices or 1
        self._parts, self._host_slice = slices * count, slice(slices * index, slices * (index + 1))
        self._epoch = self._step = self._start = 0
        self._latest: tuple[int, Any] = -1, None  # epoch and order in one assignment, for threads
        epochs = min(-(-_MIN_SAMPLED_BATCHES // max(len(self), 1)), _MIN_SAMPLED_BATCHES // 4) if shuffle else 1
        sampled = [
            self._chunk(order, step) for order in map(self._order, range(epochs)) for step in self._sampled_steps()
        ]
        sampled = [parts for parts in sampled if self._is_full(parts)] or sampled
        is_every_batch = len(self._sampled_steps()) == len(self)
        self._sizes = [Sizes([f.need(parts) for parts in sampled], f.nse, is_every_batch) for f in features]
        self._levels = sorted(set(map(self._level, sampled)))
        self._scratch, self._capacities = Scratch(), [(0, 1)] * len(features)
        if not self.is_part:
            counts = [self._count(parts) for parts in sampled[:: max(len(sampled) // _COUNTED_BATCHES, 1)]]
            largest = [max(found) for found in zip(*counts, strict=True)]
            self._capacities = [(capacity_for(count), size) for count, size in largest] or self._capacities

    def __len__(self) -> int:
        full, rest = divmod(self._num_examples, self._batch_size)
        return full + (rest > 0 and not self._drop_remainder)

    @property
    def num_examples(self) -> int:
        return self._num_examples

    @property
    def num_devices(self) -> int | None:
        return self._devices

    @property
    def is_part(self) -> bool:
        """Whether other hosts make the rest of each batch."""
        return self._parts > (self._devices or 1)

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "step": self._step, **self._settings()}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        for name, value in self._settings().items():
            if state.get(name) != value:
                got = f"{name}={state.get(name)}"
                raise ValueError(message("batches", "state", f"saved with {name}={value}", got))
        epoch, step = int(state.get("epoch", -1)), int(state.get("step", -1))
        if not (epoch >= 0 and 0 <= step <= len(self)):
            raise ValueError(message("batches", "state", f"a position of an epoch of {len(self)} batches", dict(state)))
        self._epoch, self._step, self._start = epoch, step, step

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
        order = self._order(epoch)
        for step in range(start, len(self)):
            batch = self._batch(self._chunk(order, step))
            if step + 1 < len(self):
                self._epoch, self._step = epoch, step + 1
            else:
                self._epoch, self._step, self._start = epoch + 1, 0, 0
            yield batch
        if start >= len(self):  # an empty epoch, or a state at the end of one
            self._epoch, self._step, self._start = epoch + 1, 0, 0

    def __getitem__(self, step: Any) -> Batch:
        if not is_int(step):
            raise TypeError(f"js.Batches are indexed by the number of a batch. Got {type(step).__name__} instead.")
        if not -len(self) <= step < len(self):
            raise IndexError(f"js.Batches: batch {step} of an epoch of {len(self)}.")
        return self._batch(self._chunk(self._order(self._epoch), int(step) % len(self)))

    def one_epoch(self) -> Iterator[Batch]:
        """The batches of the current epoch, from its beginning. `state` does not change."""
        return (batch for batch, _ in self.counted_epoch())

    def counted_epoch(self) -> Iterator[tuple[Batch, int]]:
        """The same, each with its number of examples."""
        chunks = (self._chunk(order, step) for order in [self._order(self._epoch)] for step in range(len(self)))
        return ((self._batch(parts), sum(map(len, parts))) for parts in chunks)

    def _sampled_steps(self) -> Sequence[int]:
        """The steps whose batches determine the sizes: all of an epoch, or enough for a million examples. In a shuffled
        epoch these are the first ones, which are as representative as others and faster to compute."""
        count = min(len(self), max(_MIN_SAMPLED_BATCHES, _SAMPLED_EXAMPLES // self._batch_size))
        return range(count) if self._shuffle else [len(self) * i // count for i in range(count)]

    def _order(self, epoch: int) -> InOrder | Shuffled | np.ndarray:
        of, order = self._latest
        if of != epoch:
            order = order_of(self._num_examples, [self._seed, epoch] if self._shuffle else None)
            self._latest = epoch, order
        return order

    def _chunk(self, order: Any, step: int) -> list[np.ndarray]:
        """The numbers of the examples of a batch, one array for each device of each host."""
        part, first = self._batch_size // self._parts, step * self._batch_size
        batch = order[first : min(first + self._batch_size, self._num_examples)]
        return [batch[i * part : (i + 1) * part] for i in range(self._parts)]

    def _is_full(self, parts: list[np.ndarray]) -> bool:
        return sum(map(len, parts)) == self._batch_size

    def _level(self, parts: list[np.ndarray]) -> int:
        return max(sizes.level(f.need(parts)) for f, sizes in zip(self._features, self._sizes, strict=True))

    def _count(self, parts: list[np.ndarray]) -> list[tuple[int, int]]:
        """For each feature, the largest number of distinct ids in a shard, and the number of ids in that shard."""
        length, sizes = self._batch_size // len(parts), self._fit(parts)
        shards = [self._shard(part, length, sizes, parts[0][:1]) for part in parts]
        counts = []
        for f, leaves in zip(self._features, zip(*shards, strict=True), strict=True):
            ids = [f.ids(x) for x in leaves]
            counts.append(max((0, 1) if x is None else (len(sorted_distinct(x.reshape(-1))), x.size) for x in ids))
        return counts

    def _fit(self, parts: list[np.ndarray]) -> list[int]:
        """The padded size of each feature in a batch."""
        wanted = self._level(parts) if self._is_full(parts) else LEVELS - 1
        level = next((level for level in self._levels if level >= wanted), self._levels[-1])
        return [sizes.fit(f.need(parts), level) for f, sizes in zip(self._features, self._sizes, strict=True)]

    def _shard(self, part: np.ndarray, length: int, sizes: list[int], filler: np.ndarray) -> list[Any]:
        return [_cut(f, part, length, size, filler) for f, size in zip(self._features, sizes, strict=True)]

    def _batch(self, parts: list[np.ndarray]) -> Batch:
        length, filler, sizes = self._batch_size // len(parts), parts[0][:1], self._fit(parts)
        host_parts, examples = parts[self._host_slice], self._examples
        features = [self._shard(part, length, sizes, filler) for part in host_parts]
        known = [self._known(n, list(leaves)) for n, leaves in enumerate(zip(*features, strict=True))]
        shards = []
        for part, leaves, distinct in zip(host_parts, features, zip(*known, strict=True), strict=True):
            y = None if examples.y is None else _cut(examples.y, part, length, 0, filler)
            weight = weights(len(part) if examples.weight is None else examples.weight.cut(part), length)
            shards.append((*(jax.tree.unflatten(examples.tree, of) for of in (leaves, distinct)), y, weight))
        return assemble_batch(shards, self._devices)

    def _known(self, n: int, leaves: list[Any]) -> list[Any]:
        """The `DistinctIds` of feature n, or None, for each shard."""
        ids = [self._features[n].ids(x) for x in leaves]
        if self.is_part or ids[0] is None:
            return [None] * len(leaves)
        (capacity, size), many = self._capacities[n], ids[0].size
        capacity = max(capacity, -(-capacity * many // size))
        # above two thirds of all ids use the maximum: few batches need it, and each size is compiled for
        return distinct_ids(ids, capacity if 3 * capacity < 2 * many else many + 1, self._scratch)


_MIN_SAMPLED_BATCHES = 64  # the least number of batches that sizes are learnt from
_SAMPLED_EXAMPLES = 1 << 20
_COUNTED_BATCHES = 16  # sampled batches in which distinct ids are counted


def _cut(feature: Any, part: np.ndarray, length: int, size: int, filler: np.ndarray) -> Any:
    return feature.pad(feature.cut(part), length, size, None if len(part) == length else feature.cut(filler))
