"""Which form pays where: plans of one model at one cost, each with other forms, as int8 files in every runtime.

    python tools/benchmark_forms.py            # writes tools/results/forms.json and prints a table
    python tools/benchmark_forms.py --samples fmnist-vit --share 0.3 --runtimes openvino

What the file holds of samples that were not asked for stays in it.

The cost is the mean of the shares of the model's parameters and MACs, as `rowcol-edge` searches for a drop. All plans
get the second pass. Files of one runtime take turns in one session beside the dense int8 file and a null arm; OpenVINO
is held to older instruction sets too (evidence `proxy`), which is as near as this machine comes to an edge CPU. `kl` is
that of the int8 file's answers from the dense float network's on the selection split, in nats.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmark_machine import machine, settle
from int8_files import RUNTIMES, TARGET, compiled, logits, scores
from markdown_table import interval
from rowcol_edge import arms, config, evaluation, job, search, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.device import schedule, stats, system
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.profile import NULL
from rowcol_edge.device.session import run_session
from rowcol_edge.device.verdicts import judge
from rowcol_edge.device.worker import TIME, Request
from rowcol_edge.errors import MeasurementError
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import ranks
from rowcol_edge.factoring.allocation import Allocator, Widths
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.costs import LayerInfo, Split
from rowcol_edge.factoring.options import Options
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study, study
from rowcol_edge.report.progress import reporter

RESULTS = Path(__file__).parent / "results"
CAPS = {"openvino": ("", "AVX2_VNNI", "AVX2")}
FORMS = ("column", "column, row, both", "narrow", "all")
_TIMEOUT_SECONDS = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=["elpv-resnet18", "fmnist-vit"])
    parser.add_argument("--share", type=float, default=0.35, help="of the cost that a plan may have")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=stats.MIN_ROUNDS, help="fresh processes for each file")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each session, as far as the rounds allow")
    parser.add_argument("--work", type=Path, default=Path("dist/forms"), help="the files that are measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "forms.json")
    options = parser.parse_args()
    written = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"samples": {}}
    with reporter() as progress:
        made = {name: files(name, options, progress) for name in options.samples}
    settle()
    for name, (said, paths, example) in made.items():
        sessions = [
            timed(runtime, cap, paths[runtime], example, options)
            for runtime in options.runtimes
            for cap in CAPS.get(runtime, ("",))
        ]
        written["samples"][name] = said | {
            "command": shlex.join(["python", *sys.argv]), "machine": machine(), "tools": job.tool_versions(),
            "share": options.share, "sessions": sessions,
        }  # fmt: skip
        print(table(name, written["samples"][name]), flush=True)
        options.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


def plans(known: Study, share: float) -> dict[str, FactorPlan | None]:
    """By forms; None where they cannot save so much."""

    def cost(info: LayerInfo, split: Split | None) -> float:
        return (ranks.parameters(info, split) / known.parameters + ranks.macs(info, split) / known.macs) / 2

    # OpenVINO crashes under AVX2 in a layer norm over a number of channels that 16 does not divide
    multiple = targets.load(TARGET).rank_multiple
    widths = Widths(known.infos, known.channels)
    losses = {name: space.losses for name, space in known.channel_spaces.items()}
    allowed: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], bool]] = {
        "column": (known.spaces, {}, False),
        "column, row, both": (known.spaces, known.input_spaces, False),
        "narrow": ({}, {}, True),
        "all": (known.spaces, known.input_spaces, True),
    }
    found: dict[str, FactorPlan | None] = {}
    for name, (outputs, inputs, narrow) in allowed.items():
        allocator = Allocator(widths, Options(outputs, inputs, multiple, 1.0), losses) if narrow else None
        try:
            plan = ranks.plan_by_cost(
                known.infos, outputs, cost, total=1.0, limit=share, rank_multiple=multiple, made_by=name,
                allocator=allocator, inputs=inputs,
            )  # fmt: skip
            found[name] = replace(plan, refit=True)
        except ranks.OverBudgetError:
            found[name] = None
    return found


def files(
    name: str, options: argparse.Namespace, progress: job.Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Path]], Path]:
    """What is known of each plan's files, where they are by runtime and plan, and an input for them."""
    work = job.prepare(config.make({"model": f"sample:{name}"}), progress=progress)
    known = study(work.model.module, work.calibration, classify=True, progress=progress)
    reference = logits(torch_run(known.dense), work)
    target = targets.load(TARGET)
    rows = []
    paths: dict[str, dict[str, Path]] = {runtime: {} for runtime in options.runtimes}
    dense = FactorPlan((), made_by="dense")
    for form, plan in {"dense": dense, **plans(known, options.share)}.items():
        if plan is None:
            rows.append({"forms": form, "unreachable": True})
            continue
        module = factored(known, plan, progress)
        spent = search.trial(known, ranks.refresh(plan, known.infos, known.spaces, known.channels, known.input_spaces),
                             None, None)  # fmt: skip
        row: dict[str, Any] = {
            "forms": form, "parameters": spent.parameters, "macs": spent.macs, "predicted": plan.loss, "gap": plan.gap,
            "layers": _counted(plan), "fp32_kl": scores(logits(torch_run(module), work), reference)["kl"], "files": {},
        }  # fmt: skip
        folder = options.work / name / form.replace(", ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for runtime, path in compiled(module, options.runtimes, work, folder, partial(progress, f"{form} at int8")):
            with evaluation.opened(
                path, load_backend(runtime).host_runtime, arms.runtime_options(target, target.runtime(runtime))
            ) as run:
                judged = scores(logits(run, work), reference)
            size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.is_file())
            row["files"][runtime] = {"size_bytes": size, **judged}
            paths[runtime][form] = path
        rows.append(row)
    example = options.work / name / "input.npz"
    np.savez(example, allow_pickle=False, **{key: array[:1] for key, array in work.calibration.example().items()})
    said = {"dense_parameters": known.parameters, "dense_macs": known.macs, "rows": rows}
    return said, paths, example


