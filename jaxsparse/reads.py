"""Finding, in a traced program, where its parameters are read by rows.

A parameter is *read by rows* where it enters a gather of whole rows (`table[ids]`, `jnp.take`, `nn.Embed`,
js.embedding_lookup, js.dot, ...), a dynamic slice of whole rows (`table[i]`), or js.embedding_bag's padded sum. Casts
of the whole parameter (Flax's Embed makes one) and stop_gradient are looked through; so are nested jit, remat, the
branches of cond and switch, and the bodies of scans over which the parameter stays the same. Any other use is dense,
and is reported with its primitive and source line: a custom_jvp or custom_vjp call, whose rule is the user's, included.

`find_reads` walks a jaxpr and says which leaves are only read by rows. `interpret.Interpreter` evaluates the same jaxpr
with those leaves held back. Both ask `kind_of`, so that they cannot disagree about what a read is.

`find_reads` also bounds, where it can prove it, how many distinct ids a read has: an id array of the batch that
js.batches counted, seen through reshapes, slices and any function applied element by element, has no more distinct
values than it had on the host. And where the batch has these values in order, and a read is of all of the array, the
same functions are applied to them: these are the rows to gather, and no others. Of a matrix the batch has the columns
that have entries; they are what js.dot reads, as long as it is given the indices and the shape that they are of.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core

from jaxsparse.embedding import PADDED_SUM, at_least_int32
from jaxsparse.ops import COLUMNS
from jaxsparse.rows import row_ids

_LIBRARIES = re.compile(
    r"[/\\\\](jax|jaxlib|jaxsparse|flax|optax|chex|equinox|haiku|contextlib\.py|functools\.py)([/\\\\]|$)"
)
_CELL = re.compile(r"[/\\\\]ipykernel_\d+[/\\\\]")  # a notebook's; the file is there for a debugger only


class Read(NamedTuple):
    """One place where a leaf is read by rows."""

    leaf: int
    out: jax.ShapeDtypeStruct  # what the read gives: ids, or bags, first
    ids: tuple[int, ...]  # the shape of the ids read
    distinct: int | None  # a proven bound on the number of distinct ids
    values: Any  # all that `ids` name, int32 (k,), none left out and no others; or None
    source: str  # "file:line (function)"


class DenseUse(NamedTuple):
    """Why a leaf's gradient is dense: what uses the whole of it, and where."""

    cause: str
    source: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A held-back leaf on its way through the program, with the casts that wait for its rows."""

    leaf: int
    dtype: Any
    casts: tuple[Any, ...] = ()

    def cast(self, dtype: Any) -> Table:
        return Table(self.leaf, dtype, (*self.casts, dtype))


# What an equation means for the tables that enter it.
CAST, STOP, DENSE = "cast", "stop", "dense"
GATHER, SLICE, BAG = "gather", "slice", "bag"  # the reads
CALL, REMAT, SCAN, COND = "call", "remat", "scan", "cond"


def kind_of(eqn: Any, tables: Sequence[Table | None]) -> str:
    """What `eqn` does with the tables among its operands (given in order, None for anything else)."""
    name, params = eqn.primitive.name, eqn.params
    first_only = tables[0] is not None and all(t is None for t in tables[1:])
    if name in ("jit", "pjit", "closed_call"):
        return BAG if _is_padded_sum(eqn, tables) else CALL
    if name in ("checkpoint", "remat", "remat2"):
        return REMAT
    if name == "scan" and not any(tables[params["num_consts"] :]):
        return SCAN
    if name == "cond" and tables[0] is None:
        return COND
    if not first_only:
        return DENSE
    if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
        return CAST
    if name == "stop_gradient":
        return STOP
    if name == "gather":
        numbers, operand = params["dimension_numbers"], eqn.invars[0].aval
        whole_rows = (
            numbers.collapsed_slice_dims == (0,)
            and numbers.start_index_map == (0,)
            and not numbers.operand_batching_dims
            and tuple(params["slice_sizes"]) == (1, *operand.shape[1:])
        )
        return GATHER if whole_rows else DENSE
    if (
        name == "dynamic_slice"
        and eqn.invars[0].aval.ndim
        and tuple(params["slice_sizes"][1:]) == eqn.invars[0].aval.shape[1:]
    ):
        return SLICE
    return DENSE


def _is_padded_sum(eqn: Any, tables: Sequence[Table | None]) -> bool:
    """Whether this is js.embedding_bag's own padded sum, as called: under vmap its shapes differ, and it is looked
    through."""
    if eqn.params.get("name") != PADDED_SUM or len(eqn.invars) not in (2, 3):
        return False
    if tables[0] is None or tables[0].casts or any(tables[1:]):
        return False
    table, ids, *weights = (v.aval for v in eqn.invars)
    same = ids.ndim == 2 and all(w.shape == ids.shape for w in weights) and len(eqn.outvars) == 1
    return same and eqn.outvars[0].aval.shape == ids.shape[:1] + table.shape[1:]


def inner_jaxpr(eqn: Any) -> core.ClosedJaxpr:
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


# Whether the output with this number, outside of the program that has it, is only summed over an axis.
Summed = Callable[[int, int], bool]


def only_summed(jaxpr: Any, v: Any, axis: int, outside: Summed) -> bool:
    """Whether all that a program does with a variable are sums over (at least) this axis: a maximum's derivative needs
    the variable itself once more."""
    used = False
    for eqn in jaxpr.eqns:
        for i, operand in enumerate(eqn.invars):
            if operand is not v:
                continue
            used = True
            if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                inner = inner_jaxpr(eqn).jaxpr

                def further(n: int, axis: int, eqn: Any = eqn) -> bool:
                    return only_summed(jaxpr, eqn.outvars[n], axis, outside)

                if not only_summed(inner, inner.invars[i], axis, further):
                    return False
            elif eqn.primitive.name != "reduce_sum" or axis not in eqn.params["axes"]:
                return False
    outputs = [i for i, out in enumerate(jaxpr.outvars) if out is v]
    return (used or bool(outputs)) and all(outside(i, axis) for i in outputs)


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def source_line(eqns: Sequence[Any]) -> str:
    """Where the user's program made the last of these equations, each of which is inside the one before: the innermost
    frame outside the libraries. The frames of an equation in a nested jit, jnp.take's for one, end at that jit."""
    for eqn in reversed(eqns):
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback else []:
            if not _LIBRARIES.search(frame.file_name):
                file = "cell" if _CELL.search(frame.file_name) else frame.file_name
                return f"{file}:{frame.line_num} ({frame.function_name})"
    return "unknown source"


