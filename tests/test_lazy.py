"""lazy(inner) against dense optax on the densified gradient, untouched rows and slots put back after every step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from jaxsparse.trace import pieces
from tests.flags import DEFAULTS
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but
from tests.stepwise import TOGETHER

V, D = 12, 3
ADAM = js.lazy_adam(0.1)
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
# Those whose state optax's tree_map_params does not know, so that only the parameters have an oracle.
RECIPES = {
    "a rate for each table": lambda: optax.partition(
        {"fast": optax.adam(0.1), "slow": optax.sgd(0.01)}, {"t": "fast", "u": "slow", "w": "slow"}
    ),
    "a frozen table": lambda: optax.partition(
        {"on": optax.adam(0.1), "off": optax.set_to_zero()}, {"t": "on", "u": "off", "w": "on"}
    ),
    "masked": lambda: optax.masked(optax.adam(0.1), MASK),
    "no NaN": lambda: optax.chain(optax.zero_nans(), optax.adam(0.1)),
    "block_rms_of_large_gradients": lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
    "block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
    "state that nobody uses": lambda: optax.chain(
        optax.GradientTransformation(
            lambda p: jax.tree.map(lambda x: jnp.zeros((x.size,)), p), lambda u, s, p=None: (u, s)
        ),
        optax.sgd(0.1),
    ),
    "without the mean of all rows": lambda: optax.chain(
        optax.stateless(lambda u, p: jax.tree.map(lambda x: x - x.mean(0, keepdims=True), u)), optax.sgd(0.1)
    ),
}
# As many as are one program: decay, a schedule, three slots, a cond, masks, norms.
FEW = "adamw_mask rmsprop_centered inject apply_if_finite masked block_rms".split()
MORE = [name for name in INNERS | RECIPES if name not in FEW]  # like these, and slow by their number


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


def every_row(step):
    """As `gradient`, but all rows of both tables are in it, some twice, and padding."""
    rng = np.random.default_rng(step)
    ids = jnp.asarray(np.concatenate([rng.permutation(V), rng.integers(0, V, 3), [V, -1]]))
    rows = lambda *shape: jnp.asarray(rng.normal(size=(len(ids), *shape)), jnp.float32)  # noqa: E731
    return gradient(step) | {"t": js.RowSparse(ids, rows(D), (V, D)), "u": js.RowSparse(ids, rows(), (V,))}


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
    return jnp.where(jnp.reshape(touched, touched.shape + (1,) * (new.ndim - 1)), new, old)


def oracle_step(inner, grads, touched, values, state, *, by_row=True):
    """Dense optax, then everything that belongs to an untouched row put back, slots told by optax's own
    tree_map_params, if it can."""
    updates, new_state = inner.update(grads, state, values)
    new = jax.tree.map(put_back, optax.apply_updates(values, updates), values, touched)
    if not by_row:
        return new, new_state
    marks = optax.tree_utils.tree_map_params(
        inner, lambda _, mark: mark, new_state, touched, transform_non_params=lambda _: np.ones(1, bool)
    )
    return new, jax.tree.map(lambda n, o, m: put_back(n, o, m) if jnp.ndim(n) else n, new_state, state, marks)


def lazy_step(tx, grads, values, state):
    updates, state = tx.update(grads, state, values)
    sparse = jax.tree.map(is_row_sparse, grads, is_leaf=is_row_sparse)
    assert jax.tree.map(is_row_sparse, updates, is_leaf=is_row_sparse) == sparse
    return optax.apply_updates(values, updates), state


@functools.cache
def optimizer(name):
    """The optimizer and its lazy one."""
    inner = (INNERS | RECIPES)[name]()
    return inner, js.lazy(inner)


def each(names, make):
    out = {}
    for name in names:
        try:
            out[name] = make(name)
        except Exception as error:
            error.add_note(f"The optimizer is {name!r}.")
            raise
    return out


QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}  # half of the time is LLVM's optimizations


def steps(name, make, number):
    """For each step with the gradients of `make`: (parameters, state) of lazy, of the oracle, and the touched rows."""
    names = MORE if name in MORE else FEW
    first = names.index(name) // TOGETHER * TOGETHER
    for got, want, touched in steps_of_all(tuple(names[first : first + TOGETHER]), make, number):
        yield got[name], want[name], touched


@functools.cache
def steps_of_all(names, make, number):
    lazy, dense, traces = programs(names)
    got = each(names, lambda name: (params(), optimizer(name)[1].init(params())))
    want = each(names, lambda name: (params(), optimizer(name)[0].init(params())))
    out = []
    traces.clear()
    for step in range(number):
        grads = make(step)
        touched = touched_rows(grads)
        got, want = lazy(grads, got), dense(densify(grads), touched, want)
        out.append((got, want, touched))
    assert len(traces) == 1
    return out


@functools.cache
def programs(names):
    """lazy's step and the oracle's, one program each for all the optimizers; and lazy's traces."""
    traces = []

    def lazy(grads, before):
        traces.append(1)
        return each(names, lambda name: lazy_step(optimizer(name)[1], grads, *before[name]))

    def dense(grads, touched, before):
        def step(name):
            return oracle_step(optimizer(name)[0], grads, touched, *before[name], by_row=name in INNERS)

        return each(names, step)

    return jax.jit(lazy, **QUICKLY), jax.jit(dense, **QUICKLY), traces


