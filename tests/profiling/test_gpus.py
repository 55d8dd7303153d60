"""The table of GPUs: every figure has a source, and none can be a slip of the pen."""

import json
import pickle
import re
from dataclasses import asdict

import pytest

from dpmem_profiling.gpus import GPUS, Gpu, cublas_workspace_bytes, cublaslt_workspace_bytes, gpu

GIB = 1 << 30
MIB = 1 << 20
ALL = pytest.mark.parametrize("known", GPUS.values(), ids=lambda known: known.name)


@ALL
def test_the_total_is_the_nominal_size_less_what_the_driver_keeps(known: Gpu) -> None:
    nominal = re.search(r"(\d+)GB$", known.title)
    assert nominal is not None
    # ECC takes a sixteenth of the memory of L40S, A40 and A10G; T4's driver nearly as much.
    assert 0.91 < known.total_bytes / (int(nominal[1]) * GIB) <= 1


@ALL
def test_every_figure_has_a_source(known: Gpu) -> None:
    fields = {"total_bytes", "architecture", "context_bytes"}
    assert set(known.source) == {name for name in fields if getattr(known, name) is not None}
    assert all("." in text for text in known.source.values())


@ALL
def test_names_are_what_people_type(known: Gpu) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", known.name)
    assert gpu(known.name) is known
    assert (known.architecture is None) == known.title.startswith("AMD")


def test_totals_that_were_measured_for_the_validation() -> None:
    assert gpu("rtx-3060-12gb").total_bytes == 12_622_168_064
    assert gpu("rtx-4060").total_bytes == 8_318_222_336


def test_a_gpu_can_be_a_key_and_travel() -> None:
    assert len(set(GPUS.values())) == len(GPUS)
    known = gpu("rtx-6000-ada")
    assert pickle.loads(pickle.dumps(known)) == known
    assert json.loads(json.dumps(asdict(known)))["context_bytes"] == 426 * MIB


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a100", "did you mean a100-40gb or a100-80gb?"),
        ("RTX-4090", "did you mean rtx-4090?"),
        ("rtx4080", "did you mean rtx-4080 or rtx-4090?"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="a GPU must be one of") as caught:
        gpu(name)
    assert str(caught.value).endswith(f"received {name!r}; {hint}")


def test_a_name_like_none_lists_them_all() -> None:
    with pytest.raises(ValueError, match=r"received 'voodoo';$") as caught:
        gpu("voodoo")
    assert all(known in str(caught.value) for known in GPUS)


@pytest.mark.parametrize(
    ("architecture", "expected_bytes"),
    [
        ((7, 5), 8_519_680),
        ((8, 0), 8_519_680),
        ((8, 9), 8_519_680),
        ((9, 0), 32 * MIB),
        ((10, 0), 32 * MIB),
        ((12, 0), 32 * MIB),
        (None, 128 * MIB),
    ],
)
def test_cublas_workspaces(architecture: tuple[int, int] | None, expected_bytes: int) -> None:
    assert cublas_workspace_bytes(architecture) == expected_bytes


def test_cublaslt_shares_the_workspace_of_cublas() -> None:
    assert cublaslt_workspace_bytes((9, 0)) == 0
    assert cublaslt_workspace_bytes(None) == 76 * MIB
