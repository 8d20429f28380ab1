"""`python -m tests.benchmarks.programs`: the public programs of tests/test_programs.py as written, and with one word.

Each step runs under jax.jit with the donation that its author wrote, under jax.jit with its state donated, and under
js.jit. They take turns in one process, each on its own copy of the state; medians. `written/js` is the gain of the one
word, and `donated/js` what of it is not the donation that its author left out.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import jaxsparse as js
from tests import test_programs as programs
from tests.stepwise import copied

# Batches of a usual size. A program that uses its table as a whole gets fewer rows: logits are (batch, rows).
SIZES: dict[Callable[..., Any], dict[str, int]] = {
    programs.glove: {"size": 1024},
    programs.cbow: {"size": 256, "most_rows": 50_000},
    programs.skip_gram: {"size": 1024, "negatives": 5},
    programs.playlists: {"size": 128},
    programs.deepfm: {"size": 4096},
    programs.ratings: {"size": 4096},
    programs.clicks: {"size": 1024},
    programs.dlrm: {"size": 1024},
    programs.transe: {"size": 4096},
    programs.tied_sequence: {"size": 16, "length": 20, "most_rows": 50_000},
    programs.tagger: {"size": 64, "length": 50},
}
Run = Callable[[Any, Any], tuple[Any, Any]]  # (state, batch) -> (state, the rest)


def donated_arguments(program: programs.Program) -> tuple[int, ...]:
    """The arguments that are made of the state, by position."""
    args, _ = program.args(program.state, program.batches[0])
    leaves = {id(x) for x in jax.tree.leaves(program.state)}
    static = np.atleast_1d(program.words.get("static_argnums", ())).tolist()
    return tuple(
        n for n, arg in enumerate(args) if n not in static and any(id(x) in leaves for x in jax.tree.leaves(arg))
    )


def steps_of(make: Callable[..., Any], rows: int, dim: int) -> tuple[dict[str, tuple[Run, Any]], list[Any]]:
    """By name, a step and its state; and the batches."""
    sizes = dict(SIZES[make])
    program = make(rows=min(rows, sizes.pop("most_rows", rows)), dim=dim, **sizes)

    def run(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, Any]:
        args, kwargs = program.args(state, batch)
        return program.new(step(*args, **kwargs))

    static = {k: v for k, v in program.words.items() if k == "static_argnums"}
    jitted = {
        "written": jax.jit(program.step, **program.words),
        "donated": jax.jit(program.step, **static, donate_argnums=donated_arguments(program)),
        "js.jit": js.jit(program.step, **program.words),
    }
    return {k: (functools.partial(run, step), copied(program.state)) for k, step in jitted.items()}, program.batches


def steps_in_place(rows: int, dim: int) -> tuple[dict[str, tuple[Run, Any]], list[Any]]:
    """The same of DeepFM as its author wrote it, which changes its modules in place."""

    def run(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, Any]:
        loss = step(*state, batch)
        return state, loss

    out = {}
    for name, jit in {
        "written": nnx.jit,
        "donated": functools.partial(nnx.jit, donate_argnums=(0, 1)),
        "js.jit": js.nnx.jit,
    }.items():
        model, batches, _ = programs.deepfm_parts(rows, dim, SIZES[programs.deepfm]["size"])
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        out[name] = functools.partial(run, jit(programs.deepfm_in_place)), (model, optimizer)
    return out, batches


def arrays_of(state: Any) -> Any:
    """Of a state, which may be nnx modules."""
    return jax.tree.map(lambda x: nnx.state(x) if is_module(x) else x, state, is_leaf=is_module)


def is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def measure(steps: dict[str, tuple[Run, Any]], batches: list[Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step; who begins changes from round to round."""
    names = list(steps)
    states, times = {k: state for k, (_, state) in steps.items()}, {k: [] for k in steps}
    for repeat in range(rounds + 1):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            run, _ = steps[name]
            for batch in batches:
                start = time.perf_counter()
                states[name], others = run(states[name], batch)
                jax.block_until_ready((arrays_of(states[name]), others))
                if repeat:  # the first round compiles
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", help="a part of a program's name")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {options.rows:,} x {options.dim}, ms a step")
    print(f"{'':>16} {'written':>9} {'donated':>9} {'js.jit':>9} {'written/js':>11} {'donated/js':>11}")
    makers = {make.__name__: functools.partial(steps_of, make) for make in SIZES} | {"deepfm_in_place": steps_in_place}
    for name, make in makers.items():
        if options.only is None or options.only in name:
            ms = measure(*make(rows=options.rows, dim=options.dim), options.rounds)
            ours = ms["js.jit"]
            times = " ".join(f"{t:>9.2f}" for t in ms.values())
            print(f"{name:>16} {times} {ms['written'] / ours:>11.2f} {ms['donated'] / ours:>11.2f}", flush=True)


if __name__ == "__main__":
    main()
