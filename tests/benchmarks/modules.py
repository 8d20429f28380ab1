"""`python -m tests.benchmarks.modules`: an nnx step under nnx.jit (donated or not) and js.nnx.jit, and with two words.

Two models with Adam, on batches that are NumPy arrays: a tower of bags with BatchNorm and Dropout, and skip-gram with
negatives. All steps are timed in turn in one process, medians.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsparse as js


class Tower(nnx.Module):
    def __init__(self, num_rows, dim, rngs):
        self.embed, self.norm = nnx.Embed(num_rows, dim, rngs=rngs), nnx.BatchNorm(dim, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(dim, 1, rngs=rngs)

    def loss(self, batch):
        ids, y = batch
        logits = self.head(self.dropout(self.norm(self.embed(ids).mean(1))))[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    @staticmethod
    def draw(rng, num_rows):
        return (rng.zipf(1.2, (4096, 20)) % num_rows).astype(np.int32), rng.integers(0, 2, 4096).astype(np.float32)


class SkipGram(nnx.Module):
    def __init__(self, num_rows, dim, rngs):
        self.words, self.contexts = nnx.Embed(num_rows, dim, rngs=rngs), nnx.Embed(num_rows, dim, rngs=rngs)

    def loss(self, batch):
        words, contexts, negatives = batch
        x = self.words(words)
        score = (x * self.contexts(contexts)).sum(-1)
        others = jnp.einsum("bd,bnd->bn", x, self.contexts(negatives))
        return -jnp.mean(jax.nn.log_sigmoid(score) + jax.nn.log_sigmoid(-others).sum(-1))

    @staticmethod
    def draw(rng, num_rows):
        return tuple((rng.zipf(1.2, shape) % num_rows).astype(np.int32) for shape in (4096, 4096, (4096, 5)))


def loss_of(model, batch):
    return model.loss(batch)


def step_with(value_and_grad):
    def step(model, optimizer, batch):
        loss, grads = value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    return step


STEPS = {
    "nnx.jit": (nnx.jit(step_with(nnx.value_and_grad)), optax.adam),
    "nnx.jit, donated": (nnx.jit(step_with(nnx.value_and_grad), donate_argnums=(0, 1)), optax.adam),
    "two words, donated": (nnx.jit(step_with(js.nnx.value_and_grad), donate_argnums=(0, 1)), js.lazy_adam),
    "js.nnx.jit": (js.nnx.jit(step_with(nnx.value_and_grad)), optax.adam),
}


def measure(kind: type, num_rows: int, dim: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step."""
    rng = np.random.default_rng(0)
    batches = [kind.draw(rng, num_rows) for _ in range(4)]
    objects, times = {}, {name: [] for name in STEPS}
    for name, (_, tx) in STEPS.items():
        model = kind(num_rows, dim, nnx.Rngs(0))
        objects[name] = model, nnx.Optimizer(model, tx(1e-3), wrt=nnx.Param)
    for repeat in range(rounds + 1):
        for name, (step, _) in STEPS.items():
            for batch in batches:
                start = time.perf_counter()
                loss = step(*objects[name], batch)
                jax.block_until_ready((nnx.state(objects[name][0]), loss))
                if repeat:  # the first round compiles
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {options.rows:,} x {options.dim}, Adam, ms a step")
    for kind in (Tower, SkipGram):
        for name, ms in measure(kind, options.rows, options.dim, options.rounds).items():
            print(f"{kind.__name__:>10} {name:>20} {ms:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
