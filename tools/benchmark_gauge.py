"""Measure gauges between factors at int8: what a split leaves, others for all layers, and one chosen for each.

    python tools/benchmark_gauge.py            # writes tools/results/gauge.json and prints a table

What the file holds of samples that were not asked for stays in it.

Every arm of a plan is the same factored model to float rounding (see `rowcol_edge.factoring.gauge`), so that all that
tells them apart is what int8 makes of them: `kl` (nats) and `error` (‖int8 − fp32‖ / ‖fp32‖ of the logits) are against
the fp32 factored model on the selection split, `value` is the sample's metric there. `simulated` is the mean over the
layers of the relative squared error that a gauge is chosen by, on calibration inputs. `alone` are the KL that each
factored layer brings about when it alone is in (simulated) int8, on selection inputs: what one file shows of one gauge
is partly chance, as the errors of all layers, most of them outside of the factors, meet in a few logits.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmark_gauge_table import table
from benchmark_machine import machine
from int8_files import RUNTIMES, TARGET, compiled, logits, scores
from rowcol_edge import arms, calling, config, evaluation, job, limits, search, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.datasets import Feeds
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import apply
from rowcol_edge.factoring.gauge import Gauge
from rowcol_edge.factoring.settle import GAUGES, SAMPLES, in8bits, quantized, settle_model
from rowcol_edge.factoring.study import Study, study
from rowcol_edge.report.progress import reporter

RESULTS = Path(__file__).parent / "results"
_ALONE = 128  # selection inputs that layers are judged on one by one

ARMS: dict[str, Sequence[Gauge | None]] = {
    "as split": (None,),
    **{f"alpha {alpha:g}": (Gauge(alpha),) for alpha in (0.0, 0.5, 1.0)},
    "alpha 0.5, rotated": (Gauge(0.5, 0),),
    "chosen per layer": GAUGES,
}
"""Gauges that every layer has to choose from."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=["fmnist-vit", "elpv-resnet18"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.35, 0.2, 0.1], help="shares of the parameters")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "gauge.json")
    options = parser.parse_args()
    with reporter() as progress:
        for name in options.samples:
            started = time.monotonic()

            def keep(so_far: dict[str, Any], name: str = name, started: float = started) -> None:
                said = {
                    "command": shlex.join(["python", *sys.argv]),
                    "machine": machine(),
                    "tools": job.tool_versions(),
                    "source": job.own_source(),
                    "seconds": round(time.monotonic() - started),
                }
                written = _written(options.out)  # another of these may have written meanwhile
                written["samples"][name] = said | so_far
                options.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

            measure(name, options.ratios, options.runtimes, options.arms, progress, keep)
            print(table(name, _written(options.out)["samples"][name]))
    print(f"written to {options.out}")


def _written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"samples": {}}
    return found


