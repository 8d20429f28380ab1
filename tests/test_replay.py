"""untouched="replay": the rows that a step does not touch move on as under the dense optimizer.

Against dense optax here in float32, with one model that has everything; `fidelity.py` holds it against float64.
"""

import dataclasses
import math
from functools import partial

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.optim import catch_up
from jaxsparse.trace import planning
from jaxsparse.train.refresh import _flush_all
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but

V, D, B, L = 40, 3, 4, 3
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 40, 1e-3)
MASK = {"t": True, "b": False, "w": True}
CLIP = optax.clip_by_global_norm(0.05)

PAIRS = {
    "adam": (js.lazy_adam(0.05, untouched="replay"), optax.adam(0.05)),
    "adam_schedule": (
        js.lazy_adam(SCHEDULE, 0.8, 0.95, 1e-3, untouched="replay"),
        optax.adam(SCHEDULE, 0.8, 0.95, 1e-3),
    ),
    "adamw": (
        js.lazy_adamw(SCHEDULE, weight_decay=0.3, untouched="replay"),
        optax.adamw(SCHEDULE, weight_decay=0.3),
    ),
    "adamw_mask": (
        js.lazy_adamw(0.05, weight_decay=0.3, mask=MASK, untouched="replay"),
        optax.adamw(0.05, weight_decay=0.3, mask=MASK),
    ),
    "adamw_zero": (js.lazy_adamw(0.05, weight_decay=0.0, untouched="replay"), optax.adamw(0.05, weight_decay=0.0)),
    "momentum_zero": (js.lazy_sgd(0.1, 0.0, untouched="replay"), optax.sgd(0.1, 0.0)),
    "rmsprop_zero": (
        js.lazy_rmsprop(0.1, 0.0, momentum=0.0, untouched="replay"),
        optax.rmsprop(0.1, 0.0, momentum=0.0),
    ),
    "clip": (js.lazy_adam(0.05, before=CLIP, untouched="replay"), optax.chain(CLIP, optax.adam(0.05))),
    "momentum": (js.lazy_sgd(SCHEDULE, 0.9, untouched="replay"), optax.sgd(SCHEDULE, 0.9)),
    "nesterov": (js.lazy_sgd(0.1, 0.9, True, untouched="replay"), optax.sgd(0.1, 0.9, True)),
    "sgd": (js.lazy_sgd(0.1, untouched="replay"), optax.sgd(0.1)),
    "rmsprop": (js.lazy_rmsprop(0.05, untouched="replay"), optax.rmsprop(0.05)),
    "rmsprop_all": (
        js.lazy_rmsprop(SCHEDULE, centered=True, momentum=0.8, nesterov=True, bias_correction=True, untouched="replay"),
        optax.rmsprop(SCHEDULE, centered=True, momentum=0.8, nesterov=True, bias_correction=True),
    ),
    "adagrad": (js.lazy_adagrad(0.1, untouched="replay"), optax.adagrad(0.1)),
    "partition": (
        optax.partition(
            {"slow": js.lazy_adam(0.01, untouched="replay"), "fast": js.lazy_sgd(0.1, 0.9, untouched="replay")},
            {"t": "slow", "b": "fast", "w": "fast"},
        ),
        optax.partition(
            {"slow": optax.adam(0.01), "fast": optax.sgd(0.1, 0.9)}, {"t": "slow", "b": "fast", "w": "fast"}
        ),
    ),
    "masked": tuple(
        optax.chain(
            optax.masked(adam, lambda p: {k: k != "w" for k in p}),
            optax.masked(optax.scale(-0.1), lambda p: {k: k == "w" for k in p}),
        )
        for adam in (js.lazy_adam(0.05, untouched="replay"), optax.adam(0.05))
    ),
    "inject": (
        optax.inject_hyperparams(js.lazy_adam, static_args=("b1", "b2", "eps", "eps_root"))(
            learning_rate=SCHEDULE, untouched="replay"
        ),
        optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    ),
    "chain": (
        optax.chain(js.lazy_adam(0.05, untouched="replay"), optax.identity()),
        optax.chain(optax.adam(0.05), optax.identity()),
    ),
}


