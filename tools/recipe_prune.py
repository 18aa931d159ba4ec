"""Prune, factor, distil: what each step does to the parameters, the MACs and the quality of a sample.

    python -m pip install 'rowcol-edge[build,prune]'
    python tools/recipe_prune.py            # writes tools/results/recipe_prune.json

Pruning is Torch-Pruning's: half of the hidden units of every block's MLP, by the norm of their weights, untrained.
What it leaves is factored like any other model, and what factoring leaves is distilled from the dense original. Nothing
needs a label but the figures: choices are made on the selection split, and test is judged once, at the end. The last
rows need more images than the sample ships (Debian's dataset-fashion-mnist) and are left out without them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmark_machine import machine
from rowcol_edge import config, evaluation, job, limits, search, targets
from rowcol_edge.calling import bind, feed
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import DataError
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import apply
from rowcol_edge.factoring.recover import Recovered, recover
from rowcol_edge.factoring.study import Study, study
from rowcol_edge.report.progress import reporter
from rowcol_edge.samples import load

RESULTS = Path(__file__).parent / "results"
SAMPLE, TARGET = "fmnist-vit", "generic-x86"
_BATCHES = 128  # of 64 images from the training split


@dataclass(frozen=True, slots=True)
class Step:
    """A model on the way, with what it costs."""

    name: str
    module: nn.Module
    parameters: int
    macs: int
    recovered: Recovered | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the hidden units that is pruned")
    parser.add_argument("--share", type=float, default=0.2, help="of the dense parameters that factoring leaves")
    parser.add_argument("--epochs", type=int, default=10, help="on the calibration split")
    parser.add_argument("--more-epochs", type=int, default=3, help="on the unlabelled images besides")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipe_prune.json")
    options = parser.parse_args()
    started = time.monotonic()
    with reporter() as progress:
        work = job.prepare(config.make({"model": f"sample:{SAMPLE}"}), progress=progress)
        steps, more = walked(work, options, progress)
        rows = scored(work, steps, progress)
    result = {
        "command": shlex.join(["python", "tools/recipe_prune.py", *said(options, parser)]),
        "machine": machine(),
        "tools": job.tool_versions() | {"torch-pruning": torch_pruning_version()},
        "source": job.own_source(),
        "threads": torch.get_num_threads(),
        "sample": SAMPLE,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "images": {"calibration": len(work.calibration), "more": 0 if more is None else len(more)},
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"written to {options.out}")


def said(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The options that decide the figures, where they are not the defaults."""
    given = {
        name: value for name, value in vars(options).items() if name != "out" and value != parser.get_default(name)
    }
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def walked(work: job.Job, options: argparse.Namespace, progress: job.Progress) -> tuple[list[Step], Split | None]:
    """Every step, and the unlabelled images, if they are there."""
    dense = studied(work.model.module, work, progress)
    limit = int(options.share * dense.parameters)
    pruned = studied(prune(work.model.module, work, options.ratio), work, progress)
    both, alone = (factored(known, limit, progress) for known in (pruned, dense))
    steps = [
        Step("dense", dense.folded, dense.parameters, dense.macs),
        Step("pruned", pruned.folded, pruned.parameters, pruned.macs),
        Step("pruned, factored", *both),
    ]
    judge = selection_judge(work, progress)

    def distilled(name: str, made: tuple[nn.Module, int, int], data: Split, epochs: int) -> Step:
        found = recover(made[0], dense.folded, data, judge, epochs=epochs, progress=progress)
        return Step(name, found.module, made[1], made[2], found)

    steps.append(distilled("pruned, factored, distilled", both, work.calibration, options.epochs))
    if more := unlabelled(work):
        count = f"distilled on {len(more):,} images"
        steps += [
            distilled(f"pruned, factored, {count}", both, more, options.more_epochs),
            Step("factored", *alone),
            distilled(f"factored, {count}", alone, more, options.more_epochs),
        ]
    return steps, more


