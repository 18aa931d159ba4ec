"""Time by layer in two arms and by operator in each: what is drawn as bars, and the rows of the tables beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..device.layer_times import ArmOperators, LayerComparison, LayerTime, OperatorTime
from ..device.operator_table import verdicts_text
from .charts import WIDTH, Axis, Tick
from .figures import ProfileFigures

LEFT, RIGHT = 24, WIDTH - 12
MARK, RADIUS, THICK = 12, 6.5, 8
"""The middle and radius of the marker in front of a bar, and how thick that is."""
TOP = 34
_LABEL, _BAR, _GAP = 17, 15, 8
_LETTERS = 40
SHOWN = 12
"""Layers that are drawn; the table has all."""
OPERATORS = 15
"""Operators of an arm that are shown; the profile's JSON has all."""
ELSEWHERE = "elsewhere"
MS = 1e6
_BEYOND = 2.0
"""The picture ends at so many times the longest bar: one interrupted process would make all bars short."""


@dataclass(frozen=True, slots=True)
class Bar:
    """``y`` is its middle. ``low`` and ``high`` are where the range over processes ends, in pixels, as ``end`` is."""

    number: int
    y: float
    end: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """``said`` is the row in words, for who cannot see it."""

    label: str
    said: str
    y: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Bars:
    title: str
    description: str
    height: float
    x_label: str
    x_ticks: tuple[Tick, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer in the arms that are set side by side, each None where an arm has no time of it."""

    layer: str
    times: tuple[LayerTime | None, ...]
    comparison: LayerComparison | None


@dataclass(frozen=True, slots=True)
class LayerTable:
    """``arms`` have their numbers in the report, the dense one first; ``rows`` what takes most there first;
    ``verdicts`` how many have won and lost, empty for a single arm."""

    arms: tuple[tuple[int, str], ...]
    rows: tuple[LayerRow, ...]
    elsewhere_ns: tuple[float, ...]
    verdicts: str


@dataclass(frozen=True, slots=True)
class OperatorBars:
    """The operators of an arm that take longest, each with its share of all its operators' time; ``number`` is the
    arm's in the report."""

    number: int
    arm: str
    bars: Bars
    rows: tuple[tuple[OperatorTime, float], ...]


def table(profile: ProfileFigures) -> LayerTable | None:
    """The default arm beside the dense one of its precision, or alone; None where no operators were measured."""
    found = profile.operators
    if found is None or profile.default_arm not in found.arms:
        return None
    dense = f"dense@{profile.default_arm.partition('@')[2]}"
    names = list(dict.fromkeys(name for name in (dense, profile.default_arm) if name in found.arms))
    numbers = {arm.arm: number for number, arm in enumerate(profile.arms, 1)}
    times = [{layer.layer: layer for layer in found.arms[name].layers} for name in names]
    compared = {each.layer: each for each in found.comparisons if (each.arm, each.baseline) == (names[-1], names[0])}
    layers = sorted(dict.fromkeys(name for of_arm in times for name in of_arm), key=lambda name: -_most(name, times))
    return LayerTable(
        tuple((numbers[name], name) for name in names),
        tuple(LayerRow(name, tuple(each.get(name) for each in times), compared.get(name)) for name in layers),
        tuple(found.arms[name].elsewhere_ns for name in names),
        verdicts_text(tuple(compared.values())) if compared else "",
    )


def bars(layers: LayerTable) -> Bars:
    """The layers that take most, and what no layer is known for."""
    shown = layers.rows[:SHOWN]
    spans = [_range(each) for row in shown for each in row.times] + [(ns, ns, ns) for ns in layers.elsewhere_ns]
    farthest, longest = max(high for _, _, high in spans), max(ns for ns, _, _ in spans)
    limit = min(1.05 * farthest, _BEYOND * longest) or MS
    axis = Axis(0.0, 1e-6 * limit, LEFT, RIGHT)
    rows, y = [], float(TOP)
    entries = [(row.layer, [_range(each) for each in row.times]) for row in shown]
    entries.append((ELSEWHERE, [(ns, ns, ns) for ns in layers.elsewhere_ns]))
    for label, ranges in entries:
        said = "; ".join(
            f"{name} {ns * 1e-6:.3g} ms" for (_, name), (ns, _, _) in zip(layers.arms, ranges, strict=True)
        )
        drawn = tuple(
            Bar(number, y + _LABEL + (place + 0.5) * _BAR, *(axis.at(min(ns, limit) * 1e-6) for ns in times))
            for place, ((number, _), times) in enumerate(zip(layers.arms, ranges, strict=True))
        )
        rows.append(Row(_short(label), f"{label}: {said}", y + _LABEL - 5, drawn))
        y += _LABEL + _BAR * len(ranges) + _GAP
    names = " and ".join(name for _, name in layers.arms)
    left = len(layers.rows) - len(shown)
    cut = " Lines that end at the right go on beyond it." if farthest > limit else ""
    said = f"Time of an inference spent in each layer, {names}, by the runtime's profiler; lines span the processes."
    return Bars(
        "Time by layer", said + cut + (f" {left} more layers in the table." if left > 0 else ""), y + 26, "time, ms",
        axis.ticks(), tuple(rows),
    )  # fmt: skip


def by_operator(profile: ProfileFigures) -> tuple[OperatorBars, ...]:
    """One an arm; none where no operators were measured."""
    arms = profile.operators.arms if profile.operators else {}
    return tuple(
        _operators(number, arm.arm, arms[arm.arm])
        for number, arm in enumerate(profile.arms, 1)
        if arm.arm in arms and arms[arm.arm].operators
    )


def _operators(number: int, name: str, arm: ArmOperators) -> OperatorBars:
    shown = sorted(arm.operators, key=lambda operator: -operator.ns)[:OPERATORS]
    whole = sum(operator.ns for operator in arm.operators) or 1.0
    axis = Axis(0.0, 1.05 * max(1.0, shown[0].ns) / MS, LEFT, RIGHT)
    rows, y = [], float(TOP)
    for operator in shown:
        end = axis.at(operator.ns / MS)
        bar = Bar(number, y + _LABEL + 0.5 * _BAR, end, end, end)
        said = f"{operator.name}, {operator.kind}: {operator.ns / MS:.3g} ms"
        rows.append(Row(_short(operator.name), said, y + _LABEL - 5, (bar,)))
        y += _LABEL + _BAR + _GAP
    left = len(arm.operators) - len(shown)
    said = "Time of an inference spent in each operator, as the runtime calls them, by its profiler."
    bars = Bars(
        f"Time by operator, {name}", said + (f" {left} more in the profile's JSON." if left else ""), y + 26,
        "time, ms", axis.ticks(), tuple(rows),
    )  # fmt: skip
    return OperatorBars(number, name, bars, tuple((operator, operator.ns / whole) for operator in shown))


def _short(name: str) -> str:
    """Both ends of a name that is too long for the picture."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[:half]}…{name[-half:]}"


def _most(name: str, times: Sequence[dict[str, LayerTime]]) -> float:
    """What a layer takes in the first arm that has it."""
    return next(each[name].ns for each in times if name in each)


def _range(layer: LayerTime | None) -> tuple[float, float, float]:
    """Median over processes, the least and the most, ns."""
    return (0.0, 0.0, 0.0) if layer is None else (layer.ns, min(layer.rounds_ns), max(layer.rounds_ns))