# ---------------------------------------------------------------------------------------------------------------------
# find


class Columns(NamedTuple):
    """The columns that the entries of a sparse matrix are in."""

    ids: Any  # int32 (k,), each at least once and no others
    shape: tuple[int, ...]  # of the matrix: outside it there is only padding


class Known(NamedTuple):
    """What is known of an array of the batch."""

    distinct: int  # it has at most so many distinct values
    values: Any = None  # an array of them, each at least once and no others; or None
    columns: Columns | None = None  # if it is the indices of a matrix


class _Values(NamedTuple):
    """Element by element a function of one array with at most `distinct` distinct values; `view` tells which array."""

    view: object
    distinct: int
    values: Any = None  # as in Known; of a scalar, the scalar
    columns: Columns | None = None


_SCALAR = object()

_ELEMENTWISE = frozenset(
    "abs add and clamp convert_element_type copy div eq ge gt integer_pow le lt max min mul ne "
    "neg not or population_count rem select_n shift_left shift_right_arithmetic shift_right_logical sign square "
    "stop_gradient sub xor".split()
)
_RESHAPING = frozenset(
    "broadcast_in_dim dynamic_slice expand_dims reshape rev slice squeeze transpose".split(),
)
_KEEPING = _RESHAPING - {"dynamic_slice", "slice"}  # all values


