"""Losses and weights against NumPy, and that their gradients stay row-sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxsparse as js
from jaxsparse.losses import log_uniform_draw, log_uniform_log_probability
from jaxsparse.rows import is_row_sparse

V, D, B = 20, 4, 6
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(B, D)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=V), jnp.float32)
LABELS = jnp.array([3, 0, 19, 3, 7, 1])


def test_weighted_mean():
    values, weight = jnp.array([1.0, jnp.nan, 5.0]), jnp.array([1.0, 0.0, 3.0])
    assert js.weighted_mean(values, weight) == 4
    np.testing.assert_allclose(jax.grad(js.weighted_mean)(values, weight), [0.25, 0, 0.75])
    assert js.weighted_mean(values, jnp.zeros(3)) == 0
    np.testing.assert_array_equal(jax.grad(js.weighted_mean)(values, jnp.zeros(3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"'weight'.*\(3,\).*\(2,\)"):
        js.weighted_mean(values, jnp.zeros(2))


def test_inverse_frequency_weights():
    labels = RNG.choice([0, 0, 0, 2, 4], 200)
    want = [np.log(200 / (labels == k).sum()) if (labels == k).any() else 0 for k in range(6)]
    np.testing.assert_allclose(js.inverse_frequency_weights(labels, 6), want, rtol=1e-6)
    np.testing.assert_array_equal(js.inverse_frequency_weights([], 2), [0, 0])
    for bad in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"'labels'.*\[0, 3\)"):
            js.inverse_frequency_weights(bad, 3)
    with pytest.raises(TypeError, match=r"'labels'.*integer"):
        js.inverse_frequency_weights([0.5])


def everything(key, num_samples, num_classes):
    """A sample that is the whole vocabulary."""
    del key
    assert num_samples == num_classes
    return jnp.arange(num_classes)


def uniform(classes, num_classes):
    return jnp.full(classes.shape, -np.log(num_classes))


@pytest.mark.parametrize("bias", [None, BIAS])
def test_with_everything_sampled_it_is_the_softmax(bias):
    """Every class expected once, own label left out of the sample: the full cross-entropy, in value and gradient."""

    def sampled(table, hidden, bias):
        return js.sampled_softmax(
            table, hidden, LABELS, None, num_samples=V, bias=bias, draw=everything, log_probability=uniform
        ).sum()

    def full(table, hidden, bias):
        logits = hidden @ table.T + (0 if bias is None else bias[None])
        return -jax.nn.log_softmax(logits)[jnp.arange(B), LABELS].sum()

    arguments = (0, 1) if bias is None else (0, 1, 2)
    value, grads = jax.value_and_grad(sampled, arguments)(TABLE, HIDDEN, bias)
    want_value, want = jax.value_and_grad(full, arguments)(TABLE, HIDDEN, bias)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hits", [True, False])
def test_against_numpy(hits):
    key, samples = jax.random.key(1), 30
    got = js.sampled_softmax(TABLE, HIDDEN, LABELS, key, num_samples=samples, bias=BIAS, remove_accidental_hits=hits)
    drawn = np.asarray(log_uniform_draw(key, samples, V))
    expected_count = samples * np.log1p(1 / (np.arange(V) + 1)) / np.log(V + 1)
    logits = np.asarray(HIDDEN @ TABLE.T + BIAS[None], np.float64) - np.log(expected_count)[None]
    for i, label in enumerate(np.asarray(LABELS)):
        kept = drawn[drawn != label] if hits else drawn
        terms = np.concatenate([logits[i, [label]], logits[i, kept]])
        np.testing.assert_allclose(got[i], scipy.special.logsumexp(terms) - logits[i, label], rtol=1e-4)


def test_the_sampler_draws_what_it_says():
    probability = np.exp(log_uniform_log_probability(jnp.arange(V), V))
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-5)
    counts = np.bincount(log_uniform_draw(jax.random.key(0), 100_000, V), minlength=V)
    assert len(counts) == V
    np.testing.assert_allclose(counts / 100_000, probability, atol=5 * np.sqrt(0.25 / 100_000))


def test_its_gradients_are_row_sparse():
    def loss(params):
        return js.sampled_softmax(
            params["t"], HIDDEN, LABELS, jax.random.key(0), num_samples=8, bias=params["b"]
        ).mean()

    params = {"t": TABLE, "b": BIAS}
    grads, want = js.grad(loss)(params), jax.grad(loss)(params)
    for name in params:
        assert is_row_sparse(grads[name]) and grads[name].rows.shape[0] == B + 8
        np.testing.assert_allclose(grads[name].todense(), want[name], rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"'hidden'.*\(B, d\)"):
        js.sampled_softmax(TABLE, HIDDEN[:, :2], LABELS, None, num_samples=3)
    with pytest.raises(ValueError, match=r"'log_probability'.*with draw"):
        js.sampled_softmax(TABLE, HIDDEN, LABELS, None, num_samples=3, draw=everything)
