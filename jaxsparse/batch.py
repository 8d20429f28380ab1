"""From SciPy matrices and id lists on the host to static-shape batches on the device.

This is the one file that looks at values. What cannot work raises here, at once, with the value and where it stands; the device
code behind it need not check anything. Nothing is clipped, wrapped or dropped.

Shapes are static on the device and sizes are not in the data, so everything is padded, by BCOO's contract (index = size, data = 0) for
sparse matrices and with padding_idx (or num_rows) for id lists. Examples that fill up a batch are empty there, and elsewhere repeat
one of the batch, so that no new row is touched and nothing new can overflow; their weight is 0. How much: `_Sizes` has a few sizes for a
whole run, one where all batches are alike. How many distinct values an integer array holds matters to the cost of a step,
so it is counted here and carried, rounded up likewise, as a static field of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from jaxsparse._checks import MAX_ROWS, message


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch, a pytree.

    Attributes:
      x: what `js.batches` was given, cut to this batch: BCOO (B, num_features) for a SciPy matrix, int32 (B, L) for id lists,
        arrays (B, ...) for arrays, a dict of these for a dict.
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

    Duplicates are summed, explicit zeros are kept, the entries are ordered by row and column. Padding has index = shape and data 0.

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
    csr = _canonical(matrix, "from_scipy", "matrix")
    nse = csr.nnz if nse is None else nse
    if nse < csr.nnz:
        do = "A smaller nse would lose entries."
        raise ValueError(message("from_scipy", "nse", f"at least the number of stored entries, {csr.nnz}", nse, do))
    data, indices = _entries(csr, np.arange(csr.shape[0]), csr.shape[0], nse)
    return jax.tree.map(jnp.asarray, _bcoo(data, indices, csr.shape))


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
      x: the examples, n of them: a SciPy sparse matrix (n, num_features); integers (n, L) or (n,), which are ids; a list of n
        lists of ids, which become (B, L), L being the batch's longest, rounded up to one of a few sizes; any other array (n, ...); or a dict of these, nested at will.
      y: the targets, (n, ...), or None.
      batch_size: examples a batch; the last batch of an epoch is padded up to it with weight 0.
      shuffle: another order each epoch, all of them from `seed`.
      seed: of the orders.
      drop_remainder: leave out the last batch where it is not full.
      num_rows: the size of the table that ids go into: an int, or one by feature name. Ids are checked against it. Lists of ids
        need it.
      padding_idx: what pads lists of ids, an int or one by feature name; give embedding_bag or embedding_lookup the same one.
        num_rows by default. An id equal to it is legal in the data and means padding there too.
      weight: a weight for each example, (n,); 1 by default.
      nse: entries a batch of a SciPy matrix is padded to, an int or one by feature name. By default one of a few sizes.
      devices: if given, every leaf of a batch gets a leading axis of this size, one slice of batch_size / devices
        examples for each device: what jax.pmap maps over.
      check_finite: whether NaN and inf in x, y and weight are errors.

    Returns:
      A `Batches`: each iteration over it is one epoch of `Batch`.

    Raises:
      TypeError: for an x that is none of the above.
      ValueError: for sizes that do not fit together, ids outside [0, num_rows), nse too small, or, with check_finite, NaN and inf.
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
        x, y, batch_size, shuffle, seed, drop_remainder, num_rows, padding_idx, weight, nse, devices, check_finite
    )  # fmt: skip


class Batches:
    """What `js.batches` returns. `len()` is the number of batches an epoch.

    Each `iter()` starts an epoch at its beginning: the one that comes next, or the same one again if its iteration was left early. To
    go on where a run stopped, save `state` beside the checkpoint and set it before iterating.

    Attributes:
      state: the position as a dict of ints: epoch, step (of the batch to come next), and the settings that the order depends on.
        Setting it raises ValueError if those settings differ.
    """

    def __init__(
        self, x: Any, y: Any, batch_size: int, shuffle: bool, seed: int, drop_remainder: bool, num_rows: Any, padding_idx: Any,
        weight: Any, nse: Any, devices: int | None, check_finite: bool,
    ) -> None:  # fmt: skip
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(message("batches", "batch_size", "an integer of at least 1", batch_size))
        if devices is not None and (devices < 1 or batch_size % devices):
            raise ValueError(message("batches", "devices", f"a divisor of batch_size, {batch_size}", devices))
        per_name = {"num_rows": num_rows, "padding_idx": padding_idx, "nse": nse}
        names: set[str] = set()
        self._features = _features(x, "x", None, per_name, check_finite, names)
        for argument, value in per_name.items():
            for name in set(value) - names if isinstance(value, Mapping) else ():
                raise ValueError(message("batches", argument, f"keyed by the features of x, {sorted(names)}", repr(name)))
        leaves = jax.tree.leaves(self._features, is_leaf=_is_feature)
        if not leaves:
            raise ValueError(message("batches", "x", "at least one feature", "an empty dict"))
        self._num_examples = leaves[0].num_examples
        for leaf in leaves[1:]:
            if leaf.num_examples != self._num_examples:
                must = f"of {self._num_examples} examples, as {leaves[0].name} is"
                raise ValueError(message("batches", leaf.name, must, leaf.num_examples))
        self._y = None if y is None else _Array(_host_array(y), "y", check_finite)
        self._weight = None if weight is None else _Array(_host_array(weight).astype(np.float32), "weight", check_finite)
        for other in (self._y, self._weight):
            if other is not None and other.num_examples != self._num_examples:
                raise ValueError(message("batches", other.name, f"of {self._num_examples} examples, as x is", other.num_examples))
        if self._weight is not None and (self._weight.values.ndim != 1 or (self._weight.values < 0).any()):
            raise ValueError(
                message("batches", "weight", "of shape (n,) and not negative", _where(self._weight.values, self._weight.values < 0))
            )
        self._batch_size, self._shuffle, self._seed = int(batch_size), bool(shuffle), int(seed)
        self._drop_remainder, self._devices = bool(drop_remainder), devices
        self._epoch = self._step = self._start = 0
        few = [(order, step) for order in map(self._order, range(_LOOK_AHEAD if shuffle else 1)) for step in range(len(self))]
        self._sizes = self._map(lambda f: f.sizes([part for order, step in few for part in self._chunk(order, step)]))
        first = [part for order, step in few[:_LOOK_AHEAD] for part in self._chunk(order, step)]
        self._distinct = [_Sizes(counts) for counts in zip(*map(self._count, first), strict=True)]

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
        return [order[first + i * part : min(first + (i + 1) * part, first + self._batch_size)] for i in range(self._devices or 1)]

    def _map(self, f: Callable[..., Any], *rest: Any) -> Any:
        return jax.tree.map(f, self._features, *rest, is_leaf=_is_feature)

    def _count(self, part: np.ndarray) -> list[int | None]:
        """For each leaf of x, how many distinct values a full shard like this part holds."""
        return [c for f in jax.tree.leaves(self._features, is_leaf=_is_feature) for c in f.distinct(part)]

    def _batch(self, parts: list[np.ndarray]) -> Batch:
        length, spare = self._batch_size // len(parts), int(parts[0][0])
        sizes = self._map(lambda f, sizes: f.fit(sizes, parts, length), self._sizes)
        shards = []
        for part in parts:
            weight = np.zeros(length, np.float32)
            weight[: len(part)] = 1 if self._weight is None else self._weight.values[part]
            x = self._map(lambda f, size, part=part: f.take(part, length, size, spare), sizes)
            shards.append((x, None if self._y is None else self._y.take(part, length, None, spare), weight))
        distinct = []
        for leaf, counts in enumerate(zip(*map(self._count, parts), strict=True)):
            size = int(jax.tree.leaves(shards[0][0])[leaf].size)
            full = [None if c is None else _as_full(c, len(part), length) for c, part in zip(counts, parts, strict=True)]
            distinct.append(None if None in full else min(size, self._distinct[leaf].fit(max(full)) + length + 2))
        arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *shards) if self._devices else jax.tree.map(jnp.asarray, shards[0])
        return Batch(*arrays, distinct=tuple(distinct))


_LOOK_AHEAD = 4  # epochs for sizes, batches for counts


class _Sizes:
    """A few static sizes for a run: the largest that is expected, in eighths of an octave, and three quarters and half of that.

    What needs more than the largest gets its own size. Where all batches need the same, all get the same.
    """

    def __init__(self, needs: Sequence[int | None], fixed: int | None = None) -> None:
        known = [n for n in needs if n is not None]
        self.largest = round_up(max(known, default=1)) if fixed is None else fixed
        self.fixed = fixed is not None

    def fit(self, need: int) -> int:
        if self.fixed:
            return self.largest
        rungs = (-(-self.largest // 2), -(-3 * self.largest // 4), self.largest)
        return next((rung for rung in rungs if rung >= need), round_up(need))


def _as_full(need: int, examples: int, length: int) -> int:
    """What a full shard would need where `examples` of its `length` need this much, so that the last batch gets no shape of its own."""
    return need if examples == length else max(need, -(-need * length // max(examples, 1)))


def round_up(n: int) -> int:
    """The next of eight sizes an octave: at most an eighth more than n, and at least 1."""
    step = 1 << max(int(n).bit_length() - 4, 0)
    return max(-(-int(n) // step) * step, 1)


# ---------------------------------------------------------------------------------------------------------------------
# One class for each kind of feature: what it is, how large a batch of it gets, and how to cut one.


class _Sparse:
    """A SciPy matrix: BCOO batches."""

    def __init__(self, matrix: Any, name: str, nse: int | None, check_finite: bool) -> None:
        self.csr, self.name, self.nse = _canonical(matrix, "batches", name), name, nse
        if check_finite and not np.isfinite(self.csr.data).all():
            at = int(np.flatnonzero(~np.isfinite(self.csr.data))[0])
            row = int(np.searchsorted(self.csr.indptr, at, side="right")) - 1
            raise ValueError(message("batches", name, "finite", f"{self.csr.data[at]} at row {row}, column {self.csr.indices[at]}"))
        self.num_examples = self.csr.shape[0]
        self.lengths = np.diff(self.csr.indptr).astype(np.int64)
        self.counter = _Counter(self.csr.shape[1])

    def sizes(self, parts: list[np.ndarray]) -> _Sizes:
        return _Sizes([int(self.lengths[part].sum()) for part in parts], self.nse)

    def fit(self, sizes: _Sizes, parts: list[np.ndarray], length: int) -> int:
        entries = [int(self.lengths[part].sum()) for part in parts]
        if self.nse is not None and max(entries) > self.nse:
            must = f"at least {max(entries)}, the entries of {self.name} in the batch of examples {parts[0][:3].tolist()}..."
            raise ValueError(message("batches", "nse", must, self.nse, "Raise nse, or leave it out."))
        return sizes.fit(max(_as_full(n, len(part), length) for n, part in zip(entries, parts, strict=True)))

    def distinct(self, part: np.ndarray) -> list[int | None]:
        return [None, self.counter(_columns(self.csr, part))]  # of data, of indices

    def take(self, part: np.ndarray, length: int, size: int, spare: int) -> BCOO:
        del spare
        data, indices = _entries(self.csr, part, length, size)
        return _bcoo(data, indices, (length, self.csr.shape[1]))


class _Lists:
    """Lists of ids: (B, L) padded."""

    def __init__(self, lists: Any, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        if num_rows is None:
            do = "It is the number of rows of the table that the ids go into."
            raise ValueError(message("batches", "num_rows", f"given, because {name} is a list of id lists", None, do))
        self.name, self.num_examples = name, len(lists)
        self.lengths = np.fromiter((len(row) for row in lists), np.int64, len(lists))
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        flat = np.concatenate([np.asarray(row) if len(row) else np.zeros(0, np.int32) for row in lists] or [np.zeros(0, np.int32)])
        if not np.issubdtype(flat.dtype, np.integer):
            raise TypeError(message("batches", name, "lists of integers", f"{flat.dtype=}"))

        def position(at: int) -> str:
            row = int(np.searchsorted(self.starts, at, side="right")) - 1
            return f"position {at - self.starts[row]} of list {row}"

        self.flat = _checked_ids(flat, name, num_rows, padding_idx, position)
        self.padding = num_rows if padding_idx is None else padding_idx
        self.counter = _Counter(num_rows)

    def sizes(self, parts: list[np.ndarray]) -> _Sizes:
        return _Sizes([int(self.lengths[part].max(initial=1)) for part in parts])

    def fit(self, sizes: _Sizes, parts: list[np.ndarray], length: int) -> int:
        del length
        return sizes.fit(max(int(self.lengths[part].max(initial=1)) for part in parts))

    def distinct(self, part: np.ndarray) -> list[int | None]:
        return [self.counter(self.flat[_spans(self.starts[part], self.lengths[part])])]

    def take(self, part: np.ndarray, length: int, size: int, spare: int) -> np.ndarray:
        del spare
        out = np.full((length, size), self.padding, np.int32)
        lengths = self.lengths[part]
        out[: len(part)][np.arange(size) < lengths[:, None]] = self.flat[_spans(self.starts[part], lengths)]
        return out


class _Ids:
    """An array of ids."""

    def __init__(self, ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None) -> None:
        self.name, self.num_examples = name, len(ids)

        def position(at: int) -> str:
            return f"position {tuple(map(int, np.unravel_index(at, ids.shape)))}"

        self.ids = _checked_ids(ids.reshape(-1), name, num_rows, padding_idx, position).reshape(ids.shape)
        self.padding = padding_idx
        top = int(ids.max(initial=0)) + 1
        self.counter = _Counter(top if num_rows is None else num_rows)

    def sizes(self, parts: list[np.ndarray]) -> None:
        del parts

    def fit(self, sizes: None, parts: list[np.ndarray], length: int) -> None:
        del sizes, parts, length

    def distinct(self, part: np.ndarray) -> list[int | None]:
        return [self.counter(self.ids[part].reshape(-1)) + self.ids[:1].size]  # padding may repeat another shard's example

    def take(self, part: np.ndarray, length: int, size: None, spare: int) -> np.ndarray:
        del size
        return _pad(self.ids[part], length, self.ids[spare] if self.padding is None else self.padding)


class _Array:
    """Any other array."""

    def __init__(self, values: np.ndarray, name: str, check_finite: bool) -> None:
        if values.ndim < 1:
            raise ValueError(message("batches", name, "an array of shape (n, ...)", f"shape {values.shape}"))
        if check_finite and np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
            raise ValueError(message("batches", name, "finite", _where(values, ~np.isfinite(values))))
        self.values, self.name, self.num_examples = _jax_dtype(values, "batches", name), name, len(values)

    def sizes(self, parts: list[np.ndarray]) -> None:
        del parts

    def fit(self, sizes: None, parts: list[np.ndarray], length: int) -> None:
        del sizes, parts, length

    def distinct(self, part: np.ndarray) -> list[int | None]:
        del part
        return [None]

    def take(self, part: np.ndarray, length: int, size: None, spare: int) -> np.ndarray:
        del size
        return _pad(self.values[part], length, self.values[spare])


class _Counter:
    """Counts distinct ids in O(len(ids)): every id writes its position, and the ones that find their own are the distinct ones."""

    def __init__(self, num_ids: int) -> None:
        self.num_ids = num_ids
        self.seen: np.ndarray | None = None

    def __call__(self, ids: np.ndarray) -> int:
        if self.num_ids > 1 << 26:  # 256 MB of scratch: rather sort
            return len(np.unique(ids))
        if self.seen is None:
            self.seen = np.zeros(self.num_ids + 1, np.int32)
        positions = np.arange(len(ids), dtype=np.int32)
        at = np.where((ids >= 0) & (ids < self.num_ids), ids, self.num_ids)
        self.seen[at] = positions
        return int(np.count_nonzero(self.seen[at] == positions))


def _is_feature(x: object) -> bool:
    return isinstance(x, (_Sparse, _Lists, _Ids, _Array))


def _features(x: Any, path: str, key: str | None, per_name: dict[str, Any], check_finite: bool, names: set[str]) -> Any:
    """x with every feature wrapped in its class."""
    if isinstance(x, Mapping):
        return {k: _features(v, f"{path}[{k!r}]", k, per_name, check_finite, names) for k, v in x.items()}
    if key is not None:
        names.add(key)
    num_rows, padding_idx, nse = (v.get(key) if isinstance(v, Mapping) else v for v in per_name.values())
    if scipy.sparse.issparse(x):
        return _Sparse(x, path, nse, check_finite)
    if isinstance(x, (list, tuple)) and (not x or any(isinstance(row, (list, tuple, np.ndarray)) for row in x)):
        return _Lists(x, path, num_rows, padding_idx)
    array = _host_array(x)
    if array.dtype == object or array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        do = "Use a SciPy matrix, an array, or a list of id lists."
        raise TypeError(message("batches", path, "numbers", f"{type(x).__name__} of {array.dtype=}", do))
    if array.ndim and np.issubdtype(array.dtype, np.integer):
        return _Ids(array, path, num_rows, padding_idx)
    return _Array(array, path, check_finite)


def _host_array(x: Any) -> np.ndarray:
    return np.asarray(x)


def _where(values: np.ndarray, bad: np.ndarray) -> str:
    if not bad.any():
        return f"shape {values.shape}"
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{values[at]} at position {at if len(at) > 1 else at[0]}"


def _pad(values: np.ndarray, length: int, fill: Any) -> np.ndarray:
    """values (k, ...) with `fill` up to (length, ...)."""
    out = np.empty((length, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    out[len(values) :] = fill
    return out


def _checked_ids(ids: np.ndarray, name: str, num_rows: int | None, padding_idx: int | None, position: Callable[[int], str]) -> np.ndarray:
    """Flat ids as int32, or the error that says which one is wrong and where."""
    bad = (ids < 0) | (ids > 2**31 - 1)
    if num_rows is not None:
        if not 0 <= num_rows < MAX_ROWS:
            raise ValueError(message("batches", "num_rows", f"between 0 and {MAX_ROWS - 1}", num_rows))
        bad |= ids >= num_rows
    if padding_idx is not None:
        bad &= ids != padding_idx
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        value = int(ids[at])
        must = f"ids in [0, {num_rows})" if num_rows is not None else "ids in [0, 2**31)"
        do = "Integer arrays are ids; cast them to float if these are numbers. Rows that mean padding want padding_idx=."
        error = OverflowError if value > 2**31 - 1 else ValueError
        raise error(message("batches", name, must, f"{value} at {position(at)}", do))
    return ids.astype(np.int32)


def _canonical(matrix: Any, function: str, argument: str) -> Any:
    """The matrix as CSR with sorted indices and no duplicates; the caller's own is left as it is."""
    if not scipy.sparse.issparse(matrix):
        raise TypeError(message(function, argument, "a SciPy sparse matrix", type(matrix).__name__, "Dense arrays need no conversion."))
    if matrix.ndim != 2:
        raise ValueError(message(function, argument, "of two dimensions", f"shape {matrix.shape}"))
    for size in matrix.shape:
        if size >= MAX_ROWS:
            raise OverflowError(message(function, argument, f"of dimensions below {MAX_ROWS}", f"shape {matrix.shape}"))
    csr = matrix.tocsr()
    if csr.nnz:
        bad = (csr.indices < 0) | (csr.indices >= csr.shape[1])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
            raise ValueError(message(function, argument, f"of column indices in [0, {csr.shape[1]})", f"{csr.indices[at]} in row {row}"))
    if csr is matrix or np.shares_memory(csr.data, matrix.data):
        csr = csr.copy()
    csr.sum_duplicates()  # sorts too; keeps explicit zeros
    csr.data = _jax_dtype(csr.data, function, argument)
    return csr


