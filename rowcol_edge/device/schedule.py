"""Who runs when, and for how long: pure functions, no clock and no processes.

Rounds follow a Williams design (Williams, "Experimental designs balanced for the estimation of residual effects of
treatments", 1949): over one cycle every arm stands at every position equally often and follows every other arm
equally often, so that neither drift inside a round nor what the previous process left behind (heat, clock, caches)
favours an arm. Where there is no time for a cycle, as with many arms, every six rounds are three rows and the same
three backwards, so that the places of an arm have the same mean as those of every other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import MeasurementError
from .stats import MIN_ROUNDS, SEED

DEFAULT_ROUNDS = 12
"""Twelve is a whole number of cycles for two, three, four and six arms."""
DEFAULT_SECONDS = 75.0
MAX_SAMPLES = 500
"""A block. Its median is long settled by then, and twelve blocks have enough for a p99."""
MIN_SAMPLES = 5
RUN_SECONDS = (0.25, 2.0)
"""Shortest and longest time for warm-up and samples of one process."""
_WARMUP_SHARE = 0.3
_MIN_INFERENCES = 2 * MIN_SAMPLES
"""What the shortest time has to have room for: the samples, and as many warm-up runs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``rounds`` of one process an arm, each with ``run_seconds`` for warm-up and samples."""

    rounds: int
    run_seconds: float
    expected_seconds: float

    @property
    def warmup_seconds(self) -> float:
        return self.run_seconds * _WARMUP_SHARE


def time_budget(seconds: float | None) -> float:
    """The seconds for everything, DEFAULT_SECONDS for None. MeasurementError: a time that is not above 0 and finite."""
    if seconds is None:
        return DEFAULT_SECONDS
    if not 0 < seconds < math.inf:
        raise MeasurementError("seconds", expected="a time > 0 that ends", got=str(seconds))
    return seconds


def cycle(arms: int) -> int:
    """Rounds until the order is balanced: as many as arms, twice that for an odd number of them."""
    return arms if arms % 2 == 0 or arms == 1 else 2 * arms


def balanced_rounds(arms: int, wanted: int) -> int:
    """The whole number of cycles nearest to ``wanted`` rounds, never fewer than an interval needs.

    MeasurementError: ``wanted`` is below ``MIN_ROUNDS``.
    """
    if wanted < MIN_ROUNDS:
        hint = "below that no 95 % interval can be given"
        raise MeasurementError("blocks", expected=f"at least {MIN_ROUNDS}", got=str(wanted), hint=hint)
    one = cycle(arms)
    fewest = -(-MIN_ROUNDS // one)
    return one * max(fewest, int(wanted / one + 0.5))


def order(arms: Sequence[str], rounds: int) -> tuple[tuple[str, ...], ...]:
    """The arms of each round in the order they run; the rows of each cycle are shuffled, always the same way."""
    rows = _williams(len(arms))
    halves = [row for row in rows if row <= row[::-1]]  # of each row and its reverse, which is a row too
    random = np.random.default_rng(SEED)
    indices: list[list[int]] = []
    while len(indices) < rounds:
        shuffled = random.permutation(len(halves))
        for start in range(0, len(halves), MIN_ROUNDS // 2):
            few = [halves[i] for i in shuffled[start : start + MIN_ROUNDS // 2]]
            turned = [row[::-1] if random.integers(2) else row for row in few]
            indices += turned if len(arms) == 1 else [*turned, *(row[::-1] for row in turned)]
    return tuple(tuple(arms[i] for i in row) for row in indices[:rounds])


def plan(inference_seconds: Sequence[float], rounds: int, seconds: float, overhead_seconds: float) -> Plan:
    """Share ``seconds`` among the processes of ``rounds`` rounds.

    ``inference_seconds`` holds one estimate an arm (the null arm is one), ``overhead_seconds`` what a process costs
    besides (interpreter, imports, load). Where time is short, whole cycles are dropped before blocks get shorter than
    the shortest useful one; what then still does not fit is longer than asked for (``expected_seconds`` says so).
    """
    arms = len(inference_seconds)
    needed = [max(RUN_SECONDS[0], _MIN_INFERENCES * value) for value in inference_seconds]
    shortest = sum(needed) / arms
    one = cycle(arms)
    while rounds - one >= MIN_ROUNDS and seconds / (rounds * arms) - overhead_seconds < shortest:
        rounds -= one
    run_seconds = seconds / (rounds * arms) - overhead_seconds
    run_seconds = max(RUN_SECONDS[0], min(RUN_SECONDS[1], run_seconds))
    each = sum(max(run_seconds, value) for value in needed)
    return Plan(rounds, run_seconds, rounds * (each + arms * overhead_seconds))


def _williams(arms: int) -> list[list[int]]:
    if arms == 1:
        return [[0]]
    first = [0]
    low, high = 1, arms - 1
    while len(first) < arms:
        first.append(low)
        low += 1
        if len(first) < arms:
            first.append(high)
            high -= 1
    rows = [[(value + shift) % arms for value in first] for shift in range(arms)]
    return rows if arms % 2 == 0 else rows + [row[::-1] for row in rows]
