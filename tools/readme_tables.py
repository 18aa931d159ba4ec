"""Write the tables of README.md from the results they show.

python tools/readme_tables.py            # rewrites README.md
python tools/readme_tables.py --check    # exit code 1 if a table is not that of its result
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import readme_int8_tables as int8
from benchmark_agreement_table import agreement
from benchmark_backends_table import short_table
from markdown_table import ratio, table
from rowcol_edge import targets

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
README = ROOT / "README.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is stale")
    text = README.read_text(encoding="utf-8")
    wanted = rewritten(text)
    if parser.parse_args().check:
        return 0 if wanted == text else 1
    README.write_text(wanted, encoding="utf-8")
    return 0


def rewritten(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"README.md needs exactly one pair of markers table:{name}")
        text = pattern.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def elpv() -> str:
    """The three arms: size, quality, time and memory."""
    result = _result("elpv-generic-x86.json")
    manifest, profile, machine = result["manifest"], result["profile"], result["machine"]
    comparisons = {(c["arm"], c["baseline"]): c for c in profile["comparisons"]}
    rows = []
    for arm in manifest["arms"]:
        name, test, measured = arm["name"], arm["quality"]["test"], profile["arms"][arm["name"]]
        cold, latency, memory = measured["cold"], measured["latency"], measured["memory"]
        rows.append(
            [
                f"`{name}`",
                f"{arm['parameters'] / 1e6:.2f} M",
                f"{arm['size_bytes'] / 1e6:.2f} MB",
                f"{test['value'] * 100:.2f} %",
                _drop(test),
                f"{latency['median_ns'] / 1e6:.2f} ms",
                ratio(comparisons.get((name, f"dense@{arm['precision']}"))),
                ratio(comparisons.get((name, "dense@fp32"))),
                f"{(cold['import_ns'] + cold['load_ns'] + cold['first_ns']) / 1e6:.0f} ms",
                f"{memory['peak_bytes'] / 2**20:.0f} MiB" if memory else "–",
            ]
        )
    heads = [
        "arm", "parameters", "file", f"{manifest['metric'].replace('_', ' ')} (test)",
        "drop to the original [95 %]; flipped decisions", "latency, median", "ratio to dense, same precision [95 %]",
        "ratio to dense@fp32 [95 %]", "cold start", "peak memory",
    ]  # fmt: skip
    head = (
        f"`sample:elpv-resnet18` (ResNet-18, 1×224×224, real solar cells) for `{manifest['target']['name']}`, "
        f"budget {manifest['build']['budget']} on the selection split, no fine-tuning:"
    )
    foot = (
        f"Evidence: **{profile['evidence']}** – {machine['cpu_model']}, {machine['cores_usable']} cores, "
        f"{profile['threads']} threads, ONNX Runtime {profile['runtime_version']}, batch 1. A ratio below 1 is faster. "
        f"Null arm (the same file twice): {ratio(profile['null'])}. Command: `{result['command']}`."
    )
    said = " ".join(f"The profiler says: {warning}." for warning in profile["warnings"])
    return "\n\n".join(part for part in (head, table(heads, rows), foot, said) if part)


def frontier() -> str:
    """How far factoring goes without fine-tuning, on the selection split."""
    result = _result("elpv-generic-x86.json")
    rows = [
        [
            row["plan"],
            f"{row['parameters'] / 1e6:.2f} M ({row['parameters'] / result['frontier'][0]['parameters']:.0%})",
            f"{row['macs'] / 1e6:,.0f} M",
            f"{row['value'] * 100:.2f} %",
            f"{row['drop']:+.2f} pp",
        ]
        for row in result["frontier"]
    ]
    heads = ["plan", "parameters", "MACs", f"{result['manifest']['metric'].replace('_', ' ')}", "drop"]
    dense, missed = result["frontier"][0], [row["drop"] > 0.5 + 1e-9 for row in result["frontier"]]
    least = result["frontier"][missed.index(True) - 1 if any(missed) else -1]
    beyond = result["frontier"][len(missed) - 1 - missed[::-1].index(False)]
    bolder = [miss for miss, row in zip(missed, result["frontier"], strict=True) if row["macs"] < least["macs"]]
    smaller, held = len(bolder), bolder.count(False)
    head = (
        f"How far it goes at fp32 on the selection split, without fine-tuning: within 0.5 pp every plan down to "
        f"**{least['parameters'] / 1e6:.2f} M parameters ({least['parameters'] / dense['parameters']:.0%})** and "
        f"{least['macs'] / 1e6:,.0f} M of {dense['macs'] / 1e6:,.0f} M MACs. Of {smaller} bolder ones {held} "
        f"hold too, the boldest with {beyond['parameters'] / 1e6:.2f} M: on so few images a point and more is chance."
    )
    details = "<details><summary>Every plan of the ladder</summary>"
    return "\n\n".join([head, details, table(heads, rows), "</details>"])


def boards() -> str:
    """The targets, from their TOML files."""
    found = [targets.load(name) for name in targets.available()]
    rows = [
        [
            f"`{target.name}`" if position == 0 else "",
            target.title if position == 0 else "",
            f"{runtime.name} ≥ {runtime.oldest}{_onnx(runtime)}",
            runtime.offered,
            str(target.threads),
        ]
        for target in found
        for position, runtime in enumerate(target.runtimes)
    ]
    return table(["target", "board", "runtime", "precisions", "threads"], rows)


def _onnx(runtime: targets.RuntimeSpec) -> str:
    return "" if runtime.opset is None else f", opset {runtime.opset}, IR {runtime.ir_version}"


def samples() -> str:
    """How good the shipped models are, beside the bar they are held to."""
    scored = _result("samples.json")
    elpv_, fmnist = scored["elpv-resnet18"], scored["fmnist-vit"]
    rows = [
        [
            what,
            *(f"{elpv_[key][split][figure]:.4f}" for split in ("selection", "test") for figure in ("accuracy", "auc")),
        ]
        for what, key in (
            ("logistic probe on frozen EfficientNet-Lite0 features (the bar)", "probe"),
            ("`sample:elpv-resnet18`, threshold 0.5", "student"),
        )
    ]
    heads = ["ELPV", "accuracy, selection", "AUC, selection", "accuracy, test", "AUC, test"]
    line = (
        f"`sample:fmnist-vit`: accuracy {fmnist['test_all_accuracy']:.4f} on all 10,000 test images of Fashion-MNIST, "
    )
    foot = (
        f"{fmnist['test_accuracy']:.4f} on the 400 that are committed. {scored['cpu']}. Command: `{scored['command']}`."
    )
    return table(heads, rows) + f"\n\n{line}{foot}"


def profiler() -> str:
    """What the simulation says of the profiler's intervals, with its own number of rounds and with the fewest."""
    usual, fewest = (_result(f"profiler-simulation{few}.json") for few in ("", "-6"))
    scenarios = usual["scenarios"]
    return (
        f"Profiler, simulated in {len(scenarios)} scenarios of {scenarios[0]['repetitions']:,} sessions with "
        f"{usual['rounds']} rounds each: {_held(scenarios)}. With {fewest['rounds']} rounds, as the runtimes' table "
        f"has them: {_held(fewest['scenarios'])}."
    )


