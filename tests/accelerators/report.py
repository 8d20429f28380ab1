"""What there is to say of one compiled case."""

import dataclasses
import time

from tests.accelerators import cases, reading
from tests.accelerators.topologies import device
from tests.hlo import compiled_by_default


@dataclasses.dataclass(frozen=True)
class Report:
    """Of a case.

    Attributes:
      large: operations as large as a table, by kind: how often each is in the program.
      temporaries, arguments, in_place: bytes, as the compiler says.
      state, given: bytes of the state, and of all arguments, without padding.
      needed: bytes that a step has to move.
      moved: bytes that the program moves, by kind of operation.
      with_tiles: bytes that it moves, if a TPU's scatter moves a tile for each row.
      seconds: that tracing, lowering and compiling took.
      text: optimized HLO.
    """

    case: cases.Case
    large: dict[str, int]
    temporaries: int
    arguments: int
    in_place: int
    state: int
    given: int
    needed: float
    moved: dict[str, float]
    with_tiles: float
    seconds: float
    text: str = dataclasses.field(repr=False)

    @property
    def ratio(self) -> float:
        return sum(self.moved.values()) / self.needed

    def __str__(self) -> str:
        large = ", ".join(f"{many} {kind}" for kind, many in self.large.items()) or "none"
        moved = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in list(self.moved.items())[:4])
        more = self.with_tiles > 1.01 * sum(self.moved.values())
        tiles = f", with a tile for each row of a scatter {self.with_tiles / self.needed:.1f}" if more else ""
        return (
            f"{self.case}: table-sized: {large}; temporaries {self.temporaries / 1e6:.1f} MB, arguments "
            f"{self.arguments / 1e6:.0f} MB of state {self.state / 1e6:.0f} MB, in place {self.in_place / 1e6:.0f} MB; "
            f"moved {sum(self.moved.values()) / 1e6:.1f} MB / needed {self.needed / 1e6:.1f} MB = {self.ratio:.1f} "
            f"({moved}){tiles}; {self.seconds:.0f} s"
        )


def report(case: cases.Case) -> Report:
    """Compiles a case and reads what comes out."""
    start = time.monotonic()
    made = cases.lower(case, device(case.kind))
    compiled = compiled_by_default(made.lowered, case.options)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = reading.Program(text)
    return Report(
        case=case,
        large=reading.table_sized(program, made.stored, made.ids),
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        in_place=memory.alias_size_in_bytes,
        state=made.state_bytes,
        given=made.argument_bytes,
        needed=reading.bytes_needed(made.distinct, made.row_bytes, made.ids, cases.BAGS, case.dim),
        moved=reading.bytes_moved(program),
        with_tiles=sum(reading.bytes_moved(program, tiles=True).values()),
        seconds=time.monotonic() - start,
        text=text,
    )
