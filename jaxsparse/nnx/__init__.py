"""flax.nnx: the words of `nnx` for which there is one of ours, with its contract, at the cost of the rows.

`js.nnx.jit` is `js.jit`, and `js.nnx.value_and_grad`, `grad` and `explain` are `js.value_and_grad`, `js.grad` and
`js.explain`, for functions of nnx modules that change them in place.
"""

from jaxsparse.nnx.explain import explain as explain
from jaxsparse.nnx.grad import grad as grad
from jaxsparse.nnx.grad import value_and_grad as value_and_grad
from jaxsparse.nnx.jit import jit as jit
