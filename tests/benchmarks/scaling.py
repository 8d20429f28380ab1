"""`python -m tests.benchmarks.scaling`: what a device moves, holds and calculates, as devices and tables grow.

Read from programs that are compiled for fake CPU devices and never run, so tables of 10^8 rows cost nothing: the bytes
that come out of a step's collectives, the bytes of a device's arguments (its part of table and slots, and its batch)
and of its temporaries, and the floating-point operations as XLA counts them (loop bodies once). Ways: examples split
over the devices with every table on each of them; rows split over the devices; both; and dense data parallel, with
optax.adam. 4096 bags of 20 Zipf(1.2) ids, 64 columns, Adam, in a batch of js.batches, which knows its distinct ids.
"""

import argparse
import json
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsparse as js
from jaxsparse.__main__ import make_dense_step
from tests.benchmarks.crossover import DIM, LENGTH, loss_fn
from tests.benchmarks.workloads import Case, make_batches
from tests.hlo import bytes_moved

BATCH = 4096
P = PartitionSpec
WAYS = {"data": ("data",), "rows": ("rows",), "data x rows": ("data", "rows"), "dense data": ("data",)}


def dense_loss(params, batch):
    """Of one gather: of twenty, as in embedding_bag, every one would have a gradient of the table's size combined."""
    logits = params["table"][batch.x].mean(1) @ params["head"]
    return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)


def compiled(way: str, n: int, num_rows: int):
    axes = WAYS[way]
    shape = (n,) if len(axes) == 1 else (2, n // 2)
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:n])
    tx = optax.adam(1e-3) if way == "dense data" else js.lazy_adam(1e-3)

    def create():
        params = {"table": jnp.zeros((num_rows, DIM)), "head": jnp.ones(DIM)}
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    def abstract(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def of_state(x):
        return abstract(x, P("rows") if "rows" in axes and x.shape[:1] == (num_rows,) else P())

    ids, labels, _ = make_batches(Case("scaling", 100_000, batch=BATCH, length=LENGTH))
    (batch, *_) = js.batches(ids[0], labels[0], batch_size=BATCH, num_rows=num_rows)
    batch = jax.tree.map(lambda x: abstract(x, P("data") if "data" in axes else P()), batch)
    step = make_dense_step(dense_loss) if way == "dense data" else js.make_train_step(loss_fn)
    return step.lower(jax.tree.map(of_state, jax.eval_shape(create)), batch).compile()


def measure(way: str, n: int, num_rows: int) -> dict:
    program = compiled(way, n, num_rows)
    memory, moved = program.memory_analysis(), bytes_moved(program.as_text())
    return {
        "way": way,
        "devices": n,
        "num_rows": num_rows,
        "moved_mb": sum(moved.values()) / 1e6,
        "arguments_mb": memory.argument_size_in_bytes / 1e6,
        "temporaries_mb": memory.temp_size_in_bytes / 1e6,
        "mflops": program.cost_analysis()["flops"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cases = [(way, n, 1_000_000) for way in WAYS for n in (1, 2, 4, 8) if n > 1 or len(WAYS[way]) == 1]
    cases += [(way, 8, rows) for way in WAYS for rows in (100_000, 10_000_000, 100_000_000)]
    print(
        f"jax {jax.__version__}; {BATCH} bags of {LENGTH} ids, {DIM} columns, Adam; MB and Mflop of one device, a step"
    )
    print(f"{'way':<13}{'devices':>8}{'rows':>12}{'moved':>10}{'arguments':>11}{'temporaries':>13}{'Mflop':>10}")
    figures = []
    for case in cases:
        figures.append(found := measure(*case))
        print(
            f"{found['way']:<13}{found['devices']:>8}{found['num_rows']:>12,}{found['moved_mb']:>10.2f}"
            f"{found['arguments_mb']:>11.1f}{found['temporaries_mb']:>13.1f}{found['mflops']:>10.1f}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
