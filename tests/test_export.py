"""A step is lowered for other platforms than the one it is on: choices by platform are made when it is lowered."""

import collections
import dataclasses
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.ops.rows import add_in_order, gathered_once
from tests.marks import slow_but

V, D, B, L = 20_000, 64, 128, 40
PLATFORMS = ["cpu", "tpu", "cuda"]
TX = js.lazy(optax.adam(0.1))


def make_state():
    params = {"table": jnp.ones((V, D)), "head": jnp.full(D, 0.1)}
    return TrainState.create(apply_fn=None, params=params, tx=TX)


def make_batch(known):
    rng = np.random.default_rng(0)
    ids, y = rng.integers(0, V, (B, L)), rng.normal(size=B).astype(np.float32)
    batch = next(iter(js.batches(ids, y, batch_size=B, num_rows=V)))
    return batch if known else dataclasses.replace(batch, distinct=None)


def loss_fn(params, batch):
    return jnp.mean((params["table"][batch.x].mean(1) @ params["head"] - batch.y) ** 2)


def stock_step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


def two_words(state, batch):
    loss, grads = js.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


STEPS = {
    "js.jit": lambda: js.jit(stock_step),
    "js.make_train_step": lambda: js.make_train_step(loss_fn),
    "two words": lambda: jax.jit(two_words, donate_argnums=0),
}


def operations(exported):
    return collections.Counter(re.findall(r"stablehlo\.(\w+)", exported.mlir_module()))


def exported_for(step, *args):
    return {name: operations(jax.export.export(step, platforms=[name])(*args)) for name in PLATFORMS}


QUICK = [("js.jit", True)]


@pytest.mark.parametrize(("name", "known"), slow_but(QUICK, itertools.product(STEPS, [True, False])))
def test_each_platform_gets_its_own_way(name, known):
    """On CPU rows are written in pieces, in a loop, as they are copied in words, and distinct ids are found by hashing;
    elsewhere everything is done at once, and ids are sorted."""
    found = exported_for(STEPS[name](), make_state(), make_batch(known))
    cpu, tpu, cuda = (found[platform] for platform in PLATFORMS)
    assert cpu["while"] and not tpu["while"]
    assert not cpu["sort"] and tpu["sort"] and cuda["sort"]
    for operation in ("scatter", "bitcast_convert", "or", "sort"):  # all that chooses here takes TPUs and GPUs for one
        assert tpu[operation] == cuda[operation], operation
    assert cpu["bitcast_convert"] > tpu["bitcast_convert"]


def test_rows_are_copied_in_words_and_once_on_cpu_only():
    x, ids = jnp.ones((9, 4)), jnp.array([3, 1])

    def copied(x, ids):
        return gathered_once(lambda gather: [gather(x, ids)], [jax.ShapeDtypeStruct((2, 4), x.dtype)], ids[0] >= 0)

    found = exported_for(jax.jit(copied), x, ids)
    assert found["cpu"]["bitcast_convert"] == 2 and found["cpu"]["or"] > found["tpu"]["or"]
    assert found["cpu"]["case"] == found["tpu"]["case"] + 1 and found["tpu"] == found["cuda"]
    assert not found["tpu"]["bitcast_convert"]
    jaxpr = jax.make_jaxpr(copied)(x, ids)
    assert jnp.array_equal(jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x, ids)[0], x[ids])


def test_a_tpu_gathers_rows_once():
    """For the loss and for the update. A GPU gathers them where they are used. Run here, what is made for a TPU does
    what is made for a CPU, and the rows that are not read keep their bits."""
    batch, step = make_batch(True), js.jit(stock_step)
    table = re.escape(f"(tensor<{V}x{D}xf32>")
    module = {
        name: jax.export.export(step, platforms=[name])(make_state(), batch).mlir_module() for name in PLATFORMS[1:]
    }
    found = {name: len(re.findall(rf'"stablehlo.gather".*: {table}', text)) for name, text in module.items()}
    assert found["tpu"] == 3 and found["cuda"] == 4, found
    anywhere = [jax.export.DisabledSafetyCheck.platform()]
    exported = jax.export.export(step, platforms=["tpu"], disabled_checks=anywhere)(make_state(), batch)
    got, want = jax.tree.leaves(exported.call(make_state(), batch)), jax.tree.leaves(step(make_state(), batch))
    for x, y, old in zip(got, want, [*jax.tree.leaves(make_state()), None], strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-9)
        if x.ndim == 2:
            unread = np.setdiff1d(np.arange(V), np.asarray(batch.x))
            assert np.array_equal(np.asarray(x)[unread], np.asarray(old)[unread])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platforms", "known"), slow_but([(("cpu",), True)], [(("cpu",), True), (("cpu", "tpu"), False)])
)
def test_an_exported_step_is_the_step(known, platforms):
    batch, step = make_batch(known), js.jit(stock_step)
    exported = jax.export.export(step, platforms=list(platforms))(make_state(), batch)
    got, want = exported.call(make_state(), batch), step(make_state(), batch)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5)


