"""`jit`: the one word. jax.jit of a train step, on the rows that it reads.

It is `rowwise`, compiled, and what only a compiled call can do: the row ids are looked at on the host before the step
runs. A small program makes them of the batch (`Planned.ids`); NumPy sorts them, and knows how many are distinct and
where in that list each id is. So the step works on as many rows as there are, rounded up to few sizes, and looks no id
up. That needs ids that the host can see: they are made of NumPy arrays, or of arrays on the CPU. Where they are on an
accelerator, nothing is copied to the host: they are sorted there, and the block has as many rows as there are ids.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _jax
from jaxsparse.rowwise import announce, choose_rows, evaluate, plan_step, reads_of, rowwise, trace_step
from jaxsparse.walk import Path, Space

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods


def jit(
    step: Callable[..., Any] | None = None,
    *,
    donate_argnums: int | Sequence[int] = 0,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
) -> Any:
    """jax.jit for a train step, at the cost of the rows that it reads.

    The step is the one that everybody writes: jax.value_and_grad, any optax transformation, any state. What of the
    state is read by rows (`table[ids]`, jnp.take, nn.Embed, js.embedding_bag) is a table. The step is evaluated on the
    rows of the tables that it reads, and of all that has a row for each of theirs: gradients, the optimizer's slots,
    averages.

    **What changes.** Rows that a batch does not read are left alone, bit for bit, in parameter and slots, as torch's
    SparseAdam leaves them: no momentum, no decay. Otherwise the result is that of jax.jit.

    **What costs as much as a table** all the same is warned of, once for each line: a table that is used as a whole
    (a tied softmax) is dense with its slots, exactly as under jax.jit; noise drawn in a table's shape; a norm of a
    whole parameter.

    **What is refused**, with its line, because it cannot be right for rows that are left alone: sums over all rows that
    scale an update (LAMB, LARS, Adafactor, DoG, DoWG, Prodigy, Muon, adaptive_grad_clip) or that are kept (SM3);
    updates that wait for a later step (MultiSteps, apply_every, lookahead, SAM over two steps: use opaque_mode);
    several steps in one program (make `js.rowwise(step)` the body of the scan); ids made of rows that the step has
    changed.

    Args:
      step: step(state, ...) -> state, or (state, ...), any pytrees.
      donate_argnums: the arguments that are state, whose memory the results take over: each is an output of the step,
        in the structure that it came in. Do not use them after the call.
      static_argnums, static_argnames: as in jax.jit.

    Returns:
      A function of the step's arguments that returns what the step returns, with `lower` as in jax.jit. Without step, a
      decorator.

    Raises:
      ValueError: at the first call, if the step cannot be right on the rows that it reads.
      TypeError: if no argument of donate_argnums is an output.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = optax.adam(0.1)
      >>> @js.jit
      ... def step(state, ids):
      ...     table, opt_state = state
      ...     loss, gradient = jax.value_and_grad(lambda table: jnp.sum(table[ids] ** 2))(table)
      ...     updates, opt_state = tx.update(gradient, opt_state, table)
      ...     return (optax.apply_updates(table, updates), opt_state), loss
      >>> table = jnp.ones((4, 1))
      >>> (table, opt_state), loss = step((table, tx.init(table)), jnp.array([2, 0, 2]))
      >>> [round(x, 4) for x in table.ravel().tolist()], float(loss)
      ([0.9, 1.0, 0.9, 1.0], 3.0)

    References:
      torch.optim.SparseAdam, tf.keras's LazyAdam.
    """
    if step is None:
        return functools.partial(
            jit, donate_argnums=donate_argnums, static_argnums=static_argnums, static_argnames=static_argnames
        )
    return JittedStep(step, _sequence(donate_argnums), _sequence(static_argnums), _sequence(static_argnames))


def _sequence(x: Any) -> tuple[Any, ...]:
    return () if x is None else (x,) if isinstance(x, int | str) else tuple(x)


class JittedStep:
    """What `js.jit` returns."""

    def __init__(
        self, step: Callable[..., Any], donate: tuple[int, ...], static: tuple[int, ...], static_names: tuple[str, ...]
    ) -> None:
        functools.update_wrapper(self, step)
        self._step, self._donate, self._static, self._static_names = step, donate, *_static(step, static, static_names)
        self._programs: dict[Any, _Program] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, program = self._program(args, kwargs)
        if program is None:
            step, args, kwargs, states = self._dynamic(args, kwargs)
            return rowwise(step, state_argnums=states)(*args, **kwargs)
        return program(leaves)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The program that a call with these arguments, or ones of these shapes, runs, as of a jitted function. Of
        abstract arguments it is the largest one, where all ids are distinct."""
        leaves, program = self._program(args, kwargs)
        if program is None:
            step, args, kwargs, states = self._dynamic(args, kwargs)
            return jax.jit(rowwise(step, state_argnums=states), donate_argnums=states).lower(*args, **kwargs)
        return program.lower(leaves)

    def _cache_size(self) -> int:
        """How many programs were compiled."""
        return sum(program.cache_size() for program in self._programs.values())

    def _dynamic(self, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any, tuple[int, ...]]:
        """The step as a function of what is not static, these arguments, and which of them are state."""
        if not self._static and not self._static_names:
            return self._step, args, kwargs, self._donate
        fixed = {n: x for n, x in enumerate(args) if n in self._static}
        named = {k: x for k, x in kwargs.items() if k in self._static_names}
        kept = [n for n in range(len(args)) if n not in fixed]

        def step(*dynamic: Any, **others: Any) -> Any:
            by_position = fixed | dict(zip(kept, dynamic, strict=True))
            return self._step(*(by_position[n] for n in range(len(by_position))), **others, **named)

        states = tuple(kept.index(n % len(args)) for n in self._donate if n % len(args) in kept)
        return step, tuple(args[n] for n in kept), {k: x for k, x in kwargs.items() if k not in named}, states

    def _program(self, args: Any, kwargs: Any) -> tuple[list[Any], _Program | None]:
        """The leaves of what is not static, and the program for such leaves: none inside of another trace."""
        static: Any = ()
        if self._static or self._static_names:
            static = (
                tuple(x for n, x in enumerate(args) if n in self._static),
                tuple(sorted((k, x) for k, x in kwargs.items() if k in self._static_names)),
            )
            step, args, kwargs, states = self._dynamic(args, kwargs)
        else:
            step, states = self._step, self._donate
        leaves, tree = _flatten((args, kwargs))
        if any(map(_jax.is_traced, leaves)):
            return leaves, None
        key = (tree, static, tuple(map(_jax.kind_of_array, leaves)))
        program = self._programs.get(key)
        if program is None:
            abstract = jax.tree.map(_jax.abstract, (args, kwargs))
            program = self._programs[key] = _Program(step, *abstract, states)
        return leaves, program


