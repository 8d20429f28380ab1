"""Public programs that train embeddings, with one word changed: jax.jit becomes js.jit.

Each program is written anew on made data. What is kept of it is how it is built: its model, its state, its loss, its
optimizer, what its step takes and returns, and how it is jitted. A comment names the repository and the file.
The oracle is the same step under jax.jit, with the rows that no id names put back after every step.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct
from flax.training.train_state import TrainState

import jaxsparse as js
from tests.marks import slow_but
from tests.stepwise import compare, copied

STEPS = 3
TOL = 2e-5  # as in the other files: sums of the same float32 numbers in another order


@dataclasses.dataclass(frozen=True)
class Program:
    """A step as its author jits it.

    `tables` are names in the paths of the state, each with the ids by which a batch reads it. `whole` are those that
    the program uses as a whole. `words` are the arguments of jax.jit that the program gives. `args` are the step's
    arguments, `new` is what of its result is the state, and what is not.
    """

    step: Callable[..., Any]
    state: Any
    batches: list[Any]
    tables: dict[str, Callable[..., Any]]
    whole: tuple[str, ...] = ()
    words: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: Callable[..., Any] = lambda state, batch: ((state, *batch), {})
    new: Callable[..., Any] = lambda out: out


def ids(rng, rows, *shape):
    """Few of many rows, and some of them often."""
    return ((rng.zipf(1.3, shape) * 7919) % rows).astype(np.int32)


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def made(rng, init, *args, **kwargs):
    """Variables as init makes them, of NumPy's numbers: to compile the initializers takes longer than a step."""

    def one(path, x):
        scale = 0.3 if x.ndim > 1 else 0.01
        return jnp.asarray(("scale" in jax.tree_util.keystr(path)) + scale * floats(rng, *x.shape))

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(init, *args, **kwargs))


def table_of(path, tables):
    return next((name for name in tables if name in path), None)


