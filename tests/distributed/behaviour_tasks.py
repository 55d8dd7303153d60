"""Models and training loops that data-parallel wrappers have got wrong; ranks' side.

The oracle is arithmetic: each rank computes every rank's own gradients on a copy of the model, and
their average.
"""

import copy
import pickle
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toys import Layers, are_equal_across_ranks, averaged, differing, input_of

import dpmem
from dpmem.ddp_rule import by_rule
from dpmem_profiling import measure


class Kinds(nn.Module):
    """Parameters of every kind of number, shape and size, two of them in one storage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        storage = torch.randn(12)
        self.first = nn.Parameter(storage[:6])
        self.second = nn.Parameter(storage[6:])
        self.wide = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.pairs = nn.Parameter(torch.randn(6, 2, dtype=torch.complex64).T)
        self.brain = nn.Parameter(torch.randn(6).bfloat16())
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        complex_part = (x.to(torch.complex64) @ self.pairs.T).abs().sum()
        return (
            (x * self.first * self.second).sum() * self.scalar
            + (x.double() * self.wide).square().sum()
            + (x.bfloat16() * self.brain).float().sum()
            + complex_part.double()
            + self.empty.sum()
        )


def kinds_of_parameters(rank: int, bucket_cap_mb: float) -> list[str]:
    def loss(model: nn.Module, rank: int) -> Tensor:
        return model(input_of(rank))

    model = Kinds()
    wrapped = dpmem.DataParallel(model, bucket_cap_mb=bucket_cap_mb)
    different = []
    for step in range(3):
        expected = averaged(model, loss)
        loss(wrapped, rank).backward()
        different += [f"step {step}: {name}" for name in differing(model, expected)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        wrapped.zero_grad()
    return different


def sparse_gradients(rank: int) -> list[str]:
    """An embedding with sparse gradients, absent on rank 1 in the second step."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.embed = nn.Embedding(12, 3, sparse=True)
            self.out = nn.Linear(3, 1)

        def forward(self, x: Tensor, use: bool) -> Tensor:
            hidden = self.embed(x).sum(0) if use else torch.ones(3)
            return self.out(hidden).square().sum()

    model = Net()
    wrapped = dpmem.DataParallel(model, find_unused_parameters=True)
    different = []
    for step in range(2):

        def loss(model: nn.Module, rank: int, step: int = step) -> Tensor:
            return model(torch.tensor([rank, 3, 3, 7 * rank]), step == 0 or rank == 0)

        expected = averaged(model, loss)
        loss(wrapped, rank).backward()
        different += differing(model, expected)
        assert model.embed.weight.grad.is_sparse
        wrapped.zero_grad()
    return different


def frozen_and_unfrozen(rank: int) -> tuple[list[str], list[int]]:
    """Layers frozen and unfrozen between steps; and how many elements traveled in each."""
    model = Layers()
    wrapped = dpmem.DataParallel(model)
    different, sizes = [], []
    for trainable in ("abc", "c", "ac", "abc"):
        for name, layer in model.layers.items():
            layer.requires_grad_(name in trainable)
        expected = averaged(model, lambda model, rank: model(input_of(rank)).square().sum())
        wrapped(input_of(rank)).square().sum().backward()
        different += [f"{trainable}: {name}" for name in differing(model, expected)]
        sizes.append(sum(bucket.numel for bucket in wrapped._gradients.plan.buckets))
        wrapped.zero_grad()
    return different, sizes


def gradients_in_a_bucket(rank: int, bucket_cap_mb: float) -> list[int]:
    wrapped = dpmem.DataParallel(Layers(), bucket_cap_mb=bucket_cap_mb)
    return [len(bucket.slots) for bucket in wrapped._gradients.plan.buckets]


def frozen_with_a_gradient(rank: int) -> tuple[float, float]:
    """(norm clipping saw, norm of all that the optimizer updates with) where a gradient is kept."""
    model = Layers()
    wrapped, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.0), max_grad_norm=1e-3
    )
    wrapped(input_of(rank)).square().sum().backward()
    model.layers["a"].requires_grad_(False)
    wrapped(input_of(rank)).square().sum().backward()
    before = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    optimizer.step()
    after = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert abs(float(after) / 1e-3 - 1) < 1e-4
    return float(wrapped.grad_norm), float(before)


def converted_after_wrapping(rank: int) -> list[str]:
    model = Layers()
    wrapped = dpmem.DataParallel(model)
    different = []
    for dtype in (torch.bfloat16, torch.float32):
        wrapped.to(dtype)
        x = [input_of(other).to(dtype) for other in range(dist.get_world_size())]
        expected = averaged(model, lambda model, rank, x=x: model(x[rank]).sum())
        wrapped(x[rank]).sum().backward()
        different += [
            f"{dtype}: {name}"
            for (name, p), want in zip(model.named_parameters(), expected, strict=True)
            if p.grad.dtype != dtype or not torch.allclose(p.grad, want, rtol=2**-6)
        ]
        wrapped.zero_grad()
    return different


