"""What CUDA does otherwise than the CPU, seen from the operators that run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpmem_profiling.cuda_semantics import Architecture, cuda_semantics


class Operators(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@contextmanager
def on_cuda(architecture: Architecture | None = (8, 6)) -> Iterator[Operators]:
    with cuda_semantics(architecture), FakeTensorMode(), Operators() as operators:
        yield operators


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the storages that `run` saves for backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_dropout_saves_one_byte_an_element() -> None:
    with on_cuda() as operators:
        x = torch.empty(8, 16, requires_grad=True)
        assert saved_bytes(lambda: F.dropout(x, 0.1)) == 8 * 16
        assert "native_dropout" in operators.names
        assert F.dropout(x, 0.1, training=False) is not None
        assert saved_bytes(lambda: F.dropout(x, 0.0)) == 0
        # Everything dropped is a product with a zero.
        F.dropout(x, 1.0).sum().backward()
    x = torch.ones(8, 16, requires_grad=True)
    # The CPU keeps the mask in the tensor's own type.
    assert saved_bytes(lambda: F.dropout(x, 0.1)) >= 4 * 8 * 16


FLASH, EFFICIENT, MATH = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_attention_math",
)


@pytest.mark.parametrize(
    ("architecture", "dtype", "width", "masked", "kernel"),
    [
        ((8, 6), torch.float32, 64, False, EFFICIENT),
        ((8, 6), torch.float32, 64, True, EFFICIENT),
        ((8, 6), torch.float32, 66, False, MATH),
        ((8, 6), torch.bfloat16, 64, False, FLASH),
        ((8, 6), torch.bfloat16, 60, False, FLASH),
        ((8, 6), torch.bfloat16, 264, False, EFFICIENT),
        ((8, 6), torch.bfloat16, 64, True, EFFICIENT),
        ((7, 5), torch.float16, 64, False, EFFICIENT),
        ((7, 0), torch.bfloat16, 64, False, MATH),
        (None, torch.bfloat16, 64, False, FLASH),
    ],
)
def test_attention_takes_the_kernel_that_cuda_takes(
    architecture: Architecture | None, dtype: torch.dtype, width: int, masked: bool, kernel: str
) -> None:
    with on_cuda(architecture) as operators:
        query, key, value = (
            torch.empty(2, 3, 20, width, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        mask = torch.empty(2, 1, 20, 20, dtype=torch.bool) if masked else None
        result = F.scaled_dot_product_attention(query, key, value, mask)
        result.sum().backward()
        assert result.shape == query.shape
        assert query.grad is not None
        assert query.grad.shape == query.shape
    ran = {FLASH, EFFICIENT} & set(operators.names)
    assert ran == ({kernel} - {MATH})


HEADS = (2, 4, 20, 64)


@pytest.mark.parametrize(
    ("dtype", "query", "key", "settings", "kernel"),
    [
        (torch.bfloat16, HEADS, HEADS, {"is_causal": True}, FLASH),
        # FlashAttention 2 begins a causal mask at the other corner.
        (torch.bfloat16, HEADS, (2, 4, 30, 64), {"is_causal": True}, EFFICIENT),
        (torch.bfloat16, HEADS, (2, 4, 30, 64), {}, FLASH),
        (torch.bfloat16, HEADS, (2, 2, 20, 64), {"enable_gqa": True}, FLASH),
        (torch.float32, HEADS, (2, 2, 20, 64), {"enable_gqa": True}, MATH),
        (torch.float32, HEADS, HEADS, {"enable_gqa": True}, EFFICIENT),
        # Only the math kernel broadcasts.
        (torch.bfloat16, HEADS, (2, 1, 20, 64), {}, MATH),
        (torch.float32, HEADS, (2, 1, 20, 64), {}, MATH),
        (torch.bfloat16, HEADS, (1, 4, 20, 64), {}, MATH),
    ],
)
def test_attention_between_different_shapes(
    dtype: torch.dtype,
    query: tuple[int, ...],
    key: tuple[int, ...],
    settings: dict[str, bool],
    kernel: str,
) -> None:
    with on_cuda() as operators:
        of, to = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in (query, key))
        F.scaled_dot_product_attention(of, to, to, **settings).sum().backward()  # type: ignore[arg-type]
    assert {FLASH, EFFICIENT} & set(operators.names) == {kernel} - {MATH}


def test_attention_over_columns_is_maths() -> None:
    with on_cuda() as operators:
        across = torch.empty(2, 4, 64, 20, dtype=torch.bfloat16).transpose(-1, -2)
        F.scaled_dot_product_attention(across, across, across)
    assert not {FLASH, EFFICIENT} & set(operators.names)


def test_attention_inside_of_a_module_is_translated_too() -> None:
    with on_cuda() as operators:
        attention = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True)
        x = torch.empty(2, 10, 64)
        attention(x, x, x, need_weights=False)[0].sum().backward()
    assert EFFICIENT in operators.names
    assert EFFICIENT + "_backward" in operators.names


def test_autocast_follows_cudas_lists() -> None:
    with on_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.empty(4, 8, 16, requires_grad=True)
        half = F.linear(x, torch.empty(16, 16, requires_grad=True))
        assert half.dtype == torch.bfloat16
        for widened in (
            torch.softmax(half, -1),
            F.layer_norm(half, (16,)),
            half.sum(),
            half.pow(2),
            F.nll_loss(F.log_softmax(half.flatten(0, 1), -1), torch.zeros(32, dtype=torch.long)),
        ):
            assert widened.dtype == torch.float32
        assert torch.softmax(half, -1, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert F.gelu(half).dtype == torch.bfloat16
        # On the CPU's list alone.
        assert F.max_pool3d(half.unsqueeze(0), 2).dtype == torch.bfloat16
        assert torch.addcmul(x, half, half).dtype == torch.float32
        assert torch.mv(x[0], torch.empty(16)).dtype == torch.bfloat16


def test_autocast_without_a_type_is_cudas_half() -> None:
    with on_cuda(), torch.autocast("cuda"):
        assert (torch.empty(2, 2) @ torch.empty(2, 2)).dtype == torch.float16


def test_optimizers_take_the_foreach_path() -> None:
    with on_cuda() as operators:
        layer = nn.Linear(4, 4)
        layer(torch.empty(2, 4)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
    assert "_foreach_lerp_" in operators.names


def test_the_rules_end_with_the_block() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), on_cuda():
        raise RuntimeError("on purpose")
    x = torch.ones(4, 16, requires_grad=True)
    with Operators() as operators, torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.softmax(x.bfloat16(), -1).dtype == torch.bfloat16
        F.dropout(x, 0.5)
        torch.optim.SGD([x], lr=0.1).step()
    assert "native_dropout" not in operators.names
    assert not any("foreach" in name for name in operators.names)
