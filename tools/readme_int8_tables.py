"""The README's tables of what factored and tied models weigh, take and lose in each runtime's files."""

from __future__ import annotations

from typing import Any

from benchmark_gauge_table import alone, means
from markdown_table import interval, table


def ties(found: dict[str, Any]) -> str:
    """Files of networks with tied matrices beside the same ones untied."""
    heads = [
        "network, runtime, precision", "tied file", "over its unique parameters", "untied file",
        "time, tied / untied [95 %]", "peak memory, tied, untied", "less memory, of the bytes less",
        "error, tied, untied",
    ]  # fmt: skip
    rows = []
    for row in found["rows"]:
        tied, untied = row["arms"]["tied"], row["arms"]["untied"]
        less, memory = (untied[what] - tied[what] for what in ("size_bytes", "peak_bytes"))
        rows.append(
            [
                f"`{row['model']}`, {row['runtime']}, {row['precision']}",
                f"{tied['size_bytes'] / 1e6:.1f} MB",
                f"{tied['size_ratio']:.3f}",
                f"{untied['size_bytes'] / 1e6:.1f} MB",
                interval(row["latency_ratio"]),
                f"{tied['peak_bytes'] / 2**20:.0f}, {untied['peak_bytes'] / 2**20:.0f} MiB",
                f"{memory / less:.0%}".replace("%", " %"),
                f"{tied['error']:.1e}, {untied['error']:.1e}",
            ]
        )
    evidence = ", ".join(sorted({row["latency_ratio"]["evidence"] for row in found["rows"]}))
    made = dict.fromkeys(f"`{row['command']}`, {_machine(row)}" for row in found["rows"])
    foot = (
        "Batch 1, random weights, files in turns of a tenth of a second or three inferences; the error is that of the "
        "file's outputs against the float network's. Evidence: "
        f"{evidence}. {'; '.join(made)}."
    )
    return "\n\n".join([table(heads, rows), foot])


def forms(found: dict[str, Any]) -> str:
    """What each choice of forms gives as int8 files at one cost, beside the dense int8 file."""
    heads = ["model, plan", "parameters, MACs", "KL at fp32"]
    sessions = [session for model in found["models"].values() for session in model["sessions"]]
    settings = list(dict.fromkeys((session["runtime"], session["cap"]) for session in sessions))
    heads += [f"{runtime}{', ' + cap if cap else ''}: time / dense [95 %]; KL" for runtime, cap in settings]
    rows = []
    for name, model in found["models"].items():
        timed = {(session["runtime"], session["cap"]): session for session in model["sessions"]}
        for row in model["rows"]:
            if row.get("unreachable"):
                rows.append([f"`{name}`, {row['forms']}", *["cannot save so much"] * (len(heads) - 1)])
                continue
            cells = []
            for place in settings:
                if "error" in timed[place]:
                    cells.append("not measured")
                    continue
                ratio, file = timed[place]["ratios"].get(row["forms"]), row["files"][place[0]]
                if row["forms"] in timed[place].get("crashed", ()):
                    time = "crashes"
                else:
                    time = interval(ratio) if ratio else f"{timed[place]['median_ns'][row['forms']] / 1e6:.2f} ms"
                cells.append(f"{time}; {file['kl']:.2g}{_mended(file)}")
            costs = f"{row['parameters'] / 1e6:.2f} M, {row['macs'] / 1e6:.0f} M"
            rows.append([f"`{name}`, {row['forms']}", costs, f"{row['fp32_kl']:.2g}", *cells])
    first = next(iter(found["models"].values()))
    levels = {f"{each['runtime']} {each['cap']}".strip(): each["evidence"] for each in first["sessions"]}
    commands = dict.fromkeys(
        f"`{model['build']['command']}`; `{model['time']['command']}`, {_machine(model['time'])}"
        for model in found["models"].values()
    )
    plans = "The plans of the comparison above"
    if "share" in first:
        plans = (
            f"Plans of at most {first['share']:.0%} of what the layers that can be factored cost "
            "(mean of parameters and MACs)"
        )
    every = [
        file for model in found["models"].values() for row in model["rows"] for file in row.get("files", {}).values()
    ]
    mended = ""
    if any(map(_mended, every)):
        mended = "; *repaired*: channels equalised, biases corrected where the backend can; *in float*: so many layers"
    foot = (
        f"{plans}, second pass, no fine-tuning; KL in nats from the dense float network, on the selection split "
        "(EfficientNet-Lite0: on new crops of the photos that it was calibrated on)"
        f"{mended}. Evidence: "
        f"{', '.join(f'{name} {level}' for name, level in levels.items())}. {_warnings(sessions)} "
        f"{_disturbed(found['models'])}{'; '.join(commands)}."
    )
    return "\n\n".join([table(heads, rows), foot])


