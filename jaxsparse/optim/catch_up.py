r"""The sum of the steps that a row missed, without taking them one by one.

Rows and slots that were up to date after step s go in; they come out as the dense optimizer has them after step t.

An optimizer with moments moves a row after its last gradient too. For Adam, a row that was up to date after step s and
is wanted as it is after step t has missed the steps s + 1, ..., t, k = 1, ..., t - s of them:

    m_k = b1^k m,    v_k = b2^k v,    p -= sum_k num_k m / (den_k sqrt(v) + eps),
    num_k = lr(s + k) b1^k / (1 - b1^(s + k)),    den_k = sqrt(b2^k / (1 - b2^(s + k))).

The sums depend on s, t and the rates, not on the element, but for the way sqrt(v) meets eps. As a function of u = log
den, f(u) = sqrt(den) / (den sqrt(v) + eps) is as smooth as a hyperbolic secant, so we interpolate it in u at the
Chebyshev nodes u_i(s) of the interval that the den_k fall into, l_i being the Lagrange polynomials of these nodes:

    sum_k num_k / (den_k x + eps) = sum_i W_i / (d_i x + eps),    W_i(s) = sum_k num_k sqrt(d_i / den_k) l_i(log den_k).

*History* keeps the W_i, one column for each s modulo HISTORY, a power of two (a TPU pads rows of few numbers to 128). A
step adds its term to the columns of the last few hundred steps (older terms shrink by b1 / sqrt(b2) a step, and are
negligible) and clears its own column. The terms have the rate that was applied, so schedules and rates that are
injected at run time need nothing else, and nothing is divided by a sum that may be 0.

Decoupled weight decay multiplies p by 1 - lr(s + k) wd in every step. A term goes in divided by the product of these
from s on, and p and the sum are multiplied by that product in the end. The product is kept as a sum of logarithms in
two float32 (its value and its rounding error), whose differences stay exact over 10^6 steps.

All functions take arrays with a row for each table row. `replaying.py` chooses the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checks import message

HISTORY = 1 << 16  # steps of history: each row is brought up to date at least once in so many steps
_LOG_DECAY = ("log_decay", "log_decay_lost")  # a sum of logarithms, and its rounding error
_NEGLIGIBLE = 2.0**-24  # terms below this part of the first are left out of a sum

History = dict[str, jax.Array]
Slots = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Adam:
    """The rule of Adam and AdamW, with slots mu and nu.

    Attributes:
      b1, b2, eps: as in optax.adam, Python numbers.
      plain, decayed: whether there are leaves without and with weight decay.
    """

    b1: float
    b2: float
    eps: float
    plain: bool = True
    decayed: bool = False

    @property
    def window(self) -> int:
        """The number of missed steps that move a row by more than rounding."""
        return math.ceil(math.log(_NEGLIGIBLE) / math.log(max(self.b1, 1e-9) / math.sqrt(self.b2)))

    def init(self) -> History:
        nodes = _choose_nodes(self.b1, self.b2)[0]
        out = {}
        if self.plain:
            out["weights"] = jnp.zeros((nodes, HISTORY), jnp.float32)
        if self.decayed:
            out["decayed"] = jnp.zeros((nodes, HISTORY), jnp.float32)
            out |= {name: jnp.zeros(HISTORY, jnp.float32) for name in _LOG_DECAY}
        return out

    def record(self, history: History, step: jax.Array, rate: Any, decay: Any) -> History:
        """The history after step number `step` (1, 2, ...), which had this rate and multiplied by 1 - decay."""
        k = jnp.arange(self.window, 0, -1, dtype=jnp.int32)
        out, terms = dict(history), self._terms(step, k, rate)
        if self.plain:
            out["weights"] = _record(out["weights"], step, terms)
        if self.decayed:
            sums = [history[name] for name in _LOG_DECAY]
            total = _add([_at_steps(x, step - 1) for x in sums], jnp.log1p(-decay))
            terms = terms * jnp.exp(_difference([_at_steps(x, step - k) for x in sums], total))[None]
            out["decayed"] = _record(out["decayed"], step, terms)
            out |= {name: x.at[step % HISTORY].set(n) for name, x, n in zip(_LOG_DECAY, sums, total, strict=True)}
        return out

    def _terms(self, step: jax.Array, k: jax.Array, rate: Any) -> jax.Array:
        """What step number `step` adds to the stamps k (n,) steps before it: (nodes, n)."""
        log_b1, log_b2 = math.log(self.b1) if self.b1 else -math.inf, math.log(self.b2)
        nodes, last = _choose_nodes(self.b1, self.b2)
        num = rate * jnp.exp(k * log_b1) / -jnp.expm1(step * log_b1)
        middle, half = _interval(step - k, log_b2, last)
        u = jnp.clip((_log_den(step - k, k, log_b2) - middle) / half, -1, 1)
        at, lagrange = (jnp.asarray(x, jnp.float32) for x in _chebyshev(nodes))
        basis = jnp.stack(_polynomials(u, nodes), axis=1) @ lagrange
        return (num[:, None] * basis * jnp.exp(0.5 * half[:, None] * (at[None] - u[:, None]))).T

    def catch_up(
        self, history: History, decayed: bool, last: jax.Array, now: jax.Array, p: jax.Array, slots: Slots
    ) -> tuple[jax.Array, Slots]:
        """Rows p (k, ...) and slots, up to date after step `last` (k,), as they are after step `now`."""
        wide = jnp.promote_types(p.dtype, jnp.float32)
        missed = now - last
        spread = functools.partial(_spread, ndim=p.ndim)
        count, log_b2 = _choose_nodes(self.b1, self.b2)[0], math.log(self.b2)
        weights = [_at_steps(x, last) for x in history["decayed" if decayed else "weights"]]
        middle, half = _interval(last, log_b2, _choose_nodes(self.b1, self.b2)[1])
        mu, nu = slots["mu"].astype(wide), slots["nu"].astype(wide)
        root, total = jnp.sqrt(nu), jnp.zeros_like(nu)
        for i, node in enumerate(_chebyshev(count)[0]):
            total += spread(weights[i]) / (root * spread(jnp.exp(middle + half * node)) + self.eps)
        move = mu * total
        value = p.astype(wide)
        if decayed:
            log_decay = _difference(*([_at_steps(history[name], at) for name in _LOG_DECAY] for at in (now, last)))
            # multiplying by 1 - share would round in the same direction at every visit of a popular row
            share = spread(-jnp.expm1(log_decay))
            move = move + share * (value - move)
        has_missed = spread(missed > 0)
        new = {"mu": mu * _power(self.b1, missed, p.ndim), "nu": nu * _power(self.b2, missed, p.ndim)}
        return (
            jnp.where(has_missed, (value - move).astype(p.dtype), p),
            {name: jnp.where(has_missed, new[name].astype(slots[name].dtype), slots[name]) for name in slots},
        )


@dataclasses.dataclass(frozen=True)
class Decay:
    """The rule of SGD and RMSProp: slots that decay, one of which, `trace`, may move the row.

    Attributes:
      rates: pairs (name, rate) of each slot: a step without gradient multiplies the slot by the rate.
      nesterov: whether the row moves by the trace as it will be one step later.
      scaled: whether the trace is multiplied by the learning rate when it moves the row (SGD), or has the rate in it
        already (RMSProp with momentum, as in optax).
    """

    rates: tuple[tuple[str, float], ...]
    nesterov: bool = False
    scaled: bool = True
    decayed = False  # no leaf has weight decay

    @property
    def _momentum(self) -> float:
        return dict(self.rates).get("trace", 0.0)

    @property
    def window(self) -> int:
        if not (self.scaled and self._momentum):
            return 1
        return math.ceil(math.log(_NEGLIGIBLE * (1 - self._momentum)) / math.log(self._momentum))

    def init(self) -> History:
        return {"weights": jnp.zeros((HISTORY,), jnp.float32)} if self.scaled and self._momentum else {}

    def record(self, history: History, step: jax.Array, rate: Any, decay: Any) -> History:
        """The history after step number `step`, which had this rate."""
        del decay
        if not history:
            return history
        k = jnp.arange(1, self.window + 1, dtype=jnp.int32)
        at = jnp.where(step - k >= 0, (step - k) % HISTORY, HISTORY)
        terms = -rate * jnp.exp(k * math.log(self._momentum))
        return {"weights": history["weights"].at[at].add(terms, mode="drop").at[step % HISTORY].set(0)}

    def catch_up(
        self, history: History, decayed: bool, last: jax.Array, now: jax.Array, p: jax.Array, slots: Slots
    ) -> tuple[jax.Array, Slots]:
        """Rows p (k, ...) and slots, up to date after step `last` (k,), as they are after step `now`."""
        del decayed
        missed = now - last
        has_missed = _spread(missed > 0, p.ndim)
        new = {
            name: jnp.where(
                has_missed, (slots[name] * _power(rate, missed, p.ndim)).astype(slots[name].dtype), slots[name]
            )
            for name, rate in self.rates
        }
        momentum = self._momentum
        if momentum:
            if self.scaled:
                total = _at_steps(history["weights"], last)
            else:  # momentum + momentum^2 + ..., a geometric series
                total = momentum * -jnp.expm1(missed * math.log(momentum)) / (1 - momentum)
            move = slots["trace"] * _spread(total * (momentum if self.nesterov else 1), p.ndim)
            wide = jnp.promote_types(p.dtype, jnp.float32)
            p = jnp.where(has_missed, (p.astype(wide) + move).astype(p.dtype), p)
        return p, new


def check_adam(function: str, b1: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool) -> None:
    """Raises where Adam cannot be replayed.

    Raises:
      TypeError: if b1, b2, eps or eps_root are not Python numbers.
      ValueError: if b1 >= b2, eps_root is not 0, or nesterov.
    """
    for name, value in (("b1", b1), ("b2", b2), ("eps", eps), ("eps_root", eps_root)):
        if not isinstance(value, int | float):
            do = "The history depends on it: with optax.inject_hyperparams, list it in static_args."
            raise TypeError(
                message(function, name, "a Python number with untouched='replay'", type(value).__name__, do)
            )
    if not 0 <= b1 < b2 < 1:
        do = "Otherwise the steps that a row missed do not die away."
        raise ValueError(
            message(function, "b1", f"at least 0 and below {b2=}, itself below 1, with untouched='replay'", b1, do)
        )
    if b1 / math.sqrt(b2) >= 1 or Adam(b1, b2, eps).window > HISTORY // 4:
        do = f"The window of missed steps would not fit a history of {HISTORY} steps."
        raise ValueError(message(function, "b1", f"so small that (b1 / sqrt(b2))^{HISTORY // 4} < 2^-24", b1, do))
    if eps_root != 0:
        do = "It changes how a missed step depends on the element; eps is supported."
        raise ValueError(message(function, "eps_root", "0 with untouched='replay'", eps_root, do))
    if nesterov:
        do = "Its missed steps have another bias correction, which the history does not keep."
        raise ValueError(message(function, "nesterov", "False with untouched='replay'", nesterov, do))


def check_rates(function: str, **rates: Any) -> None:
    """Raises where a slot that decays at such a rate cannot be replayed.

    Raises:
      TypeError: if a rate is neither None nor a Python number.
      ValueError: if it is not in [0, 1), or so near to 1 that history is too short for it.
    """
    for name, rate in rates.items():
        if rate is None:
            continue
        if not isinstance(rate, int | float):
            do = "The history depends on it: with optax.inject_hyperparams, list it in static_args."
            raise TypeError(message(function, name, "a Python number with untouched='replay'", type(rate).__name__, do))
        if not 0 <= rate < 1 or Decay((("trace", rate),)).window > HISTORY // 4:
            must = f"at least 0 and so small that {name}^{HISTORY // 4} < 2^-24 (1 - {name}), with untouched='replay'"
            raise ValueError(message(function, name, must, rate))


def _record(x: jax.Array, step: jax.Array, terms: jax.Array) -> jax.Array:
    """History x (nodes, HISTORY) with terms (nodes, window) added to the last steps before `step`; that of `step` is 0.

    It writes two windows of columns, because history is circular. A TPU writes these in place, but would copy history
    for a scatter.
    """
    window = terms.shape[1]
    size = window + 1
    terms = jnp.pad(terms, ((0, 0), (size, size + 1)))
    oldest = (step - window) % HISTORY
    first = jnp.minimum(oldest, HISTORY - size)
    for start, end, skipped in ((first, HISTORY, first - oldest), (0 * first, first, HISTORY - oldest)):
        column = start + jnp.arange(size, dtype=jnp.int32)
        k = jnp.where(column < end, (step - column) % HISTORY, HISTORY)[None]  # how many steps ago
        old = jax.vmap(_at_steps)(x, jnp.broadcast_to(column[None], (x.shape[0], size)))
        new = old + jax.lax.dynamic_slice_in_dim(terms, size + skipped, size, axis=1)
        new = jnp.where(k == 0, 0, jnp.where(k <= jnp.minimum(step, window), new, old))
        x = jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=1)
    return x


def _at_steps(x: jax.Array, steps: jax.Array) -> jax.Array:
    """The entries of a history (HISTORY,) for some steps."""
    return x.at[steps & (HISTORY - 1)].get(mode="promise_in_bounds")


def _spread(x: jax.Array, ndim: int) -> jax.Array:
    """x (k,) with trailing axes."""
    return x.reshape(x.shape + (1,) * (ndim - 1))


def _power(base: float, exponent: jax.Array, ndim: int) -> jax.Array:
    """base^exponent (k, 1, ...) for integers of any size, by squaring: exp(exponent log(base)) would lose 7 bits."""
    out = jnp.ones(exponent.shape, jnp.float32)
    for bit in range(31):
        factor = float(np.float32(base ** (1 << bit)))
        if factor == 0:
            out = jnp.where(exponent >> bit > 0, 0, out)
            break
        out = jnp.where((exponent >> bit) & 1 == 1, out * factor, out)
    return _spread(out, ndim)


def _log_den(s: jax.Array, k: Any, log_b2: float) -> jax.Array:
    """log of den_k at stamp s."""
    return 0.5 * (k * log_b2 - jnp.log(-jnp.expm1((s + k).astype(jnp.float32) * log_b2)))


def _interval(s: jax.Array, log_b2: float, last: int) -> tuple[jax.Array, jax.Array]:
    """Middle and half width of log den_1 ... log den_last, at stamps s (...)."""
    first, end = _log_den(s, 1, log_b2), _log_den(s, last, log_b2)
    return (first + end) / 2, (first - end) / 2


def _polynomials(u: Any, count: int) -> list[Any]:
    """The Chebyshev polynomials T_0 ... of u."""
    out = [u * 0 + 1, u]
    while len(out) < count:
        out.append(2 * u * out[-1] - out[-2])
    return out[:count]


@functools.lru_cache
def _chebyshev(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nodes in (-1, 1), and the Lagrange polynomials of these nodes in terms of Chebyshev's: (degree, node)."""
    nodes = np.cos((2 * np.arange(count) + 1) * np.pi / (2 * count))
    lagrange = 2 * np.stack(_polynomials(nodes, count)) / count
    lagrange[0] /= 2
    return nodes, lagrange


