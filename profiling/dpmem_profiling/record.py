"""What is known about the memory of one training step: `MemoryRecord` and its neighbours.

These are the only shapes that cross from whoever measures or predicts to whoever reports. All
quantities are bytes and seconds; what is not known is None, never 0 or -1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from dpmem_profiling.extrapolate import Requests

Category = Literal[
    "parameter",
    "gradient",
    "optimizer_state",
    "bucket",
    "activation",
    "compressed",
    "temporary",
    "buffer",
    "input",
    "workspace",
    "unknown",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

Source = Literal["measured", "predicted"]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TimelinePoint:
    """Live bytes by category right after one allocation or release.

    `event` counts allocations, releases and phase edges from the start of the step; `phase` is
    None outside of every phase. Categories that hold nothing are left out. `reserved_bytes` is what
    the caching allocator held then, None where there is none (CPU) or its history is not known.
    """

    event: int
    time_s: float
    phase: str | None
    live_bytes: Mapping[Category, int]
    reserved_bytes: int | None = None


@dataclass(frozen=True)
class TensorAtPeak:
    """One storage that was live at the peak, described by the tensor that created it.

    `module` is the path of the module whose forward was running, None outside of any (in backward,
    in the optimizer, while building); `op` the operator, e.g. "aten.mm", None where the storage is
    older than the tracker.
    """

    size_bytes: int
    shape: tuple[int, ...]
    dtype: str
    category: Category
    module: str | None
    op: str | None


@dataclass(frozen=True)
class MemoryRecord:
    """The memory of one training step, measured or predicted. Schema version 1.

    name                  what reports call the job
    source                "measured" or "predicted"
    batch_size            samples per rank in the step
    world_size            data-parallel ranks; the bytes are one rank's
    device                "CPU", or the GPU's name
    torch_version         torch.__version__
    peak_allocated_bytes  the most tensor bytes live at once during the step
    peak_reserved_bytes   the most the caching allocator held; None where there is none (CPU)
    device_bytes          the most of the whole device in use during the step, by NVML
    limit_bytes           the limit in force during the step
    at_peak               bytes by category at the peak; they sum to peak_allocated_bytes
    peak_by_category      each category's own peak, at its own moment
    peak_by_phase         each phase's own peak, all categories together; "outside" for the rest
    persistent_bytes      by category, between steps, with no batch alive
    timeline              the step, thinned; holds the peak and all phase edges
    tensors_at_peak       the largest tensors live at the peak, largest first
    step_s                one step, timed without instrumentation
    notes                 sentences a reader needs to judge the figures

    Raises ValueError where the categories at the peak do not add up to it, or one is not known.
    """

    name: str
    source: Source
    batch_size: int
    world_size: int
    device: str
    torch_version: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    device_bytes: int | None
    limit_bytes: int | None
    at_peak: Mapping[Category, int]
    peak_by_category: Mapping[Category, int]
    peak_by_phase: Mapping[str, int]
    persistent_bytes: Mapping[Category, int]
    timeline: tuple[TimelinePoint, ...]
    tensors_at_peak: tuple[TensorAtPeak, ...]
    step_s: float | None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(
                f"source must be one of {', '.join(get_args(Source))}; got {self.source!r}"
            )
        for name in ("at_peak", "peak_by_category", "persistent_bytes"):
            unknown = set(getattr(self, name)) - set(CATEGORIES)
            if unknown:
                raise ValueError(
                    f"{name} must use the categories {', '.join(CATEGORIES)}; "
                    f"got {', '.join(sorted(map(str, unknown)))}"
                )
        total_bytes = sum(self.at_peak.values())
        if total_bytes != self.peak_allocated_bytes:
            raise ValueError(
                f"at_peak must sum to peak_allocated_bytes={self.peak_allocated_bytes}; "
                f"got {total_bytes}. Put what is not accounted for under 'unknown'."
            )

    @property
    def growth_bytes(self) -> int | None:
        """What the step left behind: what outlives it, less what there was before it.

        Of a step that is not the first this is 0, except for a job that keeps more and more. The
        optimizer's state and one gradient of each parameter do not count: where gradients are
        accumulated they come and go from step to step. None for a prediction, which repeats one
        step and so cannot say.
        """
        if self.source == "predicted":
            return None
        return _kept_bytes(self.persistent_bytes) - _kept_bytes(self.timeline[0].live_bytes)

    def to_json(self) -> dict[str, Any]:
        """The record as a dictionary that `json.dumps` takes; `from_json` reads it back."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryRecord:
        """Read what `to_json` wrote, also after a trip through `json.dumps` and `json.loads`.

        Raises ValueError for another schema version and for missing or surplus fields.
        """
        fields = _fields_of(cls, data)
        fields["timeline"] = tuple(TimelinePoint(**point) for point in fields["timeline"])
        fields["tensors_at_peak"] = tuple(
            TensorAtPeak(**{**tensor, "shape": tuple(tensor["shape"])})
            for tensor in fields["tensors_at_peak"]
        )
        fields["notes"] = tuple(fields["notes"])
        return cls(**fields)


