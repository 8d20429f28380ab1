"""What a compiled program allocates, read from its HLO text."""

import math
import re

import jax
import jax.numpy as jnp

from tests.flags import DEFAULTS, QUICK

# Instructions that name an array which is already there, or write into one in place.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "scatter", "opt-barrier"}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_SHAPE = re.compile(r"\b(?:pred|[usf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]")


def computations(text: str) -> dict[str, list[re.Match]]:
    """The instructions of every computation of an HLO module, by the computation's name."""
    out: dict[str, list[re.Match]] = {}
    current: list[re.Match] = []
    for line in text.splitlines():
        if line.endswith("{") and "=" not in line.split("(")[0]:
            current = out.setdefault(line.removeprefix("ENTRY ").split()[0].lstrip("%"), [])
        elif match := INSTRUCTION.match(line):
            current.append(match)
    return out


def large_arrays(text: str, num_rows: int) -> list[str]:
    """Instructions, branches and loop bodies included, that create an array of num_rows elements or more.

    Inside a fusion nothing is created but its result, and a fusion whose root is a scatter, or another such fusion,
    writes in place: where XLA could not do that, it says so with a copy, which this finds.
    """
    parts = computations(text)
    fused = {
        m
        for body in parts.values()
        for i in body
        if i["op"] == "fusion"
        for m in re.findall(r"calls=%?([\w.\-]+)", i["rest"])
    }
    fused |= {
        m
        for body in parts.values()
        for i in body
        for m in re.findall(r"to_apply=%?([\w.\-]+)", i["rest"])
        if i["op"] != "call"
    }

    def in_place(instruction: re.Match) -> bool:
        if instruction["op"] in _FREE:
            return True
        if instruction["op"] != "fusion":
            return False
        body = parts[re.search(r"calls=%?([\w.\-]+)", instruction["rest"])[1]]
        root = body[-1]
        by_name = {i["name"]: i for i in body}
        while root["op"] == "bitcast":
            root = by_name[re.search(r"%([\w.\-]+)", root["rest"])[1]]
        return root["op"] == "scatter" or (root["op"] == "fusion" and in_place(root))

    found = []
    for name, body in parts.items():
        if name in fused:
            continue
        for instruction in body:
            sizes = [math.prod(map(int, filter(None, s.split(",")))) for s in _SHAPE.findall(instruction["shape"])]
            if max(sizes, default=0) >= num_rows and not in_place(instruction):
                found.append(f"{name}: {instruction['shape']} {instruction['op']}")
    return found


_COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all"}
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}


def bytes_moved(text: str) -> dict[str, int]:
    """The bytes that come out of the collectives of a program on one device, by kind, loop bodies counted once."""
    moved: dict[str, int] = {}
    for body in computations(text).values():
        for instruction in body:
            kind = instruction["op"].removesuffix("-start")
            for dtype, dims in re.findall(r"\b(pred|[usf]\d+|bf16|c64|c128)\[([\d,]*)\]", instruction["shape"]):
                if kind in _COLLECTIVES:
                    size = _BYTES.get(dtype) or int(dtype[1:]) // 8
                    moved[kind] = moved.get(kind, 0) + size * math.prod(map(int, filter(None, dims.split(","))))
    return moved


def compiled_by_default(lowered, others=None):
    """A lowered function, compiled as it is by default: what it allocates and moves is what users get.
    `others`: further options of the compiler.

    What LLVM does comes after all that is read here, and stays quick: HLO is the same.
    """
    kept = {"xla_backend_optimization_level", "xla_cpu_parallel_codegen_split_count"}
    quick = {name: value for name, value in QUICK.items() if name in kept}
    return lowered.compile(DEFAULTS | quick | (others or {}))


def compiled_text(step, *args) -> str:
    """HLO of a jitted function for abstract arguments: nothing is allocated."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    return compiled_by_default(step.lower(*structs)).as_text()
