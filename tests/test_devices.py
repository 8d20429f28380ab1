"""Many devices: the same numbers as one, bytes that do not depend on num_rows, and state that is split as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

import jaxsparse as js
from jaxsparse.refresh import _flush_rows, _row_shardings
from jaxsparse.rows import coalesce_ids
from tests import devices
from tests.hlo import bytes_moved, large_arrays

P = PartitionSpec


@pytest.fixture(scope="module")
def alone():
    """Runs on one device, by optimizer."""
    runs = {}

    def of(optimizer, steps):
        if optimizer not in runs:
            runs[optimizer] = devices.one(devices.start(optimizer), steps)
        return runs[optimizer]

    return of


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        *(("adamw, replay", way) for way in devices.WAYS if way not in ("data 2", "rows 2")),
        *(("clip, adam", way) for way in ("shard_map 8, check_vma", "data 2", "data 2 x rows 4")),
        ("rowwise adagrad", "rows 2"),
    ],
)
def test_agrees_with_one_device(optimizer, way, alone):
    """A sample of `python -m tests.devices`; two epochs, one padded batch and one with an idle device in each."""
    want = alone(optimizer, 8)
    got = devices.WAYS[way](devices.start(optimizer), 8)
    assert max(devices.furthest(got, want)) < 2e-6 and got.replicas_equal
    untrained = devices.start(optimizer).params["table"]
    assert np.abs(want.params["table"] - untrained).max() > 1e-2  # it went somewhere


# ---------------------------------------------------------------------------------------------------------------------
# what moves and what is held

LARGE = 40_000


def compiled(way, num_rows, skipped="freeze"):
    """The compiled step of a job over a table of num_rows rows, all shapes abstract, and the state's bytes."""
    batch_size, tx = 64, js.lazy_adam(1e-3, skipped=skipped)

    def create():
        params = {"table": jnp.zeros((num_rows, 4)), "head": jnp.ones(4)}
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    state = jax.eval_shape(create)
    ids = np.zeros((batch_size, 5), np.int32)
    if way == "pmap":
        (batch,) = js.batches(ids, np.zeros(batch_size), batch_size=batch_size, devices=8, num_rows=num_rows)
        step = js.make_train_step(loss_fn, axis_name="i", jit=False)
        step = jax.pmap(step, axis_name="i", devices=jax.devices()[:8], donate_argnums=0)
        state = jax.tree.map(lambda x: jnp.zeros((8, *x.shape), x.dtype), state)
        state, _ = step(state, batch)  # pmap donates what is on its devices
        return step.lower(state, batch).compile()
    names = {"data": ("data",), "rows": ("rows",), "data x rows": ("data", "rows")}[way]
    mesh = devices.mesh_of((8,) if len(names) == 1 else (2, 4), names)

    def put(x):
        by_row = "rows" in names and x.ndim and x.shape[0] == num_rows
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, P("rows") if by_row else P())
        )

    (batch,) = js.batches(ids, np.zeros(batch_size), batch_size=batch_size, num_rows=num_rows)
    batch = (
        js.global_batch(batch, mesh, "data")
        if "data" in names
        else jax.device_put(batch, jax.sharding.NamedSharding(mesh, P()))
    )
    return js.make_train_step(loss_fn).lower(jax.tree.map(put, state), batch).compile()


def loss_fn(params, batch):
    logits = js.embedding_bag(params["table"], batch.x) @ params["head"]
    return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)


@pytest.mark.parametrize("way", ["pmap", "data", "rows", "data x rows"])
def test_bytes_do_not_depend_on_num_rows(way):
    small, large = (compiled(way, num_rows).as_text() for num_rows in (LARGE, 2 * LARGE))
    moved = bytes_moved(small)
    assert moved == bytes_moved(large)
    assert 0 < sum(moved.values()) < 64 * 5 * 4 * 4 * 8  # all of it is less than a few blocks of 320 rows
    # a device creates nothing of its part of the table's rows, let alone of all
    assert large_arrays(large, 2 * LARGE // (4 if "rows" in way else 1)) == []


def test_work_of_a_device_does_not_grow_with_the_square_of_the_batch():
    """A cumsum of split ids would be one window of all of them for each."""
    mesh = devices.mesh_of((8,), ("data",))
    ids = jax.ShapeDtypeStruct((32_768,), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, P("data")))
    scratch = jax.ShapeDtypeStruct((LARGE,), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, P()))
    choose = jax.jit(lambda ids, scratch: coalesce_ids(ids, LARGE, 32_768, scratch))
    assert choose.lower(ids, scratch).compile().cost_analysis()["flops"] < 100 * 32_768


