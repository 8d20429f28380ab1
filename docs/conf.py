"""Sphinx: the README, the pages, the notebooks as they are saved, and the API from docstrings, with a search.

`pip install -e ".[docs]"` and `sphinx-build -W -c docs . build/docs`. The API's pages are the groups of
`jaxsparse.__all__`, as its comments name them.
"""

import inspect
import pathlib
import re
import shutil

import jaxsparse as js

ROOT = pathlib.Path(__file__).parents[1]

project, author, version = "jaxsparse", "the jaxsparse authors", js.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
html_theme = "furo"
html_title = f"jaxsparse {version}"
html_copy_source = False

nb_execution_mode = "off"  # tests/test_notebooks.py runs them
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "ref.python"]  # notebooks begin where they like; fields of two classes may be alike
default_role, smartquotes = "code", False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Returns"]  # text, of which what stands before a colon is no type
autodoc_typehints = "none"
autodoc_member_order = "bysource"


def groups() -> dict[str, list[str]]:
    """The names of jaxsparse.__all__ by the comment above them."""
    source = inspect.getsource(js)
    lines = source[source.index("__all__ = [") :].split("]")[0]
    found: dict[str, list[str]] = {}
    for comment, name in re.findall(r'^    (?:# (.+)|"(\w+)",)$', lines, re.MULTILINE):
        if comment:
            found[comment] = group = []
        else:
            group.append(name)
    return found


def entry(name: str) -> str:
    thing = getattr(js, name)
    if inspect.ismodule(thing):
        imported = "   :imported-members:\n" if name == "nnx" else ""  # its functions are of modules of its own
        return f".. automodule:: jaxsparse.{name}\n   :members:\n{imported}"
    if inspect.isclass(thing):
        return f".. autoclass:: {name}\n   :members:\n"
    return f".. autofunction:: {name}\n"


def write_api() -> None:
    folder = ROOT / "docs" / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (title, names) in enumerate(groups().items()):
        entries = "\n".join(map(entry, names))
        path = folder / f"{number:02}.rst"
        path.write_text(f"{title}\n{'=' * len(title)}\n\n.. currentmodule:: jaxsparse\n\n{entries}")


def indent(line):
    return len(line) - len(line.lstrip())


def mark_equations(app, what, name, obj, options, lines):
    """A paragraph that is indented by four stays as it is written."""
    for i in range(len(lines) - 2, 0, -1):
        if lines[i - 1].strip() and not lines[i].strip() and indent(lines[i + 1]) == indent(lines[i - 1]) + 4:
            lines[i : i + 1] = ["", " " * indent(lines[i - 1]) + "::", ""]


def escape(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`: a star or a bar in them is itself."""
    literal = None  # how far what is marked "::" is indented
    for i, line in enumerate(lines):
        if line.strip() == "::":
            literal = indent(line)
        elif line.strip() and literal is not None and indent(line) <= literal:
            literal = None
        if literal is None and not line.lstrip().startswith((">>>", "...")):
            pieces = re.split(r"(`[^`]*`|\*\*[A-Z][^*]*\*\*)", line)
            lines[i] = "".join(x if k % 2 else re.sub(r"([*|])", r"\\\1", x) for k, x in enumerate(pieces))


def setup(app):
    write_api()
    app.connect("autodoc-process-docstring", mark_equations, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", escape, priority=600)
