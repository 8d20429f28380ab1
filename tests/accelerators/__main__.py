"""One case, compiled and read, in one line.

    python -m tests.accelerators v5e 1e6 64 float32 adam step

v4 | v5e | v5p | v6e | h100, rows, columns, dtype, optimizer, way; `--length 20` for as many ids a bag (4), `--packed`
for a state that js.pack has packed, `--row-dma` for the kernels of ops/row_dma.py, `--no-streams` for a TPU's compiler
that brings no small array onto the chip as a whole, and `--text FILE` for the optimized HLO. The optimizers and ways
are those of cases.py.
"""

import argparse
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.accelerators import cases, topologies
from tests.accelerators.report import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.accelerators", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=topologies.KINDS)
    parser.add_argument("num_rows", type=lambda x: int(float(x)))
    parser.add_argument("dim", type=int)
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("optimizer", choices=list(cases.LAZY))
    parser.add_argument("way", choices=cases.WAYS)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--row-dma", action="store_true")
    parser.add_argument("--no-streams", dest="streams", action="store_false")
    parser.add_argument("--text", type=pathlib.Path)
    options = vars(parser.parse_args())
    text = options.pop("text")
    if why := topologies.missing(options["kind"]):
        raise SystemExit(why)
    found = report(cases.Case(**options))
    print(found)
    if text:
        text.write_text(found.text)


if __name__ == "__main__":
    main()
