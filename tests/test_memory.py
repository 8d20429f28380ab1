"""js.memory against NumPy, which learns one example after the other and knows nothing of batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js
from tests.marks import slow_but

SLOTS, DIM, LABELS, B = 6, 3, 4, 8
query = jax.jit(js.memory.query, static_argnames="k")
update = jax.jit(js.memory.update, static_argnames="balanced")


class Oracle:
    """Lists of slots; a slot is [key, label, age]."""

    def __init__(self, slots):
        self.slots = [None] * slots

    def cosines(self, x):
        x = np.asarray(x, np.float64)
        return [-np.inf if slot is None else slot[0] @ x / np.linalg.norm(x) for slot in self.slots]

    def learn(self, x, label, balanced=True):
        x = np.asarray(x, np.float64) / np.linalg.norm(x)
        nearest = int(np.argmax(self.cosines(x)))
        if self.slots[nearest] is not None and self.slots[nearest][1] == label:
            key = x + self.slots[nearest][0]
            n, new = nearest, [key / np.linalg.norm(key), label, 0]
        else:
            n, new = self.oldest(balanced), [x, label, 0]
        for slot in self.slots:
            if slot is not None:
                slot[2] += 1
        self.slots[n] = new

    def oldest(self, balanced):
        if None in self.slots:
            return self.slots.index(None)
        labels = [slot[1] for slot in self.slots]
        share = [labels.count(label) / len(labels) if balanced else 1 for label in labels]
        return int(np.argmax(np.float64([slot[2] for slot in self.slots]) * share))

    def equals(self, memory):
        labels = [-1 if slot is None else slot[1] for slot in self.slots]
        np.testing.assert_array_equal(memory.labels, labels)
        np.testing.assert_array_equal(memory.slots_of, np.bincount([x for x in labels if x >= 0], minlength=LABELS))
        for i, slot in enumerate(self.slots):
            np.testing.assert_allclose(memory.keys[i], np.zeros(DIM) if slot is None else slot[0], atol=1e-5)
            if slot is not None:
                assert memory.ages[i] == slot[2]


def drawn(seed, size=B):
    """Embeddings in general position, so that no two similarities are equal up to rounding, and unbalanced labels."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, DIM)).astype(np.float32), rng.choice(LABELS, size, p=[0.7, 0.2, 0.07, 0.03])


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_update(seed, balanced):
    memory, oracle = js.memory.init(SLOTS, DIM, LABELS), Oracle(SLOTS)
    for part in range(3):
        x, labels = drawn([seed, part])
        memory = update(memory, x, labels, balanced=balanced)
        for one, label in zip(x, labels, strict=True):
            oracle.learn(one, label, balanced)
        oracle.equals(memory)


def test_in_parts_and_one_by_one(monkeypatch):
    """A batch too large for one matrix of similarities, with a last part that is padded; and single examples."""
    x, labels = drawn(0)
    whole = update(js.memory.init(SLOTS, DIM, LABELS), x, labels)
    with monkeypatch.context() as patch:
        patch.setattr(js.memory, "_CHUNK", 3 * SLOTS)
        parts = js.memory.update(js.memory.init(SLOTS, DIM, LABELS), x, labels)
    single = js.memory.init(SLOTS, DIM, LABELS)
    for one, label in zip(x, labels, strict=True):
        single = update(single, one, label)
    for other in (parts, single):
        for a, b in zip(whole, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def with_slots(labels, ages):
    """A memory whose keys are the axes."""
    labels, ages = np.int32(labels), np.int32(ages)
    slots_of = np.bincount(labels, minlength=LABELS).astype(np.int32)
    keys = np.eye(len(labels), dtype=np.float32)
    return js.memory.Memory(*map(jnp.asarray, (keys, labels, 100 - ages, slots_of)), jnp.int32(100))


def test_the_frequent_label_goes_first():
    """The example of the source: 50 * 0.2 = 10 stays, 15 * 0.8 = 12 goes; by age alone it would be the other way."""
    memory, new = with_slots([0, 0, 0, 0, 1], [15, 14, 13, 12, 50]), np.float32([0, 0, 0, 0, -1])
    assert update(memory, new, 2).labels.tolist() == [2, 0, 0, 0, 1]
    assert update(memory, new, 2, balanced=False).labels.tolist() == [0, 0, 0, 0, 2]
    even = with_slots([0, 1, 2, 3], [3, 9, 4, 2])  # "if all labels are distributed uniformly": the original method
    for balanced in (True, False):
        assert update(even, np.float32([0, -1, 0, 0]), 3, balanced=balanced).labels.tolist() == [0, 3, 2, 3]


def test_padding_is_left_out():
    x, labels = drawn(1)
    memory = update(js.memory.init(SLOTS, DIM, LABELS), x, labels)
    for a, b in zip(memory, update(memory, x, np.full(B, -1)), strict=True):
        np.testing.assert_array_equal(a, b)
    mixed = np.where(np.arange(B) % 2 == 0, labels, [-1, LABELS] * (B // 2))
    want, oracle = update(memory, x, mixed), Oracle(SLOTS)
    for one, label in [*zip(x, labels, strict=True), *zip(x[::2], labels[::2], strict=True)]:
        oracle.learn(one, label)
    oracle.equals(want)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, SLOTS]))
