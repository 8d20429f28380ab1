"""Around Equinox, if it is installed: its modules are trees whose leaves need not be arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.hlo import compiled_by_default, large_arrays

eqx = pytest.importorskip("equinox")

V, D = 3000, 4


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    mlp: eqx.nn.MLP  # which holds its activation, a function, as a leaf

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(V, D, key=key)
        self.mlp = eqx.nn.MLP(D, "scalar", 8, 1, key=key)

    def __call__(self, ids):
        return self.mlp(jax.vmap(self.embed)(ids).mean(0))


def loss_fn(model, batch):
    ids, y = batch
    return jnp.mean((jax.vmap(model)(ids) - y) ** 2)


def setting():
    rng = np.random.default_rng(0)
    batch = rng.integers(0, V, (6, 3)).astype(np.int32), rng.normal(size=6).astype(np.float32)
    return Model(jax.random.key(0)), batch


def test_one_word():
    """The model is divided before the step, and put together inside; the rest is as Equinox's documentation has it."""
    model, batch = setting()
    tx = optax.sgd(0.3)

    @eqx.filter_jit
    def equinox_step(model, opt_state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    want, want_state = model, tx.init(eqx.filter(model, eqx.is_inexact_array))
    params, static = eqx.partition(jax.tree.map(lambda x: x, model), eqx.is_inexact_array)
    params = jax.tree.map(jnp.copy, params)  # `model` stays
    opt_state = tx.init(params)

    @js.jit
    def step(params, opt_state, batch):
        model = eqx.combine(params, static)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(params, updates), opt_state, loss

    text = compiled_by_default(step.lower(params, opt_state, batch)).as_text()
    assert not large_arrays(text, V)
    for _ in range(3):
        want, want_state, want_loss = equinox_step(want, want_state, batch)
        params, opt_state, loss = step(params, opt_state, batch)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    got = eqx.combine(params, static)
    for x, y in zip(jax.tree.leaves(eqx.filter(got, eqx.is_array)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(eqx.filter(want, eqx.is_array)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_two_words():
    model, batch = setting()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = js.lazy(optax.sgd(0.3))

    @jax.jit
    def step(params, opt_state, batch):
        grad = js.value_and_grad(lambda params, batch: loss_fn(eqx.combine(params, static), batch))
        loss, grads = grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, grads

    new, _, loss, grads = step(params, tx.init(params), batch)
    want_loss, want = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(model, batch)
    assert is_row_sparse(grads.embed.weight)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    np.testing.assert_allclose(grads.embed.weight.todense(), want.embed.weight, rtol=1e-5, atol=1e-6)
    for x, y, g in zip(*map(jax.tree.leaves, (new, params, eqx.filter(want, eqx.is_array))), strict=True):
        np.testing.assert_allclose(x, y - 0.3 * g, rtol=1e-5, atol=1e-6)


def test_what_is_no_array_is_named():
    model, batch = setting()
    with pytest.raises(TypeError, match=r"Got a custom_jvp at \.mlp\.activation.*eqx\.partition"):
        js.grad(loss_fn)(model, batch)
    with pytest.raises(TypeError, match=r"a custom_jvp at argument \[0\]\.mlp.*eqx\.partition and eqx\.combine"):
        js.jit(lambda model, batch: (model, loss_fn(model, batch)))(model, batch)
