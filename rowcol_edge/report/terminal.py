"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ..device.doctor import GOOD, MARKS, NOTE, STOP, TOLD, verdict
from ..device.manifest import RUN
from ..targets import install_lines
from .sheet import Sheet

if TYPE_CHECKING:
    from ..api import Demo
    from ..coverage import DataReport
    from ..device.doctor import Diagnosis
    from ..device.profile import Profile
    from ..inspection import ChannelUse, Inspection
    from ..pipeline import Built, Factored
    from ..samples import Sample
    from ..targets import Target
    from .change import Change
    from .compare import ComparisonTable

_LISTED = 4
_BARS = " ▁▂▃▄▅▆▇█"


def _console() -> Console:
    # what is printed names the user's own things: "net:two:" is no emoji and "[red]" no colour
    return Console(highlight=False, markup=False, emoji=False)


def targets(boards: Iterable[Target], samples: Iterable[Sample]) -> None:
    """The boards and the embedded samples."""
    console = _console()
    table = Sheet("Targets", [("name", "l"), ("board", "l"), ("runtimes", "l"), ("threads", "r"), ("MiB", "r")])
    for target in boards:
        runtimes = ", ".join(runtime.name for runtime in target.runtimes)
        table.add_row(target.name, target.title, runtimes, str(target.threads), f"{target.memory_mb:,}")
    console.print(table)
    console.print("One of them, with its precisions and how to install its runtimes: rowcol-edge targets NAME\n")
    table = Sheet("Samples", [("name", "l"), ("what", "l"), ("metric", "l"), ("needs", "l")])
    for sample in samples:
        table.add_row(f"sample:{sample.name}", sample.title, sample.metric, ", ".join(sample.packages) or "–")
    console.print(table)


def target(board: Target) -> None:
    """One board: what a build has to know of it, why, and how each runtime is installed there."""
    console = _console()
    facts = [
        ("Python", ", ".join(board.pythons)),
        ("wheels", board.platform),
        ("instruction set", ", ".join(board.isa)),
        ("threads", str(board.threads)),
        ("memory", f"{board.memory_mb:,} MiB"),
    ]
    console.print(f"{board.name}: {board.title}", style="bold")
    for what, value in facts:
        console.print(f"  {what}: {value}")
    console.print(f"\n{board.why}")
    for runtime in board.runtimes:
        opset = "" if runtime.opset is None else f", ONNX opset {runtime.opset}, IR {runtime.ir_version}"
        console.print(f"\n{runtime.name} ≥ {runtime.oldest}{opset}", style="bold")
        console.print(f"  precisions: {runtime.offered}")
        console.print(f"  providers: {', '.join(runtime.providers)}")
        console.print(runtime.why)
        # never wrapped: these lines are copied into a shell
        console.print(f"\n{indent(install_lines(runtime), '    ')}", soft_wrap=True)


def inspection(found: Inspection) -> None:
    """One row a layer: how many directions of its row and column space hold 99 and 99.9 % of the variance."""
    table = Sheet(
        f"{found.model}: {found.parameters:,} parameters, {found.macs / 1e6:,.1f} M MACs, {found.samples} samples",
        [
            ("layer", "l"),
            ("out×in", "l"),
            ("row use\n99, 99.9 %", "r"),
            ("column use\n99, 99.9 %", "r"),
            ("spectra", "l"),
            ("saves", "r"),
        ],
    )
    for layer in found.layers:
        table.add_row(
            layer.name,
            layer.shape,
            _use(layer.row_rank_99, layer.row_rank_999, layer.row_size),
            _use(layer.column_rank_99, layer.column_rank_999, layer.column_size),
            f"{_spectrum(layer.row_spectrum):4} {_spectrum(layer.column_spectrum)}",
            f"{layer.saves_parameters:,}" if layer.saves_parameters else "–",
        )
    console = _console()
    console.print(table)
    for layer in found.layers:
        if layer.fixed:
            console.print(f"left alone: {layer.name}: {layer.fixed}")
    for name, reason in found.closed.items():
        console.print(f"left as one: {name or 'the model'}: {reason}")
    for kind in dict.fromkeys(each.kind for each in found.elsewhere):
        these = [each for each in found.elsewhere if each.kind == kind]
        names = ", ".join(each.name for each in these[:_LISTED])
        more = f" and {len(these) - _LISTED} more" if len(these) > _LISTED else ""
        parameters = sum(each.parameters for each in these)
        console.print(
            f"left alone: {names}{more}: {parameters:,} parameters of a {kind}, which is no layer that can be factored"
        )
    for layer in found.layers:
        if layer.measured_thinly:
            console.print(f"too few data: {layer.name}: {layer.rows} rows cannot fill its spaces; do not trust its use")
    _channels(console, found.channels)
    share = found.saves_parameters / max(1, found.parameters)
    console.print(
        "Use: directions that hold 99 and 99.9 % of the variance, of all. Spectra: variance in each quarter of the "
        "directions, row and column.\nAt 99.9 % a layer, factoring saves "
        f"{found.saves_parameters:,} parameters ({share:.0%}). What that costs in quality, build finds out.",
    )