# What most optimizers train by default is one table, here: the other rank, or a matter of several tables, is another
# optimizer's. -m slow trains both in all of them.
TABLES = dict.fromkeys(PAIRS, "t") | dict.fromkeys(("adam_schedule", "nesterov", "sgd"), "b")
TABLES |= dict.fromkeys(("adamw_mask", "momentum", "rmsprop_all", "partition"), "tb")


# The smallest programs, which other tests run too; test_fidelity.py has AdamW.
FIRST = ("momentum",)


def with_tables(names):
    cases = [(name, TABLES[name]) for name in names] + [(name, "tb") for name in names if TABLES[name] != "tb"]
    quick = [case for case in cases[: len(names)] if case[0] in FIRST]
    return pytest.mark.parametrize(("name", "tables"), slow_but(quick, cases))


# For what does not depend on the optimizer: of those with a history, momentum has the smallest programs, AdamW the
# largest.
small_and_large = pytest.mark.parametrize("name", ["momentum", pytest.param("adamw_mask", marks=pytest.mark.slow)])


def params(tables="tb"):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    every = {"t": make(V, D), "b": make(V), "w": make(D)}
    return {name: every[name] for name in (*tables, "w")}


def batch(step):
    """Rows that are skipped for any number of steps, duplicates, and rows that are never touched."""
    rng = np.random.default_rng(step)
    return jnp.asarray(np.minimum(rng.zipf(1.4, (B, L)), V - 5) - 1)


QUICK = {"xla_backend_optimization_level": 0}  # the same HLO, compiled in two thirds of the time
IDS = np.stack([batch(step) for step in range(40)])


def loss_fn(p, ids):
    """Gradients that do not come near zero, where Adam would make rounding as large as the rate."""
    loss = jnp.float32(0)
    if "t" in p:
        h = jnp.sum(p["t"][ids], axis=1)
        loss += jnp.mean((h @ p["w"]) * (0.5 + ids[:, 1] % 3))
    if "b" in p:
        loss += jnp.mean(p["b"][ids[:, 0]] * (ids[:, 2] % 3 - 1.0))
    return loss


def start(tx, tables="tb", **changed):
    return state_of(tx, params(tables) | changed, step=0)


def state_of(tx, params, **changed):
    state = TrainState.create(apply_fn=None, params=params, tx=tx).replace(**changed)
    return state.replace(step=jnp.int32(state.step))  # as after a step: a Python number would be another program


def steps_of(step, ids=IDS):
    """run(state, begin, end) -> (state, state flushed, losses) of these steps: one program, for any number of them."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, begin, end):
        def body(i, carry):
            state, metrics = step(carry[0], jnp.asarray(ids)[i])
            return state, carry[1].at[i].set(metrics["loss"])

        state, losses = jax.lax.fori_loop(begin, end, body, (state, jnp.zeros(len(ids))))
        return state, js.flush(state), losses

    return run


def dense_step(state, ids):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, ids)
    return state.apply_gradients(grads=grads), {"loss": loss}


run, dense_run = steps_of(js.make_train_step(loss_fn, jit=False)), steps_of(dense_step)


def close(got, want, **kwargs):
    chex.assert_trees_all_close(got, want, **({"rtol": 2e-4, "atol": 3e-6} | kwargs))


def slots(state):
    """The moments of a state, whatever it is of."""
    kinds = optax.ScaleByAdamState | optax.TraceState | optax.ScaleByRmsState | optax.ScaleByRStdDevState
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [jax.tree.leaves(part) for part in parts if isinstance(part, kinds)]


@with_tables(PAIRS)
def test_against_dense_optax(name, tables):
    """After flush, parameters and moments are where the dense optimizer has them."""
    tx, dense = PAIRS[name]
    got, want = run(start(tx, tables), 0, 30)[1], dense_run(start(dense, tables), 0, 30)[0]
    close(got.params, want.params)
    close(slots(got.opt_state), slots(want.opt_state))


@partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
def by_hand(state, ids):
    state = js.refresh(loss_fn)(state, ids)
    loss, grads = js.value_and_grad(loss_fn)(state.params, ids)
    return state.apply_gradients(grads=grads), loss


@pytest.mark.slow
@small_and_large
def test_a_step_written_by_hand(name):
    """It agrees with make_train_step's, losses included: what its forward pass reads is up to date."""
    tx = PAIRS[name][0]
    _, want, losses = run(start(tx), 0, 20)
    state = start(tx)
    for i in range(20):
        state, loss = by_hand(state, IDS[i])
        np.testing.assert_allclose(losses[i], loss, rtol=1e-5, atol=1e-6)
    close(js.flush(state).params, want.params)


