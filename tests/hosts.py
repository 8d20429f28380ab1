"""`python -m tests.hosts INDEX COUNT ADDRESS DIRECTORY`: one of several hosts that train one model, on real data.

Each reads its own part of the e-mails' batches. The mesh is hosts x devices of a host: examples are split over hosts,
the rows of the table over the devices of each. A checkpoint (orbax, every host writing its own shards) is written every
four steps; if there is one, the run goes on from it. `--die-at STEP` ends the process there as a lost host would.
At the end host 0 writes losses and parameters to DIRECTORY/result.npz. With COUNT 1 there is no cluster to join.
"""

import argparse
import json
import os
import pathlib

if __name__ == "__main__":  # pytest imports it as well
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import jaxsparse as js
from jaxsparse.__main__ import hash_words, load_mails

ROWS, DIM, LENGTH, BATCH, EVERY = 2**16, 16, 128, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("address")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    if options.count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.address, options.count, options.index, heartbeat_timeout_seconds=10)

    texts, labels = load_mails()
    order = np.random.default_rng(0).permutation(len(texts))[: options.steps * BATCH]
    words = hash_words([texts[i] for i in order], ROWS)
    ids = [row[:LENGTH] for row in np.split(words.indices, words.indptr[1:-1])]
    part = jax.process_index(), jax.process_count()
    batches = js.batches(ids, labels[order], num_rows=ROWS, batch_size=BATCH, shuffle=True, shard=part)

    mesh = jax.make_mesh((options.count, 2), ("hosts", "rows"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx = js.lazy_adamw(1e-2, weight_decay=1e-2, untouched="replay")

    @jax.jit
    def create(key):
        params = {"table": 0.1 * jax.random.normal(key, (ROWS, DIM)), "head": jnp.ones(DIM), "bias": jnp.zeros(())}
        return js.shard_rows(TrainState.create(apply_fn=None, params=params, tx=tx), mesh, tables="table", axis="rows")

    def loss_fn(params, batch):
        bags = js.embedding_bag(params["table"], batch.x, padding_idx=ROWS)
        losses = optax.sigmoid_binary_cross_entropy(bags @ params["head"] + params["bias"], batch.y)
        return js.weighted_mean(losses, batch.weight)

    state, losses, step = create(jax.random.key(0)), [], js.make_train_step(loss_fn)
    with ocp.CheckpointManager(options.directory / "checkpoints") as checkpoints:
        if (at := checkpoints.latest_step()) is not None:
            state = checkpoints.restore(at, args=ocp.args.StandardRestore(state))
            position = json.loads((options.directory / f"{at}.json").read_text())
            batches.state, losses = position["batches"], position["losses"]
            print(f"host {options.index}: going on from step {at}", flush=True)
        for batch in batches:
            if len(losses) == options.die_at:
                os._exit(17)
            state, metrics = step(state, js.global_batch(batch, mesh, "hosts"))
            losses.append(float(metrics["loss"]))
            if len(losses) % EVERY == 0:
                if options.index == 0:
                    position = {"batches": batches.state, "losses": losses}
                    (options.directory / f"{len(losses)}.json").write_text(json.dumps(position))
                checkpoints.save(len(losses), args=ocp.args.StandardSave(state))
                checkpoints.wait_until_finished()
    params = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(js.flush(state).params)
    if options.index == 0:
        np.savez(options.directory / "result.npz", losses=losses, **jax.tree.map(np.asarray, params))
    print(f"host {options.index}: {len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
