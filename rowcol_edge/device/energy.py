"""Energy of one inference: what a rail takes while inferences run one after the other, less what it takes at rest.

A measurement of its own, after that of latency: three processes an arm, the arms in turn. Each is at rest with the
artifact open for as long as it then works, so that the idle power is of the same board at nearly the same temperature.
What is subtracted is all that the board takes when nothing runs: the figure says what an inference adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import stats
from .profile import NULL, EnergyReading, RailEnergy
from .session import Executor, Progress
from .worker import ENERGY, EnergyRun, Request

REPEATS = 3
SECONDS = 5.0
"""At rest, and again at work: long for both sources. A RAPL counter steps every millisecond; an INA3221 that averages
as much as it can does so over about a second (kernel.org, hwmon/ina3221)."""


def energy_runs(
    requests: Mapping[str, Request], executor: Executor, progress: Progress, seconds: float = SECONDS
) -> dict[str, list[EnergyRun]]:
    """Runs by arm; the null arm is left out. MeasurementError: a process failed."""
    names = [name for name in requests if name != NULL]
    runs: dict[str, list[EnergyRun]] = {name: [] for name in names}
    total = REPEATS * len(names)
    for repeat in range(REPEATS):
        for i, name in enumerate(names):
            progress("energy", repeat * len(names) + i, total)
            request = replace(requests[name], mode=ENERGY, run_seconds=seconds)
            runs[name].append(executor.energy(request, f"arm {name}, energy run {repeat + 1}"))
    progress("energy", total, total)
    return runs


def by_rail(runs: Sequence[EnergyRun]) -> tuple[RailEnergy, ...]:
    """What every run could read, in the order of the first; empty where that is nothing."""
    found = []
    for rail in runs[0].rails if runs else ():
        readings = tuple(
            EnergyReading(run.inferences, run.seconds, same.idle_watts, same.watts, same.samples)
            for run in runs
            for same in run.rails
            if (same.rail, same.source) == (rail.rail, rail.source)
        )
        if len(readings) == len(runs):
            joules = [reading.joules for reading in readings]
            found.append(RailEnergy(rail.rail, rail.source, stats.median(joules), min(joules), max(joules), readings))
    return tuple(found)
