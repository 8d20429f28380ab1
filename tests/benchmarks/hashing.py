"""`python -m tests.benchmarks.hashing`: values a second of one core that js.hash_ids and js.cross take."""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np

import jaxsparse as js

N, ROWS, ROUNDS = 1 << 20, 1_000_003, 9


def columns():
    rng = np.random.default_rng(0)
    integers = rng.integers(0, 2**63, N)
    tokens = [f"{i:08x}" for i in integers % 2**32]  # as Criteo's categories
    names = [f"user{i % 100_000:07d}" for i in range(N)]
    values = {
        "int64": integers,
        "int32": integers.astype(np.int32),
        "list of str, 8 long": tokens,
        "list of str, 11 long": names,
        "array of str, 11 long": np.array(names),
        "list of bytes, 8 long": [token.encode() for token in tokens],
    }
    for name, column in values.items():
        yield name, functools.partial(js.hash_ids, column, ROWS)
    yield "cross of int64 and str", functools.partial(js.cross, [integers, tokens], ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    figures = {}
    for name, run in columns():
        times = []
        for _ in range(ROUNDS + 1):  # the first is not timed
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        figures[name] = N / float(np.median(times[1:])) / 1e6
        print(f"{name:24}{figures[name]:8.1f} M/s", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