def _held(scenarios: Sequence[dict[str, Any]]) -> str:
    coverage = min(scenarios, key=lambda s: s["coverage"])
    alarms = max(scenarios, key=lambda s: s["null_false_alarms"])
    return (
        f"the nominal 95 % interval covers at least {coverage['coverage']:.1%} ({coverage['scenario']}), the null arm "
        f"alarms falsely in at most {alarms['null_false_alarms']:.1%} ({alarms['scenario']})"
    )


def device() -> str:
    """What the device side costs by itself."""
    found = _result("device.json")
    arms = list(found["runner"].values())

    def span(low: str, high: str, form: str) -> str:
        return f"{min(arm[low] for arm in arms):{form}} to {max(arm[high] for arm in arms):{form}}"

    return (
        f"Device side on {found['machine']['cpu_model']}: start-up {found['start']['own_ms']:.0f} ms over the "
        f"runtime's import; preprocessing, checks and decoding add {span('extra_ms', 'extra_ms', '.3f')} ms to a call "
        f"(medians of the arms; single predictors {span('extra_low_ms', 'extra_high_ms', '.3f')} ms), which is "
        f"{span('extra_at_10_ms', 'extra_at_10_ms', '.2%')} of 10 ms."
    )


def calibration() -> str:
    """How far int8 outputs are off, by how the calibration subset was chosen."""
    found = _result("calibration.json")
    rows = []
    for name, sample in found["samples"].items():
        errors: dict[tuple[str, int], list[float]] = {}
        for row in sample["rows"]:
            errors.setdefault((row["way"], row["samples"]), []).append(row["relative_error"] * 100)
        for size in sorted(size for way, size in errors if way == "k-center"):
            drawn = errors["random", size]
            rows.append(
                [
                    f"`sample:{name}`",
                    f"{size} of {sample['pool']:,}",
                    f"{errors['k-center', size][0]:.2f} %",
                    f"{sum(drawn) / len(drawn):.2f} % [{min(drawn):.2f}, {max(drawn):.2f}]",
                    f"{errors['widest ranges', size][0]:.2f} %",
                    f"{errors['all', sample['pool']][0]:.2f} %",
                ]
            )
    heads = ["", "images", "diverse (ours)", "random, mean of 5 draws [lowest, highest]", "widest ranges", "all"]
    return (
        "Relative error of the dense int8 model's outputs (ONNX Runtime) on the selection split, by how its "
        f"calibration images were chosen:\n\n{table(heads, rows)}\n\n"
        f"{found['machine']['cpu_model']}. Command: `{found['command']}`; every way: "
        "[tools/results/calibration.json](tools/results/calibration.json)."
    )


