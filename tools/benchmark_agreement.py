"""Does our profiler say what the runtimes' own benchmarks say? The same artifact, the same threads, taking turns.

    python tools/benchmark_agreement.py    # builds dist/agreement where missing, writes tools/results/agreement.json

Beside each timed process of the profiler runs one of the runtime's own tool, and one that is a plain loop over the
runtime's Python calls:

- openvino: ``benchmark_app`` (of the package openvino), synchronous, one stream. Its clock is the plugin's own.
- onnxruntime: ``onnxruntime_perf_test`` comes with no package, so the plain loop stands for it: like that tool it times
  ``run`` of one session, one after the other.
- tflite: ``litert-benchmark`` (of the package ai-edge-litert), which runs a ``CompiledModel``; the profiler and the
  plain loop run an ``Interpreter``. Its clock is that of the invocation.

The plain loop times what a program cannot do without: handing over the input, the invocation, taking the outputs.
Beside it, in the same process, stands the clock that the tool has: OpenVINO's own, or that of TFLite's invocation
alone. Where the profiler and a tool differ, these tell how much of it is not measured by the tool at all.

A ratio is the profiler's median over the other's in the same round, with the paired interval of the profiler.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rowcol_edge
from benchmark_machine import machine, settle
from rowcol_edge import job
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.stats import MIN_ROUNDS, ratio_interval
from rowcol_edge.device.worker import TIME, Request
from rowcol_edge.report.progress import reporter

RESULT = Path(__file__).parent / "results" / "agreement.json"
TARGET = "generic-x86"
RUNTIMES = ("onnxruntime", "openvino", "tflite")
ARMS = ("factored@int8", "dense@fp32")
OURS, LOOP, INSIDE = "profiler", "plain loop", "invocation in the loop"
_FEWEST, _WARMUPS = 50, 20
_TIMEOUT_SECONDS = 120.0

_HEAD = """
import json, sys, time
import numpy as np
path, golden, threads, runs, warmups = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
feeds = {name: array[:1] for name, array in np.load(golden).items()}
"""
_LOOP = """
for _ in range(warmups):
    infer()
whole, inside = [], []
for _ in range(runs):
    begin = time.perf_counter_ns()
    own = infer()
    whole.append(time.perf_counter_ns() - begin)
    inside.append(own)
print(json.dumps([whole, inside]))
"""
_INFER = {
    "onnxruntime": """
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = threads
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
def infer():
    session.run(None, feeds)
""",
    "openvino": """
import openvino as ov
settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": "f32"}
request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
def infer():
    request.infer(feeds)
    return request.latency * 1e6
""",
    "tflite": """
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=path, num_threads=threads)
interpreter.allocate_tensors()
given = [(detail["index"], array) for detail, array in zip(interpreter.get_input_details(), feeds.values())]
wanted = [detail["index"] for detail in interpreter.get_output_details()]
def infer():
    for index, array in given:
        interpreter.set_tensor(index, array)
    begin = time.perf_counter_ns()
    interpreter.invoke()
    own = time.perf_counter_ns() - begin
    for index in wanted:
        interpreter.get_tensor(index)
    return own
""",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """One arm of one bundle; ``request`` is the profiler's."""

    runtime: str
    arm: str
    request: Request
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def others(self) -> tuple[str, ...]:
        return (*([TOOLS[self.runtime][0]] if self.runtime in TOOLS else []), LOOP)


Measure = Callable[[Subject, str, int], dict[str, float]]
"""One process: what measures it (OURS or one of ``Subject.others``) over so many inferences; medians in ns by clock,
that of the same name and, in the loop, INSIDE."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="elpv-resnet18")
    parser.add_argument("--bundles", type=Path, default=Path("dist/agreement"), help="built there where missing")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="of inferences in each process")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--settle", type=float, default=240.0, help="seconds to wait for a quiet machine at most")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: an interval needs {MIN_ROUNDS}")
    with reporter() as progress:
        subjects: list[Subject] = []
        for name in options.runtimes:
            subjects += found(options.bundles / options.sample, name, options.seconds, progress)
        settle(seconds=options.settle)
        began = time.monotonic()
        rows = measured(subjects, options.rounds, options.seconds, measure, progress)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "tools": job.tool_versions(),
        "sample": f"sample:{options.sample}",
        "threads": subjects[0].request.threads,
        "rounds": options.rounds,
        "seconds": round(time.monotonic() - began),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


def found(folder: Path, runtime: str, seconds: float, progress: job.Progress) -> list[Subject]:
    """The arms of the runtime's bundle of the sample that names the folder; it is built where it is not there."""
    path = folder / f"{TARGET}-{runtime}"
    if not path.is_dir():
        rowcol_edge.build(f"sample:{folder.name}", target=TARGET, runtime=runtime, out=str(folder), progress=progress)
    with Bundle.open(path) as bundle:
        manifest = bundle.manifest
        batch = {spec.name: spec.shape[0] or 1 for spec in manifest.inputs}
        return [
            Subject(
                runtime,
                name,
                Request(
                    mode=TIME, arm=name, runtime=runtime, artifact=str(bundle.artifact(name)),
                    golden_inputs=str(bundle.root / manifest.golden_inputs), batch=batch,
                    threads=manifest.runtime.threads, providers=manifest.runtime.providers,
                    properties=manifest.runtime.properties, run_seconds=seconds, warmup_seconds=0.3 * seconds,
                    min_samples=_FEWEST,
                ),
                {spec.name: (batch[spec.name], *(size or 1 for size in spec.shape[1:])) for spec in manifest.inputs},
            )
            for name in ARMS
        ]  # fmt: skip


