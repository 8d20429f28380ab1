"""The limit: `limit.c`, one whole step by hand, compiled for the machine and the case and called through ctypes.

Its memory is of anonymous maps, pages of the ordinary size, as malloc gives it to everyone else here; NumPy asks the
kernel for huge pages.
"""

import ctypes
import mmap
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import workloads
from tests.benchmarks.workloads import ADAM, Case, Made

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")


class Rates(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in ("lr", "b1", "b2", "eps"))


def compiled(dim: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        library, source = f"{folder}/limit.so", str(Path(__file__).with_name("limit.c"))
        subprocess.run(["gcc", *FLAGS, f"-DDIM={dim}", source, "-o", library, "-lm"], check=True)
        step = ctypes.CDLL(library).step
    step.restype = ctypes.c_float
    step.argtypes = [ctypes.c_int, ctypes.c_int, Rates] + [ctypes.c_void_p] * 9
    return step


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    size = int(np.prod(shape))
    array = np.frombuffer(mmap.mmap(-1, 4 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype, size).reshape(shape)
    array[:] = 0  # every page is there before anything is timed
    return array


def make(contestant: str, case: Case) -> Made:
    del contestant
    ids, labels, _ = workloads.make_batches(case)
    total, one_step = case.batch * case.length, compiled(case.dim)
    tables = [zeros(case.num_rows, case.dim) for _ in range(3)]
    heads = [zeros(case.dim) for _ in range(3)]
    tables[0][:], heads[0][:] = workloads.initial_table(case), workloads.initial_head(case)
    places = [zeros(total, dtype=np.int32) for _ in range(2)]
    work = [zeros(case.num_rows, dtype=np.int32), zeros(case.batch, case.dim), zeros(total, case.dim), *places]
    count = 0

    def step(i: int) -> float:
        nonlocal count
        count += 1
        root = (1 - ADAM["b2"] ** count) ** 0.5
        rates = Rates(ADAM["lr"] * root / (1 - ADAM["b1"] ** count), ADAM["b1"], ADAM["b2"], ADAM["eps"] * root)
        triples = [(ctypes.c_void_p * 3)(*(array.ctypes.data for array in three)) for three in (tables, heads)]
        first, rest = ([array.ctypes.data for array in arrays] for arrays in ([ids[i], labels[i]], work))
        return one_step(case.batch, case.length, rates, *first, *triples, *rest)

    return step, lambda ids: tables[0][ids]
