"""What autograd saves of a model, what becomes of each tensor, and why: one table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dpmem.activations.forms import (
    Bools,
    Codes,
    Exact,
    Form,
    PoolOffsets,
    Positive,
    Recomputed,
    ShapeOnly,
    TwoValued,
)
from dpmem.activations.policy import Policy
from dpmem.activations.sensitivity import GradientReader, sensitivities
from dpmem.activations.slots import Packed, Saved, Slot, View, stored_bytes
from dpmem.activations.store import ActivationStore

_LOSSLESS = {
    Bools: "a bit each",
    Positive: "a bit each",
    TwoValued: "a bit each",
    PoolOffsets: "a byte or two each",
}


@dataclass(frozen=True)
class AuditRow:
    """One tensor that autograd saved.

    number              in the order of saving, from 1
    module              path of the module whose forward saved it; "" for the model's own
    function            torch function that saved it; None: none that torch dispatches in Python
    tensor              shape and dtype
    role                what it is to backward: `roles.Role`
    bytes_before        of its storage, where no earlier row has that already, else 0
    bytes_after         of what is kept of it and no earlier row counts
    shared_with         number of the first row with the same storage; None: this is the first
    predicted_variance  what its rounding adds to the summed variances of all weight gradients;
                        None: no loss was given, or an earlier row has it
    decision            how it is kept
    reason              why
    """

    number: int
    module: str
    function: str | None
    tensor: str
    role: str
    bytes_before: int
    bytes_after: int
    shared_with: int | None
    predicted_variance: float | None
    decision: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """The rows, and the sums over all of them but the model's own tensors."""

    rows: tuple[AuditRow, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        head = (
            "#",
            "module",
            "function",
            "tensor",
            "role",
            "before",
            "after",
            "shared",
            "variance",
        )
        table = [(*head, "decision", "reason")]
        for row in self.rows:
            variance = row.predicted_variance
            table.append(
                (
                    str(row.number),
                    row.module,
                    row.function or "-",
                    row.tensor,
                    row.role,
                    f"{row.bytes_before:,}",
                    f"{row.bytes_after:,}",
                    "" if row.shared_with is None else f"#{row.shared_with}",
                    "" if variance is None else f"{variance:.2e}",
                    row.decision,
                    row.reason,
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        ratio = self.bytes_before / max(1, self.bytes_after)
        lines.append(
            f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after: {ratio:.2f}x"
        )
        return "\n".join(lines)


def audit(
    model: nn.Module,
    batch: Any,
    policy: str | Policy = "4bit",
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Audit:
    """What `policy` makes of each tensor that autograd saves in one forward of `model`.

    batch   what the model takes: a mapping as keyword arguments, a list or tuple as arguments,
            anything else as the one argument
    policy  a preset's name, a byte budget such as "6GiB", or a `Policy`
    loss    (model, batch) -> scalar; with it a backward runs, which tells the predicted variances.
            Without it an output's `.loss` serves, as Hugging Face's models give it; where there is
            none the variances stay None

    Gradients, buffers and the random state are afterwards what they were before. The model is left
    in the mode, training or evaluation, that it is in.

    Raises ValueError for an unknown policy and for a budget without a loss, and as the store does.
    """
    chosen = policy if isinstance(policy, Policy) else Policy.parse(policy)
    store = ActivationStore(model, chosen, seed=0)
    log: list[Saved] = []
    with _left_as_it_was(model), _modules_followed(model, store):
        variances = _read(store, chosen, model, batch, loss, log)
        if chosen.budget_bytes is not None:
            if variances is None:
                raise ValueError(
                    "a budget's bits follow from gradients; received no loss; pass loss=(model, "
                    "batch) -> scalar"
                )
            # The first forward has the fewest bits; the second those that were chosen.
            log.clear()
            variances = _read(store, chosen, model, batch, loss, log)
        # Read while the graph and with it what is kept are gone, but for the log's own holds.
        rows = tuple(_rows(log, variances))
    return Audit(
        rows,
        sum(row.bytes_before for row in rows if row.role != "model"),
        sum(row.bytes_after for row in rows if row.role != "model"),
    )


def _read(
    store: ActivationStore,
    policy: Policy,
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    log: list[Saved],
) -> list[float] | None:
    """Run a forward into `log`; the sensitivities by number where there is a loss."""
    reader = GradientReader(policy.group_size)
    store.log, store.reader = log, reader
    with store:
        # A budget's reader is the planner's; it may rest in this forward.
        reader = store.reader or reader
        value = loss(model, batch) if loss is not None else _call(model, batch)
    if loss is None:
        value = getattr(value, "loss", None)
    if not isinstance(value, Tensor):
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(value, parameters, allow_unused=True)
    return sensitivities(reader.readings, len(log) + 1)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _rows(log: list[Saved], sensitivity: list[float] | None) -> Iterator[AuditRow]:
    counted: set[object] = set()
    first: dict[StorageWeakRef, int] = {}
    for number, one in enumerate(log, 1):
        shared = None if one.storage is None else first.setdefault(one.storage, number)
        # What the model owns is not kept for backward's sake.
        kept = {} if one.use.role == "model" else stored_bytes([one])
        after = sum(size for held, size in kept.items() if held not in counted)
        counted.update(kept)
        variance = None
        if sensitivity is not None and _number(one.packed) in (None, number):
            variance = _variance(one.packed, sensitivity)
        yield AuditRow(
            number,
            one.module or "",
            one.function,
            one.tensor,
            one.use.role,
            one.storage_bytes if shared in (None, number) else 0,
            after,
            None if shared == number else shared,
            variance,
            _decision(one.packed),
            one.use.reason,
        )


def _number(packed: Packed) -> int | None:
    return packed.number if isinstance(packed, View) else None


def _values(packed: Packed) -> Form | Exact | Recomputed | ShapeOnly | None:
    if not isinstance(packed, View):
        return packed
    return packed.source.values if isinstance(packed.source, Slot) else packed.source


def _variance(packed: Packed, sensitivity: list[float]) -> float:
    values = _values(packed)
    if isinstance(packed, View) and isinstance(values, Codes):
        return sensitivity[packed.number] / (2**values.bits - 1) ** 2
    return 0.0


def _decision(packed: Packed) -> str:
    values = _values(packed)
    if isinstance(values, ShapeOnly):
        return "shape only"
    if isinstance(packed, View) and packed.of_sign:
        signs = packed.source.sign if isinstance(packed.source, Slot) else packed.source
        return "exact, shared" if signs is None else "a bit each"
    if isinstance(values, Codes):
        return f"{values.bits} bits"
    if isinstance(values, Recomputed):
        return "recomputed"
    return _LOSSLESS.get(type(values), "exact")


@contextmanager
def _modules_followed(model: nn.Module, store: ActivationStore) -> Iterator[None]:
    """Tell the store which module runs."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str | None] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(store.module_name)
        store.module_name = names.get(id(module))

    def leave(*_: Any) -> None:
        store.module_name = stack.pop()

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore buffers and the random state; gradients are asked for without being kept."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
