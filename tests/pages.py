"""The pages for readers (README, CONTRIBUTING.md and what is written beside the notebooks) and their Python cells."""

import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"notebooks/{path.name}" for path in ROOT.glob("notebooks/*.md"))]


def text(page: str) -> str:
    return (ROOT / page).read_text()


def cells(markdown: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)


def run(page: str, cells: Iterable[str]) -> dict[str, Any]:
    """The namespace in which the cells ran, one after the other."""
    namespace: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):  # flax's layers promote
        for number, cell in enumerate(cells):
            exec(compile(cell, f"{page}, cell {number}", "exec"), namespace)
    return namespace
