"""Profiles that somebody has tampered with: an answer or one typed error, never anything else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import rowcol_edge
from rowcol_edge.errors import RowcolError

from ..profiles import make_profile
from .test_page import rich_profile

NUMBERS = [0, -1, 1, 10**400, 2**63, 1e308, -1e308, 0.5, True, None]
TEXTS = ["", "xyz", "\ud800", "not comparable", "faster", "emulated", "proxy", None]
OTHERS: list[Any] = [[], {}, None, "x", 7, [[]]]


def paths(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key, and the first two places of every list."""
    if so_far:
        yield so_far
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, below in inner:
        yield from paths(below, (*so_far, key))


def tampered(document: dict[str, Any], choose: random.Random) -> dict[str, Any]:
    """One value is another, or gone."""
    made = copy.deepcopy(document)
    path = choose.choice(list(paths(made)))
    at: Any = made
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    values = TEXTS if isinstance(old, str) else NUMBERS if isinstance(old, int | float) else OTHERS
    if choose.random() < 0.15:
        del at[path[-1]]
    else:
        at[path[-1]] = choose.choice(values)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_a_tampered_profile_is_shown_or_refused(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    document = json.loads(rich_profile(samples=6).to_json())
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    good.write_text(make_profile(samples=6, created="2027-01-01T00:00:00Z").to_json(), encoding="utf-8")
    uses: list[Callable[[], Any]] = [
        lambda: rowcol_edge.write_report([bad], out=tmp_path / "r.html", json=tmp_path / "j", csv=tmp_path / "c"),
        lambda: rowcol_edge.gate(bad, max_latency_ratio=2.0, max_bytes="4MB", max_memory="1GiB").text(),
        lambda: rowcol_edge.compare_profiles(bad, good, allow=["bundle", "threads", "settings"]).markdown(),
        lambda: rowcol_edge.compare_profiles(good, bad).markdown(),
    ]
    answered = 0
    for _ in range(10):
        bad.write_text(json.dumps(tampered(document, choose)), encoding="utf-8")
        for use in uses:
            with suppress(RowcolError):
                assert use()
                answered += 1
    assert 0 < answered < 10 * len(uses)  # some of it was harmless, some was not


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
