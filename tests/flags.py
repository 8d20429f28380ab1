"""XLA's flags for the tests: what is set before JAX is imported, so that nothing here imports it."""

import importlib.metadata

# Most of the suite's time is XLA's, for thousands of small programs that run once or twice. Without LLVM's
# optimizations, with XLA's older way to write loops, and in one piece, a program compiles in a quarter of the time.
# For each flag: quick, as it is by default, and the newest jax that is known to know it.
_FLAGS = {
    "xla_backend_optimization_level": (0, 3, (0, 12)),
    "xla_cpu_use_fusion_emitters": (False, True, (0, 10)),
    "xla_cpu_parallel_codegen_split_count": (1, 32, (0, 12)),
}


def _known(jax_version: str, which: int) -> dict[str, object]:
    version = tuple(int(part) for part in jax_version.split(".")[:2])
    return {name: values[which] for name, values in _FLAGS.items() if (0, 10) <= version <= values[2]}


QUICK = _known(importlib.metadata.version("jax"), 0)
# As `compiler_options` of one program these go before XLA_FLAGS: it is compiled as it is by default.
DEFAULTS = _known(importlib.metadata.version("jax"), 1)


def xla_flags(environment, jax_version: str) -> str:
    """XLA_FLAGS for the tests: what it is, eight devices, and the quick flags.

    A flag that XLA_FLAGS names stays as it is there, and JAXSPARSE_XLA_DEFAULTS=1 sets none. Neither is one set
    that this JAX is not known to know: XLA ends the process then.
    """
    given = environment.get("XLA_FLAGS", "")
    devices = "--xla_force_host_platform_device_count"
    flags = [given, "" if devices in given else f"{devices}=8"]
    if environment.get("JAXSPARSE_XLA_DEFAULTS", "0") in ("", "0"):
        quick = _known(jax_version, 0)
        flags += [f"--{name}={str(value).lower()}" for name, value in quick.items() if name not in given]
    return " ".join(filter(None, flags))
