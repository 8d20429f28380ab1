"""`python -m tests.benchmarks.replay`: what exactness costs.

One job, 4096 bags of 20 Zipf(1.2) ids, 64 columns, a linear head and Adam: a step that replays skipped rows, one that
freezes them, a dense one, and js.flush, timed in turn in one process, medians; and the temporary memory of flush.
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
from jaxsparse.train.refresh import _flush_all
from tests.benchmarks.crossover import DIM, LENGTH, dense_step, loss_fn

BATCH = 4096


def measure(num_rows: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.2, (8 * BATCH, LENGTH)) % num_rows).astype(np.int32)
    batches = list(js.batches(ids, rng.integers(0, 2, 8 * BATCH).astype(np.float32), batch_size=BATCH))
    sparse, table = js.make_train_step(loss_fn), rng.standard_normal((num_rows, DIM), dtype=np.float32)
    contestants = {
        "freeze": (sparse, js.lazy_adam(1e-3)),
        "replay": (sparse, js.lazy_adam(1e-3, untouched="replay")),
        "dense": (jax.jit(dense_step, donate_argnums=0), optax.adam(1e-3)),
    }
    states, times = {}, {name: [] for name in (*contestants, "flush")}
    for name, (_, tx) in contestants.items():
        params = {"table": jnp.array(table), "head": jnp.ones(DIM)}
        states[name] = TrainState.create(apply_fn=None, params=params, tx=tx)

    def timed(name, call):
        start = time.perf_counter()
        out = call()
        jax.block_until_ready(out)
        times[name].append(1e3 * (time.perf_counter() - start))
        return out

    for repeat in range(rounds + 1):
        for name, (step, _) in contestants.items():
            for batch in batches if name != "dense" or repeat else batches[:1]:
                states[name], _ = timed(name, lambda name=name, step=step, batch=batch: step(states[name], batch))
        states["replay"] = timed("flush", lambda: js.flush(states["replay"]))
        if not repeat:  # it compiled
            times = {name: [] for name in times}
    both = states["replay"].params, states["replay"].opt_state
    memory = _flush_all.lower(*both).compile().memory_analysis()
    figures = {f"{name}_ms": float(np.median(t)) for name, t in times.items()}
    return figures | {"flush_temporary_mb": memory.temp_size_in_bytes / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--num-rows", type=int, default=1_000_000)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {BATCH} bags of {LENGTH} ids, {DIM} columns, Adam")
    figures = measure(options.num_rows, options.rounds)
    for name, value in figures.items():
        print(f"{name:>20} {value:10.2f}")
    print(f"{'replay / freeze':>20} {figures['replay_ms'] / figures['freeze_ms']:10.2f}")
    print(f"{'flush / dense':>20} {figures['flush_ms'] / figures['dense_ms']:10.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
