"""Row-sparse gradients: which leaves get them, and that densified they are jax.grad's."""

import dataclasses
import functools
import pathlib
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.flags import DEFAULTS
from tests.marks import slow_but
from tests.stepwise import TOGETHER

V, D = 11, 4
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)), jnp.float32)
OTHER = jnp.asarray(np.random.default_rng(1).normal(size=(V, D)), jnp.float32)
IDS = jnp.array([[3, 1, 3], [0, 10, 7]])
WEIGHTS = jnp.asarray(np.random.default_rng(2).normal(size=IDS.shape), jnp.float32)
X = js.from_scipy(scipy.sparse.random(6, V, 0.3, "csr", np.float32, rng=np.random.default_rng(3)), nse=25)


def dense(tree):
    return jax.tree.map(lambda g: g.todense() if is_row_sparse(g) else g, tree, is_leaf=is_row_sparse)


densified = jax.jit(lambda g: g.todense())


def sparse_leaves(grads):
    """Paths of the leaves that ARE RowSparse."""
    leaves = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_row_sparse)[0]
    return {jax.tree_util.keystr(path) for path, g in leaves if is_row_sparse(g)}


def both(fun, *args):
    """js.value_and_grad and jax.value_and_grad."""
    return js.value_and_grad(fun)(*args), jax.value_and_grad(fun)(*args)


def hold_equal(got, want, expect, rtol=1e-5):
    """Values and gradients as of `both`, row-sparse ones at `expect` and nowhere else."""
    (value, grads), (want_value, want_grads) = got, want
    assert sparse_leaves(grads) == set(expect)
    np.testing.assert_allclose(value, want_value, rtol=rtol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), dense(grads), want_grads)
    jax.tree.map(lambda a, b: (a.dtype == b.dtype) or pytest.fail("dtype"), dense(grads), want_grads)


def assert_as_jax(fun, args, expect, rtol=1e-5, **options):
    hold_equal(*jax.jit(lambda args: both(fun, *args), **options)(args), expect, rtol)


def in_few_programs(cases):
    """`both` of each case, a function of TABLE: few programs compile in a fraction of the time of many, or of one."""

    def one(name, table):
        try:
            return both(cases[name], table)
        except Exception as error:
            error.add_note(f"in case {name}")
            raise

    names, out = list(cases), {}
    for i in range(0, len(names), TOGETHER):
        some = names[i : i + TOGETHER]
        with jax.numpy_rank_promotion("allow"):
            out |= jax.jit(lambda table, some=some: {name: one(name, table) for name in some})(TABLE)
    return out


def squares(x):
    return jnp.sum(jnp.sin(x) ** 2)


REMAP = jnp.array([5, 0, 3, 3, 1, 4, 2, 6, 0, 1, 9])  # another table, of ids

