"""What factoring costs: ResNet-50 and DeiT-S to half of their parameters with 256 images of 224², without a second pass
and with one. Each model in a process of its own: seconds and processor seconds of every stage (the latter are what to
go by where others use the machine too), and the most memory that the whole process ever had. Apart from these: a plan
within two limits at once, and the choice of gauges, which is for int8.

    python tools/benchmark_factoring_cost.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

IMAGES = 256
SHARES = (0.7, 0.4)  # of the MACs, as a limit beside half of the parameters
MODELS = ("resnet50", "deit_small")
_RESULT = Path(__file__).with_name("results") / "factoring-cost.json"


class Clock:
    """Stages one after the other."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._began = time.perf_counter(), time.process_time()

    def stage(self, name: str) -> None:
        """The one that has just ended."""
        now = time.perf_counter(), time.process_time()
        passed = [round(after - before, 2) for after, before in zip(now, self._began, strict=True)]
        self.stages[name] = dict(zip(("seconds", "cpu_seconds"), passed, strict=True))
        self._began = now


def measure(name: str, threads: int) -> dict[str, Any]:
    """One model, in this process."""
    import torch

    import benchmark_models
    from rowcol_edge import datasets, limits, search
    from rowcol_edge.device.memory import peak_bytes
    from rowcol_edge.factoring import ranks
    from rowcol_edge.factoring.apply import factored, metrics
    from rowcol_edge.factoring.settle import SAMPLES, settle_model
    from rowcol_edge.factoring.study import study

    torch.set_num_threads(threads)
    benchmark_models.PHOTOS["calibration"] = IMAGES
    model: torch.nn.Module = getattr(benchmark_models, name)().eval()
    crops = datasets.Split(
        "calibration", "photos", lambda: (({"x": batch}, None) for batch in benchmark_models.calibration())
    )
    split = datasets.scan(crops)
    clock = Clock()
    known = study(model, split, classify=True)
    clock.stage("graph")
    narrowed = sum(not each.fixed for each in known.channels)
    clock.stage("couplings")
    spaces, channels = dict(known.spaces), dict(known.channel_spaces)
    clock.stage("spaces")
    half = limits.of_parameters(known, known.parameters // 2, "params<=0.5x")
    plan = search.within(known, [half], 16, name)
    clock.stage("plans, of which one is taken")
    factored(known, plan)
    clock.stage("rewriting")
    peak = peak_bytes()
    once = list(clock.stages.values())
    made = factored(known, replace(plan, refit=True))
    clock.stage("rewriting with a second pass")
    twice, peak_twice = [*once[:-1], clock.stages["rewriting with a second pass"]], peak_bytes()
    limits.cheapest(known, [half], 16, name)
    clock.stage("allocation")
    for share in SHARES:
        also = limits.Limit(f"macs<={share}x", "macs", ranks.macs, known.macs, share * known.macs)
        limits.cheapest(known, [half, also], 16, name)
        clock.stage(f"allocation with {also.text} beside")
    names, samples = [layer.name for layer in plan.projected], split.spread(SAMPLES)
    settle_model(made, names, samples, metrics=metrics(known, plan))
    clock.stage("gauges")
    return {
        "images": len(split),
        "layers": len(spaces),
        "channel_sets": [len(channels), narrowed],
        "parameters": [known.parameters, known.parameters - plan.saved_parameters],
        "stages": clock.stages,
        "once": {key: round(sum(stage[key] for stage in once), 1) for key in once[0]} | {"peak_bytes": peak},
        "twice": {key: round(sum(stage[key] for stage in twice), 1) for key in twice[0]} | {"peak_bytes": peak_twice},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=MODELS, help="in this process, to stdout")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.threads)))
        return
    from benchmark_machine import machine
    from rowcol_edge import job

    made = {"source": job.own_source(), "tools": job.tool_versions()}
    kept: dict[str, Any] = json.loads(_RESULT.read_text(encoding="utf-8")) if _RESULT.is_file() else {}
    models = kept.get("models", {})
    for name in options.models:
        command = [sys.executable, __file__, "--one", name, "--threads", str(options.threads)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))
        load = os.getloadavg()[0]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | threads, text=True)
        models[name] = json.loads(done.stdout) | {"threads": options.threads, "load_before": round(load, 2)} | made
        result = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "models": models}
        _RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table(name, models[name]))


def table(name: str, found: dict[str, Any]) -> str:
    lines = [f"{name}: {found['images']} images, {found['threads']} threads"]
    lines += [
        f"  {stage:30}{at['seconds']:8.1f} s{at['cpu_seconds']:8.1f} cpu-s" for stage, at in found["stages"].items()
    ]
    for which, title in (("once", "without a second pass"), ("twice", "with one")):
        at = found[which]
        size = at["peak_bytes"] / 2**30
        lines.append(f"  {title:30}{at['seconds']:8.1f} s{at['cpu_seconds']:8.1f} cpu-s, {size:.2f} GiB at its peak")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
