"""rows=: some rows of a table are trained, all others keep their bits in parameter and slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.trace import pieces
from tests.marks import slow_but
from tests.stepwise import copied

V, D = 1000, 3
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))


def loss_fn(params, ids):
    return jnp.sum((params["words"][ids] - 2) ** 2) + jnp.sum(params["users"][ids[:, :2]] ** 2) + params["w"].sum()


def step(state, ids, tx=TX, mask=None):
    """A step whose gradient is masked as dense programs do it, if there is a mask."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, ids)
    if mask is not None:
        grads = grads | {"words": jnp.where(mask[:, None], grads["words"], 0)}
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def start():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(V, D)), jnp.float32) for name in ("words", "users")}
    params["w"] = jnp.ones(2)
    return params, TX.init(params)


def batches(shape=(64, 5)):
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, shape).astype(np.int32) for _ in range(3)]


def put_back(new, old, ids, trained):
    """The dense step with rows put back that are not read, or not trained."""

    def one(path, new, old):
        name = jax.tree_util.keystr(path)
        if new.shape != (V, D):
            return new
        moved = np.isin(np.arange(V), ids if "words" in name else ids[:, :2])
        moved &= trained if "words" in name else True
        return jnp.where(moved[:, None], new, old)

    return jax.tree_util.tree_map_with_path(one, new, old)


FEW, MANY = np.arange(V) % 3 == 0, np.arange(V) % 3 > 0
ROWS = {"a mask": FEW, "most": MANY, "ids": np.flatnonzero(FEW), "none": np.zeros(0, int), "all": np.ones(V, bool)}


def lazy_step(state, ids, rows):
    params, opt_state = state
    tx = js.lazy(TX, rows=rows)
    loss, grads = js.value_and_grad(loss_fn)(params, ids)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


ROADS = {
    "js.jit": lambda rows: js.jit(step, rows=rows),
    "js.rowwise": lambda rows: jax.jit(js.rowwise(step, rows=rows), donate_argnums=0),
    "two words": lambda rows: jax.jit(functools.partial(lazy_step, rows=rows), donate_argnums=0),
}


@pytest.mark.parametrize("piece", slow_but([0], [0, 1 << 18]))
@pytest.mark.parametrize("road", slow_but(["js.jit"], ROADS))
@pytest.mark.parametrize("name", slow_but(["a mask"], ["a mask", "most", "none"]))
def test_against_the_masked_dense_step(name, road, piece, monkeypatch):
    """Also where a norm is taken over the gradient: rows that are not trained count nothing in it."""
    monkeypatch.setattr(pieces, "_PIECE", piece)
    trained = np.isin(np.arange(V), ROWS[name]) if ROWS[name].dtype != bool else ROWS[name]
    run, dense = ROADS[road]({"words": ROWS[name]}), jax.jit(functools.partial(step, mask=trained))
    state, want = copied(start()), start()
    for ids in batches():
        state, loss = run(state, ids)
        new, wanted = dense(want, ids)
        want = put_back(new, want, ids, trained)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    before, slots = start()
    for x, y in [(state[0], before), (state[1][1][0].mu, slots[1][0].mu), (state[1][1][0].nu, slots[1][0].nu)]:
        np.testing.assert_array_equal(x["words"][~trained], y["words"][~trained])


@pytest.mark.parametrize("name", slow_but(["ids"], ["ids", "all"]))
def test_ids_and_masks(name):
    results = []
    for rows in ({"words": ROWS[name]}, {"words": FEW} if name == "ids" else None):
        state, _ = js.jit(step, rows=rows)(copied(start()), batches()[0])
        results.append(state)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_one_table_needs_no_name():
    def of_words(state, ids):
        return state - jax.grad(lambda t: jnp.sum(t[ids]))(state)

    got = js.jit(of_words, rows=[3, 5])(jnp.zeros((V, 1)), np.array([3, 4, 3]))
    assert np.flatnonzero(got).tolist() == [3] and got[3] == -2


def test_bad_rows():
    state, ids = start(), batches()[0]
    for rows, match in [
        ({"['w']": [0]}, r"which is the dense \[0\]\['w'\]"),
        ({"nobody": [0]}, r"'nobody', which is a part of none"),
        ([0], r"a dictionary where there is not just one table.*2 tables"),
        ({"words": [V]}, r"ids from 1000 to 1000"),
        ({"words": [-1]}, r"ids from -1 to -1"),
        ({"words": np.ones(V - 1, bool)}, r"mask \(num_rows,\), of a table of 1000 rows.*bool of shape \(999,\)"),
        ({"words": [0.5]}, r"float64 of shape \(1,\)"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            js.jit(step, rows=rows)(copied(state), ids)
    with pytest.raises(ValueError, match=r"'rows'.*js\.jit or js\.rowwise, give it to that"):
        js.jit(functools.partial(step, tx=js.lazy(TX, rows={"words": [0]})))(state, ids)
    tx = js.lazy_adam(0.1, untouched="replay")
    with pytest.raises(ValueError, match=r"'rows' argument of js\.lazy .*replays"):
        js.lazy(tx, rows={"words": [0]}).init(state[0])
    with pytest.raises(ValueError, match=r"'rows'.*replays"):
        js.jit(functools.partial(step, tx=tx), rows={"words": [0]})((state[0], tx.init(state[0])), ids)
