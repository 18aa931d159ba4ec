"""The profiler beside the runtimes' own tools: who runs when, and what the table says of it."""

from __future__ import annotations

import json
import re
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

    def measure(subject: Any, name: str, runs: int) -> float:
        calls["n"] += 1
        return level[name] * 1e6 * (1 + 0.001 * (calls["n"] // 5))

    found: list[dict[str, Any]] = script.measured(subjects(script), 8, 1.0, measure, lambda *_: None)
    return found


def test_all_take_turns_and_run_as_many_inferences_as_fit_in_the_time(script: ModuleType) -> None:
    seen: list[tuple[str, str, int]] = []

    def measure(subject: Any, name: str, runs: int) -> float:
        seen.append((subject.runtime, name, runs))
        return 4e6

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
    ("level", "said"),
    [
        ({"profiler": 4.0, "benchmark_app": 4.0, "plain loop": 4.0}, "brings): 2 of 2."),
        (
            {"profiler": 4.0, "benchmark_app": 3.8, "plain loop": 4.0},
            "1 of 2. `dense@fp32` on openvino takes +200 µs against benchmark_app; a loop over",
        ),
        ({"profiler": 4.0, "benchmark_app": 3.8, "plain loop": 3.8}, "µs against the loop: it checks inputs"),
    ],
)
def test_the_table_says_what_is_known_of_a_difference(
    script: ModuleType, table: ModuleType, level: dict[str, float], said: str
) -> None:
    text = re.sub(r"\+(19|20)\d µs", "+200 µs", table.agreement(result(script, level)))
    lines = text.splitlines()
    assert lines[2].startswith("| `dense@fp32`, openvino | 4.")
    assert {line.count("|") for line in lines[:4]} == {7}
    assert said in text
    assert "openvino 2026.4" in text


def test_an_interval_that_reaches_beyond_the_limit_is_named(table: ModuleType) -> None:
    row = {
        "runtime": "tflite", "arm": "dense@fp32", "medians_ns": {},
        "against": {"litert-benchmark": {"ratio": 1.01, "ci_low": 0.97, "ci_high": 1.03, "longer_ns": 10.0}},
    }  # fmt: skip
    assert "the interval reaches beyond it for `dense@fp32`, tflite" in table.verdict([row])
