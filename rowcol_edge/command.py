"""What all commands share: JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .job import Progress

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout and nothing else")]


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress line with elapsed time and ETA on stderr; plain lines where that is no terminal.

    What the user's own code prints meanwhile goes to stderr too: stdout belongs to the results.
    """
    from .report.progress import reporter

    with redirect_stdout(sys.stderr), reporter() as report:
        yield report
