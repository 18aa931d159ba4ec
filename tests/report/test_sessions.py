from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rowcol_edge
from rowcol_edge import cli
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.profile import Comparison, Profile
from rowcol_edge.errors import BundleError, ConfigError, NotComparableError
from rowcol_edge.report.change import Change
from rowcol_edge.report.sessions import ALLOWED, compare

from ..profiles import ENVIRONMENT, LEVELS_MS, make_bundle, make_manifest, make_profile

LATER = "2026-02-02T03:04:05Z"
CALM = Comparison("null", "dense@int8", 1.0, 0.995, 1.006, "no significant difference", "target", 12)


def session(factor: float = 1.0, *, sha256: str = "ab", null: Comparison = CALM, **changes: Any) -> Profile:
    """Factored arms take ``factor`` times as long; ``sha256`` is that of their files. All others are the same."""
    levels = {arm: ms * (factor if arm.startswith("factored") else 1.0) for arm, ms in LEVELS_MS.items()}
    found = make_profile(levels_ms=levels, **changes)
    arms = {
        name: replace(arm, sha256=32 * sha256) if name.startswith("factored") else arm
        for name, arm in found.arms.items()
    }
    return replace(found, arms=arms, null=null)


def stored(tmp_path: Path, *profiles: Profile) -> list[Path]:
    paths = [tmp_path / name for name in ("old.json", "new.json", "third.json")[: len(profiles)]]
    for path, profile in zip(paths, profiles, strict=True):
        path.write_text(profile.to_json(), encoding="utf-8")
    return paths


def change(tmp_path: Path, old: Profile, new: Profile, **options: Any) -> Change:
    return compare(*stored(tmp_path, old, new), **options)


def verdicts(found: Change) -> dict[str, str]:
    return {arm.arm: arm.latency.verdict for arm in found.arms}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(list(map(str, arguments)))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_another_build_is_compared_arm_by_arm(tmp_path: Path) -> None:
    found = change(tmp_path, session(), session(0.8, sha256="ef", digest="ef" * 32, created=LATER))
    assert verdicts(found) == {
        "factored@int8": "faster", "dense@int8": "no significant difference", "dense@fp32": "no significant difference"
    }  # fmt: skip
    arm = found.arms[0]
    assert arm.latency.ratio == pytest.approx(0.8, abs=0.01)
    assert arm.latency.ci_low is not None
    assert arm.latency.ci_high is not None
    assert arm.latency.ci_low < 0.8 < arm.latency.ci_high
    assert (arm.same_file, arm.old.size_bytes, arm.new.peak_bytes, arm.old.blocks) == (False, 1_234_567, 70 << 20, 12)
    assert found.changed == ("build: cdcdcdcdcdcd and efefefefefef",)
    assert "two sessions: what changed on the machine in between is in neither" in found.notes
    cells = {row[0]: row[1:] for row in found.rows()}
    assert cells["latency"][0] == "2.00 ms → 1.60 ms"
    assert cells["new / old, by blocks [95 %]"][0].endswith("] faster")
    assert cells["file"][1] == "1.23 MB, the same"
    assert cells["peak memory"][0] == "70 MiB → 70 MiB"
    assert "quality" not in cells


def test_another_runtime_version_is_what_is_compared_and_leaves_no_arm_as_a_check(tmp_path: Path) -> None:
    found = change(tmp_path, session(), session(1.2, runtime_version="1.21", created=LATER))
    assert verdicts(found)["factored@int8"] == "slower"
    assert found.changed == ("onnxruntime: 1.20 and 1.21",)
    assert any(note.startswith("no arm is the same file under the same runtime") for note in found.notes)
    both = change(tmp_path, session(), session(1.2, runtime_version="1.21", digest="ef" * 32, created=LATER))
    assert any(note.endswith("the figures are of all of it at once") for note in both.notes)


def test_a_change_within_the_noise_of_a_null_arm_is_none(tmp_path: Path) -> None:
    loud = replace(CALM, ci_low=0.9, ci_high=1.1)
    new = session(0.95, digest="ef" * 32, sha256="ef", created=LATER)
    for old, later in ((session(null=loud), new), (session(), replace(new, null=loud))):
        found = change(tmp_path, old, later)
        assert found.noise == pytest.approx(1 / 0.9 - 1)
        arm = found.arms[0].latency
        assert (arm.verdict, arm.reason) == ("no significant difference", "no more than the noise of 11.1%")
    assert verdicts(change(tmp_path, session(), new))["factored@int8"] == "faster"


def test_files_that_are_the_same_tell_of_the_machine(tmp_path: Path) -> None:
    """The board became a tenth slower: dense arms show it, and a factored arm that is slower by as much is not news."""
    levels = {arm: 1.1 * ms for arm, ms in LEVELS_MS.items()}
    new = replace(make_profile(levels_ms=levels, digest="ef" * 32, created=LATER), null=CALM)
    arms = {**new.arms, "factored@int8": replace(new.arms["factored@int8"], sha256="ef" * 32)}
    found = change(tmp_path, session(), replace(new, arms=arms))
    assert verdicts(found) == {
        "factored@int8": "no significant difference", "dense@int8": "slower", "dense@fp32": "slower"
    }  # fmt: skip
    assert found.noise > 0.1
    [note] = [note for note in found.notes if note.startswith("the machine is not what it was")]
    assert "dense@fp32 1.1" in note


