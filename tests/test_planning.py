"""What planning makes of a program's arrays: those that row ids are made of, and those that a region needs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js
from jaxsparse import _jax

V = 40
IDS = jnp.asarray(np.random.default_rng(0).integers(0, V, (6, 3)))
TABLE = jnp.asarray(np.random.default_rng(1).normal(size=(V, 4)), jnp.float32)
TX = optax.sgd(0.1)


def updated(loss_fn, table, *args):
    gradient = jax.grad(loss_fn)(table, *args)
    return optax.apply_updates(table, TX.update(gradient, TX.init(table))[0])


def test_what_no_ids_are_made_of_is_not_made(monkeypatch):
    evaluated, evaluate = [], _jax.evaluate
    monkeypatch.setattr(
        _jax, "evaluate", lambda program, eqn, *rest: evaluated.append(eqn) or evaluate(program, eqn, *rest)
    )

    def step(table, ids):
        return updated(lambda table: jnp.sum(jnp.tanh(jnp.cos(table[ids // 2]).sum(1) @ jnp.ones((4, 4)))), table)

    plan = js.jit(step).plan(TABLE, IDS)
    assert plan.leaves == {0: 0}
    made = {eqn.primitive.name for eqn in evaluated}
    assert made and not made & {"cos", "tanh", "dot_general"}
    assert any("div" in eqn.primitive.name for eqn in evaluated)


def test_ids_at_the_end_of_a_long_chain():
    """Longer than functions may call each other in Python."""

    def step(table, ids):
        for _ in range(1200):
            ids = jax.lax.add(ids, jnp.ones_like(ids))
        return updated(lambda table: jnp.sum(table[ids - 1200] ** 2), table)

    plan = js.jit(step).plan(TABLE, IDS)
    assert plan.leaves == {0: 0}
    np.testing.assert_array_equal(plan.ids_of([TABLE, IDS])[0], IDS.ravel())


def test_what_is_made_late_is_used_in_a_region_and_behind_it():
    def loss_fn(table, ids, by):
        scale = jnp.exp(by)
        scaled = table * scale
        shifted = ids + jnp.sum(by > 1e9, dtype=ids.dtype)

        def body(total, i):
            return total + jnp.sum(scaled[i + shifted[0, 0] * 0] ** 2) * jnp.cos(scale), scaled[i].sum() * scale

        total, parts = jax.lax.scan(body, jnp.sin(scale), shifted)
        again = jax.lax.cond(by > 0, lambda: scaled[shifted[0]].sum() * scale, lambda: scale)
        return total + parts.sum() + again + jnp.sum(scaled[shifted] * scale)

    def step(table, ids, by):
        return updated(loss_fn, table, ids, by)

    by = jnp.float32(0.3)
    want = jax.jit(step)(TABLE, IDS, by)
    np.testing.assert_allclose(js.jit(step)(TABLE + 0, IDS, by), want, rtol=1e-5)


def test_a_loop_whose_carry_becomes_rows_and_whose_body_prints(capfd):
    """It is traced for zeros that stay zeros, and again for rows: only that one is in the program."""

    def step(table, ids):
        gradient = jax.grad(lambda table: jnp.sum(table[ids] ** 2))(table)

        def body(total, _):
            jax.debug.print("turn")
            return total + gradient, None

        total, _ = jax.lax.scan(body, jnp.zeros_like(table), length=3)
        return table - 0.1 * total

    want = jax.jit(lambda table, ids: updated(lambda table: 3 * jnp.sum(table[ids] ** 2), table))(TABLE, IDS)
    np.testing.assert_allclose(js.jit(step)(TABLE + 0, IDS), want, rtol=1e-5)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("turn") == 3
