"""Native converters run in a process of their own: they may crash, hang or print, and the caller goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(
    module: str,
    arguments: Sequence[object],
    *,
    tool: str,
    timeout_s: float,
    exit_codes: Mapping[int, str] | None = None,
) -> str:
    """Run ``python -m module arguments``: why it failed, in words that begin with ``tool``; empty if it did not.

    Args:
        exit_codes: what the module's own exit codes mean; any other failure is told by its last line of output.
    """
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            _command(module, arguments),
            env=environment,
            timeout=timeout_s,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{tool} took longer than {timeout_s:g} s"
    if done.returncode == 0:
        return ""
    if exit_codes and done.returncode in exit_codes:
        return exit_codes[done.returncode]
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
    last = lines[-1][:200] if lines else ""
    if done.returncode < 0:
        return f"{tool} crashed ({_signal_name(-done.returncode)}){f': {last}' if last else ''}"
    return f"{tool} failed: {last or f'exit code {done.returncode}'}"


def hide(module: str) -> None:
    """Let this process find no such module: a converter may import torch for seconds only because it is installed."""
    sys.modules[module] = None  # type: ignore[assignment]  # what import takes as "not found"


def _command(module: str, arguments: Sequence[object]) -> list[str]:
    # -P: the folder the user stands in is no place to import from.
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