def _channels(console: Console, channels: Sequence[ChannelUse]) -> None:
    """The sets of channels that can be narrowed, and the others with the reason."""
    free = [each for each in channels if not each.fixed]
    if free:
        table = Sheet("Channels that can be narrowed, without a new operator", [("set", "l"), ("", "r"), ("in", "l")])
        for each in free:
            size = str(each.size) if each.groups == 1 else f"{each.groups}×{each.size}"
            more = f" and {len(each.layers) - _LISTED} more" if len(each.layers) > _LISTED else ""
            table.add_row(each.name, size, ", ".join(each.layers[:_LISTED]) + more)
        console.print(table)
    for each in channels:
        if each.fixed:
            console.print(f"not narrowed: channels of {each.name}: {each.fixed}")


def diagnosis(found: Diagnosis) -> None:
    """A row a finding, with what to do about it, and the verdict."""
    colours = {GOOD: "green", NOTE: "yellow", STOP: "red", TOLD: "none"}
    table = Sheet(found.subject, [("", "l"), ("what", "l"), ("found", "l")])
    for one in found.findings:
        table.add_row(Text(MARKS[one.level], colours[one.level]), one.what, one.found)
    console = _console()
    console.print(table)
    said: dict[str, str] = {}
    for one in found.findings:
        if one.do:
            console.print(f"{MARKS[one.level]} {one.what}: {one.found}")
            first = said.setdefault(one.do, one.what)
            # never wrapped: these lines are copied into a shell
            console.print(indent(one.do if first == one.what else f"as for {first}", "    "), soft_wrap=True)
    console.print(verdict(found))


def _use(rank_99: int | None, rank_999: int | None, size: int) -> str:
    return "–" if rank_99 is None else f"{rank_99}, {rank_999}/{size}"


def _spectrum(spectrum: Sequence[float]) -> str:
    """Variance in each quarter of the directions, as bars on a square-root scale so that a tail can be seen."""
    points = spectrum[3::4]
    shares = [b - a for a, b in zip((0.0, *points), points, strict=False)]
    return "".join(_BARS[max(1 if s > 1e-6 else 0, round(max(s, 0.0) ** 0.5 * (len(_BARS) - 1)))] for s in shares)


def data(found: DataReport) -> None:
    """Classes of each split, what the calibration subset covers, and the near-duplicates that matter most."""
    table = Sheet("Samples", [("split", "l"), ("samples", "r"), ("classes", "l")])
    names = [*((split.name, split) for split in found.splits), ("quantizer gets", found.subset)]
    for name, split in names:
        kinds = ", ".join(f"{kind} {count}" for kind, count in split.classes.items()) or "–"
        table.add_row(name, str(split.samples), kinds if split.labelled or not split.classes else f"{kinds} (answered)")
    console = _console()
    console.print(table)
    if found.narrowest is not None:
        shares = sorted(found.ranges.values())
        console.print(
            f"The quantizer's samples span {shares[len(shares) // 2]:.0%} of the pool's range in the median layer; "
            f"least in {found.narrowest[0]}: {found.narrowest[1]:.0%}.",
        )
    repeats = ", ".join(f"{name} {len(pairs)}" for name, pairs in found.repeats().items()) or "none"
    console.print(f"Near-duplicates inside a split: {repeats}.")
    leaks = found.leaks()
    if not leaks:
        console.print("Near-duplicates between splits: none.")
        return
    table = Sheet(
        "Near-duplicates between splits",
        [("splits", "l"), ("pairs", "r"), ("most alike (place, place: likeness)", "l")],
    )
    for (first, second), pairs in leaks.items():
        worst = ", ".join(f"{p.first_index}, {p.second_index}: {p.likeness:.2f}" for p in pairs[:_LISTED])
        table.add_row(f"{first}, {second}", str(len(pairs)), worst)
    console.print(table)
    for note in found.notes():
        console.print(f"warning: {note}")


