"""What tests/accelerators reads in the text of a compiled program, on text written by hand."""

import jax
import jax.numpy as jnp
import pytest

from tests.accelerators.reading import Program, arrays, bytes_moved, bytes_needed, table_sized
from tests.hlo import compiled_by_default

SET = """
%set (old: f32[], new: f32[]) -> f32[] {
  %old = f32[] parameter(0)
  ROOT %new = f32[] parameter(1)
}
"""


def program(entry, others=""):
    return Program(f"HloModule m\n{SET}\n{others}\n\nENTRY %main (t: f32[1000,64]) -> f32[1000,64] {{\n{entry}\n}}\n")


def test_a_copy_of_a_table_is_found_and_counted():
    entry = """  %t = f32[1000,64]{0,1:T(8,128)} parameter(0)
  %copy.1 = f32[1000,64]{1,0:T(8,128)} copy(%t)
  ROOT %copy.2 = f32[1000,64]{0,1:T(8,128)} copy(%copy.1)"""
    assert table_sized(program(entry), (1000, 64), ids=4) == {"copy": 2}
    there, padded = 1024 * 64 * 4, 1000 * 128 * 4
    assert bytes_moved(program(entry)) == {"copy": 2 * (there + padded)}


def test_a_table_in_another_shape_is_found_by_its_size():
    entry = "  %t = f32[1000,64]{1,0} parameter(0)\n  ROOT %r = f32[500,128]{1,0} reshape(%t)"
    assert table_sized(program(entry), (1000, 64), ids=4) == {"reshape": 1}
    assert table_sized(program(entry.replace("500,128", "2,128")), (1000, 64), ids=4) == {}


SCATTER = """
%fused (p: f32[1000,64], i: s32[8], r: f32[8,64]) -> f32[1000,64] {
  %p = f32[1000,64]{1,0} parameter(0)
  %i = s32[8]{0} parameter(1)
  %r = f32[8,64]{1,0} parameter(2)
  ROOT %s = f32[1000,64]{1,0} scatter(%p, %i, %r), update_window_dims={1}, to_apply=%set
}
"""
WRITE = """  %t = f32[1000,64]{1,0} parameter(0)
  %ids = s32[8]{0} parameter(1)
  %rows = f32[8,64]{1,0} parameter(2)
  ROOT %f = f32[1000,64]{1,0} fusion(%t, %ids, %rows), kind=kInput, calls=%fused"""


def test_rows_that_are_written_in_place_are_counted_alone():
    written = program(WRITE, SCATTER)
    assert table_sized(written, (1000, 64), ids=8) == {}
    assert bytes_moved(written) == {"scatter": 2 * 8 * 64 * 4 + 8 * 4}  # read, and written; and the ids
    doubled = SCATTER.replace("ROOT %s", "%s").replace("to_apply=%set\n", "to_apply=%set\n  ROOT %n = ") + ""
    doubled = doubled.replace("ROOT %n = }", "ROOT %n = f32[1000,64]{1,0} negate(%s)\n}")
    assert table_sized(program(WRITE, doubled), (1000, 64), ids=8) == {"negate fusion": 1}


@pytest.mark.parametrize(("layout", "row"), [("{1,0:T(8,128)}", 512), ("{0,1:T(8,128)}", 64 * 128 * 4), ("{1,0}", 256)])
def test_a_row_is_as_wide_as_it_lies(layout, row):
    """128 columns where rows lie along the lanes of a TPU, and 128 rows where they lie across them."""
    entry = f"""  %t = f32[1000,64]{layout} parameter(0)
  %ids = s32[8]{{0:S(1)}} parameter(1)
  ROOT %g = f32[8,64]{{1,0:S(1)}} gather(%t, %ids), offset_dims={{1}}"""
    assert bytes_moved(program(entry)) == {"gather": 8 * row}


def test_what_streams_onto_the_chip_is_found():
    entry = """  %t = f32[1000]{0:T(1024)} parameter(0)
  %slice-start = ((f32[1000]{0:T(1024)}), f32[500]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%t), slice={[0:500]}
  ROOT %slice-done = f32[500]{0:T(1024)S(1)} slice-done(%slice-start)"""
    assert table_sized(program(entry), (1000, 1), ids=4) == {"slice-start": 1}
    assert bytes_moved(program(entry)) == {"slice": 500 * 4}


def test_rows_that_the_sparse_core_gathers_are_counted_alone():
    entry = """  %t = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %ids = s32[8]{0:T(1024)} parameter(1)
  %gather_offload_async_start = ((), (), (s32[9]{0})) custom-call-start(), custom_call_target="TODO"
  %gather_offload_async_start.update = ((f32[1000,128]{1,0:T(8,128)}, s32[8]{0:T(1024)}), f32[8,128]{1,0:T(8,128)}, """
    entry += """(s32[9]{0})) custom-call-update(%gather_offload_async_start, %t, %ids)
  ROOT %done = f32[8,128]{1,0:T(8,128)} custom-call-done(%gather_offload_async_start.update)"""
    assert table_sized(program(entry), (1000, 128), ids=8) == {}
    assert bytes_moved(program(entry)) == {"gather": 2 * 8 * 512 + 1024 * 4}  # read and written; the ids, padded


def test_a_loop_is_counted_and_so_is_what_is_in_it():
    body = """
%body (x: (s32[], f32[1000,64])) -> (s32[], f32[1000,64]) {
  %x = (s32[], f32[1000,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%x), index=0
  %t = f32[1000,64]{1,0} get-tuple-element(%x), index=1
  %c = f32[1000,64]{1,0} copy(%t)
  ROOT %out = (s32[], f32[1000,64]{1,0}) tuple(%n, %c)
}

%test (x: (s32[], f32[1000,64])) -> pred[] {
  %x = (s32[], f32[1000,64]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""
    entry = """  %t = (s32[], f32[1000,64]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[1000,64]{1,0}) while(%t), condition=%test, body=%body, """
    entry += """backend_config={"known_trip_count":{"n":"3"}}"""
    assert table_sized(program(entry, body), (1000, 64), ids=4) == {"copy": 1, "while": 1}
    assert bytes_moved(program(entry, body)) == {"copy": 3 * 2 * 1000 * 64 * 4}


def test_shapes_are_read():
    (a, b) = arrays("(bf16[3,5]{0,1:T(8,128)(2,1)S(1)}, /*index=1*/pred[7]{0})")
    assert (a.dtype, a.shape, a.order, a.tile, a.on_chip, a.itemsize) == ("bf16", (3, 5), (0, 1), (8, 128), True, 2)
    assert (b.shape, b.tile, b.on_chip, b.bytes) == ((7,), (), False, 7)


def test_a_program_of_this_machine_is_read():
    """The rows that are read and written, and all of a table that is scaled."""
    table, ids = jax.ShapeDtypeStruct((5000, 16), jnp.float32), jax.ShapeDtypeStruct((10,), jnp.int32)

    def change(table, ids):
        return table.at[ids].set(2 * table[ids], mode="drop", unique_indices=True)

    def scaled(table, ids):
        return 2 * table + table[ids].sum()

    few, all_of_it = (
        Program(compiled_by_default(jax.jit(f, donate_argnums=0).lower(table, ids)).as_text()) for f in (change, scaled)
    )
    assert table_sized(few, (5000, 16), ids=10) == {}
    assert sum(bytes_moved(few).values()) < 20 * bytes_needed(10, 64, ids=10, bags=0, dim=16)
    assert table_sized(all_of_it, (5000, 16), ids=10)
    assert sum(bytes_moved(all_of_it).values()) > 2 * 5000 * 64
