"""Which form pays where: plans of one model at one cost, each with other forms, as int8 bundles in every runtime.

    python tools/benchmark_forms.py            # writes tools/results/forms.json and prints a table
    python tools/benchmark_forms.py --models fmnist-vit --share 0.3 --runtimes openvino
    python tools/benchmark_forms.py --only build && python tools/benchmark_forms.py --only time
    python tools/benchmark_forms.py --plans factoring    # ours of benchmark_factoring.py: factoring-int8.json

What the file holds of models that were not asked for stays in it. The models, and what they need, are those of
`benchmark_factoring.py`. Sessions stay too where a model is built again to bundles of the same shapes: what values
their files hold does not matter to time.

The cost is the mean of the shares of the parameters and MACs of the layers that can be factored. All plans get the
second pass. With `--plans factoring` they are those that `benchmark_factoring.py` made: shares of the parameters or of
the MACs alone, and ranks and widths that are no multiples of anything. Each plan is a whole bundle, as
`build --plan … --precision int8` makes it: gauges chosen, the repair and layers in float where a file is too far off
without, and verified; *dense* is the plan that changes nothing. Files of one runtime take turns in one session beside
that one and a null arm; OpenVINO is held to older instruction sets too (evidence `proxy`), which is as near as this
machine comes to an edge CPU. `kl` is that of the int8 file's answers from the dense float network's, in nats: on the
selection split, of EfficientNet-Lite0 on new crops of the photos that it was calibrated on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import factoring_rivals as rivals
from benchmark_factoring import SHARES, SUBJECTS
from benchmark_machine import machine, settle
from int8_files import RUNTIMES, TARGET, logits, scores
from markdown_table import interval
from rowcol_edge import arms, bundling, evaluation, job, pipeline, search, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.cache import Cache
from rowcol_edge.datasets import Feeds
from rowcol_edge.device import schedule, stats, system
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.profile import NULL
from rowcol_edge.device.session import run_session
from rowcol_edge.device.verdicts import judge
from rowcol_edge.device.verify import verify
from rowcol_edge.device.worker import TIME, Request
from rowcol_edge.errors import MeasurementError
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import balance, ranks
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
PLANS = {"forms": "forms.json", "factoring": "factoring-int8.json"}
DENSE = "dense"
AXES = {"parameters": "parameters", "macs": "MACs"}
_TIMEOUT_SECONDS = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--only", choices=("build", "time"), help="the bundles, or sessions of those that are there")
    parser.add_argument("--plans", choices=PLANS, default="forms")
    parser.add_argument("--share", type=float, default=0.35, help="of the cost that a plan of forms may have")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=stats.MIN_ROUNDS, help="fresh processes for each file")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each session, as far as the rounds allow")
    parser.add_argument("--work", type=Path, default=Path("dist/forms"), help="the bundles, and what stages keep")
    parser.add_argument("--out", type=Path, help="forms.json or factoring-int8.json among the results if not given")
    options = parser.parse_args()
    options.out = options.out or RESULTS / PLANS[options.plans]
    options.cache = options.work / "cache"
    options.work /= options.plans

    def kept() -> dict[str, Any]:
        return json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"models": {}}

    def keep(name: str, found: dict[str, Any], step: str) -> None:
        made = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "source": job.own_source()}
        made["tools"] = job.tool_versions()
        written = kept()
        written["models"][name] = found | {step: made}
        options.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    if options.only != "time":
        with reporter() as progress:
            for name in options.models:
                before, found = kept()["models"].get(name), bundles(name, options, progress)
                if before is not None and _shapes(before) == _shapes(found):
                    found = {key: before[key] for key in ("sessions", "time") if key in before} | found
                share = {"share": options.share} if options.plans == "forms" else {}
                keep(name, {"sessions": []} | found | share, "build")
    if options.only != "build":
        settle()
        for name in options.models:
            found = kept()["models"][name]
            sessions = {(each["runtime"], each["cap"]): each for each in found["sessions"]}
            for runtime in options.runtimes:
                for cap in CAPS.get(runtime, ("",)):
                    sessions[runtime, cap] = timed(name, runtime, cap, found["rows"], options)
            keep(name, {**found, "sessions": list(sessions.values())}, "time")
            print(table(name, kept()["models"][name]), flush=True)
    print(f"written to {options.out}")


def plans(known: Study, share: float) -> dict[str, FactorPlan | None]:
    """By forms; None where they cannot save so much."""

    free = [known.infos[name] for name in known.spaces]
    parameters, macs = sum(info.parameters for info in free), sum(info.macs for info in free)

    def cost(info: LayerInfo, split: Split | None) -> float:
        return (ranks.parameters(info, split) / parameters + ranks.macs(info, split) / macs) / 2

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

    def made(name: str, factor: float) -> FactorPlan:
        outputs, inputs, narrow = allowed[name]
        options = Options(outputs, inputs, multiple, 1.0)
        return ranks.plan_by_cost(
            known.infos, outputs, cost, total=1.0, limit=share, rank_multiple=multiple, made_by=name,
            allocator=Allocator(widths, options, losses, factor) if narrow else None, inputs=inputs,
        )  # fmt: skip

    for name in allowed:
        try:
            found[name] = replace(balance.nearer(known, partial(made, name)), refit=True)
        except ranks.OverBudgetError:
            found[name] = None
    return found


def shared(known: Study) -> dict[str, FactorPlan | None]:
    """Those of `benchmark_factoring.py`; None where they cannot save so much."""
    ours = rivals.WAYS[-1]
    found: dict[str, FactorPlan | None] = {}
    for axis, share in itertools.product(AXES, SHARES):
        name = f"{share:.0%} of the {AXES[axis]}"
        try:
            found[name] = rivals.plan(ours, known, dict(known.spaces), axis, share)
        except ranks.OverBudgetError:
            found[name] = None
    return found


def bundles(name: str, options: argparse.Namespace, progress: job.Progress) -> dict[str, Any]:
    """What is known of each plan's bundles, which lie in `_folder`, and of an input for them beside."""
    subject = SUBJECTS[name](options.work / "data", progress)
    work = subject.work
    judged = next(iter(subject.tests.values())).feeds if work.selection is None else list(work.selection.batches())
    known = study(work.model.module, work.calibration, classify=True, progress=progress)
    reference = logits(torch_run(known.dense), judged)
    chosen = plans(known, options.share) if options.plans == "forms" else shared(known)
    rows: list[dict[str, Any]] = []
    for form, plan in {DENSE: FactorPlan((), made_by=DENSE), **chosen}.items():
        if plan is None:
            rows.append({"forms": form, "unreachable": True})
            continue
        spent = search.trial(known, ranks.refresh(plan, known.infos, known.spaces, known.channels, known.input_spaces),
                             None, None)  # fmt: skip
        row: dict[str, Any] = {
            "forms": form, "parameters": spent.parameters, "macs": spent.macs, "predicted": plan.loss, "gap": plan.gap,
            "layers": _counted(plan),
            "fp32_kl": scores(logits(torch_run(factored(known, plan, progress)), judged), reference)["kl"],
            "files": {},
        }  # fmt: skip
        folder = _folder(options, name, form)
        folder.mkdir(parents=True, exist_ok=True)
        plan.write(folder / "plan.toml")
        for runtime in options.runtimes:
            with _built(work, form, runtime, options, folder, progress) as bundle:
                row["files"][runtime] = _file(bundle, judged, reference)
        rows.append(row)
    example = {key: array[:1] for key, array in work.calibration.example().items()}
    np.savez(options.work / name / "input.npz", allow_pickle=False, **example)
    return {"dense_parameters": known.parameters, "dense_macs": known.macs, "rows": rows}


