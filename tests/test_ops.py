"""dot, sum, mean and concatenate over BCOO against NumPy, dense gradients and their dense selves."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO, BCSR

import jaxsparse as js
from tests import oracles
from tests.test_embedding import directional_derivatives, in_one_program

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def sparse(dense):
    """BCOO.fromdense, which compiles, in NumPy."""
    indices = np.argwhere(dense)
    parts = dense[tuple(indices.T)], indices.astype(np.int32)
    return BCOO(tuple(map(jnp.asarray, parts)), shape=dense.shape, indices_sorted=True, unique_indices=True)


def drawn_bcoo(rng, shape, nse, dtype):
    """BCOO as it may come: unsorted, repeats, no entries, padding; and entries, not zero, half out of range."""
    half_outside = [(0,) * len(shape[1:]) + (shape[-1] + 2,), (shape[0],) + (0,) * len(shape[1:])]
    inside = rng.integers(0, np.maximum(shape, 1), (nse, len(shape)))
    kind = rng.choice(["inside", "inside", "padding", "half"], nse) if shape[0] else np.full(nse, "padding")
    indices = np.where((kind == "inside")[:, None], inside, np.array(shape)[None])
    indices[kind == "half"] = rng.choice(half_outside, (kind == "half").sum())
    padding = (indices == shape).all(1)
    data = np.where(padding, 0, rng.normal(size=nse) + 0.1).astype(dtype)  # half out of range keeps its data
    return BCOO((jnp.asarray(data), jnp.asarray(indices, jnp.int32)), shape=shape)


SHAPES = [(1, 1), (3, 5), (4, 1), (0, 3), (5,), (1,)]


@functools.cache
def cases():
    """(shape, nse, tail of w, dtype), the last two being drawn."""
    rng = np.random.default_rng(0)
    choices = ((), (2,), (2, 3)), ("float32", "bfloat16", "float16")
    return [(*case, *(c[rng.integers(3)] for c in choices)) for case in itertools.product(SHAPES, (0, 3, 8))]


def drawn_arguments(seed, dtype=None):
    """x and w of every case."""
    rng = np.random.default_rng(seed)
    return [
        (drawn_bcoo(rng, shape, nse, dtype or own), rng.normal(size=(shape[-1], *tail)).astype(dtype or own))
        for shape, nse, tail, own in cases()
    ]


def close(got, want, dtype="float32", message=""):
    assert got.shape == want.shape, message
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    np.testing.assert_allclose(np.asarray(got, np.float64), want, **tolerance, err_msg=message)


def with_data(x, data):
    return BCOO((data, x.indices), shape=x.shape, indices_sorted=x.indices_sorted, unique_indices=x.unique_indices)


# ---------------------------------------------------------------------------------------------------------------------
# dot


def axes_of(x):
    return [None, *range(-x.ndim, x.ndim)]


SEEDS = st.integers(0, 2**32 - 1)  # values are drawn in a few fixed shapes, which compile once


@jax.jit
def all_of(arguments):
    """Of each x and w: the product, and each sum and mean."""
    results = []
    for x, w in arguments:
        sums = {name: [getattr(js, name)(x, axis) for axis in axes_of(x)] for name in ("sum", "mean")}
        results.append({"dot": js.dot(x, w), **sums})
    return results


@settings(max_examples=10)
@given(seed=SEEDS)
def test_dot_equals_the_oracle(seed):
    arguments = drawn_arguments(seed)
    for case, (x, w), results in zip(cases(), arguments, all_of(arguments), strict=True):
        assert results["dot"].dtype == x.dtype, case
        close(results["dot"], oracles.dot(x, w), x.dtype.name, f"{case}")


@jax.jit
def gradients_of_dot(arguments, cotangents):
    return [
        jax.grad(lambda d, w, x=x, g=g: jnp.vdot(g, js.dot(with_data(x, d), w)), (0, 1))(x.data, w)
        for (x, w), g in zip(arguments, cotangents, strict=True)
    ]


@settings(max_examples=10)
@given(seed=SEEDS)
def test_dot_gradients_equal_those_of_a_dense_program(seed):
    """With respect to the weight S^T g; with respect to the data <g[i], w[j]>, 0 at entries that stand for nothing."""
    rng, arguments = np.random.default_rng(seed), drawn_arguments(seed, "float32")
    cotangents = [rng.normal(size=(*x.shape[:-1], *w.shape[1:])).astype(np.float32) for x, w in arguments]
    results = gradients_of_dot(arguments, cotangents)
    for case, (x, w), g, (by_data, by_w) in zip(cases(), arguments, cotangents, results, strict=True):
        dense = oracles.dense(x).reshape(-1, x.shape[-1])
        flat = g.reshape(len(dense), w[0].size)
        close(by_w, (dense.T @ flat).reshape(w.shape), message=f"{case}")
        want = np.zeros(x.nse)
        for k, index in enumerate(np.asarray(x.indices).tolist()):
            if all(0 <= i < size for i, size in zip(index, x.shape, strict=True)):
                want[k] = flat[index[0] if x.ndim == 2 else 0] @ w[index[-1]].reshape(-1)
        close(by_data, want, message=f"{case}")


def test_dot_derivatives_equal_finite_differences():
    """In float64, the first and the second, forward and reverse, repeats and padding included."""
    rng = np.random.default_rng(0)
    indices = np.array([[2, 0], [0, 1], [0, 1], [3, 4], [1, 3], [3, 2], [0, 9]])  # (3, 4)
    args = rng.normal(size=7), rng.normal(size=(4, 2))
    draw_like = lambda tree: jax.tree.map(lambda x: rng.normal(size=x.shape), tree)  # noqa: E731

    def dot(data, w):
        return js.dot(BCOO((data, indices), shape=(3, 4)), w)

    def backward(*args):
        out, vjp = jax.vjp(dot, *args)
        return vjp(out)

    def forward(args, tangents):
        return jax.jvp(dot, args, tangents)

    functions = {"first": (dot, args), "second forward": (forward, (args, args)), "second reverse": (backward, args)}
    with jax.enable_x64(True):
        tangents = {
            name: (draw_like(args), draw_like(jax.eval_shape(f, *args))) for name, (f, args) in functions.items()
        }

        @jax.jit
        def program(tangents):
            by_name = {name: (*functions[name], *t) for name, t in tangents.items()}
            return dot(*args), {name: directional_derivatives(*t, eps=1e-4) for name, t in by_name.items()}

        out, derivatives = program(tangents)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, oracles.dot(BCOO((args[0], indices), shape=(3, 4)), args[1]), rtol=1e-14)
    for name, (got, want) in derivatives.items():
        same = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-7, err_msg=name)
        jax.tree.map(same, got, want)


def test_dot_leaves_rows_alone_that_no_entry_names():
    """NaN there stays there, and their gradient is exactly 0: a zero in a dense x would give 0 * NaN."""
    data = jnp.array([2.0, 0.0, 7.0, np.nan])
    x = BCOO((data, jnp.array([[0, 1], [2, 4], [2, 0], [0, -1]])), shape=(2, 4))

    @jax.jit
    def all_of(x, w):
        out, vjp = jax.vjp(lambda w: js.dot(x, w), w)
        return out, vjp(jnp.ones(2)), js.grad(lambda w: jnp.sum(js.dot(x, w)))(w)

    out, (gradient,), row_sparse = all_of(x, np.array([np.nan, 3.0, np.nan, np.nan], np.float32))
    np.testing.assert_array_equal(out, [6, 0])
    np.testing.assert_array_equal(gradient, [0, 2, 0, 0])
    assert [i for i in row_sparse.ids.tolist() if i < 4] == [1]  # nor does a lazy optimizer see them


PROMOTIONS = [
    ("int32", "float32", "float32"),
    ("bool", "float32", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "float16", "float32"),
    ("int8", "bfloat16", "bfloat16"),
    ("float16", "float16", "float16"),
]


@in_one_program(*PROMOTIONS)
def promoted(x_dtype, w_dtype, _):
    dense = np.array([[0, 1, 0], [1, 0, 1]]).astype(jnp.dtype(x_dtype))
    arguments = sparse(dense), dense, np.array([1.5, 2.5, 4.0]).astype(jnp.dtype(w_dtype))
    return lambda x, dense, w: (js.dot(x, w), js.dot(dense, w)), arguments


@pytest.mark.parametrize(("x_dtype", "w_dtype", "out"), PROMOTIONS)
def test_dot_promotes(x_dtype, w_dtype, out):
    got, same = promoted(x_dtype, w_dtype, out)
    assert got.dtype == out == same.dtype
    np.testing.assert_array_equal(got.astype(np.float32), [2.5, 5.5])


def test_16_bit_products_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16, so a running sum would stay there."""
    x = sparse(np.array([[256.0] + [1.0] * 60], jnp.bfloat16))
    counts = sparse(np.array([[257, -256]], np.int32))
    ones = np.ones(61, jnp.bfloat16)
    *sums, rest = jax.jit(lambda x, counts, w: (js.dot(x, w)[0], js.sum(x, 1)[0], js.sum(x), js.dot(counts, w[:2])))(
        x, counts, ones
    )
    for got in sums:
        assert got.dtype == jnp.bfloat16 and got.item() == 316
    assert rest.item() == 1  # nor are they rounded before


