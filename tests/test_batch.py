"""From SciPy and id lists to batches: every row once, nothing clipped, few shapes, and bounds that hold."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO, BCSR

import jaxsparse as js
from tests.marks import slow_but

V = 23  # rows of every table, columns of every matrix
SIZES_AND_DEVICES = [(1, None), (7, None), (64, None), (4, 1), (8, 2), (8, 8)]
rng_of = np.random.default_rng


def zipf(rng, shape, num_rows=V):
    return np.minimum(rng.zipf(1.5, shape) - 1, num_rows - 1)


def random_csr(rng, n, columns=V, density=0.2):
    """Duplicates, explicit zeros, unsorted, and empty rows as they come."""
    nnz = int(n * columns * density)
    rows, cols = rng.integers(0, max(n, 1), nnz), zipf(rng, nnz, columns)
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]) if n else [0]
    return sp.csr_matrix((rng.integers(-3, 4, nnz).astype(np.float32), cols[order], indptr), shape=(n, columns))


KINDS = {
    "csr": random_csr,
    "ids": lambda rng, n: zipf(rng, (n, 3)),
    "ids_1d": zipf,
    "lists": lambda rng, n: [zipf(rng, length).tolist() for length in rng.poisson(2.0, n)],
    "dense": lambda rng, n: rng.normal(size=(n, 2)).astype(np.float32),
    "dict": lambda rng, n: {
        **{"words": KINDS["csr"](rng, n), "user": KINDS["ids_1d"](rng, n), "ages": KINDS["dense"](rng, n)},
        "more": {"items": KINDS["lists"](rng, n), "clicks": KINDS["ids"](rng, n)},
    },
}


def rows_for(x):
    """num_rows for the ids of x, if it has any."""
    return V if sp.issparse(x) or isinstance(x, (list, dict)) or x.dtype.kind in "iu" else None


def densify(x):
    """A BCOO of NumPy arrays, dense; its padding must be BCOO's own, and come last."""
    at = np.asarray(x.indices)
    padding = (at == x.shape).all(axis=1)
    assert ((at >= 0) & (at < x.shape))[~padding].all() and not np.asarray(x.data)[padding].any()
    assert [tuple(i) for i in at] == sorted(map(tuple, at))
    out = np.zeros((x.shape[0] + 1, x.shape[1] + 1), x.data.dtype)
    np.add.at(out, tuple(at.T), np.asarray(x.data))
    return out[:-1, :-1]


def shards(batch, devices=None):
    """The batch of each device, in NumPy."""
    batch = jax.tree.map(np.asarray, batch)
    return [batch] if devices is None else [jax.tree.map(lambda a, i=i: a[i], batch) for i in range(devices)]


def check_rows(x, got, examples, padding):
    """The rows of `got` are these examples of x; those after them are padding that touches nothing new."""
    k = len(examples)
    if isinstance(x, dict):
        assert got.keys() == x.keys()
        for name in x:
            check_rows(x[name], got[name], examples, padding)
    elif isinstance(x, list):
        assert got.dtype == np.int32
        for row, example in zip(got, examples, strict=False):
            assert row.tolist() == x[example] + [padding] * (len(row) - len(x[example]))
        assert (got[k:] == padding).all()
    elif sp.issparse(x):
        assert got.shape == (got.shape[0], x.shape[1]) and got.indices.dtype == np.int32
        np.testing.assert_array_equal(densify(got)[:k], x.toarray()[examples])
        assert not densify(got)[k:].any() and not np.isin(got.indices[:, 0], range(k, got.shape[0])).any()
    else:
        np.testing.assert_array_equal(got[:k], x[examples])


def signature(batch):
    return jax.tree.structure(batch), tuple((a.shape, a.dtype) for a in jax.tree.leaves(batch))


def assert_same(ours, theirs):
    """Bit-identical batches, in their static fields too: another would compile again."""
    assert list(map(signature, ours)) == list(map(signature, theirs))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_raises(error, says, function, *args, **kwargs):
    """`says` is "argument: what it must be. Got ..."."""
    argument, must = says.split(": ", 1)
    name = "from_scipy" if function is js.from_scipy else "batches"
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    assert str(raised.value).startswith(f"The '{argument}' argument of js.{name} must be {must}")


# ---- from_scipy


@pytest.mark.parametrize("container", ["matrix", "array"])
@pytest.mark.parametrize("fmt", ["csr", "csc", "coo", "bsr", "dia", "dok", "lil"])
@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 4), st.integers(0, 9))
def test_from_scipy_equals_scipy(container, fmt, n, columns, extra, seed):
    matrix = getattr(sp, f"{fmt}_{container}")(random_csr(rng_of(seed), n, columns, 0.5))
    canonical = matrix.tocsr(copy=True)
    canonical.sum_duplicates()
    x = js.from_scipy(matrix, nse=canonical.nnz + extra)
    assert isinstance(x, BCOO) and x.shape == (n, columns) and x.nse == canonical.nnz + extra
    assert x.indices.dtype == jnp.int32
    np.testing.assert_array_equal(densify(x), matrix.toarray())
    np.testing.assert_array_equal(np.asarray(x.data)[: canonical.nnz], canonical.data)  # explicit zeros among them
    if not extra:
        assert js.from_scipy(matrix).nse == canonical.nnz


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("fmt", ["csr", "csc", "coo"])
def test_from_scipy_index_types(fmt, dtype):
    matrix = sp.csr_matrix(np.eye(4, 5, 1, dtype=np.float32)).asformat(fmt)
    if fmt == "coo":
        matrix.row, matrix.col = matrix.row.astype(dtype), matrix.col.astype(dtype)
    else:
        matrix.indices, matrix.indptr = matrix.indices.astype(dtype), matrix.indptr.astype(dtype)
    np.testing.assert_array_equal(densify(js.from_scipy(matrix)), np.eye(4, 5, 1))
    for batch in js.batches(matrix, batch_size=4):
        np.testing.assert_array_equal(densify(batch.x), np.eye(4, 5, 1))


