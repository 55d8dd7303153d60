"""A small byte-level GPT and real text for it, on every machine: the standard library's source.

Plain PyTorch: what `dpmem demo`, the examples and the benchmarks train.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


@dataclass(frozen=True)
class GPTSize:
    """Shape of a ByteGPT. The default has 4.9 million parameters."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    context: int = 256


class Block(nn.Module):
    """One pre-norm transformer layer: [batch, time, width] -> the same shape."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.project = nn.Linear(size.width, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.expand = nn.Linear(size.width, 4 * size.width)
        self.contract = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the MLP, each added to the residual stream."""
        batch, time, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return hidden


class ByteGPT(nn.Module):
    """Predicts the next byte: tokens [batch, time] int64 -> logits [batch, time, 256] fp32."""

    def __init__(self, size: GPTSize | None = None) -> None:
        super().__init__()
        size = size or GPTSize()
        self.token = nn.Embedding(256, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        self.apply(self._initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        # GPT-2's: a normal of standard deviation 0.02, biases zero.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a byte, of `model` on windows [batch, context + 1] int64."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


class StandardLibraryText(Dataset[Tensor]):
    """The source of the running interpreter's standard library, cut into windows of bytes.

    Item i is an int64 tensor of context + 1 bytes. At most `limit_bytes` are read, in the order
    of the files' names, so two runs of one interpreter see the same text.

    Raises RuntimeError where the interpreter came without its sources.
    """

    def __init__(self, context: int, limit_bytes: int = 4 << 20) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        text = bytearray()
        for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
            if "site-packages" in path.parts or len(text) >= limit_bytes:
                continue
            text += path.read_bytes()
        if len(text) <= context:
            raise RuntimeError(
                f"the demo trains on the standard library's source; {root} holds none; "
                "use an interpreter installed with its .py files"
            )
        self.text = torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()

    def batch(self, n: int) -> Tensor:
        """The first n windows, around again where there are fewer: [n, context + 1] int64."""
        return torch.stack([self[i % len(self)] for i in range(n)])
