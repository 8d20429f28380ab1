"""Every Python cell of the README and the pages runs as it stands, from top to bottom in one namespace a page."""

import re

import numpy as np
import pytest

import jaxsparse as js
from tests.marks import slow_but
from tests.pages import PAGES, ROOT, cells, run, text

RUN = [page for page in PAGES if cells(text(page)) and page != "notebooks/recipes.md"]  # test_recipes.py runs that


@pytest.mark.parametrize("page", slow_but(["README.md", "notebooks/data.md"], RUN))
def test_cells_run(page, capsys):
    namespace = run(page, cells(text(page)))
    capsys.readouterr()
    if "loss" in namespace:
        assert np.isfinite(namespace["loss"])


def test_the_readme_is_short():
    assert len(text("README.md").splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text(page))
    for link in links:
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    for name in {*re.findall(r"\bjs\.([a-zA-Z_]+)", text(page))}:
        assert hasattr(js, name), f"js.{name}"


def test_every_page_is_linked_from_the_readme():
    for page in PAGES[1:]:
        assert f"]({page})" in text("README.md"), page


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    for module in {*re.findall(r"python -m (tests[.\w]*)", re.sub(r"\s+", " ", text(page)))}:
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_two_commands():
    one, two = re.findall(r"^python3 -m venv .*$", text("README.md"), re.MULTILINE)
    assert one.endswith("python -m jaxsparse") and two.endswith("pytest")


def test_ci_runs_the_readmes_own_command():
    assert "grep -E '^python3 .*pytest$' README.md" in (ROOT / ".ci" / "run").read_text()