@pytest.mark.parametrize("wrap", [js.from_scipy, partial(js.batches, batch_size=2)])
def test_the_callers_matrix_is_not_modified(wrap):
    data, indices, indptr = np.array([1.0, 2, 3, 0]), np.array([1, 0, 1, 2]), np.array([0, 3, 4])
    matrix = sp.csr_matrix((data, indices, indptr), shape=(2, 3))
    wrap(matrix)
    assert matrix.data.tolist() == [1, 2, 3, 0] and matrix.indices.tolist() == [1, 0, 1, 2] and matrix.nnz == 4
    assert js.from_scipy(matrix).data.tolist() == [2, 4, 0]  # duplicates summed, the zero kept


def test_from_scipy_dtypes_and_wide_matrices():
    table = [(np.float64, "float32"), (np.int64, "int32"), (np.uint64, "uint32"), (np.bool_, "bool"), (np.int8, "int8")]
    for given_dtype, kept in table:
        assert js.from_scipy(sp.eye_array(3, dtype=given_dtype, format="csr")).data.dtype == kept
    with jax.enable_x64(True):
        assert js.from_scipy(sp.eye_array(3, format="csr")).data.dtype == jnp.float64
        assert js.from_scipy(sp.csr_array([[2**40]])).data.tolist() == [2**40]
        (batch,) = js.batches(sp.eye_array(3, format="csr"), [0.1, 0.2, 0.3], batch_size=3)
        assert batch.x.data.dtype == batch.y.dtype == jnp.float64 and batch.x.indices.dtype == jnp.int32
    wide = sp.coo_array(([1.0], ([0], [2**31 - 3])), shape=(1, 2**31 - 2))
    assert js.from_scipy(wide, nse=2).indices.tolist() == [[0, 2**31 - 3], [1, 2**31 - 2]]
    (batch,) = js.batches(wide, batch_size=2)
    assert batch.x.indices[0].tolist() == [0, 2**31 - 3]


def out_of_range(fmt, index):
    matrix = sp.eye_array(3, format=fmt)
    matrix.indices[1] = index
    return matrix


@pytest.mark.parametrize("matrix, nse, error, says", [
    (sp.eye_array(3), 2, ValueError, "nse: at least the number of stored entries, 3. Got 2"),
    (sp.eye_array(3), -1, ValueError, "nse: at least the number of stored entries, 3. Got -1"),
    (sp.eye_array(3), 3.5, ValueError, "nse: at least the number of stored entries, 3. Got 3.5"),
    (np.eye(3), None, TypeError, "matrix: a SciPy sparse matrix. Got ndarray"),
    (sp.coo_array([1, 2]), None, ValueError, "matrix: of two dimensions. Got shape (2,)"),
    (sp.csr_array([[0, 1], [0, 2**31]]), None, OverflowError,
     "matrix: within int32. Got 2147483648 at row 1, column 1"),
    (sp.csr_array([[0, -(2**40)]]), None, OverflowError,
     "matrix: within int32. Got -1099511627776 at row 0, column 1"),
    (sp.csr_array((1, 2**31)), None, OverflowError,
     "matrix: of dimensions below 2147483647. Got shape (1, 2147483648)"),
    (sp.eye_array(2, dtype=np.longdouble), None, TypeError, "matrix: of numbers that JAX has a dtype for. Got "),
    (out_of_range("csr", 7), None, ValueError, "matrix: of column indices in [0, 3). Got 7 in row 1"),
    (out_of_range("csr", -1), None, ValueError, "matrix: of column indices in [0, 3). Got -1 in row 1"),
    (out_of_range("csc", 3), None, ValueError, "matrix: of row indices in [0, 3). Got 3 in column 1"),
    (out_of_range("csc", -2), None, ValueError, "matrix: of row indices in [0, 3). Got -2 in column 1"),
])  # fmt: skip
def test_from_scipy_refuses(matrix, nse, error, says):
    assert_raises(error, says, js.from_scipy, matrix, nse=nse)


# ---- every row once


def epoch_rows(batches, x, padding, devices=None):
    """The examples of an epoch in order, by y = their number; checks each batch on the way."""
    seen = []
    for batch in batches:
        assert batch.weight.dtype == np.float32
        for shard in shards(batch, devices):
            real = shard.y[shard.weight > 0]
            assert (shard.weight[: len(real)] == 1).all() and not shard.weight[len(real) :].any()
            check_rows(x, shard.x, real, padding)
            seen.extend(real.tolist())
    return seen


