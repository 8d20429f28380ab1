"""The floors: imports run downward. And the package is what it says it is."""

import ast
import functools
import pathlib
import subprocess
import sys
import tomllib

import pytest

from tests.flags import DEFAULTS, QUICK, xla_flags

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxsparse"
FLOORS = [
    "_jax _checks _context",
    "_names",
    "ops data",
    "trace",
    "optim",
    "parallel",
    "train testing nn export memory",
    "nnx command",
    "__main__",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}


@functools.cache
def imports(name: str) -> set[str]:
    """Of a module, those of whole modules by their full names; without those that are for types only."""
    tree = ast.parse(MODULES[name].read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names = {f"{n.module}.{x.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for x in n.names}
    plain = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return froms | plain | {x for x in names if x.removeprefix("jaxsparse.") in MODULES}


def inner_imports(name: str) -> set[str]:
    return {x for x in (module.removeprefix("jaxsparse.") for module in imports(name)) if x in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name):
    here = name.split(".")[0]
    assert here in FLOOR, f"{name} stands on no floor"
    for there in {other.split(".")[0] for other in inner_imports(name)}:
        below = FLOOR[there] < FLOOR[here] or there == here
        assert below, f"{name} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"


def test_imports_have_no_circle():
    done: set[str] = set()
    while len(done) < len(MODULES):
        ready = {name for name in MODULES if name not in done and inner_imports(name) <= done}
        assert ready, f"a circle among {sorted(MODULES.keys() - done)}"
        done |= ready


def test_run_time_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {"jax", "flax", "optax", "numpy", "scipy", "chex", "tqdm"}
    assert {d.split(">")[0] for d in project["dependencies"]} == allowed
    used = {module.split(".")[0] for name in MODULES for module in imports(name)}
    third_party = used - set(__import__("sys").stdlib_module_names) - {"jaxsparse"}
    assert third_party <= allowed, third_party - allowed
    tests = " ".join(project["optional-dependencies"]["test"])
    assert "torch" not in tests and "tensorflow" not in tests


def test_an_import_starts_no_backend():
    """jax.distributed.initialize and settings of JAX have to come before that, and may come after the import."""
    code = "import jaxsparse; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    late = "import sys; assert not {'flax.nnx', 'jax.experimental.pallas'} & set(sys.modules)"
    lazy = "assert 'nnx' in dir(jaxsparse); jaxsparse.nnx.jit"
    absent = "assert not hasattr(jaxsparse, 'nmx')"
    subprocess.run([sys.executable, "-c", f"{code}; {late}; {lazy}; {absent}"], check=True)


def test_top_level():
    names = {path.name for path in ROOT.iterdir()}
    shown = {name for name in names if not name.startswith(".") and not name.endswith("egg-info")}
    expected = {"jaxsparse", "notebooks", "tests", "docs", "pyproject.toml", "LICENSE"}
    expected |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert shown - {"build", "dist"} <= expected


def test_no_file_is_two_rooms():
    for name in MODULES.keys() - {"_jax"}:  # all of JAX that may change is in one, by decision
        assert len(MODULES[name].read_text().splitlines()) <= 400, name


def test_the_flags_that_make_xla_quick():
    """Only those that a JAX knows: XLA ends the process at others."""
    eight, level = "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"
    others = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    assert xla_flags({}, "0.10.2") == f"{eight} {level} {others}"
    assert xla_flags({}, "0.12.0.1") == f"{eight} {level} {others.split()[1]}"
    assert xla_flags({"JAXSPARSE_XLA_DEFAULTS": "1"}, "0.10.2") == xla_flags({}, "0.13.0") == eight
    mine = "--xla_backend_optimization_level=2"
    assert xla_flags({"XLA_FLAGS": mine}, "0.10.2") == f"{mine} {eight} {others}"
    one = "--xla_force_host_platform_device_count=1"
    assert xla_flags({"XLA_FLAGS": one}, "0.10.2") == f"{one} {level} {others}"
    assert QUICK.keys() == DEFAULTS.keys()
