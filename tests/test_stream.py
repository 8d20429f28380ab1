"""Streams: every example once, across the borders of chunks, in few shapes, on several hosts, and from any position."""

import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js
from tests.marks import slow_but
from tests.test_batch import KINDS, V, assert_same, densify, epoch_rows, rows_for, shards, signature, zipf

rng_of = np.random.default_rng


def part_of(x, rows):
    """Some rows of what js.batches takes."""
    if isinstance(x, dict):
        return {name: part_of(of, rows) for name, of in x.items()}
    return [x[i] for i in rows] if isinstance(x, list) else x[rows]


def chunks_of(x, sizes, weight=None):
    """(x, y) of chunks of these sizes, y being the number of the example."""
    ends = np.cumsum([0, *sizes])
    spans = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    return [(part_of(x, rows), rows, *([] if weight is None else [weight[rows]])) for rows in spans]


def stream_of(x, sizes, **options):
    chunks = chunks_of(x, sizes)
    return js.stream(lambda: iter(chunks), **{"num_rows": rows_for(x), **options})


def files_of(x, sizes, **options):
    """The same as files of up to two chunks."""
    chunks = chunks_of(x, sizes)
    files = {f"f{i}": chunks[i : i + 2] for i in range(0, len(chunks), 2)}
    read = lambda name: iter(files[name]) if len(files[name]) == 2 else files[name][0]  # noqa: E731
    counts = [sum(len(y) for _, y in of) for of in files.values()]
    return js.stream(list(files), reader=read, **{"examples": counts, "num_rows": rows_for(x), **options})


# ---- every row once


@given(
    st.sampled_from(list(KINDS)), st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    st.sampled_from([(1, None), (7, None), (64, None), (4, 1), (8, 2)]), st.booleans(), st.sampled_from([1, 6, 99]),
    st.sampled_from([stream_of, files_of]),
)  # fmt: skip
def test_every_row_once_an_epoch(kind, sizes, size_and_devices, shuffle, buffer, new):
    batch_size, devices = size_and_devices
    x, n = KINDS[kind](rng_of(0), sum(sizes)), sum(sizes)
    options = {"batch_size": batch_size, "devices": devices, "shuffle": shuffle, "buffer": buffer}
    stream, short = new(x, sizes, **options), new(x, sizes, drop_remainder=True, **options)
    for epoch in range(2):
        assert stream.state["epoch"] == epoch
        order = epoch_rows(stream, x, V, devices)
        assert sorted(order) == list(range(n)) and (shuffle or order == list(range(n)))
        assert epoch_rows(short, x, V, devices) == order[: n - n % batch_size]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_js_batches(kind):
    """Of one size they are bit-equal, the distinct ids included; weights travel along."""
    x, weight = KINDS[kind](rng_of(3), 30), rng_of(4).random(30, np.float32)
    chunks = chunks_of(x, [4, 0, 17, 1, 8], weight)
    nse = {} if isinstance(x, (list, np.ndarray)) else {"nse": 500}
    want = js.batches(x, np.arange(30), batch_size=8, num_rows=rows_for(x), weight=weight, **nse)
    stream = js.stream(lambda: iter(chunks), batch_size=8, num_rows=rows_for(x), length=9, distinct=2000, **nse)
    for ours, theirs in zip(stream, want, strict=True):
        for name in "y", "weight":
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        leaves = [jax.tree.flatten(of.x, is_leaf=lambda b: hasattr(b, "nse"))[0] for of in (ours, theirs)]
        for a, b in zip(*leaves, strict=True):
            if hasattr(a, "nse"):
                np.testing.assert_array_equal(densify(a), densify(b))
            elif a.shape == b.shape:
                np.testing.assert_array_equal(a, b)
            else:  # lists, to another length
                k = min(a.shape[1], b.shape[1])
                np.testing.assert_array_equal(a[:, :k], b[:, :k])
                assert (np.asarray(a)[:, k:] == V).all() and (np.asarray(b)[:, k:] == V).all()
        is_ids = lambda d: isinstance(d, js.DistinctIds)  # noqa: E731
        for known in jax.tree.leaves(ours.distinct, is_leaf=is_ids):
            distinct = np.asarray(known.ids).ravel()[: known.size]
            k = int((distinct != -(2**31)).sum())
            assert k < known.size and (np.diff(distinct[:k]) > 0).all() and np.asarray(known.positions).max() < k


