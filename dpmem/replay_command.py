"""`dpmem replay`: a memory snapshot through the allocator model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from dpmem_profiling import (
    AllocatorSettings,
    DeviceReplay,
    ReplayRun,
    format_bytes,
    read_snapshot,
    replay_snapshot,
)

FINDING = 1
_NOTHING = "–"


@click.command("replay")
@click.argument("snapshot", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--allocator",
    metavar="SETTINGS",
    help='What if: settings as in PYTORCH_ALLOC_CONF, such as "expandable_segments:True".',
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def replay_command(snapshot: Path, allocator: str | None, as_json: bool) -> int:
    """Replay SNAPSHOT (of torch.cuda.memory._dump_snapshot) as the CUDA allocator would.

    Says whether the model agrees with the recording, where memory peaks and how much of it is
    fragmented; with --allocator, what the same requests take under other settings. For that what
    was live when the recording began is requested anew ("repacked"), under the recorded settings
    too, for comparison. Exit 1: the model does not agree, or the requests do not fit.
    """
    settings = None if allocator is None else AllocatorSettings.parse(allocator)
    devices = replay_snapshot(read_snapshot(snapshot), settings)
    if as_json:
        document = {"snapshot": str(snapshot), "devices": [asdict(device) for device in devices]}
        click.echo(json.dumps(document, indent=2))
    else:
        console = Console()
        for device in devices:
            console.print(_table(device, allocator))
            console.print(_agreement(device), highlight=False)
    found = [text for device in devices for text in _findings(device, allocator)]
    if found:
        click.echo(f"dpmem: {'; '.join(found)}", err=True)
    return FINDING if found else 0


def _findings(device: DeviceReplay, allocator: str | None) -> list[str]:
    found = []
    name = f"device {device.device}"
    agreement = device.agreement
    if not agreement.is_complete:
        at = agreement.first_difference
        where = "at its end" if at is None else f"from event {at} of {device.n_events} on"
        found.append(f"{name}: the model differs from the recording {where}")
    if device.what_if is not None:
        run = device.what_if.other_settings
        if run.failed_event is not None:
            found.append(f"{name}: out of memory under {allocator} at event {run.failed_event}")
        elif run.n_ooms_served < run.n_ooms:
            kept = run.n_ooms - run.n_ooms_served
            found.append(f"{name}: out of memory under {allocator}, too: {kept} of {run.n_ooms}")
    return found


def _table(device: DeviceReplay, allocator: str | None) -> Table:
    table = Table(title=f"device {device.device}", title_justify="left")
    columns = [("recorded", device.run)]
    if device.what_if is not None:
        columns += [
            ("same settings, repacked", device.what_if.recorded_settings),
            (f"{allocator}, repacked", device.what_if.other_settings),
        ]
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right", overflow="fold")
    for what, text in _ROWS:
        texts = [text(run) for _, run in columns]
        if any(found != _NOTHING for found in texts):
            table.add_row(what, *texts)
    return table


def _agreement(device: DeviceReplay) -> str:
    agreement = device.agreement
    sentences = [
        f"{device.n_events} events",
        f"addresses as recorded: {agreement.n_same_address} of {agreement.n_allocations}",
        f"segments as recorded: {agreement.n_same_segment} of {agreement.n_segments}",
    ]
    if agreement.n_unknown_sizes:
        sentences.append(f"blocks whose size is not recorded: {agreement.n_unknown_sizes}")
    if device.capacity_bytes is not None:
        sentences.append(f"the device can give {format_bytes(device.capacity_bytes)}")
    return "; ".join(sentences)


def _failure(run: ReplayRun) -> str:
    return _NOTHING if run.failed_event is None else f"event {run.failed_event}"


def _ooms(run: ReplayRun) -> str:
    return f"{run.n_ooms}, {run.n_ooms_served} served" if run.n_ooms else _NOTHING


_ROWS: Sequence[tuple[str, Callable[[ReplayRun], str]]] = (
    ("peak allocated", lambda run: format_bytes(run.peak_allocated_bytes)),
    ("peak reserved", lambda run: format_bytes(run.peak_reserved_bytes)),
    ("reserved when most was allocated", lambda run: format_bytes(run.reserved_at_peak_bytes)),
    ("of it fragments", lambda run: format_bytes(run.inactive_split_at_peak_bytes)),
    ("retries", lambda run: str(run.n_retries)),
    ("recorded out-of-memory errors", _ooms),
    ("does not fit from", _failure),
)