@pytest.mark.slow
def test_the_trace_that_dense_adam_gives():
    """DESIGN's: w = 1, lr .1, g = 1 on rows 0, 1, 0. A frozen row would be at .814153."""
    state = state_of(js.lazy_adam(0.1, untouched="replay"), {"w": jnp.ones((2, 1))})
    step, seen = js.make_train_step(lambda p, ids: jnp.sum(p["w"][ids]), jit=False), []
    step_and_flush = steps_of(step, np.array([[0], [1], [0]]))
    for i in range(3):
        state = step_and_flush(state, i, i + 1)[1]
        seen.append(float(state.params["w"][0, 0]))
    np.testing.assert_allclose(seen, [0.9, 0.832993, 0.751192], atol=5e-6)  # 1 - .999 is 2e-5 off in float32


@pytest.mark.slow
def test_every_row_decays_under_replay_and_only_touched_rows_under_freeze():
    p, ids = {"t": jnp.ones((4, 1)), "w": jnp.ones(1)}, np.array([[2]] * 3)  # 3 steps of rate .1 and decay 1
    three_steps = steps_of(js.make_train_step(lambda p, ids: jnp.sum(p["t"][ids] @ p["w"]), jit=False), ids)
    for skipped, untouched in (("replay", 0.9**3), ("freeze", 1.0)):
        tx = js.lazy_adamw(0.1, weight_decay=1.0, untouched=skipped)
        state, flushed, _ = three_steps(state_of(tx, p), 0, 3)
        np.testing.assert_allclose(flushed.params["t"][:2], untouched, rtol=1e-6, err_msg=skipped)
    assert js.flush(state) is state  # frozen


@pytest.mark.parametrize(
    ("betas", "gaps"),
    [
        ((0.9, 0.999), [(1, 1), (1, 2), (1, 400), (10, 3), (500, 2000)]),
        ((0.0, 0.9), [(1, 3), (500, 100)]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((0.9, 0.95), [(1, 1), (1, 2), (1, 400), (10, 3), (500, 2000)]),
                ((0.95, 0.99), [(1, 3), (2, 500), (500, 100)]),
                ((0.9, 0.98), [(1, 3), (2, 500), (500, 100)]),
                ((0.99, 0.999), [(1, 3), (2, 500)]),
                ((0.9, 0.999), [(1000, 100_000)]),
            ]
        ),
    ],
)
def test_catching_up_is_the_sum_of_the_steps(betas, gaps, monkeypatch):
    """From the first, an early and a late step, over 1 to 100,000 of them, against their sum in float64."""
    monkeypatch.setattr(catch_up, "HISTORY", 1 << 17)
    rate, decay, b1, b2 = 0.01, 1e-5, *betas
    m, v = 10.0 ** np.linspace(-8, 2, 11), 10.0 ** np.linspace(-16, 4, 11)
    moments = {"mu": jnp.asarray(m[:, None], jnp.float32), "nu": jnp.asarray(v[:, None], jnp.float32)}
    rule, every_eps = catch_up.Adam(b1, b2, 1e-10, plain=True, decayed=True), (1e-10, 1e-8, 1e-3)

    @jax.jit
    def catch_up_from(last, missed):
        """(moves and moments for each eps, what decay alone makes of ones)."""
        now, stamps, zeros = last + missed, jnp.full(11, last), jnp.zeros((11, 1))
        record = lambda step, history: rule.record(history, step, rate, decay)  # noqa: E731
        history = jax.lax.fori_loop(jnp.maximum(1, last - rule.window - 1), now + 1, record, rule.init())
        of = lambda eps: dataclasses.replace(rule, eps=eps).catch_up(history, False, stamps, now, zeros, moments)  # noqa: E731
        ones, _ = rule.catch_up(history, True, stamps, now, zeros + 1, {"mu": zeros, "nu": zeros})
        return jax.vmap(of)(jnp.float32(every_eps)), ones

    for last, missed in gaps:
        (moves, new), ones = catch_up_from(last, missed)
        k = np.arange(1, missed + 1)
        num = rate * b1**k / (1 - b1 ** (last + k))
        den = np.sqrt(b2**k / (1 - b2 ** (last + k)))
        for i, eps in enumerate(every_eps):
            check = partial(np.testing.assert_allclose, err_msg=f"{last=} {missed=} {eps=}")
            move = (m[:, None] * num / (den * np.sqrt(v)[:, None] + eps)).sum(1)
            check(-np.float64(moves[i, :, 0]), move, rtol=3e-6, atol=1e-37)
            check(new["nu"][i, :, 0], v * b2**missed, rtol=1e-5, atol=1e-37)
            check(new["mu"][i, :, 0], m * b1**missed, rtol=1e-5, atol=1e-37)
        np.testing.assert_allclose(ones, (1 - decay) ** missed, rtol=3e-7, err_msg=f"{last=} {missed=}")


