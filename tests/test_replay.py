"""skipped="replay": the rows that a step does not touch move on as under the dense optimizer.

Against dense optax here in float32, with one model that has everything; `fidelity.py` holds it against float64.
"""

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
from jaxsparse import catch_up
from jaxsparse.refresh import _flush_all
from tests.hlo import compiled_text, large_arrays

V, D, B, L = 40, 3, 4, 3
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 40, 1e-3)
MASK = {"t": True, "b": False, "w": True}
CLIP = optax.clip_by_global_norm(0.05)

PAIRS = {
    "adam": (js.lazy_adam(0.05, skipped="replay"), optax.adam(0.05)),
    "adam_schedule": (js.lazy_adam(SCHEDULE, 0.8, 0.95, 1e-3, skipped="replay"), optax.adam(SCHEDULE, 0.8, 0.95, 1e-3)),
    "adamw": (
        js.lazy_adamw(SCHEDULE, weight_decay=0.3, skipped="replay"),
        optax.adamw(SCHEDULE, weight_decay=0.3),
    ),
    "adamw_mask": (
        js.lazy_adamw(0.05, weight_decay=0.3, mask=MASK, skipped="replay"),
        optax.adamw(0.05, weight_decay=0.3, mask=MASK),
    ),
    "adamw_zero": (js.lazy_adamw(0.05, weight_decay=0.0, skipped="replay"), optax.adamw(0.05, weight_decay=0.0)),
    "momentum_zero": (js.lazy_sgd(0.1, 0.0, skipped="replay"), optax.sgd(0.1, 0.0)),
    "rmsprop_zero": (js.lazy_rmsprop(0.1, 0.0, momentum=0.0, skipped="replay"), optax.rmsprop(0.1, 0.0, momentum=0.0)),
    "clip": (js.lazy_adam(0.05, before=CLIP, skipped="replay"), optax.chain(CLIP, optax.adam(0.05))),
    "momentum": (js.lazy_sgd(SCHEDULE, 0.9, skipped="replay"), optax.sgd(SCHEDULE, 0.9)),
    "nesterov": (js.lazy_sgd(0.1, 0.9, True, skipped="replay"), optax.sgd(0.1, 0.9, True)),
    "sgd": (js.lazy_sgd(0.1, skipped="replay"), optax.sgd(0.1)),
    "rmsprop": (js.lazy_rmsprop(0.05, skipped="replay"), optax.rmsprop(0.05)),
    "rmsprop_all": (
        js.lazy_rmsprop(SCHEDULE, centered=True, momentum=0.8, nesterov=True, bias_correction=True, skipped="replay"),
        optax.rmsprop(SCHEDULE, centered=True, momentum=0.8, nesterov=True, bias_correction=True),
    ),
    "adagrad": (js.lazy_adagrad(0.1, skipped="replay"), optax.adagrad(0.1)),
    "partition": (
        optax.partition(
            {"slow": js.lazy_adam(0.01, skipped="replay"), "fast": js.lazy_sgd(0.1, 0.9, skipped="replay")},
            {"t": "slow", "b": "fast", "w": "fast"},
        ),
        optax.partition(
            {"slow": optax.adam(0.01), "fast": optax.sgd(0.1, 0.9)}, {"t": "slow", "b": "fast", "w": "fast"}
        ),
    ),
    "masked": tuple(
        optax.chain(
            optax.masked(adam, {"t": True, "b": True, "w": False}),
            optax.masked(optax.scale(-0.1), {"t": False, "b": False, "w": True}),
        )
        for adam in (js.lazy_adam(0.05, skipped="replay"), optax.adam(0.05))
    ),
    "inject": (
        optax.inject_hyperparams(js.lazy_adam, static_args=("b1", "b2", "eps", "eps_root"))(
            learning_rate=SCHEDULE, skipped="replay"
        ),
        optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    ),
    "chain": (
        optax.chain(js.lazy_adam(0.05, skipped="replay"), optax.identity()),
        optax.chain(optax.adam(0.05), optax.identity()),
    ),
}


