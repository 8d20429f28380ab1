"""Around Flax: our modules, nnx's optimizer, checkpoints, and a run that is killed and resumed."""

import functools

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import scipy.sparse
from flax import nnx
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.hlo import compiled_text, large_arrays
from tests.marks import slow_but

V, D = 30, 4
IDS = jnp.array([[3, 1, 0], [0, 0, 0], [7, 7, 29]])
X = js.from_scipy(scipy.sparse.random(5, V, 0.2, "csr", np.float32, rng=np.random.default_rng(0)))


COMBINERS = ["sum", "mean", "sqrtn", "max"]


@functools.cache
def bags():
    """For each combiner, in one program: what its module makes, and what it should be."""

    def of(combiner):
        bag = js.nn.EmbeddingBag(V, D, combiner=combiner, padding_idx=0)
        params = bag.init(jax.random.key(0), IDS)
        return {
            "table": params["params"]["embedding"],
            "out": bag.apply(params, IDS),
            "flat": bag.apply(params, IDS.ravel(), offsets=jnp.array([0, 3, 6])),
            "grads": js.grad(lambda p: bag.apply(p, IDS).sum())(params),
            "want": js.embedding_bag(params["params"]["embedding"], IDS, combiner=combiner, padding_idx=0),
            "want_table": nn.Embed(V, D).init(jax.random.key(0), IDS)["params"]["embedding"],
        }

    return jax.jit(lambda: {combiner: of(combiner) for combiner in COMBINERS})()


@pytest.mark.parametrize("combiner", COMBINERS)
def test_embedding_bag_module(combiner):
    got = bags()[combiner]
    np.testing.assert_array_equal(got["out"], got["want"])
    np.testing.assert_array_equal(got["table"], got["want_table"])  # nn.Embed's name, shape and initializer
    assert is_row_sparse(got["grads"]["params"]["embedding"])
    np.testing.assert_allclose(got["flat"], got["want"], rtol=1e-6)


def test_embedding_bag_module_in_bfloat16():
    bag = js.nn.EmbeddingBag(V, D, dtype=jnp.bfloat16)

    @jax.jit
    def run():
        params = bag.init(jax.random.key(0), IDS)
        grads = js.grad(lambda p: bag.apply(p, IDS).sum().astype(jnp.float32))(params)
        return params["params"]["embedding"], bag.apply(params, IDS), grads["params"]["embedding"]

    table, out, grads = run()
    assert table.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    assert is_row_sparse(grads) and grads.dtype == jnp.float32


@pytest.mark.parametrize("use_bias", slow_but([True], [True, False]))
def test_sparse_dense_is_dense(use_bias):
    layer, reference = js.nn.SparseDense(D, use_bias), nn.Dense(D, use_bias)

    @jax.jit
    def run(x):
        params = layer.init(jax.random.key(0), x)
        dense = x.todense()
        return {
            "params": params,
            "out": (layer.apply(params, x), layer.apply(params, dense)),
            "grads": js.grad(lambda p: jnp.sum(layer.apply(p, x) ** 2))(params)["params"]["kernel"],
            "want_params": reference.init(jax.random.key(0), dense),
            "want": reference.apply(params, dense),
            "want_grads": jax.grad(lambda p: jnp.sum(layer.apply(p, dense) ** 2))(params)["params"]["kernel"],
        }

    with jax.numpy_rank_promotion("allow"):
        got = run(X)
    chex.assert_trees_all_equal(got["params"], got["want_params"])
    for out in got["out"]:
        np.testing.assert_allclose(out, got["want"], rtol=1e-5, atol=1e-6)
    assert is_row_sparse(got["grads"])
    np.testing.assert_allclose(got["grads"].todense(), got["want_grads"], rtol=1e-4, atol=1e-5)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(D, 1, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.dropout(self.embed(ids).mean(1)))[:, 0]


