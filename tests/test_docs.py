"""What is public has a docstring and a place among the API pages, and the lint is the same everywhere."""

import ast
import inspect
import re
import runpy

import jaxsparse as js
from tests.pages import ROOT, text

FUNCTIONS = [name for name in js.__all__ if callable(getattr(js, name))]


def test_all_is_what_is_imported():
    tree = ast.parse(inspect.getsource(js))
    names = [x.asname for node in tree.body if isinstance(node, ast.ImportFrom) for x in node.names if x.asname]
    assert sorted(js.__all__) == sorted({*names, "nnx"})


def test_every_public_name_is_in_one_group_of_the_pages():
    groups = runpy.run_path(str(ROOT / "docs" / "conf.py"))["groups"]()
    assert [name for names in groups.values() for name in names] == js.__all__
    assert len(groups) < 15 and all(len(names) < 15 for names in groups.values())


def test_exports_are_documented():
    for name in FUNCTIONS:
        documented = inspect.getdoc(getattr(js, name))
        assert documented and len(documented) > 20, name
        if inspect.isfunction(getattr(js, name)):
            assert ">>>" in documented, f"{name} has no example"


def test_every_argument_is_described():
    for name in FUNCTIONS:
        thing = getattr(js, name)
        documented = inspect.getdoc(thing)
        if inspect.isfunction(thing) and "\nArgs:\n" in documented:
            for argument, kind in inspect.signature(thing).parameters.items():
                if kind.kind is kind.VAR_KEYWORD:  # for errors about options that are not there
                    continue
                assert re.search(rf"^  (?:\w+, )*{argument}(?:, \w+)*: ", documented, re.MULTILINE), (name, argument)


def test_lint_is_the_same_everywhere():
    def versions(words):
        return {*re.findall(r"(?:ruff|mypy)==[\d.]+", words)}

    assert versions((ROOT / ".pre-commit-config.yaml").read_text()) == versions((ROOT / ".ci/run").read_text()) != set()


def test_ci_builds_the_pages():
    command = "sphinx-build -W -c docs . build/docs"
    assert all(command in text(page) for page in ("README.md", "CONTRIBUTING.md"))
    assert "sphinx-build -q -W -c docs . " in (ROOT / ".ci/run").read_text()
