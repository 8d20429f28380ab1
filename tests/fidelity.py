"""`python -m tests.fidelity`: after js.flush, how far replay is from dense optax, drawn over more than 1,000 cases.

**Three runs** of every case, on the same float32 rates and gradients: dense optax in float64 (the reference), dense
optax in float32, and the jaxsparse optimizer with untouched="replay" in float32, flushed at the end. Only the reference
runs with x64 enabled.

**Deviation** of an element of a parameter or of a moment (mu, nu, trace, sum_of_squares): its distance from the
reference, in units of 2^-24 x scale, the rounding of float32 at that scale. The scale is the element's own, from
the reference:

* of a parameter: max(|p| at the start, |p| at the end, movement), movement being the sum of |change| over all steps;
* of a moment that decays by b: what the moment would be had all contributions to it the same sign, the same recursion
  on their sizes; a moment that has decayed to nothing is thus compared with that nothing, not with its past.

A factor b^k underflows at 2^-126, and moments of up to 2^20 are multiplied by it: so a unit is never less than 2^-106,
1e-32.

**Criterion**: in every group of rows, the largest deviation of replay <= max(FLOOR, 2 sqrt(n), LUCK x the largest
deviation of dense float32 in this group). A group is the rows of one array in one case with as many gradients, n (to a
power of two), and as long a longest skip (to a power of ten): a popular row's rounding excuses no rare row, a long skip
no short one, and a case no other.

* FLOOR = 4, a few units: a catch-up rounds the power or the sum it looks up, the product with the moment, and the row;
  dense float32, which rounds in every step, may by luck lose nothing at all.
* 2 sqrt(n): a row with n gradients is rounded by n refreshes and n updates, each by up to one unit (0.58 in the root
  mean square): 0.8 sqrt(n) in all, and the largest of a few dozen such elements is 2.5 times that. Dense float32 rounds
  at least as often, but either may be the luckier, even where both do the same (Adagrad, or rows of every step).
* LUCK = 2: for that reason too. Rounding errors of equal size differ by as much in a group of a few elements.

**bfloat16 tables** keep float32 moments, which are held to the same criterion (their gradients are drawn so that
bfloat16 holds them). Their parameters are compared with the dense run of a float32 table, cast at the end. A row with n
gradients is rounded to bfloat16 by n refreshes, n updates, every flush and the cast: at most
2^-8 |p| each, and weight decay multiplies a rounded p: so the tolerance is 2^-8 (2 n + flushes + 2) scale, and as much
of the criterion's units.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxsparse as js
from jaxsparse.optim import catch_up

FLOOR = 4.0
LUCK = 2.0
SLOTS = ("mu", "nu", "trace", "sum_of_squares")
BETAS = ((0.9, 0.999), (0.9, 0.95), (0.95, 0.99), (0.9, 0.98), (0.99, 0.999))
RATES = ("constant", "warm-up", "cosine", "piecewise")
TABLES = (
    {"t": (200, 8)},
    {"t": (150, 4), "u": (80, 16), "v": (120,)},
    {"v": (300,)},
    {"t": (100, 1), "u": (64, 3), "w": (5,)},  # w is read as a whole
)
WHOLE = "w"
MASK = {"t": True, "u": False, "v": True, "w": False}


def rowwise_adagrad(learning_rate, eps):
    """Dense Adagrad with one accumulator a row, which optax has not."""

    def init_fn(params):
        return optax.ScaleByRssState(jax.tree.map(lambda p: jnp.zeros_like(p, shape=p.shape[:1]), params))

    def update_fn(updates, state, params=None):
        del params
        sums = jax.tree.map(
            lambda g, s: s + jnp.mean(g**2, axis=tuple(range(1, g.ndim))), updates, state.sum_of_squares
        )
        scale = lambda g, s: g / (jnp.sqrt(s) + eps).reshape(s.shape + (1,) * (g.ndim - 1))  # noqa: E731
        return jax.tree.map(scale, updates, sums), optax.ScaleByRssState(sums)

    return optax.chain(optax.GradientTransformation(init_fn, update_fn), optax.scale_by_learning_rate(learning_rate))


# name: (dense, ours, settings beside those that are drawn)
OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adam": (optax.adam, js.lazy_adam, {}),
    "adamw": (optax.adamw, js.lazy_adamw, {}),
    "adamw, mask": (optax.adamw, js.lazy_adamw, {}),
    "momentum": (optax.sgd, js.lazy_sgd, {}),
    "nesterov": (optax.sgd, js.lazy_sgd, {"nesterov": True}),
    "sgd": (optax.sgd, js.lazy_sgd, {}),
    "adagrad": (optax.adagrad, js.lazy_adagrad, {}),
    "rowwise adagrad": (rowwise_adagrad, js.lazy_rowwise_adagrad, {}),
    "rmsprop": (optax.rmsprop, js.lazy_rmsprop, {}),
    "rmsprop, centered": (optax.rmsprop, js.lazy_rmsprop, {"centered": True}),
    "rmsprop, momentum": (optax.rmsprop, js.lazy_rmsprop, {"momentum": 0.9}),
    "rmsprop, nesterov": (optax.rmsprop, js.lazy_rmsprop, {"momentum": 0.9, "nesterov": True, "centered": True}),
    "rmsprop, corrected": (optax.rmsprop, js.lazy_rmsprop, {"momentum": 0.9, "bias_correction": True}),
}
# Which one each group of cases takes, in turn: half of them Adam or AdamW, which have most to get wrong.
TURNS = (
    *("adam", "adamw", "momentum", "adam", "adamw, mask", "rmsprop, centered", "adam", "adamw", "nesterov"),
    *("adam", "adamw, mask", "adagrad", "adam", "adamw", "rmsprop, momentum", "adam", "adamw", "sgd"),
    *("rowwise adagrad", "rmsprop, nesterov", "rmsprop", "rmsprop, corrected"),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings that are compiled in, and so shared by several cases: these differ in rates, ids and gradients."""

    optimizer: str
    settings: tuple[tuple[str, Any], ...]  # arguments of the optimizer
    tables: int  # index of TABLES, or -1: one small table for long runs
    steps: int
    cases: int
    ids: str  # zipf, uniform or rare
    form: str  # "step": js.make_train_step; "by hand": js.refresh, js.grad, update, apply_updates
    injected: bool  # the rate is set from outside, between steps, by optax.inject_hyperparams
    clip: float | None  # before=optax.clip_by_global_norm(clip)
    dtype: str  # of tables
    history: int  # steps of history
    seed: int

    @property
    def shapes(self):
        return TABLES[self.tables] if self.tables >= 0 else {"t": (24, 4)}

    def decays(self):
        """What each kind of slot is multiplied by in a step without gradient."""
        s = dict(self.settings)
        if "b1" in s:
            return {"mu": s["b1"], "nu": s["b2"]}
        return {"mu": s.get("decay"), "nu": s.get("decay"), "trace": s.get("momentum"), "sum_of_squares": 1.0}


