"""Times of TensorRT's layers, which it reports of each run to a profiler: docs.nvidia.com/deeplearning/tensorrt,
"IProfiler". A layer that several of the file's operators became has their names, with a plus between them."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ...errors import MeasurementError
from .base import OperatorRuns
from .tensorrt_build import trt

if TYPE_CHECKING:
    from .tensorrt import TensorRtSession

_JOINED = " + "


class LayerTimes(trt.IProfiler):  # type: ignore[misc]
    """Collects what is reported of one run: ns by the name of the layer."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.reported: dict[str, int] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.reported[layer_name] = self.reported.get(layer_name, 0) + round(ms * 1e6)


class TensorRtProfiler:
    """A session whose layers report their times."""

    def __init__(self, session: TensorRtSession) -> None:
        self._session = session
        self._times = LayerTimes()
        session.report_to(self._times)
        self._runs: list[dict[str, int]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> object:
        outputs = self._session.infer(feeds)
        self._runs.append(self._times.reported)
        self._times.reported = {}
        return outputs

    def operators(self) -> tuple[OperatorRuns, ...]:
        names = dict.fromkeys(name for run in self._runs for name in run)
        if not names:
            got = f"none in {len(self._runs)} inferences"
            raise MeasurementError("operators of tensorrt", expected="layers that report their times", got=got)
        return tuple(
            OperatorRuns(name, "layer", tuple(name.split(_JOINED)), tuple(run.get(name, 0) for run in self._runs))
            for name in names
        )

    def __enter__(self) -> TensorRtProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()