def params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"t": make(V, D), "b": make(V), "w": make(D)}


def batch(step):
    """Rows that are skipped for any number of steps, duplicates, and rows that are never touched."""
    rng = np.random.default_rng(step)
    return jnp.asarray(np.minimum(rng.zipf(1.4, (B, L)), V - 5) - 1)


def loss_fn(p, ids):
    """Gradients that do not come near zero, where Adam would make rounding as large as the rate."""
    h = jnp.sum(p["t"][ids], axis=1)
    return jnp.mean((h @ p["w"]) * (0.5 + ids[:, 1] % 3)) + jnp.mean(p["b"][ids[:, 0]] * (ids[:, 2] % 3 - 1.0))


def start(tx, **changed):
    return TrainState.create(apply_fn=None, params=params() | changed, tx=tx)


def dense_run(tx, steps, begin=0, state=None):
    state = start(tx) if state is None else state

    @jax.jit
    def step(state, ids):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, ids))

    for i in range(begin, begin + steps):
        state = step(state, batch(i))
    return state


def close(got, want, **kwargs):
    chex.assert_trees_all_close(got, want, **({"rtol": 2e-4, "atol": 3e-6} | kwargs))


def slots(state):
    """The moments of a state, whatever it is of."""
    kinds = optax.ScaleByAdamState | optax.TraceState | optax.ScaleByRmsState | optax.ScaleByRStdDevState
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [jax.tree.leaves(part) for part in parts if isinstance(part, kinds)]


@pytest.mark.parametrize("name", PAIRS)
def test_against_dense_optax(name):
    """After flush, parameters and moments are where the dense optimizer has them."""
    tx, dense = PAIRS[name]
    got, want = js.flush(run(tx, 30)), dense_run(dense, 30)
    close(got.params, want.params)
    close(slots(got.opt_state), slots(want.opt_state))


@partial(jax.jit, donate_argnums=0)
def by_hand(state, ids):
    state = js.refresh(loss_fn)(state, ids)
    loss, grads = js.value_and_grad(loss_fn)(state.params, ids)
    return state.apply_gradients(grads=grads), loss


def test_a_step_written_by_hand():
    """It agrees with make_train_step's, losses included: what its forward pass reads is up to date."""
    tx = PAIRS["adamw_mask"][0]
    state, other, step = start(tx), start(tx), js.make_train_step(loss_fn)
    for i in range(20):
        state, metrics = step(state, batch(i))
        other, loss = by_hand(other, batch(i))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5, atol=1e-6)
    close(js.flush(other).params, js.flush(state).params)


def test_the_trace_that_dense_adam_gives():
    """DESIGN's: w = 1, lr .1, g = 1 on rows 0, 1, 0. A frozen row would be at .814153."""
    tx = js.lazy_adam(0.1, skipped="replay")
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones((2, 1))}, tx=tx)
    step = js.make_train_step(lambda p, ids: jnp.sum(p["w"][ids]))
    seen = []
    for row in (0, 1, 0):
        state, _ = step(state, jnp.array([row]))
        state = js.flush(state)
        seen.append(float(state.params["w"][0, 0]))
    np.testing.assert_allclose(seen, [0.9, 0.832993, 0.751192], atol=5e-6)  # 1 - .999 is 2e-5 off in float32


def test_every_row_decays_under_replay_and_only_touched_rows_under_freeze():
    p, ids = {"t": jnp.ones((4, 1)), "w": jnp.ones(1)}, jnp.array([2])  # 3 steps of rate .1 and decay 1
    for skipped, untouched in (("replay", 0.9**3), ("freeze", 1.0)):
        tx = js.lazy_adamw(0.1, weight_decay=1.0, skipped=skipped)
        state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, p), tx=tx)
        step = js.make_train_step(lambda p, ids: jnp.sum(p["t"][ids] @ p["w"]))
        for _ in range(3):
            state, _ = step(state, ids)
        np.testing.assert_allclose(js.flush(state).params["t"][:2], untouched, rtol=1e-6)


