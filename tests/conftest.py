"""Eight fake CPU devices, and every rule as strict as it goes."""

import gc
import os

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
    """After each file: JAX keeps every program that it compiled, and all files' together are 11 GB a worker."""
    yield
    jax.clear_caches()
    gc.collect()
