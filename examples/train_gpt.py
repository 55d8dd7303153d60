"""Train the byte-level GPT data parallel with small activations.

One process:    python examples/train_gpt.py
Two processes:  torchrun --nproc-per-node 2 examples/train_gpt.py
"""

import torch
from torch.utils.data import DataLoader, DistributedSampler

import dpmem
from dpmem.text_gpt import ByteGPT, StandardLibraryText, next_byte_loss

STEPS = 20


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ByteGPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = dpmem.wrap(model, optimizer, activations="4bit", max_grad_norm=1.0)

    text = StandardLibraryText(context=256)
    distributed = torch.distributed.is_initialized()
    sampler = DistributedSampler(text, seed=0) if distributed else None
    loader = DataLoader(text, batch_size=4, sampler=sampler, shuffle=sampler is None)
    for step, windows in zip(range(STEPS), loader, strict=False):
        loss = next_byte_loss(model, windows.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:2d}  loss {loss.item():.4f}  norm {model.grad_norm.item():.3f}")
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
