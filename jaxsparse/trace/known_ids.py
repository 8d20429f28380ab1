"""Follows ids whose distinct values come with the batch (`data/distinct.py`) through the program that computes row ids.

An array is coded if it is known to be values[places], with few values and an integer place for each element. An
elementwise operation is done on the values, a move of elements on the places. So row ids stay coded if a program
reshapes, hashes or masks a batch's ids. The rows of a table are then found among the few values, without sorting all
ids.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program
from jaxsparse.data.batch import Batch
from jaxsparse.data.distinct import NO_ID, DistinctIds
from jaxsparse.ops.rows import as_whole
from jaxsparse.trace.row_elementwise import ELEMENTWISE


class Known(NamedTuple):
    """Numbers of leaves among a step's arguments: an array, its distinct ids and its positions in these."""

    array: int
    ids: int
    positions: int
    size: int
    is_column: bool  # the ids are the second column of the array, the indices of a BCOO


def find_known(tree: Any) -> list[Known]:
    """Finds the arrays with known distinct ids in a pytree: those of batches that are unchanged since js.batches made
    them, or a device's part of these."""
    leaves, definition = jax.tree.flatten(tree)
    numbers = jax.tree.unflatten(definition, range(len(leaves)))
    found = []
    for batch in jax.tree.leaves(numbers, is_leaf=lambda x: isinstance(x, Batch)):
        if not isinstance(batch, Batch):
            continue
        arrays = jax.tree.leaves(batch.x, is_leaf=lambda x: isinstance(x, BCOO))
        distinct_of = jax.tree.leaves(batch.distinct, is_leaf=lambda x: x is None or isinstance(x, DistinctIds))
        for x, distinct in zip(arrays, distinct_of, strict=True) if len(arrays) == len(distinct_of) else ():
            if isinstance(distinct, DistinctIds):
                is_column = isinstance(x, BCOO)
                array = x.indices if is_column else x
                known = Known(array, distinct.ids, distinct.positions, distinct.size, is_column)
                if _fits(known, leaves, distinct.shape):
                    found.append(known)
    return found


def known_of_traced(args: Any, kwargs: Any, start: int) -> tuple[list[Known], list[Any], Callable[..., Any]]:
    """What is known of the arguments' ids, if the arguments are being traced.

    Returns:
      The known arrays, with numbers of inputs from `start` on; these inputs; a function of them that returns (args,
      kwargs).
    """
    found = find_known((args, kwargs))
    others, tree = jax.tree.flatten((args, kwargs))
    found = [k for k in found if _jax.is_traced(others[k.array])]
    if not found:
        return [], [], lambda arrays: (args, kwargs)
    numbers = [i for k in found for i in k[:3]]

    def with_arrays(arrays: list[Any]) -> Any:
        by_number = dict(zip(numbers, arrays, strict=True))
        return jax.tree.unflatten(tree, [by_number.get(i, x) for i, x in enumerate(others)])

    at = itertools.count(start)
    known = [k._replace(array=next(at), ids=next(at), positions=next(at)) for k in found]
    return known, [others[i] for i in numbers], with_arrays


def _fits(known: Known, leaves: Sequence[Any], counted: tuple[int, ...]) -> bool:
    """Whether an array still has the shape that it had when its distinct ids were found."""
    array, ids, positions = (jnp.shape(leaves[i]) for i in known[:3])
    same = array == (*positions, 2) if known.is_column else array == positions
    return same and positions == counted and len(ids) == 2 and ids[0] == counted[0] and ids[0] * ids[1] >= known.size


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """An array that is compared by identity: two codes with one `Shared` have the same values, or the same places."""

    array: Any


class Coded(NamedTuple):
    """An array that is known to be values[places].

    values: (m,).
    is_id: bool (m,). The other values are padding.
    places: int32, the array's shape.
    all_named: whether each value is known to occur at some place.
    """

    values: Shared
    is_id: jax.Array
    places: Shared
    all_named: bool


