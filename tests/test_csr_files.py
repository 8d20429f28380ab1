"""Data larger than memory: files of CSR, nothing copied that is right already, a shuffle without a permutation, and
batches by number."""

import os
import pickle
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import scipy.sparse as sp

import jaxsparse as js
from jaxsparse.data.csr import Csr
from jaxsparse.data.order import FEW, Shuffled, order_of
from jaxsparse.data.ragged import PIECE
from tests.test_batch import assert_same, densify, random_csr

rng_of = np.random.default_rng


def mapped(path, array):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def raw_csr(data, indices, indptr, shape):
    """A CSR of these arrays themselves: SciPy's constructor may convert them."""
    matrix = sp.csr_array(shape, dtype=data.dtype)
    matrix.data, matrix.indices, matrix.indptr = data, indices, indptr
    return matrix


# ---- files


@pytest.mark.parametrize("fmt", ["csr", "csc", "coo"])
def test_a_saved_matrix_is_the_matrix(tmp_path, fmt):
    m = random_csr(rng_of(0), 40)
    js.save_csr(tmp_path / "whole", m.asformat(fmt))
    js.save_csr(tmp_path / "parts", (m[i : i + 9].asformat(fmt) for i in range(0, 40, 9)))
    for name in "whole", "parts":
        x = js.open_csr(tmp_path / name)
        assert isinstance(x, sp.csr_array) and x.shape == m.shape and x.dtype == np.float32
        assert x.indices.dtype == np.int32 and x.indptr.dtype == np.int64 and not x.data.flags.writeable
        np.testing.assert_array_equal(x.toarray(), m.toarray())
        np.testing.assert_array_equal(x[[5, 1, 39]].toarray(), m[[5, 1, 39]].toarray())
        for ours, theirs in zip(js.batches(x, batch_size=16), js.batches(m, batch_size=16), strict=True):
            np.testing.assert_array_equal(densify(ours.x), densify(theirs.x))
    js.save_csr(tmp_path / "again", js.open_csr(tmp_path / "parts"))
    assert (tmp_path / "again" / "indices.npy").read_bytes() == (tmp_path / "parts" / "indices.npy").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "parts", "whole"]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (4, 7)])
