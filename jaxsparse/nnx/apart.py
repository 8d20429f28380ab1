"""Splits nnx objects in a function's arguments into a static part and arrays, and merges them again.

A call crosses the border of a pure function twice, both times by nnx's own protocol (`nnx.update_context`). On the way
in, objects are split outside and merged inside. On the way out, the objects as the function left them are split inside,
and the caller's objects are updated. Leaves that the function did not change are not returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A static part of a tree, such as a static argument."""

    value: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Graph:
    """The structure of an nnx object, which has `count` leaves."""

    definition: Any  # nnx.GraphDef
    count: int


def take_apart(tree: Any, ctxtag: Any) -> tuple[Any, list[Any]]:
    """The tree with a Graph in place of each nnx object, and the leaves of all objects in order. An object or variable
    that occurs twice has its leaves listed once."""
    leaves: list[Any] = []

    def split(ctx: Any, path: Any, prefix: Any, node: Any) -> Graph:
        definition, own = ctx.flatten(node, with_paths=False)
        leaves.extend(own)
        return Graph(definition, len(own))

    return nnx.to_tree(tree, split_fn=split, ctxtag=ctxtag), leaves


def put_together(tree: Any, leaves: Sequence[Any], ctxtag: Any, *, is_inner: bool) -> tuple[Any, list[Any]]:
    """The inverse of `take_apart`: the tree, and its nnx objects in order. With `is_inner` they are new objects;
    otherwise the caller's own objects, updated."""
    it, nodes = iter(leaves), list[Any]()

    def merge(ctx: Any, path: Any, prefix: Any, graph: Graph) -> Any:
        nodes.append(ctx.unflatten(graph.definition, [next(it) for _ in range(graph.count)]))
        return nodes[-1]

    return from_tree(tree, Graph, merge, ctxtag, is_inner=is_inner), nodes


def from_tree(tree: Any, kind: type, merge: Callable[..., Any], ctxtag: Any, *, is_inner: bool) -> Any:
    """nnx.from_tree of a tree in which instances of `kind` stand for the objects."""

    def is_node(x: Any) -> bool:
        return isinstance(x, kind)

    return nnx.from_tree(tree, merge_fn=merge, is_node_leaf=is_node, is_leaf=is_node, is_inner=is_inner, ctxtag=ctxtag)


def held_by(tree: Any) -> list[Any]:
    """The leaves of the nnx objects in a tree, in the order of `take_apart`: variables, and arrays outside of any."""
    held: list[Any] = []

    def look(ctx: Any, path: Any, prefix: Any, node: Any) -> None:
        held.extend(ctx.flatten(node)[1].leaves)

    nnx.to_tree(tree, split_fn=look)
    return held


def value_of(held: Any) -> Any:
    """The current value of a leaf."""
    return held.get_raw_value() if isinstance(held, nnx.Variable) else held


class Given:
    """The objects that a pure function passes to the user's function. Make it before the call, to see what changes.

    Attributes:
      nodes: the objects.
      before: the values of their leaves before the call.
    """

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes
        self._held = held_by(nodes)
        self.before = list(map(value_of, self._held))

    def now(self) -> list[Any]:
        """The current values of these leaves."""
        return list(map(value_of, self._held))

    def left_alone(self) -> set[int]:
        """The numbers of the leaves that the function did not change."""
        return {k for k, (old, new) in enumerate(zip(self.before, self.now(), strict=True)) if new is old}

    def after(self, out: Any, known: set[int], ctxtag: Any) -> Outcome:
        """The objects after the call and the function's result `out`, split. Leaves with a number in `known` are not
        repeated: the caller gets them elsewhere."""
        graphs, leaves = take_apart((self.nodes, out), ctxtag)
        number = {id(x): k for k, x in enumerate(self.now()) if k in known}
        sources = tuple(number.get(id(x)) for x in leaves)
        return Outcome(graphs, [x for x, k in zip(leaves, sources, strict=True) if k is None], Static(sources))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a pure function of nnx objects returns.

    Attributes:
      graphs: the objects it was given and the result, as trees with a Graph for each object.
      fresh: their new leaves.
      sources: for each leaf of `graphs`, the number of the given leaf that it equals; None for the next fresh one.
    """

    graphs: Any
    fresh: list[Any]
    sources: Static

    def put_into_objects(self, known: Sequence[Any], ctxtag: Any) -> Any:
        """Updates the caller's objects and returns the function's result. `known`: the given leaves after the call."""
        fresh: Iterator[Any] = iter(self.fresh)
        leaves = [next(fresh) if k is None else known[k] for k in self.sources.value]
        (_, out), _ = put_together(self.graphs, leaves, ctxtag, is_inner=False)
        return out
