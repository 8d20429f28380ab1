"""Tables that are put below each other, and read as one: each is row-sparse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.trace import planning
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but
from tests.stepwise import copied

HEIGHTS, D = {"a": 50, "b": 60, "c": 70}, 4
TOTAL = sum(HEIGHTS.values())
RNG = np.random.default_rng(0)
IDS = jnp.asarray(np.stack([RNG.integers(k, size=(6, 2)) + start for k, start in ((50, 0), (60, 50), (70, 110))], -1))
IDS = IDS.at[0].set(jnp.array([[0, 49, 50], [109, 110, 179]]))  # first and last rows
TX = optax.adam(0.1)


def joined(p):
    return jnp.concatenate([p["a"], p["b"], p["c"]])


def squares(x):
    return jnp.sum(x**2)


READS = {
    "index": lambda p, i: squares(joined(p)[i]),
    "a bag": lambda p, i: squares(joined(p)[i].sum(1)),
    "js.embedding_bag": lambda p, i: squares(js.embedding_bag(joined(p), i[:, 0], combiner="mean")),
    "ids out of range": lambda p, i: squares(jnp.take(joined(p), i * 3 - 9, axis=0, mode="fill", fill_value=1)),
    "clipped ids": lambda p, i: squares(jnp.take(joined(p), i * 3 - 9, axis=0, mode="clip")),
    "negative ids": lambda p, i: squares(joined(p)[i - TOTAL]),
    "narrow ids": lambda p, i: squares(joined(p)[i.astype(jnp.uint8)]),
    "twice": lambda p, i: (lambda t: squares(t[i]) + squares(t[i[:, 0]] * 3))(joined(p)),
    "two and one": lambda p, i: squares(jnp.concatenate([jnp.concatenate([p["a"], p["b"]]), p["c"]])[i]),
    "in a jit": lambda p, i: squares(jax.jit(lambda t, i: t[i])(joined(p), i)),
    "a jit of all": jax.jit(lambda p, i: squares(joined(p)[i])),
    "a remat of all": jax.checkpoint(lambda p, i: squares(jnp.tanh(joined(p)[i]))),
    "a padding row": lambda p, i: squares(jnp.concatenate([jnp.zeros((1, D)), joined(p)])[i]),
    "cast": lambda p, i: squares(joined(jax.tree.map(jnp.bfloat16, p))[i].astype(jnp.float32)),
    "a part of a row": lambda p, i: squares(joined(p)[i, 1]),
    "scalar ids": lambda p, i: squares(jax.vmap(lambda k: joined(p)[k])(i.reshape(-1))),
    "read alone too": lambda p, i: squares(joined(p)[i]) + squares(p["b"][i % 60]),
}


def new_params():
    return {name: {t: jnp.asarray(RNG.normal(size=(k, D)), jnp.float32) for t, k in HEIGHTS.items()} for name in READS}


def loss_fn(params, ids):
    return sum(read(params[name], ids) for name, read in READS.items())


def step(state, ids, loss_fn=loss_fn):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, ids)
    updates, opt_state = TX.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


@functools.cache
def gradients():
    """Of all reads: dense, and row-sparse."""
    params = new_params()
    return jax.jit(jax.grad(loss_fn))(params, IDS), jax.jit(js.grad(loss_fn))(params, IDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
def test_gradients(name):
    want, got = (gradient[name] for gradient in gradients())
    for t in HEIGHTS:
        assert isinstance(got[t], js.RowSparse), t
        np.testing.assert_allclose(got[t].todense(), want[t], rtol=2e-2 if name == "cast" else 1e-5, atol=1e-5)


@functools.cache
def states():
    """Before, after two steps of js.jit, and after two dense ones with rows put back that the second does not read."""
    before = new_params()
    before = before, TX.init(before)
    run, dense = js.jit(step), jax.jit(step)
    (got, _), (first, _) = run(copied(before), IDS), dense(before, IDS)
    (got, got_loss), (want, want_loss) = run(got, IDS[:3]), dense(first, IDS[:3])
    read = jax.tree.map(lambda g: (g != 0).any(1, keepdims=True), jax.jit(jax.grad(loss_fn))(first[0], IDS[:3]))
    back = functools.partial(jax.tree.map, lambda new, old, read: jnp.where(read, new, old))
    (adam, rest), (was, _) = want[1], first[1]
    adam = adam._replace(mu=back(adam.mu, was.mu, read), nu=back(adam.nu, was.nu, read))
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    return got, (back(want[0], first[0], read), (adam, rest))


@pytest.mark.slow  # what is different from a gradient is in other tests
@pytest.mark.parametrize("name", READS)
def test_steps(name):
    got, want = states()
    for part in (lambda s: s[0], lambda s: s[1][0].mu, lambda s: s[1][0].nu):
        for t in HEIGHTS:
            tol = {"rtol": 2e-2, "atol": 2e-2} if name == "cast" else {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(part(got)[name][t], part(want)[name][t], **tol)


@pytest.mark.parametrize("strides", [None, (1, 1)])
def test_a_gradient_that_is_cut_by_hand(strides):
    """Each part is row-sparse: only the rows that are read change."""
    params = {t: jnp.asarray(RNG.normal(size=(k, D)), jnp.float32) for t, k in HEIGHTS.items()}

    def by_hand(params, ids):
        gradient = jax.grad(lambda table: squares(table[ids]))(joined(params))
        starts = dict(zip(HEIGHTS, (0, 50, 110), strict=True))
        cut = {t: jax.lax.slice(gradient, (starts[t], 0), (starts[t] + k, D), strides) for t, k in HEIGHTS.items()}
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, cut), None

    run = js.jit(by_hand)
    said = js.explain(run)(params, IDS)
    assert all(said[f"['{t}']"].row_sparse and said[f"['{t}']"].num_rows == k for t, k in HEIGHTS.items())
    want = jax.jit(by_hand)(params, IDS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), run(copied(params), IDS), want)


def test_nothing_with_all_rows_is_made():
    params = {t: jnp.ones((1000 * k, D)) for t, k in HEIGHTS.items()}
    run = js.jit(functools.partial(step, loss_fn=READS["twice"]))
    text = compiled_by_default(run.lower((params, TX.init(params)), IDS)).as_text()
    assert not large_arrays(text, min(map(len, params.values())))


def test_lines():
    """Of the reads, and of what makes such tables dense."""
    params = {t: jnp.ones((k, D)) for t, k in HEIGHTS.items()}
    dense = (
        lambda p, i: jax.checkpoint(lambda t: squares(t[i]))(joined(p)),
        lambda p, i: jax.lax.scan(lambda c, i: (c + squares(joined(p)[i]), None), 0.0, i)[0],
    )
    for read in (lambda p, i: squares(joined(p)[i]), lambda p, i: squares(jnp.take(joined(p), i, axis=0))):
        (line,) = js.explain(read)(params, IDS)["['a']"].reads
        assert "test_joined.py" in line
    for loss_fn in dense:
        said = str(js.explain(loss_fn)(params, IDS)["['a']"])
        assert "dense: concatenate at " in said and "test_joined.py" in said


def test_used_as_a_whole():
    """It is made, as under jax.jit, and the gradient is dense."""
    params = new_params()["index"]

    def loss_fn(p, ids):
        table = joined(p)
        return squares(table[ids]) + jnp.mean(table @ table[0])

    state = params, TX.init(params)
    want = jax.jit(functools.partial(step, loss_fn=loss_fn))(state, IDS)
    with pytest.warns(UserWarning) as said:
        got = js.jit(functools.partial(step, loss_fn=loss_fn))(copied(state), IDS)
    assert any("['a'] is dense, with its slots: concatenate" in str(warning.message) for warning in said)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


def stacked(p):
    return jnp.stack([p["t"], p["u"]])


def by_number(ids):
    """Rows of the two tables that are read where a pair of numbers is (table, row)."""
    return [{int(row) for table, row in ids if table == n} for n in (0, 1)]


def every(ids):
    return [{int(row) for _, row in ids}] * 2


STACKS = {
    "by table and row": (lambda p, i: squares(stacked(p)[i[:, 0], i[:, 1]]), by_number),
    "negative": (lambda p, i: squares(stacked(p)[i[:, 0] - 2, i[:, 1] - 50]), by_number),
    "twice": (
        lambda p, i: (lambda t: squares(t[i[:, 0], i[:, 1]]) + squares(t[0, i[:1, 1]]))(stacked(p)),
        lambda ids: [by_number(ids)[0] | {int(ids[0, 1])}, by_number(ids)[1]],
    ),
    "in a remat": (jax.checkpoint(lambda p, i: squares(jnp.sin(stacked(p)[i[:, 0], i[:, 1]]))), by_number),
    "along columns": (lambda p, i: squares(jnp.stack([p["t"], p["u"]], 1)[i[:, 1]]), every),
    "along the last axis": (lambda p, i: squares(jnp.stack([p["t"], p["u"]], -1)[i[:, 1]]), every),
}


@pytest.mark.parametrize("name", slow_but({"by table and row", "along columns"}, STACKS))
def test_stacked_in_the_step(name):
    """A row that one table's id names stays as it is in the other table, which has had momentum there."""
    loss_fn, rows = STACKS[name]
    params = {name: jnp.asarray(RNG.normal(size=(50, D)), jnp.float32) for name in ("t", "u")}
    got = want = (params, TX.init(params))
    run, dense = js.jit(functools.partial(step, loss_fn=loss_fn)), jax.jit(functools.partial(step, loss_fn=loss_fn))
    for ids in np.array([[[0, 2], [1, 3], [0, 49]], [[1, 2], [0, 3], [1, 0]], [[0, 2], [0, 3], [1, 49]]]):
        read = {name: np.isin(np.arange(50), list(r))[:, None] for name, r in zip(("t", "u"), rows(ids), strict=True)}
        back = functools.partial(jax.tree.map, jnp.where, read)
        old, (want, want_loss), before = want, dense(want, ids), copied(got)
        was, adam = old[1][0], want[1][0]
        adam = adam._replace(mu=back(adam.mu, was.mu), nu=back(adam.nu, was.nu))
        want = back(want[0], old[0]), (adam, want[1][1])
        got, loss = run(got if got[0] is not params else copied(got), ids)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
        jax.tree.map(np.testing.assert_array_equal, got[0], back(got[0], before[0]))


def test_stacked_and_read_under_vmap(monkeypatch):
    """It is made, and dense, as under jax.jit."""
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    params = {name: jnp.asarray(RNG.normal(size=(50, D)), jnp.float32) for name in ("t", "u")}
    loss_fn = lambda p, i: squares(jax.vmap(lambda t, i: t[i])(stacked(p), i.T))  # noqa: E731
    run, start = functools.partial(step, loss_fn=loss_fn), (params, TX.init(params))
    with pytest.warns(UserWarning, match="no array of the state is read by rows"):
        got = js.jit(run)(copied(start), np.array([[0, 2], [1, 3]]))
    want = jax.jit(run)(start, np.array([[0, 2], [1, 3]]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