def test_the_same_build_again_is_a_check_of_the_machine(tmp_path: Path) -> None:
    found = change(tmp_path, session(), session(created=LATER))
    assert set(verdicts(found).values()) == {"no significant difference"}
    assert (found.changed, all(arm.same_file for arm in found.arms)) == ((), True)
    assert "the same build and runtime: what differs is the machine's" in found.notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 4}, "threads: 2 and 4"),
        ({"target": "raspberry-pi-5"}, "target: generic-x86 and raspberry-pi-5"),
        ({"runtime": "openvino"}, "runtime: onnxruntime and openvino"),
        ({"bundle": "other"}, "bundle: tiny and other"),
        ({"evidence": "proxy"}, "evidence: target and proxy"),
        ({"properties": {"HINT": "bf16"}}, "settings: none and HINT=bf16"),
        ({"caps": {"DNNL_MAX_CPU_ISA": "AVX2"}}, "caps: none and DNNL_MAX_CPU_ISA=AVX2"),
        ({"environment": replace(ENVIRONMENT, host_id="ffff")}, "host: 0123456789ab and ffff"),
        ({"environment": replace(ENVIRONMENT, governor="powersave")}, "governor: performance and powersave"),
        ({"environment": replace(ENVIRONMENT, cores_usable=1)}, "usable cores: 2 and 1"),
        ({"environment": replace(ENVIRONMENT, power_mode="7W (3)")}, "power mode: none and 7W (3)"),
        ({"environment": replace(ENVIRONMENT, clocks_held=True)}, "clocks held: not told and yes"),
    ],
)
def test_what_is_not_comparable_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(NotComparableError, match="expected the same conditions") as e:
        change(tmp_path, session(), session(created=LATER, **changes))
    assert e.value.got == said
    assert e.value.exit_code == 3


def test_one_error_names_every_difference_and_what_would_allow_them(tmp_path: Path) -> None:
    host = replace(ENVIRONMENT, governor="powersave")
    new = session(threads=4, environment=host, created=LATER)
    with pytest.raises(NotComparableError) as e:
        change(tmp_path, session(), new)
    assert e.value.got == "threads: 2 and 4; governor: performance and powersave"
    assert e.value.hint.endswith("--allow threads --allow governor")
    found = change(tmp_path, session(), new, allow=["threads", "governor"])
    assert found.changed == ("threads: 2 and 4", "governor: performance and powersave")
    assert any(note.startswith("no arm is the same file") for note in found.notes)  # threads would show in all of them
    with pytest.raises(NotComparableError, match="got target: generic-x86 and other; threads: 2 and 4") as e:
        change(tmp_path, session(), replace(new, target="other", environment=ENVIRONMENT))
    assert "--allow" not in e.value.hint


def test_an_exception_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean threads"):
        change(tmp_path, session(), session(created=LATER), allow=["thread"])
    assert not {"target", "processor", "runtime", "caps", "evidence"} & set(ALLOWED)


def test_the_help_names_every_condition_that_may_be_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(ALLOWED) in said


def test_emulated_times_are_never_compared(tmp_path: Path) -> None:
    with pytest.raises(NotComparableError, match="emulated times, which are no latency"):
        change(tmp_path, session(evidence="emulated"), session(evidence="emulated", created=LATER))


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_session_whose_own_noise_is_not_known_is_refused(tmp_path: Path, which: str) -> None:
    reason = "the runtime changed in between: 1.20, 1.21"
    unknown = Comparison("null", "dense@int8", None, None, None, "not comparable", "target", 12, reason)
    null = {"old": CALM, "new": CALM, which: unknown}
    with pytest.raises(NotComparableError) as e:
        change(tmp_path, session(null=null["old"]), session(0.9, null=null["new"], created=LATER))
    assert e.value.got == f"null arm of the {which} one: {reason}, so that its noise is not known"
    assert "--allow" not in e.value.hint


def test_one_session_is_not_two(tmp_path: Path) -> None:
    with pytest.raises(NotComparableError, match="the same one twice"):
        change(tmp_path, session(), session())


def test_no_arm_in_both(tmp_path: Path) -> None:
    new = session(created=LATER)
    with pytest.raises(NotComparableError, match="expected an arm that both measured"):
        change(tmp_path, session(), replace(new, arms={"other@int8": new.arms["dense@int8"]}))
    few = {name: arm for name, arm in new.arms.items() if name != "dense@fp32"}
    found = change(tmp_path, session(), replace(new, arms=few))
    assert [arm.arm for arm in found.arms] == list(few)
    assert "only in the old one: dense@fp32" in found.notes