class _Entry(NamedTuple):
    """An array of a program and what is known of it: its code, the code of its second column, or the one number that
    all its elements equal."""

    given: Shared
    coded: Coded | None = None
    column: Coded | None = None
    number: Shared | None = None

    @property
    def array(self) -> Any:
        return self.given.array

    @property
    def one_number(self) -> Shared | None:
        return self.given if self.number is None and jnp.shape(self.array) == () else self.number


def coded_ids(ids: _jax.Needed, leaves: Sequence[Any], known: Sequence[Known]) -> tuple[list[Coded | None], jax.Array]:
    """(the code of each id array or None, whether some batch's distinct ids do not agree with its ids: bool ())."""
    entries = [_Entry(Shared(as_whole(x) if used else x)) for x, used in zip(leaves, ids.used, strict=False)]
    wrong = jnp.zeros((), bool)
    for k in (k for k in known if ids.used[k.array]):
        values = jnp.reshape(leaves[k.ids], -1)[: k.size]
        array, places = jnp.asarray(leaves[k.array]), jnp.asarray(leaves[k.positions])
        coded = Coded(Shared(values), values != NO_ID, Shared(places), all_named=True)
        given = Shared(array)
        entries[k.array] = _Entry(given, column=coded) if k.is_column else _Entry(given, coded)
        stated = values.at[places].get(mode="fill", fill_value=NO_ID, wrap_negative_indices=False)
        wrong |= jnp.any(stated != (array[:, 1] if k.is_column else array))
    inputs = [v for v, used in zip(entries, ids.used, strict=False) if used]
    return [v.coded for v in _Evaluation().run(ids.program, inputs)], wrong


