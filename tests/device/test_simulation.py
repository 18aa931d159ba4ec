"""The profiler's intervals on machines that misbehave in known ways: a short form of tools/simulate_profiler.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rowcol_edge.device import schedule, stats

REPETITIONS = 200
PROMISE = 0.93


def margin(share: float, repetitions: int) -> float:
    """Three standard deviations of a share counted over so many repetitions."""
    return 3 * sqrt(share * (1 - share) / repetitions)


@pytest.fixture(scope="module")
def simulator(root: Path) -> ModuleType:
    path = root / "tools/simulate_profiler.py"
    spec = importlib.util.spec_from_file_location("simulate_profiler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcomes(simulator: ModuleType) -> dict[str, Any]:
    return {scenario.name: simulator.simulate(scenario, REPETITIONS, seed=7) for scenario in simulator.SCENARIOS}


def test_intervals_hold_the_true_ratio(outcomes: dict[str, Any]) -> None:
    for name, outcome in outcomes.items():
        assert outcome.coverage >= PROMISE - margin(PROMISE, REPETITIONS), name
    mean = sum(outcome.coverage for outcome in outcomes.values()) / len(outcomes)
    assert mean >= PROMISE


def test_the_null_arm_seldom_alarms(outcomes: dict[str, Any]) -> None:
    for name, outcome in outcomes.items():
        assert outcome.null_false_alarms <= 0.05 + margin(0.05, REPETITIONS), name
    assert 0 < sum(outcome.null_false_alarms for outcome in outcomes.values()) / len(outcomes) <= 0.06


def test_effects_are_found_where_the_machine_allows_it(outcomes: dict[str, Any]) -> None:
    for name in ("constant", "drift", "wander", "slow-first"):
        assert outcomes[name].power["10%"] >= 0.99, name
        assert outcomes[name].power["5%"] >= 0.97, name
    assert outcomes["constant"].power["2%"] >= 0.9


def test_the_true_ratio_of_an_arm_with_two_speeds_is_that_of_a_typical_round(outcomes: dict[str, Any]) -> None:
    assert outcomes["bimodal"].true_ratio == 0.9
    assert 0.9 < outcomes["bimodal-one-arm"].true_ratio < 0.91


def test_the_published_figures_are_of_this_profiler_and_keep_the_promise(root: Path, simulator: ModuleType) -> None:
    document = json.loads((root / "tools/results/profiler-simulation.json").read_text(encoding="utf-8"))
    assert (document["rounds"], document["resamples"]) == (schedule.DEFAULT_ROUNDS, stats.RESAMPLES)
    assert document["command"].startswith("python tools/simulate_profiler.py --repetitions ")
    assert [row["scenario"] for row in document["scenarios"]] == [scenario.name for scenario in simulator.SCENARIOS]
    for row in document["scenarios"]:
        assert row["repetitions"] >= 1000
        assert row["coverage"] >= PROMISE, row["scenario"]
        assert row["null_false_alarms"] <= 0.06, row["scenario"]
