"""Geometry of a report's charts: numbers in, coordinates out. What is drawn of them is the template's.

An arm is told by its number in a marker, colour and dashes only help; the table beside a chart has the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .figures import ArmFigures, ProfileFigures

WIDTH, HEIGHT = 380, 256
LEFT, RIGHT, TOP, BOTTOM = 52, 368, 28, 206
_LOG_FROM = 4.0
_TICKS = 5
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Series:
    """``number`` is the arm's, from 1; ``line`` is a polyline's points, empty for a mark alone; ``dots`` lie on it."""

    number: int
    name: str
    mark: Mark
    line: str = ""
    dots: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """``front`` is a polyline through the marks that none beats in both directions."""

    kind: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    front: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from ``low`` to ``high`` onto pixels from ``start`` to ``end``; logarithmic over wide ranges above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def fit(cls, values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Axis:
        low, high = min(values), max(values)
        if zero:
            low, high = min(0.0, low), max(0.0, high) * 1.05
        log = not zero and low > 0 and high / low >= _LOG_FROM
        if log:
            return cls(low / 1.1, high * 1.1, start, end, log)
        pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
        return cls(low - (0 if zero and low == 0 else pad), high + (0 if zero else pad), start, end)

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low or 1.0)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> tuple[Tick, ...]:
        return tuple(Tick(self.at(value), f"{value:g}") for value in self._values() if self.low <= value <= self.high)

    def _values(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            return [step * 10.0**power for power in range(first, last + 1) for step in steps]
        raw = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
        first = math.ceil(self.low / step)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step) + 1)]


def charts(profile: ProfileFigures) -> tuple[Chart, ...]:
    """Those for which the profile has numbers."""
    drawn = latency(profile), memory(profile), memory_over_time(profile), size(profile), drop(profile)
    return tuple(chart for chart in drawn if chart)


def latency(profile: ProfileFigures) -> Chart | None:
    """The share of inferences that took at most so long."""
    arms = [(number, arm) for number, arm in enumerate(profile.arms, 1) if arm.curve]
    if not arms:
        return None
    x = Axis.fit([ns * 1e-6 for _, arm in arms for _, ns in arm.curve], LEFT, RIGHT)
    y = Axis(0, 100, BOTTOM, TOP)
    series = []
    for number, arm in arms:
        points = [(x.at(ns * 1e-6), y.at(share)) for share, ns in arm.curve]
        # markers at different heights, so that arms of equal speed do not hide each other
        share = 25 + 10 * (number % 6)
        nearest = min(range(len(points)), key=lambda i, at=share: abs(arm.curve[i][0] - at))  # type: ignore[misc]
        series.append(Series(number, arm.arm, Mark(*points[nearest]), _polyline(points)))
    y_ticks = tuple(Tick(y.at(share), f"{share} %") for share in (0, 25, 50, 75, 100))
    fastest = min((arm for _, arm in arms), key=lambda arm: arm.median_ns or math.inf)
    said = f"Share of inferences that took at most so long, for {len(arms)} arms; {fastest.arm} has the least median."
    return Chart(
        "latency",
        "Latency distribution",
        said,
        f"latency, ms{_scale(x)}",
        "inferences done",
        x.ticks(),
        y_ticks,
        tuple(series),
    )


def memory(profile: ProfileFigures) -> Chart | None:
    """RSS at each stage."""
    arms = [(number, arm) for number, arm in enumerate(profile.arms, 1) if _resident(arm)]
    if not arms:
        return None
    names = profile.stage_names
    width = (RIGHT - LEFT - 40) / max(1, len(names) - 1)
    at = {name: round(LEFT + 20 + width * i, 1) for i, name in enumerate(names)}
    y = Axis.fit([value for _, arm in arms for _, value in _resident(arm)], BOTTOM, TOP, zero=True)
    series = []
    for number, arm in arms:
        points = [(at[name], y.at(value)) for name, value in _resident(arm)]
        series.append(Series(number, arm.arm, Mark(*points[number % len(points)]), _polyline(points)))
    x_ticks = tuple(Tick(place, name) for name, place in at.items())
    said = f"Resident memory of a process in MiB at {len(names)} stages of its life, for {len(arms)} arms."
    return Chart("memory", "Memory at each stage", said, "stage", "resident, MiB", x_ticks, y.ticks(), tuple(series))


def memory_over_time(profile: ProfileFigures) -> Chart | None:
    """RSS of a process from its start to its end."""
    arms = [(number, arm) for number, arm in enumerate(profile.arms, 1) if arm.memory_curve]
    if not arms:
        return None
    x = Axis.fit([ns * 1e-6 for _, arm in arms for ns, _ in arm.memory_curve], LEFT, RIGHT, zero=True)
    y = Axis.fit([value / _MIB for _, arm in arms for _, value in arm.memory_curve], BOTTOM, TOP, zero=True)
    series = []
    for number, arm in arms:
        points = [(x.at(ns * 1e-6), y.at(value / _MIB)) for ns, value in arm.memory_curve]
        dots = tuple(Mark(x.at(each.time_ns * 1e-6), y.at(each.resident_bytes / _MIB)) for each in arm.memory_marks)
        # markers at different heights of the way up, so that arms which load alike do not hide each other
        most = max(value for _, value in arm.memory_curve)
        share = 0.35 + 0.1 * (number % 6)
        first = next(i for i, (_, value) in enumerate(arm.memory_curve) if value >= share * most)
        series.append(Series(number, arm.arm, Mark(*points[first]), _polyline(points), dots))
    said = (
        "Resident memory of one process of each arm, from its start to its end; dots are the runtime imported, the "
        "model loaded, the first inference, the last one, and the peak."
    )
    labels = "since the start, ms", "resident, MiB"
    return Chart("memory-time", "Memory over time", said, *labels, x.ticks(), y.ticks(), tuple(series))


def size(profile: ProfileFigures) -> Chart | None:
    """Latency against the file's bytes."""
    places = [(arm, arm.median_ns * 1e-6, arm.size_bytes / 1e6) for arm in profile.arms if arm.median_ns is not None]
    return _scatter(profile, places, "size", "Latency and size", "file, MB")