READS = {
    "index": lambda t: squares(t[IDS]),
    "index_negative": lambda t: squares(t[IDS - V // 2]),
    "take": lambda t: squares(jnp.take(t, IDS, axis=0)),
    "take_clip": lambda t: squares(jnp.take(t, IDS + 5, axis=0, mode="clip")),
    "take_wrap": lambda t: squares(jnp.take(t, IDS + 5, axis=0, mode="wrap")),
    "take_fill_0": lambda t: squares(jnp.take(t, IDS + 5, axis=0, fill_value=0)),
    "at_get": lambda t: squares(t.at[IDS + 5].get(mode="fill", fill_value=0)),
    "at_get_clip": lambda t: squares(t.at[IDS + 5].get(mode="clip")),
    "out_of_bounds": lambda t: squares(t[IDS + 5]),
    "int8": lambda t: squares(t[IDS.astype(jnp.int8)]),
    "uint32": lambda t: squares(t[IDS.astype(jnp.uint32)]),
    "lookup": lambda t: squares(js.embedding_lookup(t, IDS)),
    "lookup_padding": lambda t: squares(js.embedding_lookup(t, IDS, padding_idx=3)),
    "bag_sum": lambda t: squares(js.embedding_bag(t, IDS, combiner="sum")),
    "bag_mean_weights": lambda t: squares(js.embedding_bag(t, IDS, weights=WEIGHTS**2, combiner="mean")),
    "bag_sqrtn_padding": lambda t: squares(js.embedding_bag(t, IDS, combiner="sqrtn", padding_idx=3)),
    "bag_max": lambda t: squares(js.embedding_bag(t, IDS, combiner="max")),
    "bag_offsets": lambda t: squares(js.embedding_bag(t, IDS.ravel(), offsets=jnp.array([0, 2, 2]), combiner="mean")),
    "bag_segments": lambda t: squares(
        js.embedding_bag(t, IDS.ravel(), segment_ids=jnp.array([2, 0, 0, 9, 2, 2]), num_bags=3, combiner="sqrtn")
    ),
    "bag_long": lambda t: squares(js.embedding_bag(t, jnp.tile(IDS, (1, 30)), combiner="mean")),
    "bag_empty": lambda t: squares(js.embedding_bag(t, IDS[:, :0], combiner="mean")),
    "dot": lambda t: squares(js.dot(X, t)),
    "twice": lambda t: squares(t[IDS]) + squares(js.embedding_bag(t, IDS, combiner="sum")) + squares(t[IDS[0]]),
    "cast": lambda t: squares(t.astype(jnp.bfloat16)[IDS].astype(jnp.float32)),
    "cast_bag": lambda t: squares(js.embedding_bag(t.astype(jnp.bfloat16), IDS).astype(jnp.float32)),
    "mean_of_reads": lambda t: squares(t[IDS].mean(1)),
    "max_of_take": lambda t: squares(jnp.max(jnp.take(t, IDS, axis=0), axis=1)),
    "sum_in_a_jit": lambda t: squares(jax.jit(lambda x: jax.jit(jnp.mean, static_argnums=1)(x, 1))(t[IDS])),
    "sum_over_the_other": lambda t: squares(t[IDS].sum(0)) + squares(t[IDS].sum((0, 1))),
    "sum_and_reads": lambda t: (lambda x: squares(x.sum(1)) + squares(x))(t[IDS]),
    "nested_jit": lambda t: jax.jit(lambda t, i: squares(jax.jit(jnp.tanh)(t[i])))(t, IDS),
    "remat": lambda t: jax.checkpoint(lambda t, i: squares(t[i] * 2))(t, IDS),
    "remat_of_jit": jax.checkpoint(jax.jit(lambda t: squares(js.embedding_bag(t, IDS)) + squares(t[IDS]))),
    "vmap_ids": lambda t: squares(jax.vmap(lambda i: t[i] + 1)(IDS)),
    "vmap_ids_out_axis": lambda t: squares(jax.vmap(lambda i: t[i], out_axes=2)(IDS)),
    "vmap_bag": lambda t: squares(
        jax.vmap(lambda i: js.embedding_bag(t, i, combiner="sum"))(jnp.stack([IDS, IDS + 1]))
    ),
    "vmap_over_tables": lambda t: squares(jax.vmap(lambda u: u[IDS])(jnp.stack([t, 2 * t]))),
    "vmap_model": lambda t: jnp.sum(jax.vmap(lambda i: squares(t[i].mean(0)))(IDS)),
    "stopped_and_read": lambda t: squares(t[IDS] * jax.lax.stop_gradient(t)[IDS]),
    "stopped_and_used_whole": lambda t: squares(t[IDS]) * jnp.sum(jax.lax.stop_gradient(t) ** 2),
    "ids_computed": lambda t: squares(t[(IDS * 7 + 3) % V]),
    "one_row": lambda t: jax.jit(lambda t, i: squares(t[i]))(t, 3),
    "one_row_clamped": lambda t: squares(jax.lax.dynamic_slice(t, (V - 1, 0), (2, D))),
    "fixed_rows": lambda t: squares(t[IDS] * t[0]) + squares(t[-2:]) + squares(t[1:5:2, 1:]) + t[2, 0] + squares(t[:0]),
    "fixed_row_squeezed": lambda t: squares(jnp.squeeze(t[IDS] @ t[:1].T, -1)),
    "fixed_columns": lambda t: squares(t[IDS] + t.T[:, 3] * jnp.cos(t)[4]),
    "fixed_in_regions": lambda t: (
        jax.lax.scan(lambda c, i: (c + squares(t[i] + t[1]), 0), 0.0, IDS)[0]
        + jax.checkpoint(lambda t: squares(jnp.sin(t[3:5])))(t)
        + jax.lax.cond(IDS[0, 0] > 2, lambda: squares(t[2:4]), lambda: 0.0)
    ),
    "scan": lambda t: jax.lax.scan(lambda c, i: (c + squares(t[i]), jnp.sum(t[i[0]])), 0.0, IDS)[0],
    "scan_computed_ids": lambda t: jax.lax.scan(
        lambda c, i: (c + squares(t[jnp.clip(i + 1, 2, 5)] * t[REMAP[i]]), None), 0.0, IDS
    )[0],
    "scan_invariant": lambda t: jax.lax.scan(lambda c, i: (c, squares(c[i])), t, IDS)[1].sum(),
    "scan_ys": lambda t: squares(jax.lax.scan(lambda c, i: (c + 1, t[i] * c), 1.0, IDS, reverse=True)[1]),
    "scan_carried_ids": lambda t: jax.lax.scan(lambda c, _: ((c * 3 + 1) % V, t[c]), IDS[0], None, length=4)[1].sum(),
    "scan_of_bags": lambda t: squares(
        jax.lax.scan(lambda c, i: (c, js.embedding_bag(t, i)), 0, jnp.stack([IDS] * 2))[1]
    ),
    "scan_of_scan": lambda t: jax.lax.scan(
        lambda c, i: (jax.lax.scan(lambda d, k: (d + squares(t[k]), None), c, i)[0], None), 0.0, IDS
    )[0],
    "fori": lambda t: jax.lax.fori_loop(0, 2, lambda k, c: c + squares(t[IDS[k]]), 0.0),
    "map": lambda t: squares(jax.lax.map(lambda i: t[i].sum(0), IDS)),
    "cond_true": lambda t: jax.lax.cond(IDS[0, 0] > 2, lambda i: squares(t[i]), lambda i: squares(t[i[0]]) * 2, IDS),
    "cond_false": lambda t: jax.lax.cond(IDS[0, 0] > 3, lambda i: squares(t[i]), lambda i: squares(t[i[0]]) * 2, IDS),
    "cond_one_sided": lambda t: jax.lax.cond(IDS[0, 0] > 3, lambda: 0.0, lambda: squares(js.embedding_bag(t, IDS))),
    "switch": lambda t: squares(jax.lax.switch(IDS[0, 1], [lambda: t[IDS], lambda: t[IDS + 1], lambda: t[IDS] * 2])),
    "scan_of_cond": lambda t: jax.lax.scan(
        lambda c, i: (c + jax.lax.cond(i[0] > 2, lambda: squares(t[i]), lambda: squares(t[i[1]])), None), 0.0, IDS
    )[0],
    "remat_of_scan": jax.checkpoint(lambda t: jax.lax.scan(lambda c, i: (c + squares(t[i]), None), 0.0, IDS)[0]),
    "scalar_loss_of_some": lambda t: t[IDS][0, 0, 0],
    "only_stopped": lambda t: squares(jax.lax.stop_gradient(t)[IDS]),
}


# Row-sparse as a gradient; in a step it is several steps, which are refused.
CARRIED = {
    "carried_on": lambda t: jax.lax.scan(lambda c, i: (c.at[i].add(1.0), squares(c[i])), t, IDS)[1].sum(),
}


# One of each kind that the step reads from its blocks in a way of its own; the others are variations.
KINDS = (
    "index take_clip at_get out_of_bounds bag_mean_weights bag_max bag_offsets bag_empty dot twice cast mean_of_reads "
    "sum_and_reads remat vmap_ids_out_axis stopped_and_used_whole one_row_clamped scan cond_false "
    "fixed_rows fixed_in_regions scan_computed_ids"
).split()


@functools.cache
def reads(kinds):
    return in_few_programs({name: read for name, read in (READS | CARRIED).items() if (name in KINDS) == kinds})


def read(name):
    return reads(name in KINDS)[name]


def test_fixed_rows_alone_make_no_table():
    table = jnp.ones((20_000, 2))
    _, gradient = js.value_and_grad(lambda t: squares(t[:4]))(table)
    assert isinstance(gradient, jax.Array) and gradient[:, 0].sum() > 0
    many = lambda t: squares(t[IDS]) + squares(t[:10_000])  # noqa: E731
    assert isinstance(js.value_and_grad(many)(table)[1], jax.Array)


def tolerance(name):
    return 2e-2 if "cast" in name else 1e-5


@pytest.mark.parametrize("name", slow_but(KINDS, READS | CARRIED))
def test_reads(name):
    hold_equal(*read(name), {""}, tolerance(name))


@pytest.mark.parametrize("name", slow_but(["index"], "index bag_mean_weights dot cast remat scan cond_false".split()))
def test_reads_without_jit(name):
    with jax.numpy_rank_promotion("allow"):
        hold_equal(js.value_and_grad(READS[name])(TABLE), read(name)[1], {""}, tolerance(name))


@functools.cache
def step_over(names):
    """Tables, each read by one of READS, after a step of rate 1, and the values."""

    def loss_fn(params, _):
        values = {name: READS[name](table) for name, table in params.items()}
        return sum(values.values()), values

    params = {name: jnp.copy(TABLE) for name in names}
    state = TrainState.create(apply_fn=None, params=params, tx=js.lazy_sgd(1.0))
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them uses its table as a whole
        state, metrics = js.make_train_step(loss_fn, has_aux=True)(state, None)
    return jax.device_get((state.params, metrics["aux"]))


@pytest.mark.parametrize("name", slow_but(KINDS, READS))
def test_reads_in_the_step(name):
    """make_train_step reads from a block of the table, not from the table: it moves the same rows as far."""
    tables, values = step_over(tuple(k for k in READS if (k in KINDS) == (name in KINDS)))
    (_, grads), (value, gradient) = read(name)
    np.testing.assert_allclose(values[name], value, rtol=tolerance(name))
    np.testing.assert_allclose(tables[name], TABLE - gradient, rtol=tolerance(name), atol=1e-5)
    untouched = np.setdiff1d(np.arange(V), np.asarray(grads.ids))
    np.testing.assert_array_equal(tables[name][untouched], np.asarray(TABLE)[untouched])


def test_weights_of_a_bag_in_the_step():
    """The block's own derivative of a padded sum, with respect to rows and weights."""
    p = {"t": TABLE, "s": WEIGHTS}
    loss = lambda p, _: squares(js.embedding_bag(p["t"], IDS, weights=p["s"], combiner="sum", padding_idx=3))  # noqa: E731
    want = jax.tree.map(np.subtract, p, jax.jit(jax.grad(loss))(p, None))
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, p), tx=js.lazy_sgd(1.0))
    state, _ = js.make_train_step(loss)(state, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, want)