def backends() -> str:
    """Every model and runtime in one row: the dense original, the best of ours, the best of the runtimes' own ways."""
    return short_table(_result("backends.json"))


def factoring() -> str:
    """Ours beside other ways to factor; where ours is not the nearest to the original, or not the best."""
    found = _result("factoring.json")
    some, every, behind, worse, cells = [], [], [], [], 0
    ahead: dict[str, list[str]] = {"agreement": [], "error": []}
    for model in found["models"].values():
        shown = model["shown"]
        dense = f"{model['title']} ({shown}; dense {model['dense'][shown] * 100:.1f} %)"
        ways = list(dict.fromkeys(row["way"] for row in model["rows"]))
        for axis, share in dict.fromkeys((row["axis"], row["share"]) for row in model["rows"]):
            at = {row["way"]: row for row in model["rows"] if (row["axis"], row["share"]) == (axis, share)}
            what = f"{share:.0%} of the {'MACs' if axis == 'macs' else axis}"
            every.append([model["title"], what, *(_factored(at[way], shown, whole=True) for way in ways)])
            if axis == "parameters" and share in _SHARES:
                some.append([dense, f"{share:.0%}", *(_factored(at[way], shown) for way in ways)])
                dense = ""
            made = {way: row for way, row in at.items() if "kl" in row}
            cells += "ours" in made
            nearest = min(made, key=lambda way: (made[way]["kl"], way != "ours"), default="ours")
            if nearest != "ours":
                ours = f"{made['ours']['kl']:.3g}" if "ours" in made else "not reached"
                behind.append(f"{model['title']} at {what}: {nearest} {made[nearest]['kl']:.3g}, ours {ours}")
            best = max(made, key=lambda way: (made[way][shown], way == "ours"), default="ours")
            if best != "ours" and "ours" in made:
                points = (made[best][shown] - made["ours"][shown]) * 100
                worse.append((points, f"{model['title']} at {what}, {best}"))
            rivals = {way: row for way, row in made.items() if not way.startswith("ours")}
            for measure, where in ahead.items():
                sign = 1 if measure == "error" else -1
                first = min(rivals, key=lambda way: sign * rivals[way][measure])
                if sign * rivals[first][measure] < sign * made["ours"][measure]:
                    both = [f"{100 * row[measure]:.1f}" for row in (rivals[first], made["ours"])]
                    where.append(f"{model['title']} at {what}: {first} {both[0]} %, ours {both[1]} %")
    machines = sorted({model["machine"]["cpu_model"] for model in found["models"].values()})
    measures = {"agreement": "more first classes of the dense model", "error": "less relative error of the logits"}
    lead = f"Of {cells} comparisons (six shares of the parameters and of the MACs of each test) "
    lead += f"ours has the least divergence in {cells - len(behind)}"
    lead += f"; not in: {'; '.join(behind)}. " if behind else ". "
    lead += f"The best quality it has, alone or with others, in {cells - len(worse)}"
    if worse:
        most, where = max(worse)
        points = sorted(each for each, _ in worse)[len(worse) // 2]
        lead += f"; elsewhere it is behind by {points:.1f} pp (median), at most by {most:.1f} pp ({where})"
    lead += f". Beyond chance {_beyond(found)}"
    foot = (
        "Each cell: the quality on the test split and, behind it, the Kullback–Leibler divergence from the dense "
        f"model's answers in nats. {lead}. {', '.join(machines)}. Command: `python tools/benchmark_factoring.py`."
    )
    details = "\n\n".join(
        [
            "<details><summary>Every share, of parameters and of MACs</summary>",
            table(["test", "share", *ways], every),
            "Quality, divergence in nats, relative error of the logits, share of the dense model's first classes kept.",
            *(
                f"One of the four other ways has {what} in {len(where)} of {cells}: {'; '.join(where)}."
                for measure, what in measures.items()
                if (where := ahead[measure])
            ),
            "</details>",
        ]
    )
    return "\n\n".join([table(["model", "share", *ways], some), foot, details])


def _beyond(found: dict[str, Any]) -> str:
    """Where the interval of what another way has more than ours says that it is nearer, or better."""
    places: dict[str, list[str]] = {"kl": [], "quality": []}
    for model in found["models"].values():
        for row in model["rows"]:
            what = f"{row['share']:.0%} of the {'MACs' if row['axis'] == 'macs' else row['axis']}"
            for measure, sign in (("kl", -1), ("quality", 1)):
                bounds = row.get(f"{measure}_beyond_ours", [0.0, 0.0])
                if min(sign * bound for bound in bounds) > 0.0:
                    places[measure].append(f"{model['title']} at {what}, {row['way']}")
    said = [
        f"another way is {what} in {len(where)} places{': ' if where else ''}{'; '.join(where)}"
        for what, where in (("nearer", places["kl"]), ("better", places["quality"]))
    ]
    ahead = {
        way: sum(_ahead(row) for model in found["models"].values() for row in model["rows"] if row["way"] == way)
        for way in ("covariance, by energy", "ours, project only")
    }
    than = ", ".join(f"*{way}* in {count}" for way, count in ahead.items())
    return (
        f"{' and '.join(said)}; ours is better than {than} (95 % intervals of the paired differences by a "
        "bootstrap over samples, of EfficientNet-Lite0 over photos, as crops of one are not independent)"
    )


def _ahead(row: dict[str, Any]) -> bool:
    return max(row.get("quality_beyond_ours", [0.0, 0.0])) < 0.0


def _factored(row: dict[str, Any], shown: str, *, whole: bool = False) -> str:
    if "kl" not in row:
        return "not reached"
    text = f"{row[shown] * 100:.1f} %, {row['kl']:.2g}"
    return f"{text}, {row['error']:.2g}, {row['agreement'] * 100:.1f} %" if whole else text


_SHARES = (0.5, 0.3, 0.15)


def recovered() -> str:
    """What each step of prune, factor, distil costs and gives."""
    found = _result("recipe_prune.json")
    dense = found["rows"][0]
    rows = []
    for row in found["rows"]:
        selection, test = row["quality"]["selection"], row["quality"]["test"]
        rows.append(
            [
                row["step"],
                f"{row['parameters'] / 1e3:,.0f} k ({row['parameters'] / dense['parameters']:.0%})",
                f"{row['macs'] / 1e6:.1f} M",
                f"{selection['value'] * 100:.2f} %",
                f"{test['value'] * 100:.2f} %",
                f"{test['drop_pp']:+.2f} [{test['ci_low_pp']:+.2f}, {test['ci_high_pp']:+.2f}]"
                if row != dense
                else "–",
            ]
        )
    heads = ["step", "parameters", "MACs", "selection", "test", "drop to dense on test, pp [95 %]"]
    metric, images = dense["quality"]["test"]["metric"], found["images"]
    foot = (
        f"`sample:{found['sample']}`, {metric} at fp32 on {dense['quality']['selection']['n']} selection and "
        f"{dense['quality']['test']['n']} test images, *distilled* without labels on the {images['calibration']} "
        f"calibration images unless it says on how many. {found['machine']['cpu_model']}, {found['threads']} thread. "
        f"Command: `{found['command']}`."
    )
    return "\n\n".join([table(heads, rows), foot])


def twins() -> str:
    """Tied twins of the samples beside the dense networks."""
    found = _result("tied_twins.json")
    heads = [
        "sample, start",
        "epochs",
        "parameters",
        "metric",
        "dense, test [95 %]",
        "tied, test [95 %]",
        "drop, pp [95 %]",
    ]
    rows = []
    for name, sample in found["samples"].items():
        for start, arms in sample["starts"].items():
            dense, tied = arms["dense"], arms["tied"]
            for metric, lost in arms["drop_pp"].items():
                shown = [
                    f"{100 * test['value']:.2f} % [{100 * test['ci_low']:.2f}, {100 * test['ci_high']:.2f}]"
                    for test in (dense["test"][metric], tied["test"][metric])
                ]
                rows.append(
                    [
                        f"`sample:{name}`, {start}",
                        str(dense["epochs"]),
                        f"{dense['parameters'] / 1e6:.2f} M → {tied['parameters'] / 1e6:.2f} M",
                        metric.replace("_", " "),
                        *shown,
                        f"{lost['value']:+.2f} [{lost['ci_low']:+.2f}, {lost['ci_high']:+.2f}]",
                    ]
                )
    foot = (
        f"One seed, {found['threads']} thread of {found['machine']['cpu_model']}. Command: `{found['command']}`; with "
        "`--table` also the error of every tie."
    )
    return "\n\n".join([table(heads, rows), foot])


def domains() -> str:
    """Which samples go through which runtime, and what int8 makes of them."""
    found = _result("domains.json")
    heads = ["sample, budget", "runtime", "dense@fp32", "factored@fp32", "dense@int8", "factored@int8"]
    rows = []
    for row in found["rows"]:
        arms, cells = row["arms"], []
        for name in heads[2:]:
            arm = arms.get(name)
            size = "" if arm is None else f"{arm['size_bytes'] / 1e6:.2f} MB"
            cells.append("failed" if arm is None else f"{100 * arm['test']:.1f} %, {size}, {arm['error']:.1e}")
        rows.append([f"`sample:{row['sample']}`, {row['budget']}", row["runtime"], *cells])
    [count] = {row["samples_per_split"] for row in found["rows"]}
    made = dict.fromkeys(f"`{row['command']}`, {row['machine']['cpu_model']}" for row in found["rows"])
    foot = (
        f"Quality on {count} test samples (enough to see that it works, not how well), size of "
        f"the file, relative error of its outputs against the dense PyTorch model's. {'; '.join(made)}."
    )
    return "\n\n".join([table(heads, rows), foot])


def cost() -> str:
    """Time and memory of factoring."""
    found = _result("factoring-cost.json")
    ways = {"once": "without the second pass", "twice": "with it"}
    said = [
        f"{name} {title} {model[way]['seconds']:.0f} s and {model[way]['peak_bytes'] / 2**30:.1f} GiB"
        for name, model in found["models"].items()
        for way, title in ways.items()
    ]
    images = {model["images"] for model in found["models"].values()}
    every = [stage for model in found["models"].values() for stage in model["stages"]]
    beside = [stage for stage in dict.fromkeys(every) if stage.endswith(" beside")]
    apart = [
        "; ".join(
            f"{name} {' and '.join(format(model['stages'][stage]['seconds'], '.1f') for stage in stages)} s"
            for name, model in found["models"].items()
        )
        for stages in (["plans, of which one is taken"], ["allocation"], beside, ["gauges"])
    ]
    limits = " or ".join(f"`{stage.removeprefix('allocation with ').removesuffix(' beside')}`" for stage in beside)
    return (
        f"Factoring to half of the parameters with {' or '.join(map(str, images))} images of 224×224, everything from "
        f"tracing to the rewritten module: {'; '.join(said)}. Of that the two plans, with trying both: {apart[0]}; "
        f"one by itself: {apart[1]}. Not in it: one with {limits} beside ({apart[2]}), and the choice of gauges for "
        f"int8 ({apart[3]}). "
        f"{found['machine']['cpu_model']}, {found['machine']['cores_usable']} cores. Command: `{found['command']}`."
    )


def fleet() -> str:
    """A campaign on 500 boards, simulated; what Dask's part costs, measured."""
    found = _result("fleet-simulation.json")
    rows = [
        [
            "one board of the target" if run["once"] else "every board",
            f"{run['chance_of_a_lost_board']:.0%}, {run['dead_boards']}",
            f"{run['hours']:.2f} h",
            f"{run['boards_at_work']:.0%}",
            f"{run['begun_again']:,}",
            f"{run['not_measured']:,} of {run['jobs']:,}",
        ]
        for run in found["simulated"]
    ]
    first, lengths = found["simulated"][0], found["seconds_of_real_jobs"]
    heads = [
        "each bundle on",
        "chance that a job loses its board, dead boards",
        "takes",
        "boards at work",
        "begun again",
    ]
    text = table([*heads, "not measured"], rows)
    text += (
        f"\n\n{first['boards']} boards, {first['jobs'] // first['boards']} jobs each, simulated with a clock that "
        f"jumps, by the rules and the loop of real campaigns; jobs as long as {len(lengths)} real ones on loopback "
        f"({min(lengths):.0f} to {max(lengths):.0f} s). Without losses and gaps: {first['hours_without_losses']:.2f} h."
    )
    if real := found.get("measured"):
        text += (
            f" Measured with {real['workers']} real Dask workers in one process, whose {real['jobs']:,} jobs of "
            f"{real['seconds_a_job_sleeps']:.0f} s sleep: {real['seconds']:.0f} s instead of "
            f"{real['seconds_without_scheduler']:.0f}, {real['cpu_ms_a_job']:.0f} ms of processor time a job for "
            f"client, scheduler and worker together, {real['peak_mib_of_all']:,} MiB in all (a machine with a load of "
            f"{real['load_average']:.0f} on {found['machine']['cores']} cores)."
        )
    return f"{text} Command: `{found['command']}`."


TABLES: dict[str, Callable[[], str]] = {
    "elpv": elpv,
    "frontier": frontier,
    "targets": boards,
    "samples": samples,
    "profiler": profiler,
    "device": device,
    "calibration": calibration,
    "factoring": factoring,
    "recover": recovered,
    "twins": twins,
    "domains": domains,
    "cost": cost,
    "fleet": fleet,
}
# ten minutes to an hour on a quiet machine; until they were run their place is empty
LONG: dict[str, tuple[str, Callable[[], str]]] = {
    "backends": ("backends.json", backends),
    "ties": ("ties.json", lambda: int8.ties(_result("ties.json"))),
    "forms": ("forms.json", lambda: int8.forms(_result("forms.json"))),
    "factoring-int8": ("factoring-int8.json", lambda: int8.forms(_result("factoring-int8.json"))),
    "depthwise": ("depthwise.json", lambda: int8.depthwise(_result("depthwise.json"))),
    "agreement": ("agreement.json", lambda: agreement(_result("agreement.json"))),
    "gauges": ("gauge.json", lambda: int8.gauges(_result("gauge.json"))),
}
TABLES |= {name: make if (RESULTS / file).is_file() else str for name, (file, make) in LONG.items()}


def _result(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return loaded


def _drop(test: dict[str, Any]) -> str:
    interval = f"[{test['ci_low_pp']:+.2f}, {test['ci_high_pp']:+.2f}]"
    return f"{test['drop_pp']:+.2f} pp {interval}; {test['flips']} of {test['n']}"


if __name__ == "__main__":
    sys.exit(main())
