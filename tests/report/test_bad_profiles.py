"""Profiles that somebody has tampered with: an answer or one typed error, never anything else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

import rowcol_edge
from rowcol_edge.device.profile import Profile
from rowcol_edge.device.table import profile_table
from rowcol_edge.errors import BundleError, RowcolError

from ..profiles import make_profile
from .test_page import rich_profile

NUMBERS = [0, -1, 1, 10**400, 2**63, 1e308, -1e308, 0.5, True, None]
TEXTS = ["", "xyz", "\ud800", "not comparable", "faster", "emulated", "proxy", None]
OTHERS: list[Any] = [[], {}, None, "x", 7, [[]]]
GONE = object()
DRAWN, TABLED = 140, 2500
"""Of some 7,000 changes: those that all commands see, and those that the reader and the terminal's table see."""


def paths(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key, and the first two places of every list."""
    if so_far:
        yield so_far
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, below in inner:
        yield from paths(below, (*so_far, key))


def changes(document: dict[str, Any]) -> list[tuple[tuple[Any, ...], Any]]:
    """Every path with every value that it may be given instead, and with GONE."""
    return [(path, value) for path in paths(document) for value in (*_others(at(document, path)), GONE)]


def _others(old: Any) -> list[Any]:
    return TEXTS if isinstance(old, str) else NUMBERS if isinstance(old, int | float) else OTHERS


def at(document: Any, path: tuple[Any, ...]) -> Any:
    return reduce(lambda value, key: value[key], path, document)


def tampered(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """One value is another, or gone."""
    made = copy.deepcopy(document)
    if value is GONE:
        del at(made, path[:-1])[path[-1]]
    else:
        at(made, path[:-1])[path[-1]] = value
    return made


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(rich_profile(samples=6).to_json())
    return whole


def shown(bad: Path, good: Path) -> list[Callable[[], Any]]:
    """All that shows or judges a profile in a file."""
    out = bad.parent
    return [
        lambda: rowcol_edge.write_report([bad], out=out / "r.html", json=out / "j", csv=out / "c"),
        lambda: rowcol_edge.gate(bad, max_latency_ratio=2.0, max_bytes="4MB", max_memory="1GiB").text(),
        lambda: rowcol_edge.compare_profiles(bad, good, allow=["bundle", "threads", "settings"]).markdown(),
        lambda: rowcol_edge.compare_profiles(good, bad).markdown(),
        lambda: profile_table(Profile.load(bad)),
        lambda: judged(bad),
    ]


def judged(path: Path) -> bool:
    Profile.load(path).raise_if_over_budget()
    return True


def files(tmp_path: Path) -> tuple[Path, Path]:
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    good.write_text(make_profile(samples=6, created="2027-01-01T00:00:00Z").to_json(), encoding="utf-8")
    return bad, good


def test_a_tampered_profile_is_shown_or_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    bad, good = files(tmp_path)
    uses = shown(bad, good)
    drawn = random.Random(0).sample(changes(document), DRAWN)
    answered = 0
    for change in drawn:
        bad.write_text(json.dumps(tampered(document, *change)), encoding="utf-8")
        for use in uses:
            with suppress(RowcolError):
                assert use()
                answered += 1
    assert 0 < answered < DRAWN * len(uses)  # some of it was harmless, some was not


def test_a_tampered_profile_is_a_table_or_refused(document: dict[str, Any]) -> None:
    drawn = random.Random(1).sample(changes(document), TABLED)
    answered = 0
    for change in drawn:
        with suppress(RowcolError):
            profile = Profile.from_dict(tampered(document, *change))
            answered += bool(profile_table(profile))
            profile.raise_if_over_budget()
    assert 0 < answered < TABLED


DISAGREEING: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "an interval of a layer without its end": (
        ("operators", "comparisons", 0, "ci_high"), None, "ratio of body.0: expected numbers above 0, all three or none"
    ),
    "an interval without its begin": (("comparisons", 0, "ci_low"), None, "ratio of factored@int8: .* 0[.]5.*, None, "),
    "a layer of no process": (
        ("operators", "arms", "dense@int8", "layers", 0, "rounds_ns"), [], "layer body.0 of dense@int8: .* got none"
    ),
    "a layer compared that an arm lacks": (
        ("operators", "arms", "dense@int8", "layers"), [], "a layer that dense@int8 has, got 'body.0'"
    ),
    "operators compared of an arm without": (
        ("operators", "arms", "dense@int8"), GONE, "a layer that dense@int8 has, got 'body.0'"
    ),
    "an arm that decides without a verdict": (
        ("memory_budget", "decide"), ["x"], "memory_budget.decide: expected arms out of factored@int8, .* got 'x'"
    ),
    "a verdict on an arm that was not measured": (
        ("arms", "factored@int8"), GONE, "memory_budget.verdicts: .* got 'factored@int8'"
    ),
    "memory below 0": (
        ("arms", "factored@int8", "footprints", 0, "runs", 0, "curve", "resident_bytes", 2), -5, "bytes ≥ 0, got -5"
    ),
    "cold starts beyond what a number holds": (
        ("arms", "dense@int8", "cold"), {"import_ns": 1.7e308, "load_ns": 1.7e308, "first_ns": 1.0}, "cold: .* got inf"
    ),
    "a footprint's ratio that is none": (
        ("arms", "dense@int8", "footprints", 0, "latency"),
        {"arm": "null", "baseline": "default", "ratio": 1.0, "ci_low": 0.9, "ci_high": None, "verdict": "faster",
         "evidence": "target", "rounds": 6, "reason": ""},
        "footprint default: ratio of null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DISAGREEING)
def test_records_that_do_not_agree_are_refused_by_name(tmp_path: Path, document: dict[str, Any], what: str) -> None:
    path, value, said = DISAGREEING[what]
    bad, good = files(tmp_path)
    bad.write_text(json.dumps(tampered(document, path, value)), encoding="utf-8")
    for use in shown(bad, good):
        with pytest.raises(BundleError, match=f"^bad.json.*{said}"):
            use()


def test_operators_of_an_arm_that_was_not_measured_are_refused(document: dict[str, Any]) -> None:
    values = tampered({**document, "memory_budget": None}, ("arms", "dense@int8"), GONE)
    with pytest.raises(
        BundleError, match="operators: expected arms out of factored@int8, dense@fp32, got 'dense@int8'"
    ):
        Profile.from_dict(values)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_profile_that_was_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path, other = tmp_path / "p.json", tmp_path / "o.json"
    text = make_profile(samples=6).to_json()
    other.write_text(text, encoding="utf-8")
    path.write_text(text[: int(len(text) * share)], encoding="utf-8")
    for use in (
        lambda: rowcol_edge.write_report([path], out=tmp_path / "r.html"),
        lambda: rowcol_edge.gate(path, max_bytes="4MB"),
        lambda: rowcol_edge.compare_profiles(other, path),
    ):
        with pytest.raises(RowcolError, match=r"p.json: expected a JSON document") as e:
            use()
        assert e.value.exit_code == 2
    assert not (tmp_path / "r.html").exists()
