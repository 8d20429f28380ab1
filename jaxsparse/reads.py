"""Finding, in a traced program, where its parameters are read by rows.

A parameter is *read by rows* where it enters a gather of whole rows (`table[ids]`, `jnp.take`, `nn.Embed`,
js.embedding_lookup, js.dot, ...), a dynamic slice of whole rows (`table[i]`), or js.embedding_bag's padded sum. Casts
of the whole parameter (Flax's Embed makes one) and stop_gradient are looked through; so are nested jit, remat, the
branches of cond and switch, and the bodies of scans over which the parameter stays the same. Any other use is dense,
and is reported with its primitive and source line: a custom_jvp or custom_vjp call, whose rule is the user's, included.

`find_reads` walks a program and says which leaves are only read by rows. `interpret.Interpreter` evaluates the same one
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
import jax.numpy as jnp

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program
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
    closed: bool  # a region that this library cannot open, and that may only read rows

    @property
    def advice(self) -> str:
        """ "" or what to do about it."""
        if not self.closed:
            return ""
        return f"jaxsparse cannot open a {self.cause} with jax {jax.__version__}: read the rows outside of it."


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


def kind_of(eqn: Equation, tables: Sequence[Table | None]) -> str:
    """What `eqn` does with the tables among its operands (given in order, None for anything else)."""
    primitive = eqn.primitive
    first_only = tables[0] is not None and all(t is None for t in tables[1:])
    if primitive in _jax.CALLS:
        return BAG if _is_padded_sum(eqn, tables) else CALL
    if _jax.is_remat(eqn):
        return REMAT
    if primitive is _jax.SCAN and not any(tables[_jax.scan_of(eqn).num_consts :]):
        return SCAN
    if primitive is _jax.COND and tables[0] is None:
        return COND
    if not first_only:
        return DENSE
    operand = _jax.shape(eqn.inputs[0])
    if primitive is _jax.CONVERT and jnp.issubdtype(eqn.param("new_dtype"), jnp.floating):
        return CAST
    if primitive is _jax.STOP_GRADIENT:
        return STOP
    if primitive is _jax.GATHER:
        numbers = eqn.param("dimension_numbers")
        whole_rows = (
            numbers.collapsed_slice_dims == (0,)
            and numbers.start_index_map == (0,)
            and not numbers.operand_batching_dims
            and tuple(eqn.param("slice_sizes")) == (1, *operand[1:])
        )
        return GATHER if whole_rows else DENSE
    if primitive is _jax.DYNAMIC_SLICE and operand and tuple(eqn.param("slice_sizes")[1:]) == operand[1:]:
        return SLICE
    return DENSE


def _is_padded_sum(eqn: Equation, tables: Sequence[Table | None]) -> bool:
    """Whether this is js.embedding_bag's own padded sum, as called: under vmap its shapes differ, and it is looked
    through."""
    if _jax.called_name(eqn) != PADDED_SUM or len(eqn.inputs) not in (2, 3):
        return False
    if tables[0] is None or tables[0].casts or any(tables[1:]):
        return False
    table, ids, *weights = map(_jax.shape, eqn.inputs)
    same = len(ids) == 2 and all(w == ids for w in weights) and len(eqn.outputs) == 1
    return same and _jax.shape(eqn.outputs[0]) == ids[:1] + table[1:]


# Whether the output with this number, outside of the program that has it, is only summed over an axis.
Summed = Callable[[int, int], bool]


def only_summed(program: Program, v: Any, axis: int, outside: Summed) -> bool:
    """Whether all that a program does with a variable are sums over (at least) this axis: a maximum's derivative needs
    the variable itself once more."""
    used = False
    for eqn in program.equations:
        for i, operand in enumerate(eqn.inputs):
            if operand is not v:
                continue
            used = True
            if eqn.primitive in _jax.CALLS:
                inner = _jax.called(eqn)

                def further(n: int, axis: int, eqn: Equation = eqn) -> bool:
                    return only_summed(program, eqn.outputs[n], axis, outside)

                if not only_summed(inner, inner.inputs[i], axis, further):
                    return False
            elif eqn.primitive is not _jax.REDUCE_SUM or axis not in eqn.param("axes"):
                return False
    outputs = [i for i, out in enumerate(program.outputs) if out is v]
    return (used or bool(outputs)) and all(outside(i, axis) for i in outputs)


def source_line(eqns: Sequence[Equation]) -> str:
    """Where the user's program made the last of these equations, each of which is inside the one before: the innermost
    frame outside the libraries. The frames of an equation in a nested jit, jnp.take's for one, end at that jit."""
    for eqn in reversed(eqns):
        for file, line, function in _jax.source_frames(eqn):
            if not _LIBRARIES.search(file):
                return f"{'cell' if _CELL.search(file) else file}:{line} ({function})"
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

