"""What memory the host has for this process, and what the process took of it at most."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

# Where Linux says what memory there is; tests put another tree here.
_ROOT = Path("/")

# Fields of /proc/self/status, proc(5): the most that was ever mapped, and ever resident.
Peak = Literal["VmPeak", "VmHWM"]


class ProcessLimit(NamedTuple):
    """What all of a process may come to, and the peak that is held to it."""

    limit_bytes: int
    peak: Peak


def memory_bytes() -> tuple[int, int] | None:
    """Free and total bytes for this process; None where the host does not say (off Linux).

    The host's are bounded by the control group, and by the address space (`ulimit -v`), of which
    what is mapped already counts as used.
    """
    memory = _physical_bytes()
    mapped_limit_bytes = _address_space_bytes()
    if memory is None or mapped_limit_bytes is None:
        return memory
    left_bytes = max(mapped_limit_bytes - _status_bytes("VmSize"), 0)
    return min(memory[0], left_bytes), min(memory[1], mapped_limit_bytes)


def process_limit() -> ProcessLimit | None:
    """What this process, all of it, may come to before the host ends it or refuses; None off Linux.

    Held to address space where that is limited and less of it is left than of memory.
    """
    memory = _physical_bytes()
    if memory is None:
        return None
    mapped_limit_bytes = _address_space_bytes()
    if mapped_limit_bytes is not None:
        left_bytes = mapped_limit_bytes - _status_bytes("VmSize")
        if left_bytes < memory[0]:
            return ProcessLimit(mapped_limit_bytes, "VmPeak")
    return ProcessLimit(memory[0] + _status_bytes("VmRSS"), "VmHWM")


def process_peak_bytes(peak: Peak) -> int:
    """The most that this process ever mapped or had resident."""
    return _status_bytes(peak)


def _physical_bytes() -> tuple[int, int] | None:
    meminfo = _ROOT / "proc/meminfo"
    if not meminfo.is_file():
        return None
    free_bytes, total_bytes = (_kib(meminfo, key) for key in ("MemAvailable", "MemTotal"))
    # A container has less than its host, and a batch system's job less than its machine.
    for group, limit, usage, cache in _control_groups():
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
            used_bytes = int((group / usage).read_text()) - _cached_bytes(group, cache)
            total_bytes = min(total_bytes, int(text))
            free_bytes = min(free_bytes, int(text) - used_bytes)
    return max(free_bytes, 0), total_bytes


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """This process's groups and those around them, with the files of limit and use, and the key in
    memory.stat of files that were read: version 2, then version 1."""
    two = ("memory.max", "memory.current", "inactive_file")
    one = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    own = _ROOT / "proc/self/cgroup"
    mounted = _ROOT / "sys/fs/cgroup"
    # Source: cgroups(7), hierarchy:controllers:path. A container may not see its path: its own
    # group is then the root.
    lines = own.read_text().splitlines() if own.is_file() else []
    places = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    of_memory = next((path for names, path in places.items() if "memory" in names.split(",")), "/")
    for root, path, files in (
        (mounted, places.get("", "/"), two),
        (mounted / "memory", of_memory, one),
    ):
        group = root / path.lstrip("/")
        for around in (group, *group.parents):
            if around.is_relative_to(root):
                yield (around, *files)


def _cached_bytes(group: Path, key: str) -> int:
    """What a group is charged for files that were read, which makes room when memory is asked."""
    stat = group / "memory.stat"
    found = stat.is_file() and re.search(rf"^{key} (\d+)$", stat.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _address_space_bytes() -> int | None:
    # Imported here: Windows, which has no /proc either, does not have it.
    import resource

    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit_bytes == resource.RLIM_INFINITY else limit_bytes


def _status_bytes(key: str) -> int:
    return _kib(_ROOT / "proc/self/status", key)


def _kib(path: Path, key: str) -> int:
    """The bytes of the line `key: … kB`."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} has no {key}"
    return int(found[1]) << 10
