"""A written model is the model, and needs nothing but NumPy."""

import json
import runpy
import subprocess
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from jax.experimental.sparse import BCOO

import jaxsparse as js
from tests.marks import slow_but


def numbers(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).normal(size=shape).astype(np.float32)


def ids_below(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, n, shape).astype(np.int32)


def params_of(model, x):
    """Parameters of a model, drawn without compiling."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    draw = np.random.default_rng(0)

    def drawn(path, leaf):
        values = 0.4 * draw.normal(size=leaf.shape).astype(np.float32)
        return np.abs(values) if "var" in jax.tree_util.keystr(path) else values

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def export(tmp_path, apply_fn, params, example, batch="b"):
    folder = js.export_numpy(apply_fn, params, example, tmp_path / f"model_{len(list(tmp_path.iterdir()))}", batch)
    source = (folder / "model.py").read_text()
    return runpy.run_path(str(folder / "model.py"))["predict"], source, folder


def check(tmp_path, apply_fn, params, example, *xs, batch="b"):
    """The written model gives what JAX gives, in its structure, shapes and dtypes. An x is one for both, or a pair."""
    predict, source, _ = export(tmp_path, apply_fn, params, example, batch)
    for x in xs or (example,):
        for_jax, for_numpy = x if isinstance(x, Pair) else (x, x)
        want, got = jax.jit(apply_fn)(params, for_jax), predict(for_numpy)
        assert jax.tree.structure(want) == jax.tree.structure(got)
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            expected = np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a)
            assert (expected.shape, expected.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(b, expected, rtol=1e-5, atol=1e-5)
    return source


class Pair(NamedTuple):
    for_jax: object
    for_numpy: object


def first(n, tree):
    return jax.tree.map(lambda x: x[:n], tree)


# ---------------------------------------------------------------------------------------------------------------------
# the models of the notebooks, smaller


V, D = 500, 8


class BagClassifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.normal(0.1), (V, D))
        return nn.Dense(1, bias_init=nn.initializers.ones)(js.dot(x, table))[:, 0]


def mails(n):
    return scipy.sparse.random(n, V, 0.02, "csr", np.float32, rng=np.random.default_rng(n))


def test_quickstart(tmp_path):
    model, batch = BagClassifier(), next(iter(js.batches(mails(64), batch_size=64)))
    params = params_of(model, batch.x)
    some, parts = mails(5), mails(9)
    none = scipy.sparse.csr_matrix((2, V), dtype=np.float32)
    xs = [Pair(js.from_scipy(x), x) for x in (some, none)]
    xs += [Pair(js.from_scipy(parts), (parts.data, parts.indices, parts.indptr))]
    xs += [Pair(js.from_scipy(parts), {name: getattr(parts, name).tolist() for name in ("data", "indices", "indptr")})]
    source = check(tmp_path, model.apply, params, batch, *xs)
    assert "    return (dot(x_rows, x_columns, x_values, table, b) @ Dense_0_kernel + Dense_0_bias)[:, 0]" in source
    assert len(source.split("def predict")[1].splitlines()) <= 5
    predict = export(tmp_path, model.apply, params, batch)[0]
    with pytest.raises(ValueError, match=r"x.indices must be in \[0, 500\). Got 0 to 600 instead"):
        predict(([1.0, 1.0], [0, 600], [0, 2]))
    with pytest.raises(TypeError, match=r"x must be a CSR matrix. Got csc instead: call .tocsr\(\)"):
        predict(some.tocsc())
    with pytest.raises(ValueError, match=r"x.indptr must start with 0"):
        predict(([1.0, 1.0], [0, 6], [0, 3]))


def bag_model(params, ids):
    bag = js.embedding_bag(params["table"], ids, combiner="mean", padding_idx=params["table"].shape[0])
    return bag @ params["head"] + params["bias"]


def test_large_embeddings_and_many_devices(tmp_path):
    params = {"table": numbers(V, D), "head": numbers(D), "bias": np.float32(0.5)}
    ids = ids_below(V + 1, 6, 20)
    outside, all_padding = ids.copy(), np.full((2, 20), V, np.int32)
    outside[0, 3], outside[1, 2] = -1, V + 7
    source = check(tmp_path, bag_model, params, ids, ids, ids[:1], ids[:0], outside, all_padding, ids.astype(np.int64))
    assert "bags(table, " in source and "# test_export_numpy.py:" in source
    check(tmp_path, bag_model, params, ids, ids, ids_below(V, 3, 70), ids[:, :1], batch="b, l")


class WideAndDeep(nn.Module):
    @nn.compact
    def __call__(self, x):
        wide = nn.Embed(900, 1, name="crosses")(x["crosses"]).sum((1, 2))
        wide += nn.Embed(V, 1, name="singles")(x["ids"]).sum((1, 2))
        factors = nn.Embed(V, D, name="factors")(x["ids"])
        machine = 0.5 * jnp.sum(factors.sum(1) ** 2 - (factors**2).sum(1), axis=1)
        deep = jnp.concatenate([factors.reshape(len(factors), -1), x["numbers"]], axis=1)
        deep = nn.relu(nn.Dense(64, name="hidden")(deep))
        return wide + machine + nn.Dense(1, name="out")(deep)[:, 0]


@pytest.mark.slow
def test_click_through(tmp_path):
    x = {"ids": ids_below(V, 10, 4), "crosses": ids_below(900, 10, 6), "numbers": numbers(10, 5)}
    params = params_of(WideAndDeep(), x)
    outside = x | {"ids": np.where(np.arange(4) == 1, -3, x["ids"]).astype(np.int32)}
    source = check(tmp_path, WideAndDeep().apply, params, x, x, first(1, x), outside)
    assert "out_kernel" in source and "factors_embedding" in source and 'x["crosses"]' in source


# ---------------------------------------------------------------------------------------------------------------------
# attention, norms, nnx


class Attention(nn.Module):
    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(100, 16)(ids) + nn.Embed(12, 16, name="places")(jnp.arange(ids.shape[1]))[None]
        h += nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h), mask=nn.make_causal_mask(ids))
        h += nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.RMSNorm()(h)), approximate=False))
        h = nn.BatchNorm(use_running_average=True)(h)
        return {"next": nn.Embed(100, 16, name="out").attend(h[:, -1]), "max": nn.log_softmax(h.max(1))}


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["b", "b, l"])
def test_attention(tmp_path, batch):
    ids = ids_below(100, 6, 12)
    params = params_of(Attention(), ids)
    xs = (ids, ids[:1]) + ((ids[:2, :5],) if batch == "b, l" else ())
    check(tmp_path, Attention().apply, params, ids, *xs, batch=batch)


@pytest.mark.slow
def test_nnx(tmp_path):
    class Tower(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.norm = nnx.Embed(100, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout, self.head = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.dropout(self.norm(self.embed(ids).mean(1))))[:, 0]

    tower, ids = Tower(nnx.Rngs(0)), ids_below(100, 6, 12)
    tower.eval()
    graph, state = nnx.split(tower)
    source = check(tmp_path, lambda state, ids: nnx.merge(graph, state)(ids), state, ids)
    other = check(tmp_path, lambda tower, ids: tower(ids), tower, ids)
    assert other.splitlines()[-1] == source.splitlines()[-1]
    assert "embed_embedding" in source and "head_kernel" in source and "rng" not in source


# ---------------------------------------------------------------------------------------------------------------------
# bags in all layouts, sparse inputs


LAYOUTS = {
    "padded sum": lambda p, x: js.embedding_bag(p, x["ids"], combiner="sum", padding_idx=0),
    "padded weights": lambda p, x: js.embedding_bag(p, x["ids"], weights=x["w"], padding_idx=3),
    "padded sqrtn": lambda p, x: js.embedding_bag(p, x["ids"], weights=x["w"], combiner="sqrtn"),
    "padded max": lambda p, x: js.embedding_bag(p, x["ids"], combiner="max", padding_idx=0),
    "clip": lambda p, x: js.embedding_bag(p, x["ids"] * 2 - 3, mode="clip"),
    "lookup": lambda p, x: js.embedding_lookup(p, x["ids"], padding_idx=7),
    "offsets": lambda p, x: js.embedding_bag(p, x["flat"], offsets=x["offsets"], weights=x["fw"], combiner="mean"),
    "offsets max": lambda p, x: js.embedding_bag(p, x["flat"], offsets=x["offsets"], combiner="max", padding_idx=0),
    "segments": lambda p, x: js.embedding_bag(p, x["flat"], segment_ids=x["bags"], num_bags=4, combiner="sqrtn"),
    "take": lambda p, x: jnp.take(p, x["ids"], axis=0, mode="clip"),
    "by name": lambda p, x: p[x["ids"], x["ids"] % 8],
    "columns": lambda p, x: p[:, x["flat"][:3] % 8][:2],
}


@pytest.mark.parametrize("name", slow_but(["offsets"], LAYOUTS))
def test_layouts(tmp_path, name):
    flat, offsets = ids_below(30, 14), np.array([0, 3, 3, 10], np.int32)
    x = {"ids": ids_below(30, 4, 5), "w": numbers(4, 5), "flat": flat, "fw": numbers(14) ** 2, "offsets": offsets}
    x["bags"] = np.array([0, 0, 3, 2, 1, 1, 1, 9, 3, 2, 0, 0, 3, 3], np.int32)
    fewer = x | {"flat": flat[:11], "fw": x["fw"][:11], "bags": x["bags"][:11], "offsets": offsets[:2]}
    fewer |= {"ids": x["ids"][:2], "w": x["w"][:2]}
    names = {"ids": "b, l", "w": "b, l", "flat": "n", "fw": "n", "bags": "n", "offsets": "b"}
    check(tmp_path, LAYOUTS[name], numbers(30, 8), x, x, fewer, batch=names)


@pytest.mark.slow
def test_parts_of_sparse_inputs(tmp_path):
    x = {"a": mails(6), "b": mails(6) * 2, "n": numbers(6, 3)}

    def apply_fn(w, x):
        both = js.concatenate([x["a"], x["b"]], axis=1)
        return (
            js.dot(both, w) + js.sum(x["a"], axis=1)[:, None],
            js.mean(x["b"], axis=1),
            x["n"].sum(1),
            js.dot(x["n"], w[:3]),
        )

    def for_jax(x):
        return {name: js.from_scipy(part) if scipy.sparse.issparse(part) else part for name, part in x.items()}

    fewer = {"a": x["a"][2:4], "b": x["b"][:2], "n": x["n"][:2]}
    check(tmp_path, apply_fn, numbers(2 * V, 4), for_jax(x), *(Pair(for_jax(part), part) for part in (x, fewer)))
    predict = export(tmp_path, apply_fn, numbers(2 * V, 4), for_jax(x))[0]
    with pytest.raises(ValueError, match=r"b must have 6 rows. Got 2 instead"):
        predict(x | {"b": fewer["b"]})


def summed(x, rows):
    """The sum of the rows of each example's entries."""
    return jax.ops.segment_sum(rows, x.indices[:, 0], num_segments=x.shape[0])


