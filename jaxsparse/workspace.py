"""jit with a memory: large temporaries of one call are the buffers of the next one's.

For each call, XLA on CPU takes one piece of memory for all temporaries and gives it back afterwards. Beyond 32 MB,
glibc gets it from the system and returns it there, with one page fault for every 4 KB of it, which can cost more than
what a step does with it (tests.benchmarks, uniform/adam, is such a job). So the blocks are outputs, and next time their
buffers are donated to the blocks of the next batch. Accelerators have allocators of their own that keep memory, and
need none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxsparse._jax import is_traced
from jaxsparse.batch import find_batches, order_batches

_SMALL = 1 << 18  # bytes: what is smaller is left to XLA
_SHAPES = 4  # of batches whose buffers are kept

_flatten: Any = jax.tree.flatten  # its stubs give a tree definition no methods


class StepWithWorkspace:
    """jax.jit(step, donate_argnums=0), for a step(state, *args) -> (state, metrics, arrays).

    Called, it returns (state, metrics). The arrays are large temporaries, and their buffers stay here until they are
    used for the arrays of the next call with arguments of the same shapes. Over several devices, on accelerators and
    inside other transformations nothing is kept.
    """

    def __init__(self, step: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self._plain = jax.jit(plain, donate_argnums=0)
        self._buffers: dict[Any, list[jax.Array]] = {}

        @jax.jit  # traced once: for the arrays' shapes, and in the program with buffers
        def inner(state: Any, ordered: Any, *args: Any) -> Any:
            return step(state, *order_batches(args, ordered))

        def with_buffers(state: Any, buffers: list[jax.Array], ordered: Any, *args: Any) -> Any:
            del buffers
            state, metrics, arrays = inner(state, ordered, *args)
            return state, _large(arrays), metrics

        self._shapes = lambda *args: jax.eval_shape(lambda *args: _large(inner(*args)[2]), *args)
        self._with_buffers = jax.jit(with_buffers, donate_argnums=(0, 1), keep_unused=True)

    def __call__(self, state: Any, *args: Any) -> Any:
        leaves, tree = _flatten((state, args))
        sharding = _one_cpu(leaves)
        if sharding is None:
            return self._plain(state, *args)
        ordered = [batch.ordered for batch in find_batches(args)]
        key = tree, sharding, tuple([getattr(x, "shape", ()) for x in leaves + jax.tree.leaves(ordered)])
        buffers = self._buffers.pop(key, None)  # not there again if the call fails, which has used them up
        if buffers is None:
            # committed to their device if the arguments are: the step's results are too, and so are the next buffers
            device = sharding if any(getattr(x, "committed", False) for x in leaves) else None
            buffers = [jax.numpy.zeros(x.shape, x.dtype, device=device) for x in self._shapes(state, ordered, *args)]
            if len(self._buffers) >= _SHAPES:
                self._buffers.pop(next(iter(self._buffers)))
        state, self._buffers[key], metrics = self._with_buffers(state, buffers, ordered, *args)
        return state, metrics

    def lower(self, state: Any, *args: Any) -> Any:
        """As of a jitted function: the program that a call with these arguments, or ones of these shapes, runs. A
        batch itself knows more of its arrays than their shapes (`Batch.ordered`)."""
        if _one_cpu(jax.tree.leaves((state, args))) is None:
            return self._plain.lower(state, *args)
        ordered = [batch.ordered for batch in find_batches(args)]
        return self._with_buffers.lower(state, self._shapes(state, ordered, *args), ordered, *args)


def _large(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x for x in arrays if x.size * x.dtype.itemsize >= _SMALL]


def _one_cpu(leaves: list[Any]) -> Any:
    """The sharding of all arrays, if that is one CPU device, otherwise None. Abstract ones and NumPy's are anywhere."""
    if jax.default_backend() != "cpu":
        return None
    found: Any = None
    for x in leaves:  # 10 to 30 of them, at each step: no set of shardings, whose hashes are slow
        if is_traced(x):
            return None
        sharding = getattr(x, "sharding", None)
        if found is None:
            found = sharding
        elif sharding is not None and sharding is not found and sharding != found:
            return None
    if found is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return found if isinstance(found, jax.sharding.SingleDeviceSharding) else None
