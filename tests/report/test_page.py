from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import rowcol_edge
from rowcol_edge import cli
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.memory import Curve, Usage
from rowcol_edge.device.profile import (
    TWICE,
    Comparison,
    Footprint,
    FootprintReading,
    MemoryBudget,
    Profile,
    RailEnergy,
)
from rowcol_edge.errors import BundleError, ConfigError, MissingDependencyError, NotComparableError
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.report import charts, figures, reading
from rowcol_edge.report.page import claim, headline, page

from ..profiles import MIB, MS, make_bundle, make_manifest, make_operators, make_profile

HOSTILE = "<script>alert('x')</script>\"&"


class Document(HTMLParser):
    """Tags with their attributes, texts by the tag around them, and whether all is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("br", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def written(tmp_path: Path, *profiles: Profile, **manifest: Any) -> str:
    """The page over profiles of one bundle with a plan; digests are set to the bundle's."""
    folder = tmp_path / "bundle"
    layers = (LayerPlan("body.0", "project", 8, 0.99, 4000, 1000, 64_000, 16_000), LayerPlan("head", reason="too thin"))
    FactorPlan(layers).write(tmp_path / "plan.toml")
    make_bundle(folder, make_manifest(**manifest), {"plan.toml": (tmp_path / "plan.toml").read_bytes()})
    with Bundle.open(folder) as bundle:
        digest = bundle.digest
    paths = [folder / f"profiles/{i}.json" for i in range(len(profiles))]
    for path, profile in zip(paths, profiles, strict=True):
        path.write_text(replace(profile, digest=digest).to_json(), encoding="utf-8")
    rowcol_edge.write_report(paths, out=tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def rich_profile(samples: int = 60) -> Profile:
    """With footprints, energy, a memory budget and a warning."""
    profile = make_profile(samples=samples)
    use = Usage(50 * MIB, 40 * MIB, 30 * MIB)
    steady = replace(use, resident_bytes=66 * MIB)
    stages, peaks = (use, use, use, steady), (80 * MIB, 90 * MIB)
    curve = Curve(
        (30 * MS, 300 * MS, 360 * MS, 400 * MS, 900 * MS), (9 * MIB, 50 * MIB, 80 * MIB, 66 * MIB, 66 * MIB),
        (300 * MS, 350 * MS, 370 * MS, 880 * MS),
    )  # fmt: skip
    runs = tuple(FootprintReading(*stages, *peaks, 20, 2.0 * MS, found) for found in (curve, None))
    null, slower = (
        Comparison(name, "default", ratio, ratio - 0.01, ratio + 0.01, verdict, "target", 6)
        for name, ratio, verdict in (("null", 1.0, "no significant difference"), ("no arena", 1.25, "slower"))
    )
    default = Footprint("default", {}, *stages, *peaks, None, runs)
    smaller = replace(steady, resident_bytes=60 * MIB, private_bytes=None)
    saving = tuple(replace(each, steady=smaller, run_peak_bytes=88 * MIB) for each in runs)
    without = Footprint(
        "no arena", {"enable_cpu_mem_arena": "0"}, use, use, use, smaller, 80 * MIB, 88 * MIB, slower, saving
    )
    twice = Footprint(TWICE, {}, *stages, *peaks, null, runs)
    energy = RailEnergy("VDD_IN", "INA3221", 0.0042, 0.004, 0.005, ())
    arms = {
        name: replace(arm, footprints=(default, without, twice), energy=(energy,)) for name, arm in profile.arms.items()
    }
    budget = MemoryBudget(64 * MIB, dict.fromkeys(arms, "over"), ("factored@int8",))
    return replace(
        profile, arms=arms, memory_budget=budget, operators=make_operators(), operators_note="",
        warnings=("the fan stood still",),
    )  # fmt: skip


def test_the_page_has_every_section_and_the_numbers(tmp_path: Path) -> None:
    document = Document(written(tmp_path, rich_profile()))
    headings = [text for tag, text in document.texts if tag in ("h1", "h2", "h3")]
    assert headings == [
        "tiny: measured on generic-x86",
        "tiny for generic-x86",
        "Warnings",
        "Arms",
        "Distribution, memory and trade-offs",
        "Memory by the runtime's settings",
        "Time by layer",
        "Time by operator",
        "Plan by layer",
        "Environment and protocol",
    ]
    cells = Counter(text for tag, text in document.texts if tag in ("td", "th"))
    for text in (
        "1.23 MB",
        "2.00 ms",
        "8.00 ms",
        "0.9000",
        "+0.25 pp [-0.10, +0.60]",
        "4.2 mJ [4 mJ, 5 mJ]",
        "90 MiB",
        "3.15 MB",
        "too thin",
    ):
        assert cells[text], text
    assert ("li", "the fan stood still") in document.texts
    assert ("dd", "x86_64 Some Core") in document.texts
    assert ("dd", "12, each arm once a round in a process of its own") in document.texts


def test_energy_stands_with_the_rail_that_it_was_read_on(tmp_path: Path) -> None:
    """The default arm's could not be read, and another arm's on another rail than a third one's."""
    profile = rich_profile()
    rails = {"factored@int8": (), "dense@int8": profile.arms["dense@int8"].energy,
             "dense@fp32": (RailEnergy("psys", "RAPL", 0.0099, 0.009, 0.01, ()),)}  # fmt: skip
    arms = {name: replace(profile.arms[name], energy=energy) for name, energy in rails.items()}
    texts = [
        text for tag, text in Document(written(tmp_path, replace(profile, arms=arms))).texts if tag in ("td", "th")
    ]
    assert "energy less idle [least, most], rail" in texts
    for energy, rail in (("4.2 mJ [4 mJ, 5 mJ]", "VDD_IN"), ("9.9 mJ [9 mJ, 10 mJ]", "psys")):
        assert texts[texts.index(energy) + 1] == rail
    (without := tmp_path / "without").mkdir()
    assert "energy less idle" not in written(without, make_profile())


def test_the_runtimes_settings_stand_with_what_they_save_and_cost(tmp_path: Path) -> None:
    text = written(tmp_path, rich_profile())
    found = [text for tag, text in Document(text).texts if tag == "td"]
    first = found.index("no arena")
    assert found[first : first + 11] == [
        "no arena", "-2.0", "-6.0", "–", "1.250 [1.240, 1.260] slower",
        "default twice", "+0.0", "+0.0", "+0.0", "1.000 [0.990, 1.010] no significant difference", "no arena",
    ]  # fmt: skip
    (without := tmp_path / "without").mkdir()
    (emulated := tmp_path / "emulated").mkdir()
    assert "settings</h3>" not in written(without, make_profile())
    assert "settings</h3>" not in written(emulated, replace(rich_profile(), evidence="emulated"))


def test_an_older_profile_tells_of_the_settings_null_arm_its_latency_alone(tmp_path: Path) -> None:
    profile = rich_profile()
    arm = profile.arms["factored@int8"]
    default, without, twice = arm.footprints
    older = replace(arm, footprints=(replace(default, latency=twice.latency), without))
    text = written(tmp_path, replace(profile, arms={**profile.arms, arm.name: older}))
    found = [text for tag, text in Document(text).texts if tag == "td"]
    first = found.index("default twice")
    assert found[first + 1 : first + 5] == ["–", "–", "–", "1.000 [0.990, 1.010] no significant difference"]
    assert found[first + 6 : first + 10] == ["-2.0", "-6.0", "–", "1.250 [1.240, 1.260] slower"]  # the next arm's


def test_the_page_is_made_for_keyboards_and_screen_readers(tmp_path: Path) -> None:
    document = Document(written(tmp_path, rich_profile(), make_profile(created="2026-02-02T03:04:05Z")))
    assert [document.count(tag) for tag in ("h1", "main", "header", "nav", "footer", "script")] == [1, 1, 1, 1, 1, 0]
    assert document.count("caption") == document.count("table") > 10
    assert all(attributes.get("scope") for tag, attributes in document.tags if tag == "th")
    regions = [attributes for _, attributes in document.tags if attributes.get("role") == "region"]
    assert len(regions) == document.count("table")
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)
    ids = [attributes["id"] for _, attributes in document.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in document.tags if tag == "svg"]
    assert len(pictures) == 13  # the second profile has no footprint, so no memory over time, and no operators
    labels = [region["aria-label"] for region in regions]
    assert len(labels) == len(set(labels))
    titles = [text for tag, text in document.texts if tag == "title" and " of tiny" in text]
    assert len(titles) == len(set(titles)) == len(pictures)
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(str(picture["aria-labelledby"]).split()) <= set(ids)
    links = [str(attributes["href"]) for tag, attributes in document.tags if tag == "a"]
    assert {link.lstrip("#") for link in links} <= set(ids)
    assert document.tags[0] == ("html", {"lang": "en"})


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, rich_profile())
    document = Document(text)
    assert not {tag for tag, _ in document.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    assert not [name for _, attributes in document.tags for name in attributes if name in ("src", "style", "srcset")]
    assert not re.search(r"url\(|@import|https?:", text)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in document.tags


def test_hostile_names_are_text(tmp_path: Path) -> None:
    profile = rich_profile()
    arms = {HOSTILE: replace(profile.arms["factored@int8"], name=HOSTILE, footprints=()), **profile.arms}
    environment = replace(profile.environment, cpu_model=HOSTILE, board=f"</style>{HOSTILE}")
    hostile = replace(
        profile, arms=arms, bundle=HOSTILE, target=HOSTILE, runtime_version=HOSTILE, warnings=(HOSTILE,),
        evidence_note=HOSTILE, environment=environment, memory_budget=None,
    )  # fmt: skip
    text = written(tmp_path, hostile, name=HOSTILE)
    document = Document(text)
    assert document.count("script") == 0
    assert document.count("style") == 1
    assert "<script" not in text
    assert ("li", HOSTILE) in document.texts
    assert any(HOSTILE in text for tag, text in document.texts if tag == "title")
    assert any(attributes.get("aria-label") == f"Arms of {HOSTILE} for {HOSTILE}" for _, attributes in document.tags)


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path: Path) -> None:
    text = make_profile(bundle="BROKEN").to_json().replace('"BROKEN"', '"a\\ud800b"')
    (tmp_path / "p.json").write_text(text)
    rowcol_edge.write_report([tmp_path / "p.json"], out=tmp_path / "r.html")
    assert "a?b for generic-x86" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_verdict_in_words(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(rich_profile().to_json(), encoding="utf-8")
    found = reading.load([tmp_path / "p.json"]).profiles[0]
    first, second, *others = headline(found)
    assert re.fullmatch(
        r"factored@int8 is faster than dense@int8: it takes 50\.\d % of its time "
        r"\(95 % interval 49\.\d to 50\.\d %\)\.",
        first,
    )
    assert second.startswith("factored@int8 is faster than dense@fp32: it takes 25.")
    assert others == [
        "Its file takes 1.23 MB, against 1.23 MB of dense@int8 and 1.23 MB of dense@fp32.",
        "Peak memory 70 MiB; the target's budget of 64 MiB: over.",
    ]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            Comparison("a", "b", 1.2, 1.1, 1.3, "slower", "target", 12),
            "a is slower than b: it takes 120.0 % of its time (95 % interval 110.0 to 130.0 %).",
        ),
        (
            Comparison("a", "b", 0.99, 0.9, 1.1, "no significant difference", "target", 12, "x"),
            (
                "No significant difference in latency between a and b: 99.0 % of its time "
                "(95 % interval 90.0 to 110.0 %; x)."
            ),
        ),
        (
            Comparison("a", "b", None, None, None, "not comparable", "target", 3, "3 rounds"),
            "The latencies of a and b are not comparable: 3 rounds.",
        ),
    ],
)
def test_a_claim_never_goes_without_its_interval(found: Comparison, said: str) -> None:
    assert claim(found) == said


