"""Eight fake CPU devices, programs that compile fast, and every rule as strict as it goes."""

import gc
import importlib.metadata
import os
import pathlib
import re
import signal
import sys

from tests.flags import DEFAULTS, xla_flags

os.environ["XLA_FLAGS"] = xla_flags(os.environ, importlib.metadata.version("jax"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Traced programs are many small objects that live long: looking through them for garbage took 6 % of the time.
gc.set_threshold(100_000, 50, 100)

# Shapes are drawn, and every new shape compiles: slow examples are no fault of the test.
hypothesis.settings.register_profile("jaxsparse", deadline=None, max_examples=30, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxsparse")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("cpu"):
        if jax.default_backend() != "cpu":
            pytest.skip(f"on a CPU only: {mark.args[0]}")
    for mark in item.iter_markers("devices"):
        if jax.device_count() < mark.args[0]:
            pytest.skip(few_devices(mark.args[0]))


def few_devices(wanted):
    return f"{jax.device_count()} of {wanted} devices: {jax.devices()[0].device_kind}"


def pytest_collection_modifyitems(items):
    """Examples in docstrings, which have no marks, are skipped where there are fewer devices than they ask for."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            asked = re.findall(r"jax\.devices\(\)\[:(\d)", "".join(line.source for line in item.dtest.examples))
            for number in map(int, asked):
                if jax.device_count() < number:
                    item.add_marker(pytest.mark.skip(few_devices(number)))


@pytest.fixture
def explained_by_default(monkeypatch):
    """js.explain compiles a program to see what it makes, here as users get it and not with the quick flags."""
    explain, compile_ = sys.modules["jaxsparse.train.explain"], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, options=None: compile_(self, DEFAULTS | (options or {}))
    )
    explain._written_in_place.cache_clear()
    yield
    explain._written_in_place.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """After a file, once this process is large: JAX keeps every program that it compiled, and small ones are shared."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else None
    if pages is None or pages * os.sysconf("SC_PAGE_SIZE") > 3e9:
        jax.clear_caches()
        gc.collect()
