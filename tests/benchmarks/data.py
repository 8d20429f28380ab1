"""`python -m tests.benchmarks.data`: what js.batches takes to accept data that are memory-mapped, and to make a batch.

Each in a process of its own, from files in a temporary folder. The memory is that of the process itself (RssAnon,
sampled each millisecond), beyond what it had before the call, as a share of the data; pages of the files, which the
kernel takes back when it needs them, are no part of it. The batch is the first one of a shuffled epoch. `wide` has 100M
rows of 100 columns, of which one entry in ten thousand is stored: nearly all of it is where the rows begin. `stream` is
the same as `csr` in fifteen files, an epoch of a js.stream that is shuffled in a buffer of a tenth of it; and how many
shapes a jitted function compiled.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import jaxsparse as js
from tests.benchmarks.memory import memory

MILLION = 10**6


def csr_parts() -> Iterator[Any]:
    """1.5M rows of 50 entries in a million columns."""
    rng = np.random.default_rng(0)
    for _ in range(15):
        columns = np.cumsum(rng.integers(1, MILLION // 50, (100_000, 50), dtype=np.int32), axis=1, dtype=np.int32)
        entries = np.ones(columns.size, np.float32), columns.reshape(-1), np.arange(0, columns.size + 1, 50)
        yield scipy.sparse.csr_array(entries, (100_000, MILLION))


def wide_parts() -> Iterator[Any]:
    rng = np.random.default_rng(0)
    for _ in range(100):
        yield scipy.sparse.random_array((MILLION, 100), density=1e-4, format="csr", dtype=np.float32, rng=rng)


def write_array(path: Path, dtype: str) -> None:
    rng, kind = np.random.default_rng(0), dtype[1]
    make = (lambda: rng.integers(0, MILLION, (MILLION, 10))) if kind == "i" else lambda: rng.random((MILLION, 10))
    count = 60 // int(dtype[2])
    array = np.lib.format.open_memmap(path, "w+", dtype, (count * MILLION, 10))
    for i in range(count):
        array[i * MILLION : (i + 1) * MILLION] = make()
    array.flush()


KINDS = {
    "csr": csr_parts,
    "wide": wide_parts,
    "stream": csr_parts,
    "ids int32": "<i4",
    "ids int64": "<i8",
    "dense float32": "<f4",
    "dense float64": "<f8",
}


def write(kind: str, path: Path) -> None:
    what = KINDS[kind]
    if kind == "stream":
        for number, part in enumerate(csr_parts()):
            js.save_csr(path / str(number), part)
    elif callable(what):
        js.save_csr(path, what())
    else:
        write_array(path, what)


def opened(path: Path) -> tuple[Any, int]:
    """The data and their bytes."""
    if path.is_dir():
        x = js.open_csr(path)
        return x, x.data.nbytes + x.indices.nbytes + x.indptr.nbytes
    x = np.load(path, mmap_mode="r")
    return x, x.nbytes


class Peak:
    """The most anonymous memory within a block, beyond what there was before."""

    def __enter__(self) -> "Peak":
        self._before, self.above, self._over = memory("RssAnon"), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(1e-3):
            self.above = max(self.above, memory("RssAnon") - self._before)

    def __exit__(self, *error: object) -> None:
        self.above = max(self.above, memory("RssAnon") - self._before)
        self._over.set()
        self._thread.join()


def measure(path: Path) -> dict[str, float]:
    jax.block_until_ready(jnp.ones(8) + 1)
    list(js.batches(np.arange(8), batch_size=4))
    data, size = opened(path)
    with Peak() as peak:
        start = time.perf_counter()
        batches = js.batches(data, batch_size=1024, shuffle=True, check_finite=True)
        accepted = time.perf_counter()
        it = iter(batches)
        jax.block_until_ready(next(it))
        first = time.perf_counter()
        for _ in range(100):
            jax.block_until_ready(next(it))
        end = time.perf_counter()
    seconds = {"accept_s": accepted - start, "first_batch_s": first - accepted, "batch_ms": (end - first) * 10}
    return {"MB": size / 1e6, "extra_MB": peak.above / 1e6, "extra": peak.above / size, **seconds}


def measure_stream(path: Path) -> dict[str, float]:
    files = sorted(path.iterdir())
    read = jax.jit(lambda batch: batch.x.data.sum())
    jax.block_until_ready(jnp.ones(8) + 1)
    with Peak() as peak:
        start = time.perf_counter()
        stream = js.stream(files, reader=js.open_csr, batch_size=1024, shuffle=True, buffer=150_000)
        accepted = time.perf_counter()
        entries = sum(float(read(batch)) for batch in stream)
        end = time.perf_counter()
    assert entries == 75 * MILLION and sum(stream.rungs) == -(-1_500_000 // 1024)
    seconds = {"accept_s": accepted - start, "batch_ms": 1e3 * (end - accepted) / sum(stream.rungs)}
    return {"extra_MB": peak.above / 1e6, **seconds, "shapes": read._cache_size()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    figures = {}
    for kind in options.only:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            write(kind, path)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured = pool.apply(measure_stream if kind == "stream" else measure, (path,))
        print(f"{kind:>14} " + "  ".join(f"{k} {v:.3g}" for k, v in measured.items()), flush=True)
        figures |= {f"{kind} {name}": value for name, value in measured.items()}
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
