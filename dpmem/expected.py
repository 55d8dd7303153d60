"""What a search on a GPU expects of batches before it tries them: a forecast for that very GPU."""

import math

import torch

from dpmem.forecast import forecast_of
from dpmem.targets import describe
from dpmem_profiling import Job
from dpmem_profiling.gpus import Gpu


class Expected:
    """Bytes that PyTorch's allocator would reserve on `device` for a batch of `job`.

    Infinite where no forecast can be made, as beyond the end of a data set.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self._forecast = forecast_of(job)
        # Of the GPU only what decides which kernels run: how much it has is the search's to know.
        self._gpu = Gpu(
            name=str(device),
            title=torch.cuda.get_device_name(device),
            architecture=torch.cuda.get_device_capability(device),
            total_bytes=0,
            context_bytes=None,
            source={},
        )
        self._is_made = False
        self._failure: Exception | None = None

    def __call__(self, batch: int) -> float:
        if self._failure is not None and not self._is_made:
            # Each attempt builds the model.
            return math.inf
        try:
            size_bytes = self._forecast.reserved_bytes(batch, self._gpu)
        except Exception as error:  # noqa: BLE001 - the probes decide; what fails there is raised
            self._failure = self._failure or error
            return math.inf
        self._is_made = True
        return size_bytes

    def notes(self) -> tuple[str, ...]:
        """A sentence where the search had to do without."""
        if self._failure is None or self._is_made:
            return ()
        return (f"searched without a forecast, which could not be made: {describe(self._failure)}",)
