"""`explain`: which parameters a loss or a step reads by rows, and what makes the others dense.

A function and its arguments go in; an `Explanation` with a line for each parameter comes out. It shows the plan that
is made from the traced program, so that no gradient is dense without the user's knowledge. Nothing is computed. For
tables of 16 bits or less a small program is compiled, to see how XLA writes their rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._checks import message
from jaxsparse.ops.rows import gather_rows, scatter_rows
from jaxsparse.trace.plan import Reason
from jaxsparse.trace.planning import Planned, PlannedStep
from jaxsparse.train.grad import Tables, plan_gradient
from jaxsparse.train.jit import JittedStep
from jaxsparse.train.packing import copied_whole, megabytes
from jaxsparse.train.rowwise import plan_of, plans_seen

# Below this many table rows for each row read, a dense step is about as fast: python -m tests.benchmarks.crossover.
_CROSSOVER = 0.05


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What `js.explain` says of one parameter.

    Attributes:
      path: its path, as jax.tree_util.keystr writes it.
      row_sparse: whether its gradient is a RowSparse.
      num_rows: the number of its rows; 0 for a scalar.
      rows_read: the number of ids that are read in one evaluation, repeats included.
      reads: the source lines that read rows.
      cause: for a dense gradient, the primitive that uses the whole parameter, or another reason. "" for a row-sparse
        one. For a slot in a step's state, the table whose rows it has.
      source: the source line of `cause`.
      advice: what would be faster, or "".
    """

    path: str
    row_sparse: bool
    num_rows: int
    rows_read: int
    reads: tuple[str, ...]
    cause: str
    source: str
    advice: str

    def __str__(self) -> str:
        if self.row_sparse and not self.reads:
            line = f"row-sparse: {self.cause or 'it would be read, by a batch with ids'}"
        elif self.row_sparse:
            many = f"{len(self.reads)} reads" if len(self.reads) > 1 else "1 read"
            where = ", ".join(dict.fromkeys(self.reads))
            line = f"row-sparse: {many} of {self.rows_read:,} of {self.num_rows:,} rows at {where}"
        else:
            line = f"dense: {self.cause}" + (f" at {self.source}" if self.source else "")
        return f"{self.path or 'parameter'}  {line}" + (f". {self.advice}" if self.advice else "")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `js.explain` returns. It prints one line for each parameter.

    Attributes:
      parameters: {path: Parameter}, in the order of the leaves.
    """

    parameters: dict[str, Parameter]

    def __getitem__(self, path: str) -> Parameter:
        return self.parameters[path]

    def __str__(self) -> str:
        return "\n".join(map(str, self.parameters.values()))

    __repr__ = __str__


def explain(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, tables: Tables = None
) -> Callable[..., Explanation]:
    """A function that says which gradients of `fun` are row-sparse, and why the others are dense.

    Args and errors are those of `js.value_and_grad`.

    `fun` may also be a step: one of `js.jit` or `js.rowwise`, or jax.jit or jax.pmap of the latter. The explanation
    then says which arrays of its state are read by rows, which are slots of these, and which are copied because they
    are not donated. The other arguments have no effect. Under jax.pmap, sizes are those on one device.

    Returns:
      A function of fun's arguments that returns an `Explanation`: print it, or look its fields up by path.

    Raises:
      ValueError: for a jax.pmap that was called before, which JAX does not trace again.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> params = {"table": jnp.ones((5000, 2)), "w": jnp.ones(2)}
      >>> loss = lambda params, ids: jnp.sum(params["table"][ids] @ params["w"])
      >>> said = js.explain(loss)(params, jnp.array([3, 0, 3]))
      >>> said["['table']"].row_sparse, said["['table']"].rows_read, said["['w']"].cause
      (True, 3, 'dot_general')
      >>> step = js.jit(lambda p, ids: p - 0.1 * jax.grad(lambda p: jnp.sum(p[ids]))(p))
      >>> js.explain(step)(jnp.ones((5000, 2)), jnp.array([3, 0, 3]))[""].rows_read
      3
    """
    if isinstance(fun, JittedStep):
        return functools.partial(_explain_step, fun.plan, fun.donated)
    if (plan := plan_of(fun)) is not None:
        return functools.partial(_explain_step, plan, None)
    if (plan := plan_of(getattr(fun, "__wrapped__", fun))) is not None:
        if hasattr(fun, "trace"):  # jax.jit's
            return functools.partial(_explain_step, plan, functools.partial(_donated, fun))
        if hasattr(fun, "lower"):  # jax.pmap's
            return functools.partial(_explain_mapped, fun)

    def explain_fun(*args: Any, **kwargs: Any) -> Explanation:
        planned = plan_gradient(fun, argnums, has_aux, args, kwargs, tables)
        out = {}
        for i, (path, leaf) in enumerate(zip(planned.paths, planned.leaves_of_arguments, strict=True)):
            row_sparse, reads = i in planned.leaves or i in planned.unused, _reads_of(planned, i)
            is_left_out = reads and not row_sparse and tables is not None
            why = Reason("not in tables=", "") if is_left_out else planned.why_dense(i)
            out[path] = Parameter(
                path=path,
                row_sparse=row_sparse,
                num_rows=leaf.shape[0] if leaf.ndim else 0,
                rows_read=sum(n for _, n in reads),
                reads=tuple(source for source, _ in reads),
                cause="" if row_sparse else why.cause,
                source="" if row_sparse else why.source,
                advice=_advice(reads, leaf) if row_sparse else "" if is_left_out else planned.advice(i),
            )
        return Explanation(out)

    return explain_fun


def _donated(jitted: Any, *args: Any, **kwargs: Any) -> set[int]:
    """The leaves of these arguments that a jax.jit function donates."""
    return {i for i, x in enumerate(jax.tree.leaves(jitted.trace(*args, **kwargs).args_info)) if x.donated}


def _explain_mapped(mapped: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Explains a step under jax.pmap. Only jax.pmap knows its axis and the arrays of one device, so it is traced."""
    with plans_seen() as seen:
        info = jax.tree.leaves(mapped.lower(*args, **kwargs).args_info)
    if not seen:
        must, do = "one that was not called before", "Make it anew: js.explain(jax.pmap(js.rowwise(step), ...))."
        raise ValueError(message("explain", "fun", must, "a jax.pmap that JAX has traced, and does not again,", do))
    platform = _jax.platform_of(jax.tree.leaves((args, kwargs)))
    return _explained(seen[0], {i for i, x in enumerate(info) if x.donated}, platform)


