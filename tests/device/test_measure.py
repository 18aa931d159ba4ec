"""The whole profiler over a fake executor, and once over real processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rowcol_edge.device import measure, system
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.measure import default_pairs, profile
from rowcol_edge.device.profile import Profile
from rowcol_edge.device.table import profile_table
from rowcol_edge.device.worker import TIME, MemoryRun, Request, TimedRun
from rowcol_edge.errors import BudgetError, BundleError, MeasurementError

from ..profiles import ENVIRONMENT, MIB, FakeExecutor, make_manifest

LEVELS = {"factored@fp32": 2.0, "dense@fp32": 4.0}


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet machine of two cores, whatever this one is."""
    monkeypatch.setattr(system, "environment", lambda: ENVIRONMENT)


def fake(bundle: Bundle, **options: Any) -> tuple[Profile, FakeExecutor]:
    executor = options.pop("executor", None) or FakeExecutor(LEVELS)
    return profile(bundle, executor=executor, **options), executor


def retarget(bundle: Bundle, **changes: Any) -> Bundle:
    bundle.manifest = replace(bundle.manifest, target={**bundle.manifest.target, **changes})
    return bundle


def test_a_default_profile(bundle: Bundle) -> None:
    found, executor = fake(bundle)
    assert (found.bundle, found.digest, found.target) == ("tiny", bundle.digest, "generic-x86")
    assert (found.runtime, found.runtime_version, found.threads) == ("onnxruntime", "1.20", 1)
    assert (found.evidence, found.evidence_note) == ("target", "measured on Some Core")
    assert found.warnings == ()
    assert found.protocol.rounds == 12
    assert len(executor.requests) == 3 * 12
    main = found.comparison("factored@fp32", "dense@fp32")
    assert main.verdict == "faster"
    assert main.ratio == pytest.approx(0.5, abs=0.01)
    assert (found.null.baseline, found.null.verdict) == ("dense@fp32", "no significant difference")


def test_an_arms_figures(bundle: Bundle) -> None:
    found, _ = fake(bundle)
    arm = found.arms["factored@fp32"]
    artifact = bundle.artifact("factored@fp32")
    assert arm.artifact_bytes == artifact.stat().st_size
    assert arm.sha256 == next(f.sha256 for f in bundle.manifest.files if f.path == arm.artifact)
    assert arm.latency.n == sum(len(block.samples_ns) for block in arm.blocks) == 12 * 60
    assert arm.latency.p99_ns is not None
    assert arm.latency.p90_ns is not None
    assert arm.latency.median_ns < arm.latency.p90_ns < arm.latency.p99_ns
    assert (arm.cold.import_ns, arm.cold.load_ns, arm.cold.first_ns) == (300e6, 20e6, 9e6)
    assert arm.memory is not None
    assert (arm.memory.baseline_bytes, arm.memory.after_load_bytes, arm.memory.peak_bytes) == (
        50 * MIB,
        60 * MIB,
        70 * MIB,
    )
    assert len(arm.memory.runs) == 3
    assert found.null_arm.memory is None
    assert Profile.from_json(found.to_json()) == found


def test_requests_hold_what_the_bundle_says(bundle: Bundle) -> None:
    _, executor = fake(bundle)
    request = next(r for r in executor.requests if r.arm == "factored@fp32")
    assert request.artifact == str(bundle.artifact("factored@fp32"))
    assert request.batch == {"image": 1}
    assert (request.runtime, request.threads, request.providers) == ("onnxruntime", 1, ("CPUExecutionProvider",))
    assert 0 < request.warmup_seconds < request.run_seconds <= 2.0


def test_fewer_blocks_and_chosen_arms(bundle: Bundle) -> None:
    found, executor = fake(bundle, arms=["dense@fp32"], blocks=6)
    assert list(found.arms) == ["dense@fp32"]
    assert found.comparisons == ()
    assert found.null.baseline == "dense@fp32"
    assert len(executor.requests) == 2 * 6