def test_emulated_times_are_left_out(tmp_path: Path) -> None:
    text = written(tmp_path, make_profile(evidence="emulated"))
    document = Document(text)
    assert document.count("svg") == 0
    assert " ms<" not in text.partition("Environment and protocol")[0]
    assert "The latencies of factored@int8 and dense@int8 are not comparable: emulated times are no latency." in text
    assert "emulated: times and memory are not the target&#39;s and are left out" in text


def test_a_percentile_of_too_few_samples_is_a_dash(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(make_profile(samples=4).to_json(), encoding="utf-8")
    arm = reading.load([tmp_path / "p.json"]).profiles[0].arms[0]
    assert arm.percentiles[figures.TABLED.index(99)] is None
    assert arm.percentiles[figures.TABLED.index(90)] is None
    assert arm.percentiles[figures.TABLED.index(50)] == pytest.approx(arm.median_ns, abs=1)


def test_the_curve_is_that_of_the_raw_samples(tmp_path: Path) -> None:
    profile = make_profile()
    (tmp_path / "p.json").write_text(profile.to_json(), encoding="utf-8")
    found = reading.load([tmp_path / "p.json"]).profiles[0].arms[0]
    samples = sorted(ns for block in profile.arms["factored@int8"].blocks for ns in block.samples_ns)
    assert found.curve[0] == (0, samples[0])
    assert found.curve[-1] == (100, samples[-1])
    assert dict(found.curve)[50] == pytest.approx(profile.arms["factored@int8"].latency.median_ns, abs=1)


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([2.0, 3.0], False, ["2", "2.5", "3"]),
        ([2.0, 90.0], True, ["2", "5", "10", "20", "50"]),
        ([5.0], False, ["4.8", "4.9", "5", "5.1", "5.2"]),
        ([0.0], False, ["-1", "-0.5", "0", "0.5", "1"]),
        ([1e-3, 1e3], True, ["0.001", "0.01", "0.1", "1", "10", "100", "1000"]),
    ],
)
def test_an_axis(values: list[float], log: bool, ticks: list[str]) -> None:
    axis = charts.Axis.fit(values, 50, 350)
    assert axis.log is log
    assert [tick.label for tick in axis.ticks()] == ticks
    assert all(50 <= axis.at(value) <= 350 for value in values)


