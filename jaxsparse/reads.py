"""Finding, in a traced program, where its parameters are read by rows.

A parameter is *read by rows* where it enters a gather of whole rows (`table[ids]`, `jnp.take`, `nn.Embed`,
js.embedding_lookup, js.dot, ...) or js.embedding_bag's padded sum. Casts of the whole parameter (Flax's Embed makes
one) and stop_gradient are looked through, as are nested jit and remat. Any other use is dense, and is reported with its
primitive and source line: a custom_jvp or custom_vjp call, whose rule is the user's, and loop and branch bodies
included.

`find_reads` walks a jaxpr and says which leaves are only read by rows. `replay` evaluates the same jaxpr with those
leaves held back, handing each read to a callback. Both go through `_step`, so that they cannot disagree about what a
read is.

`find_reads` also bounds, where it can prove it, how many distinct ids a read has: an id array of the batch that
js.batches counted, seen through reshapes, slices and any function applied element by element, has no more distinct
values than it had on the host.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core

from jaxsparse.embedding import PADDED_SUM

_LIBRARIES = re.compile(
    r"[/\\\\](jax|jaxlib|jaxsparse|flax|optax|chex|equinox|haiku|contextlib\.py|functools\.py)([/\\\\]|$)"
)
_CLIP = jax.lax.GatherScatterMode.CLIP


class Read(NamedTuple):
    """One place where a leaf is read by rows."""

    leaf: int
    out: jax.ShapeDtypeStruct  # what the read gives: ids, or bags, first
    ids: Any  # the shape of the ids read
    distinct: int | None  # a proven bound on the number of distinct ids
    source: str  # "file:line (function)"


class DenseUse(NamedTuple):
    """Why a leaf's gradient is dense: what uses the whole of it, and where."""

    cause: str
    source: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A held-back leaf on its way through the program, with the cast that waits for its rows."""

    leaf: int
    dtype: Any
    cast: bool = False
    stopped: bool = False


# What an equation means for the tables that enter it.
_CAST, _STOP, _GATHER, _BAG, _CALL, _REMAT, _DENSE = "cast", "stop", "gather", "bag", "call", "remat", "dense"


def _kind(eqn: Any, tables: Sequence[Table | None]) -> str:
    """What `eqn` does with the tables among its operands (given in order, None for anything else)."""
    name, params = eqn.primitive.name, eqn.params
    first_only = tables[0] is not None and all(t is None for t in tables[1:])
    if name in ("jit", "pjit", "closed_call"):
        return _BAG if _is_padded_sum(eqn, tables) else _CALL
    if name in ("checkpoint", "remat", "remat2"):
        return _REMAT
    if not first_only:
        return _DENSE
    if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
        return _CAST
    if name == "stop_gradient":
        return _STOP
    if name == "gather":
        numbers, operand = params["dimension_numbers"], eqn.invars[0].aval
        whole_rows = (
            numbers.collapsed_slice_dims == (0,)
            and numbers.start_index_map == (0,)
            and not numbers.operand_batching_dims
            and tuple(params["slice_sizes"]) == (1, *operand.shape[1:])
        )
        return _GATHER if whole_rows else _DENSE
    return _DENSE


def _is_padded_sum(eqn: Any, tables: Sequence[Table | None]) -> bool:
    """Whether this is js.embedding_bag's own padded sum, as called: under vmap its shapes differ, and it is looked
    through."""
    if eqn.params.get("name") != PADDED_SUM or len(eqn.invars) not in (2, 3):
        return False
    if tables[0] is None or tables[0].cast or any(tables[1:]):
        return False
    table, ids, *weights = (v.aval for v in eqn.invars)
    same = ids.ndim == 2 and all(w.shape == ids.shape for w in weights) and len(eqn.outvars) == 1
    return same and eqn.outvars[0].aval.shape == ids.shape[:1] + table.shape[1:]


def _inner(eqn: Any) -> core.ClosedJaxpr:
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def source_line(eqn: Any) -> str:
    """Where the user's program made this equation: the innermost frame outside the libraries, or else the innermost."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    for frame in frames:
        if not _LIBRARIES.search(frame.file_name):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return "unknown source"


# ---------------------------------------------------------------------------------------------------------------------
# find


class _Values(NamedTuple):
    """Element by element a function of one array with at most `distinct` distinct values; `view` tells which array."""

    view: object
    distinct: int


_SCALAR = object()