def test_an_exported_step_writes_in_place():
    batch, state = make_batch(True), make_state()
    module = jax.export.export(js.jit(stock_step))(state, batch).mlir_module()
    assert len(re.findall(r"jax\.buffer_donor|tf\.aliasing_output", module)) == len(jax.tree.leaves(state))


def flush_of_replayed():
    """And a state for it."""
    tx = js.lazy_adamw(0.1, untouched="replay")
    state = make_state()
    return jax.jit(js.flush, donate_argnums=0), (TrainState.create(apply_fn=None, params=state.params, tx=tx),)


@pytest.mark.parametrize("name", slow_but(["js.jit"], [*STEPS, "js.flush"]))
def test_an_exported_program_makes_nothing_as_large_as_a_table(name):
    """For a TPU or a GPU, too: rows of the table and its two slots are scattered into them, once. Flush has a loop for
    each parameter."""
    step, args = flush_of_replayed() if name == "js.flush" else (STEPS[name](), (make_state(), make_batch(True)))
    table = f"tensor<{V}x{D}xf32>"
    for platform in PLATFORMS[1:]:
        exported = jax.export.export(step, platforms=[platform])(*args)
        module = re.sub(r" loc\(.*\)$", "", exported.mlir_module(), flags=re.M)
        made = re.findall(rf'= "?stablehlo\.(\w+).* {table}$', module, re.M)  # by an operation without regions
        scattered = re.findall(rf"^ *\}}\) : \({table}, tensor<\d+x1xi32>, .*-> {table}$", module, re.M)
        assert (made, len(scattered)) == ([], 3), platform
        if name == "js.flush":
            assert operations(exported)["while"] == len(jax.tree.leaves(args[0].params))
        assert len(re.findall(r"jax\.buffer_donor|tf\.aliasing_output", module)) == len(jax.tree.leaves(args[0]))


def test_what_is_traced_takes_the_arguments_of_the_step():
    """By name as well, and without those that are static."""

    def step(rate, params, opt_state, *, ids):
        grads = jax.grad(lambda table: jnp.sum(table[ids] ** 2))(params)
        return params - rate * grads, opt_state + 1

    params, count, ids = jnp.ones((6, 2)), jnp.zeros((6, 2)), jnp.array([1, 4, 1])
    traced = js.jit(step, static_argnums=0).trace(0.25, params=params, opt_state=count, ids=ids)
    compiled = traced.lower().compile()
    assert traced.fun_name == "step"
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == params.nbytes + count.nbytes
    params, count = compiled(params, count, ids=ids)
    assert params[:, 0].tolist() == [1, 0, 1, 1, 0.5, 1] and bool(jnp.all(count == 1))


def test_traced_in_another_trace():
    step = js.jit(lambda table, ids: table - 0.5 * jax.grad(lambda table: jnp.sum(table[ids]))(table))
    made = []

    def outer(table, ids):
        made.append(step.trace(table, ids).lower().as_text())
        return step(table, ids)

    out = jax.jit(outer)(jnp.ones((6, 2)), jnp.array([1, 4, 1]))
    assert out[:, 0].tolist() == [1, 0, 1, 1, 0.5, 1] and "scatter" in made[0]


def test_a_gpu_adds_many_rows_to_few_in_the_order_of_these():
    """27 or more for each. 21 MB of them are added as they come; 105 MB in order, by one more sort than on TPU."""

    def sorts(length):
        ids = np.random.default_rng(0).integers(0, 3000, (2048, length))
        batch = next(iter(js.batches(ids, np.zeros(2048, np.float32), batch_size=2048, num_rows=V)))
        found = exported_for(js.make_train_step(loss_fn), make_state(), batch)
        return found["cuda"]["sort"] - found["tpu"]["sort"]

    assert sorts(40) == 0 and sorts(200) == 1


def test_rows_added_in_order():
    rng = np.random.default_rng(0)
    place = rng.integers(0, 7, (40, 3)).astype(np.int32)  # 5 and 6 are outside
    rows = rng.normal(size=(40, 3, 2)).astype(np.float32)
    want = np.ones((5, 2))
    for at, row in zip(place.ravel(), rows.reshape(-1, 2), strict=True):
        if at < 5:
            want[at] += row
    got = add_in_order(jnp.ones((5, 2)), jnp.asarray(place), jnp.asarray(rows))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
