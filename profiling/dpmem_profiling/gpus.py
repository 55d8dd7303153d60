"""GPUs that need not be here: how much memory each has, and what of it never reaches a tensor.

Total: what CUDA says a process may have, `torch.cuda.mem_get_info()[1]`, on Linux. NVML and
`nvidia-smi` say more (24,564 MiB for an RTX 4090), because they count what the driver keeps for
itself; Windows reports the nominal size. The figure moves with the driver by about half a percent:
where several readings are published the smallest stands here, since "fits" said wrongly costs more
than a batch one smaller. A reading in GiB to two decimals is right to 0.005 GiB.

Context: what a process takes on the GPU before its first tensor. It depends on the driver, the CUDA
version and the kernels loaded more than on the GPU; what was published reaches from 256 MiB (RTX
3090, torch 2.7) over 287,047,680 B (lazy loading) and 666,632,192 B (eager; both pytorch PR #86509,
GPU not named) to 616 MiB (a server of 8, LMCache issue #4019). None where nobody published it.

Names carry the size where a model is sold with several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

_MIB = 1 << 20
_GIB = 1 << 30

# compute capability: https://developer.nvidia.com/cuda-gpus
_CAPABILITY_SOURCE = "NVIDIA, CUDA GPU Compute Capability, developer.nvidia.com/cuda-gpus"


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    name           as the command line takes it, lower case, such as "a100-40gb"
    title          as reports write it, such as "NVIDIA A100 40GB"
    architecture   compute capability, such as (8, 0); None on AMD
    total_bytes    what the driver reports to a process as the device's total
    context_bytes  what a process takes before its first tensor; None where it is not known
    source         field -> where its figure comes from, for each of the three that is not None
    """

    name: str
    title: str
    architecture: tuple[int, int] | None
    total_bytes: int
    context_bytes: int | None
    source: Mapping[str, str] = field(hash=False)


def gpu(name: str) -> Gpu:
    """The GPU with this name.

    Raises ValueError for a name that is not in GPUS; the message lists those that are.
    """
    if name in GPUS:
        return GPUS[name]
    wanted = name.lower()
    close = [known for known in GPUS if known.startswith(wanted)]
    close = close or get_close_matches(wanted, GPUS, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"a GPU must be one of {', '.join(GPUS)}; received {name!r}; {hint}".rstrip())


def cublas_workspace_bytes(architecture: tuple[int, int] | None) -> int:
    """Bytes of the workspace that torch gives cuBLAS, once per (thread's handle, stream).

    It lives in the caching allocator from the first matrix product of each thread on each stream
    to the end: forward's thread and autograd's have one each. 32 MiB on compute capability 9, 10
    and 12, 8,519,680 B (4096 KiB x 2 + 16 KiB x 8) on others, 128 MiB on AMD's MI300 class (None).
    torch before 2.12 gave 32 MiB to 9.0 alone.

    The environment overrides it: CUBLAS_WORKSPACE_CONFIG is ":SIZE:COUNT", repeated, SIZE in KiB,
    and the workspace is the sum of the products; ":4096:8", which deterministic algorithms ask for,
    is 32 MiB and ":16:8" 128 KiB. `torch.backends.cuda.cublas_workspace_size` overrides that.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize; Blackwell since
    pytorch PR #175344; two blocks of 8,519,680 B stand in published memory snapshots.
    """
    if architecture is None:
        return 128 * _MIB
    return 32 * _MIB if architecture[0] in (9, 10, 12) else 8_519_680


def cublaslt_workspace_bytes(architecture: tuple[int, int] | None) -> int:
    """Bytes that cuBLASLt takes beside cuBLAS's workspace, per (handle, stream): 0 on NVIDIA.

    Both use one workspace since pytorch PR #173002. TORCH_CUBLASLT_UNIFIED_WORKSPACE=0 brings back
    one of its own, 1 MiB, or CUBLASLT_WORKSPACE_SIZE in KiB; up to torch 2.6 each call allocated
    that much and freed it. On AMD (None) hipBLASLt has its own 76 MiB.

    Source: torch 2.13, torch/backends/cuda/__init__.py, blas_workspace_size;
    aten/src/ATen/cuda/CublasHandlePool.cpp, parseCUDABlasLtWorkspaceSize.
    """
    return 76 * _MIB if architecture is None else 0


def _gpu(
    name: str,
    title: str,
    architecture: tuple[int, int] | None,
    total_bytes: float,
    total_source: str,
    context: tuple[int, str] | None = None,
) -> Gpu:
    source = {"total_bytes": total_source}
    if architecture is not None:
        source["architecture"] = _CAPABILITY_SOURCE
    if context is not None:
        source["context_bytes"] = context[1]
    return Gpu(
        name=name,
        title=title,
        architecture=architecture,
        total_bytes=int(total_bytes),
        context_bytes=None if context is None else context[0],
        source=source,
    )