@given(
    st.sampled_from(list(KINDS)), st.integers(0, 13), st.sampled_from(SIZES_AND_DEVICES),
    st.booleans(), st.booleans(), st.integers(0, 5),
)  # fmt: skip
def test_every_row_once_an_epoch(kind, n, size_and_devices, shuffle, drop_remainder, seed):
    batch_size, devices = size_and_devices
    x = KINDS[kind](rng_of(seed), n)
    options = {"batch_size": batch_size, "devices": devices, "shuffle": shuffle, "drop_remainder": drop_remainder}
    options["seed"] = seed
    batches, again = (js.batches(x, np.arange(n), num_rows=rows_for(x), **options) for _ in range(2))
    assert len(batches) == (n // batch_size if drop_remainder else -(-n // batch_size)) and batches.num_examples == n
    for epoch in range(3):
        assert batches.state["epoch"] == epoch
        order = epoch_rows(batches, x, V, devices)
        kept = n - n % batch_size if drop_remainder else n
        assert len(order) == kept and (set(order) == set(range(n)) if kept == n else len(set(order)) == kept)
        assert order == (sorted(order) if not shuffle else order) == epoch_rows(again, x, V, devices)


def test_orders_differ_by_epoch_and_seed():
    def orders(seed):
        batches = js.batches(np.arange(50), np.arange(50), batch_size=8, shuffle=True, seed=seed)
        return [tuple(epoch_rows(batches, np.arange(50), None)) for _ in range(4)]

    assert len({*orders(0), *orders(1)}) == 8 and orders(0) == orders(0)


def test_y_and_weight_travel_along():
    y, weight = rng_of(0).normal(size=(5, 2)).astype(np.float32), [1, 0.5, 0, 2, 1]
    first, second = js.batches(np.arange(5), y, weight=weight, batch_size=3)
    np.testing.assert_array_equal(first.y, y[:3])
    np.testing.assert_array_equal(second.y[:2], y[3:])
    assert first.weight.tolist() == [1, 0.5, 0] and second.weight.tolist() == [2, 1, 0]
    assert next(iter(js.batches(np.arange(5), batch_size=3))).y is None


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_every_integer_type(dtype):
    ids = np.array([[3, 0], [120, 7], [5, 5]], dtype)
    lists = [ids[0], [], ids[1], np.array([2], np.int64)]
    for batch in js.batches(ids, batch_size=3, num_rows=121):
        assert batch.x.dtype == jnp.int32 and batch.x.tolist() == ids.tolist()
    for batch in js.batches(lists, batch_size=4, num_rows=121):
        assert batch.x.tolist() == [[3, 0], [121, 121], [120, 7], [2, 121]]


# ---- padding


def test_padding_touches_no_new_row():
    lists, ids = [[3, 1], [2], [0]], np.array([[3, 1], [2, 2], [5, 0]])
    for padding_idx, fill in (None, V), (0, 0), (V, V), (-1, -1):
        *_, last = js.batches(lists, batch_size=2, num_rows=V, padding_idx=padding_idx)
        assert last.x.tolist() == [[0, fill], [fill, fill]] and last.weight.tolist() == [1, 0]
    for padding_idx, fill in (None, [5, 0]), (0, [0, 0]), (V, [V, V]):
        *_, last = js.batches(ids, batch_size=2, num_rows=V, padding_idx=padding_idx)
        assert last.x.tolist() == [[5, 0], fill] and last.weight.tolist() == [1, 0]
        *_, last = js.batches(ids, batch_size=2, num_rows=V, padding_idx=padding_idx, devices=2)
        assert last.x.tolist() == [[[5, 0]], [fill]] and last.weight.tolist() == [[1], [0]]


def test_the_padding_id_is_legal_in_the_data():
    for x in [[4, -1], [-1]], np.array([[4, -1], [-1, -1]]):
        (batch,) = js.batches(x, batch_size=2, num_rows=5, padding_idx=-1)
        assert batch.x.tolist() == [[4, -1], [-1, -1]]
    x = {"a": [[5], [1]], "b": np.array([9, 2])}
    (batch,) = js.batches(x, batch_size=2, num_rows={"a": 5, "b": 9}, padding_idx={"a": 5, "b": 9})
    assert batch.x["a"].tolist() == [[5], [1]] and batch.x["b"].tolist() == [9, 2]


# ---- few static shapes


def count_traces(batches, epochs):
    traces = []

    @jax.jit
    def step(batch):
        traces.append(batch.x)
        return batch.weight.sum()

    for _ in range(epochs):
        for batch in batches:
            step.eval_shape(batch)  # which traces where a call would trace, and compiles nothing
    return len(traces)


def fixed_csr(rng, n, per_row=5, columns=200):
    columns_of = np.argsort(rng.random((n, columns)), axis=1)[:, :per_row]
    return sp.csr_matrix((np.ones(n * per_row), columns_of.reshape(-1), np.arange(n + 1) * per_row), (n, columns))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "n, batch_size", slow_but([(300, 16), (7, 16)], [(300, 16), (61, 20), (205, 51), (7, 16), (33, 8), (1025, 256)])
)
def test_fixed_length_data_compiles_once(n, batch_size, shuffle):
    rng = rng_of(n)
    x = {
        "csr": fixed_csr(rng, n),
        "ids": zipf(rng, (n, 5), 1000),
        "uniform": rng.integers(0, 100, n),
        "lists": rng.integers(0, 50, (n, 3)).tolist(),
        "dense": rng.normal(size=(n, 2)),
    }
    for name, features in [*x.items(), ("all", x)]:
        num_rows = None if name == "dense" else 1000
        batches = js.batches(features, np.zeros(n), batch_size=batch_size, num_rows=num_rows, shuffle=shuffle)
        assert count_traces(batches, 16 if shuffle else 2) == 1  # far beyond the batches that sizes are learnt from


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("draw", ["poisson", "lognormal", "one long"])
def test_ragged_data_compiles_a_few_times(draw, features):
    rng, n = rng_of(1), 500
    draws = {"poisson": lambda: rng.poisson(5, n), "lognormal": lambda: rng.lognormal(2, 1, n).astype(int)}
    draws["one long"] = lambda: np.where(np.arange(n) == 99, 300, 1)
    x = {}
    for i in range(features):
        lengths = draws[draw]()
        x[f"lists{i}"] = [zipf(rng, length, 1000).tolist() for length in lengths]
        cols = zipf(rng, lengths.sum(), 1000)
        x[f"csr{i}"] = sp.csr_matrix((np.ones(len(cols)), cols, np.cumsum([0, *lengths])), (n, 1000))
    batches = js.batches(x, batch_size=32, num_rows=1000, shuffle=True)
    assert len({signature(b) for _ in range(4) for b in batches}) <= 3