@pytest.mark.parametrize(
    ("betas", "gaps"),
    [
        ((0.9, 0.999), [(1, 1), (1, 2), (1, 400), (10, 3), (500, 2000), (1000, 100_000)]),
        ((0.9, 0.95), [(1, 1), (1, 2), (1, 400), (10, 3), (500, 2000)]),
        ((0.95, 0.99), [(1, 3), (2, 500), (500, 100)]),
        ((0.9, 0.98), [(1, 3), (2, 500), (500, 100)]),
        ((0.0, 0.9), [(1, 3), (500, 100)]),
        ((0.99, 0.999), [(1, 3), (2, 500)]),
    ],
)
def test_catching_up_is_the_sum_of_the_steps(betas, gaps, monkeypatch):
    """From the first, an early and a late step, over 1 to 100,000 of them, against their sum in float64."""
    monkeypatch.setattr(catch_up, "HISTORY", 1 << 17)
    rate, decay, b1, b2 = 0.01, 1e-5, *betas
    m, v = 10.0 ** np.linspace(-8, 2, 11), 10.0 ** np.linspace(-16, 4, 11)
    moments = {"mu": jnp.asarray(m[:, None], jnp.float32), "nu": jnp.asarray(v[:, None], jnp.float32)}
    rules = [catch_up.Adam(b1, b2, eps, plain=True, decayed=True) for eps in (1e-10, 1e-8, 1e-3)]
    record = jax.jit(lambda h, a, b: jax.lax.fori_loop(a, b, lambda t, h: rules[0].record(h, t, rate, decay), h))
    for last, missed in gaps:
        history = record(rules[0].init(), max(1, last - rules[0].window - 1), last + missed + 1)
        now, stamps, k = jnp.int32(last + missed), jnp.full(11, last), np.arange(1, missed + 1)
        num = rate * b1**k / (1 - b1 ** (last + k))
        den = np.sqrt(b2**k / (1 - b2 ** (last + k)))
        for rule in rules:
            move = (m[:, None] * num / (den * np.sqrt(v)[:, None] + rule.eps)).sum(1)
            got, new = rule.catch_up(history, False, stamps, now, jnp.zeros((11, 1)), moments)
            np.testing.assert_allclose(-np.float64(got[:, 0]), move, rtol=3e-6, atol=1e-37)
        np.testing.assert_allclose(new["nu"][:, 0], v * b2**missed, rtol=1e-5, atol=1e-37)
        np.testing.assert_allclose(new["mu"][:, 0], m * b1**missed, rtol=1e-5, atol=1e-37)
        zeros = jax.tree.map(jnp.zeros_like, moments)
        got, _ = rules[0].catch_up(history, True, stamps, now, jnp.ones((11, 1)), zeros)
        np.testing.assert_allclose(got, (1 - decay) ** missed, rtol=3e-7)


def test_nodes_are_as_good_as_the_docstring_says():
    exact = [(0.9, 0.999), (0.9, 0.98), (0.9, 0.95), (0.95, 0.99), (0.99, 0.999)]
    for betas, bound in [*((betas, 1e-6) for betas in exact), ((0.9, 0.91), 1.5e-4)]:
        count, last = catch_up._choose_nodes(*betas)
        assert count <= 16
        errors = [catch_up.interpolation_error(*betas, s, count, last) for s in (1, 2, 3, 10, 100, 10_000)]
        assert max(errors) < bound, (betas, errors)


def test_history_that_goes_round(monkeypatch):
    """Rows are flushed before history forgets what they missed: here every 480 steps or so."""
    monkeypatch.setattr(catch_up, "HISTORY", 512)
    settings = {"learning_rate": 0.01, "b1": 0.5, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.1}
    tx, dense = js.lazy_adamw(**settings, skipped="replay"), optax.adamw(**settings)
    steps, ids = 1300, np.full((1300, B, L), V - 6)
    for i in (0, 1, 2, *range(3, steps, 97)):
        ids[i] = batch(i)

    def scanned(step, tx):
        state = start(tx).replace(step=jnp.int32(0))
        return jax.jit(partial(jax.lax.scan, step))(state, jnp.asarray(ids))[0]

    state = scanned(js.make_train_step(loss_fn, jit=False), tx)
    assert steps - 512 < int(state.opt_state.decayed["t"].whole) < steps
    want = scanned(lambda s, ids: (s.apply_gradients(grads=jax.grad(loss_fn)(s.params, ids)), None), dense)
    close(js.flush(state).params, want.params)


