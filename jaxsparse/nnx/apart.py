"""nnx objects among the arguments of a function, taken apart and put together.

There are two ways through nnx's protocol (`nnx.update_context`), in and out: objects are taken apart outside of a pure
function and put together inside of it, and what they have become is taken apart inside and put into the objects
outside. Leaves that the function has left alone do not come out.
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
    """A part of a tree that is no array."""

    value: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Graph:
    """An nnx object without its leaves, of which there are `count`."""

    definition: Any  # nnx.GraphDef
    count: int


def take_apart(tree: Any, ctxtag: Any) -> tuple[Any, list[Any]]:
    """The tree, with a Graph for each nnx object, and the leaves of these in order. An object or variable that is there
    twice is one."""
    leaves: list[Any] = []

    def split(ctx: Any, path: Any, prefix: Any, node: Any) -> Graph:
        definition, own = ctx.flatten(node, with_paths=False)
        leaves.extend(own)
        return Graph(definition, len(own))

    return nnx.to_tree(tree, split_fn=split, ctxtag=ctxtag), leaves


def put_together(tree: Any, leaves: Sequence[Any], ctxtag: Any, *, is_inner: bool) -> tuple[Any, list[Any]]:
    """The inverse of `take_apart`, and the objects in order. Outside, these are the ones there were, updated."""
    it, nodes = iter(leaves), list[Any]()

    def merge(ctx: Any, path: Any, prefix: Any, graph: Graph) -> Any:
        nodes.append(ctx.unflatten(graph.definition, [next(it) for _ in range(graph.count)]))
        return nodes[-1]

    return from_tree(tree, Graph, merge, ctxtag, is_inner=is_inner), nodes


def from_tree(tree: Any, kind: type, merge: Callable[..., Any], ctxtag: Any, *, is_inner: bool) -> Any:
    """nnx.from_tree, of a tree whose objects are of this kind."""

    def is_node(x: Any) -> bool:
        return isinstance(x, kind)

    return nnx.from_tree(tree, merge_fn=merge, is_node_leaf=is_node, is_leaf=is_node, is_inner=is_inner, ctxtag=ctxtag)


def held_by(tree: Any) -> list[Any]:
    """The variables, and arrays that are in none, that are the leaves of the nnx objects in a tree, in their order."""
    held: list[Any] = []

    def look(ctx: Any, path: Any, prefix: Any, node: Any) -> None:
        held.extend(ctx.flatten(node)[1].leaves)

    nnx.to_tree(tree, split_fn=look)
    return held


def value_of(held: Any) -> Any:
    """What a leaf is now."""
    return held.get_raw_value() if isinstance(held, nnx.Variable) else held


class Given:
    """The objects that a function is given, inside of it: made before it is called.

    Attributes:
      nodes: the objects.
      before: what their leaves are before the call.
    """

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes
        self._held = held_by(nodes)
        self.before = list(map(value_of, self._held))

    def now(self) -> list[Any]:
        """What these leaves are now."""
        return list(map(value_of, self._held))

    def left_alone(self) -> set[int]:
        """The numbers of those that the function has not changed."""
        return {k for k, (old, new) in enumerate(zip(self.before, self.now(), strict=True)) if new is old}

    def after(self, out: Any, known: set[int], ctxtag: Any) -> Outcome:
        """What the objects have become, and what the function returned, taken apart; the leaves `known` come out in
        another way."""
        graphs, leaves = take_apart((self.nodes, out), ctxtag)
        number = {id(x): k for k, x in enumerate(self.now()) if k in known}
        sources = tuple(number.get(id(x)) for x in leaves)
        return Outcome(graphs, [x for x, k in zip(leaves, sources, strict=True) if k is None], Static(sources))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What comes out of a pure function of nnx objects.

    Attributes:
      graphs: the objects that it was given, and what it returned: trees with a Graph for each object.
      fresh: leaves of these that are not known.
      sources: for each of their leaves the number of the given one that it is, or None for the next fresh one.
    """

    graphs: Any
    fresh: list[Any]
    sources: Static

    def put_into_objects(self, known: Sequence[Any], ctxtag: Any) -> Any:
        """Updates the objects outside; what the function returned. `known` are the given leaves, as they are now."""
        fresh: Iterator[Any] = iter(self.fresh)
        leaves = [next(fresh) if k is None else known[k] for k in self.sources.value]
        (_, out), _ = put_together(self.graphs, leaves, ctxtag, is_inner=False)
        return out