def _static(step: Callable[..., Any], numbers: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """Static arguments by position and by name, each also the other way, as in jax.jit."""
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        return numbers, names
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    numbers = tuple(n % len(by_position) if n < 0 else n for n in numbers)
    both = dict.fromkeys((*names, *(by_position[n] for n in numbers if n < len(by_position))))
    return tuple(dict.fromkeys((*numbers, *(by_position.index(k) for k in names if k in by_position)))), tuple(both)


class _Program:
    """A step for arguments of some structure, shapes and dtypes."""

    def __init__(self, step: Callable[..., Any], args: Any, kwargs: Any, states: tuple[int, ...]) -> None:
        traced = trace_step(step, args, kwargs, states)
        self.planned = planned = plan_step(traced, traced.leaves)
        announce(planned)
        self._unflatten, self._num_leaves = traced.unflatten, len(traced.leaves)
        self._donated = sorted(traced.donated)
        self._kept = [i for i in range(len(traced.leaves)) if i not in traced.donated]
        self._used = [i for i, used in enumerate(planned.ids.used[: self._num_leaves]) if used]
        self._host = HostRows(planned)
        self._ids = jax.jit(lambda leaves: self._host.wanted(planned.ids(leaves)))
        # state first: JAX pairs donated arrays with outputs of their shape in order
        self._order = [traced.places[i] for i in self._donated if i in traced.places]
        self._order += [j for j in range(len(traced.program.outputs)) if j not in self._order]
        self._on_host = jax.jit(self._with_rows, donate_argnums=0)
        self._on_device = jax.jit(self._with_ids, donate_argnums=0)

    def _with_rows(self, donated: list[Any], kept: list[Any], rows: list[Any], positions: list[Any]) -> list[Any]:
        spaces = self._host.spaces(rows, positions)
        outs = evaluate(self.planned, self._together(donated, kept), spaces)
        return [outs[j] for j in self._order]

    def _with_ids(self, donated: list[Any], kept: list[Any]) -> list[Any]:
        leaves = self._together(donated, kept)
        ids = self.planned.ids([leaves[i] for i in self._used])
        spaces = {c: choose_rows(self.planned, c, ids) for c in self.planned.classes}
        outs = evaluate(self.planned, leaves, spaces)
        return [outs[j] for j in self._order]

    def _together(self, donated: list[Any], kept: list[Any]) -> list[Any]:
        leaves = dict(zip(self._donated, donated, strict=True)) | dict(zip(self._kept, kept, strict=True))
        return [leaves[i] for i in range(self._num_leaves)]

    def _apart(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        return _jax.without_repeats([leaves[i] for i in self._donated]), [leaves[i] for i in self._kept]

    def __call__(self, leaves: list[Any]) -> Any:
        used = [leaves[i] for i in self._used]
        if self._host.sees(used):
            outs = self._on_host(*self._apart(leaves), *self._host.choose(self._ids(used)))
        else:
            outs = self._on_device(*self._apart(leaves))
        by_place = dict(zip(self._order, outs, strict=True))
        return self._unflatten([by_place[j] for j in range(len(outs))])

    def lower(self, leaves: list[Any]) -> Any:
        used = [leaves[i] for i in self._used]
        if not self._host.sees(used):
            return self._on_device.lower(*self._apart(leaves))
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in used)
        rows = self._host.most(jax.eval_shape(self._ids, used)) if abstract else self._host.choose(self._ids(used))
        return self._on_host.lower(*self._apart(leaves), *rows)

    def cache_size(self) -> int:
        return self._on_host._cache_size() + self._on_device._cache_size()


# ---------------------------------------------------------------------------------------------------------------------


class HostRows:
    """The distinct rows of each class, chosen on the host, and where in them each id is.

    The ids come as one array for each different way in which the step makes some, `numbers`, of each class.
    """

    def __init__(self, planned: Any) -> None:
        self._by_class = [(c, num_rows, list(reads_of(planned, c).items())) for c, num_rows in planned.classes.items()]
        self._numbers = list(planned.ids.numbers)
        self._paths: list[list[tuple[Path, int]]] = []  # by class: places of reads, with the array that has their ids
        for c, _, arrays in self._by_class:
            index = {number: i for i, (number, _) in enumerate(arrays)}
            self._paths.append(
                [
                    (read.path, index[number])
                    for read, number in zip(planned.reads, self._numbers, strict=True)
                    if read.path is not None and planned.plan.find(read.node) == c
                ]
            )
        self._can = not planned.plan.axes and not planned.ids.has_effects
        self._sizes: list[list[int]] = [[] for _ in self._by_class]
        self._scratch: dict[int, np.ndarray] = {}

    def sees(self, used: list[Any]) -> bool:
        """Whether ids made of these arrays are to be looked at on the host."""
        return self._can and all(map(_jax.is_on_host, used))

    def wanted(self, ids: list[Any]) -> list[list[Any]]:
        """Of the ids of all reads, each different array once, by class."""
        by_number = dict(zip(self._numbers, ids, strict=True))
        return [[by_number[number] for number, _ in arrays] for _, _, arrays in self._by_class]

    def choose(self, ids: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
        """For each class, its rows: int32 (k,), padded with num_rows, num_rows + 1, ...; and for each array of its ids
        where they are, k for those that are no row."""
        rows, positions = [], []
        for n, ((_, num_rows, arrays), given) in enumerate(zip(self._by_class, ids, strict=True)):
            parts = [np.asarray(x) for x in given]
            unique, outside = _distinct(parts, num_rows, [clipped for _, clipped in arrays])
            size = self._size(n, len(unique), min(sum(x.size for x in parts), num_rows))
            padded = np.arange(num_rows - len(unique), num_rows - len(unique) + size, dtype=np.int32)
            padded[: len(unique)] = unique
            rows.append(padded)
            scratch = self._scratch.setdefault(num_rows, np.empty(num_rows, np.int32))  # of which few pages are used
            scratch[unique] = np.arange(len(unique), dtype=np.int32)
            positions.append([_look_up(scratch, x, size, num_rows if outside else None) for x in parts])
        return rows, positions

    def _size(self, n: int, distinct: int, most: int) -> int:
        """How many rows a block gets: so many and one of padding, few sizes in all, of which each is compiled for."""
        for size in self._sizes[n]:
            if distinct < size <= 1.25 * distinct + 64:
                return size
        grain = max(16, 1 << max(distinct.bit_length() - 4, 0))
        size = min(-(-(distinct + 1 + grain // 2) // grain) * grain, most + 1)
        self._sizes[n] = sorted([*self._sizes[n], size])
        return size

    def most(self, ids: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
        """Abstract results of `choose`, where all ids are distinct."""
        rows = []
        for (_, num_rows, _), given in zip(self._by_class, ids, strict=True):
            size = min(sum(x.size for x in given), num_rows) + 1
            rows.append(jax.ShapeDtypeStruct((size,), jnp.int32))
        return rows, [[jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in given] for given in ids]

    def spaces(self, rows: list[Any], positions: list[list[Any]]) -> dict[int, Space]:
        """What `choose` returned, as the step needs it."""
        out = {}
        for (c, num_rows, _), ids, places, paths in zip(self._by_class, rows, positions, self._paths, strict=True):
            out[c] = Space(ids, num_rows, {path: places[i] for path, i in paths})
        return out


def _distinct(parts: list[np.ndarray], num_rows: int, clipped: list[bool]) -> tuple[np.ndarray, bool]:
    """The distinct rows that ids name, in order, and whether some ids name none. Where they are `clipped`, an id out of
    range names the first or last row."""
    ordered = np.sort(parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts]))
    first, last = np.searchsorted(ordered, [0, num_rows])
    outside = first > 0 or last < len(ordered)
    if outside:
        ends = []
        for x, is_clipped in zip(parts, clipped, strict=True):
            if is_clipped:
                ends += [0] * bool(np.any(x < 0))
                ends += [num_rows - 1] * bool(np.any((x >= num_rows) & (x != np.iinfo(np.int32).max)))
        ordered = np.sort(np.concatenate([ordered[first:last], np.array(ends, np.int32)]))
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new], outside


def _look_up(scratch: np.ndarray, ids: np.ndarray, size: int, num_rows: int | None) -> np.ndarray:
    if num_rows is None:
        return scratch[ids]
    inside = (ids >= 0) & (ids < num_rows)
    return np.where(inside, scratch[np.where(inside, ids, 0)], np.int32(size))
