"""`jit`: the one word. jax.jit of a train step, on the rows that it reads.

It is `rowwise`, compiled, and what only a compiled call can do: the row ids are looked at on the host before the step
runs. A small program makes them of the batch (`Planned.ids`); NumPy sorts them, and knows how many are distinct and
where in that list each id is. So the step works on as many rows as there are, rounded up to few sizes, and looks no id
up. That needs ids that the host can see: they are made of NumPy arrays, or of arrays on the CPU. Where they are on an
accelerator, nothing is copied to the host: they are sorted there, and the block has as many rows as there are ids. A
batch that carries its distinct ids (`known_ids.py`) needs none of that.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse.ops.rows import is_stored
from jaxsparse.trace.planning import PlannedStep, announce
from jaxsparse.trace.tracing import check_arguments
from jaxsparse.train.device_rows import knows_all
from jaxsparse.train.host_rows import HostRows
from jaxsparse.train.packing import warn_of_copies
from jaxsparse.train.rowwise import evaluate, evaluate_by_ids, on_rows, prepare_step, rowwise

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods


def jit(
    step: Callable[..., Any] | None = None,
    *,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    rows: Any = None,
    **others: Any,
) -> Any:
    """jax.jit for a train step, at the cost of the rows that it reads.

    The step is the one that everybody writes: jax.value_and_grad, any optax transformation, any state. What of the
    state is read by rows (`table[ids]`, jnp.take, nn.Embed, js.embedding_bag) is a table. The step is evaluated on the
    rows of the tables that it reads, and of all that has a row for each of theirs: gradients, the optimizer's slots,
    averages.

    **What changes.** Rows that a batch does not read are left alone, bit for bit, in parameter and slots, as torch's
    SparseAdam leaves them: no momentum, no decay. Otherwise the result is that of jax.jit.

    Norms of gradients and updates are over the rows that are read; so are those of the gradient of a penalty on a whole
    table. Row ids are known before the step runs: what they are made of is computed twice, and if that is the state,
    the host waits for the step before.

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
      donate_argnums, donate_argnames: the arguments that are state, whose memory the results take over: each comes back
        as a part of the output, in the structure that it came in. Do not use them after the call. None: the first one
        that does, and all others that do and have arrays of its shapes, as in step(params, opt_state, batch). Two of
        one structure are told apart by what the outputs are made of; if you name them, they come back in their order.
      static_argnums, static_argnames: as in jax.jit.
      rows: which rows are trained: ids or a mask (num_rows,) if there is one table, or a dictionary of them, whose keys
        are parts of the paths of tables: `rows={"words": new_ids}`. All others keep their bits in parameter and slots,
        and get no gradient.

    Returns:
      A function of the step's arguments that returns what the step returns, with `lower` and `trace` as in jax.jit:
      jax.export takes it. Without step, a decorator.

    Raises:
      ValueError: at the first call, if the step cannot be right on the rows that it reads.
      TypeError: if no argument of donate_argnums is an output; for other options of jax.jit, which
        `jax.jit(js.rowwise(step), ...)` takes.

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
    if others:
        name, value = next(iter(others.items()))
        do = f"If it is one of jax.jit's, write jax.jit(js.rowwise(step), donate_argnums=0, {name}=...)."
        raise TypeError(message("jit", name, "left out", repr(value), do))
    if step is None:
        return functools.partial(
            jit,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            rows=rows,
        )
    donated = None if donate_argnums is None and donate_argnames is None else _sequence(donate_argnums)
    if donate_argnames is not None:
        donated, _ = _both_ways(step, donated or (), _sequence(donate_argnames))
    return JittedStep(step, donated, _sequence(static_argnums), _sequence(static_argnames), rows)


def _sequence(x: Any) -> tuple[Any, ...]:
    return () if x is None else (x,) if isinstance(x, int | str) else tuple(x)