class Finder:
    """Walks a jaxpr, marking each variable with the Table or the _Values it holds."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.dense: dict[int, DenseUse] = {}
        self._within: list[Any] = []  # the equations that the walk is inside of

    def walk(self, jaxpr: Any, marks: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
        """Marks (Table, _Values or None) of the outputs, given those of the inputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(
            zip(jaxpr.invars, marks, strict=True)
        )

        def read(v: Any) -> Any:
            if isinstance(v, core.Literal):
                return _Values(_SCALAR, 1, v.val) if _shape(v) == () else None
            mark = env.get(v)
            return _Values(_SCALAR, 1) if mark is None and _shape(v) == () else mark

        for eqn in jaxpr.eqns:
            self._within.append(eqn)
            env.update(zip(eqn.outvars, self._step(eqn, [read(v) for v in eqn.invars]), strict=True))
            self._within.pop()
        return [read(v) for v in jaxpr.outvars]

    def _step(self, eqn: Any, marks: list[Any]) -> list[Any]:
        tables = [m if isinstance(m, Table) else None for m in marks]
        nothing: list[Any] = [None] * len(eqn.outvars)
        if not any(tables):
            if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                columns = _columns_out(eqn, marks)
                if columns is not None:
                    return [columns]
                inner = inner_jaxpr(eqn)
                return self.walk(inner.jaxpr, marks, [None] * len(inner.consts))
            return [_values_out(eqn, marks)] if len(eqn.outvars) == 1 else nothing
        kind = kind_of(eqn, tables)
        table = next(t for t in tables if t)
        if kind == CAST:
            return [table.cast(eqn.params["new_dtype"])]
        if kind == STOP:
            return nothing  # an array like any other from here on
        if kind in (CALL, REMAT):
            inner = inner_jaxpr(eqn)
            return self.walk(inner.jaxpr, marks, [None] * len(inner.consts))
        if kind == SCAN:
            return self._scan(eqn, tables)
        if kind == COND:
            return self._cond(eqn, marks)
        if kind in (GATHER, SLICE, BAG):
            self.reads.append(_read(eqn, kind, table, marks[1], source_line(self._within)))
            return nothing
        self._dense_use(tables, eqn)
        return nothing

    def _dense_use(self, tables: Sequence[Any], eqn: Any) -> None:
        for t in tables:
            if isinstance(t, Table) and t.leaf not in self.dense:
                self.dense[t.leaf] = DenseUse(eqn.primitive.name, source_line(self._within))

    def _scan(self, eqn: Any, tables: list[Table | None]) -> list[Any]:
        """The reads of the body, once for each turn, and without bounds: a scalar may differ from turn to turn."""
        first, length, inner = len(self.reads), eqn.params["length"], inner_jaxpr(eqn)
        outs = self.walk(inner.jaxpr, tables, [None] * len(inner.consts))
        self.reads[first:] = [
            r._replace(out=_stacked(length, r.out), ids=(length, *r.ids), distinct=None, values=None)
            for r in self.reads[first:]
        ]
        self._dense_use(outs, eqn)  # stacked, or carried on
        return [None] * len(eqn.outvars)

    def _cond(self, eqn: Any, marks: list[Any]) -> list[Any]:
        """The reads of every branch, one branch after the other, of which one is made."""
        first = len(self.reads)
        for branch in eqn.params["branches"]:
            self._dense_use(self.walk(branch.jaxpr, marks[1:], [None] * len(branch.consts)), eqn)
        self.reads[first:] = [r._replace(values=None) for r in self.reads[first:]]
        return [None] * len(eqn.outvars)


