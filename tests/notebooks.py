"""`python -m tests.notebooks [NAME ...]`: runs the notebooks, each in a fresh kernel and an empty folder.

Prints how long each took, and what is wrong: errors, warnings, cells out of order. With --save the outputs are written
back, the last state of each progress bar only, and the picture of the cell that is tagged "readme" beside the notebook.
"""

import argparse
import base64
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_BAR = re.compile(r"[^\n]*100%\|█+\| (\d+)/\1 \[[^\n]*\] *")


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def run(name: str) -> dict[str, Any]:
    """The notebook with the outputs of a new run; of one that failed, up to there."""
    import nbclient
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        options = {"timeout": 900, "allow_errors": True, "record_timing": False, "coalesce_streams": True}
        nbclient.NotebookClient(notebook, kernel_name="python3", resources=resources, **options).execute()
    return json.loads(nbformat.writes(notebook))


def text(lines: str | list[str]) -> str:
    """What a stream shows in the end: a carriage return goes back to the beginning of the line."""
    return re.sub(r"[^\n]*\r(?!\n)", "", "".join(lines))


def pictures(cell: dict[str, Any]) -> list[bytes]:
    found = [output.get("data", {}).get("image/png") for output in cell.get("outputs", ())]
    return [base64.b64decode("".join(picture)) for picture in found if picture]


def problems(notebook: dict[str, Any]) -> list[str]:
    """What a reader should not have to see."""
    cells = notebook["cells"]
    found = []
    for word in ("**Needs**", "**Takes**"):
        if word not in "".join(cells[0]["source"]):
            found.append(f"the first cell does not say {word}")
    if "## What to try next" not in "".join(cells[-1]["source"]):
        found.append("the last cell does not say what to try next")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("cells were not run once each from the top")
    if len([cell for cell in code if "readme" in cell["metadata"].get("tags", ()) and pictures(cell)]) != 1:
        found.append("there is not one cell with the tag readme and a picture")
    for number, cell in enumerate(code, 1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"cell {number}: {output['ename']}: {output['evalue']}")
            elif output["output_type"] == "stream":
                shown = text(output["text"])
                noise = [line for line in shown.splitlines() if line.strip() and not _BAR.fullmatch(line)]
                if (output["name"] == "stderr" and noise) or "Warning" in shown:
                    found.append(f"cell {number} prints {noise}")
    return found


def save(name: str, notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                output["text"] = text(output["text"]).splitlines(keepends=True)
        if "readme" in cell["metadata"].get("tags", ()):
            (FOLDER / f"{name}.png").write_bytes(pictures(cell)[0])
    (FOLDER / f"{name}.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES, help=f"of {', '.join(NAMES)}; all of them")
    parser.add_argument("--save", action="store_true", help="write the outputs back, if nothing is wrong")
    options = parser.parse_args()
    failed = False
    for name in options.names:
        start = time.perf_counter()
        notebook = run(name)
        wrong = problems(notebook)
        failed |= bool(wrong)
        print(f"{name}: {time.perf_counter() - start:.0f} s", *wrong, sep="\n  ", flush=True)
        if options.save and not wrong:
            save(name, notebook)
    sys.exit(failed)


if __name__ == "__main__":
    main()
