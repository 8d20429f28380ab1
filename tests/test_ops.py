"""dot, sum, mean and concatenate over BCOO against NumPy, dense gradients and their dense selves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO, BCSR
from jax.test_util import check_grads

import jaxsparse as js
from tests import oracles

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@st.composite
def bcoos(draw, shape=None, dtype=None):
    """BCOO as it may come: unsorted, repeats, no entries, padding; and entries, not zero, half out of range."""
    shape = draw(st.sampled_from([(1, 1), (3, 5), (4, 1), (0, 3), (5,), (1,)])) if shape is None else shape
    inside = st.tuples(*(st.integers(0, max(size - 1, 0)) for size in shape))
    half_outside = st.sampled_from([(0,) * len(shape[1:]) + (shape[-1] + 2,), (shape[0],) + (0,) * len(shape[1:])])
    some = st.one_of(inside, inside, st.just(shape), half_outside) if shape[0] else st.just(shape)
    indices = draw(st.lists(some, max_size=8))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])) if dtype is None else dtype
    data = np.random.default_rng(draw(st.integers(0, 99))).normal(size=len(indices)) + 0.1
    padding = np.array([i == shape for i in indices], bool)
    data = jnp.asarray(np.where(padding, 0, data), dtype)  # half out of range keeps its data
    return BCOO((data, jnp.array(indices, jnp.int32).reshape(len(indices), len(shape))), shape=shape)


def close(got, want, dtype="float32"):
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def with_data(x, data):
    return BCOO((data, x.indices), shape=x.shape, indices_sorted=x.indices_sorted, unique_indices=x.unique_indices)


# ---------------------------------------------------------------------------------------------------------------------
# dot


@given(bcoos(), st.sampled_from([(), (2,), (2, 3)]))
def test_dot_equals_the_oracle(x, tail):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(x.shape[-1], *tail)), x.dtype)
    out = jax.jit(js.dot)(x, w)
    assert out.dtype == x.dtype
    close(out, oracles.dot(x, w), x.dtype.name)


@settings(max_examples=20)
@given(bcoos(dtype="float32"), st.sampled_from([(), (2,)]))
def test_dot_gradients_equal_those_of_a_dense_program(x, tail):
    """With respect to the weight S^T g; with respect to the data <g[i], w[j]>, 0 at entries that stand for nothing."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(x.shape[-1], *tail)), jnp.float32)
    cotangent = rng.normal(size=(*x.shape[:-1], *tail)).astype(np.float32)
    by_data, by_w = jax.jit(jax.grad(lambda d, w: jnp.vdot(cotangent, js.dot(with_data(x, d), w)), (0, 1)))(x.data, w)
    dense = oracles.dense(x).reshape(-1, x.shape[-1])
    g = cotangent.reshape(len(dense), w[0].size)
    close(by_w, np.asarray(dense.T @ g).reshape(w.shape))
    want = np.zeros(x.nse)
    for k, index in enumerate(np.asarray(x.indices).tolist()):
        if all(0 <= i < size for i, size in zip(index, x.shape, strict=True)):
            want[k] = g[index[0] if x.ndim == 2 else 0] @ np.asarray(w)[index[-1]].reshape(-1)
    close(by_data, want)