def test_a_baseline_is_measured_even_if_it_is_not_among_the_arms(bundle: Bundle) -> None:
    found, _ = fake(bundle, arms=["dense@fp32"], baseline="factored@fp32")
    assert [(c.arm, c.baseline, c.verdict) for c in found.comparisons] == [("dense@fp32", "factored@fp32", "slower")]
    assert found.null.baseline == "factored@fp32"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arms": ["dense@fp16"]}, BundleError, "did you mean dense@fp32"),
        ({"baseline": "dense"}, BundleError, "expected one of"),
        ({"arms": []}, MeasurementError, "at least one arm"),
        ({"blocks": 5}, MeasurementError, "blocks: expected at least 6"),
        ({"seconds": 0.0}, MeasurementError, "seconds: expected a time > 0"),
        ({"seconds": float("inf")}, MeasurementError, "seconds: expected a time > 0 that ends, got inf"),
        ({"seconds": float("nan")}, MeasurementError, "seconds: expected a time > 0 that ends, got nan"),
        ({"evidence": "predicted"}, MeasurementError, "expected proxy or emulated"),
    ],
)
def test_bad_options(bundle: Bundle, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fake(bundle, **options)


def test_evidence_can_be_weakened_never_raised(bundle: Bundle) -> None:
    found, _ = fake(bundle, evidence="proxy")
    assert (found.evidence, {c.evidence for c in (*found.comparisons, found.null)}) == ("proxy", {"proxy"})
    assert found.evidence_note == "measured on Some Core; declared proxy by whoever measured"
    emulated, _ = fake(bundle, evidence="emulated")
    assert {c.verdict for c in (*emulated.comparisons, emulated.null)} == {"not comparable"}
    pi = retarget(bundle, match={"machine": "aarch64", "device_tree_model": "Raspberry Pi 5"})
    with pytest.raises(MeasurementError, match="target is what the machine itself shows"):
        fake(pi, evidence="target")
    assert fake(pi)[0].evidence == "proxy"


def test_a_proxy_is_capped_the_target_itself_never(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, str]] = []

    def processes(variables: dict[str, str], timeout_seconds: float) -> FakeExecutor:
        made.append(variables)
        return FakeExecutor(LEVELS)

    monkeypatch.setattr(measure, "Processes", processes)
    caps = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert profile(retarget(bundle, proxy_env=caps)).caps == {}
    found = profile(retarget(bundle, match={"machine": "aarch64"}))
    assert found.caps == caps
    assert made == [{}, caps]
    assert "capped by ONEDNN_MAX_CPU_ISA=AVX2" in found.evidence_note


def test_threads(bundle: Bundle) -> None:
    bundle.manifest = replace(bundle.manifest, runtime=replace(bundle.manifest.runtime, threads=4))
    found, executor = fake(bundle)
    assert found.threads == 2  # the machine has no more
    assert {request.threads for request in executor.requests} == {2}
    assert found.warnings == ("measured with 2 thread(s), the target asks for 4",)
    found, _ = fake(bundle, threads=4)
    assert (found.threads, found.warnings) == (4, ("4 threads on 2 usable core(s): they wait for one another",))
    found, executor = fake(bundle, threads=0)
    assert (found.threads, {request.threads for request in executor.requests}) == (2, {2})  # all that there are


class Silent(FakeExecutor):
    """On a system that tells nothing of memory."""

    def memory(self, request: Request, where: str) -> MemoryRun:
        return MemoryRun("1.20", None, None, None, False, 2_000_000)


def test_gaps_of_memory_are_told(bundle: Bundle) -> None:
    found, _ = fake(retarget(bundle, memory_mb=64), executor=Silent(LEVELS))
    assert found.arms["dense@fp32"].memory is None
    assert found.warnings[0].startswith("memory was not measured")
    assert found.memory_budget is not None
    assert set(found.memory_budget.verdicts.values()) == {"not measured"}
    found.raise_if_over_budget()


@pytest.mark.parametrize(
    ("providers", "beside"),
    [
        (("CUDAExecutionProvider", "CPUExecutionProvider"), "CUDAExecutionProvider"),
        (("cuda:0",), "cuda:0"),
        (("GPU.0",), "GPU.0"),
        (("XnnpackExecutionProvider", "CPUExecutionProvider"), ""),
        ((), ""),
    ],
)
def test_memory_of_an_accelerator_is_not_in_the_process(
    bundle: Bundle, providers: tuple[str, ...], beside: str
) -> None:
    bundle.manifest = replace(bundle.manifest, runtime=replace(bundle.manifest.runtime, providers=providers))
    said = f"memory is the process's as Linux counts it: what {beside} takes is not in it"
    assert fake(bundle)[0].warnings == ((said,) if beside else ())
    assert not any(said == warning for warning in fake(bundle, executor=Silent(LEVELS))[0].warnings)


class Greedy(FakeExecutor):
    """The dense arm takes more than the factored one, which takes 70 MiB."""

    def memory(self, request: Request, where: str) -> MemoryRun:
        found = super().memory(request, where)
        return replace(found, peak_bytes=96 * MIB) if request.arm.startswith("dense") else found


class OnlyLatency(FakeExecutor):
    """Everything beyond latency and its memory fails."""

    def fail(self, request: Request, where: str) -> Any:
        self.requests.append(request)
        raise MeasurementError(where, expected="a result within 125 s", got="none")

    footprint = energy = operators = peaks = fail


