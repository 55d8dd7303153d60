"""A traced step against the same step measured, and against what CUDA is known to do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from residual_job import GPU, RESIDUAL, WIDTH, Residual, last_step_peak_bytes, mean_square
from torch import Tensor, nn
from torch.nn import functional as F

from dpmem_profiling import Job, StepContext, measure
from dpmem_profiling.trace import between, trace


@pytest.mark.parametrize("zero_grad", ["start", "before_backward", "end"])
@pytest.mark.parametrize("n", [5, 64])
def test_a_traced_step_takes_what_a_real_one_takes(n: int, zero_grad: Any) -> None:
    job = replace(RESIDUAL, zero_grad=zero_grad)
    record = measure(job, n, device="cpu")
    traced = trace(job, n, GPU)
    assert last_step_peak_bytes(traced) == record.peak_allocated_bytes
    held: dict[str, int] = {}
    for change in traced.changes:
        if change.storage is not None:
            category = traced.categories[change.storage]
            held[category] = held.get(category, 0) + change.delta_bytes
    del held["workspace"]
    assert {name: size for name, size in held.items() if size} == record.persistent_bytes


class Averaged(nn.Module):
    """A layer cloned twice, as nn.TransformerEncoder clones its layers, and an average of both."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.Sequential(*(deepcopy(layer) for _ in range(2)))
        self.average = deepcopy(self.layers).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x) - self.average(x)
        return result


def penalized(model: nn.Module, batch: Tensor) -> Tensor:
    """A gradient penalty, which the bias of a normalization has no part in."""
    batch.requires_grad_()
    (slope,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
    return slope.square().sum()


@pytest.mark.parametrize(
    "job",
    [
        replace(RESIDUAL, model=Averaged),
        replace(
            RESIDUAL, model=lambda: nn.Sequential(Residual(), nn.LayerNorm(WIDTH)), loss=penalized
        ),
    ],
    ids=["deep copies", "gradient penalty"],
)
def test_no_kind_of_step_takes_another_size_than_a_real_one(job: Job) -> None:
    real = measure(job, 16, device="cpu").peak_allocated_bytes
    assert last_step_peak_bytes(trace(job, 16, GPU)) == real


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True)

    def forward(self, index: Tensor) -> Tensor:
        result: Tensor = self.table(index) * self.table(index + ROWS // 2)
        return result


ROWS = 1000


def different_rows(n: int) -> Tensor:
    return torch.arange(8 * n).view(n, 8)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.SparseAdam(list(p)),
    ],
    ids=["SGD", "Adagrad", "SparseAdam"],
)
@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Embedding(ROWS, WIDTH, sparse=True),
        lambda: nn.EmbeddingBag(ROWS, WIDTH, sparse=True, mode="sum"),
        Twice,
    ],
    ids=["embedding", "bag", "twice"],
)
def test_sparse_gradients_have_the_elements_of_real_ones(
    model: Callable[[], nn.Module], optimizer: Any
) -> None:
    job = replace(RESIDUAL, model=model, batch=different_rows, optimizer=optimizer)
    traced = trace(job, 32, None)
    assert last_step_peak_bytes(traced) == measure(job, 32, device="cpu").peak_allocated_bytes
    assert not traced.notes


def with_gradient(use: Callable[[Tensor], Any]) -> Job:
    """A step that uses the sparse gradient of an embedding once, while it is there."""

    def step(context: StepContext) -> None:
        context.model(context.batch).square().mean().backward()
        gradient = context.model.weight.grad
        assert isinstance(gradient, Tensor)
        used = use(gradient)
        # Outweighs what else there was.
        torch.empty(10**6, dtype=torch.uint8)
        del used
        context.model.zero_grad()

    return Job(lambda: nn.Embedding(ROWS, WIDTH, sparse=True), different_rows, step=step)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "use",
    [
        Tensor.half,
        Tensor.double,
        torch.zeros_like,
        torch.empty_like,
        lambda gradient: gradient.new_zeros(gradient.shape),
        lambda gradient: gradient.double() + gradient.double(),
    ],
    ids=["half", "double", "zeros_like", "empty_like", "new_zeros", "sum of doubles"],
)
def test_what_is_made_of_sparse_gradients_is_of_its_own_size(use: Callable[[Tensor], Any]) -> None:
    job = with_gradient(use)
    traced = trace(job, 32, None)
    assert last_step_peak_bytes(traced) == measure(job, 32, device="cpu").peak_allocated_bytes
    assert not traced.notes