_ELEMENTWISE = _jax.primitives(
    "abs add and clamp convert_element_type copy div eq ge gt integer_pow le lt max min mul ne "
    "neg not or population_count rem select_n shift_left shift_right_arithmetic shift_right_logical sign square "
    "stop_gradient sub xor"
)
_RESHAPING = _jax.primitives("broadcast_in_dim dynamic_slice reshape rev slice squeeze transpose")
_KEEPING = _RESHAPING - {_jax.DYNAMIC_SLICE, _jax.SLICE}  # all values


class Finder:
    """Walks a program, marking each variable with the Table or the _Values it holds."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.dense: dict[int, DenseUse] = {}
        self._within: list[Equation] = []  # the equations that the walk is inside of

    def walk(self, program: Program, marks: Sequence[Any], constants: dict[Any, Any] | None = None) -> list[Any]:
        """Marks (Table, _Values or None) of the outputs, given those of the inputs, and of constants by variable."""
        env: dict[Any, Any] = dict(zip(program.inputs, marks, strict=True)) | (constants or {})

        def read(v: Any) -> Any:
            if _jax.is_literal(v):
                return _Values(_SCALAR, 1, _jax.literal_value(v)) if _jax.shape(v) == () else None
            mark = env.get(v)
            return _Values(_SCALAR, 1) if mark is None and _jax.shape(v) == () else mark

        for eqn in program.equations:
            self._within.append(eqn)
            env.update(zip(eqn.outputs, self._step(eqn, [read(v) for v in eqn.inputs]), strict=True))
            self._within.pop()
        return [read(v) for v in program.outputs]

    def _step(self, eqn: Equation, marks: list[Any]) -> list[Any]:
        tables = [m if isinstance(m, Table) else None for m in marks]
        nothing: list[Any] = [None] * len(eqn.outputs)
        if not any(tables):
            if eqn.primitive in _jax.CALLS:
                columns = _columns_out(eqn, marks)
                return [columns] if columns is not None else self.walk(_jax.called(eqn), marks)
            return [_values_out(eqn, marks)] if len(eqn.outputs) == 1 else nothing
        kind = kind_of(eqn, tables)
        table = next(t for t in tables if t)
        if kind == CAST:
            return [table.cast(eqn.param("new_dtype"))]
        if kind == STOP:
            return nothing  # an array like any other from here on
        if kind == CALL:
            return self.walk(_jax.called(eqn), marks)
        if kind == REMAT:
            return self.walk(_jax.remat_of(eqn).body, marks)
        if kind == SCAN:
            return self._scan(eqn, tables)
        if kind == COND:
            return self._cond(eqn, marks)
        if kind in (GATHER, SLICE, BAG):
            self.reads.append(_read(eqn, kind, table, marks[1], source_line(self._within)))
            return nothing
        self._dense_use(tables, eqn)
        return nothing

    def _dense_use(self, tables: Sequence[Any], eqn: Equation) -> None:
        for t in tables:
            if isinstance(t, Table) and t.leaf not in self.dense:
                closed = _closed_region(eqn, tables)
                self.dense[t.leaf] = DenseUse(str(eqn.primitive), source_line(self._within), closed)

    def _scan(self, eqn: Equation, tables: list[Table | None]) -> list[Any]:
        """The reads of the body, once for each turn, and without bounds: a scalar may differ from turn to turn."""
        first, scan = len(self.reads), _jax.scan_of(eqn)
        outs = self.walk(scan.body, tables)
        self.reads[first:] = [
            r._replace(out=_stacked(scan.length, r.out), ids=(scan.length, *r.ids), distinct=None, values=None)
            for r in self.reads[first:]
        ]
        self._dense_use(outs, eqn)  # stacked, or carried on
        return [None] * len(eqn.outputs)

    def _cond(self, eqn: Equation, marks: list[Any]) -> list[Any]:
        """The reads of every branch, one branch after the other, of which one is made."""
        first = len(self.reads)
        for branch in _jax.branches(eqn):
            self._dense_use(self.walk(branch, marks[1:]), eqn)
        self.reads[first:] = [r._replace(values=None) for r in self.reads[first:]]
        return [None] * len(eqn.outputs)


# regions that are no obstacle by themselves: what they do with a table is dense whatever is inside
_DENSE_INSIDE = _jax.primitives("cond custom_jvp_call custom_vjp_call scan while")


def _closed_region(eqn: Equation, tables: Sequence[Any]) -> bool:
    """Whether a table enters a region of a kind that is unknown here, in which it may be read by rows."""
    programs = None if eqn.primitive in _DENSE_INSIDE else _jax.held_programs(eqn)
    if programs is None:
        return False
    for inner in programs:
        if len(inner.inputs) == len(tables):
            finder = Finder()
            finder.walk(inner, tables)
            return not finder.dense
    return True


def _stacked(length: int, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((length, *x.shape), x.dtype)


def _read(eqn: Equation, kind: str, table: Table, ids_mark: Any, source: str) -> Read:
    """The read that an equation makes."""
    tail, dtype = _jax.shape(eqn.inputs[0])[1:], table.dtype
    if kind == SLICE:
        ids: tuple[int, ...] = (eqn.param("slice_sizes")[0],)
    else:
        ids = _jax.shape(eqn.inputs[1])[: -1 if kind == GATHER else None]
    if kind == BAG:
        dtype = _jax.dtype(eqn.outputs[0])
    distinct = values = None
    if isinstance(ids_mark, _Values) and kind != SLICE:
        distinct = ids_mark.distinct
        if ids_mark.view is not _SCALAR and ids_mark.values is not None and 0 not in ids:
            values = rows_named(eqn, kind, ids_mark.values, CLIPPED)
    out = jax.ShapeDtypeStruct((ids[:1] if kind == BAG else ids) + tail, dtype)
    return Read(table.leaf, out, ids, distinct, values, source)


# t[ids] reads the first or last row where ids are out of range, and then has no gradient for it
CLIPPED = frozenset({jax.lax.GatherScatterMode.CLIP, jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS})


def rows_named(eqn: Equation, kind: str, ids: Any, clipped: frozenset[Any]) -> jax.Array:
    """The rows, int32, that the ids of a gather or bag name: num_rows where none. `clipped` are the modes of a gather
    that read the first or last row where an id is out of range."""
    num_rows = _jax.shape(eqn.inputs[0])[0]
    if kind == GATHER and eqn.param("mode") in clipped:
        ids = jnp.clip(at_least_int32(ids), 0, num_rows - 1)
    return row_ids(jnp.asarray(ids), num_rows)


def _columns_out(eqn: Equation, marks: list[Any]) -> _Values | None:
    """What js.dot takes of the indices of a matrix, if its columns are known: padding apart, these."""
    if _jax.called_name(eqn) != COLUMNS or not isinstance(marks[0], _Values) or marks[0].columns is None:
        return None
    ids, shape = marks[0].columns
    given = tuple(m.values if isinstance(m, _Values) else None for m in marks[1:])
    return _Values(object(), ids.shape[0] + 1, ids) if given == shape else None


def _values_out(eqn: Equation, marks: list[Any]) -> _Values | None:
    primitive = eqn.primitive
    known = [m for m in marks if isinstance(m, _Values)]
    if primitive in _ELEMENTWISE and len(known) == len(marks):
        views = {m.view: m for m in known if m.view is not _SCALAR}
        if len(views) <= 1:
            mark = next(iter(views.values()), _Values(_SCALAR, 1))
            return mark._replace(values=_applied(eqn, known), columns=None)
    if primitive is _jax.SELECT and all(
        isinstance(m, _Values) for m in marks[1:]
    ):  # each value is one of the cases', whatever chooses
        marks, primitive = marks[1:], _jax.CONCATENATE
    if primitive in _RESHAPING and isinstance(marks[0], _Values):
        # a new arrangement: not to be paired with the old one
        values = marks[0].values if primitive in _KEEPING else None
        return _Values(object() if marks[0].view is not _SCALAR else _SCALAR, marks[0].distinct, values)
    elif primitive is _jax.GATHER and isinstance(marks[0], _Values):  # of some of the values, and perhaps a fill value
        return _Values(object(), marks[0].distinct + 1)
    elif primitive is _jax.CONCATENATE and all(isinstance(m, _Values) for m in marks):
        return _Values(object(), sum(m.distinct for m in marks))
    return None


def _applied(eqn: Equation, operands: Sequence[_Values]) -> Any:
    """An elementwise equation's result on the values of its operands; not floats, which XLA may round in another way
    where it puts other operations together."""
    if any(m.values is None for m in operands) or jnp.issubdtype(_jax.dtype(eqn.outputs[0]), jnp.inexact):
        return None
    return eqn.primitive.bind(*jnp.broadcast_arrays(*(m.values for m in operands)), **eqn.params)


def find_reads(
    program: Program, candidates: Sequence[bool], known: Callable[[Any], Known | None]
) -> tuple[list[Read], dict[int, DenseUse]]:
    """The reads of each leaf in program order, and for each leaf that is (also) used densely, the first such use.

    Args:
      program: its inputs are the leaves.
      candidates: which inputs to follow.
      known: for a constant of the program (an array it closes over), what is known of it, or None.
    """
    finder = Finder()
    marks = [
        Table(i, _jax.dtype(v)) if c else None for i, (v, c) in enumerate(zip(program.inputs, candidates, strict=True))
    ]
    constants = {v: _Values(object(), *found) for v, c in program.constants.items() if (found := known(c)) is not None}
    outs = finder.walk(program, marks, constants)
    del outs  # a table that is returned, in aux, is returned as it is
    return finder.reads, finder.dense
