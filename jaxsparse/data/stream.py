"""Batches of data that are larger than memory and are read in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse._checks import message
from jaxsparse._names import OF_LOADERS, other_names
from jaxsparse.data.batch import Batch, assemble_batch, weights
from jaxsparse.data.chunks import Chunk, Source, Window, concatenated, files_of, prefetched, split
from jaxsparse.data.distinct import Scratch
from jaxsparse.data.examples import Examples, check_integers, check_names, check_sizes, is_int
from jaxsparse.data.features import Lists, Sparse
from jaxsparse.data.ragged import take
from jaxsparse.data.rungs import Rungs


@other_names("stream", OF_LOADERS)
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
    """Batches of static shapes from data that are read chunk by chunk.

    A batch may have examples of several chunks. An epoch has each example once. Memory holds one chunk; with shuffle,
    as many chunks as have `buffer` examples, and twice that while they are concatenated. At the beginning it holds the
    chunks of 16 batches, from which the sizes are learnt.

    Args:
      source: a function that returns an iterable of chunks and is called at each epoch; or a list of files, with a
        reader. A chunk is x, (x, y) or (x, y, weight), as for js.batches. All chunks are of the same kind.
      batch_size: examples in a batch. The last batch of an epoch is padded with examples of weight 0.
      reader: reader(file) -> a chunk, an iterator of chunks, or the reader that js.read_csv and others return.
      shuffle: whether each epoch has another order: of the files, and of the examples within consecutive chunks that
        have at least `buffer` examples in all.
      buffer: the least number of examples that are shuffled together.
      seed: determines all orders.
      drop_remainder: whether to leave out a last batch that is not full; with shard, the last one of each host.
      num_rows, padding_idx, check_finite: as in js.batches.
      nse, length, distinct: entries of a matrix in a batch, length of id lists, and a number above that of the distinct
        ids: ints, or dicts of ints by feature name. By default they are learnt from the first chunks. A batch that
        needs more gets two or eight times these sizes: three shapes in all. A batch that needs still more warns.
      devices: as in js.batches.
      shard: if given, (index, count): this host reads every count-th file of an epoch (without files, every count-th
        chunk) and makes batches of batch_size / count examples. All hosts make the same number of batches: a host with
        fewer examples adds batches of weight 0. With drop_remainder, each host leaves out its own last examples, so its
        batches are full or of weight 0. All hosts need the same shapes, so a batch that does not fit raises. Such
        batches do not carry distinct ids.
      examples: the number of examples of each file. Needed for files with shard: hosts must know of each other's.
      prefetch: the number of batches that a thread makes in advance, while the step runs. The batches are the same.
        `state` is that of the batch returned last. An exception is raised in place of the batch that caused it.

    Returns:
      A `Stream`. Each iteration over it is one epoch of `Batch`.

    Raises:
      TypeError, ValueError, OverflowError: as js.batches, also while iterating; a note names the chunk. ValueError also
        if chunks are of different kinds, the source has no examples, or, with shard, a batch does not fit.

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


class _Position(NamedTuple):
    """Where an epoch goes on: the window of the next example, its first chunk, and the examples before it."""

    step: int = 0
    file: int = 0  # in the order of the epoch
    chunk: int = 0  # of the file
    window: int = 0
    first: int = 0


