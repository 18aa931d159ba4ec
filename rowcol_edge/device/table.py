"""A profile as plain text, for a terminal that has nothing but this archive."""

from __future__ import annotations

from collections.abc import Sequence

from . import boards
from .profile import (
    NOT_ASKED,
    NOT_MEASURED,
    OVER,
    TWICE,
    ArmProfile,
    Comparison,
    MemoryBudget,
    Profile,
    RailEnergy,
    settings_text,
)
from .stats import NOT_COMPARABLE, median, refusal
from .system import Readings, counts, readings

NONE = "–"


def profile_table(profile: Profile) -> str:
    """Arms, paired ratios with interval and verdict, the null arm, energy, evidence and warnings."""
    from .operator_table import operator_lines  # which is made of what stands below

    protocol = profile.protocol
    runtime = f"{profile.runtime} {profile.runtime_version}"
    threads = f"{profile.threads or 'default'} thread(s)"
    settings = settings_text(profile)
    taken = f"{protocol.rounds} rounds in {protocol.elapsed_seconds:.0f} s"
    lines = [
        f"{profile.bundle} for {profile.target}: {runtime}, {threads}, {taken}",
        *([f"runtime settings: {settings}"] if settings else []),
        f"evidence: {profile.evidence} – {profile.evidence_note}",
        f"host: {_host(profile)}",
        _readings(profile),
        "",
        *_arms(profile),
        *_budget(profile),
        "",
        *_ratios(profile),
        *_stages(profile),
        *_variants(profile),
        *_energies(profile),
        *operator_lines(profile),
    ]
    if refusals := _refusals(profile):
        lines += ["", *refusals]
    if profile.warnings:
        lines += ["", *(f"warning: {text}" for text in profile.warnings)]
    return "\n".join(lines)


def milliseconds(ns: float | None) -> str:
    """A time with three significant digits, in ms; a dash for none."""
    if ns is None:
        return NONE
    ms = ns * 1e-6
    return (
        f"{ms:.0f} ms"
        if ms >= 99.95
        else f"{ms:.1f} ms"
        if ms >= 9.995
        else f"{ms:.2f} ms"
        if ms >= 0.9995
        else f"{ms:.3f} ms"
    )


def size(size_bytes: float | None) -> str:
    """A size on disk (kB, MB: powers of ten)."""
    if size_bytes is None:
        return NONE
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def mebibytes(size_bytes: float | None) -> str:
    """A size in memory (MiB)."""
    return NONE if size_bytes is None else f"{size_bytes / (1 << 20):.0f} MiB"


def joules(value: float | None) -> str:
    """An energy with three significant digits, in J, mJ or µJ; a dash for none."""
    if value is None:
        return NONE
    units = ((1.0, "J"), (1e3, "mJ"), (1e6, "µJ"))
    factor, unit = next((each for each in units if abs(value) * each[0] >= 0.9995), units[-1])
    return f"{float(f'{value * factor:.3g}'):g} {unit}"


def ratio_text(comparison: Comparison) -> str:
    """``0.612 [0.604, 0.619] faster``: never a ratio without its interval and verdict."""
    c = comparison
    if c.ratio is None or c.ci_low is None or c.ci_high is None or c.verdict == NOT_COMPARABLE:
        return f"{NOT_COMPARABLE}{f' ({c.reason})' if c.reason else ''}"
    reason = f" ({c.reason})" if c.reason else ""
    return f"{c.ratio:.3f} [{c.ci_low:.3f}, {c.ci_high:.3f}] {c.verdict}{reason}"


def times_count(profile: Profile) -> bool:
    """May times and memory of this profile be printed as the target's? An emulator's are its own."""
    return counts(profile.evidence)


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Rows of cells aligned to the widest of each column, two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(right))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _arms(profile: Profile) -> list[str]:
    shown = times_count(profile)
    head = ["arm", "median", "p90", "p99", "import", "load", "first", "peak memory", "over runtime", "file"]
    rows = [head, *(_arm(arm, shown) for arm in profile.arms.values())]
    return columns(rows, [False] + [True] * (len(head) - 1))