def test_saved_matrices_without_entries(tmp_path, shape):
    js.save_csr(tmp_path / "x", sp.csr_array(shape, dtype=np.int32))
    x = js.open_csr(tmp_path / "x")
    assert x.shape == shape and x.nnz == 0 and x.dtype == np.int32
    assert len(list(js.batches(x, batch_size=2))) == -(-shape[0] // 2)


def test_saving_never_holds_all(tmp_path):
    m = sp.random_array((1000, 500), density=0.1, format="csr", dtype=np.float32, rng=rng_of(0))  # 0.4 MB
    tracemalloc.start()
    js.save_csr(tmp_path / "x", (m + m for _ in range(40)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x" / "indices.npy").stat().st_size > 7e6 and peak < 6e6


def test_what_is_half_written_is_not_opened(tmp_path):
    def parts(last):
        yield sp.eye_array(3, format="csr")
        yield last

    m = sp.eye_array(3, format="csr")
    for last, error, says in [
        (np.eye(3), TypeError, r"'matrix\[1\]' argument of js.save_csr must be a SciPy sparse matrix. Got ndarray"),
        (sp.eye_array(3, 4), ValueError, r"'matrix\[1\]'.*of 3 columns, as matrix\[0\] is. Got 4"),
        (m.astype(int), ValueError, r"'matrix\[1\]'.*of float32, as matrix\[0\] is. Got int32"),
    ]:
        with pytest.raises(error, match=says):
            js.save_csr(tmp_path / "x", parts(last))
        assert not list(tmp_path.iterdir())
    for wrong, error in [([], ValueError), (3, TypeError), (np.eye(2), TypeError)]:
        with pytest.raises(error, match="'matrix'"):
            js.save_csr(tmp_path / "x", wrong)
    with pytest.raises(FileNotFoundError, match=r"a whole folder of js.save_csr. Got no .*x/data.npy"):
        js.open_csr(tmp_path / "x")
    js.save_csr(tmp_path / "x", m)
    with pytest.raises(FileExistsError, match=r"'path'.*a new folder. Got .*x, which exists"):
        js.save_csr(tmp_path / "x", m)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("shape", lambda x: x[:1], r"whose shape.npy has two sizes. Got \[30\] in .*x instead"),
        ("shape", lambda x: -x, r"whose shape.npy has two sizes. Got \[-30, -30\] in .*x instead"),
        ("indices", lambda x: x[1:], r"whose indices.npy has 450 numbers. Got 449 in .*x instead"),
        ("indptr", lambda x: x[1:], r"whose indptr.npy has 31 numbers. Got 30 in .*x instead"),
        ("indptr", lambda x: np.minimum(x, 440), r"whose indptr.npy ends with 450. Got 440 in .*x instead"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, name, change, says):
    js.save_csr(tmp_path / "x", sp.random_array((30, 30), density=0.5, format="csr", dtype=np.float32, rng=rng_of(0)))
    file = tmp_path / "x" / f"{name}.npy"
    np.save(file, change(np.load(file)))
    with pytest.raises(ValueError, match=rf"'path' argument of js.open_csr must be a folder {says}"):
        js.open_csr(tmp_path / "x")


@pytest.mark.parametrize("name", ["data", "indices", "indptr", "shape"])
def test_errors_name_the_file(tmp_path, name):
    js.save_csr(tmp_path / "x", sp.random_array((30, 30), density=0.5, format="csr", dtype=np.float32, rng=rng_of(0)))
    file = tmp_path / "x" / f"{name}.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-5])
    with pytest.raises(ValueError, match=rf"'path'.*{name}.npy"):
        js.open_csr(tmp_path / "x")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"'path'.*{name}.npy"):
        js.open_csr(tmp_path / "x")
    np.save(file, np.arange(3.0))
    with pytest.raises(ValueError, match=r"'path'.*\.npy"):
        js.open_csr(tmp_path / "x")
    os.remove(file)
    with pytest.raises(FileNotFoundError, match=rf"no .*{name}.npy"):
        js.open_csr(tmp_path / "x")
    file.write_bytes(good)
    assert js.open_csr(tmp_path / "x").shape == (30, 30)


# ---- nothing is copied that is right already


def test_what_is_right_is_not_copied(tmp_path):
    """Also where it is memory-mapped: what is allocated stays far below the data."""
    n, rng = 200_000, rng_of(0)
    columns = np.cumsum(rng.integers(1, 50, (n, 10)), axis=1)
    ends = np.arange(0, 10 * n + 1, 10)
    data = mapped(tmp_path / "data.npy", rng.random(10 * n, np.float32))
    cases = {}
    for kinds in (np.int32, np.int64), (np.int64, np.int64), (np.int32, np.int32):
        indices = mapped(tmp_path / f"{kinds[0].__name__}.npy", columns.reshape(-1).astype(kinds[0]))
        cases[f"csr of {kinds}"] = raw_csr(data, indices, ends.astype(kinds[1]), (n, 500))
    for kind in "<i4", "<u8", "<f4", "<f8":
        cases[kind] = mapped(tmp_path / "x.npy", columns.astype(kind))
        os.remove(tmp_path / "x.npy")
    cases["columns"] = cases["<f8"][:, ::2]  # a view that is not in one piece
    for name, x in cases.items():
        y = np.ones(n)
        list(js.batches(x[:4], y[:4], batch_size=4))
        tracemalloc.start()
        batches = js.batches(x, y, weight=y, batch_size=256, shuffle=True)
        next(iter(batches))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = x.nnz * 8 if sp.issparse(x) else x.nbytes
        assert size >= 8e6 and peak < 6.5e6, (name, peak)  # the order is 1.6 MB of it, and a piece some MB


def test_the_arrays_of_a_canonical_matrix_are_its_own():
    m = random_csr(rng_of(0), 30)
    m.sum_duplicates()
    arrays = m.data, m.indices, m.indptr
    rows = Csr(m, "f", "x").rows
    assert all(map(np.shares_memory, (*rows.arrays, rows.starts), arrays))


@pytest.mark.parametrize("piece", [1, 3, 7, PIECE])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_pieces_see_what_the_whole_shows(monkeypatch, piece, dtype):
    """Unsorted rows, duplicates and bad indices, wherever a border between pieces is."""
    for module in "csr", "ragged":
        monkeypatch.setattr(f"jaxsparse.data.{module}.PIECE", piece)
    for seed in range(8):
        m = random_csr(rng_of(seed), 12, 9, 0.3)
        m = raw_csr(m.data, m.indices.astype(dtype), m.indptr.astype(dtype), m.shape)
        want = m.toarray()
        increases = all(
            (np.diff(m.indices[a:b].astype(int)) > 0).all() for a, b in np.stack([m.indptr[:-1], m.indptr[1:]], 1)
        )
        csr = Csr(m, "f", "x")
        assert np.shares_memory(csr.rows.arrays[1], m.indices) == increases
        tidy = raw_csr(*csr.rows.arrays, csr.rows.starts, m.shape)
        assert np.shares_memory(Csr(tidy, "f", "x").rows.arrays[1], tidy.indices)
        np.testing.assert_array_equal(tidy.toarray(), want)
        at = int(rng_of(seed).integers(len(m.indices)))
        row = int(np.repeat(np.arange(12), np.diff(m.indptr.astype(int)))[at])
        m.indices[at] = 9
        with pytest.raises(ValueError, match=rf"column indices in \[0, 9\). Got 9 in row {row}"):
            Csr(m, "f", "x")
        values = rng_of(seed).normal(size=(5, 4))
        ids = rng_of(seed).integers(0, 9, (5, 4)).astype(dtype)
        i, j = int(rng_of(seed).integers(5)), int(rng_of(seed).integers(4))
        values[i, j], ids[i, j] = np.nan, 9
        with pytest.raises(ValueError, match=rf"Got nan at position \({i}, {j}\)"):
            js.batches(values, batch_size=2, check_finite=True)
        with pytest.raises(ValueError, match=rf"Got 9 at position \({i}, {j}\)"):
            js.batches(ids, batch_size=2, num_rows=9)


@pytest.mark.parametrize("indptr", [[1, 2, 3], [0, 3, 2], [0, 1, 9], [0, 1], [0, 9, 3]])
def test_refuses_an_indptr(indptr):
    m = raw_csr(np.ones(3, np.float32), np.arange(3, dtype=np.int32), np.array(indptr), (2, 3))
    with pytest.raises(ValueError, match=r"'x' argument of js.batches must be of a"):
        js.batches(m, batch_size=2)


def test_entries_behind_the_last_row_are_no_entries():
    m = raw_csr(np.array([1, 2, np.nan], np.float32), np.array([0, 1, 77], np.int32), np.array([0, 1, 2]), (2, 3))
    (batch,) = js.batches(m, batch_size=2)
    assert densify(batch.x).tolist() == [[1, 0, 0], [0, 2, 0]]


def test_sizes_learnt_from_some_batches_have_room(monkeypatch):
    monkeypatch.setattr("jaxsparse.data.pipeline._SAMPLED_EXAMPLES", 1)
    lengths = rng_of(0).poisson(3, 20_000)
    m = sp.csr_array(
        (np.ones(lengths.sum()), np.concatenate([np.arange(k) for k in lengths]), np.cumsum([0, *lengths])),
        (20_000, 30),
    )
    for shuffle in True, False:
        batches = js.batches(m, batch_size=16, shuffle=shuffle)
        assert len({batch.x.nse for batch in (batches[i] for i in range(0, len(batches), 3))}) <= 3


# ---- the order


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 257, 20_000, 70_000])
def test_a_shuffle_has_every_example_once(n):
    for epoch in range(3):
        order = Shuffled(n, [7, epoch])
        whole = order[0:n]
        np.testing.assert_array_equal(np.sort(whole), np.arange(n))
        again, start = Shuffled(n, [7, epoch]), 0
        while start < n:
            stop = start + 1 + start % 4099
            np.testing.assert_array_equal(again[start:stop], whole[start:stop])
            start = stop


