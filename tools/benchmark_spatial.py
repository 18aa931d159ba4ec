"""What a search among spatial splits too would gain: plans with and without them, of networks with k×k kernels.

    python tools/benchmark_spatial.py                          # writes tools/results/spatial.json, a quarter of an hour

`rowcol-edge` applies spatial splits where a plan names them and does not search them. Here both orders (k×1 first, 1×k
first) are options of the allocation at every rank, at the loss that `rowcol_edge.factoring.latents` predicts for them;
all else is *ours* of `benchmark_factoring.py`. Judged on the test split, without fine-tuning: of a classifier the
Kullback–Leibler divergence from the dense model's answers in nats, else half the squared relative error about the
mean. `ratio` is that with spatial splits over that without, with the 95 % interval of a bootstrap over samples.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import factoring_rivals as rivals
from benchmark_factoring import SHARES
from benchmark_machine import machine
from markdown_table import interval
from rowcol_edge import config, job
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import ranks
from rowcol_edge.factoring.allocation import Allocator, Widths
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.latents import spatial_losses
from rowcol_edge.factoring.options import Option, Options, Spectrum
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study, study
from rowcol_edge.report.progress import reporter

SAMPLES = ("elpv-resnet18", "elpv-scratch-unet")
_RESULTS = Path(__file__).parent / "results" / "spatial.json"
_JUDGES = 128  # calibration samples; every other of them is judged on
_RESAMPLES = 1000

Losses = Mapping[bool, Mapping[str, np.ndarray]]  # across first or not, layer → by rank


class WithSpatial(Options):
    """Options of the package, and spatial splits with no more parameters than a layer's dearest column split."""

    def __init__(self, outputs: Mapping[str, Spectrum], inputs: Mapping[str, Spectrum], losses: Losses) -> None:
        super().__init__(outputs, inputs)
        self._spatial = losses

    def of(self, info: LayerInfo, count: int | None = None) -> list[Option]:
        found = super().of(info, count)
        if len(found) < 2:
            return found
        rest, most = info.out_features, info.split_parameters(Split(Form.COLUMN, info.break_even))
        for across, losses in self._spatial.items():
            if info.name not in losses:
                continue
            each = info.split_parameters(Split(Form.SPATIAL, 1, across_first=across)) - rest
            largest, _ = info.largest(Form.SPATIAL, across_first=across)
            found += [
                Option(Split(Form.SPATIAL, rank, across_first=across), float(losses[info.name][rank]))
                for rank in self._ranks(min((most - rest) // each, largest), count)
            ]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args()
    with reporter() as progress:
        for name in options.samples:
            found = measure(name, progress)
            made = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "source": job.own_source()}
            result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"samples": {}}
            result["samples"][name] = made | {"tools": job.tool_versions()} | found
            options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(table(name, found), flush=True)
    print(f"written to {options.out}")


def measure(name: str, progress: job.Progress) -> dict[str, Any]:
    work = job.prepare(config.make({"model": f"sample:{name}"}), progress=progress)
    assert work.test is not None
    batches, classify = list(work.test.batches()), work.contract == "classify"
    started = time.monotonic()
    known = study(work.model.module, work.calibration, classify=classify, progress=progress)
    spaces, inputs = dict(known.spaces), dict(known.input_spaces)
    took = {"study": time.monotonic() - started}
    started = time.monotonic()
    samples = work.calibration.spread(min(_JUDGES, len(work.calibration)))
    losses = {
        across: spatial_losses(
            known.folded, samples, inputs, spaces, across_first=across, classify=classify, progress=progress
        )
        for across in (False, True)
    }
    took["spatial"] = time.monotonic() - started

    def outputs(plan: FactorPlan | None) -> np.ndarray:
        run = torch_run(known.dense if plan is None else factored(known, replace(plan, refit=True)))
        return np.concatenate([np.asarray(next(iter(run(batch).values())), np.float64) for batch in batches])

    reference, rows = outputs(None), []
    cells = [(axis, share) for axis in rivals.COSTS for share in SHARES]
    for done, (axis, share) in enumerate(cells):
        progress("plans", done, len(cells))
        plans = {
            "without": _plan(known, Options(spaces, inputs), axis, share),
            "with": _plan(known, WithSpatial(spaces, inputs, losses), axis, share),
        }
        each = {key: divergences(outputs(plan), reference, classify=classify) for key, plan in plans.items()}
        row: dict[str, Any] = {"axis": axis, "share": share, "ratio": _ratio(each["with"], each["without"])}
        for key, plan in plans.items():
            splits = [str(layer.split) for layer in plan.projected]
            row[key] = {
                "predicted": plan.loss, "loss": float(each[key].mean()),
                "layers": {split: splits.count(split) for split in dict.fromkeys(splits)},
            }  # fmt: skip
        rows.append(row)
    return {"classify": classify, "test": len(reference), "seconds": took, "rows": rows}


def _plan(known: Study, options: Options, axis: str, share: float) -> FactorPlan:
    cost = rivals.COSTS[axis]
    total = sum(cost(known.infos[name], None) for name in known.spaces)
    widths = {name: space.losses for name, space in known.channel_spaces.items()}
    allocator = Allocator(Widths(known.infos, known.channels), options, widths) if widths else None
    assert allocator is not None, "without one, plans are made of the package's own options"
    return ranks.plan_by_cost(
        known.infos, known.spaces, cost, total=total, limit=share * total, made_by=f"{axis}<={share:g}",
        allocator=allocator, inputs=known.input_spaces,
    )  # fmt: skip


def divergences(got: np.ndarray, reference: np.ndarray, *, classify: bool) -> np.ndarray:
    """(samples,)"""
    if classify:
        logs, given = (x - x.max(1, keepdims=True) for x in (got, reference))
        logs, given = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logs, given))
        return np.asarray((np.exp(given) * (given - logs)).sum(1))
    axes = tuple(range(1, got.ndim))
    spread = np.square(reference - reference.mean(0)).sum(axes).mean()
    return np.asarray(0.5 * np.square(got - reference).sum(axes) / spread)


def _ratio(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    random = np.random.default_rng(0)
    picks = random.integers(len(one), size=(_RESAMPLES, len(one)))
    low, high = np.quantile(one[picks].mean(1) / other[picks].mean(1), [0.025, 0.975])
    return {"ratio": float(one.mean() / other.mean()), "ci_low": float(low), "ci_high": float(high)}


def table(name: str, found: dict[str, Any]) -> str:
    took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in found["seconds"].items())
    lines = [f"{name}: {found['test']} test samples; {took}"]
    for row in found["rows"]:
        without, given = row["without"], row["with"]
        lines.append(
            f"  {row['share']:.0%} of the {row['axis']}: {without['loss']:.2e} → {given['loss']:.2e}, "
            f"{interval(row['ratio'])}, predicted {without['predicted']:.2e} → {given['predicted']:.2e}; "
            f"{given['layers'].get('spatial', 0)} of {sum(given['layers'].values())} splits spatial"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