class JittedStep:
    """What `js.jit` returns."""

    def __init__(
        self,
        step: Callable[..., Any],
        donate: tuple[int, ...] | None,
        static: tuple[int, ...],
        static_names: tuple[str, ...],
        rows: Any,
    ) -> None:
        functools.update_wrapper(self, step)
        self._step, self._donate, self._rows = step, donate, rows
        self._static, self._static_names = _both_ways(step, static, static_names)
        self._signature = _signature(step)
        self._programs: dict[Any, _Program] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, program = self._program(args, kwargs)
        if program is None:
            step, args, kwargs, states = self._dynamic(args, kwargs)
            return rowwise(step, state_argnums=states, rows=self._rows)(*args, **kwargs)
        return program(leaves)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def __deepcopy__(self, memo: Any) -> JittedStep:
        return JittedStep(self._step, self._donate, self._static, self._static_names, self._rows)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The program that a call with these arguments, or ones of these shapes, runs, as of a jitted function. Of
        abstract arguments it is the largest one, where all ids are distinct. What it compiles to is called like the
        step."""
        leaves, program = self._program(args, kwargs)
        if program is None:
            step, args, kwargs, states = self._dynamic(args, kwargs)
            return jax.jit(rowwise(step, state_argnums=states, rows=self._rows), donate_argnums=states or ()).lower(
                *args, **kwargs
            )
        lowered, call = program.lower(leaves)
        return Lowered(lowered, lambda compiled, args, kwargs: call(compiled, self._program(args, kwargs)[0]))

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """The step as one function of its arguments, as of a jitted function: jax.export takes it, and it is lowered
        for other platforms than this one. No host looks at its ids: it finds the distinct ones itself."""
        step, dynamic, named, states, _ = self._dynamic_by_position(args, kwargs)
        _, program = self._program(args, kwargs)
        if program is None:
            run = rowwise(step, state_argnums=states, rows=self._rows)
            return jax.jit(run, donate_argnums=states or ()).trace(*dynamic, **named)
        return program.trace(step, dynamic, named)

    def plan(self, *args: Any, **kwargs: Any) -> PlannedStep:
        """What is known of the step for arguments of these shapes, before it runs: for `js.explain`."""
        _, program = self._program(args, kwargs)
        assert program is not None, "not inside of another trace"
        return program.planned

    def _cache_size(self) -> int:
        """How many programs were compiled."""
        return sum(program.cache_size() for program in self._programs.values())

    def _dynamic(self, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any, tuple[int, ...] | None]:
        """The step as a function of what is not static, these arguments, and which of them are state."""
        if not self._static and not self._static_names:
            return self._step, args, kwargs, self._donate
        fixed = {n: x for n, x in enumerate(args) if n in self._static}
        named = {k: x for k, x in kwargs.items() if k in self._static_names}
        kept = [n for n in range(len(args)) if n not in fixed]

        def step(*dynamic: Any, **others: Any) -> Any:
            by_position = fixed | dict(zip(kept, dynamic, strict=True))
            return self._step(*(by_position[n] for n in range(len(by_position))), **others, **named)

        donate = self._donate
        states = None if donate is None else tuple(kept.index(n % len(args)) for n in donate if n % len(args) in kept)
        return step, tuple(args[n] for n in kept), {k: x for k, x in kwargs.items() if k not in named}, states

    def _dynamic_by_position(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any, Any, Any]:
        """As `_dynamic`, what can be given by position being so; and what is static."""
        if kwargs and self._signature is not None:
            try:
                bound = self._signature.bind(*args, **kwargs)
            except TypeError:
                pass  # which the step itself says
            else:
                args, kwargs = bound.args, bound.kwargs
        static: Any = ()
        if self._static or self._static_names:
            static = (
                tuple(x for n, x in enumerate(args) if n in self._static),
                tuple(sorted((k, x) for k, x in kwargs.items() if k in self._static_names)),
            )
        return *self._dynamic(args, kwargs), static

    def _program(self, args: Any, kwargs: Any) -> tuple[list[Any], _Program | None]:
        """The leaves of what is not static, and the program for such leaves: none inside of another trace."""
        step, args, kwargs, states, static = self._dynamic_by_position(args, kwargs)
        leaves, tree = _flatten((args, kwargs))
        if any(map(_jax.is_traced, leaves)):
            return leaves, None
        try:
            kinds = tuple(map(_jax.kind_of_array, leaves))
        except TypeError:
            check_arguments(args, kwargs)
            raise
        key = (tree, static, kinds, _jax.settings())
        program = self._programs.get(key)
        if program is None:
            abstract: Any = jax.tree.map(_jax.abstract, (args, kwargs))
            program = self._programs[key] = _Program(step, abstract[0], abstract[1], states, self._rows)
            program.warn(_jax.platform_of(leaves))
        return leaves, program


def _signature(step: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(step)
    except (TypeError, ValueError):
        return None


def _both_ways(
    step: Callable[..., Any], numbers: tuple[int, ...], names: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Arguments given by position and by name, each also the other way, as in jax.jit."""
    signature = _signature(step)
    if signature is None:
        return numbers, names
    parameters = signature.parameters.values()
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    numbers = tuple(n % len(by_position) if n < 0 else n for n in numbers)
    both = dict.fromkeys((*names, *(by_position[n] for n in numbers if n < len(by_position))))
    return tuple(dict.fromkeys((*numbers, *(by_position.index(k) for k in names if k in by_position)))), tuple(both)