def _mended(file: dict[str, Any]) -> str:
    """What a build did to a file that was too far off without."""
    kept = len(file.get("kept_float", ()))
    return f"{', repaired' if file.get('repaired') else ''}{f', {kept} in float' if kept else ''}"


def _warnings(sessions: list[dict[str, Any]]) -> str:
    """In how many of the sessions the profiler says what."""
    told = {
        "processes of the same arm differ": "processes of one arm differ by a tenth and more, which the intervals hold",
        "the warm-up met its bound": "a warm-up met its bound before the median was stable",
    }
    counts = {
        what: sum(any(warning.startswith(begin) for warning in each.get("warnings", ())) for each in sessions)
        for begin, what in told.items()
    }
    measured = sum("null" in each for each in sessions)
    said = ", ".join(f"{what} ({count})" for what, count in counts.items() if count)
    return f"The profiler warns, in so many of {measured} sessions: {said}." if said else ""


def _disturbed(models: dict[str, Any]) -> str:
    """Where the dense file differs from itself, and what is no finding there."""
    said = []
    for name, model in models.items():
        for session in model["sessions"]:
            null = session.get("null")
            if null is not None and not null["ci_low"] <= 1.0 <= null["ci_high"]:
                bound = max(null["ci_high"], 1.0 / null["ci_low"])
                where = f"`{name}`, {session['runtime']}{', ' + session['cap'] if session['cap'] else ''}"
                said.append(f"{where}: ratios of {1.0 / bound:.2f} to {bound:.2f}")
    return f"No findings, as the dense file differs from itself: {'; '.join(said)}. " if said else ""


def depthwise(found: dict[str, Any]) -> str:
    """How long depthwise convolutions take for each channel, by their width."""
    widths = list(found["rows"][0]["widths"])
    rows = [
        [
            f"{row['runtime']}, {row['precision']}, {row['kernel']}×{row['kernel']}",
            *(f"{row['widths'][width]['per_channel']:.2f}" for width in widths),
            f"{row['null']['ci_low']:.2f} to {row['null']['ci_high']:.2f}",
        ]
        for row in found["rows"]
    ]
    heads = ["runtime", *(f"{width} channels" for width in widths), "128, against itself [95 %]"]
    evidence = ", ".join(sorted({row["evidence"] for row in found["rows"]}))
    foot = (
        f"Time for each channel beside that at 128 channels: {found['layers']} depthwise convolutions in a row over "
        f"{found['size']}×{found['size']} pixels. Evidence: {evidence}. {_warnings(found['rows'])} "
        f"`{found['command']}`, {_machine(found)}."
    )
    return "\n\n".join([table(heads, rows), foot])


def gauges(found: dict[str, Any]) -> str:
    """What int8 makes of factored models in each gauge."""
    rows, runtimes = [], list(dict.fromkeys(
        row["runtime"] for sample in found["samples"].values() for plan in sample["plans"] for row in plan["rows"]
    ))  # fmt: skip
    for name, sample in found["samples"].items():
        kls, errors = means(sample, "kl"), means(sample, "error")
        names = list(dict.fromkeys(arm for arm, _ in kls))
        for arm in names:
            cells = [
                f"{1000 * kls[arm, each]:.3f}, {100 * errors[arm, each]:.1f} %" if (arm, each) in kls else "–"
                for each in runtimes
            ]
            rows.append([f"`{name}`, {arm}", *cells, f"{alone(sample, arm, names[0]):.2f}"])
    heads = ["sample, gauge", *(f"{each}: KL, error" for each in runtimes), "KL of layers alone, to the first row"]
    of = "; ".join(
        f"`{name}` at {', '.join(format(plan['ratio'], '.0%') for plan in sample['plans'])} of its parameters, "
        f"`{sample['command']}`, {_machine(sample)}"
        for name, sample in found["samples"].items()
    )
    foot = (
        "int8 files of projected plans against the same factored model at fp32, selection split, geometric means over "
        f"the plans; KL in thousandths of a nat. {of}."
    )
    return "\n\n".join([table(heads, rows), foot])


def _machine(found: dict[str, Any]) -> str:
    cores = found["machine"]["cores_usable"]
    return f"{found['machine']['cpu_model']}, {cores} core{'s' if cores > 1 else ''}"
