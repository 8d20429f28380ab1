"""Row ids by NumPy against the same program by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse import _jax
from jaxsparse.train.numpy_ids import numpy_function

V = 1000
WORD = st.integers(-(2**31), 2**31 - 1)
ARRAYS = st.lists(WORD, min_size=12, max_size=12).map(lambda x: np.array(x, np.int32).reshape(3, 4))


def normalised(ids):
    return jnp.where(ids < 0, ids + V, ids)


@jax.custom_jvp
def same(x):
    return x


COVERED = {
    "negative ids": lambda a, b: normalised(a),
    "several arrays": lambda a, b: jnp.concatenate([normalised(a), b + V * jnp.arange(4, dtype=jnp.int32)], axis=1),
    "hashed": lambda a, b: (a.astype(jnp.uint32) * jnp.uint32(2654435761) ^ b.astype(jnp.uint32)) % jnp.uint32(V),
    "remainders": lambda a, b: jnp.remainder(a, V) + jax.lax.rem(b, jnp.int32(7)),
    "remainders of zero": lambda a, b: jax.lax.rem(a, jnp.minimum(b, jnp.int32(3)) & jnp.int32(3)),
    "masked": lambda a, b: jnp.where((a > 5) & ~(b == 0) | (a <= -9) | (b >= 2) & (b != 4), a, V),
    "clipped": lambda a, b: jnp.clip(a, 0, V - 1) + jax.lax.max(b, jnp.int32(0)) - jax.lax.min(b, jnp.int32(0)),
    "cut": lambda a, b: a[1:, ::2].T,
    "narrow": lambda a, b: a.astype(jnp.uint8).astype(jnp.int32) * b.astype(jnp.int16),
    "bools": lambda a, b: a.astype(bool) ^ b.astype(bool),
    "broadcast": lambda a, b: a[:, None] + b[None, :, 0, None],
    "calls": lambda a, b: jax.jit(normalised)(a) + jax.jit(normalised)(b) + same(a),
    "an input": lambda a, b: b,
    "a constant": lambda a, b: a + np.arange(4, dtype=np.int32),
    "one number": lambda a, b: a[0, 0] + jnp.int32(3),
}
same.defjvp(lambda primals, tangents: (primals[0], tangents[0]))

LIKE = jax.ShapeDtypeStruct((3, 4), jnp.int32)


@functools.cache
def both(name):
    with jax.numpy_rank_promotion("allow"):
        by_xla = jax.jit(COVERED[name]).lower(LIKE, LIKE).compile()
        return by_xla, numpy_function(_jax.trace(COVERED[name], LIKE, LIKE), [0])


@pytest.mark.parametrize("name", COVERED)
@given(ARRAYS, ARRAYS)
def test_values_are_those_of_xla(name, a, b):
    by_xla, by_numpy = both(name)
    want, (got,) = by_xla(a, b), by_numpy([a, jnp.asarray(b)])
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_equal_outputs_are_computed_once():
    program = _jax.trace(lambda a, b: (normalised(a), b, normalised(a), a * b), LIKE, LIKE)
    x, y, again, product = numpy_function(program, [4, 7, 4, 5])([np.full((3, 4), -1, np.int32), jnp.ones((3, 4), int)])
    assert x is again and (x == V - 1).all() and (y == 1).all() and (product == -1).all()


@pytest.mark.parametrize(
    "fun",
    [
        lambda a, b: (a * 0.5).astype(jnp.int32),  # floats
        lambda a, b: jnp.sort(a),
        lambda a, b: a // b,
        lambda a, b: jax.lax.cumsum(b),
        lambda a, b: jax.jit(jnp.sort)(a),
        lambda a, b: jax.lax.select_n(jnp.clip(a, 0, 2), a, b, a),
        lambda a, b: a + np.ones(4).astype(int) * jnp.floor(jnp.float32(1)).astype(int),
    ],
)
def test_what_numpy_does_not_do_alike_is_left_to_xla(fun):
    with jax.numpy_rank_promotion("allow"):
        assert numpy_function(_jax.trace(fun, LIKE, LIKE), [0]) is None


TX = optax.adam(0.1)


def step_with(ids_of):
    def step(state, batch):
        params, opt_state = state

        def loss_fn(params):
            ids = ids_of(batch, params["seen"])
            return jnp.sum(jnp.take(params["t"], ids, axis=0) ** 2 * jnp.arange(1.0, 5.0)[:, None])

        loss, grads = jax.value_and_grad(loss_fn, allow_int=True)(params)
        updates, opt_state = TX.update({"t": grads["t"]}, opt_state, {"t": params["t"]})
        return (params | optax.apply_updates({"t": params["t"]}, updates), opt_state), loss

    return step


@pytest.mark.parametrize(
    ("ids_of", "by_numpy"),
    [
        (lambda batch, seen: batch, True),
        (lambda batch, seen: batch * jnp.int32(40503) % 7, True),
        (lambda batch, seen: jnp.sort(batch), False),
        (lambda batch, seen: batch + seen, False),  # of a donated array
    ],
)
def test_steps(ids_of, by_numpy):
    rng = np.random.default_rng(0)
    params = {"t": jnp.array(rng.standard_normal((7, 2)), jnp.float32), "seen": jnp.int32(0)}
    state = params, TX.init({"t": params["t"]})
    dense, rows = jax.jit(step_with(ids_of)), js.jit(step_with(ids_of))
    batch = np.array([3, -1, 3, 0], np.int64)
    want, want_loss = dense(state, batch)
    (got, _), loss = rows(jax.tree.map(jnp.copy, state), batch)
    (program,) = rows._programs.values()
    assert (program._numpy_ids is not None) == by_numpy
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    read = np.unique(np.asarray(ids_of(jnp.asarray(batch), params["seen"])) % 7)
    expected = np.asarray(params["t"]).copy()
    expected[read] = want[0]["t"][read]
    np.testing.assert_allclose(got["t"], expected, rtol=1e-6)
