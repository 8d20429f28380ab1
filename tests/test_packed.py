"""Packed tables: the same steps, bit for bit where XLA does the same arithmetic, and all other rows keep their bits."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsparse as js
from jaxsparse.ops.packed import pack_array
from jaxsparse.ops.rows import gather_rows, scatter_rows
from jaxsparse.train import packing
from tests.flags import DEFAULTS
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but

V = 1000
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (4, 32, 5)).astype(np.int32)
TABLE = "['t']"


def params_of(shape, dtype=jnp.float32):
    table = np.random.default_rng(1).normal(size=(V, *shape))
    return {"t": jnp.asarray(table, dtype), "w": jnp.ones(shape)}


def loss_fn(params, ids):
    return jnp.mean((params["t"][ids].astype(jnp.float32).mean(1) * params["w"][None]) ** 2)


def states_of(tx, params):
    """One as it is, one packed, that share no buffer."""
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    packed = js.pack(state, tables=TABLE)
    assert isinstance(packed.params["t"], js.Packed)
    return state, jax.tree.map(jnp.copy, packed)


def assert_same(packed, state, **tolerance):
    packed = js.unpack(packed)
    assert jax.tree.structure(packed) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), **tolerance)


ALL_SHAPES = [(1,), (3,), (16,), (64,), (96,), (200,), (2, 4)]
SHAPES = [pytest.param(x, marks=() if x in ((3,), (96,)) else pytest.mark.slow) for x in ALL_SHAPES]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype", slow_but([jnp.float32, jnp.bfloat16], [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
)
def test_rows_keep_their_bits(shape, dtype):
    """Of all numbers there are: NaN, minus zero, and what is too small to be normal, beside each other.

    Compiled as by default: with the quick flags, LLVM makes zero of bfloat16 numbers that are too small to be normal,
    on processors with AVX512-BF16.
    """
    jit = functools.partial(jax.jit, compiler_options=DEFAULTS)
    size = V * int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    table = RNG.integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(V, *shape)
    if jnp.issubdtype(dtype, jnp.inexact):
        table[::11] = -0.0
        with np.errstate(invalid="ignore"):
            table[np.isnan(table)] = np.nan  # a quiet one: any other may become one
    ids = RNG.permutation(np.r_[RNG.choice(V, 40, replace=False), V, V + 1, -1, V + 9]).astype(np.int32)
    rows = table[RNG.integers(0, V, len(ids))]
    words = f"u{jnp.dtype(dtype).itemsize}"
    for order in (slice(None), np.argsort(ids)):
        packed = jit(pack_array)(table)
        got = np.asarray(jit(gather_rows)(packed, ids[order]))
        real = (ids[order] >= 0) & (ids[order] < V)
        np.testing.assert_array_equal(got[real].view(words), table[ids[order][real]].view(words))
        assert not got[~real].view(words).any()
        want = table.copy()
        want[ids[order][real]] = rows[order][real]
        got = np.asarray(jit(scatter_rows)(packed, ids[order], rows[order]))
        np.testing.assert_array_equal(got.view(words), want.view(words))


@pytest.mark.slow
@given(st.integers(1, 40), st.sampled_from([1, 3, 64, 100]), st.lists(st.integers(-3, 50), unique=True, max_size=20))
def test_some_rows(num_rows, width, ids):
    table = jnp.arange(num_rows * width, dtype=jnp.float32).reshape(num_rows, width)
    ids = np.resize(np.r_[ids, np.arange(60, 90)], 30).astype(np.int32)  # one shape
    packed = scatter_rows(pack_array(table), ids, jnp.full((30, width), -1.0))
    want = np.array(table)
    want[ids[(ids >= 0) & (ids < num_rows)]] = -1
    np.testing.assert_array_equal(packed, want)


@pytest.mark.parametrize("shape", [(16,), *(pytest.param(x, marks=pytest.mark.slow) for x in ALL_SHAPES if x != (16,))])
@pytest.mark.parametrize("dtype", slow_but([jnp.float32], [jnp.float32, jnp.bfloat16]))
def test_steps(shape, dtype):
    def step(state, ids):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, ids)
        return state.apply_gradients(grads=grads), loss

    state, packed = states_of(optax.adamw(1e-2), params_of(shape, dtype))
    _, scanned = states_of(state.tx, params_of(shape, dtype))
    plain, one = js.jit(step), js.jit(step)
    before = np.asarray(packed.params["t"])
    for ids in IDS:
        (state, want), (packed, loss) = plain(state, ids), one(packed, ids)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert_same(packed, state, rtol=1e-5, atol=1e-7)
    untouched = np.setdiff1d(np.arange(V), IDS)
    np.testing.assert_array_equal(np.asarray(packed.params["t"])[untouched], before[untouched])
    scanned, _ = jax.jit(functools.partial(jax.lax.scan, js.rowwise(step)))(scanned, IDS)
    assert_same(scanned, state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", slow_but(["replay"], ["adam", "lazy_adam", "rowwise_adagrad", "replay"]))
def test_what_a_model_goes_through(optimizer):
    tx = {
        "adam": optax.adam(1e-2),
        "lazy_adam": js.lazy_adam(1e-2),
        "rowwise_adagrad": js.lazy_rowwise_adagrad(1e-2),
        "replay": js.lazy_adamw(1e-2, untouched="replay"),
    }[optimizer]
    state, packed = states_of(tx, params_of((16,)))
    step = js.make_train_step(loss_fn)
    for ids in IDS:
        (state, metrics), (packed, others) = step(state, ids), step(packed, ids)
        np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-6)
    state, packed = js.flush(state), js.flush(packed)
    assert_same(packed, state, rtol=1e-5, atol=1e-7)
    saved = flax.serialization.to_bytes(packed)
    assert saved == flax.serialization.to_bytes(js.unpack(packed))
    restored = flax.serialization.from_bytes(packed, saved)
    assert jax.tree.structure(restored) == jax.tree.structure(packed)
    assert_same(restored, js.unpack(packed), rtol=0)
    batches = js.batches(IDS.reshape(-1, 5)[:50], np.zeros(50), batch_size=16, num_rows=V)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    metrics, score = lambda p, b: {"loss": loss_fn(p, b.x)}, lambda p, x: p["t"][x].sum((1, 2))
    jax.tree.map(compare, js.evaluate(metrics, packed, batches), js.evaluate(metrics, state, batches))
    compare(js.predict(score, packed, batches), js.predict(score, state, batches))


INITS = {
    "adam": lambda: optax.adam(1e-2),
    "rowwise_adagrad": lambda: js.lazy_rowwise_adagrad(1e-2, initial_accumulator_value=0.1),
    "ftrl": lambda: js.lazy_ftrl(1e-2),
    "replay": lambda: js.lazy_adamw(1e-2, untouched="replay"),
    "ema": lambda: js.params_ema(optax.adam(1e-2), 0.9),
}


@pytest.mark.parametrize("optimizer", INITS)
def test_the_state_of_packed_params_is_the_packed_state(optimizer):
    tx, params = INITS[optimizer](), params_of((16,))
    want = js.pack(tx.init(params), tables=lambda path, x: "'t'" in path or ".t" in path)
    got = tx.init(js.pack(params, tables=TABLE))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(js.unpack(got)), jax.tree.leaves(js.unpack(want)), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@pytest.mark.slow
def test_the_compiled_step_makes_nothing_of_the_tables_size():
    _, packed = states_of(optax.adam(1e-2), params_of((16,)))
    num_packed = packed.params["t"].data.shape[0]
    step = js.jit(lambda s, ids: s.apply_gradients(grads=jax.grad(loss_fn)(s.params, ids)))
    few = np.arange(8, dtype=np.int32).reshape(4, 2)
    assert not large_arrays(compiled_by_default(step.lower(packed, few)).as_text(), num_packed * 128)


def test_a_table_that_is_used_as_a_whole():
    def step(params, ids):
        grads = jax.grad(lambda p: jnp.mean(jnp.exp(p["t"][ids].sum(1) @ p["t"].T)))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = params_of((3,))
    packed = jax.tree.map(jnp.copy, js.pack(params, tables=TABLE))
    with pytest.warns(UserWarning, match="is dense|read by rows"):
        assert_same(js.jit(step)(packed, IDS[0]), jax.jit(step)(params, IDS[0]), rtol=1e-5, atol=1e-6)


def test_trained_rows():
    state, packed = states_of(optax.adam(1e-2), params_of((16,)))

    def step(state, ids):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, ids))

    rows = np.arange(0, V, 2)
    got, want = js.jit(step, rows=rows)(packed, IDS[0]), js.jit(step, rows=rows)(state, IDS[0])
    assert_same(got, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(got.params["t"])[1::2], np.asarray(params_of((16,))["t"])[1::2])


def test_which_leaves_are_packed():
    tree = {
        "large": jax.ShapeDtypeStruct((1 << 16, 64), jnp.float32),
        "small": jnp.zeros((100, 64)),
        "full": jax.ShapeDtypeStruct((1 << 16, 128), jnp.float32),
        "vector": jax.ShapeDtypeStruct((1 << 16,), jnp.float32),
        "double": jax.ShapeDtypeStruct((1 << 16, 3), np.float64),
        "number": 1.0,
        "half bytes": jax.ShapeDtypeStruct((1 << 16, 3), jnp.int4),
    }
    packed = js.pack(tree)
    assert [name for name, x in packed.items() if isinstance(x, js.Packed)] == ["large"]
    assert packed["large"].data.shape == (1 << 15, 128) and packed["large"].shape == (1 << 16, 64)
    assert isinstance(js.pack(tree, tables="small")["small"], js.Packed)
    assert js.pack(packed)["large"] is packed["large"]
    replayed = js.lazy_adamw(1e-3, untouched="replay")
    state = jax.eval_shape(replayed.init, {"t": tree["large"]})
    named = js.pack(replayed.init({"t": jnp.ones((8, 3))}), tables=lambda path, x: True)
    assert all(not isinstance(x, js.Packed) for x in named.history.values())
    assert np.array(js.pack({"t": jnp.ones((8, 16))}, tables="t")["t"]).flags.writeable
    packed = js.pack(state)
    assert isinstance(packed.wrapped[0].mu["t"], js.Packed)
    assert all(not isinstance(x, js.Packed) for x in packed.history.values())


def test_row_ids_made_of_packed_tables():
    """Of the state, of an argument that is none, and where the batch knows its distinct ids."""

    def step(state, frozen, ids):
        rows = (state["m"][ids] + frozen[ids]) % V
        grads = jax.grad(lambda t: jnp.sum(t[rows] ** 2))(state["t"])
        return {"t": state["t"] - 0.1 * grads, "m": state["m"]}

    table = {"t": params_of((16,))["t"], "m": jnp.asarray(RNG.integers(0, V, (V, 3)), jnp.int32)}
    packed, frozen = (js.pack(x, tables=lambda path, x: True) for x in (table, table["m"]))
    with pytest.warns(UserWarning, match=r"Packed .* is unpacked whole at each step: row ids"):
        got = js.jit(step)(packed, frozen, IDS[0])
    assert jax.tree.structure(got) == jax.tree.structure(packed)
    assert_same(got, jax.jit(step)(table, table["m"], IDS[0]), rtol=1e-6)

    def metric(params, batch):
        return {"x": jnp.sum(params["t"][params["m"][batch.x]])}

    states = [TrainState.create(apply_fn=None, params=p, tx=optax.identity()) for p in (table, js.pack(table, "m"))]
    batches = js.batches(IDS.reshape(-1, 5)[:32], np.zeros(32), batch_size=16, num_rows=V)
    want, got = (js.evaluate(metric, state, batches)["x"] for state in states)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_what_a_step_hands_through_is_not_unpacked():
    packed = js.pack({**params_of((16,)), "target": jnp.ones((V, 16))}, tables=lambda path, x: x.ndim > 1)
    step = js.jit(
        lambda p, ids: {**jax.tree.map(lambda p, g: p - g, p, jax.grad(loss_fn)(p, ids)), "target": p["target"]}
    )
    few = np.arange(8, dtype=np.int32).reshape(4, 2)
    hlo = compiled_by_default(step.lower(packed, few)).as_text()
    assert f"[{V},16]" not in hlo


@pytest.mark.devices(8)
def test_errors():
    state = js.pack(TrainState.create(apply_fn=None, params=params_of((16,)), tx=optax.adam(1e-2)), tables=TABLE)
    for change in (
        lambda: js.grow(state, "t", 2 * V, init=0.0),
        lambda: js.shard_rows(state, jax.make_mesh((2,), ("r",), devices=jax.devices()[:2]), "t", "r"),
    ):
        with pytest.raises(TypeError, match=r"Packed\(float32.*js.unpack"):
            change()
    packed = js.pack({"t": jnp.zeros((V, 16))}, tables="t")
    with pytest.raises(TypeError, match=r"Packed table at \['t'\].*js.unpack"):
        js.value_and_grad(lambda p: jnp.sum(p["t"][jnp.arange(3)]))(packed)
    tx, plain = js.lazy(optax.adam(1e-2)), js.unpack(packed)
    grads = {"t": js.RowSparse(jnp.array([3]), jnp.ones((1, 16)), (V, 16))}
    with pytest.raises(TypeError, match=r"'params'.*js.lazy .*Packed\(.*at \['t'\].*js.make_train_step; .*js.unpack"):
        tx.update(grads, tx.init(plain), packed)
    with pytest.raises(TypeError, match=r"'state'.*js.lazy .*Packed\(.*\['t'\].*js.unpack"):
        tx.update(grads, tx.init(packed), plain)
    with pytest.raises(ValueError, match=r"'tables'.*parts of the paths"):
        js.pack({"t": jnp.zeros((V, 16))}, tables="u")
    split = jax.ShapeDtypeStruct(
        (V, 16), jnp.float32, sharding=NamedSharding(Mesh(jax.devices()[:2], "r"), PartitionSpec("r"))
    )
    with pytest.raises(ValueError, match="whole on each device"):
        js.pack({"t": split}, tables="t")


def test_modules_whose_tables_are_packed():
    """The step is that of arrays, in place; what has no use for packed tables says so."""

    def step(model, optimizer, ids):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean(jnp.tanh(model(ids)) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    def made():
        model = nnx.Embed(V, 16, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    plain, packed, run = made(), made(), js.nnx.jit(step)
    nnx.update(packed, js.pack(nnx.state(packed), tables="embedding"))
    for ids in IDS[:2]:
        np.testing.assert_array_equal(run(*packed, ids), run(*plain, ids))
    model, _ = packed
    assert isinstance(model.embedding.get_value(), js.Packed)
    assert js.nnx.explain(run)(*packed, IDS[0])["['model']['embedding']"].row_sparse
    with pytest.raises(TypeError, match=r"Packed\(.*\) in a module .*js\.unpack\(nnx\.state\(model\)\)"):
        js.nnx.jit(lambda model, ids: model(ids))(model, IDS[0])
    with pytest.raises(TypeError, match=r"js\.nnx\.value_and_grad .*Packed\(.*js\.unpack\(nnx\.state\(model\)\)"):
        js.nnx.value_and_grad(lambda model: jnp.sum(model(IDS[0])))(model)
    nnx.update(packed, js.unpack(nnx.state(packed)))
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(x)) for x in (packed, plain)))


@pytest.mark.slow
def test_on_tpu_a_step_that_copies_tables_says_so(monkeypatch):
    monkeypatch.setattr(js.train.jit._jax, "platform_of", lambda arrays: "tpu")
    packing._WARNED.clear()
    step = js.jit(lambda p, ids: jax.tree.map(lambda p, g: p - g, p, jax.grad(loss_fn)(p, ids)))
    params = params_of((16,))
    with pytest.warns(UserWarning, match=r"XLA copies \['t'\] at each step, 0 MB .*js.pack"):
        said = js.explain(step)(params, IDS[0])
    assert "js.pack(state)" in str(said[TABLE]) and "js.pack" not in str(said["['w']"])
    packed = js.pack(params, tables=TABLE)
    said = js.explain(js.jit(step.__wrapped__))(packed, IDS[0])
    assert said[TABLE].row_sparse and "js.pack" not in str(said)
