"""`js.memory`: a memory of keys, labels and ages, for rare labels.

    memory = js.memory.init(num_slots, dim, num_labels)
    near = js.memory.query(memory, embeddings)             # near.labels, near.similarity, near.slots
    memory = js.memory.update(memory, embeddings, labels)  # donate the memory to jax.jit: rows are written in place

A slot holds a key, which is an embedding of length 1, and a label. A query returns the labels of the most similar keys,
so a label can be found from its first example on. The functions are pure: they work under jit, vmap and scan.

References:
  Kaiser, Nachum, Roy and Bengio, "Learning to remember rare events", ICLR 2017
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._checks import as_ids, check_float, check_num_rows, message
from jaxsparse.ops.rows import at_least_int32, in_range

_CHUNK = 2**26  # the largest array of similarities, 256 MB


class Memory(NamedTuple):
    """What `init` makes and `update` returns.

    Attributes:
      keys: unit vectors; zero in an empty slot.
      labels: -1 in an empty slot.
      written: the value of `seen` when the slot was last written.
      slots_of: the number of slots of each label.
      seen: the number of examples so far.
    """

    keys: jax.Array  # shape=(num_slots, dim), dtype=float32
    labels: jax.Array  # shape=(num_slots,), dtype=int32
    written: jax.Array  # shape=(num_slots,), dtype=int32
    slots_of: jax.Array  # shape=(num_labels,), dtype=int32
    seen: jax.Array  # shape=(), dtype=int32

    @property
    def ages(self) -> jax.Array:
        """The number of examples since each slot was written, int32 (num_slots,)."""
        return self.seen - self.written


class Neighbours(NamedTuple):
    """The result of `query`, most similar first.

    Attributes:
      labels: -1 where there are fewer than k keys.
      similarity: cosines; -inf where there are fewer than k keys.
      slots: the keys' rows in the memory; num_slots where there are fewer than k keys.
    """

    labels: jax.Array  # shape=(..., k), dtype=int32
    similarity: jax.Array  # shape=(..., k), dtype=float32
    slots: jax.Array  # shape=(..., k), dtype=int32


def init(num_slots: int, dim: int, num_labels: int) -> Memory:
    """An empty memory.

    Args:
      num_slots: the number of keys it can hold.
      dim: the length of an embedding.
      num_labels: labels are integers in [0, num_labels).

    Returns:
      A `Memory`. It takes 4 (dim + 2) bytes a slot and 4 bytes a label.

    Raises:
      ValueError: if an argument is less than 1, or 2**31 - 1 or more.

    Example:
      >>> import jaxsparse as js
      >>> memory = js.memory.init(num_slots=1000, dim=16, num_labels=3)
      >>> memory.keys.shape, int(memory.labels[0])
      ((1000, 16), -1)
    """
    for name, size in (("num_slots", num_slots), ("dim", dim), ("num_labels", num_labels)):
        check_num_rows("memory.init", name, size)
        if size < 1:
            raise ValueError(message("memory.init", name, "at least 1", size))
    empty = jnp.full(num_slots, -1, jnp.int32)
    zeros = jnp.zeros((num_slots, dim)), empty, jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_labels, jnp.int32)
    return Memory(*zeros, jnp.zeros((), jnp.int32))


def query(memory: Memory, x: Any, *, k: int = 1, where: Any = None) -> Neighbours:
    """The k most similar keys, by cosine.

    Differentiable with respect to x; the keys are constants. With `where`, the nearest key of the same label and the
    nearest key of another label make a triplet:

        same = memory.labels[None] == labels[:, None]
        loss = jax.nn.relu(margin + query(memory, x, where=~same).similarity - query(memory, x, where=same).similarity)

    Args:
      memory: a `Memory`.
      x: floating, embeddings of shape (..., dim) and any length.
      k: the number of keys, 1 to num_slots.
      where: bool, of a shape that broadcasts to (..., num_slots): the slots to search. All of them by default.

    Returns:
      `Neighbours`. Empty slots are never among them.

    Raises:
      TypeError: if x is not floating, or `where` is not bool.
      ValueError: if shapes do not fit, or k is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> memory = js.memory.init(num_slots=8, dim=2, num_labels=3)
      >>> memory = js.memory.update(memory, jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([2, 0]))
      >>> near = js.memory.query(memory, jnp.array([3.0, 4.0]), k=3)
      >>> near.labels.tolist(), [round(s, 4) for s in near.similarity.tolist()], near.slots.tolist()
      ([0, 2, -1], [0.8, 0.6, -inf], [1, 0, 8])
    """
    f = "memory.query"
    x = _embeddings(f, memory, x)
    num_slots = len(memory.labels)
    if not 1 <= k <= num_slots:
        raise ValueError(message(f, "k", f"from 1 to {num_slots}, the number of slots", k))
    shape = (*x.shape[:-1], num_slots)
    where = jnp.array(True) if where is None else jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(message(f, "where", "a bool array", f"{where.dtype=}"))
    if where.ndim > len(shape) or any(a not in (1, b) for a, b in zip(where.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(message(f, "where", f"of a shape that broadcasts to {shape}", f"{where.shape=}"))

    keys, filled = jax.lax.stop_gradient(memory.keys), (memory.labels >= 0).reshape((1,) * (len(shape) - 1) + (-1,))
    searched = where.reshape((1,) * (len(shape) - where.ndim) + where.shape) & filled
    searched = searched if searched.size == num_slots else jnp.broadcast_to(searched, shape)
    flat, searched = x.reshape(-1, x.shape[-1]), searched.reshape(-1, num_slots)  # (B, dim), (1 or B, num_slots)

    def nearest(x: jax.Array, searched: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.top_k(jnp.where(searched, _cosines(x, keys), -jnp.inf), k)

    def nearest_of(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        similarity, slots = nearest(flat[i, None], searched[jnp.minimum(i, len(searched) - 1), None])
        return similarity[0], slots[0]

    if len(flat) * num_slots <= _CHUNK:
        similarity, slots = nearest(flat, searched)
    else:
        similarity, slots = jax.lax.map(nearest_of, jnp.arange(len(flat)), batch_size=max(1, _CHUNK // num_slots))
    similarity, slots = (array.reshape(*shape[:-1], k) for array in (similarity, slots))
    found = similarity > -jnp.inf
    labels = jnp.where(found, memory.labels[slots], -1)
    return Neighbours(labels, similarity, jnp.where(found, slots, num_slots))


def update(memory: Memory, x: Any, labels: Any, *, balanced: bool = True) -> Memory:
    """The memory after a batch of examples, which are added one after the other.

    For an example x of label y, whose nearest key is in slot n:

        labels[n] == y:  keys[n] = (x + keys[n]) / |x + keys[n]|      the key moves towards x
        otherwise:       n = argmax(age * share), keys[n] = x / |x|, labels[n] = y

    Then slot n has age 0, and all other slots are one older. The share of a slot is the share of its label among all
    slots. So a slot of a frequent label is overwritten before an older slot of a rare label. If all labels have equally
    many slots, the oldest slot is overwritten. Empty slots are filled first.

    A batch costs one product of embeddings and keys. Each example then costs a search of O(num_slots) and one row
    written. Donate the memory to jax.jit; otherwise its arrays are copied.

    Args:
      memory: a `Memory`.
      x: floating, embeddings (B, dim) of any length, or (dim,) for one example.
      labels: integers (B,), or () for one. Examples with a label outside [0, num_labels), such as
        padding, are left out.
      balanced: whether to overwrite by age * share. Otherwise the oldest slot is overwritten, as in the reference.

    Returns:
      A `Memory`, equal to that of B calls with one example each.

    Raises:
      TypeError: if x is not floating, or labels are not integers.
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> memory = js.memory.init(num_slots=4, dim=2, num_labels=3)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.1], [-1.0, 0.0]])
      >>> memory = js.memory.update(memory, x, jnp.array([1, 0, 0, 0, 2]))
      >>> memory.labels.tolist()  # slot 1 is overwritten, although slot 0 is older: 2 * 3/4 > 3 * 1/4
      [1, 2, 0, 0]
    """
    f = "memory.update"
    x, labels = _embeddings(f, memory, x), at_least_int32(as_ids(f, "labels", labels))
    if x.ndim > 2 or labels.shape != x.shape[:-1]:
        must = "of shape (B,), with x (B, dim), or () with x (dim,)"
        raise ValueError(message(f, "labels", must, f"{labels.shape=}, {x.shape=}"))
    x, labels = jax.lax.stop_gradient(_unit(x.reshape(-1, x.shape[-1]))), labels.reshape(-1)
    size = max(1, min(len(x), _CHUNK // len(memory.labels)))
    parts = -(-len(x) // size)
    x = jnp.pad(x, [(0, parts * size - len(x)), (0, 0)]).reshape(parts, size, x.shape[1])
    labels = jnp.pad(labels, (0, parts * size - len(labels)), constant_values=-1).reshape(parts, size)
    learn = functools.partial(_learn, balanced)
    return learn(memory, (x[0], labels[0]))[0] if parts == 1 else jax.lax.scan(learn, memory, (x, labels))[0]


def _learn(balanced: bool, memory: Memory, examples: tuple[jax.Array, jax.Array]) -> tuple[Memory, None]:
    """The memory after examples: unit vectors (B, dim) and labels (B,). A body of jax.lax.scan."""
    x, labels = examples
    known = in_range(labels, len(memory.slots_of))
    labels = jnp.where(known, labels, 0).astype(jnp.int32)
    cosines = jnp.where((memory.labels >= 0)[None], _cosines(x, memory.keys), -jnp.inf)  # (B, num_slots)

    def add(state: tuple[Memory, jax.Array], example: Any) -> tuple[Any, None]:
        memory, cosines = state
        i, key, label, known = example
        nearest = jnp.argmax(cosines[i])
        same = memory.labels[nearest] == label
        slot = jnp.where(same, nearest, _to_overwrite(memory, balanced))
        key = jnp.where(same, _unit(key + memory.keys[slot]), key)
        old, slot = (
            memory.labels[slot],
            jnp.where(known, slot, len(memory.labels)),
        )  # an index past the end is not written
        count = known.astype(jnp.int32)
        seen = memory.seen + count
        slots_of = memory.slots_of.at[jnp.where(old < 0, len(memory.slots_of), old)].add(-count, mode="drop")
        memory = Memory(
            memory.keys.at[slot].set(key, mode="drop"),
            memory.labels.at[slot].set(label, mode="drop"),
            memory.written.at[slot].set(seen, mode="drop"),
            slots_of.at[label].add(count),
            seen,
        )
        return (memory, cosines.at[:, slot].set(_cosines(x, key[None])[:, 0], mode="drop")), None

    return jax.lax.scan(add, (memory, cosines), (jnp.arange(len(x)), x, labels, known))[0][0], None


def _to_overwrite(memory: Memory, balanced: bool) -> jax.Array:
    """The first empty slot, or argmax(age * share)."""
    weight = memory.slots_of[memory.labels] if balanced else 1
    order = memory.ages.astype(jnp.float32) * weight
    return jnp.argmax(jnp.where(memory.labels < 0, jnp.inf, order))


def _embeddings(f: str, memory: Memory, x: Any) -> jax.Array:
    """x as float32 (..., dim)."""
    x = jnp.asarray(x)
    check_float(f, "x", x)
    if x.ndim < 1 or x.shape[-1] != memory.keys.shape[1]:
        raise ValueError(message(f, "x", f"of shape (..., {memory.keys.shape[1]})", f"{x.shape=}"))
    return x.astype(memory.keys.dtype)


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis. Where x is zero, the result and its gradient are zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _cosines(x: jax.Array, keys: jax.Array) -> jax.Array:
    """x (..., dim) of any length, keys (n, dim) of length 1 -> (..., n)."""
    return jnp.matmul(_unit(x), keys.T, precision=jax.lax.Precision.HIGHEST)