@dataclass(frozen=True)
class Probe:
    """One batch size tried.

    `outcome`: "fits"; "oom", out of memory or over the limit; "retry", it ran but only after the
    allocator gave memory back and asked again, which counts as not fitting; "slow", it ran and took
    longer than was asked for; "error", it failed for another reason. `error` says more of the last
    two. `seconds` is one training step. `peak_by_phase` is as in a
    MemoryRecord, where known: a step's peak is the highest of its phases', each of them close to a
    line in the batch. `batch_bytes` is what the batch itself holds at most during the step,
    `growth_bytes` what the step left behind, as in a MemoryRecord. `requests`, what it asked of its
    allocator, is for the search alone: the probes of a result have none.
    """

    batch: int
    outcome: Literal["fits", "oom", "retry", "slow", "error"]
    predicted_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    seconds: float | None = None
    peak_by_phase: Mapping[str, int] | None = None
    batch_bytes: int | None = None
    growth_bytes: int | None = None
    error: str | None = None
    requests: Requests | None = field(default=None, compare=False, repr=False)

    @property
    def peak_bytes(self) -> int | None:
        """What is held to the limit: reserved bytes, else allocated, else predicted ones."""
        for size_bytes in (self.reserved_bytes, self.allocated_bytes, self.predicted_bytes):
            if size_bytes is not None:
                return size_bytes
        return None

    def told(self) -> Probe:
        """As a result has it."""
        return replace(self, requests=None)


class Accumulation(NamedTuple):
    """A large batch in parts: `steps` times forward and backward of `batch` samples."""

    batch: int
    steps: int