@pytest.mark.parametrize("skipped", ["freeze", "replay"])
def test_a_device_holds_its_part_of_the_tables(skipped):
    memory = {n: compiled("rows", n, skipped).memory_analysis() for n in (LARGE, 2 * LARGE)}
    more = memory[2 * LARGE].argument_size_in_bytes - memory[LARGE].argument_size_in_bytes
    of_a_row = 4 * (3 * 4 + 1 + (skipped == "replay"))  # table, mu, nu; scratch; stamps
    assert more == LARGE // 8 * of_a_row
    if skipped == "freeze":  # the chunks in which replay brings rows up to date grow until they are a few MB
        assert memory[2 * LARGE].temp_size_in_bytes - memory[LARGE].temp_size_in_bytes < 1000


# ---------------------------------------------------------------------------------------------------------------------
# every op over a table that is split

V, D, N = 30, 3, 8
RNG = np.random.default_rng(0)
BAGS = RNG.integers(V, size=(N, 4))
SCORES = jnp.asarray(RNG.normal(size=(N, 4)) ** 2, jnp.float32)
FLAT, OFFSETS = jnp.asarray(RNG.integers(V, size=11)), jnp.array([0, 0, 3, 4, 4, 8, 9, 11])
PADDED = scipy.sparse.csr_array(scipy.sparse.random(N, V, 0.2, random_state=0, dtype=np.float32))
PADDED.resize((N, js.padded_rows(V, 4)))
X = js.from_scipy(PADDED, nse=60)

