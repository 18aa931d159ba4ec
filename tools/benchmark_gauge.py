"""Measure the gauge between factors at int8: each one tried for all layers, and the one chosen per layer.

    python tools/benchmark_gauge.py            # writes tools/results/gauge.json and prints a table

What the file holds of samples that were not asked for stays in it.

Every arm is the same factored model to float rounding (see `rowcol_edge.factoring.gauge`), so that all that tells them
apart is what int8 makes of them: `kl` (nats) and `error` (‖int8 − fp32‖ / ‖fp32‖ of the logits) are against the fp32
factored model on the selection split, `value` is the sample's metric there. `simulated` is the mean over the layers of
the relative squared error that a gauge is chosen by, on calibration inputs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmark_machine import machine
from int8_files import RUNTIMES, TARGET, compiled, logits, scores
from rowcol_edge import arms, config, evaluation, job, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import apply, ranks
from rowcol_edge.factoring.gauge import Gauge
from rowcol_edge.factoring.settle import ALPHAS, GAUGES, settle_model
from rowcol_edge.factoring.spaces import LayerSpaces
from rowcol_edge.factoring.study import study
from rowcol_edge.report.progress import reporter

RESULTS = Path(__file__).parent / "results"
_LOOKED_AT = 16  # inputs that gauges are judged on

CENTRED = tuple(Gauge(alpha, centred=True) for alpha in ALPHAS)
ARMS: dict[str, Sequence[Gauge | None]] = {
    **{f"alpha {alpha:g}": (Gauge(alpha),) for alpha in ALPHAS},
    **{f"alpha {alpha:g}, rotated": (Gauge(alpha, 0),) for alpha in (0.0, 0.5, 1.0)},
    "alpha 0.5, rotated, scaled": (Gauge(0.5, 0, 0.5),),
    "alpha 0.5, centred": (Gauge(0.5, centred=True),),
    "chosen per layer": GAUGES,
    "chosen per layer, centred too": (*GAUGES, *CENTRED),
}
"""Gauges that every layer has to choose from."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=["fmnist-vit", "elpv-resnet18"])
    parser.add_argument("--ratio", type=float, default=0.35, help="share of the parameters that the plan may have")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "gauge.json")
    options = parser.parse_args()
    written = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"samples": {}}
    with reporter() as progress:
        for name in options.samples:
            started = time.monotonic()

            def keep(so_far: dict[str, Any], name: str = name, started: float = started) -> None:
                said = {
                    "command": shlex.join(["python", *sys.argv]),
                    "machine": machine(),
                    "tools": job.tool_versions(),
                    "seconds": round(time.monotonic() - started),
                    "ratio": options.ratio,
                }
                written["samples"][name] = said | so_far
                options.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

            measure(name, options.ratio, options.runtimes, options.arms, progress, keep)
            print(table(name, written["samples"][name]))
    print(f"written to {options.out}")


def measure(
    name: str,
    ratio: float,
    runtimes: Sequence[str],
    names_of_arms: Sequence[str],
    progress: job.Progress,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Every arm in every runtime on one sample; what is known is kept after each arm."""
    work = job.prepare(config.make({"model": f"sample:{name}"}), progress=progress)
    assert work.selection is not None
    studied = study(work.model.module, work.calibration, classify=True, progress=progress)
    spaces = dict(studied.spaces)
    plan = ranks.plan_by_parameters(
        studied.infos, spaces, model_parameters=studied.parameters, ratio=ratio, rank_multiple=8, model=name
    )
    factored = apply.apply(studied.folded, plan, spaces)
    names = [layer.name for layer in plan.projected]
    reference = evaluation.predict(torch_run(factored), work.selection, work, progress)
    dense = evaluation.judge_selection(
        evaluation.predict(torch_run(studied.folded), work.selection, work, progress), work
    )
    float_value = evaluation.judge_selection(reference, work, dense).value
    looked_at = work.calibration.spread(_LOOKED_AT)
    metrics = {layer: _metric(spaces[layer]) for layer in names}
    result: dict[str, Any] = {
        "layers": len(names),
        "parameters": studied.parameters - plan.saved_parameters,
        "selection": len(work.selection),
        "metric": work.metric.name if work.metric else "",
        "dense_value": dense.value,
        "fp32_value": float_value,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="rowcol-gauge-") as folder:
        for arm in names_of_arms:
            for bits in sorted({_bits(runtime) for runtime in runtimes}):
                made, settled = settle_model(
                    factored, names, looked_at, gauges=ARMS[arm], metrics=metrics, weight_bits=bits
                )
                shared = {
                    "arm": arm,
                    "weight_bits": bits,
                    "simulated": float(np.mean([entry.error for entry in settled.values()])),
                    "chosen": {layer: str(entry.chosen) for layer, entry in settled.items()},
                    "float_error": scores(logits(torch_run(made), work), reference.outputs)["error"],
                }
                at_bits = [runtime for runtime in runtimes if _bits(runtime) == bits]
                for runtime, predictions in _int8(made, at_bits, work, Path(folder), partial(progress, arm)):
                    judged = evaluation.judge_selection(predictions, work, dense)
                    found = scores(predictions.outputs, reference.outputs)
                    result["rows"].append({"runtime": runtime, **shared, "value": judged.value, **found})
            keep(result)


def _metric(space: LayerSpaces) -> np.ndarray | None:
    """F, which the dual directions are the root of."""
    return None if space.dual is None else np.asarray(space.dual @ space.dual.T)


def _spec(runtime: str) -> QuantSpec:
    return QuantSpec.for_target("int8", targets.load(TARGET))


def _bits(runtime: str) -> int:
    """Of the weights; tflite has 8 everywhere."""
    return 7 if _spec(runtime).reduce_range and runtime != "tflite" else 8


def _int8(
    model: nn.Module, runtimes: Sequence[str], work: job.Job, folder: Path, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Any]]:
    """What each runtime's int8 file of the model says on the selection split."""
    assert work.selection is not None
    target = targets.load(TARGET)
    for name, path in compiled(model, runtimes, work, folder, progress):
        options = arms.runtime_options(target, target.runtime(name))
        with evaluation.opened(path, load_backend(name).host_runtime, options) as run:
            yield name, evaluation.predict(run, work.selection, work)


def table(name: str, found: dict[str, Any]) -> str:
    """A row an arm; of each runtime KL in millinats, relative error and the metric."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in found["rows"]))
    lines = [
        f"{name}: {found['layers']} layers, {found['parameters']:,} parameters",
        f"{found['metric']} dense {100 * found['dense_value']:.2f} %, factored fp32 {100 * found['fp32_value']:.2f} %",
        f"{'':32}" + "".join(f"{runtime + ': KL, error, value':>38}" for runtime in runtimes),
    ]
    for arm in dict.fromkeys(row["arm"] for row in found["rows"]):
        rows = {row["runtime"]: row for row in found["rows"] if row["arm"] == arm}
        cells = [
            f"{1000 * row['kl']:14.3f} {100 * row['error']:9.2f} % {100 * row['value']:9.2f} %"
            for row in (rows[runtime] for runtime in runtimes)
        ]
        lines.append(f"{arm:32}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
