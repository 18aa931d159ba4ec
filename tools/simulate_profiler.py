"""How often the profiler is right: its schedule, intervals and verdicts over a fake runtime whose latency is known.

    python tools/simulate_profiler.py --repetitions 2000 --out tools/results/profiler-simulation.json

Each scenario is a machine that misbehaves in one way (or in all). Per repetition a whole session runs: memory runs,
balanced rounds of "processes" with a null arm, intervals, verdicts; only processes and clock are fake. Counted are the
share of intervals that hold the true ratio, the null arm's false alarms, and how often effects of 2, 5 and 10 % are
found.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rowcol_edge.device.profile import NULL
from rowcol_edge.device.schedule import DEFAULT_ROUNDS
from rowcol_edge.device.session import run_session
from rowcol_edge.device.stats import CONFIDENCE, FASTER, NO_DIFFERENCE, RESAMPLES, median
from rowcol_edge.device.system import TARGET
from rowcol_edge.device.verdicts import judge
from rowcol_edge.device.worker import TIME, MemoryRun, Request, TimedRun

DENSE, FACTORED, SECOND = "dense@int8", "factored@int8", "second@int8"
BASE_NS = 5_000_000
EFFECTS = (0.98, 0.95, 0.90)
"""Ratios whose detection is counted: 2, 5 and 10 % faster."""
SAMPLES = 40
"""A block; fewer than a real one has, so that the noise of a block's median is not flattered."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A machine. Shares and standard deviations are relative to the latency."""

    name: str
    what: str
    process_sd: float = 0.005
    sample_sd: float = 0.03
    skew: float = 0.0
    """Mean of an exponential delay that each process has."""
    drift: float = 0.0
    """Slow-down from the first to the last process."""
    wander: float = 0.0
    """Standard deviation of a state that changes slowly from process to process (autocorrelation 0.9)."""
    spikes: float = 0.0
    """Share of samples that take three to ten times as long."""
    bursts: float = 0.0
    """Share of processes that run 40 % slower, beside other work."""
    slow_mode: float = 0.0
    """Share of processes that land in a mode 20 % slower …"""
    slow_mode_only: str = ""
    """… or those of this arm only."""
    slow_first: float = 0.0
    """Slow-down of the whole first round, halved from process to process."""


SCENARIOS = (
    Scenario("constant", "noise only"),
    Scenario("skewed", "skewed noise of processes and samples", sample_sd=0.15, skew=0.02),
    Scenario("drift", "30 % slower by the end (heat)", drift=0.3),
    Scenario("wander", "a slowly changing machine, 3 %, autocorrelation 0.9", wander=0.03),
    Scenario("outliers", "3 % of samples 3-10 times as long, 8 % of processes 40 % slower", spikes=0.03, bursts=0.08),
    Scenario("bimodal", "30 % of all processes 20 % slower", slow_mode=0.3),
    Scenario("bimodal-even", "half of all processes 20 % slower", slow_mode=0.5),
    Scenario("bimodal-one-arm", "30 % of one arm's processes 20 % slower", slow_mode=0.3, slow_mode_only=FACTORED),
    Scenario("slow-first", "the first round up to twice as slow", slow_first=1.0),
    Scenario(
        "everything", "all of these together", 0.005, 0.1, 0.01, 0.2, 0.02, 0.03, 0.05, 0.2, "", 1.0,
    ),
)  # fmt: skip


