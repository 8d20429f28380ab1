"""Steps within jax.set_mesh of a mesh with Explicit axes, where JAX keeps shardings in the types of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from tests.marks import slow_but
from tests.stepwise import compare

ADAM = optax.adam(0.1)
TOL = 2e-5  # sums of the same float32 numbers in another order
IDS = np.arange(32, dtype=np.int32).reshape(16, 2) % 7
V, D = 64, 4
TABLE = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def loss_fn(table, ids):
    return jnp.sum(jnp.tanh(table[ids].mean(1)) ** 2)


def step(state, ids):
    table, opt_state = state
    loss, gradient = jax.value_and_grad(loss_fn)(table, ids)
    updates, opt_state = ADAM.update(gradient, opt_state, table)
    return (optax.apply_updates(table, updates), opt_state), loss


def wanted():
    """Two steps on no mesh: a row that is not read has no gradient and no momentum, so dense Adam leaves it alone."""
    state = jnp.asarray(TABLE), ADAM.init(jnp.asarray(TABLE))
    for _ in range(2):
        state, loss = jax.jit(step)(state, IDS)
    return jax.tree.map(np.asarray, (state, loss))


def mesh_of(*kinds):
    shape, names = ((4, 2), ("data", "rows")) if len(kinds) == 2 else ((8,), ("data",))
    return jax.make_mesh(shape, names, axis_types=kinds)


def at_hand(mesh, sharded):
    """What is given to a step: made within the mesh; or split over its axes, the rows of the table too."""
    if not sharded:
        table = jnp.asarray(TABLE)
        return (table, ADAM.init(table)), IDS
    rows = NamedSharding(mesh, P("rows") if "rows" in mesh.axis_names else P())
    place = lambda x: jax.device_put(x, rows if jnp.ndim(x) else NamedSharding(mesh, P()))  # noqa: E731
    return jax.tree.map(place, (TABLE, ADAM.init(TABLE))), jax.device_put(IDS, NamedSharding(mesh, P("data")))


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
CASES = {
    "js.jit": (js.jit(step), (EXPLICIT,), False),
    "js.jit, split": (js.jit(step), (EXPLICIT, EXPLICIT), True),
    "js.jit, one axis Auto": (js.jit(step), (EXPLICIT, AUTO), True),
    "js.rowwise": (jax.jit(js.rowwise(step), donate_argnums=0), (EXPLICIT,), False),
    "js.rowwise, split": (jax.jit(js.rowwise(step), donate_argnums=0), (EXPLICIT, EXPLICIT), True),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", slow_but(["js.jit", "js.rowwise, split"], CASES))
def test_a_step(name):
    run, kinds, sharded = CASES[name]
    mesh = mesh_of(*kinds)
    with jax.set_mesh(mesh):
        state, ids = at_hand(mesh, sharded)
        before = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(2):
            state, loss = run(state, ids)
    compare(name, (state, loss), wanted(), TOL)
    is_same = jax.tree.map(lambda x, old: x.sharding.is_equivalent_to(old, x.ndim), state, before)
    assert all(jax.tree.leaves(is_same))


@pytest.mark.devices(8)
def test_a_step_on_modules():
    def train_step(model, optimizer, ids):
        loss, grads = nnx.value_and_grad(lambda model: loss_fn(model.embedding[...], ids))(model)
        optimizer.update(model, grads)
        return loss

    with jax.set_mesh(mesh_of(EXPLICIT)):
        model = nnx.Embed(V, D, embedding_init=lambda *_: jnp.asarray(TABLE), rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
        run = js.nnx.jit(train_step)
        losses = [run(model, optimizer, IDS) for _ in range(2)]
    (table, _), loss = wanted()
    compare("js.nnx.jit", (model.embedding[...], losses[1]), (table, loss), TOL)


@pytest.mark.devices(8)
def test_a_program_that_names_shardings_is_refused():
    """On the rows that a step reads its arrays have other shapes than in the program."""

    def named(table, ids):
        return table - 0.1 * jax.grad(lambda table: jnp.sum(table.at[ids].get(out_sharding=P("data")) ** 2))(table)

    with jax.set_mesh(mesh_of(EXPLICIT)), pytest.raises(ValueError, match="type Auto") as error:
        js.jit(named)(jnp.asarray(TABLE), IDS)
    assert any("Leave out_sharding= and jax.sharding.reshard out of it" in note for note in error.value.__notes__)


@pytest.mark.devices(8)
def test_a_step_is_compiled_for_the_mesh_in_context():
    """The same arguments, with and without a mesh, are no reason for the same program."""
    run = js.jit(step)
    with jax.set_mesh(mesh_of(EXPLICIT)):
        run.lower((TABLE, ADAM.init(TABLE)), IDS)
    (state, _), _ = run((jnp.asarray(TABLE), ADAM.init(jnp.asarray(TABLE))), IDS)
    assert len(state.devices()) == 1