def _stacked(length: int, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((length, *x.shape), x.dtype)


def _read(eqn: Any, kind: str, table: Table, ids_mark: Any, source: str) -> Read:
    """The read that an equation makes."""
    tail, dtype = eqn.invars[0].aval.shape[1:], table.dtype
    if kind == SLICE:
        ids: tuple[int, ...] = (eqn.params["slice_sizes"][0],)
    else:
        ids = eqn.invars[1].aval.shape[:-1] if kind == GATHER else eqn.invars[1].aval.shape
    if kind == BAG:
        dtype = eqn.outvars[0].aval.dtype
    distinct = values = None
    if isinstance(ids_mark, _Values) and kind != SLICE:
        distinct = ids_mark.distinct
        if ids_mark.view is not _SCALAR and ids_mark.values is not None and 0 not in ids:
            values = rows_named(eqn, kind, ids_mark.values, CLIPPED)
    out = jax.ShapeDtypeStruct((ids[:1] if kind == BAG else ids) + tail, dtype)
    return Read(table.leaf, out, ids, distinct, values, source)


# t[ids] reads the first or last row where ids are out of range, and then has no gradient for it
CLIPPED = frozenset({jax.lax.GatherScatterMode.CLIP, jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS})


def rows_named(eqn: Any, kind: str, ids: Any, clipped: frozenset[Any]) -> jax.Array:
    """The rows, int32, that the ids of a gather or bag name: num_rows where none. `clipped` are the modes of a gather
    that read the first or last row where an id is out of range."""
    num_rows = eqn.invars[0].aval.shape[0]
    if kind == GATHER and eqn.params["mode"] in clipped:
        ids = jnp.clip(at_least_int32(ids), 0, num_rows - 1)
    return row_ids(jnp.asarray(ids), num_rows)


def _columns_out(eqn: Any, marks: list[Any]) -> _Values | None:
    """What js.dot takes of the indices of a matrix, if its columns are known: padding apart, these."""
    if eqn.params.get("name") != COLUMNS or not isinstance(marks[0], _Values) or marks[0].columns is None:
        return None
    ids, shape = marks[0].columns
    given = tuple(m.values if isinstance(m, _Values) else None for m in marks[1:])
    return _Values(object(), ids.shape[0] + 1, ids) if given == shape else None


def _values_out(eqn: Any, marks: list[Any]) -> _Values | None:
    name = eqn.primitive.name
    known = [m for m in marks if isinstance(m, _Values)]
    if name in _ELEMENTWISE and len(known) == len(marks):
        views = {id(m.view): m for m in known if m.view is not _SCALAR}
        if len(views) <= 1:
            mark = next(iter(views.values()), _Values(_SCALAR, 1))
            return mark._replace(values=_applied(eqn, known), columns=None)
    if name == "select_n" and all(
        isinstance(m, _Values) for m in marks[1:]
    ):  # each value is one of the cases', whatever chooses
        marks, name = marks[1:], "concatenate"
    if name in _RESHAPING and isinstance(marks[0], _Values):  # a new arrangement: not to be paired with the old one
        values = marks[0].values if name in _KEEPING else None
        return _Values(object() if marks[0].view is not _SCALAR else _SCALAR, marks[0].distinct, values)
    elif name == "gather" and isinstance(marks[0], _Values):  # of some of the values, and perhaps a fill value
        return _Values(object(), marks[0].distinct + 1)
    elif name == "concatenate" and all(isinstance(m, _Values) for m in marks):
        return _Values(object(), sum(m.distinct for m in marks))
    return None


def _applied(eqn: Any, operands: Sequence[_Values]) -> Any:
    """An elementwise equation's result on the values of its operands; not floats, which XLA may round in another way
    where it puts other operations together."""
    if any(m.values is None for m in operands) or jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return None
    return eqn.primitive.bind(*jnp.broadcast_arrays(*(m.values for m in operands)), **eqn.params)


def find_reads(
    closed: core.ClosedJaxpr, candidates: Sequence[bool], known: Callable[[Any], Known | None]
) -> tuple[list[Read], dict[int, DenseUse]]:
    """The reads of each leaf in program order, and for each leaf that is (also) used densely, the first such use.

    Args:
      closed: the traced program; its inputs are the leaves.
      candidates: which inputs to follow.
      known: for a constant of the program (an array it closes over), what is known of it, or None.
    """
    finder = Finder()
    marks = [
        Table(i, v.aval.dtype) if c else None
        for i, (v, c) in enumerate(zip(closed.jaxpr.invars, candidates, strict=True))
    ]
    constants = [known(c) for c in closed.consts]
    outs = finder.walk(closed.jaxpr, marks, [None if c is None else _Values(object(), *c) for c in constants])
    del outs  # a table that is returned, in aux, is returned as it is
    return finder.reads, finder.dense