@dataclass(frozen=True)
class BatchSizeResult:
    """The outcome of a batch-size search; `print` shows it as a short text.

    largest_fitting  largest batch whose peak is within limit_bytes, None where none is
    largest_safe     largest batch whose peak is within limit_bytes - margin_bytes, or None
    fastest          the probed safe batch with the most samples per second; None if none was timed
    peak_bytes       the peak at largest_safe, else at the smallest batch that the job takes (at
                     least this, where it ran out of memory); None where the probe did not say
    probes           every batch tried, in order
    curve            (batch, peak bytes) of the probes that ran, ascending
    limited_by       one phrase: what keeps the batch from growing
    multiple_of      both largest batches and the fastest are multiples of it
    notes            sentences a reader needs to judge the figures
    explanation      where no batch is safe: by how much, what takes the room, what would help
    """

    largest_fitting: int | None
    largest_safe: int | None
    fastest: int | None
    peak_bytes: int | None
    limit_bytes: int
    margin_bytes: int
    source: Source
    probes: tuple[Probe, ...]
    curve: tuple[tuple[int, int], ...]
    limited_by: str
    multiple_of: int = 1
    notes: tuple[str, ...] = ()
    explanation: str | None = None

    def samples_per_second(self) -> dict[int, float]:
        """The speed of every safe batch that was timed, one step each; of the multiples alone.

        A batch below largest_safe is not safe where its own peak is above: peaks may fall again.
        """
        safe_bytes = self.limit_bytes - self.margin_bytes
        return {
            probe.batch: probe.batch / probe.seconds
            for probe in self.probes
            if probe.outcome == "fits"
            and probe.seconds
            and probe.batch <= (self.largest_safe or 0)
            and (probe.peak_bytes or 0) <= safe_bytes
            and probe.batch % self.multiple_of == 0
        }

    def accumulation_for(self, target: int) -> Accumulation:
        """How to train at a batch of `target` samples: the largest safe batch that divides it.

        With largest_safe=12 a target of 64 takes 8 steps of 8 samples. The batch is a multiple of
        `multiple_of`, as the answers are.

        Raises ValueError for a target that is not a positive multiple of it and where no batch is
        safe.
        """
        if target < 1:
            raise ValueError(f"target must be at least 1; got {target}")
        if self.largest_safe is None:
            raise ValueError(f"no batch is safe, so none can be accumulated: {self.limited_by}")
        step = self.multiple_of
        if target % step:
            raise ValueError(f"target must be a multiple of multiple_of={step}; got {target}")
        at_most = min(target, self.largest_safe)
        batch = max(n for n in range(step, at_most + 1, step) if target % n == 0)
        return Accumulation(batch, target // batch)

    def plot(self, path: str | Path) -> None:
        """Write a PNG: the probed peaks over the batch, the limit, and the margin below it.

        Raises OSError where `path` cannot be written.
        """
        # Imported here: the picture is drawn from this module's classes.
        from dpmem_profiling.report.pictures import batch_size_png

        Path(path).write_bytes(batch_size_png(self))

    def to_json(self) -> dict[str, Any]:
        """The result as a dictionary that `json.dumps` takes; `from_json` reads it back."""
        fields = asdict(self)
        for probe in fields["probes"]:
            del probe["requests"]
        return {"schema_version": SCHEMA_VERSION, **fields}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BatchSizeResult:
        """Read what `to_json` wrote, also after a trip through `json.dumps` and `json.loads`.

        Raises ValueError for another schema version and for missing or surplus fields.
        """
        fields = _fields_of(cls, data)
        fields["probes"] = tuple(Probe(**probe) for probe in fields["probes"])
        fields["curve"] = tuple((batch, peak_bytes) for batch, peak_bytes in fields["curve"])
        fields["notes"] = tuple(fields["notes"])
        return cls(**fields)

    def __str__(self) -> str:
        from dpmem_profiling.report.batch_words import batch_size_text

        return batch_size_text(self)


def _kept_bytes(live_bytes: Mapping[Category, int]) -> int:
    """What is alive beyond the optimizer's state and one gradient of each parameter."""
    one_each_bytes = min(live_bytes.get("gradient", 0), live_bytes.get("parameter", 0))
    return sum(live_bytes.values()) - live_bytes.get("optimizer_state", 0) - one_each_bytes


def _fields_of(
    kind: type[MemoryRecord | BatchSizeResult], data: Mapping[str, Any]
) -> dict[str, Any]:
    """What `data` says of a `kind`. Raises ValueError unless it has exactly its fields."""
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version must be {SCHEMA_VERSION}; got {version!r}. "
            "Read this with the dpmem version that wrote it."
        )
    fields = {key: value for key, value in data.items() if key != "schema_version"}
    expected = set(kind.__dataclass_fields__)
    if set(fields) != expected:
        differing = ", ".join(sorted(set(fields) ^ expected))
        raise ValueError(
            f"a version {SCHEMA_VERSION} {kind.__name__} has exactly the documented fields; "
            f"missing or surplus: {differing}"
        )
    return fields
