"""What a compiled program has in it: operations as large as a table, and the bytes that it moves."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

from tests.hlo import INSTRUCTION, computations

# Instructions that name an array which is there already.
_FREE = "parameter get-tuple-element tuple bitcast constant opt-barrier after-all iota partition-id replica-id".split()
# Instructions that write rows into an array in place: where XLA cannot, it copies the array first, and that is found.
_WRITES = ["scatter", "dynamic-update-slice"]
_READS = ["gather", "dynamic-slice", "slice"]
# Inside of a fusion: what nothing is made for, if only some rows of it are read.
_SAME_ROWS = ["bitcast", "reshape", "copy"]
_CALLS = ["while", "conditional", "call"]

_ARRAY = re.compile(r"\b(pred|[usf]\d+\w*|bf16|c64|c128)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array in HLO: `order` are its axes from the fastest on, `tile` what the fastest are padded to."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    on_chip: bool  # in a TPU's vector memory

    @property
    def itemsize(self) -> float:
        bits = _BITS.get(self.dtype) or int(re.match(r"[usf](\d+)", self.dtype)[1])
        return bits / 8

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def bytes_of(self, shape: tuple[int, ...]) -> float:
        """Of a window of this shape, with what its tiles are padded to; nothing on the chip."""
        if self.on_chip:
            return 0.0
        padded = [shape[axis] for axis in self.order] or list(shape)
        # One row of a tile lies together: of a window the fastest axis is padded, of the array itself all axes are.
        for n, size in enumerate(reversed(self.tile)):
            whole = n < len(padded) and (n == 0 or shape == self.shape or _crosses(self, n, shape))
            if whole:
                padded[n] = -(-padded[n] // size) * size
        return math.prod(padded) * self.itemsize

    @property
    def bytes(self) -> float:
        return self.bytes_of(self.shape)


def _crosses(array: Array, n: int, window: tuple[int, ...]) -> bool:
    """Whether a window goes on along a slower axis: then it takes a part of all rows of a tile."""
    return n < len(array.order) and window[array.order[n]] > 1


def arrays(shape: str) -> list[Array]:
    """Of the text of a shape, a tuple's being all of its arrays."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        order, _, rest = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        numbers = [tuple(map(int, filter(None, x.split(",")))) for x in (dims, order, tile[1] if tile else "")]
        found.append(Array(dtype, *numbers, on_chip="S(1)" in rest))
    return found


class Program:
    """The text of an optimized HLO module, taken apart."""

    def __init__(self, text: str) -> None:
        self.parts = computations(text)
        self.entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]

    @functools.cached_property
    def turns(self) -> dict[str, int]:
        """How often each computation runs that is no fusion's and no reduction's, as far as that is known."""
        turns: dict[str, int] = collections.defaultdict(int)
        stack = [(self.entry, 1)]
        while stack:
            name, many = stack.pop()
            turns[name] += many
            for i in self.parts[name]:
                if i["op"] in _CALLS:
                    count = re.search(r'known_trip_count":\{"n":"(\d+)"', i["rest"])
                    often = many * (int(count[1]) if count else 1)
                    stack += [(inner, often) for inner in _called(i["rest"]) if inner in self.parts]
        return turns

    def body(self, fusion: re.Match) -> list[re.Match]:
        return self.parts[re.search(r"calls=%?([\w.\-]+)", fusion["rest"])[1]]


def _is_name_only(i: re.Match) -> bool:
    """Whether an instruction names what another one makes: the end of one that runs beside others, its parts, or the
    scratch of one that the SparseCore is to do."""
    if i["op"].endswith("-done") or i["op"] == "custom-call-start":
        return True
    return i["op"] == "custom-call" and _NAMES.search(i["rest"]) is not None


