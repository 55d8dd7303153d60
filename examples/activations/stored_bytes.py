"""Bytes stored between forward and backward, beside those of the same run left exact.

python examples/activations/stored_bytes.py

Runs on fake tensors: shapes, dtypes and storages as on real ones, no data, seconds instead of
minutes; on the CPU's operators, which save float masks where a GPU saves bits. Writes
reports/bench/activations-bytes.{md,json}. Needs transformers and torchvision.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import dpmem

POLICIES = {
    "lossless": "lossless",
    "8bit": "8bit",
    "4bit": "4bit",
    "2bit": "2bit",
    **{
        f"uniform {bits}": dpmem.Policy(linear_bits=bits, nonlinear_bits=bits) for bits in (8, 4, 2)
    },
}
OUT = Path(__file__).parents[2] / "reports" / "bench"


def define_missing_operators() -> None:
    """torchvision beside a torch of another build lacks its own operators, and does not import."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define_missing_operators.keep = library


def resnet50() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Batch 16 of 224 x 224."""
    define_missing_operators()
    import torchvision

    return torchvision.models.resnet50(), (torch.randn(16, 3, 224, 224),)


class Blocks(nn.Module):
    """GPT-2's transformer blocks alone."""

    def __init__(self, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.blocks = _gpt2(dropout, attention_dropout).transformer.h

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ChunkedLoss(nn.Module):
    """The whole GPT-2, its loss recomputed in chunks: what a fused cross-entropy would store."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _gpt2(0.1, 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.transformer(tokens).last_hidden_state[:, :-1].flatten(0, 1)
        return checkpoint(self._loss, hidden, tokens[:, 1:].flatten(), use_reentrant=False)

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model.lm_head(hidden), target)


class WholeLoss(ChunkedLoss):
    """The whole GPT-2 with torch's cross-entropy, whose log-softmax stays exact."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.transformer(tokens).last_hidden_state[:, :-1].flatten(0, 1)
        return self._loss(hidden, tokens[:, 1:].flatten())


def _gpt2(dropout: float, attention_dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=attention_dropout
    )
    return GPT2LMHeadModel(config)


def blocks(dropout: float, attention_dropout: float) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Four of GPT-2's blocks, batch 2, T = 512."""
    x = torch.randn(2, 512, 768, requires_grad=True)
    return Blocks(dropout, attention_dropout), (x,)


def whole(kind: type[nn.Module]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """GPT-2 of four blocks with its embedding and head, batch 2, T = 512."""
    return kind(), (torch.zeros(2, 512, dtype=torch.long),)


Case = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
# What each has to reach, by policy.
CASES: dict[str, tuple[Case, bool, dict[str, float]]] = {
    "ResNet-50, fp32": (
        resnet50,
        False,
        {"lossless": 1.05, "8bit": 3.8, "4bit": 7.0, "2bit": 12.1}
        | {"uniform 8": 3.7, "uniform 4": 6.9, "uniform 2": 11.5},
    ),
    "GPT-2 blocks, no dropout, fp32": (
        lambda: blocks(0.0, 0.0),
        False,
        {"8bit": 3.8, "4bit": 6.0, "2bit": 8.1},
    ),
    "GPT-2 blocks, dropout .1/.1, fp32": (
        lambda: blocks(0.1, 0.1),
        False,
        {"lossless": 1.2, "8bit": 4.6, "4bit": 6.6, "2bit": 8.4},
    ),
    "ResNet-50, bf16 autocast": (resnet50, True, {"8bit": 1.9, "4bit": 3.5, "2bit": 6.2}),
    "GPT-2 blocks, dropout .1/0, bf16 autocast": (
        lambda: blocks(0.1, 0.0),
        True,
        {"8bit": 2.2, "4bit": 3.4, "2bit": 4.7},
    ),
    "GPT-2 whole, dropout .1/0, fp32": (lambda: whole(WholeLoss), False, {}),
    "GPT-2 whole, its loss recomputed, fp32": (lambda: whole(ChunkedLoss), False, {}),
}


def count(case: Case, bf16: bool, policy: str | dpmem.Policy) -> tuple[int, int]:
    """Bytes exact, and as `policy` stores them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = case()
        model.train()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            audit = dpmem.audit(model, batch, policy)
    return audit.bytes_before, audit.bytes_after


def main() -> None:
    """Count every case under every policy."""
    rows = []
    for name, (case, bf16, asked) in CASES.items():
        for policy_name, policy in POLICIES.items():
            before, after = count(case, bf16, policy)
            row = {
                "model": name,
                "policy": policy_name,
                "exact_bytes": before,
                "stored_bytes": after,
                "ratio": before / after,
                "asked": asked.get(policy_name),
            }
            rows.append(row)
            print(
                f"{name:45}{policy_name:12}{before / after:8.2f}  asked {row['asked']}", flush=True
            )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "activations-bytes.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    lines = [
        "# Stored activations beside exact ones",
        "",
        "Made by `python examples/activations/stored_bytes.py` on fake tensors and the CPU's",
        f"operators, torch {torch.__version__}. Bytes of unique storages that autograd keeps,",
        "without weights and their copies: all exact, over as the policy stores them. `uniform`:",
        "the same bits for linear and nonlinear uses, no ladder.",
        "",
        "| model | policy | exact MiB | stored MiB | ratio | asked |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        asked = "–" if row["asked"] is None else f"≥ {row['asked']}"
        lines.append(
            f"| {row['model']} | {row['policy']} | {row['exact_bytes'] / 2**20:.1f} "
            f"| {row['stored_bytes'] / 2**20:.1f} | {row['ratio']:.2f} | {asked} |"
        )
    (OUT / "activations-bytes.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