def test_too_few_blocks_give_no_interval(tmp_path: Path) -> None:
    new = session(0.5, created=LATER)
    short = replace(new.arms["factored@int8"], blocks=new.arms["factored@int8"].blocks[:5])
    arm = change(tmp_path, session(), replace(new, arms={**new.arms, "factored@int8": short})).arms[0]
    assert (arm.latency.verdict, arm.latency.reason) == ("not comparable", "5 blocks, an interval needs 6")


def test_quality_is_that_of_each_build(tmp_path: Path) -> None:
    """The old build's bundle is named, the new profile lies in its own."""
    manifests = {name: make_manifest(created=f"2026-0{i}-01T00:00:00Z") for i, name in enumerate(("old", "new"), 1)}
    paths = []
    for name, manifest in manifests.items():
        quality = {"test": {"metric": "accuracy", "value": 0.9 if name == "old" else 0.89, "n": 40}}
        arms = tuple(replace(arm, quality=quality) for arm in manifest.arms)
        make_bundle(tmp_path / name, replace(manifest, arms=arms))
        with Bundle.open(tmp_path / name) as bundle:
            profile = session(digest=bundle.digest, created=LATER if name == "new" else "2026-01-01T00:00:00Z")
        paths.append(tmp_path / ("old.json" if name == "old" else "new/profiles/new.json"))
        paths[-1].write_text(profile.to_json(), encoding="utf-8")
    cells = {row[0]: row[1] for row in compare(*paths).rows()}
    assert cells["accuracy"] == "– → 0.8900"
    found = rowcol_edge.compare_profiles(*paths, bundles=[tmp_path / "old"])
    assert {row[0]: row[1] for row in found.rows()}["accuracy"] == "0.9000 → 0.8900"
    make_bundle(tmp_path / "third", make_manifest())
    with pytest.raises(NotComparableError, match="expected the same build"):
        compare(*paths, bundles=[tmp_path / "third"])


def test_bundles_judged_by_different_metrics_are_not_comparable(tmp_path: Path) -> None:
    paths = []
    for name, metric in (("old", "accuracy"), ("new", "auroc")):
        arms = tuple(
            replace(arm, quality={"test": {"metric": metric, "value": 0.9, "n": 40}}) for arm in make_manifest().arms
        )
        make_bundle(tmp_path / name, replace(make_manifest(), arms=arms))
        with Bundle.open(tmp_path / name) as bundle:
            profile = session(digest=bundle.digest)
        paths.append(tmp_path / f"{name}/profiles/p.json")
        paths[-1].write_text(profile.to_json(), encoding="utf-8")
    with pytest.raises(NotComparableError, match="metric: accuracy and auroc"):
        compare(*paths)


def test_what_else_is_said(tmp_path: Path) -> None:
    host = replace(ENVIRONMENT, kernel="6.2", numpy="2.1")
    found = change(tmp_path, session(created=LATER), session(environment=host, warnings=("it was warm",)))
    assert "the old one was measured after the new one: is that the order you mean?" in found.notes
    assert "also another: kernel 6.1 and 6.2, numpy 2.0.0 and 2.1" in found.notes
    assert "new: it was warm" in found.notes


def test_markdown_and_json(tmp_path: Path) -> None:
    found = change(tmp_path, session(), session(0.8, sha256="ef", digest="ef" * 32, created=LATER))
    lines = found.markdown().splitlines()
    assert lines[0] == "|  | factored@int8 | dense@int8 | dense@fp32 |"
    assert {line.count("|") for line in lines[: lines.index("")]} == {5}
    document = json.loads(json.dumps(found.to_dict()))
    assert (document["schema"], document["new"]["created"]) == (1, LATER)
    assert document["arms"][0]["latency"]["verdict"] == "faster"


def test_the_command_line_tells_profiles_from_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = stored(tmp_path, session(), session(threads=1, created=LATER))
    assert run("compare", old, new) == 3
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "threads: 2 and 1" in error
    assert run("compare", old, new, "--allow", "threads", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] == ["threads: 2 and 1"]
    assert run("compare", old, new, "--allow", "threads") == 0
    assert "two sessions: what changed on the machine" in " ".join(capsys.readouterr().out.split())
    for paths, got in (([old], "1 profile(s) and 0"), ([old, tmp_path], "1 profile(s) and 1"), ([old, new, old], "3")):
        assert run("compare", *paths) == 2
        assert got in capsys.readouterr().err
    assert run("compare", tmp_path, "--allow", "threads") == 2
    assert "expected: two profiles to use them for" in capsys.readouterr().err
    assert run("compare", tmp_path / "missing.json", new) == 2
    assert "a readable profile" in capsys.readouterr().err


def test_a_damaged_profile_and_another_schema_are_refused_by_name(tmp_path: Path) -> None:
    old, new = stored(tmp_path, session(), session(created=LATER))
    text = new.read_text(encoding="utf-8")
    new.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(BundleError, match=r"new.json: expected a JSON document"):
        compare(old, new)
    new.write_text(json.dumps({**json.loads(text), "schema": 99}), encoding="utf-8")
    with pytest.raises(BundleError, match=r"new.json.schema: .*got 99"):
        compare(old, new)
