"""From SciPy matrices and id lists on the host to static-shape batches on the device.

Shapes are static on the device and sizes are not in the data, so everything is padded, by BCOO's contract (index =
size, data = 0) for sparse matrices and with padding_idx (or num_rows) for id lists. Examples that fill up a batch are
empty there, and elsewhere repeat one of the batch, so that no new row is touched and nothing new can overflow; their
weight is 0. How much: `Sizes` has a few sizes for a whole run, and all features of a batch are padded to the same level
of theirs, or every combination would be a shape to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxsparse._checks import message
from jaxsparse.data.batch import Batch, put_together, weights
from jaxsparse.data.csr import Csr
from jaxsparse.data.distinct import Scratch, distinct_ids, room_for, sorted_distinct
from jaxsparse.data.examples import Examples, check_integers, check_sizes, is_int
from jaxsparse.data.features import LEVELS, Sizes, bcoo, entries
from jaxsparse.data.order import InOrder, Shuffled, order_of


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
    csr = Csr(matrix, "from_scipy", "matrix")
    nse = csr.nnz if nse is None else nse
    if not is_int(nse) or nse < csr.nnz:
        do = "A smaller nse would lose entries."
        raise ValueError(message("from_scipy", "nse", f"at least the number of stored entries, {csr.nnz}", nse, do))
    cut = csr.take(np.arange(csr.shape[0]))
    return jax.tree.map(jnp.asarray, bcoo(*entries(cut, csr.shape, nse), csr.shape))


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
    """Batches of one static shape: every example once an epoch, another order each epoch, resumable.

    Args:
      x: the examples, n of them: a SciPy sparse matrix (n, num_features); integers (n, L) or (n,), which are ids; a
        list of n lists of ids, which become (B, L), L being the batch's longest, rounded up to one of a few sizes; any
        other array (n, ...); or a dict of these, nested at will. Columns of data frames are arrays, if they are numbers
        without missing values. No examples, n = 0, are no batches.
      y: the targets, an array (n, ...), or None.
      batch_size: examples a batch; the last batch of an epoch is padded up to it with weight 0.
      shuffle: another order each epoch, all of them from `seed`.
      seed: of the orders.
      drop_remainder: leave out the last batch where it is not full.
      num_rows: the size of the table that ids go into: an int, or one by feature name. Ids are checked against it.
        Lists of ids need it. An int is for the ids in x, if there are any, and otherwise for its matrices, which must
        not have more columns.
      padding_idx: what pads lists of ids, an int or one by feature name; give embedding_bag or embedding_lookup the
        same one. num_rows by default. An id equal to it is legal in the data and means padding there too.
      weight: a weight for each example, (n,); 1 by default.
      nse: entries a batch of a SciPy matrix is padded to, an int or one by feature name. By default one of a few sizes.
      devices: if given, every leaf of a batch gets a leading axis of this size, one slice of batch_size / devices
        examples for each device: what jax.pmap maps over.
      shard: if given, (index, count): of every batch only this slice of batch_size / count examples, cut into `devices`
        slices in its turn. With (jax.process_index(), jax.process_count()) and everything else the same on every
        host, each example is on one host, and all hosts make the same number of steps with the same shapes. Such
        batches do not carry their distinct ids: a host would have to look at those of all others.
      check_finite: whether NaN and inf in x, y and weight are errors.

    Returns:
      A `Batches`: each iteration over it is one epoch of `Batch`, and batches[i] is the i-th of it. Arrays, and CSR
        matrices whose rows have increasing indices, are looked at in pieces and not copied, memory-mapped ones neither:
        do not write to them while they are in use.

    Raises:
      TypeError: for an x that is none of the above, for sizes and ids that are no integers, and for a num_rows of
        features that are no ids. It names the column: sparse, categorical, missing, of strings, of lists.
      ValueError: for sizes that do not fit together, ids outside [0, num_rows), more columns than num_rows, nse too
        small, or, with check_finite, NaN and inf.
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
        shard=shard,
        check_finite=check_finite,
    )


