"""`python -m tests.devices`: one job on one device and on many, in every way that JAX has, for 100 steps.

One loss_fn and one optimizer; one device, pmap, shard_map with and without vma checks, jit over a data mesh, and tables
whose rows are split over a mesh axis, alone and beside a data axis. Batches have Zipf ids, ids of one shard only, empty
bags, a device all of whose bags are empty, and a last batch that is padded, so that devices have no example. Prints how
far losses, parameters and slots are from those of one device, at most, and whether replicas are equal bit by bit.
Without eight devices it makes eight of the CPU.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

import jaxsparse as js
from jaxsparse.optim.replaying import is_replay_state

ROWS, DIM, BATCH, LENGTH = 1003, 8, 64, 6  # as many rows as no number of devices divides


def loss_fn(params, batch):
    bags = js.embedding_bag(params["table"], batch.x["bag"], combiner="mean", padding_idx=ROWS)
    logits = (bags + params["table"][batch.x["one"]]) @ params["head"]
    return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: js.lazy_adam(1e-2),
    "adamw, replay": lambda: js.lazy_adamw(1e-2, weight_decay=1e-2, untouched="replay"),
    "sgd, replay": lambda: js.lazy_sgd(0.1, momentum=0.9, untouched="replay"),
    "rowwise adagrad": lambda: js.lazy_rowwise_adagrad(0.1),
    "clip, adam": lambda: js.lazy(optax.chain(optax.clip_by_global_norm(0.05), optax.adam(1e-2))),
}


@functools.cache
def transformation(optimizer: str) -> optax.GradientTransformation:
    """One object a name: a step compiles anew for another."""
    return OPTIMIZERS[optimizer]()


@functools.cache
def train_step():
    """The step of one device and of every mesh, which compiles once for what has the same shapes and shardings."""
    return js.make_train_step(loss_fn)


def start(optimizer: str) -> TrainState:
    rng = np.random.default_rng(1)
    params = {
        "table": jnp.asarray(rng.standard_normal((ROWS, DIM)), jnp.float32),
        "head": jnp.asarray(rng.standard_normal(DIM), jnp.float32),
    }
    return TrainState.create(apply_fn=None, params=params, tx=transformation(optimizer))


def batches(devices: int | None = None) -> js.Batches:
    rng = np.random.default_rng(2)
    n = 3 * BATCH + 10
    bags = (rng.zipf(1.2, (n, LENGTH)) % ROWS).tolist()
    bags = [bag[: rng.integers(LENGTH + 1)] for bag in bags]
    bags[BATCH : BATCH + BATCH // 8] = [[]] * (BATCH // 8)  # all that the first of 8 devices gets of the second batch
    bags[2 * BATCH : 3 * BATCH] = [[i % (ROWS // 8) for i in bag] for bag in bags[2 * BATCH : 3 * BATCH]]
    x = {"bag": bags, "one": rng.integers(ROWS, size=n)}
    y = rng.integers(2, size=n).astype(np.float32)
    return js.batches(x, y, batch_size=BATCH, num_rows=ROWS, padding_idx={"bag": ROWS}, devices=devices)


class Run(NamedTuple):
    losses: list[float]
    params: dict[str, np.ndarray]
    slots: list[np.ndarray]
    replicas_equal: bool
    table: jax.sharding.Sharding


def finish(losses: list[float], state: TrainState, replicas_equal: bool = True) -> Run:
    """The outcome of a run, every row up to date; a padded table cut to its rows."""
    state = js.flush(state)
    cut = lambda x: x[:ROWS] if x.ndim and x.shape[0] > ROWS else x  # noqa: E731
    parts = jax.tree.leaves(state.opt_state, is_leaf=is_replay_state)
    wrapped = [s.wrapped if is_replay_state(s) else s for s in parts]
    params, slots = jax.tree.map(lambda x: cut(np.asarray(x)), (state.params, jax.tree.leaves(wrapped)))
    return Run(losses, params, slots, replicas_equal, state.params["table"].sharding)


def shards_are_equal(tree) -> bool:
    """Whether what several devices hold of an array is the same, bit by bit."""
    for x in jax.tree.leaves(tree):
        by_index: dict[str, bytes] = {}
        for shard in x.addressable_shards:
            data = np.asarray(shard.data).tobytes()
            if by_index.setdefault(str(shard.index), data) != data:
                return False
    return True


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], kind: AxisType = AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=devices)


def one(state, steps):
    step, losses = train_step(), []
    for batch in stream(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return finish(losses, state)


def pmap(n):
    def run(state, steps):
        step = js.make_train_step(loss_fn, axis_name="batch", jit=False)
        step = jax.pmap(step, axis_name="batch", devices=jax.devices()[:n], donate_argnums=0)
        # one copy on each device from the start, as pmap returns them: otherwise the second step is another program
        split = jax.sharding.NamedSharding(mesh_of((n,), ("batch",)), PartitionSpec("batch"))
        copies, losses = jax.device_put(jax.tree.map(lambda x: np.stack([x] * n), state), split), []
        for batch in stream(steps, n):
            copies, metrics = step(copies, batch)
            losses.append(float(np.asarray(metrics["loss"])[0]))
        copies = jax.tree.map(np.asarray, copies)
        equal = all((x == x[:1]).all() for x in jax.tree.leaves(copies))
        return finish(losses, jax.tree.map(lambda x: jnp.asarray(x[0]), copies), equal)

    return run


def shard_map(n, check_vma):
    def run(state, steps):
        mesh, spec = mesh_of((n,), ("batch",)), PartitionSpec
        inner = js.make_train_step(loss_fn, axis_name="batch", jit=False)
        step = jax.shard_map(
            lambda state, batch: inner(state, jax.tree.map(lambda x: x[0], batch)),
            mesh=mesh,
            in_specs=(spec(), spec("batch")),
            out_specs=spec(),
            check_vma=check_vma,
        )
        step, losses = jax.jit(step, donate_argnums=0), []
        for batch in stream(steps, n):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return finish(losses, state, shards_are_equal(state))

    return run


def sharded(shape, names, kind=AxisType.Auto):
    """jit over a mesh: examples split over its axis "data", rows over its axis "rows"."""

    def run(state, steps):
        mesh, step, losses = mesh_of(shape, names, kind), train_step(), []
        if "rows" in names:
            state = js.shard_rows(state, mesh, tables="table", axis="rows")
        else:
            state = jax.device_put(state, jax.sharding.NamedSharding(mesh, PartitionSpec()))
        for batch in stream(steps):
            state, metrics = step(state, js.global_batch(batch, mesh, "data") if "data" in names else batch)
            losses.append(float(metrics["loss"]))
        return finish(losses, state, shards_are_equal(state))

    return run


def stream(steps: int, devices: int | None = None):
    data = batches(devices)
    for i in range(steps):
        if i % len(data) == 0:
            epoch = iter(data)
        yield next(epoch)


WAYS = {
    "pmap 2": pmap(2),
    "pmap 8": pmap(8),
    "shard_map 8, check_vma": shard_map(8, True),
    "shard_map 8": shard_map(8, False),
    "data 2": sharded((2,), ("data",)),
    "data 8": sharded((8,), ("data",)),
    "rows 2": sharded((2,), ("rows",)),
    "rows 8": sharded((8,), ("rows",)),
    "data 2 x rows 4": sharded((2, 4), ("data", "rows")),
    "data 2 x rows 4, explicit": sharded((2, 4), ("data", "rows"), AxisType.Explicit),
}


def furthest(got: Run, want: Run) -> tuple[float, float, float]:
    """The largest deviation of losses, parameters and slots, the last relative to the slot's largest element."""
    loss = max(abs(a - b) for a, b in zip(got.losses, want.losses, strict=True))
    params = max(float(np.abs(got.params[k] - want.params[k]).max()) for k in want.params)
    slots = [
        float(np.abs(a - b).max()) / max(float(np.abs(b).max()), 1e-30)
        for a, b in zip(got.slots, want.slots, strict=True)
    ]
    return loss, params, max(slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind} x {jax.device_count()}; {options.steps} steps")
    print(f"{'':<42}{'loss':>10}{'parameters':>12}{'slots':>10}  replicas")
    for optimizer in OPTIMIZERS:
        want = one(start(optimizer), options.steps)
        for name, run in WAYS.items():
            got = run(start(optimizer), options.steps)
            loss, params, slots = furthest(got, want)
            same = "equal" if got.replicas_equal else "NOT EQUAL"
            print(f"{optimizer:<16}{name:<26}{loss:>10.1e}{params:>12.1e}{slots:>10.1e}  {same}", flush=True)


if __name__ == "__main__":
    main()
