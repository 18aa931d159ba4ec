"""Measure the ELPV sample here: its three arms, and how far factoring goes within a drop, without fine-tuning.

    python tools/benchmark_elpv.py            # writes tools/results/elpv-generic-x86.json

Everything is chosen on the selection split; the test split is reported for the bundle that was chosen, once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rowcol_edge
from benchmark_machine import machine, settle
from rowcol_edge import config, evaluation, job, search
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.study import study
from rowcol_edge.report.progress import reporter

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="elpv-resnet18")
    parser.add_argument("--target", default="generic-x86")
    parser.add_argument("--budget", default="drop<=0.5pp")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--work", default="dist/benchmark")
    options = parser.parse_args()
    started = time.monotonic()
    with reporter() as progress:
        reference = f"sample:{options.sample}"
        built = rowcol_edge.build(
            reference, target=options.target, budget=options.budget, out=options.work, force=True, progress=progress
        )[0]
        plans = frontier(reference, options.target, progress)
        settle()
        measured = rowcol_edge.profile(built.path, blocks=options.blocks, progress=progress)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "source": job.own_source(),
        "seconds": round(time.monotonic() - started),
        "manifest": built.manifest.to_dict(),
        "profile": summary(measured.to_dict()),
        "frontier": plans,
    }
    out = RESULTS / f"{options.sample.partition('-')[0]}-{options.target}.json"
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {out}")


def frontier(reference: str, target: str, progress: job.Progress) -> list[dict[str, Any]]:
    """Every plan of the search's ladder on the selection split at fp32, from careful to bold."""
    work = job.prepare(config.make({"model": reference, "target": target}), progress=progress)
    known = study(work.model.module, work.calibration, classify=True, progress=progress)
    assert work.selection is not None

    selection = work.selection

    def judged(module: Any, original: evaluation.Judged | None) -> evaluation.Judged:
        return evaluation.judge_selection(evaluation.predict(torch_run(module), selection, work), work, original)

    dense = judged(work.model.module, None)
    rows = [{"plan": "dense", "parameters": known.parameters, "macs": known.macs, "value": dense.value, "drop": 0.0}]
    ladder = search.Ladder(known, work.targets[0].rank_multiple, work.model.name)
    for i in range(len(ladder.plans)):
        progress("frontier", i, len(ladder.plans))
        plan = ladder.nearer(i)
        if plan.changes:
            found = judged(factored(known, replace(plan, refit=True)), dense)
            trial = search.trial(known, plan, found.value, evaluation.drop(work, dense, found))
            rows.append(
                {
                    "plan": trial.made_by, "parameters": trial.parameters, "macs": trial.macs,
                    "value": trial.value, "drop": trial.drop,
                }
            )  # fmt: skip
    return rows


def summary(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile without its raw samples, which would fill the repository."""
    return {key: _without_samples(value) for key, value in profile.items()}


def _without_samples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_samples(v) for k, v in value.items() if k not in ("blocks", "samples_ns", "warmups_ns")}
    return [_without_samples(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