class Stream:
    """What `js.stream` returns. It has no `len()`: the number of batches is known when the epoch ends.

    Each `iter()` is one epoch, from its beginning or from a `state` that was set. If an iteration ends early, the next
    one starts the same epoch again.

    Attributes:
      state: the position, a dict of ints. Save it with the checkpoint and set it before iterating; each host has its
        own. Files before the position are not read again; of its file, chunks before it are read and skipped. Setting
        it raises ValueError if the settings in it differ.
      sizes: nse, length and distinct, given or learnt. js.stream(..., **stream.sizes) learns nothing.
      rungs: the number of batches made with these sizes, with two and with eight times these, and with more.
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
        self._prefetch, self._pool = prefetch, ThreadPoolExecutor(1, "js.stream")  # the thread starts at its first task
        self._index, self._hosts = settings["shard_index"], settings["shard_count"]
        self._size = settings["batch_size"] // self._hosts
        self._source = Source(files, reader, counts, self._checked)
        self._has_files = files[0] is not None
        self._per_name = {**ids, "nse": None}
        self._check_finite = check_finite
        self._kinds: dict[str, str] | None = None
        self._epoch, self._position, self._begin = 0, _Position(), _Position()
        self._learn(sizes)

    @property
    def num_devices(self) -> int | None:
        return self._devices

    @property
    def is_part(self) -> bool:
        """Whether other hosts make the rest of each batch."""
        return self._hosts > 1

    @property
    def rungs(self) -> list[int]:
        return list(self._rungs.used)

    @property
    def sizes(self) -> dict[str, Any]:
        found: dict[str, dict[Any, int]] = {"nse": {}, "length": {}, "distinct": {}}
        for feature, size, capacity in zip(self._features, self._rungs.sizes, self._rungs.capacities, strict=True):
            for name, value in {"length" if isinstance(feature, Lists) else "nse": size, "distinct": capacity}.items():
                if value:
                    found[name][feature.key] = value
        return {name: of.get(None, of) for name, of in found.items() if of}

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, **self._position._asdict(), **self._settings}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        for name, value in self._settings.items():
            if state.get(name) != value:
                got = f"{name}={state.get(name)}"
                raise ValueError(message("stream", "state", f"saved with {name}={value}", got))
        epoch, *position = (int(state.get(name, -1)) for name in ("epoch", *_Position._fields))
        if min(epoch, *position) < 0 or position[1] > len(self._source.files):
            raise ValueError(message("stream", "state", "a position of a stream", dict(state)))
        self._epoch, self._position = epoch, _Position(*position)
        self._begin = self._position

    def __iter__(self) -> Iterator[Batch]:
        epoch, begin = self._epoch, self._begin
        is_empty = True
        for batch, _, after in self._batches(epoch, begin):
            is_empty = False
            self._epoch, self._position = (epoch, after) if after is not None else (epoch + 1, _Position())
            if after is None:
                self._begin = _Position()
            yield batch
        if is_empty:
            self._epoch, self._position, self._begin = epoch + 1, _Position(), _Position()

    def one_epoch(self) -> Iterator[Batch]:
        """The batches of the current epoch, from its beginning. `state` does not change."""
        return (batch for batch, _ in self.counted_epoch())

    def counted_epoch(self) -> Iterator[tuple[Batch, int]]:
        """The same, each with its number of examples."""
        return ((batch, count) for batch, count, _ in self._batches(self._epoch, _Position()))

    def _checked(self, part: Any) -> Chunk:
        chunk = Chunk(Examples(*split(part), self._per_name, self._check_finite))
        if self._kinds is not None:
            chunk.check_like(self._kinds)
        return chunk

    def _learn(self, given: dict[str, Any]) -> None:
        """Learns the sizes from the first chunks: the same chunks, and sizes, on every host."""
        chunks, held = list[Chunk](), 0
        found = (c for f in range(len(self._source.files)) for *_, c in self._source.chunks(f, lambda _: False))
        for chunk in found:
            if chunk is not None and chunk.num_examples:
                self._kinds = self._kinds or chunk.kinds()
                chunks.append(chunk)
                held += chunk.num_examples
            if held >= _MIN_LEARNT_BATCHES * self._size:
                break
        if not chunks:
            must = "a source of at least one example"
            raise ValueError(message("stream", "source", must, "none"))
        examples = chunks[0].examples
        self._features, self._tree = [f.bare() for f in examples.features], examples.tree
        check_names(given, {f.key for f in self._features if f.key is not None}, "stream")
        self._has_weight = examples.weight is not None
        self._y = None if examples.y is None else examples.y.bare()
        self._fillers = chunks[0].cut(np.arange(1))
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
        count = min(full, _SAMPLED_BATCHES)
        spans = [
            (a, min(a + self._size, len(window))) for a in (self._size * (full * i // count) for i in range(count))
        ]
        sampled = [self._shards(window.cut(a, b)[: len(self._features)], b - a) for a, b in spans]
        self._rungs.learn(sampled, self._fillers[: len(self._features)], sizes, values[2])

    def _batches(self, epoch: int, position: _Position) -> Iterator[tuple[Batch, int, _Position | None]]:
        """From a position on: each batch, its number of examples, and the next position, None after the last batch."""
        made = self._made(epoch, position)
        return prefetched(made, self._prefetch, self._pool) if self._prefetch else made

    def _made(self, epoch: int, position: _Position) -> Generator[tuple[Batch, int, _Position | None]]:
        items = self._items(epoch, position)
        item = next(items, None)
        while item is not None:
            (cuts, count, after), item = item, next(items, None)
            yield self._batch(cuts, count), count, None if item is None else after

    def _items(self, epoch: int, position: _Position) -> Iterator[tuple[list[Any], int, _Position]]:
        """From a position on: the cuts of each batch, its number of examples, and the position after it."""
        totals, step, first = [0] * self._hosts, position.step, position.first
        windows = self._windows(epoch, position, totals)
        at, (window, where) = step * self._size - first, next(windows)
        if window is not None and not 0 <= at < len(window):
            raise ValueError(
                message("stream", "state", "a position in the data that it was saved with", position._asdict())
            )
        while window is not None:
            parts, count = [], 0
            while window is not None and count < self._size:
                stop = min(at + self._size - count, len(window))
                parts.append(window.cut(at, stop))
                count, at = count + stop - at, stop
                if at == len(window):
                    first, at, window = first + at, 0, None  # frees its memory
                    window, where = next(windows)
            if count == self._size or not self._settings["drop_remainder"]:
                step += 1
                yield concatenated(parts), count, _Position(step, *where, first)
        while step < self._steps(epoch, totals):
            step += 1
            yield [take(filler, np.arange(0)) for filler in self._fillers], 0, _Position(step, *where, first)

    def _steps(self, epoch: int, totals: list[int]) -> int:
        """The number of batches that each host makes, if there are several hosts; otherwise 0."""
        if not self.is_part:
            return 0
        if self._counts is not None:
            totals = [0] * self._hosts
            for number, file in enumerate(self._order(epoch)):
                totals[number % self._hosts] += self._counts[file]
        max_examples = max(totals)
        return max_examples // self._size if self._settings["drop_remainder"] else -(-max_examples // self._size)

    def _order(self, epoch: int) -> Sequence[int]:
        """The order of the files."""
        count = len(self._source.files)
        if not self._settings["shuffle"] or not self._has_files:
            return range(count)
        return np.random.default_rng([self._settings["seed"], epoch]).permutation(count).tolist()

    def _windows(
        self, epoch: int, position: _Position, totals: list[int]
    ) -> Iterator[tuple[Window | None, tuple[int, int, int]]]:
        """The windows of this host from a position on, each with (file and chunk where it begins, its number); None at
        the end. Adds the examples of the chunks to `totals`, by host."""
        files, number, chunks, held = self._order(epoch), position.window, list[Chunk](), 0
        begin, chunk_number = (position.file, position.chunk), 0

        def skipped_chunks(file: int) -> Callable[[int], bool]:
            is_of_host = lambda chunk: self._has_files or chunk % self._hosts == self._index  # noqa: E731
            return lambda chunk: not is_of_host(chunk) or (file == position.file and chunk < position.chunk)

        for file in range(position.file, len(files)):
            if self._has_files and file % self._hosts != self._index:
                continue
            for chunk_number, size, chunk in self._source.chunks(files[file], skipped_chunks(file)):
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
        key = [self._settings["seed"], epoch, number + 1]  # + 1, because a trailing 0 would not change the key
        window = Window(chunks, key if self._settings["shuffle"] else None)
        chunks.clear()  # the window has them, or a copy
        return window

    def _shards(self, cuts: list[Any], count: int) -> list[list[Any]]:
        """The cuts of a batch of `count` examples, split by device."""
        if not self._devices:
            return [cuts]
        ends = [min(i * self._length, count) for i in range(self._devices + 1)]
        return [[take(cut, np.arange(a, b)) for cut in cuts] for a, b in itertools.pairwise(ends)]

    def _batch(self, cuts: list[Any], count: int) -> Batch:
        features, shards = len(self._features), self._shards(cuts, count)
        fillers = [take(cut, np.arange(1)) for cut in cuts] if count else self._fillers
        padded, known = self._rungs.make([shard[:features] for shard in shards], fillers[:features])
        shard_batches = []
        for number, (shard, leaves, distinct) in enumerate(zip(shards, padded, known, strict=True)):
            num_examples = min(max(count - number * self._length, 0), self._length)
            y = None if self._y is None else self._y.pad(shard[features], self._length, 0, fillers[features])
            weight = weights(shard[-1] if self._has_weight else num_examples, self._length)
            shard_batches.append((*(jax.tree.unflatten(self._tree, of) for of in (leaves, distinct)), y, weight))
        return assemble_batch(shard_batches, self._devices)


_MIN_LEARNT_BATCHES = 16  # sizes are learnt from the chunks of at least so many batches
_SAMPLED_BATCHES = 16  # of these, so many are padded
