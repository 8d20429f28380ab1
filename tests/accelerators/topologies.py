"""Accelerators that are described and not there, to compile for: TPUs by libtpu, an H100 by JAX's CUDA plugin."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib

import jax
from jax.experimental import topologies

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = {"h100": "h100.txtpb"}
KINDS = [*TPUS, *GPUS]

_CUDA = "jax_plugins.xla_cuda13"


def missing(kind: str) -> str:
    """What is not installed that compiling for this kind needs; "" if all is there."""
    try:
        if importlib.util.find_spec("libtpu" if kind in TPUS else _CUDA):
            return ""
    except ModuleNotFoundError:  # no plugin of JAX at all
        pass
    return f'{"libtpu" if kind in TPUS else _CUDA} is not installed: pip install -e ".[accelerators]"'


def libtpu_version() -> tuple[int, ...]:
    """(0, 0, 52), say; () where it is not installed."""
    found = "" if missing("v5e") else importlib.metadata.version("libtpu")
    return tuple(int(part) for part in found.split(".")[:3] if part.isdigit())


@functools.cache
def device(kind: str) -> jax.Device:
    """One described device: arrays cannot be put there, but programs are compiled for it."""
    jax.devices("cpu")  # the plugins that are there are registered now, and not once more later
    if kind in TPUS:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network which TPU this is
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may compile too
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[kind]).devices[0]
    target = pathlib.Path(__file__).with_name(GPUS[kind]).read_text()
    describe = functools.partial(topologies.get_topology_desc, "", "cuda", target_config=target, topology="1x1x1")
    try:
        found = describe()
    except NotImplementedError:  # the plugin looked for cuDNN, which only running needs, and did not register
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        importlib.import_module(_CUDA).initialize()
        found = describe()
    return found.devices[0]