def run(tx, steps, **changed):
    state, step = start(tx, **changed), js.make_train_step(loss_fn)
    for i in range(steps):
        state, _ = step(state, batch(i))
    return state


def test_flush_twice_changes_nothing():
    once = js.flush(run(PAIRS["adamw"][0], 7))
    copy = jax.tree.map(jnp.copy, once)
    chex.assert_trees_all_equal(js.flush(once), copy)
    frozen = run(js.lazy_adam(0.1), 2)
    assert js.flush(frozen) is frozen


def test_flush_takes_pairs_and_refuses_others():
    state = run(PAIRS["adam"][0], 5)
    pair = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    chex.assert_trees_all_equal(js.flush(pair)[0], js.flush(state).params)
    with pytest.raises(TypeError, match=r"'state'.*TrainState or a pair.*dict"):
        js.flush({"params": 1})


def test_stale_rows_are_refused():
    """Eagerly with an error, under jit with NaN: an update of rows that were not refreshed is never just wrong."""
    tx = js.lazy_adam(0.1, skipped="replay")
    p = params()
    opt_state = tx.init(p)
    first = js.grad(loss_fn)(p, jnp.array([[1, 2, 3]]))
    updates, opt_state = tx.update(first, opt_state, p)
    p = optax.apply_updates(p, updates)
    with pytest.raises(ValueError, match=r"stale.*js\.refresh"):
        tx.update(js.grad(loss_fn)(p, jnp.array([[5, 4, 4]])), opt_state, p)
    updates, _ = jax.jit(tx.update)(js.grad(loss_fn)(p, jnp.array([[5, 4, 4]])), opt_state, p)
    assert np.isnan(updates["t"].rows).all()
    p, opt_state = js.refresh(loss_fn)((p, opt_state), jnp.array([[5, 4, 4]]))
    updates, _ = jax.jit(tx.update)(js.grad(loss_fn)(p, jnp.array([[5, 4, 4]])), opt_state, p)
    assert np.isfinite(updates["t"].rows).all()


def test_a_table_that_another_loss_uses_as_a_whole():
    """Its rows are brought up to date before a dense gradient is taken."""

    def whole(p, ids):
        return loss_fn(p, ids) + jnp.sum(p["t"] ** 2)

    tx, dense = PAIRS["adam"]
    steps = [js.make_train_step(loss_fn), js.make_train_step(whole)]
    state, want = start(tx), start(dense)
    for i in range(12):
        state, _ = steps[i % 5 == 4](state, batch(i))
        want = want.apply_gradients(grads=jax.grad(whole if i % 5 == 4 else loss_fn)(want.params, batch(i)))
    close(js.flush(state).params, want.params)


def test_accumulated_gradients():
    """Rows stay as they were refreshed until the update that all of them wait for."""
    tx, dense = js.accumulate(js.lazy_adam(0.05, skipped="replay"), 2), optax.adam(0.05)
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        got = js.flush(run(tx, 12))
    want = start(dense)
    for i in range(0, 12, 2):
        grads = [jax.grad(loss_fn)(want.params, batch(j)) for j in (i, i + 1)]
        want = want.apply_gradients(grads=jax.tree.map(lambda a, b: (a + b) / 2, *grads))
    close(got.params, want.params)


def test_evaluation_wants_all_rows_up_to_date():
    batches = js.batches(np.asarray(batch(0)), np.zeros(B), batch_size=B)
    metric_fn = lambda p, b: {"value": loss_fn(p, b.x)}  # noqa: E731
    state = run(PAIRS["adam"][0], 5)
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


