"""Every runtime and precision on this machine, dense and factored, beside what the runtimes' own quantizers make.

    python tools/benchmark_backends.py            # writes tools/results/backends.json and backends.md
    python tools/benchmark_backends.py --quick    # the small model, few rounds, into dist/: does it run?

Everything is built first (what a build has cost for ResNet-50 is a result too), then measured: one session for each
model and setting (a runtime, or OpenVINO held to an older instruction set), in which all its files take turns, ours and
the others', with a null arm. A session that is finished is not measured again as long as its files are the same, so the
command can be stopped and run again; what --models and --runtimes leave out stays in the results as it was measured
before, if by the same package. With --precisions the results go to the work folder: such a session is not a whole one.
Under a cap only fp32 and int8 are measured; those figures have evidence `proxy`, and their quality is that of the same
files without a cap.

A file of another maker counts as faster where it is significantly faster than the fastest of ours at its precision; as
better where its drop is more than 0.5 pp smaller than the smallest of ours; as smaller where it has less than 95 % of
the bytes of our smallest; as closer to the original where its outputs' error is less than 75 % of our smallest. Where
we make none at its precision (our int8-dynamic refuses convolutions, which it slows down), all of our quantized files
are its rivals. The reason is looked up in `tools/backends_remarks.toml`; without one the cell is marked `unexplained`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark_backends_files import File, files
from benchmark_backends_table import long_table
from benchmark_cost import build_cost
from benchmark_machine import machine, settle
from benchmark_models import Model, models
from rowcol_edge import job, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.device import schedule, stats, system
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.profile import NULL, Block, Comparison
from rowcol_edge.device.runtimes import load_runtime
from rowcol_edge.device.session import Session, run_session
from rowcol_edge.device.verdicts import judge
from rowcol_edge.device.worker import TIME, Request
from rowcol_edge.errors import MissingDependencyError
from rowcol_edge.report.progress import reporter
from rowcol_edge.targets import RuntimeSpec, Target

HERE = Path(__file__).parent
TARGET = "generic-x86"
CAPS = {"openvino": ("AVX2_VNNI", "AVX2")}
_CAPPED = ("fp32", "int8")
_BETTER_PP = 0.5
_SMALLER = 0.95
_CLOSER = 0.75
_MAKERS = ("benchmark_backends_files.py", "benchmark_models.py", "benchmark_peers.py", "minilm.py")
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Setting:
    """A runtime on this machine, held to an instruction set or not."""

    runtime: RuntimeSpec
    cap: str

    @property
    def name(self) -> str:
        return f"{self.runtime.name} {self.cap}".strip()

    @property
    def variables(self) -> dict[str, str]:
        return {"ONEDNN_MAX_CPU_ISA": self.cap} if self.cap else {}


def main() -> None:
    options = _options()
    os.environ["ROWCOL_CACHE"] = str((options.work / "cache").resolve())
    target = targets.load(TARGET)
    runtimes = [spec for spec in target.runtimes if _there(spec) and spec.name in (options.runtimes or [spec.name])]
    chosen = [model for name, model in models(options.work).items() if name in options.models]
    with reporter() as progress:
        cost = None if options.no_cost else build_cost([spec.name for spec in runtimes], options.work, progress)
        if any(model.name == "minilm" for model in chosen):
            import minilm

            progress("prepare MiniLM", 0, 1)
            minilm.prepare(options.work / "minilm")
        built = {
            (model.name, spec.name): _built(model, target, spec, options.work, progress)
            for model in chosen
            for spec in runtimes
        }
        if options.build_only:
            return
    todo = [
        (model, setting, _wanted(built[model.name, spec.name], setting, options.precisions))
        for model in chosen
        for spec in runtimes
        for setting in _settings(spec)
    ]
    sessions = _measured(todo, target, options)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "tools": job.tool_versions(),
        "source": job.own_source(),
        "models": {
            m.name: {"title": m.title, "source": m.source, "labelled": "test" in m.options or _sample(m)}
            for m in chosen
        },
        "build": cost,
        "sessions": sessions,
    }
    _keep(result, options.out / "backends.json")
    _explain(result["sessions"], tomllib.loads((HERE / "backends_remarks.toml").read_text(encoding="utf-8")))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "backends.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (options.out / "backends.md").write_text(long_table(result), encoding="utf-8")
    print(f"written to {options.out / 'backends.json'} and {options.out / 'backends.md'}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(models(Path()))
    parser.add_argument("--models", nargs="+", default=known, choices=known, help="only these")
    parser.add_argument("--runtimes", nargs="+", help="only these")
    parser.add_argument("--precisions", nargs="+", help="measure only these")
    parser.add_argument("--rounds", type=int, default=stats.MIN_ROUNDS, help="fresh processes for each file")
    parser.add_argument("--seconds", type=float, default=45.0, help="for each session, as far as the rounds allow")
    parser.add_argument("--work", type=Path, default=Path("dist/backends"), help="bundles, cache, finished sessions")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--no-cost", action="store_true", help="leave out the cost of building ResNet-50")
    parser.add_argument("--build-only", action="store_true", help="measure nothing: a later command finds what is made")
    parser.add_argument("--quick", action="store_true", help="fmnist-vit, results in --work")
    options = parser.parse_args()
    if options.quick:
        options.models, options.no_cost, options.seconds = ["fmnist-vit"], True, 1.0
    if options.quick or options.precisions:
        options.out = options.work / "quick"
    return options


def _there(spec: RuntimeSpec) -> bool:
    """Whether this machine can build for a runtime and run it."""
    try:
        load_backend(spec.name)
        load_runtime(spec.name)
    except MissingDependencyError as e:
        print(f"left out: {e}", file=sys.stderr)
        return False
    return True


def _settings(spec: RuntimeSpec) -> list[Setting]:
    return [Setting(spec, cap) for cap in ("", *CAPS.get(spec.name, ()))]


def _sample(model: Model) -> bool:
    return str(model.options["model"]).startswith("sample:")


def _measured(
    todo: Sequence[tuple[Model, Setting, list[File]]], target: Target, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All sessions; one that lies finished in the work folder is read."""
    sessions: list[dict[str, Any]] = []
    todo = [entry for entry in todo if _any_built(*entry)]
    began, measured = time.monotonic(), 0
    for done, (model, setting, wanted) in enumerate(todo):
        key = _key(wanted, setting, options)
        path = options.work / "sessions" / f"{model.name}-{setting.name.replace(' ', '-')}.json"
        found = _kept(path, key)
        if not found:
            if not measured and not options.quick:
                settle()
                began = time.monotonic()
            each = (time.monotonic() - began) / measured if measured else options.seconds
            left = each * (len(todo) - done) / 60
            where = f"session {done + 1} of {len(todo)}: {model.name}, {setting.name}"
            print(f"{where}; about {left:.0f} min left", file=sys.stderr)
            found = _put(path, {"key": key, **_session(model, setting, wanted, target, options)})
            measured += 1
        sessions.append(found)
    return sessions


