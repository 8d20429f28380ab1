"""`js.nnx.value_and_grad` and `grad`: as in nnx, with row-sparse gradients of variables that are only read by rows.

nnx objects are split as nnx does it (`apart.py`). `js.value_and_grad` then differentiates a pure function of their
variables. The objects after the call are its auxiliary output.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxsparse._checks import message
from jaxsparse.nnx.apart import Given, from_tree, held_by, value_of
from jaxsparse.nnx.jit import check_unbound, check_unpacked
from jaxsparse.train.grad import Tables
from jaxsparse.train.grad import value_and_grad as js_value_and_grad

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods
Argnums = Any  # int, nnx.DiffState, or a sequence of these


def value_and_grad(
    fun: Callable[..., Any] | None = None,
    *,
    argnums: Argnums = 0,
    has_aux: bool = False,
    tables: Tables = None,
    **others: Any,
) -> Any:
    """nnx.value_and_grad, with row-sparse gradients of variables that `fun` only reads by rows.

    `fun` may update its modules in place (statistics, rngs, nnx.Module.sow), as with nnx. Inside of `js.nnx.jit` and
    `js.jit` it does what nnx.value_and_grad does, because the whole step is evaluated on the rows that it reads.

    Args:
      fun: returns a real scalar, or with `has_aux` a pair (scalar, aux). Its arguments are nnx objects, arrays, or
        trees of them.
      argnums: which arguments to differentiate with respect to: a position, or several. Of an nnx object, these are its
        nnx.Params, or with nnx.DiffState(position, filter) the variables that match the filter. An argument may also
        be arrays.
      has_aux: whether `fun` returns (scalar, aux).
      tables: as in `js.value_and_grad`. The path of a variable looks like "['embed']['embedding']".

    Returns:
      A function of fun's arguments that returns (value, gradient), or ((value, aux), gradient). As in nnx, the gradient
      of an nnx object is an nnx.State. In it, variables that are only read by rows have a `RowSparse`. If `fun` is left
      out, a decorator.

    Raises:
      TypeError: if `fun` does not return a real scalar, or a variable to differentiate is not floating; for other
        options of nnx.value_and_grad.
      ValueError: if an argument to differentiate shares a variable with another argument; for a bound method; and as
        in `js.value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax import nnx
      >>> model = nnx.Embed(5, 2, embedding_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> loss, grads = js.nnx.value_and_grad(lambda model, ids: jnp.sum(model(ids) ** 2))(model, jnp.array([3, 0, 3]))
      >>> float(loss), grads["embedding"].get_value()
      (6.0, RowSparse(ids=int32[4], rows=float32[4,2], shape=(5, 2), unique=True))

    References:
      flax.nnx.value_and_grad.
    """
    _check_options("nnx.value_and_grad", others)
    if fun is None:
        return functools.partial(value_and_grad, argnums=argnums, has_aux=has_aux, tables=tables)
    check_unbound("nnx.value_and_grad", "fun", fun)
    _filters(argnums)

    @functools.wraps(fun)
    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        tag = object()
        with nnx.update_context(tag):
            call = Call(fun, argnums, has_aux, args, kwargs, tag)
            both = js_value_and_grad(call.pure, call.argnums, True, tables=tables)
            (value, outcome), gradient = both(*call.args)
            aux = outcome.put_into_objects(call.leaves, tag)
        gradient = _without_apart(gradient)
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return value_and_grad_fun


def grad(
    fun: Callable[..., Any] | None = None,
    *,
    argnums: Argnums = 0,
    has_aux: bool = False,
    tables: Tables = None,
    **others: Any,
) -> Any:
    """nnx.grad, with row-sparse gradients of variables that `fun` only reads by rows.

    Arguments and errors are those of `js.nnx.value_and_grad`.

    Returns:
      A function of fun's arguments that returns the gradient, or with `has_aux` the pair (gradient, aux). If `fun` is
      left out, a decorator.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax import nnx
      >>> model = nnx.Embed(5, 1, embedding_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> grads = js.nnx.grad(lambda model, ids: jnp.sum(model(ids) ** 2))(model, jnp.array([3]))
      >>> grads["embedding"].get_value().todense().tolist()
      [[0.0], [0.0], [0.0], [2.0], [0.0]]

    References:
      flax.nnx.grad.
    """
    _check_options("nnx.grad", others)
    if fun is None:
        return functools.partial(grad, argnums=argnums, has_aux=has_aux, tables=tables)
    both = value_and_grad(fun, argnums=argnums, has_aux=has_aux, tables=tables)

    @functools.wraps(fun)
    def grad_fun(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return grad_fun


class Call:
    """One call of a function of nnx objects, as a call of a pure function that `js.value_and_grad` can differentiate.
    Make and use it within one nnx.update_context.

    Attributes:
      args: the arguments of the pure function.
      argnums: which of them to differentiate with respect to, in the form that `js.value_and_grad` takes.
      leaves: the leaves of all nnx objects in the arguments, in order.
    """

    def __init__(
        self, fun: Callable[..., Any], argnums: Argnums, has_aux: bool, args: Any, kwargs: Any, tag: Any
    ) -> None:
        args = _positional(fun, args, kwargs)
        filters = _filters(argnums)
        for n in filters:
            if not -len(args) <= n < len(args):
                must = f"positions among the {len(args)} arguments"
                raise TypeError(message("nnx.value_and_grad", "argnums", must, n))
        filters = {n % len(args): f for n, f in filters.items()}
        self._fun, self._has_aux, self._tag = fun, has_aux, tag
        one = isinstance(argnums, int | nnx.DiffState)
        self.argnums: Any = next(iter(filters)) if one else tuple(filters)
        self.leaves = list(map(value_of, held_by(args)))
        check_unpacked("nnx.value_and_grad", "called with modules whose tables are arrays", self.leaves)
        prefix = tuple(None if n not in filters else nnx.DiffState(-1, filters[n]) for n in range(len(args)))
        self.args = nnx.to_tree(args, prefix=prefix, split_fn=_split, ctxtag=tag)

    def pure(self, *args: Any) -> Any:
        """(value, Outcome): the function's value, and its aux and the objects after the call."""
        nodes: list[Any] = []

        def merge(ctx: Any, path: Any, prefix: Any, node: _Apart) -> Any:
            nodes.append(ctx.merge(node.parts.definition, *node.states()))
            return nodes[-1]

        args = from_tree(args, _Apart, merge, self._tag, is_inner=True)
        given = Given(nodes)
        out = self._fun(*args)
        if self._has_aux and not (isinstance(out, tuple) and len(out) == 2):
            must = "a function that returns (scalar, aux), as has_aux=True says"
            raise TypeError(message("nnx.value_and_grad", "fun", must, repr(out)))
        value, aux = out if self._has_aux else (out, None)
        return value, given.after(aux, given.left_alone(), self._tag)


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """All of an nnx object but the variables to differentiate.

    Attributes:
      definition: its nnx.GraphDef.
      rest: the states of its other variables.
      tree: tree definition of the state to differentiate; None if there is nothing to differentiate.
      keys: a path for each leaf of that state.
    """

    definition: Any
    rest: tuple[Any, ...]
    tree: Any
    keys: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Apart:
    """An nnx object as a pytree. Its leaves are the values of the variables to differentiate, or their gradients. There
    are none if nothing is to be differentiated."""

    leaves: Sequence[Any]
    parts: _Parts

    def state(self) -> Any:
        """The nnx.State of the variables to differentiate."""
        return self.parts.tree.unflatten(self.leaves)

    def states(self) -> tuple[Any, ...]:
        return (self.state(), *self.parts.rest) if self.parts.tree is not None else self.parts.rest


jax.tree_util.register_pytree_with_keys(
    _Apart,
    lambda x: (list(zip(x.parts.keys, x.leaves, strict=True)), x.parts),
    lambda parts, leaves: _Apart(tuple(leaves), parts),
    lambda x: (x.leaves, x.parts),
)


class _Path(str):
    """A whole path as one key, which jax.tree_util.keystr prints unchanged."""


def _split(ctx: Any, path: Any, prefix: Any, node: Any) -> _Apart:
    """Splits one nnx object, for nnx.to_tree. `prefix` is None if nothing in it is to be differentiated."""
    if prefix is None:
        definition, rest = ctx.split(node)
        return _Apart((), _Parts(definition, (rest,), None, ()))
    if isinstance(node, nnx.Variable):
        definition, state, *rest = ctx.split(node)
    else:
        definition, state, *rest = ctx.split(node, prefix.filter, ...)
    keyed = jax.tree_util.tree_flatten_with_path(state)[0]
    leaves, tree = _flatten(state)
    keys = tuple(_Path(jax.tree_util.keystr(path).removesuffix(".value")) for path, _ in keyed)
    return _Apart(tuple(leaves), _Parts(definition, tuple(rest), tree, keys))


def _without_apart(gradient: Any) -> Any:
    """A gradient, with an nnx.State for each nnx object."""
    is_apart = lambda x: isinstance(x, _Apart)  # noqa: E731
    return jax.tree.map(lambda x: x.state() if is_apart(x) else x, gradient, is_leaf=is_apart)


def _filters(argnums: Argnums) -> dict[int, Any]:
    """By argument position, the filter of the variables to differentiate."""
    out: dict[int, Any] = {}
    for x in [argnums] if isinstance(argnums, int | nnx.DiffState) else argnums:
        n, kind = (x.argnum, x.filter) if isinstance(x, nnx.DiffState) else (x, nnx.Param)
        if n in out:
            raise ValueError(message("nnx.value_and_grad", "argnums", "different positions", f"{n} twice"))
        out[n] = kind
    return out


def _positional(fun: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """All arguments by position, as nnx passes them."""
    if not kwargs:
        return tuple(args)
    bound = inspect.signature(fun).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        got, do = f"{sorted(bound.kwargs)}, which only go by name,", "Close over them, as nnx.value_and_grad wants it."
        raise TypeError(message("nnx.value_and_grad", "fun", "called with arguments that have positions", got, do))
    return bound.args


def _check_options(function: str, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in ("graph", "graph_updates") or value is False:  # of which True is what this is
            raise TypeError(message(function, name, "left out", repr(value)))
