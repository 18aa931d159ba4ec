from __future__ import annotations

from dataclasses import replace

import pytest

from rowcol_edge.device.profile import Comparison
from rowcol_edge.device.system import readings
from rowcol_edge.device.table import joules, machine_told, mebibytes, milliseconds, profile_table, ratio_text, size
from rowcol_edge.report.facts import environment_facts

from ..profiles import ENVIRONMENT, make_profile


def test_the_whole_table() -> None:
    lines = profile_table(
        make_profile(warnings=("load 3.00 on 2 core(s): end other work, then measure again",))
    ).splitlines()
    assert lines[0] == "tiny for generic-x86: onnxruntime 1.20, 2 thread(s), 12 rounds in 70 s"
    assert lines[1] == "evidence: target – measured on Some Core"
    assert lines[2] == "host: Some Core, 2 of 4 cores, avx2 fma, governor performance, no caps, Python 3.11.7"
    assert lines[3] == (
        "before → after: temperature 48 °C → 48 °C, fastest core 1500 MHz → 1500 MHz, throttling none → none"
    )
    assert lines[5].split() == [
        "arm",
        "median",
        "p90",
        "p99",
        "import",
        "load",
        "first",
        "peak",
        "memory",
        "over",
        "runtime",
        "file",
    ]
    factored = lines[6].split()
    assert factored[0] == "factored@int8"
    assert 1.9 < float(factored[1]) < 2.1
    assert factored[7:] == ["300", "ms", "20.0", "ms", "9.00", "ms", "70", "MiB", "20", "MiB", "1.23", "MB"]
    ratio = next(line for line in lines if line.startswith("factored@int8 / dense@int8"))
    assert ratio.endswith("] faster")
    null = next(line for line in lines if line.startswith("null arm: dense@int8 twice"))
    assert null.endswith("no significant difference")
    assert lines[-1] == "warning: load 3.00 on 2 core(s): end other work, then measure again"
    assert all(line == line.rstrip() for line in lines)


def test_the_runtimes_settings_are_stated() -> None:
    lines = profile_table(make_profile(properties={"INFERENCE_PRECISION_HINT": "f32"})).splitlines()
    assert lines[1] == "runtime settings: INFERENCE_PRECISION_HINT=f32"
    assert lines[2].startswith("evidence: target")


def test_refused_percentiles_are_dashes_with_a_reason() -> None:
    text = profile_table(make_profile(samples=41))
    assert "–" in next(line for line in text.splitlines() if line.startswith("factored@int8"))
    assert "factored@int8: p99 refused: 492 samples, needs 500" in text
    assert "p90 refused" not in text
    assert "refused" not in profile_table(make_profile())


def test_an_emulators_times_are_never_shown() -> None:
    lines = profile_table(make_profile(evidence="emulated")).splitlines()
    row = next(line for line in lines if line.startswith("factored@int8 "))
    assert "ms" not in row
    assert row.split()[1:] == ["–"] * 8 + ["1.23", "MB"]
    assert "not comparable (emulated times are no latency)" in "\n".join(lines)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "–"),
        (12_345.0, "0.012 ms"),
        (1.0e6, "1.00 ms"),
        (12.34e6, "12.3 ms"),
        (123.4e6, "123 ms"),
        (9.996e6, "10.0 ms"),
    ],
)
def test_times(ns: float | None, text: str) -> None:
    assert milliseconds(ns) == text


def test_sizes() -> None:
    assert (size(None), size(999_000), size(4_404_019)) == ("–", "999 kB", "4.40 MB")
    assert (mebibytes(None), mebibytes(3 << 20)) == ("–", "3 MiB")


def test_no_ratio_without_its_interval() -> None:
    c = Comparison("a", "b", 0.61234, 0.6, 0.62, "faster", "target", 12)
    assert ratio_text(c) == "0.612 [0.600, 0.620] faster"
    refused = Comparison("a", "b", None, None, None, "not comparable", "target", 5, "5 rounds, an interval needs 6")
    assert ratio_text(refused) == "not comparable (5 rounds, an interval needs 6)"


def test_what_a_board_tells_is_stated() -> None:
    host = replace(ENVIRONMENT, power_mode="MAXN_SUPER (2)", clocks_held=False, frequency_khz=None, temperature_c=None)
    after = replace(readings(host), temperature_c=71.2, firmware_temperature_c=70.0, throttled="4")
    lines = profile_table(make_profile(environment=host, after=after)).splitlines()
    assert "power mode MAXN_SUPER (2), clocks held: no (jetson_clocks)" in lines[2]
    assert lines[3] == (
        "before → after: temperature not measured → 71 °C, firmware temperature not measured → 70 °C, "
        "fastest core not measured, throttling not measured → 4"
    )


UNTOLD = replace(ENVIRONMENT, governor="", frequency_khz=None, temperature_c=None)
COMMON = ("governor", "temperature", "fastest core", "throttling")


@pytest.mark.parametrize(
    ("board", "own"),
    [
        ("", ()),
        ("Raspberry Pi 5 Model B Rev 1.0", ("firmware temperature",)),
        ("NVIDIA Jetson Orin Nano Developer Kit", ("power mode", "clocks held")),
    ],
)
def test_what_a_machine_should_tell_and_does_not_was_not_measured(board: str, own: tuple[str, ...]) -> None:
    host = replace(UNTOLD, board=board)
    profile = make_profile(environment=host, after=readings(host))
    assert machine_told(profile) == dict.fromkeys((*COMMON, *own), ("not measured", "not measured"))
    text = profile_table(profile)
    assert "governor not measured" in text
    assert "before → after: temperature not measured, " in text
    assert text.count("not measured") == len(COMMON) + len(own)
    facts = environment_facts(profile)
    assert {what for what, told in facts.items() if told == "not measured"} == {*COMMON, *own}


def test_no_throttling_is_said_only_where_it_can_be_seen() -> None:
    """A Raspberry Pi's cores are held back by its firmware, which has to be asked."""
    assert machine_told(make_profile())["throttling"] == ("none", "none")
    pi = replace(ENVIRONMENT, board="Raspberry Pi 4 Model B Rev 1.5", firmware_temperature_c=51.0)
    told = machine_told(make_profile(environment=pi, after=replace(readings(pi), throttled="0")))
    assert told["throttling"] == ("not measured", "0")
    assert told["firmware temperature"] == ("51 °C", "51 °C")


def test_the_report_says_whether_clocks_were_held() -> None:
    host = replace(ENVIRONMENT, board="NVIDIA Jetson AGX Orin", clocks_held=True)
    facts = environment_facts(make_profile(environment=host, after=replace(readings(host), clocks_held=False)))
    assert (facts["clocks held"], facts["power mode"]) == ("yes → no", "not measured")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1.234, "1.23 J"), (0.01234, "12.3 mJ"), (0.00099996, "1 mJ"), (-0.0004, "-400 µJ"), (0.0, "0 µJ")],
)
def test_energies(value: float | None, text: str) -> None:
    assert joules(value) == text
