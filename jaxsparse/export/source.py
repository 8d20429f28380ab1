"""The file model.py: its docstring, helpers, arrays, and the lines of predict."""

from __future__ import annotations

import inspect
import linecache
import os
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import message
from jaxsparse.export import helpers
from jaxsparse.export.inputs import Input, Inputs, as_size
from jaxsparse.export.writer import ATOM, Line, Value, Writer, dtype_text, names_in, numpy_dtype, shape_text
from jaxsparse.trace.lines import file_name

_NUMPY_2 = 'assert int(np.__version__.split(".")[0]) >= 2, "this needs NumPy 2"  # whose float32 stays float32'
_WIDTH = 110  # the longest comment, in characters
_INLINE = 8  # constants of up to so many numbers are written in the source


def input_lines(w: Writer, inputs: Inputs, first: int) -> list[Line]:
    """The lines that check and read the argument of predict. Its arrays are the values from number `first` on."""
    lines: list[Line] = []
    known: set[str] = set()  # sizes

    def size(n: int | str) -> str:
        return "None" if isinstance(n, str) and n not in known else str(n)

    def value(name: str, shape: Sequence[int | str], dtype: Any, **facts: Any) -> None:
        nonlocal first
        sizes = tuple(map(as_size, shape))
        w.known(first, Value(name, ATOM, sizes, np.dtype(dtype), sizes, **facts))
        first += 1

    for leaf in inputs.leaves:
        called = f'({leaf.path}, "{leaf.name}", {dtype_text(leaf.dtype)}'
        if leaf.entries is None:
            name = "x" if leaf.path == leaf.name == "x" else w.new_name(leaf.name)
            lines.append((name, f"{w.helper('array')}{called}{''.join(f', {size(n)}' for n in leaf.shape)})", None))
            for axis, n in enumerate(leaf.shape):
                if isinstance(n, str) and n not in known:
                    lines.append((n, f"{name}.shape[{axis}]", None))
                    known.add(n)
            value(name, leaf.shape, leaf.dtype)
            continue
        n, m = leaf.shape
        names = [w.new_name(f"{leaf.name}_{part}") for part in ("values", "rows", "columns")]
        count = n if isinstance(n, str) and n not in known else "_"
        lines.append((", ".join([*names, count]), f"{w.helper('csr')}{called}, {size(n)}, {m})", None))
        lines.append((leaf.entries, f"len({names[0]})", None))
        known |= {n} if isinstance(n, str) else set()
        value(names[0], [leaf.entries], leaf.dtype)
        value(names[1], [leaf.entries], np.int32, bounds=(0, as_size(n)), is_sorted=True)
        value(names[2], [leaf.entries], np.int32, bounds=(0, m))
    return lines


def needed_input_lines(lines: list[Line], needed: set[str]) -> list[Line]:
    """Those of the lines of `input_lines` that assign a needed name."""
    kept: list[Line] = []
    for line in reversed(lines):
        if names_in(line[0]) & needed:
            needed = needed | (names_in(line[1]) - {"x"})
            kept.append(line)
    return kept[::-1]


def tree_text(x: Any) -> str:
    """A pytree of expressions as one Python expression."""
    if isinstance(x, str):
        return x
    if isinstance(x, dict):
        return f"{{{', '.join(f'{key!r}: {tree_text(value)}' for key, value in x.items())}}}"
    if type(x) in (tuple, list):
        parts = ", ".join(map(tree_text, x))
        return f"[{parts}]" if isinstance(x, list) else f"({parts}{',' * (len(x) == 1)})"
    if x is None:
        return "None"
    must = "a function that returns arrays, or tuples, lists and dicts of them"
    raise TypeError(message("export_numpy", "apply_fn", must, f"one that returns a {type(x).__name__}"))