def test_a_feature_of_one_length_leaves_the_others_their_sizes():
    words = sp.csr_matrix(np.where(np.arange(64)[:, None] == 9, 1.0, np.eye(64)))  # one row is full, the others hold 1
    x = {"words": words, "pair": [[1, 2]] * 64}
    sizes = [(b.x["words"].nse, b.x["pair"].shape) for b in js.batches(x, batch_size=8, num_rows=5)]
    assert sizes == [(8, (8, 2)), (72, (8, 2)), *[(8, (8, 2))] * 6]


def test_a_short_last_batch_costs_no_more_than_a_full_one():
    """One example is left over, and it is the longest: its batch must not be sized as if it were full of such."""
    m = sp.vstack([fixed_csr(rng_of(0), 64), np.ones((1, 200))]).tocsr()
    assert [batch.x.nse for batch in js.batches(m, batch_size=64)] == [320, 320]
    assert [batch.x.nse for batch in js.batches(m, batch_size=64, nse=999)] == [999, 999]


# ---- position


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle, drop_remainder", [(True, False), (False, False), (True, True)])
def test_a_saved_position_goes_on_bit_identically(kind, shuffle, drop_remainder):
    x, options = KINDS[kind](rng_of(0), 11), {"shuffle": shuffle, "drop_remainder": drop_remainder}
    new = partial(js.batches, x, np.arange(11), batch_size=4, num_rows=rows_for(x), seed=3, **options)
    run, states, batches = [], [], new()
    for _ in range(3):
        states.append(json.dumps(batches.state))  # between epochs, too
        run.append([])
        for batch in batches:
            run[-1].append(batch)
            states.append(json.dumps(batches.state))
    straight = [b for epoch in run for b in epoch]
    for text in states:
        state = json.loads(text)
        done = state["epoch"] * len(batches) + state["step"]
        resumed = new()
        resumed.state = state
        assert resumed.state == state
        rest = [b for _ in range(state["epoch"], 3) for b in resumed]
        assert_same(rest, straight[done:])


def test_looking_at_a_batch_after_restoring_does_not_lose_the_position():
    batches = js.batches(np.arange(10), np.arange(10), batch_size=2, shuffle=True)
    first = [b.y.tolist() for b in batches]
    batches.state = {**batches.state, "epoch": 0, "step": 3}
    assert next(iter(batches)).y.tolist() == first[3]
    assert [b.y.tolist() for b in batches] == first[3:]
    second = [b.y.tolist() for b in batches]
    assert len(second) == 5 and sorted(np.concatenate(second)) == list(range(10))


def test_leaving_early_starts_the_epoch_again():
    batches, straight = (js.batches(np.arange(10), np.arange(10), batch_size=3, shuffle=True) for _ in range(2))
    epochs = [list(straight) for _ in range(2)]
    assert_same([next(iter(batches)), next(iter(batches))], [epochs[0][0]] * 2)
    for _, batch in zip(range(2), batches, strict=False):
        del batch
    assert_same(list(batches), epochs[0])
    assert_same(list(batches), epochs[1])
    assert next(iter(js.batches(np.arange(0), batch_size=3)), None) is None


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"shuffle": 0}, {"batch_size": 5}, {"drop_remainder": 1}, {"num_examples": 9}, {"epoch": -1},
    {"step": 4}, {"step": -1}, {"seed": None},
])  # fmt: skip
def test_a_position_of_other_settings_raises(change):
    batches = js.batches(np.arange(10), np.arange(10), batch_size=4, shuffle=True)
    ((name, _),) = change.items()
    with pytest.raises(ValueError) as error:
        batches.state = {**batches.state, **change}
    assert "'state'" in str(error.value) and name in str(error.value)
    with pytest.raises(ValueError):
        batches.state = {key: value for key, value in batches.state.items() if key != name}
    assert batches.state["step"] == batches.state["epoch"] == 0 and len(list(batches)) == 3


# ---- devices


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", KINDS)
def test_pmap_takes_stacked_shards(kind):
    n, devices = 19, 4
    x = KINDS[kind](rng_of(0), n)
    stacked = js.batches(x, np.arange(n), batch_size=8, num_rows=rows_for(x), shuffle=True, devices=devices)
    whole = js.batches(x, np.arange(n), batch_size=8, num_rows=rows_for(x), shuffle=True)

    @partial(jax.pmap, axis_name="d", devices=jax.devices()[:devices])
    def total(batch):
        return jax.lax.psum((batch.y * batch.weight).sum(), "d")

    # 19 = 8 + 8 + 3: of the last batch, two devices have no example of their own
    for ours, theirs in zip(stacked, whole, strict=True):
        assert all(a.shape[0] == devices for a in jax.tree.leaves(ours))
        assert total(ours)[0] == (theirs.y * theirs.weight).sum()
        union = [y for shard in shards(ours, devices) for y in shard.y[shard.weight > 0]]
        assert union == theirs.y[theirs.weight > 0].tolist()
    assert [int((s.weight > 0).sum()) for s in shards(ours, devices)] == [2, 1, 0, 0]


