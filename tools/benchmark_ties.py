"""What a tie saves and costs: bytes of each runtime's file over those of the unique parameters, latency and memory of
the tied network beside the same one untied.

    python tools/benchmark_ties.py                        # writes tools/results/ties.json
    python tools/benchmark_ties.py --models halvit-tiny --runtimes onnxruntime

What the file holds of rows that were not asked for stays in it.

The untied network has a matrix of its own for each use, with the same numbers. Its operators are the same but in
TFLite, where a matrix is read transposed by others, and OpenVINO's int8 transformers, of which only the untied get
SmoothQuant. Files of one runtime and precision take short turns (see `benchmark_turns`), a null arm among them. A
parameter counts with the bytes it is stored in: at int8 one for those of matrices and kernels, four for biases, norms
and positions. Memory is the most that a process of its own takes while it loads the file and runs it, so that it holds
what a runtime copies. Weights are random, but batch norms know their inputs, biases are no zeros and scales are around
one: a network as it was before training would lack what stands behind a use. At int8 the error against the float
network says whether one scale for both uses is good enough, not how good the network is.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmark_machine import machine
from benchmark_turns import take_turns
from rowcol_edge import evaluation, job, models, sources, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.device import stats, system
from rowcol_edge.device.processes import Processes
from rowcol_edge.device.profile import NULL
from rowcol_edge.device.runtimes import RuntimeOptions
from rowcol_edge.device.session import MEMORY_REPEATS
from rowcol_edge.device.worker import MEMORY, TIME, Request
from rowcol_edge.factoring.halvit import TiedStage
from rowcol_edge.factoring.ties import TiedAttention, TiedFeedForward
from rowcol_edge.targets import RuntimeSpec, Target

TARGET = "generic-x86"
MODELS = ("halvit-tiny", "halvit-small", "halvit-resnet50")
PRECISIONS = ("fp32", "int8")
_SAMPLES = 8
_ROUNDS = 18
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class File:
    """One compiled file: ``arm`` is tied or untied."""

    arm: str
    path: Path
    size_bytes: int
    unique_bytes: int
    error: float


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    target = targets.load(TARGET)
    inputs = np.random.default_rng(0).normal(size=(_SAMPLES, 3, 224, 224)).astype(np.float32)
    for name in options.models:
        shutil.rmtree(options.work / name, ignore_errors=True)  # an older converter's files would be taken
        tied = _settled(models.load(f"sample:{name}").module, torch.from_numpy(inputs))
        networks = {"tied": tied, "untied": untied(tied)}
        for runtime in (target.runtime(found) for found in options.runtimes):
            programs = {
                arm: _source(network, runtime, inputs, options.work / name, arm) for arm, network in networks.items()
            }
            for precision in options.precisions:
                made = [
                    _compiled(arm, networks[arm], programs[arm], target, runtime, precision, inputs) for arm in networks
                ]
                row = {"model": name, **_measured(made, target, runtime, precision, inputs, options)}
                print(_line(row), flush=True)
                _keep(row, options.out)
    print(f"written to {options.out}")


def _settled(network: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """With biases and uneven norms, of which batch norms know the inputs."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            layer.weight.data = 1.0 + 0.1 * torch.randn(layer.weight.shape, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        network.train()(inputs)
    return network.eval()


def _keep(row: dict[str, Any], out: Path) -> None:
    """After each row: what a command that is stopped has measured stays, and what the file holds of others."""
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    said = {
        "command": shlex.join(["python", *sys.argv]), "machine": machine(), "tools": job.tool_versions(),
        "source": job.own_source(),
    }  # fmt: skip
    found = {_place(each): each for each in rows} | {_place(row): row | said}
    out.write_text(json.dumps({"rows": sorted(found.values(), key=_place)}, indent=1) + "\n", encoding="utf-8")


