"""`jit`: the one word. jax.jit of a train step, on the rows that it reads.

It is `rowwise`, compiled, with one thing more: the row ids are read on the host before the step runs. They are made
from the batch, by NumPy where it can (`numpy_ids.py`), otherwise by a small program. NumPy sorts them, counts the
distinct ones and finds each id among them. So the step works on the distinct rows, their number rounded up to one of
few sizes, and searches no ids. That needs ids that the host can read: made of NumPy arrays, or of arrays on the CPU. On
a GPU, and if ids are on another accelerator, nothing is read on the host: the ids are sorted on the device, and the
block has as many rows as there are ids. A batch that carries its distinct ids (`known_ids.py`) needs none of this.
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
from jaxsparse.trace.planning import PlannedStep
from jaxsparse.trace.tracing import check_arguments
from jaxsparse.train.program import Lowered, StepProgram
from jaxsparse.train.rowwise import rowwise

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
    table. Row ids are computed once more before the step runs. If they are made from the state, the host waits for the
    previous step.

    Within jax.set_mesh of a mesh with Explicit axes the step is traced as on one of Auto axes: arrays keep the
    shardings that they have, and the step names none (out_sharding=, jax.sharding.reshard).

    **What costs as much as a table** all the same is warned of, once for each line: a table that is used as a whole
    (a tied softmax) is dense with its slots, exactly as under jax.jit; a table of 65,536 rows or more that no ids read
    where they might (`jax.nn.one_hot(ids, V) @ table`); noise drawn in a table's shape; a norm of a whole parameter.

    **What is refused**, with its line, because it cannot be right for rows that are left alone: sums over all rows that
    scale an update (LAMB, LARS, Adafactor, DoG, DoWG, Prodigy, Muon, adaptive_grad_clip) or that are kept (SM3);
    updates that wait for a later step (MultiSteps, apply_every, lookahead, SAM over two steps: use opaque_mode);
    several steps in one program (make `js.rowwise(step)` the body of the scan); ids made of rows that the step has
    changed.

    Args:
      step: step(state, ...) -> state, or (state, ...), any pytrees.
      donate_argnums, donate_argnames: the arguments that are state, whose memory the results take over: each comes back
        as a part of the output, in the structure that it came in. Do not use them after the call. None: the first
        argument that comes back, and all others that come back and have arrays of its shapes, as in step(params,
        opt_state, batch). Two of one structure are told apart by what the outputs are made of; if you name them, they
        come back in their order.
        (): the state is found as with None, but not donated. It stays usable, and each step copies its tables, with
        a warning that says how large they are.
      static_argnums, static_argnames: as in jax.jit.
      rows: which rows are trained: ids or a mask (num_rows,) if there is one table, or a dictionary of them, whose keys
        are parts of the paths of tables: `rows={"words": new_ids}`. All other rows keep their bits in parameter and
        slots, and get no gradient.

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
    donated = None if donate_argnums is None and donate_argnames is None else sequence(donate_argnums)
    if donate_argnames is not None:
        donated, _ = _both_ways(step, donated or (), sequence(donate_argnames))
    keeps = donated == ()
    return JittedStep(
        step, None if keeps else donated, sequence(static_argnums), sequence(static_argnames), rows, keeps=keeps
    )


def sequence(x: Any) -> tuple[Any, ...]:
    """Numbers or names of arguments as a tuple; given one, several or None."""
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
        *,
        keeps: bool = False,
    ) -> None:
        functools.update_wrapper(self, step)
        self._step, self._donate, self._rows, self._keeps = step, donate, rows, keeps
        self._static, self._static_names = _both_ways(step, static, static_names)
        self._signature = _signature(step)
        self._programs: dict[Any, StepProgram] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, program = self._program(args, kwargs)
        if program is None:
            step, args, kwargs, states = self._dynamic(args, kwargs)
            return rowwise(step, state_argnums=states, rows=self._rows)(*args, **kwargs)
        return program(leaves)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def __deepcopy__(self, memo: Any) -> JittedStep:
        return JittedStep(self._step, self._donate, self._static, self._static_names, self._rows, keeps=self._keeps)

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
        """The plan of the step for arguments of these shapes, before it runs: for `js.explain`."""
        _, program = self._program(args, kwargs)
        assert program is not None, "not inside of another trace"
        return program.planned

    def donated(self, *args: Any, **kwargs: Any) -> set[int]:
        """Which leaves of these arguments are donated."""
        return set() if self._keeps else self.plan(*args, **kwargs).traced.donated

    def _cache_size(self) -> int:
        """How many programs were compiled."""
        return sum(program.cache_size() for program in self._programs.values())

    def _dynamic(self, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any, tuple[int, ...] | None]:
        """(the step as a function of the non-static arguments, those arguments, which of them are state)."""
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
        """Like `_dynamic`, with arguments given by position where possible; and the static ones."""
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

    def _program(self, args: Any, kwargs: Any) -> tuple[list[Any], StepProgram | None]:
        """(the leaves of the non-static arguments, the program for them). The program is None inside another trace."""
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
            program = self._programs[key] = StepProgram(
                step, abstract[0], abstract[1], states, self._rows, keeps=self._keeps
            )
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
    """Static or donated arguments by position and by name; each is completed from the other, as in jax.jit."""
    signature = _signature(step)
    if signature is None:
        return numbers, names
    parameters = signature.parameters.values()
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    numbers = tuple(n % len(by_position) if n < 0 else n for n in numbers)
    both = dict.fromkeys((*names, *(by_position[n] for n in numbers if n < len(by_position))))
    return tuple(dict.fromkeys((*numbers, *(by_position.index(k) for k in names if k in by_position)))), tuple(both)
