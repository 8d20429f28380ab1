"""The chunks of a stream, read one by one, and windows of consecutive chunks whose examples are shuffled."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import numpy as np
import scipy.sparse

from jaxsparse._checks import message
from jaxsparse.data.examples import Examples
from jaxsparse.data.order import order_of
from jaxsparse.data.ragged import Ragged, as_ragged, rows_of


class Chunk:
    """Some examples of a stream. The columns are the features of x, then y and the weights where they are given."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.num_examples = examples, examples.num_examples
        self.columns = [*examples.features, *(c for c in (examples.y, examples.weight) if c is not None)]

    def cut(self, rows: np.ndarray) -> list[Any]:
        return [column.cut(rows) for column in self.columns]

    def kinds(self) -> dict[str, str]:
        return {column.name: column.kind for column in self.columns}

    def check_like(self, first: dict[str, str]) -> None:
        """Raises ValueError unless the columns are of the same kinds as `first`, those of the first chunk."""
        ours = self.kinds()
        for name in first | ours:
            must, got = first.get(name, "left out"), ours.get(name, "left out")
            if must != got:
                must = f"of chunks that are alike, {name} being {must}, as in the first"
                raise ValueError(message("stream", "source", must, got))


def concatenated(cuts: Sequence[list[Any]]) -> list[Any]:
    """The cuts of several chunks, concatenated column by column."""
    return [jax.tree.map(lambda *arrays: np.concatenate(arrays), *of) for of in zip(*cuts, strict=True)]


class Window:
    """Consecutive chunks, and the order of their examples: shuffled by `key`, or unchanged if it is None."""

    def __init__(self, chunks: Sequence[Chunk], key: Sequence[int] | None) -> None:
        self._length = sum(chunk.num_examples for chunk in chunks)
        self._order = order_of(self._length, key)
        self._chunk, self._columns = (chunks[0] if len(chunks) == 1 else None), list[Any]()
        if self._chunk is None:
            columns = concatenated([chunk.cut(np.arange(chunk.num_examples)) for chunk in chunks])
            self._columns = [as_ragged(c) if isinstance(c, tuple) else c for c in columns]

    def __len__(self) -> int:
        return self._length

    def cut(self, start: int, stop: int) -> list[Any]:
        rows = self._order[start:stop]
        if self._chunk is not None:
            return self._chunk.cut(rows)
        return [c.take(rows) if isinstance(c, Ragged) else rows_of(c, rows) for c in self._columns]


class Source:
    """The source of chunks: files with a reader, or a function, which counts as one file.

    Args:
      checked: turns what the reader returned into a `Chunk`.
      counts: the number of examples of each file, or None.
    """

    def __init__(
        self,
        files: Sequence[Any],
        reader: Callable[[Any], Any],
        counts: Sequence[int] | None,
        checked: Callable[..., Chunk],
    ) -> None:
        self.files, self._reader, self._counts, self._checked = files, reader, counts, checked

    def chunks(self, file: int, skip: Callable[[int], bool]) -> Iterator[tuple[int, int, Chunk | None]]:
        """For each chunk of a file: its number, its number of examples, and the chunk, or None if it is skipped."""
        name = self.files[file]
        where = "" if name is None else f" of {name!r}"
        read = self._reader(name)
        # an iterable without a length has several chunks: an iterator, or a reader such as js.read_csv
        is_chunks = hasattr(read, "__iter__") and not hasattr(read, "__len__")
        parts = read if hasattr(read, "__next__") or is_chunks else [read]
        total = 0
        for number, part in enumerate(parts):
            try:
                chunk = None if skip(number) else self._checked(part)
                size = _num_examples(part) if chunk is None else chunk.num_examples
            except Exception as error:
                error.add_note(f"js.stream: in chunk {number}{where}.")
                raise
            total += size
            yield number, size, chunk
            del chunk, part  # before the next one is read
        if self._counts is not None and total != self._counts[file]:
            must = f"the numbers of examples of the files, {total} for {name!r}"
            raise ValueError(message("stream", "examples", must, self._counts[file]))


T = TypeVar("T")


def prefetched(items: Generator[T], count: int, pool: ThreadPoolExecutor) -> Iterator[T]:
    """The same items in the same order, `count` of them made in advance by a pool of one thread. An exception is raised
    in place of the item that caused it.

    Each item is a separate task. So the thread never waits for the consumer, and ends when Python does.
    """
    is_ending = sys.is_finalizing  # a local name: Python clears modules when it exits
    made = collections.deque(pool.submit(next, items, None) for _ in range(count))
    try:
        while (item := made.popleft().result()) is not None:
            made.append(pool.submit(next, items, None))
            yield item
    finally:
        if not is_ending():  # at exit the thread has ended
            wait([task for task in made if not task.cancel()])
        items.close()  # closes its files, too


def files_of(source: Any, reader: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The files and the reader of a `js.stream`. A source that is a function is one file, None."""
    must, do = "a function that gives an iterator of chunks", "A list of files wants reader=."
    if reader is None:
        if not callable(source):
            do += " An iterator is used up after one epoch: give the function that makes it."
            raise TypeError(message("stream", "source", must, type(source).__name__, do))

        def read(_: None) -> Iterator[Any]:
            chunks = source()
            if hasattr(chunks, "shape") or isinstance(chunks, Mapping) or not hasattr(chunks, "__iter__"):
                raise TypeError(message("stream", "source", must, f"one that gives {type(chunks).__name__}"))
            return iter(chunks)

        return [None], read
    if not callable(reader):
        raise TypeError(message("stream", "reader", "a function of a file", type(reader).__name__))
    is_list = hasattr(source, "__iter__") and not isinstance(source, (str, bytes, Mapping))
    files = list(source) if is_list else []
    if not files:
        got = "none" if is_list else repr(source)
        raise TypeError(message("stream", "source", "a list of files, with reader=", got))
    return files, reader


def split(part: Any) -> tuple[Any, Any, Any]:
    """x, y and weight of a chunk; None for those that are not given."""
    if not isinstance(part, tuple):
        return part, None, None
    if not 1 <= len(part) <= 3:
        must = "of chunks x, (x, y) or (x, y, weight)"
        do = "Id lists go into a list."
        raise ValueError(message("stream", "source", must, f"a tuple of {len(part)}", do))
    return (*part, *[None] * (3 - len(part)))  # type: ignore[return-value]


def _num_examples(part: Any) -> int:
    x = split(part)[0]
    while isinstance(x, Mapping) and not scipy.sparse.issparse(x) and x:
        x = next(iter(x.values()))
    return x.shape[0] if hasattr(x, "shape") else len(x)
