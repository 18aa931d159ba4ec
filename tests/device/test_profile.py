from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge.device.memory import Curve, Usage
from rowcol_edge.device.profile import Footprint, FootprintReading, Profile, conditions
from rowcol_edge.errors import BundleError, NotComparableError

from ..profiles import ENVIRONMENT, make_profile


def test_json_round_trip_keeps_every_raw_sample(tmp_path: Path) -> None:
    profile = make_profile()
    text = profile.to_json()
    assert Profile.from_json(text) == profile
    assert json.loads(text) == json.loads(json.dumps(profile.to_dict()))
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    assert (
        Profile.load(tmp_path / "p.json").arms["dense@fp32"].blocks[11].samples_ns
        == profile.arms["dense@fp32"].blocks[11].samples_ns
    )


def test_plain_json_is_read_as_well() -> None:
    profile = make_profile()
    assert Profile.from_json(json.dumps(profile.to_dict(), indent=1)) == profile


def test_the_samples_of_a_block_stand_on_one_line() -> None:
    lines = make_profile().to_json().splitlines()
    assert sum('"samples_ns": [' in line for line in lines) == 4 * 12
    assert len(lines) < 1200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "profile.schema: expected 3 or 4, got 2"),
        ({"evidence": "hearsay"}, "evidence: expected one of target, proxy, emulated, predicted, got 'hearsay'"),
        ({"threads": "2"}, "profile.threads: expected a whole number, got '2'"),
        ({"arms": {"a": {}}}, "profile.arms.a.name: expected a value"),
        ({"extra": 1}, "profile.extra: expected no such key"),
    ],
)
def test_a_damaged_profile_is_an_error_that_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Profile.from_dict({**make_profile().to_dict(), **change})


def test_a_profile_from_before_there_were_operators_is_read() -> None:
    profile = make_profile()
    older = {key: value for key, value in profile.to_dict().items() if not key.startswith("operators")}
    found = Profile.from_dict({**older, "schema": 3})
    assert found == replace(profile, operators_note="the profile is older than that")
    with pytest.raises(BundleError, match=r"profile\.operators: expected a value"):
        Profile.from_dict({**older, "schema": 4})


def test_an_unknown_verdict_is_an_error() -> None:
    profile = make_profile()
    with pytest.raises(BundleError, match="verdict: expected one of faster, slower"):
        Profile.from_dict({**profile.to_dict(), "null": {**profile.to_dict()["null"], "verdict": "great"}})