def _parts(shape: str) -> list[str]:
    """Of a tuple's shape, those of its elements, which may be tuples."""
    depth, parts = 0, [""]
    for c in shape[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _made(i: re.Match) -> list[Array]:
    """The arrays that an instruction makes. One that runs beside others names its operands first: (to, from, ...) of a
    copy, ((operands), result, ...) of all else; one for the SparseCore has them when it goes on."""
    if i["op"].endswith(("-start", "-update")):
        first, *others = _parts(i["shape"])
        return arrays(others[0] if first.startswith("(") else first)
    return arrays(i["shape"])


def _given(i: re.Match) -> list[Array]:
    """Of one that runs beside others, its operands."""
    first, *others = _parts(i["shape"])
    return arrays(first if first.startswith("(") else others[0])


def _is_offloaded(i: re.Match, kind: str) -> bool:
    """Whether an instruction is a gather or scatter that the SparseCore does; a scatter's is in place."""
    return i["op"] == "custom-call-update" and i["name"].startswith(f"{kind}_offload")


def _is_row_dma(i: re.Match, kind: str) -> bool:
    """Whether an instruction is a kernel of ops/row_dma.py: "gather", or "write", which is in place."""
    if i["op"] != "custom-call" or not i["name"].startswith(f"jaxsparse_{kind}_rows"):
        return False
    return kind != "write" or "output_to_operand_aliasing={{}: (2, {})}" in i["rest"]


def _is_large_part(i: re.Match, is_large: Callable[[Array], bool]) -> bool:
    (part,), (whole,) = _made(i), _given(i)
    return is_large(whole) and 64 * part.size >= whole.size


_NAMES = re.compile(r'custom_call_target="(ConcatBitcast|AssumeGatherIndicesInBound|AllocateBuffer)"')


def _called(rest: str) -> list[str]:
    found = re.findall(r"(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    several = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return found + (re.findall(r"%?([\w.\-]+)", several[1]) if several else [])


def operands(instruction: re.Match) -> list[str]:
    depth, end = 1, len(instruction["rest"])
    for n, c in enumerate(instruction["rest"]):
        depth += (c == "(") - (c == ")")
        if not depth:
            end = n
            break
    return re.findall(r"%([\w.\-]+)", instruction["rest"][:end])


def roots(body: list[re.Match]) -> list[re.Match]:
    """What makes each of the results of a computation, looked at through tuples and bitcasts."""
    by_name = {i["name"]: i for i in body}

    def made(i: re.Match) -> list[re.Match]:
        if i["op"] == "tuple":
            return [x for name in operands(i) for x in made(by_name[name])]
        return made(by_name[operands(i)[0]]) if i["op"] == "bitcast" else [i]

    return made(body[-1])


def table_sized(program: Program, table: tuple[int, ...], ids: int) -> dict[str, int]:
    """Operations whose result is as large as a table of this shape, or as a part of it: how often each kind is there.

    Such a result has an axis of the table's rows, padded or not, or has num_rows elements and is larger than all that
    is made of a row for each id. What names an array or writes some of its rows in place is none. A loop or branch is
    one if a table goes through it; what is in it is counted by itself.
    """
    num_rows = table[0]
    least = max(num_rows, 4 * ids * math.prod(table[1:]))

    def is_large(array: Array) -> bool:
        return array.size >= least or any(num_rows <= n <= num_rows + 1024 for n in array.shape)

    found: dict[str, int] = collections.Counter()
    for name in program.turns:
        for i in program.parts[name]:
            kind = i["op"]
            if kind in _FREE or kind in _WRITES or kind == "call" or _is_name_only(i):
                continue
            if _is_offloaded(i, "scatter") or _is_row_dma(i, "write"):
                continue
            if kind == "fusion":
                made = roots(program.body(i))
                large = [r["op"] for r in made if any(map(is_large, arrays(r["shape"]))) and r["op"] not in _WRITES]
                found.update(f"{op} fusion" for op in large if op != "parameter")
            elif _is_large_part(i, is_large) if kind == "slice-start" else any(map(is_large, _made(i))):
                found[kind] += 1
    return dict(sorted(found.items()))


def bytes_moved(program: Program, *, tiles: bool = False) -> dict[str, float]:
    """Bytes that are read and written outside of the chip, by kind of operation.

    Of what is gathered, sliced, scattered or updated, these rows and no others; of all else operands and results. Rows
    are as wide as they lie there: 128 columns on TPU, where a row lies along the lanes, and a slab of 128 rows where
    the rows do. A TPU's scatter moves a whole tile for a row, 8 times as much: that is counted with `tiles` only. What
    a kernel of ops/row_dma.py moves is not in the program, and follows from its shapes: the ids, and all rows twice.
    """
    moved: dict[str, float] = collections.Counter()
    for name, turns in program.turns.items():
        body = program.parts[name]
        shapes = {i["name"]: i["shape"] for i in body}
        for i in body:
            if i["op"] in _FREE or i["op"] in _CALLS or _is_name_only(i):
                continue
            kind, size = _moved_by(program, i, shapes, tiles)
            moved[kind] += turns * size
    return {kind: size for kind, size in sorted(moved.items(), key=lambda x: -x[1]) if size}


def _moved_by(program: Program, i: re.Match, shapes: dict[str, str], tiles: bool) -> tuple[str, float]:
    if i["op"] in ("copy-start", "slice-start"):
        (to,), (source,) = _made(i), _given(i)
        return i["op"].removesuffix("-start"), to.bytes + (0 if source.on_chip else to.size * to.itemsize)
    if i["op"] == "custom-call-update":
        table, *others = _given(i)
        is_scatter = _is_offloaded(i, "scatter")
        rows = others[-1:] if is_scatter else _made(i)
        size = sum(x.bytes for x in (*others, *(() if is_scatter else rows))) + sum(_windows(table, x) for x in rows)
        return "scatter" if is_scatter else "gather" if _is_offloaded(i, "gather") else "copy", size
    if _is_row_dma(i, "gather") or _is_row_dma(i, "write"):
        ids, *between, table = (arrays(shapes[name])[0] for name in operands(i))
        (rows,) = between or _made(i)
        return "row dma", ids.bytes + rows.bytes + _windows(table, rows)
    if i["op"] == "fusion":
        inner = program.body(i)
    else:
        names = operands(i)
        inner = [_stand_in(name, shapes.get(name, "")) for name in names] + [i]
    by_name = {x["name"]: x for x in inner}
    made = roots(inner) if i["op"] == "fusion" else [i]
    kinds = {x["op"] for x in inner}
    size = sum(_written(program, x, by_name, tiles) for x in made)
    for x in inner:
        if x["op"] == "parameter":
            size += _read(x, inner, by_name, made)
    for kind in ("scatter", "dynamic-update-slice", "gather", "sort", "copy", "transpose", "reduce"):
        if kind in kinds or i["op"].startswith(kind):
            return kind, size
    return "others", size


def _stand_in(name: str, shape: str) -> re.Match:
    return INSTRUCTION.match(f"  %{name} = {shape or '()'} parameter(0)")


def _written(program: Program, root: re.Match, by_name: dict[str, re.Match], tiles: bool) -> float:
    if root["op"] not in _WRITES:
        return sum(x.bytes for x in arrays(root["shape"]))
    names = operands(root)
    many = 1 if root["op"] == "dynamic-update-slice" else (len(names) - 1) // 2
    size = 0.0
    for n in range(many):
        table = arrays(by_name[names[n]]["shape"])[0]
        update = arrays(by_name[names[n + 1 if many == 1 and root["op"] != "scatter" else n + many + 1]]["shape"])[0]
        whole = tiles and root["op"] == "scatter" and len(table.shape) > 1 and len(table.tile) > 1
        size += _windows(table, update) * (table.tile[0] if whole else 1)
    if root["op"] == "scatter":
        region = program.parts[re.search(r"to_apply=%?([\w.\-]+)", root["rest"])[1]]
        size *= 1 if region[-1]["op"] == "parameter" else 2  # what is added to is read as well
    return size


def _windows(table: Array, rows: Array) -> float:
    """Bytes of some rows of a table, as they lie in it, rows (n, ...) of its trailing shape or a slice of its rank."""
    if len(table.shape) < 2:
        return rows.size * table.itemsize * (not table.on_chip)
    window = (1, *table.shape[1:])
    return rows.size / math.prod(window) * table.bytes_of(window)


def _read(x: re.Match, inner: list[re.Match], by_name: dict[str, re.Match], made: list[re.Match]) -> float:
    """Bytes that are read of one operand."""
    (*whole,) = arrays(x["shape"])
    names, size, queue = {x["name"]}, 0.0, [x["name"]]
    while queue:
        name = queue.pop()
        for user in inner:
            given = operands(user) if user["op"] != "parameter" else []
            if name not in given:
                continue
            if user["op"] in _SAME_ROWS and user not in made:
                if user["name"] not in names:
                    names.add(user["name"])
                    queue.append(user["name"])
            elif user["op"] in _READS and given[0] == name:
                size += sum(_windows(whole[0], r) for last in _last_gathers(user, inner) for r in arrays(last["shape"]))
            elif user["op"] in _WRITES and name in given[: max(1, (len(given) - 1) // 2)] and user in made:
                continue  # counted where it is written
            else:
                return sum(a.bytes for a in whole)
    return size if any(i["op"] == "gather" for i in inner) else min(size, sum(a.bytes for a in whole))


def _last_gathers(first: re.Match, inner: list[re.Match]) -> list[re.Match]:
    """In a fusion, the gathers of what this one gathers, which then gathers as many rows; itself if there are none."""
    names, found = {first["name"]}, []
    for i in inner:
        given = operands(i) if i["op"] != "parameter" else []
        if i["op"] == "gather" and given[0] in names:
            found.append(i)
        elif names & set(given):
            names.add(i["name"])
    return found or [first]


def bytes_needed(distinct: int, row_bytes: float, ids: int, bags: int, dim: int) -> float:
    """Bytes that a step has to move: the rows that the batch reads, of the table and of all that has a row for each of
    its, read and written; the ids; and the bags and their gradient in float32, written and read."""
    return distinct * row_bytes * 2 + ids * 4 + 4 * bags * dim * 4
