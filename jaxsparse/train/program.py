"""The compiled programs that a `js.jit` step runs, for one structure, shapes and dtypes of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse.ops.rows import as_whole, is_stored
from jaxsparse.parallel.collectives import in_auto_mode
from jaxsparse.trace.planning import announce
from jaxsparse.train.device_rows import knows_all
from jaxsparse.train.host_rows import HostRows
from jaxsparse.train.numpy_ids import numpy_function
from jaxsparse.train.packing import warn_of_copies, warn_of_no_donation
from jaxsparse.train.rowwise import evaluate, evaluate_by_ids, on_rows, over_any_mesh, prepare_step


class StepProgram:
    """A step for arguments of some structure, shapes and dtypes.

    Args:
      keeps: whether the given state stays usable; then it is not donated.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        args: Any,
        kwargs: Any,
        states: tuple[int, ...] | None,
        rows: Any,
        *,
        keeps: bool = False,
    ) -> None:
        self._prepared = prepare_step(step, args, kwargs, states, rows)
        self.planned = planned = self._prepared.planned
        traced = planned.traced
        announce(planned)
        self._unflatten, self._num_leaves = traced.unflatten, len(traced.leaves)
        self._stored = {i: x for i, x in enumerate(traced.leaves) if is_stored(x)}
        self._donated = [] if keeps else sorted(traced.donated)
        self._kept = [i for i in range(len(traced.leaves)) if i not in self._donated]
        self._used = [i for i, used in enumerate(planned.ids.used[: self._num_leaves]) if used]
        self._knows_all = knows_all(planned, traced.leaves)
        self._host = HostRows(planned)
        self._ids = jax.jit(self._wanted_ids)
        self._numpy_ids = self._function_of_ids()
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
        if not self._donated:
            warn_of_no_donation(traced.name, [*tables], [traced.leaves[i] for i in self.planned.leaves])

    def _wanted_ids(self, used: list[Any]) -> list[list[Any]]:
        def wanted(_: Any, used: list[Any]) -> tuple[Any, list[list[Any]]]:
            whole = list(map(as_whole, self._as_stored(self._used, used)))
            return (), self._host.wanted(self.planned.ids(whole))

        return in_auto_mode(wanted, (), used)[1]

    def _function_of_ids(self) -> Callable[..., Any] | None:
        """The ids of all reads by NumPy, if that can be. Not of donated arrays: NumPy's view of one would keep XLA from
        taking over its memory."""
        ids = self.planned.ids
        if len(ids.program.inputs) != len(self._used) or {*self._donated, *self._stored} & {*self._used}:
            return None
        return numpy_function(ids.program, ids.numbers)

    def _host_ids(self, used: list[Any]) -> list[list[Any]]:
        """The ids of all reads, by class, for the host to sort."""
        return self._ids(used) if self._numpy_ids is None else self._host.wanted(self._numpy_ids(used))

    def _with_rows(self, donated: list[Any], kept: list[Any], chosen: Any) -> list[Any]:
        leaves = self._merge_leaves(donated, kept)

        def run(leaves: list[Any], chosen: Any) -> list[Any]:
            if chosen is None:
                return evaluate_by_ids(self._prepared, leaves)
            return evaluate(self._prepared, leaves, self._host.spaces(*chosen))

        outs = over_any_mesh(self.planned, leaves, run, chosen)
        return [outs[j] for j in self._order]

    def _with_ids(self, donated: list[Any], kept: list[Any]) -> list[Any]:
        outs = on_rows(self._prepared, self._merge_leaves(donated, kept), on_one_device=False)
        return [outs[j] for j in self._order]

    def _merge_leaves(self, donated: list[Any], kept: list[Any]) -> list[Any]:
        leaves = dict(zip(self._donated, donated, strict=True)) | dict(zip(self._kept, kept, strict=True))
        return [leaves[i] for i in range(self._num_leaves)]

    def _split_leaves(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
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
        try:
            return self._run(leaves)
        except (RuntimeError, ValueError) as error:
            paths = self.planned.traced.paths
            deleted = next((i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and x.is_deleted()), None)
            if deleted is None or not str(error).count("deleted"):
                raise
            must, got = "the one that the last call returned", f"one whose {paths[deleted]} is donated and deleted"
            do = "Write state, loss = step(state, batch), or copy what you keep before the step."
            raise type(error)(message("jit", "state", must, got, do)) from error

    def _run(self, leaves: list[Any]) -> Any:
        used = [leaves[i] for i in self._used]
        donated, kept = self._split_leaves(leaves)
        if self._leaves_ids_to_device(leaves, used):
            outs = self._on_device(donated, kept)
        else:
            chosen = None if self._knows_all else self._host.choose(self._host_ids(used))
            outs = self._on_host(donated, kept, chosen)
        return self._returned(outs)

    def _leaves_ids_to_device(self, leaves: list[Any], used: list[Any]) -> bool:
        """Whether the ids are left to the device: not sorted on the host, and not known from a batch. A GPU sorts them
        faster than the host does."""
        if not _jax.on_one_device(leaves):
            return True
        return not self._knows_all and (not self._host.sees(used) or _jax.platform_of(leaves) == "gpu")

    def _returned(self, outs: list[Any]) -> Any:
        by_place = dict(zip(self._order, outs, strict=True))
        return self._unflatten([by_place[j] for j in range(len(outs))])

    def lower(self, leaves: list[Any]) -> tuple[Any, Callable[..., Any]]:
        """(the lowered program for these leaves, a function of the compiled program and the leaves that calls it)."""
        used = [leaves[i] for i in self._used]
        donated, kept = self._split_leaves(leaves)
        if self._leaves_ids_to_device(leaves, used):

            def with_ids(compiled: Any, leaves: list[Any]) -> Any:
                return self._returned(compiled(*self._split_leaves(leaves)))

            return self._on_device.lower(donated, kept), with_ids
        if self._knows_all:
            chosen, sizes = None, []
        else:
            abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in used)
            ids = jax.eval_shape(self._ids, used) if abstract else self._host_ids(used)
            chosen = self._host.largest(ids) if abstract else self._host.choose(ids)
            sizes = [x.shape[0] for x in chosen[0]]

        def with_rows(compiled: Any, leaves: list[Any]) -> Any:
            donated, kept = self._split_leaves(leaves)
            used = [leaves[i] for i in self._used]
            chosen = None if self._knows_all else self._host.choose(self._host_ids(used), sizes)
            return self._returned(compiled(donated, kept, chosen))

        return self._on_host.lower(donated, kept, chosen), with_rows

    def trace(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The step as one jitted function, traced for these arguments."""
        on_one_device = _jax.on_one_device(jax.tree.leaves((args, kwargs)))

        @functools.wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._unflatten(
                on_rows(self._prepared, jax.tree.leaves((args, kwargs), is_leaf=is_stored), on_one_device=on_one_device)
            )

        def is_donated(leaves: Any) -> bool:
            return bool(jax.tree.leaves(leaves)) and set(jax.tree.leaves(leaves)) <= set(self._donated)

        numbers = jax.tree.unflatten(jax.tree.structure((args, kwargs)), range(self._num_leaves))
        donated = [n for n, leaves in enumerate(numbers[0]) if is_donated(leaves)]
        names = [k for k, leaves in numbers[1].items() if is_donated(leaves)]
        return jax.jit(run, donate_argnums=donated, donate_argnames=names).trace(*args, **kwargs)

    def cache_size(self) -> int:
        programs: list[Any] = [self._on_host, self._on_device]
        return sum(program._cache_size() for program in programs)


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
