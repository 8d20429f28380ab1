"""Contestants in pairs: first their results are held against each other, then they are timed in turn."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tests.benchmarks.worker import Worker
from tests.benchmarks.workloads import NUM_BATCHES, OURS, Case, cases, gpu_cases, size_cases


class Entry(NamedTuple):
    contestant: str
    case: Case


class Result(NamedTuple):
    """Medians in milliseconds, and the median and the quartiles of a round's ratio, other / base."""

    case: str
    base: str
    other: str
    base_ms: float
    other_ms: float
    ratio: float
    low: float
    high: float


def groups(*, gpu: bool) -> list[tuple[Entry, list[Entry]]]:
    """A base, and those it is held against one by one."""
    chosen, (small, *large) = gpu_cases() if gpu else cases(), size_cases()
    alone = [(Entry(name, small), [Entry(name, case) for case in large]) for name in ("jaxsparse", "limit")]
    return [(Entry("jaxsparse", c), [Entry(peer, c) for peer in c.peers]) for c in chosen] + alone * (not gpu)


def run(base: Entry, others: list[Entry], pythons: dict[str, str], rounds: int, known: dict) -> Iterator[Result | str]:
    """A result for each of the others, or what went wrong. `known` keeps the results that others must agree with."""

    def start(entry: Entry) -> contextlib.closing[Worker]:
        return contextlib.closing(Worker(pythons[entry.contestant], *entry))

    checked = set()
    with start(base) as a:
        for other in others:
            # three steps on one batch read the same rows, and there dense and lazy optimizers are the same
            batches = (0, 1, 2) if moves_skipped_rows(base) == moves_skipped_rows(other) else (0, 0, 0)
            with start(other) as b:
                try:
                    if batches not in checked:
                        check(base, a, batches, known)
                        checked.add(batches)
                    check(other, b, batches, known)
                    yield timed(base, a, other, b, rounds)
                except RuntimeError as error:
                    yield str(error)


def moves_skipped_rows(entry: Entry) -> bool:
    """Whether rows move that a step does not read: under dense Adam, and where it is replayed."""
    if entry.contestant in OURS:
        return entry.case.optimizer == "adam_replay"
    return entry.case.rule == "adam" and entry.contestant in ("optax", "keras")


def check(entry: Entry, worker: Worker, batches: tuple[int, ...], known: dict) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        worker.ask("check", batches, file.name)
        found = dict(np.load(file.name))
    want = known.setdefault((entry.case.name, batches), found)
    apart = np.linalg.norm(found["after"] - want["after"]) / np.linalg.norm(want["after"] - want["before"])
    losses = np.abs(found["losses"] / want["losses"] - 1).max()
    if not (apart < 1e-3 and losses < 1e-5):
        raise RuntimeError(
            f"{worker.name} disagrees: rows by {apart:.1e} of how far they moved, losses by {losses:.1e}"
        )


def timed(base: Entry, a: Worker, other: Entry, b: Worker, rounds: int) -> Result:
    lengths = [(worker, warm(worker)) for worker in (a, b)]
    blocks = np.array([[np.median(worker.ask("time", n)) for worker, n in lengths] for _ in range(rounds)])
    low, ratio, high = np.percentile(blocks[:, 1] / blocks[:, 0], [25, 50, 75])
    name = base.contestant if base.case == other.case else f"{base.contestant} on {base.case.name}"
    return Result(other.case.name, name, other.contestant, *map(float, (*np.median(blocks, 0), ratio, low, high)))


def warm(worker: Worker) -> int:
    """Runs all batches, if steps are not slow; returns how many steps make a block of about a quarter of a second."""
    ms = min(worker.ask("time", 3))
    if ms < 100:
        ms = min(worker.ask("time", NUM_BATCHES))
    return min(max(round(250 / ms), 2), 16)
