"""Numbers out of raw samples: percentiles that may be refused, and the interval on a paired ratio of latencies.

The unit of evidence is the round, not the sample. Samples of one process share its memory layout, clock and
neighbours, so a thousand of them say little about the next process (Kalibera & Jones, "Rigorous benchmarking in
reasonable time", ISMM 2013). Each round runs every arm once, each in a process of its own; its log-ratio of block
medians is one observation, and the interval is a bootstrap over rounds.

The estimate is the median of the log-ratios: what a typical round shows. A slow first round, a burst of other work or
a process that landed in a slow mode moves a mean over twelve rounds by percents, and its interval by more.

The percentile bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13) is too narrow for
so few rounds. Its tails are moved out by the factor that makes it agree with Student's t for the mean of normal data
(Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015, section 4.1,
"expanded percentile"). Bootstrap-t was tried and rejected: resamples of a bimodal set have next to no variance, and
the interval becomes useless. Coverage by simulation: tools/simulate_profiler.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MeasurementError

CONFIDENCE = 0.95
"""Nominal confidence of every interval; ``_Z`` belongs to it."""
MIN_ROUNDS = 6
"""With n rounds the widest interval a median can have (smallest to largest) covers it with 1 - 2·0.5ⁿ: 93.8 % for
five rounds, 96.9 % for six. Below six no interval deserves to be called 95 %."""
RESAMPLES = 4000
SEED = 20130620

MIN_SAMPLES = {90: 50, 99: 500}
"""Five samples have to lie beyond a percentile, or it is the luck of a few: n·(1 - q) ≥ 5."""

FASTER = "faster"
SLOWER = "slower"
NO_DIFFERENCE = "no significant difference"
NOT_COMPARABLE = "not comparable"
VERDICTS = (FASTER, SLOWER, NO_DIFFERENCE, NOT_COMPARABLE)

_Z = 1.959963984540054  # standard normal quantile of 0.975


@dataclass(frozen=True, slots=True)
class Interval:
    """Latency of an arm over its baseline's (below 1: faster) and the bounds of its 95 % interval."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        if self.high < 1.0:
            return FASTER
        return SLOWER if self.low > 1.0 else NO_DIFFERENCE


def median(samples: Sequence[float]) -> float:
    """Middle value, or the mean of the middle two; MeasurementError without samples."""
    if not samples:
        raise MeasurementError("median", expected="at least one sample", got="none")
    ordered = sorted(samples)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def percentile(samples: Sequence[float] | NDArray[Any], q: int) -> float | None:
    """The q-th percentile (linear between order statistics), q in ``MIN_SAMPLES``; None with too few samples for it."""
    if len(samples) < MIN_SAMPLES[q]:
        return None
    return float(np.percentile(np.asarray(samples, np.float64), q))


def refusal(q: int, count: int) -> str:
    """Why :func:`percentile` gave None."""
    return f"p{q} refused: {count} samples, needs {MIN_SAMPLES[q]}"


def spread(block_medians: Sequence[float]) -> float:
    """Distance between the 10th and the 90th percentile of block medians over their median, dimensionless."""
    low, high = np.percentile(np.asarray(block_medians, np.float64), [10, 90])
    return float((high - low) / median(block_medians))


def ratio_interval(arm_ns: Sequence[float], baseline_ns: Sequence[float]) -> Interval:
    """Paired interval from the block medians of the same rounds, in the same order; deterministic.

    MeasurementError: fewer than ``MIN_ROUNDS`` rounds, unequal lengths, or times that are not positive.
    """
    rounds = len(arm_ns)
    if rounds != len(baseline_ns):
        raise MeasurementError("paired ratio", expected=f"{rounds} baseline rounds", got=str(len(baseline_ns)))
    if rounds < MIN_ROUNDS:
        raise MeasurementError("paired ratio", expected=f"at least {MIN_ROUNDS} rounds", got=str(rounds))
    arm, baseline = np.asarray(arm_ns, np.float64), np.asarray(baseline_ns, np.float64)
    if not (np.isfinite(arm).all() and np.isfinite(baseline).all() and arm.min() > 0 and baseline.min() > 0):
        raise MeasurementError("paired ratio", expected="positive, finite times", got="another value")
    logs = np.log(arm / baseline)
    # np.median is several times slower here
    resampled = np.sort(logs[_indices(rounds)], axis=1)
    half = rounds // 2
    medians = resampled[:, half] if rounds % 2 else (resampled[:, half - 1] + resampled[:, half]) / 2
    tail = tail_probability(rounds)
    low, high = np.quantile(medians, [tail, 1.0 - tail])
    return Interval(math.exp(median(logs.tolist())), math.exp(float(low)), math.exp(float(high)), rounds)


def unpaired_interval(arm_ns: Sequence[float], baseline_ns: Sequence[float]) -> Interval:
    """From block medians of two sessions, which are not paired: a bootstrap over each of them; deterministic.

    The tails are those for the smaller sample, whose degrees of freedom are a lower bound of Welch's. MeasurementError:
    fewer than ``MIN_ROUNDS`` blocks in one of them, or times that are not positive.
    """
    fewest = min(len(arm_ns), len(baseline_ns))
    if fewest < MIN_ROUNDS:
        raise MeasurementError("unpaired ratio", expected=f"at least {MIN_ROUNDS} blocks each", got=str(fewest))
    if not all(math.isfinite(value) and value > 0 for value in (*arm_ns, *baseline_ns)):
        raise MeasurementError("unpaired ratio", expected="positive, finite times", got="another value")
    random = np.random.default_rng(SEED)
    samples = [np.log(np.asarray(values, np.float64)) for values in (arm_ns, baseline_ns)]
    resampled = [np.median(logs[random.integers(0, len(logs), (RESAMPLES, len(logs)))], axis=1) for logs in samples]
    tail = tail_probability(fewest)
    low, high = np.quantile(resampled[0] - resampled[1], [tail, 1.0 - tail])
    ratio = float(np.median(samples[0]) - np.median(samples[1]))
    return Interval(math.exp(ratio), math.exp(float(low)), math.exp(float(high)), fewest)


def tail_probability(rounds: int) -> float:
    """Share of resamples to leave out at each end: Φ(-√(n/(n-1))·t), t Student's 97.5 % quantile for n-1 degrees."""
    t = _student(rounds - 1)
    return 0.5 * math.erfc(math.sqrt(rounds / (rounds - 1)) * t / math.sqrt(2.0))


def _student(degrees: int) -> float:
    """97.5 % quantile by the Cornish-Fisher series (Abramowitz & Stegun 26.7.5); within 0.003 from five degrees on."""
    z, v = _Z, float(degrees)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


@lru_cache(maxsize=8)
def _indices(rounds: int) -> NDArray[np.intp]:
    indices = np.random.default_rng(SEED).integers(0, rounds, size=(RESAMPLES, rounds))
    indices.setflags(write=False)
    return indices
