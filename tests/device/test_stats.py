from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowcol_edge.device import stats
from rowcol_edge.errors import MeasurementError

BASELINE = [100.0, 104.0, 99.0, 101.0, 103.0, 98.0, 102.0, 100.0, 97.0, 105.0, 101.0, 99.0]


def test_a_constant_ratio_is_exact() -> None:
    found = stats.ratio_interval([value * 0.8 for value in BASELINE], BASELINE)
    assert found.ratio == pytest.approx(0.8)
    assert (found.low, found.high) == (pytest.approx(0.8), pytest.approx(0.8))
    assert found.verdict == stats.FASTER
    assert found.rounds == 12


def test_verdicts() -> None:
    assert stats.ratio_interval([v * 1.2 for v in BASELINE], BASELINE).verdict == stats.SLOWER
    assert stats.ratio_interval(BASELINE, BASELINE).verdict == stats.NO_DIFFERENCE
    shuffled = BASELINE[5:] + BASELINE[:5]
    assert stats.ratio_interval(shuffled, BASELINE).verdict == stats.NO_DIFFERENCE


def test_pairing_cancels_what_a_round_does_to_both() -> None:
    wild = [value * 3**i for i, value in enumerate(BASELINE)]
    found = stats.ratio_interval([value * 0.97 for value in wild], wild)
    assert found.high < 0.971


def test_a_slow_first_round_and_a_burst_do_not_decide() -> None:
    arm = [value * 0.95 for value in BASELINE]
    arm[0] *= 3.0
    arm[7] *= 1.4
    noise = np.random.default_rng(3).normal(1.0, 0.003, 12)
    found = stats.ratio_interval([a * n for a, n in zip(arm, noise, strict=True)], BASELINE)
    assert found.verdict == stats.FASTER
    assert found.ratio == pytest.approx(0.95, abs=0.005)


def test_the_interval_is_deterministic_and_inverts_with_the_arms() -> None:
    arm = [v * s for v, s in zip(BASELINE, np.random.default_rng(1).normal(0.9, 0.02, 12), strict=True)]
    one, two = stats.ratio_interval(arm, BASELINE), stats.ratio_interval(BASELINE, arm)
    assert one == stats.ratio_interval(arm, BASELINE)
    assert one.low < one.ratio < one.high
    assert two.ratio == pytest.approx(1 / one.ratio)
    assert two.low == pytest.approx(1 / one.high, rel=0.003)


@pytest.mark.parametrize(
    ("arm", "baseline", "what"),
    [
        ([1.0] * 5, [1.0] * 5, "at least 6 rounds"),
        ([1.0] * 6, [1.0] * 7, "6 baseline rounds"),
        ([1.0] * 6, [1.0] * 5 + [0.0], "positive, finite times"),
        ([1.0] * 5 + [math.nan], [1.0] * 6, "positive, finite times"),
    ],
)
def test_an_interval_that_cannot_be_given_is_refused(arm: list[float], baseline: list[float], what: str) -> None:
    with pytest.raises(MeasurementError, match=what):
        stats.ratio_interval(arm, baseline)


def test_the_fewest_rounds_are_the_fewest_whose_widest_interval_has_the_confidence() -> None:
    assert 1 - 2 * 0.5**stats.MIN_ROUNDS >= stats.CONFIDENCE
    assert 1 - 2 * 0.5 ** (stats.MIN_ROUNDS - 1) < stats.CONFIDENCE


# 97.5 % quantiles of Student's t from a printed table
@pytest.mark.parametrize(("degrees", "t"), [(5, 2.571), (7, 2.365), (11, 2.201), (19, 2.093), (60, 2.000)])
def test_expanded_tails_follow_students_t(degrees: int, t: float) -> None:
    n = degrees + 1
    assert stats.tail_probability(n) == pytest.approx(NormalDist().cdf(-math.sqrt(n / (n - 1)) * t), rel=0.03)


def test_expanded_tails_approach_the_nominal_ones() -> None:
    tails = [stats.tail_probability(n) for n in (6, 8, 12, 20, 100, 10_000)]
    assert tails == sorted(tails)
    assert tails[-1] == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize(("q", "fewest"), [(90, 50), (99, 500)])
def test_percentiles_are_refused_with_too_few_samples(q: int, fewest: int) -> None:
    assert fewest * (1 - q / 100) == pytest.approx(5)
    assert stats.percentile(range(fewest - 1), q) is None
    assert stats.percentile(range(fewest), q) == pytest.approx((fewest - 1) * q / 100)
    assert stats.refusal(q, fewest - 1) == f"p{q} refused: {fewest - 1} samples, needs {fewest}"


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=50))
def test_median_is_numpys(values: list[int]) -> None:
    assert stats.median(values) == pytest.approx(float(np.median(values)))


def test_median_of_nothing() -> None:
    with pytest.raises(MeasurementError, match="at least one sample"):
        stats.median([])


def test_spread_sees_two_speeds() -> None:
    assert stats.spread([100.0] * 12) == 0.0
    assert stats.spread([100.0] * 8 + [120.0] * 4) == pytest.approx(0.2)


def test_the_interval_of_two_independent_samples_covers() -> None:
    """Nominal 95 %; a nudge below that for 300 trials (binomial, three standard deviations)."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        new, old = 5e6 * random.lognormal(0, 0.02, 12), 10e6 * random.lognormal(0, 0.05, 8)
        found = stats.unpaired_interval(new.tolist(), old.tolist())
        held += found.low < 0.5 < found.high
    assert held / 300 > 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5


def test_two_samples_of_which_one_is_too_small() -> None:
    with pytest.raises(MeasurementError, match="at least 6 blocks each, got 5"):
        stats.unpaired_interval([1.0] * 12, [1.0] * 5)
    with pytest.raises(MeasurementError, match="positive, finite times"):
        stats.unpaired_interval([1.0] * 12, [0.0] * 12)