def log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_group(rng, turn, steps=300, cases=8):
    """The group whose turn it is: optimizers go round, all else is drawn."""
    name = TURNS[turn % len(TURNS)]
    settings = dict(OPTIMIZERS[name][2])
    history, fits = (65536 if steps < 1000 or steps > 20000 else 1024), False
    if name.startswith("adam"):
        settings["b1"], settings["b2"] = BETAS[(turn + turn // len(TURNS)) % len(BETAS)]
        if name.startswith("adamw"):
            settings["weight_decay"] = log_uniform(rng, 1e-4, 0.3)
        if name == "adamw, mask":
            settings["mask"] = "MASK"
    elif name in ("momentum", "nesterov"):
        settings["momentum"] = float(rng.choice([0.5, 0.9, 0.99]))
    elif name.startswith("rmsprop"):
        settings["decay"] = float(rng.choice([0.9, 0.99]))
        settings["eps_in_sqrt"] = bool(rng.integers(2))
    if name not in ("momentum", "nesterov", "sgd"):
        settings["eps"] = log_uniform(rng, 1e-10, 1e-3)
    injected = rng.random() < 0.2
    dtype = "bfloat16" if name[:5] in ("adam", "adamw", "momen") and not injected and rng.random() < 0.15 else "float32"
    if dtype == "bfloat16" and name == "momentum":
        settings["accumulator_dtype"] = "float32"
    while not fits:  # a history that is too short for these betas is refused
        try:
            with shrunk(history):
                lazy_optimizer(OPTIMIZERS[name][1], settings, 0.1)
            fits = True
        except ValueError:
            history *= 2
    return Group(
        optimizer=name,
        settings=tuple(settings.items()),
        tables=int(rng.integers(len(TABLES))) if steps <= 300 else -1,
        steps=steps,
        cases=cases,
        ids=("zipf", "uniform")[int(rng.integers(2))] if steps <= 300 else "rare",
        form=("step", "by hand")[int(rng.integers(2))],
        injected=injected,
        clip=log_uniform(rng, 1e-3, 10.0) if dtype == "float32" and rng.random() < 0.2 else None,
        dtype=dtype,
        history=history,
        seed=int(rng.integers(1 << 31)),
    )


@contextlib.contextmanager
def shrunk(history):
    """jaxsparse with so many steps of history, that it may go round while we look."""
    before, catch_up.HISTORY = catch_up.HISTORY, history
    try:
        yield
    finally:
        catch_up.HISTORY = before


def resolve(settings):
    names = {"mask": lambda params: {k: MASK[k] for k in params}, "accumulator_dtype": jnp.float32}
    return {k: names.get(k, v) for k, v in dict(settings).items()}


def lazy_optimizer(make, settings, rate, **more):
    return make(rate, **resolve(settings), untouched="replay", **more)


def optimizers(group, rates, freeze=False):
    """(dense, ours) with this rate after each number of updates."""
    dense, ours, _ = OPTIMIZERS[group.optimizer]
    before = None if group.clip is None else optax.clip_by_global_norm(group.clip)
    settings = resolve(group.settings)
    if group.dtype == "bfloat16":
        dense_settings = {k: v for k, v in settings.items() if k != "accumulator_dtype"}
    else:
        dense_settings = settings
    more = {"before": before, "untouched": "freeze" if freeze else "replay"}
    if group.injected:
        dense = optax.inject_hyperparams(dense, fixed(dense))(learning_rate=0.1, **dense_settings)
        ours = optax.inject_hyperparams(ours, fixed(ours))(learning_rate=0.1, **settings, **more)
    else:
        schedule = lambda count: rates[count]  # noqa: E731
        dense, ours = dense(schedule, **dense_settings), ours(schedule, **settings, **more)
    return dense if before is None else optax.chain(before, dense), ours


def fixed(make):
    """The arguments that inject_hyperparams shall not inject, defaults included."""
    return tuple(set(inspect.signature(make).parameters) - {"learning_rate", "weight_decay"})


def inject(group, opt_state, rate):
    """The state with another learning rate: what a training loop does to it between steps."""
    if not group.injected:
        return opt_state
    if isinstance(opt_state, tuple) and not hasattr(opt_state, "hyperparams"):  # chain(clip, ...)
        return (opt_state[0], inject(group, opt_state[1], rate))
    return opt_state._replace(hyperparams=opt_state.hyperparams | {"learning_rate": rate})


def draw_rates(rng, group):
    """Its kind, and the rates of all steps, float32."""
    peak, steps = log_uniform(rng, 1e-4, 0.1), group.steps
    warm = int(rng.integers(1, steps // 3))
    if group.injected:  # any rate at any time, and now and then none
        every = int(rng.integers(1, 50))
        rates = peak * 10 ** rng.uniform(-2, 0, steps) * (rng.random(steps) < 0.9)
        return "injected", np.repeat(rates, every)[:steps].astype(np.float32)
    kind = RATES[int(rng.integers(len(RATES)))]
    cuts = {
        int(i): float(x) for i, x in zip(rng.integers(1, steps, 4), rng.choice([0.0, 0.1, 0.5, 2.0], 4), strict=True)
    }
    schedule = {
        "constant": optax.constant_schedule(peak),
        "warm-up": optax.warmup_constant_schedule(0.0, peak, warm),
        "cosine": optax.warmup_cosine_decay_schedule(0.0, peak, warm, steps, peak / 100),
        "piecewise": optax.piecewise_constant_schedule(peak, cuts),
    }[kind]
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=jnp.float32)) * jnp.ones(steps)
    return kind, np.asarray(rates, np.float32)


def draw_ids(rng, kind, steps, rows):
    """(steps, k): ids with duplicates; the last tenth of the rows is never named."""
    named = max(1, rows * 9 // 10)
    if kind == "uniform":
        return rng.integers(0, named, (steps, 8))
    if kind == "zipf":
        return (rng.zipf(log_uniform(rng, 1.1, 2.0), (steps, 12)) - 1) % named
    ids = np.zeros((steps, 2), np.int64)  # row 0 in every step, each other row a few times in the whole run
    for row in range(1, named):
        at = np.exp(rng.uniform(0, np.log(steps), rng.integers(1, 6))).astype(int) % steps
        ids[steps - 1 - at if rng.integers(2) else at, 1] = row
    return ids


def draw_case(rng, group):
    """Start values, and for every step its rate, ids and gradients; and what to call it."""
    kind, rates = draw_rates(rng, group)
    by_row, start = bool(rng.integers(2)), log_uniform(rng, 1e-3, 1.0)
    one = log_uniform(rng, 1e-8, 1e3)
    case = {"p": {}, "ids": {}, "g": {}, "rates": rates}
    for name, shape in group.shapes.items():
        exact = (lambda x: x.astype(jnp.bfloat16)) if group.dtype == "bfloat16" else lambda x: x
        case["p"][name] = exact((start * rng.normal(size=shape)).astype(np.float32)).astype(np.float32)
        scales = 10 ** rng.uniform(-8, 3, shape[0]) if by_row else np.full(shape[0], one)
        if name == WHOLE:
            case["g"][name] = (scales * rng.normal(size=(group.steps, *shape))).astype(np.float32)
            continue
        ids = draw_ids(rng, group.ids, group.steps, shape[0])
        # Repeats of an id have gradients of one sign: the order of their sum is nobody's, and must not matter more.
        sign = rng.choice([-1, 1], (group.steps, 1, *shape[1:])) * rng.choice([-1, 1], shape)[ids]
        sizes = abs(rng.normal(size=sign.shape)) * scales[ids].reshape(ids.shape + (1,) * (len(shape) - 1))
        g = sign * sizes
        if group.dtype == "bfloat16":  # sums of duplicates are exact too: only the first has a gradient
            order = np.sort(ids, axis=1)
            first = np.concatenate([np.ones((len(ids), 1), bool), order[:, 1:] != order[:, :-1]], axis=1)
            ids, g = order, g * first.reshape(ids.shape + (1,) * (len(shape) - 1))
        case["ids"][name] = ids.astype(np.int32)
        case["g"][name] = exact(g.astype(np.float32)).astype(np.float32)
    return case, {"rates": kind, "peak": float(rates.max()), "gradients": "by row" if by_row else f"{one:.1e}"}


def slots_of(opt_state):
    """{(slot, parameter): array}, wherever in the state they are."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        for at, part in itertools.pairwise(path):
            if getattr(at, "name", None) in SLOTS and hasattr(part, "key"):
                found[at.name, part.key] = leaf
    return found


def run_dense(group, cases, dtype):
    """Values of parameters ("p", name) and slots after all steps of dense optax, and their scales."""
    decays = group.decays()

    def run(case):
        tx, _ = optimizers(group, case["rates"])
        start = case["p"]

        def body(carry, now):
            params, opt_state, scales = carry
            grads = {
                k: jnp.zeros_like(params[k]).at[now["ids"][k]].add(g) if k != WHOLE else g for k, g in now["g"].items()
            }
            updates, new_state = tx.update(grads, inject(group, opt_state, now["rate"]), params)
            new, old = optax.apply_updates(params, updates), slots_of(opt_state)
            moved = {("p", k): scales["p", k] + abs(new[k] - params[k]) for k in params}
            for at, slot in slots_of(new_state).items():
                decay = decays[at[0]]
                moved[at] = decay * scales[at] + abs(slot - decay * old[at])
            return (new, new_state, moved), None

        state = tx.init(start)
        scales = {("p", k): jnp.zeros_like(p) for k, p in start.items()}
        scales |= {at: abs(slot) for at, slot in slots_of(state).items()}
        steps = {"ids": case["ids"], "g": case["g"], "rate": case["rates"]}
        params, state, scales = jax.lax.scan(body, (start, state, scales), steps)[0]
        values = {("p", k): p for k, p in params.items()} | slots_of(state)
        sizes = {
            at: jnp.maximum(scales[at], jnp.maximum(abs(x), abs(start[at[1]])) if at[0] == "p" else abs(x))
            for at, x in values.items()
        }
        return values, sizes

    cast = lambda x: x.astype(dtype) if x.dtype == np.float32 else x  # noqa: E731
    return jax.device_get(jax.jit(lambda cases: jax.lax.map(run, cases))(jax.tree.map(cast, cases)))


def loss_fn(params, batch):
    reads = [params[k] if k == WHOLE else params[k][batch["ids"][k]] for k in params]
    return sum(jnp.sum(read * g) for read, g in zip(reads, batch["g"].values(), strict=True))


def run_ours(group, cases, freeze=False):
    """What run_dense returns first, of the jaxsparse optimizer, flushed."""
    step = js.make_train_step(loss_fn, jit=False)

    def run(case):
        _, tx = optimizers(group, case["rates"], freeze)
        steps = {"ids": case["ids"], "g": case["g"], "rate": case["rates"]}
        start = {k: p.astype(group.dtype) for k, p in case["p"].items()}

        def by_step(state, now):
            state = state.replace(opt_state=inject(group, state.opt_state, now["rate"]))
            return step(state, now)[0], None

        def by_hand(pair, now):
            params, opt_state = js.refresh(loss_fn)((pair[0], inject(group, pair[1], now["rate"])), now)
            updates, opt_state = tx.update(js.grad(loss_fn)(params, now), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        if group.form == "step":
            state = TrainState.create(apply_fn=None, params=start, tx=tx).replace(step=jnp.int32(0))
            state = js.flush(jax.lax.scan(by_step, state, steps)[0])
            params, opt_state = state.params, state.opt_state
        else:
            params, opt_state = js.flush(jax.lax.scan(by_hand, (start, tx.init(start)), steps)[0])
        return {("p", k): p.astype(jnp.float32) for k, p in params.items()} | slots_of(opt_state)

    with shrunk(group.history):
        return jax.device_get(jax.jit(lambda cases: jax.lax.map(run, cases))(cases))


class Finding(NamedTuple):
    """A group of rows: of one array in one case, with like many gradients and a like longest skip."""

    case: int
    slot: str  # or "p"
    parameter: str
    touches: int  # the most of its rows
    skip: int  # the longest, floor(log10)
    replay: float  # the largest deviation, in units
    float32: float  # that of dense float32
    replay_absolute: float
    float32_absolute: float
    tolerance: float  # in units

    @property
    def violates(self):
        return not self.replay <= self.tolerance


@functools.lru_cache(maxsize=1)
def reference(group):
    """(each case and its labels, all cases in one, what run_dense returns in float64, its values in float32)."""
    rng = np.random.default_rng(group.seed)
    drawn = [draw_case(rng, group) for _ in range(group.cases)]
    cases = jax.tree.map(lambda *xs: np.stack(xs), *[case for case, _ in drawn])
    with jax.enable_x64(True):
        exact = run_dense(group, cases, np.float64)
    return drawn, cases, exact, run_dense(group, cases, np.float32)[0]


def run_group(group, freeze=False):
    """(labels of each case, findings)."""
    drawn, cases, (want, sizes), dense = reference(group)
    got = run_ours(group, cases, freeze)
    assert got.keys() == want.keys() == dense.keys(), (got.keys(), want.keys())
    assert {x.dtype for x in want.values()} == {np.dtype(np.float64)}
    findings = []
    for at in want:
        for i, (case, _) in enumerate(drawn):
            arrays = [x[at][i] for x in (got, dense, want, sizes)]
            findings += [Finding(i, *at, *found) for found in compare(group, case, at, *arrays)]
    return [label for _, label in drawn], findings


def compare(group, case, at, got, dense, want, sizes):
    """What follows (case, slot, parameter) in the findings about one array."""
    touches, skip = history_of(case["ids"].get(at[1]), group.steps, len(want))
    widest = lambda x: np.nan_to_num(x, nan=np.inf).reshape(len(x), -1).max(1)  # noqa: E731
    unit = np.maximum(sizes * 2.0**-24, 2.0**-106)
    theirs = abs(dense.astype(np.float64) - want)
    rounded = group.dtype == "bfloat16" and at[0] == "p"
    ours = abs(got.astype(np.float64) - (np.asarray(dense.astype(jnp.bfloat16), np.float64) if rounded else want))
    of_rows = [widest(x) for x in (ours / unit, theirs / unit, ours, theirs)]
    codes = np.floor(np.log2(touches + 1)).astype(int) * 10 + np.floor(np.log10(np.maximum(skip, 1))).astype(int)
    for code in np.unique(codes):
        rows = codes == code
        most = int(touches[rows].max())
        largest = [float(x[rows].max()) for x in of_rows]
        tolerance = max(FLOOR, 2 * math.sqrt(most), LUCK * largest[1])
        if rounded:
            flushes = 1 + group.steps // (group.history // 2)
            tolerance += 2.0**16 * (2 * most + flushes + 2)
        yield most, int(code % 10), *largest, tolerance


def history_of(ids, steps, rows):
    """In how many steps each row was named, and the longest time it was not; ids None: always."""
    if ids is None:
        return np.full(rows, steps), np.zeros(rows, int)
    touches, longest, last = np.zeros(rows, int), np.zeros(rows, int), np.full(rows, -1)
    for step, named in enumerate(ids):
        now = np.unique(named)
        longest[now] = np.maximum(longest[now], step - 1 - last[now])
        touches[now] += 1
        last[now] = step
    return touches, np.maximum(longest, steps - 1 - last)


def draw_groups(seed, cases):
    """So many cases, in groups: some go through their history more than once, and a few are long."""
    rng, groups = np.random.default_rng(seed), []
    long = {5: (20_000, 3), 7: (100_000, 1), 10: (20_000, 3), 13: (100_000, 1), 26: (20_000, 3)}
    while sum(group.cases for group in groups) < cases:
        turn = len(groups)
        steps, many = long.get(turn, (2500, 12) if turn % 8 == 4 else (300, 28))
        groups.append(draw_group(rng, turn, steps, many))
    return groups


def decade(x):
    return "none" if x is None else f"1e{math.floor(math.log10(x)):+03d}"


def views(group, label, finding):
    """Under which headings of the table a finding belongs."""
    s = dict(group.settings)
    yield "optimizer", group.optimizer
    if "b1" in s:
        yield "betas", f"{s['b1']}, {s['b2']}"
    if "eps" in s:
        yield "eps", decade(s["eps"])
    yield "rates", label["rates"]
    yield "longest skip", ("0-9", "10-99", "100-999", "1,000-9,999", "10,000-99,999", "100,000")[finding.skip]
    yield "history", f"{group.history} of {group.steps}"
    yield "form", group.form
    yield "before", "clip" if group.clip else "none"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin, table, bad, worst, total = time.perf_counter(), collections.defaultdict(list), set(), [], 0
    for number, group in enumerate(draw_groups(options.seed, options.cases)):
        start = time.perf_counter()
        labels, findings = run_group(group)
        total += group.cases
        for finding in findings:
            label, case = labels[finding.case], (number, finding.case)
            if finding.violates:
                bad.add(case)
            for view in views(group, label, finding) if group.dtype == "float32" else ():
                table[view].append((case, finding))
            table["tables", group.dtype].append((case, finding))
        most = max(findings, key=lambda f: f.replay / f.tolerance)
        worst.append((most.replay / most.tolerance, group, labels[most.case], most))
        seconds = time.perf_counter() - start
        print(f"{number}: {total} cases, {len(bad)} violate, {seconds:.1f} s, {group.optimizer}", file=sys.stderr)
    report(table)
    print(f"\n{total} cases, {len(bad)} violate, {time.perf_counter() - begin:.0f} s")
    for ratio, *what in sorted(worst, key=lambda w: -w[0])[:3]:
        print(f"{ratio:.2f} of its tolerance:", *what, sep="\n  ")
    return 1 if bad else 0


def report(table):
    """The largest deviations under every heading: parameters and moments, in units, then parameters' absolute ones."""
    last = None
    for what, value in sorted(table):
        if what != last:
            last = what
            print(f"\n{what:20} cases violate | p: replay   float32 | moments:     float32 | absolute p:  float32")
        found = table[what, value]
        row = f"  {value:18} {len({c for c, _ in found}):5} {len({c for c, f in found if f.violates}):7}"
        of_p = [f for _, f in found if f.slot == "p"]
        of_slots = [f for _, f in found if f.slot != "p"]
        for part, fields in ((of_p, (5, 6)), (of_slots, (5, 6)), (of_p, (7, 8))):
            for field in fields:
                most = max((f[field] for f in part), default=0.0)
                row += f" {most:11.1e}" if field > 6 else f" {most:11.1f}"
        print(row)


if __name__ == "__main__":
    sys.exit(main())