def used_only_under_no_sync(rank: int) -> list[str]:
    """pytorch/pytorch#69031: layer b has a gradient from no_sync alone."""
    model = Layers()
    wrapped = dpmem.DataParallel(model, find_unused_parameters=True)

    def loss(model: nn.Module, rank: int) -> Tensor:
        return model(input_of(rank), "abc").sum() + model(input_of(rank + 7), "ac").sum()

    expected = averaged(model, loss)
    with wrapped.no_sync():
        wrapped(input_of(rank), "abc").sum().backward()
    wrapped(input_of(rank + 7), "ac").sum().backward()
    return differing(model, expected)


def unused_differently(rank: int, static_graph: bool) -> list[str]:
    """Layer b on rank 0 alone, layer c on no rank: gradients of b on both, of c on none."""
    model = Layers()
    wrapped = dpmem.DataParallel(
        model, find_unused_parameters=not static_graph, static_graph=static_graph
    )
    different = []
    for _ in range(3):

        def loss(model: nn.Module, rank: int) -> Tensor:
            return model(input_of(rank), "ab" if rank == 0 else "a").square().sum()

        expected = averaged(model, loss)
        loss(wrapped, rank).backward()
        different += differing(model, expected)
        wrapped.zero_grad()
    return different


def changed_static_graph(rank: int) -> str | None:
    wrapped = dpmem.DataParallel(Layers(), static_graph=True)
    wrapped(input_of(rank), "ab").sum().backward()
    wrapped(input_of(rank), "a").sum().backward()
    try:
        wrapped(input_of(rank), "ab")
    except RuntimeError as error:
        return str(error)
    return None


def reentrant_twice(rank: int) -> list[str]:
    """One module in two reentrant checkpoints: its gradients are accumulated twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Layers()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.net, x, use_reentrant=True)
            return x

    model = Twice()
    wrapped = dpmem.DataParallel(model, static_graph=True, bucket_cap_mb=0.0001)
    different = []
    for _ in range(3):

        def loss(model: nn.Module, rank: int) -> Tensor:
            return model(input_of(rank).requires_grad_()).square().sum()

        expected = averaged(model, loss)
        loss(wrapped, rank).backward()
        different += differing(model, expected)
        wrapped.zero_grad()
    return different


def gradients_of_their_own(rank: int) -> tuple[list[str], bool, int]:
    """gradient_as_bucket_view=False: what somebody holds is not overwritten; no bucket is kept."""
    model = Layers()
    wrapped = dpmem.DataParallel(model, gradient_as_bucket_view=False)

    def loss(model: nn.Module, rank: int) -> Tensor:
        return model(input_of(rank)).square().sum()

    expected = averaged(model, loss)
    loss(wrapped, rank).backward()
    different = differing(model, expected)
    held = model.layers["a"].weight.grad
    before = held.clone()
    wrapped.zero_grad()
    loss(wrapped, rank + 1).backward()
    return different, torch.equal(held, before), len(wrapped.owned_tensors()["bucket"])


def copies_train(rank: int, how: str) -> list[str]:
    """A copied or pickled wrapper averages, and does not touch the original."""
    model = Layers()
    wrapped, _ = dpmem.wrap(model, activations="lossless")
    again = copy.deepcopy(wrapped) if how == "copy" else pickle.loads(pickle.dumps(wrapped))
    expected = averaged(model, lambda model, rank: model(input_of(rank)).square().sum())
    again(input_of(rank)).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert again._store is not None
    assert list(again.state_dict()) == list(model.state_dict())
    return differing(again.module, expected)


def one_dimension_of_a_mesh(rank: int) -> list[float]:
    """Four ranks as 2 x 2: gradients are averaged along one dimension of the mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    results = []
    for name in ("outer", "inner"):
        model = nn.Linear(1, 1, bias=False)
        wrapped = dpmem.DataParallel(model, device_mesh=mesh[name])
        wrapped(torch.full((1, 1), float(rank))).backward()
        results.append(model.weight.grad.item())
    return results


def graph_of_gradients(rank: int) -> tuple[list[str], str, bool]:
    """A penalty on gradients through autograd.grad; and backward(create_graph=True)'s warning."""
    model = Layers()
    wrapped = dpmem.DataParallel(model)

    def loss(model: nn.Module, rank: int) -> Tensor:
        value = model(input_of(rank)).square().sum()
        gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value + sum(gradient.square().sum() for gradient in gradients)

    expected = averaged(model, loss)
    loss(wrapped, rank).backward()
    different = differing(model, expected)
    wrapped.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped(input_of(rank)).square().sum().backward(create_graph=True)
    said = [str(w.message) for w in caught if "no .grad has a graph" in str(w.message)]
    return different, said[0], any(p.grad.requires_grad for p in model.parameters())


