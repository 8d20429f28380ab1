"""A large table that is dense though its rows might be read: said once for each table and line, with what to do."""

import pathlib
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js
from jaxsparse.trace import planning

ROWS = 1 << 16  # the fewest that are worth a warning
IDS = np.array([3, 0, 3])


def one_hot(t, ids):
    return jnp.sum((jax.nn.one_hot(ids, ROWS) @ t) ** 2)  # one_hot


def no_axis(t, ids):
    return jnp.sum(jnp.take(t, 2 * ids) ** 2)  # no_axis


def static(t, ids):
    return jnp.sum(t[2:9] ** 2) + ids.sum()  # static


def tied(t, ids):
    return jnp.sum(jax.nn.logsumexp(t[ids] @ t.T, axis=-1))  # tied


def output_layer(t, ids):
    return jnp.sum(jnp.ones((len(ids), 2), t.dtype) @ t.T) ** 2  # output_layer


def in_scan(t, ids):
    def each(c, i):
        return (c + jnp.sum((jax.nn.one_hot(i, ROWS) @ t) ** 2), None)  # in_scan

    return jax.lax.scan(each, 0.0, ids)[0]


def tied_in_scan(t, ids):
    def each(c, i):
        return (c + jax.nn.logsumexp(t[i] @ t.T), None)  # tied_in_scan

    return jax.lax.scan(each, 0.0, ids)[0]


def carried(t, ids):
    def each(c, i):
        return ((c[0], c[1] + jax.nn.logsumexp(c[0][i] @ c[0].T)), None)  # carried

    return jax.lax.scan(each, (t, 0.0), ids)[0][1]


def in_remat(t, ids):
    def each(t):
        return jnp.sum((jax.nn.one_hot(ids, ROWS) @ t) ** 2)  # in_remat

    return jax.checkpoint(each)(t)


def in_cond(t, ids):
    def each(t):
        return jnp.sum((jax.nn.one_hot(ids, ROWS) @ t) ** 2)  # in_cond

    return jax.lax.cond(jnp.asarray(ids)[0] > 0, each, lambda t: 0.0, t)


def set_before(t, ids):
    return jnp.sum(t.at[:, 1].set(0.0)[ids] ** 2)  # set_before


def summed_before(t, ids):
    return jnp.sum(jnp.cumsum(t, 0)[ids] ** 2)  # summed_before


def sorted_before(t, ids):
    return jnp.sum(jnp.flip(jnp.sort(t, 0), 0)[ids] ** 2)  # sorted_before


TAKE = r"jnp\.take\(table, ids, axis=0\)"
ONE_HOT = rf"dot_general at .* If .* one-hot, read rows, {TAKE}; if it is sparse, js\.dot takes it as a BCOO\.$"
TIED = r"(reduce_\w+|dot_general) at .* For an output layer, js\.sampled_softmax computes the logits of few rows\.$"
ADVICE = {
    one_hot: ONE_HOT,
    no_axis: rf"reshape at .* Read rows by ids, {TAKE}\.$",
    static: rf"slice at .* Read rows by ids, {TAKE}\.$",
    tied: TIED,
    output_layer: r"dot_general at .* For an output layer, js\.sampled_softmax computes the logits of few rows\.$",
    in_scan: ONE_HOT,
    in_remat: ONE_HOT,
    in_cond: ONE_HOT,
    tied_in_scan: TIED,
    carried: TIED,
    set_before: rf"gather at .* Read rows by ids, {TAKE}\.$",
    summed_before: rf"gather at .* Read rows by ids, {TAKE}\.$",
    sorted_before: rf"gather at .* Read rows by ids, {TAKE}\.$",
}


def sgd(loss):
    def step(params, ids):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(lambda p: loss(p["t"], ids))(params))

    return step


class Table(nnx.Module):
    def __init__(self):
        self.t = nnx.Param(jnp.ones((ROWS, 2)))


def nnx_step(loss):
    def step(model, optimizer, ids):
        optimizer.update(model, nnx.grad(lambda model: loss(model.t[...], ids))(model))

    model = Table()
    js.nnx.jit(step).lower(model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param), IDS)


def of_params(loss):
    return lambda params, ids: loss(params["t"], ids)


PARAMS = {"t": jax.ShapeDtypeStruct((ROWS, 2), jnp.float32)}
ENTRIES = {  # traced only
    "js.jit": (lambda loss: js.jit(sgd(loss)).lower(PARAMS, IDS), r"step: \['t'\] is dense, with its slots: "),
    "js.rowwise": (
        lambda loss: jax.eval_shape(js.rowwise(sgd(loss)), PARAMS, IDS),
        r"step: \['t'\] is dense, with its slots: ",
    ),
    "js.value_and_grad": (
        lambda loss: jax.eval_shape(js.value_and_grad(of_params(loss)), PARAMS, IDS),
        r"The gradient of \['t'\] is dense: ",
    ),
    "js.nnx.jit": (nnx_step, r"\['model'\]\['t'\] is dense, with its slots: "),
    "js.nnx.value_and_grad": (
        lambda loss: nnx.jit(js.nnx.value_and_grad(lambda model: loss(model.t[...], IDS))).lower(Table()),
        r"The gradient of \['t'\] is dense: ",
    ),
}