@pytest.mark.parametrize("name", ["adam", "adamw", "clip", "momentum", "partition", "rmsprop_all"])
def test_hand_over_to_plain_optax_and_back(name):
    tx, dense = PAIRS[name]
    state = js.flush(run(tx, 15))
    plain = TrainState.create(apply_fn=None, params=state.params, tx=dense)
    plain = plain.replace(opt_state=js.to_optax_state(state.opt_state), step=15)
    chex.assert_trees_all_equal_structs(plain.opt_state, dense.init(state.params))
    plain = dense_run(dense, 10, begin=15, state=plain)
    close(plain.params, dense_run(dense, 25).params)
    back = js.from_optax_state(tx, plain.opt_state, plain.params)
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, plain.params), tx=tx).replace(opt_state=back)
    step = js.make_train_step(loss_fn)
    for i in range(25, 40):
        state, _ = step(state, batch(i))
    close(js.flush(state).params, dense_run(dense, 40).params)


@pytest.mark.parametrize("how", ["orbax", "flax"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(how, tmp_path):
    """Stamps and history are in the checkpoint, and what goes on is bit-equal."""
    tx = PAIRS["adamw_mask"][0]
    step, state, want = js.make_train_step(loss_fn), run(tx, 9), run(tx, 20)
    if how == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            state = checkpointer.restore(tmp_path / "state", start(tx))
    else:
        state = flax.serialization.from_bytes(start(tx), flax.serialization.to_bytes(state))
    for i in range(9, 20):
        state, _ = step(state, batch(i))
    chex.assert_trees_all_equal(state.params, want.params)
    chex.assert_trees_all_equal(js.flush(state).params, js.flush(want).params)


@pytest.mark.parametrize("name", ["adam", "adamw_mask", "momentum", "rmsprop_all", "partition"])
def test_nothing_of_the_tables_size_is_made(name):
    """Neither by the step, flush in time included, nor by flush; and what is donated is written in place."""
    rows = 1_000_003
    big = {"t": jnp.zeros((rows, D)), "b": jnp.zeros(rows), "w": jnp.ones(D)}
    state = jax.eval_shape(lambda: TrainState.create(apply_fn=None, params=big, tx=PAIRS[name][0]))
    assert large_arrays(compiled_text(js.make_train_step(loss_fn), state, batch(0)), rows) == []
    assert large_arrays(compiled_text(by_hand, state, batch(0)), rows) == []
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.opt_state))
    compiled = _flush_all.lower(*structs).compile()
    assert large_arrays(compiled.as_text(), rows) == []
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


def test_one_trace_and_the_same_buffers():
    traces = []
    state, step = start(PAIRS["adamw"][0]), js.make_train_step(lambda p, ids: traces.append(1) or loss_fn(p, ids))
    state, _ = step(state, batch(0))
    address = state.params["t"].unsafe_buffer_pointer()
    for i in range(1, 5):
        state, _ = step(state, batch(i))
    assert state.params["t"].unsafe_buffer_pointer() == address and len(traces) == 1
    assert js.flush(state).params["t"].unsafe_buffer_pointer() == address


def test_pmap_agrees_with_one_device():
    """Rows that one device reads are brought up to date on all, so that replicas stay equal bit by bit."""
    tx, n = PAIRS["adamw"][0], 2
    one, step = start(tx), js.make_train_step(loss_fn)
    many = jax.tree.map(lambda x: jnp.stack([x] * n), start(tx))
    pstep = jax.pmap(js.make_train_step(loss_fn, axis_name="i", jit=False), axis_name="i", devices=jax.devices()[:n])
    for i in range(12):
        ids = jnp.concatenate([batch(2 * i), batch(2 * i + 1)])
        one, _ = step(one, ids)
        many, _ = pstep(many, ids.reshape(n, B, L))
    replicas = [jax.tree.map(lambda x, i=i: x[i], many) for i in range(n)]
    chex.assert_trees_all_equal(replicas[0].params, replicas[1].params)
    chex.assert_trees_all_equal(replicas[0].opt_state, replicas[1].opt_state)
    close(js.flush(replicas[0]).params, js.flush(one).params)


