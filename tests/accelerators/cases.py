"""Steps to compile: a model of one table, of some shape, an optimizer, and one of the ways to write a step."""

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.ops import row_dma
from jaxsparse.train.evaluation import reading_rows

BAGS = 4096

STOCK = {
    "sgd": lambda: optax.sgd(1e-3),
    "adam": lambda: optax.adam(1e-3),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
}
LAZY = {name: lambda make=make: js.lazy(make()) for name, make in STOCK.items()} | {
    "rowwise": lambda: js.lazy_rowwise_adagrad(1e-2),
    "ftrl": lambda: js.lazy_ftrl(1e-2),
    "replay": lambda: js.lazy_adamw(1e-3, untouched="replay"),
}
# jit: the stock step under js.jit. hand: js.value_and_grad and js.lazy under jax.jit. unknown: the same, of a batch
# that does not know its distinct ids. step: js.make_train_step.
WAYS = ["jit", "hand", "unknown", "step", "flush", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled: of one table (num_rows, dim), and batches of `BAGS` bags of `length` ids."""

    kind: str
    num_rows: int
    dim: int
    dtype: str = "float32"
    optimizer: str = "adam"
    way: str = "step"
    length: int = 4
    packed: bool = False  # by js.pack
    row_dma: bool = False  # with the kernels of ops/row_dma.py
    streams: bool = True  # a TPU's compiler may bring all of a small array onto the chip beside other work

    def __str__(self) -> str:
        shape = f"{self.num_rows:.0e}x{self.dim}".replace("e+0", "e")
        dtype = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        return (
            f"{self.kind} {shape} {dtype} {self.optimizer} {self.way}"
            + f" L{self.length}" * (self.length != 4)
            + " packed" * self.packed
            + " row-dma" * self.row_dma
            + " no-streams" * (not self.streams)
        )

    @property
    def options(self) -> dict[str, str]:
        """For the compiler. A user sets them for a process, in LIBTPU_INIT_ARGS."""
        names = [] if self.streams else ["prefetches", "evictions"]
        return {f"xla_vf_vmem_max_outstanding_{name}": "0" for name in names}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step for abstract arguments.

    Attributes:
      lowered: as jax.jit's `lower` returns it.
      state_bytes: of all that is donated, or of the parameters where nothing is.
      argument_bytes: of all arguments.
      row_bytes: of one row of the table and of all that has a row for each of its.
      stored: shape of the table, as it is stored.
      distinct: how many rows the batch reads.
      ids: how many ids it has.
    """

    lowered: Any
    state_bytes: int
    argument_bytes: int
    row_bytes: float
    stored: tuple[int, ...]
    distinct: int
    ids: int


def lower(case: Case, device: jax.Device) -> Lowered:
    sharding = jax.sharding.SingleDeviceSharding(device)

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    batch, ids = _batch(case)
    state = there(jax.eval_shape(partial(_state, case)))
    by_row = [x for x in jax.tree.leaves(state) if x.shape[:1] == (case.num_rows,)]
    by_row = [x for x in by_row if case.way != "evaluate" or x is state.params["table"]]
    state = js.pack(state) if case.packed else state
    batch = there(batch)
    program, args = _program(case, state, batch)
    with mock.patch.dict(os.environ, {row_dma.FLAG: "1" if case.row_dma else "0"}):
        lowered = program.lower(*args)
    return Lowered(
        lowered=lowered,
        state_bytes=_bytes(args[0]),
        argument_bytes=_bytes(args),
        row_bytes=_bytes(by_row) / case.num_rows,
        stored=jax.tree.leaves(state.params["table"])[0].shape,
        distinct=len(np.unique(ids)),
        ids=ids.size,
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _batch(case: Case) -> Any:
    """One batch, and its ids."""
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.2, (BAGS, case.length)) % case.num_rows).astype(np.int32)
    y = np.zeros(BAGS, np.float32)
    if case.dim == 1:
        ends = np.arange(0, ids.size + 1, case.length)
        x = scipy.sparse.csr_array((np.ones(ids.size, np.float32), ids.ravel(), ends), shape=(BAGS, case.num_rows))
        x.sum_duplicates()
        batches = js.batches(x, y, batch_size=BAGS)
    else:
        batches = js.batches(ids, y, batch_size=BAGS, num_rows=case.num_rows)
    return next(iter(batches)), ids


def _state(case: Case) -> TrainState:
    shape = (case.num_rows, case.dim) if case.dim > 1 else (case.num_rows,)
    params = {"table": jnp.zeros(shape, case.dtype), "head": jnp.ones(case.dim)}
    optimizers = LAZY | (STOCK if case.way == "jit" else {})
    return TrainState.create(apply_fn=None, params=params, tx=optimizers[case.optimizer]())


def _loss(params: Any, batch: Any) -> jax.Array:
    table = params["table"]
    if table.ndim == 1:
        logits = js.dot(batch.x, table) * params["head"]
    else:
        logits = table[batch.x].mean(1).astype(jnp.float32) @ params["head"]
    return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)


def _program(case: Case, state: Any, batch: Any) -> tuple[Any, tuple[Any, ...]]:
    """What has `lower`, and the arguments for it."""

    def step_by(value_and_grad: Callable[..., Any]) -> Callable[..., Any]:
        def step(state: Any, batch: Any) -> Any:
            if case.optimizer == "replay" and value_and_grad is js.value_and_grad:
                state = js.refresh(_loss)(state, batch)
            loss, grads = value_and_grad(_loss)(state.params, batch)
            return state.apply_gradients(grads=grads), loss

        return step

    if case.way == "unknown":
        batch = dataclasses.replace(batch, distinct=None)
    if case.way == "flush":
        return jax.jit(js.flush, donate_argnums=0), (state,)
    if case.way == "evaluate":
        return jax.jit(reading_rows(_loss)), (state.params, batch)  # which is what js.evaluate compiles
    if case.way == "jit":
        return js.jit(step_by(jax.value_and_grad)), (state, batch)
    if case.way == "step":
        return js.make_train_step(_loss), (state, batch)
    return jax.jit(step_by(js.value_and_grad), donate_argnums=0), (state, batch)
