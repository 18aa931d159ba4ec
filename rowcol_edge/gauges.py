"""The gauges of a job's factored models: chosen for each plan by what int8 makes of it, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import nn

from .factoring.apply import metrics
from .factoring.plan import FactorPlan
from .factoring.settle import SAMPLES, Settled, settle_model
from .factoring.study import Study
from .job import Job, Progress
from .targets import Target

_Found = tuple[nn.Module, dict[str, Settled]]


@dataclass(frozen=True, slots=True)
class Gauged:
    """A plan's factored model in its gauges.

    Attributes:
        plan: the plan, whose layers say their gauges.
        module: makes the model.
        note: what was gained, in one line.
    """

    plan: FactorPlan
    module: Callable[[], nn.Module]
    note: str


class Settler:
    """Settles the factored models of one job, each once for targets whose processors take weights alike.

    Whatever the precision: the float product is the same, so that all precisions start from one file.
    """

    def __init__(self, job: Job, study: Study, progress: Progress) -> None:
        self._job, self._study, self._progress = job, study, progress
        self._records: dict[tuple[str, int], Mapping[str, Mapping[str, Any]]] = {}
        self._last: tuple[tuple[str, int], _Found] | None = None

    def of(self, plan: FactorPlan, target: Target, make: Callable[[], nn.Module]) -> Gauged:
        """The plan's model, which ``make`` makes as it was factored, or recovered."""
        bits = 7 if target.int8_saturates else 8
        if not plan.projected:
            return Gauged(plan, make, "")
        record = self._record(plan, bits, make)
        layers = (
            replace(layer, gauge=record[layer.name]["gauge"]) if layer.name in record else layer
            for layer in plan.layers
        )
        before, after = (fmean(said[key] for said in record.values()) for key in ("before", "after"))
        note = (
            f"factored: gauges of {len(record)} layers chosen on {SAMPLES} calibration inputs, simulated int8 error "
            f"(weights of {bits} bits, 8 between factors) {before:.2e} → {after:.2e}"
        )
        return Gauged(replace(plan, layers=tuple(layers)), lambda: self._settled(plan, bits, make)[0], note)

    def _record(self, plan: FactorPlan, bits: int, make: Callable[[], nn.Module]) -> Mapping[str, Mapping[str, Any]]:
        key = (plan.digest, bits)
        if key not in self._records:
            job = self._job

            def found() -> str:
                _, settled = self._settled(plan, bits, make)
                return json.dumps(
                    {
                        name: {"gauge": str(each), "before": each.before, "after": each.error}
                        for name, each in settled.items()
                    }
                )

            stage = job.stage_key("gauges", plan.digest, bits, job.contract, job.calibration.key, job.recovery_key)
            self._records[key] = json.loads(job.cache.text(stage, found))
        return self._records[key]

    def _settled(self, plan: FactorPlan, bits: int, make: Callable[[], nn.Module]) -> _Found:
        """Deterministic; the last one is kept for the export that follows."""
        key = (plan.digest, bits)
        if self._last is None or self._last[0] != key:
            self._last = None  # not two models at once
            found = settle_model(
                make(),
                [layer.name for layer in plan.projected],
                self._job.calibration.spread(SAMPLES),
                metrics=metrics(self._study, plan),
                weight_bits=bits,
                progress=self._progress,
            )
            self._last = key, found
        return self._last[1]
