"""Changes the number or the order of a table's rows, between two steps: `grow`, `shrink`, `remap`.

A state goes in; a state comes out in which the table, its slots and its copies have the new rows. The slots are not
guessed from shapes: the optimizer's `init` is evaluated abstractly for two numbers of rows, and slots are the arrays
whose first axis follows. New rows of a slot start from what `init` gives them. Only the stamps of replaying optimizers
start from the present step: a row misses no step before it exists.

One program makes all arrays. It gathers a few rows at a time from the old arrays and scatters them into the new ones,
as a step does, so that arrays that are split over a mesh stay split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import check_num_rows, check_table, chosen_paths, message
from jaxsparse._jax import is_traced
from jaxsparse.ops.rows import check_arrays, gather_rows, scatter_rows
from jaxsparse.optim.replaying import replay_states
from jaxsparse.parallel.collectives import in_auto_mode
from jaxsparse.train.refresh import split_state

# their stubs give a tree definition no methods
_flatten: Any = jax.tree.flatten
_flatten_with_path: Any = jax.tree_util.tree_flatten_with_path
_structure: Any = jax.tree.structure

_CHUNK = 1 << 18  # elements of an array that are copied at a time


def grow(
    state: Any,
    table: str | Sequence[str] | Callable[[str, Any], bool],
    num_rows: int,
    *,
    init: Any,
    key: Any = None,
    copies: str | Sequence[str] | Callable[[str, Any], bool] | None = None,
    tx: Any = None,
) -> Any:
    """Adds rows to a table, as if they had been there from the start and no batch had named them.

    The new rows come after the old ones, in the table and in all arrays of the optimizer that have a row for each row
    of the table: moments, accumulators, stamps. Old rows keep their values. Counters go on: bias correction counts
    updates, as for any row that is first touched late. With untouched="replay" the new rows are up to date, so that
    they do not move or decay for steps before they existed. The old rows need no js.flush.

    Call it between two steps, outside of jit. The next step compiles for the new shapes. Flax modules must be given the
    new number (num_embeddings=num_rows), and so must js.batches(num_rows=). The cost is that of a few dense steps, and
    memory for the old and the new arrays.

    Args:
      state: a TrainState, or another object with params, opt_state and replace, or a pair (params, opt_state), or a
        dictionary with these names. It is not donated, but both states share the arrays that do not belong to the
        table: do not use the old state after a step from the new one.
      table: the parameter: a part of its path, as jax.tree_util.keystr writes it, that no other path has. A list of
        such parts, or a function of (path, leaf), names several tables with the same number of rows.
      num_rows: the new number of rows, at least the old one. If rows are split over devices, a multiple of the number
        of devices (js.padded_rows). Rows of zeros that js.shard_rows has added are old rows: js.remap makes new ones
        of them.
      init: the new rows: a number, one row, an array (number of new rows, ...), or a function init(key, shape, dtype)
        as in jax.nn.initializers, where `shape` is that of the new rows. They are cast to the table's dtype.
      key: a jax.random key, if `init` is a function.
      copies: which other parts of the state, with the structure and shapes of params, are copies of the parameters:
        averages, target networks. Parts of their paths, or a function of (path, subtree). Copies get the new rows of
        the table. None if there are no such parts. A part that started from zeros (a sum of gradients, an average with
        bias correction) is no copy: take it out of the state and add zeros, or keep it in the optimizer (optax.ema),
        whose init gives its new rows. Any other array, such as counts of visits, stays as it is.
      tx: the optimizer whose state is in `state`; state.tx by default.

    Returns:
      The state, of the same kind. Each array keeps its sharding.

    Raises:
      TypeError: if `state` is of another kind, or tx, or a key for a function, is missing.
      ValueError: if `table` does not name one table; if there would be fewer rows; if `init` has another shape; if the
        devices cannot have equally many rows; if opt_state is not of tx; if tx has arrays that depend on the number of
        rows in another way than by row; or if parts of the state look like copies that `copies` does not name.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> from flax.training.train_state import TrainState
      >>> params = {"words": jnp.ones((2, 3)), "head": jnp.ones(3)}
      >>> state = TrainState.create(apply_fn=None, params=params, tx=js.lazy_adagrad(0.1))
      >>> state = js.grow(state, "words", 4, init=jax.nn.initializers.normal(0.02), key=jax.random.key(0))
      >>> [x.shape for x in jax.tree.leaves(state.params)]
      [(3,), (4, 3)]
      >>> state.opt_state[0].sum_of_squares["words"][:, 0].tolist() == 4 * [jnp.float32(0.1)]
      True
    """
    resize = _Resize("grow", "num_rows", state, table, tx)
    if num_rows < resize.num_rows:
        must = f"at least the table's number of rows, {resize.num_rows}"
        raise ValueError(message("grow", "num_rows", must, num_rows, "js.shrink leaves rows out."))
    return resize.state_with(num_rows, None, num_rows - resize.num_rows, init, key, copies)


def shrink(
    state: Any, table: str | Sequence[str] | Callable[[str, Any], bool], num_rows: int, *, tx: Any = None
) -> Any:
    """Removes the last rows of a table and of its slots. Otherwise as `js.grow`.

    Args:
      state, table, tx: as in `js.grow`.
      num_rows: the number of rows to keep, at least 1. If rows are split over devices, a multiple of the number of
        devices.

    Returns:
      The state, of the same kind. Copies of params in it lose the same rows.

    Raises:
      TypeError, ValueError: as js.grow; and if there would be more rows, or none.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx, table = optax.sgd(0.1, momentum=0.9), jnp.array([[1.], [2.], [3.]])
      >>> table, opt_state = js.shrink((table, tx.init(table)), "", 2, tx=tx)
      >>> table.ravel().tolist(), opt_state[0].trace.shape
      ([1.0, 2.0], (2, 1))
    """
    resize = _Resize("shrink", "num_rows", state, table, tx)
    if not 0 < num_rows <= resize.num_rows:
        must = f"at least 1 and at most the table's number of rows, {resize.num_rows}"
        raise ValueError(message("shrink", "num_rows", must, num_rows, "js.grow adds rows."))
    return resize.state_with(num_rows, None, 0)


def remap(
    state: Any,
    table: str | Sequence[str] | Callable[[str, Any], bool],
    new_ids: Any,
    *,
    init: Any = None,
    key: Any = None,
    copies: str | Sequence[str] | Callable[[str, Any], bool] | None = None,
    tx: Any = None,
) -> Any:
    """Selects and reorders the rows of a table: row i becomes the old row new_ids[i], or a new row where that is -1.

    It sorts rows by frequency, drops rows, or replaces rows by new ones. Slots and new rows are as in `js.grow`.

    Args:
      state, table, key, copies, tx: as in `js.grow`.
      new_ids: integers in [-1, number of rows), of shape (new number of rows,), on the host. A row that is named more
        than once is copied with its slots.
      init: the new rows, in the order of the -1, as in `js.grow`. Required if there are any.

    Returns:
      The state, of the same kind.

    Raises:
      TypeError, ValueError: as js.grow; and if new_ids are not such integers.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax, jaxsparse as js
      >>> tx, table = optax.adam(0.1), jnp.array([[1.], [2.], [3.]])
      >>> state = js.remap((table, tx.init(table)), "", [2, -1, 0, 0], init=9.0, tx=tx)
      >>> state[0].ravel().tolist()
      [3.0, 9.0, 1.0, 1.0]

      Ids that js.spread_ids has renamed have other names in a larger table, here with 5 rows instead of 3 on 2 devices:

      >>> old, new = js.spread_ids(np.arange(3), 3, 2), js.spread_ids(np.arange(5), 5, 2)
      >>> new_ids = np.full(js.padded_rows(5, 2), -1)
      >>> new_ids[new[:3]] = old
      >>> new_ids.tolist()
      [0, 1, -1, 2, -1, -1]
    """
    resize = _Resize("remap", "new_ids", state, table, tx)
    ids, must = np.asarray(new_ids), f"integers in [-1, {resize.num_rows}), of shape (new number of rows,)"
    if not np.issubdtype(ids.dtype, np.integer):
        do = "Make them of a mask by np.flatnonzero." if ids.dtype == bool else ""
        raise TypeError(message("remap", "new_ids", must, f"{ids.dtype} of shape {ids.shape}", do))
    if ids.ndim != 1 or not ids.size:
        raise ValueError(message("remap", "new_ids", must, f"shape {ids.shape}"))
    if not -1 <= ids.min() <= ids.max() < resize.num_rows:
        raise ValueError(message("remap", "new_ids", must, f"{ids.min()} to {ids.max()}"))
    num_new = int(np.sum(ids < 0))
    if num_new and init is None:
        raise ValueError(message("remap", "init", f"given, for {num_new} new rows (-1 in new_ids)", None))
    return resize.state_with(len(ids), ids.astype(np.int32), num_new, init, key, copies)


class _Part(NamedTuple):
    """An array with the table's rows: the number of its leaf in the state, and which slot or table it is."""

    leaf: int
    slot: int | None = None  # the number of the leaf of tx.init
    table: int | None = None  # the number of the leaf of params, for a table or a copy of one
    steps: int | None = None  # for stamps: the leaf of the state with the present step