def _built(model: Model, target: Target, spec: RuntimeSpec, work: Path, progress: job.Progress) -> list[File]:
    """`files`, or what an earlier command found: what cannot be built would be tried again each time, for minutes."""
    tools = {name: (HERE / name).read_text(encoding="utf-8") for name in _MAKERS}
    key = _digest([asdict(model), target.to_dict(), spec.name, job.tool_versions(), job.own_source(), tools])
    path = work / "files" / f"{model.name}-{spec.name}.json"
    found = [File(**entry) for entry in _kept(path, key).get("files", [])]
    if found and all(Path(file.path).exists() for file in found if file.path):
        return found
    made = files(model, target, spec, work, progress)
    _put(path, {"key": key, "files": [file.to_dict() for file in made]})
    return made


def _kept(path: Path, key: str) -> dict[str, Any]:
    """What lies there of the same key, or nothing."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("key") == key else {}


def _put(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
    path.with_suffix(".part").replace(path)
    return found


def _any_built(model: Model, setting: Setting, wanted: Sequence[File]) -> bool:
    if any(not file.error for file in wanted):
        return True
    print(f"left out: {model.name}, {setting.name}: {wanted[0].error}", file=sys.stderr)
    return False


def _keep(result: dict[str, Any], path: Path) -> None:
    """Add an earlier result's other sessions and its cost of a build, where machine, tools and package are the same."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = json.loads(json.dumps(result))  # as it was read: tuples have become lists
    differ = [key for key in ("machine", "tools", "source") if earlier.get(key) != now[key]]
    if differ:
        if earlier:
            print(f"left out: what {path} held before, of other {' and '.join(differ)}", file=sys.stderr)
        return
    measured = {(s["model"], s["setting"]) for s in result["sessions"]}
    others = [s for s in earlier["sessions"] if (s["model"], s["setting"]) not in measured]
    names = {s["model"] for s in others}
    result["models"] |= {name: said for name, said in earlier["models"].items() if name in names}
    result["sessions"] = [*result["sessions"], *others]
    result["build"] = result["build"] or earlier["build"]


def _wanted(built: Sequence[File], setting: Setting, precisions: Sequence[str] | None) -> list[File]:
    asked = precisions or [file.precision for file in built]
    return [f for f in built if f.precision in asked and (not setting.cap or f.precision in _CAPPED)]