OF_ENTRIES = {  # what looks like js.dot, and is not that of float32
    "linear": lambda w, x: summed(x["a"], x["a"].data * w[x["a"].indices[:, 1], 0]),
    "of each example": lambda w, x: summed(
        x["a"], x["a"].data * js.embedding_lookup(x["n"], x["a"].indices[:, 0])[:, 0]
    ),
    "float16": lambda w, x: summed(x["a"], x["a"].data[:, None] * w[x["a"].indices[:, 1]]),
}


@pytest.mark.parametrize("name", slow_but(["linear"], OF_ENTRIES))
def test_entries_of_sparse_inputs(tmp_path, name):
    dtype = np.float16 if name == "float16" else np.float32
    x, w = {"a": mails(6), "n": numbers(6, 3)}, np.round(numbers(V, 4) * 4).astype(dtype)
    x["a"].data = np.ceil(x["a"].data * 4)  # their sums have no rounding

    def for_jax(x):
        a = js.from_scipy(x["a"])
        return x | {"a": BCOO((a.data.astype(dtype), a.indices), shape=a.shape)}

    def for_numpy(x):
        return x | {"a": (x["a"].data.astype(dtype), x["a"].indices, x["a"].indptr)}

    fewer = {"a": x["a"][2:4], "n": x["n"][:2]}
    check(tmp_path, OF_ENTRIES[name], w, for_jax(x), *(Pair(for_jax(part), for_numpy(part)) for part in (x, fewer)))


