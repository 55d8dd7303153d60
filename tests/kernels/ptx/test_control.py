"""Parsing, branches, barriers, warps, undefined registers."""

import numpy as np
import pytest

from verify.ptx import (
    DivergenceError,
    ParseError,
    Trap,
    UninitialisedRegister,
    UnsupportedInstruction,
    parse,
    run,
)

LANE = np.arange(64) % 32


def test_special_registers():
    names = ["tid.x", "ntid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z",
             "laneid", "warpid", "tid.y", "ntid.z"]  # fmt: skip
    moves = "".join(
        f"mov.u32 %r1, %{name}; st.global.b32 [%rd2+{4 * i}], %r1;" for i, name in enumerate(names)
    )
    program = parse(f""".visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
.maxntid 64, 1, 1
{{ .reg .b32 %r<9>; .reg .b64 %rd<9>;
 ld.param.b64 %rd1, [k_param_0];
 mov.u32 %r2, %ctaid.z; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.x;
 mad.lo.u32 %r5, %r2, 3, %r3; mad.lo.u32 %r5, %r5, 2, %r4; mov.u32 %r6, %tid.x;
 mad.lo.u32 %r5, %r5, 64, %r6; mad.wide.u32 %rd2, %r5, {4 * len(names)}, %rd1; {moves} ret; }}""")
    got = np.zeros((4, 3, 2, 64, len(names)), np.uint32)
    run(program, (2, 3, 4), [got])
    z, y, x, t = np.meshgrid(*(np.arange(n) for n in (4, 3, 2, 64)), indexing="ij")
    one = np.ones_like(x)
    want = [t, 64 * one, x, y, z, 2 * one, 3 * one, 4 * one, t % 32, t // 32, 0 * one, one]
    np.testing.assert_array_equal(got, np.stack(want, axis=-1))


def test_divergent_branches_meet_again(execute):
    """Each thread loops its own number of times, then all shuffle together."""
    body = """mov.u32 %r1, 0; mov.u32 %r2, 0;
      $LOOP: setp.ge.u32 %p1, %r2, %a; @%p1 bra $AFTER;
      add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra.uni $LOOP;
      $AFTER: shfl.sync.idx.b32 %r3, %r1, 5, 31, -1; add.u32 %x, %r1, %r3;"""
    turns = (np.arange(64, dtype=np.uint32) * 7) % 11
    sums = turns * (turns - 1) // 2
    got = execute(body, turns)
    np.testing.assert_array_equal(got, sums + np.repeat(sums[5::32], 32))


def test_falling_through_into_a_label_meets_those_who_jumped_there(execute):
    body = """mov.u32 %r1, %a; setp.lt.u32 %p1, %a, 9; @%p1 bra $JOIN; add.u32 %r1, %r1, 100;
      $JOIN: shfl.sync.bfly.b32 %x, %r1, 16, 31, -1;"""
    moved = LANE + np.where(LANE < 9, 0, 100)
    got = execute(body, LANE.astype(np.uint32))
    np.testing.assert_array_equal(got, moved[np.arange(64) ^ 16])


def test_branch_both_ways(execute):
    body = """setp.lt.s32 %p1, %a, 0; @!%p1 bra $POSITIVE; neg.s32 %x, %a; bra $END;
      $POSITIVE: add.s32 %x, %a, 1000; $END:"""
    a = np.array([-3, 4, -1, 0], np.int32)
    np.testing.assert_array_equal(execute(body, a, out=np.int32), [3, 1004, 1, 1000])


def test_threads_that_return_early_leave_the_others(execute):
    """The second block returns; the first passes its barrier without it."""
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 ret;
      bar.sync 0; mov.u32 %x, 3;"""
    np.testing.assert_array_equal(execute(body, LANE), [3] * 32 + [0] * 32)


def test_a_barrier_waits_for_no_thread_that_returned(execute):
    body = "setp.gt.u32 %p1, %index1, 15; @%p1 ret; bar.sync 0; mov.u32 %x, 3;"
    np.testing.assert_array_equal(execute(body, LANE), np.where(LANE < 16, 3, 0))


def test_a_barrier_that_some_threads_skip_raises(execute):
    body = """setp.lt.u32 %p1, %index1, 4; mov.u32 %x, 0; @%p1 bra $SKIP; bar.sync 0;
      $SKIP: add.u32 %x, %x, 1;"""
    with pytest.raises(DivergenceError, match=r"bar\.sync"):
        execute(body, LANE)


def test_a_partial_barrier_and_a_trap(execute):
    with pytest.raises(UnsupportedInstruction, match="part of a block"):
        execute("bar.sync 0, 16; mov.u32 %x, 0;")
    body = "setp.eq.u32 %p1, %index1, 7; @%p1 trap; mov.u32 %x, 0;"
    with pytest.raises(Trap, match="thread 7"):
        execute(body)


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 1, 31, LANE ^ 1),
        ("bfly", 16, 31, LANE ^ 16),
        ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE)),
        ("down", 5, 31, np.where(LANE + 5 <= 31, LANE + 5, LANE)),
        ("idx", 9, 31, np.full(64, 9)),
        # Segments of eight lanes: mask 0x18 keeps the lane's upper bits.
        ("idx", 2, 0x1807, LANE // 8 * 8 + 2),
        ("down", 6, 0x1807, np.where(LANE % 8 < 2, LANE + 6, LANE)),
        ("up", 6, 0x1800, np.where(LANE % 8 >= 6, LANE - 6, LANE)),
        ("bfly", 4, 0x1807, LANE ^ 4),
        # The clamp puts lanes beyond it out of range: above it, for `up` below it.
        ("up", 3, 0x0005, np.where(LANE - 3 >= 5, LANE - 3, LANE)),
        ("idx", 20, 0x0003, LANE),
    ],
)
def test_shuffle_modes(execute, mode, b, c, source):
    values = np.random.default_rng(0).integers(0, 2**32, 64, np.uint64).astype(np.uint32)
    body = f"shfl.sync.{mode}.b32 %x, %a, {b}, {c}, -1;"
    warp = np.arange(64) // 32 * 32
    np.testing.assert_array_equal(execute(body, values), values[warp + source])
    body = f"shfl.sync.{mode}.b32 %r1|%p1, %a, {b}, {c}, -1; selp.b32 %x, 1, 0, %p1;"
    # Out of range a lane reads itself; in range only `idx`, where it may name itself, does so too.
    in_range = (source != LANE) | (mode == "idx" and b <= c & 31)
    np.testing.assert_array_equal(execute(body, values), in_range)


def test_a_shuffle_that_some_members_miss_raises(execute):
    body = """mov.u32 %x, 0; setp.lt.u32 %p1, %index1, 16;
      @%p1 shfl.sync.bfly.b32 %x, %a, 1, 31, {};"""
    with pytest.raises(DivergenceError, match=r"32 threads wait .*shfl"):
        execute(body.format(-1), LANE.astype(np.uint32))
    got = execute(body.format("0xFFFF"), LANE.astype(np.uint32))
    np.testing.assert_array_equal(got, np.where(LANE < 16, LANE ^ 1, 0))


def test_reductions_over_a_warp(execute):
    a = np.random.default_rng(0).integers(-(2**31), 2**31, 64).astype(np.int32)
    for opcode, reduce in (
        ("add.s32", lambda w: w.astype(np.int64).sum() & 0xFFFFFFFF),
        ("min.s32", lambda w: w.min()),
        ("max.s32", lambda w: w.max()),
        ("max.u32", lambda w: w.view(np.uint32).max()),
        ("and.b32", np.bitwise_and.reduce),
        ("or.b32", np.bitwise_or.reduce),
        ("xor.b32", np.bitwise_xor.reduce),
    ):
        got = execute(f"redux.sync.{opcode} %x, %a, -1;", a)
        want = [int(reduce(w)) & 0xFFFFFFFF for w in (a[:32], a[32:]) for _ in range(32)]
        np.testing.assert_array_equal(got, np.array(want, np.uint32), err_msg=opcode)


def test_float_reductions_over_a_warp(execute):
    a = np.linspace(-3, 3, 32, dtype=np.float32)
    a[5] = np.nan
    got = lambda body: execute(body, a, out=np.uint32)[0]  # noqa: E731
    bits = lambda v: np.float32(v).view(np.uint32)  # noqa: E731
    assert got("redux.sync.max.f32 %x, %a, -1;") == bits(3)
    assert got("redux.sync.min.f32 %x, %a, -1;") == bits(-3)
    assert got("redux.sync.min.abs.f32 %x, %a, -1;") == bits(np.nanmin(np.abs(a)))
    assert got("redux.sync.max.NaN.f32 %x, %a, -1;") == 0x7FFFFFFF
    a[:] = 0
    a[3] = -0.0
    assert got("redux.sync.min.f32 %x, %a, -1;") == 0x80000000
    assert got("redux.sync.max.f32 %x, %a, -1;") == 0


def test_votes(execute):
    a = np.array([1] * 32 + [0, 1] * 16, np.uint32)
    for body, want in (
        ("vote.sync.ballot.b32 %x, %p1, -1;", [0xFFFFFFFF, 0xAAAAAAAA]),
        ("vote.sync.ballot.b32 %x, !%p1, -1;", [0, 0x55555555]),
        ("vote.sync.all.pred %p2, %p1, -1; selp.b32 %x, 1, 0, %p2;", [1, 0]),
        ("vote.sync.any.pred %p2, %p1, -1; selp.b32 %x, 1, 0, %p2;", [1, 1]),
        ("vote.sync.uni.pred %p2, %p1, -1; selp.b32 %x, 1, 0, %p2;", [1, 0]),
        ("mov.u32 %x, 0; @%p1 activemask.b32 %x;", [0xFFFFFFFF, None]),
    ):
        got = execute("setp.ne.u32 %p1, %a, 0;" + body, a)
        for warp, value in enumerate(want):
            if value is not None:
                assert (got[32 * warp : 32 * warp + 32] == value).all(), body


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_moves(execute, transposed):
    """stmatrix lays four 8x8 fragments out as rows; ldmatrix brings them back."""
    module = ".shared .align 16 .b8 tile[512];"
    trans = ".trans" if transposed else ""
    body = f"""mov.u32 %r0, tile; mad.lo.u32 %r1, %index1, 16, %r0;
      mad.lo.u32 %r2, %index1, 4, %r0;
      stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r1], {{%a, %b}}; bar.sync 0;
      ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r3, %r4}}, [%r1];
      ld.shared.b32 %r5, [%r2+128];
      mov.b64 %q1, {{%r3, %r4}}; mov.b64 {{%r6, %r7}}, %q1; xor.b32 %x, %r6, %r7;"""
    matrices = np.arange(128, dtype=np.uint16).reshape(2, 8, 8)
    fragments = [m.reshape(32, 2).copy().view(np.uint32).ravel() for m in matrices]
    got = execute(body, *fragments, module=module)
    expected = [m.T if transposed else m for m in matrices]
    words = [np.ascontiguousarray(m).reshape(32, 2).view(np.uint32).ravel() for m in expected]
    np.testing.assert_array_equal(got, words[0] ^ words[1])


def test_rows_of_a_stored_matrix(execute):
    module = ".shared .align 16 .b8 tile[512];"
    body = """mov.u32 %r0, tile; mad.lo.u32 %r1, %index1, 16, %r0; mad.lo.u32 %r2, %index1, 4, %r0;
      stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r1], {%a}; bar.sync 0;
      ld.shared.b32 %x, [%r2];"""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    got = execute(body, matrix.view(np.uint32).ravel(), module=module)
    np.testing.assert_array_equal(got, np.ascontiguousarray(matrix.T).view(np.uint32).ravel())


UNDEFINED = "setp.lt.u32 %p1, %index1, 8; @%p1 mov.u32 %r1, 5;"


@pytest.mark.parametrize(
    "use",
    [
        "mov.u32 %x, %r1;",
        "add.u32 %x, %r1, 1;",
        "mov.u32 %x, %r7;",
        "mov.u32 %x, 1; setp.eq.u32 %p2, %r1, 5; @%p2 mov.u32 %x, 2;",
        "mov.u32 %x, 1; cvt.u64.u32 %q1, %r1; ld.global.b32 %x, [%q1];",
        "shfl.sync.bfly.b32 %x, %r1, 8, 31, -1;",
        "mov.b64 %q1, {%r1, %index1}; mov.b64 {%x, _}, %q1;",
        "mov.b64 %q1, {%r1, %index1}; add.u64 %q1, %q1, 1; mov.b64 {_, %x}, %q1;",
        "mov.u32 %x, 1; redux.sync.add.s32 %x, %r1, -1;",
        "prmt.b32 %x, %r1, %index1, 0x4440;",
    ],
)
def test_what_comes_of_an_undefined_register_raises(execute, use):
    with pytest.raises(UninitialisedRegister, match=r"\d+ threads"):
        execute(UNDEFINED + use, LANE)


@pytest.mark.parametrize(
    ("use", "want"),
    [
        ("selp.b32 %x, %r1, %index1, %p1;", np.where(LANE < 8, 5, LANE)),
        ("mov.b64 %q1, {%r1, %index1}; mov.b64 {_, %x}, %q1;", LANE),
        ("mov.b64 %q1, {%index1, %r1}; cvt.u32.u64 %x, %q1;", LANE),
        ("mov.b64 %q1, {%index1, %r1}; add.f32x2 %q1, %q1, %q1; mov.b64 {%x, _}, %q1;", 2 * LANE),
        ("add.u32 %r2, %r1, 1; mov.u32 %r2, %index1; mov.u32 %x, %r2;", LANE),
        ("prmt.b32 %r2, %r1, %index1, 0x1044; prmt.b32 %x, %r2, 0, 0x4410;", LANE * 257),
        ("@!%p1 mov.u32 %r1, 6; mov.u32 %x, %r1;", np.where(LANE < 8, 5, 6)),
    ],
)
def test_an_undefined_register_without_consequence_is_fine(execute, use, want):
    np.testing.assert_array_equal(execute(UNDEFINED + use, LANE), want)


def test_an_inline_block_has_its_own_registers(execute):
    body = """
      { .reg .b32 t; .reg .pred p; mov.u32 t, 5; setp.eq.u32 p, %a, 0; selp.b32 %x, t, 0, p; }
      { .reg .b64 t; mul.wide.u32 t, %a, %a; mov.b64 {%r1, %r2}, t; add.u32 %x, %x, %r1; }"""
    a = np.array([0, 3], np.uint32)
    np.testing.assert_array_equal(execute(body, a), [5, 9])
    body = """{ .reg .b32 t; mov.u32 t, 5; { .reg .b32 t; mov.u32 t, 8; } mov.u32 %x, t; }"""
    assert execute(body)[0] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found 0"),
        (".entry k() { ret; }", "neither .reqntid nor .maxntid"),
        (".entry k() .reqntid 32, 2 { ret; }", "one-dimensional"),
        (".entry k() .reqntid 32 { mov.u32 %r1, 0; ret; }", "%r1 is no declared register"),
        (".entry k() .reqntid 32 { ret;", "no closing brace"),
        (".entry k(.param .align 64 .b8 map[128]) .reqntid 32 { ret; }", "scalars or pointers"),
        (".func f() { ret; } .entry k() .reqntid 32 { ret; }", "device functions"),
    ],
)
def test_text_that_cannot_be_read_raises(text, message):
    with pytest.raises(ParseError, match=message):
        parse(text)


def test_grid_and_block_shapes_are_checked():
    program = parse(".entry k() .reqntid 32 { ret; }")
    assert run(program, (0,), []).instructions == 0
    assert run(program, (5, 2), []).instructions == 5 * 2 * 32
    with pytest.raises(ValueError, match="one to three"):
        run(program, (1, 1, 1, 1), [])
    with pytest.raises(ValueError, match="whole warps"):
        run(parse(".entry k() .reqntid 48 { ret; }"), (1,), [])
