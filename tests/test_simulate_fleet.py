"""The simulation of a fleet: what it is made with, and that the published figures are those of the present rules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "tools"))
    import simulate_fleet

    return simulate_fleet


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> dict[str, Any]:
    """The result without its measured part."""
    out = folder / "out.json"
    options = [*map(str, arguments), "--workers", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tools/simulate_fleet.py", *options])
    script.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert found["command"] == " ".join(["python tools/simulate_fleet.py", *options])
    return found


def test_jobs_are_as_long_as_those_of_a_campaign(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = [{"state": "measured", "seconds": 60.0}, {"state": "failed", "seconds": 7.0}]
    fleet = tmp_path / "fleet.json"
    fleet.write_text(json.dumps({"schema": 1, "entries": entries}), encoding="utf-8")
    found = run(script, monkeypatch, tmp_path, "--fleet", fleet, "--boards", 4, "--bundles", 3)
    assert found["seconds_of_real_jobs"] == [60.0]
    calm = found["simulated"][0]
    assert (calm["jobs"], calm["measured"], calm["begun_again"]) == (12, 12, 0)
    assert calm["hours"] == calm["hours_without_losses"] == 0.05
    again = run(script, monkeypatch, tmp_path, "--fleet", tmp_path / "out.json", "--boards", 4, "--bundles", 3)
    assert again["seconds_of_real_jobs"] == [60.0]


def test_a_campaign_without_a_measurement_says_so(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text('{"entries": [{"state": "failed", "seconds": 7.0}]}', encoding="utf-8")
    with pytest.raises(SystemExit, match="no job that was measured"):
        script.seconds_of_jobs(tmp_path / "fleet.json")


def test_the_published_figures_are_those_of_the_present_rules(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = json.loads(script.RESULT.read_text(encoding="utf-8"))["simulated"]
    found = run(script, monkeypatch, tmp_path)["simulated"]
    for row in (*published, *found):
        del row["cpu_seconds_of_the_rules"]
    assert found == published