def test_an_extra_measurement_that_fails_costs_a_warning_and_not_the_session(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "environment", lambda: replace(ENVIRONMENT, rails=("VDD_IN",)))
    found, executor = fake(bundle, executor=OnlyLatency(LEVELS), memory=True, energy=True, ops=True)
    assert found.comparison("factored@fp32", "dense@fp32").verdict == "faster"
    said = "expected a result within 125 s, got none"
    assert [warning.partition(":")[0] for warning in found.warnings if warning.endswith(said)] == [
        "memory at each stage", "energy", "operators"
    ]  # fmt: skip
    assert found.arms["dense@fp32"].footprints == ()
    assert found.energy_note.endswith(said)
    assert (found.operators, found.operators_note.endswith(said)) == (None, True)
    assert Profile.from_json(found.to_json()) == found
    extra = [request for request in executor.requests if request.mode != TIME]
    assert len(extra) == 3
    assert all(request.inference_seconds == pytest.approx(LEVELS[request.arm] / 1e3, rel=0.05) for request in extra)


@pytest.mark.parametrize(
    ("limit_mb", "arms", "verdicts", "message"),
    [
        (96, None, "within within", ""),
        (70, None, "within over", ""),  # the dense arm is there to be compared with
        (69, None, "over over", "a peak of at most 69 MiB, got factored@fp32 70 MiB –"),
        (70, ["dense@fp32"], "over", "a peak of at most 70 MiB, got dense@fp32 96 MiB –"),
    ],
)
def test_the_targets_memory_is_a_gate_for_the_default_arm_or_else_for_all(
    bundle: Bundle, limit_mb: int, arms: list[str] | None, verdicts: str, message: str
) -> None:
    found, _ = fake(retarget(bundle, memory_mb=limit_mb), executor=Greedy(LEVELS), arms=arms)
    budget = found.memory_budget
    assert budget is not None
    assert (budget.limit_bytes, " ".join(budget.verdicts.values())) == (limit_mb * MIB, verdicts)
    assert Profile.from_json(found.to_json()) == found
    [line] = [line for line in profile_table(found).splitlines() if line.startswith("memory budget")]
    assert line.startswith(f"memory budget {limit_mb} MiB: ")
    assert ("dense@fp32 OVER by 26 MiB" in line) == (limit_mb == 70)
    assert budget.over == (("dense@fp32",) if arms else ("factored@fp32",) if message else ())
    if message:
        with pytest.raises(BudgetError, match=rf"memory on generic-x86 \(target\): expected {message}"):
            found.raise_if_over_budget()
    else:
        found.raise_if_over_budget()


def test_without_a_limit_and_under_an_emulator_no_budget_is_broken(bundle: Bundle) -> None:
    assert fake(bundle)[0].memory_budget is None
    emulated, _ = fake(retarget(bundle, memory_mb=1), evidence="emulated")
    assert emulated.memory_budget is not None
    assert set(emulated.memory_budget.verdicts.values()) == {"not measured"}


def test_a_runtime_that_changed_in_between_is_not_compared(bundle: Bundle) -> None:
    class Changing(FakeExecutor):
        def time(self, request: Request, where: str) -> TimedRun:
            return replace(super().time(request, where), runtime_version="1.21" if "block 9" in where else "1.20")

    found, _ = fake(bundle, executor=Changing(LEVELS))
    assert found.runtime_version == "1.20 / 1.21"
    assert {c.verdict for c in found.comparisons} == {"not comparable"}
    assert found.comparisons[0].reason == "the runtime changed in between: 1.20, 1.21"


def test_throttling_that_sets_in_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([replace(ENVIRONMENT, throttled="0"), replace(ENVIRONMENT, throttled="4")])
    monkeypatch.setattr(system, "environment", lambda: next(seen))
    assert "throttling changed while measuring (0 to 4)" in fake(bundle)[0].warnings[0]


def test_the_fair_baseline_is_the_dense_arm_of_the_same_precision() -> None:
    arms = make_manifest(("factored@int8", "dense@int8", "dense@fp32", "factored@fp32")).arms
    assert default_pairs(arms) == [
        ("factored@int8", "dense@int8"),
        ("factored@fp32", "dense@fp32"),
        ("factored@int8", "dense@fp32"),
        ("dense@int8", "dense@fp32"),
    ]
    assert default_pairs(arms[:2], "factored@int8") == [("dense@int8", "factored@int8")]
    assert default_pairs(arms[:1]) == []


def test_real_processes(bundle: Bundle) -> None:
    steps: list[tuple[int, int]] = []
    found = profile(
        bundle,
        arms=["dense@fp32"],
        blocks=6,
        seconds=1.0,
        progress=lambda what, done, total: steps.append((done, total)),
    )
    assert found.protocol.rounds == 6
    assert {len(found.arms["dense@fp32"].blocks), len(found.null_arm.blocks)} == {6}
    assert found.null.rounds == 6
    assert found.null.ratio is not None
    assert steps[-1] == (15, 15)
    assert Profile.from_json(found.to_json()) == found
