"""The time of operators as text: where each arm's goes, and each layer of the model in two arms side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .layer_times import LOST, OPEN, WON, ArmOperators, LayerComparison, LayerTime, Operators
from .profile import NOT_ASKED, Profile
from .roofline import Peaks
from .table import NONE, columns, milliseconds

TOP = 20
"""Layers of a table, beside those that have lost; the profile's JSON has all."""


def operator_lines(profile: Profile) -> list[str]:
    """Empty where they were not asked for."""
    found = profile.operators
    if found is None:
        asked = profile.operators_note and profile.operators_note != NOT_ASKED
        return ["", f"operators: not measured ({profile.operators_note})"] if asked else []
    lines = [
        "",
        peaks_text(found.peaks),
        *(f"operators of {name}: {share_text(arm)}" for name, arm in found.arms.items()),
    ]
    if found.null_layers:
        lines.append(null_text(found))
    pairs = list(dict.fromkeys((each.arm, each.baseline) for each in found.comparisons))
    fair = [pair for pair in pairs if _precision(pair[0]) == _precision(pair[1])]
    for one, other in fair or pairs:
        lines += ["", *side_by_side(found, one, other)]
    for name, only in found.arms.items() if not pairs else ():
        lines += ["", *alone(name, only)]
    return lines


def peaks_text(peaks: Peaks) -> str:
    return (
        f"machine at most, {peaks.threads} thread(s): {peaks.bytes_per_second / 1e9:.1f} GB/s, "
        f"{peaks.macs_per_second / 1e9:.1f} GMAC/s in float32 ({peaks.method})"
    )


def null_text(found: Operators) -> str:
    return (
        f"null arm: {found.null_verdicts} of {found.null_layers} layers came out won or lost between two sets of "
        "processes of one file"
    )


def share_text(arm: ArmOperators) -> str:
    """``1.14 ms in the fastest process, of an inference's 0.36 ms without the profiler: …``, what is subtracted and
    what is the layers', then the times as they ran."""
    own = arm.elsewhere_ns + sum(layer.ns for layer in arm.layers)
    if arm.latency_ns is None or arm.uncorrected_ns is None:
        head = f"{time_text(own)} where nothing interrupts them, the profiler's own part not subtracted; "
    else:
        head = f"{time_text(arm.uncorrected_ns)} in the fastest process, "
        head += f"of an inference's {time_text(arm.latency_ns)} without the profiler (a tenth is faster)"
        if arm.overhead_ns > 0:
            head += (
                f": {time_text(arm.overhead_ns)} an operator are the profiler's and subtracted, {time_text(own)} left"
            )
        head += "; "
    return (
        f"{head}{arm.attributed:.1%} of it in layers of the model; "
        f"{time_text(arm.total_ns)} as they ran, of an inference's {time_text(arm.inference_ns)} with the profiler on"
    )


def verdicts_text(found: Sequence[LayerComparison]) -> str:
    """``12 won, 3 lost, 40 without verdict``."""
    counts = Counter(each.verdict for each in found)
    return f"{counts[WON]} won, {counts[LOST]} lost, {counts[OPEN]} without verdict"


def side_by_side(found: Operators, arm: str, baseline: str) -> list[str]:
    """The layers of two arms, those that take most in the baseline first: the first TOP, and all that have lost."""
    pairs = [each for each in found.comparisons if (each.arm, each.baseline) == (arm, baseline)]
    mine = {layer.layer: layer for layer in found.arms[arm].layers}
    its = {layer.layer: layer for layer in found.arms[baseline].layers}
    ordered = sorted(pairs, key=lambda each: -its[each.layer].ns)
    head = [
        f"layers, {arm} / {baseline}", "form", baseline.partition("@")[0], arm.partition("@")[0], "ratio [95 %]", "",
        "MACs", "after", "bound", "reached", "after",
    ]  # fmt: skip
    shown = [each for place, each in enumerate(ordered) if place < TOP or each.verdict == LOST]
    rows = [_row(each, mine[each.layer], its[each.layer]) for each in shown]
    elsewhere = [time_text(found.arms[name].elsewhere_ns) for name in (baseline, arm)]
    rows.append(["elsewhere", NONE, *elsewhere, *[NONE] * (len(head) - 4)])
    text = columns([head, *rows], [False, False, True, True, False, False] + [True] * 2 + [False] + [True] * 2)
    left = len(ordered) - len(shown)
    more = f"; {left} more in the profile's JSON, none of them lost" if left else ""
    return [*text, f"layers: {verdicts_text(pairs)}{more}"]


def alone(name: str, arm: ArmOperators) -> list[str]:
    """The layers of one arm, those that take most first."""
    ordered = sorted(arm.layers, key=lambda layer: -layer.ns)
    rows = [[f"layers, {name}", "form", "time", "MACs", "bound", "reached"]]
    rows += [
        [
            layer.layer,
            form_text(layer),
            time_text(layer.ns),
            macs_text(layer.macs),
            layer.bound or NONE,
            reached(layer),
        ]
        for layer in ordered[:TOP]
    ]
    rows.append(["elsewhere", NONE, time_text(arm.elsewhere_ns), *[NONE] * 3])
    return columns(rows, [False, False, True, True, False, True])


def form_text(layer: LayerTime) -> str:
    return layer.form if layer.rank is None else f"{layer.form}, rank {layer.rank}"


def macs_text(macs: int) -> str:
    """``115.6 M`` or ``64 k``; a dash for none."""
    return NONE if not macs else f"{macs / 1e6:.1f} M" if macs >= 1e6 else f"{macs / 1e3:.3g} k"


def time_text(ns: float | None) -> str:
    """As `milliseconds`, below 0.1 ms in µs."""
    return milliseconds(ns) if ns is None or ns >= 99_950 else f"{ns / 1e3:.1f} µs"


def reached(layer: LayerTime) -> str:
    """The share of what the machine's peaks allow."""
    return NONE if layer.reached is None else f"{layer.reached:.0%}"


def _row(found: LayerComparison, mine: LayerTime, its: LayerTime) -> Sequence[str]:
    ratio = NONE if found.ratio is None else f"{found.ratio:.3f} [{found.ci_low:.3f}, {found.ci_high:.3f}]"
    return [
        found.layer, form_text(mine), time_text(its.ns), time_text(mine.ns), ratio, found.verdict,
        macs_text(its.macs), macs_text(mine.macs), mine.bound or NONE, reached(its), reached(mine),
    ]  # fmt: skip


def _precision(arm: str) -> str:
    return arm.partition("@")[2]
