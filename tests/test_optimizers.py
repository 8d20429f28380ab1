"""The named optimizers against their formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

V, D = 9, 3


def gradients(steps=6, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        ids = rng.choice([0, 2, 2, 5, 7, V], 8)
        yield ids, rng.normal(size=(8, D)).astype(np.float32)


def summed(ids, rows):
    """Touched rows and the dense sum of their gradients, float64."""
    out = np.zeros((V, D))
    np.add.at(out, ids[ids < V], rows[ids < V].astype(np.float64))
    return np.unique(ids[ids < V]), out


def run(tx, table, steps):
    return run_all({"it": tx}, table, steps)["it"]


def run_all(txs, table, steps):
    """{name: (table, state)} after the steps, which are one program for all the optimizers."""

    def step(carry, grads):
        ids, rows = grads
        out = {}
        for name, (table, state) in carry.items():
            try:
                updates, new_state = txs[name].update(js.RowSparse(ids, rows, (V, D)), state, table)
            except Exception as error:
                error.add_note(f"The optimizer is {name}.")
                raise
            out[name] = optax.apply_updates(table, updates), new_state
        return out, None

    @jax.jit
    def scan(table, ids, rows):
        return jax.lax.scan(step, {name: (table, tx.init(table)) for name, tx in txs.items()}, (ids, rows))[0]

    ids, rows = (np.stack(each) for each in zip(*steps, strict=True))
    return scan(table, ids.astype(np.int32), rows)


def test_rowwise_adagrad_is_fbgemms_formula():
    table = np.random.default_rng(1).normal(size=(V, D))
    want, s = table.copy(), np.full(V, 0.2)
    for ids, rows in gradients():
        touched, g = summed(ids, rows)
        s[touched] += np.mean(g[touched] ** 2, axis=1)
        want[touched] -= 0.1 * g[touched] / (np.sqrt(s[touched]) + 1e-3)[:, None]
    tx = js.lazy_rowwise_adagrad(0.1, initial_accumulator_value=0.2, eps=1e-3)
    got, state = run(tx, table.astype(np.float32), gradients())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    sums = optax.tree_utils.tree_get(state, "sum_of_squares")
    assert sums.shape == (V,)
    np.testing.assert_allclose(sums, s, rtol=1e-5)


REGULARIZERS = [(0.0, 0.0), (0.8, 0.1), (50.0, 0.0)]


@functools.cache
def ftrls():
    txs = {f"{l1} {l2}": js.lazy_ftrl(0.3, 1.5, l1, l2) for l1, l2 in REGULARIZERS}
    return run_all(txs, np.zeros((V, D), np.float32), gradients(12))


@pytest.mark.parametrize(("l1", "l2"), REGULARIZERS)
def test_ftrl_is_mcmahans_algorithm(l1, l2):
    lr, beta = 0.3, 1.5
    w, z, n = (np.zeros((V, D)) for _ in range(3))
    for ids, rows in gradients(12):
        touched, g = summed(ids, rows)
        for i in touched:
            for j in range(D):
                sigma = (np.sqrt(n[i, j] + g[i, j] ** 2) - np.sqrt(n[i, j])) / lr
                z[i, j] += g[i, j] - sigma * w[i, j]
                n[i, j] += g[i, j] ** 2
                small = abs(z[i, j]) <= l1
                w[i, j] = 0 if small else -(z[i, j] - np.sign(z[i, j]) * l1) / ((beta + np.sqrt(n[i, j])) / lr + l2)
    got, _ = ftrls()[f"{l1} {l2}"]
    np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got == 0, w == 0)  # exact zeros
    assert {0.0: 0, 50.0: D * 4}.get(l1, (w[[0, 2, 5, 7]] == 0).sum()) == (w[[0, 2, 5, 7]] == 0).sum()


def test_ftrl_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match=r"'learning_rate'.*schedule"):
        js.lazy_ftrl(optax.constant_schedule(0.1))
    tx = js.lazy_ftrl(0.1)
    with pytest.raises(ValueError, match=r"'params'.*update"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


CLIP = optax.clip_by_global_norm(0.5)
ALIASES = {
    "adam": (lambda before: js.lazy_adam(0.1, 0.8, 0.9, before=before), optax.adam(0.1, 0.8, 0.9)),
    "adamw": (
        lambda before: js.lazy_adamw(0.1, weight_decay=0.3, nesterov=True, before=before),
        optax.adamw(0.1, weight_decay=0.3, nesterov=True),
    ),
    "sgd": (lambda before: js.lazy_sgd(0.1, 0.9, True, before=before), optax.sgd(0.1, 0.9, True)),
    "adagrad": (lambda before: js.lazy_adagrad(0.1, 0.2, before=before), optax.adagrad(0.1, 0.2)),
}


# As `before` is the same for all of them, the others with it are slow: each is two optimizers more for lazy to try out.
BEFORE = [(name, None) for name in ALIASES] + [("adam", CLIP)]
MORE_BEFORE = [(name, CLIP) for name in ALIASES if name != "adam"]


@functools.cache
def aliases(slow):
    """What they make of the same gradients, and what the chains do that they stand for."""
    txs = {}
    for name, before in MORE_BEFORE if slow else BEFORE:
        named, inner = ALIASES[name]
        txs[f"{name} {before}"] = named(before)
        txs[f"chain of {name} {before}"] = js.lazy(inner if before is None else optax.chain(before, inner))
    return run_all(txs, np.random.default_rng(1).normal(size=(V, D)).astype(np.float32), gradients())


@pytest.mark.parametrize(
    ("name", "before"), BEFORE + [pytest.param(*each, marks=pytest.mark.slow) for each in MORE_BEFORE]
)
def test_aliases(name, before):
    results = aliases((name, before) in MORE_BEFORE)
    np.testing.assert_array_equal(results[f"{name} {before}"][0], results[f"chain of {name} {before}"][0])


@pytest.mark.parametrize("name", ["adagrad", "sgd"])
def test_where_frozen_and_dense_are_the_same(name):
    """A row without a gradient does not move under Adagrad, nor under plain sgd: lazy is dense optax there."""
    inner = {"adagrad": optax.adagrad(0.1), "sgd": optax.sgd(0.1)}[name]
    table = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)
    want, state, update = table, inner.init(table), jax.jit(inner.update)
    for ids, rows in gradients():
        updates, state = update(np.float32(summed(ids, rows)[1]), state, want)
        want = optax.apply_updates(want, updates)
    got, _ = run(js.lazy(inner), table, gradients())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
