"""The protocol as it runs: memory runs, then balanced rounds of timed processes, within a budget of time.

Memory runs come first: they are processes of their own, they put the files into the page cache, and they tell how
long a process and an inference take, from which the time of each block is planned. The clock and the processes are
parameters: the protocol is tested, and its intervals are simulated, without either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from . import schedule, stats
from .layer_times import OperatorsRun
from .profile import NULL, Block
from .roofline import Peaks
from .worker import MEMORY, MEMORY_RUNS, EnergyRun, FootprintRun, MemoryRun, Request, TimedRun

MEMORY_REPEATS = 3
_OVERRUN = 1.1
"""A session ends early, at a whole round, once it has taken so many times its budget."""

Progress = Callable[[str, int, int], None]
"""Called before each process and at the end: what is measured, processes done, processes in all."""


class Executor(Protocol):
    """Runs a request in a fresh process; MeasurementError names it by ``where`` (arm and block) if it fails."""

    def time(self, request: Request, where: str) -> TimedRun: ...

    def memory(self, request: Request, where: str) -> MemoryRun: ...

    def footprint(self, request: Request, where: str) -> FootprintRun: ...

    def energy(self, request: Request, where: str) -> EnergyRun: ...

    def operators(self, request: Request, where: str) -> OperatorsRun: ...

    def peaks(self, request: Request, where: str) -> Peaks: ...


@dataclass(frozen=True, slots=True)
class Session:
    """What ran, by arm (the null arm by the name ``null``): timed blocks and memory runs; ``order`` as it came out."""

    blocks: dict[str, list[Block]]
    memory: dict[str, list[MemoryRun]]
    order: tuple[tuple[str, ...], ...]
    plan: schedule.Plan
    versions: frozenset[str]
    elapsed_seconds: float
    warnings: tuple[str, ...]


def run_session(
    requests: Mapping[str, Request],
    executor: Executor,
    rounds: int,
    budget_seconds: float,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> Session:
    """Run every arm of ``requests``; the one called ``null`` has a copy of another arm's request."""
    begin = clock()
    names = list(requests)
    real = [name for name in names if name != NULL]
    memory, overhead_seconds = _memory_runs(requests, real, executor, rounds * len(names), progress, clock)
    # the null arm runs another arm's file, whose name its request has
    inference_seconds = {
        name: min(run.inference_ns for run in memory[name if name in memory else requests[name].arm]) * 1e-9
        for name in names
    }
    plan = schedule.plan(list(inference_seconds.values()), rounds, budget_seconds - (clock() - begin), overhead_seconds)
    warnings = []
    if plan.rounds < rounds:
        warnings.append(
            f"{plan.rounds} rounds instead of {rounds}: {budget_seconds:.0f} s are short; allow more --seconds"
        )
    order = schedule.order(names, plan.rounds)
    blocks: dict[str, list[Block]] = {name: [] for name in names}
    versions = {run.runtime_version for runs in memory.values() for run in runs}
    done = MEMORY_REPEATS * len(real)
    total = done + plan.rounds * len(names)
    for i, row in enumerate(order):
        if i >= stats.MIN_ROUNDS and clock() - begin > _OVERRUN * budget_seconds:
            warnings.append(
                f"stopped after {i} of {plan.rounds} rounds, the time was up: the order is not balanced; "
                "allow more --seconds"
            )
            order = order[:i]
            break
        for position, name in enumerate(row):
            progress("latency", done, total)
            request = replace(
                requests[name],
                run_seconds=plan.run_seconds,
                warmup_seconds=plan.warmup_seconds,
                inference_seconds=inference_seconds[name],
            )
            run = executor.time(request, f"arm {name}, block {i + 1}")
            blocks[name].append(_block(run, i, position))
            versions.add(run.runtime_version)
            done += 1
    progress("latency", total, total)
    return Session(blocks, memory, order, plan, frozenset(versions), clock() - begin, tuple(warnings))


def _memory_runs(
    requests: Mapping[str, Request],
    names: list[str],
    executor: Executor,
    rest: int,
    progress: Progress,
    clock: Callable[[], float],
) -> tuple[dict[str, list[MemoryRun]], float]:
    """Memory runs of each arm, and the seconds a process takes besides its inferences (the median over all of them)."""
    runs: dict[str, list[MemoryRun]] = {name: [] for name in names}
    overheads: list[float] = []
    for repeat in range(MEMORY_REPEATS):
        for name in names:
            progress("memory", len(overheads), MEMORY_REPEATS * len(names) + rest)
            begin = clock()
            run = executor.memory(replace(requests[name], mode=MEMORY), f"arm {name}, memory run {repeat + 1}")
            overheads.append(max(0.0, clock() - begin - MEMORY_RUNS * run.inference_ns * 1e-9))
            runs[name].append(run)
    return runs, stats.median(overheads)


def _block(run: TimedRun, index: int, position: int) -> Block:
    return Block(
        round=index,
        position=position,
        import_ns=run.import_ns,
        load_ns=run.load_ns,
        first_ns=run.first_ns,
        settled=run.settled,
        warmups_ns=run.warmups_ns,
        samples_ns=run.samples_ns,
    )
