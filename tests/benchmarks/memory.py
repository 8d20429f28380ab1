"""`python -m tests.benchmarks.memory`: peak resident memory of steps and of making the state, and compile times.

Each in a process of its own; 8M rows of 64 columns, Adam. Peaks are the kernel's (VmHWM, reset before), less what
Python and jax take by themselves, as a multiple of the bytes of the table and its two slots. The state is made in three
ways: in one jit, the stock way; with only the parameters in a jit; and, the recipe, so with a key whose numbers need no
scratch memory to be made:

    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), ids)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
"""

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

import jaxsparse as js
from tests.benchmarks import with_jax
from tests.benchmarks.workloads import Case

NUM_ROWS, DIM = 8_000_000, 64


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.Embed(NUM_ROWS, DIM)(ids).mean(1))[:, 0]


def memory(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak(prepare: Callable[[], Callable[[], Any]]) -> float:
    """Of the call that is prepared."""
    jax.block_until_ready(jnp.ones(8) + 1)
    baseline = memory("VmRSS")
    call = prepare()
    Path("/proc/self/clear_refs").write_text("5")
    kept = jax.block_until_ready(call())
    above = memory("VmHWM") - baseline
    del kept
    return above / (3 * 4 * NUM_ROWS * DIM)


def of_steps() -> float:
    def prepare() -> Callable[[], Any]:
        step, _ = with_jax.make("jaxsparse", Case("memory", NUM_ROWS, dim=DIM))
        return lambda: [step(i) for i in range(8)]

    return peak(prepare)


def of_init(way: str) -> float:
    model, ids, tx = Model(), jnp.zeros((4096, 20), jnp.int32), js.lazy_adam(1e-3)
    init, key = jax.jit(model.init), jax.random.key(0)

    def create(params: Any) -> TrainState:
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    ways = {
        "stock": lambda: jax.jit(lambda key: create(model.init(key, ids)))(key),
        "apart": lambda: create(init(key, ids)),
        "recipe": lambda: create(init(jax.random.key(0, impl="rbg"), ids)),
    }
    return peak(lambda: ways[way])


def of_compiling(length: int) -> float:
    """Seconds to trace and compile the first step."""
    case = Case("compile", 10**6, length=length)
    batch, state = (
        next(iter(with_jax.make_data(case))),
        with_jax.make_state(case, with_jax.make_optimizer(case, lazy=True)),
    )
    start = time.perf_counter()
    js.make_train_step(with_jax.make_loss(case)).lower(state, batch).compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    jobs = {"step": (of_steps,)} | {f"init_{way}": (of_init, way) for way in ("stock", "apart", "recipe")}
    jobs |= {f"compile_{length}_s": (of_compiling, length) for length in (20, 500)}
    figures = {}
    for name, (function, *arguments) in jobs.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures[name] = pool.apply(function, arguments)
        print(f"{name:>16} {figures[name]:6.2f}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
