"""Keywords of other libraries are answered, and those of older releases still work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

TABLE, IDS = jnp.arange(8.0).reshape(4, 2), jnp.array([[1, 2], [3, 3]])
ANSWERS = {
    "mode": (lambda: js.embedding_bag(TABLE, IDS, mode="mean"), ValueError, r"'mode'.*combiner='mean'"),
    "lookup": (lambda: js.embedding_lookup(TABLE, IDS, mode="max"), ValueError, r"'mode'.*combiner='max'"),
    "weights": (lambda: js.embedding_bag(TABLE, IDS, per_sample_weights=TABLE), TypeError, "Write weights="),
    "sparse": (
        lambda: js.embedding_bag(TABLE, IDS, sparse=True),
        TypeError,
        "'sparse'.*Got True.*row-sparse in js.jit",
    ),
    "ragged": (lambda: js.embedding_bag(TABLE, [[1, 2], [3]]), ValueError, "lists of different lengths.*offsets="),
    "module mode": (lambda: js.nn.EmbeddingBag(4, 2, mode="sum"), ValueError, r"nn\.EmbeddingBag.*combiner='sum'"),
    "module width": (lambda: js.nn.EmbeddingBag(4, embedding_dim=2), TypeError, "Write features="),
    "lr": (lambda: js.lazy_adam(lr=0.1), TypeError, r"'lr' argument of js\.lazy_adam.*Got 0\.1.*learning_rate="),
    "betas": (lambda: js.lazy_adamw(0.1, betas=(0.9, 0.99)), TypeError, "b1= and b2="),
    "decay": (lambda: js.lazy_adam(0.1, weight_decay=0.1), TypeError, r"js\.lazy_adamw"),
    "rows": (lambda: js.batches([[0]], num_embeddings=4, batch_size=1), TypeError, "'num_embeddings'.*num_rows="),
    "last": (lambda: js.stream(list, batch_size=1, drop_last=True), TypeError, "drop_remainder="),
    "buckets": (lambda: js.hash_ids(["a"], num_buckets=4), TypeError, "num_rows="),
    "pandas": (lambda: js.read_csv("a.csv", sep=";"), TypeError, "Got ';' instead.*delimiter="),
    "keras": (lambda: js.fit(None, None, [], validation_data=[]), TypeError, "Got a value instead.*validation="),
    "ftrl": (lambda: js.lazy_ftrl(alpha=0.1), TypeError, "learning_rate="),
    "float labels": (lambda: js.inverse_frequency_weights(np.ones(2)), TypeError, "labels.dtype=.*labels.astype"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_other_libraries_words_are_answered(name):
    call, error, match = ANSWERS[name]
    with pytest.raises(error, match=match):
        call()


def test_a_word_that_an_optimizer_has_is_its_own():
    js.lazy_adamw(0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    "make", [js.lazy_adam, js.lazy_adamw, js.lazy_sgd, js.lazy_rmsprop, js.lazy_adagrad, js.lazy_rowwise_adagrad]
)
def test_skipped_still_works(make):
    with pytest.warns(DeprecationWarning, match=rf"js\.{make.__name__}: skipped= is now untouched=") as caught:
        old = make(0.1, skipped="replay")
    assert caught[0].filename == __file__
    state, new = old.init(TABLE), make(0.1, untouched="replay").init(TABLE)
    assert jax.tree.structure(state) == jax.tree.structure(new)
    with pytest.raises(TypeError, match=r"'skipped'.*untouched= is given"):
        make(0.1, skipped="freeze", untouched="freeze")


def test_signatures_are_those_of_the_functions():
    tx = optax.inject_hyperparams(js.lazy_adam)(learning_rate=0.1, untouched="freeze")
    assert float(tx.init(TABLE).hyperparams["learning_rate"]) == np.float32(0.1)


def a_step(state, ids):
    gradient = jax.grad(lambda table: jnp.sum(table[ids] ** 2))(state)
    return state - 0.1 * gradient


def test_a_state_that_was_donated_is_named():
    step, state = js.jit(a_step), TABLE + 0
    step(state, IDS)
    with pytest.raises((ValueError, RuntimeError), match=r"'state'.*deleted.*state, loss = step"):
        step(state, IDS)


def test_a_state_without_params_is_answered():
    step = js.make_train_step(lambda params, ids: jnp.sum(params["t"][ids]))
    with pytest.raises(TypeError, match=r"'state'.*Got dict.*TrainState\.create"):
        step({"t": TABLE}, IDS)


def test_orders_of_other_libraries_are_answered():
    with pytest.raises(TypeError, match=r"Write \(table, ids\)"):
        js.embedding_bag(IDS, TABLE)
    scores, labels = np.linspace(0, 1, 9), np.arange(9) % 2
    assert float(js.auc(scores, labels)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"Write js\.auc\(scores, labels\)"):
        js.auc(labels, scores)
    assert repr(js.auc(scores, labels)) == "Auc(0.5000, of 9 examples; float() gives the number)"
