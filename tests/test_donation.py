"""A step whose state is not donated: right, usable state, and how many bytes it copies is said."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.train import packing
from tests.stepwise import compare, copied

IDS = np.array([3, 0, 3])
ADAM = optax.adam(0.1)


def step(state, ids):
    params, opt_state = state
    gradient = jax.grad(lambda params: jnp.sum(params["t"][ids] @ params["w"]))(params)
    updates, opt_state = ADAM.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def made():
    params = {"t": jnp.ones((500, 2)), "w": jnp.array([1.0, -2.0])}
    return params, ADAM.init(params)


def test_a_state_that_is_to_stay(monkeypatch):
    monkeypatch.setattr(packing, "_WARNED", set())
    state = made()
    before = copied(state)
    run = js.jit(step, donate_argnums=())
    paths = r"\[0\]\['t'\], \[1\]\[0\]\.mu\['t'\], \[1\]\[0\]\.nu\['t'\]"
    with pytest.warns(
        UserWarning, match=rf"^step: .* not donated, so each step copies .*{paths}: 0\.0 MB\. Leave"
    ) as said:
        got = run(state, IDS)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        run(state, IDS)
        js.jit(step, donate_argnames=()).lower(state, IDS[:2])
    compare("the old state", state, before, 0)
    compare("the new one", got, js.jit(step)(copied(state), IDS), 0)
    assert "each step copies it: 0.0 MB" in js.explain(run)(state, IDS)["[0]['t']"].advice


def test_explain_says_what_jax_jit_copies():
    """It knows the donation of jax.jit around js.rowwise, which the trace of a step does not."""
    state, note = made(), "It is not donated, so each step copies it: 0.0 MB."
    kept = {}
    for name, run in {
        "not": jax.jit(js.rowwise(step)),
        "donated": jax.jit(js.rowwise(step), donate_argnums=0),
        "by name": jax.jit(js.rowwise(step), donate_argnames="state"),
        "js.jit": js.jit(step),
        "unknown": js.rowwise(step),
    }.items():
        said = js.explain(run)(state, IDS)
        assert [path for path, x in said.parameters.items() if x.row_sparse] == [
            "[0]['t']",
            "[1][0].mu['t']",
            "[1][0].nu['t']",
        ], name
        kept[name] = {note in x.advice for x in said.parameters.values() if x.row_sparse}
    assert kept == {
        "not": {True},
        "donated": {False},
        "by name": {False},
        "js.jit": {False},
        "unknown": {False},
    }


@pytest.mark.devices(2)
def test_explain_says_what_jax_pmap_copies():
    """Each device's state is one of 500 rows, of which it reads those of its own batch."""

    def mean_step(state, ids):
        params, opt_state = state
        gradient = jax.grad(lambda params: jnp.sum(params["t"][ids] @ params["w"]))(params)
        updates, opt_state = ADAM.update(jax.lax.pmean(gradient, "device"), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state, ids = jax.tree.map(lambda x: jnp.stack([x, x]), made()), np.stack([IDS, IDS + 1])
    for donate in ((), 0):
        run = jax.pmap(js.rowwise(mean_step), axis_name="device", donate_argnums=donate)
        said = js.explain(run)(state, ids)
        table, slot = said["[0]['t']"], said["[1][0].mu['t']"]
        assert (table.num_rows, table.rows_read, slot.row_sparse) == (500, 3, True)
        copies = "It is not donated, so each step copies it: 0.0 MB." in table.advice
        assert copies == (donate == ()) and not said["[0]['w']"].row_sparse
    with pytest.raises(
        ValueError, match=r"'fun' argument of js\.explain must be one that was not called.*Make it anew"
    ):
        js.explain(run)(state, ids)
