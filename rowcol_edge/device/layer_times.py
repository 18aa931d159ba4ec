"""Times of operators put together by the layers of the original model, and which layer won and which lost by factoring.

The unit of evidence is the process, as it is of latencies: each round runs every arm once, in processes of their own
with the runtime's profiler on. A layer has won where the slowest process of the factored arm was faster than the
fastest of the dense one, and lost the other way round; where the two ranges overlap, nothing is said. For six rounds of
arms that do not differ, ranges lie apart by chance in two of 924 layers.

A profiler takes time itself at each operator, and counts it as the operator's: where their sum is above what an
inference takes without it, the difference is subtracted, the same from each. That it is the same for each is assumed,
and so nothing is said where two medians differ by no more than their corrections do and the µs that runtimes count in,
one more for each operator that one arm has more. Nor is anything said of a layer whose products one of the two arms has
elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import stats
from .layers import MODEL, FileLayer, FileOperator, Finder, LayerMap
from .roofline import Peaks, bound
from .runtimes.base import OperatorRuns

WON, LOST, OPEN = "won", "lost", "no verdict"
LAYER_VERDICTS = (WON, LOST, OPEN)
_RESOLUTION_NS = 1_000


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator, as the runtime calls it: ns of an inference, the median over processes, less the profiler's own.
    ``origin`` is the operator of the file that it is known by; that and ``layer`` are empty where they could not be
    told."""

    name: str
    origin: str
    kind: str
    layer: str
    ns: float


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer of the original model, as an arm has it: ``ns`` of an inference is the median of ``rounds_ns``, which
    holds one of each process; ``overhead_ns``, the profiler's own at its ``operators``, is subtracted from each.
    Both are 0 in older profiles.

    ``macs`` and ``traffic_bytes`` as `layers.FileLayer`. ``least_ns`` is what the machine's peaks allow at best,
    ``bound`` which of them binds; None and empty where the bytes, or the peaks of an accelerator, are not known.
    """

    layer: str
    form: str
    rank: int | None
    macs: int
    traffic_bytes: int | None
    ns: float
    rounds_ns: tuple[float, ...]
    least_ns: float | None
    bound: str
    overhead_ns: float = 0.0
    operators: int = 0

    @property
    def reached(self) -> float | None:
        """The share of what the peaks allow; over 1 where data lie in a cache, or int8 multiplies faster. None where
        more was subtracted than is left: that time is known too roughly."""
        rough = self.ns <= max(0.0, self.overhead_ns)
        return None if self.least_ns is None or rough else self.least_ns / self.ns


@dataclass(frozen=True, slots=True)
class ArmOperators:
    """Where the time of an arm goes, with the runtime's profiler on. ``elsewhere_ns`` is of operators that no layer is
    known for, ``total_ns`` of all operators of an inference, ``inference_ns`` of the whole by the clock outside.

    Other work that interrupts single operators is in the last two, and hardly in the times of operators and layers.

    ``latency_ns`` is that of an inference without the profiler that nothing interrupts, ``uncorrected_ns`` the sum of
    operators in the fastest process, before ``overhead_ns``, the profiler's own, was subtracted from each; both None
    where nothing was, as in older profiles.
    """

    layers: tuple[LayerTime, ...]
    operators: tuple[OperatorTime, ...]
    elsewhere_ns: float
    total_ns: float
    inference_ns: float
    latency_ns: float | None = None
    uncorrected_ns: float | None = None
    overhead_ns: float = 0.0

    @property
    def attributed(self) -> float:
        """The share of the operators' time that is the layers', without what the model's own code does between."""
        known = sum(layer.ns for layer in self.layers)
        own = sum(layer.ns for layer in self.layers if layer.layer == MODEL)
        return (known - own) / (known + self.elsewhere_ns) if known > own else 0.0


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """Time of a layer in ``arm`` over that in ``baseline``, paired by round. ``verdict`` is one of LAYER_VERDICTS;
    ratio and its 95 % interval are None where a process saw no time of the layer."""

    layer: str
    arm: str
    baseline: str
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Operators:
    """What ``--ops`` found. ``null_verdicts`` of ``null_layers`` layers came out won or lost between two sets of
    processes of one and the same file: how far to believe the others."""

    peaks: Peaks
    arms: dict[str, ArmOperators]
    comparisons: tuple[LayerComparison, ...]
    null_layers: int
    null_verdicts: int


@dataclass(frozen=True, slots=True)
class OperatorsRun:
    """One process with the runtime's profiler on: of the inferences after the warm-up, ``samples_ns`` by the clock
    outside, and those of each operator."""

    runtime_version: str
    samples_ns: tuple[int, ...]
    operators: tuple[OperatorRuns, ...]


