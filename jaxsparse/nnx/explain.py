"""`js.nnx.explain`: which variables a loss or a step reads by rows, and what makes the others dense."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxsparse.nnx.grad import Argnums, Call
from jaxsparse.nnx.jit import JittedModules
from jaxsparse.train.explain import Explanation
from jaxsparse.train.explain import explain as js_explain
from jaxsparse.train.grad import Tables


def explain(
    fun: Callable[..., Any], *, argnums: Argnums = 0, has_aux: bool = False, tables: Tables = None
) -> Callable[..., Explanation]:
    """`js.explain` for functions of nnx modules: which gradients of `fun` are row-sparse, and why the others are dense.

    Args and errors are those of `js.nnx.value_and_grad`. `fun` may also be a step that `js.nnx.jit` returned. Of the
    variables that the step changes, the explanation then shows which are tables (read by rows), which have one row for
    each row of a table (an optimizer's slots), and which are dense. Nothing is computed, and no module is changed.

    Returns:
      A function of fun's arguments that returns an `Explanation`: print it, or look its fields up by path.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax import nnx
      >>> model = nnx.Embed(5000, 2, rngs=nnx.Rngs(0))
      >>> said = js.nnx.explain(lambda model, ids: jnp.sum(model(ids)))(model, jnp.array([3, 0, 3]))
      >>> said["['embedding']"].row_sparse, said["['embedding']"].rows_read
      (True, 3)
    """
    if isinstance(fun, JittedModules):
        return functools.partial(_explain_step, fun)

    def explain_fun(*args: Any, **kwargs: Any) -> Explanation:
        tag = object()
        with nnx.update_context(tag):
            call = Call(fun, argnums, has_aux, args, kwargs, tag)
            return js_explain(call.pure, call.argnums, True, tables=tables)(*call.args)

    return explain_fun


def _explain_step(step: JittedModules, *args: Any, **kwargs: Any) -> Explanation:
    with nnx.update_context(step):
        pure, _ = step.pure_arguments(args, kwargs)
        return js_explain(step.on_rows)(*pure)
