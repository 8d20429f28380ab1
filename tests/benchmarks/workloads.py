"""What is trained: tables, ids, labels and settings, the same for every contestant. NumPy only.

Random numbers are of RandomState, whose stream is the same in all versions of NumPy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

NUM_BATCHES = 8
BLOCK = 65_536  # rows of random numbers, repeated down the table: 10^7 rows of their own take too long

ADAM = {"lr": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-12}  # so small that it does not matter where it stands
RATES = {"adagrad": 1e-2, "rowwise_adagrad": 1e-2, "sgd": 1.0, "ftrl": 1.0}
EPS = 1e-15  # of the Adagrads, beside the root; their accumulators start at 0
FTRL = {"beta": 1.0, "l1": 1e-5}

OURS = ("jaxsparse", "js.jit", "arrays", "words js.jit", "words batches", "words", "linen")
ADAM_PEERS = ("torch", "tensorflow", "optax")
PEERS = ("torch", "fbgemm", "tensorflow", "optax")

# What a contestant's make(name, case) gives: step(i), which runs batch i, waits until all results are ready and returns
# the loss; and rows(ids) of the table.
Made = tuple[Callable[[int], Any], Callable[[np.ndarray], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One job.

    Attributes:
      name: also what `--only` selects by, from its beginning.
      model: "bag", logits = mean of the rows of a bag @ head; "fields", the rows of an example side by side @ head;
        "linear", tanh of the weighted sum of the rows @ head, or the sum itself if dim is 1.
      ids: how they are drawn: "zipf" (1.2), "uniform", or "fields", zipf in a range of rows for each position.
      span: how many of the table's rows ids are drawn from, the first ones; all of them by default.
      spread: whether these are sent all over the table by a fixed permutation.
      peers: who jaxsparse is held against.
    """

    name: str
    num_rows: int
    optimizer: str = "adam"
    model: str = "bag"
    dim: int = 64
    batch: int = 4096
    length: int = 20
    ids: str = "zipf"
    span: int | None = None
    spread: bool = False
    peers: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The optimizer without what it does to skipped rows."""
        return self.optimizer.removesuffix("_replay")

    @property
    def has_head(self) -> bool:
        return self.dim > 1


def cases() -> list[Case]:
    bags = []
    for e in (5, 6, 7):
        of_adam = {
            "adam": (*ADAM_PEERS, *["keras", *OURS[2:6]] * (e == 6), "limit"),
            "adam_replay": (*ADAM_PEERS, "limit"),
        }
        peers = of_adam | {"adagrad": PEERS, "rowwise_adagrad": ("fbgemm",), "sgd": PEERS}
        for optimizer, p in peers.items():
            stock = ("js.jit",) * (e == 6 and optimizer != "adam_replay")
            bags.append(Case(f"bag/{optimizer}/1e{e}", 10**e, optimizer, peers=(*p, *stock)))
    ctr = {"num_rows": 2**22, "model": "fields", "dim": 16, "batch": 8192, "length": 26, "ids": "fields"}
    linear = {"num_rows": 10**6, "model": "linear", "batch": 1024, "length": 100, "ids": "fields"}
    return [
        *bags,
        Case("ctr/adam", **ctr, peers=ADAM_PEERS),
        Case("ctr/adagrad", **ctr, optimizer="adagrad", peers=PEERS),
        Case("linear/adam", **linear, peers=ADAM_PEERS),
        Case("linear/ftrl", **linear, dim=1, optimizer="ftrl", peers=("tensorflow",)),
        Case("unmodified/adam", 10**6, peers=("linen",)),
        Case("uniform/adam", 10**6, ids="uniform", peers=(*ADAM_PEERS, "limit")),
        Case("online/adam", 10**6, batch=1, peers=ADAM_PEERS),
        Case("online/sgd", 10**6, "sgd", batch=1, peers=PEERS),
    ]


def size_cases() -> tuple[Case, Case, Case]:
    """One job on the rows of a table of 10^5, on as many first rows of one of 10^7, and on rows all over that."""
    first = Case("size/1e7-first", 10**7, span=10**5)
    return Case("size/1e5", 10**5), first, dataclasses.replace(first, name="size/1e7-spread", spread=True)


def gpu_cases() -> list[Case]:
    """The bag at a CPU's size and at a GPU's, and the sparse input."""
    return [
        Case("gpu/adam/1e6", 10**6, peers=("torch", "optax", "js.jit", "words batches")),
        Case("gpu/adam/1e7", 10**7, peers=("torch", "optax")),
        Case("gpu/adam/1e7x128", 10**7, dim=128, batch=65_536, peers=("torch", "js.jit")),
        Case("gpu/adam_replay/1e6", 10**6, "adam_replay", peers=("torch", "optax")),
        Case("gpu/linear/1e6", 10**6, model="linear", batch=1024, length=100, ids="fields", peers=("torch", "optax")),
    ]


def initial_table(case: Case) -> np.ndarray:
    """float32 (num_rows, dim). FTRL's is a function of its state, which is zero."""
    if case.optimizer == "ftrl":
        return np.zeros((case.num_rows, case.dim), np.float32)
    block = 0.1 * np.random.RandomState(1).standard_normal((BLOCK, case.dim)).astype(np.float32)
    table = np.empty((case.num_rows, case.dim), np.float32)
    for start in range(0, case.num_rows, BLOCK):
        table[start : start + BLOCK] = block[: case.num_rows - start]
    return table


def initial_head(case: Case) -> np.ndarray:
    """float32, (dim,) or, for fields, (length * dim,)."""
    size = case.dim * (case.length if case.model == "fields" else 1)
    return np.random.RandomState(2).uniform(0.5, 1.5, size).astype(np.float32)


def make_batches(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """ids int32 (8, batch, length); labels float32 (8, batch); values like ids for the linear model, or None."""
    rng, span, shape = np.random.RandomState(0), case.span or case.num_rows, (NUM_BATCHES, case.batch, case.length)
    if case.ids == "uniform":
        ids = rng.randint(0, span, shape)
    elif case.ids == "fields":
        ids = rng.zipf(1.2, shape) % (span // case.length) + span // case.length * np.arange(case.length)
    else:
        ids = rng.zipf(1.2, shape) % span
    if case.spread:
        ids = np.random.RandomState(3).permutation(case.num_rows)[ids]
    labels = rng.randint(0, 2, shape[:2]).astype(np.float32)
    values = (0.1 * rng.standard_normal(shape)).astype(np.float32) if case.model == "linear" else None
    return ids.astype(np.int32), labels, values
