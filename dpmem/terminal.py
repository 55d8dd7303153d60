"""What all of dpmem's commands share: options, exit codes, one-line errors, tables."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.table import Table

from dpmem.targets import TargetError, describe
from dpmem.units import parse_bytes
from dpmem_profiling import InvalidJob, format_bytes

Result = TypeVar("Result")

FINDING = 1
BAD_INPUT = 2


class ByteSize(click.ParamType):  # type: ignore[type-arg]
    """A byte size such as 8GiB."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, context)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")


def finding(message: str) -> int:
    """Say what was found on stderr; the exit code that goes with it."""
    say(message)
    return FINDING


def say(message: str) -> None:
    """One line on stderr."""
    click.echo(f"dpmem: {' '.join(message.split())}", err=True)


def run_job(target: str, run: Callable[[], Result]) -> Result:
    """Run a user's job; what its code raises becomes one line that says where."""
    try:
        return run()
    except InvalidJob as error:
        raise TargetError(f"TARGET {target!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"TARGET {target!r}: its job {describe(error)}") from error


def bytes_or_unknown(size_bytes: int | None) -> str:
    """Bytes for a reader."""
    return "unknown" if size_bytes is None else format_bytes(size_bytes)


def two_columns(rows: list[tuple[str, str]]) -> Table:
    """Names and what is to be said of them."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
