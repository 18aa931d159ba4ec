"""A report as one HTML file: no script, nothing loaded, readable on a phone, in the dark and by a screen reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..device import operator_table
from ..device.profile import NOT_ASKED, Comparison
from ..device.stats import FASTER, NO_DIFFERENCE, NOT_COMPARABLE, SLOWER
from ..device.system import PROXY, TARGET
from ..device.table import NONE, joules, mebibytes, mib_change, milliseconds, ratio_text, size
from ..errors import MissingDependencyError
from . import charts, layer_bars
from .figures import STAGES, TABLED, ArmFigures, Figures, ProfileFigures

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")
_EVIDENCE = {TARGET: "measured on the target", PROXY: "measured on a machine that stands in for the target"}


def check() -> None:
    """MissingDependencyError where no page can be made, before anything is read."""
    _environment()


def page(figures: Figures) -> str:
    """The HTML document; the same figures give the same text."""
    template = _environment().get_template("report.html")
    return template.render(
        figures=figures, charts=charts, bars=layer_bars, tabled=TABLED, stages=STAGES, not_asked=NOT_ASKED
    )


def headline(profile: ProfileFigures) -> list[str]:
    """The verdict on the default arm in sentences: latency, file, quality, memory."""
    arm = profile.default
    said = [claim(found) for found in profile.comparisons]
    if not said:
        said.append(f"{arm.arm} was measured without a dense arm to set it against.")
    others = {c.baseline for c in profile.comparisons}
    sizes = [f"{size(other.size_bytes)} of {other.arm}" for other in profile.arms if other.arm in others]
    said.append(f"Its file takes {size(arm.size_bytes)}{', against ' + ' and '.join(sizes) if sizes else ''}.")
    if arm.quality is not None:
        where = "test split" if arm.split == "test" else "selection split, on which choices were made"
        lost = "" if arm.drop_pp is None else f", {drop_text(arm)} lost to the original"
        said.append(f"Quality, {where}: {arm.metric} {arm.quality:.4f}{lost}.")
    if profile.memory_limit_bytes is not None and arm.memory_verdict:
        limit, peak = mebibytes(profile.memory_limit_bytes), mebibytes(arm.peak_bytes)
        said.append(f"Peak memory {peak}; the target's budget of {limit}: {arm.memory_verdict}.")
    return said


def claim(found: Comparison) -> str:
    """One comparison as a sentence, always with its interval."""
    pair = f"{found.arm} and {found.baseline}"
    if found.verdict == NOT_COMPARABLE or found.ratio is None or found.ci_low is None or found.ci_high is None:
        return f"The latencies of {pair} are not comparable: {found.reason or 'no interval'}."
    bounds = f"95 % interval {100 * found.ci_low:.1f} to {100 * found.ci_high:.1f} %"
    if found.verdict == NO_DIFFERENCE:
        reason = f"; {found.reason}" if found.reason else ""
        share = f"{100 * found.ratio:.1f} %"
        return f"No significant difference in latency between {pair}: {share} of its time ({bounds}{reason})."
    word = {FASTER: "faster", SLOWER: "slower"}[found.verdict]
    return f"{found.arm} is {word} than {found.baseline}: it takes {100 * found.ratio:.1f} % of its time ({bounds})."


def evidence_text(level: str) -> str:
    """What an evidence level means; those whose times are no latency say so."""
    return _EVIDENCE.get(level, f"{level}: times and memory are not the target's and are left out")


def drop_text(arm: ArmFigures) -> str:
    """``+0.25 pp [-0.10, +0.60]``; a dash for none."""
    if arm.drop_pp is None:
        return NONE
    interval = "" if arm.drop_low_pp is None else f" [{arm.drop_low_pp:+.2f}, {arm.drop_high_pp:+.2f}]"
    return f"{arm.drop_pp:+.2f} pp{interval}"


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as e:
        raise MissingDependencyError("a report needs jinja2", package="rowcol-edge[report]") from e
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,  # names in a profile are the user's, and a profile may come from anywhere
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": milliseconds, "size": size, "mib": mebibytes, "joules": joules, "ratio": ratio_text, "drop": drop_text,
        "mib_change": mib_change, "headline": headline, "evidence": evidence_text, "charts": charts.charts,
        "layer_table": layer_bars.table, "layer_bars": layer_bars.bars, "by_operator": layer_bars.by_operator,
        "peaks": operator_table.peaks_text,
        "share": operator_table.share_text, "form": operator_table.form_text, "time": operator_table.time_text,
        "macs": operator_table.macs_text, "reached": operator_table.reached,
    }  # fmt: skip
    return environment