def _place(row: dict[str, Any]) -> tuple[int, str, int]:
    return MODELS.index(row["model"]), row["runtime"], PRECISIONS.index(row["precision"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino", "tflite"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="fresh processes for each file")
    parser.add_argument("--work", type=Path, default=Path("dist/ties"), help="the files that are measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ties.json")
    options = parser.parse_args()
    if options.rounds < stats.MIN_ROUNDS:
        parser.error(f"--rounds {options.rounds}: an interval needs {stats.MIN_ROUNDS}")
    return options


class _Untied(nn.Module):
    """A tied layer with a matrix of its own, stored as it is read, for each use."""

    def __init__(self, layer: TiedAttention | TiedFeedForward) -> None:
        super().__init__()
        self.layer = layer
        names = ("query", "weight") if isinstance(layer, TiedAttention) else ("weight",)
        for name in names:
            setattr(self, f"{name}_turned", nn.Parameter(getattr(layer, name).detach().t().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if isinstance(layer, TiedFeedForward):
            hidden = layer.activation(F.linear(x, layer.weight, layer.hidden_bias))
            return F.linear(hidden, self.weight_turned, layer.bias)
        q, k, v = (
            F.linear(x, weight).unflatten(-1, (layer.heads, -1)).transpose(-3, -2)
            for weight in (layer.query, layer.weight, self.weight_turned)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        return F.linear(mixed, self.query_turned)


class _UntiedStage(nn.Module):
    """A tied stage with two matrices of its own for each bottleneck."""

    def __init__(self, stage: TiedStage) -> None:
        super().__init__()
        self.widen, self.shortcut, self.inner, self.norms = stage.widen, stage.shortcut, stage.inner, stage.norms
        weight, depth = stage.weight.detach(), len(stage.inner)
        self.into = nn.ParameterList([nn.Parameter(_nudged(weight, n)) for n in range(depth)])
        self.out = nn.ParameterList([nn.Parameter(_nudged(weight.transpose(0, 1), n)) for n in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.widen(x), x], 1)
        shortcut = self.shortcut(x)
        for inner, norm, into, out in zip(self.inner, self.norms, self.into, self.out, strict=True):
            x = shortcut = torch.relu(norm(F.conv2d(inner(F.conv2d(x, into)), out)) + shortcut)
        return x


def untied(model: nn.Module) -> nn.Module:
    """A copy whose matrices are each stored once for every use. They differ a little: files are searched for matrices
    that are one, whether a network says so or not."""
    result = copy.deepcopy(model)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, TiedAttention | TiedFeedForward):
            own = _Untied(layer)
            for key, parameter in own.named_parameters(recurse=False):
                parameter.data = _nudged(parameter.data, len(key))
            result.set_submodule(name, own)
        elif isinstance(layer, TiedStage):
            result.set_submodule(name, _UntiedStage(layer))
    return result.eval()


def _nudged(weight: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return weight.clone() + 1e-3 * weight.std() * torch.randn(weight.shape, generator=generator)


def _source(network: nn.Module, runtime: RuntimeSpec, inputs: np.ndarray, folder: Path, arm: str) -> Path:
    """The file the backend starts from, made by the steps of a build."""
    folder.mkdir(parents=True, exist_ok=True)
    count = iter(range(100))
    request = sources.Request(
        network,
        {"x": inputs[:1]},
        runtime,
        False,
        lambda suffix: folder / f"{arm}-{runtime.name}-{next(count)}{suffix}",
    )
    *_, last = sources.steps(load_backend(runtime.name).consumes, request)
    return last.path


def _compiled(
    arm: str, network: nn.Module, source: Path, target: Target, runtime: RuntimeSpec, precision: str, inputs: np.ndarray
) -> File:
    def calibration() -> Iterator[dict[str, np.ndarray]]:
        for sample in inputs[: _SAMPLES // 2]:
            yield {"x": sample[None]}

    backend, unseen = load_backend(runtime.name), inputs[_SAMPLES // 2 :]
    out = source.with_name(f"{arm}-{runtime.name}-{precision}{backend.suffix}")
    artifact = backend.compile(source, runtime, QuantSpec.for_target(precision, target), calibration, out)
    with torch.no_grad():
        wanted = network(torch.from_numpy(unseen)).numpy()
    options = RuntimeOptions(threads=target.threads, properties=runtime.properties)
    with evaluation.opened(artifact.path, backend.host_runtime, options) as run:
        [got] = run({"x": unseen}).values()
    error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    return File(arm, artifact.path, artifact.size_bytes, _unique_bytes(network, precision), error)


def _unique_bytes(network: nn.Module, precision: str) -> int:
    matrices = sum(p.numel() for p in network.parameters() if p.dim() > 1 and p.shape[0] > 1)
    rest = sum(p.numel() for p in network.parameters()) - matrices
    return (1 if precision == "int8" else 4) * matrices + 4 * rest


def _measured(
    made: list[File],
    target: Target,
    runtime: RuntimeSpec,
    precision: str,
    inputs: np.ndarray,
    options: argparse.Namespace,
) -> dict[str, Any]:
    golden = options.work / "inputs.npz"
    np.savez(golden, x=inputs[:1])
    requests = {file.arm: _request(file, target, runtime, golden) for file in made}
    processes = Processes({}, _TIMEOUT_SECONDS)
    peaks: dict[str, list[float]] = {file.arm: [] for file in made}
    for _ in range(MEMORY_REPEATS):
        for arm, request in requests.items():
            peaks[arm].append(processes.memory(replace(request, mode=MEMORY), f"memory of {arm}").peak_bytes or 0)
    requests[NULL] = requests["untied"]
    found = take_turns(requests, "untied", options.rounds)
    arms = {
        file.arm: {
            "size_bytes": file.size_bytes,
            "unique_bytes": file.unique_bytes,
            "size_ratio": file.size_bytes / file.unique_bytes,
            "error": file.error,
            "peak_bytes": stats.median(peaks[file.arm]),
        }
        for file in made
    }
    judged = found.judged(system.evidence_for(target.to_dict(), system.environment()).level)
    [ratio] = judged.comparisons
    return {
        "runtime": runtime.name, "precision": precision, "arms": arms,
        "latency_ratio": {
            "ratio": ratio.ratio, "ci_low": ratio.ci_low, "ci_high": ratio.ci_high, "verdict": ratio.verdict,
            "evidence": ratio.evidence,
        },
        "null": {"ratio": judged.null.ratio, "ci_low": judged.null.ci_low, "ci_high": judged.null.ci_high},
    }  # fmt: skip


def _request(file: File, target: Target, runtime: RuntimeSpec, golden: Path) -> Request:
    return Request(
        mode=TIME,
        arm=file.arm,
        runtime=runtime.name,
        artifact=str(file.path.resolve()),
        golden_inputs=str(golden.resolve()),
        batch={"x": 1},
        threads=min(target.threads, system.environment().cores_usable),
        providers=runtime.providers,
        properties=runtime.properties,
    )


def _line(row: dict[str, Any]) -> str:
    tied, other, ratio = row["arms"]["tied"], row["arms"]["untied"], row["latency_ratio"]
    return (
        f"{row['model']} {row['runtime']} {row['precision']}: {tied['size_bytes'] / 1e6:.2f} MB, "
        f"{tied['size_ratio']:.3f} of its unique parameters (untied {other['size_bytes'] / 1e6:.2f} MB); "
        f"time {ratio['ratio']:.2f} [{ratio['ci_low']:.2f}, {ratio['ci_high']:.2f}] of untied; "
        f"peak memory {tied['peak_bytes'] / 2**20:.0f} MiB (untied {other['peak_bytes'] / 2**20:.0f}); "
        f"error {tied['error']:.2e} (untied {other['error']:.2e})"
    )


if __name__ == "__main__":
    main()