class _Evaluation:
    """Evaluates a program. Operations on the same values or places are done once."""

    def __init__(self) -> None:
        self._done: dict[Any, Shared] = {}

    def run(self, program: Program, inputs: Sequence[_Entry]) -> list[_Entry]:
        env = {v: _Entry(Shared(x)) for v, x in program.constants.items()}
        env.update(zip(program.inputs, inputs, strict=True))

        def read(v: Any) -> _Entry:
            if _jax.is_literal(v):
                return _Entry(Shared(np.asarray(_jax.literal_value(v), _jax.dtype(v))))
            return env[v]

        for eqn in program.equations:
            entries = [read(v) for v in eqn.inputs]
            if eqn.primitive in _jax.CALLS:
                outs = self.run(_jax.called(eqn), entries)
            else:
                outs = [_Entry(Shared(x)) for x in _jax.evaluate(program, eqn, [v.array for v in entries])]
                if len(outs) == 1:
                    outs = [self._known(eqn, entries, outs[0])]
            env.update(zip(eqn.outputs, outs, strict=True))
        return [read(v) for v in program.outputs]

    def _known(self, eqn: Equation, entries: list[_Entry], out: _Entry) -> _Entry:
        """The output with what is known of it."""
        first = next(iter(entries), out)
        if eqn.primitive in ELEMENTWISE:
            return self._elementwise(eqn, entries, out)
        if eqn.primitive is _jax.CONCATENATE:
            return out._replace(coded=self._joined(eqn, entries, [], all_named=True))
        if eqn.primitive is _jax.SLICE and first.column is not None:
            n, column = first.array.shape[0], first.column
            bounds = [tuple(eqn.param(name) or ()) for name in ("start_indices", "limit_indices", "strides")]
            if bounds == [(0, 1), (n, 2), ()]:
                places = self._once("column", [column.places], lambda: column.places.array[:, None])
                return out._replace(coded=column._replace(places=places))
        casts = _jax.summed_axes(eqn) == ()  # a cast: the array varies over devices
        if not casts and eqn.primitive not in _MOVES:
            return out
        code, number = first.coded, first.one_number
        axes = _jax.varying_axes(out.array)
        if number is not None:
            return out._replace(number=Shared(_jax.vary(jnp.asarray(number.array), axes)) if casts else number)
        if code is None:
            return out
        if casts:
            values, places = (
                self._once(("vary", axes), [x], lambda x=x: _jax.vary(x.array, axes))  # type: ignore[misc]
                for x in (code.values, code.places)
            )
            return out._replace(coded=code._replace(values=values, is_id=_jax.vary(code.is_id, axes), places=places))
        places = self._bind(eqn, [code.places, *(v.given for v in entries[1:])])
        all_named = code.all_named and eqn.primitive not in _SLICES and out.array.size > 0
        return out._replace(coded=code._replace(places=places, all_named=all_named))

    def _elementwise(self, eqn: Equation, entries: list[_Entry], out: _Entry) -> _Entry:
        given = [v.coded for v in entries if v.coded is not None]
        operands = [v.one_number if v.coded is None else v.coded.values for v in entries]
        same_places = all(code.places is given[0].places for code in given)
        if same_places and all(x is not None for x in operands):
            known = [x for x in operands if x is not None]
            if not given:
                return out._replace(number=self._bind(eqn, known))
            shape = given[0].values.array.shape
            arrays = [
                jnp.broadcast_to(jnp.asarray(x.array, _jax.dtype(v)), shape)
                for x, v in zip(known, eqn.inputs, strict=True)
            ]
            values = self._once(_jax.description(eqn), known, lambda: _jax.bind(eqn, arrays)[0])
            return out._replace(coded=given[0]._replace(values=values, all_named=any(c.all_named for c in given)))
        if eqn.primitive is _jax.SELECT:
            return out._replace(coded=self._joined(eqn, entries[1:], [entries[0].given], all_named=False))
        return out

    def _joined(
        self, eqn: Equation, entries: list[_Entry], index_operands: list[Shared], *, all_named: bool
    ) -> Coded | None:
        """The code of an array whose elements come from the entries: their values concatenated, single numbers last."""
        codes = []
        for v in entries:
            code = v.coded
            if code is None and v.one_number is not None:
                one = self._once("one", [v.one_number], lambda x=v.one_number: jnp.reshape(jnp.asarray(x.array), 1))  # type: ignore[misc]
                zeros = Shared(jnp.zeros(jnp.shape(v.array), jnp.int32))
                code = Coded(one, jnp.ones(1, bool), zeros, all_named=jnp.size(v.array) > 0)
            if code is None:
                return None
            codes.append(code)
        parts = {code.values: code for code in codes}
        parts = dict(sorted(parts.items(), key=lambda part: part[0].array.shape == (1,)))
        ends = itertools.accumulate(code.values.array.shape[0] for code in parts.values())
        start = dict(zip(parts, [0, *ends], strict=False))
        places = self._bind(eqn, [*index_operands, *(Shared(code.places.array + start[code.values]) for code in codes)])
        if len(parts) == 1:
            return codes[0]._replace(places=places, all_named=all_named and any(code.all_named for code in codes))
        values = self._once("joined", list(parts), lambda: jnp.concatenate([x.array for x in parts]))
        is_id = jnp.concatenate([code.is_id for code in parts.values()])
        return Coded(values, is_id, places, all_named and all(code.all_named for code in codes))

    def _bind(self, eqn: Equation, operands: Sequence[Shared]) -> Shared:
        return self._once(_jax.description(eqn), operands, lambda: _jax.bind(eqn, [x.array for x in operands])[0])

    def _once(self, what: Hashable, operands: Sequence[Shared], make: Callable[[], Any]) -> Shared:
        key = what, *(_key(x) for x in operands)
        if key not in self._done:
            self._done[key] = Shared(make())
        return self._done[key]


def _key(x: Shared) -> Hashable:
    return (x.array.dtype, x.array.shape, x.array.tobytes()) if isinstance(x.array, np.ndarray) else x


_SLICES = _jax.primitives("slice dynamic_slice")
_MOVES = _SLICES | _jax.primitives("broadcast_in_dim reshape rev squeeze transpose")