@pytest.mark.parametrize("shape", [(V,), pytest.param((V, 1), marks=pytest.mark.slow), (V, 2, 3)])
def test_tables_of_any_rank(shape):
    t = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    assert_as_jax(lambda t: squares(t[IDS]), (t,), {""})
    assert_as_jax(lambda t: squares(js.embedding_bag(t, IDS)), (t,), {""})
    assert_as_jax(lambda t: squares(js.dot(X, t)), (t,), {""})


DENSE = {
    "norm": lambda t: squares(t[IDS]) + 0.1 * jnp.sum(t**2),
    "tied_output": lambda t: squares(t[IDS] @ t.T),
    "columns": lambda t: squares(t[:, jnp.array([0, 1])]),
    "scanned_over": lambda t: jax.lax.scan(lambda c, row: (c + squares(row), None), 0.0, t)[0],
    "dense_in_a_scan": lambda t: jax.lax.scan(lambda c, i: (c + squares(t[i] @ t.T), None), 0.0, IDS)[0],
    "dense_in_a_branch": lambda t: jax.lax.cond(IDS[0, 0] > 2, lambda: squares(t), lambda: squares(t[IDS[0]])),
    "slice": lambda t: squares(t[2:5]),
    "unused": lambda t: jnp.float32(1),
}