class Click(NamedTuple):
    ids: object
    age: object


def test_inputs_with_names(tmp_path):
    x = Click(ids_below(30, 4, 5), numbers(4))
    source = check(tmp_path, lambda p, x: p[x.ids].sum((1, 2)) + x.age, numbers(30, 8), x, x, first(2, x))
    assert "array(x.ids, " in source and "array(x.age, " in source


# ---------------------------------------------------------------------------------------------------------------------
# equations one by one


EQUATIONS = {
    "activations": lambda f, i, b: [
        g(f) for g in (nn.relu, nn.gelu, nn.tanh, nn.sigmoid, nn.softplus, nn.silu, nn.elu)
    ],
    "more activations": lambda f, i, b: [nn.leaky_relu(f), nn.hard_swish(f), nn.softmax(f), nn.logsumexp(f, 1)],
    "erf": lambda f, i, b: [jax.lax.erf(f * 3), jax.scipy.special.erfc(f * 2), jax.scipy.stats.norm.cdf(f)],
    "roots": lambda f, i, b: [jnp.sqrt(abs(f)), jax.lax.rsqrt(abs(f) + 1), jnp.cbrt(f), f**3, f**-2],
    "logs": lambda f, i, b: [jnp.log(abs(f)), jnp.log1p(f**2), jnp.expm1(f), jnp.exp2(f), jnp.logaddexp(f, 1)],
    "angles": lambda f, i, b: [jnp.sin(f), jnp.cos(f), jnp.tan(f), jnp.arctan2(f, 2.0), jnp.sinh(f)],
    "rounding": lambda f, i, b: [jnp.round(f * 4), jnp.floor(f), jnp.ceil(f), jnp.sign(f), jax.lax.round(f)],
    "powers": lambda f, i, b: [jnp.abs(f) ** f, jnp.square(f), f**4, f**5, 2.0**f, 1 / f],
    "integers": lambda f, i, b: [i // 3, i % 3, i / 3, jax.lax.div(i, 3), jax.lax.rem(i, 3), -i, i << 2],
    "bits": lambda f, i, b: [i & 3, i | 4, i ^ 5, ~i, i >> 1, b & ~b, b | b, b ^ True],
    "comparisons": lambda f, i, b: [f > 0, i == 2, f != f, i <= 1, f >= 0.5, jnp.isnan(f), jnp.isfinite(f)],
    "choices": lambda f, i, b: [jnp.where(b, f, 0), jnp.where(b, 1.0, 2), jnp.clip(f, -0.5, 0.5), jnp.maximum(i, 2)],
    "sums": lambda f, i, b: [f.sum(), i.sum(1), b.sum(0), f.mean(1), f.var(1), i.mean(), f.prod(1)],
    "extremes": lambda f, i, b: [f.max(1), i.min(0), f.argmax(1), i.argmin(1), b.any(1), b.all(), jnp.ptp(f, 1)],
    "running": lambda f, i, b: [
        f.cumsum(1),
        i.cumsum(0),
        f.cumprod(1),
        jax.lax.cummax(f, 1, True),
        jax.lax.cumsum(f, 1, True),
    ],
    "sorting": lambda f, i, b: [
        jnp.sort(f, 1),
        jnp.argsort(f, 1),
        jnp.argsort(-i, 1),
        jax.lax.top_k(f, 3),
        jnp.median(f, 1),
    ],
    "two keys": lambda f, i, b: jax.lax.sort([i % 2, i, f], num_keys=2),
    "shapes": lambda f, i, b: [f.T, f.reshape(-1, 3, 2), f[:, None], f.ravel(), jnp.flip(f, 1), f[:, ::2], f[1:]],
    "shapes of axes": lambda f, i, b: [
        jnp.moveaxis(f.reshape(-1, 3, 2), 2, 0),
        f[..., -1],
        f[:, 2:3],
        jnp.squeeze(f[:, :1], 1),
    ],
    "together": lambda f, i, b: [
        jnp.concatenate([f, f], 1),
        jnp.stack([f, f + 1]),
        jnp.split(f, 2, 1),
        jnp.tile(f, (1, 2)),
    ],
    "filled": lambda f, i, b: [
        jnp.pad(f, ((0, 1), (2, 0))),
        jnp.zeros_like(f),
        jnp.ones(3),
        jnp.arange(4) + 0.5,
        jnp.full((2, 2), 7),
    ],
    "repeated": lambda f, i, b: [
        jnp.repeat(f, 2, axis=1),
        jnp.broadcast_to(f[:, :1], f.shape),
        f - f.mean(0)[None],
        jnp.eye(3),
    ],
    "products": lambda f, i, b: [f @ f.T, jnp.einsum("bi,bj->bij", f, f), jnp.einsum("bi,bi->b", f, f), i @ i.T],
    "more products": lambda f, i, b: [
        jnp.einsum("bi,ji->bj", f, f[:3] * 2),
        jnp.einsum("bi,ijk->bjk", f, jnp.ones((6, 2, 3))),
        jnp.outer(f[:, 0], f[:, 1]),
        jnp.dot(f, f[0]),
    ],
    "norms": lambda f, i, b: [
        jnp.linalg.norm(f, axis=1),
        nn.standardize(f),
        f / jnp.linalg.norm(f, axis=1, keepdims=True),
    ],
    "one hot": lambda f, i, b: [
        jax.nn.one_hot(i % 4, 5),
        jnp.take_along_axis(f, i[:, :2] % 6, 1),
        f[jnp.arange(len(f)), 2],
    ],
    "written": lambda f, i, b: [
        f.at[:, 1].set(0.0),
        f.at[:, 2].add(f[:, 0]),
        f.at[i[:, 0] % 5].max(2.0),
        i.at[0].mul(3),
    ],
    "segments": lambda f, i, b: [g(f, i[:, 0] % 4, num_segments=4) for g in (jax.ops.segment_sum, jax.ops.segment_max)],
    "parts": lambda f, i, b: [
        jax.lax.dynamic_slice_in_dim(f, i[0, 0] % 9, 2, 1),
        jax.lax.dynamic_index_in_dim(f, 2, 1, False),
    ],
    "replaced": lambda f, i, b: jax.lax.dynamic_update_slice(f, jnp.zeros((2, 2)), (i[0, 0] % 3, 1)),
    "branches": lambda f, i, b: [
        jax.lax.cond(f[0, 0] > 0, jnp.sin, jnp.cos, f),
        jax.lax.switch(i[0, 0] % 3, [jnp.sin, jnp.cos, jnp.tan], f),
    ],
    "conversions": lambda f, i, b: [
        f.astype(int),
        b.astype(float),
        i.astype(bool),
        i.astype(jnp.uint8),
        f.astype(jnp.float16),
    ],
    "calls": lambda f, i, b: [
        jax.checkpoint(jnp.sin)(f),
        jax.jit(jnp.cos)(f),
        jax.lax.stop_gradient(f),
        own_derivative(f),
    ],
    "vmap": lambda f, i, b: jax.vmap(lambda row, at: row[at % 6] * row.sum())(f, i[:, 0]),
    "sizes": lambda f, i, b: [f / len(f), jnp.arange(len(f)), jnp.ones((2 * len(f) + 1, 2)), f.mean(0), len(f) * i],
    "bits as floats": lambda f, i, b: jax.lax.bitcast_convert_type(f, jnp.int32),
    "nothing of x": lambda f, i, b: [jnp.ones((3, 2)) * 2, jnp.float32(3) + 1],
    "unsigned": lambda f, i, b: [jax.lax.shift_right_logical(i.astype(jnp.uint32), jnp.uint32(3)), (i % 9).view("u4")],
    "as they are": lambda f, i, b: [
        jnp.sum(f, axis=()),
        jax.lax.reduce_precision(f, 8, 23),
        f[:, 0][:, None].ravel(),
        {"none": None, "f": f},
    ],
    "small numbers": lambda f, i, b: [
        jnp.matmul(i.astype(jnp.int8) * 9, i.T.astype(jnp.int8), preferred_element_type=jnp.int32),
        jnp.matmul(f.astype(jnp.float16), f.T.astype(jnp.float16), preferred_element_type=jnp.float32),
    ],
    "promised": lambda f, i, b: [
        jnp.asarray(HELD).at[i % 6].get(mode="promise_in_bounds"),
        jnp.asarray(HELD).at[jnp.where(b, i.astype(jnp.uint32) % 6, 0)].get(mode="promise_in_bounds"),
        jnp.asarray(HELD).at[(i % 6).astype(jnp.uint32)].get(mode="promise_in_bounds"),
    ],
}
HELD = np.arange(6, dtype=np.float32) - 2.5


@jax.custom_vjp
def own_derivative(x):
    return jnp.tanh(x)


own_derivative.defvjp(lambda x: (own_derivative(x), x), lambda x, g: (g,))
QUICK_EQUATIONS = ["written", "sorting"]


@pytest.mark.parametrize("name", slow_but(QUICK_EQUATIONS, EQUATIONS))
def test_equations(tmp_path, name):
    x = {"floats": numbers(7, 6), "ints": ids_below(9, 7, 6) - 2, "bools": numbers(7, 6) > 0}
    if name in ("one hot", "segments", "parts", "replaced", "written", "vmap"):
        x["ints"] += 2
    check(tmp_path, lambda params, x: EQUATIONS[name](*map(x.get, ("floats", "ints", "bools"))), {}, x, x, first(3, x))


# ---------------------------------------------------------------------------------------------------------------------
# loops of a known length


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(30, 8)(ids)
        return nn.Dense(2)(nn.RNN(nn.GRUCell(6))(h)[:, -1]), nn.RNN(nn.LSTMCell(6), return_carry=True)(h)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["b", "b, l"])