def _jax_dtype(values: np.ndarray, function: str, argument: str) -> np.ndarray:
    """In the dtype that JAX keeps them in: 64 bits become 32 unless jax_enable_x64 is on. Integers that do not fit raise."""
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if np.issubdtype(values.dtype, np.integer) and values.size:
        limits, flat = np.iinfo(dtype), values.reshape(-1)
        for at in (int(flat.argmax()), int(flat.argmin())):
            if not limits.min <= int(flat[at]) <= limits.max:
                raise OverflowError(message(function, argument, f"within {dtype}", f"{flat[at]} at position {at}"))
    return values.astype(dtype, copy=False)


@functools.lru_cache
def _bcoo_structure(shape: tuple[int, int]) -> Any:
    return jax.tree.structure(BCOO((jnp.zeros(0), jnp.zeros((0, 2), jnp.int32)), shape=shape, indices_sorted=True))


def _bcoo(data: np.ndarray, indices: np.ndarray, shape: tuple[int, int]) -> BCOO:
    """A BCOO that holds the NumPy arrays themselves: its constructor would move them to the default device."""
    return jax.tree.unflatten(_bcoo_structure(shape), [data, indices])


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions starts[i], starts[i] + 1, ..., starts[i] + lengths[i] - 1, for every i, in one array."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _columns(csr: Any, rows: np.ndarray) -> np.ndarray:
    starts = csr.indptr[rows].astype(np.int64)
    return csr.indices[_spans(starts, csr.indptr[rows + 1] - starts)]


def _entries(csr: Any, rows: np.ndarray, length: int, nse: int) -> tuple[np.ndarray, np.ndarray]:
    """data (nse,) and indices (nse, 2) of some rows, as rows 0, 1, ... of `length`, padded with (length, num_columns) and 0."""
    starts = csr.indptr[rows].astype(np.int64)
    lengths = csr.indptr[rows + 1] - starts
    at = _spans(starts, lengths)
    data = np.zeros(nse, csr.data.dtype)
    indices = np.empty((nse, 2), np.int32)
    data[: len(at)] = csr.data[at]
    indices[: len(at), 0] = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
    indices[: len(at), 1] = csr.indices[at]
    indices[len(at) :] = (length, csr.shape[1])
    return data, indices
