"""A contestant in a process of its own, so that no library's threads and memory are in another's way.

Both ends of the pipe: `Worker`, which the benchmark holds, and `main`, which it starts as
`PYTHON -m tests.benchmarks.worker CONTESTANT CASE`. A request and its reply are a line of JSON each.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.workloads import NUM_BATCHES, OURS, Case, Made, make_batches

ROOT = Path(__file__).parents[2]
MODULES = dict.fromkeys((*OURS, "optax"), "with_jax") | dict.fromkeys(("torch", "fbgemm"), "with_torch")
MODULES |= {"keras": "with_keras", "tensorflow": "with_tensorflow", "limit": "with_c"}
# OpenMP's threads wait without spinning: as fast for torch, FBGEMM and C on a quiet machine, and several times faster
# where anything else takes one of two cores for a moment.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Worker:
    """The benchmark's end of the pipe."""

    def __init__(self, python: str, contestant: str, case: Case) -> None:
        self.name = f"{contestant} on {case.name}"
        command = [python, "-m", "tests.benchmarks.worker", contestant, json.dumps(dataclasses.asdict(case))]
        ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, **ends)

    def ask(self, request: str, *arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([request, *arguments]), file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"{self.name} died with {self._process.wait()}")
        answer, error = json.loads(reply)
        if error:
            raise RuntimeError(f"{self.name}: {error}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._process:
            self._process.stdin.close()


class Contestant:
    """Answers requests."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case, self.steps = name, case, 0
        self.made: Made | None = None

    def check(self, batches: list[int], path: str) -> None:
        """Steps from the start on these batches; saves the losses, and the rows of the first before and after."""
        self.made = None
        gc.collect()
        self.made = importlib.import_module(f"tests.benchmarks.{MODULES[self.name]}").make(self.name, self.case)
        step, rows = self.made
        ids = np.unique(make_batches(self.case)[0][batches[0]])
        before = rows(ids)
        losses = [float(step(i)) for i in batches]
        np.savez(path, losses=losses, before=before, after=rows(ids))

    def time(self, steps: int) -> list[float]:
        """Milliseconds of each of these steps, after one that is not timed: another process had the caches."""
        step, times = self.made[0], []
        for _ in range(steps + 1):
            start = time.perf_counter()
            step(self.steps % NUM_BATCHES)
            times.append(1e3 * (time.perf_counter() - start))
            self.steps += 1
        return times[1:]


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    contestant = Contestant(sys.argv[1], Case(**json.loads(sys.argv[2])))
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            reply = getattr(contestant, request)(*arguments), None
        except Exception:
            reply = None, traceback.format_exc(limit=-3)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
