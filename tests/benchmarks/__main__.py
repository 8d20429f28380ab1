"""`python -m tests.benchmarks`: jaxsparse against its peers, each in a process of its own, two at a time.

For every pair, results are first held against each other (parameters in norm, to a thousandth of how far they moved;
losses to 1e-5), then blocks of up to 16 steps are timed in turn. Reported are the medians, and the median and the
quartiles of the ratio within a round. What disagrees is not timed, and the exit status is 1.

The peers, each in the form that was fastest here, are described in `with_*.py`. Those that are not installed are
skipped. What was used for README and notebooks/speed.md, from a clone, with Python 3.11:

    python3 -m venv bench && bench/bin/pip install -e ".[bench]"
    bench/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    bench/bin/pip install --no-deps fbgemm-gpu-cpu==1.8.0
    python3 -m venv tf && tf/bin/pip install tensorflow-cpu==2.15.1 tensorflow-addons==0.23.0
    bench/bin/python -m tests.benchmarks --tensorflow tf/bin/python --data flights.csv.zip --rounds 4 \\
        --json figures.json --plot figures.png

`skipped_rows.py` says where the flights are. All of it takes 13 to 20 minutes, and 20 GB of memory for the tables of
10^7 rows.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import pairs, report
from tests.benchmarks.worker import MODULES, ROOT

NEEDS = {"torch": "torch", "fbgemm": "fbgemm_gpu", "keras": "keras"}
PACKAGES = ("jax", "flax", "optax", "numpy", "torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "keras")
TENSORFLOW = ("tensorflow-cpu", "tensorflow", "tensorflow-addons")
VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}))
"""


def versions(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    found = json.loads(subprocess.check_output([python, "-c", VERSIONS]))
    return {name: found[name] for name in packages if name in found}


def machine() -> dict[str, str]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    device = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    return {
        "CPU": cpu[1] if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "cache": ", ".join(f"L{(c / 'level').read_text().strip()} {(c / 'size').read_text().strip()}" for c in caches),
        "load": f"{os.getloadavg()[0]:.1f}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "jax on": subprocess.check_output([sys.executable, "-c", device], text=True).strip(),
        "python": platform.python_version(),
    }


def part(name: str, *arguments: str) -> Any:
    """What another benchmark of this folder writes to its --json; it prints for itself."""
    print(f"\n{name}", flush=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--json", file.name, *arguments]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(Path(file.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="a png or svg; needs matplotlib")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="cases (bag/adam/1e6, ctr/, size/) and "
                        "parts (host, data, crossover, memory, flights) whose names begin like this")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tensorflow", metavar="PYTHON", default=sys.executable, help="whose environment has it")
    parser.add_argument("--data", metavar="FILE", help="flights.csv.zip: see skipped_rows.py")
    parser.add_argument("--gpu", action="store_true", help="the cases for a GPU instead")
    options = parser.parse_args()

    def wanted(name: str) -> bool:
        return name.startswith(tuple(options.only))

    about, of_tensorflow = machine(), versions(options.tensorflow, TENSORFLOW)
    installed = versions(sys.executable, PACKAGES) | of_tensorflow
    for facts in (about, installed):
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
    gone = {name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None}
    gone |= {"limit"} if shutil.which("gcc") is None else set()
    gone |= {"tensorflow"} if "tensorflow-addons" not in of_tensorflow else set()
    for name in sorted(gone):
        print(f"{name} is skipped: {'there is no gcc' if name == 'limit' else 'it is not installed'}")

    results, errors, parts, known = [], [], {}, {}
    pythons = dict.fromkeys(MODULES, sys.executable) | {"tensorflow": options.tensorflow}
    for base, others in pairs.groups(gpu=options.gpu):
        there = [e for e in others if e.contestant not in gone and wanted(e.case.name)]
        for outcome in pairs.run(base, there, pythons, options.rounds, known) if there else ():
            if isinstance(outcome, str):
                errors.append(outcome)
                print(f"ERROR {outcome}", flush=True)
            else:
                results.append(outcome)
                print(report.line(outcome), flush=True)
    for name, arguments in {
        "host": [],
        "data": [],
        "crossover": [],
        "memory": [],
        "flights": ["--data", options.data],
    }.items():
        if wanted(name) and None not in arguments and not options.gpu:
            try:
                parts[name] = part(name, *arguments)
            except subprocess.CalledProcessError as error:
                errors.append(str(error))

    named = report.figures(results, parts)
    goals = report.targets(named)
    print(report.table(results, named) + "\n")
    for goal in goals:
        print(f"{goal['what']:52} {goal['value']:8.2f} {goal['target']:>8} {'pass' if goal['met'] else 'MISS'}")
    if options.json:
        everything = {"machine": about, "versions": installed, "pairs": [r._asdict() for r in results], **parts}
        Path(options.json).write_text(json.dumps(everything | {"targets": goals, "errors": errors}, indent=1))
    if options.plot:
        report.plot(results, options.plot)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
