"""XLA's flags for the tests: what is set before JAX is imported, so that nothing here imports it."""

# Most of the suite's time is XLA's, for thousands of small programs that run once or twice. Without LLVM's
# optimizations, with XLA's older way to write loops, and in one piece, a program compiles in a quarter of the time.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# As `compiler_options` of one program these go before XLA_FLAGS: it is compiled as it is by default.
DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}


def xla_flags(environment, jax_version: str) -> str:
    """XLA_FLAGS for the tests: what it is, eight devices, and the quick flags.

    A quick flag that XLA_FLAGS names stays as it is there, and JAXSPARSE_XLA_DEFAULTS=1 sets none. Neither does a JAX
    that came later: XLA ends the process when it does not know a flag.
    """
    given = environment.get("XLA_FLAGS", "")
    flags = [given, "--xla_force_host_platform_device_count=8"]
    known = (0, 10) <= tuple(int(part) for part in jax_version.split(".")[:2]) <= (0, 12)
    if known and environment.get("JAXSPARSE_XLA_DEFAULTS", "0") in ("", "0"):
        flags += [f"--{name}={str(value).lower()}" for name, value in QUICK.items() if name not in given]
    return " ".join(filter(None, flags))
