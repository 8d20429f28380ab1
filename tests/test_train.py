"""The step: what it computes, what it allocates, how often it is traced, and the same under pmap."""

import os
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.hlo import compiled_text, large_arrays
from tests.marks import slow_but

V, D, B, L = 50, 4, 8, 3
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Model(nn.Module):
    """All three kinds of feature: an Embed nobody changed, a bag, a sparse product; and a dense head."""

    num_rows: int = V
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        table = self.param("bag", nn.initializers.normal(1.0), (self.num_rows, D))
        weight = self.param("wide", nn.initializers.normal(1.0), (x["words"].shape[1], D))
        user = nn.Embed(self.num_rows, D, name="user", dtype=self.dtype)(x["user"])
        bag = js.embedding_bag(table, x["ids"], padding_idx=0, combiner="mean")
        h = jnp.concatenate([user, bag, js.dot(x["words"], weight)], axis=1).astype(jnp.float32)
        return nn.Dense(1, use_bias=False)(nn.tanh(nn.Dense(8, use_bias=False)(h)))[:, 0]


def data(n, num_rows=V, seed=0):
    rng = np.random.default_rng(seed)
    words = scipy.sparse.random(n, num_rows, 5 / num_rows, "csr", np.float32, rng=rng)
    ids = (rng.zipf(1.3, (n, L)) % num_rows).astype(np.int32)
    x = {"words": words, "user": rng.integers(0, num_rows, n).astype(np.int32), "ids": ids}
    return x, rng.integers(0, 2, n).astype(np.float32)


def loss_of(model):
    def loss_fn(params, batch):
        losses = optax.sigmoid_binary_cross_entropy(model.apply(params, batch.x), batch.y)
        return js.weighted_mean(losses, batch.weight)

    return loss_fn


def state_of(model, batch, tx):
    return TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), batch.x), tx=tx)


def as_numpy(tree):
    return jax.tree.map(np.array, tree)  # a copy: the state is donated


# ---------------------------------------------------------------------------------------------------------------------


def test_step_against_the_dense_step_with_untouched_rows_put_back():
    x, y = data(20)
    batches = js.batches(x, y, batch_size=B, shuffle=True, padding_idx={"ids": 0})
    model = Model()
    first = next(iter(batches))
    inner = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(0.1, weight_decay=0.1))
    state, step = state_of(model, first, js.lazy(inner)), js.make_train_step(loss_of(model))
    params, opt_state = as_numpy(state.params), inner.init(state.params)

    @jax.jit
    def dense_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_of(model))(params, batch)
        updates, opt_state = inner.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads)

    for batch in [*batches, *batches]:
        new_params, new_opt_state, loss, norm = dense_step(params, opt_state, batch)
        touched = {
            "user": np.unique(batch.x["user"]),
            "bag": np.setdiff1d(batch.x["ids"], [0]),
            "wide": np.setdiff1d(batch.x["words"].indices[:, 1], [V]),
        }

        def keep(path, old, new):
            rows = next((touched[k] for k in touched if k in jax.tree_util.keystr(path)), None)  # noqa: B023
            if rows is None or np.ndim(old) < 2:
                return new
            out = np.array(old)
            out[rows] = np.asarray(new)[rows]
            return out

        params = jax.tree_util.tree_map_with_path(keep, params, new_params)
        opt_state = jax.tree_util.tree_map_with_path(keep, opt_state, new_opt_state)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        assert metrics["rows_touched"] == sum(map(len, touched.values()))
        chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-4, atol=1e-6)
    assert state.step == 2 * len(batches)


def test_one_trace_for_many_batches():
    x, y = data(21)
    x.pop("words")  # ragged: a few shapes
    batches = js.batches(x, y, batch_size=B, shuffle=True)

    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        losses = params["t"][batch.x["user"]] + params["t"][batch.x["ids"]].sum(1) - batch.y
        return js.weighted_mean(losses**2, batch.weight)

    step = js.make_train_step(loss_fn)
    state = TrainState.create(apply_fn=None, params={"t": jnp.zeros(V)}, tx=js.lazy_adam(0.1))
    for _ in range(3):
        for batch in batches:
            state, _ = step(state, batch)
    assert state.step == 9 and len(traces) == 1


