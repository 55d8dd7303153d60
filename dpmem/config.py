"""What `wrap` was asked for, validated once, on construction."""

from dataclasses import dataclass
from typing import Literal, get_args

from dpmem.activations.policy import Policy

Precision = Literal["fp32", "bf16", "fp16"]
# A preset's name or a budget such as "6GiB": `Policy.parse`.
Activations = str
Shard = Literal["none"]
Offload = Literal["none"]

# Named in the public signature so that code written today keeps its shape; refused until built.
_NOT_BUILT = {
    "shard": {"optimizer": "optimizer-state sharding", "parameters": "FSDP2 behind this call"},
    "offload": {"optimizer": "host offload", "parameters": "host offload"},
}


@dataclass(frozen=True)
class WrapConfig:
    """The options of `dpmem.wrap`.

    precision       "fp32"; "bf16" or "fp16": autocast inside, half-precision outputs returned as
                    fp32; "fp16" with loss scaling inside
    activations     None (stored as autograd stores them), a preset, a byte budget, or a Policy
    max_grad_norm   global 2-norm gradients are clipped to before the optimizer's step
    shard, offload  "none": the only values of this version

    Raises ValueError for a value outside these, and NotImplementedError for one that dpmem's
    design names and this version does not have: nothing is ignored silently.
    """

    precision: Precision = "fp32"
    activations: Activations | Policy | None = None
    max_grad_norm: float | None = None
    shard: Shard = "none"
    offload: Offload = "none"

    def __post_init__(self) -> None:
        _check("precision", self.precision, get_args(Precision))
        if self.activations is not None and not isinstance(self.activations, Policy):
            Policy.parse(self.activations)
        _check("shard", self.shard, get_args(Shard))
        _check("offload", self.offload, get_args(Offload))
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, int | float) and norm > 0):
            raise ValueError(
                f"max_grad_norm must be a positive number or None; received {norm!r}; "
                "use None for no clipping"
            )

    @property
    def policy(self) -> Policy | None:
        """The activation policy asked for, a name resolved."""
        if self.activations is None or isinstance(self.activations, Policy):
            return self.activations
        return Policy.parse(self.activations)


def _check(option: str, value: object, allowed: tuple[object, ...]) -> None:
    missing = _NOT_BUILT.get(option, {})
    if isinstance(value, str) and value in missing:
        raise NotImplementedError(
            f"{option}={value!r} needs {missing[value]}, which this version of dpmem does not "
            f"have; use one of {', '.join(map(repr, allowed))}"
        )
    if value not in allowed:
        raise ValueError(
            f"{option} must be one of {', '.join(map(repr, allowed))}; received {value!r}"
        )
