"""Tables of one shape in one array, read by table and row: row-sparse in both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.trace import planning
from jaxsparse.train import grad
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but
from tests.stepwise import copied

F, V, D = 3, 40, 4
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, V, (5, F)), jnp.int32).at[0].set(jnp.array([0, V - 1, 0]))
FIELDS = jnp.arange(F)[None]
OFFSETS = FIELDS * V
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))


def squares(x):
    return jnp.sum(x**2)


READS = {
    "index": lambda t, i: squares(t[FIELDS, i]),
    "reshape": lambda t, i: squares(t.reshape(F * V, D)[i + OFFSETS]),
    "reshape, -1, jnp.take": lambda t, i: squares(jnp.take(t.reshape(-1, D), i + OFFSETS, axis=0)),
    "a bag": lambda t, i: squares(js.embedding_bag(t.reshape(F * V, D), i + OFFSETS, combiner="mean")),
    "vmap": lambda t, i: squares(jax.vmap(lambda t, i: t[i], (0, 1), 1)(t, i)),
    "two vmaps": lambda t, i: squares(jax.vmap(lambda i: jax.vmap(lambda t, i: t[i])(t, i))(i)),
    "one table": lambda t, i: squares(t[1, i]),
    "scalars": lambda t, i: squares(jax.vmap(lambda k: t[k % F, k])(i.reshape(-1))),
    "negative": lambda t, i: squares(t[-1 - FIELDS, i - V]),
    "narrow": lambda t, i: squares(t[FIELDS.astype(jnp.uint8), i.astype(jnp.uint8)]),
    "clipped": lambda t, i: squares(t.at[FIELDS * 2 - 1, i * 3 - 9].get(mode="clip")),
    "filled": lambda t, i: squares(t.at[FIELDS * 2 - 1, i * 3 - 9].get(mode="fill", fill_value=1)),
    "a part of a row": lambda t, i: squares(t[FIELDS, i, 1]) + squares(t[FIELDS, i, :2]),
    "cast": lambda t, i: squares(t.astype(jnp.bfloat16)[FIELDS, i].astype(jnp.float32)),
    "scaled": lambda t, i: squares((t * jnp.arange(1.0, D + 1)[None, None])[FIELDS, i]),
    "normalised": lambda t, i: squares(jnp.cos(t / jnp.linalg.norm(t, axis=-1, keepdims=True))[FIELDS, i]),
    "in a jit": jax.jit(lambda t, i: squares(t[FIELDS, i])),
    "twice": lambda t, i: squares(t[FIELDS, i]) + squares(t.reshape(F * V, D)[i[:, 0]]),
    "a slice": lambda t, i: squares(jax.lax.dynamic_slice(t, (1, i[1, 0], 0), (1, 1, D))),
    "squeezed": lambda t, i: squares(t[FIELDS, i]) + squares(jnp.squeeze(t.sum(-1, keepdims=True), -1)[FIELDS, i]),
}


QUICK = {"index", "reshape", "vmap", "filled", "scalars"}


def loss_fn(params, ids):
    return sum(READS[name](table, ids) for name, table in params.items())


def step(state, ids, loss_fn=loss_fn, tx=TX):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, ids)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


@functools.cache
def states(quick):
    """After two steps of js.jit, and after two dense ones with rows put back that the second does not read."""
    names = [name for name in READS if (name in QUICK) == quick]
    params = {name: jnp.asarray(RNG.normal(size=(F, V, D)), jnp.float32) for name in names}
    before = params, TX.init(params)
    run, dense = js.jit(step), jax.jit(step)
    (got, _), (first, _) = run(copied(before), IDS), dense(before, IDS)
    read = jax.tree.map(lambda g: (g != 0).any(-1, keepdims=True), jax.jit(jax.grad(loss_fn))(before[0], IDS))

    def put_back(new, old):
        clip, (adam, *others) = new[1]
        _, (was, *_) = old[1]
        back = functools.partial(jax.tree.map, lambda new, old, read: jnp.where(read, new, old))
        adam = adam._replace(mu=back(adam.mu, was.mu, read), nu=back(adam.nu, was.nu, read))
        return back(new[0], old[0], read), (clip, (adam, *others))

    want = put_back(first, before)
    (got, got_loss), (after, want_loss) = run(got, IDS), dense(want, IDS)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    return got, put_back(after, want)


@pytest.mark.parametrize("name", slow_but(QUICK, READS))
def test_steps(name):
    got, want = states(name in QUICK)
    for part in (lambda s: s[0], lambda s: s[1][1][0].mu, lambda s: s[1][1][0].nu):
        tol = {"rtol": 2e-2, "atol": 2e-2} if name == "cast" else {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(part(got)[name], part(want)[name], **tol)


@pytest.mark.parametrize("name", slow_but(QUICK | {"a bag"}, READS))
def test_read_by_rows(name):
    table = jnp.ones((F, V, D))
    said = js.explain(js.jit(functools.partial(step, loss_fn=READS[name])))((table, TX.init(table)), IDS)["[0]"]
    assert said.row_sparse and said.num_rows == F * V
    assert all("test_stacked.py" in line or "embedding.py" in line for line in said.reads)


def test_linen_embeddings_under_nn_vmap():
    embed = nn.vmap(
        nn.Embed, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1, axis_size=F
    )
    model = embed(V, D)
    params = model.init(jax.random.key(0), IDS)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=js.lazy(optax.adam(0.1)))
    train_step = js.make_train_step(lambda p, i: squares(model.apply(p, i)))
    state, metrics = train_step(copied(state), IDS)
    new, old = (p["params"]["embedding"] for p in (state.params, params))
    read = np.zeros((F, V), bool)
    read[np.arange(F), IDS] = True
    assert metrics["rows_touched"] == read.sum()
    np.testing.assert_array_equal(np.any(new != old, -1), read)


def test_nothing_with_all_rows_is_made():
    table = jnp.ones((F, 2000, D))
    run = js.jit(functools.partial(step, loss_fn=READS["index"]))
    text = compiled_by_default(run.lower((table, TX.init(table)), IDS)).as_text()
    assert not large_arrays(text, 2000)


def scanned(t, ids):
    return jax.lax.scan(lambda total, i: (total + squares(t[FIELDS, i[None]]), None), 0.0, ids)[0]


LEFT = {
    "in a scan": (scanned, {}, "that is in a scan"),
    "rows=": (READS["index"], {"rows": np.array([0, 2])}, "rows= names rows of its first axis"),
    "of one table, all": (
        lambda t, i: squares(t[FIELDS, i]) + squares(t[i[0, 0] % F]),
        {},
        "reshape at .*test_stacked.py",
    ),
}


@pytest.mark.parametrize("name", slow_but({"rows="}, LEFT))
def test_what_is_read_by_table_all_the_same_is_announced(name):
    loss_fn, options, why = LEFT[name]
    table = jnp.ones((F, V, D))
    start = table, TX.init(table)
    run = functools.partial(step, loss_fn=loss_fn)
    with pytest.warns(UserWarning, match=rf"\[0\] is read by table and row, and each of its tables.*{why}"):
        got = js.jit(run, **options)(copied(start), IDS)
    want = jax.jit(run)(start, IDS)
    trained = options.get("rows", np.arange(F))
    np.testing.assert_allclose(got[0][0][trained], want[0][0][trained], rtol=1e-4)


@pytest.mark.parametrize("name", slow_but(QUICK, [name for name in READS if name != "a slice"]))
def test_a_gradient_alone_has_whole_tables_and_says_so(name, monkeypatch):
    monkeypatch.setattr(grad, "_WARNED", set())
    params, loss_fn = {"t": jnp.ones((F, V, D)), "w": jnp.ones((F, V))}, READS[name]
    with pytest.warns(UserWarning, match=r"\['t'\] \(3, 40, 4\) has whole tables .*at \S+\.py.*js\.jit") as warned:
        got = js.grad(lambda p, i: loss_fn(p["t"], i) + jnp.sum(p["w"]))(params, IDS)
    assert len(warned) == 1
    want = jax.grad(lambda t: loss_fn(t, IDS))(params["t"])
    np.testing.assert_allclose(jnp.zeros((F, V, D)) + got["t"], want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("road", slow_but({"replay"}, ["replay", "average"]))
def test_optimizers_that_ask_which_rows(road, monkeypatch):
    """They keep something for each row of the first axis: each table is one row."""
    made = {
        "replay": lambda: (js.lazy_adam(0.1, untouched="replay"), js.flush),
        "average": lambda: (js.lazy(js.params_ema(optax.adam(0.1), 0.9)), lambda state: state),
    }
    tx, after = made[road]()
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    state = TrainState.create(apply_fn=None, params={"t": jnp.ones((F, V, D))}, tx=tx)
    want = TrainState.create(apply_fn=None, params={"t": jnp.ones((F, V, D))}, tx=optax.adam(0.1))
    said = r"\['t'\] is read by table and row, and each of its tables is one row here: the optimizer keeps"
    with pytest.warns(UserWarning, match=said):
        state, _ = js.make_train_step(lambda p, i: READS["index"](p["t"], i))(state, IDS)
    want = want.apply_gradients(grads=jax.grad(lambda p: READS["index"](p["t"], IDS))(want.params))
    np.testing.assert_allclose(after(state).params["t"], want.params["t"], rtol=1e-5)


WHOLE = {
    "product": lambda t: t @ jnp.ones((D, D)),
    "sum of tables": lambda t: t.sum(0),
    "squares of each table": lambda t: jnp.einsum("fvd,fvd->f", t, t),
    "times its table's number": lambda t: t * jnp.arange(F)[:, None, None],
    "other axes first": lambda t: jax.lax.broadcast_in_dim(t, (F, V, F, V, D), (2, 3, 4)),
}


@pytest.mark.parametrize("name", slow_but({"sum of tables"}, WHOLE))
def test_used_as_a_whole(name, monkeypatch):
    """It is dense, as under jax.jit."""
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    table = jnp.ones((F, V, D))
    loss_fn = lambda t, i: squares(t[FIELDS, i]) + jnp.sum(jnp.tanh(WHOLE[name](t)))  # noqa: E731
    run = functools.partial(step, loss_fn=loss_fn)
    start = table, TX.init(table)
    with pytest.warns(UserWarning):
        got = js.jit(run)(copied(start), IDS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got, jax.jit(run)(start, IDS))


def test_a_feature_without_ids():
    """The step is traced again with one, to see what it would read."""
    table = jnp.ones((F, V, D))
    run = functools.partial(step, loss_fn=lambda t, i: READS["index"](t, i[0]) + READS["index"](t, i[1]))
    start, ids = (table, TX.init(table)), (IDS, IDS[:0])
    said = js.explain(js.jit(run))(start, ids)["[0]"]
    assert said.row_sparse and said.num_rows == F * V
    got, want = js.jit(run)(copied(start), ids), jax.jit(run)(start, ids)
    read = np.zeros((F, V, 1), bool)
    read[FIELDS, IDS] = True
    np.testing.assert_allclose(got[0][0], np.where(read, want[0][0], table), rtol=1e-5)
