"""The examples of a user's file, read chunk by chunk. Memory holds only the chunks of readers and streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse

from jaxsparse._checks import MAX_ROWS
from jaxsparse.data.order import order_of
from jaxsparse.data.readers.csv import read_csv
from jaxsparse.data.readers.jsonl import read_jsonl
from jaxsparse.data.readers.parquet import read_parquet
from jaxsparse.data.readers.svmlight import read_svmlight
from jaxsparse.data.readers.text import read_text
from jaxsparse.data.readers.vw import read_vw
from jaxsparse.data.stream import Stream, stream


class Examples:
    """The examples of a file, in the format and with the columns of its settings.

    Args:
      path: the file.
      settings: those of `files.inspect_file`, with "format", "rows", "seed", "batch_size" and "held_out". `scan` adds
        to them.
      bad_lines: a file for bad lines; by default they raise ValueError.
    """

    def __init__(self, path: str, settings: dict[str, Any], bad_lines: str | None = None) -> None:
        self.path, self.settings, self._bad_lines = path, settings, bad_lines
        self._has_reported_bad = bad_lines is None

    def chunks(self, labeled: bool = True) -> Iterator[tuple[Any, Any, Any]]:
        """Chunks of examples: a CSR matrix (n, num_columns), y (n,) or None, and weights (n,) or None.

        Hashed columns share the first settings["rows"] columns, each with another seed. Each column of numbers has one
        column after these, with sign(v) log(1 + |v|); an empty number is 0.
        """
        reader, is_empty = self._reader(labeled), True
        for x, y, weight in reader:
            is_empty = False
            yield self._matrix(x) if isinstance(x, dict) else x, y, weight
        self._has_reported_bad = True
        if is_empty:
            raise ValueError(f"{self.path} has no examples.")

    def scan(self) -> None:
        """Reads the file once, so that bad lines are found before training. Adds to the settings the number of examples
        and columns, the longest row, and whether labels are two classes."""
        columns = count = longest = 0
        labels: set[float] = set()
        for x, y, _ in self.chunks():
            count += len(y)
            columns = max(columns, int(x.indices.max(initial=-1)) + 1)
            longest = max(longest, int(np.diff(x.indptr).max()))
            if len(labels) < 3:
                labels.update(np.unique(y).tolist())
        if self.settings["format"] == "svmlight":
            self.settings["num_columns"] = max(columns, 1)
        self.settings["num_examples"], self.settings["longest"] = count, longest
        self.settings["binary"] = labels in ({0, 1}, {-1, 1})

    @property
    def num_held_out(self) -> int:
        return math.ceil(self.settings["held_out"] * self.settings["num_examples"])

    def part(self, held_out: bool) -> Iterator[tuple[Any, ...]]:
        """Chunks of the held-out examples, or of the others. Nothing is copied: a random order of all examples, from
        the seed, says which ones are held out, its first ones.

        Raises:
          OSError: if the number of examples has changed since `scan`.
        """
        count, at = self.settings["num_examples"], 0
        order = order_of(count, [self.settings["seed"]])
        for x, y, weight in self.chunks():
            if at + len(y) > count:
                break
            selected = np.flatnonzero((order[at : at + len(y)] < self.num_held_out) == held_out)
            at += len(y)
            target = (y > 0).astype(np.float32) if self.settings["binary"] else y
            yield (x[selected], target[selected], *([] if weight is None else [weight[selected]]))
        if at != count:
            raise OSError(f"{self.path} has changed: it had {count:,} examples.")

    def stream(self, chunks: Callable[[], Iterator[Any]], **options: Any) -> Stream:
        """A stream of these chunks with at most three shapes. The largest one fits the longest rows of the file."""

        def make(**sizes: Any) -> Stream:
            return stream(chunks, batch_size=self.settings["batch_size"], prefetch=2, **sizes, **options)

        made = make()
        max_sizes = {"nse": self.settings["batch_size"] * max(self.settings.get("longest", 0), 1)}
        max_sizes["distinct"] = min(max_sizes["nse"], self.settings["num_columns"]) + 1
        sizes = {name: max(size, -(-max_sizes[name] // 8)) for name, size in made.sizes.items()}
        return made if sizes == made.sizes else make(**sizes)

    def _reader(self, labeled: bool) -> Any:
        path, settings, rows = self.path, self.settings, self.settings["rows"]
        bad_lines_option: dict[str, Any] = (
            {} if self._has_reported_bad or settings["format"] == "parquet" else {"bad_lines": self._bad_lines}
        )
        reader: Any
        if settings["format"] == "svmlight":
            columns = settings.get("num_columns", MAX_ROWS - 1)
            reader = read_svmlight(path, num_features=columns, zero_based=settings["zero_based"], **bad_lines_option)
        elif settings["format"] == "vw":
            reader = read_vw(path, num_rows=rows, labeled=labeled, **bad_lines_option)
        elif settings["format"] == "text":
            reader = read_text(path, num_rows=rows, labels=settings["labels"], labeled=labeled, **bad_lines_option)
        else:
            column_options: dict[str, Any] = {
                "label": settings["label"] if labeled else None,
                "numbers": settings["numbers"],
                "hashed": settings["hashed"],
                "num_rows": rows,
                "seed": {name: n for n, name in enumerate(settings["hashed"])},
                "fill": 0.0,
            }
            if settings["format"] == "csv":
                reader = read_csv(path, columns=settings["names"], **bad_lines_option, **column_options)
            else:
                read = read_jsonl if settings["format"] == "jsonl" else read_parquet
                reader = read(path, missing="", **bad_lines_option, **column_options)
        reader.quiet = self._has_reported_bad and self._bad_lines is not None
        return reader

    def _matrix(self, x: dict[str, Any]) -> Any:
        n = len(next(iter(x.values())))
        rows, columns, values = [], [], []
        for name in self.settings["hashed"]:
            ids = x[name]
            lengths = np.array([len(row) for row in ids]) if isinstance(ids, list) else np.ones(n, int)
            columns.append(np.concatenate(ids) if isinstance(ids, list) else ids)
            rows.append(np.repeat(np.arange(n), lengths))
            values.append(np.ones(len(columns[-1]), np.float32))
        if self.settings["numbers"]:
            numbers = np.sign(x["numbers"]) * np.log1p(np.abs(x["numbers"]))
            at = np.nonzero(numbers)
            rows.append(at[0])
            columns.append(at[1] + self.settings["rows"])
            values.append(numbers[at])
        where = np.concatenate(rows), np.concatenate(columns)
        return scipy.sparse.csr_matrix((np.concatenate(values), where), shape=(n, self.settings["num_columns"]))
