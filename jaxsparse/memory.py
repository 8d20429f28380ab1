"""`js.memory`: a memory of keys, labels and ages, for labels that are rare.

    memory = js.memory.init(num_slots, dim, num_labels)
    near = js.memory.query(memory, embeddings)             # near.labels, near.similarity, near.slots
    memory = js.memory.update(memory, embeddings, labels)  # donate the memory to jax.jit: rows are written in place

A slot holds an embedding of length 1, its key, and a label. What is asked for is answered by the labels of the most
similar keys, so that a label is known from its first example on. Pure functions, to be jitted, mapped and scanned.

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

_CHUNK = 2**26  # similarities that are looked at at once, 256 MB


class Memory(NamedTuple):
    """What `init` makes and `update` returns.

    Attributes:
      keys: unit vectors; zero in an empty slot.
      labels: -1 in an empty slot.
      written: the value of `seen` when the slot was last written.
      slots_of: how many slots each label has.
      seen: how many examples there have been.
    """

    keys: jax.Array  # shape=(num_slots, dim), dtype=float32
    labels: jax.Array  # shape=(num_slots,), dtype=int32
    written: jax.Array  # shape=(num_slots,), dtype=int32
    slots_of: jax.Array  # shape=(num_labels,), dtype=int32
    seen: jax.Array  # shape=(), dtype=int32

    @property
    def ages(self) -> jax.Array:
        """How many examples ago a slot was written, int32 (num_slots,). Computed, so that a write costs one row."""
        return self.seen - self.written


class Neighbours(NamedTuple):
    """What `query` returns, most similar first.

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
      num_slots: how many keys it holds.
      dim: the length of an embedding.
      num_labels: labels are integers in [0, num_labels).

    Returns:
      A `Memory`. It takes 4 (dim + 2) bytes a slot, and 4 a label.

    Raises:
      ValueError: if one of them is smaller than 1, or 2**31 - 1 or more.

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

    Differentiable with respect to x: <x / |x|, key>, the keys being constants. With `where`, the nearest key of the own
    label and the nearest of another one make a triplet:

        same = memory.labels[None] == labels[:, None]
        loss = jax.nn.relu(margin + query(memory, x, where=~same).similarity - query(memory, x, where=same).similarity)

    Args:
      memory: a `Memory`.
      x: floating, embeddings of shape (..., dim) and any length.
      k: how many, 1 to num_slots.
      where: bool, of a shape that broadcasts to (..., num_slots): which slots count. All of them by default.

    Returns:
      `Neighbours`. Empty slots are no neighbours.

    Raises:
      TypeError: if x is not floating, or where not bool.
      ValueError: for shapes that do not fit, or a k out of range.

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
    there = where.reshape((1,) * (len(shape) - where.ndim) + where.shape) & filled
    there = there if there.size == num_slots else jnp.broadcast_to(there, shape)
    flat, there = x.reshape(-1, x.shape[-1]), there.reshape(-1, num_slots)  # (B, dim), (1 or B, num_slots)

    def nearest(x: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.top_k(jnp.where(there, _cosines(x, keys), -jnp.inf), k)

    def nearest_of(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        similarity, slots = nearest(flat[i, None], there[jnp.minimum(i, len(there) - 1), None])
        return similarity[0], slots[0]

    if len(flat) * num_slots <= _CHUNK:
        similarity, slots = nearest(flat, there)
    else:
        similarity, slots = jax.lax.map(nearest_of, jnp.arange(len(flat)), batch_size=max(1, _CHUNK // num_slots))
    similarity, slots = (array.reshape(*shape[:-1], k) for array in (similarity, slots))
    found = similarity > -jnp.inf
    labels = jnp.where(found, memory.labels[slots], -1)
    return Neighbours(labels, similarity, jnp.where(found, slots, num_slots))


def update(memory: Memory, x: Any, labels: Any, *, balanced: bool = True) -> Memory:
    """The memory after some examples, one after the other.

    For an example x of label y, its nearest key being that of slot n:

        labels[n] == y:  keys[n] = (x + keys[n]) / |x + keys[n]|      the key moves towards x
        otherwise:       n = argmax(age * share), keys[n] = x / |x|, labels[n] = y

    and slot n has age 0, all others are one older. The share of a slot is that of its label among all slots: so a slot
    of a label that has many is overwritten before one of a rare label that is older, and if labels have equally many,
    the oldest is. Empty slots are filled first.

    A batch costs one product of embeddings and keys, and after that O(num_slots) an example to look and one row to
    write. Donate the memory, or its arrays are copied.

    Args:
      memory: a `Memory`.
      x: floating, embeddings (B, dim) of any length, or (dim,) for one example.
      labels: integers (B,), or () for one. Examples with a label outside [0, num_labels) are left out, as padding is.
      balanced: whether the share counts; otherwise the oldest slot is overwritten, as in the reference.

    Returns:
      A `Memory`. The result is that of B calls with one example each.

    Raises:
      TypeError: if x is not floating, or labels are not integers.
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> memory = js.memory.init(num_slots=4, dim=2, num_labels=3)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.1], [-1.0, 0.0]])
      >>> memory = js.memory.update(memory, x, jnp.array([1, 0, 0, 0, 2]))
      >>> memory.labels.tolist()  # slot 1 had to go: 2 * 3/4 > 3 * 1/4, where slot 0 was older
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
    """The memory after unit vectors x (B, dim) of labels (B,), and nothing, as in a scan."""
    x, labels = examples
    known = in_range(labels, len(memory.slots_of))
    labels = jnp.where(known, labels, 0).astype(jnp.int32)
    cosines = jnp.where((memory.labels >= 0)[None], _cosines(x, memory.keys), -jnp.inf)  # (B, num_slots)

    def one(state: tuple[Memory, jax.Array], example: Any) -> tuple[Any, None]:
        memory, cosines = state
        i, key, label, known = example
        nearest = jnp.argmax(cosines[i])
        same = memory.labels[nearest] == label
        slot = jnp.where(same, nearest, _to_overwrite(memory, balanced))
        key = jnp.where(same, _unit(key + memory.keys[slot]), key)
        old, slot = memory.labels[slot], jnp.where(known, slot, len(memory.labels))  # one past the end: not written
        more = known.astype(jnp.int32)
        seen = memory.seen + more
        slots_of = memory.slots_of.at[jnp.where(old < 0, len(memory.slots_of), old)].add(-more, mode="drop")
        memory = Memory(
            memory.keys.at[slot].set(key, mode="drop"),
            memory.labels.at[slot].set(label, mode="drop"),
            memory.written.at[slot].set(seen, mode="drop"),
            slots_of.at[label].add(more),
            seen,
        )
        return (memory, cosines.at[:, slot].set(_cosines(x, key[None])[:, 0], mode="drop")), None

    return jax.lax.scan(one, (memory, cosines), (jnp.arange(len(x)), x, labels, known))[0][0], None


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
    """x / |x| along the last axis; zero, with a gradient of zero, where x is."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _cosines(x: jax.Array, keys: jax.Array) -> jax.Array:
    """x (..., dim) of any length, keys (n, dim) of length 1 -> (..., n)."""
    return jnp.matmul(_unit(x), keys.T, precision=jax.lax.Precision.HIGHEST)
