"""Every Python cell of the README runs as it stands, from top to bottom in one namespace."""

import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
CELLS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(cells):
    namespace: dict = {}
    with jax.numpy_rank_promotion("allow"):  # flax's layers promote
        for number, cell in enumerate(cells):
            exec(compile(cell, f"README.md, cell {number}", "exec"), namespace)
    return namespace


def test_the_first_cell_runs():
    assert np.isfinite(run(CELLS[:1])["loss"])


@pytest.mark.slow
def test_the_cells_run(capsys):
    assert len(CELLS) >= 3
    namespace = run(CELLS)
    capsys.readouterr()
    assert np.isfinite(namespace["loss"])
    grads = namespace["grads"]
    assert any(type(g).__name__ == "RowSparse" for g in jax.tree.leaves(grads, is_leaf=lambda g: hasattr(g, "ids")))


def test_the_two_commands():
    one, two = re.findall(r"^python3 -m venv .*$", TEXT, re.MULTILINE)
    assert one.endswith("python -m jaxsparse") and two.endswith("pytest")


def test_ci_runs_the_readmes_own_command():
    assert "grep -E '^python3 .*pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_exports_are_documented():
    import jaxsparse as js

    public = [getattr(js, name) for name in vars(js) if not name.startswith("_")]
    for thing in public:
        if callable(thing) and getattr(thing, "__module__", "").startswith("jaxsparse"):
            assert thing.__doc__ and len(thing.__doc__) > 20, thing