def test_recurrent_models(tmp_path, batch):
    ids = ids_below(30, 4, 20)
    params = params_of(Recurrent(), ids)
    xs = (ids, ids[:1]) + ((ids[:3, :7],) if batch == "b, l" else ())
    source = check(tmp_path, Recurrent().apply, params, ids, *xs, batch=batch)
    assert "def step(" in source and "GRUCell_0_hn_kernel" in source


def carried(table, f, i):
    """A float, a bool and an integer that are carried; a table and a branch in the body."""

    def body(carry, ids):
        total, seen, count = carry
        rows = table[ids]
        total = jax.lax.cond(count % 2 == 0, jnp.add, jnp.subtract, total, rows)
        return (total, seen | (total > 0), count + 1), (total.max(1), count)

    start = jnp.zeros((len(f), 3)), jnp.zeros((len(f), 3), bool), 0
    return jax.lax.scan(body, start, i.T)


LOOPS = {
    "carried": carried,
    "over examples": lambda p, f, i: jax.lax.scan(lambda c, row: (c + row, c[0]), jnp.zeros(6), f),
    "reverse": lambda p, f, i: jax.lax.scan(lambda c, col: (c * 0.5 + col, None), f[:, 0], f.T, reverse=True)[0],
    "unused": lambda p, f, i: jax.lax.scan(lambda c, col: (c + col, (c, col * 2)), f[:, 0], f.T)[1][1],
    "fori": lambda p, f, i: jax.lax.fori_loop(0, 3, lambda k, h: jnp.tanh(h @ p[:3] + p[k, 0]), f[:, :3]),
    "nested": lambda p, f, i: jax.lax.scan(
        lambda c, col: jax.lax.scan(
            lambda h, row: (jnp.tanh(h + row[None]) * col[:, None], len(f) * h.sum()), c, p[:2]
        ),
        f[:, :3],
        f.T,
    ),
    "map": lambda p, f, i: (jax.lax.map(jnp.sort, f), jax.vmap(lambda row: jax.lax.map(jnp.cos, row))(f)),
    "parameters alone": lambda p, f, i: f[:, :3] @ jax.lax.fori_loop(0, 2, lambda _, w: w @ w / 4, p[:3]),
    "two alike": lambda p, f, i: [jax.lax.map(g, f) for g in (jnp.sin, jnp.cos)],
    "places": lambda p, f, i: [jnp.searchsorted(jnp.sort(p[:, 0]), f, side=side) for side in ("left", "right")],
    "pursuit": lambda p, f, i: js.omp(p.T / jnp.linalg.norm(p.T, axis=0, keepdims=True), f[:, :3], k=2),
}