def factored(result: Factored) -> None:
    """The chosen plan, layer by layer, and what was tried."""
    table = Sheet(
        f"{result.model}: plan {result.plan.made_by}",
        [
            ("layer", "l"),
            ("form", "l"),
            ("rank", "r"),
            ("kept", "r"),
            ("params", "r"),
            ("→", "r"),
            ("note", "l"),
        ],
    )
    for layer in result.plan.layers:
        table.add_row(
            layer.name,
            f"{layer.form} {layer.split}" if layer.form == "project" else layer.form,
            f"{layer.taken} → {layer.rank}" if layer.taken else str(layer.rank or "–"),
            f"{layer.energy:.3%}" if layer.form == "project" and layer.energy is not None else "–",
            f"{layer.parameters_before:,}",
            f"{layer.parameters_after:,}",
            layer.reason,
        )
    console = _console()
    console.print(table)
    if (loss := result.plan.loss) is not None:
        gap = result.plan.gap  # not known of a plan that was put together from those of two limits
        most = "" if gap is None else f"; other forms and ranks at these widths could save at most {gap:.1g} of it"
        unit = (
            "nats" if result.contract == "classify" else "of half the outputs' squared relative error about their mean"
        )
        console.print(f"predicted loss {loss:.3g} {unit}{most}")
    _trials(console, [t.to_dict() for t in result.trials])
    for said in filter(None, (result.second_pass, result.recovery and result.recovery.note)):
        console.print(said)
    for note in filter(None, (result.plan.note, result.assumed)):
        console.print(f"warning: {note}")
    if result.size is not None:
        size, precision = result.size
        console.print(f"predicted {size / 1e6:.3g} MB of weights at {precision}; build judges the real file")
    console.print(
        f"{result.parameters_before:,} → {result.parameters_after:,} parameters "
        f"({result.parameters_after / max(1, result.parameters_before):.1%}); written to {result.out}",
    )


def _trials(console: Console, trials: Sequence[dict[str, Any]]) -> None:
    if not any(t["drop"] is not None for t in trials):
        return
    table = Sheet(
        "Tried on the selection split (fp32)", [("plan", "l"), ("params", "r"), ("value", "r"), ("drop", "r")]
    )
    for trial in trials:
        table.add_row(trial["made_by"], f"{trial['parameters']:,}", f"{trial['value']:.4f}", f"{trial['drop']:+.2f} pp")
    console.print(table)


def built(bundles: Sequence[Built]) -> None:
    """Each bundle's arms with size and quality, the stages' errors, and the next command."""
    console = _console()
    for one in bundles:
        manifest = one.manifest
        state = "unchanged, kept" if one.reused else "built"
        table = Sheet(
            f"{one.path} ({state}); quality is {manifest.metric or 'not judged'}",
            [("arm", "l"), ("params", "r"), ("MB", "r"), ("select", "r"), ("test", "r"),
             ("drop, pp\n[95 %]", "r"), ("flips", "r")],
        )  # fmt: skip
        for arm in manifest.arms:
            selection, test = arm.quality.get("selection"), arm.quality.get("test")
            table.add_row(
                arm.name + (" *" if arm.name == manifest.default_arm else ""),
                f"{arm.parameters / 1e6:.3f} M",
                f"{arm.size_bytes / 1e6:.2f}",
                f"{selection['value']:.4f}" if selection else "–",
                f"{test['value']:.4f}" if test else "–",
                _drop(test),
                str(test["flips"]) if test and "flips" in test else "–",
            )
        console.print(table)
        for checked in dict.fromkeys(arm.checked for arm in manifest.arms if arm.checked != RUN):
            names = ", ".join(arm.name for arm in manifest.arms if arm.checked == checked)
            console.print(f"  {checked}: {names}")
        if "precision" in manifest.build:
            _candidates(console, manifest.build["precision"])
        for note in manifest.build.get("notes", []):
            console.print(f"  note: {note}")
        if one.wheelhouse is not None:
            console.print(f"  wheels for the board: {one.wheelhouse}")
        console.print(f"  next: rowcol-edge profile {one.path}", soft_wrap=True)