def test_nodes_are_as_good_as_the_docstring_says():
    exact = [(0.9, 0.999), (0.9, 0.98), (0.9, 0.95), (0.95, 0.99), (0.99, 0.999)]
    for betas, bound in [*((betas, 1e-6) for betas in exact), ((0.9, 0.91), 1.5e-4)]:
        count, last = catch_up._choose_nodes(*betas)
        assert count <= 16
        errors = [catch_up.interpolation_error(*betas, s, count, last) for s in (1, 2, 3, 10, 100, 10_000)]
        assert max(errors) < bound, (betas, errors)


@pytest.mark.slow  # test_fidelity.py has a case whose history does
def test_history_that_goes_round(monkeypatch):
    """Rows are flushed before history forgets what they missed: here every 480 steps or so."""
    monkeypatch.setattr(catch_up, "HISTORY", 512)
    settings = {"learning_rate": 0.01, "b1": 0.5, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.1}
    tx, dense = js.lazy_adamw(**settings, untouched="replay"), optax.adamw(**settings)
    steps, ids = 1300, np.full((1300, B, L), V - 6)
    for i in (0, 1, 2, *range(3, steps, 97)):
        ids[i] = batch(i)
    state, got, _ = steps_of(js.make_train_step(loss_fn, jit=False), ids)(start(tx), 0, steps)
    assert steps - 512 < int(state.opt_state.decayed["t"].whole) < steps
    close(got.params, steps_of(dense_step, ids)(start(dense), 0, steps)[0].params)


@small_and_large
def test_flush_twice_changes_nothing(name):
    once = js.flush(run(start(PAIRS[name][0]), 0, 7)[0])
    copy = jax.tree.map(jnp.copy, once)
    chex.assert_trees_all_equal(js.flush(once), copy)


@small_and_large
def test_flush_takes_pairs_and_refuses_others(name):
    state = run(start(PAIRS[name][0]), 0, 5)[0]
    pair = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    chex.assert_trees_all_equal(js.flush(pair)[0], js.flush(state).params)
    with pytest.raises(TypeError, match=r"'state'.*TrainState or a pair.*dict"):
        js.flush({"params": 1})