def test_state_is_donated():
    x, y = data(B)
    batch = next(iter(js.batches(x, y, batch_size=B)))
    state = state_of(Model(), batch, js.lazy_adam(0.1))
    new, _ = js.make_train_step(loss_of(Model()))(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_aux_and_further_arguments():
    """Mutable collections go in as an argument and come back as aux."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, ids, train):
            x = nn.Embed(V, D, name="e")(ids).mean(1)
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.BatchNorm(use_running_average=not train)(x).sum(1)

    model = Normed()
    x, y = data(B)
    batch = next(iter(js.batches(x["ids"], y, batch_size=B)))
    variables = model.init(jax.random.key(0), batch.x, False)

    def loss_fn(params, batch, batch_stats, rng):
        out, mutated = model.apply(
            {"params": params, "batch_stats": batch_stats}, batch.x, True, mutable="batch_stats", rngs={"dropout": rng}
        )
        return js.weighted_mean((out - batch.y) ** 2, batch.weight), (mutated["batch_stats"], {"out": out})

    with jax.numpy_rank_promotion("allow"):  # flax's BatchNorm promotes
        args = (batch, variables["batch_stats"], jax.random.key(1))
        _, (want_stats, want) = jax.jit(loss_fn)(variables["params"], *args)
        state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=js.lazy_adam(0.1))
        state, metrics = js.make_train_step(loss_fn, has_aux=True)(state, *args)
    stats, out = metrics["aux"]
    chex.assert_trees_all_close(stats, want_stats, rtol=1e-5)
    np.testing.assert_allclose(out["out"], want["out"], rtol=1e-4, atol=1e-5)
    assert metrics["rows_touched"] == len(np.unique(batch.x))


def test_lazy_anywhere_in_the_optimizer_state():
    tx = optax.partition({"rows": js.lazy(optax.sgd(1.0)), "dense": optax.sgd(0.5)}, {"t": "rows", "w": "dense"})
    params = {"t": jnp.ones((V, 1)), "w": jnp.ones(1)}
    step = js.make_train_step(lambda p, ids: jnp.sum(p["t"][ids]) + jnp.sum(p["w"]))
    state, metrics = step(TrainState.create(apply_fn=None, params=params, tx=tx), jnp.array([3, 3, 5]))
    want = np.ones((V, 1))
    want[3], want[5] = -1, 0
    np.testing.assert_array_equal(state.params["t"], want)
    np.testing.assert_array_equal(state.params["w"], [0.5])
    assert metrics["rows_touched"] == 2
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(4 + 1 + 1))


@pytest.mark.slow  # test_the_loss_is_passed_on_as_value has both, of one table
def test_stock_optax_takes_the_same_step():
    """An optimizer need not be lazy, and its state is the same."""
    x, y = data(20)
    batches = js.batches(x, y, batch_size=B, padding_idx={"ids": 0})
    model, first = Model(), next(iter(batches))
    inner, step = optax.adamw(0.1), js.make_train_step(loss_of(model))
    stock, lazy = (state_of(model, first, tx) for tx in (inner, js.lazy(inner)))
    for batch in batches:
        stock, want = step(stock, batch)
        lazy, got = step(lazy, batch)
        assert got == want
    chex.assert_trees_all_equal((stock.params, stock.opt_state), (lazy.params, lazy.opt_state))


# ---------------------------------------------------------------------------------------------------------------------
# O(rows)


ROWS = 10_000_000
STEPS = {
    "adam": lambda: js.lazy_adam(1e-3),
    "clip_adamw": lambda: js.lazy(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("adam", jnp.bfloat16, marks=pytest.mark.slow),
        ("clip_adamw", jnp.float32),
        pytest.param("adam", jnp.float32, marks=pytest.mark.slow),
        pytest.param("clip_adamw", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_nothing_of_the_tables_size_is_created(name, dtype):
    x, y = data(B, 100)
    batch = next(iter(js.batches(x, y, batch_size=B)))
    bcoo = batch.x["words"]
    wide = type(bcoo)((bcoo.data, bcoo.indices), shape=(B, ROWS), indices_sorted=True)
    batch = js.Batch({**batch.x, "words": wide}, batch.y, batch.weight)
    model = Model(num_rows=ROWS, dtype=dtype)
    abstract = jax.eval_shape(lambda b: state_of(model, b, STEPS[name]()), batch)
    text = compiled_text(js.make_train_step(loss_of(model)), abstract, batch)
    assert f"[{ROWS},{D}]" in text and text.count("scatter(") >= 9  # three tables and their slots, in place
    assert large_arrays(text, ROWS) == []


def test_the_stock_flax_step_creates_nothing_large_either():
    """The two-word change of the README: hand-written step, stock TrainState."""
    x, y = data(B, 100)
    batch = next(iter(js.batches({"ids": x["ids"]}, y, batch_size=B)))

    def loss_fn(params, batch):
        return js.weighted_mean(
            (nn.Embed(ROWS, D).apply(params, batch.x["ids"]).mean((1, 2)) - batch.y) ** 2, batch.weight
        )

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        loss, grads = js.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    tx = js.lazy(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 100))))

    def make():
        params = nn.Embed(ROWS, D).init(jax.random.key(0), batch.x["ids"])
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    text = compiled_text(train_step, jax.eval_shape(make), batch)
    assert large_arrays(text, ROWS) == []


def unused_by_the_gradient(params, batch):
    rows = params["t"][batch]
    return jnp.sum(rows * 2), {"rows": rows, "norm": jnp.sum(params["t"][batch + 1] ** 2)}


ORDERS = {
    "linear": lambda p, b: (jnp.sum(p["t"][b] * 2), None),
    "linear_bag": lambda p, b: (jnp.sum(js.embedding_bag(p["t"], b[:, None])), None),
    "linear_in_one_of_two": lambda p, b: (jnp.sum(p["t"][b] * p["w"][None]) + jnp.sum(p["t"][b + 1]), None),
    "metrics": unused_by_the_gradient,
    "squares": lambda p, b: (jnp.sum(p["t"][b] ** 2), None),
}


@pytest.mark.parametrize("name", slow_but(["linear", "linear_bag", "linear_in_one_of_two", "metrics"], ORDERS))
@pytest.mark.parametrize("tx", [js.lazy_sgd(0.1), pytest.param(js.lazy_adagrad(0.1), marks=pytest.mark.slow)])
def test_reads_come_before_the_update(name, tx):
    """Nothing in a gradient that is constant says that the table is read before it is written; a copy would."""
    ids = jax.ShapeDtypeStruct((7,), jnp.int32)

    def make():
        return TrainState.create(apply_fn=None, params={"t": jnp.ones((ROWS, D)), "w": jnp.ones(D)}, tx=tx)

    step = js.make_train_step(ORDERS[name], has_aux=True)
    assert large_arrays(compiled_text(step, jax.eval_shape(make), ids), ROWS) == []


CREATE_LARGE = {
    "dense_gradient": (lambda t, ids: t - jax.grad(lambda t: jnp.sum(t[ids]))(t), (0,)),
    "cast": (lambda t, ids: t.astype(jnp.bfloat16).at[ids].get().sum(), ()),
    "not_donated": (lambda t, ids: t.at[ids].add(1.0), ()),
    "branch": (lambda t, ids: jax.lax.cond(ids[0] > 3, lambda t: t.at[ids].add(1.0), lambda t: t * 2, t), (0,)),
    "loop": (lambda t, ids: jax.lax.fori_loop(0, ids[0], lambda i, t: jnp.sin(t), t), (0,)),
    "flattened": (lambda t, ids: jnp.cumsum(t.reshape(-1))[ids], ()),
    "integers": (lambda t, ids: jnp.argsort(t[:, 0])[ids], ()),
    "mask": (lambda t, ids: t[ids] * jnp.zeros(t.shape[0], bool).at[ids].set(True)[ids[0]], ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "float16", "bfloat16"]))
def test_no_table_sized_arrays_unless_explain_says_so(dtype, explained_by_default):
    """XLA on CPU converts a whole bfloat16 table before it writes some rows, or does not: what it compiles tells."""
    tx = js.lazy_adam(0.05)

    def loss(table, ids):
        return jnp.sum(js.embedding_lookup(table, ids).astype(jnp.float32) ** 2)

    def step(table, state, ids):
        updates, state = tx.update(js.grad(loss)(table, ids), state, table)
        return optax.apply_updates(table, updates), state

    table, ids = jnp.zeros((ROWS, 4), dtype), jnp.arange(40)
    text = compiled_text(jax.jit(step, donate_argnums=(0, 1)), table, tx.init(table), ids)
    large, advice = large_arrays(text, ROWS), js.explain(loss)(table, ids)[""].advice
    assert bool(large) == ("converting all of it" in advice), large
    assert dtype == "bfloat16" or not large


@pytest.mark.slow  # 4 GB
@pytest.mark.skipif(MEMORY < 12e9, reason="needs 5 GB for the table")
def test_a_table_past_two_to_the_31_elements():
    """Its elements cannot be counted by an int32: rows before, at and behind that point, and no others, change."""
    rows = 2**25 + 8
    tx, table = js.lazy_sgd(1.0), jnp.zeros((rows, 64), jnp.float16)
    ids = jnp.array([0, 1, 2**24, 2**25 - 1, 2**25, 2**25 + 1, rows - 1, rows - 1])

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        gradient = js.grad(lambda t: -jnp.sum(t[ids].astype(jnp.float32) * (1.0 + jnp.arange(64))[None]))(table)
        updates, state = tx.update(gradient, state, table)
        return optax.apply_updates(table, updates), state

    table, _ = step(table, tx.init(table), ids)
    want = np.tile(1.0 + np.arange(64), (7, 1))
    want[-1] *= 2
    np.testing.assert_array_equal(table.at[ids[:7]].get(), want)
    assert np.count_nonzero(np.asarray(table).view(np.uint16)) == want.size


@pytest.mark.cpu("it reads what XLA writes for a CPU")
@pytest.mark.parametrize("name", CREATE_LARGE)
def test_the_reader_of_hlo_sees_large_arrays(name):
    """The oracle can fail: each of these creates an array of the table's size."""
    fun, donate = CREATE_LARGE[name]
    args = (jax.ShapeDtypeStruct((ROWS, D), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32))
    if name == "cast":  # XLA fuses a cast into the gather after it; an output keeps it
        fun = lambda t, ids: t.astype(jnp.bfloat16)  # noqa: E731
    text = compiled_text(jax.jit(fun, donate_argnums=donate), *args)
    assert large_arrays(text, ROWS)


@pytest.mark.slow
def test_scopes_are_named():
    x, y = data(B)
    batch = next(iter(js.batches(x, y, batch_size=B)))
    model = Model()
    text = compiled_text(js.make_train_step(loss_of(model)), state_of(model, batch, js.lazy_adam(0.1)), batch)
    for scope in ("gather", "loss_and_gradients", "update", "scatter", "Dense_0"):
        assert f"/{scope}" in text, scope


# ---------------------------------------------------------------------------------------------------------------------
# pmap


@pytest.mark.slow  # as tests.devices, of which test_devices.py is a sample, but with another loss
@pytest.mark.parametrize(("devices", "optimizer"), [(2, "clip_adamw"), (8, "adam")])
def test_pmap_agrees_with_one_device(devices, optimizer):
    """19 examples in batches of 16: the last one has a device with a part and, with 8, devices without any example."""
    x, y = data(19)
    settings = {"batch_size": 16, "shuffle": True, "padding_idx": {"ids": 0}}
    one, many = js.batches(x, y, **settings), js.batches(x, y, **settings, devices=devices)
    model, tx = Model(), STEPS[optimizer]()
    loss_fn = loss_of(model)
    state = state_of(model, next(iter(one)), tx)
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), state)
    step = js.make_train_step(loss_fn)
    pstep = jax.pmap(
        js.make_train_step(loss_fn, axis_name="batch", jit=False),
        axis_name="batch",
        donate_argnums=0,
        devices=jax.devices()[:devices],
    )
    for _ in range(3):
        for whole_batch, shards in zip(one, many, strict=True):
            state, want = step(state, whole_batch)
            copies, got = pstep(copies, shards)
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(got[name], np.full(devices, want[name]), rtol=2e-5)
            assert got["rows_touched"].tolist() == [want["rows_touched"].item()] * devices
    for got in jax.tree.leaves(copies):
        for replica in got:
            np.testing.assert_array_equal(replica, got[0])  # replicas are bit-equal
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], copies.params), state.params, rtol=1e-4, atol=2e-5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], copies.opt_state), state.opt_state, rtol=1e-4, atol=2e-5
    )