def drop(profile: ProfileFigures) -> Chart | None:
    """Latency against the quality lost; the arm that it is lost to stands at 0."""
    stated = [arm for arm in profile.arms if arm.drop_pp is not None]
    original = [arm for arm in profile.arms if arm.drop_pp is None and arm.quality is not None]
    places = [
        (arm, arm.median_ns * 1e-6, arm.drop_pp or 0.0) for arm in (*stated, *original) if arm.median_ns is not None
    ]
    return _scatter(profile, places, "drop", "Latency and quality", "drop, pp") if stated else None


def _scatter(
    profile: ProfileFigures, places: Sequence[tuple[ArmFigures, float, float]], kind: str, title: str, what: str
) -> Chart | None:
    if not places:
        return None
    x = Axis.fit([ms for _, ms, _ in places], LEFT + 10, RIGHT - 10)
    y = Axis.fit([value for _, _, value in places], BOTTOM - 10, TOP + 10)
    numbers = {arm.arm: number for number, arm in enumerate(profile.arms, 1)}
    series = tuple(Series(numbers[arm.arm], arm.arm, Mark(x.at(ms), y.at(value))) for arm, ms, value in places)
    best = sorted((ms, value, arm.arm) for arm, ms, value in places if not _beaten(ms, value, places))
    said = f"Median latency against {what}; both are better when lower. No arm beats {', '.join(b[2] for b in best)}."
    front = _polyline([(x.at(ms), y.at(value)) for ms, value, _ in best])
    labels = f"median latency, ms{_scale(x)}", f"{what}{_scale(y)}"
    return Chart(kind, title, said, *labels, x.ticks(), y.ticks(), series, front)


def _beaten(ms: float, value: float, places: Sequence[tuple[ArmFigures, float, float]]) -> bool:
    return any(a <= ms and b <= value and (a, b) != (ms, value) for _, a, b in places)


def _resident(arm: ArmFigures) -> list[tuple[str, float]]:
    return [(stage.name, stage.resident_bytes / _MIB) for stage in arm.stages if stage.resident_bytes is not None]


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _scale(axis: Axis) -> str:
    return " (log)" if axis.log else ""