@small_and_large
def test_stale_rows_are_refused(name):
    """Eagerly with an error, under jit with NaN: an update of rows that were not refreshed is never just wrong."""
    tx, p = PAIRS[name][0], params()
    quick = partial(jax.jit, compiler_options=QUICK)
    grad, refresh, opt_state = quick(js.grad(loss_fn)), quick(js.refresh(loss_fn)), tx.init(p)

    @quick
    def update(p, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, p)
        return updates, optax.apply_updates(p, updates), opt_state

    _, p, opt_state = update(p, opt_state, grad(p, jnp.array([[1, 2, 3]])))
    stale = jnp.array([[5, 4, 4]])
    with pytest.raises(ValueError, match=r"stale.*js\.refresh"):
        tx.update(grad(p, stale), opt_state, p)
    late = update(p, opt_state, grad(p, stale))[0]["t"]
    assert np.isnan(late.rows[late.ids < V]).all()
    p, opt_state = refresh((p, opt_state), stale)
    assert np.isfinite(update(p, opt_state, grad(p, stale))[0]["t"].rows).all()


@pytest.mark.slow
@small_and_large
def test_a_table_that_another_loss_uses_as_a_whole(name, monkeypatch):
    """Its rows are brought up to date before a dense gradient is taken."""
    monkeypatch.setattr(planning, "_ANNOUNCED", set())

    def whole(p, ids):
        return loss_fn(p, ids) + jnp.sum(p["t"] ** 2)

    def dense_whole(state, ids):
        loss, grads = jax.value_and_grad(whole)(state.params, ids)
        return state.apply_gradients(grads=grads), {"loss": loss}

    def turns(state, by_rows, by_tables):
        for begin in (0, 5):
            state, *_ = by_rows(state, begin, begin + 4)
            state, *_ = by_tables(state, begin + 4, begin + 5)
        return by_rows(state, 10, 12)[1]

    tx, dense = PAIRS[name]
    with pytest.warns(UserWarning, match=r"\['t'\] is dense, with its slots: its gradient is not zero in rows"):
        got = turns(start(tx), run, steps_of(js.make_train_step(whole, jit=False)))
    close(got.params, turns(start(dense), dense_run, steps_of(dense_whole)).params)


@pytest.mark.slow  # test_rowwise.py has them without replay
@small_and_large
def test_accumulated_gradients(name):
    """Rows stay as they were refreshed until the update that all of them wait for."""

    pairs = IDS.reshape(-1, 2, B, L)

    def two_parts(state, ids):
        def add(total, ids):
            return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(state.params, ids)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), ids)
        return state.apply_gradients(grads=jax.tree.map(lambda g: g / 2, total)), {"loss": jnp.float32(0)}

    def dense_two_parts(state, ids):
        loss, grads = jax.value_and_grad(lambda p: (loss_fn(p, ids[0]) + loss_fn(p, ids[1])) / 2)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    tx, dense = PAIRS[name]
    want = steps_of(dense_two_parts, pairs)(start(dense), 0, 6)[0]
    close(steps_of(js.rowwise(two_parts), pairs)(start(tx), 0, 6)[1].params, want.params)


@small_and_large
def test_evaluation_wants_all_rows_up_to_date(name):
    batches = js.batches(np.asarray(batch(0)), np.zeros(B), batch_size=B)
    metric_fn = lambda p, b: {"value": loss_fn(p, b.x)}  # noqa: E731
    state = run(start(PAIRS[name][0]), 0, 5)[0]
    for refuses in (
        lambda: js.evaluate(metric_fn, state, batches),
        lambda: js.predict(lambda p, ids: jnp.sum(p["t"][ids], 1), state, batches),
        lambda: js.to_optax_state(state.opt_state),
    ):
        with pytest.raises(ValueError, match=r"'state'.*up to date.*step 0 of 5.*js\.flush"):
            refuses()
    step = js.make_train_step(lambda p, b: loss_fn(p, b.x))
    state, history = js.fit(step, state, batches, epochs=1, validation=batches, metrics=metric_fn, progress=False)
    assert js.evaluate(metric_fn, state, batches)["value"] == history[0]["value"]  # fit flushed it