def _built(
    work: job.Job, form: str, runtime: str, options: argparse.Namespace, folder: Path, progress: job.Progress
) -> Bundle:
    asked = replace(
        work.options, target=(TARGET,), runtime=runtime, precision="int8", plan=str(folder / "plan.toml"),
        out=str(folder), dense=False, zip=False,
    )  # fmt: skip

    def told(label: str, done: int, total: int) -> None:
        progress(f"{form}, {runtime}: {label}", done, total)

    [built] = pipeline.build(asked, cache=Cache(options.cache), progress=told)
    return Bundle.open(built.path)


def _file(bundle: Bundle, judged: Sequence[Feeds], reference: np.ndarray) -> dict[str, Any]:
    target, manifest = targets.load(TARGET), bundle.manifest
    arm, runtime = bundle.arm(), manifest.runtime.name
    settings = arms.runtime_options(target, target.runtime(runtime))
    with evaluation.opened(bundle.artifact(arm), load_backend(runtime).host_runtime, settings) as run:
        found = scores(logits(run, judged), reference)
    return {
        "size_bytes": arm.size_bytes,
        "repaired": any(note.startswith(f"{arm.name}: layers equalised") for note in manifest.build["notes"]),
        "kept_float": list(arm.kept_float),
        **found,
        "verified": verify(bundle).ok,
    }


