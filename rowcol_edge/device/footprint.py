"""Memory of one process apart from latency, and what the runtime's own settings save and cost.

Each arm runs as it is, and once more for each setting of its runtime that trades memory for time, all in processes of
their own and in a balanced order, with a null arm, as the arms of the latency rounds do. So the ratio of their
latencies has an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import schedule, stats
from .memory import Usage
from .profile import NULL, TWICE, Block, Comparison, Footprint, FootprintReading
from .runtimes.memory import VARIANTS
from .session import Executor, Progress
from .verdicts import judge
from .worker import FOOTPRINT, FootprintRun, Request

DEFAULT = "default"
"""The arm as the target has it."""
ROUNDS = stats.MIN_ROUNDS
RUN_SECONDS, WARMUP_SECONDS = 0.5, 0.15

Runs = dict[str, list[FootprintRun]]
"""By variant, the default first."""


def footprint_runs(requests: Mapping[str, Request], executor: Executor, progress: Progress) -> dict[str, Runs]:
    """Runs by arm; the null arm is left out. MeasurementError: a process failed."""
    asked = [
        (arm, variant, replace(request, mode=FOOTPRINT, run_seconds=RUN_SECONDS, warmup_seconds=WARMUP_SECONDS,
                               properties={**request.properties, **properties}))
        for arm, request in requests.items()
        if arm != NULL
        for variant, properties in variants(request.runtime).items()
    ]  # fmt: skip
    runs: dict[str, Runs] = {}
    for arm, variant, _ in asked:
        runs.setdefault(arm, {})[variant] = []
    done, total = 0, ROUNDS * len(asked)
    for i, row in enumerate(schedule.order([str(place) for place in range(len(asked))], ROUNDS)):
        for place in row:
            arm, variant, request = asked[int(place)]
            progress("footprint", done, total)
            found = executor.footprint(request, f"arm {arm}, {variant}, footprint run {i + 1}")
            runs[arm][variant].append(found)
            done += 1
    progress("footprint", total, total)
    return runs


def variants(runtime: str) -> dict[str, dict[str, str]]:
    """The properties that each variant adds to those of the target, by name; where there are any, a null arm too."""
    own = VARIANTS.get(runtime, {})
    return {DEFAULT: {}, **own, TWICE: {}} if own else {DEFAULT: {}}


def footprints(runtime: str, runs: Runs, evidence: str) -> tuple[Footprint, ...]:
    """One a variant: medians over its runs, and its latency against the default's of the same rounds."""
    latencies: dict[str, Comparison] = {}
    if TWICE in runs:
        names = {name: NULL if name == TWICE else name for name in runs}
        blocks = {names[name]: [_block(i, run) for i, run in enumerate(found)] for name, found in runs.items()}
        pairs = [(name, DEFAULT) for name in runs if name not in (DEFAULT, TWICE)]
        judged = judge(blocks, pairs, DEFAULT, evidence)
        latencies = {TWICE: judged.null, **{found.arm: found for found in judged.comparisons}}
    return tuple(
        Footprint(
            variant=name,
            properties=variants(runtime)[name],
            imported=_middle([run.imported for run in of_variant]),
            loaded=_middle([run.loaded for run in of_variant]),
            first=_middle([run.first for run in of_variant]),
            steady=_middle([run.steady for run in of_variant]),
            load_peak_bytes=_median([run.load_peak_bytes for run in of_variant]),
            run_peak_bytes=_median([run.run_peak_bytes for run in of_variant]),
            latency=latencies.get(name),
            runs=tuple(map(_reading, of_variant)),
        )
        for name, of_variant in runs.items()
    )


def _block(index: int, run: FootprintRun) -> Block:
    """As a block of the latency rounds, of which only the round and the samples count here."""
    return Block(index, 0, 0, 0, 0, True, (), run.samples_ns)


def _reading(run: FootprintRun) -> FootprintReading:
    peaks = run.load_peak_bytes, run.run_peak_bytes
    stages = run.imported, run.loaded, run.first, run.steady
    return FootprintReading(*stages, *peaks, run.inferences, stats.median(run.samples_ns), run.curve)


def _middle(usages: Sequence[Usage]) -> Usage:
    return Usage(
        _median([usage.resident_bytes for usage in usages]),
        _median([usage.proportional_bytes for usage in usages]),
        _median([usage.private_bytes for usage in usages]),
    )


def _median(values: Sequence[int | None]) -> int | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return int(stats.median(known)) if known and len(known) == len(values) else None
