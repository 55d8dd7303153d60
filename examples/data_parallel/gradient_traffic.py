"""Bytes of memory that a step moves per gradient element, between backward and the update.

python examples/data_parallel/gradient_traffic.py

One step of eight 512 x 512 linear layers, counted while it runs on the CPU: torch's operations by a
dispatch mode (what each reads and writes, from its schema), ours by what the compiled loops are
called with, at the bytes per element that the executed PTX of the same kernels was seen to ask for
(reports/kernels/verify.json). Counted is what is done to gradients and buckets: averaging, check,
norm, unscaling, clipping, and the optimizer's reading of the gradients; not the matrix products
that make them, the optimizer's state, nor the collective itself. Writes
reports/bench/gradient-traffic.{md,json}.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpmem
from dpmem_kernels import tensor_table_cpu

REPORTS = Path(__file__).parents[2] / "reports"
WIDTH, LAYERS, BATCH = 512, 8, 4
ELEMENTS = WIDTH * WIDTH * LAYERS
# Of these the optimizer's own memory is not counted: only the gradients that they read and, where
# they are given a scale to divide by, write. Told to skip, they return before the first element.
UPDATES = ("_fused_adamw_",)
# They make gradients, or move no data.
NOT_COUNTED = ("mm", "empty", "detach")
# Ours are counted by their loops; c10d's are the collective.
NAMESPACES_NOT_COUNTED = ("dpmem", "c10d")


def proven_bytes() -> dict[tuple[str, str], float]:
    """Bytes per element by kernel and variant, as executed PTX for sm_90 asked for them."""
    rows = json.loads((REPORTS / "kernels" / "verify.json").read_text())["rows"]
    return {
        (row["kernel"], row["variant"]): row["bytes_per_element"]
        for row in rows
        if row["target"] == "sm_90"
    }


class Traffic(TorchDispatchMode):
    """Counts bytes, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[str, float] = {}
        self._proven = proven_bytes()

    def add(self, name: str, count_bytes: float) -> None:
        self.counted[name] = self.counted.get(name, 0.0) + count_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, name = func._schema.name.split("::")
        if namespace in NAMESPACES_NOT_COUNTED or name in NOT_COUNTED:
            return result
        if name == "_to_copy" and torch.float16 in (args[0].dtype, result.dtype):
            return result  # autocast's, of weights, and of what becomes their gradients
        if name in UPDATES:
            found_inf = kwargs.get("found_inf")
            if found_inf is None or found_inf.item() != 1:
                writes = kwargs.get("grad_scale") is not None
                self.add(name, sum(gradient.nbytes for gradient in args[1]) * (1 + writes))
            return result
        moved = 0
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            overwrites = writes and name in ("copy_", "zero_", "fill_")
            for tensor in _large(value):
                # Written in place it is read and written; overwritten, only written.
                moved += tensor.nbytes * (1 + writes - overwrites)
        moved += sum(tensor.nbytes for tensor in _large(kwargs.get("out")))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view
        if all(alias is None for alias in aliases):
            moved += sum(tensor.nbytes for tensor in _large(result))
        if moved:
            self.add(name, moved)
        return result

    @contextmanager
    def loops(self) -> Iterator[None]:
        """Count our loops too."""
        with (
            mock.patch.object(
                tensor_table_cpu, "_read_range", self._read(tensor_table_cpu._read_range)
            ),
            mock.patch.object(
                tensor_table_cpu, "_move_range", self._move(tensor_table_cpu._move_range)
            ),
        ):
            yield

    def _read(self, loop: Callable[..., None]) -> Callable[..., None]:
        def read(
            chunks: Any, code: int, sources: Any, like: Any, partials: Any, *rest: int
        ) -> None:
            elements = int(chunks[chunks[:, 1] == code][:, 3].sum())
            kind = "fp32" if like.itemsize == 4 else "16bit"
            self.add("dpmem grad_stats", elements * self._proven["grad_stats", kind])
            loop(chunks, code, sources, like, partials, *rest)

        return read

    def _move(self, loop: Callable[..., None]) -> Callable[..., None]:
        def move(chunks: Any, code: int, *rest: Any) -> None:
            _, _, source, destination, _, accumulate, sums, in_place = rest[:8]
            assert not accumulate
            assert not sums
            elements = int(chunks[chunks[:, 1] == code][:, 3].sum())
            kinds = ["fp32" if like.itemsize == 4 else "16bit" for like in (source, destination)]
            if in_place and (rest[0] == rest[1]).all():
                self.add("dpmem grad_scale", elements * self._proven["grad_scale", kinds[0]])
            else:
                wire = {"fp32": "fp32", "16bit": "bf16"}[kinds[1]]
                proven = self._proven["bucket_pack", f"{kinds[0]} to {wire}"]
                self.add("dpmem bucket_pack", elements * proven)
            loop(chunks, code, *rest)

        return move