class _Resize:
    """The leaves of a state, and which of them have the rows of a table.

    Args:
      function, argument: names for messages: the function, and its argument with the new rows.
      state, table, tx: as in `grow`.
    """

    def __init__(self, function: str, argument: str, state: Any, table: Any, tx: Any) -> None:
        check_arrays(function, state)
        self._function, self._argument = function, argument
        self._leaves, self._tree = _flatten(state)
        # trees whose leaves are the numbers of the leaves
        self._numbers = self._tree.unflatten(range(len(self._leaves)))
        self._params, self._opt_state, _ = split_state(self._numbers, function)
        self._tx: Any = getattr(state, "tx", None) if tx is None else tx
        if self._tx is None:
            raise TypeError(message(function, "tx", "the optimizer, for a state without tx", None, "Pass tx=."))
        self._of_params, self._definition = _flatten(self._params)
        self._tables = self._find_tables(table)
        for i in self._tables:
            check_table(function, self._param(i))
        heights = {self._param(i).shape[0] for i in self._tables}
        if len(heights) > 1:
            raise ValueError(message(function, "table", "tables of one height", f"heights {sorted(heights)}"))
        self.num_rows = heights.pop()

    def _param(self, i: int) -> Any:
        return self._leaves[self._of_params[i]]

    def _find_tables(self, table: Any) -> list[int]:
        paths = [jax.tree_util.keystr(path) for path, _ in _flatten_with_path(self._params)[0]]
        values = [self._leaves[n] for n in self._of_params]
        found: list[int] = []
        for name in [table] if isinstance(table, str) or callable(table) else table:
            flags = chosen_paths(self._function, name, paths, values, "table")
            meant = [i for i, flag in enumerate(flags) if flag]
            if not meant or (len(meant) > 1 and not callable(name)):
                got = f"{name!r}, which is in {[paths[i] for i in meant]}"
                do = "Name more of the path; several tables whose rows go together are a list of such names."
                raise ValueError(message(self._function, "table", f"a part of one of the paths {paths}", got, do))
            found += [i for i in meant if i not in found]
        return found

    def state_with(
        self, num_rows: int, ids: np.ndarray | None, num_new: int, init: Any = None, key: Any = None, copies: Any = None
    ) -> Any:
        """The state with `num_rows` rows: those of `ids`, or all in their order, `num_new` of them being new."""
        if ids is None and num_rows == self.num_rows:
            return self._tree.unflatten(self._leaves)
        check_num_rows(self._function, self._argument, num_rows)
        parts = self._find_slots(num_rows) + self._find_copies(num_new, copies)
        parts += [_Part(self._of_params[i], table=i) for i in self._tables]
        old = [self._leaves[part.leaf] for part in parts]
        shardings = [self._check_sharding(x, num_rows) for x in old]
        rows = {i: self._new_rows(self._param(i), num_new, init, key) for i in self._tables} if num_new else {}
        new_at = np.arange(num_rows - num_new, num_rows) if ids is None else np.flatnonzero(ids < 0)
        steps = {part.steps: self._leaves[part.steps] for part in parts if part.steps is not None}
        params = [self._leaves[n] for n in self._of_params]

        def make(old: list[Any], params: list[Any], rows: dict[int, Any], steps: dict[int, Any], ids: Any) -> Any:
            made = self._initial_arrays(parts, old, num_rows, params, rows, steps, new_at.astype(np.int32))
            return _with_old_rows(made, old, num_rows, ids), ()

        run = jax.jit(lambda *args: in_auto_mode(make, *args)[0], out_shardings=shardings)
        leaves = list(self._leaves)
        for part, x in zip(parts, run(old, params, rows, steps, ids), strict=True):
            leaves[part.leaf] = x
        return self._tree.unflatten(leaves)

    def _initial_arrays(
        self, parts: list[_Part], old: list[Any], num_rows: int, params: list[Any], rows: Any, steps: Any, at: Any
    ) -> list[Any]:
        """New arrays for all parts. Only their new rows, which are at the positions `at`, have values yet."""
        params = list(params)
        for i in self._tables:
            made = jnp.zeros((num_rows, *params[i].shape[1:]), params[i].dtype)
            params[i] = scatter_rows(made, at, rows[i]) if rows else made
        slots = jax.tree.leaves(self._tx.init(self._definition.unflatten(params)))

        def start(part: _Part, x: Any) -> Any:
            if part.steps is not None:
                return jnp.full((num_rows,), steps[part.steps], x.dtype)
            return (params[part.table] if part.slot is None else slots[part.slot]).astype(x.dtype)  # type: ignore[index]

        return [start(part, x) for part, x in zip(parts, old, strict=True)]

    def _find_slots(self, num_rows: int) -> list[_Part]:
        """The leaves of opt_state that have the table's rows."""
        other_height = num_rows if num_rows != self.num_rows else num_rows + 1
        before, after = (self._abstract_slots(height) for height in (self.num_rows, other_height))
        numbers = jax.tree.leaves(self._opt_state)
        state_shapes = [jnp.shape(self._leaves[n]) for n in numbers]
        if [x.shape for x in jax.tree.leaves(before)] != state_shapes:
            must = "the optimizer whose state is in 'state', with the same settings"
            raise ValueError(message(self._function, "tx", must, "one whose state has other shapes than opt_state"))
        must, do = "an optimizer that keeps its state by row", "Make a new state: tx.init(params)."
        if _structure(before) != _structure(after):
            got = f"one whose state has another structure for {other_height} rows than for {self.num_rows}"
            raise ValueError(message(self._function, "tx", must, got, do))
        stamps: dict[Any, Any] = {
            stamp.rows: state.steps
            for state in replay_states(self._opt_state)
            for stamp in (state.plain | state.decayed).values()
        }
        parts, flat = [], zip(numbers, _flatten_with_path(before)[0], jax.tree.leaves(after), strict=True)
        for slot, (number, (path, x), y) in enumerate(flat):
            if x.shape == y.shape:
                continue
            if (x.shape[:1], y.shape[:1]) != ((self.num_rows,), (other_height,)) or x.shape[1:] != y.shape[1:]:
                name = jax.tree_util.keystr(path)
                got = f"one with {name} of shape {x.shape}, and of shape {y.shape} for {other_height} rows"
                raise ValueError(message(self._function, "tx", must, got, do))
            parts.append(_Part(number, slot=slot, steps=stamps.get(number)))
        return parts

    def _abstract_slots(self, num_rows: int) -> Any:
        shapes = [
            jax.ShapeDtypeStruct((num_rows, *x.shape[1:]) if i in self._tables else jnp.shape(x), jnp.result_type(x))
            for i, x in enumerate(self._leaves[n] for n in self._of_params)
        ]
        return jax.eval_shape(self._tx.init, self._definition.unflatten(shapes))

    def _find_copies(self, num_new: int, copies: Any) -> list[_Part]:
        """The copies of the tables, in parts of the state with the structure and shapes of params."""
        like = lambda node: _structure(node) == self._definition  # noqa: E731
        params_and_slots = {*self._of_params, *jax.tree.leaves(self._opt_state)}
        shapes = [jnp.shape(self._leaves[n]) for n in self._of_params]
        found = []
        for path, node in _flatten_with_path(self._numbers, is_leaf=like)[0]:
            numbers = jax.tree.leaves(node)
            same_shapes = [jnp.shape(self._leaves[n]) for n in numbers] == shapes
            if like(node) and same_shapes and not params_and_slots & {*numbers}:
                found.append((jax.tree_util.keystr(path), numbers))
        paths = [path for path, _ in found]
        named = [False] * len(found) if copies is None else chosen_paths(self._function, copies, paths, found, "copies")
        unnamed = [path for path, is_named in zip(paths, named, strict=True) if not is_named]
        if num_new and unnamed:
            must = f"parts of the paths {paths}, which look like copies of params"
            do = "Their new rows are the table's. Take out of the state what is something else (sums of gradients)."
            raise ValueError(message(self._function, "copies", must, f"{copies!r}, without {unnamed}", do))
        return [_Part(numbers[i], table=i) for _, numbers in found for i in self._tables]

    def _check_sharding(self, x: Any, num_rows: int) -> Any:
        """The sharding of an array like x with this many rows; None for a single device."""
        sharding = None if is_traced(x) else getattr(x, "sharding", None)
        if sharding is None or len(sharding.device_set) == 1:
            return None
        parts = x.shape[0] // sharding.shard_shape(x.shape)[0]
        if num_rows % parts:
            do = f"Make it js.padded_rows({num_rows}, {parts}) = {-(-num_rows // parts) * parts}."
            got = f"{num_rows} rows"
            must = f"for a multiple of {parts} rows, which are split over as many devices"
            raise ValueError(message(self._function, self._argument, must, got, do))
        return sharding

    def _new_rows(self, table: Any, num_new: int, init: Any, key: Any) -> Any:
        shape, row = (num_new, *table.shape[1:]), table.shape[1:]
        if callable(init):
            if key is None:
                raise TypeError(message(self._function, "key", "a jax.random key, for a function init", None))
            made = init(key, shape, table.dtype)
        else:
            made = jnp.asarray(init)
        if made.shape not in ((), row, shape):
            must = f"a number, a row of shape {row}, or new rows of shape {shape}"
            raise ValueError(message(self._function, "init", must, f"shape {made.shape}"))
        return jnp.broadcast_to(made.astype(table.dtype).reshape((1,) * (len(shape) - made.ndim) + made.shape), shape)


def _with_old_rows(new: list[Any], old: list[Any], num_rows: int, ids: Any) -> list[Any]:
    """`new` with row i replaced by row ids[i] of `old`, unless ids[i] is negative. If ids is None, ids[i] is i."""
    before, widest = old[0].shape[0], max(math.prod(x.shape[1:]) for x in old)
    size = min(num_rows, max(1, _CHUNK // max(1, widest)))

    def body(i: jax.Array, new: list[Any]) -> list[Any]:
        targets = i * size + jnp.arange(size, dtype=jnp.int32)
        source = targets if ids is None else ids.at[targets].get(mode="fill", fill_value=-1)
        targets = jnp.where((source >= 0) & (source < before), targets, -1 - targets)
        return [scatter_rows(n, targets, gather_rows(x, source)) for n, x in zip(new, old, strict=True)]

    return jax.lax.fori_loop(0, -(-num_rows // size), body, new)