class FakeRuntime:
    """An executor without processes: latencies drawn for each "process" in the order the session starts them."""

    def __init__(
        self, scenario: Scenario, ratios: Mapping[str, float], processes: int, random: np.random.Generator
    ) -> None:
        self._scenario = scenario
        self._ratios = ratios
        self._processes = processes
        self._random = random
        self._started = 0
        self._state = random.normal(0.0, scenario.wander) if scenario.wander else 0.0

    def memory(self, request: Request, where: str) -> MemoryRun:
        return MemoryRun("1.0", 1, 2, 3, True, BASE_NS)

    def time(self, request: Request, where: str) -> TimedRun:
        s, random = self._scenario, self._random
        level = BASE_NS * self._ratios[request.arm] * self.slowness(request.arm)
        samples = level * np.exp(random.normal(0.0, s.sample_sd, SAMPLES))
        if s.spikes:
            hit = random.random(SAMPLES) < s.spikes
            samples[hit] *= random.uniform(3.0, 10.0, int(hit.sum()))
        return TimedRun("1.0", 1, 1, 1, (), True, tuple(samples.astype(np.int64).tolist()))

    def slowness(self, arm: str) -> float:
        """What the machine makes of one process, and one step of its slow changes."""
        s, random, index = self._scenario, self._random, self._started
        self._started += 1
        value = 1.0 + random.normal(0.0, s.process_sd)
        value *= 1.0 + s.drift * index / max(1, self._processes - 1)
        if s.skew:
            value += random.exponential(s.skew)
        if s.wander:
            self._state = 0.9 * self._state + random.normal(0.0, s.wander * (1 - 0.9**2) ** 0.5)
            value *= 1.0 + self._state
        if s.bursts and random.random() < s.bursts:
            value *= 1.4
        if s.slow_mode and s.slow_mode_only in ("", arm) and random.random() < s.slow_mode:
            value *= 1.2
        if s.slow_first and index < self._processes // DEFAULT_ROUNDS:
            value *= 1.0 + s.slow_first * 0.5**index
        return float(value)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares over the repetitions of one scenario; ``power`` by effect. ``half_width``: median over the repetitions."""

    scenario: str
    what: str
    repetitions: int
    true_ratio: float
    coverage: float
    null_false_alarms: float
    half_width: float
    power: dict[str, float]


def requests(names: tuple[str, ...]) -> dict[str, Request]:
    """One request an arm, and the null arm with that of the baseline."""
    made = {name: Request(TIME, name, "fake", "", "", {}, 1) for name in names}
    return {**made, NULL: made[DENSE]}


def simulate(scenario: Scenario, repetitions: int, rounds: int = DEFAULT_ROUNDS, seed: int = 1) -> Outcome:
    """Whole sessions of arms at known ratios, and the null arm."""
    random = np.random.default_rng([seed, sum(scenario.name.encode())])
    truth = EFFECTS[-1] * typical_ratio(scenario, random)
    covered = alarms = 0
    tried, found = dict.fromkeys(EFFECTS, 0), dict.fromkeys(EFFECTS, 0)
    widths = []
    for i in range(repetitions):
        # three arms and the null arm, as in a default profile; the smaller effects take turns
        ratios = {DENSE: 1.0, FACTORED: EFFECTS[-1], SECOND: EFFECTS[i % (len(EFFECTS) - 1)]}
        asked = requests(tuple(ratios))
        runtime = FakeRuntime(scenario, ratios, rounds * len(asked), random)
        session = run_session(asked, runtime, rounds, 1e9, lambda what, done, total: None, clock=lambda: 0.0)
        judged = judge(session.blocks, [(FACTORED, DENSE), (SECOND, DENSE)], DENSE, TARGET)
        for comparison in judged.comparisons:
            tried[ratios[comparison.arm]] += 1
            found[ratios[comparison.arm]] += comparison.verdict == FASTER
        main, null = judged.comparisons[0], judged.null
        assert main.ci_low
        assert main.ci_high
        covered += main.ci_low <= truth <= main.ci_high
        alarms += null.verdict != NO_DIFFERENCE
        widths.append((main.ci_high - main.ci_low) / 2)
    return Outcome(
        scenario.name,
        scenario.what,
        repetitions,
        truth,
        covered / repetitions,
        alarms / repetitions,
        median(widths),
        {f"{1 - effect:.0%}": found[effect] / max(1, tried[effect]) for effect in EFFECTS},
    )


def typical_ratio(scenario: Scenario, random: np.random.Generator) -> float:
    """Median slowness of the factored arm over the dense one: 1 where both suffer alike, drawn where they do not."""
    if not scenario.slow_mode_only:
        return 1.0
    still = FakeRuntime(scenario, {}, 1, random)
    return median([still.slowness(FACTORED) / still.slowness(DENSE) for _ in range(100_000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begin = time.monotonic()
    outcomes = [report(simulate(s, options.repetitions, options.rounds, options.seed)) for s in SCENARIOS]
    given = f"--repetitions {options.repetitions} --rounds {options.rounds} --seed {options.seed}"
    if options.out:
        document = {
            "command": f"python tools/simulate_profiler.py {given} --out {options.out}",
            "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
            "seconds": round(time.monotonic() - begin, 1),
            "nominal_confidence": CONFIDENCE,
            "rounds": options.rounds,
            "resamples": RESAMPLES,
            "samples_per_block": SAMPLES,
            "scenarios": [asdict(outcome) for outcome in outcomes],
        }
        options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def report(outcome: Outcome) -> Outcome:
    power = "  ".join(f"{effect} {share:.3f}" for effect, share in outcome.power.items())
    print(
        f"{outcome.scenario:16s} coverage {outcome.coverage:.3f}  null false alarms "
        f"{outcome.null_false_alarms:.3f}  half width {outcome.half_width:.4f}  found: {power}",
        flush=True,
    )
    return outcome


if __name__ == "__main__":
    main()