def test_a_sparse_tensor_has_the_type_that_was_asked_for() -> None:
    def use(gradient: Tensor) -> None:
        assert gradient.half().dtype is torch.float16
        assert (gradient + gradient.double()).dtype is torch.float64

    trace(with_gradient(use), 4, GPU)


@pytest.mark.parametrize(
    "use",
    [
        lambda gradient: torch.sparse.sum(gradient, dim=1),
        lambda gradient: gradient.unsqueeze(0),
        lambda gradient: gradient.unsqueeze(2),
        lambda gradient: gradient.index_select(1, torch.arange(5)),
        lambda gradient: gradient.index_select(0, torch.arange(5)),
        lambda gradient: gradient.index_select(0, torch.zeros(ROWS, dtype=torch.long)),
    ],
    ids=["sum", "unsqueeze", "unsqueeze last", "columns", "rows", "as many rows"],
)
def test_the_elements_of_other_dimensions_are_said_to_be_unknown(
    use: Callable[[Tensor], Any],
) -> None:
    assert "unknown: how many elements" in " ".join(trace(with_gradient(use), 4, GPU).notes)


def test_the_elements_of_a_sparse_sum_in_place_are_said_to_be_unknown() -> None:
    def step(context: StepContext) -> None:
        for part in context.batch.chunk(2):
            context.model(part).square().mean().backward()
        context.model.zero_grad()

    job = Job(lambda: nn.Embedding(ROWS, WIDTH, sparse=True), different_rows, step=step)
    assert "unknown: how many elements" in " ".join(trace(job, 4, GPU).notes)


def test_on_the_cpu_the_cpus_own_kernels_are_traced() -> None:
    def dropping(model: nn.Module, batch: Tensor) -> Tensor:
        return F.dropout(model(batch), 0.5).square().mean()

    # Activations outweigh all else.
    n = 512
    job = replace(RESIDUAL, loss=dropping, optimizer=None)
    record = measure(job, n, device="cpu")
    assert last_step_peak_bytes(trace(job, n, None)) == record.peak_allocated_bytes
    # CUDA's mask takes a byte where the CPU's takes four.
    assert last_step_peak_bytes(trace(job, n, GPU)) == record.peak_allocated_bytes - 3 * n * WIDTH


def test_lookups_scatter_their_gradients_in_place() -> None:
    def looked_up(model: nn.Module, batch: Tensor) -> Tensor:
        x = model(batch)
        rows = torch.zeros(len(batch), dtype=torch.long)
        picked = x.gather(1, rows.unsqueeze(1)) + x.max(1, keepdim=True)[0]
        return picked.sum() + x[rows].sum() + x.index_select(0, rows).sum()

    job = replace(RESIDUAL, loss=looked_up, optimizer=None)
    record = measure(job, 512, device="cpu")
    assert last_step_peak_bytes(trace(job, 512, None)) == record.peak_allocated_bytes


def test_categories_and_phases_at_the_peak() -> None:
    traced = trace(RESIDUAL, 8, GPU)
    parameter_bytes = 4 * 2 * (WIDTH * WIDTH + WIDTH)
    by_category: dict[str, int] = {}
    for number, info in enumerate(traced.storages):
        category = traced.categories[number]
        if category in ("parameter", "optimizer_state", "input", "gradient"):
            by_category[category] = by_category.get(category, 0) + max(
                (c.delta_bytes for c in traced.changes if c.storage == number), default=0
            )
        assert info.dtype in ("float32", "uint8")
    steps = len(traced.step_starts)
    assert by_category["parameter"] == by_category["optimizer_state"] == parameter_bytes
    assert by_category["input"] == steps * 4 * 8 * WIDTH
    assert {change.phase for change in traced.changes} == {
        None, "forward", "backward", "step", "zero_grad"
    }  # fmt: skip


def test_a_workspace_for_each_thread_that_multiplies_matrices() -> None:
    traced = trace(RESIDUAL, 8, GPU)
    workspaces = [
        (change.phase, change.delta_bytes)
        for change in traced.changes
        if change.storage is not None and traced.categories[change.storage] == "workspace"
    ]
    assert workspaces == [("forward", 4096), ("backward", 4096)]


def test_between_two_batches_is_as_good_as_traced() -> None:
    low, high = (trace(RESIDUAL, n, GPU) for n in (2, 6))
    for n in (3, 4, 50):
        assert (made := between(low, high, n)) is not None
        direct = trace(RESIDUAL, n, GPU)
        assert made.batch_size == n
        assert [change[1:] for change in made.changes] == [change[1:] for change in direct.changes]