def _key(wanted: Sequence[File], setting: Setting, options: argparse.Namespace) -> str:
    parts = [
        [f.to_dict() for f in wanted],
        setting.name,
        options.rounds,
        options.seconds,
        job.tool_versions(),
        machine(),
    ]
    return _digest(parts)


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _session(
    model: Model, setting: Setting, wanted: Sequence[File], target: Target, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the files of a model in a setting, and set them against one another."""
    host = system.environment()
    threads = min(target.threads, host.cores_usable)
    there = {f.name: f for f in wanted if not f.error}
    requests = {name: _request(file, setting, threads) for name, file in there.items()}
    null_of = next(name for name in ("dense@int8", "dense@fp32", *requests) if name in requests)
    requests[NULL] = requests[null_of]
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = run_session(
        requests, Processes(setting.variables, _TIMEOUT_SECONDS), options.rounds, options.seconds, job.silent
    )
    judged_pairs = [(arm, other) for arm in there for other in there if arm != other]
    level = system.PROXY if setting.cap else system.evidence_for(target.to_dict(), host).level
    judged = judge(found.blocks, judged_pairs, null_of, level)
    ratios = {(c.arm, c.baseline): _ratio(c) for c in judged.comparisons}
    return {
        "model": model.name,
        "setting": setting.name,
        "runtime": setting.runtime.name,
        "runtime_version": " / ".join(sorted(found.versions)),
        "cap": setting.cap,
        "threads": threads,
        "properties": dict(setting.runtime.properties),
        "started": started,
        "seconds": round(found.elapsed_seconds, 1),
        "evidence": level,
        "null": _ratio(judged.null),
        "warnings": [*found.warnings, *judged.warnings],
        "cells": [_cell(file, there, found, ratios) for file in wanted],
    }


def _request(file: File, setting: Setting, threads: int) -> Request:
    return Request(
        mode=TIME,
        arm=file.name,
        runtime=setting.runtime.name,
        artifact=file.path,
        golden_inputs=file.inputs,
        batch=file.batch,
        threads=threads,
        providers=setting.runtime.providers,
        properties=setting.runtime.properties,
        min_samples=schedule.MIN_SAMPLES,
        max_samples=schedule.MAX_SAMPLES,
    )


def _cell(
    file: File, there: Mapping[str, File], found: Session, ratios: Mapping[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """One row: what the file is, how good it is, how long it takes, and beside which others."""
    said = {key: value for key, value in file.to_dict().items() if key not in ("path", "inputs", "batch")}
    if file.error:
        return said
    blocks = found.blocks

    def against(names: Sequence[str]) -> dict[str, Any] | None:
        fastest = min((n for n in names if n != file.name), key=lambda n: _median(blocks[n]), default=None)
        return None if fastest is None else ratios[file.name, fastest]

    samples = [ns for block in blocks[file.name] for ns in block.samples_ns]
    return {
        **said,
        "median_ns": stats.median(samples),
        "p90_ns": stats.percentile(samples, 90),
        "samples": len(samples),
        "block_medians_ns": [block.median_ns for block in blocks[file.name]],
        "load_ns": stats.median([block.load_ns for block in blocks[file.name]]),
        "peak_bytes": stats.median([run.peak_bytes or 0 for run in found.memory[file.name]]),
        "to_dense": against([n for n in there if n == f"dense@{file.precision}"]),
        "to_fp32": against([n for n in there if n == "dense@fp32"]),
        "to_peer": against([n for n, other in there.items() if other.peer]) if not file.peer else None,
        "to_ours": against([other["name"] for other in _rivals(file.to_dict(), [f.to_dict() for f in there.values()])])
        if file.peer
        else None,
    }


def _rivals(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a file of another maker is held to: ours at its precision, or all of ours that are quantized, or all."""
    ours = [c for c in cells if not c["peer"] and not c["error"]]
    same = [c for c in ours if c["precision"] == cell["precision"]]
    return same or [c for c in ours if c["precision"] not in ("fp32", "fp16")] or ours


def _median(blocks: Sequence[Block]) -> float:
    return stats.median([block.median_ns for block in blocks])


def _ratio(found: Comparison) -> dict[str, Any]:
    return {
        "baseline": found.baseline, "ratio": found.ratio, "ci_low": found.ci_low, "ci_high": found.ci_high,
        "verdict": found.verdict, "evidence": found.evidence,
    }  # fmt: skip


def _explain(sessions: Sequence[dict[str, Any]], remarks: Mapping[str, str]) -> None:
    """Beside each cell of another maker that is faster or better than ours: why."""
    for session in sessions:
        for cell in session["cells"]:
            beaten = _beaten(cell, _rivals(cell, session["cells"])) if cell["peer"] and not cell["error"] else ""
            if beaten:
                name = f"{session['model']} / {session['setting']} / {cell['name']}"
                cell["beats_ours"] = beaten
                cell["remark"] = remarks.get(name, "unexplained")


def _beaten(cell: Mapping[str, Any], ours: Sequence[Mapping[str, Any]]) -> str:
    """What another maker's file is ahead in: ``faster``, ``better``, ``smaller``, ``closer``, several, or nothing."""
    ahead = []
    if cell["to_ours"] and cell["to_ours"]["verdict"] == stats.FASTER:
        ahead.append("faster")
    drops = [c["quality"]["drop_pp"] for c in ours if c.get("quality")]
    if cell.get("quality") and drops and min(drops) - cell["quality"]["drop_pp"] > _BETTER_PP:
        ahead.append("better")
    if ours and cell["size_bytes"] < _SMALLER * min(c["size_bytes"] for c in ours):
        ahead.append("smaller")
    errors = [c["fidelity"]["relative_error"] for c in ours if c.get("fidelity")]
    if cell.get("fidelity") and errors and cell["fidelity"]["relative_error"] < _CLOSER * min(errors):
        ahead.append("closer to the original")
    return " and ".join(filter(None, [", ".join(ahead[:-1]), *ahead[-1:]]))


if __name__ == "__main__":
    main()