@with_tables(["adam", "adamw", "clip", "momentum", "partition", "rmsprop_all"])
def test_hand_over_to_plain_optax_and_back(name, tables):
    tx, dense = PAIRS[name]
    state = run(start(tx, tables), 0, 15)[1]
    plain = state_of(dense, state.params, opt_state=js.to_optax_state(state.opt_state), step=15)
    chex.assert_trees_all_equal_structs(plain.opt_state, dense.init(state.params))
    plain, want = dense_run(plain, 15, 25)[0], start(dense, tables)
    close(plain.params, dense_run(want, 0, 25)[0].params)
    back = js.from_optax_state(tx, plain.opt_state, plain.params)
    state = state_of(tx, plain.params, opt_state=back)
    close(run(state, 25, 40)[1].params, dense_run(want, 0, 40)[0].params)


def test_hand_over_where_skipped_rows_freeze():
    """Nothing is put off, so the states are plain optax's."""
    params, tx = {"t": jnp.ones((3, 2))}, js.lazy_adam(0.1)
    state = tx.init(params)
    assert jax.tree.structure(js.to_optax_state(state)) == jax.tree.structure(optax.adam(0.1).init(params))
    plain = jax.tree.map(lambda x: x + 1, js.to_optax_state(state))
    chex.assert_trees_all_equal(js.from_optax_state(tx, plain, params), plain)


@pytest.mark.slow  # as test_checkpoints.py for all optimizers
@pytest.mark.parametrize("how", ["orbax", "flax"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(how, tmp_path):
    """Stamps and history are in the checkpoint, and what goes on is bit-equal."""
    tx = PAIRS["adamw_mask"][0]
    state, want = run(start(tx), 0, 9)[0], run(start(tx), 0, 20)[:2]
    if how == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            state = checkpointer.restore(tmp_path / "state", start(tx))
    else:
        state = flax.serialization.from_bytes(start(tx), flax.serialization.to_bytes(state))
    got = run(jax.tree.map(np.asarray, state), 9, 20)[:2]  # Orbax ties arrays to a device, which is another program
    chex.assert_trees_all_equal([state.params for state in got], [state.params for state in want])


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["sgd"], "sgd momentum adam adamw_mask rmsprop_all partition".split()))
def test_nothing_of_the_tables_size_is_made(name):
    """Neither by the step, flush in time included, nor by flush; and what is donated is written in place."""
    rows = 1_000_003
    big = {"t": jnp.zeros((rows, D)), "b": jnp.zeros(rows), "w": jnp.ones(D)}
    state = jax.eval_shape(lambda: TrainState.create(apply_fn=None, params=big, tx=PAIRS[name][0]))
    structs = lambda *args: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)  # noqa: E731
    compiled = {
        "step": compiled_by_default(js.make_train_step(loss_fn).lower(*structs(state, batch(0)))),
        "by_hand": compiled_by_default(by_hand.lower(*structs(state, batch(0)))),
        "flush": compiled_by_default(_flush_all.lower(*structs(state.params, state.opt_state))),
    }
    for what, program in compiled.items():
        assert large_arrays(program.as_text(), rows) == [], what
    assert compiled["flush"].memory_analysis().temp_size_in_bytes < 64e6


@pytest.mark.slow
@small_and_large
def test_one_trace_and_the_same_buffers(name):
    traces = []
    state, step = start(PAIRS[name][0]), js.make_train_step(lambda p, ids: traces.append(1) or loss_fn(p, ids))
    state, _ = step(state, batch(0))
    address = state.params["t"].unsafe_buffer_pointer()
    for i in range(1, 5):
        state, _ = step(state, batch(i))
    assert state.params["t"].unsafe_buffer_pointer() == address and len(traces) == 1
    assert js.flush(state).params["t"].unsafe_buffer_pointer() == address


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "adamw_mask"])
def test_pmap_agrees_with_one_device(name):
    """Rows that one device reads are brought up to date on all, so that replicas stay equal bit by bit."""
    (tx, dense), n, ids = PAIRS[name], 2, IDS[:24].reshape(2, 12, B, L)
    step = js.make_train_step(loss_fn, axis_name="i", jit=False)
    pmapped = jax.pmap(partial(jax.lax.scan, step), axis_name="i", devices=jax.devices()[:n])
    many, _ = pmapped(jax.tree.map(lambda x: jnp.stack([x] * n), start(tx)), ids)
    replicas = [jax.tree.map(lambda x, i=i: x[i], many) for i in range(n)]
    chex.assert_trees_all_equal(replicas[0].params, replicas[1].params)
    chex.assert_trees_all_equal(replicas[0].opt_state, replicas[1].opt_state)
    one = steps_of(dense_step, np.concatenate(ids, axis=1))(start(dense), 0, 12)[0]
    close(js.flush(replicas[0]).params, one.params)


