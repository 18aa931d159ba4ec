"""Times of ONNX Runtime's operators, from the trace that a session writes (onnxruntime.ai/docs, "Profiling tools").

The trace is a list of events. Those of an inference's operators come before its ``model_run``. Times are in whole µs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import MeasurementError
from .base import OperatorRuns

if TYPE_CHECKING:
    from .onnxruntime import OnnxSession

_KERNEL = "_kernel_time"
_WHAT = "operators of onnxruntime"


class OnnxProfiler:
    """A session that writes a trace into a folder of its own, which goes with it."""

    def __init__(self, open_session: Callable[[str], OnnxSession]) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="rowcol-operators-")
        except OSError as e:
            hint = "free some space, or name another folder in TMPDIR"
            raise MeasurementError(_WHAT, expected="a temporary folder for the trace", got=str(e), hint=hint) from e
        try:
            self._session = open_session(str(Path(self._folder.name) / "trace"))
        except BaseException:
            self._folder.cleanup()
            raise

    def run(self, feeds: Mapping[str, np.ndarray]) -> object:
        return self._session.infer(feeds)

    def operators(self) -> tuple[OperatorRuns, ...]:
        try:
            text = self._session.end_profiling().read_text(encoding="utf-8")
        except OSError as e:
            raise MeasurementError(_WHAT, expected="the trace that the session wrote", got=str(e)) from e
        return parse(text)

    def __enter__(self) -> OnnxProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()
        self._folder.cleanup()


def parse(text: str) -> tuple[OperatorRuns, ...]:
    """The operators of a trace. MeasurementError: it is cut short, or its inferences ran different operators."""
    try:
        events: list[dict[str, Any]] = json.loads(text)
        runs = _grouped(events)
        names = [[event["name"] for event in run] for run in runs]
        if runs and runs[0] and all(other == names[0] for other in names):
            return tuple(map(_runs, zip(*runs, strict=True)))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        hint = "is the disk full? the trace takes some 500 bytes an operator and inference"
        raise MeasurementError(_WHAT, expected="a whole trace", got=f"{type(e).__name__}: {e}", hint=hint) from e
    counts = ", ".join(sorted({str(len(run)) for run in runs})) or "no"
    got = f"{len(runs)} inferences of {counts} operators"
    raise MeasurementError(_WHAT, expected="inferences that run the same operators", got=got)


def _runs(events: Sequence[dict[str, Any]]) -> OperatorRuns:
    """One operator over all inferences."""
    name = str(events[0]["name"]).removesuffix(_KERNEL)
    return OperatorRuns(
        name, str(events[0]["args"]["op_name"]), (name,), tuple(event["dur"] * 1000 for event in events)
    )


def _grouped(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of the operators of each inference."""
    runs: list[list[dict[str, Any]]] = []
    current: list[dict[str, Any]] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            current.append(event)
        elif event["name"] == "model_run":
            runs.append(current)
            current = []
    return runs
