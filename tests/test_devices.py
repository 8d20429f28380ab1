"""Many devices: the same numbers as one, bytes that do not depend on num_rows, and state that is split as promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

import jaxsparse as js
from jaxsparse.train.refresh import _flush_rows, _row_shardings
from tests import devices
from tests.hlo import bytes_moved, compiled_by_default, large_arrays
from tests.marks import slow_but

P = PartitionSpec


@functools.cache
def alone(optimizer):
    """The run on one device."""
    return devices.one(devices.start(optimizer), 8)


def cases():
    """Every kind of way with one optimizer, and all with AdamW and replay, whose programs are the largest."""
    quick = [("sgd, replay", "data 2 x rows 4")]
    others = [
        ("clip, adam", way) for way in ("pmap 2", "shard_map 8, check_vma", "shard_map 8", "data 2", "data 2 x rows 4")
    ]
    others += [("sgd, replay", way) for way in ("shard_map 8, check_vma", "rows 8")]
    others += [("rowwise adagrad", way) for way in ("rows 2", "data 2 x rows 4, explicit")]
    large = [("adamw, replay", way) for way in devices.WAYS if way not in ("data 2", "rows 2")]
    return slow_but(quick, quick + others + large)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "way"), cases())
def test_agrees_with_one_device(optimizer, way):
    """A sample of `python -m tests.devices`; two epochs, one padded batch and one with an idle device in each."""
    want = alone(optimizer)
    got = devices.WAYS[way](devices.start(optimizer), 8)
    assert max(devices.furthest(got, want)) < 2e-6 and got.replicas_equal
    untrained = devices.start(optimizer).params["table"]
    assert np.abs(want.params["table"] - untrained).max() > 1e-2  # it went somewhere
    if "rows" in way:  # and the flush left rows where they were
        assert got.table.is_equivalent_to(jax.sharding.NamedSharding(got.table.mesh, P("rows")), 2)


# ---------------------------------------------------------------------------------------------------------------------
# what moves and what is held

LARGE = 40_000


@functools.cache
def lazy_adam(skipped):
    return js.lazy_adam(1e-3, untouched=skipped)


@functools.cache
def compiled(way, num_rows, skipped):
    """The compiled step of a job over a table of num_rows rows; the state is abstract."""
    batch_size = 64

    def create():
        params = {"table": jnp.zeros((num_rows, 4)), "head": jnp.ones(4)}
        return TrainState.create(apply_fn=None, params=params, tx=lazy_adam(skipped))

    state = jax.eval_shape(create)
    ids = np.zeros((batch_size, 5), np.int32)
    names = {"pmap": ("i",), "data": ("data",), "rows": ("rows",), "data x rows": ("data", "rows")}[way]
    mesh = devices.mesh_of((8,) if len(names) == 1 else (2, 4), names)
    placed = functools.partial(jax.sharding.NamedSharding, mesh)
    if way == "pmap":
        (batch,) = js.batches(ids, np.zeros(batch_size), batch_size=batch_size, devices=8, num_rows=num_rows)
        step = js.make_train_step(loss_fn, axis_name="i", jit=False)
        step = jax.pmap(step, axis_name="i", devices=jax.devices()[:8], donate_argnums=0)
        copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype, sharding=placed(P("i"))), state)
        return compiled_by_default(step.lower(copies, batch))

    def put(x):
        by_row = "rows" in names and x.ndim and x.shape[0] == num_rows
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(P("rows") if by_row else P()))

    (batch,) = js.batches(ids, np.zeros(batch_size), batch_size=batch_size, num_rows=num_rows)
    batch = js.global_batch(batch, mesh, "data") if "data" in names else jax.device_put(batch, placed(P()))
    return compiled_by_default(js.make_train_step(loss_fn).lower(jax.tree.map(put, state), batch))


def loss_fn(params, batch):
    logits = js.embedding_bag(params["table"], batch.x) @ params["head"]
    return js.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch.y), batch.weight)


@pytest.mark.slow
@pytest.mark.parametrize("way", slow_but(["rows"], ["pmap", "data", "rows", "data x rows"]))
def test_bytes_do_not_depend_on_num_rows(way):
    small, large = (compiled(way, num_rows, "freeze").as_text() for num_rows in (LARGE, 2 * LARGE))
    moved = bytes_moved(small)
    assert moved == bytes_moved(large)
    assert 0 < sum(moved.values()) < 64 * 5 * 4 * 4 * 8  # all of it is less than a few blocks of 320 rows
    # a device creates nothing of its part of the table's rows, let alone of all
    assert large_arrays(large, 2 * LARGE // (4 if "rows" in way else 1)) == []


@pytest.mark.devices(8)
@pytest.mark.parametrize("skipped", ["freeze", pytest.param("replay", marks=pytest.mark.slow)])
def test_a_device_holds_its_part_of_the_tables(skipped):
    memory = {n: compiled("rows", n, skipped).memory_analysis() for n in (LARGE, 2 * LARGE)}
    more = memory[2 * LARGE].argument_size_in_bytes - memory[LARGE].argument_size_in_bytes
    of_a_row = 4 * (3 * 4 + (skipped == "replay"))  # table, mu, nu; stamps
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
    "lookup": lambda t, w, ids: t[ids],
    "take": lambda t, w, ids: jnp.take(t, ids, axis=0),
    **{
        combiner: lambda t, w, ids, combiner=combiner: js.embedding_bag(
            t, ids, weights=None if combiner == "max" else w, combiner=combiner, padding_idx=3
        )
        for combiner in ("sum", "mean", "sqrtn", "max")
    },
    "offsets": lambda t, w, ids: js.embedding_bag(t, FLAT, offsets=OFFSETS, combiner="mean"),
    "ragged max": lambda t, w, ids: js.embedding_bag(t, FLAT, offsets=OFFSETS, combiner="max"),
    "product": lambda t, w, ids: js.dot(X, t),
}
ROWS = {name: js.padded_rows(V, 4) if name == "product" else V for name in OPS}  # a matrix has a column for each row
WIDTH = {name: D + i for i, name in enumerate(OPS)}  # by which the program's text tells tables apart


@functools.cache
def step_of_all_ops():
    """One step with a table and weights of its own for each op: parameters and outputs by dense gradients on one
    device, those of a mesh of data x rows, and the text of its program."""
    params = {
        name: {"t": jnp.asarray(RNG.normal(size=(ROWS[name], WIDTH[name])), jnp.float32), "w": SCORES} for name in OPS
    }
    outputs = lambda params, ids: {name: op(**params[name], ids=ids) for name, op in OPS.items()}  # noqa: E731
    shapes = jax.eval_shape(outputs, params, BAGS)
    cotangents = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), shapes)

    def loss(params, ids):
        out = outputs(params, ids)
        return sum(jnp.sum(out[name] * cotangents[name]) + jnp.sum(out[name] ** 2) for name in OPS), out

    @jax.jit
    def dense_step(params, ids):
        grads, out = jax.grad(loss, has_aux=True)(params, ids)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), out

    want = dense_step(params, BAGS)
    mesh = devices.mesh_of((2, 4), ("data", "rows"))
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, params), tx=js.lazy_sgd(0.1))
    state = js.shard_rows(state, mesh, tables=lambda path, _: path.endswith("['t']"), axis="rows")
    ids = jax.device_put(BAGS, jax.sharding.NamedSharding(mesh, P("data")))
    program = compiled_by_default(js.make_train_step(loss, has_aux=True).lower(state, ids))
    state, metrics = program(state, ids)
    return want, (state.params, metrics["aux"]), program.as_text()


@pytest.mark.slow  # one program, compiled as XLA does by default, for its text
@pytest.mark.parametrize("name", OPS)
def test_ops_over_split_rows(name):
    """Forward and backward, weights included, on a mesh of data x rows."""
    (want, want_out), (got, got_out), text = step_of_all_ops()
    rows, shape = ROWS[name], (V + 2, WIDTH[name])
    assert "all-gather" not in "".join(line for line in text.splitlines() if f"[{shape[0]},{shape[1]}]" in line)
    np.testing.assert_allclose(got_out[name], want_out[name], rtol=1e-5, atol=1e-6)
    table = np.asarray(got[name]["t"])
    np.testing.assert_allclose(table[:rows], want[name]["t"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[name]["w"], want[name]["w"], rtol=1e-5, atol=1e-6)
    assert table.shape == shape and not table[rows:].any()
    assert got[name]["t"].sharding.spec == P("rows")


# ---------------------------------------------------------------------------------------------------------------------
# the pieces


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd, replay", pytest.param("adamw, replay", marks=pytest.mark.slow)])
def test_flush_of_split_rows_moves_nothing(optimizer):
    mesh = devices.mesh_of((8,), ("rows",))
    state = js.shard_rows(devices.start(optimizer), mesh, tables="table", axis="rows")
    for batch in devices.stream(3):
        state, _ = devices.train_step()(state, batch)
    of_mesh, specs = _row_shardings(state.params, state.opt_state)
    assert of_mesh == mesh
    flush = jax.shard_map(_flush_rows, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    program = compiled_by_default(jax.jit(flush, donate_argnums=(0, 1)).lower(state.params, state.opt_state))
    assert bytes_moved(program.as_text()) == {}


@pytest.mark.slow
@pytest.mark.devices(8)
def test_flush_of_split_rows_whose_slots_are_whole():
    """Devices have other rows of the one than of the others, so XLA moves them."""
    tx, params = js.lazy_sgd(1.0, momentum=0.5, untouched="replay"), {"table": jnp.ones((8, 2))}
    opt_state, loss_fn = tx.init(params), lambda params, ids: jnp.sum(params["table"][ids])
    for ids in (jnp.array([0, 1]), jnp.array([5])):
        params, opt_state = js.refresh(loss_fn)((params, opt_state), ids)
        updates, opt_state = tx.update(js.grad(loss_fn)(params, ids), opt_state, params)
        params = optax.apply_updates(params, updates)
    mesh = devices.mesh_of((8,), ("rows",))
    split, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (P("rows"), P()))
    on_mesh = jax.device_put(params, split), jax.device_put(opt_state, whole)
    assert _row_shardings(*on_mesh) == (None, None)
    want, got = js.flush(jax.tree.map(jnp.copy, (params, opt_state))), js.flush(on_mesh)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert want[0]["table"][:3, 0].tolist() == [-0.5, -0.5, 1.0]


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", slow_but([AxisType.Auto], [AxisType.Auto, AxisType.Explicit]))
def test_shard_rows_under_jit_makes_no_whole_table(kind):
    mesh, num_rows = devices.mesh_of((8,), ("rows",), kind), 4 * LARGE

    def create(key):
        params = {"table": jax.random.normal(key, (num_rows, 4)), "head": jnp.ones(4)}
        state = TrainState.create(apply_fn=None, params=params, tx=js.lazy_adam(1e-3, untouched="replay"))
        return js.shard_rows(state, mesh, tables="table", axis="rows")

    make = compiled_by_default(jax.jit(create).lower(jax.random.key(0)))
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


@pytest.mark.devices(8)
def test_refusals():
    state = devices.start("adam")
    mesh = devices.mesh_of((2,), ("rows",))
    with pytest.raises(ValueError, match=r"'axis'.*rows.*'columns'"):
        js.shard_rows(state, mesh, tables="table", axis="columns")
    with pytest.raises(ValueError, match=r"'tables'.*'tabel'"):
        js.shard_rows(state, mesh, tables="tabel", axis="rows")


@pytest.mark.devices(8)
@pytest.mark.parametrize("check_vma", slow_but([True], [True, False]))
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
    want = jax.jit(jax.value_and_grad(loss))(params, ids)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads, want[1])


def test_sparse_inputs_of_several_hosts_want_devices(monkeypatch):
    (batch,) = js.batches(scipy.sparse.eye_array(2, 3, format="csr", dtype=np.float32), batch_size=2)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"'batch' argument of js.global_batch must be without BCOO leaves, or with dev"
    ):
        js.global_batch(batch, mesh, "data")