class Batches:
    """What `js.batches` returns. `len()` is the number of batches an epoch.

    batches[i] is the i-th batch of the epoch at `state`, from any thread, and does not move that: what loads by number
    (a thread pool, grain's MapDataset, torch's DataLoader with batch_size=None) can drive it. Set the epoch between two
    passes, for another order: batches.state = {**batches.state, "epoch": epoch, "step": 0}.

    Each `iter()` starts an epoch at its beginning: the one that comes next, or the same one again if its iteration was
    left early. To go on where a run stopped, save `state` beside the checkpoint and set it before iterating: the epoch
    then starts there, however often it is left early. An epoch is over when its last batch has been handed out.

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
        own = devices or 1
        self._parts, self._own = own * count, slice(own * index, own * (index + 1))
        self._epoch = self._step = self._start = 0
        self._latest: tuple[int, Any] = -1, None  # epoch and order, set at once: several threads may look
        epochs = min(-(-_LOOK_AHEAD // max(len(self), 1)), _LOOK_AHEAD // 4) if shuffle else 1
        ahead = [self._chunk(order, step) for order in map(self._order, range(epochs)) for step in self._looked_at()]
        ahead = [parts for parts in ahead if self._is_full(parts)] or ahead
        are_all = len(self._looked_at()) == len(self)
        self._sizes = [Sizes([f.need(parts) for parts in ahead], f.nse, are_all) for f in features]
        self._levels = sorted(set(map(self._level, ahead)))
        self._scratch, self._rooms = Scratch(), [(0, 1)] * len(features)
        if not self.is_part:
            counts = [self._count(parts) for parts in ahead[:: max(len(ahead) // _LOOK_AT, 1)]]
            most = [max(found) for found in zip(*counts, strict=True)]
            self._rooms = [(room_for(count), size) for count, size in most] or self._rooms

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
        """Whether other hosts have the rest of each batch."""
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
        if start >= len(self):  # an empty epoch, or a position at the end of one
            self._epoch, self._step, self._start = epoch + 1, 0, 0

    def __getitem__(self, step: Any) -> Batch:
        if not is_int(step):
            raise TypeError(f"js.Batches are indexed by the number of a batch. Got {type(step).__name__} instead.")
        if not -len(self) <= step < len(self):
            raise IndexError(f"js.Batches: batch {step} of an epoch of {len(self)}.")
        return self._batch(self._chunk(self._order(self._epoch), int(step) % len(self)))

    def one_epoch(self) -> Iterator[Batch]:
        """The batches of a whole epoch, in the order of the present one. The position stays where it is."""
        return (batch for batch, _ in self.counted_epoch())

    def counted_epoch(self) -> Iterator[tuple[Batch, int]]:
        """The same, with how many examples each has."""
        chunks = (self._chunk(order, step) for order in [self._order(self._epoch)] for step in range(len(self)))
        return ((self._batch(parts), sum(map(len, parts))) for parts in chunks)

    def _looked_at(self) -> Sequence[int]:
        """The batches of an epoch that sizes are learnt from: all, or as many as have a million examples. In a
        shuffled epoch each is as good as another, and neighbours are found sooner."""
        count = min(len(self), max(_LOOK_AHEAD, _EXAMPLES_AHEAD // self._batch_size))
        return range(count) if self._shuffle else [len(self) * i // count for i in range(count)]

    def _order(self, epoch: int) -> InOrder | Shuffled | np.ndarray:
        of, order = self._latest
        if of != epoch:
            order = order_of(self._num_examples, [self._seed, epoch] if self._shuffle else None)
            self._latest = epoch, order
        return order

    def _chunk(self, order: Any, step: int) -> list[np.ndarray]:
        """The examples of a batch, one array for each device of each host."""
        part, first = self._batch_size // self._parts, step * self._batch_size
        batch = order[first : min(first + self._batch_size, self._num_examples)]
        return [batch[i * part : (i + 1) * part] for i in range(self._parts)]

    def _is_full(self, parts: list[np.ndarray]) -> bool:
        return sum(map(len, parts)) == self._batch_size

    def _level(self, parts: list[np.ndarray]) -> int:
        return max(sizes.level(f.need(parts)) for f, sizes in zip(self._features, self._sizes, strict=True))

    def _count(self, parts: list[np.ndarray]) -> list[tuple[int, int]]:
        """Of each feature, the most distinct ids in a shard of a batch, and how many ids that has."""
        length, sizes = self._batch_size // len(parts), self._fit(parts)
        shards = [self._shard(part, length, sizes, parts[0][:1]) for part in parts]
        counts = []
        for f, leaves in zip(self._features, zip(*shards, strict=True), strict=True):
            ids = [f.ids(x) for x in leaves]
            counts.append(max((0, 1) if x is None else (len(sorted_distinct(x.reshape(-1))), x.size) for x in ids))
        return counts

    def _fit(self, parts: list[np.ndarray]) -> list[int]:
        """The size of each feature in a batch."""
        wanted = self._level(parts) if self._is_full(parts) else LEVELS - 1
        level = next((level for level in self._levels if level >= wanted), self._levels[-1])
        return [sizes.fit(f.need(parts), level) for f, sizes in zip(self._features, self._sizes, strict=True)]

    def _shard(self, part: np.ndarray, length: int, sizes: list[int], spare: np.ndarray) -> list[Any]:
        return [_cut(f, part, length, size, spare) for f, size in zip(self._features, sizes, strict=True)]

    def _batch(self, parts: list[np.ndarray]) -> Batch:
        length, spare, sizes = self._batch_size // len(parts), parts[0][:1], self._fit(parts)
        own, examples = parts[self._own], self._examples
        features = [self._shard(part, length, sizes, spare) for part in own]
        known = [self._known(n, list(leaves)) for n, leaves in enumerate(zip(*features, strict=True))]
        shards = []
        for part, leaves, distinct in zip(own, features, zip(*known, strict=True), strict=True):
            y = None if examples.y is None else _cut(examples.y, part, length, 0, spare)
            weight = weights(len(part) if examples.weight is None else examples.weight.cut(part), length)
            shards.append((*(jax.tree.unflatten(examples.tree, of) for of in (leaves, distinct)), y, weight))
        return put_together(shards, self._devices)

    def _known(self, n: int, leaves: list[Any]) -> list[Any]:
        """What is known of the ids of feature n, for each shard."""
        ids = [self._features[n].ids(x) for x in leaves]
        if self.is_part or ids[0] is None:
            return [None] * len(leaves)
        (room, size), many = self._rooms[n], ids[0].size
        room = max(room, -(-room * many // size))
        # few batches would need more than two thirds of all, and each size is compiled for
        return distinct_ids(ids, room if 3 * room < 2 * many else many + 1, self._scratch)


_LOOK_AHEAD = 64  # batches to learn the sizes from, at least
_EXAMPLES_AHEAD = 1 << 20
_LOOK_AT = 16  # of these, to count ids in


def _cut(feature: Any, part: np.ndarray, length: int, size: int, spare: np.ndarray) -> Any:
    return feature.pad(feature.cut(part), length, size, None if len(part) == length else feature.cut(spare))
