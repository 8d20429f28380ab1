"""`js.nnx.jit`: `js.jit` for steps that take nnx modules and update them in place.

As in nnx.jit, a pure function of arrays is compiled. nnx's own protocol (`nnx.update_context`) splits the arguments
before it, merges them inside, and updates the caller's objects after it. This covers new attributes, shared variables
and `nnx.cached_partial`. The first argument of the pure function holds the variables that the step changes: `js.jit`
takes it for the state. To find these variables, a new step is traced one more time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse._context import tracing
from jaxsparse.nnx.apart import Given, Static, held_by, put_together, take_apart
from jaxsparse.ops.rows import as_shape, is_stored
from jaxsparse.optim.replaying import is_replay_state
from jaxsparse.trace.tracing import check_arguments
from jaxsparse.trace.values import RefusedError
from jaxsparse.train.jit import JittedStep, sequence

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods


def jit(
    step: Callable[..., Any] | None = None,
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
    rows: Any = None,
    **others: Any,
) -> Any:
    """nnx.jit for a train step, at the cost of the rows that it reads.

    The step is written as in Flax's documentation. It takes modules, an nnx.Optimizer, metrics and a batch, and updates
    them in place. Everything that nnx.jit supports works: shared variables, rngs, statistics, nnx.Module.sow, new
    attributes, nnx.cached_partial. A variable that is only read by rows, such as that of an nnx.Embed, is a table, and
    its slots in the optimizer are updated by rows too. `js.jit` describes what is row-sparse and what is refused.
    Tables may be packed: `both = (model, optimizer); nnx.update(both, js.pack(nnx.state(both)))`.

    **Variables that the step changes are donated.** The step gives them new arrays, and JAX deletes the old ones.
    `nnx.clone` and `nnx.state` share a module's arrays. To keep values from before a step, copy them first:
    `jax.tree.map(jnp.copy, nnx.state(model))`.

    A function that changes only scalars, such as an evaluation that counts a metric, runs as under nnx.jit.

    Args:
      step: a function of pytrees of nnx objects and arrays. It may change the objects.
      static_argnums, static_argnames: as in nnx.jit.
      donate_argnums, donate_argnames: accepted so that `nnx.jit` can be replaced without other edits, and ignored:
        variables that the step changes are always donated, and nothing else is.
      graph, graph_updates: accepted for the same reason, and ignored: arguments are always treated as graphs.
      rows: which rows are trained, as in `js.jit`. The path of a table begins with the name of the argument:
        "['model']['embed']['embedding']".

    Returns:
      A function of the step's arguments that returns what the step returns, with `lower` as in jax.jit. If `step` is
      left out, a decorator.

    Raises:
      ValueError: at the first call, if the step cannot be evaluated on the rows that it reads; for a bound method.
      TypeError: for other options of nnx.jit, such as in_shardings; for packed tables if the step changes no table.
      RuntimeError: if an array of the arguments was deleted, because a step updated another module that shares it.

    Example:
      >>> import jax.numpy as jnp, optax, jaxsparse as js
      >>> from flax import nnx
      >>> @js.nnx.jit
      ... def train_step(model, optimizer, ids):
      ...     loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(ids) ** 2))(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> model = nnx.Embed(4, 1, embedding_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
      >>> loss = train_step(model, optimizer, jnp.array([2, 0, 2]))
      >>> [round(x, 4) for x in model.embedding[...].ravel().tolist()], float(loss)
      ([0.9, 1.0, 0.9, 1.0], 3.0)

    References:
      flax.nnx.jit; torch.optim.SparseAdam.
    """
    del donate_argnums, donate_argnames, graph, graph_updates
    if others:
        name, value = next(iter(others.items()))
        do = "Arrays keep the shardings that they have: place them before, or use nnx.jit."
        raise TypeError(message("nnx.jit", name, "left out", repr(value), do))
    if step is None:
        return functools.partial(jit, static_argnums=static_argnums, static_argnames=static_argnames, rows=rows)
    check_unbound("nnx.jit", "step", step)
    return JittedModules(step, sequence(static_argnums), sequence(static_argnames), rows)


def check_unbound(function: str, argument: str, fun: Callable[..., Any]) -> None:
    """Raises ValueError for a bound method of a module: changes of that module would be lost."""
    inner = fun
    while isinstance(inner, functools.partial):
        inner = inner.func
    owner = getattr(inner, "__self__", None)
    if inspect.ismethod(inner) and isinstance(owner, nnx.Pytree):
        do = f"Write {type(owner).__name__}.{inner.__name__} and pass the module as its first argument."
        raise ValueError(message(function, argument, "a function of the modules that it changes", repr(inner), do))


def check_unpacked(function: str, must: str, leaves: Sequence[Any]) -> None:
    """Raises TypeError if there are packed tables among the leaves of modules."""
    for x in filter(is_stored, leaves):
        do = "Unpack them first: nnx.update(model, js.unpack(nnx.state(model)))."
        raise TypeError(message(function, "step" if function == "nnx.jit" else "fun", must, f"{x!r} in a module", do))


class JittedModules:
    """What `js.nnx.jit` returns."""

    def __init__(self, step: Callable[..., Any], static: tuple[int, ...], names: tuple[str, ...], rows: Any) -> None:
        functools.update_wrapper(self, step)
        self._step, self._static, self._static_names, self._rows = step, static, names, rows
        self._parameters: list[str] = _positional(step)
        self._layouts: dict[Any, _Layout] = {}

        def pure(states: Any, kept: list[Any], tree: Any, layout: _Layout) -> Any:
            given, out = self._run(tree, layout.merge(states, kept))
            now, known = given.now(), given.left_alone().union(layout.changed)
            return layout.definition.unflatten([now[k] for k in layout.changed]), given.after(out, known, self)

        pure.__qualname__ = getattr(step, "__qualname__", type(step).__name__)
        self.on_rows = JittedStep(pure, (0,), (), (), rows)
        self._whole = jax.jit(pure, donate_argnums=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with nnx.update_context(self):
            pure, leaves = self.pure_arguments(args, kwargs)
            layout = pure[-1]
            try:
                states, outcome = self._program(layout)(*pure)
            except (RuntimeError, ValueError) as error:
                _check_there(error, layout, leaves)
                self._check_held(error, args, kwargs)
                raise
            for k, x in zip(layout.changed, layout.definition.flatten_up_to(states), strict=True):
                leaves[k] = x
            return outcome.put_into_objects(leaves, self)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self, owner)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The lowered program that a call with these arguments would run, for inspection, as in `js.jit`."""
        with nnx.update_context(self):
            pure, _ = self.pure_arguments(args, kwargs)
            return self._program(pure[-1]).lower(*pure)

    def pure_arguments(self, args: Any, kwargs: Any) -> tuple[tuple[Any, Any, Any, _Layout], list[Any]]:
        """The arguments of the pure step, and the leaves of the nnx objects in order. Call it in an update context."""
        args, kwargs = self._with_static(args, kwargs)
        tree, leaves = take_apart((args, kwargs), self)
        others, definition = _flatten((tree, leaves))
        key = (definition, *((getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in others))
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._layout_of(args, kwargs, tree, leaves)
        return (*layout.split(leaves), tree, layout), leaves

    def _cache_size(self) -> int:
        """The number of compiled programs."""
        whole: Any = self._whole
        return self.on_rows._cache_size() + whole._cache_size()

    def _check_held(self, error: Exception, args: Any, kwargs: Any) -> None:
        """Raises a ValueError that names arrays outside of variables, where something like a slot is put into them."""
        named = self._named(args, kwargs)
        held = [p for p, x in nnx.iter_graph(named, graph=True) if isinstance(x, jax.Array) and x.ndim and len(p) > 1]
        if held and isinstance(error, RefusedError) and error.got.startswith("output "):
            paths = ", ".join("".join(f"[{k!r}]" for k in path) for path in held[:3]) + (", ..." if held[3:] else "")
            got = f"plain arrays at {paths}, as nnx.data holds them, and a new array with a row for each of a table's"
            do = "An average of a table is such an array: hold each in an nnx.Variable, and set variable[...] = new."
            must = "one that keeps what has a table's rows in an nnx.Variable"
            raise ValueError(message("nnx.jit", "step", must, got, do)) from error

    def _named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by the names of the step's parameters."""
        named = dict(zip(self._parameters, args, strict=False))
        return named | {f"args[{n}]": x for n, x in enumerate(args) if n >= len(self._parameters)} | kwargs

    def _program(self, layout: _Layout) -> Any:
        return self.on_rows if layout.has_rows or self._rows is not None else self._whole

    def _with_static(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not self._static and not self._static_names:
            return args, kwargs
        numbers = {n % len(args) for n in self._static if n < len(args)}
        numbers |= {n for n, name in enumerate(self._parameters[: len(args)]) if name in self._static_names}
        names = {*self._static_names, *(self._parameters[n] for n in self._static if n < len(self._parameters))}
        args = tuple(Static(x) if n in numbers else x for n, x in enumerate(args))
        return args, {name: Static(x) if name in names else x for name, x in kwargs.items()}

    def _run(self, tree: Any, leaves: Sequence[Any]) -> tuple[Given, Any]:
        """Calls the step on objects merged from these leaves. Returns the objects and the step's result."""
        (args, kwargs), nodes = put_together(tree, leaves, self, is_inner=True)
        given = Given(nodes)
        args = [x.value if isinstance(x, Static) else x for x in args]
        return given, self._step(*args, **{k: x.value if isinstance(x, Static) else x for k, x in kwargs.items()})

    def _layout_of(self, args: Any, kwargs: Any, tree: Any, leaves: list[Any]) -> _Layout:
        """Traces the step to find the variables that it changes."""
        check_arguments(*tree)
        changed: list[int] = []

        def look(tree: Any, leaves: list[Any]) -> None:
            with tracing():
                given, _ = self._run(tree, leaves)
            pairs = enumerate(zip(given.before, given.now(), strict=True))
            changed[:] = [k for k, (old, new) in pairs if new is not old and _kinds(new) == _kinds(old)]

        whole = list(map(as_shape, leaves))  # packed tables are arrays to the step
        jax.eval_shape(look, *jax.tree.map(_jax.abstract, (tree, whole)))  # without shardings, as js.jit traces it
        places = _places(self._named(args, kwargs), changed, held_by((args, kwargs)))
        numbers, definition = _flatten(places)
        has_rows = any(shape and shape[0] > 1 for k in numbers for shape, _ in _kinds(whole[k])[1])
        if not has_rows:
            check_unpacked("nnx.jit", "a step, which changes the tables that it is given packed", leaves)
        return _Layout(tuple(numbers), definition, has_rows)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which leaves of the nnx objects a step changes, and the tree that they form as the state of the pure step.

    Attributes:
      changed: the numbers of these leaves, in the order of the state.
      definition: tree definition of the state: nested dictionaries, keyed by the paths of the variables.
      has_rows: whether any of them may be a table.
    """

    changed: tuple[int, ...]
    definition: Any
    has_rows: bool

    def split(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Splits leaves into the state and all others."""
        changed = set(self.changed)
        kept = [x for k, x in enumerate(leaves) if k not in changed]
        return self.definition.unflatten(_jax.without_repeats([leaves[k] for k in self.changed], kept)), kept

    def merge(self, states: Any, kept: Sequence[Any]) -> list[Any]:
        by_number = dict(zip(self.changed, self.definition.flatten_up_to(states), strict=True))
        it = iter(kept)
        return [by_number[k] if k in by_number else next(it) for k in range(len(self.changed) + len(kept))]


def _kinds(value: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """Structure, shapes and dtypes of a variable's value. If a step keeps them, the memory can be reused."""
    leaves, definition = _flatten(value)
    return definition, [_jax.kind_of_array(x)[:2] for x in leaves]


def _places(named: dict[str, Any], changed: Sequence[int], held: Sequence[Any]) -> dict[str, Any]:
    """The numbers of the changed leaves, in nested dictionaries keyed by the paths of the variables in the arguments.
    The state of a replaying optimizer is kept whole even if only parts of it change: `js.jit` looks for it."""

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    number = {id(x): k for k, x in enumerate(held) if is_variable(x)}
    nodes = [(path, x) for path, x in nnx.iter_graph(named, graph=True) if is_variable(x) or is_replay_state(x)]
    whole = {path for path, x in nodes if is_replay_state(x)}
    out: dict[str, Any] = {}
    for path, x in nodes:
        inside = any(path[:n] in whole for n in range(len(path)))
        if inside or (is_variable(x) and number.get(id(x)) not in changed):
            continue
        at = out
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = jax.tree.map(lambda v: number[id(v)], x, is_leaf=is_variable)
    return out


def _positional(step: Callable[..., Any]) -> list[str]:
    """The names of the step's positional parameters."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _check_there(error: Exception, layout: _Layout, leaves: Sequence[Any]) -> None:
    """Raises a RuntimeError that names the first deleted array among the arguments, which JAX's error does not."""
    paths = {
        k: path for path, k in jax.tree_util.tree_flatten_with_path(layout.definition.unflatten(layout.changed))[0]
    }
    gone = [k for k, x in enumerate(leaves) if isinstance(x, jax.Array) and x.is_deleted()]
    if gone:
        named = [jax.tree_util.keystr(paths[k]) for k in gone if k in paths]
        do = "Copy what is to stay before the step: jax.tree.map(jnp.copy, nnx.state(model))."
        got = f"an array that is gone at {named[0]}" if named else f"{len(gone)} arrays that are gone"
        got += ": a step has updated another module that has it, too (nnx.clone and nnx.state share arrays),"
        raise RuntimeError(message("nnx.jit", "step", "called with modules whose arrays are there", got, do)) from error
