"""flax.nnx: five models under nnx.jit and js.nnx.jit, what nnx promises besides, and gradients with nnx's contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but

V, D, B = 3000, 4, 6
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def flax_layers_promote():
    with jax.numpy_rank_promotion("allow"):
        yield


def draw(*shape):
    return (RNG.zipf(1.3, shape) % V).astype(np.int32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Five models, with a loss of a batch. `touched`: the ids that it reads of tables, by a part of their paths.


class Factors(nnx.Module):
    def __init__(self, rngs):
        self.users, self.items = nnx.Embed(V, D, rngs=rngs), nnx.Embed(V, D, rngs=rngs)
        self.bias = nnx.Embed(V, 1, rngs=rngs)

    def loss(self, batch):
        users, items, y = batch
        return jnp.mean(((self.users(users) * self.items(items)).sum(-1) + self.bias(items)[:, 0] - y) ** 2)

    def draw_batch():
        return draw(B), draw(B), normal(B)

    def touched(batch):
        return {"users": batch[0], "items": batch[1], "bias": batch[1]}


class Tower(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.dense = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(D, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, ids):
        return self.dropout(self.norm(self.dense(self.embed(ids).mean(1))))


class TwoTowers(nnx.Module):
    def __init__(self, rngs):
        self.query, self.item = Tower(rngs), Tower(rngs)

    def loss(self, batch):
        scores = self.query(batch[0]) @ self.item(batch[1]).T
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(B)).mean()

    def draw_batch():
        return draw(B, 3), draw(B, 2)

    def touched(batch):
        return {"query": batch[0], "item": batch[1]}


class Ranking(nnx.Module):
    """DLRM: tables of different heights, their pairwise products, dense numbers."""

    heights = (V, V - 1, V - 2, V)

    def __init__(self, rngs):
        self.tables = nnx.List([nnx.Embed(n, D, rngs=rngs) for n in self.heights])
        self.bottom, self.top = nnx.Linear(3, D, rngs=rngs), nnx.Linear(D + 10, 1, rngs=rngs)

    def loss(self, batch):
        ids, numbers, y = batch
        x = [nnx.relu(self.bottom(numbers)), *(table(ids[:, n]) for n, table in enumerate(self.tables))]
        pairs = jnp.einsum("bnd,bmd->bnm", *2 * (jnp.stack(x, 1),))[:, *np.triu_indices(5, 1)]
        return optax.sigmoid_binary_cross_entropy(self.top(jnp.concatenate([x[0], pairs], 1))[:, 0], y).mean()

    def draw_batch():
        return draw(B, 4) % (V - 2), normal(B, 3), (normal(B) > 0).astype(np.float32)

    def touched(batch):
        return {f"['tables'][{n}]": batch[0][:, n] for n in range(4)}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.dense, self.norm = nnx.Linear(D, D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.dropout(self.attention(self.norm(x), mask=mask))
        return x + nnx.relu(self.dense(x))


class NextItem(nnx.Module):
    """SASRec: a causal transformer over a sequence of items, with blocks made by nnx.vmap and read by nnx.scan."""

    def __init__(self, rngs):
        self.items = nnx.Embed(V, D, rngs=rngs)
        self.position = nnx.Param(nnx.initializers.normal()(rngs.params(), (5, D)))

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def blocks(rngs):
            return Block(rngs)

        self.blocks = blocks(rngs)

    def __call__(self, ids):
        mask = nnx.make_causal_mask(ids)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, block):
            return block(x, mask)

        return through(self.items(ids) + self.position[...], self.blocks)

    def loss(self, batch):
        ids, positive, negative = batch
        x = self(ids)
        score = (x * self.items(positive)).sum(-1) - (x * self.items(negative)).sum(-1)
        return -jnp.mean(jax.nn.log_sigmoid(score))

    def draw_batch():
        return draw(B, 5), draw(B, 5), draw(B, 5)

    def touched(batch):
        return {"items": np.stack(batch)}


class SkipGram(nnx.Module):
    """With a table of words that is also that of contexts' neighbours, and negatives that its own rngs draw."""

    def __init__(self, rngs):
        self.words, self.contexts = nnx.Embed(V, D, rngs=rngs), nnx.Embed(V, D, rngs=rngs)
        self.neighbours = self.words
        self.rngs = rngs

    def negatives(self, rngs):
        return jax.random.randint(rngs.negatives(), (B, 3), 0, V)

    def loss(self, batch):
        words, contexts, neighbours = batch
        x = self.words(words)
        negative = (x[:, None] * self.contexts(self.negatives(self.rngs))).sum(-1)
        score = (x * self.contexts(contexts)).sum(-1) + (x * self.neighbours(neighbours)).sum(-1)
        return -jnp.mean(jax.nn.log_sigmoid(score) + jax.nn.log_sigmoid(-negative).sum(-1))

    def draw_batch():
        return draw(B), draw(B), draw(B)

    def touched(batch):
        return {"words": np.stack([batch[0], batch[2]]), "contexts": batch[1]}


