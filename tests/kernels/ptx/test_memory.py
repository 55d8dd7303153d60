"""Loads, stores, atomics, state spaces, parameters, faults and counts."""

import numpy as np
import pytest

from verify.ptx import (
    GlobalMemory,
    MemoryFault,
    ParseError,
    UnsupportedInstruction,
    parse,
    run,
)


def program(body, parameters, threads=32, module=""):
    return parse(f"""
.version 8.7
.target sm_90a
.address_size 64
{module}
.visible .entry kernel({", ".join(f".param .{t} p{i}" for i, t in enumerate(parameters))})
.reqntid {threads}
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %q<9>; .reg .b64 %rd<20>;
  {"".join(f"ld.param.u64 %rd{i}, [p{i}];" for i, t in enumerate(parameters) if t == "u64")}
  mov.u32 %r0, %tid.x;
  {body}
  ret;
}}""")


def copy(vector, bits, threads=32):
    """Every thread moves one vector of `vector` words of `bits`."""
    count, suffix = (vector, f".v{vector}") if vector > 1 else (1, "")
    kind = "q" if bits == 64 else "h" if bits <= 16 else "r"
    registers = ", ".join(f"%{kind}{i + 1}" for i in range(count))
    words = f"{{{registers}}}" if vector > 1 else registers
    size = bits // 8 * count
    return program(
        f"""mad.wide.u32 %rd5, %r0, {size}, %rd0; mad.wide.u32 %rd6, %r0, {size}, %rd1;
        ld.global{suffix}.b{bits} {words}, [%rd5];
        st.global{suffix}.b{bits} [%rd6], {words};""",
        ["u64", "u64"],
        threads,
    )


@pytest.mark.parametrize(
    ("vector", "bits"),
    [(1, 8), (1, 16), (1, 32), (1, 64), (2, 8), (4, 8), (2, 16), (4, 16), (2, 32), (4, 32), (8, 32),
     (2, 64)],
)  # fmt: skip
def test_vectors_copy_their_bytes_and_are_counted(vector, bits):
    size_bytes = vector * bits // 8
    source = np.random.default_rng(0).integers(0, 256, 32 * size_bytes).astype(np.uint8)
    target = np.zeros_like(source)
    counts = run(copy(vector, bits), (1,), [source, target])
    np.testing.assert_array_equal(target, source)
    assert counts.loads == counts.stores == {size_bytes: 32}
    assert counts.loaded_bytes == counts.stored_bytes == source.nbytes
    assert counts.atomic_bytes == 0
    assert counts.instructions == 32 * 8


@pytest.mark.parametrize(
    ("index", "words", "sectors"),
    [
        ("mov.u32 %r1, 0;", 1, 1),
        ("mov.u32 %r1, %r0;", 1, 8),
        ("xor.b32 %r1, %r0, 31;", 1, 8),
        ("shl.b32 %r1, %r0, 3;", 1, 64),
        ("shr.u32 %r1, %r0, 1;", 1, 4),
        ("shl.b32 %r1, %r0, 2;", 4, 32),
        ("and.b32 %r1, %r0, 60;", 4, 8),
    ],
)
def test_a_sector_counts_once_in_each_block(index, words, sectors):
    registers = ", ".join(f"%r{2 + i}" for i in range(words))
    value = f"{{{registers}}}" if words > 1 else registers
    suffix = f".v{words}" if words > 1 else ""
    body = f"""{index} mad.wide.u32 %rd5, %r1, 4, %rd0; ld.global{suffix}.b32 {value}, [%rd5];
        ld.global.b32 %r9, [%rd5]; setp.lt.u32 %p1, %r0, 1; @%p1 st.global.b32 [%rd5], %r9;"""
    counts = run(program(body, ["u64"], threads=64), (2,), [np.zeros(512, np.uint32)])
    # Both blocks read the same places, twice, and one thread of each writes four bytes.
    assert counts.distinct_loaded_sectors == 2 * sectors
    assert counts.loaded_bytes == 2 * 64 * (4 * words + 4)
    assert counts.distinct_stored_sectors == 2
    assert counts.distinct_bytes == 32 * (2 * sectors + 2)


