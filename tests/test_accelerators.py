"""Steps compiled for TPUs and a GPU that are not here have no work as large as a table in them.

    pip install -e ".[accelerators]"
    python -m pytest -m accelerators --dist load
    python -m pytest -m accelerators -n 0 -s                         the same, a line for each case

Each case is one of `python -m tests.accelerators`. What fails today is marked, with why.
"""

import math
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse as js
from tests.accelerators.cases import Case
from tests.accelerators.report import report
from tests.accelerators.topologies import device, libtpu_version, missing
from tests.hlo import large_arrays

M = 10**6
COPIED = "a row that is no multiple of 128 wide lies across the lanes, and XLA copies the table to read and write rows"
SLABS = "a narrow row lies across the lanes: a slab of 128 rows is moved for each"
STREAMED = "all of a small array is streamed onto the chip and back"
ALL_IDS = "a row for each id is made before those of a bag are added up"
SPARSE_CORE = "the SparseCore gathers rows of table and slots into memory outside of the chip"
REREAD = "XLA reads and writes rows more often than it has to"

# of each case, why it fails today; None if it does not
CASES: dict[Case, str | None] = {
    Case("v5e", M, 1, optimizer="ftrl"): STREAMED,
    Case("v5e", M, 8): COPIED,
    Case("v5e", M, 16): COPIED,
    Case("v5e", M, 32): COPIED,
    Case("v5e", M, 64): COPIED,
    Case("v5e", M, 96): COPIED,
    Case("v5e", M, 100): COPIED,
    Case("v5e", M, 128): None,
    Case("v5e", M, 200): COPIED,
    Case("v5e", M, 256): None,
    Case("v5e", 8 * M, 1, optimizer="ftrl"): STREAMED,
    Case("v5e", 8 * M, 16): SLABS,
    Case("v5e", 8 * M, 64): COPIED,
    Case("v5e", 8 * M, 128): None,
    Case("v5e", 100 * M, 1, optimizer="ftrl"): None,
    Case("v5e", 100 * M, 8, optimizer="sgd"): SLABS,
    Case("v5e", 100 * M, 16, optimizer="sgd"): SLABS,
    Case("v5p", 100 * M, 64, optimizer="sgd"): COPIED,
    Case("v5p", 100 * M, 128, optimizer="sgd"): ALL_IDS,
    Case("v5e", M, 32, "bfloat16"): COPIED,
    Case("v5e", M, 64, "bfloat16"): COPIED,
    Case("v5e", M, 128, "bfloat16"): None,
    Case("v5e", M, 128, optimizer="sgd", way="jit"): None,
    Case("v5e", M, 128, optimizer="clip", way="jit"): None,
    Case("v5e", M, 128, optimizer="clip", way="hand"): None,
    Case("v5e", M, 128, optimizer="clip", way="unknown"): None,
    Case("v5e", M, 128, optimizer="rowwise", way="jit"): STREAMED,
    Case("v5e", M, 128, optimizer="replay"): STREAMED,
    Case("v5e", M, 128, optimizer="replay", way="flush"): None,
    Case("v5e", M, 128, way="evaluate"): None,
    Case("v5e", M, 128, length=20): None,
    Case("v5e", M, 64, optimizer="sgd", way="hand"): COPIED,
    Case("v5e", M, 64, optimizer="clip", way="jit"): COPIED,
    Case("v5e", M, 64, optimizer="rowwise", way="hand"): COPIED,
    Case("v5e", M, 64, optimizer="replay", way="jit"): COPIED,
    Case("v5e", M, 64, optimizer="replay", way="flush"): COPIED,
    Case("v5e", M, 64, way="evaluate"): COPIED,
    Case("v5e", M, 16, packed=True): STREAMED,
    Case("v5e", M, 32, packed=True): None,
    Case("v5e", M, 64, packed=True): None,
    Case("v5e", M, 96, packed=True): None,
    Case("v5e", M, 100, packed=True): None,
    Case("v5e", M, 200, packed=True): None,
    Case("v5e", 8 * M, 8, packed=True): None,
    Case("v5e", 8 * M, 16, packed=True): None,
    Case("v5e", 8 * M, 64, packed=True): None,
    Case("v5e", 100 * M, 16, optimizer="sgd", packed=True): None,
    Case("v5p", 100 * M, 64, optimizer="sgd", packed=True): ALL_IDS,
    Case("v5e", M, 64, "bfloat16", packed=True): None,
    Case("v5e", M, 64, optimizer="clip", way="jit", packed=True): None,
    Case("v5e", M, 64, optimizer="rowwise", way="jit", packed=True): None,
    Case("v5e", M, 64, optimizer="replay", packed=True): STREAMED,
    Case("v5e", M, 64, optimizer="replay", way="flush", packed=True): None,
    Case("v5e", M, 64, way="evaluate", packed=True): None,
    Case("v4", M, 64, packed=True): None,
    Case("v6e", M, 64, packed=True): SPARSE_CORE,
    Case("v4", M, 64): COPIED,
    Case("v4", M, 128): None,
    Case("v5p", M, 16): COPIED,
    Case("v5p", M, 128): ALL_IDS,
    Case("v6e", M, 64): COPIED,
    Case("v6e", M, 128): SPARSE_CORE if libtpu_version() > (0, 0, 42) else None,  # which gathers there
    Case("v5e", M, 1, optimizer="ftrl", streams=False): None,
    Case("v5e", 8 * M, 1, optimizer="ftrl", streams=False): None,
    Case("v5e", M, 128, optimizer="rowwise", way="jit", streams=False): None,
    Case("v5e", M, 128, optimizer="replay", streams=False): None,
    Case("v5e", M, 128, row_dma=True): None,
    Case("v5e", M, 256, way="jit", row_dma=True): None,
    Case("v5e", M, 64, packed=True, row_dma=True): None,
    Case("h100", M, 1, optimizer="ftrl"): None,
    Case("h100", M, 16): None,
    Case("h100", M, 64, optimizer="clip", way="jit"): None,
    Case("h100", M, 64, optimizer="clip", way="hand"): None,
    Case("h100", M, 64, optimizer="clip", way="unknown"): ALL_IDS,
    Case("h100", M, 64, optimizer="rowwise", way="jit"): None,
    Case("h100", M, 64, optimizer="replay"): None,
    Case("h100", M, 64, optimizer="replay", way="flush"): None,
    Case("h100", M, 64, way="evaluate"): None,
    Case("h100", M, 100, "bfloat16"): None,
    Case("h100", M, 128): ALL_IDS,
    Case("h100", M, 128, way="hand"): REREAD,
    Case("h100", 100 * M, 64, optimizer="sgd"): None,
    Case("h100", M, 64, length=20): None,
}


