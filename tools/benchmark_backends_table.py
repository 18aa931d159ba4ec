"""The tables of `benchmark_backends.py`: a long one with every cell, a short one for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import ratio, table
from rowcol_edge.device import stats
from rowcol_edge.device.verdicts import WIDE_SPREAD

_EXPLAINED = """\
Latency is that of one inference at batch 1. A ratio below 1 is faster, with its 95 % interval. Quality: the value on
the test split and its drop to the dense PyTorch model; fidelity: the mean cosine of the outputs with those of the
dense PyTorch model. Files of other makers are in italics."""


def long_table(result: Mapping[str, Any]) -> str:
    """Every cell of every session, as markdown."""
    parts = [
        "# Every runtime and precision",
        _foot(result),
        _EXPLAINED,
    ]
    for session in result["sessions"]:
        model = result["models"][session["model"]]
        parts.append(f"## {model['title']}, {session['setting']}")
        parts.append(
            f"{session['runtime']} {session['runtime_version']}, {session['threads']} threads{_settings(session)}, "
            f"evidence **{session['evidence']}**; {model['source']}. Null arm: {ratio(session['null'])}."
        )
        parts.append(table(_HEADS, [_row(cell) for cell in session["cells"]]))
        parts += [
            f"- *{cell['name']}* is {cell['beats_ours']}: {cell['remark']}"
            for cell in session["cells"]
            if cell.get("beats_ours")
        ]
        parts += [f"- not built: {cell['name']}: {cell['error']}" for cell in session["cells"] if cell["error"]]
        parts += [f"- the profiler says: {warning}" for warning in session["warnings"]]
    return "\n\n".join(parts) + "\n"


def short_table(result: Mapping[str, Any]) -> str:
    """One row a session: the dense original, the fastest of ours that keeps the drop, the fastest of the others."""
    heads = ["model, runtime", "dense@fp32", "ours", "today's way", "ours / today's [95 %]", "evidence"]
    rows, beaten = [], []
    for session in result["sessions"]:
        cells = {cell["name"]: cell for cell in session["cells"] if not cell["error"]}
        made = [c for c in cells.values() if not c["peer"]]
        held = _held(made)
        ours = min(held or made, key=lambda c: c["median_ns"])
        peers = [c for c in cells.values() if c["peer"]]
        peer = min(peers, key=lambda c: c["median_ns"], default=None)
        rows.append(
            [
                f"{result['models'][session['model']]['title']}, {session['setting']}",
                _short(cells.get("dense@fp32")),
                _short(ours, named=True) + ("" if held else ", over the budget"),
                _short(peer, named=True),
                ratio(ours["to_peer"]) + ("" if peer is None or not (_wide(ours) or _wide(peer)) else " †"),
                session["evidence"],
            ]
        )
        beaten += [(session, cell) for cell in peers if cell.get("beats_ours")]
    notes = [f"- {s['model']}, {s['setting']}: *{c['name']}* is {c['beats_ours']}: {c['remark']}" for s, c in beaten]
    details = [
        "<details><summary>Where today's way is ahead of ours, and why</summary>",
        "\n".join(notes),
        "</details>",
    ]
    every = "Every cell: [tools/results/backends.md](tools/results/backends.md)."
    dagger = (
        [f"† Processes of the same file differ by more than {WIDE_SPREAD:.0%}: the ratio is that of a typical round."]
        if any("†" in row[4] for row in rows)
        else []
    )
    return "\n\n".join([table(heads, rows), *dagger, *(details if notes else []), f"{_foot(result)} {every}"])


_HEADS = [
    "file", "parameters", "bytes", "quality (test)", "drop [95 %]; flips", "fidelity", "median", "p90",
    "ratio to dense, same precision", "ratio to the best peer", "peak memory",
]  # fmt: skip


def _row(cell: Mapping[str, Any]) -> list[str]:
    name = f"*{cell['name']}*" if cell["peer"] else f"`{cell['name']}`"
    if cell["error"]:
        return [name, *["–"] * (len(_HEADS) - 1)]
    quality, fidelity = cell["quality"], cell["fidelity"]
    return [
        name,
        f"{cell['parameters'] / 1e6:.2f} M",
        f"{cell['size_bytes'] / 1e6:.2f} MB",
        f"{quality['value'] * 100:.2f} % {quality['metric'].replace('_', ' ')}" if quality else "–",
        _drop(quality),
        f"{fidelity['cosine']:.4f}" if fidelity else "–",
        _ms(cell["median_ns"]),
        _ms(cell["p90_ns"]),
        ratio(cell["to_dense"]),
        ratio(cell["to_peer"]) if not cell["peer"] else _to_ours(cell["to_ours"]),
        f"{cell['peak_bytes'] / 2**20:.0f} MiB",
    ]


def _to_ours(found: Mapping[str, Any] | None) -> str:
    return f"to `{found['baseline']}`: {ratio(found)}" if found else ratio(found)


def _settings(session: Mapping[str, Any]) -> str:
    """The runtime's own settings, the same for every file: openvino's inference precision is one."""
    return "".join(f", {name}={value}" for name, value in session["properties"].items())


def _wide(cell: Mapping[str, Any]) -> bool:
    return stats.spread(cell["block_medians_ns"]) > WIDE_SPREAD


def _held(cells: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Those whose drop on the selection split is within half a point or was not judged."""
    return [c for c in cells if c["selection_drop_pp"] is None or c["selection_drop_pp"] <= 0.5 + 1e-9]


def _short(cell: Mapping[str, Any] | None, *, named: bool = False) -> str:
    if cell is None:
        return "–"
    name = f"{'*' if cell['peer'] else '`'}{cell['name']}{'*' if cell['peer'] else '`'} " if named else ""
    drop = f", {cell['quality']['drop_pp']:+.2f} pp" if cell["quality"] and named else ""
    return f"{name}{_ms(cell['median_ns'])}, {cell['size_bytes'] / 1e6:.2f} MB{drop}"


def _drop(quality: Mapping[str, Any]) -> str:
    if "drop_pp" not in quality:
        return "–"
    text = f"{quality['drop_pp']:+.2f} pp [{quality['ci_low_pp']:+.2f}, {quality['ci_high_pp']:+.2f}]"
    return f"{text}; {quality['flips']} of {quality['n']}" if "flips" in quality else text


def _ms(ns: float | None) -> str:
    return "–" if ns is None else f"{ns / 1e6:.2f} ms"


def _foot(result: Mapping[str, Any]) -> str:
    machine, cost = result["machine"], result["build"]
    rounds = {len(c["block_medians_ns"]) for s in result["sessions"] for c in s["cells"] if not c["error"]}
    text = (
        f"{machine['cpu_model']}, {machine['cores_usable']} cores, {' or '.join(map(str, sorted(rounds)))} rounds of "
        f"every file. Command: `{result['command']}`."
    )
    if cost:
        first, second = cost["first"], cost["second"]
        again = sorted(second["by_command"].values())
        text += (
            f" A full build of ResNet-50 for {', '.join(cost['runtimes'])} (fp32 and int8, all arms, within "
            f"`params<=0.5x`, no labelled data to judge on) takes {first['seconds']:.0f} s in "
            f"{len(first['by_command'])} commands, and {first['peak_bytes'] / 2**30:.1f} GiB at its peak; the second "
            f"time {second['seconds']:.0f} s, {again[0]:.0f} to {again[-1]:.0f} s a command."
        )
    return text
