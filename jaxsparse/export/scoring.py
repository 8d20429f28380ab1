"""`export_numpy`: a model as a folder with NumPy source."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._context import one_gather_per_bag
from jaxsparse.data.batch import Batch
from jaxsparse.export import elementwise, indexing, loops, products, reductions, shapes
from jaxsparse.export.flat import DiffersError, Flat, flatten, folded, merged, without_repeats
from jaxsparse.export.inputs import Inputs
from jaxsparse.export.source import CONSTANT, input_lines, needed_input_lines, source_text, stored_arrays, tree_text
from jaxsparse.export.writer import ATOM, UnknownError, Value, Writer, names_in, numpy_dtype
from jaxsparse.ops.rows import is_stored

RULES = elementwise.RULES | shapes.RULES | reductions.RULES | products.RULES | indexing.RULES | loops.RULES


def export_numpy(
    apply_fn: Callable[..., Any], params: Any, example: Any, path: str | os.PathLike[str], batch: Any = "b"
) -> Path:
    """Writes a model as NumPy source: a folder that scores without JAX and without this library.

    `model.py` defines predict(x), with at most one line for each equation of the traced model. Its names are those of
    the parameters, which are .npy files in the folder. These are memory-mapped: only rows that are read come into
    memory. The folder needs Python and NumPy 2.

    The argument of predict has the structure of the example. A sparse input (BCOO) is passed as CSR: a SciPy matrix, a
    tuple (data, indices, indptr), or a dict of these three. 64-bit numbers are accepted for 32-bit ones if they fit.
    The results have the dtypes and, up to rounding, the values of JAX's. A model that computes in bfloat16, which NumPy
    lacks, computes in float32; a bfloat16 table that is read by rows stays 16 bits in its file. Ids outside of a table
    give what JAX gives (NaN, 0, the nearest row). They raise IndexError where the model promises that there are none.

    Both branches of a jax.lax.cond are computed. jax.lax.scan, and what is made of it (fori_loop with a known number of
    steps, map, flax.linen.RNN), is a Python loop. jax.lax.while_loop, random numbers, convolutions and other equations
    without a rule are refused.

    Args:
      apply_fn: apply_fn(params, x) -> an array, or tuples, lists and dicts of arrays.
      params: a pytree of arrays, or an nnx module. Packed tables (`js.pack`) are unpacked. Only arrays that the result
        needs are written.
      example: x of a batch, or the `Batch` itself. Only its structure, shapes and dtypes are used.
      path: the folder, which must not exist.
      batch: a name for the first size of all inputs, which may vary. For several sizes that vary, shapes with names, in
        the structure of the example or a prefix of it: {"ids": "b, l"} for arrays (b, l), "b, ..." if the other sizes
        are those of the example. The number of entries of a sparse input may always vary.

    Returns:
      The folder's path.

    Raises:
      FileExistsError: if `path` exists.
      TypeError: for an equation that cannot be written in NumPy, with its source line; or if the equations depend on
        the sizes.
      ValueError: if `batch` does not fit the example.

    Example:
      >>> import runpy, tempfile, jax.numpy as jnp, jaxsparse as js
      >>> params = {"table": jnp.arange(8.).reshape(4, 2), "head": jnp.array([1., 10.])}
      >>> apply_fn = lambda params, ids: params["table"][ids].mean(1) @ params["head"]
      >>> folder = js.export_numpy(apply_fn, params, jnp.zeros((2, 3), int), tempfile.mkdtemp() + "/model")
      >>> runpy.run_path(str(folder / "model.py"))["predict"]([[0, 1, 2], [3, 3, 3], [0, 0, 0], [1, 1, 1]]).tolist()
      [32.0, 76.0, 10.0, 32.0]
    """
    folder = Path(path)
    if folder.exists():
        do = "Remove it, or write beside it."
        raise FileExistsError(message("export_numpy", "path", "a new folder", f"{folder}, which exists,", do))
    source, arrays = source_and_arrays(apply_fn, params, example, batch)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, x in arrays.items():
            np.save(partial / f"{name}.npy", x)
        (partial / "model.py").write_text(source, encoding="utf-8")
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def source_and_arrays(
    apply_fn: Callable[..., Any], params: Any, example: Any, batch: Any
) -> tuple[str, dict[str, np.ndarray]]:
    """The source of model.py, and the arrays that it loads, by name."""
    inputs = Inputs(example.x if isinstance(example, Batch) else example, batch)
    with_paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_stored)
    leaves = [_jax_array(x) for _, x in with_paths]
    flat, outputs = _traced(apply_fn, leaves, tree, inputs)
    flat.constants |= dict(enumerate(leaves))
    flat = folded(without_repeats(flat))

    writer = Writer(flat, inputs.names, RULES)
    names = _names([path for path, _ in with_paths])
    stored: dict[str, int] = {}  # the numbers of constants, by name
    for number in flat.used_constants():
        name = writer.new_name(names[number] if number < len(names) else CONSTANT)
        stored[name] = number
        value = Value(name, ATOM, flat.shapes[number], flat.dtypes[number], flat.shapes[number])
        value.is_stored = True
        value.rows_as = "bfloat16" if _is_read_as_bits(flat, number) else None
        writer.known(number, value)
    head = input_lines(writer, inputs, len(leaves))
    try:
        writer.write_all(flat.operations)
    except UnknownError as unknown:
        raise TypeError(_refusal(" at ".join(unknown.args))) from None
    try:
        values = [writer.full(writer.value(x)) for x in flat.outputs]
        for value in values:
            numpy_dtype(value.dtype)
    except UnknownError as unknown:
        raise TypeError(_refusal(f"{unknown.args[0]} among its outputs")) from None
    text = tree_text(jax.tree.unflatten(outputs, [value.text for value in values]))
    lines, text = writer.renumbered(writer.needed_lines(text), text)
    needed = set().union(names_in(text), *(names_in(expression) for _, expression, _ in lines))
    arrays, loads = stored_arrays(writer, {name: number for name, number in stored.items() if name in needed})
    return source_text(writer, inputs, [*needed_input_lines(head, needed), *lines], text, values, loads), arrays


def _refusal(what: str) -> str:
    do = "Compute it before or after, outside of the function that is exported."
    return message("export_numpy", "apply_fn", "a function that NumPy can compute", f"one with {what}", do)


def _jax_array(x: Any) -> Any:
    """An array, unpacked if it was packed. Python numbers are returned as they are."""
    if is_stored(x):
        return np.asarray(x)
    if not _jax.is_array_or_number(x):
        raise TypeError(message("export_numpy", "params", "a tree of arrays", f"one with a {type(x).__name__} in it"))
    return x


def _abstract(x: Any) -> Any:
    """The shape and dtype of an array. Python numbers are returned as they are: their dtype is weak."""
    if not hasattr(x, "dtype"):
        return x
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return jax.ShapeDtypeStruct(x.shape, x.dtype if is_key else jax.dtypes.canonicalize_dtype(x.dtype))


def _traced(apply_fn: Callable[..., Any], leaves: list[Any], tree: Any, inputs: Inputs) -> tuple[Flat, Any]:
    """The program, with parameters and then `inputs` as its inputs, and the structure of its output."""
    flats, out_trees = [], []
    for sizes in inputs.points.all:

        def flat_fn(*arrays: Any, sizes: Sequence[int] = sizes) -> list[Any]:
            params = jax.tree.unflatten(tree, arrays[: len(leaves)])
            with one_gather_per_bag():
                out = apply_fn(params, inputs.tree_of(arrays[len(leaves) :], sizes))
            outs, structure = jax.tree.flatten(out)
            out_trees.append(structure)
            return outs

        flats.append(flatten(_jax.trace(flat_fn, *map(_abstract, leaves), *inputs.arrays_at(sizes))))
    try:
        return merged(flats, inputs.points), out_trees[0]
    except DiffersError as differs:
        what, where = differs.args
        got = f"one in which {what} ({where})"
        do = "Give sizes that may not change as numbers in `batch`."
        must = f"the same for every {' and '.join(inputs.names)}"
        raise TypeError(message("export_numpy", "apply_fn", must, got, do)) from None


def _names(paths: Sequence[Any]) -> list[str]:
    """Names of parameters: their paths, without a leading `params` and a trailing `value`."""
    keys = [
        [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path] for path in paths
    ]
    keys = [parts[1:] if parts[:1] == ["params"] and len(parts) > 1 else parts for parts in keys]
    keys = [parts[:-1] if parts[-1:] == ["value"] and len(parts) > 1 else parts for parts in keys]
    return ["_".join(parts) or "params" for parts in keys]


def _is_read_as_bits(flat: Flat, number: int) -> bool:
    """Whether a bfloat16 array is only used by gathers of its rows, converted or not."""
    if flat.dtypes[number] != jnp.bfloat16 or number in flat.outputs:
        return False
    users = [op for op in flat.operations if number in op.inputs]
    converted = [op.outputs[0] for op in users if op.name == "convert_element_type"]
    others = dataclasses.replace(flat, operations=[op for op in flat.operations if op.name != "convert_element_type"])
    return others.is_read_by_rows(number) and all(map(flat.is_read_by_rows, converted))
