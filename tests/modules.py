"""Five nnx models as Flax's documentation writes them, for tests/test_nnx.py and tests/benchmarks/modules.py.

Each has a loss of a batch, `draw_batch`, which draws one, and `touched`: the ids that a batch reads of tables, by a
part of their paths.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


def draw_ids(rng, rows, *shape):
    return (rng.zipf(1.3, shape) % rows).astype(np.int32)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


class Factors(nnx.Module):
    """Matrix factorisation with biases of items."""

    def __init__(self, rows, dim, rngs):
        self.users, self.items = nnx.Embed(rows, dim, rngs=rngs), nnx.Embed(rows, dim, rngs=rngs)
        self.bias = nnx.Embed(rows, 1, rngs=rngs)

    def loss(self, batch):
        users, items, y = batch
        return jnp.mean(((self.users(users) * self.items(items)).sum(-1) + self.bias(items)[:, 0] - y) ** 2)

    @staticmethod
    def draw_batch(rng, rows, size):
        return draw_ids(rng, rows, size), draw_ids(rng, rows, size), normal(rng, size)

    @staticmethod
    def touched(batch):
        return {"users": batch[0], "items": batch[1], "bias": batch[1]}


class Tower(nnx.Module):
    def __init__(self, rows, dim, rngs):
        self.embed, self.dense = nnx.Embed(rows, dim, rngs=rngs), nnx.Linear(dim, dim, use_bias=False, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(dim, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, ids):
        return self.dropout(self.norm(self.dense(self.embed(ids).mean(1))))


class TwoTowers(nnx.Module):
    """Retrieval with the other items of a batch as negatives."""

    def __init__(self, rows, dim, rngs):
        self.query, self.item = Tower(rows, dim, rngs), Tower(rows, dim, rngs)

    def loss(self, batch):
        scores = self.query(batch[0]) @ self.item(batch[1]).T
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(scores))).mean()

    @staticmethod
    def draw_batch(rng, rows, size):
        return draw_ids(rng, rows, size, 3), draw_ids(rng, rows, size, 2)

    @staticmethod
    def touched(batch):
        return {"['query']['embed']": batch[0], "['item']['embed']": batch[1]}


class Ranking(nnx.Module):
    """DLRM: eight tables of different heights, their pairwise products, dense numbers."""

    tables_of = 1, 2, 4, 4, 8, 8, 16, 16  # rows // n rows

    def __init__(self, rows, dim, rngs):
        self.tables = nnx.List([nnx.Embed(rows // n, dim, rngs=rngs) for n in self.tables_of])
        self.bottom, self.top = nnx.Linear(3, dim, rngs=rngs), nnx.Linear(dim + 36, 1, rngs=rngs)

    def loss(self, batch):
        ids, numbers, y = batch
        x = [nnx.relu(self.bottom(numbers)), *(table(ids[:, n]) for n, table in enumerate(self.tables))]
        x = jnp.stack(x, 1)
        pairs = jnp.einsum("bnd,bmd->bnm", x, x)[:, *np.triu_indices(9, 1)]
        logits = self.top(jnp.concatenate([x[:, 0], pairs], 1))[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    @classmethod
    def draw_batch(cls, rng, rows, size):
        ids = np.stack([draw_ids(rng, rows // n, size) for n in cls.tables_of], 1)
        return ids, normal(rng, size, 3), (normal(rng, size) > 0).astype(np.float32)

    @staticmethod
    def touched(batch):
        return {f"['tables'][{n}]": ids for n, ids in enumerate(batch[0].T)}


class Block(nnx.Module):
    def __init__(self, dim, rngs):
        self.attention = nnx.MultiHeadAttention(2, dim, decode=False, rngs=rngs)
        self.dense, self.norm = nnx.Linear(dim, dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.dropout(self.attention(self.norm(x), mask=mask))
        return x + nnx.relu(self.dense(x))


class NextItem(nnx.Module):
    """SASRec: a causal transformer over a sequence of items, with blocks made by nnx.vmap and read by nnx.scan."""

    length = 5

    def __init__(self, rows, dim, rngs):
        self.items = nnx.Embed(rows, dim, rngs=rngs)
        self.position = nnx.Param(nnx.initializers.normal()(rngs.params(), (self.length, dim)))

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def blocks(rngs):
            return Block(dim, rngs)

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

    @classmethod
    def draw_batch(cls, rng, rows, size):
        return tuple(draw_ids(rng, rows, size, cls.length) for _ in range(3))

    @staticmethod
    def touched(batch):
        return {"items": np.stack(batch)}


class SkipGram(nnx.Module):
    """With a table of words that is also that of contexts' neighbours, and negatives that its own rngs draw."""

    def __init__(self, rows, dim, rngs):
        self.words, self.contexts = nnx.Embed(rows, dim, rngs=rngs), nnx.Embed(rows, dim, rngs=rngs)
        self.neighbours = self.words
        self.rngs = rngs

    def negatives(self, rngs, size):
        return jax.random.randint(rngs.negatives(), (size, 3), 0, self.contexts.num_embeddings)

    def loss(self, batch):
        words, contexts, neighbours = batch
        x = self.words(words)
        negative = (x[:, None] * self.contexts(self.negatives(self.rngs, len(words)))).sum(-1)
        score = (x * self.contexts(contexts)).sum(-1) + (x * self.neighbours(neighbours)).sum(-1)
        return -jnp.mean(jax.nn.log_sigmoid(score) + jax.nn.log_sigmoid(-negative).sum(-1))

    @staticmethod
    def draw_batch(rng, rows, size):
        return tuple(draw_ids(rng, rows, size) for _ in range(3))

    @staticmethod
    def touched(batch):
        shared = np.stack([batch[0], batch[2]])
        return {"neighbours": shared, "contexts": batch[1]}  # the first name of the shared table


MODELS = {model.__name__: model for model in (Factors, TwoTowers, Ranking, NextItem, SkipGram)}
