"""A stock train step on the rows that it reads: every optax transformation, every way to read, every way to refuse."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.trace import pieces
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but
from tests.stepwise import (
    P0,
    QUICK,
    STEP,
    Case,
    D,
    V,
    batch,
    both_tables,
    check,
    compare,
    copied,
    create,
    draw_ids,
    loss_fn,
    normal,
    of_loss,
    on_updates,
    put_back,
)


def rowwise(step):
    return jax.jit(js.rowwise(step), donate_argnums=0, compiler_options=QUICK)


ROADS = [pytest.param(js.jit, id="js.jit"), pytest.param(rowwise, id="js.rowwise", marks=pytest.mark.slow)]
EVERY_ROAD = pytest.mark.parametrize("transform", ROADS)

# ---------------------------------------------------------------------------------------------------------------------
# optimizers

LABELS = {"t": "a", "b": "b", "w": "a"}
KEEP = jnp.asarray((np.arange(V) % 3 > 0)[:, None], jnp.float32)

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adam, schedule": optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "amsgrad": optax.amsgrad(0.1),
    "nadamw": optax.nadamw(0.1),
    "adamax": optax.adamax(0.1),
    "adabelief": optax.adabelief(0.1),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "lion": optax.lion(0.1),
    "yogi": optax.yogi(0.1),
    "radam": optax.radam(0.1),
    "adadelta": optax.adadelta(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "optimistic": optax.optimistic_gradient_descent(0.1),
    "adan": optax.adan(0.1),
    "rprop": optax.rprop(0.1),
    "novograd": optax.novograd(0.1),
    "cocob": optax.contrib.cocob(),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "clip": optax.chain(optax.clip(0.01), optax.adam(0.1)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(0.01), optax.adam(0.1)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(0.1),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, LABELS),
    "masked": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), {"t": True, "b": False, "w": True}), optax.adam(0.1)
    ),
    "mask by shape": optax.adamw(0.1, weight_decay=1.0, mask=lambda p: jax.tree.map(lambda x: x.shape[0] < 50, p)),
    "mask over rows": on_updates(lambda u: u * KEEP),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "ema": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "keep_params_nonnegative": optax.chain(optax.adam(0.1), optax.keep_params_nonnegative()),
    "lazy": js.lazy(optax.adam(0.1)),
    "lazy_ftrl": js.lazy_ftrl(0.1),
}


@pytest.mark.slow
@EVERY_ROAD
def test_optimizers(transform):
    check({name: Case(STEP, create(tx)) for name, tx in OPTIMIZERS.items()}, transform)


def test_noise_is_drawn_for_the_whole_table_and_announced():
    noisy = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1))
    with pytest.warns(UserWarning, match="makes an array with a row for each of a table's"):
        check({"noise": Case(STEP, create(noisy))})


def after(first, second):
    """Dense: `second` of what `first` updates, rows that are frozen being no update."""

    def step(state, *args):
        *arrays, touched = args
        value, grads = jax.value_and_grad(loss_fn)(state.params, *arrays)
        updates, one = first.update(grads, state.opt_state[0], state.params)
        updates = put_back(updates, jax.tree.map(jnp.zeros_like, updates), touched)
        updates, two = second.update(updates, state.opt_state[1], state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=(one, two)), value

    return Case(STEP, create(optax.chain(first, second)), oracle=step)


@pytest.mark.slow  # a norm of the gradient is in test_steps
def test_norms_of_updates_are_those_of_the_rows_that_move():
    cases = {
        "clip after adam": after(optax.adam(0.1), optax.clip_by_global_norm(0.05)),
        "clip inside apply_if_finite": after(
            optax.adam(0.1), optax.apply_if_finite(optax.clip_by_global_norm(0.05), 3)
        ),
        "clip_by_block_rms after adam": after(optax.adam(0.1), optax.clip_by_block_rms(0.01)),
    }
    with pytest.warns(UserWarning, match="is over the rows that are read"):
        check(cases)


MIX = normal(D, D)
_clipped = jax.custom_jvp(lambda x: jnp.clip(x, -0.01, 0.01))
_clipped.defjvp(lambda x, t: (_clipped(x[0]), t[0]))
BY_ROW = {
    "matmul": lambda u: u @ MIX,
    "reshape": lambda u: (u.reshape(V, 2, D // 2) * jnp.array([[1.0], [2.0]])[None]).reshape(V, D),
    "transpose": lambda u: (u.T * jnp.arange(1.0, D + 1)[:, None]).T,
    "concatenate": lambda u: jnp.concatenate([u, 2 * u], 1)[:, 4:12],
    "pad": lambda u: jnp.pad(u, ((0, 0), (1, 0)))[:, :D],
    "cumsum": lambda u: jnp.cumsum(u, 1),
    "sort": lambda u: jnp.sort(u, 1),
    "row norms": lambda u: u / (1e-3 + jnp.linalg.norm(u, axis=1, keepdims=True)),
    "einsum": lambda u: u * jnp.einsum("vd,vd->v", u, u)[:, None],
    "columns": lambda u: u[:, ::-1] + u[:, jnp.arange(D)[::-1]],
    "gram": lambda u: u @ (u.T @ u + jnp.eye(D)),
    "softmax": lambda u: jax.nn.softmax(100 * u, -1),
    "top_k": lambda u: jnp.where(u >= jax.lax.top_k(jnp.abs(u), 2)[0][:, 1:], u, 0),
    "vmap": jax.vmap(lambda row: row * jnp.vdot(row, row)),
    "stack": lambda u: jnp.stack([u, u])[1],
    "moveaxis": lambda u: jnp.moveaxis(jnp.stack([u, 2 * u], -1), -1, 0).sum(0),
    "split": lambda u: jnp.concatenate(jnp.split(u, 2, axis=1)[::-1], 1),
    "mean row": lambda u: u - u.mean(0, keepdims=True),
    "largest": lambda u: u / (1 + jnp.max(jnp.abs(u))),
    "custom_jvp": _clipped,
    "closed over in a jit": jax.jit(lambda x: x * KEEP),
}


def by_visits():
    """SGD whose rate falls with the number of steps that a row was in: a schedule that is looked up row by row."""
    rates = jnp.array([0.5, 0.2, 0.1, 0.05])

    def update(updates, visits, params=None):
        moved = jax.tree.map(lambda u: jnp.any(u != 0, axis=tuple(range(1, u.ndim))), updates)
        seen = jax.tree.map(lambda n, m: jnp.minimum(n + m, 3), visits, moved)
        rate = jax.tree.map(lambda u, n: rates[n].reshape(-1, *(1,) * (u.ndim - 1)), updates, seen)
        return jax.tree.map(lambda u, r: -r * u, updates, rate), seen

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape[0], jnp.int32), params), update
    )


def test_a_schedule_for_each_row():
    check({"by visits": Case(STEP, create(by_visits()))})


@pytest.mark.slow
def test_what_is_by_row_in_an_optimizer():
    check({name: Case(STEP, create(on_updates(f)), tol=1e-4) for name, f in BY_ROW.items()})


# ---------------------------------------------------------------------------------------------------------------------
# reads


def squared(read):
    return lambda p, ids, y: jnp.mean(read(p, ids) ** 2 * p["w"][None, None, :, 0]) + 0 * y[0]


def scanned(p, ids, length):
    def turn(h, row):
        h = jnp.tanh(h + p["t"][row])
        return h, h

    return jax.lax.scan(turn, jnp.zeros((*length, D)), ids)[1]


SCALE = jnp.arange(1.0, D + 1)[None, None]
READS = {
    "index": lambda p, i: p["t"][i],
    "take": lambda p, i: jnp.take(p["t"], i, axis=0),
    "take, clip": lambda p, i: jnp.take(p["t"], i, axis=0, mode="clip"),
    "int8": lambda p, i: p["t"][i.astype(jnp.int8)],
    "uint8": lambda p, i: p["t"][i.astype(jnp.uint8)],
    "negative": lambda p, i: p["t"][i - V],
    "nested jit": lambda p, i: jax.jit(lambda t, i: jax.jit(lambda t, i: t[i])(t, i + 0))(p["t"], i),
    "remat": lambda p, i: jax.checkpoint(lambda t, i: jnp.sin(t[i] * jnp.cos(t[i])))(p["t"], i),
    "vmap": lambda p, i: jax.vmap(lambda i: p["t"][i])(i),
    "scalar under vmap": lambda p, i: jax.vmap(jax.vmap(lambda j: p["t"][j]))(i),
    "dynamic_slice": lambda p, i: jax.vmap(jax.vmap(lambda j: jax.lax.dynamic_slice(p["t"], (j, 0), (1, D))[0]))(i),
    "one dynamic_slice": lambda p, i: p["t"][i] + jax.lax.dynamic_slice(p["t"], (i[0, 0], 0), (1, D))[0][None, None],
    "scan": lambda p, i: jnp.moveaxis(scanned(p, i.T, (12,)), 0, 1),
    "scan, scalar": lambda p, i: scanned(p, i.ravel(), ()).reshape(12, 4, D),
    "cond": lambda p, i: jax.lax.cond(i.sum() % 2 >= 0, lambda t: t[i], lambda t: t[i] * 2, p["t"]),
    "transposed": lambda p, i: jnp.moveaxis(p["t"].T[:, i], 0, -1),
    "columns": lambda p, i: jnp.concatenate([p["t"][i, 3:4], p["t"][i, :7]], -1),
    "an element": lambda p, i: p["t"][i, jnp.arange(4)[None] % D][..., None],
    "changed first": lambda p, i: (p["t"] * 2 + 1)[i],
    "multiplied first": lambda p, i: (p["t"] @ (jnp.eye(D) + p["w"] @ p["w"].T))[i],
    "normed first": lambda p, i: (
        (p["t"] / jnp.linalg.norm(p["t"], axis=1, keepdims=True))[i] * jnp.arange(1.0, D + 1)[None, None]
    ),
    "reshaped": lambda p, i: p["t"].reshape(V, 2, D // 2)[i].reshape(12, 4, D),
    "summed": lambda p, i: p["t"][i].sum(1, keepdims=True) + p["t"][i].mean(0)[None],
    "weighted bag": lambda p, i: (p["t"][i] * jnp.arange(1.0, 5)[None, :, None]).sum(1, keepdims=True),
    "embedding_bag": lambda p, i: js.embedding_bag(p["t"], i, combiner="sqrtn")[:, None],
    "embedding_lookup": lambda p, i: js.embedding_lookup(p["t"], i, padding_idx=0),
    "derivative": lambda p, i: jax.vmap(jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2))))(p["t"][i]),
    "activations": lambda p, i: jax.nn.relu(jax.nn.silu(p["t"][i])),
    "none": lambda p, i: p["t"][i[:, :0]].sum(1, keepdims=True) + p["t"][i],
}


def only_t(ids, y):
    del y
    return {"t": ids}


@pytest.mark.slow  # test_grad.py has the same reads, of a loss
@EVERY_ROAD
def test_reads(transform):
    step = {
        name: of_loss(squared(lambda p, i, read=read: read(p, i) * jnp.ones((12, 4, D))))
        for name, read in READS.items()
    }
    check({name: Case(step[name], create(optax.adamw(0.05)), only_t) for name in READS}, transform)


def test_rows_that_are_set_before_they_are_read():
    """A padding row of zeros, as many programs have it: the row is one that the step names."""

    def only_t_and_padding(ids, y):
        return {"t": np.append(np.ravel(only_t(ids, y)["t"]), 0)}

    reads = {
        "set": lambda p, i: p["t"].at[0].set(0)[i] + 0.5,
        "multiplied": lambda p, i: p["t"].at[0].multiply(0)[i] + 0.5,
        "twice": lambda p, i: p["t"].at[0].set(0)[i] + p["t"].at[0].set(1)[i[:, ::-1]],
    }
    steps = {name: of_loss(squared(read)) for name, read in reads.items()}
    cases = {name: Case(steps[name], create(optax.adamw(0.05)), only_t_and_padding) for name in reads}
    check(cases, js.jit)


def test_rows_of_fixed_numbers():
    def touched(ids, y):
        return {"t": np.append(np.ravel(only_t(ids, y)["t"]), [0, 1, 5, V - 1])}

    reads = {
        "beside": lambda p, i: p["t"][i] * p["t"][:1][None] + p["t"][1:2][None] - p["t"][None, -1:] + p["t"][5, 0],
        "of the new": lambda p, i: (
            (p["t"].at[1].set(0))[i] + (p["t"][5] * (p["t"] + 1)[-1])[None, None] + p["t"][:2].sum()
        ),
    }
    check({name: Case(of_loss(squared(read)), create(optax.adamw(0.05)), touched) for name, read in reads.items()})


@pytest.mark.slow
def test_reads_that_name_other_rows():
    def switch(p, ids):
        half = [lambda t: t[ids[:6]].sum(0), lambda t: t[ids].sum(0)]
        return jax.lax.switch(ids[0, 0] % 2, half, p["t"])[None] * jnp.ones((12, 4, D))

    def made_of_rows(p, ids):
        found = jnp.argmax(p["t"][ids] * 0 + jax.nn.one_hot(ids % D, D), -1)
        return p["t"][ids] + p["b"][found][..., None]

    def out_of_range(p, ids):
        ids = ids.at[0, 0].set(V + 5).at[1, 1].set(-2).at[2, 2].set(-V - 7)
        return p["t"][ids] + p["t"].at[ids].get(mode="fill", fill_value=0)

    def named_out_of_range(ids, y):
        ids = np.array(ids)
        ids[0, 0], ids[1, 1], ids[2, 2] = V - 1, V - 2, 0
        return {"t": ids}

    cases = {
        "switch": (switch, lambda ids, y: {"t": ids[:6] if int(ids[0, 0]) % 2 == 0 else ids}),
        "made of rows": (made_of_rows, lambda ids, y: {"t": ids, "b": ids % D}),
        "out of range": (out_of_range, named_out_of_range),
    }
    adamw = create(optax.adamw(0.05))
    check({name: Case(of_loss(squared(read)), adamw, touched) for name, (read, touched) in cases.items()})


def test_all_rows_are_named():
    every = lambda: (jnp.arange(2 * V).reshape(-1, 2) % V, normal(2 * V // 2))  # noqa: E731
    clip = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    loss = lambda p, ids, y: jnp.mean(p["t"][ids].sum(1) * y[:, None] ** 2)  # noqa: E731
    states = check({"all": Case(of_loss(loss), create(clip), only_t)}, make_batch=every)
    assert np.all(np.asarray(states["all"].params["t"]) != P0["t"])


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_batch_without_ids_moves_nothing(first):
    step = js.jit(of_loss(lambda p, ids: jnp.sum(p["t"][ids] ** 2) + jnp.sum(p["w"] ** 2)))
    state = copied(create(optax.adam(0.1)))
    if not first:
        state, _ = step(state, draw_ids(5))
    before = copied(state)
    state, value = step(state, jnp.zeros(0, jnp.int32))
    assert float(value) == float(jnp.sum(before.params["w"] ** 2))
    for name in ("t", "b"):
        np.testing.assert_array_equal(state.params[name], before.params[name])
        np.testing.assert_array_equal(state.opt_state[0].mu[name], before.opt_state[0].mu[name])
    assert np.all(np.asarray(state.params["w"] != before.params["w"]))


def test_an_empty_batch_in_other_reads_moves_nothing():
    """An empty vmap, which JAX runs as well, and empty bags in the same program."""

    def loss(p, ids):
        by_one = jax.vmap(lambda i: jnp.sum(p["t"][i] ** 2) + jnp.sum(p["b"][i]))(ids)
        return jnp.sum(by_one) + jnp.sum(js.embedding_bag(p["t"], ids[:, None]) @ p["w"]) + jnp.sum(p["w"] ** 2)

    step = js.jit(of_loss(loss))
    state, _ = step(copied(create(optax.adam(0.1))), draw_ids(5))
    before = copied(state)
    state, value = step(state, jnp.zeros(0, jnp.int32))
    assert float(value) == float(jnp.sum(before.params["w"] ** 2))
    for name in ("t", "b"):
        np.testing.assert_array_equal(state.params[name], before.params[name])
        np.testing.assert_array_equal(state.opt_state[0].nu[name], before.opt_state[0].nu[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_tables(dtype):
    """Sums of many duplicates are made in float32: in 16 bits, a thousand ones of bfloat16 would add up to 256."""
    step = js.jit(of_loss(lambda p, ids: jnp.sum(p["t"][ids].astype(jnp.float32))))
    state = copied(create(optax.sgd(1.0), {"t": jnp.zeros((V, D), dtype)}))
    state, _ = step(state, jnp.full(1000, 3))
    assert state.params["t"].dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(state.params["t"], float), -1000.0 * (np.arange(V) == 3)[:, None] * np.ones(D)
    )


# ---------------------------------------------------------------------------------------------------------------------
# which arrays belong to which table

P1 = {"t": normal(V, D), "u": normal(V, D), "c": normal(V), "w": normal(D, 3)}


def two_ids():
    return draw_ids(12, 4), draw_ids(7), normal(12)


def two_tables(ids, others, y):
    del y
    return {"t": ids, "u": others, "c": others}


def loss_of_two(p, ids, others, y):
    return (
        jnp.mean((p["t"][ids].sum(1) @ p["w"]).sum(1) * y)
        + jnp.mean(p["u"][others] ** 2)
        + jnp.mean(p["c"][others] ** 2)
    )


class WithMore(TrainState):
    ema: object = None
    freq: object = None


def with_averages(state, *batch):
    value, g = jax.value_and_grad(loss_of_two)(state.params, *batch)
    g = {**g, "t": g["t"] / state.freq["t"][:, None], "u": g["u"] / state.freq["t"][:, None]}
    state = state.apply_gradients(grads=g)
    return state.replace(ema=jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, state.params)), value


@pytest.mark.slow
def test_arrays_with_the_rows_of_a_table():
    """Slots, averages and masks; tables of one height that have other ids; a table that two reads share."""
    mask = optax.stateless(lambda u, p: {**u, "t": u["t"] * KEEP, "u": u["u"] * KEEP})
    more = WithMore.create(apply_fn=None, params=P1, tx=optax.adam(0.1), ema=P1, freq={"t": jnp.arange(1.0, V + 1)})

    def sampled(p, ids, others, y):
        scores = jax.nn.log_softmax(p["t"][ids].mean(1) @ p["t"][others].T)
        return jnp.mean(scores[:, 0] * y) + jnp.mean(p["c"][others])

    adamw = optax.adamw(0.05)
    check(
        {
            "two tables": Case(of_loss(loss_of_two), create(adamw, P1), two_tables),
            "one mask for two": Case(of_loss(loss_of_two), create(optax.chain(mask, adamw), P1), two_tables),
            "averages": Case(with_averages, more, lambda i, j, y: two_tables(i, j, y) | {"t": i, "u": j}),
            "two reads": Case(
                of_loss(sampled),
                create(adamw, {k: x for k, x in P1.items() if k != "u"}),
                lambda ids, others, y: {"t": np.r_[np.ravel(ids), np.ravel(others)], "c": others},
            ),
        },
        make_batch=two_ids,
    )


def test_counts_of_reads_that_the_state_keeps():
    def step(state, ids, y):
        state, value = STEP(state, ids, y)
        return state.replace(freq={"t": state.freq["t"].at[ids].add(1.0)}), value

    state = WithMore.create(apply_fn=None, params=P0, tx=optax.adam(0.1), freq={"t": jnp.zeros(V)})
    check({"counts": Case(step, state)})


TIED = {
    "softmax": lambda z, ids: optax.softmax_cross_entropy_with_integer_labels(z, ids[:, 0]).mean(),
    "sigmoid": lambda z, ids: jnp.mean(jax.nn.softplus(z)),
}


@pytest.mark.parametrize("tied", slow_but(["softmax"], TIED))
def test_a_table_that_is_used_as_a_whole_is_dense_and_announced(tied):
    def loss(p, ids, y):
        return TIED[tied](p["t"][ids].mean(1) @ p["t"].T, ids) + jnp.mean(p["b"][ids])

    case = Case(of_loss(loss), create(optax.adamw(0.1)), lambda ids, y: {"b": ids})
    with pytest.warns(UserWarning, match=r"params\['t'\] is dense, with its slots: reduce_\w+ at"):
        check({"tied": case})


def test_a_step_without_tables_says_so():
    step = js.jit(of_loss(lambda p, x: jnp.mean((x @ p["w"]) ** 2)))
    with pytest.warns(UserWarning, match="no array of the state is read by rows"):
        step(copied(create(optax.sgd(0.1), {"w": normal(D, 3)})), normal(4, D))


# ---------------------------------------------------------------------------------------------------------------------
# regions, norms, metrics


def cond_step(state, *batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
    return jax.lax.cond(value > -1e9, lambda s: s.apply_gradients(grads=grads), lambda s: s, state), value


def never_step(state, *batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
    return jax.lax.cond(value > 1e9, lambda s: s.apply_gradients(grads=grads), lambda s: s, state), value


def accumulating(state, ids, y):
    def one(total, part):
        value, grads = jax.value_and_grad(loss_fn)(state.params, *part)
        return jax.tree.map(jnp.add, total, grads), value

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    total, values = jax.lax.scan(one, zeros, (ids.reshape(3, -1, 4), y.reshape(3, -1)))
    return state.apply_gradients(grads=jax.tree.map(lambda g: g / 3, total)), values.mean()


def accumulating_fori(state, ids, y):
    def one(n, total):
        part = jax.lax.dynamic_slice(ids, (4 * n, 0), (4, 4)), jax.lax.dynamic_slice(y, (4 * n,), (4,))
        return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(state.params, *part))

    total = jax.lax.fori_loop(0, 3, one, jax.tree.map(jnp.zeros_like, state.params))
    return state.apply_gradients(grads=total), jnp.float32(0)


def per_example(state, ids, y):
    grads = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(state.params, ids[:, None], y[:, None])
    return state.apply_gradients(grads=jax.tree.map(lambda x: x.mean(0), grads)), jnp.float32(0)


def halving(state, *batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
    norm = optax.tree.norm(grads)
    half = lambda c: (jax.tree.map(lambda x: x / 2, c[0]), c[1] / 2)  # noqa: E731
    grads, _ = jax.lax.while_loop(lambda c: c[1] > 0.05, half, (grads, norm))
    return state.apply_gradients(grads=grads), value


def sam_step(state, *batch):
    grads = jax.grad(loss_fn)(state.params, *batch)
    norm = optax.tree.norm(grads)
    moved = jax.tree.map(lambda p, g: p + 0.05 * g / norm, state.params, grads)
    return state.apply_gradients(grads=jax.grad(loss_fn)(moved, *batch)), norm


def opaque_sam_step(state, *batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
    updates, opt_state = state.tx.update(
        grads, state.opt_state, state.params, grad_fn=lambda p, _: jax.grad(loss_fn)(p, *batch)
    )
    return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), value


def remat_in_scan(p, ids, y):
    turn = jax.checkpoint(lambda h, j: (jnp.tanh(h + p["t"][j]), 0))
    return jax.lax.scan(turn, jnp.zeros((12, D)), ids.T)[0].sum() + p["b"][ids[:, 0]].sum() + 0 * y[0]


def two_words(state, *batch):
    value, grads = js.value_and_grad(loss_fn)(state.params, *batch)
    return state.apply_gradients(grads=grads), value


def with_metrics(state, *batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
    t = grads["t"]
    norms = jax.tree.map(jnp.linalg.norm, grads)
    metrics = {
        "loss": value,
        "norms": norms,
        "largest": jnp.abs(t).max(),
        "mean": t.mean(0),
        "sum": (t**2 + 1e-3).sum(0),
    }
    return state.apply_gradients(grads=grads), metrics


STEPS = {
    "cond": (cond_step, optax.adam(0.1)),
    "cond, not taken": (never_step, optax.adam(0.1)),
    "accumulation in a scan": (accumulating, optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))),
    "accumulation in a fori_loop": (accumulating_fori, optax.adam(0.1)),
    "a gradient for each example": (per_example, optax.adam(0.1)),
    "while over gradients": (halving, optax.adam(0.1)),
    "SAM by hand": (sam_step, optax.adam(0.1)),
    "SAM, opaque": (
        opaque_sam_step,
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2, opaque_mode=True),
    ),
    "remat": (of_loss(jax.checkpoint(loss_fn)), optax.adam(0.1)),
    "remat in a scan": (of_loss(remat_in_scan), optax.adam(0.1)),
    "jit inside": (jax.jit(STEP), optax.adam(0.1)),
    "metrics": (with_metrics, optax.adam(0.1)),
}


@EVERY_ROAD
def test_steps(transform):
    check({name: Case(step, create(tx)) for name, (step, tx) in STEPS.items()}, transform)


@pytest.mark.slow
def test_two_words_do_nothing_of_their_own():
    """js.value_and_grad and js.lazy, which choose rows themselves, have nothing to do in such a step."""
    words, stock = js.jit(two_words), js.jit(STEP)
    state, wanted = copied(create(js.lazy(optax.adam(0.1)))), copied(create(optax.adam(0.1)))
    for _ in range(3):
        arrays = batch()
        (state, _), (wanted, _) = words(state, *arrays), stock(wanted, *arrays)
    compare("params", state.params, wanted.params, 0)
    compare("slots", state.opt_state, wanted.opt_state, 0)


@pytest.mark.slow  # test_steps has accumulation against the dense step
def test_accumulation_is_one_big_batch():
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    big, small = copied(create(tx)), copied(create(tx))
    one, many = js.jit(STEP), js.jit(accumulating)
    for _ in range(3):
        arrays = batch()
        (big, _), (small, _) = one(big, *arrays), many(small, *arrays)
    compare("accumulated", small, big, 1e-5)


@pytest.mark.slow
def test_sums_over_a_whole_table_are_right_and_announced():
    def penalized(p, *batch):
        return loss_fn(p, *batch) + 1e-3 * jnp.sqrt(jnp.sum(p["t"] ** 2))

    def step(state, *batch):
        norm = optax.tree.norm(state.params)
        state, value = of_loss(penalized)(state, *batch)
        return state, (value, norm)

    # the penalty's gradient reaches all rows; on rows that are left alone it does nothing
    with pytest.warns(UserWarning, match="reduce_sum at .* is over all rows of a table"):
        check({"penalized": Case(step, create(optax.adam(0.1)))})


@pytest.mark.slow
def test_value_for_schedules_that_need_it():
    def step(state, *batch):
        value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), value

    plateau = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, accumulation_size=1))
    check({"reduce_on_plateau": Case(step, create(plateau))})


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def with_optimizer(tx):
    return STEP, create(tx)


SCALED = "an update that is scaled by a sum over all rows of a table"
KEPT = "a sum over all rows of what is kept in the state"
ROUND = "a counter that goes round"
REFUSED = {
    "lamb": (*with_optimizer(optax.lamb(0.1)), SCALED),
    "lars": (*with_optimizer(optax.lars(0.1)), SCALED),
    "adafactor": (*with_optimizer(optax.adafactor(0.1)), SCALED),
    "adafactor, factored": (
        STEP,
        create(optax.adafactor(0.1), {"t": normal(V + 200, 130), "b": P0["b"], "w": normal(130, 3)}),
        SCALED,
    ),
    "dog": (*with_optimizer(optax.contrib.dog(0.1)), SCALED),
    "dowg": (*with_optimizer(optax.contrib.dowg(0.1)), SCALED),
    "fromage": (*with_optimizer(optax.fromage(0.1)), SCALED),
    "scale_by_param_block_rms": (
        *with_optimizer(optax.chain(optax.scale_by_param_block_rms(), optax.sgd(0.1))),
        SCALED,
    ),
    "adaptive_grad_clip": (*with_optimizer(optax.chain(optax.adaptive_grad_clip(0.1), optax.adam(0.1))), SCALED),
    "prodigy": (*with_optimizer(optax.contrib.prodigy(0.1)), KEPT),
    "dadapt_adamw": (*with_optimizer(optax.contrib.dadapt_adamw(0.1)), KEPT),
    "clip after momentum": (*with_optimizer(optax.chain(optax.trace(0.9), optax.clip_by_global_norm(0.05))), KEPT),
    "sm3": (*with_optimizer(optax.sm3(0.1)), "state made of a sum over the rows of an update"),
    "muon": (*with_optimizer(optax.contrib.muon(0.1)), "dot_general"),
    "MultiSteps": (*with_optimizer(optax.MultiSteps(optax.adam(0.1), 2)), ROUND),
    "apply_every": (*with_optimizer(optax.chain(optax.adam(0.1), optax.apply_every(2))), ROUND),
    "SAM over two steps": (*with_optimizer(optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)), ROUND),
    "ravel": (*with_optimizer(on_updates(lambda u: u.ravel().reshape(V, D))), "reshape"),
    "vdot": (*with_optimizer(on_updates(lambda u: u * jnp.vdot(u, u))), "reshape"),
    "roll": (*with_optimizer(on_updates(lambda u: jnp.roll(u, 1, 0))), "slice"),
    "some rows": (*with_optimizer(on_updates(lambda u: u.at[: V // 2].multiply(2.0))), "scatter"),
    "argmax": (*with_optimizer(on_updates(lambda u: u * jnp.argmax(u[:, 0]))), "argmax"),
    "map over rows": (*with_optimizer(on_updates(lambda u: jax.lax.map(lambda row: row * 2, u))), "scan"),
    "a norm of the new table": (
        lambda s, *b: (lambda new, value: (new, (value, optax.tree.norm(new.params))))(*STEP(s, *b)),
        create(optax.adam(0.1)),
        KEPT,
    ),
    "the new table as a metric": (
        lambda s, *b: (lambda new, value: (new, (value, new.params["t"] * 2)))(*STEP(s, *b)),
        create(optax.adam(0.1)),
        "not where a table or slot was",
    ),
    "two steps": (
        lambda s, ids, y: STEP(STEP(s, ids[:6], y[:6])[0], ids[6:], y[6:]),
        create(optax.adam(0.1)),
        "rows that are read after an update by other ids than before it",
    ),
    "a scan over steps": (
        lambda s, ids, y: jax.lax.scan(lambda s, b: STEP(s, *b), s, (ids.reshape(3, -1, 4), y.reshape(3, -1))),
        create(optax.adam(0.1)),
        "make it the body of the scan",
    ),
    "ids made of new rows": (
        lambda s, *b: (lambda new, value: (new, value + new.params["b"][jnp.argmax(new.params["t"][b[0]], -1)].sum()))(
            *STEP(s, *b)
        ),
        create(optax.adam(0.1)),
        "row ids that depend on rows that the step has changed",
    ),
    "ids made of a gradient": (
        lambda t, ids, _: step_by_gradients(t, ids, lambda g: g),
        jnp.ones((50, 2)),
        "row ids that depend on rows that the step has changed",
    ),
    "ids made of gradients added up": (
        lambda t, ids, _: step_by_gradients(
            t, ids, lambda g: jax.lax.scan(lambda s, _: (s + g, None), 0 * g, None, 2)[0]
        ),
        jnp.ones((50, 2)),
        "row ids that depend on rows that the step has changed",
    ),
}


def step_by_gradients(t, ids, change):
    """Whose second gradient is of rows that the values of the first one name."""
    first = change(jax.grad(lambda t: jnp.sum(t[ids]))(t))
    others = jnp.where(first.sum() > 0, ids, ids + 1)
    return t - first - jax.grad(lambda t: jnp.sum(t[others]))(t)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    step, state, why = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dense tables are announced on the way
        with pytest.raises(ValueError, match="must be one that is right on the rows") as refusal:
            js.jit(step).lower(state, *batch())
    assert why in str(refusal.value)


def test_a_refusal_names_the_line():
    step = of_loss(loss_fn)
    tx = on_updates(lambda u: u * jnp.argmax(u[:, 0]))  # this line
    with pytest.raises(ValueError, match=r"argmax at .*test_rowwise.py:\d+ \(.*<lambda>"):
        js.jit(step).lower(create(tx), *batch())


def test_a_metric_of_gradients_is_reduced_or_refused_with_what_to_do():
    def step(state, ids, metric):
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(p["t"][ids])))(state.params)
        return state.apply_gradients(grads=grads), metric(grads["t"])

    def right(g):
        return jnp.stack([f(g) for f in (jnp.mean, jnp.std, jnp.max, jnp.min, jnp.linalg.norm, jax.nn.logsumexp)])

    ids, start = jnp.array([3, 9, 3]), create(optax.sgd(0.1))
    _, want = jax.jit(step, static_argnums=2)(start, ids, right)
    _, got = js.jit(step, static_argnums=2)(copied(start), ids, right)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for metric in (
        lambda g: jnp.sort(g[:, 0])[-3:],
        lambda g: g.cumsum(0)[-1],
        lambda g: g.sum(1).argmax(),
        lambda g: g[7],
    ):
        with pytest.raises(ValueError, match=r" at .*test_rowwise.py:\d+ .*Of a metric .* max and min over rows"):
            js.jit(step, static_argnums=2).lower(start, ids, metric)


def test_a_step_that_returns_no_state():
    def total(state, ids):
        return jnp.sum(state["t"][ids])

    with pytest.raises(TypeError, match="returns its new state"):
        js.jit(total, donate_argnums=0).lower({"t": P0["t"]}, draw_ids(3))
    with pytest.warns(UserWarning, match="no argument comes back as an output"):
        assert js.jit(total)({"t": P0["t"]}, np.array([3, 3])) == 2 * jnp.sum(P0["t"][3])
    with pytest.raises(TypeError, match="state_argnums"):
        js.rowwise(STEP, state_argnums=5)(create(optax.sgd(0.1)), *batch())


def test_ids_from_a_callback_are_refused():
    def loss(p, n):
        drawn = jax.experimental.io_callback(
            lambda: np.arange(3, dtype=np.int32), jax.ShapeDtypeStruct((3,), jnp.int32)
        )
        return jnp.sum(p["t"][drawn]) * n

    with pytest.raises(ValueError, match="row ids that come from a callback"):
        jax.make_jaxpr(js.rowwise(of_loss(loss)))(create(optax.sgd(0.1)), 1.0)
    with pytest.raises(ValueError, match="row ids that come from a callback"):
        js.jit(of_loss(loss)).lower(create(optax.sgd(0.1)), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# programs of many steps, and devices

CLIPPED_ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))


def test_the_body_of_a_scan_over_batches():
    ids, y = draw_ids(3, 12, 4), normal(3, 12)

    @jax.jit
    def many(state, ids, y):
        return jax.lax.scan(lambda s, b: js.rowwise(STEP)(s, *b), state, (ids, y))

    state, values = many(create(CLIPPED_ADAM), ids, y)
    wanted = create(CLIPPED_ADAM)
    for n in range(3):
        new, value = jax.jit(STEP)(wanted, ids[n], y[n])
        wanted = put_back(new, wanted, both_tables(ids[n], y[n]))
        np.testing.assert_allclose(values[n], value, rtol=1e-5)
    compare("scan", state, wanted, 1e-5)


def pmean_step(state, *batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, *batch)
    return state.apply_gradients(grads=jax.lax.pmean(grads, "d")), jax.lax.pmean(value, "d")


def pmean_loss_step(state, *batch):
    return of_loss(lambda p, *b: jax.lax.pmean(loss_fn(p, *b), "d"))(state, *batch)


def pmapped(mesh):
    run = jax.pmap(js.rowwise(pmean_step), axis_name="d", devices=list(mesh.devices), donate_argnums=0)
    many = mesh.devices.size
    return (
        lambda s, *b: run(s, *(x.reshape(many, -1, *x.shape[1:]) for x in b)),
        lambda s: jax.tree.map(lambda x: jnp.stack([x] * many), s),
    )


def shard_mapped(step, check_vma):
    def make(mesh):
        inside = jax.shard_map(
            js.rowwise(step), mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=(P(), P()), check_vma=check_vma
        )
        return jax.jit(inside, donate_argnums=0), lambda s: jax.device_put(s, NamedSharding(mesh, P()))

    return make


def split_batch(mesh):
    run = js.jit(STEP)
    split = lambda x: jax.device_put(x, NamedSharding(mesh, P("d")))  # noqa: E731
    return lambda s, *b: run(s, *map(split, b)), lambda s: jax.device_put(s, NamedSharding(mesh, P()))


DEVICES = {
    "pmap": pmapped,
    "shard_map, unchecked": shard_mapped(pmean_step, check_vma=False),
    "shard_map": shard_mapped(pmean_loss_step, check_vma=True),
    "js.jit, batch split": split_batch,
}


@pytest.mark.parametrize("name", slow_but(["shard_map"], DEVICES))
def test_devices(name):
    """Replicas are bit-equal, and what one device makes of the whole batch."""
    run, spread = DEVICES[name](Mesh(np.array(jax.devices()[:4]), "d"))
    state, wanted = spread(copied(create(CLIPPED_ADAM))), create(CLIPPED_ADAM)
    dense = jax.jit(STEP)
    for _ in range(2):
        arrays = batch()
        state, _ = run(state, *arrays)
        new, _ = dense(wanted, *arrays)
        wanted = put_back(new, wanted, both_tables(*arrays))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        parts = [np.asarray(shard.data).reshape(np.shape(y)) for shard in x.addressable_shards]
        for part in parts[1:]:
            np.testing.assert_array_equal(part, parts[0])
        np.testing.assert_allclose(parts[0], y, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# what the compiled program makes

NUM_ROWS = 20_000
LARGE = {
    "clip, adam": (STEP, CLIPPED_ADAM),
    "apply_if_finite": (STEP, optax.apply_if_finite(optax.adam(0.1), 3)),
    "accumulation": (accumulating, CLIPPED_ADAM),
    "cond": (cond_step, optax.adam(0.1)),
    "SAM": (sam_step, optax.adam(0.1)),
    "remat": (of_loss(jax.checkpoint(loss_fn)), optax.adamw(0.1)),
    "two words": (two_words, js.lazy_adam(0.1)),
}


@EVERY_ROAD
@pytest.mark.parametrize("name", slow_but(["clip, adam"], LARGE))
def test_nothing_of_the_tables_size(name, transform):
    assert not large_arrays(compiled_step(name, transform, 12), NUM_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["clip, adam"], LARGE))
def test_in_pieces_nothing_of_the_tables_size(name, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 0)
    text = compiled_step(name, js.jit, 84)
    assert not large_arrays(text, NUM_ROWS)
    assert "dynamic-slice" in text  # of a piece


def compiled_step(name, transform, num_examples):
    step, tx = LARGE[name]
    params = {
        "t": jax.ShapeDtypeStruct((NUM_ROWS, D), jnp.float32),
        "b": jax.ShapeDtypeStruct((NUM_ROWS,), jnp.float32),
    }
    params["w"] = jax.ShapeDtypeStruct((D, 3), jnp.float32)
    state = jax.eval_shape(lambda p: create(tx, p), params)
    ids, y = (jax.ShapeDtypeStruct((num_examples, *s), t) for s, t in (((4,), jnp.int32), ((), jnp.float32)))
    return compiled_by_default(transform(step).lower(state, ids, y)).as_text()


@pytest.mark.slow
def test_a_scan_of_steps_makes_nothing_of_the_tables_size():
    @jax.jit
    def many(state, ids, y):
        return jax.lax.scan(lambda s, b: js.rowwise(STEP)(s, *b), state, (ids, y))

    params = {
        "t": jax.ShapeDtypeStruct((NUM_ROWS, D), jnp.float32),
        "b": jax.ShapeDtypeStruct((NUM_ROWS,), jnp.float32),
    }
    params["w"] = jax.ShapeDtypeStruct((D, 3), jnp.float32)
    state = jax.eval_shape(lambda p: create(optax.adam(0.1), p), params)
    ids, y = jax.ShapeDtypeStruct((3, 12, 4), jnp.int32), jax.ShapeDtypeStruct((3, 12), jnp.float32)
    program = compiled_by_default(jax.jit(many, donate_argnums=0).lower(state, ids, y))
    assert not large_arrays(program.as_text(), NUM_ROWS)


# ---------------------------------------------------------------------------------------------------------------------
# what a review by someone else found


def sgd(loss):
    def step(state, *batch):
        value, grads = jax.value_and_grad(loss)(state, *batch)
        return jax.tree.map(lambda x, g: x - 0.1 * g, state, grads), value

    return step


pooled = jax.jit(lambda x: x.mean(1))
scaled = jax.jit(lambda x, s: jnp.tanh(x.sum(1)) * s)
doubled = jax.custom_jvp(lambda x: x.sum(1) * 2)
doubled.defjvp(lambda x, t: (doubled(x[0]), t[0].sum(1) * 2))
FORWARD, BACKWARD = (jnp.arange(V) * 2) % V, jnp.arange(V)[::-1]


def permuted(order, ids):
    return jax.lax.map(jax.jit(lambda i: order[i]), ids)


COLUMNS = jnp.array([1, -100, 0, D + 3] * 3)
FOUND = {
    "a sum in a jit": lambda p, i, y: pooled(p["t"][i]).sum(),
    "a sum in a jit of two": lambda p, i, y: scaled(p["t"][i], 2.0).sum(),
    "a sum in a custom_jvp": lambda p, i, y: doubled(p["t"][i]).sum(),
    "columns out of range": lambda p, i, y: jnp.sum(p["t"][i[:, 0], COLUMNS] ** 2),
    "columns of a dynamic_slice": lambda p, i, y: jnp.sum(
        jax.vmap(lambda j: jax.lax.dynamic_slice(p["t"], (j, D - 1), (1, 2)))(i[:, 0]) ** 2
    ),
    "the largest id, clipped": lambda p, i, y: jnp.sum(p["t"].at[i.at[0, 0].set(2**31 - 1)].get(mode="clip")),
}


def test_reads_of_the_review():
    def touched(name):
        def of(ids, y):
            del y
            ids = np.array(ids)
            if "largest" in name:
                ids[0, 0] = V - 1
            return {"t": ids[:, 0] if "columns" in name else ids}

        return of

    cases = {name: Case(sgd(loss), {"t": P0["t"]}, touched(name)) for name, loss in FOUND.items()}
    check(cases)


def test_ids_that_look_alike_are_not_the_same():
    def loss(p, ids, y):
        return jnp.sum(p["t"][permuted(FORWARD, ids)]) + jnp.sum(p["t"][permuted(BACKWARD, ids)] ** 2) * y[0]

    def touched(ids, y):
        return {"t": np.r_[np.ravel(FORWARD[ids]), np.ravel(BACKWARD[ids])]}

    check({"permuted": Case(sgd(loss), {"t": P0["t"]}, touched)})


def test_padding_is_no_row():
    """Rows of what is not known outside of a block are zeros at its end: 0 / 0 there is no NaN in a norm."""

    def step(state, ids, y):
        g = jax.grad(lambda t: jnp.sum(t[ids] ** 2))(state["t"])
        g = g / state["t count"][:, None]
        norm = jnp.sqrt(jnp.sum(g**2))
        finite = jnp.all(jnp.isfinite(g))
        return {"t": state["t"] - finite * 0.1 * g / jnp.maximum(1, norm), "t count": state["t count"]}, norm

    def by_products(state, ids, y):
        g = jax.grad(lambda t: jnp.sum(t[ids] ** 2))(state["t"])
        total = state["t acc"] + jnp.sum(g**2, 1)
        share = jnp.einsum("vd,v->vd", g, jax.lax.rsqrt(total))
        norm = jnp.sqrt(jnp.sum(share**2))
        return {"t": state["t"] - 0.1 * share / jnp.maximum(1, norm), "t acc": total}, norm

    start = {"t": P0["t"], "t acc": jnp.ones(V)}
    check({"products": Case(by_products, start, lambda ids, y: {"t": ids, "t acc": ids})})
    check({"counts": Case(step, {"t": P0["t"], "t count": jnp.arange(1.0, V + 1)}, lambda ids, y: {"t": ids})})


def test_a_square_table_read_by_columns():
    tx, table = optax.adam(0.1), normal(V, V)

    def step(state, ids, y):
        value, g = jax.value_and_grad(lambda t: jnp.sum(t.T[:, ids] ** 2))(state["t"])
        updates, slots = tx.update(g, state["t slots"], state["t"])
        return {"t": optax.apply_updates(state["t"], updates), "t slots": slots}, value

    start = {"t": table, "t slots": tx.init(table)}
    check({"square": Case(step, start, lambda ids, y: {"t": ids, "t slots": ids}, tol=1e-4)})


def test_the_state_among_outputs_that_look_like_it():
    def step(state, ids, y):
        value, g = jax.value_and_grad(lambda t: jnp.sum(t[ids] ** 2))(state["t"])
        return {"t": value, "n": state["n"]}, {"t": state["t"] - 0.1 * g, "n": state["n"] + 1}

    ids, y = batch()
    metrics, state = js.jit(step)({"t": jnp.array(P0["t"]), "n": 0}, ids, y)
    want_metrics, want = jax.jit(step)({"t": P0["t"], "n": 0}, ids, y)
    compare("metrics", metrics, want_metrics, 1e-5)
    compare("state", state, want, 1e-5)


def test_a_whole_array_in_two_branches():
    def step(t, ids, y):
        twice = t * 2
        norm = jax.lax.cond(y[0] > 0, lambda: jnp.sum(twice) * 1e-3, lambda: jnp.sum(twice) * 2e-3)
        value, g = jax.value_and_grad(lambda t: jnp.sum(t[ids] ** 2))(t)
        return t - 0.1 * g, (value, norm)

    ids, y = batch()
    with pytest.warns(UserWarning, match="is over all rows of a table"):
        got = js.jit(step)(jnp.array(P0["t"]), ids, y)
    compare("branches", got, jax.jit(step)(P0["t"], ids, y), 1e-5)


def test_copies_into_the_state():
    def step(state, ids, y):
        value, g = jax.value_and_grad(lambda t: jnp.sum(t[ids] ** 2))(state["t"])
        new = state["t"] - 0.1 * g
        return {"t": new, "t target": new}, value

    start = {"t": P0["t"], "t target": P0["t"] * 0}
    check({"target": Case(step, start, lambda ids, y: {"t": ids, "t target": ids})})


def test_an_output_that_copies_a_table_is_announced():
    def step(t, ids, y):
        return t - 0.1 * jax.grad(lambda t: jnp.sum(t[ids] ** 2))(t), t

    with pytest.warns(UserWarning, match="output 1 is a copy of a whole table"):
        _, old = js.jit(step)(jnp.array(P0["t"]), *batch())
    np.testing.assert_array_equal(old, P0["t"])


COUNTERS = {
    "a pointer": (lambda n: (n + 1) % 5, lambda n, g: g, True),
    "a cyclic rate": (lambda n: (n + 1) % 100, lambda n, g: jnp.where(n < 10, 0.1, 0.01) * g, True),
    "a warm start": (lambda n: jnp.where(n < 9, n + 1, 9), lambda n, g: jnp.where(n < 9, g, 2 * g), True),
    "off in some steps": (lambda n: (n + 1) % 3, lambda n, g: jnp.where(n == 0, 1.0, 0.0) * g, False),
    "one of two": (lambda n: (n + 1) % 2, lambda n, g: jax.lax.switch(n % 2, [lambda: g, lambda: 0 * g]), False),
    "every third step": (lambda n: jnp.where(n == 2, 0, n + 1), lambda n, g: jnp.where(n == 2, g, 0), False),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_counters(name):
    count, change, is_right = COUNTERS[name]
    data = jnp.arange(15).reshape(5, 3)

    def step(state, ids, y):
        rows = data[state["n"]] if name == "a pointer" else ids
        value, g = jax.value_and_grad(lambda t: jnp.sum(t[rows] ** 2))(state["t"])
        return {"t": state["t"] - 0.1 * change(state["n"], g), "n": count(state["n"])}, value

    state = {"t": P0["t"], "n": jnp.int32(1)}
    if is_right:
        got, want = js.jit(step)(copied(state), *batch()), jax.jit(step)(state, *batch())
        assert jax.tree.structure(got) == jax.tree.structure(want)
    else:
        with pytest.raises(ValueError, match="a counter that goes round"):
            js.jit(step).lower(state, *batch())


def test_sums_of_slots_are_announced_or_refused():
    """What frozen rows would add to a sum over all rows is not in it."""

    def step(state, ids, y, keep):
        g = jax.grad(lambda t: jnp.sum(t[ids] ** 2))(state["t"])
        m = 0.9 * state["m"] + 0.1 * g
        inner = jnp.sum(m * state["t"])
        return {"t": state["t"] - 0.1 * m, "m": m, "d": state["d"] + (inner if keep else 0)}, inner

    state = {"t": P0["t"], "m": P0["t"], "d": jnp.float32(0)}
    with pytest.warns(UserWarning, match="is over the rows that are read"):
        js.jit(lambda *args: step(*args, keep=False)).lower(state, *batch())
    with pytest.raises(ValueError, match="state made of a sum over the rows of an update"):
        js.jit(lambda *args: step(*args, keep=True)).lower(state, *batch())


def test_a_number_that_is_updated_beside_a_clipped_table():
    def loss(p, ids, y):
        return loss_fn(p, ids, y) + p["z"] ** 2

    tx = optax.chain(optax.adam(0.1), optax.clip_by_global_norm(0.05))
    state = copied(create(tx, {**P0, "z": jnp.float32(1)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new, _ = js.jit(of_loss(loss))(state, *batch())
    assert 0 < 1 - float(new.params["z"]) < 0.1


def test_numpy_arrays_with_a_row_for_each_of_a_tables():
    mask = np.asarray(KEEP)
    loss = lambda p, ids, y: jnp.sum(p["t"][ids] ** 2)  # noqa: E731

    def step(state, ids, y):
        value, g = jax.value_and_grad(loss)(state, ids, y)
        return {"t": state["t"] - 0.1 * g["t"] * mask}, value

    check({"mask": Case(step, {"t": P0["t"]}, only_t)})


def test_ids_made_with_numbers_that_print_alike():
    x = jnp.array([1e5, 7e5, 3e6, 9e6])
    near = [0.00012345611, 0.00012345689]

    def made(scale):
        return jnp.floor(x * scale * 1e3).astype(jnp.int32) % V

    def loss(p, ids, y):
        return jnp.sum(p["t"][made(near[0])] ** 2) + jnp.sum(p["t"][made(near[1])] ** 3)

    assert np.any(np.asarray(made(near[0]) != made(near[1])))
    check({"near": Case(sgd(loss), {"t": P0["t"]}, lambda ids, y: {"t": np.r_[made(near[0]), made(near[1])]})})


def test_unsigned_ids_out_of_range():
    loss = lambda p, ids, y: jnp.sum(jnp.take(p["t"], ids, axis=0, mode="clip") ** 3)  # noqa: E731
    state, _ = js.jit(sgd(loss))({"t": jnp.array(P0["t"])}, np.array([4_000_000_000], np.uint32), 0.0)
    moved = np.flatnonzero(np.any(np.asarray(state["t"] != P0["t"]), axis=1))
    assert moved.tolist() == [V - 1]


def test_barriers_and_bits():
    def rounded(u):
        bits = jax.lax.bitcast_convert_type(u, jnp.uint32) & jnp.uint32(0xFFFF0000)
        return jax.lax.optimization_barrier((jax.lax.bitcast_convert_type(bits, jnp.float32), 0))[0]

    check({"rounded": Case(STEP, create(on_updates(rounded)), tol=1e-2)})


def test_complex_tables():
    def step(t, ids, y):
        value, g = jax.value_and_grad(lambda t: jnp.sum(jnp.abs(t[ids]) ** 2))(t)
        return t - 0.1 * jnp.conj(g), value

    table, arrays = P0["t"] + 1j, batch()
    compare("complex", js.jit(step)(jnp.array(table), *arrays)[0].real, jax.jit(step)(table, *arrays)[0].real, 1e-5)


@pytest.mark.slow  # JAX caches nothing while it looks
def test_nothing_leaks():
    with jax.checking_leaks():
        js.jit(STEP)(copied(create(optax.adam(0.1))), *batch())


@pytest.mark.slow
@pytest.mark.cpu("elsewhere there are no pieces")
def test_vmap_of_a_step_that_is_written_in_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 0)
    tx, num_ids = optax.adam(0.1), (300, 40)  # of two ensemble members: the second needs fewer pieces

    def step(state, ids):
        table, opt_state = state
        value, g = jax.value_and_grad(lambda table: jnp.sum(jnp.sin(table[ids]) ** 2))(table)
        updates, opt_state = tx.update(g, opt_state, table)
        return (optax.apply_updates(table, updates), opt_state), value

    tables = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2000, 3)), jnp.float32)
    states = tables, jax.vmap(tx.init)(tables)
    ids = jnp.stack([jnp.arange(300) * 5 % (n * 5) for n in num_ids])
    together = jax.jit(jax.vmap(js.rowwise(step)))
    assert "while" in together.lower(states, ids).as_text()
    got = together(states, ids)
    for k in range(2):
        alone = jax.jit(js.rowwise(step))(jax.tree.map(lambda x, k=k: x[k], states), ids[k])
        compare("member", jax.tree.map(lambda x, k=k: x[k], got), alone, 1e-6)


def test_a_method():
    class Trainer:
        scale = 0.5

        @functools.partial(js.jit, static_argnums=0, donate_argnums=1)
        def step(self, t, ids):
            return t - self.scale * jax.grad(lambda t: jnp.sum(t[ids]))(t)

    new = Trainer().step(jnp.zeros((V, D)), jnp.array([3]))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(new)[:, 0]), [3])