def line_of(loss):
    """The one with its name behind it."""
    lines = pathlib.Path(__file__).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.endswith(f"  # {loss.__name__}"))


@pytest.fixture
def nothing_said(monkeypatch):
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    monkeypatch.setattr(sys.modules["jaxsparse.train.grad"], "_WARNED", set())


def said_by(function, *args):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function(*args)
    assert all(w.filename == __file__ for w in said)
    return [str(w.message) for w in said if "no array of the state is read by rows" not in str(w.message)]


@pytest.mark.parametrize("loss", ADVICE, ids=lambda loss: loss.__name__)
def test_said_once_with_the_line_and_what_to_do(loss, monkeypatch):
    for name, (entry, begin) in ENTRIES.items():
        forget(monkeypatch)
        lines = said_by(entry, loss)
        assert len(lines) == 1 and re.search(begin + ADVICE[loss], lines[0]), (name, lines)
        assert f"{__file__}:{line_of(loss)} ({loss.__name__}" in lines[0], name
        assert said_by(entry, loss) == [], name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step's, which are looked at above
        for explain in (js.explain(of_params(loss)), js.explain(js.jit(sgd(loss)))):
            said = str(explain({"t": jnp.ones((ROWS, 2))}, IDS))
            assert re.search(r"\['t'\]  dense: " + ADVICE[loss], said) and f"{__file__}:{line_of(loss)}" in said


def test_rows_that_a_while_loop_reads(nothing_said):
    def step(t, ids):
        def turn(c):
            return (c[0] + 1, c[1] + jnp.sum(t[ids[c[0]]]))

        total = jax.lax.while_loop(lambda c: c[0] < len(ids), turn, (0, 0.0))[1]
        return t - 0.1 * total * jax.grad(lambda t: jnp.sum(t[ids]))(t)

    said = said_by(js.jit(step).lower, jax.ShapeDtypeStruct((9, 2), jnp.float32), jnp.asarray(IDS))
    assert len(said) == 1 and re.search(
        r"dense, with its slots: while at .*use jax\.lax\.scan, or read rows before", said[0]
    )


def test_what_is_no_news(nothing_said):
    """Fewer rows, layers that are no tables, what the caller has chosen, and what is read by rows."""
    narrow = jax.ShapeDtypeStruct((ROWS - 1, 2), jnp.float32)
    wide = jax.ShapeDtypeStruct((2, ROWS), jnp.float32)

    def loss(params, ids):
        read = jnp.sum(params["t"][ids]) + jnp.sum(params["bias"])
        return read + jnp.sum(jnp.ones((3, ROWS - 1)) @ params["narrow"]) + jnp.sum(jnp.ones((3, 2)) @ params["wide"])

    params = PARAMS | {"narrow": narrow, "wide": wide, "bias": jax.ShapeDtypeStruct((ROWS,), jnp.float32)}
    assert said_by(jax.eval_shape, js.value_and_grad(loss), params, IDS) == []
    chosen = js.value_and_grad(of_params(tied), tables=lambda path, leaf: False)
    assert said_by(jax.eval_shape, chosen, PARAMS, IDS) == []

    def step(state, ids):
        params, opt_state = state
        updates, opt_state = optax.adam(0.1).update(jax.grad(loss)(params, ids), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = params, jax.eval_shape(optax.adam(0.1).init, params)
    assert said_by(js.jit(step).lower, state, IDS) == []


@pytest.mark.parametrize("labels", ["optax", "take_along_axis", "index"])
def test_a_classifier_with_a_bias(labels):
    """An example reads one column of the logits, and with it one number of the bias, whose rows would be columns of the
    layer's weights: weights and bias are dense, the embeddings are read by rows, and there is nothing to announce."""
    v, d, c = 50, 4, 5
    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(v, d)), "head": rng.normal(size=(d, c)), "bias": rng.normal(size=c)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    ids, y, tx = rng.integers(0, v, (8, 3)), rng.integers(0, c, 8), optax.adam(0.1)

    def loss_fn(params, ids, y):
        logits = params["table"][ids].mean(1) @ params["head"] + params["bias"][None]
        if labels == "optax":
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        logs = jax.nn.log_softmax(logits)
        return -(jnp.take_along_axis(logs, y[:, None], 1) if labels != "index" else logs[jnp.arange(8), y]).mean()

    def step(state, ids, y):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, ids, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (want, _), want_loss = jax.jit(step)((params, tx.init(params)), ids, y)
    state = jax.tree.map(jnp.copy, params), tx.init(params)
    said = js.explain(js.jit(step))(state, ids, y)
    assert said["[0]['table']"].row_sparse and not said["[0]['bias']"].row_sparse
    (got, _), loss = js.jit(step)(state, ids, y)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for name in params:  # after one step, rows that are not read are as dense Adam leaves them
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
    grads = jax.jit(js.grad(loss_fn))(params, ids, y)
    assert isinstance(grads["table"], js.RowSparse) and isinstance(grads["bias"], jax.Array)
