"""`python -m tests.benchmarks.criteo`: a click log of Criteo's form, streamed from its file to a hashed DLRM.

The file is made: a label, 13 numbers and 26 columns of categories, skewed, tab-separated, some fields empty. Reading it
(js.read_csv), its batches (js.stream), the step (js.jit) on batches that are on the device already, and all of it end
to end are timed in turn, the last without and with prefetch=, each in wall time and in the process's own time, and the
memory of the process is looked at along the way. The ratio is that of end to end to the step alone. With --minutes, the
file is trained on over and over for that long instead, and memory is printed for each minute.
"""

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxsparse as js

NUMBERS, CATEGORIES = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
CARDINALITIES = np.geomspace(4, 4_000_000, 26).astype(np.int64)
ROWS, DIM, PART, RESIDENT = 2**20, 16, 1 << 14, 32


def write(path: Path, lines: int) -> None:
    """Never more than a part of it in memory."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for first in range(0, lines, PART):
            n = min(PART, lines - first)
            numbers = rng.geometric(0.03, (n, 13)) - 2
            ranks = ((CARDINALITIES + 1.0) ** rng.random((n, 26))).astype(np.int64)  # each octave is as frequent
            mixed = (ranks * 0x9E3779B1 + np.arange(26) * 0x85EBCA6B) % 2**32
            logits = 0.02 * numbers[:, 0] - 2 + (mixed[:, :12] % 7 - 3).sum(1) / 6
            labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(int)
            columns = zip(labels.tolist(), numbers.tolist(), mixed.tolist(), rng.random((n, 39)) < 0.15, strict=True)
            for label, of_numbers, of_categories, gone in columns:
                fields = [*map(str, of_numbers), *(f"{value:08x}" for value in of_categories)]
                kept = ("" if is_gone else field for field, is_gone in zip(fields, gone.tolist(), strict=True))
                file.write(f"{label}\t" + "\t".join(kept) + "\n")


class Dlrm(nn.Module):
    """Numbers through a small network, a row of one table for each column, and products of all pairs."""

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        dense = nn.relu(nn.Dense(DIM)(nn.relu(nn.Dense(64)(x["numbers"]))))
        rows = nn.Embed(ROWS, DIM, embedding_init=nn.initializers.normal(0.05))(x["ids"])  # (B, 26, DIM)
        each = jnp.concatenate([dense[:, None, :], rows], axis=1)
        a, b = np.triu_indices(each.shape[1], 1)
        pairs = jnp.einsum("bid,bjd->bij", each, each)[:, a, b]
        top = nn.relu(nn.Dense(128)(jnp.concatenate([dense, pairs], axis=1)))
        return nn.Dense(1)(nn.relu(nn.Dense(64)(top)))[:, 0]


def reader(path: Path) -> Any:
    return js.read_csv(
        path,
        columns=["click", *NUMBERS, *CATEGORIES],
        label="click",
        numbers=NUMBERS,
        hashed=CATEGORIES,
        num_rows=ROWS,
        seed={name: n for n, name in enumerate(CATEGORIES)},  # one table, and a seed for each column
        fill=0.0,
    )


def chunks(path: Path) -> Iterator[Any]:
    for x, y, _ in reader(path):
        numbers = np.log1p(np.maximum(x["numbers"], 0))
        yield {"numbers": numbers, "ids": np.stack([x[name] for name in CATEGORIES], axis=1)}, y


MODEL, TX = Dlrm(), optax.adagrad(0.02)


@js.jit
def step(state: TrainState, batch: js.Batch) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: Any) -> jax.Array:
        losses = optax.sigmoid_binary_cross_entropy(MODEL.apply(params, batch.x), batch.y)
        return js.weighted_mean(losses, batch.weight)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def megabytes() -> float:
    """Of memory that the process has now; where there is no /proc, the most it had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class Job:
    """The state of the training, and what was measured of it."""

    def __init__(self, path: Path, batch_size: int, prefetch: int) -> None:
        make = lambda ahead: js.stream(  # noqa: E731
            lambda: chunks(path), batch_size=batch_size, num_rows={"ids": ROWS}, prefetch=ahead
        )
        self.streams = {"end to end": make(0), "with prefetch": make(prefetch)}
        self.resident = list(itertools.islice(self.streams["end to end"].one_epoch(), RESIDENT))
        params = jax.jit(MODEL.init)(jax.random.key(0), self.resident[0].x)
        self.state = TrainState.create(apply_fn=None, params=params, tx=TX)
        self.first: list[Any] = []
        self.last: deque[Any] = deque(maxlen=50)
        self.memory: list[float] = []

    def train(self, batches: Iterable[js.Batch]) -> int:
        count = 0
        for count, batch in enumerate(batches, 1):
            self.state, loss = step(self.state, batch)
            self.last.append(loss)
            if len(self.first) < 50:
                self.first.append(loss)
            if count % 16 == 0:
                self.memory.append(megabytes())
        jax.block_until_ready(self.state)
        return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=5_000_000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=int, help="train for so long, and look at memory only")
    parser.add_argument("--data", metavar="FILE", help="where the log is, or is made; by default it is temporary")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.data or Path(folder, "day.tsv"))
        if not path.exists():
            write(path, options.lines)
        figures = soak(path, options) if options.minutes else measure(path, options)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    job = Job(path, options.batch_size, options.prefetch)
    examples = sum(len(y) for _, y, _ in reader(path))
    steps = -(-examples // options.batch_size)
    print(f"{examples:,} lines, {path.stat().st_size / 1e6:,.0f} MB, batches of {options.batch_size:,}")
    runs = {
        "reading": lambda: sum(1 for _ in reader(path)),
        "batches": lambda: sum(1 for _ in job.streams["end to end"]),
        "step alone": lambda: job.train(itertools.islice(itertools.cycle(job.resident), steps)),
        **{name: lambda stream=stream: job.train(stream) for name, stream in job.streams.items()},
    }
    job.train(job.resident)  # compiles
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            wall, own = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - own))
    figures: dict[str, Any] = {}
    print(f"{'':16}{'examples/s':>12}{'us of CPU each':>16}{'of the step':>13}")
    for name, of in times.items():
        wall, own = np.median(of, axis=0) / examples
        alone = np.median([b[0] / a[0] for a, b in zip(of, times["step alone"], strict=True)])  # of one round
        figures[name] = {"examples": 1 / wall, "microseconds": 1e6 * own, "of_the_step": alone}
        print(f"{name:16}{1 / wall:12,.0f}{1e6 * own:16.1f}{alone:13.2f}")
    first, last = (np.array(jax.device_get(list(of))) for of in (job.first, job.last))
    assert np.isfinite(first).all() and np.isfinite(last).all()
    figures |= {"loss_first": float(first.mean()), "loss_last": float(last.mean())}
    print(f"loss of the first 50 steps {figures['loss_first']:.4f}, of the last 50 {figures['loss_last']:.4f}")
    figures["megabytes"] = job.memory
    figures["rungs"] = {name: of.rungs for name, of in job.streams.items()}
    quarters = ", ".join(f"{np.mean(part):,.0f}" for part in np.array_split(job.memory, 4))
    print(f"memory by quarters of the run: {quarters} MB, at most {max(job.memory):,.0f}")
    return figures


def soak(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Memory at the end of each minute of training on the file, from its start again whenever it ends."""
    job = Job(path, options.batch_size, options.prefetch)
    epochs = itertools.chain.from_iterable(itertools.repeat(job.streams["with prefetch"]))
    steps, minutes, began = job.train(job.resident), [], time.perf_counter()
    while len(minutes) < options.minutes:
        end = began + 60 * (len(minutes) + 1)
        steps += job.train(itertools.takewhile(lambda _, end=end: time.perf_counter() < end, epochs))
        minutes.append(megabytes())
        print(f"minute {len(minutes):3}: {minutes[-1]:,.0f} MB, {steps:,} steps", flush=True)
    return {"megabytes": minutes, "steps": steps}


if __name__ == "__main__":
    main()
