"""lazy(inner) against dense optax on the densified gradient, untouched rows and slots put back after every step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.rows import is_row_sparse

V, D = 12, 3
SCHEDULE = optax.cosine_decay_schedule(0.05, 20)
MASK = {"t": True, "u": False, "w": True}

INNERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "nesterov": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adam_schedule": lambda: optax.adam(SCHEDULE),
    "adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
    "adamw_mask": lambda: optax.adamw(0.05, weight_decay=0.1, mask=MASK),
    "amsgrad": lambda: optax.amsgrad(0.05),
    "nadam": lambda: optax.nadam(0.05),
    "nadamw": lambda: optax.nadamw(0.05),
    "adamax": lambda: optax.adamax(0.05),
    "adabelief": lambda: optax.adabelief(0.05),
    "adagrad": lambda: optax.adagrad(0.1),
    "rmsprop": lambda: optax.rmsprop(0.05),
    "rmsprop_centered": lambda: optax.rmsprop(0.05, centered=True, momentum=0.9),
    "lion": lambda: optax.lion(0.05),
    "yogi": lambda: optax.yogi(0.05),
    "radam": lambda: optax.radam(0.05),
    "adadelta": lambda: optax.adadelta(0.5),
    "sign_sgd": lambda: optax.sign_sgd(0.05),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.05),
    "clip": lambda: optax.chain(optax.clip(0.3), optax.adam(0.05)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.05)),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "inject": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    "ema": lambda: optax.chain(optax.adam(0.05), optax.ema(0.9)),
    "adan": lambda: optax.adan(0.05),
    "rprop": lambda: optax.rprop(0.05),
    "novograd": lambda: optax.novograd(0.05),
}


def params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"t": make(V, D), "u": make(V), "w": make(D, V)}  # w is dense, and one of its sides is V


def gradient(step, k=9):
    """Two tables and a dense leaf; ids repeat, some are padding; at step 2 the gradient of t names no row."""
    rng = np.random.default_rng(step)
    ids = rng.choice([0, 1, 4, 4, 7, V], k) if step != 2 else np.full(k, V)
    rows = rng.normal(size=(k, D)).astype(np.float32)
    one = js.RowSparse(jnp.asarray(ids), jnp.asarray(rows), (V, D))
    two = js.RowSparse(
        jnp.asarray(rng.integers(0, 5, V)), jnp.asarray(rng.normal(size=V), jnp.float32), (V,)
    )  # k = num_rows
    return {"t": one, "u": two, "w": jnp.asarray(rng.normal(size=(D, V)), jnp.float32)}


def densify(grads):
    return jax.tree.map(lambda g: g.todense() if is_row_sparse(g) else g, grads, is_leaf=is_row_sparse)


def touched_rows(grads):
    """For each leaf, which rows the gradient names: by id, not by being non-zero. None for dense leaves."""

    def rows(g):
        if not is_row_sparse(g):
            return np.ones(1, bool)
        out = np.zeros(g.num_rows, bool)
        ids = np.asarray(g.ids)
        out[ids[ids < g.num_rows]] = True
        return out

    return jax.tree.map(rows, grads, is_leaf=is_row_sparse)


def put_back(new, old, touched):
    return jnp.where(np.reshape(touched, touched.shape + (1,) * (new.ndim - 1)), new, old)


def oracle_step(inner, grads, state, values):
    """Dense optax, then everything that belongs to an untouched row put back, slots told by optax's own
    tree_map_params."""
    updates, new_state = inner.update(densify(grads), state, values)
    new = optax.apply_updates(values, updates)
    touched = touched_rows(grads)
    marks = optax.tree_utils.tree_map_params(
        inner, lambda _, mark: mark, new_state, touched, transform_non_params=lambda _: np.ones(1, bool)
    )
    kept = jax.tree.map(lambda n, o, m: put_back(n, o, m) if jnp.ndim(n) else n, new_state, state, marks)
    return jax.tree.map(put_back, new, values, touched), kept, touched


@pytest.mark.parametrize("name", INNERS)
def test_against_dense_optax(name):
    inner = INNERS[name]()
    tx = js.lazy(inner)
    values = params()
    state, want, want_state = tx.init(values), values, inner.init(values)
    traces = []

    @jax.jit
    def update(*args):
        traces.append(1)
        return tx.update(*args)

    for step in range(5):
        grads = gradient(step)
        before = values
        updates, state = update(grads, state, values)
        assert is_row_sparse(updates["t"]) and is_row_sparse(updates["u"]) and not is_row_sparse(updates["w"])
        values = optax.apply_updates(values, updates)
        want, want_state, touched = oracle_step(inner, grads, want_state, want)
        chex.assert_trees_all_close(values, want, rtol=2e-5, atol=2e-6)
        chex.assert_trees_all_close(state.wrapped, want_state, rtol=2e-5, atol=2e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(state.wrapped, want_state)
        for leaf in ("t", "u"):
            np.testing.assert_array_equal(values[leaf][~touched[leaf]], before[leaf][~touched[leaf]])  # bit-equal
    assert not np.allclose(values["t"], params()["t"]) and len(traces) == 1


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop_centered"])
def test_inside_scan_and_cond(name):
    tx = js.lazy(INNERS[name]())
    values, state = params(), tx.init(params())
    grads = [gradient(i) for i in range(3)]
    want, want_state = values, state
    for g in grads:
        updates, want_state = tx.update(g, want_state, want)
        want = optax.apply_updates(want, updates)

    def body(carry, g):
        def apply(carry):
            updates, state = tx.update(g, carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.cond(carry[0]["w"][0, 0] < 1e9, apply, lambda c: c, carry), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    (values, state), _ = jax.jit(lambda c, g: jax.lax.scan(body, c, g))((values, state), stacked)
    chex.assert_trees_all_close(values, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.wrapped, want_state.wrapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", INNERS)
def test_all_rows_touched_is_dense_optax(name):
    inner = INNERS[name]()
    tx = js.lazy(inner)
    values = {"t": params()["t"], "u": params()["u"], "w": params()["w"]}
    state, want, want_state = tx.init(values), values, inner.init(values)
    for step in range(4):
        rng = np.random.default_rng(step)
        ids = np.concatenate([rng.permutation(V), rng.integers(0, V, 3), [V, -1]])
        grads = gradient(step)
        grads["t"] = js.RowSparse(jnp.asarray(ids), jnp.asarray(rng.normal(size=(len(ids), D)), jnp.float32), (V, D))
        grads["u"] = js.RowSparse(jnp.asarray(ids), jnp.asarray(rng.normal(size=len(ids)), jnp.float32), (V,))
        updates, state = tx.update(grads, state, values)
        values = optax.apply_updates(values, updates)
        updates, want_state = inner.update(densify(grads), want_state, want)
        want = optax.apply_updates(want, updates)
    chex.assert_trees_all_close(values, want, rtol=2e-5, atol=2e-6)


@given(st.integers(1, 8), st.integers(0, 12), st.integers(0, 99))
def test_adam_on_any_shape(num_rows, k, seed):
    rng = np.random.default_rng(seed)
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))
    tx = js.lazy_adam(0.1) if seed % 2 else js.lazy(inner)
    inner = optax.adam(0.1) if seed % 2 else inner
    values = {"t": jnp.asarray(rng.normal(size=(num_rows, 2)), jnp.float32)}
    state, want, want_state = tx.init(values), values, inner.init(values)
    for _ in range(3):
        ids, rows = rng.integers(0, num_rows + 2, k), rng.normal(size=(k, 2))
        grads = {"t": js.RowSparse(jnp.asarray(ids, jnp.int32), jnp.asarray(rows, jnp.float32), (num_rows, 2))}
        updates, state = tx.update(grads, state, values)
        values = optax.apply_updates(values, updates)
        want, want_state, _ = oracle_step(inner, grads, want_state, want)
    chex.assert_trees_all_close(values, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.wrapped, want_state, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Facts from the peers


def run(tx, table, steps):
    """The table after each of the steps, a step being (ids, rows)."""
    state, out = tx.init(table), []
    for ids, rows in steps:
        g = js.RowSparse(jnp.asarray(ids, jnp.int32), jnp.asarray(rows, jnp.float32), table.shape)
        updates, state = tx.update(g, state, table)
        table = optax.apply_updates(table, updates)
        out.append(np.asarray(table))
    return out


def test_the_trace_of_torch_and_tensorflow():
    """Rows 0, 1, 0 with gradient 1, lr .1: torch 2.13 SparseAdam and TensorFlow Addons' LazyAdam (shifted by 1) give
    these."""
    one = [([row], [[1.0]]) for row in (0, 1, 0)]
    got = np.stack(run(js.lazy_adam(0.1), jnp.ones((3, 1)), one))[..., 0]
    torch = [
        [0.9000000357627869, 1, 1],
        [0.9000000357627869, 0.9255863428115845, 1],
        [0.814153790473938, 0.9255863428115845, 1],
    ]
    np.testing.assert_allclose(got, torch, rtol=3e-6)  # optax takes 1 - .999^t in float32
    tensorflow = [
        [-0.09999968111515045, 0],
        [-0.09999968111515045, -0.07441319525241852],
        [-0.1858460009098053, -0.07441319525241852],
    ]
    np.testing.assert_allclose(got[:, :2], 1 + np.array(tensorflow), rtol=2e-6)
    dense = [0.9, 0.832993, 0.751192]  # what dense Adam does to row 0
    state, w = optax.adam(0.1).init(jnp.ones(3)), jnp.ones(3)
    for row, want in zip((0, 1, 0), dense, strict=True):
        updates, state = optax.adam(0.1).update(jnp.zeros(3).at[row].set(1.0), state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w[0], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("inner", "stale", "duplicate"),
    [
        (optax.sgd(0.1), [[0.9, 1, 1], [0.9, 0.9, 1], [0.8, 0.9, 1]], 0.8799999356269836),
        (
            optax.adagrad(0.1, initial_accumulator_value=0.0, eps=1e-20),
            [[0.9, 1, 1], [0.9, 0.9, 1], [0.8292893171310425, 0.9, 1]],
            None,
        ),
    ],
)
def test_traces_of_torch_sgd_and_adagrad(inner, stale, duplicate):
    got = np.stack(run(js.lazy(inner), jnp.ones((3, 1)), [([row], [[1.0]]) for row in (0, 1, 0)]))[..., 0]
    np.testing.assert_allclose(got, stale, rtol=1e-6)
    if duplicate is not None:
        (got,) = run(js.lazy(inner), jnp.ones((3, 1)), [([1, 1], [[0.4], [0.8]])])
        np.testing.assert_allclose(got[:, 0], [1, duplicate, 1], rtol=1e-6)


def test_duplicates_are_one_update_on_their_sum():
    twice = run(js.lazy_adam(0.1), jnp.ones((3, 1)), [([1, 1], [[0.1], [0.1]])] * 3)
    once = run(js.lazy_adam(0.1), jnp.ones((3, 1)), [([1], [[0.2]])] * 3)
    np.testing.assert_array_equal(twice, once)
    np.testing.assert_allclose(
        run(js.lazy_adam(0.3), jnp.ones((3, 1)), [([1, 1], [[1], [2]])])[0][:, 0], [1, 0.7, 1], rtol=3e-6
    )


def test_an_empty_gradient_counts_and_changes_nothing():
    tx = js.lazy_adam(0.1)
    for ids in (jnp.zeros(0, jnp.int32), jnp.array([3, 3, 9])):  # no ids, and only padding
        g = js.RowSparse(ids, jnp.ones((len(ids), 1)), (3, 1))
        updates, state = tx.update(g, tx.init(jnp.ones((3, 1))), jnp.ones((3, 1)))
        np.testing.assert_array_equal(optax.apply_updates(jnp.ones((3, 1)), updates), np.ones((3, 1)))
        assert optax.tree_utils.tree_get(state, "count") == 1
        assert not np.any(optax.tree_utils.tree_get(state, "mu"))


def test_a_hundred_steps_of_torch_sparse_adam():
    """torch 2.13.0 CPU, SparseAdam(lr=.05, betas=(.9, .99), eps=1e-2), ids with duplicates, on a (6, 2) table.

    torch adds eps to sqrt(v), optax to sqrt(v / (1 - b2^t)): the same with eps / sqrt(1 - b2^t), which changes from
    step to step.
    """
    table = jnp.asarray([[np.sin(3 * i + j) for j in range(2)] for i in range(6)], jnp.float32)
    steps = []
    for t in range(100):
        ids = [(7 * t * t + 3 * j * t + j) % 6 if (t + j) % 5 else 1 for j in range(3)]
        steps.append((ids, [[np.cos(t + 2 * j + c) * (1 + j) for c in range(2)] for j in range(3)]))
    converted = optax.inject_hyperparams(optax.adam)(
        0.05, b1=0.9, b2=0.99, eps=lambda t: 1e-2 / jnp.sqrt(1 - 0.99 ** (t + 1.0))
    )
    got = run(js.lazy(converted), table, steps)
    torch_10 = [
        [-0.0732346624135971, 0.815352737903595], [-0.16031482815742493, -0.7435174584388733],
        [-0.1992780715227127, 0.5916876792907715], [0.4524534046649933, -0.6068731546401978],
        [-0.4500356912612915, 0.4874797761440277], [0.791427493095398, -0.16221658885478973],
    ]  # fmt: skip
    torch_100 = [
        [-0.4534834921360016, 0.2071245014667511], [-0.023054221644997597, -0.8273070454597473],
        [0.1239834725856781, 1.0663068294525146], [0.6911475658416748, 0.008056405931711197],
        [-0.5446197390556335, 0.883776843547821], [0.6210980415344238, -0.7341956496238708],
    ]  # fmt: skip
    np.testing.assert_allclose(got[9], torch_10, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(got[99], torch_100, rtol=1e-5, atol=5e-6)
    unconverted = run(js.lazy_adam(0.05, 0.9, 0.99, 1e-2), table, steps)
    assert np.abs(unconverted[99] - torch_100).max() > 1e-3  # the convention matters here


# ---------------------------------------------------------------------------------------------------------------------
# Around it


def test_named_adam_is_lazy_adam():
    grads, values = gradient(0), params()
    for named, chain in [
        (js.lazy_adam(0.1, 0.8, 0.99, 1e-6, nesterov=True), optax.adam(0.1, 0.8, 0.99, 1e-6, nesterov=True)),
        (
            js.lazy_adam(SCHEDULE, before=optax.clip_by_global_norm(0.1)),
            optax.chain(optax.clip_by_global_norm(0.1), optax.adam(SCHEDULE)),
        ),
    ]:
        got, _ = named.update(grads, named.init(values), values)
        want, _ = js.lazy(chain).update(grads, js.lazy(chain).init(values), values)
        chex.assert_trees_all_equal(densify(got), densify(want))


def test_they_are_optax_transformations_with_extra_args():
    for tx in (js.lazy(optax.sgd(0.1)), js.lazy_adam(0.1)):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
    seen = {}

    def update(updates, state, params=None, *, value, **extra):
        seen.update(value=value, rows=updates["t"].shape, **extra)
        return updates, state

    tx = js.lazy(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update))
    tx.update(gradient(0), tx.init(params()), params(), value=3.0, other=4)
    assert seen == {"value": 3.0, "rows": (9, D), "other": 4}


def test_stock_train_state():
    state = TrainState.create(apply_fn=None, params=params(), tx=js.lazy_adam(0.1))
    new = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, gradient(0))
    assert new.step == 1
    touched = touched_rows(gradient(0))["t"]
    np.testing.assert_array_equal(new.params["t"][~touched], state.params["t"][~touched])
    assert np.all(new.params["t"][touched] != state.params["t"][touched])


def test_without_parameters_and_without_row_sparse_gradients():
    tx = js.lazy(optax.sgd(0.5))
    updates, _ = tx.update(gradient(0), tx.init(params()))
    np.testing.assert_allclose(updates["t"].todense(), -0.5 * densify(gradient(0))["t"], rtol=1e-6)
    dense, want = densify(gradient(0)), optax.sgd(0.5).update(densify(gradient(0)), optax.sgd(0.5).init(params()))[0]
    chex.assert_trees_all_equal(tx.update(dense, tx.init(params()))[0], want)


def test_bfloat16_table_with_float32_moments():
    table = params()["t"].astype(jnp.bfloat16)
    tx = js.lazy_adam(0.05, mu_dtype=jnp.float32)
    state = tx.init(table)
    g = js.RowSparse(jnp.array([1, 1, 4]), jnp.ones((3, D), jnp.bfloat16), (V, D))
    updates, state = tx.update(g, state, table)
    new = optax.apply_updates(table, updates)
    assert new.dtype == jnp.bfloat16 and optax.tree_utils.tree_get(state, "mu").dtype == jnp.float32
    np.testing.assert_array_equal(new[0], table[0])
    np.testing.assert_allclose(np.float32(new[1]), np.float32(table[1]) - 0.05, atol=2e-2)


def test_state_keeps_optax_names():
    state = js.lazy_adam(SCHEDULE).init(params())
    assert isinstance(state, js.LazyState)
    tree_get = optax.tree_utils.tree_get
    assert tree_get(state, "mu")["t"].shape == (V, D) and tree_get(state, "nu")["u"].shape == (V,)
    inner = optax.scale_by_adam()
    assert tree_get(js.lazy(inner).init(params()), "count") == 0
    doubled = optax.tree_utils.tree_map_params(js.lazy(inner), lambda x: 2 * x, js.lazy(inner).init(params()))
    chex.assert_trees_all_equal_shapes(doubled, js.lazy(inner).init(params()))


NOT_BY_ROW = {
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "sm3": lambda: optax.sm3(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "block_rms_of_large_gradients": lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.5), optax.sgd(0.1)),
    "block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "flat_state": lambda: optax.GradientTransformation(
        lambda p: jax.tree.map(lambda x: jnp.zeros((x.size,)), p), lambda u, s, p=None: (u, s)
    ),
    "mean_of_rows": lambda: optax.stateless(lambda u, p: jax.tree.map(lambda x: x - x.mean(0, keepdims=True), u)),
}


@pytest.mark.parametrize("name", NOT_BY_ROW)
@pytest.mark.parametrize("jitted", [True, False])
def test_what_is_not_by_row_is_refused(name, jitted):
    tx = js.lazy(NOT_BY_ROW[name]())
    update = jax.jit(tx.update) if jitted else tx.update
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=r"'inner'.*each row by itself"):
        update(gradient(0), tx.init(params()), params())


def test_what_is_not_by_row_is_refused_in_every_call():
    for args, extra in (((params(),), {"value": 1.0}), ((), {})):
        inner = optax.lamb(0.1) if args else optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1))
        tx = js.lazy(inner)
        for _ in range(2):  # the refusal is not forgotten
            with pytest.raises(ValueError, match=r"'inner'.*each row by itself"):
                tx.update(gradient(0), tx.init(params()), *args, **extra)


@pytest.mark.parametrize("name", ["MultiSteps", "apply_every"])
def test_accumulation_inside_is_refused(name):
    multi = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    inner = multi if name == "MultiSteps" else optax.chain(optax.apply_every(2), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"'inner'.*one step.*js\.accumulate"):
        js.lazy(inner).init(params())


def test_a_table_without_rows():
    tx, empty = js.lazy_adam(0.1), {"t": jnp.zeros((0, D))}
    grads = {"t": js.RowSparse(jnp.array([0, 3]), jnp.ones((2, D)), (0, D))}
    updates, _ = tx.update(grads, tx.init(empty), empty)
    assert optax.apply_updates(empty, updates)["t"].shape == (0, D)


RECIPES = {
    "a rate for each table": optax.partition(
        {"fast": optax.adam(0.1), "slow": optax.sgd(0.01)}, {"t": "fast", "u": "slow", "w": "slow"}
    ),
    "a frozen table": optax.partition(
        {"on": optax.adam(0.1), "off": optax.set_to_zero()}, {"t": "on", "u": "off", "w": "on"}
    ),
    "masked": optax.masked(optax.adam(0.1), MASK),
    "no NaN": optax.chain(optax.zero_nans(), optax.adam(0.1)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_inside(name):
    """Those whose state optax's tree_map_params does not know, so that only the parameters have an oracle."""
    inner, values = RECIPES[name], params()
    tx = js.lazy(inner)
    state, want, want_state = tx.init(values), values, inner.init(values)
    for step in range(3):  # all rows are touched, so dense optax itself is the oracle
        grads = {
            k: js.RowSparse(jnp.arange(V), g, g.shape) if k != "w" else g for k, g in densify(gradient(step)).items()
        }
        updates, state = tx.update(grads, state, values)
        values = optax.apply_updates(values, updates)
        updates, want_state = inner.update(densify(grads), want_state, want)
        want = optax.apply_updates(want, updates)
    chex.assert_trees_all_close(values, want, rtol=1e-5, atol=1e-6)
    before = values
    updates, _ = tx.update(gradient(3), state, values)
    values = optax.apply_updates(values, updates)
    untouched = ~touched_rows(gradient(3))["t"]
    np.testing.assert_array_equal(values["t"][untouched], before["t"][untouched])
    if name == "a frozen table":
        np.testing.assert_array_equal(values["u"], params()["u"])


def test_shapes_that_do_not_fit():
    tx = js.lazy_adam(0.1)
    wrong = gradient(0) | {"t": js.RowSparse(jnp.arange(2), jnp.ones((2, D)), (V + 1, D))}
    with pytest.raises(ValueError, match=r"'updates'.*\(12, 3\).*\(13, 3\)"):
        tx.update(wrong, tx.init(params()), params())
