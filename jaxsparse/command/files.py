"""A user's file as one matrix and its labels."""

from __future__ import annotations

import csv
import importlib
import itertools
import os
import zlib
from typing import Any

import numpy as np
import scipy.sparse

from jaxsparse.data.readers.csv import read_csv
from jaxsparse.data.readers.lines import open_file
from jaxsparse.data.readers.parquet import read_parquet
from jaxsparse.data.readers.svmlight import read_svmlight

FORMATS = {"svmlight": (".svm", ".svmlight", ".libsvm", ".txt"), "csv": (".csv", ".tsv", ".tab")}
FORMATS |= {"parquet": (".parquet", ".pq", ".arrow", ".feather")}
_LOOK_AT = 1000  # rows of a CSV file that say which columns are numbers


def format_of(path: str) -> str:
    """By the end of the name, but for .gz.

    Raises:
      ValueError: if that says nothing.
    """
    name = path.lower().removesuffix(".gz")
    for kind, ends in FORMATS.items():
        if name.endswith(ends):
            return kind
    known = ", ".join(end for ends in FORMATS.values() for end in ends)
    raise ValueError(f"{path}: which format is it? Its name ends in none of {known}; give --format.")


def look_at(path: str, kind: str, header: bool, label: str | None, hashed: list[str]) -> dict[str, Any]:
    """Which columns a file has, and as what: the label is the first one by default, what is all numbers in the first
    rows is numbers, and all else is hashed."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is {'no file' if os.path.exists(path) else 'not there'}.")
    if kind == "svmlight":
        return {}
    names, is_number = _csv_columns(path, header) if kind == "csv" else _parquet_columns(path)
    label = names[0] if label is None else label
    for name in (label, *hashed):
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}. Its columns are {', '.join(map(repr, names[:50]))}.")
    features = [name for name in names if name != label]
    numbers = [name for name in features if is_number[name] and name not in hashed]
    others = [name for name in features if name not in numbers]
    return {"names": None if header or kind != "csv" else names, "label": label, "numbers": numbers, "hashed": others}


def _csv_columns(path: str, header: bool) -> tuple[list[str], dict[str, bool]]:
    try:
        with open_file(path) as file:
            lines = (line.decode("utf-8-sig", errors="replace") for line in file)
            rows = [row for row in itertools.islice(csv.reader(lines, delimiter=_delimiter(path)), _LOOK_AT) if row]
    except (csv.Error, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or no CSV file: {error}") from error
    if not rows or (header and len(rows) < 2):
        raise ValueError(f"{path} has no rows.")
    names = rows.pop(0) if header else [f"c{n}" for n in range(len(rows[0]))]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns have one name. If the first line is no line of names, give --no-header.")
    columns = itertools.zip_longest(*(row[: len(names)] for row in rows), fillvalue="")
    return names, {name: all(map(_is_number, column)) for name, column in zip(names, columns, strict=False)}


def _delimiter(path: str) -> str:
    return "\t" if any(f".{kind}" in path.lower() for kind in ("tsv", "tab")) else ","


def _is_number(text: str) -> bool:
    try:
        return not text or abs(float(text)) < float("inf")
    except ValueError:
        return False


def _parquet_columns(path: str) -> tuple[list[str], dict[str, bool]]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(f"{path} wants pyarrow: pip install 'jaxsparse[arrow]'.") from None
    try:
        with open(path, "rb") as file:
            is_arrow = file.read(6) == b"ARROW1"
        schema = arrow.ipc.open_file(path).schema if is_arrow else parquet.read_schema(path)
    except (arrow.lib.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = ("int", "uint", "float", "double", "half", "decimal", "bool")
    return schema.names, {field.name: str(field.type).startswith(kinds) for field in schema}


def load(
    path: str, settings: dict[str, Any], *, labeled: bool, bad_lines: str | None = None
) -> tuple[Any, np.ndarray | None]:
    """All of a file: CSR (n, settings["num_columns"]), and the labels (n,).

    Hashed columns share the first settings["rows"] columns, each with a seed of its own. Numbers have a column each
    behind them, as sign(v) log(1 + |v|); an empty one is 0.
    """
    reader: Any
    if settings["format"] == "svmlight":
        reader = read_svmlight(
            path, num_features=settings.get("num_columns"), zero_based=settings["zero_based"], bad_lines=bad_lines
        )
        settings["num_columns"] = reader.num_features
        chunks = [(chunk.x, chunk.y) for chunk in reader]
    else:
        settings["num_columns"] = settings["rows"] + len(settings["numbers"])
        shared: dict[str, Any] = {
            "label": settings["label"] if labeled else None,
            "numbers": settings["numbers"],
            "hashed": settings["hashed"],
            "num_rows": settings["rows"],
            "seed": {name: n for n, name in enumerate(settings["hashed"])},
            "fill": 0.0,
        }
        if settings["format"] == "csv":
            reader = read_csv(path, columns=settings["names"], bad_lines=bad_lines, **shared)
        else:
            reader = read_parquet(path, missing="", **shared)
        chunks = [(_matrix(chunk.x, len(_first(chunk.x)), settings), chunk.y) for chunk in reader]
    if not chunks:
        raise ValueError(f"{path} has no examples.")
    xs, ys = zip(*chunks, strict=True)
    return scipy.sparse.vstack(xs, format="csr"), np.concatenate(ys) if labeled else None


def _first(x: dict[str, Any]) -> Any:
    return next(iter(x.values()))


def _matrix(x: dict[str, Any], n: int, settings: dict[str, Any]) -> Any:
    rows, columns, values = [], [], []
    for name in settings["hashed"]:
        ids = x[name]
        lengths = np.array([len(row) for row in ids]) if isinstance(ids, list) else np.ones(n, int)
        columns.append(np.concatenate(ids) if isinstance(ids, list) else ids)
        rows.append(np.repeat(np.arange(n), lengths))
        values.append(np.ones(len(columns[-1]), np.float32))
    if settings["numbers"]:
        numbers = np.sign(x["numbers"]) * np.log1p(np.abs(x["numbers"]))
        at = np.nonzero(numbers)
        rows.append(at[0])
        columns.append(at[1] + settings["rows"])
        values.append(numbers[at])
    where = np.concatenate(rows), np.concatenate(columns)
    return scipy.sparse.csr_matrix((np.concatenate(values), where), shape=(n, settings["num_columns"]))
