"""`python -m tests.benchmarks.export`: scoring by the folder that `js.export_numpy` writes, with JAX beside it.

Bags of 20 uniform ids in a table of 2^20 x 64, their mean, and a network of 64 hidden units. Each number is of a
process of its own: seconds from its start to its first score, of one example; microseconds an example, the median of
ten batches of 4096 that are other ones each time, and then of 1000 examples, one at a time; and resident memory over
what Python and NumPy take: its own (RssAnon), and what it sees of files (RssFile): libraries, and pages of the table
that were read, with as many others as the kernel has at hand or reads ahead. It may take these back at any time. JAX
has the parameters from the same .npy files, and compiles for each size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, DIM, LENGTH, BATCH = 2**20, 64, 20, 4096

NUMPY = """
sys.path.insert(0, sys.argv[1])
from model import predict
"""
JAX = """
import jax, jax.numpy as jnp
params = {name: jnp.asarray(np.load(f"{sys.argv[1]}/{name}.npy")) for name in ("table", "hidden", "bias", "head")}
from tests.benchmarks.export import apply_fn
apply = jax.jit(apply_fn)
predict = lambda ids: np.asarray(apply(params, ids))
"""
RUN = """
import json, re, sys, time
import numpy as np
def resident():
    with open("/proc/self/status") as status:
        status = status.read()
    return np.array([int(re.search(name + r":\\s+(\\d+)", status)[1]) / 1024 for name in ("RssAnon", "RssFile")])
before = resident()
{model}
rng = np.random.default_rng(0)
def ids(n):
    return rng.integers(0, {rows}, (n, {length})).astype(np.int32)
predict(ids(1))
first, memory = time.time(), resident() - before
predict(ids(64))
some = resident() - before
predict(ids({batch}))
seconds, again = [], [ids({batch}) for _ in range(10)]
for x in again:
    start = time.perf_counter()
    predict(x)
    seconds.append(time.perf_counter() - start)
numbers = [first - float(sys.argv[2]), 1e6 * float(np.median(seconds)) / {batch}]
after, single = resident() - before, []
for x in [ids(1) for _ in range(1000)]:
    start = time.perf_counter()
    predict(x)
    single.append(time.perf_counter() - start)
print(json.dumps([*numbers, 1e6 * float(np.median(single)), *memory, *some, *after]))
"""


WAYS = (("NumPy", NUMPY, False), ("NumPy, files not read yet", NUMPY, True), ("JAX", JAX, False))


def apply_fn(params, ids):
    import jax

    bags = params["table"][ids].mean(1)
    return jax.nn.relu(bags @ params["hidden"] + params["bias"]) @ params["head"]


def forget(folder: Path) -> None:
    """Has the kernel drop the files' pages, as they are on a machine that has not read them."""
    for file in folder.glob("*.npy"):
        opened = os.open(file, os.O_RDONLY)
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def measure(model: str, folder: Path, rounds: int, is_cold: bool) -> list[float]:
    """Medians of seconds to the first score, microseconds an example in batches and alone, and MB of its own and of
    files: after the first example, 64 more, and the batches."""
    code = RUN.format(model=model, rows=ROWS, length=LENGTH, batch=BATCH)
    out = []
    for _ in range(rounds):
        if is_cold:
            forget(folder)
        done = [sys.executable, "-c", code, str(folder), str(time.time())]
        out.append(json.loads(subprocess.run(done, check=True, capture_output=True, text=True).stdout))
    return [statistics.median(numbers) for numbers in zip(*out, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    rounds = parser.parse_args().rounds
    import numpy as np

    import jaxsparse as js

    rng = np.random.default_rng(0)
    shapes = {"table": (ROWS, DIM), "hidden": (DIM, 64), "bias": (1, 64), "head": (64,)}
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as parent:
        start = time.perf_counter()
        folder = js.export_numpy(apply_fn, params, np.zeros((BATCH, LENGTH), np.int32), Path(parent, "model"))
        print(f"written in {time.perf_counter() - start:.2f} s; the table has {4 * ROWS * DIM / 1e6:.0f} MB")
        source = (folder / "model.py").read_text()
        print(source[source.index("def predict") :])
        for name, model, is_cold in WAYS:
            first, microseconds, alone, *memory = measure(model, folder, rounds, is_cold)
            print(f"{name}: first score after {first:.3f} s, {microseconds:.2f} microseconds an example", end=" ")
            print(f"in batches, {alone:.1f} alone")
            when = ("1 example", "64 more", f"{11 * BATCH:,} more")
            for examples, own, mapped in zip(when, memory[::2], memory[1::2], strict=True):
                print(f"  after {examples}: {own:.1f} MB of its own, {mapped:.1f} MB of files")


if __name__ == "__main__":
    main()
