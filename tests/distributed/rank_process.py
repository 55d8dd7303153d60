"""One rank of a test: waits for tasks, runs them, sends back what they return or raise."""

import traceback
import warnings
from datetime import timedelta
from typing import Any


def serve(rank: int, world_size: int, scratch: str, pipe: Any) -> None:
    import backward_tasks
    import behaviour_tasks
    import finding_tasks
    import group_tasks
    import scaling_tasks
    import sharding_jobs
    import tasks
    import torch
    import torch.distributed as dist
    import wire_tasks

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    modules = (
        tasks,
        backward_tasks,
        behaviour_tasks,
        finding_tasks,
        group_tasks,
        scaling_tasks,
        sharding_jobs,
        wire_tasks,
    )
    while True:
        task, arguments = pipe.recv()
        torch.manual_seed(0)
        try:
            module = next(module for module in modules if hasattr(module, task))
            result, trace = getattr(module, task)(rank, **arguments), None
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must hear of it
            # Tracebacks do not pickle: their text travels. So does the type, where it is plain.
            plain = type(error) in (ValueError, TypeError, RuntimeError)
            result = error.with_traceback(None) if plain else RuntimeError(repr(error))
            trace = traceback.format_exc()
        pipe.send((result, trace))
