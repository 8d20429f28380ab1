"""Static checks of arguments, and `message`, which words all errors.

The checks use types, shapes and dtypes only, so they work on tracers and cost nothing on the device. Values are checked
on the host, in `data/inputs.py`.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

# Row ids are int32. A block of k rows pads its ids with num_rows, num_rows + 1, ...
MAX_ROWS = 2**31 - 1

_HERE = os.path.dirname(__file__) + os.sep
_LIBRARIES = re.compile(r"[/\\\\](jax|jaxlib|flax|optax|chex|equinox|haiku|contextlib\.py|functools\.py)([/\\\\]|$)")


def message(function: str, argument: str, must: str, got: object, do: str = "") -> str:
    """An error message: the argument, what it must be, what it was, and what to do."""
    return f"The '{argument}' argument of js.{function} must be {must}. Got {got} instead.{' ' + do if do else ''}"


def is_library(file: str) -> bool:
    """Whether a source file belongs to this library, or to a library between it and the user's code, such as JAX."""
    return file.startswith(_HERE) or _LIBRARIES.search(file) is not None


def warn(text: str, kind: type[Warning] = UserWarning) -> None:
    """Warns at the user's line: the innermost frame outside of the libraries."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and is_library(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, kind, stacklevel=level)


def check_transformation(function: str, argument: str, x: Any) -> None:
    """Raises TypeError unless `x` is an optax transformation."""
    if not (callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))):
        do = "Call it, optax.adam(1e-3) say." if callable(x) else ""
        raise TypeError(message(function, argument, "an optax transformation, as of optax.adam(1e-3)", repr(x), do))


def chosen_paths(
    function: str, tables: Any, paths: Sequence[str], leaves: Sequence[Any], argument: str = "tables"
) -> list[bool]:
    """Whether `tables` selects each leaf: by a part of its path, a list of parts, or a function of (path, leaf)."""
    if callable(tables):
        return [bool(tables(path, leaf)) for path, leaf in zip(paths, leaves, strict=True)]
    names = [tables] if isinstance(tables, str) else tables
    for name in names:
        if not any(name in path for path in paths):
            raise ValueError(message(function, argument, f"parts of the paths {list(paths)}", repr(name)))
    return [any(name in path for name in names) for path in paths]


def as_ids(function: str, argument: str, ids: Any) -> jax.Array:
    """`ids` as an array of integers.

    Raises:
      TypeError: for any other dtype.
      ValueError: for lists of different lengths.
      OverflowError: if NumPy ids do not fit JAX's widest enabled integer. JAX would keep the lower 32 bits without a
        warning (jax#18385), so 2**32 would become row 0.
    """
    if not isinstance(ids, jax.Array):
        ids = _as_numpy(function, argument, ids)
        if ids.size == 0 and ids.dtype == np.float64:  # np.asarray([])
            ids = ids.astype(np.int32)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            message(
                function,
                argument,
                "an integer array",
                f"{argument}.dtype={ids.dtype!r}",
                f"Cast it: {argument}.astype('int32').",
            )
        )
    if isinstance(ids, np.ndarray) and ids.size:
        limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(ids.dtype))
        flat = ids.reshape(-1)
        for at in (int(flat.argmax()), int(flat.argmin())):
            if not limits.min <= int(flat[at]) <= limits.max:
                raise OverflowError(
                    message(
                        function,
                        argument,
                        f"at most {limits.max}",
                        f"{flat[at]} at position {at}",
                        "Switch on jax_enable_x64.",
                    )
                )
    return jnp.asarray(ids)


def _as_numpy(function: str, argument: str, ids: Any) -> np.ndarray:
    try:
        return np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        do = "Pad them, as js.batches does, or give one list of all ids with offsets= or segment_ids=."
        raise ValueError(message(function, argument, "an array", "lists of different lengths", do)) from error


def check_float(function: str, argument: str, x: Any) -> None:
    """Raises TypeError unless `x` has a floating dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(message(function, argument, "a floating-point array", f"{x.dtype=}"))


def check_table(function: str, table: Any) -> None:
    """Raises unless `table` is a floating array of shape (num_rows, ...) whose rows int32 ids can address."""
    if table.ndim < 1:
        raise ValueError(message(function, "table", "an array of shape (num_rows, ...)", f"{table.shape=}"))
    check_float(function, "table", table)
    check_num_rows(function, "table", table.shape[0])


def check_num_rows(function: str, argument: str, num_rows: int) -> None:
    """Raises ValueError if int32 ids cannot address `num_rows` rows."""
    if not 0 <= num_rows < MAX_ROWS:
        raise ValueError(
            message(function, argument, f"fewer than {MAX_ROWS} rows", num_rows, "Split it into several tables.")
        )


def check_choice(function: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(message(function, argument, "one of " + ", ".join(map(repr, choices)), repr(value)))


def check_bcoo(function: str, argument: str, x: Any, ndims: tuple[int, ...] = (2,)) -> None:
    """Raises unless `x` is a BCOO whose dimensions are all sparse, with a number of them in `ndims`."""
    if not isinstance(x, BCOO):
        raise TypeError(
            message(
                function,
                argument,
                "a BCOO or a dense array",
                type(x).__name__,
                "Make one of a SciPy matrix: js.from_scipy(x).",
            )
        )
    if x.n_batch or x.n_dense or x.ndim not in ndims:
        raise ValueError(
            message(
                function,
                argument,
                f"a BCOO of {' or '.join(map(str, ndims))} sparse dimensions and no others",
                f"n_batch={x.n_batch}, n_sparse={x.n_sparse}, n_dense={x.n_dense}",
                "Use jax.vmap over batch dimensions.",
            )
        )


def _is_module(x: Any) -> bool:
    nnx: Any = sys.modules.get("flax.nnx")  # if nnx is not imported, there are no modules
    return nnx is not None and isinstance(x, nnx.Pytree)


def check_no_modules(function: str, argument: str, tree: Any) -> None:
    """Raises TypeError if a tree contains an nnx module.

    JAX would flatten the module and rebuild a copy: a shared variable would become two, and changes in a call would be
    lost.
    """
    for path, module in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_module)[0]:
        if _is_module(module):
            leaves = jax.tree_util.tree_flatten_with_path(module)[0]
            integers = [at for at, x in leaves if not jnp.issubdtype(jnp.result_type(x), jnp.floating)]
            at = next(iter(integers + [at for at, _ in leaves]), ())
            name = jax.tree_util.keystr((*path[1:], *at)).removesuffix(".value")
            got = f"a {type(module).__name__}, whose leaf {name} {'is no parameter' if integers else 'is in a module'},"
            do = "Use js.nnx.value_and_grad, js.nnx.grad and js.nnx.explain for nnx modules."
            raise TypeError(message(function, argument, "arguments that are arrays or trees of them", got, do))


class Modules:
    """The nnx modules among some arguments, and their arrays before a call.

    Args:
      tree: the arguments of the call.
    """

    def __init__(self, tree: Any) -> None:
        self._modules = [x for x in jax.tree.leaves(tree, is_leaf=_is_module) if _is_module(x)]
        self._before = list(map(jax.tree.leaves, self._modules))

    def check_unchanged(self, function: str) -> None:
        """Raises TypeError if the call has changed a module: the change would be lost."""
        for module, before in zip(self._modules, self._before, strict=True):
            after = jax.tree_util.tree_flatten_with_path(module)[0]
            is_unchanged = len(after) == len(before) and all(x is y for (_, x), y in zip(after, before, strict=True))
            if not is_unchanged:
                changed = [jax.tree_util.keystr(path) for path, x in after if not any(x is y for y in before)]
                got = f"one that changes {', '.join(changed[:3])} of its {type(module).__name__}, which would be lost,"
                do = "Use js.nnx.jit, which keeps what changes in modules."
                raise TypeError(message(function, "function", "one that changes no module that it is given", got, do))
