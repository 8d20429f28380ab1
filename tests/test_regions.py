"""Reads and regions at the edge of what is computed by rows: under js.jit each step gives what it gives under jax.jit.

With plain gradient descent a row that is not read stays as it is on both roads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.trace import planning
from tests.marks import slow_but
from tests.stepwise import copied

V, D = 40, 4
RNG = np.random.default_rng(0)
TABLE, OTHER = (jnp.asarray(RNG.normal(size=(V, D)), jnp.float32) for _ in range(2))
IDS = jnp.asarray(RNG.integers(0, V, 7), jnp.int32)


def gathered(t, at, sizes, **dims):
    return jax.lax.gather(t, at, jax.lax.GatherDimensionNumbers(**dims), sizes, mode="clip")


def first_three(t, ids):
    """What a while loop reads: how many rows is not known before it ends."""
    t = jax.lax.stop_gradient(t)
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + t[ids[c[0]]]), (0, jnp.zeros(D)))[1]


def delay_line(t):
    """Each turn hands a table on to the next of twelve places: the kinds of the places settle after as many turns."""
    places, _ = jax.lax.scan(lambda c, _: ((c[0], *c[:-1]), None), (t, *[jnp.zeros((V, D))] * 12), None, length=2)
    return places[2]


READS = {  # what is read of a table besides t[IDS], and whether that leaves it row-sparse
    "some columns of three rows": (
        lambda t, i: gathered(
            t, i[:, None] % D, (3, 1), offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(1,)
        ),
        False,
    ),
    "two rows for an id": (
        lambda t, i: gathered(t, i[:, None], (2, D), offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)),
        False,
    ),
    "columns that the batch names": (lambda t, i: jax.lax.dynamic_slice(t, (0, i[0] % 2), (V, 2))[i], True),
    "a slice of zeros": (lambda t, i: jax.lax.dynamic_slice(jnp.zeros_like(t), (i[0], 0), (1, D)) + t[i[:1]], True),
    "a part of a row that is set": (
        lambda t, i: jax.lax.dynamic_update_slice(t, jnp.ones((1, 2)), (i[0], 0))[i],
        False,
    ),
    "each row picks a number": (
        lambda t, i: jax.vmap(lambda row, k: row[k])(OTHER, (t[:, 0] > 0).astype(jnp.int32))[i],
        False,
    ),
    "another table in one case": (lambda t, i: jax.lax.cond(i[0] > 20, lambda t: t, lambda t: OTHER, t)[i], True),
    "another table in all cases but one": (
        lambda t, i: jax.lax.switch(i[0] % 3, [lambda t: t, lambda t: OTHER, lambda t: t * 2], t)[i],
        True,
    ),
    "another table after a turn": (
        lambda t, i: jax.lax.scan(lambda c, _: (OTHER, None), t, None, length=2)[0][i] + t[i],
        True,
    ),
    "rows that a while reads": (lambda t, i: first_three(t, i)[None] + t[i], False),
    "twelve places": (lambda t, i: delay_line(t)[i], False),
}


def step(params, ids, read):
    loss, gradient = jax.value_and_grad(lambda t: jnp.sum(t[ids] ** 2) + jnp.sum(read(t, ids) ** 2))(params["t"])
    return {"t": params["t"] - 0.1 * gradient}, loss


@pytest.mark.filterwarnings(
    "ignore:.*is dense:UserWarning", "ignore:.*no array of the state:UserWarning", "ignore:partial:UserWarning"
)
@pytest.mark.parametrize("name", slow_but({"columns that the batch names", "another table in one case"}, READS))
def test_the_same_as_dense(name, monkeypatch):
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    read, row_sparse = READS[name]
    run = functools.partial(step, read=read)
    got, want = js.jit(run)(copied({"t": TABLE}), IDS), jax.jit(run)({"t": TABLE}, IDS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
    assert js.explain(js.jit(run))({"t": TABLE}, IDS)["['t']"].row_sparse == row_sparse


SQUARE = {  # rows of the table along one axis, and then along the other
    "in a case": lambda t, i: jax.lax.cond(i[0] > 20, lambda t: t, lambda t: t.T, t)[i],
    "in two cases of three": lambda t, i: jax.lax.switch(i[0] % 3, [lambda t: t, lambda t: t.T, lambda t: t], t)[i],
    "after a turn": lambda t, i: jax.lax.scan(lambda c, _: (c.T, None), t, None, length=3)[0][i],
    "after a turn of a while": lambda t, i: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1].T), (0, jax.lax.stop_gradient(t))
    )[1][i],
}


@pytest.mark.filterwarnings("ignore:.*no array of the state:UserWarning")
@pytest.mark.parametrize("name", slow_but({"in a case", "after a turn"}, SQUARE))
def test_rows_along_two_axes_are_dense(name, monkeypatch):
    monkeypatch.setattr(planning, "_ANNOUNCED", set())
    table = {"t": jnp.asarray(RNG.normal(size=(V, V)), jnp.float32)}
    run = functools.partial(step, read=SQUARE[name])
    with pytest.warns(UserWarning, match=r"\['t'\] is dense, with its slots: (cond|scan|while) at .*test_regions\.py"):
        got, want = js.jit(run)(copied(table), IDS), jax.jit(run)(table, IDS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
    assert not js.explain(js.jit(run))(table, IDS)["['t']"].row_sparse


def test_rows_of_bools():
    def run(state, ids):
        filled = jnp.take(state["seen"], ids, mode="fill")  # outside of the table: True
        return {"seen": state["seen"].at[ids].set(True)}, (state["seen"][ids], filled)

    seen, ids = jnp.arange(V) % 3 == 0, IDS.at[0].set(V)
    got, want = js.jit(run)({"seen": jnp.copy(seen)}, ids), jax.jit(run)({"seen": seen}, ids)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert js.explain(js.jit(run))({"seen": seen}, ids)["['seen']"].row_sparse
