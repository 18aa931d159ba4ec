from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from rowcol_edge.device import schedule
from rowcol_edge.errors import MeasurementError

NAMES = "abcdefg"


@pytest.mark.parametrize("arms", range(2, 8))
def test_every_arm_stands_everywhere_and_follows_every_other_equally_often(arms: int) -> None:
    names = NAMES[:arms]
    rounds = 2 * schedule.cycle(arms)
    order = schedule.order(names, rounds)
    assert len(order) == rounds
    assert all(sorted(row) == sorted(names) for row in order)
    places = Counter((name, i) for row in order for i, name in enumerate(row))
    assert set(places.values()) == {rounds // arms}
    followers = Counter(pair for row in order for pair in pairwise(row))
    assert len(followers) == arms * (arms - 1)
    assert len(set(followers.values())) == 1


@pytest.mark.parametrize("arms", [2, 3, 7, 8, 15, 16])
def test_in_every_six_rounds_the_places_of_all_arms_have_the_same_mean(arms: int) -> None:
    names = [chr(ord("a") + i) for i in range(arms)]
    rounds = 6 * (schedule.cycle(arms) // 6 or 1)
    order = schedule.order(names, rounds)
    for start in range(0, rounds, 6):
        few = order[start : start + 6]
        means = {sum(row.index(name) for row in few) / 6 for name in names}
        assert means == {(arms - 1) / 2}
        assert len({*few}) == min(6, schedule.cycle(arms))


def test_the_order_repeats_itself_exactly() -> None:
    assert schedule.order("abcd", 12) == schedule.order("abcd", 12)
    assert schedule.order("a", 6) == (("a",),) * 6


@pytest.mark.parametrize(
    ("arms", "wanted", "rounds"),
    [
        (2, 12, 12),
        (3, 12, 12),
        (4, 12, 12),
        (4, 10, 12),
        (4, 9, 8),
        (5, 12, 10),
        (6, 12, 12),
        (7, 12, 14),
        (2, 7, 8),
        (4, 6, 8),
    ],
)
def test_rounds_are_whole_cycles(arms: int, wanted: int, rounds: int) -> None:
    assert schedule.balanced_rounds(arms, wanted) == rounds
    assert rounds % schedule.cycle(arms) == 0


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(MeasurementError, match="blocks: expected at least 6, got 5"):
        schedule.balanced_rounds(4, 5)


def test_time_is_shared_after_what_processes_cost() -> None:
    plan = schedule.plan([0.005] * 4, 12, seconds=72.0, overhead_seconds=0.5)
    assert plan.rounds == 12
    assert plan.run_seconds == pytest.approx(1.0)
    assert plan.warmup_seconds == pytest.approx(0.3)
    assert plan.expected_seconds == pytest.approx(72.0)


def test_a_block_is_no_longer_than_useful() -> None:
    plan = schedule.plan([0.005] * 2, 12, seconds=1000.0, overhead_seconds=0.1)
    assert plan.run_seconds == schedule.RUN_SECONDS[1]
    assert plan.expected_seconds < 60


def test_short_time_drops_whole_cycles_before_it_shortens_blocks_too_far() -> None:
    plan = schedule.plan([0.005] * 4, 12, seconds=25.0, overhead_seconds=0.5)
    assert plan.rounds == 8
    assert plan.run_seconds == pytest.approx(25 / 32 - 0.5)
    assert plan.expected_seconds == pytest.approx(25.0)


def test_where_even_the_fewest_blocks_do_not_fit_the_plan_says_how_long_it_takes() -> None:
    plan = schedule.plan([1.0, 0.5, 0.5, 1.0], 12, seconds=10.0, overhead_seconds=1.0)
    assert plan.rounds == 8
    assert plan.expected_seconds == pytest.approx(8 * (10 + 5 + 5 + 10 + 4 * 1.0))