class Lowered:
    """What jax.jit's `lower` returns; what it compiles to is called with the step's arguments."""

    def __init__(self, lowered: Any, call: Callable[..., Any]) -> None:
        self._lowered, self._call = lowered, call

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        return Compiled(self._lowered.compile(*args, **kwargs), self._call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled:
    """What `Lowered.compile` returns."""

    def __init__(self, compiled: Any, call: Callable[..., Any]) -> None:
        self._compiled, self._call = compiled, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._compiled, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


class _Program:
    """A step for arguments of some structure, shapes and dtypes."""

    def __init__(
        self, step: Callable[..., Any], args: Any, kwargs: Any, states: tuple[int, ...] | None, rows: Any
    ) -> None:
        self._prepared = prepare_step(step, args, kwargs, states, rows)
        self.planned = planned = self._prepared.planned
        traced = planned.traced
        announce(planned)
        self._unflatten, self._num_leaves = traced.unflatten, len(traced.leaves)
        self._stored = {i: x for i, x in enumerate(traced.leaves) if is_stored(x)}
        self._donated = sorted(traced.donated)
        self._kept = [i for i in range(len(traced.leaves)) if i not in traced.donated]
        self._used = [i for i, used in enumerate(planned.ids.used[: self._num_leaves]) if used]
        self._knows_all = knows_all(planned, traced.leaves)
        self._host = HostRows(planned)
        self._ids = jax.jit(lambda leaves: self._host.wanted(planned.ids(leaves)))
        # state first: JAX pairs donated arrays with outputs of their shape in order
        self._order = [traced.places[i] for i in self._donated if i in traced.places]
        self._order += [j for j in range(len(traced.program.outputs)) if j not in self._order]
        self._on_host = jax.jit(self._with_rows, donate_argnums=0)
        self._on_device = jax.jit(self._with_ids, donate_argnums=0)

    def warn(self, platform: str) -> None:
        """Warns of what this step costs on this platform."""
        traced = self.planned.traced
        tables = {traced.paths[i]: traced.leaves[i] for i in self.planned.leaves}
        warn_of_copies(traced.name, tables, platform)

    def _with_rows(self, donated: list[Any], kept: list[Any], chosen: Any) -> list[Any]:
        leaves = self._together(donated, kept)
        if chosen is None:
            outs = evaluate_by_ids(self._prepared, leaves)
        else:
            outs = evaluate(self._prepared, leaves, self._host.spaces(*chosen))
        return [outs[j] for j in self._order]

    def _with_ids(self, donated: list[Any], kept: list[Any]) -> list[Any]:
        outs = on_rows(self._prepared, self._together(donated, kept), alone=False)
        return [outs[j] for j in self._order]

    def _together(self, donated: list[Any], kept: list[Any]) -> list[Any]:
        leaves = dict(zip(self._donated, donated, strict=True)) | dict(zip(self._kept, kept, strict=True))
        return [leaves[i] for i in range(self._num_leaves)]

    def _apart(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        kept = [leaves[i] for i in self._kept]
        donated = _jax.without_repeats([leaves[i] for i in self._donated], kept)
        if not self._stored:
            return donated, kept
        return self._as_stored(self._donated, donated), self._as_stored(self._kept, kept)

    def _as_stored(self, numbers: list[int], arrays: list[Any]) -> list[Any]:
        return [
            jax.tree.unflatten(jax.tree.structure(self._stored[i]), [x]) if i in self._stored else x
            for i, x in zip(numbers, arrays, strict=True)
        ]

    def __call__(self, leaves: list[Any]) -> Any:
        used = [leaves[i] for i in self._used]
        donated, kept = self._apart(leaves)
        if self._leaves_ids_to_device(leaves, used):
            outs = self._on_device(donated, kept)
        else:
            chosen = None if self._knows_all else self._host.choose(self._ids(used))
            outs = self._on_host(donated, kept, chosen)
        return self._returned(outs)

    def _leaves_ids_to_device(self, leaves: list[Any], used: list[Any]) -> bool:
        """Whether ids are neither looked at on the host nor known to be all in one place."""
        return not _jax.on_one_device(leaves) or not (self._knows_all or self._host.sees(used))

    def _returned(self, outs: list[Any]) -> Any:
        by_place = dict(zip(self._order, outs, strict=True))
        return self._unflatten([by_place[j] for j in range(len(outs))])

    def lower(self, leaves: list[Any]) -> tuple[Any, Callable[..., Any]]:
        """The program for these leaves, lowered, and a function of it, when it is compiled, and of leaves."""
        used = [leaves[i] for i in self._used]
        donated, kept = self._apart(leaves)
        if self._leaves_ids_to_device(leaves, used):

            def with_ids(compiled: Any, leaves: list[Any]) -> Any:
                return self._returned(compiled(*self._apart(leaves)))

            return self._on_device.lower(donated, kept), with_ids
        if self._knows_all:
            chosen, sizes = None, []
        else:
            abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in used)
            ids = jax.eval_shape(self._ids, used) if abstract else self._ids(used)
            chosen = self._host.most(ids) if abstract else self._host.choose(ids)
            sizes = [x.shape[0] for x in chosen[0]]

        def with_rows(compiled: Any, leaves: list[Any]) -> Any:
            donated, kept = self._apart(leaves)
            used = [leaves[i] for i in self._used]
            chosen = None if self._knows_all else self._host.choose(self._ids(used), sizes)
            return self._returned(compiled(donated, kept, chosen))

        return self._on_host.lower(donated, kept, chosen), with_rows

    def trace(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The step as one jitted function, traced for these arguments."""
        alone = _jax.on_one_device(_flatten((args, kwargs))[0])

        @functools.wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._unflatten(on_rows(self._prepared, _flatten((args, kwargs))[0], alone=alone))

        def is_donated(leaves: Any) -> bool:
            return bool(jax.tree.leaves(leaves)) and set(jax.tree.leaves(leaves)) <= set(self._donated)

        numbers = jax.tree.unflatten(_flatten((args, kwargs))[1], range(self._num_leaves))
        donated = [n for n, leaves in enumerate(numbers[0]) if is_donated(leaves)]
        names = [k for k, leaves in numbers[1].items() if is_donated(leaves)]
        return jax.jit(run, donate_argnums=donated, donate_argnames=names).trace(*args, **kwargs)

    def cache_size(self) -> int:
        programs: list[Any] = [self._on_host, self._on_device]
        return sum(program._cache_size() for program in programs)