def test_query(seed, k):
    x, labels = drawn(seed, size=4)  # fewer than slots
    memory, oracle = update(js.memory.init(SLOTS, DIM, LABELS), x, labels), Oracle(SLOTS)
    for one, label in zip(x, labels, strict=True):
        oracle.learn(one, label)
    x = drawn([seed, 1])[0]
    where = np.random.default_rng(seed).random((B, SLOTS)) < 0.7
    near, some = query(memory, x, k=k), query(memory, x, k=k, where=where)
    for i in range(B):
        cosines = np.array(oracle.cosines(x[i]))
        for got, allowed in ((near, cosines), (some, np.where(where[i], cosines, -np.inf))):
            order = np.argsort(-allowed, kind="stable")[:k]
            found = np.isfinite(allowed[order])
            np.testing.assert_allclose(got.similarity[i], allowed[order], atol=1e-5)
            np.testing.assert_array_equal(got.slots[i], np.where(found, order, SLOTS))
            np.testing.assert_array_equal(got.labels[i], np.where(found, memory.labels[order], -1))


@pytest.mark.parametrize("mask", slow_but(["each"], ["none", "one", "column", "each"]))
def test_query_in_parts(monkeypatch, mask):
    memory, x = update(js.memory.init(SLOTS, DIM, LABELS), *drawn(2)), drawn(3)[0]
    shape = {"none": None, "one": (SLOTS,), "column": (B, 1), "each": (B, SLOTS)}[mask]
    where = None if shape is None else np.random.default_rng(0).random(shape) < 0.7
    whole = query(memory, x, k=2, where=where)
    monkeypatch.setattr(js.memory, "_CHUNK", 3 * SLOTS)
    for a, b in zip(whole, js.memory.query(memory, x, k=2, where=where), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    if mask == "one":
        for a, b in zip(whole, js.memory.query(memory, x.reshape(2, 4, DIM), k=2, where=where), strict=True):
            np.testing.assert_allclose(a, b.reshape(a.shape), atol=1e-6)


def test_a_triplet_has_a_gradient_by_the_query_alone():
    memory, (x, labels) = update(js.memory.init(SLOTS, DIM, LABELS), *drawn(4)), drawn(5)
    x, labels = x[labels == 0][:1], labels[labels == 0][:1]

    def loss(keys, x):
        m = memory._replace(keys=keys)
        same = m.labels[None] == labels[:, None]
        return jnp.sum(1 + query(m, x, where=~same).similarity - query(m, x, where=same).similarity)

    of_keys, of_x = jax.jit(jax.grad(loss, (0, 1)))(memory.keys, x)
    assert not of_keys.any()
    for direction in np.eye(DIM, dtype=np.float32):
        difference = (loss(memory.keys, x + 1e-2 * direction) - loss(memory.keys, x - 1e-2 * direction)) / 2e-2
        np.testing.assert_allclose(of_x @ direction, difference, atol=2e-3)


def test_no_examples_and_zero_embeddings():
    memory = js.memory.init(SLOTS, DIM, LABELS)
    for a, b in zip(memory, update(memory, np.zeros((0, DIM), np.float32), np.zeros(0, np.int32)), strict=True):
        np.testing.assert_array_equal(a, b)  # no examples
    memory = update(memory, np.zeros((2, DIM), np.float32), np.int32([1, 2]))
    memory = update(memory, *drawn(6))
    assert np.isfinite(memory.keys).all()
    gradient = jax.grad(lambda x: query(memory, x).similarity.sum())(jnp.zeros(DIM))
    np.testing.assert_array_equal(gradient, np.zeros(DIM))


@pytest.mark.slow
def test_vmap():
    x, labels = (np.stack(both) for both in zip(drawn(7), drawn(8), strict=True))
    memories = jax.vmap(lambda x, y: js.memory.update(js.memory.init(SLOTS, DIM, LABELS), x, y))(x, labels)
    near = jax.vmap(functools.partial(js.memory.query, k=2))(memories, x)
    for i in range(2):
        one = update(js.memory.init(SLOTS, DIM, LABELS), x[i], labels[i])
        for a, b in zip((*one, *query(one, x[i], k=2)), (*memories, *near), strict=True):
            np.testing.assert_allclose(a, b[i], atol=1e-6)


def test_writes_are_sparse():
    """A donated memory is written in place: no copy of its keys, whatever their number."""
    shapes = jax.eval_shape(lambda: js.memory.init(100_000, 64, 10))
    x, labels = jax.ShapeDtypeStruct((4, 64), "float32"), jax.ShapeDtypeStruct((4,), "int32")
    program = jax.jit(js.memory.update, donate_argnums=0).lower(shapes, x, labels).compile().memory_analysis()
    keys = 4 * 100_000 * 64
    assert program.alias_size_in_bytes >= keys
    assert program.temp_size_in_bytes < keys / 4


def test_errors():
    memory = js.memory.init(SLOTS, DIM, LABELS)
    x, labels = drawn(0)
    for name in ("num_slots", "dim", "num_labels"):
        with pytest.raises(ValueError, match=rf"'{name}'.*at least 1"):
            js.memory.init(**{"num_slots": 2, "dim": 2, "num_labels": 2} | {name: 0})
    with pytest.raises(ValueError, match=r"'x'.*\(\.\.\., 3\)"):
        js.memory.query(memory, x[:, :2])
    with pytest.raises(TypeError, match=r"'x'.*floating"):
        js.memory.query(memory, x.astype(int))
    for k in (0, SLOTS + 1):
        with pytest.raises(ValueError, match=r"'k'.*1 to 6"):
            js.memory.query(memory, x, k=k)
    with pytest.raises(TypeError, match=r"'where'.*bool"):
        js.memory.query(memory, x, where=np.ones(SLOTS))
    with pytest.raises(ValueError, match=r"'where'.*broadcasts"):
        js.memory.query(memory, x, where=np.ones((B + 1, SLOTS), bool))
    with pytest.raises(ValueError, match=r"'labels'.*\(B,\)"):
        js.memory.update(memory, x, labels[:2])
    with pytest.raises(TypeError, match=r"'labels'.*integer"):
        js.memory.update(memory, x, labels.astype(float))