def test_masked_threads_neither_move_nor_count():
    body = """setp.lt.u32 %p1, %r0, 5; mad.wide.u32 %rd5, %r0, 4, %rd0; mov.u32 %r1, 7;
        @%p1 st.global.b32 [%rd5], %r1; @!%p1 ld.global.b32 %r1, [%rd0];"""
    target = np.zeros(32, np.uint32)
    counts = run(program(body, ["u64"]), (1,), [target])
    assert target.tolist() == [7] * 5 + [0] * 27
    assert counts.stores == {4: 5}
    assert counts.loads == {4: 27}


def test_narrow_loads_extend_into_the_register():
    body = """ld.global.s8 %r1, [%rd0]; ld.global.u8 %r2, [%rd0]; ld.global.s16 %r3, [%rd0];
        st.global.v2.b32 [%rd1], {%r1, %r2}; st.global.b32 [%rd1+8], %r3;"""
    target = np.zeros(4, np.uint32)
    run(program(body, ["u64", "u64"]), (1,), [np.array([0x80, 0xFF], np.uint8), target])
    assert [hex(v) for v in target] == ["0xffffff80", "0x80", "0xffffff80", "0x0"]


def test_cache_hints_change_nothing():
    body = """createpolicy.fractional.L2::evict_first.b64 %q1, 1.0;
        ld.global.L1::evict_first.L2::cache_hint.v2.b32 {%r1, %r2}, [ %rd0 + 0 ], %q1;
        ld.global.nc.b32 %r3, [%rd0]; ld.volatile.global.b32 %r3, [%rd0];
        ld.acquire.gpu.global.b32 %r3, [%rd0]; membar.gl; fence.acq_rel.gpu;
        st.global.cs.v2.b32 [%rd1], {%r1, %r2};"""
    target = np.zeros(2, np.uint32)
    run(program(body, ["u64", "u64"]), (1,), [np.array([3, 4], np.uint32), target])
    assert target.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("offset", "message"),
    [(4 * 32, r"4 bytes at 0x\w+ lie outside.*p0"), (-4, "outside"), (4096, "outside")],
)
def test_out_of_bounds_raises(offset, message):
    body = f"mov.u32 %r1, 0; st.global.b32 [%rd0+{offset}], %r1;"
    target = np.ones(32, np.uint32)
    with pytest.raises(MemoryFault, match=message):
        run(program(body, ["u64"]), (1,), [target])
    assert target.all()


def test_an_access_that_straddles_the_end_raises():
    with pytest.raises(MemoryFault, match="8 bytes at"):
        run(program("ld.global.b64 %q1, [%rd0];", ["u64"]), (1,), [np.zeros(1, np.uint32)])


def test_misaligned_raises():
    body = "ld.global.v2.b32 {%r1, %r2}, [%rd0+4];"
    with pytest.raises(MemoryFault, match=r"in p0 .* is not a multiple of the 8 bytes"):
        run(program(body, ["u64"]), (1,), [np.zeros(8, np.uint32)])


def test_a_misaligned_array_is_reached_by_narrow_accesses_only():
    source, target = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    memory = GlobalMemory()
    memory.map("source", source, misalignment_bytes=4)
    run(copy(1, 32), (1,), [source, target], memory=memory)
    np.testing.assert_array_equal(source, target)
    with pytest.raises(MemoryFault, match="source"):
        run(copy(2, 32), (1,), [source, target], memory=memory)


def test_storing_to_a_read_only_array_raises():
    target = np.zeros(32, np.uint32)
    target.flags.writeable = False
    with pytest.raises(MemoryFault, match="read-only array p0"):
        run(program("st.global.b32 [%rd0], %r0;", ["u64"]), (1,), [target])


def test_a_pointer_table_reaches_mapped_arrays():
    tensors = [np.zeros(3, np.uint32), np.zeros(5, np.uint32)]
    memory = GlobalMemory()
    table = np.array([memory.map(f"t{i}", t) for i, t in enumerate(tensors)], np.int64)
    body = """setp.lt.u32 %p1, %r0, 2; @!%p1 bra $DONE; mad.wide.u32 %rd5, %r0, 8, %rd0;
        ld.global.b64 %rd6, [%rd5]; st.global.b32 [%rd6+8], %r0; $DONE:"""
    run(program(body, ["u64"]), (1,), [table], memory=memory)
    assert [t.tolist() for t in tensors] == [[0, 0, 0], [0, 0, 1, 0, 0]]


