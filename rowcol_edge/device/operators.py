"""The time of single operators: each arm with its runtime's own profiler on, in processes of their own.

A profiler slows what it looks at, so none of these processes gives a latency; how much it does is told by the
inferences that were timed without it. They run in the same balanced order as the latency rounds, with the null arm;
before and after them one measures what the machine can do at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from . import layers, roofline, schedule, stats
from .bundle import Bundle
from .layer_times import OPEN, LayerComparison, Operators, OperatorsRun, compared, of_arm
from .profile import NULL, Block
from .session import Executor, Progress
from .worker import OPERATORS, PEAKS, Request

ROUNDS = stats.MIN_ROUNDS
RUN_SECONDS, WARMUP_SECONDS = 1.0, 0.2
_FASTEST = 10
"""Percent of inferences that are faster than one that nothing interrupts: the fastest of all may have been lucky."""


def operators(
    bundle: Bundle,
    requests: Mapping[str, Request],
    pairs: Sequence[tuple[str, str]],
    null_of: str,
    blocks: Mapping[str, Sequence[Block]],
    executor: Executor,
    progress: Progress,
) -> Operators:
    """Measure the arms of ``requests`` and set the pairs side by side; ``blocks`` are their processes without a
    profiler. MeasurementError: a process failed."""
    names = list(requests)
    maps = {name: layers.load(bundle, request.arm) for name, request in requests.items()}
    total = 2 + ROUNDS * len(names)
    progress("operators", 0, total)
    asked = replace(next(iter(requests.values())), mode=PEAKS)
    before = executor.peaks(asked, "the machine's peaks")
    runs: dict[str, list[OperatorsRun]] = {name: [] for name in names}
    done = 1
    for i, row in enumerate(schedule.order(names, ROUNDS)):
        for name in row:
            progress("operators", done, total)
            request = replace(requests[name], mode=OPERATORS, run_seconds=RUN_SECONDS, warmup_seconds=WARMUP_SECONDS)
            runs[name].append(executor.operators(request, f"arm {name}, operators run {i + 1}"))
            done += 1
    peaks = roofline.higher(before, executor.peaks(asked, "the machine's peaks"))
    progress("operators", total, total)
    limits = peaks if _on_processor(asked.providers) else None
    arms = {name: of_arm(of_name, maps[name], limits, _undisturbed_ns(blocks[name])) for name, of_name in runs.items()}
    null = compared(arms, [(NULL, null_of)]) if NULL in arms else ()
    real = {name: arm for name, arm in arms.items() if name != NULL}
    return Operators(peaks, real, compared(arms, pairs), len(null), sum(map(_decided, null)))


def _undisturbed_ns(blocks: Sequence[Block]) -> float:
    """Of an inference that nothing interrupts: as the times of operators are, whose sum it is held against. The median
    of a busy machine is above it, and would hide what the profiler takes."""
    return float(np.percentile(np.concatenate([block.samples_ns for block in blocks]), _FASTEST))


def _on_processor(providers: Sequence[str]) -> bool:
    """Do the peaks, which are the processor's, hold for what a runtime runs on?"""
    return all(name.startswith("CPU") for name in providers)


def _decided(found: LayerComparison) -> bool:
    return found.verdict != OPEN
