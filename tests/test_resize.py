"""js.grow, js.shrink, js.remap: a run whose table changes its rows against one that had these rows from the start."""

import dataclasses
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsparse as js
from jaxsparse.optim.replaying import ReplayState, replay_states
from tests.devices import mesh_of
from tests.hlo import bytes_moved, compiled_by_default, large_arrays
from tests.marks import slow_but

V, MORE, D, STEPS = 12, 20, 3, 5
RNG = np.random.default_rng(0)
ROWS = jnp.asarray(RNG.normal(size=(MORE, D)), jnp.float32)
IDS = np.concatenate([RNG.integers(V - 2, size=(STEPS, 4)), RNG.integers(MORE, size=(STEPS, 4))])
IDS[-STEPS:, 0] = V + 3  # a new row in each of these batches; rows V - 2 and V - 1 are not read before


def loss_fn(p, ids):
    """Of a table, another one of its height, and weights. No gradient of what is read is near zero."""
    read = jnp.sum(p["t"][ids] * (1 + jnp.arange(4.0))[:, None], 0) @ p["w"]
    return read + jnp.sum(p["other"][ids % V] * (0.5 + ids % 3)[:, None])


def params(num_rows):
    return {"t": ROWS[:num_rows], "other": ROWS[:V, :2], "w": jnp.array([1.0, -2.0, 0.5])}


def start(tx, num_rows):
    state = TrainState.create(apply_fn=None, params=params(num_rows), tx=tx)
    return jax.tree.map(jnp.array, state.replace(step=jnp.int32(0)))


def steps_of(step):
    """run(state, begin, end): one program for any number of steps."""

    @jax.jit
    def run(state, begin, end):
        return jax.lax.fori_loop(begin, end, lambda i, state: step(state, jnp.asarray(IDS)[i]), state)

    return run


def stock(state, ids):
    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, ids))


dense, whole_step = steps_of(stock), steps_of(js.rowwise(stock))
two_words = steps_of(lambda state, ids: state.apply_gradients(grads=js.grad(loss_fn)(state.params, ids)))
made = steps_of(lambda state, ids: js.make_train_step(loss_fn, jit=False)(state, ids)[0])

GROUPS = {"t": "rows", "other": "rest", "w": "rest"}
CASES = {
    "adam": (optax.adam(0.1), whole_step),
    "adagrad": (optax.adagrad(0.1), whole_step),
    "adamw": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), whole_step),
    "lazy": (js.lazy(optax.rmsprop(0.1, initial_scale=0.5, momentum=0.9)), two_words),
    "rowwise adagrad": (js.lazy_rowwise_adagrad(0.1, 0.3), two_words),
    "ftrl": (js.lazy_ftrl(0.1), two_words),
    "partition": (optax.partition({"rows": js.lazy_adam(0.1), "rest": js.lazy_sgd(0.1)}, GROUPS), two_words),
    "schedule_free": (optax.contrib.schedule_free_sgd(0.1), whole_step),
    "dense multi_steps": (optax.MultiSteps(optax.adam(0.1), 2), dense),
    "replay adam": (js.lazy_adam(0.1, untouched="replay"), made),
    "replay adamw": (js.lazy_adamw(0.1, weight_decay=0.5, untouched="replay"), made),
    "replay sgd": (js.lazy_sgd(0.1, 0.9, untouched="replay"), made),
}


def as_new(state: Any) -> Any:
    """A state in which the rows from V on have just been made: as they were, and up to date."""

    def now(part):
        if not isinstance(part, ReplayState):
            return part
        names = ("plain", "decayed")
        stamps = {
            name: {k: s._replace(rows=s.rows.at[V:].set(part.steps)) if k == "t" else s for k, s in value.items()}
            for name, value in ((name, getattr(part, name)) for name in names)
        }
        return dataclasses.replace(part, **stamps)

    opt_state = jax.tree.map(now, state.opt_state, is_leaf=lambda x: isinstance(x, ReplayState))
    table = state.params["t"].at[V:].set(ROWS[V:])
    return state.replace(params=state.params | {"t": table}, opt_state=opt_state)