def prune(model: nn.Module, work: job.Job, ratio: float) -> nn.Module:
    """A copy with fewer hidden units in every MLP; everything else keeps its width."""
    import torch_pruning as tp

    copied = copy.deepcopy(model)
    args, kwargs = bind(copied, feed(copied, work.calibration.example()))
    assert not kwargs  # the sample takes one input
    hidden = [module for name, module in copied.named_modules() if name.endswith(".expand")]
    others = [m for m in copied.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm) and m not in hidden]
    # what follows an ignored layer may be pruned all the same: its inputs are those of the hidden units
    pruner = tp.pruner.BasePruner(
        copied, args, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
        ignored_layers=others, unwrapped_parameters=[(copied.position, 2)], round_to=8,
    )  # fmt: skip
    pruner.step()
    return copied


def torch_pruning_version() -> str:
    from importlib.metadata import version

    return version("torch-pruning")


def studied(module: nn.Module, work: job.Job, progress: job.Progress) -> Study:
    return study(module, work.calibration, classify=True, progress=progress)


def factored(known: Study, most: int, progress: job.Progress) -> tuple[nn.Module, int, int]:
    """The module within a number of parameters, as a build makes it, and what it costs."""
    limit = limits.of_parameters(known, most, f"params<={most}")
    plan = search.within(known, [limit], targets.load(TARGET).rank_multiple, SAMPLE)
    module = apply.factored(known, replace(plan, refit=True), progress)
    return module, known.parameters - plan.saved_parameters, known.macs - plan.saved_macs


def unlabelled(work: job.Job) -> Split | None:
    """Images of the training split without their labels; None where the sample cannot read them."""
    from rowcol_edge import user_code

    batches: Callable[[], Iterator[Any]] = user_code.resolve(f"{load(SAMPLE).data}:train", DataError, "data")
    name = work.model.inputs[0]

    def source() -> Iterator[Any]:
        for _, (images, _labels) in zip(range(_BATCHES), batches(), strict=False):
            yield {name: images}, None

    try:
        return scan(Split("recovery", f"sample:{SAMPLE} train", source))
    except DataError as e:
        print(f"without more images: {e}", file=sys.stderr)
        return None


def selection_judge(work: job.Job, progress: job.Progress) -> Callable[[nn.Module, str], float]:
    assert work.selection is not None
    selection = work.selection

    def judge(module: nn.Module, label: str) -> float:
        predictions = evaluation.predict(torch_run(module), selection, work, progress, label)
        return evaluation.judge_selection(predictions, work).value

    return judge


def scored(work: job.Job, steps: list[Step], progress: job.Progress) -> list[dict[str, Any]]:
    """The figures of each step; the only time that the test split is judged."""
    found: dict[str, dict[str, evaluation.Judged]] = {}
    for split in (work.selection, work.test):
        assert split is not None
        for step in steps:
            predict = functools.partial(evaluation.predict, torch_run(step.module), split, work, progress)
            judged = evaluation.judge(predict(f"judge {step.name} on {split.name}"), work, None)
            found.setdefault(step.name, {})[split.name] = judged
    rows = []
    for step in steps:
        quality = {
            name: evaluation.quality_record(work, judged, found["dense"][name])
            for name, judged in found[step.name].items()
        }
        row = {"step": step.name, "parameters": step.parameters, "macs": step.macs, "quality": quality}
        if step.recovered is not None:
            row["recovered"] = {
                "best_epoch": step.recovered.best_epoch,
                "learning_rate": step.recovered.learning_rate,
                "stopped": step.recovered.stopped,
                "history": [asdict(epoch) for epoch in step.recovered.history],
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'step':<50} {'parameters':>10} {'MACs':>12} {'selection':>9} {'test':>7}"]
    for row in rows:
        quality = row["quality"]
        lines.append(
            f"{row['step']:<50} {row['parameters']:>10,} {row['macs']:>12,} "
            f"{quality['selection']['value']:>9.4f} {quality['test']['value']:>7.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
