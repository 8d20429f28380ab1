"""RowSparse: what it adds up to, what it refuses, and what carries it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental.sparse import BCOO

import jaxsparse as js
from jaxsparse.ops.row_sparse import coalesce, concatenate_blocks, is_row_sparse
from jaxsparse.ops.rows import _distinct_by_hash, distinct_rows
from tests.marks import slow_but


def dense(ids, rows, shape):
    """The oracle: what a RowSparse stands for."""
    out = np.zeros(shape, np.float64)
    for i, row in zip(np.asarray(ids), np.asarray(rows, np.float64), strict=True):
        if 0 <= i < shape[0]:
            out[i] += row
    return out


# (k, shape): no ids, one row, fewer ids than rows, more ids than rows, as many; more ids than `cumsum` has in a piece.
SHAPES = [(0, (5, 3)), (1, (1,)), (6, (1, 1)), (4, (12, 3)), (20, (7,)), (20, (12, 2, 2)), (8, (8, 3))]


@st.composite
def gradients(draw):
    """Ids and rows for each of SHAPES."""
    ids = [draw(hnp.arrays(np.int32, k, elements=st.integers(-2, shape[0] + 2))) for k, shape in SHAPES]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return ids, [rng.normal(size=(k, *shape[1:])).astype(np.float32) for k, shape in SHAPES]


def of_every_shape(compute):
    """compute(RowSparse) for each of SHAPES, in one program."""

    @jax.jit
    def run(ids, rows):
        return [compute(js.RowSparse(i, r, shape)) for i, r, (_, shape) in zip(ids, rows, SHAPES, strict=True)]

    return run


def parameter(shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@of_every_shape
def sums(g):
    return {
        "todense": g.todense(),
        "parameter": jnp.asarray(parameter(g.shape)) + g,
        "numpy parameter": parameter(g.shape) + g,
        "twice": (g + g).todense(),
        "to_bcoo": g.to_bcoo().todense(),
        "from_bcoo": js.RowSparse.from_bcoo(g.to_bcoo()).todense(),
    }


@given(gradients())
def test_todense_and_addition(gradient):
    for got, ids, rows, (_, shape) in zip(sums(*gradient), *gradient, SHAPES, strict=True):
        want = dense(ids, rows, shape)
        wanted = {"parameter": parameter(shape) + want, "numpy parameter": parameter(shape) + want, "twice": 2 * want}
        for name, x in got.items():
            np.testing.assert_allclose(x, wanted.get(name, want), atol=1e-5, err_msg=f"{name} of {shape}")


@of_every_shape
def coalesced(g):
    block = coalesce(g)
    return block, block.todense()


@given(gradients())
def test_coalesce(gradient):
    for (block, total), ids, rows, (_, shape) in zip(coalesced(*gradient), *gradient, SHAPES, strict=True):
        assert block.unique and block.rows.shape[0] == min(len(ids), shape[0])
        got = np.asarray(block.ids)
        real = (got >= 0) & (got < shape[0])
        np.testing.assert_allclose(total, dense(ids, rows, shape), atol=1e-5, err_msg=f"{len(ids)} ids, {shape}")
        assert len(set(got.tolist())) == len(got)  # padding included
        assert got[real].tolist() == sorted({int(i) for i in ids if 0 <= i < shape[0]})
        assert not np.asarray(block.rows)[~real].any()


_DISTINCT = {
    road: jax.jit(lambda ids, num_rows, size, find=find: find(ids, num_rows, size), static_argnums=(1, 2))
    for road, find in (("as called", distinct_rows), ("by hash", _distinct_by_hash))
}


@pytest.mark.parametrize("road", slow_but(["as called"], _DISTINCT))  # by hash, on CPU
@given(
    st.sampled_from([1, 7, 64]),
    st.sampled_from([1, 5, 100, 10**6]),
    st.sampled_from([(0, 1), (-3, 3)]),
    st.integers(0, 99),
)
def test_distinct_rows(road, k, num_rows, beyond, seed):
    """All rows that are named, once each, and where each id is; what names no row is nowhere."""
    ids = np.random.default_rng(seed).integers(beyond[0], min(num_rows, 80) + beyond[1], k).astype(np.int32)
    if seed % 3 == 0:  # alike in their lowest bits
        ids = np.where(ids > 0, ids * 4096 % num_rows, ids)
    size = min(k, num_rows) + 1
    unique, at = map(np.asarray, _DISTINCT[road](ids, num_rows, size))
    real = (ids >= 0) & (ids < num_rows)
    assert sorted(unique[unique < num_rows].tolist()) == sorted(set(ids[real].tolist()))
    assert unique[-1] >= num_rows and len(set(unique.tolist())) == size
    np.testing.assert_array_equal(unique[at[real]], ids[real])
    assert (at[~real] == size).all()


def test_a_numpy_gradient_and_a_numpy_parameter():
    """Eagerly, and not from a traced array."""
    ids, rows = np.array([3, 1, 1, -1], np.int32), np.ones((4, 2), np.float32)
    g = js.RowSparse(ids, rows, (3, 2))
    np.testing.assert_array_equal(g.todense(), dense(ids, rows, (3, 2)))
    np.testing.assert_array_equal(np.ones((3, 2), np.float32) + g, 1 + dense(ids, rows, (3, 2)))
    np.testing.assert_array_equal(coalesce(g).ids, [1, 4, 5])


def test_coalesce_sums_half_precision_in_single():
    g = js.RowSparse(np.zeros(512, np.int32), np.ones((512, 1), jnp.bfloat16), (1, 1))
    block = jax.jit(coalesce)(g)
    assert block.rows.item() == 512  # bfloat16 sums would stop at 256
    assert block.dtype == jnp.bfloat16


@pytest.mark.slow
def test_bfloat16_table_is_added_in_single_and_rounded_once():
    p = jnp.asarray(np.random.default_rng(0).normal(size=(200, 8)), jnp.bfloat16)
    u = jnp.asarray(np.random.default_rng(1).normal(size=(200, 8)) * 1e-2, jnp.float32)
    sparse = optax.apply_updates(p, js.RowSparse(jnp.arange(200), u, p.shape, unique=True))
    duplicated = js.RowSparse(jnp.arange(400) % 200, jnp.concatenate([u / 2, u / 2]), p.shape)
    assert sparse.dtype == jnp.bfloat16
    np.testing.assert_array_equal(sparse, optax.apply_updates(p, u))
    np.testing.assert_array_equal(optax.apply_updates(p, duplicated), optax.apply_updates(p, u))
    rounded_twice = p + u.astype(jnp.bfloat16)
    assert (rounded_twice != optax.apply_updates(p, u)).any()  # or this test could not tell


# ---------------------------------------------------------------------------------------------------------------------
# Ids are not numbers


GRADS = {"t": js.RowSparse(jnp.array([1, 2]), jnp.ones((2, 3)), (4, 3)), "w": jnp.ones(3)}
PARAMS = {"t": jnp.ones((4, 3)), "w": jnp.ones(3)}
REFUSED = {
    "scale": lambda: optax.scale(0.1),
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "lion": lambda: optax.lion(0.1),
    "sign": lambda: optax.sign_sgd(0.1),
    "clip": lambda: optax.clip(1.0),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.1),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "ema": lambda: optax.ema(0.9),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "before_lazy": lambda: optax.chain(optax.clip_by_global_norm(1.0), js.lazy_adam(0.1)),
    "after_lazy": lambda: optax.chain(js.lazy_sgd(0.1), optax.scale(0.5)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_outside_lazy_are_refused(name):
    tx = REFUSED[name]()
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_the_refusal_names_the_way_out():
    with pytest.raises(TypeError, match=r"js\.lazy.*before="):
        optax.scale(0.1).update(GRADS, optax.EmptyState())


BY_LABEL = optax.partition({2: js.lazy_sgd(0.1), 1: optax.sgd(0.1)}, lambda p: jax.tree.map(jnp.ndim, p))
OUTSIDE = {
    "adam": optax.adam(0.1),
    "multi_steps": optax.MultiSteps(js.lazy_sgd(0.1), 2),
    "a label function": BY_LABEL,
    "a mask function": optax.masked(js.lazy_sgd(0.1), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tree_of_gradients_beside_one_of_parameters_names_the_way_out(name, jit):
    tx = OUTSIDE[name]
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=r"'jaxsparse\.RowSparse', .* put the whole optax chain inside js\.lazy"):
        update(GRADS, tx.init(PARAMS), PARAMS)


def test_a_label_function_belongs_inside():
    tx = js.lazy(optax.partition({2: optax.sgd(0.1), 1: optax.set_to_zero()}, lambda p: jax.tree.map(jnp.ndim, p)))
    new = optax.apply_updates(PARAMS, tx.update(GRADS, tx.init(PARAMS), PARAMS)[0])
    np.testing.assert_allclose(new["t"][:, 0], [1, 0.9, 0.9, 1], rtol=1e-6)
    np.testing.assert_array_equal(new["w"], PARAMS["w"])


def test_a_map_of_the_users_own():
    want = {"t": np.ones((4, 3)) - 0.5 * np.asarray(GRADS["t"].todense()), "w": np.full(3, 0.5)}
    for new in (
        jax.tree.map(lambda p, g: p - 0.5 * g, PARAMS, GRADS),
        jax.tree.map(lambda p, g: p - 0.5 * g, PARAMS, GRADS, is_leaf=is_row_sparse),
        optax.apply_updates(PARAMS, jax.tree.map(lambda g: -0.5 * g, GRADS, is_leaf=is_row_sparse)),
    ):
        jax.tree.map(np.testing.assert_array_equal, new, want)
    with pytest.raises(ValueError, match=r"name the parameters first, jax\.tree\.map\(f, params, grads\)"):
        jax.tree.map(lambda g, p: p - 0.5 * g, GRADS, PARAMS)


def test_a_norm_by_optax_names_ours():
    with pytest.raises(TypeError, match=r"a norm is js\.global_norm"):
        jax.jit(optax.tree.norm)(GRADS)


def test_it_is_no_array():
    g = GRADS["t"]
    for use in (np.asarray, np.linalg.norm, lambda g: np.sum([g])):
        with pytest.raises(TypeError, match=r"is no array.*g\.todense\(\)"):  # or NumPy makes one of objects
            use(g)
    with pytest.raises(AttributeError, match=r"no 'mean'.*js\.global_norm\(g\).*g\.todense\(\)"):
        g.mean()


MAPS = {
    "add": lambda g: jax.tree.map(jnp.add, g, g),
    "multiply": lambda g: jax.tree.map(lambda x: 0.5 * x, g),
    "sign": lambda g: jax.tree.map(jnp.sign, g),
    "cast": lambda g: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g),
    "norm": optax.tree.norm,
    "mean": lambda g: jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), g, g),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_that_reach_the_ids_are_refused(name):
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        MAPS[name](GRADS)


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["psum", "pmean", "pmax"])
def test_collectives_of_ids_are_refused(name):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), GRADS)
    with pytest.raises((TypeError, ValueError), match=r"js\.psum / js\.pmean"):
        jax.pmap(lambda g: getattr(jax.lax, name)(g, "i"), axis_name="i", devices=jax.devices()[:2])(stacked)


def test_zeros_like_names_no_row():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)["t"]
    assert not ((zeros.ids >= 0) & (zeros.ids < 4)).any()
    np.testing.assert_array_equal(zeros.todense(), np.zeros((4, 3)))


def test_set_to_zero_leaves_parameters_alone():
    updates, _ = optax.set_to_zero().update(GRADS, optax.EmptyState())
    np.testing.assert_array_equal(optax.apply_updates(PARAMS, updates)["t"], PARAMS["t"])


# ---------------------------------------------------------------------------------------------------------------------
# Boundaries


def crossings():
    def scan(g):
        return jax.lax.scan(lambda c, _: (c, None), g, None, length=3)[0]

    def while_loop(g):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1]), (0, g))[1]

    def cond(g):
        return jax.lax.cond(g.rows.sum() > 0, lambda g: g, lambda g: jax.tree.map(jnp.zeros_like, g), g)

    def vmap(g):
        many = jax.vmap(lambda i: js.RowSparse(i[None], jnp.ones((1, 3)), (4, 3)))(g.ids)
        one = jax.vmap(lambda g: g.todense())(many)
        np.testing.assert_array_equal(one.sum(0), dense(g.ids, np.ones((2, 3)), (4, 3)))
        return g

    def pmap(g):
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), g)
        out = jax.pmap(lambda g: g, devices=jax.devices()[:2])(stacked)
        return jax.tree.map(lambda x: x[0], out)

    def shard_map(g):
        mesh = jax.make_mesh((2,), ("i",))
        spec = jax.sharding.PartitionSpec()
        return jax.shard_map(lambda g: g, mesh=mesh, in_specs=spec, out_specs=spec)(g)

    return {
        "jit": jax.jit(lambda g: g),
        "scan": scan,
        "while": while_loop,
        "cond": cond,
        "vmap": vmap,
        "pmap": pmap,
        "shard_map": shard_map,
    }


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", crossings())
def test_crosses(name):
    g = GRADS["t"]
    out = crossings()[name](g)
    assert isinstance(out, js.RowSparse)
    np.testing.assert_array_equal(out.ids, g.ids)
    np.testing.assert_array_equal(out.rows, g.rows)


def test_vjp_through_a_row_sparse_argument():
    out, vjp = jax.vjp(lambda g: g.rows.sum(), GRADS["t"])
    (cotangent,) = vjp(jnp.ones_like(out))
    np.testing.assert_array_equal(cotangent.rows, np.ones((2, 3)))


def test_tree_utilities():
    g = GRADS["t"]
    assert jax.eval_shape(lambda g: g, g).shape == (4, 3)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(GRADS)[0]]
    assert paths == ["['t'].ids", "['t'].rows", "['w']"]
    assert not hasattr(g, "__jax_array__")  # it would densify in silence
    with pytest.raises(TypeError):
        jnp.asarray(g)
    np.testing.assert_array_equal(concatenate_blocks([g, g]).ids, [1, 2, 1, 2])
    assert concatenate_blocks([g]) is g
    np.testing.assert_array_equal(g + np.ones(g.shape), np.ones(g.shape) + g)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


TWO_SPARSE = BCOO((jnp.ones(2), jnp.zeros((2, 2), int)), shape=(3, 3))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: js.RowSparse(jnp.ones(2), jnp.ones((2, 3)), (4, 3)), TypeError, "'ids'.*integer.*float32"),
        (lambda: js.RowSparse(jnp.arange(2), jnp.ones((3, 3)), (4, 3)), ValueError, r"'rows'.*\(k, 3\)"),
        (lambda: js.RowSparse(jnp.arange(2), jnp.ones((2, 3)), (2**31, 3)), ValueError, "'shape'.*2147483647"),
        (lambda: js.RowSparse(np.array([2**32]), jnp.ones((1, 3)), (4, 3)), OverflowError, "4294967296 at position 0"),
        (lambda: jnp.ones((5, 3)) + GRADS["t"], ValueError, r"'dense'.*\(4, 3\).*\(5, 3\)"),
        (lambda: GRADS["t"] + js.RowSparse(jnp.arange(2), jnp.ones((2, 3)), (5, 3)), ValueError, "'other'"),
        (lambda: js.RowSparse.from_bcoo(TWO_SPARSE), ValueError, "n_sparse=2"),
    ],
)
def test_errors_say_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_wide_ids_do_not_wrap():
    with jax.enable_x64(True):
        ids = np.array([2**32 + 1, 1, -(2**32)])
        got = jax.jit(lambda ids: js.RowSparse(ids, jnp.ones((3, 2)), (4, 2)).todense())(ids)
        np.testing.assert_array_equal(got, dense([9, 1, 9], np.ones((3, 2)), (4, 2)))
    g = js.RowSparse(jnp.array([2**32 - 1], jnp.uint32), jnp.ones((1, 2)), (4, 2))
    assert not g.todense().any()


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic, and one gradient an example


def test_scalars():
    g = js.RowSparse(jnp.array([1, 1, 3]), jnp.array([[1.0], [2.0], [5.0]]), (3, 1))
    for got, want in [
        (2 * g, 2 * g.todense()),
        (g * np.float32(2), 2 * g.todense()),
        (jnp.float32(2) * g, 2 * g.todense()),
        (g / 4, g.todense() / 4),
        (-g, -g.todense()),
        (g - g, 0 * g.todense()),
    ]:
        assert isinstance(got, js.RowSparse)
        np.testing.assert_array_equal(got.todense(), want)
    np.testing.assert_array_equal(jnp.ones((3, 1)) - 0.5 * g, 1 - 0.5 * g.todense())
    np.testing.assert_array_equal(np.ones((3, 1), np.float32) - 0.5 * g, 1 - 0.5 * g.todense())


@pytest.mark.parametrize("factor", [jnp.ones((3, 1)), np.ones(3)], ids=["jax", "numpy"])
def test_only_scalars(factor):
    g = js.RowSparse(jnp.array([1]), jnp.ones((1, 1)), (3, 1))
    for product in (lambda: g * factor, lambda: factor * g, lambda: g / factor, lambda: g * g):
        with pytest.raises(TypeError, match=r"must be a scalar\. Got .* Put the whole optax chain inside js\.lazy"):
            product()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16], [jnp.bfloat16, jnp.float16]))
def test_many_duplicates_of_16_bits(dtype):
    """Sums are made in float32: 256 + 1 is 256 in bfloat16, 2048 + 1 is 2048 in float16."""
    many = 1000 if dtype == jnp.bfloat16 else 4000
    g = js.RowSparse(jnp.zeros(many, jnp.int32), jnp.ones((many, 1), dtype), (3, 1))
    table = jnp.zeros((3, 1), dtype)
    for dense in (g.todense(), table + g, table - -g, g.to_bcoo().todense()):
        assert dense.dtype == dtype and dense[0, 0] == many
    assert (jnp.zeros((3, 1)) + g)[0, 0] == many
    assert js.grad(lambda t: jnp.sum(t[jnp.zeros(many, jnp.int32)]))(table).todense()[0, 0] == many
    assert js.global_norm(g) == many


def per_example_loss(params, ids, y):
    return (jnp.tanh(params["t"][ids]).sum() - y) ** 2 * (1 + params["w"].sum())


@pytest.mark.slow  # as a cell of notebooks/guide.md, and test_rowwise.py's gradient for each example
def test_gradients_of_examples_are_clipped_one_by_one():
    """DP-SGD: the mean of clipped gradients, at the cost of the rows, is that of dense gradients."""
    rng = np.random.default_rng(0)
    params = {"t": jnp.asarray(rng.normal(size=(50, 3)), jnp.float32), "w": jnp.ones(2)}
    ids, y = rng.integers(0, 50, (6, 4)), jnp.asarray(rng.normal(size=6), jnp.float32)
    ids[0] = 7  # one row four times

    def clipped_mean(grads, norm):
        norms = jax.vmap(norm)(grads)
        factor = jnp.minimum(1, 1 / norms)
        one = jax.vmap(lambda g, f: jax.tree.map(lambda x: x * f, g, is_leaf=is_row_sparse))
        return norms, jax.tree.map(lambda x: x.sum(0) / len(y), one(grads, factor), is_leaf=is_row_sparse)

    sparse = jax.vmap(js.grad(per_example_loss), (None, 0, 0))(params, ids, y)
    dense = jax.vmap(jax.grad(per_example_loss), (None, 0, 0))(params, ids, y)
    assert is_row_sparse(sparse["t"]) and sparse["t"].rows.shape[:2] == (6, 5)
    np.testing.assert_allclose(sparse["t"].todense(), dense["t"], rtol=1e-6)
    (norms, got), (want_norms, want) = clipped_mean(sparse, js.global_norm), clipped_mean(dense, optax.tree.norm)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-6)
    assert 0 < jnp.sum(norms > 1) < 6  # are clipped
    np.testing.assert_allclose(got["t"].todense(), want["t"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


@pytest.mark.slow
def test_gradients_of_examples_are_no_one_gradient():
    g = jax.vmap(js.grad(lambda t, i: jnp.sum(t[i])), (None, 0))(jnp.zeros((3, 1)), jnp.array([[0], [0]]))
    for use in (
        lambda: jnp.zeros((3, 1)) + g,
        lambda: g + g,
        lambda: js.lazy(optax.identity()).update(g, optax.EmptyState(), None),
    ):
        with pytest.raises(ValueError, match=r"one gradient\. Got one for each example.*g\.sum\(0\)"):
            use()
    with pytest.raises(ValueError, match=r"'axis'.*must be 0"):
        g.sum(1)
