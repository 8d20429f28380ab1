"""Finds the format and the columns of a user's file."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from jaxsparse.data.readers.lines import open_file
from jaxsparse.data.readers.text import label_number

FORMATS = {"svmlight": (".svm", ".svmlight", ".libsvm", ".txt"), "csv": (".csv", ".tsv", ".tab")}
FORMATS |= {"parquet": (".parquet", ".pq", ".arrow", ".feather"), "vw": (".vw",), "jsonl": (".jsonl", ".ndjson")}
FORMATS |= {"text": (".text",)}
_SAMPLE_ROWS = 1000  # rows that decide which columns are numbers
_WITH_COLUMNS = ("csv", "parquet", "jsonl")


def format_of(path: str) -> str:
    """The format of a file by the end of its name, without .gz. A .txt file is svmlight, or text if a word follows its
    first tab.

    Raises:
      ValueError: if the name does not tell.
    """
    name = path.lower().removesuffix(".gz")
    for kind, ends in FORMATS.items():
        if name.endswith(ends):
            return "text" if name.endswith(".txt") and _is_text(path) else kind
    known = ", ".join(end for ends in FORMATS.values() for end in ends)
    raise ValueError(f"{path}: which format is it? Its name ends in none of {known}. Give --format.")


def inspect_file(path: str, kind: str, header: bool, label: str | None, hashed: list[str], rows: int) -> dict[str, Any]:
    """The settings of a file: its columns and their roles. The label is the first column by default. A column with only
    numbers in the first rows is numbers, all others are hashed. For text files: the names of the labels."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}.")
    if kind == "svmlight":
        return {}
    if kind == "text":
        return {"num_columns": rows, "labels": _text_labels(path)}
    if kind == "vw":
        return {"num_columns": rows}
    find = {"parquet": _parquet_columns, "jsonl": _json_columns}
    names, is_number = _csv_columns(path, header) if kind == "csv" else find[kind](path)
    label = names[0] if label is None else label
    for name in (label, *hashed):
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}. Its columns are {', '.join(map(repr, names[:50]))}.")
    features = [name for name in names if name != label]
    if not features:
        raise ValueError(f"{path} has no column but {label!r}, the label.")
    numbers = [name for name in features if is_number[name] and name not in hashed]
    others = [name for name in features if name not in numbers]
    columns = {"names": None if header or kind != "csv" else names, "label": label, "numbers": numbers}
    return columns | {"hashed": others, "num_columns": rows + len(numbers)}


def check_options(path: str, kind: str, given: dict[str, Any]) -> None:
    """Raises ValueError for an option that does not apply to this format."""
    kinds = {"--label": _WITH_COLUMNS, "--hashed": _WITH_COLUMNS, "--no-header": ("csv",)}
    kinds |= {"--zero-based": ("svmlight",), "--bad-lines": tuple(set(FORMATS) - {"parquet"})}
    for option, of in kinds.items():
        if given[option] and kind not in of:
            raise ValueError(f"{option} is for {' and '.join(sorted(of))}, and {path} is read as {kind}.")


def _lines(path: str, what: str) -> Iterator[bytes]:
    try:
        with open_file(path) as file:
            yield from file
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged, or not a {what} file: {error}") from error


def _is_text(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    first = next((line for line in _lines(path, "text") if line.strip()), b"")
    behind = first.partition(b"\t")[2].split()
    return bool(behind) and not behind[0].split(b":")[0].isdigit() and not behind[0].startswith((b"qid:", b"#"))


def _text_labels(path: str) -> list[str] | None:
    """The names of the two classes in a text file, sorted; None if its labels are numbers."""
    names: set[str] = set()
    for raw in _lines(path, "text"):
        label, tab, _ = raw.removeprefix(b"\xef\xbb\xbf").partition(b"\t")
        name = label.decode(errors="replace").strip()
        if tab and label_number(name) is not None:
            return None
        if tab:
            names.add(name)
        if len(names) > 2:
            break
    if len(names) not in (0, 2):
        shown = ", ".join(repr(name[:40]) for name in sorted(names))
        raise ValueError(f"{path} has the labels {shown}. Labels must be numbers, or two names.")
    return sorted(names) or None


def _json_columns(path: str) -> tuple[list[str], dict[str, bool]]:
    rows = []
    for line in itertools.islice(_lines(path, "JSON lines"), _SAMPLE_ROWS):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # reported when the file is read
            continue
        if isinstance(row, dict):
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no JSON objects in its first {_SAMPLE_ROWS} lines.")
    kinds = (int, float, bool, type(None))
    return list(rows[0]), {name: all(type(row.get(name)) in kinds for row in rows) for name in rows[0]}


def _csv_columns(path: str, header: bool) -> tuple[list[str], dict[str, bool]]:
    try:
        with open_file(path) as file:
            lines = (line.decode("utf-8-sig", errors="replace") for line in file)
            rows = [row for row in itertools.islice(csv.reader(lines, delimiter=_delimiter(path)), _SAMPLE_ROWS) if row]
    except (csv.Error, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or not a CSV file: {error}") from error
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
        raise ValueError(f"{path} needs pyarrow: pip install 'jaxsparse[arrow]'.") from None
    try:
        with open(path, "rb") as file:
            is_arrow = file.read(6) == b"ARROW1"
        schema = arrow.ipc.open_file(path).schema if is_arrow else parquet.read_schema(path)
    except (arrow.lib.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = ("int", "uint", "float", "double", "half", "decimal", "bool")
    return schema.names, {field.name: str(field.type).startswith(kinds) for field in schema}