def test_the_pareto_front_leaves_out_what_is_beaten(tmp_path: Path) -> None:
    profile = make_profile()
    sizes = {"factored@int8": 5, "dense@int8": 1, "dense@fp32": 9}
    arms = {name: replace(arm, artifact_bytes=sizes[name] * MS) for name, arm in profile.arms.items()}
    (tmp_path / "p.json").write_text(replace(profile, arms=arms).to_json(), encoding="utf-8")
    chart = charts.size(reading.load([tmp_path / "p.json"]).profiles[0])
    assert chart is not None
    assert chart.description.endswith("No arm beats factored@int8, dense@int8.")
    marks = {series.name: f"{series.mark.x},{series.mark.y}" for series in chart.series}
    assert chart.front == f"{marks['factored@int8']} {marks['dense@int8']}"


def test_every_text_stands_out_from_what_is_behind_it() -> None:
    """WCAG 2.1, success criterion 1.4.3: a contrast of at least 4.5, in both schemes."""
    css = (Path(charts.__file__).with_name("templates") / "report.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        texts = [(text, behind) for text in ("ink", "faint", "link") for behind in ("paper", "card")]
        numbers = [("on", f"s{i}") for i in range(1, 7)]
        assert all(contrast(colours[text], colours[behind]) >= 4.5 for text, behind in texts + numbers)
        lines = [(f"s{i}", "card") for i in range(1, 7)]
        assert all(contrast(colours[line], colours[behind]) >= 3 for line, behind in lines)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_without_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"rowcol-edge\[report\]"):
        rowcol_edge.write_report([tmp_path / "never-read.json"], out=tmp_path / "r.html")


