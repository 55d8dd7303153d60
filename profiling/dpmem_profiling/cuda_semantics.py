"""What CUDA would do where the CPU does something else, for tensors that hold no data.

Fake *cuda* tensors need a CUDA build of torch, so a step is traced on fake CPU tensors. Inside
`cuda_semantics()` the operators that choose an algorithm by device choose CUDA's:

- dropout is one kernel that saves a bool mask (aten/src/ATen/native/Dropout.cpp)
- attention takes the flash, memory-efficient or math kernel by CUDA's rules
  (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)
- autocast follows CUDA's lists of operators (aten/src/ATen/autocast_mode.h), also where the code
  says torch.autocast("cuda"), which without CUDA would disable itself
- optimizers take their foreach path by default, and may be capturable (torch/optim/optimizer.py)
- what autograd saves under save_on_cpu is on the host (torch/autograd/graph.py)

The rules are registered with torch's dispatcher for the length of the block, for every thread.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

Architecture = tuple[int, int]

_aten = torch.ops.aten
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

# aten/src/ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP: those that the CPU's list lacks. The
# composite ones among these reach an operator that both lists have.
_LOWER_PRECISION = "addmv addr mv prelu"
# AT_FORALL_FP32 and AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE.
_FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm
    frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa norm.Scalar norm.ScalarOpt_dim
"""
# AT_FORALL_FP32_SET_OPT_DTYPE: a dtype that the caller gives stands.
_FLOAT32_BY_DEFAULT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
# AT_FORALL_PROMOTE: the widest of the arguments' types.
_PROMOTED = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
"""


@contextmanager
def cuda_semantics(architecture: Architecture | None) -> Iterator[None]:
    """Let fake CPU tensors go CUDA's ways inside the block.

    architecture   compute capability, as (8, 6); None for a GPU that has none (AMD), which is
                   taken to have the attention kernels of a recent NVIDIA one
    """
    with ExitStack() as undo:
        library = torch.library.Library("aten", "IMPL")
        undo.callback(library._destroy)
        with warnings.catch_warnings():
            # Some of the CPU's own rules are overridden: that is the point.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            library.impl("dropout", _dropout, "AutogradCPU")
            library.impl("scaled_dot_product_attention", _attention(architecture), "AutogradCPU")
            _register_autocast(library)
        undo.enter_context(_autocast_cuda_as_cpu())
        undo.enter_context(_optimizers_as_on_cuda())
        undo.enter_context(_saved_on_the_host())
        yield


@contextmanager
def _saved_on_the_host() -> Iterator[None]:
    """torch.autograd.graph.save_on_cpu takes what it saves off the device, and brings it back.

    On the device "meta", what is saved is not counted.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        return tensor.device, torch.empty_like(tensor, device="meta")

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return torch.empty_like(tensor, device=device)

    def init(hooks: Any, pin_memory: bool = False, device_type: str = "cuda") -> None:
        torch.autograd.graph.saved_tensors_hooks.__init__(hooks, pack, unpack)

    with mock.patch.object(torch.autograd.graph.save_on_cpu, "__init__", init):
        yield


@contextmanager
def _optimizers_as_on_cuda() -> Iterator[None]:
    # torch.optim deletes the modules' names from its own.
    optimizers = import_module("torch.optim.optimizer")
    foreach, capturable = (
        f"_get_{what}_supported_devices" for what in ("foreach_kernels", "capturable")
    )
    devices = [*getattr(optimizers, foreach)(), "cpu"]
    types = [*optimizers._foreach_supported_types, FakeTensor]
    # Each optimizer's module has imported the second by name.
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("torch.optim.") and hasattr(module, capturable)
    ]
    with ExitStack() as undo:
        undo.enter_context(mock.patch.object(optimizers, foreach, return_value=devices))
        undo.enter_context(mock.patch.object(optimizers, "_foreach_supported_types", types))
        for module in modules:
            undo.enter_context(mock.patch.object(module, capturable, return_value=devices))
        yield


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    if p == 0 or not train or tensor.numel() == 0:
        return tensor
    if p == 1:
        return tensor * torch.zeros((), dtype=tensor.dtype)
    return torch.native_dropout(tensor, p, train)[0]


def _attention(architecture: Architecture | None) -> Callable[..., Tensor]:
    capability = (9, 0) if architecture is None else architecture

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # attention.cpp, convert_boolean_attn_mask.
            additive = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = additive.masked_fill_(attn_mask.logical_not(), float("-inf"))
        width = query.shape[-1]
        fused = _fits_together(query, key, value, enable_gqa)
        if fused and _flash_takes(query, key, value, attn_mask, is_causal, capability):
            pad = -width % 8
            if pad:
                query, key, value = (
                    torch.nn.functional.pad(part, (0, pad)) for part in (query, key, value)
                )
            result = _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False,
                scale=width**-0.5 if scale is None else scale,
            )[0]  # fmt: skip
            return result[..., :width]
        if fused and _efficient_takes(query, key, value, capability):
            saves = torch.is_grad_enabled() and any(
                part.requires_grad for part in (query, key, value)
            )
            if attn_mask is not None:
                attn_mask = _aligned(attn_mask).expand(*query.shape[:-1], key.shape[-2])
            return _aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, saves, dropout_p, is_causal, scale=scale
            )[0]
        return _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )[0]  # fmt: skip

    return attention


