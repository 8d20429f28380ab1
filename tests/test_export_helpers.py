"""What written models contain, each function against NumPy written out or against JAX, on values that are drawn.

tests/test_export_numpy.py runs whole written models, in which these are copies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxsparse.export import helpers

V, D = 5, 3
FLOATS = st.floats(-4, 4, width=32)


def ids(*shape):
    """Some of them outside of a table of V rows."""
    return arrays(np.int32, shape, elements=st.integers(-3, V + 2))


def floats(*shape):
    return arrays(np.float32, shape, elements=FLOATS)


def test_load(tmp_path, monkeypatch):
    np.save(tmp_path / "kernel.npy", np.arange(6).reshape(2, 3))
    monkeypatch.setattr(helpers, "__file__", str(tmp_path / "model.py"))
    assert helpers.load("kernel").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("x", "dtype", "shape", "becomes"),
    [
        ([[1, 2]], "float32", (None, 2), [[1.0, 2.0]]),
        ([], "int32", (None,), []),
        ([True, False], "float32", (2,), [1.0, 0.0]),
        (np.array([7, 8]), "int8", (2,), [7, 8]),
        ([True], "bool", (1,), [True]),
    ],
)
def test_array(x, dtype, shape, becomes):
    got = helpers.array(x, "x", dtype, *shape)
    assert got.dtype == dtype and got.tolist() == becomes


def test_an_array_that_fits_is_not_copied():
    x = np.ones(3, np.float32)
    assert helpers.array(x, "x", np.float32, None) is x


@pytest.mark.parametrize(
    ("x", "dtype", "shape", "error", "says"),
    [
        ([1], "int32", (None, 2), ValueError, r"x must be of shape \(any, 2\)\. Got \(1,\) instead"),
        ([1], "int32", (2,), ValueError, r"of shape \(2,\)\. Got \(1,\)"),
        ([1.0], "int32", (1,), TypeError, "numbers that fit int32. Got float64"),
        ([1], "bool", (1,), TypeError, "numbers that fit bool. Got int64"),
        ([1j], "float32", (1,), TypeError, "numbers that fit float32. Got complex128"),
        ([1, 300], "uint8", (2,), OverflowError, "fit uint8. Got numbers from 1 to 300"),
        ([-1, 3], "uint8", (2,), OverflowError, "fit uint8. Got numbers from -1 to 3"),
    ],
)
def test_arrays_that_do_not_fit(x, dtype, shape, error, says):
    with pytest.raises(error, match=says):
        helpers.array(x, "x", dtype, *shape)


@given(arrays(np.float32, (4, V), elements=st.sampled_from([0, 0, 1, 2])))
def test_csr(dense):
    matrix = scipy.sparse.csr_matrix(dense)
    parts = {name: getattr(matrix, name) for name in ("data", "indices", "indptr")}
    for x in (matrix, parts, tuple(parts.values()), [part.tolist() for part in parts.values()]):
        for num_rows in (None, 4):
            data, rows, columns, n = helpers.csr(x, "x", np.float32, num_rows, V)
            made = np.zeros_like(dense)
            made[rows, columns] = data
            assert n == 4 and (made == dense).all() and (np.diff(rows) >= 0).all()


def test_entries_behind_the_end_of_a_csr_are_left_out():
    assert helpers.csr(([1, 2, 9], [0, 1, 77], [0, 1, 2]), "x", np.float32, None, V)[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("x", "num_rows", "error", "says"),
    [
        (scipy.sparse.csc_matrix((2, V)), None, TypeError, r"x must be a CSR matrix. Got csc instead: call .tocsr\(\)"),
        (([], [], []), None, ValueError, "x.indptr must start with 0"),
        (([1], [0], [1, 1]), None, ValueError, "x.indptr must start with 0"),
        (([1], [0], [0, 1, 0]), None, ValueError, "not decrease"),
        (([1], [0], [0, 2]), None, ValueError, "end within the indices"),
        (([1], [0], [0, 1]), 2, ValueError, "x must have 2 rows. Got 1 instead"),
        (([1], [V], [0, 1]), None, ValueError, r"x.indices must be in \[0, 5\). Got 5 to 5 instead"),
        (([1], [-1], [0, 1]), None, ValueError, r"Got -1 to -1 instead"),
        (([], [0], [0, 1]), None, ValueError, r"x.data must be of shape \(1,\). Got \(0,\)"),
    ],
)
def test_csrs_that_do_not_fit(x, num_rows, error, says):
    with pytest.raises(error, match=says):
        helpers.csr(x, "x", np.float32, num_rows, V)


def row_of(table, i, fill, clip):
    if clip:
        return table[min(max(i, 0), len(table) - 1)]
    return table[i] if 0 <= i < len(table) else np.full_like(table[0], fill)


@given(floats(V, D), ids(2, 4), st.sampled_from([0, -7, np.nan]))
def test_rows(table, ids, fill):
    for clip in (False, True):
        want = np.stack([[row_of(table, i, fill, clip) for i in bag] for bag in ids])
        np.testing.assert_array_equal(helpers.rows(table, ids, fill, clip), want)
        np.testing.assert_array_equal(helpers.rows(table, ids[0, 0], fill, clip), want[0, 0])
        np.testing.assert_allclose(helpers.bags(table, ids, fill, clip), want.sum(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(helpers.rows(table, ids % V), table[ids % V])


@given(floats(V, D), ids(2, 4), st.sampled_from([None, 0, -7, np.nan]))
def test_rows_of_bfloat16(table, ids, fill):
    table = np.asarray(jnp.asarray(table, jnp.bfloat16))
    ids = ids % V if fill is None else ids
    wide, halves = table.astype(np.float32), table.view(np.uint16)
    want = np.stack([[row_of(wide, i, fill, False) for i in bag] for bag in ids])
    np.testing.assert_array_equal(helpers.rows_of_bfloat16(halves, ids, fill), want)
    clipped = np.stack([[row_of(wide, i, fill, True) for i in bag] for bag in ids])
    np.testing.assert_array_equal(helpers.rows_of_bfloat16(halves, ids, clip=True), clipped)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1030, 2), (3, 700)])
def test_bags_of_all_sizes(shape):
    table, ids = np.eye(V, D, dtype=np.float32), np.arange(math.prod(shape)).reshape(shape) % V
    np.testing.assert_array_equal(helpers.bags(table, ids), table[ids].sum(1))


@given(ids(6), floats(6, D))
def test_sum_by(ids, values):
    for these in (ids, ids % V):
        want = np.zeros((V, D), np.float32)
        for i, value in zip(these, values, strict=True):
            if 0 <= i < V:
                want[i] += value
        np.testing.assert_allclose(helpers.sum_by(these, values, V), want, rtol=1e-6)


@given(arrays(np.float32, (4, V), elements=st.sampled_from([0, 0, 1, -2])), floats(V, D))
def test_dot(dense, table):
    x = scipy.sparse.coo_matrix(scipy.sparse.csr_matrix(dense))
    np.testing.assert_allclose(helpers.dot(x.row, x.col, x.data, table, 4), dense @ table, rtol=1e-5, atol=1e-5)


GATHERS = {  # of (3, V, D): the sizes, and what jax.lax.GatherDimensionNumbers takes
    "one axis": ((3, 1, D), {"offset_dims": (0, 2), "collapsed_slice_dims": (1,), "start_index_map": (1,)}),
    "two axes": ((1, 1, D), {"offset_dims": (2,), "collapsed_slice_dims": (0, 1), "start_index_map": (1, 0)}),
    "a window": ((2, 3, 1), {"offset_dims": (1, 2, 3), "collapsed_slice_dims": (), "start_index_map": (0, 1)}),
    "a batch": (
        (1, 2, D),
        {
            "offset_dims": (1, 2),
            "collapsed_slice_dims": (),
            "start_index_map": (1,),
            "operand_batching_dims": (0,),
            "start_indices_batching_dims": (0,),
        },
    ),
}


@pytest.mark.parametrize("name", GATHERS)
def test_gather(name):
    sizes, dims = GATHERS[name]
    shape = (3, 2, len(dims["start_index_map"])) if "batch" in name else (4, 2, len(dims["start_index_map"]))
    numbers = jax.lax.GatherDimensionNumbers(**dims)
    ways = {None: jax.lax.GatherScatterMode.CLIP, -7: jax.lax.GatherScatterMode.FILL_OR_DROP}
    compiled = {
        fill: jax.jit(lambda x, at, fill=fill: jax.lax.gather(x, at, numbers, sizes, mode=ways[fill], fill_value=fill))
        for fill in ways
    }

    @given(floats(3, V, D), ids(*shape))
    def run(x, places):
        for fill, gather in compiled.items():
            np.testing.assert_array_equal(helpers.gather(x, places, sizes, **dims, fill=fill), gather(x, places))

    run()


SCATTERS = {  # into (3, V, D): the shape of the new values, and what jax.lax.ScatterDimensionNumbers takes
    "one axis": (
        (3, 4, 2, D),
        {"update_window_dims": (0, 3), "inserted_window_dims": (1,), "scatter_dims_to_operand_dims": (1,)},
    ),
    "two axes": (
        (4, 2, D),
        {"update_window_dims": (2,), "inserted_window_dims": (0, 1), "scatter_dims_to_operand_dims": (1, 0)},
    ),
    "a window": (
        (4, 2, 2, 3, 1),
        {"update_window_dims": (2, 3, 4), "inserted_window_dims": (), "scatter_dims_to_operand_dims": (0, 1)},
    ),
    "a batch": (
        (3, 2, 2, D),
        {
            "update_window_dims": (2, 3),
            "inserted_window_dims": (),
            "scatter_dims_to_operand_dims": (1,),
            "operand_batching_dims": (0,),
            "scatter_indices_batching_dims": (0,),
        },
    ),
}
CHANGES = [(np.add, jax.lax.scatter_add), (np.maximum, jax.lax.scatter_max)]


def put_one_by_one(x, places, new):
    """What jax.lax.scatter leaves open if a place is named twice: the last value counts, as in NumPy."""
    out = x.copy()
    for i, value in zip(places, new, strict=True):
        if 0 <= i < len(x):
            out[i] = value
    return out


@pytest.mark.parametrize("name", SCATTERS)
def test_scatter(name):
    shape, dims = SCATTERS[name]
    components = len(dims["scatter_dims_to_operand_dims"])
    numbers = jax.lax.ScatterDimensionNumbers(**dims)
    modes = {False: jax.lax.GatherScatterMode.FILL_OR_DROP, True: jax.lax.GatherScatterMode.CLIP}
    compiled = {
        (ours, clip): jax.jit(lambda x, at, new, f=jaxs, mode=mode: f(x, at, new, numbers, mode=mode))
        for ours, jaxs in CHANGES
        for clip, mode in modes.items()
    }

    @given(floats(3, V, D), ids(3 if "batch" in name else 4, 2, components), floats(*shape))
    def run(x, places, new):
        for (ours, clip), scatter in compiled.items():
            got = helpers.scatter(ours, x, places, new, **dims, clip=clip)
            np.testing.assert_allclose(got, scatter(x, places, new), rtol=1e-5, atol=1e-5)

    run()


@given(floats(V, D), ids(4, 1), floats(4, D))
def test_scatter_sets(x, places, new):
    dims = {"update_window_dims": (1,), "inserted_window_dims": (0,), "scatter_dims_to_operand_dims": (0,)}
    got = helpers.scatter(None, x, places, new, **dims)
    np.testing.assert_array_equal(got, put_one_by_one(x, places[:, 0], new))
    got = helpers.scatter(None, x, places, new, **dims, clip=True)
    np.testing.assert_array_equal(got, put_one_by_one(x, np.clip(places[:, 0], 0, V - 1), new))


@jax.jit
def parts(x, new, starts):
    as_they_are = {"allow_negative_indices": False}  # where they are negative: into the array, as if they were 0
    return (
        jax.lax.dynamic_slice(x, starts, new.shape, **as_they_are),
        jax.lax.dynamic_update_slice(x, new, starts, **as_they_are),
    )


@given(floats(V, D), floats(2, 2), st.tuples(st.integers(-3, 7), st.integers(-3, 7)))
def test_parts(x, new, starts):
    read, written = parts(x, new, starts)
    np.testing.assert_array_equal(helpers.part(x, starts, new.shape), read)
    np.testing.assert_array_equal(helpers.with_part(x, new, starts), written)


@given(arrays(np.float32, (4, 6), elements=st.sampled_from([0, 1, 2, -1])), st.integers(0, 4), st.sampled_from([0, 1]))
def test_top(x, k, axis):
    lists = np.moveaxis(x, axis, -1)
    want = [sorted(range(len(values)), key=lambda i, v=values: (-v[i], i))[:k] for values in lists.tolist()]
    np.testing.assert_array_equal(np.moveaxis(helpers.top(x, k, axis), axis, -1), np.reshape(want, (len(lists), k)))


@given(arrays(np.float32, 9, elements=st.floats(-9, 9, width=32)))
def test_functions_of_numbers(x):
    exactly = lambda function: np.array([function(float(v)) for v in x])  # noqa: E731
    for got, want, rtol, atol in [
        (helpers.erf(x), exactly(math.erf), 0, 1e-7),
        (helpers.erfc(x), exactly(math.erfc), 1e-7, 1e-45),
        (helpers.sigmoid(x), exactly(lambda v: 1 / (1 + math.exp(-v))), 1e-6, 0),
        (helpers.round_away(x), exactly(lambda v: math.copysign(math.floor(abs(v) + 0.5), v)), 0, 0),
        (helpers.polynomial(x, [2, -1, 3]), exactly(lambda v: 2 - v + 3 * v * v), 1e-5, 1e-5),
    ]:
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@given(
    arrays(np.int32, 6, elements=st.integers(-20, 20)), arrays(np.int32, 6, elements=st.integers(1, 6)), st.booleans()
)
def test_truncated_division(a, b, negative):
    b = -b if negative else b
    want = [math.trunc(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert helpers.truncated_division(a, b).tolist() == want


def test_along():
    assert helpers.along(np.arange(3), [1], 3).shape == (1, 3, 1)
    assert helpers.along(np.zeros((2, 3)), [0, 3], 4).shape == (2, 1, 1, 3)
