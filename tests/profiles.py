"""Profiles and manifests made up for tests: nothing is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rowcol_edge.device import stats
from rowcol_edge.device.layer_times import ArmOperators, LayerTime, Operators, OperatorsRun, OperatorTime, compared
from rowcol_edge.device.manifest import ArmEntry, FileEntry, Manifest, RuntimeEntry, TensorSpec
from rowcol_edge.device.power import RailRun
from rowcol_edge.device.profile import (
    NOT_ASKED,
    NULL,
    ArmProfile,
    Block,
    ColdStart,
    Latency,
    Memory,
    MemoryReading,
    Profile,
    Protocol,
)
from rowcol_edge.device.roofline import Peaks
from rowcol_edge.device.runtimes.base import OperatorRuns
from rowcol_edge.device.system import Environment, readings
from rowcol_edge.device.verdicts import judge
from rowcol_edge.device.worker import EnergyRun, MemoryRun, Request, TimedRun

MS = 1_000_000
MIB = 1 << 20
LEVELS_MS = {"factored@int8": 2.0, "dense@int8": 4.0, "dense@fp32": 8.0}
PAIRS = (("factored@int8", "dense@int8"), ("factored@int8", "dense@fp32"), ("dense@int8", "dense@fp32"))

ENVIRONMENT = Environment(
    machine="x86_64",
    system="Linux",
    kernel="6.1",
    host_id="0123456789ab",
    board="",
    cpu_model="Some Core",
    isa=("avx2", "fma"),
    cores=4,
    cores_usable=2,
    governor="performance",
    frequency_khz=1_500_000,
    temperature_c=48.5,
    throttled="",
    firmware_temperature_c=None,
    power_mode="",
    clocks_held=None,
    rails=(),
    rails_unread="no INA3221 monitor and no RAPL counter here",
    memory_bytes=4096 * MIB,
    load_1m=0.1,
    virtual="",
    emulated="",
    caps={},
    python="3.11.7",
    numpy="2.0.0",
)


@dataclass
class FakeExecutor:
    """Latencies by the name of the arm, with a little noise."""

    levels_ms: Mapping[str, float] = field(default_factory=lambda: dict(LEVELS_MS))
    samples: int = 60
    version: str = "1.20"
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(1)

    def time(self, request: Request, where: str) -> TimedRun:
        self.requests.append(request)
        level = self.levels_ms[request.arm] * MS * self._random.normal(1.0, 0.005)
        times = level * self._random.normal(1.0, 0.01, self.samples)
        return TimedRun(self.version, 300 * MS, 20 * MS, 9 * MS, (5 * MS,), True, tuple(int(t) for t in times))

    def memory(self, request: Request, where: str) -> MemoryRun:
        return MemoryRun(self.version, 50 * MIB, 60 * MIB, 70 * MIB, True, int(self.levels_ms[request.arm] * MS))

    def energy(self, request: Request, where: str) -> EnergyRun:
        """A rail that takes 4 W at rest and 6 W at work."""
        self.requests.append(request)
        inferences = round(request.run_seconds * 1000 / self.levels_ms[request.arm])
        return EnergyRun(self.version, inferences, request.run_seconds, (RailRun("VDD_IN", "INA3221", 4.0, 6.0, 99),))

    def peaks(self, request: Request, where: str) -> Peaks:
        """A machine on which 1,000 bytes, or 5,000 multiply-accumulates, take a µs."""
        self.requests.append(request)
        return Peaks(1e9, 5e9, request.threads, "made up")

    def operators(self, request: Request, where: str) -> OperatorsRun:
        """Two operators that share the time three to one; the runtime adds one of its own."""
        self.requests.append(request)
        level = self.levels_ms[request.arm] * MS * self._random.normal(1.0, 0.005)
        shares = {"linear/MatMul": 0.6, "Flatten": 0.2, "Reorder_token_3": 0.1}
        times = {name: tuple(int(level * share * (1 + i / 100)) for i in range(8)) for name, share in shares.items()}
        found = tuple(OperatorRuns(name, name.split("_")[0], (name,), runs) for name, runs in times.items())
        return OperatorsRun(self.version, tuple(int(level) for _ in range(8)), found)


def arm_profile(name: str, level_ms: float, *, seed: int, rounds: int = 12, samples: int = 60) -> ArmProfile:
    random = np.random.default_rng(seed)
    times = level_ms * MS * random.normal(1.0, 0.005, (rounds, 1)) * random.normal(1.0, 0.01, (rounds, samples))
    blocks = tuple(
        Block(i, 0, 300 * MS, 20 * MS, 9 * MS, True, (5 * MS,), tuple(int(t) for t in row))
        for i, row in enumerate(times)
    )
    latency = Latency(
        float(np.median(times)), stats.percentile(times.ravel(), 90), stats.percentile(times.ravel(), 99), times.size
    )
    reading = MemoryReading(50 * MIB, 60 * MIB, 70 * MIB, True)
    memory = None if name == NULL else Memory(50 * MIB, 60 * MIB, 70 * MIB, (reading,))
    cold = ColdStart(300.0 * MS, 20.0 * MS, 9.0 * MS)
    return ArmProfile(name, f"arms/{name}.onnx", "ab" * 32, 1_234_567, latency, cold, memory, 3 * MIB, (), (), blocks)


def make_operators(names: Sequence[str] = tuple(LEVELS_MS), layers: int = 3) -> Operators:
    """``layers`` of falling weight in each arm; the factored arms take half as long in all but the last."""
    arms = {}
    for name in names:
        scale = 0.5 if name.startswith("factored") else 1.0
        times = []
        for i in range(layers):
            ns = MS / (i + 1) * (1.0 if i == layers - 1 else scale)
            rounds = tuple(ns * (1 + step / 100) for step in range(6))
            form, rank = ("project (row)", 16) if scale < 1 else ("dense", None)
            times.append(
                LayerTime(f"body.{i}", form, rank, 1_000_000, 4_000, stats.median(rounds), rounds, 2e5, "compute")
            )
        total = sum(layer.ns for layer in times) + 0.1 * MS
        found = tuple(
            OperatorTime(f"{layer.layer}_nchwc", f"{layer.layer}/Conv", "Conv", layer.layer, layer.ns)
            for layer in times
        )
        arms[name] = ArmOperators(
            tuple(times), (*found, OperatorTime("Reorder", "", "Reorder", "", 0.1 * MS)), 0.1 * MS, total, 1.1 * total
        )
    return with_arms(Operators(Peaks(8e9, 5e9, 2, "made up"), {}, (), layers, 0), arms)


def with_arms(operators: Operators, arms: Mapping[str, ArmOperators]) -> Operators:
    """These arms instead, and their layers compared anew."""
    pairs = [pair for pair in PAIRS if pair[0] in arms and pair[1] in arms]
    return replace(operators, arms=dict(arms), comparisons=compared(arms, pairs))


def make_profile(
    *, levels_ms: Mapping[str, float] | None = None, samples: int = 60, evidence: str = "target", **changes: Any
) -> Profile:
    """Three arms and a null arm of dense@int8, twelve rounds."""
    levels = dict(LEVELS_MS if levels_ms is None else levels_ms)
    arms = {name: arm_profile(name, ms, seed=i, samples=samples) for i, (name, ms) in enumerate(levels.items())}
    null_arm = arm_profile(NULL, levels["dense@int8"], seed=99, samples=samples)
    pairs = [pair for pair in PAIRS if pair[0] in arms and pair[1] in arms]
    blocks = {**{name: arm.blocks for name, arm in arms.items()}, NULL: null_arm.blocks}
    judged = judge(blocks, pairs, "dense@int8", evidence)
    values: dict[str, Any] = {
        "bundle": "tiny",
        "digest": "cd" * 32,
        "target": "generic-x86",
        "runtime": "onnxruntime",
        "runtime_version": "1.20",
        "threads": 2,
        "properties": {},
        "created": "2026-01-02T03:04:05Z",
        "evidence": evidence,
        "evidence_note": "measured on Some Core",
        "caps": {},
        "environment": ENVIRONMENT,
        "after": readings(ENVIRONMENT),
        "protocol": Protocol(12, (("dense@int8", "factored@int8"),) * 12, 0.95, 4000, 1, 1.0, 0.3, 75.0, 70.0),
        "arms": arms,
        "comparisons": judged.comparisons,
        "null": judged.null,
        "null_arm": null_arm,
        "memory_budget": None,
        "energy_note": NOT_ASKED,
        "operators": None,
        "operators_note": NOT_ASKED,
        "warnings": judged.warnings,
    }
    return Profile(**{**values, **changes})


def make_manifest(names: tuple[str, ...] = tuple(LEVELS_MS), **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "tiny",
        "target": {"name": "generic-x86", "match": {"machine": "x86_64"}},
        "runtime": RuntimeEntry("onnxruntime", "1.17.0", 18, 9, 2, "pip install onnxruntime"),
        "inputs": (TensorSpec("image", (None, 1, 2, 2), "float32"),),
        "outputs": (TensorSpec("output", (None, 2), "float32"),),
        "preprocess": None,
        "contract": "classify",
        "labels": ("good", "bad"),
        "metric": "accuracy",
        "default_arm": names[0],
        "arms": tuple(make_arm(name) for name in names),
        "golden_outputs": {name: f"golden/{name}.npz" for name in names},
        "created": "2026-01-02T03:04:05Z",
    }
    return Manifest(**{**values, **changes})


def make_arm(name: str) -> ArmEntry:
    variant, precision = name.split("@")
    test = {"metric": "accuracy", "value": 0.9, "n": 40, "drop_pp": 0.25, "ci_low_pp": -0.1, "ci_high_pp": 0.6}
    parameters = 1_000 if variant == "factored" else 4_000
    return ArmEntry(
        name, variant, precision, f"arms/{name}.onnx", parameters, parameters * 4, {"float32": 1}, 1e-5, {"test": test}
    )


class FakeBundle:
    """What the comparison reads of a bundle: manifest, digest, and a folder with profiles."""

    def __init__(self, root: Path, manifest: Manifest, *profiles: Profile) -> None:
        self.root = self.source = root
        self.manifest = manifest
        self.digest = "cd" * 32
        (root / "profiles").mkdir(parents=True, exist_ok=True)
        for i, profile in enumerate(profiles):
            (root / "profiles" / f"{i}.json").write_text(profile.to_json(), encoding="utf-8")


def make_bundle(root: Path, manifest: Manifest, files: Mapping[str, bytes] | None = None) -> None:
    """A bundle that opens: the files of the manifest hold their own names; `files` are further ones."""
    names = [*(arm.artifact for arm in manifest.arms), manifest.golden_inputs, *manifest.golden_outputs.values()]
    contents = {**{name: name.encode() for name in names}, **(files or {})}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    entries = tuple(
        FileEntry(name, hashlib.sha256(content).hexdigest(), len(content)) for name, content in contents.items()
    )
    (root / "profiles").mkdir()
    (root / "manifest.json").write_text(replace(manifest, files=entries).to_json(), encoding="utf-8")
