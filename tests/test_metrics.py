"""Losses and metrics of sparse targets, and metrics of whole sets, against NumPy and scikit-learn 1.9.1's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.special
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse

B, K, D = 5, 12, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=3, size=(B, K)).astype(np.float32)
DENSE = np.where(RNG.random((B, K)) < 0.3, RNG.choice([1, 1, 0.25], (B, K)), 0).astype(np.float32)
DENSE[2] = 0
Y = js.from_scipy(scipy.sparse.csr_matrix(DENSE), nse=40)
FEWER = type(Y)((Y.data, Y.indices), shape=(3, K))
TABLE, HIDDEN, BIAS = (RNG.normal(size=shape).astype(np.float32) for shape in ((K, D), (B, D), K))


def cross_entropy(logits, y):
    return np.sum(np.logaddexp(0, np.float64(logits)) - y * logits, axis=1)


def test_the_loss_over_all_labels():
    def loss_fn(logits, y):
        losses = js.multilabel_loss(logits, y)
        return jnp.sum(losses), losses

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for y in (Y, DENSE):
        (_, losses), grads = value_and_grad(LOGITS, y)
        np.testing.assert_allclose(losses, cross_entropy(LOGITS, DENSE), rtol=1e-5)
        np.testing.assert_allclose(grads, scipy.special.expit(LOGITS) - DENSE, atol=1e-6)
    assert js.multilabel_loss(jnp.bfloat16(LOGITS), Y).dtype == jnp.float32


def all_labels(key, num_samples, num_labels):
    del key
    return jnp.arange(num_samples) % num_labels


def uniform(labels, num_labels):
    return jnp.full(labels.shape, -np.log(num_labels), jnp.float32)


def test_with_all_labels_sampled_it_is_the_loss_over_all():
    """Each twice: a label that was drawn twice counts twice, and an example's own labels do not."""

    def sampled(table, bias):
        how = {"num_samples": 2 * K, "draw": all_labels, "log_probability": uniform}
        losses = js.sampled_multilabel_loss(table, HIDDEN, Y, jax.random.key(0), bias=bias, **how)
        return jnp.sum(losses), losses

    (_, losses), grad = jax.jit(jax.value_and_grad(sampled, has_aux=True))(TABLE, BIAS)
    logits = HIDDEN @ TABLE.T + BIAS
    np.testing.assert_allclose(losses, cross_entropy(logits, DENSE), rtol=1e-5)
    np.testing.assert_allclose(grad, (scipy.special.expit(logits) - DENSE).T @ HIDDEN, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_sampled_loss_is_right_on_average_and_row_sparse():
    def sampled(table, key):
        return js.sampled_multilabel_loss(table, HIDDEN, Y, key, num_samples=3)

    losses = jax.jit(jax.vmap(sampled, (None, 0)))(TABLE, jax.random.split(jax.random.key(1), 4000))
    want, error = cross_entropy(HIDDEN @ TABLE.T, DENSE), np.std(losses, axis=0) / np.sqrt(4000)
    assert (np.abs(np.mean(losses, axis=0) - want) < 4 * error).all() and (error < 0.2).all()
    tall = jnp.tile(TABLE, (100, 1))
    y = js.from_scipy(scipy.sparse.csr_matrix((DENSE.ravel()[:9], (RNG.integers(0, B, 9), range(9))), (B, 100 * K)))
    mean = lambda t: js.sampled_multilabel_loss(t, HIDDEN, y, jax.random.key(0), num_samples=3).mean()  # noqa: E731
    gradient = jax.jit(js.grad(mean))(tall)
    assert is_row_sparse(gradient)
    np.testing.assert_allclose(gradient.todense(), jax.jit(jax.grad(mean))(tall), atol=1e-6)


def test_what_the_losses_refuse():
    for y, error, match in [
        (scipy.sparse.csr_matrix(DENSE), TypeError, "from_scipy"),
        ([[1, 0]], TypeError, "BCOO"),
        (FEWER, ValueError, r"'y'.*of the shape of logits.*\(5, 12\).*\(3, 12\)"),
        (DENSE[:, :3], ValueError, r"'y'.*\(5, 12\).*\(5, 3\)"),
    ]:
        with pytest.raises(error, match=match):
            js.multilabel_loss(LOGITS, y)
    with pytest.raises(TypeError, match="'logits'"):
        js.multilabel_loss(DENSE.astype(int), Y)
    ask = lambda hidden=HIDDEN, y=Y, num_samples=2, **how: js.sampled_multilabel_loss(  # noqa: E731
        TABLE, hidden, y, jax.random.key(0), num_samples=num_samples, **how
    )
    for run, error, match in [
        (lambda: ask(hidden=HIDDEN[:, :3]), ValueError, "'hidden'"),
        (lambda: ask(y=FEWER), ValueError, r"'y'.*\(5, 12\)"),
        (lambda: ask(y=DENSE), TypeError, "BCOO"),
        (lambda: ask(draw=all_labels), ValueError, "'log_probability'"),
        (lambda: ask(num_samples=0), ValueError, "'num_samples'"),
    ]:
        with pytest.raises(error, match=match):
            run()
    for k in (0, K + 1):
        with pytest.raises(ValueError, match=r"'k'.*\[1, 12\]"):
            js.precision_at_k(LOGITS, Y, k)


RELEVANT = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 2, 1, 0, 3]])
SCORES = np.array([[0.1, 0.5, 0.3, 0.9, 0.2], [0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.4, 0.3, 0.2, 0.8]], np.float32)
NDCG = {  # sklearn.metrics.ndcg_score, row by row
    1: [1.0, 0.0, 0.0],
    2: [0.6131471927654585, 0.0, 0.44412286644879784],
    3: [0.6131471927654585, 0.0, 0.6074915180456525],
    5: [0.8503449055347547, 0.0, 0.6979344547655131],
}