OPS = {
    "lookup": lambda p, ids: p["t"][ids],
    "take": lambda p, ids: jnp.take(p["t"], ids, axis=0),
    **{
        combiner: lambda p, ids, combiner=combiner: js.embedding_bag(
            p["t"], ids, weights=None if combiner == "max" else p["w"], combiner=combiner, padding_idx=3
        )
        for combiner in ("sum", "mean", "sqrtn", "max")
    },
    "offsets": lambda p, ids: js.embedding_bag(p["t"], FLAT, offsets=OFFSETS, combiner="mean"),
    "ragged max": lambda p, ids: js.embedding_bag(p["t"], FLAT, offsets=OFFSETS, combiner="max"),
    "product": lambda p, ids: js.dot(X, p["t"]),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_over_split_rows(name):
    """Forward and backward, weights included, on a mesh of data x rows."""
    rows = js.padded_rows(V, 4) if name == "product" else V  # a matrix has as many columns as the table has rows
    params = {"t": jnp.asarray(RNG.normal(size=(rows, D)), jnp.float32), "w": SCORES}
    cotangent = jnp.asarray(RNG.normal(size=jax.eval_shape(OPS[name], params, BAGS).shape), jnp.float32)

    def loss(params, ids):
        out = OPS[name](params, ids)
        return jnp.sum(out * cotangent) + jnp.sum(out**2), out

    def start():
        return TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, params), tx=js.lazy_sgd(0.1))

    step = js.make_train_step(loss, has_aux=True)
    want, metrics = step(start(), jnp.asarray(BAGS))
    mesh = devices.mesh_of((2, 4), ("data", "rows"))
    state = js.shard_rows(start(), mesh, tables=lambda path, _: path.endswith("['t']"), axis="rows")
    ids = jax.device_put(BAGS, jax.sharding.NamedSharding(mesh, P("data")))
    text = step.lower(state, ids).compile().as_text()
    assert "all-gather" not in "".join(line for line in text.splitlines() if f"[{V + 2},{D}]" in line)
    got, others = step(state, ids)
    np.testing.assert_allclose(others["aux"], metrics["aux"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.params["t"][:rows], want.params["t"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.params["w"], want.params["w"], rtol=1e-5, atol=1e-6)
    assert got.params["t"].shape == (V + 2, D) and not np.asarray(got.params["t"])[rows:].any()
    assert got.params["t"].sharding.spec == P("rows")


# ---------------------------------------------------------------------------------------------------------------------
# the pieces


def test_flush_of_split_rows_moves_nothing():
    mesh = devices.mesh_of((8,), ("rows",))
    state = js.shard_rows(devices.start("adamw, replay"), mesh, tables="table", axis="rows")
    step = js.make_train_step(devices.loss_fn)
    for batch in devices.stream(3):
        state, _ = step(state, batch)
    of_mesh, specs = _row_shardings(state.params, state.opt_state)
    assert of_mesh == mesh
    flush = jax.shard_map(_flush_rows, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    text = jax.jit(flush, donate_argnums=(0, 1)).lower(state.params, state.opt_state).compile().as_text()
    assert bytes_moved(text) == {} and js.flush(state).params["table"].sharding.spec == P("rows")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shard_rows_under_jit_makes_no_whole_table(kind):
    mesh, num_rows = devices.mesh_of((8,), ("rows",), kind), 4 * LARGE

    def create(key):
        params = {"table": jax.random.normal(key, (num_rows, 4)), "head": jnp.ones(4)}
        state = TrainState.create(apply_fn=None, params=params, tx=js.lazy_adam(1e-3, skipped="replay"))
        return js.shard_rows(state, mesh, tables="table", axis="rows")

    make = jax.jit(create).lower(jax.random.key(0)).compile()
    memory = make.memory_analysis()
    assert memory.output_size_in_bytes < num_rows * (3 * 16 + 8) / 8 + 3e6  # and the history, on every device
    assert memory.temp_size_in_bytes < num_rows * 16 / 2
    state = make(jax.random.key(0))
    assert state.params["table"].sharding.spec[0] == "rows"
    np.testing.assert_array_equal(
        np.asarray(state.params["table"])[:4], jax.random.normal(jax.random.key(0), (num_rows, 4))[:4]
    )


@pytest.mark.parametrize("num_rows", [1, 7, 64, 1003])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_spread_ids(num_rows, shards):
    total = js.padded_rows(num_rows, shards)
    assert total % shards == 0 and 0 <= total - num_rows < shards
    ids = np.arange(num_rows)
    new = js.spread_ids(ids, num_rows, shards)
    assert len(set(new.tolist())) == num_rows and new.min() >= 0 and new.max() < total
    np.testing.assert_array_equal(new // (total // shards), ids % shards)  # the shard it is on
    np.testing.assert_array_equal(js.spread_ids(jnp.asarray(ids), num_rows, shards), new)
    outside = js.spread_ids(np.array([-1, -5, num_rows, num_rows + 9]), num_rows, shards)
    assert (outside[:2] < 0).all() and (outside[2:] >= total).all()


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_spread_ids_outgrow_a_narrow_type(as_array):
    new = np.asarray(js.spread_ids(as_array(np.arange(127, dtype=np.int8)), 127, 7))
    assert new.max() == 131 and len(set(new.tolist())) == 127


def test_spread_ids_balances_zipf():
    ids = np.random.default_rng(0).zipf(1.2, 20_000) % 1003
    shares = np.bincount(np.unique(js.spread_ids(ids, 1003, 8)) // (js.padded_rows(1003, 8) // 8), minlength=8)
    assert shares.max() < 1.1 * shares.mean()


def test_refusals():
    state = devices.start("adam")
    mesh = devices.mesh_of((2,), ("rows",))
    with pytest.raises(ValueError, match=r"'axis'.*rows.*'columns'"):
        js.shard_rows(state, mesh, tables="table", axis="columns")
    with pytest.raises(ValueError, match=r"'tables'.*'tabel'"):
        js.shard_rows(state, mesh, tables="tabel", axis="rows")


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_by_hand_under_shard_map(check_vma):
    """js.value_and_grad gives each device's own gradients, dense ones too, whatever shard_map checks; js.pmean joins
    them."""
    mesh, params = devices.mesh_of((4,), ("i",)), {"t": jnp.arange(12.0).reshape(6, 2), "w": jnp.array([1.0, 2.0])}
    ids = jnp.array([[1, 2], [2, 5], [2, 2], [0, 1]])

    def loss(params, ids):
        return jnp.mean((params["t"][ids] @ params["w"]) ** 2)

    def mapped(params, ids):
        value, grads = js.value_and_grad(loss)(params, ids)
        grads = js.pmean(grads, "i")
        return jax.lax.pmean(value, "i"), {"t": grads["t"].todense(), "w": grads["w"]}

    run = jax.shard_map(mapped, mesh=mesh, in_specs=(P(), P("i")), out_specs=P(), check_vma=check_vma)
    value, grads = jax.jit(run)(params, ids)
    want = jax.value_and_grad(loss)(params, ids)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads, want[1])