def problems(case, found):
    """What is not as it must be."""
    loops = {"while"} if case.optimizer == "replay" else set()  # flush's own, also before a step
    yield from (f"{many} {kind} as large as a table" for kind, many in found.large.items() if kind not in loops)
    most = 8e6 if case.length <= 4 else 64e6
    if found.temporaries > most:
        yield f"temporaries of {found.temporaries / 1e6:.1f} MB"
    if found.arguments > 1.01 * found.given:
        yield f"arguments of {found.arguments / 1e6:.0f} MB for {found.given / 1e6:.0f} MB"
    if case.way != "evaluate" and found.in_place < found.state:
        yield f"only {found.in_place / 1e6:.0f} MB written in place"
    if case.row_dma != ("row dma" in found.moved):
        yield "kernels that were not asked for, or none that were"
    if case.row_dma and found.with_tiles > most_moved(case) * found.needed:
        yield f"scatters that move {found.with_tiles / found.needed:.1f} times the bytes that have to move"
    if found.ratio > most_moved(case):
        yield f"{found.ratio:.1f} times the bytes that have to move"


def most_moved(case):
    """How many times the bytes that have to move, of steps on as many rows as are distinct. Of rows that are narrower
    than 128 a TPU moves 128 columns, and a multiple of that of wider ones that are packed."""
    if case.kind == "v5e" and case.way not in ("flush", "unknown"):
        if case.packed and case.optimizer == "adam":  # each packed row is gathered once, and scattered once
            return 1.45 * -(-max(case.dim, 128) // 128) * 128 / case.dim
        return 3 * max(1, 128 / case.dim)
    return 2 if case.kind == "h100" and (case.dim, case.optimizer) == (128, "adam") else math.inf


def marked(case, reason):
    marks = [pytest.mark.skipif(bool(missing(case.kind)), reason=missing(case.kind))]
    marks += [pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)] if reason else []
    return pytest.param(case, marks=marks, id=str(case).replace(" ", "-"))


@pytest.mark.accelerators
@pytest.mark.parametrize("case", [marked(case, reason) for case, reason in CASES.items()])
def test_no_work_as_large_as_a_table(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*on TPU, XLA copies")  # what an xfail shows
        found = report(case)
    print(found)
    assert list(problems(case, found)) == []


@pytest.mark.accelerators
@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_stacked_tables(kind):
    """As found on an H100: XLA copied them all, reading rows of one shape and writing those of the other."""
    if missing(kind):
        pytest.skip(missing(kind))
    shape, tx = (3, 200_000, 128), optax.adam(0.1)

    def step(state, ids):
        table, opt_state = state
        grads = jax.grad(lambda table: jnp.sum(table[jnp.arange(3), ids] ** 2))(table)
        updates, opt_state = tx.update(grads, opt_state, table)
        return optax.apply_updates(table, updates), opt_state

    there = jax.sharding.SingleDeviceSharding(device(kind))
    table = jax.ShapeDtypeStruct(shape, jnp.float32)
    args = (table, jax.eval_shape(tx.init, table)), jax.ShapeDtypeStruct((4096, 3), jnp.int32)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args)
    compiled = js.jit(step).lower(*args).compile()
    assert not large_arrays(compiled.as_text(), math.prod(shape))
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6