@pytest.mark.parametrize(
    ("files", "also"),
    [({"out": "p.json"}, "read"), ({"out": "r", "json": "p.json"}, "read"), ({"out": "r", "csv": "./r"}, "written")],
)
def test_what_is_read_or_written_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], also: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = make_profile().to_json()
    Path("p.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"expected a file for this alone, got one that is also {also}"):
        rowcol_edge.write_report(["p.json"], **files)
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert Path("p.json").read_text(encoding="utf-8") == text
    rowcol_edge.write_report(["p.json"], out="/dev/null", json="/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.json").write_text(make_profile().to_json(), encoding="utf-8")
    out = tmp_path / "r.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            rowcol_edge.write_report([tmp_path / "p.json"], out=out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "r.html"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(make_profile().to_json(), encoding="utf-8")

    def run(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.run_command(["report", *arguments])
        return ended.value.code

    assert run(str(tmp_path / "p.json"), "--out", str(tmp_path / "r.html")) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(str(tmp_path / "p.json"), "--out", str(tmp_path / "no/r.html")) == 2
    assert "no/" in capsys.readouterr().err
    assert run(str(tmp_path / "missing.json"), "--out", str(tmp_path / "r.html")) == 2


def test_a_bundle_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "other", make_manifest())
    (tmp_path / "p.json").write_text(make_profile().to_json(), encoding="utf-8")
    with pytest.raises(NotComparableError, match="expected the same build"):
        reading.load([tmp_path / "p.json"], [tmp_path / "other"])
    with pytest.raises(BundleError, match="at least one profile"):
        reading.load([])
    (tmp_path / "copy.json").write_text(make_profile().to_json(), encoding="utf-8")
    for twice in ([tmp_path / "p.json"] * 2, [tmp_path / "p.json", tmp_path / "copy.json"]):
        with pytest.raises(NotComparableError, match="expected sessions that differ, got the same one twice"):
            reading.load(twice)


def test_the_same_profiles_give_the_same_page(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(make_profile().to_json(), encoding="utf-8")
    assert page(reading.load([tmp_path / "p.json"])) == page(reading.load([tmp_path / "p.json"]))


def test_profiles_that_do_not_go_side_by_side_say_so(tmp_path: Path) -> None:
    assert "do not set latencies" not in written(tmp_path, make_profile(), make_profile(created="2026-01-03T00:00:00Z"))
    other = tmp_path / "other"
    other.mkdir()
    note = "do not set latencies side by side that differ in threads: 2 (0.json), 4 (1.json); read the ratios of each"
    assert ("li", note) in Document(written(other, make_profile(), make_profile(threads=4))).texts


def test_what_many_profiles_differ_in_is_said_once(tmp_path: Path) -> None:
    """The page grows as its profiles do, and no note with them."""
    profile = make_profile(samples=6)
    paths = [tmp_path / f"{i:03}.json" for i in range(120)]
    for i, path in enumerate(paths):
        host = replace(profile.environment, host_id=f"board-{i}", governor="performance" if i % 3 else "schedutil")
        path.write_text(replace(profile, environment=host).to_json(), encoding="utf-8")
    half, whole = reading.load(paths[:60]), reading.load(paths)
    first = ", ".join(f"board-{i} ({i:03}.json)" for i in range(5))
    performance = "performance (001.json, 002.json, 004.json, and 77 more)"
    said = (
        f"host: {first}, and 115 other values (115 profiles)",
        f"governor: {performance}, schedutil (000.json, 003.json, 006.json, and 37 more)",
    )
    assert whole.notes == tuple(
        f"do not set latencies side by side that differ in {text}; read the ratios of each" for text in said
    )
    assert len(page(whole)) < 2.02 * len(page(half))
