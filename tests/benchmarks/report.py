"""What the figures come to: a table, the targets, a plot."""

import operator
from typing import Any

from tests.benchmarks.pairs import Result
from tests.benchmarks.workloads import OURS

LIBRARIES = ("torch", "fbgemm", "tensorflow", "optax", "keras")
CONTESTANTS = ("jaxsparse", "limit", *LIBRARIES, *OURS[1:])
OPTIMIZERS = ("adam", "adam_replay", "adagrad", "rowwise_adagrad", "sgd")

TARGETS = (  # what, the name of its figure, what it has to be
    ("bag, Adam, 1e6: fastest peer / jaxsparse", "bag/adam/1e6 fastest", ">=", 1.5),
    ("bag, Adam, 1e6: torch SparseAdam / jaxsparse", "bag/adam/1e6 torch", ">=", 2.5),
    ("bag, Adagrad, 1e6: fastest peer / jaxsparse", "bag/adagrad/1e6 fastest", ">=", 1.2),
    ("bag, rowwise Adagrad, 1e6: fastest peer / jaxsparse", "bag/rowwise_adagrad/1e6 fastest", ">=", 1.2),
    ("bag, SGD, 1e6: fastest peer / jaxsparse", "bag/sgd/1e6 fastest", ">=", 1.1),
    ("bag, Adam, 1e6: dense optax / jaxsparse", "bag/adam/1e6 optax", ">=", 12),
    ("bag, Adam, 1e7: dense optax / jaxsparse", "bag/adam/1e7 optax", ">=", 100),
    ("bag, Adam: 1e7 / 1e5, the first rows of both", "size/1e7-first jaxsparse", "<=", 1.15),
    ("bag, Adam: 1e7 / 1e5, rows all over it, / that of C", "size/1e7-spread over C", "<=", 1.15),
    ("bag, Adam, 1e6: stock step under js.jit, arrays / jaxsparse", "bag/adam/1e6 js.jit", "<=", 1.15),
    ("bag, Adam, 1e6: make_train_step, arrays / jaxsparse", "bag/adam/1e6 arrays", "<=", 1.15),
    ("bag, Adam, 1e6: two words under js.jit, arrays / jaxsparse", "bag/adam/1e6 words js.jit", "<=", 1.15),
    ("bag, Adam, 1e6: two words under jax.jit, js.batches / jaxsparse", "bag/adam/1e6 words batches", "<=", 1.5),
    ("bag, Adam, 1e6: torch SparseAdam / two words under jax.jit, arrays", "bag/adam/1e6 torch over words", ">=", 1.0),
    ("unmodified nn.Embed / embedding_bag", "unmodified/adam linen", "<=", 2),
    ("uniform ids, Adam, 1e6: fastest peer / jaxsparse", "uniform/adam fastest", ">=", 1.2),
    ("bag, Adam, 1e6: jaxsparse / C", "bag/adam/1e6 over C", "<=", 1.3),
    ("peak memory of a step / table and slots", "memory step", "<=", 1.10),
    ("peak memory of making the state, by the recipe", "memory init_recipe", "<=", 1.40),
    ("compile time, L = 20, s", "memory compile_20_s", "<=", 5),
    ("compile time, L = 500, s", "memory compile_500_s", "<=", 8),
    ("flights: end to end / the step's own rate", "flights ids", ">=", 0.9),
    ("flights as CSR: end to end / the step's own rate", "flights csr", ">=", 0.9),
    ("GPU, 65,536 bags, Adam, 1e7: torch SparseAdam / jaxsparse", "gpu/adam/1e7x128 torch", ">=", 5),
)


def line(result: Result) -> str:
    case, base, other, base_ms, other_ms, ratio, low, high = result
    return (
        f"{case:22} {other:>10} {other_ms:9.2f} ms   {base} {base_ms:.2f} ms   ratio {ratio:.2f} ({low:.2f}-{high:.2f})"
    )


def milliseconds(results: list[Result]) -> dict[tuple[str, str], float]:
    """By case and contestant; of jaxsparse's, beside several peers, the median of the medians."""
    times: dict[tuple[str, str], list[float]] = {}
    for r in results:
        times.setdefault((r.case, r.base), []).append(r.base_ms)
        times.setdefault((r.case, r.other), []).append(r.other_ms)
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}


def figures(results: list[Result], parts: dict[str, Any]) -> dict[str, float]:
    """By name: ratios of cases, and the numbers of the other parts."""
    named = {f"{r.case} {r.other}": r.ratio for r in results}
    for case in dict.fromkeys(r.case for r in results):
        ratios = [r.ratio for r in results if r.case == case and r.other in LIBRARIES]
        if ratios:
            named[f"{case} fastest"] = min(ratios)
        if (to_limit := named.get(f"{case} limit")) is not None:
            named[f"{case} over C"] = named.get(f"{case} jaxsparse", 1.0) / to_limit
        if f"{case} words" in named and f"{case} torch" in named:
            named[f"{case} torch over words"] = named[f"{case} torch"] / named[f"{case} words"]
    return named | {f"{part} {name}": x for part, of in parts.items() if isinstance(of, dict) for name, x in of.items()}


def targets(named: dict[str, float]) -> list[dict[str, Any]]:
    """What must be true, as far as it was measured."""
    compare = {">=": operator.ge, "<=": operator.le}
    return [
        {"what": what, "value": named[name], "target": f"{sign} {bound:g}", "met": compare[sign](named[name], bound)}
        for what, name, sign, bound in TARGETS
        if name in named
    ]


def table(results: list[Result], named: dict[str, float]) -> str:
    """Milliseconds a step, and the fastest library's over jaxsparse's."""
    ms, lines = milliseconds(results), [f"\n{'ms a step':22}" + "".join(f"{c:>11}" for c in (*CONTESTANTS, "fastest"))]
    for case in dict.fromkeys(r.case for r in results if r.base == "jaxsparse"):
        cells = [ms.get((case, c)) for c in CONTESTANTS] + [named.get(f"{case} fastest")]
        lines.append(f"{case:22}" + "".join(f"{'' if x is None else format(x, '.2f'):>11}" for x in cells))
    return "\n".join(lines) if lines[1:] else ""


def plot(results: list[Result], path: str) -> None:
    """Adam's step against the size of the table, and each optimizer's at 10^6 rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ms, bars = milliseconds(results), {}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for color, name in enumerate((OURS[0], "limit", *LIBRARIES)):
        points = [(10**e, ms[f"bag/adam/1e{e}", name]) for e in (5, 6, 7) if (f"bag/adam/1e{e}", name) in ms]
        width = 3 if name == "jaxsparse" else 1.5
        left.loglog([x for x, _ in points], [y for _, y in points], f"C{color}o-", linewidth=width, label=name)
        for row, optimizer in enumerate(OPTIMIZERS):
            if (time := ms.get((f"bag/{optimizer}/1e6", name))) is not None:
                bars[row] = bars.get(row, -1) + 1  # from the top of its row
                right.barh(row - 0.35 + 0.12 * bars[row], time, 0.12, color=f"C{color}")
    left.set(xlabel="rows of the table", ylabel="ms a step", title="Adam, 4096 bags of 20 ids, 64 columns")
    left.legend()
    right.set(xscale="log", xlim=(1, None), xlabel="ms a step", title="10^6 rows", ylim=(len(OPTIMIZERS) - 0.5, -0.5))
    right.set_yticks(range(len(OPTIMIZERS)), [name.replace("_", " ") for name in OPTIMIZERS])
    figure.savefig(path, dpi=150)