def measured(
    subjects: Sequence[Subject], rounds: int, seconds: float, measure: Measure, progress: job.Progress
) -> list[dict[str, Any]]:
    """A row a subject: the medians of each round, and the profiler's ratio to each other way of measuring."""
    # a first process each, which also puts the files into the page cache, tells how many inferences fit in the time
    runs = [max(_FEWEST, int(seconds * 1e9 / measure(each, OURS, _FEWEST)[OURS])) for each in subjects]
    times: list[defaultdict[str, list[float]]] = [defaultdict(list) for _ in subjects]
    for i in range(rounds):
        progress("round", i, rounds)
        for place in range(len(subjects))[:: 1 if i % 2 else -1]:
            names = [OURS, *subjects[place].others]
            turned = names[i % len(names) :] + names[: i % len(names)]  # who goes first changes every round
            for name in turned:
                for clock, median in measure(subjects[place], name, runs[place]).items():
                    times[place][clock].append(median)
    progress("round", rounds, rounds)
    return [
        {
            "runtime": each.runtime, "arm": each.arm, "runs": count, "medians_ns": dict(of_one),
            "against": {name: against(of_one[OURS], of_one[name]) for name in each.others},
        }
        for each, count, of_one in zip(subjects, runs, times, strict=True)
    ]  # fmt: skip


def against(ours_ns: Sequence[float], theirs_ns: Sequence[float]) -> dict[str, float]:
    """The profiler's median over the other's, paired by round, and by how many ns it is longer."""
    ratio = ratio_interval(ours_ns, theirs_ns)
    longer = statistics.median(ours - theirs for ours, theirs in zip(ours_ns, theirs_ns, strict=True))
    return {"ratio": ratio.ratio, "ci_low": ratio.low, "ci_high": ratio.high, "longer_ns": longer}


def measure(subject: Subject, name: str, runs: int) -> dict[str, float]:
    """See `Measure`."""
    if name == OURS:
        executor = Processes({}, _TIMEOUT_SECONDS)
        return {OURS: statistics.median(executor.time(subject.request, f"{subject.runtime}, {subject.arm}").samples_ns)}
    if name == LOOP:
        request = subject.request
        code = _HEAD + _INFER[subject.runtime] + _LOOP
        sizes = map(str, (request.threads, runs, _WARMUPS))
        done = _run([sys.executable, "-c", code, request.artifact, request.golden_inputs, *sizes])
        whole, inside = json.loads(done)
        found = {LOOP: float(statistics.median(whole))}
        return found if None in inside else {**found, INSIDE: float(statistics.median(inside))}
    return {name: TOOLS[subject.runtime][1](subject, runs)}


def benchmark_app(subject: Subject, runs: int) -> float:
    """Its median has two decimals of a ms."""
    request = subject.request
    shapes = ",".join(f"{name}{list(shape)}".replace(" ", "") for name, shape in subject.shapes.items())
    with tempfile.TemporaryDirectory() as folder:
        _run([
            sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()",
            "-m", request.artifact, "-d", "CPU", "-api", "sync",
            "-hint", "none", "-nstreams", "1", "-nthreads", str(request.threads),
            "-infer_precision", request.properties.get("INFERENCE_PRECISION_HINT", "f32"), "-niter", str(runs),
            "-data_shape", shapes, "-inference_only",
            "-json_stats", "-report_type", "no_counters", "-report_folder", folder,
        ])  # fmt: skip
        report = json.loads((Path(folder) / "benchmark_report.json").read_text(encoding="utf-8"))
    return float(report["execution_results"]["latency (ms)"]) * 1e6


def litert_benchmark(subject: Subject, runs: int) -> float:
    """Its median has two decimals of a ms."""
    request = subject.request
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        _run([
            sys.executable, "-m", "ai_edge_litert.tools.benchmark_litert_model", f"--model={request.artifact}",
            f"--num_threads={request.threads}", f"--num_runs={runs}", f"--warmup_runs={_WARMUPS}",
            f"--result_json={out}",
        ])  # fmt: skip
        return float(json.loads(out.read_text(encoding="utf-8"))["latency"]["median_ms"]) * 1e6


TOOLS: dict[str, tuple[str, Callable[[Subject, int], float]]] = {
    "openvino": ("benchmark_app", benchmark_app),
    "tflite": ("litert-benchmark", litert_benchmark),
}


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout)[-2000:]
        raise SystemExit(f"{shlex.join(command[:3])[:200]} … ended with {done.returncode}:\n{said}")
    return done.stdout


if __name__ == "__main__":
    main()
