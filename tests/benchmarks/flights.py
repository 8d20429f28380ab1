"""`python -m tests.benchmarks.flights --data FILE`: what is left of the step's own speed behind the input pipeline.

The job is the flights of `skipped_rows.py`, which says where the data are: eight ids and 28 crosses an example, AdamW.
An epoch end to end, host and device, js.batches shuffled, is timed in turn with as many steps on batches that are on
the device already; printed are examples a second and the ratio. "csr" has the crosses as ones in a SciPy matrix, and
their weights in js.dot.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from flax.training.train_state import TrainState

import jaxsparse as js
from tests.benchmarks.skipped_rows import Job, flights_job

RESIDENT = 64  # batches


def as_csr(crosses: np.ndarray, num_columns: int) -> scipy.sparse.csr_matrix:
    starts = np.arange(0, crosses.size + 1, crosses.shape[1])
    ones = np.ones(crosses.size, np.float32)
    return scipy.sparse.csr_matrix((ones, crosses.ravel(), starts), (len(crosses), num_columns))


def measure(job: Job, form: str, rounds: int) -> dict[str, float]:
    """Medians of examples a second, end to end and on batches that are there, and their ratio."""
    x, params = job.x, jax.jit(job.model.init)(jax.random.key(0), jax.tree.map(lambda a: a[:2], job.x))
    if form == "csr":
        x = as_csr(job.x["crosses"], job.model.num_crosses)
        params = {"wide": jnp.zeros((job.model.num_crosses, job.model.dim)), "head": jnp.ones(job.model.dim)}

    def loss_fn(params: Any, batch: js.Batch) -> jax.Array:
        if form == "csr":
            logits = jnp.tanh(js.dot(batch.x, params["wide"])) @ params["head"]
        else:
            logits = job.model.apply(params, batch.x)
        return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)

    batches = js.batches(x, job.y, batch_size=job.batch_size, shuffle=True)
    resident = list(itertools.islice(batches, RESIDENT))
    step, state = js.make_train_step(loss_fn), TrainState.create(apply_fn=None, params=params, tx=js.lazy_adamw(1e-3))

    def rate(epoch: Any) -> float:
        nonlocal state
        start = time.perf_counter()
        for batch in epoch:
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return job.batch_size * len(batches) / (time.perf_counter() - start)

    there = itertools.cycle(resident)
    rates = [(rate(batches), rate(itertools.islice(there, len(batches)))) for _ in range(rounds + 1)]
    end_to_end, alone = np.median(rates[1:], axis=0)  # the first round compiles
    return {f"{form}_end_to_end": end_to_end, f"{form}_alone": alone, form: end_to_end / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FILE", required=True)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    job, figures = flights_job(options.data), {}
    print(f"{len(job.y)} examples, batches of {job.batch_size}\n{'examples/s':12}{'end to end':>12}{'step alone':>12}")
    for form in ("ids", "csr"):
        found = measure(job, form, options.rounds)
        print("{:12}{:12,.0f}{:12,.0f}{:8.2f}".format(form, *found.values()), flush=True)
        figures |= found
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