def put_back(new, old, touched):
    """`new`, with the rows of `old` that `touched`, ids by the name of a table, does not name."""

    def one(path, n, o):
        name = table_of(jax.tree_util.keystr(path), touched)
        if name is None or jnp.ndim(n) == 0:
            return n
        named = np.isin(np.arange(n.shape[0]), np.asarray(touched[name]).reshape(-1))
        return np.where(named.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree_util.tree_map_with_path(one, new, old)


# ---------------------------------------------------------------------------------------------------------------------
# Word vectors


class Glove(nn.Module):
    rows: int
    dim: int

    def setup(self):
        self.token = nn.Embed(self.rows, self.dim)
        self.offset = nn.Embed(self.rows, 1, embedding_init=nn.initializers.zeros)

    def __call__(self, pair):
        one, two = pair
        dots = jax.vmap(jnp.dot)(self.token(one), self.token(two))
        return dots + self.offset(one) + self.offset(two)  # (B, B), as in the original: (B,) and (B, 1)


def glove_gradients(state, pair, counts):
    def loss_fn(params):
        predicted = state.apply_fn({"params": params}, pair)
        weight = jnp.minimum(1.0, counts / 100.0) ** 0.75
        return jnp.mean((jnp.log10(1.0 + counts) - predicted) ** 2 * weight)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return grads, loss


def glove_update(state, grads):
    return state.apply_gradients(grads=grads)


def glove_step(state, pair, counts):
    grads, loss = glove_gradients(state, pair, counts)
    return glove_update(state, grads), loss


def glove(rows=1200, dim=8, size=32):
    """BBischof/ESRecsys, wikipedia/train_cooccurence.py: Flax. It jits the gradients and the update apart; here they
    are one step."""
    rng = np.random.default_rng(0)
    batches = [
        ((ids(rng, rows, size), ids(rng, rows, size)), rng.integers(1, 300, size).astype(np.float32))
        for _ in range(STEPS)
    ]
    model = Glove(rows, dim)
    params = made(rng, model.init, jax.random.key(0), batches[0][0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    read = lambda pair, counts: np.concatenate(pair)  # noqa: E731
    return Program(glove_step, state, batches, {"token": read, "offset": read})


def cbow(rows=1000, dim=8, size=16):
    """eliben/deep-learning-samples, word2vec-jax/train.py: params are a dict, the loss is jitted by itself, and the
    output layer is dense."""

    @jax.jit
    def forward(params, context):
        return jnp.dot(jnp.mean(params["projection"][context], axis=1), params["hidden"])

    @jax.jit
    def loss_fn(params, target, context):
        logits = forward(params, context)
        labels = jax.nn.one_hot(target, logits.shape[1])
        return optax.losses.softmax_cross_entropy(logits, labels).mean()

    tx = optax.adam(1e-3)

    def step(params, opt_state, target, context):
        loss, grads = jax.value_and_grad(loss_fn)(params, target, context)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(1)
    params = {"projection": jnp.asarray(floats(rng, rows, dim)), "hidden": jnp.asarray(floats(rng, dim, rows))}
    return Program(
        step,
        (params, tx.init(params)),
        [(ids(rng, rows, size), ids(rng, rows, size, 6)) for _ in range(STEPS)],
        {"projection": lambda target, context: context},
        args=lambda state, batch: ((*state, *batch), {}),
        new=lambda out: (out[:2], out[2]),
    )


def skip_gram(rows=1000, dim=8, size=16, negatives=3):
    """stickshift/xjax, src/xjax/models/jax/_sgns.py: one array (rows, dim, 2) holds both tables. The step takes the
    optimizer's state first, and returns it second. The dict around the array, not in the original, gives it a name."""

    def scores(params, pairs):
        return jnp.sum(params[pairs[:, 0], :, 0] * params[pairs[:, 1], :, 1], axis=1)

    def loss_fn(weight, params, batch):
        positive, negative = (scores(params, pairs) for pairs in batch)
        cross_entropy = optax.losses.sigmoid_binary_cross_entropy
        loss = cross_entropy(positive, jnp.ones(positive.size)).mean()
        return loss + weight * cross_entropy(negative, jnp.zeros(negative.size)).mean()

    def general_step(value_and_grad, tx, opt_state, params, batch):
        loss, grads = value_and_grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(2)
    tx = optax.adam(1e-2)
    params = {"both": jnp.asarray(floats(rng, rows, dim, 2))}
    fun = functools.partial(loss_fn, float(negatives))
    return Program(
        functools.partial(general_step, jax.value_and_grad(lambda p, batch: fun(p["both"], batch)), tx),
        (tx.init(params), params),
        [((ids(rng, rows, size, 2), ids(rng, rows, negatives * size, 2)),) for _ in range(STEPS)],
        {"both": np.concatenate},
        args=lambda state, batch: ((*state, *batch), {}),
        new=lambda out: ((out[1], out[0]), out[2]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Recommenders


class Playlists(nn.Module):
    albums: int
    artists: int
    dim: int

    def setup(self):
        self.album = nn.Embed(self.albums, self.dim)
        self.artist = nn.Embed(self.artists, self.dim)

    def track(self, album, artist):
        return jnp.concatenate([self.album(jnp.mod(album, self.albums)), self.artist(artist)], axis=-1)

    def __call__(self, batch):
        vectors = {k: self.track(batch[f"{k}_album"], batch[f"{k}_artist"]) for k in ("context", "next", "neg")}

        def affinity(k):
            best = jnp.max(vectors[k] @ vectors["context"].T, axis=-1)
            same = [jnp.isin(batch[f"{k}_{what}"], batch[f"context_{what}"]) for what in ("album", "artist")]
            return best + 0.1 * same[0] + 0.1 * same[1]

        themselves = {k: jnp.flip(v, axis=-2) @ v.T for k, v in vectors.items()}
        norms = jnp.sqrt(jnp.sum(jnp.concatenate(list(vectors.values()), axis=-2) ** 2, axis=-1))
        return affinity("next"), affinity("neg"), themselves, norms


def playlists(rows=1500, dim=8, size=24):
    """BBischof/ESRecsys, spotify/train_spotify.py: Flax. Two tables, ids modulo the rows, a playlist a step, momentum,
    and a penalty on the vectors that are read."""

    def step(state, batch, limit):
        def loss_fn(params):
            positive, negative, themselves, norms = state.apply_fn(params, batch)
            mean = nn.relu(1.0 + jnp.mean(negative) - jnp.mean(positive))
            extreme = nn.relu(1.0 + jnp.max(negative) - jnp.min(positive))
            near = sum(jnp.mean(nn.relu(0.5 - themselves[k])) for k in ("context", "next"))
            far = jnp.mean(nn.relu(themselves["neg"]))
            return extreme + mean + jnp.sum(nn.relu(norms - limit)) + near + far

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    rng = np.random.default_rng(3)
    sizes = {"context": size, "next": size // 2, "neg": 2 * size}
    batches = []
    for _ in range(STEPS):
        batch = {f"{k}_album": ids(rng, 3 * rows, n) for k, n in sizes.items()}
        batches.append((batch | {f"{k}_artist": ids(rng, rows, n) for k, n in sizes.items()}, 10.0))
    model = Playlists(rows, rows, dim)
    params = made(rng, model.init, jax.random.key(3), batches[0][0])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(1e-3, momentum=0.98))

    def read(what):
        return lambda batch, limit: np.concatenate([batch[f"{k}_{what}"] for k in sizes]) % rows

    return Program(step, state, batches, {"album": read("album"), "artist": read("artist")})


class DeepFM(nnx.Module):
    def __init__(self, fields, numbers, dim, *, rngs):
        self.first = nnx.List([nnx.Embed(n, 1, rngs=rngs) for n in fields])
        self.second = nnx.List([nnx.Embed(n, dim, rngs=rngs) for n in fields])
        self.first_number = nnx.Linear(numbers, 1, use_bias=False, rngs=rngs)
        width = len(fields) * dim
        self.layers = nnx.List(
            [nnx.Linear(width, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)]
        )
        self.last = nnx.Linear(8, 1, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, cat, numbers):
        first = sum(embed(cat[:, i]) for i, embed in enumerate(self.first)) + self.first_number(numbers)
        vectors = jnp.stack([embed(cat[:, i]) for i, embed in enumerate(self.second)], axis=1)
        second = 0.5 * jnp.sum(jnp.sum(vectors, axis=1) ** 2 - jnp.sum(vectors**2, axis=1), axis=-1, keepdims=True)
        h = vectors.reshape(vectors.shape[0], -1)
        for layer in self.layers:
            h = layer(h)
        return (self.bias[...] + first + second + self.last(nnx.relu(h))).squeeze(-1)


def deepfm_in_place(model, optimizer, batch):
    """The step as it is written: it changes both modules, and returns the loss only."""

    def loss_fn(model):
        logits = model(batch["cat"], batch["numbers"])
        return optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


class NnxState(TrainState):
    counts: nnx.State
    graphdef: nnx.GraphDef


def deepfm_parts(rows, dim, size):
    rng = np.random.default_rng(12)
    batches = [
        {
            "cat": np.stack([ids(rng, rows, size), ids(rng, rows + 100, size)], axis=1),
            "numbers": floats(rng, size, 2),
            "labels": rng.integers(0, 2, size).astype(np.float32),
        }
        for _ in range(STEPS)
    ]
    read = {f"['{table}'][{i}]": lambda batch, i=i: batch["cat"][:, i] for table in ("first", "second") for i in (0, 1)}
    abstract = nnx.eval_shape(lambda: DeepFM([rows, rows + 100], 2, dim, rngs=nnx.Rngs(params=0, dropout=1)))
    graphdef, params, rest = nnx.split(abstract, nnx.Param, ...)

    def other(path, x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key(1) if is_key else jnp.full(x.shape, "var" in jax.tree_util.keystr(path), x.dtype)

    rest = jax.tree_util.tree_map_with_path(other, rest)
    return nnx.merge(graphdef, made(rng, lambda: params), rest), batches, read


def deepfm(rows=1000, dim=8, size=16):
    """tae73/llm-factor-recsys-hnm, src/models/deepfm.py: Flax nnx, with tables in a list, batch norm and dropout. Its
    step changes modules in place; this one is written as google/flax, examples/nnx_toy_examples/03_train_state.py."""
    model, batches, read = deepfm_parts(rows, dim, size)
    graphdef, params, counts = nnx.split(model, nnx.Param, ...)

    def step(state, batch):
        def loss_fn(params):
            model = nnx.merge(state.graphdef, params, state.counts, copy=True)
            logits = model(batch["cat"], batch["numbers"])
            loss = optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean()
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, counts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, counts=counts), loss

    state = NnxState.create(apply_fn=None, graphdef=graphdef, params=params, tx=optax.adam(1e-3), counts=counts)
    return Program(step, state, [(batch,) for batch in batches], read)


class Ratings(nn.Module):
    items: int
    users: int
    dim: int
    layers: tuple[int, ...]

    @nn.compact
    def __call__(self, batch):
        item = nn.Embed(self.items, self.dim)(batch["item_id"])
        x = nn.Embed(self.users, self.dim)(batch["user_id"])
        for size in self.layers[:-1]:
            x = nn.relu(nn.Dense(size)(x))
        x = nn.Dense(self.layers[-1])(x)
        return jnp.sum(item * x, axis=1) / jnp.sqrt(self.dim) * 2.0 + 3.0


@struct.dataclass
class OwnState:
    step: int
    params: Any
    opt_state: Any


def ratings(rows=1100, dim=8, size=32):
    """PAIR-code/jax-recommenders, recommenders/cfdnn/train_movielens_cfdnn.py: Flax. A state of its own, and the model
    as the first argument of a step that is not jitted there (flax.optim, which it uses, is optax here)."""
    tx = optax.adam(1e-2)

    def evaluate(model, variables, batch):
        predicted = model.apply(variables, batch)
        return jnp.sum(jnp.mean((predicted - batch["user_rating"]) ** 2, axis=-1)), predicted

    def step(model, state, batch):
        fun = jax.value_and_grad(lambda params: evaluate(model, {"params": params}, batch), has_aux=True)
        (loss, _), grads = fun(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    rng = np.random.default_rng(4)
    batches = [
        (
            {
                "item_id": ids(rng, rows, size),
                "user_id": ids(rng, 2 * rows, size),
                "user_rating": rng.integers(1, 6, size).astype(np.float32),
            },
        )
        for _ in range(STEPS)
    ]
    model = Ratings(rows, 2 * rows, dim, (16, dim))
    params = made(rng, model.init, jax.random.key(4), batches[0][0])["params"]
    return Program(
        step,
        OwnState(jnp.int32(0), params, tx.init(params)),
        batches,
        {"Embed_0": lambda batch: batch["item_id"], "Embed_1": lambda batch: batch["user_id"]},
        words={"static_argnums": 0},
        args=lambda state, batch: ((model, state, *batch), {}),
    )


class Browsing(nn.Module):
    items: int
    ranks: int

    def setup(self):
        self.examination = nn.Sequential([nn.Embed(self.ranks * (self.ranks + 1) // 2, 1), nn.sigmoid])
        self.relevance = nn.Sequential([nn.Embed(self.items, 1), nn.sigmoid])

    def __call__(self, items, clicks):
        return self.examination(after_last_click(clicks)).squeeze() * self.relevance(items).squeeze()


def after_last_click(clicks):
    ranks = jnp.tile(jnp.arange(clicks.shape[1]), (clicks.shape[0], 1))
    last = jnp.zeros_like(ranks)
    for k in range(clicks.shape[1] - 1):
        last = last.at[:, k + 1].set(jnp.where(clicks[:, k] == 1, ranks[:, k] + 1, last[:, k]))
    return jnp.arange(clicks.shape[1]).cumsum() + last


class Trainer:
    def step(self, state, batch):
        def loss_fn(state, params, batch):
            items, clicks = batch
            p = state.apply_fn(params, items, clicks)
            return jnp.mean(-clicks * jnp.log(p + 1e-10) - (1 - clicks) * jnp.log(1 - p + 1e-10))

        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(state, state.params, batch)
        return state.apply_gradients(grads=grads), loss


def clicks(rows=1000, dim=1, size=16, ranks=5):
    """philipphager/ultr-toolbox, ultr_toolbox/click_models/neural: Flax. A table of one column for the items, a small
    one whose ids come of the clicks. The step is a method, jitted with its object as static argument 0."""
    del dim
    rng = np.random.default_rng(5)
    batches = [
        ((ids(rng, rows, size, ranks), rng.integers(0, 2, (size, ranks)).astype(np.float32)),) for _ in range(STEPS)
    ]
    model, trainer = Browsing(rows, ranks), Trainer()
    params = made(rng, model.init, jax.random.key(5), *batches[0][0])
    return Program(
        Trainer.step,
        TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3)),
        batches,
        {"relevance": lambda batch: batch[0], "examination": lambda batch: jax.jit(after_last_click)(batch[1])},
        words={"static_argnums": (0,)},
        args=lambda state, batch: ((trainer, state, *batch), {}),
    )


class Workload:
    """Criteo's 13 numbers and 26 ids, all in one float array, and one table for all ids."""

    def __init__(self, rows, dim):
        self.model = Dlrm(rows, dim)

    def model_fn(self, params, batch, model_state, rng):
        del model_state
        return self.model.apply({"params": params}, batch["inputs"], train=True, rngs={"dropout": rng}), None

    def loss_fn(self, targets, logits, weights):
        targets, logits = targets.reshape(-1), logits.reshape(-1)
        losses = -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
        return {"summed": (losses * weights).sum(), "n_valid_examples": weights.sum()}


class Dlrm(nn.Module):
    rows: int
    dim: int

    @nn.compact
    def __call__(self, x, train):
        numbers, cat = jnp.split(x, [13], 1)
        at = jnp.asarray(cat, jnp.int32).reshape(-1) % self.rows
        for size in (16, self.dim):
            numbers = nn.relu(nn.Dense(size)(numbers))
        scaled = lambda key, shape: jax.random.uniform(key, shape) / jnp.sqrt(self.rows)  # noqa: E731
        table = self.param("embedding_table", scaled, [self.rows, self.dim])
        vectors = table[at].reshape(x.shape[0], -1, self.dim)
        stack = jnp.concatenate([numbers[:, None], vectors], axis=1)
        i, j = jnp.triu_indices(stack.shape[1])
        dots = jnp.matmul(stack, jnp.transpose(stack, [0, 2, 1]))[:, i, j]
        x = nn.relu(nn.Dense(16)(jnp.concatenate([numbers, dots], axis=-1)))
        return nn.Dense(1)(nn.Dropout(0.0, deterministic=not train)(x))


class Moments(NamedTuple):
    count: Any
    mu: Any
    nu: Any


def own_nadam(b1=0.9, b2=0.999):
    """The program's own transformation: no line of it is optax's."""

    def decayed(updates, moments, decay, order):
        return jax.tree.map(lambda g, m: (1 - decay) * g**order + decay * m, updates, moments)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        mu, nu, count = decayed(updates, state.mu, b1, 1), decayed(updates, state.nu, b2, 2), state.count + 1
        ahead = jax.tree.map(lambda m: m / (1 - b1**count), decayed(updates, mu, b1, 1))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v / (1 - b2**count)) + 1e-8), ahead, nu)
        return updates, Moments(count, mu, nu)

    return optax.GradientTransformation(init, update)


def dlrm(rows=1300, dim=8, size=8):
    """mlcommons/algorithmic-efficiency, algoperf/workloads/criteo1tb/criteo1tb_jax/models.py, with the step of
    algorithms/target_setting_algorithms/jax_submission_base.py and the optimizer of jax_nadamw.py: Flax. Two static
    arguments, three that are donated, of which one is None, clipping by hand, and weights."""

    def step(workload, opt_update_fn, model_state, opt_state, params, batch, rng, grad_clip):
        def loss_fn(params):
            logits, new_model_state = workload.model_fn(params, batch, model_state, rng)
            loss = workload.loss_fn(batch["targets"], logits, batch["weights"])
            return loss["summed"], (loss["n_valid_examples"], new_model_state)

        (summed, (n, new_model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g / n, grads)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        scale = jax.lax.clamp(min=0.0, x=grad_clip / (norm + 1e-6), max=1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = opt_update_fn(grads, opt_state, params)
        return opt_state, optax.apply_updates(params, updates), new_model_state, summed / n, norm

    rng = np.random.default_rng(6)
    batches = []
    for n in range(STEPS):
        cat = ids(rng, 3 * rows, size, 26)
        batch = {
            "inputs": np.concatenate([floats(rng, size, 13), cat.astype(np.float32)], axis=1),
            "targets": rng.integers(0, 2, size).astype(np.float32),
            "weights": (np.arange(size) < size - 1).astype(np.float32),
        }
        batches.append((batch, jax.random.key(n)))
    workload = Workload(rows, dim)
    variables = made(
        rng, functools.partial(workload.model.init, train=False), jax.random.key(6), batches[0][0]["inputs"]
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
    scale = optax.scale_by_schedule(lambda count: -schedule(count))
    tx = optax.chain(own_nadam(), optax.add_decayed_weights(1e-2), scale)
    return Program(
        step,
        (tx.init(variables["params"]), variables["params"]),
        batches,
        {"embedding_table": lambda batch, key: batch["inputs"][:, 13:].astype(np.int32) % rows},
        words={"static_argnums": (0, 1), "donate_argnums": (2, 3, 4)},
        args=lambda state, batch: ((workload, tx.update, None, *state, *batch, 1e-2), {}),
        new=lambda out: (out[:2], out[2:]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


@struct.dataclass
class TransE:
    initializations: Any  # an entity a row
    relations: Any
    margin: float = struct.field(pytree_node=False)

    def scores(self, edges, kinds):
        unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        head, tail = (unit(self.initializations[edges[n, :]]) for n in (0, 1))
        return -jnp.linalg.norm(head + self.relations[kinds, :] - tail, axis=1, ord=1)

    def loss(self, edges, kinds):
        half = edges.shape[1] // 2
        positive = self.scores(edges[:, :half], kinds[:half])
        negative = self.scores(edges[:, half:], kinds[half:])
        return jnp.sum(jnp.clip(self.margin - positive + negative, 0, None))


def transe(rows=1000, dim=8, size=24):
    """marcelroed/rgcn-jax, rgcn/experiments/link_prediction.py (equinox there, a struct here): all triples are
    constants of the step, which corrupts them itself, with ids that are drawn from its key."""
    rng = np.random.default_rng(7)
    edges, kinds = jnp.asarray(ids(rng, rows // 2, 2, size)), jnp.asarray(ids(rng, 11, size))

    @jax.jit
    def corrupted(key):
        side, other = jax.random.split(key)
        heads = jax.random.bernoulli(side, 0.5, (size,))
        drawn = jax.random.randint(other, (size,), 0, rows)
        bad = jnp.stack([jnp.where(heads, drawn, edges[0]), jnp.where(heads, edges[1], drawn)])
        return jnp.concatenate([edges, bad], axis=1), jnp.concatenate([kinds, kinds])

    tx = optax.adam(
        1e-2, eps=1e-2
    )  # not 1e-8: the signs of an L1 norm cancel, and Adam would scale what rounding leaves

    def step(model, opt_state, key):
        data_key, _ = jax.random.split(key)
        loss, grads = jax.value_and_grad(lambda model, data: model.loss(*data))(model, corrupted(data_key))
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(model, updates), opt_state, loss, None

    model = TransE(jnp.asarray(floats(rng, rows, dim)), jnp.asarray(floats(rng, 11, dim)), 2.0)
    names = ("model", "opt_state", "key")
    return Program(
        step,
        (model, tx.init(model)),
        [(jax.random.key(n),) for n in range(STEPS)],
        {
            "initializations": lambda key: corrupted(jax.random.split(key)[0])[0],
            "relations": lambda key: kinds,
        },
        args=lambda state, batch: ((), dict(zip(names, (*state, *batch), strict=True))),
        new=lambda out: (out[:2], out[2:]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sequences


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        n, d = x.shape[1:]
        q, k, v = jnp.split(nn.Dense(3 * d, use_bias=False)(nn.LayerNorm()(x)), 3, axis=-1)
        scores = jnp.where(jnp.tril(jnp.ones((n, n)))[None] == 0, -jnp.inf, q @ k.transpose(0, 2, 1) * d**-0.5)
        weights = nn.Dropout(0.2)(nn.softmax(scores, axis=-1), deterministic=not train)
        x = x + nn.Dense(d)(weights @ v)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(d, use_bias=False)(nn.gelu(nn.Dense(2 * d)(y)) * nn.Dense(2 * d)(y))


class TiedSequence(nn.Module):
    rows: int
    dim: int
    length: int

    def setup(self):
        self.token = nn.Embed(self.rows, self.dim)
        self.position = nn.Embed(self.length, self.dim)
        self.layer = Attention()

    def __call__(self, x, train):
        h = self.token(x) + self.position(jnp.arange(x.shape[1]))[None, :]
        return self.token.attend(self.layer(h, train))


def tied_sequence(rows=1000, dim=8, size=4, length=6):
    """chris-tng/sasrec, main.py and layers.py: Flax. Dropout by the step's number, weights on padding, a schedule, and
    the item table as the output layer: it is used as a whole."""

    def rate(step):
        return 0.1 * jnp.minimum(1.0, step / 4000) / jnp.sqrt(jnp.maximum(step, 4000.0))

    def step(state, inputs, targets, dropout_rng):
        rng = jax.random.fold_in(dropout_rng, state.step)
        weights = targets > 0

        def loss_fn(params):
            logits = state.apply_fn({"params": params}, inputs, True, rngs={"dropout": rng})
            labels = jax.nn.one_hot(targets, logits.shape[-1])
            losses = -jnp.sum(labels * nn.log_softmax(logits), axis=-1) * weights
            return losses.sum() / weights.sum(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        right = (jnp.equal(jnp.argmax(logits, axis=-1), targets) * weights).sum() / weights.sum()
        return state.apply_gradients(grads=grads), (loss, right, rate(state.step))

    rng = np.random.default_rng(9)
    batches = [
        (ids(rng, rows, size, length), ids(rng, rows, size, length) * (rng.random((size, length)) < 0.8))
        for _ in range(STEPS)
    ]
    batches = [(x, y.astype(np.int32), jax.random.key(9)) for x, y in batches]
    model = TiedSequence(rows, dim, length)
    params = made(rng, functools.partial(model.init, train=False), jax.random.key(9), batches[0][0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(rate, b1=0.9, b2=0.98, eps=1e-9))
    return Program(step, state, batches, {"position": lambda *batch: np.arange(length)}, whole=("token",))


class Tagger(nn.Module):
    rows: int
    dim: int
    tags: int

    @nn.compact
    def __call__(self, *, inputs, train):
        x = nn.Embed(self.rows, self.dim, name="embed")(inputs.astype("int32"))
        x = nn.Dropout(0.3)(x, deterministic=not train)
        x = x + jnp.sin(jnp.arange(x.shape[1])[:, None] / (1 + jnp.arange(self.dim)))[None]
        y = nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
        return nn.Dense(self.tags)(nn.LayerNorm()(x + y))


def tagger(mean=lambda x: x, rows=1000, dim=8, size=8, length=6):
    """google/flax, examples/nlp_seq/train.py: Flax. Words to tags, so that the table is not tied; weights on padding,
    AdamW, dropout by the step's number, the random key by name. The original is under jax.pmap."""

    def step(state, batch, model, learning_rate_fn, dropout_rng=None):
        inputs, targets = (batch.get(k, None) for k in ("inputs", "targets"))
        weights = jnp.where(targets > 0, 1, 0).astype(jnp.float32)
        dropout_rng = jax.random.fold_in(dropout_rng, state.step)

        def loss_fn(params):
            logits = model.apply({"params": params}, inputs=inputs, train=True, rngs={"dropout": dropout_rng})
            losses = -jnp.sum(jax.nn.one_hot(targets, logits.shape[-1]) * nn.log_softmax(logits), axis=-1)
            return (losses * weights).sum() / weights.sum(), (logits, losses)

        lr = learning_rate_fn(state.step)
        (_, (logits, losses)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        new_state = state.apply_gradients(grads=mean(grads))
        metrics = {
            "loss": (losses * weights).sum(),
            "accuracy": (jnp.equal(jnp.argmax(logits, axis=-1), targets) * weights).sum(),
            "denominator": weights.sum(),
            "learning_rate": lr,
        }
        return new_state, metrics

    rng = np.random.default_rng(10)
    batches = [
        {"inputs": ids(rng, rows, size, length), "targets": rng.integers(0, 7, (size, length)).astype(np.int32)}
        for _ in range(STEPS)
    ]
    model = Tagger(rows, dim, 7)
    init = functools.partial(model.init, train=False)
    params = made(rng, init, jax.random.key(10), inputs=batches[0]["inputs"])["params"]
    rate = lambda step: 0.05 * jnp.minimum(1.0, step / 8000) / jnp.sqrt(jnp.maximum(step, 8000.0))  # noqa: E731
    tx = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-9, weight_decay=1e-1)
    return Program(
        functools.partial(step, model=model, learning_rate_fn=rate),
        TrainState.create(apply_fn=model.apply, params=params, tx=tx),
        batches,
        {"embed": lambda batch: batch["inputs"]},
        words={"donate_argnums": (0,)},
        args=lambda state, batch: ((state, batch), {"dropout_rng": jax.random.key(11)}),
    )


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_programs_run():
    """With rank promotion, on which they rely, and compiled in less time."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


PROGRAMS = [glove, cbow, skip_gram, playlists, deepfm, ratings, clicks, dlrm, transe, tied_sequence, tagger]


@pytest.mark.parametrize("make", slow_but([cbow], PROGRAMS))
def test_program(make):
    program = make()
    run = js.jit(program.step, **program.words)
    static = {k: v for k, v in program.words.items() if k == "static_argnums"}
    dense = jax.jit(program.step, **static)
    state, want = copied(program.state), copied(program.state)
    whole = pytest.warns(UserWarning, match="dense") if program.whole else contextlib.nullcontext()
    args, kwargs = program.args(state, program.batches[0])
    with whole:
        said = js.explain(run)(*args, **kwargs).parameters
    found = {path for path, each in said.items() if each.row_sparse}
    assert found == {path for path in said if table_of(path, program.tables)} != set(), str(said)
    assert not program.whole or any(table_of(path, program.whole) for path in said)
    for batch in program.batches:
        args, kwargs = program.args(state, batch)
        state, metrics = program.new(run(*args, **kwargs))
        args, kwargs = program.args(want, batch)
        new, wanted = program.new(dense(*args, **kwargs))
        given = batch if isinstance(batch, tuple) else (batch,)
        want = put_back(new, want, {name: read(*given) for name, read in program.tables.items()})
        compare(make.__name__, (state, metrics), (want, wanted), TOL)


def check_parts(states, batches, tables, run, dense):
    """Two states, changed by run and by dense, agree after every batch but for rows that are not read."""
    got, want = states
    for batch in batches:
        got, metrics = run(got, batch)
        new, wanted = dense(want, batch)
        want = put_back(new, want, {name: read(*batch) for name, read in tables.items()})
        compare("", (got, metrics), (want, wanted), TOL)


def test_gradients_and_update_are_jitted_apart():
    """Glove as it is written: jax.jit around each of two functions, as also in google/flax, examples/mnist. What leaves
    a compiled function is an array of the table's size: as under jax.jit, and announced."""

    def in_two(jit):
        gradients, update = jit(glove_gradients), jit(glove_update)

        def step(state, batch):
            grads, loss = gradients(state, *batch)
            return update(state, grads), loss

        return step

    program = glove()
    states = copied(program.state), copied(program.state)
    with pytest.warns(UserWarning, match=r"no argument comes back|no array of the state is read by rows"):
        check_parts(states, program.batches, {}, in_two(js.jit), in_two(jax.jit))


@pytest.mark.slow
def test_a_step_changes_modules_in_place():
    """DeepFM as it is written: by one word, js.nnx.jit for nnx.jit. js.jit would lose what changes, and refuses."""
    pairs = []
    for jit in (nnx.jit, js.nnx.jit):
        model, batches, _ = deepfm_parts(1000, 8, 16)
        step, optimizer = jit(deepfm_in_place), nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        losses = [step(model, optimizer, batch) for batch in batches]
        pairs.append((nnx.as_pure(nnx.state(model)), losses))
    compare("", pairs[1], pairs[0], TOL)
    with pytest.raises(TypeError, match=r"changes .* of its .*, which would be lost.*Use js\.nnx\.jit"):
        js.jit(deepfm_in_place)(model, optimizer, batches[0])


@pytest.mark.slow
def test_arguments_of_jit():
    """donate_argnames: google/flax, examples/gemma/train.py. The shardings: AlgoPerf's step (dlrm)."""
    program = glove()
    state, _ = js.jit(program.step, donate_argnames="state")(copied(program.state), *program.batches[0])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(TypeError, match=r"'in_shardings'.*jax\.jit\(js\.rowwise\(step\), .*in_shardings=\.\.\.\)"):
        js.jit(program.step, in_shardings=sharding)
    step = jax.jit(js.rowwise(program.step), donate_argnums=0, in_shardings=sharding)
    again, _ = step(copied(program.state), *program.batches[0])
    compare("", state, again, TOL)


@pytest.mark.slow
def test_tagger_under_pmap():
    """As it is written, on two devices: jax.pmap stays, and js.rowwise is the one word more."""
    program = tagger(mean=lambda grads: jax.lax.pmean(grads, "batch"))
    keys = jax.random.split(jax.random.key(11))

    def under_pmap(step):
        mapped = jax.pmap(step, axis_name="batch", devices=jax.devices()[:2])
        return lambda state, batch: mapped(state, batch, dropout_rng=keys)

    shards = [jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch) for batch in program.batches]
    got = want = jax.tree.map(lambda x: jnp.stack([x, x]), program.state)
    run, dense = under_pmap(js.rowwise(program.step)), under_pmap(program.step)
    for batch, shard in zip(program.batches, shards, strict=True):
        got, metrics = run(got, shard)
        new, wanted = dense(want, shard)
        touched = {name: read(batch) for name, read in program.tables.items()}
        halves = [put_back(*(jax.tree.map(lambda x, n=n: x[n], s) for s in (new, want)), touched) for n in (0, 1)]
        want = jax.tree.map(lambda *x: np.stack(x), *halves)
        compare("", (got, metrics), (want, wanted), TOL)
