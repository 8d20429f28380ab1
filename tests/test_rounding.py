"""Stochastic rounding of 16-bit parameters: neighbours only, unbiased, independent, and at the cost of the rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxsparse as js
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but

DTYPES = [jnp.bfloat16, jnp.float16]
ADD = js.stochastic_rounding(optax.identity())  # updates are gradients
V, D = 40, 8


@functools.partial(jax.jit, static_argnums=2)
def draws(p, u, many):
    """(many, *p.shape): what many steps would make of p + u."""

    def one(count):
        state = ADD.init(p)._replace(count=count)
        return optax.apply_updates(p, ADD.update(u.astype(p.dtype), state, p)[0])

    return jax.vmap(one)(jnp.arange(many))


def neighbours(x, dtype):
    """float64: the numbers of a 16-bit type on both sides of some of float32."""
    nearest = jnp.asarray(x).astype(dtype)
    below, above = (np.float64(jnp.nextafter(nearest, jnp.full_like(nearest, to))) for to in (-np.inf, np.inf))
    nearest, x = np.float64(nearest), np.float64(x)
    return np.where(nearest > x, below, nearest), np.where(nearest < x, above, nearest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_unbiased(dtype):
    rng, many = np.random.default_rng(0), 4000
    p = jnp.asarray(rng.normal(size=(V, D)) * 10.0 ** rng.integers(-3, 4, (V, D)), dtype)
    u = jnp.asarray(rng.normal(size=(V, D)) * np.abs(p) * 10.0 ** rng.integers(-5, 1, (V, D)), dtype)
    got = np.float64(draws(p, u, many))
    want = np.float32(p) + np.float32(u)
    a, b = neighbours(want, dtype)
    assert ((got == a) | (got == b)).all()
    chance = np.where(a == b, 0, (want - a) / np.where(a == b, 1, b - a))
    sigma = np.sqrt(chance * (1 - chance) / many) * (b - a)
    error = (got.mean(0) - want) / np.where(sigma, sigma, 1)
    assert np.abs(error).max() < 5 and 0.8 < error[sigma > 0].std() < 1.2  # as independent draws have it
    assert (np.abs(np.float64(jnp.asarray(want).astype(dtype)) - want)[sigma > 0] > 0).mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    hnp.arrays(np.float32, 16, elements=st.floats(-6e4, 6e4, width=32)),
    hnp.arrays(np.float32, 16, elements=st.floats(-100, 100, width=32)),
)
def test_only_to_neighbours(dtype, p, u):
    p, u = (jnp.asarray(np.where(np.abs(x) < 1e-30, 0, x)).astype(dtype) for x in (p, u))
    got = np.float64(draws(p, u, 20))
    total = np.float32(p) + np.float32(u)
    a, b = neighbours(total, dtype)
    small = 2.0**-23 * np.maximum(np.abs(np.float32(p)), np.abs(total))  # of a sum in float32
    assert ((got >= a - small) & (got <= b + small)).all()
    np.testing.assert_array_equal(draws(p, jnp.zeros(16), 20), np.broadcast_to(p, (20, 16)))  # no update, no change


def test_equal_elements_are_drawn_independently():
    """Along rows and columns, in steps that follow each other, and in two tables of one shape."""
    p = {"a": jnp.ones((1000, 64), jnp.bfloat16), "b": jnp.ones((1000, 64), jnp.bfloat16)}
    u = jax.tree.map(lambda x: jnp.full_like(x, -1e-3), p)
    steps = []
    for count in (0, 1):
        updates, _ = jax.jit(ADD.update)(u, ADD.init(p)._replace(count=jnp.int32(count)), p)
        steps += [np.float64(updates["a"] != 0), np.float64(updates["b"] != 0)]
    for x in steps:
        chance, n = 1e-3 * 256, x.size
        assert abs(x.mean() - chance) < 5 * np.sqrt(chance / n)
        for axis in (0, 1):
            assert 0.7 < x.mean(axis).var() * x.shape[axis] / (chance * (1 - chance)) < 1.3  # rows and columns alike
            near = np.corrcoef(np.roll(x, 1, axis).ravel(), x.ravel())[0, 1]
            assert abs(near) < 5 / np.sqrt(n)
    assert np.abs(np.corrcoef([x.ravel() for x in steps]) - np.eye(4)).max() < 5 / np.sqrt(64_000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_updates_are_kept_on_average(dtype):
    """1,000 updates of a tenth of what rounding to nearest keeps."""
    lost = float(jnp.finfo(dtype).eps) / 20

    def end(tx):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jnp.full_like(p, 1), state, p)
            return (optax.apply_updates(p, updates), state), None

        p = jnp.full((200, 4), 1.5, dtype)
        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=1000)[0][0])(p)

    assert (end(optax.sgd(-lost)) == 1.5).all()
    np.testing.assert_allclose(
        jnp.float32(end(js.stochastic_rounding(optax.sgd(-lost)))).mean(), 1.5 + 1000 * lost, rtol=5e-3
    )


def test_what_is_not_finite_stays_so():
    for dtype in DTYPES:
        p = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0, -0.0], dtype)
        np.testing.assert_array_equal(np.float32(draws(p, jnp.zeros(5), 50)), np.broadcast_to(np.float32(p), (50, 5)))


def test_other_parameters_are_inners():
    rng = np.random.default_rng(0)
    p = {"t": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32), "n": None, "s": jnp.float32(1)}
    inner = optax.adamw(0.1)
    tx, g = js.stochastic_rounding(inner), jax.tree.map(jnp.ones_like, p)
    got, state = tx.update(g, tx.init(p), p)
    want, inner_state = inner.update(g, inner.init(p), p)
    jax.tree.map(np.testing.assert_array_equal, (got, state.inner_state), (want, inner_state))


def test_moments_are_float32():
    p = {"t": jnp.ones((5, 2), jnp.bfloat16), "s": jnp.bfloat16(1)}
    tx = js.stochastic_rounding(optax.adam(0.1))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    assert {x.dtype for x in jax.tree.leaves((updates, state)) if x.dtype != jnp.int32} == {jnp.dtype(jnp.float32)}


INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
SHAPES = {"t": (V, D), "bias": (V,), "w": (D,)}


def loss(params, ids):
    logits = params["t"][ids].astype(jnp.float32) @ params["w"].astype(jnp.float32) + params["bias"][ids]
    return jnp.mean((logits - 1) ** 2)


def stock(params, opt_state, ids):
    grads = jax.grad(loss)(params, ids)
    updates, opt_state = js.stochastic_rounding(INNER).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def by_hand(params, opt_state, ids):
    grads = js.grad(loss)(params, ids)
    updates, opt_state = js.lazy(js.stochastic_rounding(INNER)).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def new_state(dtype=jnp.bfloat16, shapes=SHAPES):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return params, js.stochastic_rounding(INNER).init(params)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16], DTYPES))
def test_a_row_sparse_step_draws_what_a_dense_one_does(dtype):
    """And all other rows keep their bits."""
    want, jitted, lazy = new_state(dtype), new_state(dtype), new_state(dtype)
    step, hand, dense = js.jit(stock), jax.jit(by_hand), jax.jit(stock)
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, V, 12)
        old, want = want, dense(*want, ids)
        read = np.isin(np.arange(V), ids)
        keep = lambda new, old: jnp.where(read.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731,B023
        by_row = lambda x: np.shape(x)[:1] == (V,)  # noqa: E731
        want = jax.tree.map(lambda new, old: keep(new, old) if by_row(new) else new, want, old)  # noqa: B023
        jitted, lazy = step(*jitted, ids), hand(*lazy, ids)
        for got in (jitted, lazy):
            for x, y in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
                assert x.dtype == dtype
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("step", slow_but([stock], [stock, by_hand]))
def test_no_noise_for_the_whole_table(step):
    state = new_state(shapes=SHAPES | {"t": (50_000, D), "bias": (50_000,)})
    step = js.jit(step) if step is stock else jax.jit(step, donate_argnums=(0, 1))
    lowered = step.lower(*state, jnp.arange(12))
    assert "50000x8xf32" in lowered.as_text() and not re.search(r"50000\S*xui32", lowered.as_text())
    if jax.__version_info__ >= (0, 11):  # before, XLA converts whole bfloat16 tables on CPU to write some rows
        assert not large_arrays(compiled_by_default(lowered).as_text(), 50_000)


@pytest.mark.slow
def test_errors():
    params, state = new_state()
    with pytest.raises(TypeError, match=r"'inner' argument of js\.stochastic_rounding must be an optax transformation"):
        js.stochastic_rounding(0.1)
    with pytest.raises(ValueError, match=r"'params' argument of js\.stochastic_rounding.*Pass params"):
        ADD.update(params, ADD.init(params))
    grads = js.grad(loss)(params, jnp.array([3]))
    with pytest.raises(TypeError, match=r"Put it inside: js\.lazy\(js\.stochastic_rounding"):
        js.stochastic_rounding(js.lazy(INNER)).update(grads, state, params)
