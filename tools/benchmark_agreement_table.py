"""The README's table of tools/results/agreement.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import table

LIMIT = 0.02
"""What the medians may differ by."""
_OURS, _LOOP, _INSIDE = "profiler", "plain loop", "invocation in the loop"


def agreement(found: Mapping[str, Any]) -> str:
    """Our median beside that of the runtime's own tool and of a plain loop, as ratios with their intervals."""
    heads = ["artifact, runtime", "profiler", "the runtime's tool", "profiler / tool [95 %]", "plain loop",
             "profiler / loop [95 %]", "the invocation in it", "tool / invocation"]  # fmt: skip
    rows = []
    for row in found["rows"]:
        tool = next((name for name in row["against"] if name != _LOOP), None)
        rows.append([
            _title(row), _median(row, _OURS),
            "–" if tool is None else f"{_median(row, tool)} (`{tool}`)", _ratio(row, tool),
            _median(row, _LOOP), _ratio(row, _LOOP), *_inside(row, tool),
        ])  # fmt: skip
    versions = [f"{name} {found['tools'][name]}" for name in _PACKAGES if found["tools"].get(name)]
    rounded = " The tools state two decimals of a ms." if any(len(row["against"]) > 1 for row in found["rows"]) else ""
    foot = (
        f"`{found['sample']}`, {found['threads']} threads of {found['machine']['cpu_model']}; medians over "
        f"{found['rounds']} rounds, in which all take turns, each in a process of its own. "
        "A ratio is the median of the rounds' paired ratios: where rounds differ "
        f"more than those who measure, it may point the other way than the two medians.{rounded} Versions: "
        f"{', '.join(versions)}. "
        f"Command: `{found['command']}`."
    )
    head = "The profiler beside the runtimes' own benchmarks and a plain loop over their Python calls, same files:"
    return "\n\n".join([head, table(heads, rows), verdict(found["rows"]), foot])


_PACKAGES = ("onnxruntime", "openvino", "ai-edge-litert")


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many agree, and what is known of those that do not."""
    pairs = [(row, name, each) for row in rows for name, each in row["against"].items() if _stands(row, name)]
    beyond = [(row, name, each) for row, name, each in pairs if abs(each["ratio"] - 1) > LIMIT]
    whose = "the runtime's own tool (of the loop for onnxruntime, whose tool no package brings)"
    said = [f"Within {LIMIT:.0%} of {whose}: {len(pairs) - len(beyond)} of {len(pairs)}."]
    wide = [
        _title(row)
        for row, _, each in pairs
        if abs(each["ratio"] - 1) <= LIMIT and not 1 - LIMIT <= each["ci_low"] <= each["ci_high"] <= 1 + LIMIT
    ]
    if wide:
        said.append(f"Of these the interval reaches beyond it for {', '.join(wide)}.")
    near = [_title(row) for row, _, each in beyond if each["ci_low"] <= 1 + LIMIT and each["ci_high"] >= 1 - LIMIT]
    if near:
        said.append(f"Of the others the interval reaches below it for {', '.join(near)}: not told to be beyond.")
    said += [_difference(row, name) for row, name, _ in beyond]
    return " ".join(said)


def _title(row: Mapping[str, Any]) -> str:
    return f"`{row['arm']}`, {row['runtime']}"


def _difference(row: Mapping[str, Any], name: str) -> str:
    """What the measured numbers of a row show, in either direction."""
    found = f"`{row['arm']}` on {row['runtime']} takes {_longer(row['against'][name])} against {_called(name)}"
    if name == _LOOP:
        return f"{found}."
    pairs = list(zip(row["medians_ns"][_LOOP], row["medians_ns"][name], strict=True))
    loop = {
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        "longer_ns": statistics.median(ours - theirs for ours, theirs in pairs),
    }
    found += f" and {_longer(row['against'][_LOOP])} against the plain loop, which takes {_longer(loop)} against {name}"
    if abs(row["against"][_LOOP]["ratio"] - 1) <= LIMIT:
        found += ": the loop agrees with the profiler."
    elif abs(loop["ratio"] - 1) <= LIMIT:
        found += f": the loop agrees with {name}."
    else:
        found += ": the loop agrees with neither."
    if _INSIDE not in row["medians_ns"]:
        return found
    pairs = list(zip(row["medians_ns"][_LOOP], row["medians_ns"][_INSIDE], strict=True))
    around = statistics.median(whole - own for whole, own in pairs) / 1e3
    return f"{found} Of the loop {around:.0f} µs are around the invocation, which {name} does not time."


def _inside(row: Mapping[str, Any], tool: str | None) -> tuple[str, str]:
    """The median of the invocation alone, in the loop's processes, and the tool's over it."""
    if tool is None or _INSIDE not in row["medians_ns"]:
        return "–", "–"
    pairs = zip(row["medians_ns"][tool], row["medians_ns"][_INSIDE], strict=True)
    return _median(row, _INSIDE), f"{statistics.median(theirs / own for theirs, own in pairs):.3f}"


def _longer(found: Mapping[str, float]) -> str:
    return f"{found['longer_ns'] / 1e3:+.0f} µs ({found['ratio'] - 1:+.1%})"


def _called(name: str) -> str:
    return f"the {name}" if name == _LOOP else name


def _stands(row: Mapping[str, Any], name: str) -> bool:
    """Whether this is what the profiler is held against: the tool, or the loop where there is none."""
    return name != _LOOP or len(row["against"]) == 1


def _median(row: Mapping[str, Any], name: str) -> str:
    return f"{statistics.median(row['medians_ns'][name]) / 1e6:.2f} ms"


def _ratio(row: Mapping[str, Any], name: str | None) -> str:
    if name is None:
        return "–"
    found = row["against"][name]
    return f"{found['ratio']:.3f} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]"