@pytest.mark.slow  # test_fidelity.py has one of bfloat16
def test_bfloat16_tables_have_float32_moments():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params("t"))
    state, flushed, _ = run(start(js.lazy_adam(0.05, untouched="replay"), "t", **p), 0, 30)
    mu, nu = (optax.tree_utils.tree_get(state.opt_state, name)["t"] for name in ("mu", "nu"))
    assert mu.dtype == nu.dtype == jnp.float32 and state.params["t"].dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    want = dense_run(start(PAIRS["adam"][1], "t", **wide), 0, 30)[0]
    got = flushed.params["t"]
    # rounded at most once for each of the 30 steps that touched or refreshed it, by half of 2^-8 of a value below 4
    np.testing.assert_allclose(np.float32(got), want.params["t"], atol=30 * 2**-9 * 4)
    assert np.abs(np.float32(got) - want.params["t"]).mean() < 2**-6


def test_the_state_is_one_of_optax():
    tx = js.lazy_adamw(0.1, untouched="replay")
    state = tx.init(params())
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params()), state)
    assert optax.tree_utils.tree_get(state, "count") == 0
    assert optax.tree_utils.tree_get(state, "mu")["t"].shape == (V, D)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
    chex.assert_trees_all_equal_shapes(doubled, state)


def test_parameters_whose_joined_names_are_the_same():
    p = {"a.b": jnp.ones((2, 1)), "a": {"b": jnp.zeros(3)}}
    stamps = js.lazy_sgd(0.1, 0.9, untouched="replay").init(p).plain
    assert {name: s.rows.shape for name, s in stamps.items()} == {"['a']['b']": (3,), "['a.b']": (2,)}


def inject(**kwargs):
    return optax.inject_hyperparams(js.lazy_adam)(learning_rate=0.1, untouched="replay", **kwargs).init(params())