MODELS = {model.__name__: model for model in (Factors, TwoTowers, Ranking, NextItem, SkipGram)}


def rngs():
    return nnx.Rngs(0, negatives=1)


def train_step(model, optimizer, metrics, batch):
    """As Flax's documentation writes it."""

    def loss_fn(model, batch):
        return model.loss(batch)

    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    metrics.update(loss=loss)
    optimizer.update(model, grads)
    return loss


def start(kind, tx, **options):
    model = kind(rngs(), **options)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("loss"))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), metrics


def two_steps(sgd, adam, batch):
    """Of two optimizers, in one program."""
    return train_step(*sgd, batch), train_step(*adam, batch)


def numbers(*objects):
    """NumPy arrays of all leaves, by path."""
    leaves = jax.tree_util.tree_leaves_with_path([nnx.state(x) for x in objects])
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return {jax.tree_util.keystr(path): np.array(jax.random.key_data(x) if is_key(x) else x) for path, x in leaves}


def put_back(before, touched, objects):
    """Into all that has a row for each of a table's, the rows that no id names as they were."""
    states = [nnx.state(x) for x in objects]

    def one(path, x):
        path = jax.tree_util.keystr(path)
        name = next((name for name in touched if name in path), None)
        if name is None or x.ndim == 0 or x.shape[0] < V - 2:
            return x
        named = np.isin(np.arange(len(x)), touched[name])[:, None]
        return jnp.where(named, x, before[path])

    for x, new in zip(objects, jax.tree_util.tree_map_with_path(one, states), strict=True):
        nnx.update(x, new)


def assert_equal(got, want, tol=2e-5):
    assert got.keys() == want.keys()
    for path, x in want.items():
        close = {"rtol": tol, "atol": tol} if x.dtype.kind == "f" else {"rtol": 0}
        np.testing.assert_allclose(got[path].astype(float), x.astype(float), err_msg=path, **close)


@pytest.mark.parametrize("name", slow_but(["TwoTowers", "SkipGram"], MODELS))
def test_five_models(name):
    """With SGD as nnx.jit; with Adam as nnx.jit with the rows put back that no id names. So are rngs, statistics and
    metrics."""
    kind = MODELS[name]
    txs = optax.sgd(0.3), optax.adam(0.1)
    ours, dense = [start(kind, tx) for tx in txs], [start(kind, tx) for tx in txs]
    our_step, dense_step = js.nnx.jit(two_steps), nnx.jit(two_steps)
    for _ in range(3):
        batch = kind.draw_batch()
        touched = kind.touched(batch)
        if kind is SkipGram:
            drawn = kind.negatives(None, nnx.clone(dense[1][0].rngs))
            touched["contexts"] = np.append(touched["contexts"], drawn)
        before = numbers(*dense[1][:2])
        got, want = our_step(*ours, batch), dense_step(*dense, batch)
        put_back(before, touched, dense[1][:2])
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for our, other in zip(ours, dense, strict=True):
            assert_equal(numbers(*our), numbers(*other))
    left = np.setdiff1d(np.arange(V), np.concatenate([np.ravel(x) for x in touched.values()]))
    after = numbers(*ours[1][:2])
    tables = [path for path, x in after.items() if "mu" not in path and x.shape[:1] == (V,)]
    assert tables and all((after[path][left] == before[path][left]).all() for path in before if path in tables)
    assert our_step._cache_size() <= 3  # block sizes
    assert ours[0][2].compute()["spread"].mean == dense[0][2].compute()["spread"].mean


@pytest.mark.parametrize("name", slow_but(["Factors"], MODELS))
def test_no_table_is_copied(name):
    kind = MODELS[name]
    objects, batch = start(kind, optax.adam(0.1)), kind.draw_batch()
    before = numbers(*objects)

    def made(step):
        return large_arrays(compiled_by_default(step.lower(*objects, batch)).as_text(), V - 2)

    assert not made(js.nnx.jit(train_step))
    assert made(nnx.jit(train_step))
    assert_equal(numbers(*objects), before, tol=0)