@pytest.mark.slow
def test_a_loss_that_is_nan_on_an_empty_device_does_no_harm():
    def loss_fn(params, batch):
        return jnp.sum(batch.weight * (params["t"][batch.x] - batch.y) ** 2) / jnp.sum(batch.weight)

    ids, y = np.array([1, 2, 1]), np.array([1.0, 2.0, 3.0])
    step = js.make_train_step(loss_fn, axis_name="batch", jit=False)
    state = TrainState.create(apply_fn=None, params={"t": jnp.zeros(4)}, tx=js.lazy(optax.sgd(1.0)))
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), state)
    (batch,) = js.batches(ids, y, batch_size=8, devices=4)
    assert batch.weight.sum(1).tolist() == [2, 1, 0, 0]
    copies, metrics = jax.pmap(step, axis_name="batch", devices=jax.devices()[:4])(copies, batch)
    np.testing.assert_allclose(copies.params["t"][0], [0, 8 / 3, 4 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.full(4, 14 / 3), rtol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize("check_vma", slow_but([True], [True, False]))
def test_shard_map(check_vma):
    """Each device's mean over its own ids, then the mean of these: a batch without weights."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    step = js.make_train_step(lambda p, ids: jnp.mean(p["t"][ids] ** 2), axis_name="batch", jit=False)
    state = TrainState.create(apply_fn=None, params={"t": jnp.arange(6.0)}, tx=js.lazy_sgd(1.0))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec(), check_vma=check_vma)
    ids = jnp.array([1, 2, 2, 5])
    got, metrics = jax.jit(mapped)(state, ids)
    np.testing.assert_allclose(got.params["t"], [0, 0.5, 0, 3, 4, 2.5])
    assert metrics["rows_touched"] == 3


@pytest.mark.devices(8)
def test_traffic_does_not_depend_on_num_rows():
    """psum gathers ids and rows, and no table."""

    def combined(g):
        return js.psum(g, "batch")

    g = js.RowSparse(jnp.arange(5), jnp.ones((5, 2)), (ROWS, 2))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), g)
    text = compiled_text(jax.pmap(combined, axis_name="batch", devices=jax.devices()[:4]), stacked)
    assert "all-gather" in text and large_arrays(text, 1000) == []


@pytest.mark.devices(8)
def test_psum_and_pmean():
    ids, rows = jnp.array([[1, 2], [2, 9]]), jnp.arange(8.0).reshape(2, 2, 2)
    tree = jax.vmap(lambda i, r: {"t": js.RowSparse(i, r, (4, 2)), "w": r})(ids, rows)

    def run(combine):
        def densified(tree):
            return jax.tree.map(lambda g: jnp.zeros(g.shape) + g, combine(tree, "i"), is_leaf=is_row_sparse)

        return jax.pmap(densified, axis_name="i", devices=jax.devices()[:2])(tree)

    want = np.zeros((4, 2))
    for i, row in zip(np.ravel(ids), np.reshape(rows, (4, 2)), strict=True):
        if i < 4:
            want[i] += row
    for got, scale in ((run(js.psum), 1), (run(js.pmean), 0.5)):
        for device in range(2):
            np.testing.assert_allclose(got["t"][device], want * scale)
            np.testing.assert_allclose(got["w"][device], rows.sum(0) * scale)


@pytest.mark.devices(8)
@pytest.mark.parametrize("check_vma", [True, False])
def test_psum_adds_device_after_device(check_vma):
    """In float32 (1e8 + 1) + 1 - 1e8 is 0, and the other way around it is not: the order is that of the devices. Each
    device's own ids may repeat, and be none."""
    values = jnp.array([1e8, 1, 1, -1e8])
    ids = jnp.stack([jnp.array([5, 2, 5, -1])] * 4)
    rows = jnp.stack([values, values[::-1], values, jnp.ones(4)], 1)[..., None]

    def of_one(ids, rows):
        return js.psum(js.RowSparse(ids[0], rows[0], (6, 1)), "i")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "i")
    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(of_one, mesh=mesh, in_specs=spec("i"), out_specs=spec(), check_vma=check_vma)
    got = jax.jit(run)(ids, rows)
    assert got.unique and got.ids.shape == (6,)
    assert got.ids[:2].tolist() == [2, 5] and (got.ids[2:] >= 6).all()
    twos, fives = np.float32(0), np.float32(0)
    for two, five in zip(np.float32(values[::-1]), np.float32(values + values), strict=True):
        twos, fives = twos + two, fives + five
    assert got.rows[:2, 0].tolist() == [twos, fives]


def test_a_loss_that_prints_prints_once(capsys):
    def loss(p, ids):
        jax.debug.print("loss of {}", jnp.sum(p["t"][ids]))
        return jnp.sum(p["t"][ids])

    state = TrainState.create(apply_fn=None, params={"t": jnp.ones((V, 1))}, tx=js.lazy_sgd(0.1))
    js.make_train_step(loss)(state, jnp.array([1, 2]))
    jax.effects_barrier()
    assert capsys.readouterr().out.count("loss of 2.0") == 1


@pytest.mark.parametrize("wrap", [lambda tx: tx, js.lazy], ids=["stock", "lazy"])
def test_the_loss_is_passed_on_as_value(wrap):
    """As optax's loops pass it: to a schedule that waits until the loss stops falling."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    state = TrainState.create(
        apply_fn=None, params={"t": jnp.ones((50, 2))}, tx=wrap(optax.chain(optax.sgd(0.0), plateau))
    )
    step = js.make_train_step(lambda params, ids: jnp.sum(params["t"][ids] ** 2))
    for _ in range(4):
        state, _ = step(state, jnp.array([3, 1]))
    assert optax.tree.get(state.opt_state, "scale") < 1 and state.step == 4