def battery(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in names]


@pytest.mark.parametrize("name", battery(INNERS))
def test_against_dense_optax(name):
    before = params()
    for (values, state), (want, want_state), touched in steps(name, gradient, 5):
        chex.assert_trees_all_close(values, want, rtol=2e-5, atol=2e-6)
        chex.assert_trees_all_close(state, want_state, rtol=2e-5, atol=2e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, want_state)
        for leaf in ("t", "u"):
            np.testing.assert_array_equal(values[leaf][~touched[leaf]], before[leaf][~touched[leaf]])  # bit-equal
        before = values
    assert not np.allclose(values["t"], params()["t"])


@pytest.mark.slow
@pytest.mark.parametrize("name", battery(INNERS))
def test_all_rows_touched_is_dense_optax(name):
    *_, ((values, _), (want, _), touched) = steps(name, every_row, 4)
    assert touched["t"].all() and touched["u"].all()
    chex.assert_trees_all_close(values, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", battery(RECIPES))
def test_recipes_inside(name):
    for (values, _), (want, _), _ in steps(name, every_row, 4):
        chex.assert_trees_all_close(values, want, rtol=1e-5, atol=1e-6)
    before = params()
    for (values, _), _, touched in steps(name, gradient, 5):
        for leaf in ("t", "u"):
            np.testing.assert_array_equal(values[leaf][~touched[leaf]], before[leaf][~touched[leaf]])
        before = values
    if name == "a frozen table":
        np.testing.assert_array_equal(values["u"], params()["u"])


SCANNED = ["adam", "adamw", "rmsprop_centered"]


@functools.cache
def scanned():
    def step(carry, grads):
        return {name: lazy_step(optimizer(name)[1], grads, *carry[name]) for name in SCANNED}

    def body(carry, grads):
        go_on = carry["adam"][0]["w"][0, 0] < 1e9
        return jax.lax.cond(go_on, step, lambda carry, _: carry, carry, grads), None

    start = {name: (params(), optimizer(name)[1].init(params())) for name in SCANNED}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(gradient, range(3)))
    return jax.jit(lambda carry, grads: jax.lax.scan(body, carry, grads)[0])(start, stacked)


@pytest.mark.parametrize("name", battery(SCANNED))
def test_inside_scan_and_cond(name):
    values, state = scanned()[name]
    (want, want_state), _, _ = list(steps(name, gradient, 5))[2]
    chex.assert_trees_all_close(values, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, want_state, rtol=1e-5, atol=1e-6)


SHAPES = [(1, 5), (3, 12), (8, 0), (8, 6)]  # of the tables: rows, and ids in a gradient
CHAIN = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))
ANY_SHAPE = {"lazy_adam": (ADAM, optax.adam(0.1)), "chain": (js.lazy(CHAIN), CHAIN)}


@functools.cache
def three_steps(name):
    """Of lazy and of the oracle, on tables of all the shapes."""
    tx, inner = ANY_SHAPE[name]

    def run(values, ids, rows, dense, touched):
        def step(carry, grads):
            ids, rows, dense, touched = grads
            sparse = [js.RowSparse(*each) for each in zip(ids, rows, [v.shape for v in values], strict=True)]
            return (lazy_step(tx, sparse, *carry[0]), oracle_step(inner, dense, touched, *carry[1])), None

        start = (values, tx.init(values)), (values, inner.init(values))
        return jax.lax.scan(step, start, (ids, rows, dense, touched))[0]

    return jax.jit(run, **QUICKLY)