def stored_arrays(w: Writer, stored: dict[str, int]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays to save, and the lines of the source that load them or hold small ones.

    Args:
      stored: the numbers of constants, by name.
    """
    arrays, loads = {}, []
    for name, number in stored.items():
        x, what = _as_stored(w.flat.constants[number], w.flat.dtypes[number], w.value(number).rows_as)
        dtype, shape = dtype_text(x.dtype), str(x.shape)
        if x.size == 0:
            loads.append(f"{name} = np.zeros({shape}, {dtype})")
        elif name.startswith(CONSTANT) and x.size <= _INLINE and np.isfinite(x).all():
            loads.append(f"{name} = np.array({x.tolist()}, {dtype})")
        else:
            arrays[name] = x
            loads.append(f'{name} = load("{name}")  # {what} {shape}')
    return arrays, loads


CONSTANT = "constant"  # the name of arrays that are not parameters


def _as_stored(x: Any, dtype: Any, rows_as: str | None) -> tuple[np.ndarray, str]:
    """An array as it is saved, and its dtype in words."""
    x = np.asarray(x)
    if rows_as == "bfloat16":
        return x.astype(jnp.bfloat16).view(np.uint16), "bfloat16 as uint16,"
    x = np.ascontiguousarray(x.astype(numpy_dtype(dtype), copy=False)).reshape(x.shape)
    return x, str(x.dtype)


def source_text(
    w: Writer, inputs: Inputs, lines: list[Line], result: str, values: list[Value], loads: list[str]
) -> str:
    """The file.

    Args:
      lines: the lines of predict.
      result: the expression that it returns, made of `values`.
      loads: the lines before predict.
    """
    takes = ", ".join(f"{leaf.path}: {_described(leaf)}" for leaf in inputs.leaves)
    gives = ", ".join(f"{numpy_dtype(value.dtype)} {shape_text(value.shape)}" for value in values)
    body = [f"    {line}" for line in with_comments(lines)]
    names = names_in("\n".join([*loads, *body, result]))
    has_files = "load" in names
    parts = [
        f"""\
\"\"\"Written by jaxsparse (js.export_numpy). It needs Python and NumPy 2.

predict(x) takes {takes},
and gives {gives}.
\"\"\"
""",
        ("import pathlib\n\n" if has_files else "") + f"import numpy as np\n\n{_NUMPY_2}\n",
        *(f"\n{helper}\n" for helper in _helpers(w.helpers | {"load"} & names)),
        "\n" + "\n".join(loads) + "\n" if loads else "",
        f"""

@np.errstate(all="ignore")  # as in JAX, NaN and inf come without a warning
def predict(x):
{"".join(f"{line}{chr(10)}" for line in body)}    return {result}
""",
    ]
    return "\n".join(part for part in parts if part).replace("\n\n\n\n", "\n\n\n")


def _described(leaf: Input) -> str:
    shape = shape_text(tuple(map(as_size, leaf.shape)))
    kind = "a CSR matrix, SciPy's or (data, indices, indptr), " if leaf.entries else ""
    return f"{kind}{numpy_dtype(leaf.dtype)} {shape}"


def _helpers(names: set[str]) -> list[str]:
    """The sources of these helpers and of those that they call."""
    functions = {name: f for name, f in vars(helpers).items() if inspect.isfunction(f)}
    sources = {name: inspect.getsource(f).strip() for name, f in functions.items()}
    found: set[str] = set()
    while names - found:
        name = (names - found).pop()
        found.add(name)
        names = names | {other for other in functions if re.search(rf"\b{other}\(", sources[name])}
    return [sources[name] for name in sources if name in found]


def with_comments(lines: list[Line]) -> list[str]:
    """The lines as text, with a comment for each line of the user's program."""
    out: list[str] = []
    last = None
    for name, text, frame in lines:
        if text.startswith(DEF):
            out += text.splitlines()
            last = None
            continue
        if frame is not None and frame != last:
            out.append(f"# {_comment(*frame)}")
            last = frame
        out.append(f"{name} = {text}")
    return out


DEF = "def "  # a line that starts so is a whole function


def _comment(file: str, number: int, function: str) -> str:
    text = linecache.getline(file, number).strip()
    where = f"{os.path.basename(file_name(file))}:{number} ({function})"
    return f"{where}: {text}"[:_WIDTH] if text else where