@functools.lru_cache
def _choose_nodes(b1: float, b2: float) -> tuple[int, int]:
    """How many nodes, and the k of the last den_k in their interval: the fewest that are good to float32."""
    window, shrink = Adam(b1, b2, 0.0).window, math.log(max(b1, 1e-9) / math.sqrt(b2))
    for count in (4, 6, 8, 12, 16):
        best = (math.inf, 0)
        # terms below this part of the first are left out: the interval is narrower then
        for part in (_NEGLIGIBLE, 1e-6, 1e-5):
            last = max(2, min(window, math.ceil(math.log(part) / shrink)))
            best = min(best, (max(interpolation_error(b1, b2, s, count, last) for s in (1, 10, 100)), last))
        if best[0] < 1e-6:
            break
    return count, best[1]


def interpolation_error(b1: float, b2: float, stamp: int, count: int, last: int) -> float:
    """The largest relative error of a catch-up from `stamp` over all sqrt(v) / eps, in float64."""
    window = Adam(b1, b2, 0.0).window
    k = np.arange(1, 2 * window + 1)
    log_b1, log_b2 = np.log(max(b1, 1e-9)), np.log(b2)
    num = np.exp(k * log_b1) / -np.expm1((stamp + k) * log_b1)
    log_den = lambda k: 0.5 * (k * log_b2 - np.log(-np.expm1((stamp + k) * log_b2)))  # noqa: E731
    middle, half = (log_den(1) + log_den(last)) / 2, (log_den(1) - log_den(last)) / 2
    u = np.clip((log_den(k) - middle) / half, -1, 1)
    nodes, lagrange = _chebyshev(count)
    terms = num[:, None] * (np.stack(_polynomials(u, count), 1) @ lagrange) * np.exp(0.5 * half * (nodes - u[:, None]))
    roots = 10.0 ** np.arange(-6, 8, 0.25)[:, None] / np.exp(log_den(1))
    exact = (num / (roots * np.exp(log_den(k)) + 1)).sum(1)
    got = (terms[:window].sum(0) / (roots * np.exp(middle + half * nodes) + 1)).sum(1)
    return float(np.abs(got / exact - 1).max())


def _add(sums: Sequence[Any], x: Any) -> tuple[jax.Array, jax.Array]:
    """(value, rounding error) + x."""
    high, x = sums[0], x + sums[1]
    total = high + x
    part = total - high
    return total, (high - (total - part)) + (x - part)


def _difference(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    return (a[0] - b[0]) + (a[1] - b[1])