@pytest.mark.parametrize("name", slow_but(["chain"], ANY_SHAPE))
@given(
    ids=st.tuples(*(hnp.arrays(np.int32, (3, k), elements=st.integers(-1, n + 1)) for n, k in SHAPES)),
    seed=st.integers(0, 99),
)
def test_adam_on_any_shape(name, ids, seed):
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    values, rows = [make(n, 2) for n, _ in SHAPES], [make(3, k, 2) for _, k in SHAPES]
    dense, touched = [np.zeros((3, n, 2), np.float32) for n, _ in SHAPES], [np.zeros((3, n), bool) for n, _ in SHAPES]
    for i, (n, _) in enumerate(SHAPES):
        step, at = np.nonzero((ids[i] >= 0) & (ids[i] < n))
        np.add.at(dense[i], (step, ids[i][step, at]), rows[i][step, at])
        touched[i][step, ids[i][step, at]] = True
    (values, state), (want, want_state) = three_steps(name)(values, ids, rows, dense, touched)
    chex.assert_trees_all_close(values, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, want_state, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Facts from the peers


@functools.cache
def jitted(tx, by_default=False):
    return jax.jit(functools.partial(lazy_step, tx), compiler_options=DEFAULTS if by_default else None)


def run(tx, table, steps, by_default=False):
    """The table after each of the steps, a step being (ids, rows)."""
    state, out = tx.init(table), []
    for ids, rows in steps:
        g = js.RowSparse(np.asarray(ids, np.int32), np.asarray(rows, np.float32), table.shape)
        table, state = jitted(tx, by_default)(g, table, state)
        out.append(np.asarray(table))
    return out


def test_the_trace_of_torch_and_tensorflow():
    """Rows 0, 1, 0 with gradient 1, lr .1: torch 2.13 SparseAdam and TensorFlow Addons' LazyAdam (shifted by 1) give
    these."""
    one = [([row], [[1.0]]) for row in (0, 1, 0)]
    got = np.stack(run(ADAM, jnp.ones((3, 1)), one))[..., 0]
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
    adam, w = optax.adam(0.1), jnp.ones(3)
    state, update = adam.init(w), jax.jit(adam.update)
    for row, want in zip((0, 1, 0), dense, strict=True):
        updates, state = update(np.float32(np.arange(3) == row), state, w)
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
    tx = js.lazy(inner)
    got = np.stack(run(tx, jnp.ones((3, 1)), [([row], [[1.0]]) for row in (0, 1, 0)]))[..., 0]
    np.testing.assert_allclose(got, stale, rtol=1e-6)
    if duplicate is not None:
        (got,) = run(tx, jnp.ones((3, 1)), [([1, 1], [[0.4], [0.8]])])
        np.testing.assert_allclose(got[:, 0], [1, duplicate, 1], rtol=1e-6)


def test_duplicates_are_one_update_on_their_sum():
    """To the bit, with XLA's defaults: without optimizations, two programs round in other places."""
    twice = run(ADAM, jnp.ones((3, 1)), [([1, 1], [[0.1], [0.1]])] * 3, by_default=True)
    once = run(ADAM, jnp.ones((3, 1)), [([1], [[0.2]])] * 3, by_default=True)
    np.testing.assert_array_equal(twice, once)
    np.testing.assert_allclose(
        run(js.lazy_adam(0.3), jnp.ones((3, 1)), [([1, 1], [[1], [2]])])[0][:, 0], [1, 0.7, 1], rtol=3e-6
    )


def test_an_empty_gradient_counts_and_changes_nothing():
    table = jnp.ones((3, 1))
    for ids in ([], [3, 3, 9]):  # no ids, and only padding
        g = js.RowSparse(np.array(ids, np.int32), np.ones((len(ids), 1), np.float32), (3, 1))
        after, state = jitted(ADAM)(g, table, ADAM.init(table))
        np.testing.assert_array_equal(after, table)
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
    pairs = [
        (js.lazy_adam(0.1, 0.8, 0.99, 1e-6, nesterov=True), optax.adam(0.1, 0.8, 0.99, 1e-6, nesterov=True)),
        (
            js.lazy_adam(SCHEDULE, before=optax.clip_by_global_norm(0.1)),
            optax.chain(optax.clip_by_global_norm(0.1), optax.adam(SCHEDULE)),
        ),
    ]

    @functools.partial(jax.jit, **QUICKLY)
    def updates(grads, values):
        pairs_of_lazy = [(named, js.lazy(chain)) for named, chain in pairs]
        return [[tx.update(grads, tx.init(values), values)[0] for tx in pair] for pair in pairs_of_lazy]

    for got, want in updates({"t": gradient(0)["t"]}, {"t": params()["t"]}):
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
    assert seen == {"value": 3.0, "rows": (V, D), "other": 4}


def test_stock_train_state():
    state = TrainState.create(apply_fn=None, params=params(), tx=optimizer("adam")[1])
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
    g = js.RowSparse(np.array([1, 1, 4]), np.ones((3, D), jnp.bfloat16), (V, D))
    new, state = jitted(tx)(g, table, tx.init(table))
    assert new.dtype == jnp.bfloat16 and optax.tree_utils.tree_get(state, "mu").dtype == jnp.float32
    np.testing.assert_array_equal(new[0], table[0])
    np.testing.assert_allclose(np.float32(new[1]), np.float32(table[1]) - 0.05, atol=2e-2)


def test_state_keeps_optax_names():
    state = js.lazy_adam(SCHEDULE).init(params())
    chex.assert_trees_all_equal_structs(state, optax.adam(SCHEDULE).init(params()))
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
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.5), optax.sgd(0.1)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "apply_every": lambda: optax.chain(optax.apply_every(2), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", NOT_BY_ROW)
@pytest.mark.parametrize("jit", slow_but([True], [True, False]))  # eagerly: below
def test_what_is_not_by_row_is_refused(name, jit):
    tx = js.lazy(NOT_BY_ROW[name]())
    update = jax.jit(tx.update) if jit else tx.update
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=r"'inner'.*each row by itself"):
        update(gradient(0), tx.init(params()), params())


