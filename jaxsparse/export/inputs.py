"""The input of a written `predict`: the pytree of an example, with names for the sizes that may vary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.sparse import BCOO

from jaxsparse._checks import check_bcoo, message
from jaxsparse.export.sizes import Points, Size


def _is_bcoo(x: Any) -> bool:
    return isinstance(x, BCOO)


@dataclasses.dataclass(frozen=True)
class Input:
    """One array or sparse matrix of the input.

    Attributes:
      path: the Python expression that reads it from x.
      name: a short name.
      shape: ints, and names of sizes that may vary.
      entries: for a sparse matrix, the name of its number of entries.
    """

    path: str
    name: str
    shape: tuple[int | str, ...]
    dtype: Any
    entries: str | None = None


class Inputs:
    """The input of a model.

    Args:
      example: a pytree of arrays and BCOO.
      batch: the argument of `export_numpy`.

    Attributes:
      leaves: the arrays and sparse matrices.
      names: the names of the sizes that may vary.
      points: the sizes at which the model is traced.
    """

    def __init__(self, example: Any, batch: Any) -> None:
        with_paths, self._tree = jax.tree_util.tree_flatten_with_path(example, is_leaf=_is_bcoo)
        specs = _specs(batch, example, [x for _, x in with_paths])
        sizes: dict[str, int] = {}
        self.leaves: list[Input] = []
        for (path, x), spec in zip(with_paths, specs, strict=True):
            text, name = _access(path)
            if _is_bcoo(x):
                check_bcoo("export_numpy", f"example{text[1:]}", x)
            shape = _named(f"example{text[1:]}", x.shape, spec, sizes)
            entries = None
            if _is_bcoo(x):
                entries = f"n_{name}"
                sizes[entries] = x.nse
                if not isinstance(shape[1], int):
                    raise ValueError(message("export_numpy", "batch", "for rows of sparse inputs only", repr(spec)))
            self.leaves.append(Input(text, name, shape, _dtype(x), entries))
        self.names = list(sizes)
        self.points = Points(self.names, [max(n, 3) for n in sizes.values()])

    def arrays_at(self, sizes: Sequence[int]) -> list[Any]:
        """Abstract arrays at given sizes; for a sparse matrix its data, rows and columns."""
        known = dict(zip(self.names, sizes, strict=True))
        out: list[Any] = []
        for leaf in self.leaves:
            if leaf.entries is None:
                shape = tuple(known[n] if isinstance(n, str) else n for n in leaf.shape)
                out.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
            else:
                n = (known[leaf.entries],)
                out += [jax.ShapeDtypeStruct(n, dtype) for dtype in (leaf.dtype, np.int32, np.int32)]
        return out

    def tree_of(self, arrays: Sequence[Any], sizes: Sequence[int]) -> Any:
        """The input whose arrays are those of `arrays_at`."""
        known, remaining, leaves = dict(zip(self.names, sizes, strict=True)), list(arrays), []
        for leaf in self.leaves:
            if leaf.entries is None:
                leaves.append(remaining.pop(0))
            else:
                shape = tuple(known[n] if isinstance(n, str) else n for n in leaf.shape)
                data, rows, columns = remaining.pop(0), remaining.pop(0), remaining.pop(0)
                indices = jax.numpy.stack([rows, columns], axis=1)
                leaves.append(BCOO((data, indices), shape=shape, indices_sorted=True))
        return jax.tree.unflatten(self._tree, leaves)


def as_size(n: int | str) -> Any:
    return Size((((n,), 1),)) if isinstance(n, str) else n


def _dtype(x: Any) -> Any:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or np.dtype(dtype).kind in "OSUMm":
        raise TypeError(message("export_numpy", "example", "made of numbers", f"an array of {dtype}"))
    return jax.dtypes.canonicalize_dtype(dtype)


def _access(path: Sequence[Any]) -> tuple[str, str]:
    """The expression that reads a leaf from x, and a name for the leaf."""
    text, name = "x", ""
    for key in path:
        if isinstance(key, jax.tree_util.DictKey):
            text, name = f"{text}[{_literal(key.key)}]", str(key.key)
        elif isinstance(key, jax.tree_util.SequenceKey):
            text, name = f"{text}[{key.idx}]", f"{name or 'x'}_{key.idx}"
        elif isinstance(key, jax.tree_util.GetAttrKey):
            text, name = f"{text}.{key.name}", key.name
        else:
            must = "made of dictionaries, tuples, lists and dataclasses"
            raise TypeError(message("export_numpy", "example", must, f"a tree with {key!r} in it"))
    return text, "".join(c if c.isalnum() else "_" for c in name) or "x"


def _literal(key: Any) -> str:
    return json.dumps(key) if isinstance(key, str) else repr(key)


def _specs(batch: Any, example: Any, leaves: Sequence[Any]) -> list[str]:
    if isinstance(batch, str) and batch.isidentifier():
        lengths = {np.shape(x)[0] for x in leaves if len(np.shape(x))}
        if len(lengths) > 1:
            got = f"{batch!r} for arrays of {', '.join(map(str, sorted(lengths)))}"
            do = 'Name the sizes, as in batch={"ids": "n", "offsets": "b"}.'
            raise ValueError(message("export_numpy", "batch", "the name of the first size of all inputs", got, do))
        return [f"{batch}, ..." if len(np.shape(x)) else "" for x in leaves]
    try:
        return jax.tree.leaves(jax.tree.broadcast(batch, example, is_leaf=lambda x: _is_bcoo(x) or isinstance(x, str)))
    except ValueError as error:
        must = "a name, or a tree of shapes such as 'b, l', in the structure of the example"
        raise ValueError(message("export_numpy", "batch", must, repr(batch))) from error


def _named(where: str, shape: Sequence[int], spec: Any, sizes: dict[str, int]) -> tuple[int | str, ...]:
    """The shape, with the names of a spec in place of the sizes that may vary."""
    parts = [part.strip() for part in str(spec).split(",") if part.strip()]
    if parts and parts[-1] == "...":
        parts = parts[:-1] + ["_"] * (len(shape) - len(parts) + 1)
    if len(parts) != len(shape) or not all(
        part == "_" or part.isidentifier() or part == str(n) for part, n in zip(parts, shape, strict=True)
    ):
        got = f"{spec!r} for {where} of shape {tuple(shape)}"
        raise ValueError(message("export_numpy", "batch", "shapes of names, numbers, '_' and a last '...'", got))
    out: list[int | str] = []
    for part, n in zip(parts, shape, strict=True):
        is_named = part != "_" and part.isidentifier()
        if is_named and sizes.setdefault(part, int(n)) != n:
            got = f"{part!r} for {sizes[part]} and {n} in {where}"
            raise ValueError(message("export_numpy", "batch", "one name for each size", got))
        out.append(part if is_named else int(n))
    return tuple(out)
