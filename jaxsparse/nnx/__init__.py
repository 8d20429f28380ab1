"""flax.nnx: row-sparse versions of nnx.jit, nnx.value_and_grad and nnx.grad, and `explain`.

They are `js.jit`, `js.value_and_grad`, `js.grad` and `js.explain` for functions that take nnx modules and update them
in place, as nnx's own functions do.
"""

from jaxsparse.nnx.explain import explain as explain
from jaxsparse.nnx.grad import grad as grad
from jaxsparse.nnx.grad import value_and_grad as value_and_grad
from jaxsparse.nnx.jit import jit as jit