def _arm(arm: ArmProfile, shown: bool) -> list[str]:
    latency, cold, memory = arm.latency, arm.cold, arm.memory if shown else None
    values = (latency.median_ns, latency.p90_ns, latency.p99_ns, cold.import_ns, cold.load_ns, cold.first_ns)
    times = [milliseconds(value) if shown else NONE for value in values]
    return [
        arm.name,
        *times,
        mebibytes(memory.peak_bytes if memory else None),
        mebibytes(memory.own_bytes if memory else None),
        size(arm.artifact_bytes),
    ]


def _budget(profile: Profile) -> list[str]:
    """``memory budget 64 MiB: factored@int8 within, dense@fp32 OVER by 6 MiB``."""
    budget = profile.memory_budget
    if budget is None:
        return []
    said = [f"{name} {_fit(profile.arms[name], verdict, budget)}" for name, verdict in budget.verdicts.items()]
    return [f"memory budget {mebibytes(budget.limit_bytes)}: {', '.join(said)}"]


def _fit(arm: ArmProfile, verdict: str, budget: MemoryBudget) -> str:
    if verdict != OVER or arm.memory is None:
        return verdict
    return f"OVER by {mebibytes(arm.memory.peak_bytes - budget.limit_bytes)}"


def _ratios(profile: Profile) -> list[str]:
    rows = [["latency ratio, paired", "95 % interval and verdict"]]
    rows += [[f"{c.arm} / {c.baseline}", ratio_text(c)] for c in profile.comparisons]
    rows.append([f"null arm: {profile.null.baseline} twice", ratio_text(profile.null)])
    return columns(rows, [False, False])


def machine_told(profile: Profile) -> dict[str, tuple[str, str]]:
    """What the machine said before and after; NOT_MEASURED where it did not, and what only boards of one make tell is
    left out on others."""
    board = profile.environment.board
    before, after = (_told(each, board) for each in (readings(profile.environment), profile.after))
    own = {
        "firmware temperature": boards.raspberry_pi(board),
        "power mode": boards.jetson(board),
        "clocks held": boards.jetson(board),
    }
    return {
        what: (was, after[what])
        for what, was in before.items()
        if own.get(what, True) or (was, after[what]) != (NOT_MEASURED, NOT_MEASURED)
    }


def _told(said: Readings, board: str) -> dict[str, str]:
    # a Raspberry Pi's firmware holds cores back without a word in cpufreq
    free = said.frequency_khz is not None and not boards.raspberry_pi(board)
    texts = {
        "governor": said.governor,
        "temperature": _celsius(said.temperature_c),
        "firmware temperature": _celsius(said.firmware_temperature_c),
        "fastest core": "" if said.frequency_khz is None else f"{said.frequency_khz / 1000:.0f} MHz",
        "throttling": said.throttled or ("none" if free else ""),
        "power mode": said.power_mode,
        "clocks held": "" if said.clocks_held is None else "yes" if said.clocks_held else "no",
    }
    return {what: text or NOT_MEASURED for what, text in texts.items()}


def _celsius(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} °C"


def _readings(profile: Profile) -> str:
    """What may change in between; the rest is the host's line."""
    told = machine_told(profile)
    shown = ("temperature", "firmware temperature", "fastest core", "throttling")
    said = [
        f"{what} {NOT_MEASURED}" if told[what] == (NOT_MEASURED, NOT_MEASURED) else f"{what} {' → '.join(told[what])}"
        for what in shown
        if what in told
    ]
    return f"before → after: {', '.join(said)}"


def _stages(profile: Profile) -> list[str]:
    """Memory of a process as it goes along, each arm as the target has it: three ways to count it.

    ``to run`` is the peak of running beyond the loaded model; beside it what activations take by the graph.
    """
    arms = {name: arm.footprints[0] for name, arm in profile.arms.items() if arm.footprints and times_count(profile)}
    if not arms:
        return []
    estimates = {name: arm.activation_bytes for name, arm in profile.arms.items()}
    peaks_head = ["peak loading", "peak running", "to run", "by graph"]
    rows = [["memory of a process, MiB", "import", "loaded", "first", "steady", *peaks_head]]
    for name, found in arms.items():
        peaks = [found.load_peak_bytes, found.run_peak_bytes, found.running_bytes, estimates[name]]
        for what, kind in (("RSS", "resident_bytes"), ("PSS", "proportional_bytes"), ("private", "private_bytes")):
            stages = [getattr(stage, kind) for stage in (found.imported, found.loaded, found.first, found.steady)]
            rows.append([f"{name}, {what}", *map(_mib, [*stages, *(peaks if what == "RSS" else [None] * 4)])])
    return ["", *columns(rows, [False] + [True] * 8)]


