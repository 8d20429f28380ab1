"""Train steps on some rows against the same steps dense: some cases as parts of one program, of which each has a name.

The oracle is the step itself under jax.jit; after every step, what has a row for each of a table's rows is put back
where no id of the batch names the row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxsparse as js

V, D = 57, 8
QUICK = {"xla_backend_optimization_level": 0}  # of oracles: LLVM's optimizations are half of their time
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def draw_ids(*shape):
    return jnp.asarray(RNG.zipf(1.3, shape) % V, jnp.int32)


P0 = {"t": normal(V, D), "b": normal(V), "w": normal(D, 3)}


def batch():
    """ids (12, 4) and targets (12,)."""
    return draw_ids(12, 4), normal(12)


def loss_fn(p, ids, y):
    h = p["t"][ids].mean(1)  # (12, D)
    return jnp.mean((h @ p["w"]).sum(1) * y + p["b"][ids[:, 0]] ** 2)


def both_tables(ids, y):
    del y
    return {"t": ids, "b": ids[:, 0]}


def of_loss(loss):
    def step(state, *batch):
        value, grads = jax.value_and_grad(loss)(state.params, *batch)
        return state.apply_gradients(grads=grads), value

    return step


STEP = of_loss(loss_fn)


def create(tx, params=P0):
    return TrainState.create(apply_fn=None, params=params, tx=tx)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step, its state, and which rows of which table a batch names.

    `oracle` is another dense step(state, *batch, touched), where putting rows back is not what the step on some rows
    means.
    """

    step: Callable[..., Any]
    state: Any
    touched: Callable[..., dict[str, Any]] = both_tables
    oracle: Callable[..., Any] | None = None
    tol: float = 2e-5


def put_back(new, old, touched):
    """`new`, with the rows of `old` where `touched`, ids by the name of a table, does not name them."""

    def one(path, n, o):
        name = next((t for t in touched if f"'{t}'" in jax.tree_util.keystr(path)), None)
        if name is None or jnp.ndim(n) == 0 or n.shape[0] != V:
            return n
        named = np.isin(np.arange(V), np.asarray(touched[name]).reshape(-1))
        return jnp.where(named.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree_util.tree_map_with_path(one, new, old)


def copied(tree):
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def numbers(tree):
    """(path, NumPy array) of every leaf, of random keys their data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)  # noqa: E731
    return [(jax.tree_util.keystr(k), np.asarray(jax.random.key_data(x) if is_key(x) else x)) for k, x in leaves]


def compare(name, got, want, tol):
    for (path, x), (_, y) in zip(numbers(got), numbers(want), strict=True):
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=tol, atol=tol, err_msg=f"{name}{path}")


def together(cases, pick):
    """One step of all cases, from and to dicts by name."""

    def step(states, *batch):
        outs = {name: pick(case)(states[name], *batch) for name, case in cases.items()}
        return {name: out[0] for name, out in outs.items()}, {name: out[1] for name, out in outs.items()}

    return step


TOGETHER = 6  # cases in one program: with 36 it takes XLA twice as long as six programs with six


def check(cases, transform=js.jit, make_batch=batch, steps=3):
    """Cases, some in one program, `transform`ed, against their oracles; what is not named keeps its bits."""
    names, states = list(cases), {}
    for i in range(0, len(names), TOGETHER):
        states |= check_together({name: cases[name] for name in names[i : i + TOGETHER]}, transform, make_batch, steps)
    return states


def check_together(cases, transform, make_batch, steps):
    run = transform(together(cases, lambda case: case.step))
    dense_cases = {n: c for n, c in cases.items() if c.oracle is None}
    dense = jax.jit(together(dense_cases, lambda case: case.step), compiler_options=QUICK)
    states = {name: copied(case.state) for name, case in cases.items()}
    wanted = {name: copied(case.state) for name, case in cases.items()}
    for _ in range(steps):
        arrays = make_batch()
        touched = {name: case.touched(*arrays) for name, case in cases.items()}
        before = copied(states)
        states, values = run(states, *arrays)
        new, losses = dense({n: s for n, s in wanted.items() if cases[n].oracle is None}, *arrays)
        for name, case in cases.items():
            if case.oracle is not None:
                new[name], losses[name] = case.oracle(wanted[name], *arrays, touched[name])
            wanted[name] = put_back(new[name], wanted[name], touched[name])
            compare(name, (states[name], values[name]), (wanted[name], losses[name]), case.tol)
            kept = numbers(put_back(states[name], before[name], touched[name]))
            for (path, x), (_, y) in zip(numbers(states[name]), kept, strict=True):
                np.testing.assert_array_equal(x, y, err_msg=f"{name}{path}: rows that no id names have moved")
    return states


def on_updates(f):
    """Adam on what f makes of the table's gradient."""
    return optax.chain(optax.stateless(lambda u, p: {**u, "t": f(u["t"])}), optax.adam(0.1))