def close(got, want):
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_close(got, want, rtol=2e-6, atol=1e-7)


# It has slots, and rows that are not up to date: all that is different in the others is a number, or decay.
QUICK = [("replay sgd", False)]
EVERY = [(name, flushed) for name in CASES for flushed in (False, True)[: 1 + ("replay" in name)]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flushed"), slow_but(QUICK, EVERY))
def test_a_table_that_grew_is_one_that_was_larger_from_the_start(name, flushed):
    tx, run = CASES[name]
    flush = js.flush if flushed else lambda state: state
    state = flush(run(start(tx, V), 0, STEPS))
    want = as_new(flush(run(start(tx, MORE), 0, STEPS)))
    assert np.abs(state.params["t"] - ROWS[:V]).max() > 0.1
    got = js.grow(state, "['t']", MORE, init=ROWS[V:])
    chex.assert_trees_all_equal(got.params["t"][V:], ROWS[V:])
    chex.assert_trees_all_equal(js.shrink(got, "['t']", V), state)
    close(got, want)
    got, want = (js.flush(run(x, STEPS, 2 * STEPS)) for x in (got, want))
    assert np.abs(got.params["t"][V + 3] - ROWS[V + 3]).min() > 1e-3
    close(got, want)


@pytest.mark.slow  # AdamW under replay, whose programs are the largest
def test_new_rows_do_not_decay_for_steps_before_they_existed():
    """Right: rows of ones, one step of rate .1 and decay .5 after they are made."""
    tx, run = CASES["replay adamw"]
    state = js.grow(run(start(tx, V), 0, STEPS), "['t']", MORE, init=1.0)
    np.testing.assert_array_equal(js.flush(js.grow(state, "['t']", MORE, init=0)).params["t"][V:], 1)
    table = js.flush(run(start(tx, V), 0, STEPS)).params["t"]
    state = js.flush(run(js.grow(run(start(tx, V), 0, STEPS), "['t']", MORE, init=1.0), STEPS, STEPS + 1))
    unread = [r for r in range(V, MORE) if r not in IDS[STEPS]]
    np.testing.assert_allclose(state.params["t"][jnp.array(unread)], 0.95, rtol=1e-6)
    old = [r for r in range(V) if r not in IDS[: STEPS + 1]]
    np.testing.assert_allclose(state.params["t"][jnp.array(old)], 0.95 * table[jnp.array(old)], rtol=1e-5)


def arrays_of_t(state):
    """The arrays that belong to the table's rows, found by their paths."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    name = jax.tree_util.keystr
    return {name(path): np.asarray(x) for path, x in flat if "['t']" in name(path) and jnp.ndim(x)}


@pytest.mark.parametrize("name", slow_but([], ["adam", "replay sgd", "rowwise adagrad"]))  # as test_chunks, in training
def test_rows_in_another_order_are_trained_as_in_their_own(name):
    tx, run = CASES[name]
    order = np.random.default_rng(1).permutation(MORE)
    place = np.argsort(order)  # row r is now row place[r]
    state = run(start(tx, MORE), 0, STEPS)
    renamed = js.remap(state, "['t']", order)
    assert {path: x.shape for path, x in arrays_of_t(renamed).items()} == {
        path: x.shape for path, x in arrays_of_t(state).items()
    }

    def renaming(state, ids):  # the same batches, by the new names; the other table has its old ones

        def renamed_loss(p, ids):
            read = jnp.sum(p["t"][jnp.asarray(place)[ids]] * (1 + jnp.arange(4.0))[:, None], 0) @ p["w"]
            return read + jnp.sum(p["other"][ids % V] * (0.5 + ids % 3)[:, None])

        return js.make_train_step(renamed_loss, jit=False)(state, ids)[0]

    want, got = js.flush(run(state, STEPS, 2 * STEPS)), js.flush(steps_of(renaming)(renamed, STEPS, 2 * STEPS))
    mine, others = arrays_of_t(got), arrays_of_t(want)
    assert len(mine) > 1
    for path, x in mine.items():
        np.testing.assert_allclose(x, others[path][order], rtol=2e-6, atol=1e-7, err_msg=path)
    close(got.params["other"], want.params["other"])


@pytest.mark.parametrize("name", slow_but(["replay sgd"], ["replay sgd", "replay adamw"]))
def test_rows_are_taken_dropped_repeated_and_new(name):
    tx, run = CASES[name]
    state = run(start(tx, V), 0, STEPS)
    new_ids = np.array([7, -1, 0, 0, 11, -1])
    got, before = js.remap(state, "['t']", new_ids, init=ROWS[:2]), arrays_of_t(state)
    for path, x in arrays_of_t(got).items():
        np.testing.assert_array_equal(x[new_ids >= 0], before[path][new_ids[new_ids >= 0]], err_msg=path)
    np.testing.assert_array_equal(got.params["t"][jnp.array([1, 5])], ROWS[:2])
    (replaying,) = replay_states(got.opt_state)
    stamps = (replaying.plain | replaying.decayed)["t"].rows
    assert stamps[jnp.array([1, 5])].tolist() == [STEPS, STEPS] and stamps.min() < STEPS
    for leaf, old in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):  # the same array, or one of rows
        assert leaf is old or leaf.shape[0] == 6


def test_chunks(monkeypatch):
    """More rows than are in hand at a time, as many as no chunk divides."""
    monkeypatch.setattr("jaxsparse.train.resize._CHUNK", 5 * D)
    tx = optax.adam(0.1)
    state = (
        ROWS[:17],
        jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), tx.init(ROWS[:17])),
    )
    order = np.random.default_rng(0).permutation(17)
    mu = np.asarray(state[1][0].mu)
    np.testing.assert_array_equal(js.remap(state, "", order, tx=tx)[1][0].mu, mu[order])
    np.testing.assert_array_equal(js.shrink(state, "", 13, tx=tx)[1][0].mu, mu[:13])
    table, opt_state = js.grow(state, "", 23, init=ROWS[0], tx=tx)
    np.testing.assert_array_equal(opt_state[0].mu, np.concatenate([mu, np.zeros((6, D))]))
    np.testing.assert_array_equal(table, np.concatenate([ROWS[:17]] + [ROWS[:1]] * 6))


# ---------------------------------------------------------------------------------------------------------------------
# what holds a copy of the table


class Averaged(TrainState):
    ema: Any = struct.field(default=None)
    stats: Any = struct.field(default=None)


def averaging(state, ids):
    state = stock(state, ids)
    return state.replace(ema=optax.incremental_update(state.params, state.ema, 0.1))


def test_averages_of_parameters():
    run, tx = steps_of(averaging), CASES["adam"][0]

    def begin(num_rows):
        state = start(tx, num_rows)
        more = {"ema": jax.tree.map(jnp.array, state.params), "stats": jnp.zeros((V, D))}
        return Averaged(**{f.name: getattr(state, f.name) for f in dataclasses.fields(state)}, **more)

    state = run(begin(V), 0, STEPS)
    got = js.grow(state, "['t']", MORE, init=ROWS[V:], copies="ema")
    chex.assert_trees_all_equal(js.shrink(got, "['t']", V), state)
    close(run(got, STEPS, 2 * STEPS), run(begin(MORE), 0, 2 * STEPS))
    with pytest.raises(ValueError, match=r"'copies'.*'\.ema'.*Got None, without \['\.ema'\].*sums of gradients"):
        js.grow(state, "['t']", MORE, init=0)
    with pytest.raises(ValueError, match=r"'copies'.*parts of the paths \['\.ema'\]. Got 'average'"):
        js.grow(state, "['t']", MORE, init=0, copies="average")


def test_lookahead_has_its_parameters_twice():
    tx = optax.lookahead(optax.adam(0.1), 3, 0.5)

    @jax.jit
    def step(state, ids):
        p, opt_state = state["params"], state["opt_state"]
        updates, opt_state = tx.update(jax.grad(loss_fn)(p.fast, ids), opt_state, p)
        return state | {"params": optax.apply_updates(p, updates), "opt_state": opt_state}

    def begin(num_rows):
        p = optax.LookaheadParams.init_synced(params(num_rows))
        return {"params": p, "opt_state": tx.init(p), "key": jax.random.key(0)}

    def run(state, batches):
        for ids in batches:
            state = step(state, ids)
        return state

    names = ["fast['t']", "slow['t']"]
    got = js.grow(run(begin(V), IDS[:4]), names, MORE, init=ROWS[V:], tx=tx)
    want = run(begin(MORE), IDS[:4])
    close(got["params"], want["params"])
    close(run(got, IDS[5:9])["params"], run(want, IDS[5:9])["params"])


def test_nnx():
    """The arrays of a module and its optimizer go into larger ones."""
    model = lambda num_rows: nnx.Embed(num_rows, D, rngs=nnx.Rngs(0))  # noqa: E731
    tx, small, large = optax.adam(0.1), model(V), model(MORE)
    optimizers = [nnx.Optimizer(m, tx, wrt=nnx.Param) for m in (small, large)]
    grads = jax.grad(lambda p: jnp.sum(p["embedding"].get_value()[:3] ** 2))(nnx.state(small, nnx.Param))
    optimizers[0].update(small, grads)
    pair = nnx.state(small, nnx.Param), nnx.state(optimizers[0]).opt_state
    p, opt_state = js.grow(pair, "embedding", MORE, init=0.0, tx=tx)
    nnx.update(large, p)
    nnx.update(optimizers[1], {"opt_state": opt_state})
    np.testing.assert_array_equal(large.embedding[:V], small.embedding[...])
    assert not np.any(large.embedding[V:])
    mu = jax.tree.leaves(nnx.state(optimizers[1]).opt_state)
    assert {x.shape for x in mu} == {(), (MORE, D)} and any(np.any(x) for x in mu if x.ndim)


def test_a_state_of_numpy_arrays_and_of_bfloat16():
    tx = js.lazy_adam(0.1)
    state = start(tx, V).replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(V)))
    state = state.replace(opt_state=tx.init(state.params))
    want = js.grow(state, "['t']", MORE, init=jax.nn.initializers.normal(), key=jax.random.key(3))
    chex.assert_trees_all_equal(
        js.grow(
            jax.tree.map(np.asarray, state), "['t']", MORE, init=jax.nn.initializers.normal(), key=jax.random.key(3)
        ),
        want,
    )
    drawn = jax.nn.initializers.normal()(jax.random.key(3), (MORE - V, D), jnp.bfloat16)
    np.testing.assert_array_equal(want.params["t"][V:], drawn)


# ---------------------------------------------------------------------------------------------------------------------
# split over devices


def resized(state):
    state = js.grow(state, "['t']", MORE, init=ROWS[V:])
    return js.remap(state, "['t']", np.r_[np.arange(MORE - 1, -1, -1), -1, -1, -1, -1], init=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_tables_stay_split(kind):
    """And what they hold is what one device holds. On a mesh of 2 x 4, for rows that are not up to date."""
    mesh, (tx, run) = mesh_of((2, 4), ("data", "rows"), kind), CASES["replay sgd"]
    state = run(start(tx, V), 0, STEPS)
    want, got = resized(jax.tree.map(jnp.copy, state)), resized(js.shard_rows(state, mesh, "['t']", "rows"))
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, x) for x in (got, want)))
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    arrays = [x for x in jax.tree.leaves(got) if x.ndim and x.shape[0] == MORE + 4]
    assert len(arrays) == 3 and all(x.sharding.is_equivalent_to(rows, x.ndim) for x in arrays)
    with pytest.raises(ValueError, match=r"'num_rows'.*multiple of 4 rows.*js\.padded_rows\(27, 4\) = 28"):
        js.grow(got, "['t']", 27, init=0)
    with pytest.raises(ValueError, match=r"'new_ids'.*multiple of 4 rows.*Got 3 rows"):
        js.remap(got, "['t']", [0, 1, 2])
    if kind == AxisType.Auto:
        step = js.make_train_step(loss_fn)
        close(*(jax.tree.map(np.asarray, step(x, IDS[-1])[0]) for x in (got, want)))


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", slow_but([AxisType.Auto], [AxisType.Auto, AxisType.Explicit]))
def test_no_device_holds_more_than_its_part(kind, monkeypatch):
    """A few rows at a time go to all devices; no table is gathered."""
    rows, programs, jit = 200_000, [], jax.jit
    state = start(js.lazy_adam(0.1, untouched="replay"), V)
    state = state.replace(params={"t": jnp.ones((rows, D))})
    state = js.shard_rows(
        state.replace(opt_state=state.tx.init(state.params)), mesh_of((8,), ("rows",), kind), "", "rows"
    )

    def compiled(fun, **kwargs):
        def run(*args):
            programs.append(compiled_by_default(jit(fun, **kwargs).lower(*args)))
            return jit(fun, **kwargs)(*args)

        return run

    monkeypatch.setattr("jaxsparse.train.resize._CHUNK", 1000 * D)
    monkeypatch.setattr(jax, "jit", compiled)
    js.remap(state, "", np.r_[np.arange(rows - 1, -1, -1), [-1] * 8], init=1.0)
    text = programs[-1].as_text()
    assert bytes_moved(text) == {"all-reduce": 1000 * 4 * (3 * D + 1)}
    whole = [x for x in large_arrays(text, rows) if "s32[200008]" not in x]  # the ids
    assert whole == []


# ---------------------------------------------------------------------------------------------------------------------
# saving


@pytest.mark.slow  # AdamW under replay; test_checkpoints.py has one that did not grow
def test_a_checkpoint_of_a_grown_state_goes_on_bit_identically():
    tx, run = CASES["replay adamw"]
    state = js.grow(run(start(tx, V), 0, STEPS), "['t']", MORE, init=ROWS[V:])
    loaded = flax.serialization.from_bytes(start(tx, MORE), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(run(loaded, STEPS, 2 * STEPS), run(state, STEPS, 2 * STEPS))


# ---------------------------------------------------------------------------------------------------------------------
# errors

SMALL = start(js.lazy_adam(0.1), V)
PAIR, TX = (ROWS[:V], optax.adam(0.1).init(ROWS[:V])), optax.adam(0.1)


def decays_if_small(p):
    return jax.tree.map(lambda x: x.shape[0] < 15, p)


MASKED = optax.masked(optax.adam(0.1), decays_if_small)
LBFGS = optax.scale_by_lbfgs(3)
REFUSED = {
    "state": (lambda: js.grow([1], "t", 3, init=0), TypeError, "'state'.*js.grow.*TrainState or a pair.*Got list"),
    "no tx": (lambda: js.shrink(PAIR, "", 3), TypeError, r"'tx' argument of js\.shrink.*Got None.*Pass tx="),
    "other tx": (
        lambda: js.grow(PAIR, "", MORE, init=0, tx=optax.sgd(0.1)),
        ValueError,
        "'tx'.*whose state is in 'state'.*other shapes",
    ),
    "no such table": (lambda: js.grow(SMALL, "words", MORE, init=0), ValueError, r"'table'.*\['t'\].*Got 'words'"),
    "two tables": (
        lambda: js.grow(SMALL, "t", MORE, init=0),
        ValueError,
        r"'table' argument of js\.grow must be a part of one of .*Got 't', which is in .*'other'.*'t'.*a list",
    ),
    "two heights": (lambda: js.grow(SMALL, ["other", "w"], 99, init=0), ValueError, r"one height.*\[3, 12\]"),
    "scalar": (lambda: js.grow(({"s": jnp.ones(())}, ()), "s", 3, init=0, tx=optax.sgd(1)), ValueError, "'table'"),
    "fewer": (lambda: js.grow(SMALL, "['t']", 3, init=0), ValueError, "'num_rows'.*at least.*12. Got 3.*js.shrink"),
    "more": (lambda: js.shrink(SMALL, "['t']", 13), ValueError, "'num_rows'.*at most.*12. Got 13.*js.grow"),
    "none": (lambda: js.shrink(SMALL, "['t']", 0), ValueError, "'num_rows'.*at least 1"),
    "too many": (lambda: js.grow(SMALL, "['t']", 2**31, init=0), ValueError, "'num_rows'.*fewer than"),
    "shape": (
        lambda: js.grow(SMALL, "['t']", MORE, init=jnp.ones((2, D))),
        ValueError,
        r"'init'.*row of shape \(3,\), or new rows of shape \(8, 3\). Got shape \(2, 3\)",
    ),
    "no key": (lambda: js.grow(SMALL, "['t']", MORE, init=jax.nn.initializers.zeros), TypeError, r"'key'.*jax\.random"),
    "no init": (lambda: js.remap(SMALL, "['t']", [0, -1, -1]), ValueError, "'init'.*for 2 new rows"),
    "ids": (lambda: js.remap(SMALL, "['t']", [0, V]), ValueError, r"'new_ids'.*\[-1, 12\).*Got 0 to 12"),
    "below": (lambda: js.remap(SMALL, "['t']", [-2]), ValueError, "'new_ids'.*Got -2 to -2"),
    "mask": (lambda: js.remap(SMALL, "['t']", [True] * V), TypeError, r"'new_ids'.*Got bool.*np\.flatnonzero"),
    "matrix": (lambda: js.remap(SMALL, "['t']", [[0]]), ValueError, r"'new_ids'.*Got shape \(1, 1\)"),
    "mask by shape": (
        lambda: js.grow((ROWS[:V], MASKED.init(ROWS[:V])), "", MORE, init=0, tx=MASKED),
        ValueError,
        "'tx'.*by row.*another structure for 20 rows than for 12.*tx.init",
    ),
    "not by row": (
        lambda: js.grow((ROWS[:V], LBFGS.init(ROWS[:V])), "", MORE, init=0, tx=LBFGS),
        ValueError,
        r"'tx'.*by row.*shape \(\d+, 12, 3\), and of shape \(\d+, 20, 3\) for 20 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow  # refuses and takes what other states do, by the same code
def test_states_as_dictionaries():
    """js.flush and js.refresh take what js.grow takes."""
    tx, p, ids = js.lazy_sgd(1.0, momentum=0.5, untouched="replay"), jnp.zeros((3, 1)), jnp.array([[0], [1], [0]])
    state, refresh = {"params": p, "opt_state": tx.init(p), "epoch": 7}, js.refresh(lambda t, ids: jnp.sum(t[ids]))
    for i in range(2):
        state = refresh(state, ids[i])
        grads = js.RowSparse(ids[i], jnp.ones((1, 1)), (3, 1))
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        state |= {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
    assert state["params"].ravel().tolist() == [-1.0, -1.0, 0.0]
    state = refresh(state, ids[2])
    assert state["params"].ravel().tolist() == [-1.5, -1.0, 0.0]
    state = js.flush(state)
    assert state["opt_state"].plain["array"].whole == 2 and state["epoch"] == 7