def test_dot_derivatives_equal_finite_differences():
    """In float64, forward and reverse, repeats and padding included."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        indices = jnp.array([[2, 0], [0, 1], [0, 1], [3, 4], [1, 3], [3, 2], [0, 9]])  # (3, 4)
        x = BCOO((jnp.asarray(rng.normal(size=7)), indices), shape=(3, 4))
        w = jnp.asarray(rng.normal(size=(4, 2)))
        out = js.dot(x, w)
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, oracles.dot(x, w), rtol=1e-14)
        check_grads(jax.jit(lambda d, w: js.dot(with_data(x, d), w)), (x.data, w), 2, eps=1e-4, rtol=1e-7, atol=1e-7)


def test_dot_leaves_rows_alone_that_no_entry_names():
    """NaN there stays there, and their gradient is exactly 0: a zero in a dense x would give 0 * NaN."""
    data = jnp.array([2.0, 0.0, 7.0, np.nan])
    x = BCOO((data, jnp.array([[0, 1], [2, 4], [2, 0], [0, -1]])), shape=(2, 4))
    w = jnp.array([np.nan, 3.0, np.nan, np.nan])
    out, vjp = jax.vjp(lambda w: js.dot(x, w), w)
    np.testing.assert_array_equal(out, [6, 0])
    np.testing.assert_array_equal(vjp(jnp.ones(2))[0], [0, 2, 0, 0])
    gradient = js.grad(lambda w: jnp.sum(js.dot(x, w)))(w)
    assert gradient.ids.tolist() == [1, 4, 4, 4]  # nor does a lazy optimizer see them


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "out"),
    [
        ("int32", "float32", "float32"),
        ("bool", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("int8", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
    ],
)
def test_dot_promotes(x_dtype, w_dtype, out):
    dense = jnp.array([[0, 1, 0], [1, 0, 1]], x_dtype)
    w = jnp.array([1.5, 2.5, 4.0], w_dtype)
    got = js.dot(BCOO.fromdense(dense), w)
    assert got.dtype == out == js.dot(dense, w).dtype
    np.testing.assert_array_equal(got.astype(np.float32), [2.5, 5.5])


def test_16_bit_products_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16, so a running sum would stay there."""
    x = BCOO.fromdense(jnp.array([[256.0] + [1.0] * 60], jnp.bfloat16))
    for got in (js.dot(x, jnp.ones(61, jnp.bfloat16))[0], js.sum(x, 1)[0], js.sum(x)):
        assert got.dtype == jnp.bfloat16 and got.item() == 316
    counts = BCOO.fromdense(jnp.array([[257, -256]]))  # nor are they rounded before
    assert js.dot(counts, jnp.ones(2, jnp.bfloat16)).item() == 1


@pytest.mark.parametrize("x_shape", [(3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("w_shape", [(3,), (3, 2), (3, 2, 4)])
def test_a_dense_x_is_multiplied_as_a_sparse_one(x_shape, w_shape):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=x_shape).astype(np.float32), rng.normal(size=w_shape).astype(np.float32)
    close(js.dot(x, w), np.tensordot(x, w, 1))
    close(js.dot(jnp.asarray(x), w), np.tensordot(x, w, 1))
    if x.ndim < 3:
        close(js.dot(BCOO.fromdense(x), w), np.tensordot(x, w, 1))


# ---------------------------------------------------------------------------------------------------------------------
# sum, mean


@pytest.mark.parametrize("name", ["sum", "mean"])
@given(bcoos(), st.integers(-3, 1))
def test_sum_and_mean_equal_the_oracle(name, x, axis):
    axis = None if axis < -x.ndim or axis >= x.ndim else axis
    if name == "mean" and not np.prod(x.shape):
        return  # of nothing: see below
    out = jax.jit(getattr(js, name), static_argnums=1)(x, axis)
    assert out.dtype == x.dtype
    close(out, getattr(oracles, name)(x, axis), x.dtype.name)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "float16"])
@pytest.mark.parametrize("x64", [False, True])
def test_sum_and_mean_have_the_dtype_of_the_dense_ones(dtype, x64):
    """300 ones do not fit int8."""
    with jax.enable_x64(x64):
        dense = jnp.ones((2, 300), dtype)
        x = BCOO((jnp.ones(600, dtype), jnp.array(list(np.ndindex(2, 300)), jnp.int32)), shape=(2, 300))
        reduce = lambda module, x: [f(x, axis) for f in (module.sum, module.mean) for axis in (None, 0, 1)]  # noqa: E731
        for got, same, want in zip(
            *jax.jit(lambda: (reduce(js, x), reduce(js, dense), reduce(jnp, dense)))(), strict=True
        ):
            assert got.dtype == same.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(same, want)


def test_mean_where_the_sum_or_the_size_overflows():
    full = BCOO.fromdense(jnp.full((2, 2), 60000.0, jnp.float16))  # the sum is past float16
    assert js.mean(full).item() == 60000 and np.isinf(js.sum(full))
    huge = BCOO((jnp.ones(3), jnp.array([[0, 0], [1, 1], [999_999, 999_999]])), shape=(10**6, 10**6))
    np.testing.assert_allclose(js.mean(huge), 3e-12, rtol=1e-6)