def test_a_shuffle_mixes_within_the_buffer_and_the_files():
    chunks = [np.arange(i, i + 10) for i in range(0, 100, 10)]
    stream = js.stream(lambda: ((c, c) for c in chunks), batch_size=10, shuffle=True, buffer=25, seed=3)
    epochs = [np.concatenate([b.y for b in stream]) for _ in range(3)]
    for order in epochs:  # three chunks a window
        for first in range(0, 100, 30):
            assert sorted(order[first : first + 30]) == list(range(first, min(first + 30, 100)))
        assert not np.array_equal(order[:30], np.arange(30)) and not np.array_equal(order[:30], order[30:60] - 30)
    assert len({tuple(order) for order in epochs}) == 3
    files = js.stream(list(range(10)), reader=lambda i: (chunks[i], chunks[i]), batch_size=10, shuffle=True, buffer=1)
    orders = {tuple(int(b.y[0]) // 10 for b in files) for _ in range(4)}
    assert len(orders) == 4 and all(sorted(order) == list(range(10)) for order in orders)


def test_what_is_read_is_let_go():
    def source():
        for seed in range(15):
            yield rng_of(seed).random((1000, 250), np.float32)  # a megabyte

    for options, most in ({"shuffle": True, "buffer": 2000}, 9e6), ({}, 6e6):
        stream = js.stream(source, batch_size=50, **options)
        tracemalloc.start()
        assert sum(1 for _ in stream) == 300
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most


# ---- few shapes


def ragged_stream(lengths, batch_size, **options):
    rng = rng_of(0)
    lists = [rng.integers(0, 500, n).tolist() for n in lengths]
    m = sp.csr_array((np.ones(sum(lengths)), np.concatenate(lists), np.cumsum([0, *lengths])), (len(lists), 500))
    m.sum_duplicates()
    chunks = chunks_of({"m": m, "lists": lists}, [100] * (len(lengths) // 100))
    return m, js.stream(lambda: iter(chunks), batch_size=batch_size, num_rows=500, **options)


def test_data_like_the_first_chunks_have_one_shape():
    lengths = rng_of(1).poisson(6, 4000)
    for options in {}, {"shuffle": True, "buffer": 300}:
        _, stream = ragged_stream(lengths, 32, **options)
        assert len({signature(batch) for _ in range(2) for batch in stream}) == 1
        assert stream.rungs == [250, 0, 0]
    _, again = ragged_stream(lengths, 32, **stream.sizes)
    assert again.sizes == stream.sizes and set(stream.sizes) == {"nse", "length", "distinct"}
    ids = js.stream(lambda: iter([np.arange(100)] * 3), batch_size=10)
    assert len(list(ids)) == 30 and ids.rungs == [30, 0, 0] and ids.sizes["distinct"] > 10


def test_what_does_not_fit_gets_a_larger_rung_and_is_not_cut():
    lengths = np.concatenate([np.full(300, 2), np.full(300, 3), np.full(300, 12), np.full(300, 2)])
    m, stream = ragged_stream(lengths, 20, distinct={"m": 50, "lists": 50})
    total, seen, step = 0.0, set(), jax.jit(lambda batch: batch.weight.sum())
    for batch in stream:
        seen.add(signature(batch))
        assert step(batch) == 20
        total += float(batch.x["m"].data.sum())
        assert int((batch.x["lists"] < 500).sum()) == int(lengths[np.asarray(batch.y)].sum())
    assert (
        total == m.sum() and len(seen) == step._cache_size() == 3 and min(stream.rungs) > 0 and sum(stream.rungs) == 60
    )
    _, few = ragged_stream(lengths[:300], 20, distinct=8)  # of the first rung, but for the distinct ids
    sizes = {batch.distinct["m"].size for batch in few}
    assert few.rungs[0] == 0 and sizes <= {8 * 2, 8 * 8}


def test_a_fourth_shape_warns():
    with pytest.warns(UserWarning, match=r"js.stream: a batch needs more than eight times.*nse=, length= or distinct="):
        _, stream = ragged_stream(np.concatenate([np.full(1000, 1), np.full(100, 30)]), 10)
        assert sum(float(batch.x["m"].data.sum()) for batch in stream) == 1000 + 100 * 30
    assert len(stream.rungs) == 4 and stream.rungs[3] == 10


def test_sizes_of_nothing_can_grow():
    """First chunks without entries, ids without columns."""
    empty, full = sp.csr_array((50, 30), dtype=np.float32), sp.csr_array(np.ones((50, 30), np.float32))
    chunks = [{"m": empty, "none": np.zeros((50, 0), int)}] * 3 + [{"m": full, "none": np.zeros((50, 0), int)}]
    stream = js.stream(lambda: iter(chunks), batch_size=5, num_rows=30)
    with pytest.warns(UserWarning, match="more than eight times"):
        assert sum(float(batch.x["m"].data.sum()) for batch in stream) == 1500
    assert stream.rungs[0] == 30 and sum(stream.rungs) == 40


# ---- positions


@pytest.mark.parametrize("kind", slow_but(["dict"], ["dict", "lists"]))
@pytest.mark.parametrize("new", [stream_of, files_of])
@pytest.mark.parametrize("options", [
    {}, {"shuffle": True, "buffer": 9}, {"shuffle": True, "drop_remainder": True}, {"shard": (1, 2), "devices": 2},
    {"shard": (0, 2), "shuffle": True, "buffer": 5}, {"shuffle": True, "buffer": 9, "prefetch": 3},
])  # fmt: skip
def test_a_saved_position_goes_on_bit_identically(kind, new, options):
    sizes = [5, 1, 0, 8, 3, 6, 2]
    x = KINDS[kind](rng_of(0), sum(sizes))
    make = partial(new, x, sizes, batch_size=4, seed=3, **{"nse": 200, "length": 20, **options})
    batches, states, straight = make(), [], []
    for _ in range(2):
        states.append(json.dumps(batches.state))
        for batch in batches:
            straight.append(batch)
            states.append(json.dumps(batches.state))
    for done, text in enumerate(sorted(set(states), key=states.index)):
        resumed = make()
        resumed.state = json.loads(text)
        assert json.dumps(resumed.state) == text
        rest = [b for _ in range(json.loads(text)["epoch"], 2) for b in resumed]
        assert_same(rest, straight[done:])


def test_files_before_a_position_are_not_read():
    read = []

    def reader(i):
        read.append(i)
        return np.arange(10 * i, 10 * i + 10)

    make = lambda: js.stream(list(range(20)), reader=reader, batch_size=2, shuffle=True, buffer=20)  # noqa: E731
    stream = make()
    for _, _ in zip(range(75), stream, strict=False):
        pass
    state, resumed = stream.state, make()
    resumed.state = state
    read.clear()
    rest = np.concatenate([b.x for b in resumed])
    assert len(rest) == 50 and set(rest // 10) <= set(read) and len(read) == 6


def test_leaving_early_starts_the_epoch_again():
    stream, straight = (stream_of(np.arange(10), [4, 6], batch_size=3, shuffle=True) for _ in range(2))
    epochs = [list(straight) for _ in range(2)]
    assert_same([next(iter(stream)), next(iter(stream))], [epochs[0][0]] * 2)
    stream.state = stream.state
    assert_same([next(iter(stream)), *stream.one_epoch()], [epochs[0][1], *epochs[0]])
    assert_same([*stream, *stream], [*epochs[0][1:], *epochs[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_made_ahead_are_the_same(kind):
    sizes = [5, 1, 0, 8, 3, 6, 2]
    x = KINDS[kind](rng_of(0), sum(sizes))
    plain, made_ahead = (stream_of(x, sizes, batch_size=4, shuffle=True, buffer=9, prefetch=n) for n in (0, 3))
    for _ in range(2):
        for one, other in zip(plain, made_ahead, strict=True):
            assert_same([one], [other])
            assert plain.state == made_ahead.state  # of the batch that came, not of those that wait
    assert plain.rungs == made_ahead.rungs
    assert_same(list(made_ahead.one_epoch()), list(plain.one_epoch()))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_what_is_made_ahead_fails_in_its_place_and_ends_where_it_is_left(tmp_path, prefetch):
    (tmp_path / "a.csv").write_text("y,a\n" + "1,2\n" * 99 + "1,oh\n" + "1,2\n" * 99)
    read = lambda: js.read_csv(tmp_path / "a.csv", label="y", numbers=["a"], chunk_rows=10)  # noqa: E731
    closed = []

    def source():
        try:
            yield from read()
        finally:
            closed.append(threading.current_thread().name)

    plain, stream = (js.stream(source, batch_size=2, prefetch=n) for n in (0, prefetch))
    came = []
    for one in plain, stream, stream:  # and again
        came.append(0)
        with pytest.raises(ValueError, match=r"a\.csv, line 101: column 'a' is 'oh'"):
            for _ in one:
                came[-1] += 1
        assert one.state["step"] == came[-1]
    assert len(set(came)) == 1 and came[0] > 40
    closed.clear()
    for _ in range(3):
        batches = iter(stream)
        next(batches)
        batches.close()
    del batches  # Python 3.12.3 keeps what a closed generator holds until it is deleted
    for _ in range(500):  # and the thread holds it until its last task has ended
        if len(closed) < 3:
            time.sleep(0.01)
    assert len(closed) == 3


def test_a_thread_ends_with_its_stream():
    before, stream = set(threading.enumerate()), stream_of(np.arange(20), [20], batch_size=2, prefetch=2)
    for _ in range(3):
        next(iter(stream))
    (thread,) = set(threading.enumerate()) - before  # one for all its epochs
    del stream
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.slow
def test_python_ends_in_the_middle_of_a_stream():
    code = textwrap.dedent("""
        import numpy as np, jaxsparse as js
        stream = js.stream(lambda: (np.full((8, 2), i, np.float32) for i in range(10**9)), batch_size=4, prefetch=2)
        batches = iter(stream)
        for _ in range(5):
            next(batches)
        print("done", flush=True)
        raise SystemExit(3)
    """)
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\n", "")


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"shuffle": 0}, {"batch_size": 5}, {"drop_remainder": 1}, {"buffer": 9}, {"shard_count": 2},
    {"epoch": -1}, {"step": -1}, {"file": 2}, {"chunk": None},
])  # fmt: skip
def test_a_position_of_other_settings_raises(change):
    stream = stream_of(np.arange(10), [4, 6], batch_size=3, shuffle=True)
    with pytest.raises((ValueError, TypeError)):
        stream.state = {**stream.state, **change}
    assert stream.state["step"] == 0 and len(list(stream)) == 4


def test_a_position_in_other_data_raises():
    stream, other = (stream_of(np.arange(n), [n - 2, 2], batch_size=2) for n in (20, 10))
    for _ in zip(range(7), stream, strict=False):
        pass
    other.state = stream.state
    with pytest.raises(ValueError, match=r"'state'.*a position in the data that it was saved with"):
        list(other)


# ---- hosts


@pytest.mark.parametrize("new", [stream_of, files_of])
@pytest.mark.parametrize("count, devices", slow_but([(4, 2)], [(2, None), (4, 2)]))
@pytest.mark.parametrize("options", [{}, {"shuffle": True, "buffer": 7}, {"drop_remainder": True}])
def test_hosts_share_the_examples(new, count, devices, options):
    """Disjoint, complete, as many steps and the same shapes on every host, however uneven the files are."""
    sizes = [5, 1, 13, 0, 3, 6, 2, 4]
    x = KINDS["dict"](rng_of(0), sum(sizes))
    options = {"batch_size": 8, "nse": 100, "length": 15, **options}
    hosts = [new(x, sizes, shard=(i, count), devices=devices, **options) for i in range(count)]
    for _ in range(2):
        steps = [list(host) for host in hosts]
        assert len({len(of) for of in steps}) == 1
        assert len({signature(batch) for of in steps for batch in of}) == 1 and steps[0][0].distinct["user"] is None
        ys = [[y for b in of for s in shards(b, devices) for y in s.y[s.weight > 0]] for of in steps]
        seen = sorted(y for of in ys for y in of)
        if "drop_remainder" in options:  # a host's batches are full, or there for the others' sake
            assert all(len(set(np.asarray(batch.weight).ravel())) == 1 for of in steps for batch in of)
            assert len(seen) == sum(len(of) // (8 // count) * (8 // count) for of in ys) and len(set(seen)) == len(seen)
        else:
            assert seen == list(range(sum(sizes)))
    assert epoch_rows(hosts[0].one_epoch(), x, V, devices)


@pytest.mark.slow
def test_two_processes_share_a_stream():
    """Whose files are uneven: each step is one program of both, which waits for the other."""
    code = textwrap.dedent("""
        import sys
        import jax, numpy as np
        import jaxsparse as js

        index, address = int(sys.argv[1]), sys.argv[2]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 2, index)
        mesh = jax.make_mesh((2,), ("hosts",), axis_types=(jax.sharding.AxisType.Auto,))
        sizes = [5, 40, 0, 3, 11]
        read = lambda i: (np.full((sizes[i], 2), i), np.arange(sizes[i]) + 100 * i)
        options = {"shuffle": True, "shard": (index, 2), "examples": sizes}
        stream = js.stream(range(5), reader=read, batch_size=8, num_rows=9, **options)
        total = jax.jit(lambda b: ((b.y + 1) * b.weight).sum())
        for _ in range(2):
            sums = [float(total(js.global_batch(batch, mesh, "hosts"))) for batch in stream]
            print("epoch", len(sums), sum(sums), flush=True)
    """)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), address], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    try:
        outputs = [host.communicate(timeout=240)[0].splitlines() for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    said = [[line.split()[1:] for line in lines if line.startswith("epoch")] for lines in outputs]  # and not gloo's
    assert said[0] == said[1] and len(said[0]) == 2
    ids = [n + 100 * i + 1 for i, size in enumerate([5, 40, 0, 3, 11]) for n in range(size)]
    assert all(float(total) == sum(ids) and int(steps) >= 10 for steps, total in said[0])


def test_with_shard_what_does_not_fit_raises():
    make = partial(ragged_stream, np.concatenate([np.full(700, 2), np.full(500, 5)]), 20, shard=(0, 2))
    with pytest.raises(ValueError, match=r"'(nse|length)' argument of js.stream must be at least \d+ with shard"):
        list(make()[1])
    assert len(list(make(nse=100, length=5)[1])) == 60


# ---- what goes around a step


def loss_fn(params, batch):
    logits = js.dot(batch.x["words"], params["w"])[:, 0] + params["user"][batch.x["user"]]
    return js.weighted_mean((logits - batch.y / 40) ** 2, batch.weight)


TX = js.lazy_adam(1e-2)


def new_state():
    params = {"w": jnp.zeros((V, 1)), "user": jnp.zeros(V)}
    return TrainState.create(apply_fn=None, params=params, tx=TX)


STEP = js.make_train_step(loss_fn)


def training(**options):
    x = KINDS["dict"](rng_of(0), 43)
    x = {name: x[name] for name in ("words", "user")}
    return x, stream_of(x, [10, 3, 20, 10], batch_size=8, num_rows={"user": V}, **options)


def test_fit_evaluate_and_predict_take_streams(capfd):
    x, stream = training(shuffle=True, buffer=15)
    x, in_order = training()
    metric_fn = lambda params, batch: {"loss": loss_fn(params, batch)}  # noqa: E731
    state, history = js.fit(STEP, new_state(), stream, epochs=3, validation=in_order, metrics=metric_fn)
    assert "epoch 3/3: 6step [" in capfd.readouterr().err  # of an unknown number
    want = new_state()
    _, again = training(shuffle=True, buffer=15)
    for _ in range(3):
        for batch in again:
            want, _ = STEP(want, batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, want.params)
    assert [entry["steps"] for entry in history] == [6, 6, 6] and stream.state["epoch"] == 3
    in_memory = js.batches(x, np.arange(43), batch_size=8, num_rows={"user": V})
    np.testing.assert_allclose(history[-1]["loss"], js.evaluate(metric_fn, state, in_memory)["loss"], rtol=1e-6)
    apply_fn = lambda params, x: js.dot(x["words"], params["w"])[:, 0] + params["user"][x["user"]]  # noqa: E731
    said = js.predict(apply_fn, state, in_order)
    dense = x["words"].toarray() @ np.asarray(state.params["w"])[:, 0] + np.asarray(state.params["user"])[x["user"]]
    np.testing.assert_allclose(said, dense, rtol=1e-5, atol=1e-7)
    for wrong in {"shuffle": True}, {"drop_remainder": True}, {"devices": 2}, {"shard": (0, 2), "nse": 99}:
        with pytest.raises(ValueError, match=f"batches with {next(iter(wrong))}"):
            js.predict(apply_fn, state, training(**wrong)[1])


def test_a_stopped_fit_goes_on_where_it_was():
    _, whole = training(shuffle=True, buffer=15)
    want, _ = js.fit(STEP, new_state(), whole, epochs=2, progress=False)
    _, stream = training(shuffle=True, buffer=15)
    state, _ = js.fit(STEP, new_state(), stream, callback=lambda event: event.step == 4, progress=False)
    _, other = training(shuffle=True, buffer=15)
    other.state = json.loads(json.dumps(stream.state))
    state, history = js.fit(STEP, state, other, epochs=2, progress=False)
    assert [entry["steps"] for entry in history] == [2, 6]
    jax.tree.map(np.testing.assert_array_equal, state.params, want.params)


def test_an_epoch_of_a_stream_without_batches():
    stream = stream_of(np.arange(3), [3], batch_size=4, drop_remainder=True)
    with pytest.raises(ValueError, match=r"'batches'.*lower batch_size or drop_remainder=False"):
        js.fit(lambda state, batch: (state, {"loss": 0.0}), new_state(), stream, progress=False)


def test_a_step_compiles_once_for_a_stream():
    _, stream = training(shuffle=True, buffer=15)
    step = jax.jit(lambda table, batch: (table + loss_fn({"w": table, "user": jnp.zeros(V)}, batch), {"loss": 0.0}))
    js.fit(step, jnp.zeros((V, 1)), stream, epochs=3, progress=False)
    assert step._cache_size() == 1 == sum(k > 0 for k in stream.rungs)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_identically(tmp_path):
    """kill -9 in the middle of an epoch; the checkpoint and the position, written together, are enough."""
    code = textwrap.dedent("""
        import json, os, signal, sys
        import flax, jax, numpy as np
        import jaxsparse as js
        from tests.test_stream import STEP, new_state, training

        path, kill_at = sys.argv[1], int(sys.argv[2])
        _, stream = training(shuffle=True, buffer=15)
        state = new_state()
        if os.path.exists(path):
            saved = flax.serialization.msgpack_restore(open(path, "rb").read())
            state = flax.serialization.from_state_dict(state, saved["state"])
            stream.state = saved["position"]

        def callback(event):
            saved = {"state": flax.serialization.to_state_dict(event.state), "position": stream.state}
            saved = jax.tree.map(lambda a: np.asarray(a) if hasattr(a, "shape") else a, saved)
            with open(path + ".new", "wb") as file:
                file.write(flax.serialization.msgpack_serialize(saved))
            os.replace(path + ".new", path)
            if int(event.state.step) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        epochs = 3 - stream.state["epoch"]
        state, _ = js.fit(STEP, state, stream, epochs=epochs, callback=callback, progress=False)
        np.savez(path + ".npz", w=state.params["w"], user=state.params["user"], step=state.step)
    """)

    def run(name, kill_at):
        return subprocess.run([sys.executable, "-c", code, str(tmp_path / name), str(kill_at)], check=False).returncode

    assert run("straight", -1) == 0
    assert run("killed", 4) == run("killed", 10) == run("killed", 12) == -signal.SIGKILL
    assert run("killed", -1) == 0
    one, other = (np.load(tmp_path / f"{name}.npz") for name in ("straight", "killed"))
    assert one["step"] == 18
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# ---- what cannot work


@pytest.mark.parametrize("source, options, error, says", [
    ([1, 2], {}, TypeError, r"'source'.*a function that gives an iterator of chunks. Got list.*files wants reader="),
    (iter([np.arange(3)]), {}, TypeError, r"'source'.*Got list_iterator.*used up after one epoch"),
    ("file", {"reader": np.load}, TypeError, r"'source'.*a list of files, with reader=. Got 'file'"),
    ([], {"reader": np.load}, TypeError, r"'source'.*a list of files, with reader=. Got none"),
    (["a"], {"reader": 3}, TypeError, r"'reader'.*a function of a file. Got int"),
    (["a"], {"reader": lambda f: np.arange(3), "examples": [1, 2]}, ValueError, r"'examples'.*one number"),
    (["a"] * 2, {"reader": lambda f: np.arange(3), "shard": (0, 2)}, ValueError, r"'examples'.*given with files"),
    (["a"], {"reader": lambda f: np.arange(3), "shard": (0, 2), "examples": [3]}, ValueError, r"'source'.*at least 2"),
    ({1: 2}.get, {"reader": np.load}, TypeError, r"'source'.*a list of files, with reader=. Got <built-in"),
    (lambda: np.arange(3), {}, TypeError, r"'source'.*that gives an iterator of chunks. Got one that gives ndarray"),
    (lambda: sp.eye_array(3), {}, TypeError, r"'source'.*that gives an iterator of chunks. Got one that gives dia"),
    (lambda: None, {}, TypeError, r"'source'.*that gives an iterator of chunks. Got one that gives NoneType"),
    (lambda: [], {}, ValueError, r"'source'.*at least one example. Got none"),
    (lambda: [np.arange(0)], {}, ValueError, r"'source'.*at least one example. Got none"),
    (lambda: [np.arange(3)], {"buffer": 0}, ValueError, r"'buffer'.*an integer of at least 1. Got 0"),
    (lambda: [np.arange(3)], {"prefetch": -1}, ValueError, r"'prefetch'.*an integer of at least 0. Got -1"),
    (lambda: [np.arange(3)], {"batch_size": 0}, ValueError, r"'batch_size' argument of js.stream.*at least 1. Got 0"),
    (lambda: [np.arange(3)], {"shard": (2, 2)}, ValueError, r"'shard' argument of js.stream"),
    (lambda: [np.arange(3)], {"length": "a"}, TypeError, r"'length' argument of js.stream.*an integer"),
    (lambda: [sp.eye_array(3)], {"nse": 0}, ValueError, r"'nse' argument of js.stream must be at least 1. Got 0"),
    (lambda: [{"a": [[1]]}], {"length": {"a": -1}}, ValueError, r"'length' argument of js.stream must be at least 1"),
    (lambda: [{"a": np.arange(3)}], {"distinct": {"b": 3}}, ValueError, r"'distinct' argument of js.stream.*\['a'\]"),
    (lambda: [(np.arange(3),) * 4], {}, ValueError, r"'source'.*of chunks x, \(x, y\) or \(x, y, weight\). Got"),
])  # fmt: skip
def test_refuses(source, options, error, says):
    with pytest.raises(error, match=says):
        js.stream(source, **{"batch_size": 2, **options})


@pytest.mark.parametrize("second, says", [
    (np.array([1, 9]), r"ids in \[0, 5\). Got 9 at position 1"),
    (np.ones((2, 2), int), r"alike, x being ids of shape \('n',\), as in the first. Got ids of shape \('n', 2\)"),
    (np.ones(2), r"'num_rows'.*Got 5 for x of float32"),
    ({"a": np.ones(2, int)}, r"alike, x being ids.*Got left out"),
    ((np.ones(2, int), np.ones(2)), r"alike, y being left out, as in the first. Got float32"),
    ((np.ones(2, int), np.ones(3)), r"of 2 examples, as x is. Got 3"),
])  # fmt: skip
def test_errors_name_the_chunk(second, says):
    first = [np.arange(3)] * 60
    stream = js.stream(lambda: iter([*first, second]), batch_size=2, num_rows=5)
    files = js.stream(["a", "b"], reader=lambda f: iter(first) if f == "a" else second, batch_size=2, num_rows=5)
    for made, where in (stream, "chunk 60"), (files, "chunk 0 of 'b'"):
        with pytest.raises((ValueError, TypeError), match=says) as raised:
            list(made)
        assert raised.value.__notes__ == [f"js.stream: in {where}."]


def test_a_file_of_another_length_than_was_said_raises():
    stream = js.stream(["a"] * 70, reader=lambda f: np.arange(3), batch_size=2, examples=[3] * 69 + [4])
    with pytest.raises(ValueError, match=r"'examples'.*the numbers of examples of the files, 3 for 'a'. Got 4"):
        list(stream)


def test_zipf_texts_from_files_of_csr(tmp_path):
    """As people have them: one folder of memory-mapped CSR a day, read without a copy."""
    rng, x = rng_of(0), []
    for day in range(4):
        lengths = rng.poisson(5, 50)
        m = sp.csr_array(
            (np.ones(lengths.sum(), np.float32), zipf(rng, lengths.sum(), 300), np.cumsum([0, *lengths])), (50, 300)
        )
        js.save_csr(tmp_path / f"{day}", m)
        x.append(m)
    days = [tmp_path / f"{day}" for day in range(4)]
    stream = js.stream(days, reader=lambda day: (js.open_csr(day), np.arange(50) + 50 * int(day.name)), batch_size=32)
    rows = np.concatenate([densify(batch.x) for batch in stream])[:200]
    np.testing.assert_array_equal(rows, sp.vstack(x).toarray())


def test_a_reader_of_chunks_is_a_reader(tmp_path):
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file, rows in zip(files, (range(3), range(3, 7)), strict=True):
        file.write_text("y,c\n" + "".join(f"{n},{n}\n" for n in rows))
    read = lambda file: js.read_csv(file, label="y", ids=["c"], chunk_rows=2)  # noqa: E731
    batches = list(js.stream(files, reader=read, batch_size=3))
    assert [batch.x["c"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