@pytest.mark.slow
def test_nnx_optimizer_takes_row_sparse_gradients():
    """Split and merge, dropout included: the module is taken apart outside the loss and put together inside."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    before = np.array(model.embed.embedding[...])
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, rest, ids):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.sum(model(ids) ** 2), nnx.state(model, nnx.Not(nnx.Param))

    (_, rest), grads = jax.jit(js.value_and_grad(loss_fn, has_aux=True))(params, rest, IDS)
    assert any(map(is_row_sparse, jax.tree.leaves(grads, is_leaf=is_row_sparse)))
    optimizer.update(model, grads)
    nnx.update(model, rest)
    after = np.array(model.embed.embedding[...])
    touched = np.unique(IDS)
    untouched = np.setdiff1d(np.arange(V), touched)
    np.testing.assert_array_equal(after[untouched], before[untouched])
    assert (after[touched] != before[touched]).any()  # dropout may leave some columns alone


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@functools.cache
def program(process):
    """The step and the optimizer: each process compiles its own."""

    def loss_fn(params, batch):
        return js.weighted_mean((params["t"][batch.x].sum(1) @ params["w"] - batch.y) ** 2, batch.weight)

    tx = js.lazy_adamw(optax.cosine_decay_schedule(0.1, 40), before=optax.clip_by_global_norm(1.0))
    return js.make_train_step(loss_fn), tx


def job(process=0):
    ids = np.random.default_rng(0).zipf(1.3, (50, 3)) % V
    y = np.random.default_rng(1).normal(size=50).astype(np.float32)
    params = {"t": jnp.asarray(np.random.default_rng(2).normal(size=(V, D)), jnp.float32), "w": jnp.ones(D)}
    step, tx = program(process)
    batches = js.batches(ids, y, batch_size=8, shuffle=True, seed=3)
    return step, TrainState.create(apply_fn=None, params=params, tx=tx), batches


def run(step, state, batches, number):
    """Goes on for a number of steps, over as many epochs as that takes."""
    while number:
        for batch in batches:
            state, _ = step(state, batch)
            number -= 1
            if not number:
                break
    return state


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize("how", slow_but(["flax"], ["orbax", "flax"]))
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(how, tmp_path):
    want = run(*job(), 24)
    step, state, batches = job()
    state = run(step, state, batches, 10)  # in the middle of the second epoch
    position = batches.state
    assert position["epoch"] == 1 and position["step"] == 3
    saved = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
    step, fresh, batches = job(process=1)
    target = {"params": fresh.params, "opt_state": fresh.opt_state, "step": fresh.step}
    if how == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.asarray, target))
    else:
        restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(saved))
    batches.state = position
    got = run(step, fresh.replace(**restored), batches, 14)
    chex.assert_trees_all_equal(got.params, want.params)
    chex.assert_trees_all_equal(got.opt_state, want.opt_state)
    assert int(got.step) == 24


ADAM = js.lazy_adam(0.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators may fuse it differently")
@pytest.mark.parametrize("reduce", slow_but([jnp.sum], [jnp.sum, jnp.mean, jnp.max]))
def test_reads_that_are_only_summed_make_no_array_of_them_all(reduce):
    batch_size, length, dim = 128, 16, 32

    class Bag(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return reduce(nn.Embed(1000, dim)(ids), axis=1)

    ids = jnp.zeros((batch_size, length), jnp.int32)
    params = {"params": {"Embed_0": {"embedding": jnp.zeros((1000, dim))}}}
    state = TrainState.create(apply_fn=None, params=params, tx=ADAM)
    text = compiled_text(js.make_train_step(lambda p, ids: jnp.sum(Bag().apply(p, ids) ** 2)), state, ids)
    made = large_arrays(text, batch_size * length * dim)
    assert bool(made) == (reduce is jnp.max) and not any("concatenate" in each for each in made)


def test_abstract_init():
    big = jax.eval_shape(ADAM.init, {"t": jax.ShapeDtypeStruct((10**9, 64), jnp.float32)})
    assert optax.tree_utils.tree_get(big, "mu")["t"].shape == (10**9, 64)


@pytest.mark.slow
def test_partitioned_linen_parameters():
    """flax gives a box around a parameter, with its axes' names, to every part of the state that is made like it."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ("vocab", "embed"))
    model, tx = nn.Embed(V, D, embedding_init=init), js.lazy_adam(0.1, untouched="replay")

    def create(key):
        return TrainState.create(apply_fn=None, params=model.init(key, IDS)["params"], tx=tx)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("x", "y"))
    abstract = nn.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
    shardings = nn.logical_to_mesh_sharding(abstract, mesh, [("vocab", "x"), ("embed", "y")])
    with jax.set_mesh(mesh):
        state = nn.unbox(jax.jit(create, out_shardings=shardings)(jax.random.key(0)))
        before = np.asarray(state.params["embedding"])
        step = js.make_train_step(lambda p, ids: jnp.sum(model.apply({"params": p}, ids) ** 2))
        state, metrics = step(state, IDS)
    assert metrics["rows_touched"] == 5
    changed = np.flatnonzero(np.any(np.asarray(state.params["embedding"]) != before, axis=1))
    assert changed.tolist() == [0, 1, 3, 7, 29]


