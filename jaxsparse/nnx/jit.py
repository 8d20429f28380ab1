"""`js.nnx.jit`: the one word for flax.nnx. `js.jit` of a step whose arguments are modules that it updates in place.

nnx's own protocol takes the arguments apart before the step, puts them together inside of it, and updates the objects
after it (`nnx.update_context`): what is new in the graph, shared variables and `nnx.cached_partial` included. Between
the two stands a pure function of arrays, as with `nnx.jit`; its first argument are the variables that the step changes,
which is what `js.jit` takes for state. Which these are is seen by tracing the step once more, when it is new.
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

    The step is the one that Flax's documentation writes: it is given modules, an nnx.Optimizer, metrics and a batch,
    and updates them in place. All of `nnx.jit` holds: shared variables, rngs, statistics, what is sown, new attributes,
    nnx.cached_partial. What is row-sparse and what is refused is described with `js.jit`: a variable that is only read
    by rows, an nnx.Embed's for example, is a table, and so are its slots in the optimizer. Tables may be packed:
    `nnx.update(both, js.pack(nnx.state(both)))`, both being (model, optimizer).

    **The variables that the step changes are donated.** They have new arrays after it, and the old ones are gone. An
    `nnx.clone` or `nnx.state` of a module has the same arrays: copy those that are to stay, with
    `jax.tree.map(jnp.copy, nnx.state(model))`.

    A function that changes nothing but scalars (a metric, a counter), as of evaluation, is that of `nnx.jit`.

    Args:
      step: a function of any pytrees, whose nnx objects it may change.
      static_argnums, static_argnames: as in nnx.jit.
      donate_argnums, donate_argnames: as in nnx.jit, so that a step that has them needs one word: they say nothing new,
        since what the step changes is donated in any case, and nothing else.
      graph, graph_updates: as in nnx.jit. They say nothing new either: the arguments are graphs, which trees are too.
      rows: which rows are trained, as of `js.jit`; the paths of tables begin with the name of the argument:
        "['model']['embed']['embedding']".

    Returns:
      A function of the step's arguments that returns what the step returns, with `lower` as in jax.jit. Without step, a
      decorator.

    Raises:
      ValueError: at the first call, if the step cannot be right on the rows that it reads; for a bound method.
      TypeError: for other options of nnx.jit, such as in_shardings; for packed tables, if the step changes no table.
      RuntimeError: if an array of the arguments is gone, because a step has updated a module that has it, too.

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
    """Raises ValueError for a method of a module, whose changes to it would be lost."""
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
            given, out = self._run(tree, layout.together(states, kept))
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
                raise
            for k, x in zip(layout.changed, layout.definition.flatten_up_to(states), strict=True):
                leaves[k] = x
            return outcome.put_into_objects(leaves, self)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self, owner)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The program that a call with these arguments runs, lowered, as of `js.jit`: to be looked at."""
        with nnx.update_context(self):
            pure, _ = self.pure_arguments(args, kwargs)
            return self._program(pure[-1]).lower(*pure)

    def pure_arguments(self, args: Any, kwargs: Any) -> tuple[tuple[Any, Any, Any, _Layout], list[Any]]:
        """The arguments of the pure step, and the leaves of the nnx objects in order. Within an update context."""
        args, kwargs = self._with_static(args, kwargs)
        tree, leaves = take_apart((args, kwargs), self)
        others, definition = _flatten((tree, leaves))
        key = (definition, *((getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in others))
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._layout_of(args, kwargs, tree, leaves)
        return (*layout.apart(leaves), tree, layout), leaves

    def _cache_size(self) -> int:
        """How many programs were compiled."""
        whole: Any = self._whole
        return self.on_rows._cache_size() + whole._cache_size()

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
        """The step itself, on objects that are made of these leaves: the objects, and what it returns."""
        (args, kwargs), nodes = put_together(tree, leaves, self, is_inner=True)
        given = Given(nodes)
        args = [x.value if isinstance(x, Static) else x for x in args]
        return given, self._step(*args, **{k: x.value if isinstance(x, Static) else x for k, x in kwargs.items()})

    def _layout_of(self, args: Any, kwargs: Any, tree: Any, leaves: list[Any]) -> _Layout:
        """Traces the step, to see which variables it changes."""
        check_arguments(*tree)
        changed: list[int] = []

        def look(tree: Any, leaves: list[Any]) -> None:
            with tracing():
                given, _ = self._run(tree, leaves)
            pairs = enumerate(zip(given.before, given.now(), strict=True))
            changed[:] = [k for k, (old, new) in pairs if new is not old and _kinds(new) == _kinds(old)]

        whole = list(map(as_shape, leaves))  # packed tables are arrays to the step
        jax.eval_shape(look, *jax.tree.map(_jax.abstract, (tree, whole)))  # without shardings, as js.jit traces it
        named = dict(zip(self._parameters, args, strict=False))
        named |= {f"args[{n}]": x for n, x in enumerate(args) if n >= len(self._parameters)} | kwargs
        places = _places(named, changed, held_by((args, kwargs)))
        numbers, definition = _flatten(places)
        has_rows = any(shape and shape[0] > 1 for k in numbers for shape, _ in _kinds(whole[k])[1])
        if not has_rows:
            check_unpacked("nnx.jit", "a step, which changes the tables that it is given packed", leaves)
        return _Layout(tuple(numbers), definition, has_rows)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which leaves of the nnx objects a step changes, and how they are its state.

    Attributes:
      changed: their numbers, in the order of the state.
      definition: of the state's tree: dictionaries by the paths of the variables.
      has_rows: whether one of them may be a table.
    """

    changed: tuple[int, ...]
    definition: Any
    has_rows: bool

    def apart(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The state, and all other leaves."""
        changed = set(self.changed)
        kept = [x for k, x in enumerate(leaves) if k not in changed]
        return self.definition.unflatten(_jax.without_repeats([leaves[k] for k in self.changed], kept)), kept

    def together(self, states: Any, kept: Sequence[Any]) -> list[Any]:
        by_number = dict(zip(self.changed, self.definition.flatten_up_to(states), strict=True))
        it = iter(kept)
        return [by_number[k] if k in by_number else next(it) for k in range(len(self.changed) + len(kept))]


def _kinds(value: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """What a variable's value has to keep for its memory to be taken over: structure, shapes and dtypes."""
    leaves, definition = _flatten(value)
    return definition, [_jax.kind_of_array(x)[:2] for x in leaves]


def _places(named: dict[str, Any], changed: Sequence[int], held: Sequence[Any]) -> dict[str, Any]:
    """The numbers of changed leaves, in dictionaries by the paths of the variables in the arguments. The state of a
    replaying optimizer stays what it is, whatever of it changes: `js.jit` looks for it."""

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
    """The names of the parameters that may be given by position."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _check_there(error: Exception, layout: _Layout, leaves: Sequence[Any]) -> None:
    """Raises RuntimeError if arrays of the arguments are gone, which the error says without a name."""
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