def measure(
    name: str,
    ratios: Sequence[float],
    runtimes: Sequence[str],
    names_of_arms: Sequence[str],
    progress: job.Progress,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Every arm of every plan in every runtime on one sample; what is known is kept after each plan."""
    work = job.prepare(config.make({"model": f"sample:{name}"}), progress=progress)
    assert work.selection is not None
    studied = study(work.model.module, work.calibration, classify=True, progress=progress)
    dense = evaluation.judge_selection(
        evaluation.predict(torch_run(studied.folded), work.selection, work, progress), work
    )
    result: dict[str, Any] = {
        "selection": len(work.selection),
        "metric": work.metric.name if work.metric else "",
        "dense_value": dense.value,
        "plans": [],
    }
    for ratio in ratios:
        result["plans"].append(_plan(studied, ratio, runtimes, names_of_arms, work, dense, progress))
        keep(result)


def _plan(
    studied: Study,
    ratio: float,
    runtimes: Sequence[str],
    names_of_arms: Sequence[str],
    work: job.Job,
    dense: evaluation.Judged,
    progress: job.Progress,
) -> dict[str, Any]:
    assert work.selection is not None
    limit = limits.of_parameters(studied, int(studied.parameters * ratio), f"params<={ratio}x")
    plan = search.within(studied, [limit], targets.load(TARGET).rank_multiple, work.model.name)
    factored = apply.factored(studied, plan, progress)
    names = [layer.name for layer in plan.projected]
    metrics = apply.metrics(studied, plan)
    reference = evaluation.predict(torch_run(factored), work.selection, work, progress)
    looked_at = work.calibration.spread(SAMPLES)
    rows = []
    with tempfile.TemporaryDirectory(prefix="rowcol-gauge-") as folder:
        for arm in names_of_arms:
            bits = 7 if QuantSpec.for_target("int8", targets.load(TARGET)).reduce_range else 8
            started = time.process_time()
            made, settled = settle_model(
                factored, names, looked_at, gauges=ARMS[arm], metrics=metrics, weight_bits=bits
            )
            shared = {
                "arm": arm,
                "simulated": float(np.mean([entry.error for entry in settled.values()])),
                "seconds": round(time.process_time() - started, 2),
                "chosen": Counter(str(gauge) for entry in settled.values() for gauge in entry.chosen),
                "float_error": scores(logits(torch_run(made), work.selection.batches()), reference.outputs)["error"],
                "alone": _alone(made, names, looked_at, work.selection.spread(_ALONE), bits),
            }
            said = partial(progress, f"{ratio:g}: {arm}")
            for runtime, predictions in _int8(made, runtimes, work, Path(folder), said):
                judged = evaluation.judge_selection(predictions, work, dense)
                found = scores(predictions.outputs, reference.outputs)
                rows.append({"runtime": runtime, **shared, "value": judged.value, **found})
    return {
        "ratio": ratio,
        "parameters": studied.parameters - plan.saved_parameters,
        "splits": Counter(layer.split for layer in plan.projected),
        "fp32_value": evaluation.judge_selection(reference, work, dense).value,
        "rows": rows,
    }


def _alone(model: nn.Module, names: Sequence[str], given: Feeds, judged: Feeds, bits: int) -> dict[str, float]:
    """The KL that each of the layers brings about by itself, its ranges being those on ``given``."""
    found: dict[str, float] = {}
    with torch.no_grad(), calling.evaluating(model):
        bound = [calling.bind(model, calling.feed(model, feeds)) for feeds in (given, judged)]
        reference = model(*bound[1][0], **bound[1][1]).numpy()
        for name in names:
            parts = model.get_submodule(name)
            copy = _Int8(parts, bits)
            model.set_submodule(name, copy)
            model(*bound[0][0], **bound[0][1])
            copy.ranging = False
            found[name] = scores(model(*bound[1][0], **bound[1][1]).numpy(), reference)["kl"]
            model.set_submodule(name, parts)
    return found


class _Int8(nn.Module):
    """A factored layer in simulated int8, what it takes in float."""

    def __init__(self, parts: nn.Module, bits: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(quantized(layer, bits) for layer in parts.children())
        self.edges: list[torch.Tensor] = []
        self.ranging = True

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for place, layer in enumerate(self.parts):
            if place and self.ranging:
                self.edges.append(torch.stack([values.min(), values.max()]))
            values = layer(in8bits(values, self.edges[place - 1]) if place else values)
        return values


def _int8(
    model: nn.Module, runtimes: Sequence[str], work: job.Job, folder: Path, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Any]]:
    """What each runtime's int8 file of the model says on the selection split."""
    assert work.selection is not None
    target = targets.load(TARGET)
    for name, path in compiled(model, runtimes, work.calibration, folder, progress):
        options = arms.runtime_options(target, target.runtime(name))
        with evaluation.opened(path, load_backend(name).host_runtime, options) as run:
            yield name, evaluation.predict(run, work.selection, work)


if __name__ == "__main__":
    main()