def mib_change(size_bytes: int | None) -> str:
    """Bytes more or less, in MiB without the unit."""
    return NONE if size_bytes is None else f"{size_bytes / (1 << 20):+.1f}"


def _mib(size_bytes: int | None) -> str:
    mib = None if size_bytes is None else size_bytes / (1 << 20)
    return NONE if mib is None else f"{mib:.1f}" if mib >= 9.995 else f"{mib:.2f}"


def _variants(profile: Profile) -> list[str]:
    """What each setting of the runtime saves in bytes and costs in time, against the same arm as the target has it."""
    rows = [["runtime setting against default, MiB", "peak", "steady RSS", "steady private", "latency ratio [95 %]"]]
    for name, arm in profile.arms.items():
        shown = arm.footprints if times_count(profile) else ()
        for found in shown[1:]:
            changes = map(mib_change, found.beyond(shown[0]))
            rows.append([f"{name}, {found.variant}", *changes, ratio_text(found.latency) if found.latency else NONE])
        if shown[1:] and shown[0].latency:  # of an older profile, which has no memory of its null arm
            rows.append([f"{name}, {TWICE}", NONE, NONE, NONE, ratio_text(shown[0].latency)])
    return ["", *columns(rows, [False, True, True, True, False])] if rows[1:] else []


def _energies(profile: Profile) -> list[str]:
    """Energy of an inference by arm and rail; the reason where it was asked for and not measured."""
    if profile.energy_note:
        return [] if profile.energy_note == NOT_ASKED else ["", f"energy: not measured ({profile.energy_note})"]
    rows = [["energy of an inference, less idle", "median", "least, most", "idle", "at work", "inferences", "time"]]
    rows += [_energy(name, rail) for name, arm in profile.arms.items() for rail in arm.energy]
    return ["", *columns(rows, [False] + [True] * 6)]


def _energy(arm: str, rail: RailEnergy) -> list[str]:
    return [
        f"{arm} on {rail.rail} ({rail.source})",
        joules(rail.joules),
        f"{joules(rail.low)}, {joules(rail.high)}",
        f"{median([run.idle_watts for run in rail.runs]):.2f} W",
        f"{median([run.watts for run in rail.runs]):.2f} W",
        f"{sum(run.inferences for run in rail.runs):,}",
        f"{sum(run.seconds for run in rail.runs):.0f} s",
    ]


def _refusals(profile: Profile) -> list[str]:
    if not times_count(profile):
        return []
    lines = []
    for name, arm in profile.arms.items():
        for q, value in ((90, arm.latency.p90_ns), (99, arm.latency.p99_ns)):
            if value is None:
                lines.append(f"{name}: {refusal(q, arm.latency.n)}")
    return lines


def _host(profile: Profile) -> str:
    host = profile.environment
    told = {what: before for what, (before, _) in machine_told(profile).items()}
    isa = [flag for flag in host.isa if flag not in ("sse4_1", "sse4_2", "avx", "f16c")]
    caps = {**host.caps, **profile.caps}
    parts = [
        host.board or host.cpu_model or host.machine,
        f"{host.cores_usable} of {host.cores} cores",
        " ".join(isa),
        host.virtual,
        f"governor {told['governor']}",
        f"power mode {told['power mode']}" if "power mode" in told else "",
        f"clocks held: {told['clocks held']} (jetson_clocks)" if "clocks held" in told else "",
        "caps " + " ".join(f"{k}={v}" for k, v in sorted(caps.items())) if caps else "no caps",
        f"Python {host.python}",
    ]
    return ", ".join(part for part in parts if part)