def test_the_same_array_twice_is_one_array_but_overlap_is_refused():
    array = np.zeros(64, np.uint32)
    run(copy(1, 32), (1,), [array, array])
    with pytest.raises(ValueError, match="must not overlap"):
        run(copy(1, 32), (1,), [array, array[1:33]])
    with pytest.raises(ValueError, match="C-contiguous"):
        run(copy(1, 32), (1,), [array[::2], np.zeros(64, np.uint32)])


def test_shared_memory_is_private_to_a_block():
    module = ".extern .shared .align 16 .b8 smem[];"
    body = """mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 4, %r1; mov.u32 %r3, %ctaid.x;
        mad.lo.u32 %r4, %r3, 100, %r0; st.shared.b32 [%r2], %r4; bar.sync 0;
        xor.b32 %r5, %r0, 31; mad.lo.u32 %r6, %r5, 4, %r1; ld.shared.b32 %r7, [ %r6 + 0 ];
        mad.lo.u32 %r8, %r3, 32, %r0; mad.wide.u32 %rd5, %r8, 4, %rd0; st.global.b32 [%rd5], %r7;"""
    target = np.zeros((3, 32), np.uint32)
    kernel = program(body, ["u64"], module=module)
    counts = run(kernel, (3,), [target], shared_bytes=128)
    want = 100 * np.arange(3)[:, None] + 31 - np.arange(32)
    np.testing.assert_array_equal(target, want)
    assert counts.loads == {}
    with pytest.raises(MemoryFault, match="outside the 124 bytes of shared memory"):
        run(kernel, (3,), [target], shared_bytes=124)
    with pytest.raises(ValueError, match=r"metadata\.shared"):
        run(kernel, (3,), [target])


def test_local_memory_is_private_to_a_thread():
    body = """.local .align 8 .b8 depot[16]; mov.b64 %rd4, depot; st.local.b32 [%rd4+8], %r0;
        mov.u32 %r2, depot; ld.local.b32 %r1, [%r2+8];
        mad.wide.u32 %rd5, %r0, 4, %rd0; st.global.b32 [%rd5], %r1;"""
    target = np.zeros(32, np.uint32)
    run(program(body, ["u64"]), (1,), [target])
    np.testing.assert_array_equal(target, np.arange(32))


def test_module_constants():
    module = ".global .align 4 .b8 table[8] = {1, 2, 3, 4, 255};"
    body = """mov.b64 %rd5, table; ld.global.nc.v2.b32 {%r1, %r2}, [%rd5];
        st.global.v2.b32 [%rd0], {%r1, %r2};"""
    target = np.zeros(2, np.uint32)
    run(program(body, ["u64"], module=module), (1,), [target])
    assert [hex(v) for v in target] == ["0x4030201", "0xff"]


ATOMICS = [
    ("add.u32", np.uint32, lambda v, i: v + i),
    ("min.s32", np.int32, min),
    ("max.s32", np.int32, max),
    ("max.u32", np.uint32, max),
    ("and.b32", np.uint32, lambda v, i: v & i),
    ("or.b32", np.uint32, lambda v, i: v | i),
    ("xor.b32", np.uint32, lambda v, i: v ^ i),
    ("exch.b32", np.uint32, lambda v, i: i),
]


@pytest.mark.parametrize(("opcode", "dtype", "update"), ATOMICS)
def test_atomics_return_the_old_value_in_thread_order(opcode, dtype, update):
    body = f"""and.b32 %r1, %r0, 1; mad.wide.u32 %rd5, %r1, 4, %rd0; sub.s32 %r2, %r0, 9;
        atom.global.gpu.acq_rel.{opcode} %r3, [ %rd5 + 0 ], %r2;
        mad.wide.u32 %rd6, %r0, 4, %rd1; st.global.b32 [%rd6], %r3;"""
    cells, old = np.array([12, 5], dtype), np.zeros(32, dtype)
    counts = run(program(body, ["u64", "u64"]), (1,), [cells, old])
    expected, seen = [12, 5], []
    values = np.arange(-9, 23, dtype=np.int32).view(dtype).tolist()
    for thread, value in enumerate(values):
        seen.append(expected[thread & 1])
        updated = update(expected[thread & 1], value)
        expected[thread & 1] = updated if np.dtype(dtype).kind == "i" else updated % 2**32
    assert old.tolist() == seen
    assert cells.tolist() == expected
    assert counts.atomics == {4: 32}
    assert counts.loads == {}


