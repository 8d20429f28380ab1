"""What is made of rows for each id of a batch, and only summed: in pieces, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO

import jaxsparse as js
from jaxsparse.trace import by_entry
from tests.hlo import compiled_text

NUM_ROWS, DIM, BATCH, LENGTH = 90, 16, 11, 5


def sparse(table, ids, w):
    entries = jnp.stack([jnp.arange(BATCH * LENGTH) % BATCH, ids.ravel()], 1)
    return js.dot(BCOO((w.ravel(), entries), shape=(BATCH, NUM_ROWS)), table)


MODELS = {
    "chosen": lambda t, ids, w: jnp.where((ids > 3)[..., None], t[ids], 0.5).sum(1),
    "weighted": lambda t, ids, w: jnp.einsum("bl,bld->bd", w, t[ids]),
    "weights of the rows": lambda t, ids, w: (jax.nn.softmax(t[ids].sum(-1))[..., None] * t[ids]).sum(1),
    "heads": lambda t, ids, w: (t[ids].reshape(BATCH, LENGTH, 2, 8) * w[..., None, None]).max(1).reshape(BATCH, DIM),
    "along the row": lambda t, ids, w: (t[ids] * w[..., None]).sum(2) @ jnp.ones((LENGTH, DIM)),
    "sparse": sparse,
}


def train_step(tables, ids, w):
    def loss(tables):
        return sum(jnp.mean(jnp.tanh(model(tables[name], ids, w)) ** 2) for name, model in MODELS.items())

    value, grads = jax.value_and_grad(loss)(tables)
    return jax.tree.map(lambda t, g: t - 3.0 * g, tables, grads), value


@pytest.mark.cpu("elsewhere there are no pieces")
def test_results_are_those_of_jax(monkeypatch):
    monkeypatch.setattr(by_entry, "_LARGE", 100)
    monkeypatch.setattr(by_entry, "_PIECE", 1000)  # three examples, or 15 entries
    turns, turn = [], by_entry.Cut
    monkeypatch.setattr(by_entry, "Cut", lambda *args: turns.append(args) or turn(*args))
    rng = np.random.default_rng(0)
    tables = {name: jnp.array(rng.standard_normal((NUM_ROWS, DIM)), jnp.float32) for name in MODELS}
    ids, w = rng.integers(0, 30, (BATCH, LENGTH), np.int32), rng.standard_normal((BATCH, LENGTH)).astype(np.float32)
    expected, loss = jax.jit(train_step)(tables, ids, w)
    found, found_loss = js.jit(train_step)(jax.tree.map(jnp.copy, tables), ids, w)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    for name in MODELS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert {size for _, size in turns} == {3, 2, 15, 10}


@pytest.mark.cpu("elsewhere there are no pieces")
def test_no_array_has_a_row_for_each_id():
    n = 100_000
    x = js.from_scipy(scipy.sparse.csr_matrix((np.ones(n, np.float32), np.arange(n), np.arange(0, n + 1, 100))))

    def step(table, x, ids):
        def loss(table):
            means = jnp.where((ids > 0)[..., None], table[ids], 0).mean(1)
            return jnp.sum(jnp.tanh(js.dot(x, table))) + jnp.sum(jnp.tanh(means))

        return table - jax.grad(loss)(table)

    text = compiled_text(js.jit(step), jnp.zeros((n, 8)), x, jnp.zeros((2_500, 40), jnp.int32))
    assert "f32[100000,8]" in text  # the table, and blocks of it
    for shape in ("[100000,1,8]", "[2500,40,8]"):
        assert f"f32{shape}" not in text
