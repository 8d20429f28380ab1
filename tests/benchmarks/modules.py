"""`python -m tests.benchmarks.modules`: an nnx step under nnx.jit (donated or not) and js.nnx.jit, and with two words.

The five models of tests/modules.py with Adam, on batches that are NumPy arrays. All steps of a model are timed in
turn in one process, medians. Beside the time stands how many arrays with a row for each of a table's the compiled step
makes: copies of tables, dense gradients, updates. The tables of Ranking have from 1 to 1/16 of --rows. At 1M x 64 it
takes about 10 GB.
"""

import argparse
import re
import time

import jax
import numpy as np
import optax
from flax import nnx

import jaxsparse as js
from tests.hlo import compiled_by_default, large_arrays
from tests.modules import MODELS, Ranking

SIZES = {"NextItem": 512}  # of batches; its examples are sequences


def loss_of(model, batch):
    return model.loss(batch)


def step_with(value_and_grad):
    def step(model, optimizer, batch):
        loss, grads = value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    return step


STEPS = {
    "nnx.jit": (nnx.jit(step_with(nnx.value_and_grad)), optax.adam),
    "nnx.jit, donated": (nnx.jit(step_with(nnx.value_and_grad), donate_argnums=(0, 1)), optax.adam),
    "two words, donated": (nnx.jit(step_with(js.nnx.value_and_grad), donate_argnums=(0, 1)), js.lazy_adam),
    "js.nnx.jit": (js.nnx.jit(step_with(nnx.value_and_grad)), optax.adam),
}


def table_sized(step, args, num_rows: int) -> int:
    """How many arrays the compiled step makes that have as many rows as a table."""
    lowered = step.lower(*args)
    text = compiled_by_default(getattr(lowered, "lowered", lowered)).as_text()
    has_rows = re.compile(rf"\[({'|'.join(str(num_rows // n) for n in sorted({*Ranking.tables_of}))})[,\]]")
    return sum(map(bool, map(has_rows.search, large_arrays(text, num_rows // 16))))


def measure(kind: type, num_rows: int, dim: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Median milliseconds of each step, and the table-sized arrays that it makes."""
    rng = np.random.default_rng(0)
    batches = [kind.draw_batch(rng, num_rows, SIZES.get(kind.__name__, 4096)) for _ in range(4)]
    objects, times, made = {}, {name: [] for name in STEPS}, {}
    for name, (step, tx) in STEPS.items():
        model = kind(num_rows, dim, nnx.Rngs(0, negatives=1))
        objects[name] = model, nnx.Optimizer(model, tx(1e-3), wrt=nnx.Param)
        made[name] = table_sized(step, (*objects[name], batches[0]), num_rows)
    for repeat in range(rounds + 1):
        for name, (step, _) in STEPS.items():
            for batch in batches:
                start = time.perf_counter()
                loss = step(*objects[name], batch)
                jax.block_until_ready((nnx.state(objects[name][0]), loss))
                if repeat:  # the first round compiles
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (float(np.median(t)), made[name]) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", help="a part of a model's name")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {options.rows:,} x {options.dim}, Adam, ms a step")
    for kind in MODELS.values():
        if options.only is None or options.only in kind.__name__:
            for name, (ms, made) in measure(kind, options.rows, options.dim, options.rounds).items():
                print(f"{kind.__name__:>10} {name:>20} {ms:>8.2f} {made:>4} table-sized arrays", flush=True)


if __name__ == "__main__":
    main()
