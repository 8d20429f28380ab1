"""`python -m tests.benchmarks.crossover`: the table size below which a dense step is faster.

One job, 1024 bags of 20 Zipf(1.2) ids, 64 columns, a linear head and Adam, for growing tables; both steps timed in turn
in one process, medians. Below a ratio of 1 dense optax wins.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxsparse as js

BATCH, LENGTH, DIM = 1024, 20, 64


def loss_fn(params, batch):
    logits = js.embedding_bag(params["table"], batch.x, combiner="mean") @ params["head"]
    return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)


def dense_step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


def measure(num_rows: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of both steps at one table size."""
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.2, (8 * BATCH, LENGTH)) % num_rows).astype(np.int32)
    batches = list(js.batches(ids, rng.integers(0, 2, 8 * BATCH).astype(np.float32), batch_size=BATCH))
    contestants = {
        "sparse_ms": (js.make_train_step(loss_fn), js.lazy_adam(1e-3)),
        "dense_ms": (jax.jit(dense_step, donate_argnums=0), optax.adam(1e-3)),
    }
    states, times = {}, {name: [] for name in contestants}
    for name, (_, tx) in contestants.items():
        params = {"table": jnp.ones((num_rows, DIM)), "head": jnp.ones(DIM)}
        states[name] = TrainState.create(apply_fn=None, params=params, tx=tx)
    for repeat in range(rounds + 1):
        for name, (step, _) in contestants.items():
            for batch in batches:
                start = time.perf_counter()
                states[name], out = step(states[name], batch)
                jax.block_until_ready((states[name].params, out))
                if repeat:  # the first round compiles
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    rows = []
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {BATCH} bags of {LENGTH} ids, {DIM} columns, Adam")
    print(f"{'num_rows':>10} {'sparse ms':>10} {'dense ms':>10} {'dense / sparse':>15}")
    for num_rows in (250, 1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000):
        figures = {"num_rows": num_rows, **measure(num_rows, options.rounds)}
        rows.append(figures)
        ratio = figures["dense_ms"] / figures["sparse_ms"]
        print(f"{num_rows:>10,} {figures['sparse_ms']:>10.2f} {figures['dense_ms']:>10.2f} {ratio:>15.2f}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