def _explain_step(
    plan: Callable[..., PlannedStep], find_donated: Callable[..., set[int]] | None, *args: Any, **kwargs: Any
) -> Explanation:
    """Explains a step. `find_donated` returns the donated leaves of given arguments; None if they are unknown."""
    donated = None if find_donated is None else find_donated(*args, **kwargs)
    return _explained(plan(*args, **kwargs), donated, _jax.platform_of(jax.tree.leaves((args, kwargs))))


def _explained(planned: PlannedStep, donated: set[int] | None, platform: str) -> Explanation:
    """The explanation of a planned step. `donated` is None if the donated leaves are unknown."""
    copied = set() if donated is None else planned.leaves.keys() - donated
    find, traced = planned.plan.find, planned.traced
    out = {}
    for i in sorted(traced.places):
        path, shape, c = traced.paths[i], _jax.shape(traced.program.inputs[i]), planned.leaves.get(i)
        reads = _reads_of(planned, i)
        read_nodes = [r.node for r in planned.reads if find(r.node) == c and r.node in planned.leaves]
        table = traced.paths[read_nodes[0]] if read_nodes else ""
        advice_on_rows = "Rows that are not read are left alone."
        if copied_whole(traced.leaves[i], platform):
            advice_on_rows += " On TPU, XLA copies all others to read and write these: js.pack(state) avoids it."
        if i in copied:
            advice_on_rows += f" It is not donated, so each step copies it: {megabytes(traced.leaves[i])}."
        why, advice = planned.why_dense(i)
        cause = str(why) if i in planned.dense or advice else "not read by rows"
        out[path] = Parameter(
            path=path,
            row_sparse=c is not None,
            num_rows=shape[0] if shape else 0,
            rows_read=sum(n for _, n in reads),
            reads=tuple(source for source, _ in reads),
            cause=(f"by the rows of {table}" if table and not reads else "") if c is not None else cause,
            source="",
            advice=advice_on_rows if c is not None else advice,
        )
    return Explanation(out)


@functools.cache
def _written_in_place(dtype: Any, backend: str) -> bool:
    """Whether XLA compiles a write of some rows of a donated table without a second table."""
    del backend  # it is the default backend: a key of the cache only
    if dtype.itemsize >= 4:
        return True
    table, ids = jax.ShapeDtypeStruct((1 << 16, 8), dtype), jax.ShapeDtypeStruct((8,), jnp.int32)
    change = jax.jit(lambda table, ids: scatter_rows(table, ids, 2 * gather_rows(table, ids)), donate_argnums=0)
    memory = change.lower(table, ids).compile().memory_analysis()
    return memory is None or memory.temp_size_in_bytes < table.size * dtype.itemsize


def _reads_of(planned: Planned, i: int) -> list[tuple[str, int]]:
    """[(source line that reads rows of an input, number of ids)]. A read that is repeated for the gradient counts
    once."""
    found = zip(planned.reads, planned.ids.numbers, planned.ids.sizes, strict=True)
    reads = {(r.source, number): size for r, number, size in found if r.node == i and r.after_update is not None}
    return [(source, size) for (source, _), size in reads.items()]


def _advice(reads: list[tuple[str, int]], leaf: Any) -> str:
    if not _written_in_place(leaf.dtype, jax.default_backend()):
        where = f"with jax {jax.__version__} on {jax.default_backend()}"
        return f"XLA writes rows of a {leaf.dtype} array by converting all of it, {where}: use float32."
    if leaf.shape[0] < _CROSSOVER * sum(n for _, n in reads):
        return "At this size a dense gradient is likely as fast: tables= leaves it out."
    return ""
