"""Basic blocks and the hot path, on machine code small enough to count by hand."""

import pytest

from verify.machine_code import hot_path, parse_amdgcn, parse_sass, widths


def sass(*lines: str) -> str:
    """As nvdisasm writes it: labels alone, instructions with an address."""
    text, address = [".text.kernel:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
            text.append(f"        /*{address:04x}*/   {guard:>12} {rest} ;")
            address += 16
    return "\n".join(text)


# Aligned data takes seven instructions and one 128-bit access each way; the rest goes one by one.
TWO_WAYS = sass(
    "S2R R0, SR_TID.X",
    "ISETP.LT.AND P0, PT, R0, UR4, PT",
    "@P0 BRA `(.L_x_0)",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "FMUL R4, R4, R5",
    "STG.E.128 desc[UR4][R2.64], R4",
    "NOP",
    "EXIT",
    ".L_x_0:",
    *["@!P1 LDG.E.U16 R4, desc[UR4][R2.64]"] * 8,
    *["@!P1 STG.E.U16 desc[UR4][R2.64], R4"] * 8,
    "@P2 EXIT",
    "IADD3 R0, R0, 1, RZ",
    "EXIT",
    ".L_x_1:",
    "BRA `(.L_x_1)",
)


def test_blocks_end_at_labels_and_transfers() -> None:
    blocks = parse_sass(TWO_WAYS)
    assert [block.cost for block in blocks] == [3, 4, 17, 2, 1, 0]
    assert [block.successors for block in blocks[:5]] == [(2, 1), (-1,), (-1, 3), (-1,), (4,)]
    assert widths(blocks) == ([128, 16], [128, 16])


def test_the_wide_branch_is_the_hot_path() -> None:
    path = hot_path(parse_sass(TWO_WAYS), 128, 128)
    assert path is not None
    assert (path.instructions, path.load_bits, path.store_bits) == (7, 128, 128)


def test_code_that_only_moves_words_says_so() -> None:
    """Without the wide branch the same payload takes the narrow way, and its width is told."""
    narrow = TWO_WAYS.replace(".E.128", ".E")
    path = hot_path(parse_sass(narrow), 128, 128)
    assert path is not None
    assert (path.load_bits, path.store_bits) == (16, 16)
    # Its guarded exit is the cheapest end: 3 + 8 + 8 + 1.
    assert path.instructions == 20


def test_a_payload_that_no_path_carries_has_no_hot_path() -> None:
    assert hot_path(parse_sass(TWO_WAYS), 1024, 1024) is None


def test_only_reads_may_matter() -> None:
    path = hot_path(parse_sass(TWO_WAYS), 128, None)
    assert path is not None
    assert (path.instructions, path.load_bits, path.store_bits) == (7, 128, None)


def test_the_dearer_of_two_dtypes_counts_and_a_wider_one_does_not() -> None:
    """Three ways: bf16, a dearer fp16, and fp32 with twice the payload."""
    text = sass(
        "@P0 BRA `(.L_fp16)",
        "@P1 BRA `(.L_fp32)",
        *["LDG.E.128 R4, desc[UR4][R2.64]"] * 4,
        "BRA `(.L_end)",
        ".L_fp16:",
        *["LDG.E.128 R4, desc[UR4][R2.64]"] * 4,
        *["HADD2.F32 R4, -RZ, R4.H0_H0"] * 5,
        "BRA `(.L_end)",
        ".L_fp32:",
        *["LDG.E.128 R4, desc[UR4][R2.64]"] * 8,
        ".L_end:",
        "EXIT",
    )
    path = hot_path(parse_sass(text), 512, None)
    assert path is not None
    assert path.instructions == 1 + 4 + 5 + 1 + 1
    wide = hot_path(parse_sass(text), 1024, None)
    assert wide is not None
    assert wide.instructions == 2 + 8 + 1


def test_a_loop_runs_as_often_as_the_payload_asks() -> None:
    text = sass(
        "MOV R1, R2",
        ".L_loop:",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "IADD3 R2, R2, 16, RZ",
        "@P0 BRA `(.L_loop)",
        "EXIT",
    )
    path = hot_path(parse_sass(text), 3 * 128, None)
    assert path is not None
    assert path.instructions == 1 + 3 * 3 + 1


def test_uniform_branches_and_reconvergence_fall_through() -> None:
    text = sass(
        "BSSY B0, `(.L_x_2)",
        "BRA.U UP0, `(.L_x_1)",
        "LDG.E.64 R4, desc[UR4][R2.64]",
        ".L_x_1:",
        "BSYNC B0",
        ".L_x_2:",
        "STG.E.64 desc[UR4][R2.64], R4",
        "EXIT",
    )
    path = hot_path(parse_sass(text), 64, 64)
    assert path is not None
    assert (path.instructions, path.load_bits) == (6, 64)


def test_calls_are_not_followed_and_indirect_branches_refused() -> None:
    text = sass("LDG.E R4, desc[UR4][R2.64]", "CALL.REL.NOINC `(.L_div)", ".L_div:", "EXIT")
    assert hot_path(parse_sass(text), 32, None) is None
    with pytest.raises(ValueError, match="indirect"):
        parse_sass(sass("BRX R2 -0x10", "EXIT"))


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E", 32), ("LDG.E.64", 64), ("LDG.E.128", 128), ("LDG.E.U8", 8), ("LDG.E.S16", 16),
     ("LDG.E.EF.128", 128), ("LDG.E.128.CONSTANT", 128), ("LDG.E.ENL2.256", 256)],
)  # fmt: skip
def test_widths_of_sass(opcode: str, bits: int) -> None:
    loads, _ = widths(parse_sass(sass(f"{opcode} R4, desc[UR4][R2.64]", "EXIT")))
    assert loads == [bits]


AMD = """
kernel:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	v_cmp_gt_i64_e32 vcc, s[2:3], v[2:3]
	s_cbranch_vccz .LBB0_2
	global_load_dwordx4 v[4:7], v0, s[8:9]
	s_waitcnt vmcnt(0)
	v_mul_f32_e32 v4, v4, v5
	s_nop 1
	buffer_store_dwordx4 v[4:7], v0, s[0:3], 0 offen
	s_branch .LBB0_3
.LBB0_2:                                ; %narrow
	global_load_ushort v4, v0, s[8:9]
	v_mul_f32_e32 v4, v4, v5
	global_store_short v0, v4, s[8:9]
.LBB0_3:
	s_endpgm
"""


def test_amd_counts_vector_instructions() -> None:
    blocks = parse_amdgcn(AMD)
    assert widths(blocks) == ([128, 16], [128, 16])
    path = hot_path(blocks, 128, 128)
    assert path is not None
    assert (path.instructions, path.load_bits, path.store_bits) == (2, 128, 128)
    with pytest.raises(ValueError, match="indirect"):
        parse_amdgcn("\ts_setpc_b64 s[30:31]\n")


def test_a_way_is_not_prolonged_by_another() -> None:
    """After the wide way the narrow one could be run as well, as far as branches tell; it moves the
    payload a second time and is no way of its own, since only its store is wide."""
    text = sass(
        "@P0 BRA `(.L_narrow)",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@P1 EXIT",
        ".L_narrow:",
        *["LDG.E.U16 R4, desc[UR4][R2.64]"] * 8,
        "STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
    )
    path = hot_path(parse_sass(text), 128, 128)
    assert path is not None
    assert (path.instructions, path.load_bits, path.store_bits) == (4, 128, 128)
