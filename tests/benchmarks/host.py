"""`python -m tests.benchmarks.host`: what js.batches takes on the host for each batch of the benchmark's jobs.

It cuts the batch out of the data and puts it on the device. The benchmark's steps find batches there, and sort their
ids. Beside it, in the same process, how long the step takes; where a batch is made while the last step runs, as in a
loop that waits for neither, the host's work is hidden as far as there is a core for it (`flights.py`).
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from tests.benchmarks import with_jax
from tests.benchmarks.workloads import NUM_BATCHES, cases

JOBS = ("bag/adam/1e6", "uniform/adam", "ctr/adam", "linear/adam")
ROUNDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    by_name, figures = {case.name: case for case in cases()}, {}
    print(f"{'ms':14}{'js.batches':>12}{'step':>8}")
    for name in JOBS:
        batches, (step, _) = with_jax.make_data(by_name[name]), with_jax.make("jaxsparse", by_name[name])
        times = []
        for _ in range(ROUNDS + 2):  # two are not timed
            for i, batch in zip(range(NUM_BATCHES), timed(batches), strict=True):
                start = time.perf_counter()
                step(i)
                times.append((batch, time.perf_counter() - start))
        host, device = 1e3 * np.median(times[2 * NUM_BATCHES :], axis=0)
        print(f"{name:14}{host:12.2f}{device:8.2f}", flush=True)
        figures |= {name: host, f"{name} step": device}
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


def timed(batches):
    """How long each took to make."""
    it = iter(batches)
    for _ in range(len(batches)):
        start = time.perf_counter()
        jax.block_until_ready(next(it))
        yield time.perf_counter() - start


if __name__ == "__main__":
    main()