def test_what_is_not_by_row_is_refused_in_every_call():
    for args, extra in (((params(),), {"value": 1.0}), ((), {})):
        tx = js.lazy(optax.lamb(0.1) if args else optax.sm3(0.1))
        for _ in range(2):  # the refusal is not forgotten
            with pytest.raises(ValueError, match=r"'inner'.*each row by itself"):
                tx.update(gradient(0), tx.init(params()), *args, **extra)


def test_a_state_that_changes_its_structure_is_refused():
    grows = optax.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates, updates))
    with pytest.raises(ValueError, match=r"'inner'.*state keeps its structure"):
        js.lazy(grows).update(gradient(0), js.lazy(grows).init(params()), params())


def test_gradients_of_two_tables_that_are_added_are_refused():
    added = optax.stateless(lambda updates, params: jax.tree.map(lambda u: updates["t"] + updates["u"], updates))
    two = {"t": jnp.ones((V, D)), "u": jnp.ones((V, D))}
    grads = {name: js.RowSparse(jnp.array([k]), jnp.ones((1, D)), (V, D)) for k, name in enumerate(two)}
    with pytest.raises(ValueError, match=r"'inner'.*each row by itself"):
        js.lazy(added).update(grads, js.lazy(added).init(two), two)


def test_a_table_without_rows():
    tx, empty = ADAM, {"t": jnp.zeros((0, D))}
    grads = {"t": js.RowSparse(jnp.array([0, 3]), jnp.ones((2, D)), (0, D))}
    updates, _ = tx.update(grads, tx.init(empty), empty)
    assert optax.apply_updates(empty, updates)["t"].shape == (0, D)