def of_arm(
    runs: Sequence[OperatorsRun], known: LayerMap | None, peaks: Peaks | None, latency_ns: float
) -> ArmOperators:
    """The processes of one arm; without a map, all of its time is elsewhere. ``peaks`` of what it ran on, if known;
    ``latency_ns`` of an inference that nothing interrupts, without the profiler."""
    find = Finder(known or LayerMap((), ()))
    layers = known.layers if known else ()
    known_as: dict[str, FileOperator | None] = {}
    for operator in (operator for run in runs for operator in run.operators):
        if operator.name not in known_as:
            known_as[operator.name] = find(operator.origins)
    homes = {name: -1 if found is None else found.layer for name, found in known_as.items()}
    by_layer = [_sums(run, homes) for run in runs]
    names = list(dict.fromkeys((operator.name, operator.kind) for run in runs for operator in run.operators))
    each = [_each(run) for run in runs]
    counts = Counter(homes[operator.name] for operator in runs[0].operators)
    uncorrected_ns = min(sum(sums.values()) for sums in by_layer)  # slow processes are not the profiler's doing
    overhead_ns = max(0.0, uncorrected_ns - latency_ns) / max(1, counts.total())
    of_one_name = Counter(operator.name for operator in runs[0].operators)
    operators = tuple(
        OperatorTime(
            name=name,
            origin=found.name if (found := known_as[name]) else "",
            kind=kind,
            layer=layers[homes[name]].name if homes[name] >= 0 else "",
            ns=max(0.0, stats.median([times.get(name, 0.0) for times in each]) - of_one_name[name] * overhead_ns),
        )
        for name, kind in names
    )
    return ArmOperators(
        layers=tuple(
            _layer(layer, [sums.get(place, 0.0) for sums in by_layer], counts[place], overhead_ns, peaks)
            for place, layer in enumerate(layers)
            if any(place in sums for sums in by_layer)
        ),
        operators=operators,
        elsewhere_ns=max(0.0, stats.median([sums.get(-1, 0.0) for sums in by_layer]) - counts[-1] * overhead_ns),
        total_ns=stats.median([_middle(np.sum([each.runs_ns for each in run.operators], 0)) for run in runs]),
        inference_ns=stats.median([_middle(run.samples_ns) for run in runs]),
        latency_ns=latency_ns,
        uncorrected_ns=uncorrected_ns,
        overhead_ns=overhead_ns,
    )


def compared(arms: Mapping[str, ArmOperators], pairs: Iterable[tuple[str, str]]) -> tuple[LayerComparison, ...]:
    """Layer by layer, those that both arms of a pair have, in the order of the arm."""
    found = []
    for arm, baseline in pairs:
        others = {layer.layer: layer for layer in arms[baseline].layers}
        found += [
            compare(layer, others[layer.layer], arm, baseline) for layer in arms[arm].layers if layer.layer in others
        ]
    return tuple(found)


def compare(layer: LayerTime, other: LayerTime, arm: str, baseline: str) -> LayerComparison:
    """One layer in two arms; no verdict where only one of them multiplies there."""
    mine, its = layer.rounds_ns, other.rounds_ns
    if min(*mine, *its) <= 0:
        return LayerComparison(layer.layer, arm, baseline, None, None, None, OPEN)
    interval = stats.ratio_interval(mine, its)
    counted_ns = _RESOLUTION_NS * (1 + abs(layer.operators - other.operators))
    least_ns = counted_ns + abs(layer.overhead_ns - other.overhead_ns)
    told = abs(layer.ns - other.ns) > least_ns and (layer.macs > 0) == (other.macs > 0)
    verdict = WON if told and max(mine) < min(its) else LOST if told and min(mine) > max(its) else OPEN
    return LayerComparison(layer.layer, arm, baseline, interval.ratio, interval.low, interval.high, verdict)


def _layer(
    layer: FileLayer, uncorrected_ns: Sequence[float], operators: int, overhead_ns: float, peaks: Peaks | None
) -> LayerTime:
    found = bound(layer.macs, layer.traffic_bytes, peaks) if peaks else None
    rounds_ns = tuple(max(0.0, ns - operators * overhead_ns) for ns in uncorrected_ns)
    return LayerTime(
        layer.name, layer.form, layer.rank, layer.macs, layer.traffic_bytes, stats.median(rounds_ns), rounds_ns,
        found.least_ns if found else None, found.kind if found else "", operators * overhead_ns, operators,
    )  # fmt: skip


def _sums(run: OperatorsRun, homes: Mapping[str, int]) -> dict[int, float]:
    """By place of the layer, -1 for elsewhere: ns of an inference."""
    whole: dict[int, np.ndarray] = {}
    for operator in run.operators:
        times = np.asarray(operator.runs_ns, np.float64)
        place = homes[operator.name]
        whole[place] = whole[place] + times if place in whole else times
    return {place: _middle(times) for place, times in whole.items()}


def _each(run: OperatorsRun) -> dict[str, float]:
    """By name of the operator; those of one name add up."""
    found: dict[str, float] = {}
    for operator in run.operators:
        found[operator.name] = found.get(operator.name, 0.0) + _middle(operator.runs_ns)
    return found


def _middle(times: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half: as robust as a median, and finer than the whole µs that runtimes count in."""
    ordered = np.sort(np.asarray(times, np.float64))
    quarter = len(ordered) // 4
    return float(ordered[quarter : len(ordered) - quarter].mean()) if len(ordered) else 0.0
