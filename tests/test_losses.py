"""Losses and weights against NumPy, and that their gradients stay row-sparse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxsparse as js
from jaxsparse.ops.losses import log_uniform_draw, log_uniform_log_probability
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.marks import slow_but

V, D, B = 20, 4, 6
RNG = np.random.default_rng(0)
TABLE, HIDDEN, BIAS = (RNG.normal(size=shape).astype(np.float32) for shape in ((V, D), (B, D), V))
LABELS = np.array([3, 0, 19, 3, 7, 1])


def test_weighted_mean():
    values, weight = jnp.array([1.0, jnp.nan, 5.0]), jnp.array([1.0, 0.0, 3.0])
    mean_and_gradient = jax.jit(jax.value_and_grad(js.weighted_mean))
    mean, gradient = mean_and_gradient(values, weight)
    assert mean == 4 == js.weighted_mean(values, weight)
    np.testing.assert_allclose(gradient, [0.25, 0, 0.75])
    mean, gradient = mean_and_gradient(values, np.zeros(3, np.float32))
    assert mean == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))
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
    both = jax.jit(lambda *args: [jax.value_and_grad(f, arguments)(*args) for f in (sampled, full)])
    (value, grads), (want_value, want) = both(TABLE, HIDDEN, bias)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def losses_and_sample(samples):
    """The losses with and without removal of accidental hits, and what was drawn for them."""

    @jax.jit
    def results(table, hidden, bias):
        key = jax.random.key(1)
        loss = functools.partial(js.sampled_softmax, table, hidden, LABELS, key, num_samples=samples, bias=bias)
        return {hits: loss(remove_accidental_hits=hits) for hits in (True, False)}, log_uniform_draw(key, samples, V)

    return jax.device_get(results(TABLE, HIDDEN, BIAS))


@pytest.mark.parametrize("hits", [True, False])
def test_against_numpy(hits):
    samples = 30
    losses, drawn = losses_and_sample(samples)
    got = losses[hits]
    expected_count = samples * np.log1p(1 / (np.arange(V) + 1)) / np.log(V + 1)
    logits = np.asarray(HIDDEN @ TABLE.T + BIAS[None], np.float64) - np.log(expected_count)[None]
    for i, label in enumerate(np.asarray(LABELS)):
        kept = drawn[drawn != label] if hits else drawn
        terms = np.concatenate([logits[i, [label]], logits[i, kept]])
        np.testing.assert_allclose(got[i], scipy.special.logsumexp(terms) - logits[i, label], rtol=1e-4)


def test_the_sampler_draws_what_it_says():
    log_probability, drawn = jax.jit(
        lambda: (log_uniform_log_probability(jnp.arange(V), V), log_uniform_draw(jax.random.key(0), 100_000, V))
    )()
    probability = np.exp(log_probability)
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-5)
    counts = np.bincount(drawn, minlength=V)
    assert len(counts) == V
    np.testing.assert_allclose(counts / 100_000, probability, atol=5 * np.sqrt(0.25 / 100_000))


def test_its_gradients_are_row_sparse():
    def loss(params):
        return js.sampled_softmax(
            params["t"], HIDDEN, LABELS, jax.random.key(0), num_samples=8, bias=params["b"]
        ).mean()

    params = {"t": TABLE, "b": BIAS}

    @jax.jit
    def gradients(params):
        grads = js.grad(loss)(params)
        return grads, {name: grad.todense() for name, grad in grads.items()}, jax.grad(loss)(params)

    grads, dense, want = gradients(params)
    for name in params:
        assert is_row_sparse(grads[name]) and grads[name].rows.shape[0] == B + 8 + 1
        np.testing.assert_allclose(dense[name], want[name], rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"'hidden'.*\(B, d\)"):
        js.sampled_softmax(TABLE, HIDDEN[:, :2], LABELS, None, num_samples=3)
    with pytest.raises(ValueError, match=r"'labels'.*\(B, n\)"):
        js.sampled_softmax(TABLE, HIDDEN, jnp.zeros((B, 1, 1), int), jax.random.key(0), num_samples=3)
    with pytest.raises(ValueError, match=r"'log_probability'.*with draw"):
        js.sampled_softmax(TABLE, HIDDEN, LABELS, None, num_samples=3, draw=everything)


def full_softmax(labels, **kwargs):
    return js.sampled_softmax(
        TABLE, HIDDEN, labels, None, num_samples=V, bias=BIAS, draw=everything, log_probability=uniform, **kwargs
    )


@pytest.mark.slow
def test_several_labels_and_smoothing():
    """With everything sampled: 1/n for each of n as tf.nn.sampled_softmax_loss, label_smoothing as torch."""
    log_p = np.asarray(jax.nn.log_softmax(HIDDEN @ TABLE.T + BIAS[None]), np.float64)
    several = np.stack([np.asarray(LABELS), (np.asarray(LABELS) + 1) % V], axis=1)
    want = -log_p[np.arange(B)[:, None], several].mean(axis=1)
    np.testing.assert_allclose(full_softmax(several), want, rtol=1e-5)
    smooth = -0.9 * log_p[np.arange(B), LABELS] - 0.1 * log_p.mean(axis=1)
    np.testing.assert_allclose(full_softmax(LABELS, label_smoothing=0.1), smooth, rtol=1e-5)
    several[:, 1] = -100  # counts nothing
    np.testing.assert_allclose(full_softmax(several), full_softmax(LABELS), rtol=1e-5)


@pytest.mark.parametrize("ignored", slow_but([-100], [-100, -1, V, 2**31 - 1]))
def test_labels_that_are_none(ignored):
    """Under weight 0 they touch nothing, in value and gradient; the ignored one is 0 under any weight."""
    labels = jnp.asarray(LABELS).at[1].set(ignored)
    weight = jnp.ones(B).at[1].set(0)

    def loss(table, hidden, bias, labels, weight):
        each = js.sampled_softmax(table, hidden, labels, jax.random.key(0), num_samples=8, bias=bias)
        return js.weighted_mean(each, weight), each

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (value, each), grads = both(TABLE, HIDDEN, BIAS, labels, weight)
    (want, _), want_grads = both(TABLE, HIDDEN, BIAS, jnp.asarray(LABELS), weight)
    assert each[1] == 0 if ignored == -100 else jnp.isnan(each[1])
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    rows = js.grad(lambda table: loss(table, HIDDEN, BIAS, labels, weight)[0])(TABLE)
    drawn = set(np.asarray(log_uniform_draw(jax.random.key(0), 8, V)).tolist())
    others = set(np.delete(np.asarray(LABELS), 1).tolist())
    assert set(np.asarray(rows.ids).tolist()) & set(range(V)) == drawn | others


@pytest.mark.slow
def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        table, bias = TABLE.astype(jnp.bfloat16), BIAS.astype(jnp.bfloat16)
        js.sampled_softmax(table, HIDDEN, LABELS, jax.random.key(0), num_samples=4, bias=bias, label_smoothing=0.1)


@pytest.mark.slow
def test_no_examples():
    got = js.sampled_softmax(TABLE, HIDDEN[:0], np.zeros(0, np.int32), jax.random.key(0), num_samples=3)
    assert got.shape == (0,)
