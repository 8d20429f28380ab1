"""Kernels that move rows by DMA: Pallas interprets them, and NumPy and XLA's path say what they have to give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse._jax import pallas
from jaxsparse.ops import row_dma
from jaxsparse.ops.rows import gather_rows, scatter_rows
from tests.marks import slow_but

V, N = 40, 300  # more ids than one piece has
OUTSIDE = [V, V + 1, -1, 2**31 - 1, -(2**31)]


def table_of(dim, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(0, 100, (V, dim)).astype(dtype)


@functools.cache
def kernels():
    gather = functools.partial(row_dma.gather, interpret=True)
    write = functools.partial(row_dma.write, interpret=True)
    return jax.jit(gather), jax.jit(write)


@st.composite
def distinct_ids(draw):
    """Some rows, each once, in any order, and ids of no row between them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.choice(OUTSIDE, N).astype(np.int32)
    rows = rng.permutation(V)[: draw(st.integers(0, V))]
    ids[rng.permutation(N)[: len(rows)]] = rows
    return ids


@pytest.mark.parametrize(("dim", "dtype"), slow_but([(128, np.float32)], [(128, np.float32), (256, np.int32)]))
@given(ids=distinct_ids(), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_the_kernels_do_what_numpy_does(dim, dtype, ids, seed):
    table, rows = table_of(dim, dtype), np.resize(table_of(dim, dtype, seed + 1), (N, dim))
    real = (ids >= 0) & (ids < V)
    gather, write = kernels()
    np.testing.assert_array_equal(gather(table, ids), np.where(real[:, None], table[np.where(real, ids, 0)], 0))
    want = table.copy()
    want[ids[real]] = rows[real]
    np.testing.assert_array_equal(write(table, ids, rows), want)


@given(ids=st.lists(st.integers(-3, V + 3), min_size=N, max_size=N))
@settings(max_examples=10)
def test_a_row_may_be_read_twice(ids):
    table, ids = table_of(128), np.array(ids, np.int32)
    np.testing.assert_array_equal(kernels()[0](table, ids), gather_rows(jnp.asarray(table), ids))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [128, 256])
def test_dmas_that_end_only_when_they_are_waited_for(dim):
    """A memory that holds NaN until it is written, and DMAs as late as may be."""
    _, pltpu = pallas()
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(V), OUTSIDE * 52]).astype(np.int32)
    table, rows = jnp.asarray(table_of(dim)), np.resize(table_of(dim, seed=1), (N, dim))
    got = row_dma.gather(table, ids, interpret=late)
    np.testing.assert_array_equal(got, gather_rows(table, ids))
    distinct = np.where((ids >= 0) & (ids < V), ids, V + np.arange(N)).astype(np.int32)
    got = row_dma.write(table, ids, rows, interpret=late)
    np.testing.assert_array_equal(got, scatter_rows(table, distinct, rows))


def test_which_tables_it_takes():
    makes = lambda shape, dtype=jnp.float32: jnp.zeros(shape, dtype)  # noqa: E731
    assert all(map(row_dma.is_supported, [makes((3, 128)), makes((1, 4096)), makes((8, 256), jnp.int32)]))
    others = [makes((3, 64)), makes((3,)), makes((3, 128, 1)), makes((0, 128)), makes((3, 0)), makes((3, 8192))]
    others += [makes((3, 128), jnp.float16), js.pack({"t": makes((8, 64))}, tables="t")["t"]]
    assert not any(map(row_dma.is_supported, others))


# ---------------------------------------------------------------------------------------------------------------------
# steps


def step_of(tx):
    def step(state, ids):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["t"][ids].mean(1) @ p["w"] - 1) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def after_steps(tx, dim, pack):
    params = {"t": jnp.asarray(table_of(dim)), "w": jnp.ones(dim) / dim}
    state = params, tx.init(params)
    state = js.pack(state, tables="['t']") if pack else state
    step, losses = js.jit(step_of(tx)), []
    for seed in range(2):
        ids = np.random.default_rng(seed).integers(0, V + 2, (7, 4)).astype(np.int32)  # some of no row
        state, loss = step(state, ids)
        losses.append(loss)
    return jax.tree.map(np.asarray, (js.unpack(state), losses))


CASES = [("adam", 128, False), ("adam", 256, False), ("sgd", 128, False), ("adam", 64, True)]


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize(("name", "dim", "pack"), slow_but([("adam", 128, False)], CASES))
def test_a_step_with_the_kernels_gives_the_same_bits(name, dim, pack, monkeypatch):
    tx = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}[name]
    monkeypatch.delenv(row_dma.FLAG, raising=False)
    want = after_steps(tx, dim, pack)
    monkeypatch.setenv(row_dma.FLAG, "interpret")
    called = []
    for kernel in ("gather", "write"):
        do = getattr(row_dma, kernel)
        monkeypatch.setattr(row_dma, kernel, lambda *args, do=do, **kwargs: called.append(do) or do(*args, **kwargs))
    got = after_steps(tx, dim, pack)
    assert called
    jax.tree.map(np.testing.assert_array_equal, got, want)


def lowered_for(platform):
    tx = optax.adam(0.1)
    params = {"t": jnp.zeros((V, 128)), "w": jnp.ones(128)}
    args = (params, tx.init(params)), jnp.zeros((7, 4), jnp.int32)
    return jax.export.export(js.jit(step_of(tx)), platforms=[platform])(*args).mlir_module()


@pytest.mark.parametrize(
    ("flag", "platform", "has"),
    slow_but(
        [("1", "tpu", True)],
        [("1", "tpu", True), (None, "tpu", False), ("0", "tpu", False), ("1", "cpu", False), ("1", "cuda", False)],
    ),
)
def test_only_tpu_has_the_kernels_and_only_if_asked(flag, platform, has, monkeypatch):
    monkeypatch.delenv(row_dma.FLAG, raising=False)
    if flag:
        monkeypatch.setenv(row_dma.FLAG, flag)
    text = lowered_for(platform)
    assert ("jaxsparse_write_rows" in text, "tpu_custom_call" in text) == (has, has)


def test_another_flag_is_refused(monkeypatch):
    monkeypatch.setenv(row_dma.FLAG, "yes")
    with pytest.raises(ValueError, match=r'JAXSPARSE_TPU_ROW_DMA.*must be "0", "1" or "interpret"\. Got \'yes\''):
        scatter_rows(jnp.zeros((V, 128)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 128)))


@pytest.mark.slow
@pytest.mark.parametrize("check", [True, False])
def test_xla_moves_rows_in_shard_map(check, monkeypatch):
    monkeypatch.setenv(row_dma.FLAG, "interpret")
    mesh, whole = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), jax.sharding.PartitionSpec()
    step = js.rowwise(step_of(optax.adam(0.1)))
    params = {"t": jnp.asarray(table_of(128)), "w": jnp.ones(128) / 128}
    args = (params, optax.adam(0.1).init(params)), jnp.arange(28).reshape(7, 4)
    inside = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole), out_specs=whole, check_vma=check)
    program = str(jax.make_jaxpr(inside)(*args))
    assert "pallas_call" not in program and "pallas_call" in str(jax.make_jaxpr(step)(*args))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(inside)(*args), jax.jit(step)(*args))
