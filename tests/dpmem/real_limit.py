"""What test_find_real_limit.py runs in processes of their own, under a real memory limit.

`find ROOM_BYTES` maps at most ROOM_BYTES more than torch itself takes, searches, and prints the
limit and the result; `train LIMIT_BYTES BATCH STEPS` trains within LIMIT_BYTES of address space.
"""

import json
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dpmem

ROWS, WIDTH = 1024, 64
CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)])


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def batch(n: int) -> Tensor:
    return torch.randn(n, ROWS, WIDTH)


JOB = dpmem.Job(model, batch, loss, optimizer=partial(torch.optim.AdamW, lr=1e-3))


def find(room_bytes: int) -> dict[str, Any]:
    mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = mapped_pages * resource.getpagesize() + room_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    found = dpmem.find_batch_size(JOB, isolate=True, device=CPU)
    return {"limit_bytes": limit_bytes, "found": found.to_json()}


def train(limit_bytes: int, n: int, steps: int) -> dict[str, Any]:
    """The plain loop, with nothing watching; says how it failed, if for memory."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = model()
    optimizer = JOB.optimizer(net.parameters())
    done = 0
    try:
        for _ in range(steps):
            loss(net, batch(n)).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    except RuntimeError as error:
        return {"steps": done, "type": type(error).__name__, "error": str(error)}
    return {"steps": done}


if __name__ == "__main__":
    command, *numbers = sys.argv[1:]
    print(json.dumps({"find": find, "train": train}[command](*map(int, numbers))))
