"""The profiler beside the runtimes' own tools: who runs when, and what the table says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "tools"))
    import benchmark_agreement

    return benchmark_agreement


@pytest.fixture
def table(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "tools"))
    import benchmark_agreement_table

    return benchmark_agreement_table


def subjects(script: ModuleType) -> list[Any]:
    request = script.Request(script.TIME, "a", "openvino", "a.xml", "g.npz", {}, 2)
    return [script.Subject(runtime, "dense@fp32", request, {}) for runtime in ("openvino", "onnxruntime")]


def rows(script: ModuleType, level: dict[str, float]) -> list[dict[str, Any]]:
    """Medians in ms by who measures, with a drift that all of a round share."""
    calls = {"n": 0}

    def measure(subject: Any, name: str, runs: int) -> dict[str, float]:
        calls["n"] += 1
        drift = 1e6 * (1 + 0.001 * (calls["n"] // 5))
        inside = (
            {"invocation in the loop": 3.7 * drift} if (name, subject.runtime) == ("plain loop", "openvino") else {}
        )
        return {name: level[name] * drift, **inside}

    found: list[dict[str, Any]] = script.measured(subjects(script), 8, 1.0, measure, lambda *_: None)
    return found


def test_all_take_turns_and_run_as_many_inferences_as_fit_in_the_time(script: ModuleType) -> None:
    seen: list[tuple[str, str, int]] = []

    def measure(subject: Any, name: str, runs: int) -> dict[str, float]:
        seen.append((subject.runtime, name, runs))
        return {name: 4e6}

    script.measured(subjects(script), 6, 1.0, measure, lambda *_: None)
    first, rest = seen[:2], seen[2:]
    assert first == [("openvino", "profiler", 50), ("onnxruntime", "profiler", 50)]
    assert {runs for _, _, runs in rest} == {250}
    assert len(rest) == 6 * (3 + 2)  # benchmark_app is openvino's alone
    begins = [name for i in range(0, 30, 5) for runtime, name, _ in rest[i : i + 5] if runtime == "openvino"][::3]
    assert set(begins) == {"profiler", "benchmark_app", "plain loop"}


def test_ratios_are_paired_by_round(script: ModuleType) -> None:
    [openvino, onnxruntime] = rows(script, {"profiler": 4.0, "benchmark_app": 3.9, "plain loop": 4.0})
    assert openvino["against"]["benchmark_app"]["ratio"] == pytest.approx(4.0 / 3.9, rel=2e-3)
    assert openvino["against"]["benchmark_app"]["longer_ns"] == pytest.approx(1e5, rel=0.2)
    assert list(onnxruntime["against"]) == ["plain loop"]
    assert len(openvino["medians_ns"]["profiler"]) == 8


def result(script: ModuleType, level: dict[str, float]) -> dict[str, Any]:
    made = {
        "command": "python tools/benchmark_agreement.py", "machine": {"cpu_model": "Some Core"}, "sample": "sample:x",
        "tools": {"openvino": "2026.4", "onnxruntime": "1.32"}, "threads": 2, "rounds": 8,
        "rows": rows(script, level),
    }  # fmt: skip
    read: dict[str, Any] = json.loads(json.dumps(made))
    return read


@pytest.mark.parametrize(
    ("tool", "loop", "shares", "agrees"),
    [
        (3.8, 4.0, ("+200 µs (+5.3%)", "+0 µs (+0.0%)", "+200 µs (+5.3%)"), "the loop agrees with the profiler."),
        (3.8, 3.8, ("+200 µs (+5.3%)", "+200 µs (+5.3%)", "+0 µs (+0.0%)"), "the loop agrees with benchmark_app."),
        (4.2, 4.0, ("-200 µs (-4.8%)", "+0 µs (+0.0%)", "-200 µs (-4.8%)"), "the loop agrees with the profiler."),
        (4.2, 4.2, ("-200 µs (-4.8%)", "-200 µs (-4.8%)", "+0 µs (+0.0%)"), "the loop agrees with benchmark_app."),
        (3.8, 4.2, ("+200 µs (+5.3%)", "-200 µs (-4.8%)", "+400 µs (+10.5%)"), "the loop agrees with neither."),
        (4.2, 3.8, ("-200 µs (-4.8%)", "+200 µs (+5.3%)", "-400 µs (-9.5%)"), "the loop agrees with neither."),
    ],
)
def test_a_difference_is_told_by_all_that_was_measured_of_it(
    table: ModuleType, tool: float, loop: float, shares: tuple[str, str, str], agrees: str
) -> None:
    """Each in ms, the profiler takes 4."""
    openvino = row("openvino", {"profiler": 4.0, "benchmark_app": tool, "plain loop": loop})
    to_tool, to_loop, of_loop = shares
    assert table.verdict([openvino]).endswith(
        f"0 of 1. `dense@fp32` on openvino takes {to_tool} against benchmark_app and {to_loop} against the plain loop, "
        f"which takes {of_loop} against benchmark_app: {agrees}"
    )


def test_what_a_tool_does_not_time_is_told(table: ModuleType) -> None:
    medians = {"profiler": 4.0, "benchmark_app": 3.8, "plain loop": 4.0, "invocation in the loop": 3.8}
    openvino = row("openvino", medians)
    del openvino["against"]["invocation in the loop"]
    said = table.verdict([openvino])
    assert said.endswith("Of the loop 200 µs are around the invocation, which benchmark_app does not time.")


@pytest.mark.parametrize(("loop", "share"), [(3.8, "+200 µs (+5.3%)"), (4.2, "-200 µs (-4.8%)")])
def test_a_runtime_without_a_tool_is_told_by_its_loop(table: ModuleType, loop: float, share: str) -> None:
    said = table.verdict([row("onnxruntime", {"profiler": 4.0, "plain loop": loop})])
    assert said.endswith(f"0 of 1. `dense@fp32` on onnxruntime takes {share} against the plain loop.")


def test_nothing_is_told_of_those_that_agree(table: ModuleType) -> None:
    said = table.verdict([row("openvino", {"profiler": 4.0, "benchmark_app": 4.05, "plain loop": 3.0})])
    assert said.endswith("brings): 1 of 1.")


def row(runtime: str, level: dict[str, float]) -> dict[str, Any]:
    """Without noise."""
    ours = level["profiler"]
    against = {
        name: {"ratio": ours / ms, "ci_low": ours / ms, "ci_high": ours / ms, "longer_ns": (ours - ms) * 1e6}
        for name, ms in level.items()
        if name != "profiler"
    }
    medians = {name: [ms * 1e6] * 6 for name, ms in level.items()}
    return {"runtime": runtime, "arm": "dense@fp32", "medians_ns": medians, "against": against}


def test_the_table_has_a_row_an_artifact(script: ModuleType, table: ModuleType) -> None:
    text = table.agreement(result(script, {"profiler": 4.0, "benchmark_app": 4.0, "plain loop": 4.0}))
    lines = text.splitlines()[2:]
    assert lines[2].startswith("| `dense@fp32`, openvino | 4.")
    assert {line.count("|") for line in lines[:4]} == {9}
    assert lines[2].split("|")[7:9] == [" 3.72 ms ", " 1.081 "]
    assert lines[3].split("|")[7:9] == [" – ", " – "]
    assert "brings): 2 of 2." in text
    assert "openvino 2026.4" in text


def test_an_interval_that_reaches_beyond_the_limit_is_named(table: ModuleType) -> None:
    row = {
        "runtime": "tflite", "arm": "dense@fp32", "medians_ns": {},
        "against": {"litert-benchmark": {"ratio": 1.01, "ci_low": 0.97, "ci_high": 1.03, "longer_ns": 10.0}},
    }  # fmt: skip
    assert "the interval reaches beyond it for `dense@fp32`, tflite" in table.verdict([row])


@pytest.mark.parametrize(("ratio", "low", "high", "told"), [
    (1.03, 0.99, 1.05, False), (1.03, 1.015, 1.05, False), (0.97, 0.95, 0.985, False), (0.97, 0.95, 0.975, True),
    (1.03, 1.025, 1.05, True),
])  # fmt: skip
def test_a_difference_whose_interval_reaches_below_the_limit_is_not_called_beyond_it(
    table: ModuleType, ratio: float, low: float, high: float, told: bool
) -> None:
    found = row("onnxruntime", {"profiler": 4.0, "plain loop": 4.0})
    found["against"]["plain loop"] |= {"ratio": ratio, "ci_low": low, "ci_high": high}
    said = table.verdict([found])
    assert "brings): 0 of 1." in said
    assert ("below it for `dense@fp32`, onnxruntime: not told to be beyond." in said) is not told
