"""`python -m tests.benchmarks.example`: the README's first example, as it stands and with its one word taken back.

Both run in one process, in turn, on the same eight batches of new ids. Medians, and the median of the ratio by round.
"""

import argparse
import json
import time

import jax
import numpy as np

from tests.pages import cells, text

WORD, STOCK = "@js.jit", "@__import__('functools').partial(jax.jit, donate_argnums=0)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cell = cells(text("README.md"))[0]
    assert cell.count(WORD) == 1
    contestants = {"js.jit": {}, "jax.jit": {}}
    for namespace, code in zip(contestants.values(), (cell, cell.replace(WORD, STOCK)), strict=True):
        exec(compile(code, "README.md", "exec"), namespace)
    rng = np.random.default_rng(1)
    batches = [(rng.zipf(1.2, (256, 20)) % 100_000, rng.integers(0, 2, 256).astype(np.float32)) for _ in range(8)]
    rounds: list[dict[str, float]] = []
    for _ in range(1 + options.rounds):
        rounds.append({})
        for name, namespace in contestants.items():
            times, step = [], namespace["train_step"]
            for batch in batches:
                start = time.perf_counter()
                namespace["state"], loss = step(namespace["state"], batch)
                jax.block_until_ready((namespace["state"].params, loss))
                times.append(1e3 * (time.perf_counter() - start))
            rounds[-1][name] = float(np.median(times))
    del rounds[0]  # compiled there
    figures = {name: float(np.median([each[name] for each in rounds])) for name in contestants}
    figures["ratio"] = float(np.median([each["jax.jit"] / each["js.jit"] for each in rounds]))
    print(f"js.jit {figures['js.jit']:.2f} ms, jax.jit {figures['jax.jit']:.2f} ms, ratio {figures['ratio']:.1f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
