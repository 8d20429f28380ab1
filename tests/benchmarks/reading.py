"""`python -m tests.benchmarks.reading`: examples and megabytes a second of one core that the readers take.

Beside it the same for scikit-learn's svmlight loader, pandas's and pyarrow's CSV readers, if they are there; these do
not hash, and say no line of a bad value.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import jaxsparse as js

N, ROUNDS = 50_000, 5
CRITEO = ["click", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def write(folder):
    rng = np.random.default_rng(0)
    with open(folder / "a.svm", "w") as svm, open(folder / "a.vw", "w") as vw:
        for _ in range(N):
            entries = [
                f"{i}:{v:.4f}" for i, v in zip(np.sort(rng.choice(10**5, 30, False)) + 1, rng.random(30), strict=True)
            ]
            svm.write(f"1 {' '.join(entries)}\n")
            vw.write(f"1 |words {' '.join('w' + entry for entry in entries)}\n")
    with open(folder / "a.tsv", "w") as tsv, open(folder / "a.jsonl", "w") as jsonl:
        for numbers, categories in zip(rng.integers(0, 500, (N, 13)), rng.zipf(1.3, (N, 26)) % 2**31, strict=True):
            row = [1, *numbers.tolist(), *(f"{c:08x}" for c in categories.tolist())]
            tsv.write("\t".join(map(str, row)) + "\n")
            jsonl.write(json.dumps(dict(zip(CRITEO, row, strict=True))) + "\n")


def readers(folder):
    asked = {"label": "click", "numbers": CRITEO[1:14], "hashed": CRITEO[14:], "num_rows": 2**20}
    yield "a.svm", "js.read_svmlight", lambda: list(js.read_svmlight(folder / "a.svm", num_features=10**5))
    yield "a.vw", "js.read_vw", lambda: list(js.read_vw(folder / "a.vw", num_rows=2**20))
    yield "a.tsv", "js.read_csv", lambda: list(js.read_csv(folder / "a.tsv", columns=CRITEO, **asked))
    yield "a.jsonl", "js.read_jsonl", lambda: list(js.read_jsonl(folder / "a.jsonl", **asked))
    if importlib.util.find_spec("sklearn"):
        from sklearn.datasets import load_svmlight_file

        yield "a.svm", "sklearn", lambda: load_svmlight_file(str(folder / "a.svm"), n_features=10**5)
    if importlib.util.find_spec("pandas"):
        import pandas as pd

        yield "a.tsv", "pandas", lambda: pd.read_csv(folder / "a.tsv", sep="\t", names=CRITEO)
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import csv, parquet

        how = {"read_options": csv.ReadOptions(column_names=CRITEO, use_threads=False)}
        how["parse_options"] = csv.ParseOptions(delimiter="\t")
        yield "a.tsv", "pyarrow.csv", lambda: csv.read_csv(folder / "a.tsv", **how)
        parquet.write_table(csv.read_csv(folder / "a.tsv", **how), folder / "a.parquet")
        yield "a.parquet", "js.read_parquet", lambda: list(js.read_parquet(folder / "a.parquet", **asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for file, reader, run in readers(folder):
            times = []
            for _ in range(ROUNDS + 1):  # the first is not timed
                start = time.process_time()
                run()
                times.append(time.process_time() - start)
            seconds, megabytes = float(np.median(times[1:])), (folder / file).stat().st_size / 1e6
            figures[f"{reader} {file}"] = {"examples": N / seconds, "megabytes": megabytes / seconds}
            print(f"{reader:18}{file:12}{N / seconds / 1e3:8.0f} k/s{megabytes / seconds:8.1f} MB/s", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