def test_the_mean_of_nothing_is_nan_as_for_a_dense_one():
    x = jnp.zeros((0, 3))
    for axis, shape in ((0, (3,)), (1, (0,)), (None, ())):
        np.testing.assert_array_equal(js.mean(BCOO.fromdense(x), axis), js.mean(x, axis))
        assert js.mean(x, axis).shape == shape


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_of_sum_and_mean(axis):
    x = BCOO((jnp.arange(1.0, 6.0), jnp.array([[1, 2], [0, 1], [2, 3], [2, 0], [0, 3]])), shape=(2, 3))
    kept = {None: (), 0: (3,), 1: (2,)}[axis]
    g = np.arange(1.0, 1 + np.prod(kept), dtype=np.float32).reshape(kept)
    want = [g if axis is None else g[i[1 - axis]] for i in ((1, 2), (0, 1))] + [0, 0, 0]  # nothing for padding
    for name, size in (("sum", 1), ("mean", {None: 6, 0: 2, 1: 3}[axis])):
        got = jax.grad(lambda d, n=name: jnp.vdot(g, getattr(js, n)(with_data(x, d), axis)))(x.data)
        np.testing.assert_allclose(got, np.array(want) / size, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# concatenate


@settings(max_examples=20)
@given(st.data(), st.sampled_from([0, 1, -1, -2]), st.integers(1, 3))
def test_concatenate_equals_the_oracle(data, axis, number):
    sizes = [data.draw(st.integers(0 if axis % 2 == 0 else 1, 3)) for _ in range(number)]
    xs = [data.draw(bcoos(shape=(size, 3) if axis % 2 == 0 else (3, size))) for size in sizes]
    w = np.random.default_rng(0).normal(size=(sum(sizes) if axis % 2 else 3, 2)).astype(np.float32)
    out, dense, product = jax.jit(lambda xs: (x := js.concatenate(xs, axis), x.todense(), js.dot(x, w)))(xs)
    assert out.dtype == jnp.result_type(*(x.dtype for x in xs)) and out.nse == sum(x.nse for x in xs)
    want = oracles.concatenate(xs, axis)
    close(dense, want, out.dtype.name)  # by JAX's own reading of a BCOO
    np.testing.assert_array_equal(oracles.dense(out), want)
    close(product, want @ w)


@pytest.mark.parametrize("axis", [0, 1])
def test_concatenate_does_not_make_padding_real(axis):
    """Index 2, padding of the first part, names row or column 2 of the whole, which is the second part's first."""
    x = BCOO((jnp.array([1.0, 5.0, 5.0, 5.0]), jnp.array([[0, 1], [2, 2], [2, 0], [1, 2]])), shape=(2, 2))
    out = js.concatenate([x, x], axis=axis)
    size = np.array(out.shape)
    real = (np.asarray(out.indices) < size).all(1)
    np.testing.assert_array_equal(real, [True, False, False, False] * 2)
    np.testing.assert_array_equal(out.indices[~real], np.broadcast_to(size, (6, 2)))
    w = np.full(out.shape[1], np.nan, np.float32)
    w[[1, 3] if axis == 1 else [1]] = 1
    np.testing.assert_array_equal(js.dot(out, w), [2, 0] if axis == 1 else [1, 0, 1, 0])


def test_gradients_of_concatenate():
    x = BCOO((jnp.array([1.0, 2.0, 3.0]), jnp.array([[0, 1], [2, 2], [1, 0]])), shape=(2, 2))
    w = jnp.arange(1.0, 5.0)

    def loss(a, b):
        both = js.concatenate([with_data(x, a), with_data(x, b)], axis=1)
        return jnp.vdot(jnp.array([1.0, 10.0]), js.dot(both, w))

    by_first, by_second = jax.grad(loss, (0, 1))(x.data, x.data)
    np.testing.assert_array_equal(by_first, [2, 0, 10])
    np.testing.assert_array_equal(by_second, [4, 0, 30])


def test_dense_parts_are_concatenated_as_by_jax():
    x, z = np.ones((2, 3), np.float32), jnp.zeros((2, 1))
    np.testing.assert_array_equal(js.concatenate([x, z], axis=1), np.concatenate([x, z], axis=1))


# ---------------------------------------------------------------------------------------------------------------------
# vmap, indices of any type, zeros


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)])
def test_vmap_over_a_batch_dimension(shape):
    """A BCOO with n_batch=1, its members padded to one nse by JAX itself."""
    rng = np.random.default_rng(0)
    dense = (rng.normal(size=shape) * (rng.uniform(size=shape) < 0.4)).astype(np.float32)
    dense[1] = 0
    x, w = BCOO.fromdense(dense, n_batch=1), rng.normal(size=(5, 2)).astype(np.float32)
    assert x.n_batch == 1

    def each(x):
        both = (
            js.dot(js.concatenate([x, x], axis=1), jnp.concatenate([w, 2 * w])) if len(shape) == 3 else 3 * js.dot(x, w)
        )
        return js.dot(x, w), js.sum(x), js.mean(x), js.sum(x, axis=0), both

    product, total, average, columns, both = jax.jit(jax.vmap(each))(x)
    close(product, dense @ w)
    close(total, dense.reshape(4, -1).sum(1))
    close(average, dense.reshape(4, -1).mean(1))
    close(columns, dense.sum(1))
    close(both, 3 * dense @ w)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(jax.vmap(js.dot, (0, None))(x, w))))(w)
    close(gradient, np.repeat(dense.reshape(-1, 5).sum(0)[:, None], 2, axis=1))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_indices_of_any_integer_type(dtype):
    """Sizes may be larger than the type can count: 300 rows, or 300 columns, and 600 together."""
    w = np.arange(300, dtype=np.float32)
    wide = BCOO((jnp.ones(2), jnp.array([[0, 100], [1, 120]], dtype)), shape=(2, 300))
    tall = BCOO((jnp.ones(2), jnp.array([[100, 0], [120, 1]], dtype)), shape=(300, 2))
    np.testing.assert_array_equal(js.dot(wide, w), [100, 120])
    np.testing.assert_array_equal(js.dot(tall, w[1:3]), np.bincount([100, 120, 120], minlength=300))
    np.testing.assert_array_equal(js.sum(wide, 0).nonzero()[0], [100, 120])
    np.testing.assert_array_equal(js.sum(tall, 1).nonzero()[0], [100, 120])
    np.testing.assert_array_equal(np.nonzero(oracles.dense(js.concatenate([wide, wide], 1)))[1], [100, 400, 120, 420])
    np.testing.assert_array_equal(np.nonzero(oracles.dense(js.concatenate([tall, tall], 0)))[0], [100, 120, 400, 420])