def test_ids_of_a_callback_are_drawn_once():
    """The table that they read is dense, and says why; others are not."""
    drawn = []

    def draw():
        drawn.append(len(drawn))
        return np.int32(len(drawn) - 1)

    def loss(p, ids):
        i = jax.experimental.io_callback(draw, jax.ShapeDtypeStruct((), jnp.int32))
        return jnp.sum(p["t"][i] ** 2) + squares(p["u"][ids])

    params = {"t": 1 + jnp.arange(8.0).reshape(4, 2), "u": TABLE}
    got = jax.jit(js.grad(loss))(params, IDS)
    jax.effects_barrier()
    assert drawn == [0] and isinstance(got["u"], js.RowSparse)
    np.testing.assert_allclose(got["t"], (2 * params["t"]).at[1:].set(0))
    said = str(js.explain(loss)(params, IDS)["['t']"])
    assert "dense: row ids that come from a callback" in said and "test_grad.py" in said


dense_uses = functools.cache(lambda: in_few_programs(DENSE))


@pytest.mark.parametrize("name", DENSE)
def test_dense_uses_get_dense_gradients(name):
    hold_equal(*dense_uses()[name], set())


@pytest.mark.slow
def test_gradients_of_gradients():
    def loss(t):
        return jnp.sum(t[IDS] ** 3) + squares(js.embedding_bag(t, IDS))

    def through(grad):
        return lambda t: jnp.sum((jnp.zeros_like(t) + grad(loss)(t)) ** 2) + jnp.sum(t[IDS] ** 2)

    @jax.jit
    def run(t):
        by_value = jax.jvp(lambda t: js.value_and_grad(loss)(t)[0], (t,), (jnp.ones_like(t),))
        by_gradient = jax.grad(through(jax.grad))(t), jax.grad(through(js.grad))(t), js.grad(through(js.grad))(t)
        return by_gradient, (jax.jvp(loss, (t,), (jnp.ones_like(t),)), by_value)

    (want, got, row_sparse), (want_jvp, got_jvp) = run(TABLE)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dense(row_sparse), want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got_jvp[1], want_jvp[1], rtol=1e-5)