def test_a_profile_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Its footprints have no curves."""
    usage = Usage(3 << 20, None, None)
    reading = FootprintReading(*[usage] * 4, 5 << 20, 6 << 20, 20, 2e6)
    footprint = Footprint("default", {}, *[usage] * 4, 5 << 20, 6 << 20, None, (reading,))
    profile = make_profile()
    arms = {name: replace(arm, footprints=(footprint,)) for name, arm in profile.arms.items()}
    values = replace(profile, arms=arms).to_dict()
    for arm in values["arms"].values():
        for run in arm["footprints"][0]["runs"]:
            del run["curve"]
    read = Profile.from_dict({**values, "schema": 3})
    assert read == replace(profile, arms=arms, operators_note="the profile is older than that")
    assert read.schema == 4
    assert Profile.from_json(read.to_json()) == read


@pytest.mark.parametrize(
    "curve",
    [
        Curve((), (), (1, 2, 3, 4)),
        Curve((1, 2), (5,), (1, 2, 3, 4)),
        Curve((2, 1), (5, 5), (1, 2, 3, 4)),
        Curve((1, 2), (5, 5), (1, 2, 3)),
    ],
)
def test_a_memory_curve_that_is_none_is_refused(curve: Curve) -> None:
    usage = Usage(3 << 20, None, None)
    reading = FootprintReading(*[usage] * 4, 5 << 20, 6 << 20, 20, 2e6, curve)
    footprint = Footprint("default", {}, *[usage] * 4, 5 << 20, 6 << 20, None, (reading,))
    profile = make_profile()
    arms = {**profile.arms, "dense@int8": replace(profile.arms["dense@int8"], footprints=(footprint,))}
    with pytest.raises(BundleError, match=r"arm dense@int8: memory curve"):
        Profile.from_dict(replace(profile, arms=arms).to_dict())


def test_an_endless_file_is_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowcol_edge.device.profile._LIMIT_BYTES", 1 << 20)
    with pytest.raises(BundleError, match=r"/dev/zero: expected a profile of at most 1 MiB, got more"):
        Profile.load(Path("/dev/zero"))


@pytest.mark.parametrize("samples", [(), (4_000_000, 0), (-5,)])
def test_a_block_without_times_is_refused(samples: tuple[int, ...]) -> None:
    values = make_profile().to_dict()
    values["arms"]["dense@int8"]["blocks"][3]["samples_ns"] = samples
    with pytest.raises(BundleError, match=r"arm dense@int8, block 3: expected times above 0"):
        Profile.from_dict(values)


def test_a_ratio_that_is_none_is_refused() -> None:
    values = make_profile().to_dict()
    values["null"]["ci_low"] = -0.5
    with pytest.raises(BundleError, match=r"ratio of null: expected numbers above 0"):
        Profile.from_dict(values)


def test_a_missing_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a readable profile"):
        Profile.load(tmp_path / "no.json")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(BundleError, match=r"no.json: expected a JSON document"):
        Profile.load(tmp_path / "no.json")


def test_comparison_of_two_arms() -> None:
    found = make_profile().comparison("factored@int8", "dense@int8")
    assert found.verdict == "faster"
    assert found.ratio == pytest.approx(0.5, abs=0.01)


def test_a_pair_that_was_not_measured_or_must_not_be_compared() -> None:
    with pytest.raises(NotComparableError, match="profile again with that baseline") as e:
        make_profile().comparison("dense@fp32", "factored@int8")
    assert e.value.exit_code == 3
    with pytest.raises(NotComparableError, match="emulated times are no latency"):
        make_profile(evidence="emulated").comparison("factored@int8", "dense@int8")


def test_derived_figures() -> None:
    arm = make_profile().arms["dense@int8"]
    assert arm.cold.total_ns == 329_000_000
    assert arm.memory is not None
    assert arm.memory.own_bytes == 20 * (1 << 20)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"threads": 4}, "threads: 2 and 4"),
        ({"properties": {"INFERENCE_PRECISION_HINT": "bf16"}}, "settings: none and INFERENCE_PRECISION_HINT=bf16"),
        ({"runtime_version": "1.21"}, "runtime: onnxruntime 1.20 and onnxruntime 1.21"),
        ({"evidence": "proxy"}, "evidence: target and proxy"),
        ({"caps": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}, "caps: none and ONEDNN_MAX_CPU_ISA=AVX2"),
        ({"environment": replace(ENVIRONMENT, host_id="ba9876543210")}, "host: 0123456789ab and ba9876543210"),
        ({"environment": replace(ENVIRONMENT, caps={"OMP_NUM_THREADS": "1"})}, "caps: none and OMP_NUM_THREADS=1"),
        ({"environment": replace(ENVIRONMENT, power_mode="7W (3)")}, "power mode: none and 7W (3)"),
        ({"environment": replace(ENVIRONMENT, clocks_held=True)}, "clocks held: not told and yes"),
        ({"environment": replace(ENVIRONMENT, governor="powersave")}, "governor: performance and powersave"),
    ],
)
def test_conditions_that_keep_latencies_apart(change: dict[str, Any], difference: str) -> None:
    before, after = conditions(make_profile()), conditions(replace(make_profile(), **change))
    assert [f"{key}: {before[key]} and {after[key]}" for key in before if before[key] != after[key]] == [difference]


def test_the_same_conditions() -> None:
    profile = make_profile()
    assert conditions(profile) == conditions(replace(profile, created="later"))
    assert conditions(profile)["processor"] == "x86_64 Some Core"