def test_a_shuffle_is_even():
    """Each order of few examples about as often; of many, each part is spread evenly and neighbours are strangers."""
    counts = {}
    for seed in range(2400):
        order = tuple(Shuffled(4, [seed, 0])[0:4])
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and sum((c - 100) ** 2 / 100 for c in counts.values()) < 60  # chi2(23): 1 in 30,000
    n = 1 << 16
    for seed in range(4):
        order = Shuffled(n + 5, [seed, 1])[0:n].astype(float)
        part = np.bincount((order[: n // 8] * 64 // (n + 5)).astype(int), minlength=64)
        assert ((part - n // 512) ** 2 / (n // 512)).sum() < 130
        for other in order[1:], order[256:], np.arange(n, dtype=float):
            assert abs(np.corrcoef(order[: len(other)], other)[0, 1]) * np.sqrt(n) < 4.5
    assert len({tuple(Shuffled(1000, [seed, epoch])[0:9]) for seed in range(5) for epoch in range(5)}) == 25


def test_orders_of_many_and_of_few(monkeypatch):
    np.testing.assert_array_equal(order_of(10, [3, 2]), rng_of([3, 2]).permutation(10))
    assert isinstance(order_of(FEW, [0, 0]), np.ndarray) and isinstance(order_of(FEW + 1, [0, 0]), Shuffled)
    big = Shuffled(2**31 + 9, [1, 0])[2**31 : 2**31 + 9]
    huge = Shuffled(2**33, [1, 0])[5:9]
    assert (
        len(set(big)) == 9 and big.max() < 2**31 + 9 and len(set(huge)) == 4 and 0 <= huge.min() <= huge.max() < 2**33
    )
    monkeypatch.setattr("jaxsparse.data.order.FEW", 1000)
    n = 70_000
    seen = np.zeros(n, int)
    batches = js.batches(np.arange(n), np.arange(n, dtype=np.int64), batch_size=1 << 13, shuffle=True, seed=5)
    for batch in batches:
        np.add.at(seen, np.asarray(batch.y)[np.asarray(batch.weight) > 0], 1)
    assert (seen == 1).all()
    half = js.batches(np.arange(n), batch_size=1 << 13, shuffle=True, seed=5)
    half.state = {**half.state, "epoch": 1, "step": 8}
    np.testing.assert_array_equal(next(iter(half)).x, batches[8].x)


# ---- batches by number


@pytest.mark.parametrize("devices", [None, 2])
def test_batches_by_number_are_those_of_the_epoch(devices):
    x = {
        "m": random_csr(rng_of(0), 37),
        "ids": rng_of(1).integers(0, 9, (37, 2)),
        "lists": [[1] * (i % 4) for i in range(37)],
    }
    make = lambda: js.batches(x, np.arange(37), batch_size=8, num_rows=9, shuffle=True, devices=devices)  # noqa: E731
    batches, straight = make(), make()
    for epoch in range(2):
        batches.state = {**batches.state, "epoch": epoch, "step": 0}
        want = list(straight)
        assert_same([batches[i] for i in range(5)], want)
        assert_same([batches[-1], batches[np.int64(-5)]], [want[-1], want[0]])
        with ThreadPoolExecutor(4) as pool:
            assert_same(
                list(pool.map(batches.__getitem__, [3, 0, 4, 1, 2] * 4)), [want[i] for i in [3, 0, 4, 1, 2] * 4]
            )
        assert batches.state["step"] == 0
    for wrong in 5, -6:
        with pytest.raises(IndexError, match=f"batch {wrong} of an epoch of 5"):
            batches[wrong]
    for wrong in 1.0, slice(2), None, True:
        with pytest.raises(TypeError, match="number of a batch"):
            batches[wrong]


def test_threads_share_a_computed_order(monkeypatch):
    """Blocks of an order come and go while several threads read it."""
    monkeypatch.setattr("jaxsparse.data.order.FEW", 10)
    monkeypatch.setattr("jaxsparse.data.order._BLOCK", 16)
    batches = js.batches(np.arange(1000), batch_size=10, shuffle=True, devices=1)
    want = [batches[i].x.ravel().tolist() for i in range(100)]
    assert sorted(np.ravel(want)) == list(range(1000))
    barrier = threading.Barrier(4)

    def read(seed):
        barrier.wait()
        return all(batches[i].x.ravel().tolist() == want[i] for i in rng_of(seed).permutation(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_rows_that_do_not_fit_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxsparse.data.csr_files.MAX_ROWS", 8)
    with pytest.raises(OverflowError, match=r"'matrix' argument.*fewer than 8 rows in all.*8 up to matrix\[1\]"):
        js.save_csr(tmp_path / "x", [sp.eye_array(4)] * 3)
    assert os.listdir(tmp_path) == []


def test_grain_drives_batches():
    grain = pytest.importorskip("grain")
    batches = js.batches(random_csr(rng_of(0), 30), np.arange(30), batch_size=8, shuffle=True)
    loaded = list(grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=2)))
    assert_same(loaded, list(batches))


@pytest.mark.slow  # two processes that import JAX
def test_grain_drives_batches_in_worker_processes():
    grain, flags = pytest.importorskip("grain"), pytest.importorskip("absl.flags")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # as absl.app.run does
    x = {
        "m": random_csr(rng_of(0), 30),
        "ids": np.arange(60).reshape(30, 2),
        "lists": [[1] * (i % 4) for i in range(30)],
    }
    batches = js.batches(x, np.arange(30), batch_size=8, num_rows=60, shuffle=True)
    loaded = grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    workers = grain.MultiprocessingOptions(num_workers=2, per_worker_buffer_size=2)
    assert_same(list(loaded.mp_prefetch(workers)), list(batches.one_epoch()))


def test_pickled_batches_are_the_same():
    """As loaders with worker processes have them."""
    batches = js.batches([[3, 0], [], [1, 2], [2]], np.arange(4), num_rows=4, batch_size=2, shuffle=True)
    next(iter(batches))
    other = pickle.loads(pickle.dumps(batches))
    assert other.state == batches.state and other.state["step"] == 1
    assert_same(list(other.one_epoch()), list(batches.one_epoch()))


def test_torch_drives_batches():
    data = pytest.importorskip("torch.utils.data")
    batches = js.batches(np.arange(30), np.arange(30), batch_size=8, shuffle=True)
    assert_same(list(data.DataLoader(batches, batch_size=None, collate_fn=lambda b: b)), list(batches))
    assert isinstance(jax.tree.leaves(batches[0])[0], jax.Array)
