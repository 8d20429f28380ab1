"""The floors: imports run downward. And the package is what it says it is."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

from tests.flags import DEFAULTS, QUICK, xla_flags

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = [
    "_jax _checks rows row_sparse states tracing uses",
    "ops embedding collectives batch distinct inputs features pipeline nn losses",
    "trained pieces values plan walk row_elementwise row_rules row_reads row_regions known_ids planning",
    "lazy optimizers adagrad catch_up replaying up_to_date testing parallel",
    "device_rows host_rows rowwise jit grad explain refresh train evaluation loops",
    "__main__",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
MODULES = sorted(path.stem for path in (ROOT / "jaxsparse").glob("*.py") if path.stem != "__init__")


def imports(name: str) -> set[str]:
    tree = ast.parse((ROOT / "jaxsparse" / f"{name}.py").read_text())
    froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    plain = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return froms | plain


def inner_imports(name: str) -> set[str]:
    return {module.removeprefix("jaxsparse.") for module in imports(name) if module.startswith("jaxsparse.")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name):
    assert name in FLOOR, f"{name}.py stands on no floor"
    for other in inner_imports(name):
        assert FLOOR[other] <= FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"


def test_imports_have_no_circle():
    done: set[str] = set()
    while len(done) < len(MODULES):
        ready = {name for name in MODULES if name not in done and inner_imports(name) <= done}
        assert ready, f"a circle among {sorted(set(MODULES) - done)}"
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
    subprocess.run([sys.executable, "-c", code], check=True)


def test_top_level():
    names = {path.name for path in ROOT.iterdir()}
    shown = {name for name in names if not name.startswith(".") and not name.endswith("egg-info")}
    expected = {"jaxsparse", "notebooks", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert shown - {"build", "dist"} <= expected


def test_no_file_is_two_rooms():
    for name in set(MODULES) - {"_jax"}:  # all of JAX that may change is in one, by decision
        assert len((ROOT / "jaxsparse" / f"{name}.py").read_text().splitlines()) <= 400, name


def test_the_flags_that_make_xla_quick():
    """Only those that a JAX knows: XLA ends the process at others."""
    eight, level = "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"
    others = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    assert xla_flags({}, "0.10.2") == f"{eight} {level} {others}"
    assert xla_flags({}, "0.12.0.1") == f"{eight} {level} {others.split()[1]}"
    assert xla_flags({"JAXSPARSE_XLA_DEFAULTS": "1"}, "0.10.2") == xla_flags({}, "0.13.0") == eight
    mine = "--xla_backend_optimization_level=2"
    assert xla_flags({"XLA_FLAGS": mine}, "0.10.2") == f"{mine} {eight} {others}"
    assert QUICK.keys() == DEFAULTS.keys()