def _large(value: Any) -> list[Tensor]:
    """Tensors of a weight's size or more: all that a gradient or a bucket is part of."""
    return [
        leaf
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.numel() >= WIDTH * WIDTH
    ]


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def _ours(
    dtype: torch.dtype, max_norm: float, *, precision: Literal["fp32", "fp16"] = "fp32"
) -> Callable[[], None]:
    model = _model(dtype)
    wrapped, optimizer = dpmem.wrap(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        max_grad_norm=max_norm,
        precision=precision,
    )
    assert optimizer is not None
    if wrapped.scaler is not None:  # as GradScaler's below
        wrapped.scaler.load_state_dict({"scale": 8.0, "growth_tracker": 0, "skipped_steps": 0})

    def step() -> None:
        wrapped(torch.ones(BATCH, WIDTH, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _theirs(dtype: torch.dtype, max_norm: float, *, views: bool) -> Callable[[], None]:
    model = _model(dtype)
    wrapped: nn.Module = model
    if dist.is_initialized():
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step() -> None:
        loss = wrapped(torch.ones(BATCH, WIDTH, dtype=dtype)).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def count(step: Callable[[], None]) -> dict[str, float]:
    """Bytes per gradient element of the fourth step, by operation."""
    for _ in range(3):
        step()
    traffic = Traffic()
    with traffic.loops(), traffic:
        step()
    return {name: moved / ELEMENTS for name, moved in sorted(traffic.counted.items())}


ROWS: dict[str, Callable[[torch.dtype, float], Callable[[], None]]] = {
    "dpmem": _ours,
    "dpmem, precision='fp16'": partial(_ours, precision="fp16"),
    "DistributedDataParallel + GradScaler + clip_grad_norm_": partial(_theirs, views=False),
    "the same, gradient_as_bucket_view": partial(_theirs, views=True),
}
# What clips, and what leaves gradients as they are.
NORMS = {"clips": 1e-3, "does not clip": 1e9}


def measure(ranks: int) -> list[dict[str, Any]]:
    """All rows for this many ranks; the process group is there where it is more than one."""
    torch.set_num_threads(1)
    found = []
    for name, make in ROWS.items():
        if ranks == 1 and "bucket_view" in name:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for clips, max_norm in NORMS.items():
                parts = count(make(dtype, max_norm))
                found.append(
                    {
                        "what": name,
                        "ranks": ranks,
                        "dtype": str(dtype).removeprefix("torch."),
                        "step": clips,
                        "bytes_per_element": sum(parts.values()),
                        "parts": parts,
                    }
                )
    return found


def _rank(rank: int, scratch: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=2
    )
    found = measure(2)
    if rank == 0:
        (Path(scratch) / "rows.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def all_rows() -> list[dict[str, Any]]:
    """One rank, then two."""
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (scratch,), nprocs=2)  # type: ignore[no-untyped-call]
        two = json.loads((Path(scratch) / "rows.json").read_text())
    return [*measure(1), *two]


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print the rows, write nothing")
    as_json = parser.parse_args().json
    rows = all_rows()
    if as_json:
        print(json.dumps(rows))
        return
    out = REPORTS / "bench" / "gradient-traffic"
    out.with_suffix(".json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    lines = [
        "# Bytes of memory moved per gradient element",
        "",
        "Made by `python examples/data_parallel/gradient_traffic.py`, torch "
        f"{torch.__version__}; its docstring says how it counts, and what. AdamW(fused=True).",
        "",
        "| what | ranks | gradients | the step | bytes per element | of these |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = ", ".join(f"{name} {moved:.1f}" for name, moved in row["parts"].items())
        lines.append(
            f"| {row['what']} | {row['ranks']} | {row['dtype']} | {row['step']} "
            f"| {row['bytes_per_element']:.1f} | {parts} |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