_XMEM = "gpu_total_bytes of the runs in github.com/Stone-ResearchLife/xMem"
_QUERIES = "deviceQuery recorded in github.com/thamada/nvidia-smi"
_OUT_OF_MEMORY = "torch's out-of-memory message in"
_PROPERTIES = "torch.cuda.get_device_properties in"

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            _gpu("rtx-3060-12gb", "NVIDIA GeForce RTX 3060 12GB", (8, 6), 12_622_168_064, _XMEM),
            _gpu(
                "rtx-3070",
                "NVIDIA GeForce RTX 3070 8GB",
                (8, 6),
                7.76 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/sshan-zhao/GASDA/issues/19",
            ),
            _gpu(
                "rtx-3080-10gb",
                "NVIDIA GeForce RTX 3080 10GB",
                (8, 6),
                9.78 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/zai-org/CogVideo/issues/34",
            ),
            _gpu(
                "rtx-3090",
                "NVIDIA GeForce RTX 3090 24GB",
                (8, 6),
                25_327_697_920,
                f"{_QUERIES}, gls/RTX3090_deviceQuery.py",
                (
                    256 * _MIB,
                    "torch 2.7.1+cu128, driver 610, github.com/invoke-ai/InvokeAI/issues/9413",
                ),
            ),
            _gpu("rtx-4060", "NVIDIA GeForce RTX 4060 8GB", (8, 9), 8_318_222_336, _XMEM),
            _gpu(
                "rtx-4060-ti-16gb",
                "NVIDIA GeForce RTX 4060 Ti 16GB",
                (8, 9),
                16_857_038_848,
                f"{_QUERIES}, package/RTX4060Ti_deviceQuery.py",
            ),
            _gpu(
                "rtx-4080",
                "NVIDIA GeForce RTX 4080 16GB",
                (8, 9),
                16_076 * _MIB,
                "cuMemGetInfo, driver 545, in github.com/ollama/ollama/issues/9245",
            ),
            _gpu(
                "rtx-4090",
                "NVIDIA GeForce RTX 4090 24GB",
                (8, 9),
                23.52 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/Soul-AILab/SoulX-FlashTalk/issues/5 (January 2026); "
                "25,386,352,640 B under a driver of CUDA 12.4, github.com/thamada/nvidia-smi",
            ),
            _gpu(
                "rtx-5090",
                "NVIDIA GeForce RTX 5090 32GB",
                (12, 0),
                33_677_180_928,
                "deviceQuery, driver 570.133, in "
                "github.com/aikitoria/open-gpu-kernel-modules/issues/1",
            ),
            _gpu(
                "rtx-6000-ada",
                "NVIDIA RTX 6000 Ada Generation 48GB",
                (8, 9),
                50_865_307_648,
                "mem_get_info in github.com/unslothai/unsloth-zoo/pull/1053; with ECC on 44.43 GiB,"
                " github.com/DINGYANB/MTVCrafter/issues/21",
                (
                    426 * _MIB,
                    "torch 2.10+cu130, nvidia-smi, in github.com/unslothai/unsloth-zoo/pull/1053",
                ),
            ),
            _gpu(
                "t4",
                "NVIDIA T4 16GB",
                (7, 5),
                14.75 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/hpcaitech/Open-Sora/issues/697",
            ),
            _gpu(
                "v100-16gb",
                "NVIDIA V100 16GB",
                (7, 0),
                15.78 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/kchengiva/Shift-GCN/issues/34",
            ),
            _gpu(
                "v100-32gb",
                "NVIDIA V100 32GB",
                (7, 0),
                31.74 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/liucongg/ChatGLM-Finetuning/issues/73",
            ),
            _gpu(
                "a10g",
                "NVIDIA A10G 24GB",
                (8, 6),
                22.0 * _GIB,
                "cuMemGetInfo to 0.1 GiB, driver of CUDA 12.2, in "
                "github.com/batteries-included/batteries-included/pull/1663",
            ),
            _gpu(
                "l4",
                "NVIDIA L4 24GB",
                (8, 9),
                23_583_784_960,
                "deviceQuery, driver of CUDA 12.2, in "
                "github.com/bottlerocket-os/bottlerocket-kernel-kit/pull/139",
            ),
            _gpu(
                "l40s",
                "NVIDIA L40S 48GB",
                (8, 9),
                47_803_596_800,
                f"{_QUERIES}, nvsim/L40S_deviceQuery.py (ECC on)",
            ),
            _gpu(
                "a40",
                "NVIDIA A40 48GB",
                (8, 6),
                47_608_692_736,
                f"{_QUERIES}, nvsim/A40x10_deviceQuery.py (ECC on)",
            ),
            _gpu(
                "a100-40gb",
                "NVIDIA A100 40GB",
                (8, 0),
                42_298_834_944,
                "deviceQuery, SXM4, driver of CUDA 12.2, in "
                "github.com/bottlerocket-os/bottlerocket/pull/3873",
            ),
            _gpu(
                "a100-80gb",
                "NVIDIA A100 80GB",
                (8, 0),
                85_100_068_864,
                f"{_QUERIES}, gls/A100SXMx4_deviceQuery.py (SXM4)",
            ),
            _gpu(
                "h100-80gb",
                "NVIDIA H100 80GB",
                (9, 0),
                79.11 * _GIB,
                f"{_OUT_OF_MEMORY} github.com/vllm-project/vllm/issues/751; 85,045,477,376 B (SXM5,"
                " driver of CUDA 12.7), github.com/thamada/nvidia-smi",
            ),
            _gpu(
                "h200",
                "NVIDIA H200 141GB",
                (9, 0),
                143_156 * _MIB,
                f"{_PROPERTIES} github.com/ai-bot-pro/achatbot, "
                "deploy/modal/src/llm/vllm/vlm/skywork_r1v.py at 859e216",
            ),
            _gpu(
                "b200",
                "NVIDIA B200 180GB",
                (10, 0),
                178.35 * _GIB,
                "cudaDeviceProp.totalGlobalMem in github.com/pytorch/ao/pull/4002",
            ),
            _gpu(
                "mi300x",
                "AMD Instinct MI300X 192GB",
                None,
                196_592 * _MIB,
                f"{_PROPERTIES} github.com/pytorch/ao/pull/2853",
            ),
        )
    }
)
