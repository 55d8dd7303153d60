"""The list of cases that everything in verify goes through."""

from verify.activations import activation_cases
from verify.cases import KernelCase
from verify.fp8s import fp8_cases
from verify.masks import mask_cases
from verify.masters import master_cases
from verify.narrowing import narrowing_cases
from verify.walks import walk_cases


def cases_for(target: str) -> list[KernelCase]:
    """Every case that the launchers would ask for on `target`, and the twins to compare with."""
    assembly = 0
    if target.startswith("sm_"):
        assembly = 100 if int(target[3:]) >= 100 else 80
    return [
        *walk_cases(assembly=assembly),
        *master_cases(),
        *activation_cases(assembly=assembly),
        *fp8_cases(),
        *mask_cases(),
        *narrowing_cases(),
    ]
