"""Eight fake CPU devices, and every rule as strict as it goes."""

import gc
import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")

# Shapes are drawn, and every new shape compiles: slow examples are no fault of the test.
hypothesis.settings.register_profile("jaxsparse", deadline=None, max_examples=30, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxsparse")


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """After a file, once this process is large: JAX keeps every program that it compiled, and small ones are shared."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else None
    if pages is None or pages * os.sysconf("SC_PAGE_SIZE") > 3e9:
        jax.clear_caches()
        gc.collect()