@pytest.mark.parametrize("name", slow_but(["over examples"], LOOPS))
def test_loops(tmp_path, name):
    x = {"f": numbers(5, 6), "i": ids_below(8, 5, 6)}
    x["f"][0, :3] = [0.0, -0.0, np.nan] if name == "places" else 0.5
    xs = (x, first(1, x)) + ((first(0, x),) if name == "over examples" else ())
    check(tmp_path, lambda p, x: LOOPS[name](p, x["f"], x["i"]), numbers(8, 3), x, *xs)


def test_what_is_refused_in_a_loop_has_its_own_line(tmp_path):
    def body(carry, row):
        return jnp.linalg.cholesky(carry), None

    with pytest.raises(TypeError, match=r"Got one with cholesky at .*test_export_numpy.py:\d+ \(\S+body\) instead"):
        export(tmp_path, lambda params, x: jax.lax.scan(body, jnp.eye(6), x)[0], {}, numbers(5, 6))


@pytest.mark.parametrize("left_side", [True, False])
@pytest.mark.parametrize("options", [{}, {"lower": True, "transpose_a": True}, {"unit_diagonal": True}])
def test_triangular_systems(tmp_path, left_side, options):
    a = numbers(3, 3) + 4 * np.eye(3, dtype=np.float32)
    solve = lambda a, x: jax.lax.linalg.triangular_solve(a, x, left_side=left_side, **options)  # noqa: E731
    x = numbers(3, 2) if left_side else numbers(2, 3)
    check(tmp_path, solve, a, x, batch="_, _")
    check(tmp_path, jax.vmap(solve, (None, 0)), a, np.stack([x, 2 * x]), batch="b, _, _")


# ---------------------------------------------------------------------------------------------------------------------
# models drawn from a grammar