def _shapes(found: dict[str, Any]) -> list[list[Any]]:
    """What decides how long the files take."""
    return [
        [*(row.get(key) for key in ("forms", "parameters", "macs", "layers")),
         {runtime: file.get("kept_float") for runtime, file in row.get("files", {}).items()}]
        for row in found["rows"]
    ]  # fmt: skip


def _folder(options: argparse.Namespace, name: str, form: str) -> Path:
    return Path(options.work) / name / form.replace(", ", "-")


def _counted(plan: FactorPlan) -> dict[str, int]:
    """How many layers have which form."""
    names = [f"{layer.split}" if layer.form == "project" else layer.form for layer in plan.layers]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def timed(
    name: str, runtime: str, cap: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """All files of a runtime, held to an instruction set or not, in one session."""
    target, example = targets.load(TARGET), Path(options.work) / name / "input.npz"
    paths: dict[str, Path] = {}
    for form in (row["forms"] for row in rows if "files" in row):
        with Bundle.open(bundling.path(_folder(options, name, form), target, runtime)) as bundle:
            paths[form] = bundle.artifact()
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
    requests[NULL] = requests[DENSE]
    variables = {"ONEDNN_MAX_CPU_ISA": cap} if cap else {}
    level = system.PROXY if cap else system.evidence_for(target.to_dict(), host).level
    said = {"runtime": runtime, "cap": cap, "evidence": level}
    crashed: dict[str, str] = {}
    while True:
        try:
            session = run_session(
                requests, Processes(variables, _TIMEOUT_SECONDS), options.rounds, options.seconds, job.silent
            )
            break
        except MeasurementError as e:  # the others are still worth knowing
            form = max((form for form in paths if e.what.startswith(f"arm {form}, ")), key=len, default=DENSE)
            if form == DENSE:
                return said | {"error": str(e)}
            crashed[form] = str(e)
            del requests[form], paths[form]
    judged = judge(session.blocks, [(form, DENSE) for form in paths if form != DENSE], DENSE, level)
    medians = {form: stats.median([ns for block in session.blocks[form] for ns in block.samples_ns]) for form in paths}
    return said | {
        "crashed": crashed,
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
            if form in session["crashed"]:
                lines.append(f"    {form:20} {session['crashed'][form]}")
                continue
            file, ratio = row["files"][session["runtime"]], session["ratios"].get(form)
            beside = interval(ratio) if ratio else "1"
            time, size = session["median_ns"][form] / 1e6, file["size_bytes"] / 1e6
            lines.append(f"    {form:20} {time:8.2f} ms  {beside:22} {size:7.2f} MB  KL {file['kl']:.5f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