def _flash_takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    capability: Architecture,
) -> bool:
    """sdp_utils.cpp, can_use_flash_attention: half precision from Ampere on, and no mask."""
    width = query.shape[-1]
    return (
        capability >= (8, 0)
        and mask is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == key.shape[-1] == value.shape[-1]
        and width <= 256
        and (not is_causal or query.shape[-2] == key.shape[-2])
        and (width == 1 or all(part.stride(-1) == 1 for part in (query, key, value)))
        and _kernel_enabled("flash")
    )


def _efficient_takes(query: Tensor, key: Tensor, value: Tensor, capability: Architecture) -> bool:
    """sdp_utils.cpp, can_use_mem_efficient_attention and check_head_dim_size_mem_efficient."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if not (half or query.dtype == torch.float32) or query.shape[-1] != key.shape[-1]:
        return False
    if query.dtype == torch.bfloat16 and capability < (8, 0):
        return False
    # minimum_gemm_alignment: 128-bit accesses where tensor cores are used.
    alignment = 4 if capability >= (8, 0) else 1
    if capability >= (8, 0) or (half and capability >= (7, 0)):
        alignment = max(alignment, 8 if half else 4)
    return (
        query.shape[-3] == key.shape[-3]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
        and all(part.stride(-1) == 1 for part in (query, key, value))
        and _kernel_enabled("mem_efficient")
    )


def _fits_together(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """sdp_utils_cpp.h: what kernels other than math ask of shapes and types."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    heads, groups = query.shape[1], key.shape[1]
    return (
        query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[2] * key.shape[2] > 0
        and groups == value.shape[1]
        and (heads % groups == 0 if enable_gqa else heads == groups)
    )


def _kernel_enabled(name: str) -> bool:
    return bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


def _aligned(mask: Tensor) -> Tensor:
    """attention.cpp, pad_bias: a last dimension that is not a multiple of 16 is copied wider."""
    n_keys = mask.shape[-1]
    if n_keys % 16 == 0 or mask.shape[-1] == 1:
        return mask
    return torch.nn.functional.pad(mask, (0, -n_keys % 16))[..., :n_keys]


def _register_autocast(library: torch.library.Library) -> None:
    """CUDA's lists in place of the CPU's, under the CPU's key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, "AutocastCPU") and not has(name, "AutocastCUDA"):
            library.impl(
                name.removeprefix("aten::"), torch.library.fallthrough_kernel, "AutocastCPU"
            )
    for policy, listed in (
        (_to_autocast_dtype, _LOWER_PRECISION.split()),
        (_to_float32, _FLOAT32.split()),
        (_to_float32_by_default, _FLOAT32_BY_DEFAULT.split()),
        (_to_widest, _PROMOTED.split()),
    ):
        for name in listed:
            if torch._C._dispatch_has_kernel(f"aten::{name}"):
                library.impl(name, _cast(name, policy), "AutocastCPU")


def _cast(name: str, policy: Callable[..., torch.dtype | None]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(_aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = policy(args, kwargs)
        if dtype is not None:
            args, kwargs = tree_map_only(
                Tensor,
                lambda tensor: tensor.to(dtype) if _eligible(tensor) else tensor,
                (args, kwargs),
            )
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*args, **kwargs)

    return kernel


def _eligible(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _to_autocast_dtype(args: Any, kwargs: Any) -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _to_float32(args: Any, kwargs: Any) -> torch.dtype:
    return torch.float32


def _to_float32_by_default(args: Any, kwargs: Any) -> torch.dtype | None:
    return torch.float32 if kwargs.get("dtype") is None else None


def _to_widest(args: Any, kwargs: Any) -> torch.dtype | None:
    dtypes: list[torch.dtype] = []
    tree_map_only(
        Tensor,
        lambda tensor: dtypes.append(tensor.dtype) if _eligible(tensor) else None,
        (args, kwargs),
    )
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest


@contextmanager
def _autocast_cuda_as_cpu() -> Iterator[None]:
    """torch.autocast("cuda") acts on CPU tensors, with CUDA's default type."""
    original = torch.autocast.__init__

    def init(
        self: torch.autocast,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == "cuda":
            device_type = "cpu"
            dtype = torch.get_autocast_dtype("cuda") if dtype is None else dtype
        original(self, device_type, dtype, enabled, cache_enabled)

    with mock.patch.object(torch.autocast, "__init__", init):
        yield