def _candidates(console: Console, chosen: Mapping[str, Any]) -> None:
    """What ``--precision auto`` tried, and on which evidence it chose."""
    table = Sheet(
        f"precision {chosen['chosen']}: the smallest file, unless a larger one is measurably faster",
        [("precision", "l"), ("file", "r"), ("drop", "r"), ("latency", "r"),
         (f"ratio to {chosen['smallest']} [95 %]", "r"), ("", "l")],
    )  # fmt: skip
    for tried in chosen["candidates"]:
        measured, dropped = not tried["left_out"], tried["drop_pp"]
        ratio = f"{tried['ratio']:.2f} [{tried['ci_low']:.2f}, {tried['ci_high']:.2f}]" if tried["ratio"] else "–"
        kept = f"in float: {', '.join(tried['kept_float'])}" if tried["kept_float"] else ""
        table.add_row(
            tried["precision"] + (" *" if tried["precision"] == chosen["chosen"] else ""),
            f"{tried['size_bytes'] / 1e6:.2f} MB" if measured else "–",
            f"{dropped:+.2f} pp" if dropped is not None else "–",
            f"{tried['latency_ns'] / 1e6:.2f} ms" if measured else "–",
            ratio,
            "; ".join(filter(None, (tried["verdict"], kept, tried["left_out"]))),
        )
    console.print(table)
    console.print(f"  evidence {chosen['evidence']}: {chosen['evidence_note']}")
    for warning in chosen.get("warnings", ()):
        console.print(f"  the profiler says: {warning}", markup=False)


def _drop(record: dict[str, Any] | None) -> str:
    if not record or "drop_pp" not in record:
        return "–"
    return f"{record['drop_pp']:+.2f}\n[{record['ci_low_pp']:+.2f}, {record['ci_high_pp']:+.2f}]"


def profile(measured: Profile, path: Path) -> None:
    """The profile as the board prints it."""
    from ..device.table import profile_table

    console = _console()
    console.print(profile_table(measured), soft_wrap=True)
    console.print(f"written to {path}", soft_wrap=True)


def comparison(table: ComparisonTable, *, notes: bool = True) -> None:
    """Dense against factored: a sheet per bundle, its arms side by side, so that it fits a terminal."""
    console = _console()
    headings = table.columns()
    sheets: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for cells in table.rows():
        sheets.setdefault((cells[0], cells[1]), []).append(cells)
    for (target, bundle), arms in sheets.items():
        sheet = Sheet(f"{bundle} for {target}", [("", "l"), *((cells[2], "r") for cells in arms)])
        for i in range(3, len(headings)):
            sheet.add_row(headings[i], *(cells[i] for cells in arms))
        console.print(sheet)
    for note in table.notes if notes else ():
        console.print(f"note: {note}")


def change(found: Change) -> None:
    """Before and after, the arms side by side."""
    first, *arms = found.columns()
    sheet = Sheet(f"{found.new.bundle}: {found.old.file} → {found.new.file}", [(first, "l"), *((a, "r") for a in arms)])
    for row in found.rows():
        sheet.add_row(*row)
    console = _console()
    console.print(sheet)
    for note in found.notes:
        console.print(f"note: {note}")


def demo(shown: Demo) -> None:
    """What was built, what was measured, and one answer."""
    built([shown.built])
    from ..device.table import profile_table

    console = _console()
    console.print(profile_table(shown.profile), soft_wrap=True)
    comparison(shown.table, notes=False)  # the profile above has said them
    answer = shown.prediction
    console.print(
        f"{shown.image} is {shown.truth}; the packaged model says {answer.get('label')} "
        f"({answer.get('score', 0.0):.2f}). {shown.seconds:.0f} s in all.",
    )