def test_rankings():
    sparse = js.from_scipy(scipy.sparse.csr_matrix(RELEVANT.astype(np.float32)), nse=9)
    order = RNG.permutation(9)
    shuffled = type(sparse)((sparse.data[order], sparse.indices[order]), shape=sparse.shape)
    of_all = jax.jit(lambda s, y: {k: (js.ndcg_at_k(s, y, k), js.precision_at_k(s, y, k)) for k in NDCG})
    for y in (sparse, shuffled, RELEVANT):
        for k, (ndcg, precision) in of_all(SCORES, y).items():
            np.testing.assert_allclose(ndcg, NDCG[k], rtol=1e-6)
            top = np.argsort(-SCORES, axis=1)[:, :k]
            hits = np.take_along_axis(RELEVANT > 0, top, axis=1).mean(axis=1)
            np.testing.assert_allclose(precision, hits, rtol=1e-6)
    ties = js.precision_at_k(jnp.zeros((1, 4)), jnp.array([[1, 0, 0, 1]]), 2)
    assert ties.tolist() == [0.5]  # the lower labels come first


LABELS, WEIGHT = np.array([0, 0, 1, 1, 1, 0, 1]), np.array([1, 2, 0.5, 1, 3, 1, 0], np.float32)
OF_ALL = np.array([0.1, 0.4, 0.35, 0.8, 0.4, -1, 0.4], np.float32)


def test_rankings_by_scores_that_are_nan_are_nan():
    scores = np.array([[np.nan, 1, 2], [0, 1, 2], [np.nan, 1, 2]], np.float32)
    dense = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], np.float32)
    for y in (dense, js.from_scipy(scipy.sparse.csr_matrix(dense), nse=4)):
        np.testing.assert_array_equal(js.precision_at_k(scores, y, 1), [np.nan, 1, np.nan])
        np.testing.assert_array_equal(js.ndcg_at_k(scores, y, 1), [np.nan, 1, 0])


def test_area_under_the_curve():
    # sklearn.metrics.roc_auc_score, without and with sample_weight
    assert float(js.auc(OF_ALL, LABELS)) == pytest.approx(0.8333333333333334)
    assert float(js.auc(OF_ALL, 2 * LABELS - 1, WEIGHT)) == pytest.approx(0.7777777777777778)
    scores, labels = RNG.integers(0, 20, 300).astype(np.float32), RNG.random(300) < 0.3
    above = scores[labels][:, None] - scores[~labels][None, :]
    assert float(js.auc(scores, labels)) == pytest.approx(np.mean((above > 0) + (above == 0) / 2))
    assert float(js.auc(np.array([-np.inf, -np.inf, np.inf]), np.array([0, 1, 1]))) == 0.75
    for scores, labels in (([1.0, 2.0], [1, 1]), ([], []), ([np.nan, 1.0], [0, 1])):
        assert np.isnan(float(js.auc(np.array(scores, np.float32), np.array(labels))))
    assert float(js.auc(np.float32([1, 2, np.nan]), np.array([0, 1, 0]), np.float32([1, 1, 0]))) == 1
    for labels, weight in (([0, 1, np.nan], [1, 1, 1]), ([0, 1, 1], [1, 1, np.nan])):
        assert np.isnan(float(js.auc(np.arange(3.0), np.float32(labels), np.float32(weight))))
    assert float(js.auc(np.arange(3.0), np.float32([0, 1, np.nan]), np.array([1, 1, 0]))) == 1
    with pytest.raises(ValueError, match=r"'labels'.*\(2,\)"):
        js.auc(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="'weight'"):
        js.auc(jnp.zeros(2), jnp.zeros(2), jnp.zeros(1))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_metrics_of_a_whole_set(weight):
    """In batches of 3, whose own areas are others, and one of which has only positive examples."""
    table = jnp.asarray(OF_ALL)
    state = TrainState.create(apply_fn=None, params=table, tx=js.lazy_sgd(0.1))

    def metric_fn(table, batch):
        return js.binary_metrics(jnp.take(table, batch.x), batch.y, batch.weight) | {"one": jnp.float32(1)}

    batches = js.batches(np.arange(7), LABELS.astype(np.float32), batch_size=3, weight=weight)
    got = js.evaluate(metric_fn, state, batches)
    # sklearn.metrics: log_loss, accuracy_score of scores > 0, roc_auc_score
    loss, accuracy, auc = (
        (0.5573124180226009, 0.7142857142857143, 0.8333333333333334)
        if weight is None
        else (0.5953560415586732, 0.6470588235294118, 0.7777777777777778)
    )
    assert got == pytest.approx({"loss": loss, "accuracy": accuracy, "auc": auc, "one": 1}, rel=1e-6)
    nothing = js.evaluate(metric_fn, state, js.batches(np.arange(7), LABELS, batch_size=3, weight=np.zeros(7)))
    assert np.isnan([*nothing.values()]).all() and nothing.keys() == got.keys()
