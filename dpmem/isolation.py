"""One probe in a process of its own: what crashes there does not crash here."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from multiprocessing.connection import Connection

import torch

from dpmem.targets import describe
from dpmem_profiling import InvalidJob, Job, Probe


def probe_in_child(job: Job, batch: int, device: torch.device, limit_bytes: int | None) -> Probe:
    """Try `job` at one batch size in a fresh process, with one thread on the CPU.

    Killed by SIGKILL, as by the kernel when memory runs out, is "oom"; any other death is "error".

    Raises TypeError where the job does not pickle, InvalidJob where it breaks its promise.
    """
    try:
        pickled = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "isolate=True sends the job to another process, so its functions must be importable; "
            f"received one that is not ({error}); define them at the top of a module"
        ) from error
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(pickled, batch, device, limit_bytes, there))
    child.start()
    # Else this process holds the writing end, too, and never hears of the child's death.
    there.close()
    try:
        said = here.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGKILL:
            return Probe(batch, "oom")
        return Probe(batch, "error", error=f"ended its process with exit code {child.exitcode}")
    finally:
        # It has said all it had to say, and a process may hang while torch and its threads end.
        child.kill()
        child.join()
        here.close()
    if isinstance(said, str):
        raise InvalidJob(said)
    assert isinstance(said, Probe)
    return said


def _run(
    pickled: bytes, batch: int, device: torch.device, limit_bytes: int | None, out: Connection
) -> None:
    # Imported here: finder imports this module.
    from dpmem.finder import measured_probe

    torch.set_num_threads(1)
    said: Probe | str
    try:
        said = measured_probe(pickle.loads(pickled), batch, device, limit_bytes)
    except InvalidJob as error:
        said = str(error)
    except Exception as error:  # noqa: BLE001 - the parent must hear of whatever it is
        said = Probe(batch, "error", error=describe(error))
    out.send(said)