def test_indices_of_64_bits():
    with jax.enable_x64(True):
        x = BCOO((jnp.ones(3), jnp.array([[0, 1], [1, 2**32], [0, 2]])), shape=(2, 3))
        np.testing.assert_array_equal(js.dot(x, np.array([100.0, 1.0, 2.0])), [3, 0])
        np.testing.assert_array_equal(oracles.dense(js.concatenate([x, x], 1)).sum(1), [4, 0])
        wide = BCOO((jnp.ones(1), jnp.array([[1, 2**32]])), shape=(2, 2**40))
        np.testing.assert_array_equal(js.sum(wide, 1), [0, 1])


def test_from_scipy_to_dot():
    m = scipy.sparse.random_array((20, 30), density=0.1, rng=np.random.default_rng(0), dtype=np.float32).tocsr()
    w = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    x = js.from_scipy(m, nse=m.nnz + 5)
    close(js.dot(x, w), m @ w)
    close(js.sum(x, axis=0), m.sum(0))
    close(js.mean(x, axis=1), m.mean(1))


# ---------------------------------------------------------------------------------------------------------------------
# errors

X = BCOO.fromdense(np.eye(2, 3, dtype=np.float32))
BATCHED = BCOO.fromdense(np.ones((1, 2, 3), np.float32), n_batch=1)
CSR = scipy.sparse.csr_matrix(np.eye(2))
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
        TypeError, js.mean, (BCSR.from_bcoo(X),), "The 'x' argument of js.mean " + NOT_DENSE.format("BCSR"),
    ),
    "sum of RowSparse": (
        TypeError, js.sum, (js.RowSparse([0], np.ones((1, 2)), (3, 2)),),
        "The 'x' argument of js.sum " + NOT_DENSE.format("RowSparse"),
    ),
    "dot of a batch": (
        ValueError, js.dot, (BATCHED, np.ones(3)), "The 'x' argument of js.dot " + DIMENSIONS.format("1 or 2", 1, 2),
    ),
    "concatenate vectors": (
        ValueError, js.concatenate, ([X, BCOO.fromdense(np.ones(3))],),
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
        ValueError, js.sum, (BCOO.fromdense(np.ones(3)), 1),
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
        ValueError, js.concatenate, ([X, BCOO.fromdense(np.eye(2))],),
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