def drawn_model(seed):
    """A model of parts that are drawn, and an input."""
    draw = np.random.default_rng(seed)
    combiners = draw.choice(["sum", "mean", "sqrtn", "max"], 2)
    activation = [nn.relu, nn.gelu, nn.tanh, nn.swish, nn.softplus][draw.integers(5)]
    norm = [nn.LayerNorm(), nn.RMSNorm(), None][draw.integers(3)]
    reads = list(draw.permutation(["bag", "embed", "sparse", "attention", "numbers"])[: draw.integers(1, 5)])
    width, depth = int(draw.choice([4, 8])), int(draw.integers(0, 3))
    head = ["logit", "softmax", "dot", "top"][draw.integers(4)]

    class Drawn(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.param("table", nn.initializers.normal(1.0), (40, width))
            parts = []
            for read in reads:
                if read == "bag":
                    weights = None if "max" in combiners[0] or seed % 2 else x["weights"]
                    parts.append(
                        js.embedding_bag(table, x["ids"], weights=weights, combiner=combiners[0], padding_idx=40)
                    )
                elif read == "embed":
                    h = nn.Embed(40, width)(x["ids"] % 40)
                    parts.append(h.reshape(len(h), -1) if seed % 3 else h.mean(1))
                elif read == "sparse":
                    parts.append(js.nn.SparseDense(width)(x["words"]))
                elif read == "attention":
                    rows = js.embedding_lookup(table, x["ids"], padding_idx=40)
                    scores = jnp.einsum("bld,bmd->blm", rows, nn.Dense(width)(rows)) / np.sqrt(width)
                    scores = jnp.where((x["ids"] == 40)[:, None], -1e9, scores)
                    parts.append((nn.softmax(scores) @ rows).max(1))
                else:
                    parts.append(jnp.log1p(jnp.abs(x["numbers"])))
            h = jnp.concatenate(parts, axis=1)
            for _ in range(depth):
                h = activation(nn.Dense(width)(h))
                h = h if norm is None else norm.copy(parent=self)(h)
            if head == "logit":
                return nn.Dense(1)(h)[:, 0]
            if head == "softmax":
                return nn.softmax(nn.Dense(5)(h))
            if head == "dot":
                a, b = nn.Dense(width)(h), nn.Dense(width)(jnp.sin(h))
                return jnp.sum(a * b, axis=1) / (1 + jnp.linalg.norm(a, axis=1))
            return jax.lax.top_k(nn.Dense(7)(h), 2)

    words = scipy.sparse.random(6, 60, 0.1, "csr", np.float32, rng=draw)
    ids, weights = draw.integers(0, 41, (6, 5)).astype(np.int32), draw.random((6, 5)).astype(np.float32)
    return Drawn(), {"ids": ids, "weights": weights, "words": words, "numbers": numbers(6, 3)}


@pytest.mark.parametrize("seed", slow_but([11], range(20)))
def test_drawn_models(tmp_path, seed):
    model, x = drawn_model(seed)

    def for_jax(x):
        return x | {"words": js.from_scipy(x["words"])}

    fewer = {name: part[1:4] for name, part in x.items()}
    params = params_of(model, for_jax(x))
    check(tmp_path, model.apply, params, for_jax(x), Pair(for_jax(x), x), Pair(for_jax(fewer), fewer))


# ---------------------------------------------------------------------------------------------------------------------
# what is stored


def test_it_needs_numpy_alone_and_copies_no_table(tmp_path):
    params = {"table": numbers(4000, 16), "unused": numbers(10, 10), "head": numbers(16)}
    ids = ids_below(4000, 3, 4)
    apply_fn = lambda params, ids: js.embedding_bag(params["table"], ids, padding_idx=4000) @ params["head"]  # noqa: E731
    folder = export(tmp_path, apply_fn, params, ids)[2]
    assert sorted(file.name for file in folder.iterdir()) == ["head.npy", "model.py", "table.npy"]
    code = """
import json, mmap, sys
for name in ("jax", "jaxlib", "jaxsparse", "scipy", "flax", "ml_dtypes"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import model
table = model.table
while table.base is not None and not isinstance(table.base, mmap.mmap):
    table = table.base
assert isinstance(table.base, mmap.mmap) and not model.table.flags.writeable
print(json.dumps(model.predict(json.loads(sys.argv[2])).tolist()))
"""
    done = [sys.executable, "-I", "-W", "error", "-c", code, str(folder), json.dumps(ids.tolist())]
    out = subprocess.run(done, check=True, capture_output=True, text=True)
    np.testing.assert_allclose(json.loads(out.stdout), apply_fn(params, ids), rtol=1e-5, atol=1e-5)


def test_what_depends_on_parameters_alone_is_computed_before(tmp_path):
    def apply_fn(params, ids):
        unit = params["table"] / jnp.linalg.norm(params["table"], axis=1, keepdims=True)
        return unit[ids] @ (params["head"] * jnp.exp(params["scale"])) + params["bias"]

    params = {"table": numbers(900, 4), "head": numbers(4), "scale": 0.5, "bias": np.float32(0.25)}
    source = check(tmp_path, apply_fn, params, ids_below(900, 3, 4))
    assert source.splitlines()[-1] == "    return constant[x] @ constant_2 + bias"


def test_arrays_that_a_model_holds(tmp_path):
    scale, rows, large = jnp.float32(2.5), jnp.asarray(HELD), jnp.asarray(numbers(6, 40))
    source = check(tmp_path, lambda params, x: ((x * scale + rows[None]) * HELD[None]) @ large, {}, numbers(5, 6))
    assert "np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)" in source and "x * 2.5" in source


def test_parameters_without_rows_and_with_names_of_lines(tmp_path):
    params = {"h": numbers(6), "none": np.zeros((0, 6), np.float32)}

    def apply_fn(params, x):
        return jnp.concatenate([params["none"], jnp.sin(x) * params["h"][None] + jnp.sin(x)]), jnp.cos(x) * jnp.cos(x)

    source = check(tmp_path, apply_fn, params, numbers(5, 6))
    assert 'h = load("h")' in source and "h_2 = np.sin(x)" in source and "none = np.zeros((0, 6), np.float32)" in source


def test_nothing_is_left_of_a_folder_that_was_not_written(tmp_path, monkeypatch):
    def full(path, x):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path, bag_model, {"table": numbers(V, D), "head": numbers(D), "bias": 0.5}, ids_below(V, 3, 4))
    assert not list(tmp_path.iterdir())


