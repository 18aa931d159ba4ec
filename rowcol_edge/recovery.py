"""Recovering a job's factored models: each plan's once, kept in the cache, and what the bundle says of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from .evaluation import HELD, Judged
from .factoring import snapshots
from .factoring.apply import factored
from .factoring.distil import Distillation
from .factoring.plan import FactorPlan
from .factoring.recover import Judge, Recovered, recover
from .factoring.snapshots import Tensors
from .factoring.study import Study
from .job import Job, Progress

_TENSORS, _SAID = "model.safetensors", "recovered.json"


@dataclass(frozen=True, slots=True)
class Recovery:
    """A plan's recovered weights.

    Attributes:
        plan: the plan, whose ``recovered`` says for how many epochs.
        record: epochs trained, rate and figures, for the manifest; ``before`` and ``after`` are of ``measure``.
    """

    plan: FactorPlan
    record: Mapping[str, Any]
    tensors: Tensors

    @property
    def note(self) -> str:
        """In one line."""
        said = self.record
        stopped = f"; {said['stopped']}" if said["stopped"] else ""
        return (
            f"factored: recovered in {said['epochs']} epochs, the best is {said['best_epoch'] or 'none'}: "
            f"{said['measure']} {said['before']:.4g} → {said['after']:.4g} on the {said['judged_on']} split{stopped}"
        )


class Recoverer:
    """Recovers plans of one job. ``judge`` runs a module on the selection split."""

    def __init__(self, job: Job, study: Study, judge: Callable[[nn.Module, str], Judged], progress: Progress) -> None:
        self._job, self._study, self._judge, self._progress = job, study, judge, progress
        self._found: dict[str, Recovery] = {}

    def of(self, plan: FactorPlan | None) -> Recovery | None:
        """The recovery of a plan; None where none was asked for or nothing is factored."""
        if not self._job.options.recover or plan is None or not plan.changes:
            return None
        if plan.digest not in self._found:
            self._found[plan.digest] = self._made(plan)
        return self._found[plan.digest]

    def module(self, recovery: Recovery) -> nn.Module:
        """The recovered model."""
        made = factored(self._study, replace(recovery.plan, refit=False))  # for its shapes: the weights are kept
        snapshots.restore(made, recovery.tensors)
        return made

    def _made(self, plan: FactorPlan) -> Recovery:
        job = self._job
        key = job.stage_key("recovered", plan.digest, job.recovery_key)

        def write(folder: Path) -> None:
            found = self._recovered(plan, key)
            save_file(snapshots.state(found.module), folder / _TENSORS)
            (folder / _SAID).write_text(json.dumps(self._record(found)), encoding="utf-8")

        with tempfile.TemporaryDirectory(prefix="rowcol-recovery-") as work:
            entry = Path(work) / "entry"
            job.cache.get(key, entry, write)
            tensors, record = load_file(entry / _TENSORS), json.loads((entry / _SAID).read_text(encoding="utf-8"))
        return Recovery(replace(plan, recovered=record["epochs"]), record, tensors)

    def _recovered(self, plan: FactorPlan, key: str) -> Recovered:
        job = self._job
        return recover(
            factored(self._study, plan, self._progress),
            self._study.folded,  # answers as the original does
            job.recovery or job.calibration,
            self._scored,
            epochs=job.options.recover,
            classify=job.contract == "classify",
            cache=job.cache,
            key=key,
            progress=self._progress,
        )

    @property
    def _scored(self) -> Judge | None:
        """Labels decide, else fidelity on the selection split; without one that on what training holds out."""
        job, folded = self._job, self._study.folded
        if job.metric is not None:
            sign = 1.0 if job.metric.higher_is_better else -1.0
            return lambda module, label: sign * self._judge(module, label).value
        if job.selection is None:
            return None
        selection, classify = job.selection, job.contract == "classify"

        def fidelity(module: nn.Module, label: str) -> float:
            self._progress(label, 0, 1)
            distillation = Distillation(module, folded, [selection.spread(HELD)], classify=classify)
            distance = distillation.distance(module, selection.batches())
            self._progress(label, 1, 1)
            return -distance

        return fidelity

    def _record(self, found: Recovered) -> dict[str, Any]:
        job = self._job
        measure = "distance to the original" if job.metric is None else job.metric.name
        sign = 1.0 if job.metric is not None and job.metric.higher_is_better else -1.0
        data = job.recovery or job.calibration
        return {
            "epochs": found.history[-1].epoch,
            "best_epoch": found.best_epoch,
            "measure": measure,
            "judged_on": "calibration" if job.selection is None else "selection",
            "before": sign * found.before.score,
            "after": sign * found.after.score,
            "learning_rate": found.learning_rate,
            "features": found.features,
            "stopped": found.stopped,
            "data": {"reference": data.reference, "samples": len(data), "digest": data.digest},
            "history": [asdict(epoch) for epoch in found.history],
        }
