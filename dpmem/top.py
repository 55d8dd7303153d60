"""`dpmem top`: every GPU's memory and who uses it, live from NVML."""

import json
import time
from dataclasses import asdict, dataclass

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from dpmem.terminal import as_json, bytes_or_unknown
from dpmem_profiling import NvmlUnavailable, nvml

REFRESH_S = 0.5


@dataclass(frozen=True)
class Row:
    """A GPU or MIG instance and its processes, None where NVML does not list them."""

    device: nvml.DeviceMemory
    processes: tuple[nvml.ProcessMemory, ...] | None


@click.command()
@click.option("--once", is_flag=True, help="Print the table once, as without a terminal.")
@as_json
def top(once: bool, as_json: bool) -> int:
    """GPU memory and its processes, live from NVML. Ctrl-C ends it."""
    console = Console()
    try:
        # Open all the time: to initialise NVML again for every row and refresh may take seconds.
        with nvml.session():
            if as_json:
                click.echo(json.dumps(to_json(look()), indent=2))
            elif once or not console.is_terminal:
                console.print(table(look()))
            else:
                with Live(table(look()), console=console, auto_refresh=False) as live:
                    while True:
                        time.sleep(REFRESH_S)
                        live.update(table(look()), refresh=True)
    except NvmlUnavailable as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        pass
    return 0


def look() -> tuple[Row, ...]:
    """What NVML says now. Raises NvmlUnavailable."""
    return tuple(Row(device, nvml.processes(device.uuid)) for device in nvml.device_memory())


def to_json(rows: tuple[Row, ...]) -> list[dict[str, object]]:
    """The rows for `json.dumps`: the fields of DeviceMemory, and `processes`."""
    return [
        {
            **asdict(row.device),
            "processes": None if row.processes is None else [asdict(p) for p in row.processes],
        }
        for row in rows
    ]


def table(rows: tuple[Row, ...]) -> Group:
    """The rows for a terminal, with what NVML could not count said below."""
    shown = Table("GPU", "name", "used", "free", "total", "processes: pid, name, used")
    for row in rows:
        device = row.device
        sizes = (device.used_bytes, device.free_bytes, device.total_bytes)
        shown.add_row(
            number(device), device.name, *map(bytes_or_unknown, sizes), process_words(row.processes)
        )
    notes = [f"GPU {number(row.device)}: {row.device.note}" for row in rows if row.device.note]
    return Group(shown, *notes)


def number(device: nvml.DeviceMemory) -> str:
    """ "1" for the second GPU, "1/0" for the first MIG instance on it."""
    return str(device.index) if device.mig_index is None else f"{device.index}/{device.mig_index}"


def process_words(processes: tuple[nvml.ProcessMemory, ...] | None) -> str:
    """A line for each process."""
    if processes is None:
        return "unknown"
    return "\n".join(f"{p.pid} {p.name or '?'} {bytes_or_unknown(p.used_bytes)}" for p in processes)