def test_packed_tables(tmp_path):
    params = {"table": jnp.asarray(numbers(300, 16)), "head": numbers(16)}
    apply_fn = lambda params, ids: params["table"][ids].mean(1) @ params["head"]  # noqa: E731
    ids = ids_below(300, 3, 4)
    predict, _, folder = export(tmp_path, apply_fn, js.pack(params, tables="table"), ids)
    assert np.array_equal(np.load(folder / "table.npy"), params["table"])
    expected = np.asarray(params["table"])[ids].mean(1) @ params["head"]
    np.testing.assert_allclose(predict(ids), expected, rtol=1e-5, atol=1e-5)


READINGS = {
    "bag": lambda table, ids: js.embedding_bag(table.astype(jnp.float32), ids, padding_idx=-1),
    "rows": lambda table, ids: js.embedding_lookup(table, ids).astype(jnp.float32) * 2,
    "converted": lambda table, ids: table.astype(jnp.float32)[ids],
    "whole": lambda table, ids: table.astype(jnp.float32)[ids] @ table.astype(jnp.float32).T,
    "one": lambda table, ids: table[ids[0, 0]].astype(jnp.float32),
}


@pytest.mark.parametrize("name", slow_but(["bag"], READINGS))
def test_bfloat16_tables(tmp_path, name):
    table, ids = jnp.asarray(numbers(3000, 4), jnp.bfloat16), ids_below(3000, 3, 5)
    outside = np.where(np.arange(5) == 2, -1, ids).astype(np.int32)
    xs = (ids,) if name in ("converted", "whole") else (ids, outside)
    source = check(tmp_path, READINGS[name], table, ids, *xs)
    assert ("bfloat16 as uint16, (3000, 4)" in source) is (name not in ("whole", "one"))


@pytest.mark.slow
def test_float16_tables(tmp_path):
    ids, half = ids_below(3000, 3, 5), np.asarray(numbers(3000, 4), np.float16)
    source = check(tmp_path, READINGS["converted"], half, ids)
    assert "params[x].astype(np.float32)" in source and "float16 (3000, 4)" in source


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def test_refused_equations(tmp_path):
    def loops(params, x):
        return jax.lax.while_loop(lambda carry: carry.sum() < 9, lambda carry: carry * 2, abs(x))

    def by_batch(params, x):
        return sum(x[i] for i in range(len(x)))

    def by_key(key, x):
        return jax.random.normal(jax.random.fold_in(key, x[0, 0].astype(int)), (6,))

    def squares(params, x):
        return jnp.ones(len(x) ** 2)

    x = numbers(5, 6)
    must = r"The 'apply_fn' argument of js.export_numpy must be a function that NumPy can compute. Got one with"
    with pytest.raises(TypeError, match=rf"{must} while at .*test_export_numpy.py:\d+ \(\S+loops\) instead"):
        export(tmp_path, loops, {}, x)
    with pytest.raises(TypeError, match=rf"{must} random_\w+ at"):
        export(tmp_path, by_key, jax.random.key(0), x)
    with pytest.raises(TypeError, match=r"must be the same for every b. Got one in which the .* the size of the input"):
        export(tmp_path, by_batch, {}, x)
    with pytest.raises(TypeError, match=r"numbers such as \(25,\) are not linear in the size of the input \(.*squares"):
        export(tmp_path, squares, {}, x)
    assert not list(tmp_path.iterdir())
    check(tmp_path, by_batch, {}, x, batch="5, _")  # at one size there is one program


def test_equations_that_few_models_have(tmp_path):
    def model(table, x):
        small = x["i"].astype(jnp.int8)
        return {
            "rows times rows": jax.lax.dot_general(x["f"], table, (((1,), (1,)), ((), ()))),
            "wider than its factors": jax.lax.dot(small, small.T[:, :1], preferred_element_type=jnp.int32),
            "bits": x["i"].astype(jnp.uint32) >> 1,
            "as precise as it is": jax.lax.reduce_precision(x["f"], 8, 23),
        }

    check(tmp_path, model, numbers(4, 6), {"f": numbers(5, 6), "i": ids_below(9, 5, 6)}, batch="5, _")


