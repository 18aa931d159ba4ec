from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rowcol_edge.device import stats
from rowcol_edge.device.profile import NULL, Block
from rowcol_edge.device.verdicts import compare, judge


def blocks(level: float, *, seed: int = 0, rounds: int = 12, settled: bool = True, noise: float = 0.004) -> list[Block]:
    random = np.random.default_rng(seed)
    times = level * 1e6 * random.normal(1.0, noise, (rounds, 9))
    return [Block(i, 0, 1, 1, 1, settled, (), tuple(int(t) for t in row)) for i, row in enumerate(times)]


def test_a_session_with_a_quiet_null_arm() -> None:
    session = {"f": blocks(4.0, seed=1), "d": blocks(5.0, seed=2), "g": blocks(6.0, seed=3), NULL: blocks(5.0, seed=4)}
    found = judge(session, [("f", "d"), ("g", "d")], "d", "target")
    assert [c.verdict for c in found.comparisons] == [stats.FASTER, stats.SLOWER]
    assert found.comparisons[0].ratio == pytest.approx(0.8, abs=0.01)
    assert (found.null.arm, found.null.baseline, found.null.verdict) == (NULL, "d", stats.NO_DIFFERENCE)
    assert found.warnings == ()


def test_an_effect_no_larger_than_what_the_null_arm_shows_is_none() -> None:
    session = {"f": blocks(4.9, seed=1), "g": blocks(3.0, seed=2), "d": blocks(5.0, seed=3), NULL: blocks(5.2, seed=4)}
    alone = compare(session, "f", "d", "target")
    assert alone.verdict == stats.FASTER
    found = judge(session, [("f", "d"), ("g", "d")], "d", "target")
    assert found.null.verdict == stats.SLOWER
    assert found.comparisons[0].verdict == stats.NO_DIFFERENCE
    assert found.comparisons[0].reason == "not larger than what the null arm shows"
    assert (found.comparisons[0].ci_low, found.comparisons[0].ci_high) == (alone.ci_low, alone.ci_high)
    assert found.comparisons[1].verdict == stats.FASTER
    assert found.warnings[0].startswith("the null arm (d twice) came out slower, ratio 1.0")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda s: judge(s, [("f", "d")], "d", "emulated"), "emulated times are no latency"),
        (lambda s: judge(s, [("f", "d")], "d", "predicted"), "predicted times are no latency"),
        (
            lambda s: judge({k: v[:5] for k, v in s.items()}, [("f", "d")], "d", "target"),
            "5 rounds, an interval needs 6",
        ),
        (lambda s: judge(s, [("f", "d")], "d", "target", "the runtime changed"), "the runtime changed"),
    ],
)
def test_what_must_not_be_compared(make: Callable[[dict[str, list[Block]]], object], reason: str) -> None:
    found = make({"f": blocks(4.0, seed=1), "d": blocks(5.0, seed=2), NULL: blocks(5.0, seed=3)})
    for comparison in (found.comparisons[0], found.null):  # type: ignore[attr-defined]
        assert comparison.verdict == stats.NOT_COMPARABLE
        assert (comparison.ratio, comparison.ci_low, comparison.ci_high) == (None, None, None)
        assert comparison.reason == reason


def test_only_rounds_with_both_arms_count() -> None:
    session = {"f": blocks(4.0, seed=1), "d": blocks(5.0, seed=2)[2:]}
    assert compare(session, "f", "d", "target").rounds == 10


def test_two_speeds_and_unsettled_warm_ups_are_told() -> None:
    two_speeds = [*blocks(5.0, seed=2)[:8], *blocks(6.5, seed=3)[8:]]
    found = judge(
        {"f": blocks(4.0, seed=1, settled=False), "d": two_speeds, NULL: blocks(5.0, seed=4)},
        [("f", "d")],
        "d",
        "target",
    )
    assert any("block medians: d 3" in warning for warning in found.warnings)
    assert any("(share of blocks: f 100%): allow more --seconds" in warning for warning in found.warnings)
