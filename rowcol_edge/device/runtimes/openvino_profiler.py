"""Times of OpenVINO's operators: performance counters of each inference, and of what each was made, as the graph that
runs says: docs.openvino.ai, "Performance counters". Times are in whole µs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import MeasurementError
from .base import OperatorRuns

if TYPE_CHECKING:
    from .openvino import OpenVinoSession

_WHAT = "operators of openvino"
_ORIGINS = "originalLayersNames"
_MICROSECOND = timedelta(microseconds=1)
_EXECUTED = "Status.EXECUTED"


class OpenVinoProfiler:
    """A session of a model that was compiled to count."""

    def __init__(self, session: OpenVinoSession, compiled: Any) -> None:
        self._session = session
        self._compiled = compiled
        self._runs: list[dict[tuple[int, str], tuple[str, int]]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> object:
        outputs = self._session.infer(feeds)
        self._runs.append(executed(self._session.profiled()))
        return outputs

    def operators(self) -> tuple[OperatorRuns, ...]:
        origins = _origins(self._compiled)
        places = list(dict.fromkeys(place for run in self._runs for place in run))
        if not places:
            got = f"none in {len(self._runs)} inferences"
            raise MeasurementError(_WHAT, expected="operators that were executed", got=got)
        kinds = {place: kind for run in self._runs for place, (kind, _) in run.items()}
        return tuple(
            OperatorRuns(
                name, kinds[place, name], (name, *origins.get(name, ())),
                tuple(run[place, name][1] if (place, name) in run else 0 for run in self._runs),
            )
            for place, name in places
        )  # fmt: skip

    def __enter__(self) -> OpenVinoProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()


def executed(counters: Sequence[Any]) -> dict[tuple[int, str], tuple[str, int]]:
    """Of one inference, by place and name: kind and time in ns; what was fused into others was not run."""
    return {
        (place, str(each.node_name)): (f"{each.node_type} ({each.exec_type})", each.real_time // _MICROSECOND * 1000)
        for place, each in enumerate(counters)
        if str(each.status) == _EXECUTED
    }


def _origins(compiled: Any) -> dict[str, tuple[str, ...]]:
    """The file's operators that each one of the graph that runs was made of."""
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if _ORIGINS in info:
            found[node.get_friendly_name()] = tuple(filter(None, info[_ORIGINS].astype(str).split(",")))
    return found