def test_bfloat16_tables_have_float32_moments():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = run(js.lazy_adam(0.05, skipped="replay"), 30, **jax.tree.map(jnp.copy, p))
    mu, nu = (optax.tree_utils.tree_get(state.opt_state, name)["t"] for name in ("mu", "nu"))
    assert mu.dtype == nu.dtype == jnp.float32 and state.params["t"].dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    want = dense_run(optax.adam(0.05), 30, state=start(optax.adam(0.05), **wide))
    got = js.flush(state).params["t"]
    # rounded at most once for each of the 30 steps that touched or refreshed it, by half of 2^-8 of a value below 4
    np.testing.assert_allclose(np.float32(got), want.params["t"], atol=30 * 2**-9 * 4)
    assert np.abs(np.float32(got) - want.params["t"]).mean() < 2**-6


def test_the_state_is_one_of_optax():
    tx = js.lazy_adamw(0.1, skipped="replay")
    state = tx.init(params())
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params()), state)
    assert optax.tree_utils.tree_get(state, "count") == 0
    assert optax.tree_utils.tree_get(state, "mu")["t"].shape == (V, D)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
    chex.assert_trees_all_equal_shapes(doubled, state)


def inject(**kwargs):
    return optax.inject_hyperparams(js.lazy_adam)(learning_rate=0.1, skipped="replay", **kwargs).init(params())


REFUSED = {
    "b1": (lambda: js.lazy_adam(0.1, 0.9, 0.9, skipped="replay"), ValueError, "'b1'.*b2=0.9.*die away"),
    "close": (lambda: js.lazy_adam(0.1, 0.9999, 0.99999, skipped="replay"), ValueError, "'b1'.*history"),
    "eps_root": (lambda: js.lazy_adamw(0.1, eps_root=1e-8, skipped="replay"), ValueError, "'eps_root'.*must be 0"),
    "nesterov": (lambda: js.lazy_adam(0.1, nesterov=True, skipped="replay"), ValueError, "'nesterov'"),
    "injected": (inject, TypeError, "'b1'.*Python number.*static_args"),
    "momentum": (lambda: js.lazy_sgd(0.1, 0.99999, skipped="replay"), ValueError, "'momentum'"),
    "array": (lambda: js.lazy_sgd(0.1, jnp.float32(0.9), skipped="replay"), TypeError, "'momentum'.*Python number"),
    "decay": (lambda: js.lazy_rmsprop(0.1, 1.0, skipped="replay"), ValueError, "'decay'"),
    "word": (lambda: js.lazy_adam(0.1, skipped="catch up"), ValueError, "'skipped'.*freeze.*replay"),
    "coupled": (
        lambda: js.lazy_adam(0.1, skipped="replay", before=optax.add_decayed_weights(0.1)).init(params()),
        ValueError,
        "'before'.*zeros of zeros",
    ),
    "trace": (
        lambda: js.lazy_adam(0.1, skipped="replay", before=optax.trace(0.9)).init(params()),
        ValueError,
        "'before'.*without state by row",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_refused(name):
    make, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda p, ids: jnp.sum(p["t"][jnp.argmax(p["t"][ids[0, :1]], axis=1)]), "row ids do not depend"),
        (lambda p, ids: jnp.sum(p["t"][ids] * jax.lax.stop_gradient(p["t"])[0, 0]), "only reads rows"),
    ],
)
def test_losses_that_see_rows_which_are_not_up_to_date_are_refused(loss, text):
    with pytest.raises(ValueError, match=text):
        js.make_train_step(loss)(start(PAIRS["adam"][0]), batch(0))
    _, metrics = js.make_train_step(loss)(start(js.lazy_adam(0.1)), batch(0))  # but not if rows are frozen
    assert math.isfinite(metrics["loss"])