def test_no_line_between_batches_that_run_differently() -> None:
    def forked(model: nn.Module, batch: Tensor) -> Tensor:
        extra = batch.exp().sum() if batch.shape[0] > 4 else batch.sum()
        return mean_square(model, batch) + extra

    def padded(model: nn.Module, batch: Tensor) -> Tensor:
        return mean_square(model, F.pad(batch, (0, 0, 0, -batch.shape[0] % 4))[: len(batch)])

    for loss in (forked, padded):
        low, high = (trace(replace(RESIDUAL, loss=loss), n, GPU) for n in (2, 7))
        assert between(low, high, 5) is None


def test_traces_under_autocast_make_a_line_too() -> None:
    # Its cache of cast weights is emptied in the order of addresses, which is anyone's.
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return mean_square(model, batch)

    job = replace(RESIDUAL, model=lambda: nn.Sequential(*(Residual() for _ in range(8))), loss=loss)
    low, high, traced = (trace(job, n, GPU) for n in (4, 32, 11))
    made = between(low, high, 11)

    assert made is not None
    assert [c[1:] for c in made.changes] == [c[1:] for c in traced.changes]


@pytest.mark.parametrize(
    ("optimizer", "counted"),
    [
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.AdamW(p, capturable=True), 3),
        (lambda p: torch.optim.AdamW(p, fused=True), 3),
        (lambda p: torch.optim.Adagrad(p), 1),
        (lambda p: torch.optim.RMSprop(p), 1),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.NAdam(p), 2),
        (lambda p: torch.optim.NAdam(p, foreach=False), 2),
        (lambda p: torch.optim.NAdam(p, capturable=True), 4),
        # It keeps its counter, its rate and its mean's weight on the device, whatever is asked for.
        (lambda p: torch.optim.ASGD(p), 4),
    ],
    ids=[
        "AdamW",
        "capturable",
        "fused",
        "Adagrad",
        "RMSprop",
        "SGD",
        "NAdam",
        "NAdam, one by one",
        "NAdam, capturable",
        "ASGD",
    ],
)
def test_counters_of_steps_are_on_the_host_where_they_are(
    optimizer: Callable[[Any], torch.optim.Optimizer], counted: int
) -> None:
    traced = trace(replace(RESIDUAL, optimizer=optimizer), 4, GPU)
    gained = [
        change.storage
        for change in traced.changes
        if change.delta_bytes > 0
        and change.storage is not None
        and traced.categories[change.storage] == "optimizer_state"
    ]
    # Two layers with weight and bias.
    assert len(gained) == 4 * counted


def test_several_threads_may_trace() -> None:
    alone = [trace(RESIDUAL, n, GPU) for n in range(2, 8)]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda n: trace(RESIDUAL, n, GPU), range(2, 8)))
    for one, other in zip(alone, together, strict=True):
        assert one.storages == other.storages
        assert one.categories == other.categories
        assert [change[1:] for change in one.changes] == [change[1:] for change in other.changes]


class NamesCuda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, device="cuda")
        self.register_buffer("table", torch.arange(WIDTH).to("cuda"))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.zeros(len(x), WIDTH, device=torch.device("cuda", 0))
        result: Tensor = self.layer(x.cuda(non_blocking=True)) + noise + self.table
        return result.to(0).to("cuda:0", torch.float32)


def test_code_that_names_cuda_is_traced_where_it_is() -> None:
    class Unnamed(NamesCuda):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("table", torch.arange(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.zeros(len(x), WIDTH)
            result: Tensor = self.layer(x) + noise + self.table
            return result

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return mean_square(model, batch.pin_memory().to("cuda"))

    named = trace(replace(RESIDUAL, model=lambda: NamesCuda().cuda(), loss=loss), 4, GPU)
    plain = trace(replace(RESIDUAL, model=Unnamed), 4, GPU)
    assert [change[1:] for change in named.changes] == [change[1:] for change in plain.changes]


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_saved_on_the_cpu_is_not_on_the_gpu(pinned: bool) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
            return mean_square(model, batch)

    # Activations outweigh all else.
    n = 512
    plain, saved = (trace(replace(RESIDUAL, loss=made), n, GPU) for made in (mean_square, loss))
    # Two tensors are saved each of three times through the layers; the last is needed at the peak.
    less_bytes = last_step_peak_bytes(plain) - last_step_peak_bytes(saved)
    assert less_bytes == 5 * 4 * n * WIDTH


def test_a_loss_scaler_steps() -> None:
    def step(context: StepContext) -> None:
        assert context.optimizer is not None
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(mean_square(context.model, context.batch)).backward()
        scaler.step(context.optimizer)
        scaler.update()
        context.optimizer.zero_grad()

    assert "optimizer_state" in trace(replace(RESIDUAL, loss=None, step=step), 4, GPU).categories
