"""Batches of data that come in chunks and are larger than memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse._checks import message
from jaxsparse.data.batch import Batch, put_together, weights
from jaxsparse.data.chunks import Chunk, Source, Window, ahead, files_of, joined, split
from jaxsparse.data.distinct import Scratch
from jaxsparse.data.examples import Examples, check_integers, check_names, check_sizes, is_int
from jaxsparse.data.features import Lists, Sparse
from jaxsparse.data.ragged import take
from jaxsparse.data.rungs import Rungs


def stream(
    source: Callable[[], Any] | Sequence[Any],
    *,
    batch_size: int,
    reader: Callable[[Any], Any] | None = None,
    shuffle: bool = False,
    buffer: int = 1 << 16,
    seed: int = 0,
    drop_remainder: bool = False,
    num_rows: int | Mapping[str, int] | None = None,
    padding_idx: int | Mapping[str, int] | None = None,
    nse: int | Mapping[str, int] | None = None,
    length: int | Mapping[str, int] | None = None,
    distinct: int | Mapping[str, int] | None = None,
    devices: int | None = None,
    shard: tuple[int, int] | None = None,
    examples: Sequence[int] | None = None,
    prefetch: int = 0,
    check_finite: bool = False,
) -> Stream:
    """Batches with static shapes of chunks that are read one after the other.

    Batches go across the borders of chunks, and every example is in one batch an epoch. In memory is one chunk, or with
    shuffle as many as have `buffer` examples, and twice their memory while they are put together; at the beginning, as
    many as fill 16 batches, to learn sizes from.

    Args:
      source: a function that gives an iterator of chunks, anew for each epoch; or a list of files, with a reader. A
        chunk is x, (x, y) or (x, y, weight), as js.batches takes them, and all chunks are of the same kind.
      batch_size: examples a batch; the last batch of an epoch is padded up to it with weight 0.
      reader: reader(file) -> a chunk, or an iterator of chunks, or what js.read_csv and its like return.
      shuffle: whether the files, if there are any, have another order each epoch, and examples another order among
        those of consecutive chunks that have at least `buffer` examples together.
      buffer: see shuffle.
      seed: of the orders.
      drop_remainder: leave out the last batch where it is not full; with shard, that of each host.
      num_rows, padding_idx, check_finite: as in js.batches.
      nse, length, distinct: entries of a batch's matrix, length of its id lists, and room for its distinct ids, which
        are fewer: ints or by feature name. What is left out is learnt from the first chunks. A batch that needs more
        gets two or eight times these sizes: three shapes in all, unless one needs still more, which warns.
      devices: as in js.batches.
      shard: if given, (index, count): this host has every count-th file of an epoch, and without files every count-th
        chunk, and makes batches of batch_size / count examples. All hosts make the same number of them: those that have
        fewer examples add batches of weight 0, which repeat an example. With drop_remainder a host leaves out its own
        last examples, also where others go on, so that its batches are full or of weight 0. As all hosts need the same
        shapes, a batch that does not fit raises. Such batches do not carry their distinct ids.
      examples: how many examples each file has, so that hosts know of each other: needed for files with shard.
      prefetch: how many batches a thread reads and makes ahead, while the step runs. They are the same batches, and
        `state` is that of the batch that came last, not of those that wait. Errors come in their place.

    Returns:
      A `Stream`: each iteration over it is one epoch of `Batch`.

    Raises:
      TypeError, ValueError, OverflowError: as js.batches, also while iterating: what is wrong in a chunk has a note
        that says in which. And for chunks of different kinds, a source without examples, and a batch that does not fit
        with shard.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> days = {"mon": [[3, 0], [1, 2], [0, 0]], "tue": [[2, 2]]}
      >>> read = lambda day: (np.array(days[day]), np.ones(len(days[day])))
      >>> stream = js.stream(["mon", "tue"], reader=read, batch_size=2, num_rows=4)
      >>> [batch.x.tolist() for batch in stream]
      [[[3, 0], [1, 2]], [[0, 0], [2, 2]]]
    """
    index, count = check_sizes("stream", batch_size, devices, shard, seed)
    for argument, value, least in (("buffer", buffer, 1), ("prefetch", prefetch, 0)):
        if not is_int(value) or value < least:
            raise ValueError(message("stream", argument, f"an integer of at least {least}", value))
    ids, sizes = (
        {"num_rows": num_rows, "padding_idx": padding_idx},
        {"nse": nse, "length": length, "distinct": distinct},
    )
    check_integers(ids, "stream")
    check_integers(sizes, "stream", least=1)
    files, read = files_of(source, reader)
    if examples is not None and (reader is None or len(examples) != len(files) or not all(map(is_int, examples))):
        must = "one number for each file, and only for files"
        raise ValueError(message("stream", "examples", must, examples))
    if reader is not None and count > 1:
        if examples is None:
            do = "Count the rows: all hosts have to know how many steps the others make."
            raise ValueError(message("stream", "examples", "given with files and shard", None, do))
        if len(files) < count:
            raise ValueError(message("stream", "source", f"at least {count} files, one for each host", len(files)))
    settings = {
        "seed": int(seed),
        "shuffle": int(shuffle),
        "buffer": int(buffer),
        "batch_size": int(batch_size),
        "drop_remainder": int(drop_remainder),
        "shard_index": index,
        "shard_count": count,
    }
    return Stream(files, read, examples, settings, ids, sizes, devices, prefetch, check_finite)


class _Place(NamedTuple):
    """Where an epoch goes on: the window of the next example, where that begins, and how many examples come before."""

    step: int = 0
    file: int = 0  # in the order of the epoch
    chunk: int = 0  # of the file
    window: int = 0
    first: int = 0


class Stream:
    """What `js.stream` returns. It has no `len()`: how many batches an epoch has is known at its end.

    Each `iter()` starts an epoch at its beginning, or at a `state` that was set, as of `js.Batches`: the one that comes
    next, or the same one again if its iteration was left early.

    Attributes:
      state: the position as a dict of ints, to be saved beside a checkpoint and set before iterating; each host has its
        own. Files before it are not read again, chunks of its file are passed over. Setting it raises ValueError if the
        settings in it differ.
      sizes: nse, length and distinct, given or learnt: js.stream(..., **stream.sizes) need not learn them.
      rungs: how many batches were made with these sizes, with two and with eight times as much, and with more.
    """

    def __init__(
        self,
        files: Sequence[Any],
        reader: Callable[[Any], Any],
        counts: Sequence[int] | None,
        settings: dict[str, int],
        ids: dict[str, Any],
        sizes: dict[str, Any],
        devices: int | None,
        prefetch: int,
        check_finite: bool,
    ) -> None:
        self._settings, self._devices, self._counts = settings, devices, counts
        self._prefetch, self._pool = prefetch, ThreadPoolExecutor(1, "js.stream")  # whose thread starts when it is used
        self._index, self._hosts = settings["shard_index"], settings["shard_count"]
        self._size = settings["batch_size"] // self._hosts
        self._source = Source(files, reader, counts, self._checked)
        self._has_files = files[0] is not None
        self._per_name = {**ids, "nse": None}
        self._check_finite = check_finite
        self._kinds: dict[str, str] | None = None
        self._epoch, self._place, self._begin = 0, _Place(), _Place()
        self._learn(sizes)

    @property
    def num_devices(self) -> int | None:
        return self._devices

    @property
    def is_part(self) -> bool:
        """Whether other hosts have the rest of each batch."""
        return self._hosts > 1

    @property
    def rungs(self) -> list[int]:
        return list(self._rungs.used)

    @property
    def sizes(self) -> dict[str, Any]:
        found: dict[str, dict[Any, int]] = {"nse": {}, "length": {}, "distinct": {}}
        for feature, size, room in zip(self._features, self._rungs.sizes, self._rungs.rooms, strict=True):
            for name, value in {"length" if isinstance(feature, Lists) else "nse": size, "distinct": room}.items():
                if value:
                    found[name][feature.key] = value
        return {name: of.get(None, of) for name, of in found.items() if of}

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, **self._place._asdict(), **self._settings}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        for name, value in self._settings.items():
            if state.get(name) != value:
                got = f"{name}={state.get(name)}"
                raise ValueError(message("stream", "state", f"saved with {name}={value}", got))
        epoch, *place = (int(state.get(name, -1)) for name in ("epoch", *_Place._fields))
        if min(epoch, *place) < 0 or place[1] > len(self._source.files):
            raise ValueError(message("stream", "state", "a position of a stream", dict(state)))
        self._epoch, self._place = epoch, _Place(*place)
        self._begin = self._place

    def __iter__(self) -> Iterator[Batch]:
        epoch, begin = self._epoch, self._begin
        is_empty = True
        for batch, _, after in self._batches(epoch, begin):
            is_empty = False
            self._epoch, self._place = (epoch, after) if after is not None else (epoch + 1, _Place())
            if after is None:
                self._begin = _Place()
            yield batch
        if is_empty:
            self._epoch, self._place, self._begin = epoch + 1, _Place(), _Place()

    def one_epoch(self) -> Iterator[Batch]:
        """The batches of a whole epoch, in the order of the present one. The position stays where it is."""
        return (batch for batch, _ in self.counted_epoch())

    def counted_epoch(self) -> Iterator[tuple[Batch, int]]:
        """The same, with how many examples each has."""
        return ((batch, count) for batch, count, _ in self._batches(self._epoch, _Place()))

    def _checked(self, part: Any) -> Chunk:
        chunk = Chunk(Examples(*split(part), self._per_name, self._check_finite))
        if self._kinds is not None:
            chunk.check_like(self._kinds)
        return chunk

    def _learn(self, given: dict[str, Any]) -> None:
        """The sizes, from the first chunks: on every host the same ones."""
        chunks, held = list[Chunk](), 0
        found = (c for f in range(len(self._source.files)) for *_, c in self._source.chunks(f, lambda _: False))
        for chunk in found:
            if chunk is not None and chunk.num_examples:
                self._kinds = self._kinds or chunk.kinds()
                chunks.append(chunk)
                held += chunk.num_examples
            if held >= _LEARNT_FROM * self._size:
                break
        if not chunks:
            must = "a source of at least one example"
            raise ValueError(message("stream", "source", must, "none"))
        examples = chunks[0].examples
        self._features, self._tree = [f.bare() for f in examples.features], examples.tree
        check_names(given, {f.key for f in self._features if f.key is not None}, "stream")
        self._has_weight = examples.weight is not None
        self._y = None if examples.y is None else examples.y.bare()
        self._spares = chunks[0].cut(np.arange(1))
        values = [[v.get(f.key) if isinstance(v, Mapping) else v for f in self._features] for v in given.values()]
        sizes = [
            nse if isinstance(f, Sparse) else length if isinstance(f, Lists) else None
            for f, nse, length in zip(self._features, *values[:2], strict=True)
        ]
        scratch = None if self.is_part else Scratch()
        self._length = self._size // (self._devices or 1)
        self._rungs = Rungs(self._features, self._length, scratch, self.is_part)
        window = Window(chunks, [self._settings["seed"]] if self._settings["shuffle"] else None)
        full = max(len(window) // self._size, 1)
        count = min(full, _LOOKED_AT)
        spans = [
            (a, min(a + self._size, len(window))) for a in (self._size * (full * i // count) for i in range(count))
        ]
        looked_at = [self._shards(window.cut(a, b)[: len(self._features)], b - a) for a, b in spans]
        self._rungs.learn(looked_at, self._spares[: len(self._features)], sizes, values[2])

    def _batches(self, epoch: int, place: _Place) -> Iterator[tuple[Batch, int, _Place | None]]:
        """From a place on, each batch, how many examples it has, and the place after it: None after the last one."""
        made = self._made(epoch, place)
        return ahead(made, self._prefetch, self._pool) if self._prefetch else made

    def _made(self, epoch: int, place: _Place) -> Generator[tuple[Batch, int, _Place | None]]:
        items = self._items(epoch, place)
        item = next(items, None)
        while item is not None:
            (cuts, count, after), item = item, next(items, None)
            yield self._batch(cuts, count), count, None if item is None else after

    def _items(self, epoch: int, place: _Place) -> Iterator[tuple[list[Any], int, _Place]]:
        """The same of the cuts of batches."""
        totals, step, first = [0] * self._hosts, place.step, place.first
        windows = self._windows(epoch, place, totals)
        at, (window, where) = step * self._size - first, next(windows)
        if window is not None and not 0 <= at < len(window):
            raise ValueError(
                message("stream", "state", "a position in the data that it was saved with", place._asdict())
            )
        while window is not None:
            parts, count = [], 0
            while window is not None and count < self._size:
                stop = min(at + self._size - count, len(window))
                parts.append(window.cut(at, stop))
                count, at = count + stop - at, stop
                if at == len(window):
                    first, at, window = first + at, 0, None  # which frees it
                    window, where = next(windows)
            if count == self._size or not self._settings["drop_remainder"]:
                step += 1
                yield joined(parts), count, _Place(step, *where, first)
        while step < self._steps(epoch, totals):
            step += 1
            yield [take(spare, np.arange(0)) for spare in self._spares], 0, _Place(step, *where, first)

    def _steps(self, epoch: int, totals: list[int]) -> int:
        """How many batches all hosts make, where there are several."""
        if not self.is_part:
            return 0
        if self._counts is not None:
            totals = [0] * self._hosts
            for number, file in enumerate(self._order(epoch)):
                totals[number % self._hosts] += self._counts[file]
        most = max(totals)
        return most // self._size if self._settings["drop_remainder"] else -(-most // self._size)

    def _order(self, epoch: int) -> Sequence[int]:
        """Of the files."""
        count = len(self._source.files)
        if not self._settings["shuffle"] or not self._has_files:
            return range(count)
        return np.random.default_rng([self._settings["seed"], epoch]).permutation(count).tolist()

    def _windows(
        self, epoch: int, place: _Place, totals: list[int]
    ) -> Iterator[tuple[Window | None, tuple[int, int, int]]]:
        """The windows of this host from a place on, each with the file and chunk where it begins and its number, and
        None at the end. Adds up the examples that each host has of those chunks that come by."""
        files, number, chunks, held = self._order(epoch), place.window, list[Chunk](), 0
        begin, chunk_number = (place.file, place.chunk), 0

        def others(file: int) -> Callable[[int], bool]:
            mine = lambda chunk: self._has_files or chunk % self._hosts == self._index  # noqa: E731
            return lambda chunk: not mine(chunk) or (file == place.file and chunk < place.chunk)

        for file in range(place.file, len(files)):
            if self._has_files and file % self._hosts != self._index:
                continue
            for chunk_number, size, chunk in self._source.chunks(files[file], others(file)):
                totals[chunk_number % self._hosts] += size
                if chunk is None or not size:
                    continue
                if not chunks:
                    begin = file, chunk_number
                chunks.append(chunk)
                held += size
                del chunk
                if not self._settings["shuffle"] or held >= self._settings["buffer"]:
                    yield self._window(chunks, epoch, number), (*begin, number)
                    number, held = number + 1, 0
        if chunks:
            yield self._window(chunks, epoch, number), (*begin, number)
            number += 1
        end = (len(files), 0) if self._has_files else (0, chunk_number + 1)
        yield None, (*end, number)

    def _window(self, chunks: list[Chunk], epoch: int, number: int) -> Window:
        key = [self._settings["seed"], epoch, number + 1]  # a 0 at the end would change nothing
        window = Window(chunks, key if self._settings["shuffle"] else None)
        chunks.clear()  # they are in the window, or copied into it
        return window

    def _shards(self, cuts: list[Any], count: int) -> list[list[Any]]:
        """Of each device, the cut of its examples, where so many were cut for a batch."""
        if not self._devices:
            return [cuts]
        ends = [min(i * self._length, count) for i in range(self._devices + 1)]
        return [[take(cut, np.arange(a, b)) for cut in cuts] for a, b in itertools.pairwise(ends)]

    def _batch(self, cuts: list[Any], count: int) -> Batch:
        features, shards = len(self._features), self._shards(cuts, count)
        spares = [take(cut, np.arange(1)) for cut in cuts] if count else self._spares
        padded, known = self._rungs.make([shard[:features] for shard in shards], spares[:features])
        put = []
        for number, (shard, leaves, distinct) in enumerate(zip(shards, padded, known, strict=True)):
            here = min(max(count - number * self._length, 0), self._length)
            y = None if self._y is None else self._y.pad(shard[features], self._length, 0, spares[features])
            weight = weights(shard[-1] if self._has_weight else here, self._length)
            put.append((*(jax.tree.unflatten(self._tree, of) for of in (leaves, distinct)), y, weight))
        return put_together(put, self._devices)


_LEARNT_FROM = 16  # batches, at least
_LOOKED_AT = 16