@pytest.mark.cpu("XLA leaves out pairs of casts for a GPU")
def test_two_casts_round_twice():
    def loss(t):
        return jnp.sum(t.astype(jnp.bfloat16).astype(jnp.float32)[IDS] ** 2)

    (value, grads), (want_value, want) = jax.jit(lambda t: both(loss, t))(TABLE)
    assert is_row_sparse(grads)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert abs(value - jnp.sum(TABLE[IDS] ** 2)) > 1e-4  # or this test could not tell
    np.testing.assert_allclose(grads.todense(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but([jnp.int8], [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32]))
def test_ids_of_a_type_too_narrow_for_the_table(dtype):
    """XLA's older loops, of tests/flags.py, drop such ids in jax.grad's own scatter: this takes the defaults."""
    table, ids = jnp.arange(40_000.0)[:, None] / 40_000, jnp.array([30, 100, 5], dtype)
    for mode in ("clip", "fill"):
        loss = lambda t, mode=mode: squares(jnp.take(t, ids, axis=0, mode=mode))  # noqa: E731
        assert_as_jax(loss, (table,), {""}, compiler_options=DEFAULTS)


def test_scalars_and_empty_tables():
    assert js.grad(lambda s: jax.lax.dynamic_slice(s, (), ()) ** 2)(jnp.float32(3)) == 6
    grads = js.grad(lambda t: jnp.sum(js.embedding_lookup(t, IDS, padding_idx=3)))(jnp.zeros((0, 2)))
    assert grads.shape == (0, 2)


def test_the_users_own_rule_is_kept():
    @jax.custom_jvp
    def tenth(t):
        return t[IDS]

    tenth.defjvp(lambda primals, tangents: (tenth(*primals), 0.1 * tangents[0][IDS]))

    @jax.custom_vjp
    def fifth(t):
        return t[IDS]

    fifth.defvjp(lambda t: (t[IDS], None), lambda _, g: (jnp.zeros_like(TABLE).at[IDS].add(g / 5),))
    assert_as_jax(lambda t: squares(tenth(t)), (TABLE,), {""})
    assert_as_jax(lambda t: squares(fifth(t)), (TABLE,), {""})
    assert_as_jax(lambda t: squares(jax.nn.relu(t[IDS])), (TABLE,), {""})


def test_a_leaf_of_any_size_and_mixed_trees():
    params = {"t": TABLE, "u": OTHER[:3, :2], "b": TABLE[:, 0], "w": jnp.ones((D, 2)), "s": jnp.float32(2)}

    def loss(p):
        h = p["t"][IDS] @ p["w"] + p["u"][IDS % 3] + p["b"][IDS][..., None]
        return squares(h) * p["s"]

    with jax.numpy_rank_promotion("allow"):
        assert_as_jax(loss, (params,), {"['t']", "['u']", "['b']"})


def test_linen_embed_untouched():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(V, D, name="e", dtype=self.dtype)(ids).mean(1)
            return nn.Dense(1, name="d")(x.astype(jnp.float32))[:, 0]

        dtype: type = jnp.float32

    for dtype, rtol in ((jnp.float32, 1e-4), (jnp.bfloat16, 3e-2)):
        model = Model(dtype=dtype)
        params = model.init(jax.random.key(0), IDS)
        with jax.numpy_rank_promotion("allow"):
            assert_as_jax(lambda p: squares(model.apply(p, IDS)), (params,), {"['params']['e']['embedding']"}, rtol)  # noqa: B023


def test_nnx_embed_untouched():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, rngs=rngs)
            self.head = nnx.Linear(D, 1, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.embed(ids).mean(1))[:, 0]

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss(params):
        return squares(nnx.merge(graph, params)(IDS))

    with jax.numpy_rank_promotion("allow"):
        (_, grads), (_, want) = jax.jit(lambda p: both(loss, p))(params)
    (name,) = sparse_leaves(grads)
    assert "embed" in name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense(grads), want)


