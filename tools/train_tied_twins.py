"""Train the tied twins of both samples beside the dense networks, with equal budgets; a killed run goes on.

    apt-get install dataset-fashion-mnist
    python -m pip install -e '.[build,samples]'
    python tools/train_tied_twins.py --threads 1       # writes tools/results/tied_twins.json

Two starts. *scratch*: both from random weights. *trained*: the dense network from its shipped weights, its twin from
the same weights with each pair tied: matrices by `tie_from_dense`, 3×3 kernels by `tie_kernels_from_dense`. Within a
start both have the same recipe, epochs, pictures, views and order. The budget is small (a subset of the pictures,
reduced resolution, few epochs): the figures compare twins, they are not what either network can reach. The epoch and
the decision threshold are chosen on the selection split, of each network by itself; the test split is judged once, at
the end. Weights are kept in the cache and not shipped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmark_machine import machine
from rowcol_edge import job, quality
from train_common import (
    ROOT,
    Checkpoint,
    Stage,
    arithmetic,
    by_epoch,
    command,
    decay_groups,
    keep_memory,
    rates,
    write_json,
)
from twin_samples import SAMPLES, SETTINGS, Sample, Settings

RESULT = ROOT / "tools" / "results" / "tied_twins.json"
ARMS = ("dense", "tied")
_RESAMPLES = 2000


def begun(sample: Sample, start: str, arm: str, checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any]]:
    """An arm as its training starts, and what there is to say of it; the ties of a killed run are not made again."""
    if stored := checkpoint.load():
        dense = sample.dense("scratch")
        model = dense if arm == "dense" else sample.twin(dense, None)[0]
        model.load_state_dict(stored["state"])
        return sample.laid_out(model), stored["about"]
    model, ties = sample.network(arm, start)
    about: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if start == "trained":
        about["selection_before"] = chosen_by(sample, model)
    if ties:
        about["pairs"] = [
            {"pair": name, "first_error": round(tie.first_error, 4), "second_error": round(tie.second_error, 4)}
            for name, tie in ties.items()
        ]
    checkpoint.save(state=model.state_dict(), about=about)
    return model, about


def chosen_by(sample: Sample, model: nn.Module) -> float:
    """What the epoch is chosen by: the first metric on the selection split, which needs no threshold."""
    return round(quality.metric(sample.metrics[0]).value(sample.predictions(model, "selection"), None), 4)


def train(sample: Sample, start: str, arm: str, cache: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The moving average of the epoch that did best on the selection split, and how it came there."""
    settings, budget, name = sample.settings, sample.settings.budgets[start], f"{sample.name}-{start}-{arm}"
    keep = asdict(replace(settings, budgets={start: budget}))
    model, about = begun(sample, start, arm, Checkpoint(cache / f"{name}-start.pt", keep))
    averaged, sizes = copy.deepcopy(model), by_epoch(budget.phases)
    optimizer = torch.optim.AdamW(decay_groups([model], settings.decay), lr=budget.lr)
    stage = Stage(
        Checkpoint(cache / f"{name}.pt", keep), {"model": model}, optimizer, settings.average, sizes, clip=1.0,
        begun=start == "trained",
    )  # fmt: skip
    steps = sample.count() // settings.batch
    lr = rates(sizes, steps, budget.lr, settings.restart, warmup=max(1, steps // 2))
    for epoch in stage.epochs():
        generator = torch.Generator().manual_seed(1000 * settings.seed + epoch)
        model.train()
        losses = []
        for step, loss in enumerate(sample.losses(model, sizes[epoch], generator), epoch * steps):
            stage.learn(loss, step, lr[step])
            losses.append(loss.item())
        averaged.load_state_dict(stage.average.state)
        stage.text = f"loss {np.mean(losses):.3f}"
        score = chosen_by(sample, averaged)
        stage.judge({"loss": round(float(np.mean(losses)), 4), "selection": score}, score)
    averaged.load_state_dict(stage.best["state"])
    return averaged, about | {"kept_epoch": stage.best["epoch"], **stage.about()}


def compared(sample: Sample, start: str, cache: Path) -> dict[str, Any]:
    """Both arms from one start, trained and judged."""
    found: dict[str, Any] = {}
    arms = {arm: train(sample, start, arm, cache) for arm in ARMS}
    predicted = {
        arm: {split: sample.predictions(model, split) for split in ("selection", "test")}
        for arm, (model, _) in arms.items()
    }
    for arm, (_, about) in arms.items():
        found[arm] = about | {"test": {}}
    found["drop_pp"] = {}
    for metric in map(quality.metric, sample.metrics):
        thresholds = {arm: metric.tune(predicted[arm]["selection"]) for arm in ARMS}
        for arm in ARMS:
            found[arm]["test"][metric.name] = value(metric, predicted[arm]["test"], thresholds[arm])
        dense, tied = (predicted[arm]["test"] for arm in ARMS)
        drop = quality.paired_drop(metric, dense, tied, (thresholds["dense"], thresholds["tied"]))
        found["drop_pp"][metric.name] = {
            "value": round(drop.drop, 3), "ci_low": round(drop.low, 3), "ci_high": round(drop.high, 3)
        }  # fmt: skip
    return found


def value(metric: quality.Metric, predictions: quality.Predictions, threshold: float | None) -> dict[str, float]:
    """With its 95 % interval, by a bootstrap that resamples within classes, as that of the drop does."""
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(predictions.labels == c) for c in np.unique(predictions.labels)]
    drawn = [
        metric.value(predictions.take(np.concatenate([rng.choice(g, size=len(g)) for g in groups])), threshold)
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    got = {"value": metric.value(predictions, threshold), "ci_low": low, "ci_high": high}
    return {name: round(float(figure), 4) for name, figure in got.items()}


def run(settings: dict[str, Settings], cache: Path, out: Path) -> None:
    result: dict[str, Any] = {
        "schema": 1,
        "command": command(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "arithmetic": arithmetic(),
        "tools": job.tool_versions(),
        "source": job.own_source(),
        "samples": {},
    }
    for name, own in settings.items():
        sample = SAMPLES[name](own)
        result["samples"][name] = {
            "weights_sha256": hashlib.sha256((sample.folder / "weights.safetensors").read_bytes()).hexdigest(),
            "images": {"train": sample.count(), **{s: len(sample.split(s)[1]) for s in ("selection", "test")}},
            "settings": asdict(own),
            "starts": {start: compared(sample, start, cache) for start in own.budgets},
        }
        write_json(out, result)
    print(table(result))
    print(f"written to {out}")


def table(result: dict[str, Any]) -> str:
    """In Markdown: both qualities on the test split, and what the tie costs."""
    lines = [
        "| sample, start | epochs | parameters, dense → tied | metric | dense [95 %] | tied [95 %] | drop, pp [95 %] |",
        "| ---|--:|--:|---|--:|--:|--: |",
    ]
    for name, sample in result["samples"].items():
        for start, found in sample["starts"].items():
            dense, tied = (found[arm] for arm in ARMS)
            sizes = f"{dense['parameters']:,} → {tied['parameters']:,} ({tied['parameters'] / dense['parameters']:.0%})"
            for metric, drop in found["drop_pp"].items():
                shown = [
                    f"{100 * f['value']:.2f} % [{100 * f['ci_low']:.2f}, {100 * f['ci_high']:.2f}]"
                    for f in (dense["test"][metric], tied["test"][metric])
                ]
                lost = f"{drop['value']:+.2f} [{drop['ci_low']:+.2f}, {drop['ci_high']:+.2f}]"
                lines.append(
                    f"| {name}, {start} | {dense['epochs']} | {sizes} | {metric} | {' | '.join(shown)} | {lost} |"
                )
    return "\n".join(lines)


def pairs(result: dict[str, Any]) -> str:
    """In Markdown: the errors of each tie, on the pictures it was fitted to."""
    lines = ["| sample | pair | first | second |", "| ---|---|--:|--: |"]
    for name, sample in result["samples"].items():
        lines += [
            f"| {name} | {tie['pair']} | {tie['first_error']:.1%} | {tie['second_error']:.1%} |"
            for tie in sample["starts"]["trained"]["tied"]["pairs"]
        ]
    return "\n".join(lines)


def smoke(settings: Settings) -> Settings:
    """One epoch of a few pictures."""
    budgets = {
        start: replace(budget, phases=((min(size, 32), 1),))
        for start, budget in settings.budgets.items()
        for size, _ in budget.phases[:1]
    }
    return replace(settings, budgets=budgets, images=64, fitted=32, tested=64, batch=16, blocks=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=list(SAMPLES), choices=list(SAMPLES))
    parser.add_argument("--table", action="store_true", help="print the tables of the stored result and stop")
    parser.add_argument("--smoke", action="store_true", help="one epoch of a few pictures, written into the cache")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "tied-twins", help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    options = parser.parse_args()
    if options.table:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
        print(table(result), pairs(result), sep="\n\n")
        return
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: SETTINGS[name] for name in options.samples}
    if options.smoke:
        trial = options.cache / "smoke"
        run({name: smoke(own) for name, own in settings.items()}, trial, trial / RESULT.name)
    else:
        run(settings, options.cache, RESULT)


if __name__ == "__main__":
    main()