_ELEMENTWISE = frozenset(
    "abs add and bitcast_convert_type clamp convert_element_type copy div eq ge gt integer_pow le lt max min mul ne "
    "neg not or population_count rem select_n shift_left shift_right_arithmetic shift_right_logical sign square "
    "stop_gradient sub xor".split()
)
_RESHAPING = frozenset(
    "broadcast_in_dim dynamic_slice expand_dims reshape rev slice squeeze transpose".split(),
)


class _Finder:
    def __init__(self, leaves: Sequence[bool]) -> None:
        self.reads: list[Read] = []
        self.dense: dict[int, DenseUse] = {}
        self.leaves = leaves

    def walk(self, jaxpr: Any, marks: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
        """Marks (Table, _Values or None) of the outputs, given those of the inputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(
            zip(jaxpr.invars, marks, strict=True)
        )

        def read(v: Any) -> Any:
            if isinstance(v, core.Literal):
                return _Values(_SCALAR, 1) if _shape(v) == () else None
            mark = env.get(v)
            return _Values(_SCALAR, 1) if mark is None and _shape(v) == () else mark

        for eqn in jaxpr.eqns:
            marks = [read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._step(eqn, marks), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _step(self, eqn: Any, marks: list[Any]) -> list[Any]:
        tables = [m if isinstance(m, Table) else None for m in marks]
        nothing: list[Any] = [None] * len(eqn.outvars)
        if not any(tables):
            if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                inner = _inner(eqn)
                return self.walk(inner.jaxpr, marks, [None] * len(inner.consts))
            return [_values_out(eqn, marks)] if len(eqn.outvars) == 1 else nothing
        kind = _kind(eqn, tables)
        table = next(t for t in tables if t)
        if kind == _CAST:
            return [dataclasses.replace(table, dtype=eqn.params["new_dtype"], cast=True)]
        if kind == _STOP:
            return [dataclasses.replace(table, stopped=True)]
        if kind in (_CALL, _REMAT):
            inner = _inner(eqn)
            return self.walk(inner.jaxpr, marks, [None] * len(inner.consts))
        if kind in (_GATHER, _BAG):
            if not table.stopped:
                values = marks[1] if isinstance(marks[1], _Values) else None
                ids = eqn.invars[1].aval.shape[:-1] if kind == _GATHER else eqn.invars[1].aval.shape
                tail = eqn.invars[0].aval.shape[1:]
                if kind == _BAG:
                    struct = jax.ShapeDtypeStruct(ids[:1] + tail, eqn.outvars[0].aval.dtype)
                else:
                    struct = jax.ShapeDtypeStruct(ids + tail, table.dtype)
                self.reads.append(Read(table.leaf, struct, ids, values and values.distinct, source_line(eqn)))
            return nothing
        for t in tables:
            if t and t.leaf not in self.dense:
                self.dense[t.leaf] = DenseUse(eqn.primitive.name, source_line(eqn))
        return nothing


def _values_out(eqn: Any, marks: list[Any]) -> _Values | None:
    name = eqn.primitive.name
    known = [m for m in marks if isinstance(m, _Values)]
    if name in _ELEMENTWISE and len(known) == len(marks):
        views = {id(m.view): m for m in known if m.view is not _SCALAR}
        if len(views) <= 1:
            return next(iter(views.values()), _Values(_SCALAR, 1))
    if name == "select_n" and all(
        isinstance(m, _Values) for m in marks[1:]
    ):  # each value is one of the cases', whatever chooses
        marks, name = marks[1:], "concatenate"
    if name in _RESHAPING and isinstance(marks[0], _Values):  # a new arrangement: not to be paired with the old one
        return _Values(object() if marks[0].view is not _SCALAR else _SCALAR, marks[0].distinct)
    elif name == "gather" and isinstance(marks[0], _Values):  # of some of the values, and perhaps a fill value
        return _Values(object(), marks[0].distinct + 1)
    elif name == "concatenate" and all(isinstance(m, _Values) for m in marks):
        return _Values(object(), sum(m.distinct for m in marks))
    return None


def find_reads(
    closed: core.ClosedJaxpr, candidates: Sequence[bool], distinct: Callable[[Any], int | None]
) -> tuple[list[Read], dict[int, DenseUse]]:
    """The reads of each leaf in program order, and for each leaf that is (also) used densely, the first such use.

    Args:
      closed: the traced program; its inputs are the leaves.
      candidates: which inputs to follow.
      distinct: for a constant of the program (an array it closes over), a bound on its number of distinct values, or
        None.
    """
    finder = _Finder(candidates)
    marks = [
        Table(i, v.aval.dtype) if c else None
        for i, (v, c) in enumerate(zip(closed.jaxpr.invars, candidates, strict=True))
    ]
    bounds = [distinct(c) for c in closed.consts]
    outs = finder.walk(closed.jaxpr, marks, [None if b is None else _Values(object(), b) for b in bounds])
    del outs  # a table that is returned, in aux, is returned as it is
    return finder.reads, finder.dense


# ---------------------------------------------------------------------------------------------------------------------
# replay

# The ids of a read and, for the padded sum, the weights its cotangent is to be multiplied by.
RowIds = tuple[jax.Array, jax.Array | None]


class Replay:
    """Evaluates the program with `arrays[leaf]` read through `read + delta`: one delta a read, in program order."""

    def __init__(self, arrays: dict[int, Any], deltas: Sequence[Any]) -> None:
        self.arrays = arrays
        self.deltas: Iterator[Any] = iter(deltas)
        self.ids: list[RowIds] = []

    def run(self, jaxpr: Any, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The outputs; tables among them as arrays. `args` holds a Table where a leaf is held back."""
        return [self._array(x) if isinstance(x, Table) else x for x in self._walk(jaxpr, constants, args)]

    def _array(self, table: Table) -> Any:
        return jax.lax.stop_gradient(self.arrays[table.leaf]).astype(table.dtype)

    def _walk(self, jaxpr: Any, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(
            zip(jaxpr.invars, args, strict=True)
        )

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._step(jaxpr, eqn, values), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _step(self, jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
        tables = [v if isinstance(v, Table) else None for v in values]
        if not any(tables):
            return _evaluate(jaxpr, eqn, values)
        kind = _kind(eqn, tables)
        table = next(t for t in tables if t)
        if kind == _CAST:
            return [dataclasses.replace(table, dtype=eqn.params["new_dtype"], cast=True)]
        if kind == _STOP:
            return [dataclasses.replace(table, stopped=True)]
        if kind == _CALL:
            inner = _inner(eqn)
            return self._walk(inner.jaxpr, inner.consts, values)
        if kind == _REMAT:
            return self._remat(eqn, values)
        assert kind in (_GATHER, _BAG), f"{kind=}: find_reads and replay disagree"
        (out,) = _evaluate(jaxpr, eqn, [jax.lax.stop_gradient(self.arrays[table.leaf]), *values[1:]])
        if kind == _GATHER:
            out = out.astype(table.dtype)
        if table.stopped:
            return [out]
        num_rows = self.arrays[table.leaf].shape[0]
        if kind == _BAG:
            self.ids.append((values[1], values[2] if len(values) == 3 else None))
        else:
            ids = values[1][..., 0]
            self.ids.append((jnp.clip(ids, 0, num_rows - 1) if eqn.params["mode"] == _CLIP else ids, None))
        delta = next(self.deltas)
        if kind == _GATHER:  # vmap may have put the row's dimensions before those of the ids
            tail = eqn.params["dimension_numbers"].offset_dims
            first = iter(range(out.ndim - len(tail)))
            delta = jnp.transpose(
                delta, [out.ndim - len(tail) + tail.index(i) if i in tail else next(first) for i in range(out.ndim)]
            )
        return [out + delta]

    def _remat(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The call again under jax.checkpoint, its deltas going in and its ids coming out as any other array."""
        inner = _inner(eqn)
        finder = _Finder(())
        finder.walk(inner.jaxpr, [v if isinstance(v, Table) else None for v in values], [None] * len(inner.consts))
        deltas = [next(self.deltas) for _ in finder.reads]
        held = [v if isinstance(v, Table) else None for v in values]
        results: list[Any] = []

        def body(deltas: list[Any], rest: list[Any]) -> Any:
            sub = Replay(self.arrays, deltas)
            it = iter(rest)
            outs = sub._walk(inner.jaxpr, inner.consts, [t if t else next(it) for t in held])
            results[:] = [x if isinstance(x, Table) else None for x in outs]
            return [x for x in outs if not isinstance(x, Table)], sub.ids

        again = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        outs, ids = again(deltas, [v for v in values if not isinstance(v, Table)])
        self.ids += ids
        it = iter(outs)
        return [t if t else next(it) for t in results]


def _evaluate(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """One equation, as jax.core.eval_jaxpr evaluates it: with its own source line, name stack and context."""
    pairs = [(v, x) for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)]
    invars = list(dict(pairs))  # the same variable may come in twice
    jaxpr = jaxpr.replace(
        constvars=[],
        invars=invars,
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return list(jax.core.eval_jaxpr(jaxpr, (), *dict(pairs).values()))