REFUSED = {
    "b1": (lambda: js.lazy_adam(0.1, 0.9, 0.9, untouched="replay"), ValueError, "'b1'.*b2=0.9.*die away"),
    "close": (lambda: js.lazy_adam(0.1, 0.9999, 0.99999, untouched="replay"), ValueError, "'b1'.*history"),
    "eps_root": (lambda: js.lazy_adamw(0.1, eps_root=1e-8, untouched="replay"), ValueError, "'eps_root'.*must be 0"),
    "nesterov": (lambda: js.lazy_adam(0.1, nesterov=True, untouched="replay"), ValueError, "'nesterov'"),
    "injected": (inject, TypeError, "'b1'.*Python number.*static_args"),
    "momentum": (lambda: js.lazy_sgd(0.1, 0.99999, untouched="replay"), ValueError, "'momentum'"),
    "array": (lambda: js.lazy_sgd(0.1, jnp.float32(0.9), untouched="replay"), TypeError, "'momentum'.*Python number"),
    "decay": (lambda: js.lazy_rmsprop(0.1, 1.0, untouched="replay"), ValueError, "'decay'"),
    "word": (lambda: js.lazy_adam(0.1, untouched="catch up"), ValueError, "'untouched'.*freeze.*replay"),
    "coupled": (
        lambda: js.lazy_adam(0.1, untouched="replay", before=optax.add_decayed_weights(0.1)).init(params()),
        ValueError,
        r"'before' argument of js\.lazy_adam must be.*zeros of zeros.*at \['b'\].*weight_decay=",
    ),
    "trace": (
        lambda: js.lazy_adam(0.1, untouched="replay", before=optax.trace(0.9)).init(params()),
        ValueError,
        "'before'.*without state by row",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_refused(name):
    make, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        make()


def test_ids_made_of_rows_that_are_not_up_to_date_are_refused():
    loss = lambda p, ids: jnp.sum(p["t"][jnp.argmax(p["t"][ids[0, :1]], axis=1)])  # noqa: E731
    with pytest.raises(ValueError, match=r"row ids made of rows of \.params\['t'\].*untouched='freeze'"):
        js.make_train_step(loss)(start(PAIRS["adam"][0], "t"), batch(0))
    _, metrics = js.make_train_step(loss)(start(js.lazy_adam(0.1), "t"), batch(0))  # but not if rows are frozen
    assert math.isfinite(metrics["loss"])


def test_a_loss_that_sees_a_whole_table_sees_it_up_to_date():
    """Behind stop_gradient, in a metric or as the table itself: rows that the batch does not read have moved too."""

    def whole(p, ids):
        return loss_fn(p, ids), {"sum": jnp.sum(p["t"] ** 2), "table": p["t"]}

    def dense_whole(state, ids):
        (loss, aux), grads = jax.value_and_grad(whole, has_aux=True)(state.params, ids)
        return state.apply_gradients(grads=grads), {"loss": loss, "aux": aux}

    tx, dense = PAIRS["momentum"]
    step, got, want = js.make_train_step(whole, has_aux=True), start(tx, "t"), start(dense, "t")
    with pytest.warns(UserWarning, match="over all rows of a table|a copy of a whole table"):
        for i in range(4):
            got, metrics = step(got, IDS[i])
            want, wanted = jax.jit(dense_whole)(want, IDS[i])
            close(metrics["aux"], wanted["aux"])


@pytest.mark.slow
def test_a_state_in_any_order_and_one_without_its_parameters():
    """The parameters are those that stand beside the optimizer's state."""
    tx, step = PAIRS["momentum"][0], js.make_train_step(loss_fn)

    def by_hand(opt_state, params, ids):
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, ids), opt_state, params)
        return opt_state, optax.apply_updates(params, updates)

    run, want, p = js.jit(by_hand, donate_argnums=(0, 1)), start(tx, "t"), params("t")
    opt_state = tx.init(p)
    for i in range(3):
        want, _ = step(want, IDS[i])
        opt_state, p = run(opt_state, p, IDS[i])
    close(p, want.params, rtol=1e-6, atol=1e-7)

    def of_others(opt_state, ids):
        p = params("t")
        return tx.update(jax.grad(loss_fn)(p, ids), opt_state, p)[1]

    with pytest.raises(ValueError, match=r"parameters beside their optimizer's state.*\['t', 'w'\]"):
        js.jit(of_others)(tx.init(params("t")), IDS[0])


def test_a_batch_without_ids_brings_no_row_up_to_date():
    """Its gradient is a zero that has no rows: a dense one would mean that all rows are up to date."""
    tx = js.lazy_sgd(0.1, 0.9, untouched="replay")
    state = TrainState.create(apply_fn=None, params={"t": jnp.ones((6, 2))}, tx=tx)
    state, _ = js.make_train_step(lambda p, ids: jnp.sum(p["t"][ids]))(state, jnp.zeros(0, jnp.int32))
    assert int(state.opt_state.steps) == 1
    assert [int(x.max()) for x in state.opt_state.plain["t"]] == [0, 0]


@pytest.mark.slow
def test_a_batch_without_ids_is_a_step_that_all_rows_miss():
    loss = lambda p, ids: jnp.sum(jnp.sin(p["t"][ids]))  # noqa: E731
    tx, dense = js.lazy_sgd(0.1, 0.9, untouched="replay"), optax.sgd(0.1, 0.9)
    params = {"t": jnp.linspace(0.0, 1.0, 12).reshape(6, 2)}
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, params), tx=tx)
    slots, step = dense.init(params), js.make_train_step(loss)
    for ids in (jnp.array(ids, jnp.int32) for ids in ([1, 2], [], [1, 3], [])):
        state, _ = step(state, ids)
        updates, slots = dense.update(jax.grad(loss)(params, ids), slots, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(js.flush(state).params["t"], params["t"], rtol=1e-6)