def _counted(plan: FactorPlan) -> dict[str, int]:
    """How many layers have which form."""
    names = [f"{layer.split}" if layer.form == "project" else layer.form for layer in plan.layers]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def timed(runtime: str, cap: str, paths: dict[str, Path], example: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All files of a runtime, held to an instruction set or not, in one session."""
    target = targets.load(TARGET)
    spec, host = target.runtime(runtime), system.environment()
    with np.load(example) as found:
        batch = dict.fromkeys(found.files, 1)
    requests = {
        form: Request(
            mode=TIME, arm=form, runtime=runtime, artifact=str(path.resolve()), golden_inputs=str(example.resolve()),
            batch=batch, threads=min(target.threads, host.cores_usable), providers=spec.providers,
            properties=spec.properties, min_samples=schedule.MIN_SAMPLES, max_samples=schedule.MAX_SAMPLES,
        )
        for form, path in paths.items()
    }  # fmt: skip
    requests[NULL] = requests["dense"]
    variables = {"ONEDNN_MAX_CPU_ISA": cap} if cap else {}
    level = system.PROXY if cap else system.evidence_for(target.to_dict(), host).level
    said = {"runtime": runtime, "cap": cap, "evidence": level}
    try:
        session = run_session(
            requests, Processes(variables, _TIMEOUT_SECONDS), options.rounds, options.seconds, job.silent
        )
    except MeasurementError as e:  # the others are still worth knowing
        return said | {"error": str(e)}
    judged = judge(session.blocks, [(form, "dense") for form in paths if form != "dense"], "dense", level)
    medians = {form: stats.median([ns for block in session.blocks[form] for ns in block.samples_ns]) for form in paths}
    return said | {
        "median_ns": medians,
        "ratios": {c.arm: {"ratio": c.ratio, "ci_low": c.ci_low, "ci_high": c.ci_high} for c in judged.comparisons},
        "null": {"ratio": judged.null.ratio, "ci_low": judged.null.ci_low, "ci_high": judged.null.ci_high},
        "warnings": [*session.warnings, *judged.warnings],
    }  # fmt: skip


def table(name: str, found: dict[str, Any]) -> str:
    """A row for each runtime and setting, a column for each plan: time beside the dense int8 file, bytes, KL."""
    rows = {row["forms"]: row for row in found["rows"] if "files" in row}
    lines = [f"{name}: dense {found['dense_parameters']:,} parameters, {found['dense_macs']:,} MACs"]
    lines += [
        f"  {form}: {row['parameters']:,} parameters, {row['macs']:,} MACs, KL {row['fp32_kl']:.5f}, {row['layers']}"
        for form, row in rows.items()
    ]
    for session in found["sessions"]:
        lines.append(f"  {session['runtime']} {session['cap'] or '(no cap)'}, {session['evidence']}")
        if "error" in session:
            lines.append(f"    {session['error']}")
            continue
        for form, row in rows.items():
            file, ratio = row["files"][session["runtime"]], session["ratios"].get(form)
            beside = interval(ratio) if ratio else "1"
            time, size = session["median_ns"][form] / 1e6, file["size_bytes"] / 1e6
            lines.append(f"    {form:20} {time:8.2f} ms  {beside:22} {size:7.2f} MB  KL {file['kl']:.5f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