# ---- what cannot work raises at once

IDS, LISTS, M = np.array([[1, 2], [3, 4]]), [[1, 2], [3]], sp.eye_array(2, 5, format="csr")
NAN, INF = np.array([[0, 1], [np.nan, 0]]), {"a": np.array([[0, -np.inf], [1, 1]])}
ROWS, FINITE = {"num_rows": 5}, {"check_finite": True}


class NAType:
    """As pandas's, which need not be there: it is no bool."""

    def __repr__(self):
        return "NA"

    def __eq__(self, other):
        return self

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None


def objects(*values):
    array = np.empty(len(values), object)
    for n, value in enumerate(values):
        array[n] = value
    return array


@pytest.mark.parametrize("x, options, error, says", [
    (np.array([[1, 2], [3, 5]]), ROWS, ValueError, "x: ids in [0, 5). Got 5 at position (1, 1)"),
    (np.array([1, -1]), ROWS, ValueError, "x: ids in [0, 5). Got -1 at position 1"),
    (np.array([1, -2]), {"padding_idx": -1}, ValueError, "x: ids in [0, 2**31). Got -2 at position 1"),
    (np.array([0, 2**31]), {}, OverflowError, "x: ids in [0, 2**31). Got 2147483648 at position 1"),
    (np.array([2**32, 1]), ROWS, OverflowError, "x: ids in [0, 5). Got 4294967296 at position 0"),
    (np.array([2**63], np.uint64), {}, OverflowError, "x: ids in [0, 2**31). Got 9223372036854775808 at position 0"),
    ([[1], [2, 0, 5]], ROWS, ValueError, "x: ids in [0, 5). Got 5 at position 2 of list 1"),
    ([[], [], [-1]], ROWS, ValueError, "x: ids in [0, 5). Got -1 at position 0 of list 2"),
    ({"a": {"b": [[9]]}}, ROWS, ValueError, "x['a']['b']: ids in [0, 5). Got 9 at position 0 of list 0"),
    ([[1], [2**32]], ROWS, OverflowError, "x: ids in [0, 5). Got 4294967296 at position 0 of list 1"),
    ([[1], [2**63]], ROWS, OverflowError, "x: ids in [0, 5). Got 9223372036854775808 at position 0 of list 1"),
    ([[1], [0.5]], ROWS, TypeError, "x: lists of integers. Got [0.5] at position 1"),
    ([[True], [1]], ROWS, TypeError, "x: lists of integers. Got [True] at position 0"),
    ([[1], None], ROWS, TypeError, "x: lists of integers. Got None at position 1"),
    ([[[1], [2]], [[3]]], ROWS, TypeError, "x: lists of integers. Got [[1], [2]] at position 0"),
    ([[[1], [2, 3]], [3]], ROWS, TypeError, "x: an array, or rows of equal length. Got [[1], [2, 3]]"),
    ([[2**64]], ROWS, TypeError, "x: lists of integers. Got [18446744073709551616] at position 0"),
    (LISTS, {}, ValueError, "num_rows: given, because x is a list of id lists. Got None"),
    (LISTS, {"num_rows": {"a": 5}}, ValueError, "num_rows: given, because x is a list of id lists. Got None"),
    (LISTS, {"num_rows": 5.0}, TypeError, "num_rows: an integer, or a dict of them. Got 5.0"),
    (LISTS, {"num_rows": -1}, ValueError, "num_rows: between 0 and 2147483646. Got -1"),
    (LISTS, {"num_rows": 5, "padding_idx": 2**32}, ValueError, "padding_idx: within int32. Got 4294967296"),
    (IDS, {"padding_idx": 0.5}, TypeError, "padding_idx: an integer, or a dict of them. Got 0.5"),
    ({"a": IDS}, {"num_rows": {"b": 5}}, ValueError, "num_rows: keyed by the features of x, ['a']. Got 'b'"),
    ({"a": M}, {"nse": {"b": 5}}, ValueError, "nse: keyed by the features of x, ['a']. Got 'b'"),
    (M, {"nse": 1.5}, TypeError, "nse: an integer, or a dict of them. Got 1.5"),
    ({"w": M}, {"nse": {"w": 1}}, ValueError, "nse: at least 2, the entries of x['w'] in the batch from example 0 on"),
    ({"a": M, "b": IDS[:1]}, {}, ValueError, "x['b']: of 2 examples, as x['a'] is. Got 1"),
    (IDS, {"y": [1]}, ValueError, "y: of 2 examples, as x is. Got 1"),
    (IDS, {"y": ["a", "b"]}, TypeError, "y: of numbers that JAX has a dtype for. Got <U1"),
    (IDS, {"y": M}, TypeError, "y: an array. Got a SciPy matrix, csr instead. Make it dense: y.toarray()."),
    (IDS, {"weight": M}, TypeError, "weight: an array. Got a SciPy matrix, csr instead."),
    (IDS, {"y": {"a": [1, 2]}}, TypeError, "y: of numbers that JAX has a dtype for. Got object, {'a': [1, 2]} at"),
    (js.from_scipy(M), {}, TypeError,
     "x: an array or a SciPy matrix. Got a BCOO of JAX instead. Give the SciPy matrix"),
    ({"w": BCSR.from_bcoo(js.from_scipy(M))}, {}, TypeError, "x['w']: an array or a SciPy matrix. Got a BCSR of JAX"),
    (IDS, {"y": js.from_scipy(M)}, TypeError, "y: an array or a SciPy matrix. Got a BCOO of JAX"),
    (sp.coo_array([1, 2]), {}, ValueError, "x: of two dimensions. Got shape (2,)"),
    (sp.eye_array(2, 500, format="csr"), {"num_rows": 9}, ValueError,
     "num_rows: at least 500, the number of columns of x. Got 9 instead."),
    ({"w": M}, {"num_rows": 4}, ValueError, "num_rows: at least 5, the number of columns of x['w']. Got 4"),
    ({"w": M, "ids": IDS}, {"num_rows": {"w": 4}}, ValueError, "num_rows: at least 5, the number of columns of x['w']"),
    (np.full((4, 2), 99.0), {"num_rows": 9}, TypeError,
     "num_rows: left out, or given for ids: integers, lists of them, or the columns of a SciPy matrix. Got 9 for x of "
     "float32 instead. Cast ids to integers: .astype('int32')."),
    ({"a": np.ones(2), "b": np.ones(2)}, {"num_rows": 9}, TypeError, "num_rows: left out, or given for ids"),
    ({"a": np.ones(2), "ids": IDS}, {"num_rows": {"a": 9}}, TypeError, "num_rows: left out, or given for ids"),
    (IDS, {"y": [[1], [2, 3]]}, TypeError, "y: an array, or rows of equal length. Got [[1], [2, 3]]"),
    (IDS, {"y": [[1, 2], [3, -(2**40)]]}, OverflowError, "y: within int32. Got -1099511627776 at position (1, 1)"),
    (IDS, {"weight": [1, 2, 3]}, ValueError, "weight: of 2 examples, as x is. Got 3"),
    (IDS, {"weight": [1, -2]}, ValueError, "weight: real, of shape (n,) and not negative. Got -2 at position 1"),
    (IDS, {"weight": [[1], [2]]}, ValueError, "weight: real, of shape (n,) and not negative. Got shape (2, 1)"),
    (IDS, {"weight": [1, 1j]}, ValueError, "weight: real, of shape (n,) and not negative. Got "),
    (IDS, {"batch_size": 0}, ValueError, "batch_size: an integer of at least 1. Got 0"),
    (IDS, {"batch_size": 2.0}, ValueError, "batch_size: an integer of at least 1. Got 2.0"),
    (IDS, {"batch_size": True}, ValueError, "batch_size: an integer of at least 1. Got True"),
    (IDS, {"devices": 3}, ValueError, "devices: a divisor of batch_size, 2. Got 3"),
    (IDS, {"seed": -1}, ValueError, "seed: an integer of at least 0. Got -1"),
    (NAN, FINITE, ValueError, "x: finite. Got nan at position (1, 0)"),
    (INF, FINITE, ValueError, "x['a']: finite. Got -inf at position (0, 1)"),
    (jnp.array([0, jnp.nan], jnp.bfloat16), FINITE, ValueError, "x: finite. Got nan at position 1"),
    (np.array([0, 1e300]), FINITE, ValueError, "x: finite. Got 1e+300 at position 1"),  # inf in float32
    (sp.csr_array(NAN), FINITE, ValueError, "x: finite. Got nan at row 1, column 0"),
    (IDS, dict(y=NAN, **FINITE), ValueError, "y: finite. Got nan at position (1, 0)"),
    (IDS, dict(weight=[1, np.inf], **FINITE), ValueError, "weight: finite. Got inf at position 1"),
    (sp.csr_array([[2**31, 1], [0, 1]]), {}, OverflowError, "x: within int32. Got 2147483648 at row 0, column 0"),
    *[({"col": objects(*values)}, {}, TypeError, f"x['col']: of numbers that JAX has a dtype for. Got object{says}")
      for values, says in [
          (([1], None), ", [1] at position 0 instead. Ragged ids are a list of lists: .tolist(), with num_rows=."),
          (([1, 2], [3]), ", [1, 2] at position 0 instead. Ragged ids are a list of lists: .tolist(), with num_rows=."),
          ((np.ones(2), 3), ", array([1., 1.]) at position 0 instead. Ragged ids"),
          ((1, None), ", None at position 1 instead. Fill missing values, or leave these examples out."),
          ((1, NAType()), ", NA at position 1 instead. Fill missing values"),
          ((1, float("nan"), "b"), ", nan at position 1 instead. Fill missing values"),
          ((1, "b"), ", 'b' at position 1 instead. Give each string a number: np.unique("),
          ((1, 2), " instead. All values are numbers: cast them, .astype('int32') or"),
          ((1, object), ", <class 'object'> at position 1 instead. Cast it to numbers."),
      ]],
    (["a", "b"], {}, TypeError, "x: of numbers that JAX has a dtype for. Got <U1 instead. Give each string a number"),
    (np.zeros(2, "timedelta64[s]"), {}, TypeError, "x: of numbers that JAX has a dtype for. Got timedelta64[s]"),
    (np.ones(2, np.longdouble), {}, TypeError, "x: of numbers that JAX has a dtype for. Got "),
    (3, {}, ValueError, "x: an array of shape (n, ...). Got shape ()"),
    ({}, {}, ValueError, "x: at least one feature. Got an empty dict"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's own word on 1e300
def test_refuses(x, options, error, says):
    assert_raises(error, says, js.batches, x, **{"batch_size": 2, **options})


def test_what_is_not_finite_passes_unless_checked():
    (batch,) = js.batches({"dense": NAN, "sparse": sp.csr_array(NAN)}, NAN, batch_size=2)
    np.testing.assert_array_equal(batch.x["dense"], NAN)
    assert np.isnan(batch.y).any() and np.isnan(batch.x["sparse"].data).any()


# ---- SciPy's formats, and columns of data frames


@pytest.mark.parametrize("container", ["matrix", "array"])
@pytest.mark.parametrize("fmt", ["csr", "csc", "coo", "bsr", "dia", "dok", "lil"])
def test_every_scipy_format_is_a_matrix(container, fmt):
    """A DOK matrix is a dict, too."""
    dense = random_csr(rng_of(0), 4).toarray()
    matrix = getattr(sp, f"{fmt}_{container}")(dense)
    (one,) = js.batches(matrix, batch_size=4, num_rows=V)
    (named,) = js.batches({"w": matrix}, batch_size=4)
    np.testing.assert_array_equal(densify(one.x), dense)
    np.testing.assert_array_equal(densify(named.x["w"]), dense)


def test_one_num_rows_is_for_the_ids_among_the_features():
    x = {"words": sp.eye_array(2, 500, format="csr"), "ids": IDS, "age": np.ones(2)}
    (batch,) = js.batches(x, batch_size=2, num_rows=5)
    assert batch.x["words"].shape == (2, 500)
    (batch,) = js.batches({"words": M, "age": np.ones(2)}, batch_size=2, num_rows=9)  # a larger table is no harm
    assert batch.x["words"].shape == (2, 5)
    (batch,) = js.batches(x, batch_size=2, num_rows={"words": 500, "ids": 5})
    with pytest.raises(ValueError, match=r"ids in \[0, 4\)"):
        js.batches(x, batch_size=2, num_rows={"words": 500, "ids": 4})


def test_no_examples_are_no_batches():
    for x in np.zeros((0, 2)), np.zeros(0, int), sp.csr_array((0, 5)), {"a": np.zeros(0, int)}:
        assert len(js.batches(x, batch_size=2)) == 0 and not list(js.batches(x, batch_size=2))
    assert not list(js.batches([], batch_size=2, num_rows=3))


class Column:
    """What pandas's Series has, for those dtypes that are not NumPy's."""

    def __init__(self, values, dtype, missing=()):
        self.values, self.dtype, self.missing = np.asarray(values), dtype, missing

    def __array__(self, dtype=None, copy=None):
        return self.values

    def isna(self):
        return np.isin(np.arange(len(self.values)), self.missing)


class Frame:
    """What pandas's DataFrame has."""

    def __init__(self, **columns):
        self.data, self.columns = columns, list(columns)
        self.dtypes = [column.dtype for column in columns.values()]

    def __getitem__(self, name):
        return self.data[name]

    def __array__(self, dtype=None, copy=None):
        return np.stack([np.asarray(column) for column in self.data.values()], axis=1)


SPARSE = Column([0, 1], "Sparse[int64, 0]")
CATEGORY = Column([5, 6], "category")
NULLABLE = Column([1.0, np.nan], "Int64", missing=[1])


@pytest.mark.parametrize("x, says", [
    ({"c": CATEGORY}, "x['c']: of numbers. Got a categorical instead. Give its codes, x['c'].cat.codes, or js"),
    ({"c": SPARSE}, "x['c']: dense, or a SciPy matrix. Got a sparse column, Sparse[int64, 0] instead. Give the SciPy"),
    ({"c": NULLABLE}, "x['c']: without missing values. Got Int64, missing at position 1 instead. Fill them, .fillna("),
    (Frame(a=np.ones(2), b=CATEGORY), "x['b']: of numbers. Got a categorical"),
    (Frame(a=SPARSE, b=SPARSE), "x['a']: dense, or a SciPy matrix. Got a sparse column"),
    (Frame(a=np.ones(2), b=NULLABLE), "x['b']: without missing values. Got Int64, missing at position 1"),
    ({"m": np.ma.masked_array([1, 2], [0, 1])}, "x['m']: without missing values. Got int64, masked at position 1"),
    ({"f": Frame(a=IDS[0], b=objects([1], [2]))}, "x['f']['b']: of numbers that JAX has a dtype for. Got object, [1]"),
    (Frame(a=IDS[0], b=np.ones(2)),
     "x: a frame of one dtype. Got int64 in 'a' and float64 in 'b' instead. Give features by name: a dict of "),
])  # fmt: skip
def test_refuses_columns(x, says):
    assert_raises(TypeError, says, js.batches, x, batch_size=2)
    if isinstance(x, Frame):
        assert_raises(TypeError, "y" + says.removeprefix("x"), js.batches, IDS, x, batch_size=2)


def test_takes_columns_of_numbers():
    (batch,) = js.batches({"c": Column([3, 4], "Int64"), "f": Frame(a=IDS[0], b=IDS[1])}, batch_size=2, num_rows=5)
    assert batch.x["c"].tolist() == [3, 4] and batch.x["f"].tolist() == [[1, 3], [2, 4]]
    (batch,) = js.batches(Frame(a=np.ones(2), b=Column([0.5, 1], "Float64")), batch_size=2)
    assert batch.x.tolist() == [[1, 0.5], [1, 1]]


def test_pandas_itself():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"user": [3, 1], "age": [0.5, 1.0], "kind": pd.Categorical(["a", "b"]), "ids": [[1], [2, 0]]})
    x = {"user": frame["user"], "age": frame["age"], "kind": frame["kind"].cat.codes, "ids": frame["ids"].tolist()}
    (batch,) = js.batches(x, frame["age"], batch_size=2, num_rows=4)
    assert batch.x["user"].tolist() == [3, 1] and batch.x["kind"].tolist() == [0, 1]
    assert batch.x["ids"].tolist() == [[1, 4], [2, 0]] and batch.y.tolist() == [0.5, 1.0]
    (batch,) = js.batches(pd.DataFrame({"a": [1, 2], "b": [3, 0]}, dtype="int32"), batch_size=2, num_rows=4)
    assert batch.x.tolist() == [[1, 3], [2, 0]]
    sparse = pd.DataFrame.sparse.from_spmatrix(M)
    (batch,) = js.batches(sparse.sparse.to_coo(), batch_size=2)
    np.testing.assert_array_equal(densify(batch.x), M.toarray())
    for wrong, says in [
        (frame, "x['kind']: of numbers. Got a categorical"),
        (frame[["user", "age"]], "x: a frame of one dtype. Got int64 in 'user' and float64 in 'age'"),
        ({"kind": frame["kind"]}, "x['kind']: of numbers. Got a categorical"),
        ({"ids": frame["ids"]}, "x['ids']: of numbers that JAX has a dtype for. Got object, [1] at position 0"),
        ({"s": pd.Series(["a", "b"])}, "x['s']: of numbers that JAX has a dtype for. Got object, 'a' at position 0"),
        (sparse, "x[0]: dense, or a SciPy matrix. Got a sparse column, Sparse[float64"),
        (
            {"n": pd.Series([1, None], dtype="Int64")},
            "x['n']: without missing values. Got Int64, missing at position 1",
        ),
        (
            {"n": pd.Series([1, pd.NA], dtype=object)},
            "x['n']: of numbers that JAX has a dtype for. Got object, <NA> at",
        ),
    ]:
        assert_raises(TypeError, says, js.batches, wrong, batch_size=2)
    with pytest.raises(TypeError, match="Missing ids make floats of a column"):
        js.batches({"user": pd.Series([1, None])}, batch_size=2, num_rows={"user": 4})


# ---- a pytree, and data as it comes


def test_batch_is_a_pytree():
    (batch,) = js.batches({"a": M, "b": IDS}, [1.0, 2.0], batch_size=2)
    leaves, treedef = jax.tree.flatten(batch)
    assert len(leaves) == 9 and isinstance(batch.x["a"], BCOO)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    out = jax.jit(lambda b: jax.tree.map(lambda a: a * 2, b))(batch)
    assert isinstance(out, js.Batch) and out.x["b"].tolist() == (2 * IDS).tolist()
    np.testing.assert_array_equal(jax.jit(lambda b: b.x["a"] @ jnp.ones(5))(batch), [1, 1])


def test_zipf_words():
    """Document lengths and words as texts have them, one document ten times as long as any other."""
    rng, n, words = rng_of(0), 400, 20_000
    lengths = rng.lognormal(3, 1, n).astype(int)
    lengths[123] = 10 * lengths.max()
    texts = [zipf(rng, length, words) for length in lengths]
    m = sp.csr_array((np.ones(lengths.sum(), np.float32), np.concatenate(texts), np.cumsum([0, *lengths])), (n, words))
    x = {"bag": m, "text": [t.tolist() for t in texts]}
    batches = js.batches(x, np.arange(n), batch_size=32, num_rows=words, shuffle=True)
    longest, total = 0, 0.0
    for batch in batches:
        longest = max(longest, int((batch.x["text"] < words).sum(axis=1).max()))
        total += float(batch.x["bag"].data.sum())
        at = np.asarray(batch.y)[np.asarray(batch.weight) > 0]
        np.testing.assert_array_equal(densify(batch.x["bag"])[: len(at)], m[at].toarray())
    assert longest == lengths[123] and total == lengths.sum()


# ---------------------------------------------------------------------------------------------------------------------
# hosts


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_hosts_share_every_batch(devices, count, drop_remainder):
    """Disjoint, complete, as many steps and the same shapes on every host; together they are the whole batch."""
    n, rng = 43, np.random.default_rng(0)
    bags = [rng.integers(V, size=rng.integers(6)).tolist() for _ in range(n)]
    options = {"batch_size": 16, "num_rows": V, "shuffle": True, "drop_remainder": drop_remainder}
    whole = js.batches(bags, np.arange(n), **options)
    parts = [js.batches(bags, np.arange(n), **options, devices=devices, shard=(i, count)) for i in range(count)]
    for _ in range(2):
        for want, *hosts in zip(whole, *parts, strict=True):
            assert len({(h.x.shape, h.weight.shape) for h in hosts}) == 1
            assert all(h.weight.size == 16 // count for h in hosts)
            got = np.concatenate([np.ravel(h.y)[np.ravel(h.weight) > 0] for h in hosts])
            np.testing.assert_array_equal(got, want.y[want.weight > 0])
        assert whole.state == parts[0].state == parts[-1].state


def test_another_number_of_hosts_goes_on_where_a_run_stopped():
    two, one = (js.batches(np.arange(40), batch_size=8, shuffle=True, shard=shard) for shard in ((1, 2), None))
    it = iter(two)
    next(it), next(it)
    one.state = two.state
    assert len(list(one)) == 3


@pytest.mark.parametrize(
    ("shard", "error"),
    [((0, 3), ValueError), ((2, 2), ValueError), ((-1, 2), ValueError), ((0, 0), ValueError), (1, TypeError)],
)
def test_refuses_a_shard(shard, error):
    with pytest.raises(error, match=r"'shard'.*divisor of batch_size, 8"):
        js.batches(np.arange(40), batch_size=8, shard=shard)
    with pytest.raises(ValueError, match=r"'devices'.*batch_size / count, 4"):
        js.batches(np.arange(40), batch_size=8, shard=(0, 2), devices=3)
