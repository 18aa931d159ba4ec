"""A fresh Python process for each measurement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import MeasurementError
from .layer_times import OperatorsRun
from .memory import Curve
from .records import decode
from .roofline import Peaks
from .watching import MemoryWatch
from .worker import EnergyRun, FootprintRun, MemoryRun, Request, TimedRun

_STDERR_LINES = 3
_KILLED = "Linux does that where memory runs out (dmesg says so): end other work, or profile fewer or smaller --arms"


class Processes:
    """Runs requests in processes of their own; ``variables`` are set on top of this process's environment."""

    def __init__(self, variables: Mapping[str, str], timeout_seconds: float) -> None:
        self._command, folder = worker_command()
        self._environment = {**child_environment(folder), **variables}
        self._timeout_seconds = timeout_seconds

    def time(self, request: Request, where: str) -> TimedRun:
        return decode(TimedRun, self._run(request, where), f"result of {where}", MeasurementError)

    def memory(self, request: Request, where: str) -> MemoryRun:
        return decode(MemoryRun, self._run(request, where), f"result of {where}", MeasurementError)

    def footprint(self, request: Request, where: str) -> FootprintRun:
        """With the memory of the process over time, where the system tells of it."""
        begin = time.monotonic_ns()
        watch = MemoryWatch()
        run = decode(FootprintRun, self._run(request, where, watch.of), f"result of {where}", MeasurementError)
        times, marks = (tuple(at - begin for at in found) for found in (watch.times_ns, run.marks_ns))
        return replace(run, curve=Curve(times, tuple(watch.resident_bytes), marks) if times else None)

    def energy(self, request: Request, where: str) -> EnergyRun:
        return decode(EnergyRun, self._run(request, where), f"result of {where}", MeasurementError)

    def operators(self, request: Request, where: str) -> OperatorsRun:
        return decode(OperatorsRun, self._run(request, where), f"result of {where}", MeasurementError)

    def peaks(self, request: Request, where: str) -> Peaks:
        return decode(Peaks, self._run(request, where), f"result of {where}", MeasurementError)

    def _run(
        self, request: Request, where: str, watch: Callable[[int], AbstractContextManager[object]] = nullcontext
    ) -> Any:
        # a bound on hanging, not on being slow
        timeout = self._timeout_seconds + 10 * request.expected_seconds
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", errors="replace",
            env=self._environment,
        ) as process:  # fmt: skip
            try:
                with watch(process.pid):
                    stdout, stderr = process.communicate(request.to_json(), timeout)
            except subprocess.TimeoutExpired as e:
                hint = "is the machine busy, or is the model waiting for something?"
                raise MeasurementError(where, expected=f"a result within {timeout:.0f} s", got="none", hint=hint) from e
            finally:
                process.kill()  # which does nothing to one that has ended
        if process.returncode != 0:
            got, hint = _ending(process.returncode, stderr), _KILLED if process.returncode == -signal.SIGKILL else ""
            raise MeasurementError(where, expected="a process that ends well", got=got, hint=hint)
        try:
            return json.loads(stdout)
        except ValueError as e:
            raise MeasurementError(where, expected="one JSON result", got=repr(stdout[-200:])) from e


def worker_command() -> tuple[list[str], str]:
    """How to start a worker of this very code, and what to put on PYTHONPATH (nothing if this is a ``.pyz``)."""
    archive = getattr(globals()["__loader__"], "archive", None)  # a zipimporter's
    if archive:
        return [sys.executable, str(archive), "_worker"], ""
    package = Path(__file__).resolve().parents[1]
    return [sys.executable, "-m", f"{package.name}.device", "_worker"], str(package.parent)


def child_environment(folder: str) -> dict[str, str]:
    """This process's environment with ``folder`` on PYTHONPATH: the package may lie in a checkout not installed."""
    if not folder:
        return dict(os.environ)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": folder + (os.pathsep + inherited if inherited else "")}


def _ending(code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = " | ".join(lines[-_STDERR_LINES:]) or "nothing on stderr"
    return f"{f'signal {-code}' if code < 0 else f'exit code {code}'}: {last}"