@pytest.mark.slow
def test_argnums_aux_and_other_arguments():
    def fun(a, b, mode, *, scale, train):
        assert mode == "mean" and train is True and isinstance(scale, np.ndarray)  # untouched
        loss = squares(js.embedding_bag(b, IDS, combiner=mode)) + squares(a["t"][IDS]) * scale[0]
        return loss, {"mean": loss / 2, "name": "aux", "nothing": None, "count": 3}

    args, kwargs = ({"t": TABLE}, OTHER, "mean"), {"scale": np.array([2.0]), "train": True}
    for argnums in (0, 1, (0, 1), (1, 0), (1,), -2):
        (value, aux), grads = js.value_and_grad(fun, argnums=argnums, has_aux=True)(*args, **kwargs)
        plain = jax.value_and_grad(lambda *a, n=argnums: fun(*a, "mean", **kwargs)[0], argnums if argnums != -2 else 1)
        want_value, want = jax.jit(plain)(*args[:2])
        assert jax.tree.structure(dense(grads)) == jax.tree.structure(want)
        assert all(map(is_row_sparse, jax.tree.leaves(grads, is_leaf=is_row_sparse)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense(grads), want)
        np.testing.assert_allclose(value, want_value, rtol=1e-6)
        assert aux["name"] == "aux" and aux["nothing"] is None and aux["count"] == 3
        np.testing.assert_allclose(aux["mean"], value / 2)
    grads, aux = js.grad(fun, argnums=1, has_aux=True)(*args, **kwargs)
    assert is_row_sparse(grads) and aux["name"] == "aux"


def test_a_table_returned_in_aux_is_itself():
    _, aux = js.grad(lambda t: (squares(t[IDS]), t), has_aux=True)(TABLE)
    np.testing.assert_array_equal(aux, TABLE)


def test_gradients_of_weights_and_bcoo_data():
    def loss(args):
        t, w, data = args
        x = type(X)((data, X.indices), shape=X.shape)
        return squares(js.embedding_bag(t, IDS, weights=w, combiner="sum")) + squares(js.dot(x, t))

    assert_as_jax(loss, ((TABLE, WEIGHTS, X.data),), {"[0]"})


@functools.cache
def bag_gradients(combiner, weighted):
    def run(table, ids, weights, padding_idx):
        def loss(t):
            w = weights if weighted else None
            return jnp.sum(js.embedding_bag(t, ids, weights=w, combiner=combiner, padding_idx=padding_idx) * 0.5)

        return js.grad(loss)(table), jax.grad(loss)(table)

    return jax.jit(run, static_argnums=3)


BAG_KINDS = [("sum", True), ("sum", False), ("mean", True), ("mean", False), ("sqrtn", True), ("max", False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "bags", "length"), slow_but([(30, 5, 7)], [(1, 2, 3), (30, 5, 7), (7, 0, 4), (7, 3, 0), (6, 4, 1)])
)
@given(st.sampled_from(BAG_KINDS), st.integers(0, 9999))
def test_bags_of_any_shape(num_rows, bags, length, kind, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(num_rows, 3)).astype(np.float32)
    ids = rng.integers(0, num_rows + 1, (bags, length)).astype(np.int32)  # num_rows is padding
    grads, want = bag_gradients(*kind)(table, ids, rng.normal(size=ids.shape).astype(np.float32), num_rows)
    assert is_row_sparse(grads) and np.isfinite(grads.rows).all()
    np.testing.assert_allclose(densified(grads), want, rtol=1e-4, atol=1e-5)
    touched = np.asarray(grads.ids)
    assert set(touched[touched < num_rows].tolist()) == set(ids[ids < num_rows].tolist())  # padding touches no row


def test_the_cast_of_the_whole_table_is_moved_past_the_gather():
    big = jax.ShapeDtypeStruct((10_000_000, 8), jnp.float32)
    fun = js.grad(lambda t: squares(jnp.take(t.astype(jnp.bfloat16), IDS, axis=0).astype(jnp.float32)))
    text = jax.jit(fun).lower(big).as_text()
    assert "10000000x8xf32" in text and "10000000x8xbf16" not in text


def test_explain_looks_out_of_nested_jits():
    """jnp.take and nn.Embed read inside a jit of their own, whose equations know nothing of their caller."""
    t, ids = jnp.ones((50, 2)), jnp.arange(3)
    embed = nn.Embed(50, 2)

    def take(t):
        return jnp.sum(jnp.take(t, ids, axis=0))  # the take

    def linen(t):
        return jnp.sum(embed.apply({"params": {"embedding": t}}, ids))  # the module

    def dense(t):
        return jnp.sum(jax.jit(jnp.tanh)(t))  # a dense use

    lines = pathlib.Path(__file__).read_text().splitlines()
    for fun, comment in ((take, "# the take"), (linen, "# the module"), (dense, "# a dense use")):
        said = js.explain(fun)(t)[""]
        line = next(n for n, text in enumerate(lines, 1) if text.endswith(comment))
        assert f"test_grad.py:{line} " in (said.source or said.reads[0]), comment


def test_explain_in_a_notebook():
    cell = compile("\n\ndef loss_fn(t):\n    return t[ids].sum()", "/tmp/ipykernel_4711/123.py", "exec")
    names = {"ids": jnp.array([1, 2])}
    exec(cell, names)
    assert str(js.explain(names["loss_fn"])(jnp.ones((5, 2)))).endswith("at cell:4 (loss_fn)")


def test_explain():
    params = {
        "t": jnp.ones((500, 2)),
        "small": jnp.ones((1, 2)),
        "tied": TABLE,
        "w": jnp.ones(2),
        "s": jnp.float32(1),
        "no": jnp.ones(3),
    }

    def loss(p, batch):
        h = p["t"][batch.x] + p["t"][batch.x * 2] + p["small"][batch.x % 1]
        return jnp.sum(h @ p["w"]) * p["s"] + squares(p["tied"][IDS]) + jnp.sum(p["tied"] ** 2)  # the dense use

    batch = next(iter(js.batches(np.arange(24).reshape(4, 6), batch_size=4)))
    said = js.explain(loss)(params, batch)
    t, small, tied = said["['t']"], said["['small']"], said["['tied']"]
    assert t.row_sparse and t.num_rows == 500 and t.rows_read == 48
    assert t.advice == "" and "tables=" in small.advice and len(t.reads) == 2
    lines = pathlib.Path(__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if text.endswith("# the dense use"))
    assert not tied.row_sparse and tied.cause == "reduce_sum" and f"test_grad.py:{line} " in tied.source
    assert f"test_grad.py:{line - 1} (" in t.reads[0]
    assert said["['w']"].cause == "dot_general" and said["['s']"].cause == "mul" and said["['no']"].cause == "not used"
    printed = str(said).splitlines()
    assert len(printed) == len(params)
    assert next(p for p in printed if p.startswith("['t']")).startswith(
        "['t']  row-sparse: 2 reads of 48 of 500 rows at "
    )
    assert "['tied']  dense: reduce_sum at " in str(said)


@pytest.mark.slow
def test_tables_forces_the_choice():
    params = {"a": TABLE, "b": OTHER, "c": OTHER}

    def loss(p):
        return squares(p["a"][IDS]) + squares(p["b"][IDS]) + jnp.sum(p["b"])

    want = jax.grad(loss)(params)
    for tables, expect in [
        (None, {"['a']"}), ("a", {"['a']"}), ([], set()), (["c"], {"['c']"}), (("a", "c"), {"['a']", "['c']"}),
        (lambda path, leaf: "a" in path and leaf.shape == (V, D), {"['a']"}),
    ]:  # fmt: skip
        grads = js.grad(loss, tables=tables)(params)
        assert sparse_leaves(grads) == expect
        assert {
            path for path, p in js.explain(loss, tables=tables)(params).parameters.items() if p.row_sparse
        } == expect
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), dense(grads), want)
    assert js.grad(loss, tables="c")(params)["c"].rows.shape == (0, D)
    with pytest.raises(ValueError, match=r"'tables'.*\['b'\].*reduce_sum.*test_grad.py:\d+"):
        js.grad(loss, tables="b")(params)
    with pytest.raises(ValueError, match=r"'tables'.*'z'"):
        js.grad(loss, tables=["a", "z"])(params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """As an Equinox module is: a pytree, some of whose leaves are functions."""

    table: jax.Array
    act: object


def test_one_output_unit():
    """A weight (1, d), as torch and Equinox lay it out, is no table of one row."""
    params = {"t": TABLE, "w": jnp.ones((1, D)), "b": jnp.ones(1)}
    for loss in (
        lambda p: squares(jax.vmap(lambda x: (p["w"] @ x + p["b"])[0])(p["t"][IDS[0]])),
        lambda p: squares(jnp.squeeze(p["t"][IDS[0]] @ p["w"].T, 1)),
        lambda p: squares((p["t"][IDS[0]] @ p["w"].T)[:, 0]),
    ):
        assert_as_jax(loss, (params,), {"['t']"})


ERRORS = [
    (
        lambda: js.value_and_grad(lambda p: p["s"] * squares(p["t"][IDS]), tables=["['s']"])({"t": TABLE, "s": 1.0}),
        ValueError,
        r"'tables'.*rows.*\['s'\]",
    ),
    (lambda: js.grad(lambda t: t[IDS])(TABLE), TypeError, r"'fun'.*real scalar.*float32\[2,3,4\]"),
    (lambda: js.grad(lambda t: jnp.sum(IDS))(TABLE), TypeError, "real scalar.*int32"),
    (lambda: js.grad(lambda t: (squares(t), 1))(TABLE), TypeError, "has_aux=True"),
    (lambda: js.grad(squares, has_aux=True)(TABLE), TypeError, "scalar, aux"),
    (lambda: js.grad(squares)(IDS), TypeError, "floating arrays.*int32"),
    (lambda: js.grad(squares)("t"), TypeError, "floating arrays.*str"),
    (lambda: js.grad(squares, argnums=1)(TABLE), TypeError, "'argnums'.*1"),
    (lambda: js.grad(lambda m: squares(m.table))(Module(TABLE, jnp.tanh)), TypeError, r"Got a \w+ at \.act.*partition"),
    (
        lambda: js.grad(lambda p: squares(p["a"]["t"]))({"a": {"t": TABLE, "n": IDS}}),
        TypeError,
        r"int32 at \['a'\]\['n'\]",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), ERRORS)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()