REFUSED = {
    "shift_right_logical of signed integers": lambda f, i: jax.lax.shift_right_logical(i, 1),
    "reduce_precision to less than float32": lambda f, i: jax.lax.reduce_precision(f, 5, 10),
    "bitcast_convert_type of float32 to uint8": lambda f, i: jax.lax.bitcast_convert_type(f, jnp.uint8),
    "reduce_or of int32": lambda f, i: jnp.bitwise_or.reduce(i, axis=1),
    "reshape with dimensions": lambda f, i: f.ravel("F"),
    "pad that cuts off, or pads between numbers": lambda f, i: jax.lax.pad(f, 0.0, ((0, 0, 0), (-1, 0, 0))),
    "scatter of what a function makes": lambda f, i: f.at[0].apply(jnp.sin),
    "arrays of int4": lambda f, i: i.astype(jnp.int4),
    "numbers of complex64": lambda f, i: f * 1j,
    "dot_general over several sizes of the input": lambda f, i: jnp.einsum(
        "bl,blmn->mn", f, f[..., None, None] + i[None, None]
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_equations_without_a_rule(tmp_path, what):
    x, sizes = {"f": numbers(5, 6), "i": ids_below(9, 5, 6)}, {"f": "b, l", "i": "m, n"}
    batch = sizes if "dot_general" in what else "b"
    with pytest.raises(TypeError, match=rf"NumPy can compute. Got one with {what} at .*test_export_numpy.py:\d+ "):
        export(tmp_path, lambda params, x: REFUSED[what](x["f"], x["i"]), {}, x, batch)


def test_outputs_that_numpy_has_not(tmp_path):
    with pytest.raises(TypeError, match=r"NumPy can compute. Got one with arrays of key<\w+> among its outputs"):
        export(tmp_path, lambda key, x: (x, key), jax.random.key(0), numbers(2))


def other_by_size(x, odd, even):
    return x.sum() + (odd if len(x) % 2 else even), x.min(), x.max()


BY_SIZE = {  # at b = 5, 6 and 7
    "equations": (
        lambda x: jnp.sin(x) if len(x) % 2 else jnp.cos(x),
        r"the equations depend on .*\(\S+test_export_numpy",
    ),
    "array": (lambda x: x[:, 0] * np.arange(len(x), dtype=np.float32), "an array that the model holds depends on"),
    "number": (lambda x: x * (1 / len(x)), r"numbers such as 0\.2\d* depend on the size .*\(\S+test_export_numpy"),
    "operand": (lambda x: other_by_size(x, x.max(), 1.0), r"the equations depend on .*\(\S+test_export_numpy"),
    "literal": (lambda x: other_by_size(x, 1.0, x.max()), r"the equations depend on .*\(\S+test_export_numpy"),
    "values": (lambda x: other_by_size(x, x.min(), x.max()), r"the equations depend on .*\(\S+test_export_numpy"),
    "output": (
        lambda x: (x.sum(), x.max())[len(x) % 2],
        r"the equations depend on the size of the input \(its outputs\)",
    ),
    "rank": (lambda x: jnp.ones((2,) * len(x)), r"numbers such as \(2, 2, 2, 2, 2\) are not linear in the size"),
}


@pytest.mark.parametrize("name", BY_SIZE)
def test_models_that_differ_by_size(tmp_path, name):
    model, what = BY_SIZE[name]
    with pytest.raises(
        TypeError, match=rf"must be the same for every b. Got one in which {what}.* Give sizes that may"
    ):
        export(tmp_path, lambda params, x: model(x), {}, numbers(5, 6))
    check(tmp_path, lambda params, x: model(x), {}, numbers(5, 6), batch="5, _")


@jax.tree_util.register_pytree_node_class
class WithoutKeys(list):
    def tree_flatten(self):
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children)


def test_refused_examples(tmp_path):
    for example, dtype in (np.array(["a"]), "<U1"), (jax.random.split(jax.random.key(0)), "key<fry>"):
        with pytest.raises(TypeError, match=f"'example' .* must be made of numbers. Got an array of {dtype} instead"):
            export(tmp_path, None, {}, example)
    must = r"must be made of dictionaries, tuples, lists and dataclasses. Got a tree with FlattenedIndexKey"
    with pytest.raises(TypeError, match=rf"'example' argument of js.export_numpy {must}"):
        export(tmp_path, None, {}, WithoutKeys([numbers(2)]))
    with pytest.raises(ValueError, match=r"'batch' .* must be for rows of sparse inputs only. Got 'b, f' instead"):
        export(tmp_path, None, {}, js.from_scipy(mails(6)), "b, f")


def test_refused_arguments(tmp_path):
    apply_fn = lambda params, x: jax.tree.leaves(x)[0] * 2  # noqa: E731
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"'path' argument of js.export_numpy must be a new folder"):
        js.export_numpy(apply_fn, {}, numbers(2), tmp_path / "there")
    with pytest.raises(
        ValueError, match=r"first size of all inputs. Got 'b' for arrays of 2, 3 instead. Name the sizes"
    ):
        js.export_numpy(apply_fn, {}, [numbers(2), numbers(3)], tmp_path / "a")
    with pytest.raises(ValueError, match=r"Got 'b, l' for example of shape \(2,\) instead"):
        js.export_numpy(apply_fn, {}, numbers(2), tmp_path / "a", "b, l")
    with pytest.raises(ValueError, match=r"one name for each size. Got 'b' for 2 and 3 in example\[1\]"):
        js.export_numpy(apply_fn, {}, [numbers(2), numbers(3)], tmp_path / "a", ["b", "b"])
    with pytest.raises(ValueError, match="in the structure of the example"):
        js.export_numpy(apply_fn, {}, [numbers(2), numbers(3)], tmp_path / "a", {"y": "b"})
    with pytest.raises(TypeError, match=r"must be a tree of arrays. Got one with a str in it"):
        js.export_numpy(apply_fn, {"a": "b"}, numbers(2), tmp_path / "a")
    with pytest.raises(TypeError, match="must be a function that returns arrays, or tuples, lists and dicts"):
        js.export_numpy(lambda params, x: Pair(x, x), {}, numbers(2), tmp_path / "a")


def test_what_predict_refuses(tmp_path):
    x = {"ids": ids_below(9, 4, 3), "n": numbers(4, 2)}
    predict = export(tmp_path, lambda table, x: table[x["ids"]].sum(1) + x["n"], numbers(9, 2), x)[0]
    assert predict({"ids": [[1, 2, 3]], "n": [[1, 2]]}).dtype == np.float32
    with pytest.raises(ValueError, match=r"ids must be of shape \(any, 3\). Got \(4, 2\) instead"):
        predict(x | {"ids": x["ids"][:, :2]})
    with pytest.raises(ValueError, match=r"n must be of shape \(4, 2\). Got \(3, 2\) instead"):
        predict(x | {"n": x["n"][:3]})
    with pytest.raises(TypeError, match=r"ids must be of numbers that fit int32. Got float32 instead"):
        predict(x | {"ids": x["ids"].astype(np.float32)})
    with pytest.raises(OverflowError, match=r"ids must fit int32. Got numbers from 4294967296 to 4294967296 instead"):
        predict(x | {"ids": np.full((4, 3), 2**32)})
    with pytest.raises(IndexError, match="out of bounds"):
        predict(x | {"ids": x["ids"] + 9})