@pytest.mark.parametrize("tx", [js.lazy(optax.adam(0.1)), js.lazy_adam(0.1, untouched="replay")])
def test_partitioned_nnx_parameters(tx):
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.ones, ("x", "y"))
        model = nnx.Embed(V, D, embedding_init=init, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model, nnx.Param)
        before = np.asarray(params["embedding"][...])

        @jax.jit
        def step(params):
            state = tx.init(params)
            state = jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))
            grads = js.grad(lambda p: jnp.sum(nnx.merge(graph, p)(IDS)))(params)
            updates, _ = tx.update(grads, state, params)
            return optax.apply_updates(params, updates)

        new = step(params)
        changed = np.flatnonzero(np.any(np.asarray(new["embedding"][...]) != before, axis=1))
        assert changed.tolist() == [0, 1, 3, 7, 29]
        nnx.Optimizer(model, tx, wrt=nnx.Param)


class WithStatistics(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(V, D, rngs=rngs), nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, ids):
        return self.norm(self.embed(ids)).sum()


def test_what_changes_a_module_is_refused():
    """The module that a function gets is another one: what changes in it would be lost."""
    model = WithStatistics(nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"changes .*mean.* of its WithStatistics, which would be lost.*js\.nnx\.jit"):
        js.jit(lambda scale, model, ids: scale + model(ids))(1.0, model, IDS)


def test_a_module_is_refused_where_it_would_be_torn_apart():
    model = Model(nnx.Rngs(0))
    got = r"Got a Model, whose leaf \.dropout\.rngs\.count is no parameter, instead\. Use js\.nnx\.value_and_grad"
    for function in (js.value_and_grad, js.grad, js.explain):
        with pytest.raises(TypeError, match=got):
            function(lambda model, ids: model(ids).sum())(model, IDS)
    with pytest.raises(TypeError, match=r"a Linear, whose leaf \['b'\]\.kernel is in a module"):
        js.grad(lambda p, x: p["b"](x).sum() * p["a"])({"a": 1.0, "b": model.head}, jnp.ones((1, D)))
    with pytest.raises(TypeError, match=r"Use js\.nnx\.value_and_grad"):  # where the step as a whole is row-sparse, too
        js.jit(lambda p, ids: js.grad(lambda m: m(ids).sum() * p)(model))(1.0, IDS)
    graph, params = nnx.split(model.embed)
    grads = js.grad(lambda params, ids: nnx.merge(graph, params)(ids).sum())(params, IDS)
    assert is_row_sparse(grads["embedding"].get_value())


def test_what_is_no_parameter_is_named():
    with pytest.raises(TypeError, match=r"a leaf of dtype int32 at \['a'\]\['b'\]"):
        js.grad(lambda p: jnp.sum(p["a"]["b"]))({"a": {"b": jnp.zeros(3, int)}})
    with pytest.raises(TypeError, match=r"a bool at \['a'\].*eqx\.partition"):
        js.grad(lambda p: 0.0)({"a": True})