def test_compare_and_swap():
    body = """atom.global.gpu.relaxed.cas.b32 %r1, [%rd0], %r0, 20;
        mad.wide.u32 %rd6, %r0, 4, %rd1; st.global.b32 [%rd6], %r1;"""
    cell, old = np.array([3], np.uint32), np.zeros(32, np.uint32)
    run(program(body, ["u64", "u64"]), (1,), [cell, old])
    # Thread 3 finds 3 and stores 20, thread 20 finds 20 and stores it again.
    assert old.tolist() == [3] * 4 + [20] * 28
    assert cell[0] == 20


def test_float_atomics_round_each_addition():
    body = """mov.b32 %r1, 0f3F800000; red.global.gpu.relaxed.add.f32 [%rd0], %r1;
        mov.b32 %r2, 0x3C003C00; atom.global.gpu.relaxed.add.noftz.f16x2 %r3, [%rd1], %r2;"""
    total = np.array([2**24], np.float32)
    pair = np.array([2048, 0.5], np.float16)
    run(program(body, ["u64", "u64"]), (1,), [total, pair.view(np.uint32)])
    assert total[0] == 2**24  # each 2**24 + 1 is a tie that goes back to even
    assert pair.tolist() == [2048, 32.5]


def test_float_atomics_flush_denormals_in_global_memory_only():
    module = ".shared .align 4 .b8 cell[4];"
    body = """mov.b32 %r1, 0; mov.b32 %r2, 1; red.global.gpu.relaxed.add.f32 [%rd0], %r1;
        mov.u32 %r3, cell; st.shared.b32 [%r3], %r2; red.shared.cta.relaxed.add.f32 [%r3], %r1;
        ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd0+4], %r4;"""
    cells = np.array([1, 9], np.uint32)
    run(program(body, ["u64"], module=module), (1,), [cells])
    assert cells.tolist() == [0, 1]


def test_parameters_of_every_kind():
    body = """ld.param.b32 %r1, [p1]; ld.param.f32 %r2, [p2]; ld.param.b64 %q1, [p3];
        st.global.v2.b32 [%rd0], {%r1, %r2}; st.global.b64 [%rd0+8], %q1;"""
    kernel = program(body, ["u64", "u32", "f32", "s64"])
    target = np.zeros(4, np.uint32)
    run(kernel, (1,), [target, -1, 1.5, -(2**40)])
    assert target[0] == 2**32 - 1
    assert target[1:2].view(np.float32)[0] == 1.5
    assert target[2:].view(np.int64)[0] == -(2**40)
    for arguments, error, message in (
        ([target, 2**32, 1.0, 0], ValueError, "p1 has 32 bits"),
        ([target, 1.5, 1.0, 0], TypeError, r"p1 is \.u32; received float"),
        ([target, target, 1.0, 0], TypeError, "p1 is .u32; received an array"),
        ([target, 1], ValueError, "only scratch pointers"),
        ([target] * 5, ValueError, "takes 4 parameters"),
    ):
        with pytest.raises(error, match=message):
            run(kernel, (1,), arguments)


def test_scratch_pointers_may_be_left_out():
    target = np.zeros(1, np.uint64)
    run(program("st.global.b64 [%rd0], %rd2;", ["u64", "u64", "u64"]), (1,), [target])
    assert target[0] == 0


def test_generic_addresses_are_refused():
    with pytest.raises(UnsupportedInstruction, match=r"ld\.b32"):
        run(program("ld.b32 %r1, [%rd0];", ["u64"]), (1,), [np.zeros(1, np.uint32)])
    body = "cvta.to.global.u64 %rd5, %rd0; mov.u32 %r1, 6; st.global.b32 [%rd5], %r1;"
    target = np.zeros(1, np.uint32)
    run(program(body, ["u64"]), (1,), [target])
    assert target[0] == 6


def test_register_widths_are_checked():
    with pytest.raises(ParseError, match="%h1 has 16 bits"):
        run(program("mov.u16 %h1, 0; add.s32 %r1, %h1, 1;", ["u64"]), (1,), [np.zeros(1)])
    with pytest.raises(ParseError, match="%h1 has 16 bits"):
        run(program("mov.u32 %h1, %r0;", ["u64"]), (1,), [np.zeros(1)])