def agreed_order(rank: int) -> tuple[list[str], list[int], list[int]]:
    """Layers used in another order than registered; the plan before and after the first step."""
    model = Layers()
    wrapped = dpmem.DataParallel(model, bucket_cap_mb_list=[0.0001])
    orders, different = [], []
    for _ in range(3):

        def loss(model: nn.Module, rank: int) -> Tensor:
            return model(input_of(rank), "cab" if rank == 0 else "bca").square().sum()

        expected = averaged(model, loss)
        loss(wrapped, rank).backward()
        different += differing(model, expected)
        slots = [slot.parameter for b in wrapped._gradients.plan.buckets for slot in b.slots]
        orders.append(slots)
        wrapped.zero_grad()
    return different, orders[0], orders[-1]


def uneven_inputs(rank: int, even: bool) -> tuple[list[float], bool]:
    """Rank r has r + 2 inputs of value 1; the gradients it sees, and whether models end equal."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False).eval())
    wrapped = dpmem.DataParallel(model)
    seen = []
    with wrapped.join(divide_by_initial_world_size=not even):
        for step in range(2 * (rank + 2)):
            x = torch.ones(1, 1)
            if step % 2 == 0:
                with wrapped.no_sync():
                    wrapped(x).sum().backward()
            else:
                wrapped(x).sum().backward()
                seen.append(round(model[0].weight.grad.item(), 4))
                with torch.no_grad():
                    model[0].weight -= 0.1 * model[0].weight.grad
                wrapped.zero_grad()
    return seen, are_equal_across_ranks([*model.parameters(), *model.buffers()])


def compiled(rank: int, which: str) -> list[str]:
    """torch.compile inside the wrapper, or around it."""
    # Of torch.compile's own looking at arguments.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    model = Layers()
    wrapped: nn.Module
    if which == "inside":
        wrapped = dpmem.DataParallel(torch.compile(model, backend="aot_eager"))
    else:
        wrapped = torch.compile(dpmem.DataParallel(model), backend="aot_eager")
    different = []
    for step in range(3):
        inputs = {other: input_of(other + step) for other in range(dist.get_world_size())}
        expected = averaged(
            model, lambda model, rank, inputs=inputs: model(inputs[rank]).square().sum()
        )
        wrapped(inputs[rank]).square().sum().backward()
        different += differing(model, expected)
        model.zero_grad()
    return different


def two_forwards_in_evaluation(rank: int) -> list[str]:
    """Batch norm saves its running statistics; a second forward broadcasts them again."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    wrapped = dpmem.DataParallel(model)

    def loss(model: nn.Module, rank: int) -> Tensor:
        return model(input_of(rank)).square().sum() + model(input_of(rank + 5)).square().sum()

    expected = averaged(model, loss)
    loss(wrapped, rank).backward()
    return differing(model, expected)


def replicas_are_checked(rank: int, change: str) -> str | None:
    """What `check_replicas` says after rank 1 changed one tensor; None: nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5, dtype=torch.bfloat16), nn.BatchNorm1d(5), nn.Linear(4, 2, bias=False)
    )
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_parameter("waves", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    ours = dpmem.DataParallel(model)
    with torch.no_grad():
        weight = model[2].weight
        if rank == 1:
            if change == "one bit":
                weight.view(torch.int32)[1, 2] ^= 1
            elif change == "places":
                weight[0] = weight[0].flip(0)
            elif change == "a sign of zero":
                model[1].bias[4] = -0.0
            elif change == "a flag":
                model.flags[1] = True
            elif change == "a phase":
                model.waves.conj_physical_()
    try:
        ours.check_replicas()
    except RuntimeError as error:
        return str(error)
    return None


def ddp_by_rule(rank: int, options: dict[str, Any], warmup_steps: int) -> tuple[Any, Any]:
    """Peaks of a step with the real DistributedDataParallel and with the rule, by phase."""

    def model() -> nn.Module:
        layers = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 333), nn.Linear(333, 8)]
        return nn.Sequential(*layers)

    job = dpmem.Job(
        model=model,
        batch=lambda n: torch.randn(n, 64),
        loss=lambda model, x: model(x).square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        wrap=lambda model, optimizer: (DistributedDataParallel(model, **options), optimizer),
    )

    def peaks() -> tuple[int, dict[str, int]]:
        record = measure(job, 4, device="cpu", warmup_steps=warmup_steps)
        return record.peak_allocated_bytes, record.peak_by_phase

    real = peaks()
    with by_rule():
        return real, peaks()