def test_shapes_that_do_not_fit():
    tx = ADAM
    wrong = gradient(0) | {"t": js.RowSparse(np.arange(2), np.ones((2, D), np.float32), (V + 1, D))}
    with pytest.raises(ValueError, match=r"'updates'.*\(12, 3\).*\(13, 3\)"):
        tx.update(wrong, tx.init(params()), params())
    with pytest.raises(ValueError, match=r"\(13, 3\) at \['t'\]"):
        tx.update(wrong, tx.init(params()), params())
    with pytest.raises(ValueError, match=r"'params' argument of js\.lazy must be a tree like the gradient.*'w'"):
        tx.update({"t": gradient(0)["t"]}, tx.init(params()), params())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: js.lazy(0.1), r"'inner' argument of js\.lazy must be an optax transformation.*Got 0\.1"),
        (lambda: js.lazy(optax.adam), r"'inner'.*Got <function adam.*Call it"),
        (lambda: js.lazy_adagrad(0.1, before=1.0), r"'before' argument of js\.lazy_adagrad.*Got 1\.0"),
        (
            lambda: js.lazy_sgd(0.1, before=optax.clip, untouched="replay"),
            r"'before' argument of js\.lazy_sgd.*Call it",
        ),
    ],
)
def test_what_is_no_transformation(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize("skipped", ["freeze", "replay"])
def test_what_belongs_behind_is_no_before(skipped):
    """Adam of what is turned round goes uphill."""
    clip = optax.clip_by_global_norm(1.0)
    for before in (optax.scale(-0.1), optax.sgd(0.1), optax.chain(clip, optax.scale_by_learning_rate(0.1))):
        tx = js.lazy_adam(0.1, before=before, untouched=skipped)
        with pytest.raises(ValueError, match=r"'before' argument of js\.lazy_adam .*turns them round.*behind"):
            tx.init(params())
        with pytest.raises(ValueError, match="turns them round"):
            jax.eval_shape(tx.init, params())
    for before in (optax.scale(0.1), clip, optax.identity(), optax.set_to_zero(), optax.clip(0.01)):
        js.lazy_adam(0.1, before=before, untouched=skipped).init(params())


def test_apply_if_finite_outside():
    """It looks at the rows; where it refuses them, nothing changes."""
    tx = optax.apply_if_finite(ADAM, 3)
    table = jnp.ones((V, D))
    good = js.RowSparse(np.arange(2), np.ones((2, D), np.float32), (V, D), unique=True)
    new, state = jitted(tx)(good, table, tx.init(table))
    assert (new[:2] < 1).all() and (new[2:] == 1).all()
    bad = js.RowSparse(np.arange(2), np.array([[1, 1, np.nan], [1, 1, 1]], np.float32), (V, D), unique=True)
    kept, after = jitted(tx)(bad, new, state)
    np.testing.assert_array_equal(kept, new)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert after.total_notfinite == 1


PIECES = {
    "adam": optax.adam(0.1),
    "adamw, clipped by value": optax.chain(optax.clip(0.5), optax.adamw(0.1, weight_decay=0.1)),
    "sgd": optax.sgd(0.1),  # no slots
    "identity": optax.identity(),
    "a norm in a cond": optax.chain(
        optax.conditionally_transform(optax.clip_by_global_norm(1.0), lambda step, **_: step >= 0), optax.sgd(0.1)
    ),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
}


def one_update(tx, grads, state):
    params, opt_state = state
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@pytest.mark.slow
@pytest.mark.parametrize("many", slow_but([0, 257], [0, 1, 255, 256, 257, 400]))
@pytest.mark.parametrize("name", slow_but(["clip_by_global_norm"], PIECES))
def test_in_pieces(name, many, monkeypatch):
    """What is large is updated so many rows at a time, as far as there are rows: the same as at once."""
    rng = np.random.default_rng(many)
    params = {"t": jnp.asarray(rng.normal(size=(2000, 3)), jnp.float32), "u": jnp.ones((700, 2)), "w": jnp.ones(3)}
    ids = np.concatenate([rng.permutation(2000)[:many], 2000 + np.arange(401 - many)]).astype(np.int32)
    ids[many // 2 : many // 2 + 3] = 2500 + np.arange(3)  # padding among the rows
    rows = jnp.asarray(rng.normal(size=(401, 3)), jnp.float32)
    few = js.RowSparse(jnp.arange(5), jnp.ones((5, 2)), (700, 2), unique=True)
    grads = {"t": js.RowSparse(ids, rows, (2000, 3), unique=True), "u": few, "w": jnp.ones(3)}
    results = []
    for piece in (0, 1 << 18):
        monkeypatch.setattr(pieces, "_PIECE", piece)
        tx = js.lazy(PIECES[name])
        step = jax.jit(functools.partial(one_update, tx, grads), donate_argnums=0)
        state = jax.tree.map(jnp.copy, (params, tx.init(params)))
        lowered = step.lower(state).as_text()
        assert ("while" in lowered) == (piece == 0 and name != "identity")
        for _ in range(3):
            state = step(state)
        results.append(state)
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-6)
    untouched = np.setdiff1d(np.arange(2000), ids)
    assert np.array_equal(results[0][0]["t"][untouched], params["t"][untouched])


@pytest.mark.cpu("elsewhere there are no pieces")
def test_pieces_copy_no_table():
    """Compiled for CPU, an update in pieces makes nothing that is as large as a table."""
    params = jnp.zeros((500_000, 16))
    tx = js.lazy(optax.adam(0.1))

    def step(state, ids, rows):
        return one_update(tx, js.RowSparse(ids, rows, params.shape, unique=True), state)

    args = (params, tx.init(params)), jnp.arange(16384), jnp.ones((16384, 16))
    compiled = compiled_by_default(jax.jit(step, donate_argnums=0).lower(*args))
    assert "while" in compiled.as_text() and not large_arrays(compiled.as_text(), 500_000)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * args[2].nbytes


def test_padding_is_any_id_out_of_range():
    """Its row counts nothing in a norm, a negative id's neither."""
    g = js.RowSparse(jnp.array([1, -1, 3]), jnp.array([[1.0], [100.0], [2.0]]), (5, 1), unique=True)
    tx, zeros = js.lazy(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))), jnp.zeros((5, 1))
    got = zeros + tx.update(g, tx.init(zeros), zeros)[0]
    np.testing.assert_allclose(got[:, 0], [0, -(5**-0.5), 0, -2 * 5**-0.5, 0], rtol=1e-6)
