"""`python -m jaxsparse`: a spam classifier on real e-mails, row-sparse and dense side by side.

The library on one page: texts -> SciPy CSR of hashed word uni- and bigrams -> js.batches ->
js.dot in a Flax model -> js.make_train_step with js.lazy_adam. The dense contestant is the same model and loss with
jax.value_and_grad and optax.adam. The two are timed in turns.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import lzma
import re
import sys
import time
import zlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import scipy.sparse
import scipy.stats
from flax.training.train_state import TrainState
from tqdm import tqdm

import jaxsparse as js
from jaxsparse.command.run import Parser, command, number


def load_mails() -> tuple[list[str], np.ndarray]:
    """The texts (n), and float32 labels (n,): 1 for spam."""
    packed = importlib.resources.files("jaxsparse").joinpath("data/spamassassin.tsv.xz").read_bytes()
    lines = [line.split("\t", 2) for line in lzma.decompress(packed).decode().splitlines()]
    return [text for _, _, text in lines], np.array([label == "spam" for label, _, _ in lines], np.float32)


def hash_words(texts: list[str], num_rows: int) -> scipy.sparse.csr_matrix:
    """One row for each text: 1 / n at its n distinct words and word pairs, hashed into num_rows columns."""
    columns, starts = [], [0]
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        columns.append(np.unique([zlib.crc32(gram.encode()) % num_rows for gram in grams]).astype(np.int32))
        starts.append(starts[-1] + len(columns[-1]))
    lengths = np.diff(starts)
    values = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32)
    return scipy.sparse.csr_matrix((values, np.concatenate(columns), starts), shape=(len(texts), num_rows))


def split_by_text(texts: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and test mails. 20 % of the distinct texts are held out; copies are on the same side."""
    numbers: dict[str, int] = {}
    which = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    held_out = np.random.default_rng(seed).permutation(len(numbers)) < 0.2 * len(numbers)
    return np.flatnonzero(~held_out[which]), np.flatnonzero(held_out[which])


class BagClassifier(nn.Module):
    """A bag of embeddings and a linear head."""

    num_rows: int
    dim: int

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        table = self.param("table", nn.initializers.normal(0.1), (self.num_rows, self.dim))
        bag = js.dot(x, table)  # (B, dim): the mean of the embeddings of a mail's words
        return nn.Dense(1)(bag)[:, 0]


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive outranks a negative."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    return float(scipy.stats.mannwhitneyu(positives, negatives).statistic / (len(positives) * len(negatives)))


def main(argv: list[str] | None = None) -> Any:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["train"], ["predict"]):  # of the user's own file
        return command(argv)
    if argv[:1] and not argv[0].startswith("-"):
        print(f"python -m jaxsparse: {argv[0]!r} is no command. Commands are train and predict.", file=sys.stderr)
        raise SystemExit(2)
    description = "Without a command: trains a spam classifier on real e-mails, and times it beside dense steps. "
    description += "With your own file: `train FILE --out DIR`, then `predict DIR FILE`; each has --help."
    parser = Parser(prog="python -m jaxsparse", description=description)
    parser.add_argument("--rows", type=number(int, 0, 2**30), default=2**20, help="rows of the table (default 2^20)")
    parser.add_argument("--dim", type=number(int, 0), default=64, help="columns of the table (default 64)")
    parser.add_argument("--epochs", type=number(int, 0), default=3, help="passes over the mails (3)")
    parser.add_argument("--batch-size", type=number(int, 0), default=32, help="mails a step (32)")
    parser.add_argument("--seed", type=number(int, -1), default=0, help="of split, initialisation and order")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(argv)

    texts, labels = load_mails()
    train, test = split_by_text(texts, options.seed)
    features = hash_words(texts, options.rows)
    batches = js.batches(features[train], labels[train], batch_size=options.batch_size, shuffle=True, seed=options.seed)
    held_out = js.batches(features[test], labels[test], batch_size=options.batch_size)

    model = BagClassifier(options.rows, options.dim)

    def loss_fn(params: Any, batch: js.Batch) -> jax.Array:
        losses = optax.sigmoid_binary_cross_entropy(model.apply(params, batch.x), batch.y)
        return js.weighted_mean(losses, batch.weight)

    def new_state(tx: Any) -> TrainState:
        params = jax.jit(model.init)(jax.random.key(options.seed), next(iter(batches)).x)
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = new_state(js.lazy_adam(3e-3))
    step = js.make_train_step(loss_fn)
    touched = []
    print("The first step compiles, which takes a few seconds.", file=sys.stderr)
    with tqdm(total=options.epochs * len(batches), desc="training", unit="step") as bar:
        for _ in range(options.epochs):
            for batch in batches:
                state, metrics = step(state, batch)
                touched.append(metrics["rows_touched"])
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix(loss=f"{metrics['loss']:.4f}")

    predict = jax.jit(model.apply)
    scores = np.concatenate([np.asarray(predict(state.params, b.x))[np.asarray(b.weight) > 0] for b in held_out])
    sparse_ms, dense_ms = time_steps(
        step, state, make_dense_step(loss_fn), new_state(optax.adam(3e-3)), list(batches)[:8]
    )

    table_bytes = 4 * options.rows * options.dim
    figures = {
        "test_accuracy": float(np.mean((scores > 0) == (labels[test] == 1))),
        "test_auc": auc(scores, labels[test]),
        "num_rows": options.rows,
        "rows_touched_per_step": float(np.mean(jax.device_get(touched))),
        "sparse_step_ms": sparse_ms,
        "dense_step_ms": dense_ms,
        "table_and_slots_bytes": 3 * table_bytes,
    }
    report(figures, len(train), len(test))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)
    return figures


def make_dense_step(loss_fn: Any) -> Any:
    """The dense step, with jax.value_and_grad and optax."""

    @partial(jax.jit, donate_argnums=0)
    def dense_step(state: TrainState, batch: js.Batch) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    return dense_step


def time_steps(
    step: Any, state: Any, dense_step: Any, dense_state: Any, batches: list[js.Batch]
) -> tuple[float, float]:
    """Median milliseconds of both steps, in turns on the same batches. The first turn compiles and is left out."""
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    for round in range(4):
        for batch in batches * 2:
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state.params, metrics))
            times["sparse"].append(1e3 * (time.perf_counter() - start))
        for batch in batches[:3]:
            start = time.perf_counter()
            dense_state, loss = dense_step(dense_state, batch)
            jax.block_until_ready((dense_state.params, loss))
            times["dense"].append(1e3 * (time.perf_counter() - start))
        if round == 0:  # compiled
            times = {"sparse": [], "dense": []}
    return float(np.median(times["sparse"])), float(np.median(times["dense"]))


def report(figures: dict[str, float], num_train: int, num_test: int) -> None:
    """Prints the figures."""
    ratio = figures["dense_step_ms"] / figures["sparse_step_ms"]
    print(f"""
SpamAssassin e-mails: {num_train} to train, {num_test} held out by distinct text
  test accuracy          {figures["test_accuracy"]:.4f}
  test AUC               {figures["test_auc"]:.4f}
  rows touched a step    {figures["rows_touched_per_step"]:,.0f} of {figures["num_rows"]:,}
  row-sparse step        {figures["sparse_step_ms"]:.1f} ms    js.make_train_step, js.lazy_adam
  dense step             {figures["dense_step_ms"]:.1f} ms    jax.value_and_grad, optax.adam ({ratio:.1f} times as long)
  table and two slots    {figures["table_and_slots_bytes"] / 1e6:,.0f} MB""")


if __name__ == "__main__":
    main()
