"""How saved tensors may be stored: bits by role, presets, budgets."""

from dataclasses import dataclass, replace

import torch

from dpmem.activations.roles import Use
from dpmem.units import parse_bytes


@dataclass(frozen=True)
class Policy:
    """How activations are stored.

    linear_bits      8, 4 or 2 for tensors used linearly in backward, more for inputs of narrow
                     norms (`roles.NARROWEST_NORM`); None: exact
    nonlinear_bits   8, 4 or 2 for inputs of nonlinear functions; None: exact
    minimum_numel    smaller tensors are left alone: statistics and other small, sensitive things
    group_size       64, 128 or 256 values share one scale and zero point
    offload          what is stored waits in host memory, quantized where the bits above say so
    budget_bytes     bytes that the activations of one forward may take; linear_bits and
                     nonlinear_bits are then the fewest that may be chosen, and each tensor gets as
                     many as the budget allows, by its part in the gradients' variance
    refresh_forwards with a budget: forwards from one reading of the gradients to the next

    Bits are for float32, bfloat16 and float16: values of other types, float64 too, stay exact. In
    every policy masks become bits, ReLU keeps a bit per value, max_pool2d's indices a byte, one
    storage is kept once however often it is saved, and what is arithmetic on one kept tensor is
    computed again instead of kept.

    Raises ValueError for a value outside these.
    """

    linear_bits: int | None = 4
    nonlinear_bits: int | None = 8
    minimum_numel: int = 16_384
    group_size: int = 256
    offload: bool = False
    budget_bytes: int | None = None
    refresh_forwards: int = 100

    def __post_init__(self) -> None:
        for option in ("linear_bits", "nonlinear_bits"):
            if getattr(self, option) not in (None, 8, 4, 2):
                raise ValueError(
                    f"{option} must be 8, 4, 2 or None (exact); received {getattr(self, option)!r}"
                )
        if self.group_size not in (64, 128, 256):
            raise ValueError(f"group_size must be 64, 128 or 256; received {self.group_size!r}")
        if not isinstance(self.minimum_numel, int) or self.minimum_numel < 0:
            raise ValueError(
                f"minimum_numel must be an integer of at least 0; received {self.minimum_numel!r}"
            )
        if not isinstance(self.refresh_forwards, int) or self.refresh_forwards < 1:
            raise ValueError(
                "refresh_forwards must be an integer of at least 1; received "
                f"{self.refresh_forwards!r}"
            )
        if self.budget_bytes is None:
            return
        if not isinstance(self.budget_bytes, int) or self.budget_bytes <= 0:
            raise ValueError(
                f"budget_bytes must be a positive integer or None; received {self.budget_bytes!r}"
            )
        if self.offload:
            raise ValueError(
                "a budget counts bytes on the device, where offload leaves none; received "
                f"offload=True and budget_bytes={self.budget_bytes}; choose one"
            )

    @classmethod
    def parse(cls, name: str) -> "Policy":
        """A preset's policy, or that of a byte budget such as "6GiB".

        Raises ValueError where `name` is neither.
        """
        if name in PRESETS:
            return PRESETS[name]
        try:
            return cls(linear_bits=2, budget_bytes=parse_bytes(name))
        except (TypeError, ValueError):
            raise ValueError(
                f"activations must be one of None, {', '.join(map(repr, PRESETS))}, a budget such "
                f"as '6GiB', or a Policy; received {name!r}"
            ) from None

    def bits(self, use: Use) -> int | None:
        """Bits a value of this use is stored in; None: exact."""
        if use.role == "nonlinear_input":
            return self.nonlinear_bits
        if use.role != "linear_input":
            return None
        return None if self.linear_bits is None else max(self.linear_bits, use.least_bits)


_LOSSLESS = Policy(linear_bits=None, nonlinear_bits=None)
_BITS = {f"{bits}bit": Policy(linear_bits=bits) for bits in (8, 4, 2)}

PRESETS = {
    "lossless": _LOSSLESS,
    **_BITS,
    "offload": replace(_LOSSLESS, offload=True),
    **{f"{name}+offload": replace(policy, offload=True) for name, policy in _BITS.items()},
}

COMPRESSIBLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