X_AND_W = list(itertools.product([(3,), (2, 3), (2, 2, 3)], [(3,), (3, 2), (3, 2, 4)]))


def dense_x_and_w(x_shape, w_shape):
    rng = np.random.default_rng(0)
    return rng.normal(size=x_shape).astype(np.float32), rng.normal(size=w_shape).astype(np.float32)


@in_one_program(*X_AND_W)
def products(x_shape, w_shape):
    """Of NumPy's x, of JAX's, and of a BCOO."""
    own, w = dense_x_and_w(x_shape, w_shape)
    xs = (own, sparse(own)) if own.ndim < 3 else (own,)
    return lambda w, *xs: [js.dot(x, w) for x in (own, *xs)], (w, *xs)


@pytest.mark.parametrize("x_shape", [(3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("w_shape", [(3,), (3, 2), (3, 2, 4)])
def test_a_dense_x_is_multiplied_as_a_sparse_one(x_shape, w_shape):
    x, w = dense_x_and_w(x_shape, w_shape)
    outs = products(x_shape, w_shape)
    assert len(outs) == (3 if x.ndim < 3 else 2)
    for out in outs:
        close(out, np.tensordot(x, w, 1))


# ---------------------------------------------------------------------------------------------------------------------
# sum, mean


@pytest.mark.parametrize("name", ["sum", "mean"])
@settings(max_examples=10)
@given(seed=SEEDS)
def test_sum_and_mean_equal_the_oracle(name, seed):
    arguments = drawn_arguments(seed)
    for case, (x, _), results in zip(cases(), arguments, all_of(arguments), strict=True):
        for axis, out in zip(axes_of(x), results[name], strict=True):
            assert out.dtype == x.dtype, (case, axis)
            if name == "sum" or np.prod(x.shape):  # the mean of nothing: see below
                close(out, getattr(oracles, name)(x, axis), x.dtype.name, f"{case}, {axis=}")


DTYPES = ("bool", "int8", "uint8", "float16")


def reduced(dtype):
    """By us, of a BCOO and of its dense self, and by JAX. 300 ones do not fit int8."""
    dense, indices = np.ones((2, 300), dtype), np.array(list(np.ndindex(2, 300)), np.int32)
    x = BCOO((np.ones(600, dtype), indices), shape=(2, 300))
    reduce = lambda module, x: [f(x, axis) for f in (module.sum, module.mean) for axis in (None, 0, 1)]  # noqa: E731
    return lambda x, dense: (reduce(js, x), reduce(js, dense), reduce(jnp, dense)), (x, dense)


reduced_in_32_bits, reduced_in_64_bits = (in_one_program(*((dtype,) for dtype in DTYPES))(reduced) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x64", [False, True])
def test_sum_and_mean_have_the_dtype_of_the_dense_ones(dtype, x64):
    with jax.enable_x64(x64):
        results = (reduced_in_64_bits if x64 else reduced_in_32_bits)(dtype)
    for got, same, want in zip(*results, strict=True):
        assert got.dtype == same.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(same, want)


def test_mean_where_the_sum_or_the_size_overflows():
    full = sparse(np.full((2, 2), 60000.0, np.float16))  # the sum is past float16
    huge = BCOO((jnp.ones(3), jnp.array([[0, 0], [1, 1], [999_999, 999_999]])), shape=(10**6, 10**6))
    of_full, total, of_huge = jax.jit(lambda full, huge: (js.mean(full), js.sum(full), js.mean(huge)))(full, huge)
    assert of_full.item() == 60000 and np.isinf(total)
    np.testing.assert_allclose(of_huge, 3e-12, rtol=1e-6)


def test_the_mean_of_nothing_is_nan_as_for_a_dense_one():
    dense = np.zeros((0, 3), np.float32)
    shapes = {0: (3,), 1: (0,), None: ()}
    means = jax.jit(lambda *xs: [[js.mean(x, axis) for axis in shapes] for x in xs])(sparse(dense), dense)
    for got, want, shape in zip(*means, shapes.values(), strict=True):
        np.testing.assert_array_equal(got, want)
        assert want.shape == shape


REDUCED = BCOO((jnp.arange(1.0, 6.0), jnp.array([[1, 2], [0, 1], [2, 3], [2, 0], [0, 3]])), shape=(2, 3))


def cotangent_of(axis):
    kept = {None: (), 0: (3,), 1: (2,)}[axis]
    return np.arange(1.0, 1 + np.prod(kept), dtype=np.float32).reshape(kept)


@in_one_program((None,), (0,), (1,))
def gradients_of_reductions(axis):
    def gradients(x, g):
        return [jax.grad(lambda d, f=f: jnp.vdot(g, f(with_data(x, d), axis)))(x.data) for f in (js.sum, js.mean)]

    return gradients, (REDUCED, cotangent_of(axis))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_of_sum_and_mean(axis):
    g = cotangent_of(axis)
    want = [g if axis is None else g[i[1 - axis]] for i in ((1, 2), (0, 1))] + [0, 0, 0]  # nothing for padding
    for got, size in zip(gradients_of_reductions(axis), (1, {None: 6, 0: 2, 1: 3}[axis]), strict=True):
        np.testing.assert_allclose(got, np.array(want) / size, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# concatenate


@functools.cache
def parts_to_concatenate():
    """(axis, (shape, nse, dtype) of each part, a weight for the product)."""
    rng, parts = np.random.default_rng(0), []
    for axis, number in itertools.product((0, 1, -1, -2), (1, 2, 3)):
        sizes = rng.integers(axis % 2, 4, number).tolist()  # no rows, but not no columns
        shapes = [(size, 3) if axis % 2 == 0 else (3, size) for size in sizes]
        own = [(shape, rng.choice([0, 3, 8]), str(rng.choice(list(TOLERANCE)))) for shape in shapes]
        parts.append((axis, own, rng.normal(size=(sum(sizes) if axis % 2 else 3, 2)).astype(np.float32)))
    return parts


@jax.jit
def concatenated(arguments):
    results = []
    for (axis, *_), (xs, w) in zip(parts_to_concatenate(), arguments, strict=True):
        x = js.concatenate(xs, axis)
        results.append((x, x.todense(), js.dot(x, w)))
    return results


@settings(max_examples=10)
@given(seed=SEEDS)
def test_concatenate_equals_the_oracle(seed):
    parts = parts_to_concatenate()
    rng = np.random.default_rng(seed)
    arguments = [([drawn_bcoo(rng, *part) for part in own], w) for _, own, w in parts]
    for case, (xs, w), (out, dense, product) in zip(parts, arguments, concatenated(arguments), strict=True):
        message = f"{case[:2]}"
        assert out.dtype == jnp.result_type(*(x.dtype for x in xs)) and out.nse == sum(x.nse for x in xs), message
        want = oracles.concatenate(xs, case[0])
        close(dense, want, out.dtype.name, message)  # by JAX's own reading of a BCOO
        np.testing.assert_array_equal(oracles.dense(out), want, err_msg=message)
        close(product, want @ w, message=message)


CORNER = BCOO((jnp.array([1.0, 5.0, 5.0, 5.0]), jnp.array([[0, 1], [2, 2], [2, 0], [1, 2]])), shape=(2, 2))


@in_one_program((0,), (1,))
def twice(axis):
    w = np.full(2 * (1 + axis), np.nan, np.float32)
    w[[1, 3] if axis == 1 else [1]] = 1

    def concatenate(x, w):
        out = js.concatenate([x, x], axis=axis)
        return out, js.dot(out, w)

    return concatenate, (CORNER, w)


@pytest.mark.parametrize("axis", [0, 1])
def test_concatenate_does_not_make_padding_real(axis):
    """Index 2, padding of the first part, names row or column 2 of the whole, which is the second part's first."""
    out, product = twice(axis)
    assert out.shape == ((4, 2) if axis == 0 else (2, 4))
    size = np.array(out.shape)
    real = (out.indices < size).all(1)
    np.testing.assert_array_equal(real, [True, False, False, False] * 2)
    np.testing.assert_array_equal(out.indices[~real], np.broadcast_to(size, (6, 2)))
    np.testing.assert_array_equal(product, [2, 0] if axis == 1 else [1, 0, 1, 0])


def test_gradients_of_concatenate():
    x = BCOO((jnp.array([1.0, 2.0, 3.0]), jnp.array([[0, 1], [2, 2], [1, 0]])), shape=(2, 2))
    w = jnp.arange(1.0, 5.0)

    def loss(a, b):
        both = js.concatenate([with_data(x, a), with_data(x, b)], axis=1)
        return jnp.vdot(jnp.array([1.0, 10.0]), js.dot(both, w))

    by_first, by_second = jax.jit(jax.grad(loss, (0, 1)))(x.data, x.data)
    np.testing.assert_array_equal(by_first, [2, 0, 10])
    np.testing.assert_array_equal(by_second, [4, 0, 30])


def test_dense_parts_are_concatenated_as_by_jax():
    x, z = np.ones((2, 3), np.float32), jnp.zeros((2, 1))
    np.testing.assert_array_equal(js.concatenate([x, z], axis=1), np.concatenate([x, z], axis=1))


# ---------------------------------------------------------------------------------------------------------------------
# vmap, indices of any type, zeros


def batch_and_w(shape):
    rng = np.random.default_rng(0)
    dense = (rng.normal(size=shape) * (rng.uniform(size=shape) < 0.4)).astype(np.float32)
    dense[1] = 0
    return dense, rng.normal(size=(5, 2)).astype(np.float32)


@in_one_program(((4, 5),), ((4, 3, 5),))
def batched(shape):
    dense, w = batch_and_w(shape)
    nse = int(np.count_nonzero(dense.reshape(4, -1), axis=1).max())

    def each(x, w):
        both = (
            js.dot(js.concatenate([x, x], axis=1), jnp.concatenate([w, 2 * w])) if len(shape) == 3 else 3 * js.dot(x, w)
        )
        return js.dot(x, w), js.sum(x), js.mean(x), js.sum(x, axis=0), both

    def results(dense, w):
        x = BCOO.fromdense(dense, n_batch=1, nse=nse)
        assert x.n_batch == 1
        gradient = jax.grad(lambda w: jnp.sum(jax.vmap(js.dot, (0, None))(x, w)))(w)
        return *jax.vmap(each, (0, None))(x, w), gradient

    return results, (dense, w)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)])
def test_vmap_over_a_batch_dimension(shape):
    """A BCOO with n_batch=1, its members padded to one nse by JAX itself."""
    dense, w = batch_and_w(shape)
    product, total, average, columns, both, gradient = batched(shape)
    close(product, dense @ w)
    close(total, dense.reshape(4, -1).sum(1))
    close(average, dense.reshape(4, -1).mean(1))
    close(columns, dense.sum(1))
    close(both, 3 * dense @ w)
    close(gradient, np.repeat(dense.reshape(-1, 5).sum(0)[:, None], 2, axis=1))


@in_one_program(("int8",), ("uint8",), ("int16",), ("uint32",))
def of_index_type(dtype):
    def results(wide, tall, w):
        sums = js.sum(wide, 0), js.sum(tall, 1)
        return (
            js.dot(wide, w),
            js.dot(tall, w[1:3]),
            sums,
            js.concatenate([wide, wide], 1),
            js.concatenate([tall] * 2, 0),
        )

    wide = BCOO((np.ones(2, np.float32), np.array([[0, 100], [1, 120]], dtype)), shape=(2, 300))
    tall = BCOO((np.ones(2, np.float32), np.array([[100, 0], [120, 1]], dtype)), shape=(300, 2))
    return results, (wide, tall, np.arange(300, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_indices_of_any_integer_type(dtype):
    """Sizes may be larger than the type can count: 300 rows, or 300 columns, and 600 together."""
    by_wide, by_tall, sums, wider, taller = of_index_type(dtype)
    np.testing.assert_array_equal(by_wide, [100, 120])
    np.testing.assert_array_equal(by_tall, np.bincount([100, 120, 120], minlength=300))
    for total in sums:
        np.testing.assert_array_equal(total.nonzero()[0], [100, 120])
    np.testing.assert_array_equal(np.nonzero(oracles.dense(wider))[1], [100, 400, 120, 420])
    np.testing.assert_array_equal(np.nonzero(oracles.dense(taller))[0], [100, 120, 400, 420])


def test_indices_of_64_bits():
    @jax.jit
    def results(x, wide, w):
        return js.dot(x, w), js.concatenate([x, x], 1), js.sum(wide, 1)

    with jax.enable_x64(True):
        x = BCOO((np.ones(3), np.array([[0, 1], [1, 2**32], [0, 2]])), shape=(2, 3))
        wide = BCOO((np.ones(1), np.array([[1, 2**32]])), shape=(2, 2**40))
        product, both, total = results(x, wide, np.array([100.0, 1.0, 2.0]))
    np.testing.assert_array_equal(product, [3, 0])
    np.testing.assert_array_equal(oracles.dense(both).sum(1), [4, 0])
    np.testing.assert_array_equal(total, [0, 1])


def test_from_scipy_to_dot():
    m = scipy.sparse.random_array((20, 30), density=0.1, rng=np.random.default_rng(0), dtype=np.float32).tocsr()
    w = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    x = js.from_scipy(m, nse=m.nnz + 5)
    product, columns, rows = jax.jit(lambda x, w: (js.dot(x, w), js.sum(x, axis=0), js.mean(x, axis=1)))(x, w)
    close(product, m @ w)
    close(columns, m.sum(0))
    close(rows, m.mean(1))


# ---------------------------------------------------------------------------------------------------------------------
# errors

X = sparse(np.eye(2, 3, dtype=np.float32))
BATCHED = BCOO((np.ones((1, 6), np.float32), np.array([list(np.ndindex(2, 3))])), shape=(1, 2, 3))
CSR = scipy.sparse.csr_matrix(np.eye(2))
CSR_OF_JAX = BCSR((np.ones(2, np.float32), np.arange(2), np.arange(3)), shape=(2, 3))
NOT_DENSE = "must be a BCOO or a dense array. Got {} instead. Make one of a SciPy matrix: js.from_scipy(x)."
DIMENSIONS = (
    "must be a BCOO of {} sparse dimensions and no others. Got n_batch={}, n_sparse={}, n_dense=0 instead. "
    "Use jax.vmap over batch dimensions."
)
ERRORS = {
    "dot of SciPy": (
        TypeError, js.dot, (CSR, np.ones(2)), "The 'x' argument of js.dot " + NOT_DENSE.format("csr_matrix"),
    ),
    "sum of a list": (TypeError, js.sum, ([1.0],), "The 'x' argument of js.sum " + NOT_DENSE.format("list")),
    "mean of BCSR": (
        TypeError, js.mean, (CSR_OF_JAX,), "The 'x' argument of js.mean " + NOT_DENSE.format("BCSR"),
    ),
    "sum of RowSparse": (
        TypeError, js.sum, (js.RowSparse([0], np.ones((1, 2)), (3, 2)),),
        "The 'x' argument of js.sum " + NOT_DENSE.format("RowSparse"),
    ),
    "dot of a batch": (
        ValueError, js.dot, (BATCHED, np.ones(3)), "The 'x' argument of js.dot " + DIMENSIONS.format("1 or 2", 1, 2),
    ),
    "concatenate vectors": (
        ValueError, js.concatenate, ([X, sparse(np.ones(3))],),
        "The 'xs[1]' argument of js.concatenate " + DIMENSIONS.format("2", 0, 1),
    ),
    "dot by sparse": (
        TypeError, js.dot, (X, X),
        "The 'w' argument of js.dot must be a dense array. Got BCOO instead. Only x may be sparse.",
    ),
    "dot by SciPy": (
        TypeError, js.dot, (np.eye(2), CSR),
        "The 'w' argument of js.dot must be a dense array. Got csr_matrix instead. Only x may be sparse.",
    ),
    "dot by integers": (
        TypeError, js.dot, (X, np.ones(3, np.int32)),
        "The 'w' argument of js.dot must be a floating-point array. Got x.dtype=dtype('int32') instead.",
    ),
    "dot by too few": (
        ValueError, js.dot, (X, np.ones(2, np.float32)),
        "The 'w' argument of js.dot must be of shape (x.shape[-1], ...) for x.shape=(2, 3). Got w.shape=(2,) instead.",
    ),
    "dot by a scalar": (
        ValueError, js.dot, (X, np.float32(2)),
        "The 'w' argument of js.dot must be of shape (x.shape[-1], ...) for x.shape=(2, 3). Got w.shape=() instead.",
    ),
    "dense dot by too few": (
        ValueError, js.dot, (np.ones((2, 3)), np.ones(2)),
        "The 'w' argument of js.dot must be of shape (x.shape[-1], ...) for x.shape=(2, 3). Got w.shape=(2,) instead.",
    ),
    "no such axis": (
        ValueError, js.sum, (X, 2), "The 'axis' argument of js.sum must be an integer between -2 and 1. Got 2 instead.",
    ),
    "several axes": (
        ValueError, js.mean, (X, (0, 1)),
        "The 'axis' argument of js.mean must be an integer between -2 and 1. Got (0, 1) instead.",
    ),
    "axis of a vector": (
        ValueError, js.sum, (sparse(np.ones(3)), 1),
        "The 'axis' argument of js.sum must be an integer between -1 and 0. Got 1 instead.",
    ),
    "concatenate along no axis": (
        ValueError, js.concatenate, ([X], -3),
        "The 'axis' argument of js.concatenate must be an integer between -2 and 1. Got -3 instead.",
    ),
    "concatenate nothing": (
        ValueError, js.concatenate, ([],),
        "The 'xs' argument of js.concatenate must be a sequence of at least one matrix. Got none instead.",
    ),
    "concatenate dense and sparse": (
        TypeError, js.concatenate, ([X, np.eye(2)],),
        "The 'xs' argument of js.concatenate must be all BCOO or all dense. Got a dense array at position 1 instead. "
        "Make it sparse too: jax.experimental.sparse.BCOO.fromdense(x, nse=...).",
    ),
    "concatenate what does not fit": (
        ValueError, js.concatenate, ([X, sparse(np.eye(2))],),
        "The 'xs' argument of js.concatenate must be of equal size along axis 1. Got [3, 2] instead.",
    ),
    "concatenate past int32": (
        ValueError, js.concatenate, ([BCOO((X.data, X.indices), shape=(2, 2**30))] * 2, 1),
        "The 'xs' argument of js.concatenate must be at most 2147483647 long together along axis 1. "
        "Got 2147483648 instead.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    error, function, args, message = ERRORS[name]
    with pytest.raises(error) as caught:
        function(*args)
    assert str(caught.value) == message
