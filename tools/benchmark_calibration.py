"""Measure how the calibration subset is chosen: int8 error on the selection split, k-center against its rivals.

    python tools/benchmark_calibration.py            # writes tools/results/calibration.json

The pool is the calibration split and the first training images. Each subset quantizes the dense model for onnxruntime;
the error is ‖int8 − fp32‖ / ‖fp32‖ of the outputs on the selection split, beside the share of equal answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark_machine import machine
from rowcol_edge import calling, config, coverage, datasets, evaluation, job, targets, user_code
from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.datasets import Split
from rowcol_edge.device.runtimes import RuntimeOptions
from rowcol_edge.export import onnx, simplify
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import fold, graph
from rowcol_edge.features import Observed, Observer
from rowcol_edge.report.progress import reporter

RESULTS = Path(__file__).parent / "results"
SIZES = (16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=["elpv-resnet18", "fmnist-vit"])
    parser.add_argument("--pool", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=5, help="random subsets of each size")
    options = parser.parse_args()
    started = time.monotonic()
    with reporter() as progress:
        rows = {name: measure(name, options.pool, options.draws, progress) for name in options.samples}
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "seconds": round(time.monotonic() - started),
        "samples": rows,
    }
    out = RESULTS / "calibration.json"
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {out}")


def measure(name: str, size: int, draws: int, progress: job.Progress) -> dict[str, Any]:
    """Every way of choosing, at every size, on one sample."""
    work = job.prepare(config.make({"model": f"sample:{name}"}), progress=progress)
    pool = pooled(work, size)
    module, example = work.model.module, work.calibration.example()
    traced = graph.trace(module, calling.feed(module, example))
    folded = fold.fold_batchnorm(module, traced)
    observed = Observer(folded, traced).split(pool, progress)
    target = targets.load("generic-x86")
    runtime = target.runtime("onnxruntime")
    assert work.selection is not None
    wanted = outputs(torch_run(module), work.selection)
    rows = []
    with tempfile.TemporaryDirectory(prefix="rowcol-calibration-") as folder:
        raw, made = Path(folder) / "raw.onnx", Path(folder) / "int8.onnx"
        onnx.export(folded, example, raw, opset=runtime.opset, ir_version=runtime.ir_version, dynamic_batch=True)
        source = simplify.simplify(raw, Path(folder) / "simple.onnx").path
        planned = list(subsets(observed, draws))
        for done, (way, chosen) in enumerate(planned):
            progress(f"quantize {name}", done, len(planned))
            load_backend("onnxruntime").compile(
                source, runtime, QuantSpec.for_target("int8", target), feeds(pool, chosen), made
            )
            with evaluation.opened(made, "onnxruntime", RuntimeOptions(threads=target.threads)) as run:
                got = outputs(run, work.selection)
            rows.append(
                {
                    "way": way,
                    "samples": len(chosen),
                    "relative_error": float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)),
                    "agreement": float((got.argmax(1) == wanted.argmax(1)).mean()),
                }
            )
    return {"pool": len(pool), "selection": len(work.selection), "rows": rows}


def pooled(work: job.Job, size: int) -> Split:
    """The calibration split and as many training images as are missing."""
    sample = work.model.sample
    assert sample is not None
    train = user_code.resolve(f"{sample.data}:train", datasets.DataError, "data")
    name = work.model.inputs[0]

    def source() -> Iterator[tuple[datasets.Feeds, None]]:
        left = size
        for batch in itertools.chain((b[name] for b in work.calibration.batches()), (b[0] for b in train())):
            if left <= 0:
                return
            yield {name: batch[:left]}, None
            left -= len(batch)

    return datasets.scan(Split("pool", f"sample:{sample.name}", source))


def subsets(observed: Observed, draws: int) -> Iterator[tuple[str, Sequence[int]]]:
    """(way, places): the whole pool, and at each size what each way chooses."""
    count = len(observed)
    yield "all", range(count)
    rng = np.random.default_rng(0)
    for size in SIZES:
        center = [int(i) for i in coverage.choose(observed.features, size)]
        yield "k-center", center
        extremes = widest(observed, size)
        yield "widest ranges", extremes
        half = extremes[: size // 2]
        yield (
            "half widest, half k-center",
            sorted({*half, *coverage.choose(observed.features, size - len(half)).tolist()}),
        )
        inner = np.sort(typical(observed, 0.7))
        yield (
            "k-center of the 70 % within usual ranges",
            inner[coverage.choose(observed.features[inner], size)].tolist(),
        )
        for _ in range(draws):
            yield "random", sorted(rng.choice(count, size, replace=False).tolist())


def widest(observed: Observed, size: int) -> list[int]:
    """Greedily the samples that widen the layers' ranges most, as a share of the pool's."""
    span = np.maximum(observed.high.max(0) - observed.low.min(0), 1e-12)
    taken: list[int] = []
    low, high = np.full(len(span), np.inf), np.full(len(span), -np.inf)
    while len(taken) < size:
        reach = ((np.maximum(observed.high, high) - np.minimum(observed.low, low)) / span).sum(1)
        reach[taken] = -1.0
        taken.append(int(reach.argmax()))
        low, high = np.minimum(low, observed.low[taken[-1]]), np.maximum(high, observed.high[taken[-1]])
    return taken


def typical(observed: Observed, share: float) -> Any:
    """Places of the samples whose most unusual range is nearest to the median one."""
    away = [abs(edge - np.median(edge, axis=0)) / (edge.std(axis=0) + 1e-12) for edge in (observed.low, observed.high)]
    return np.argsort(np.maximum(*away).max(axis=1))[: int(share * len(observed))]


def feeds(pool: Split, chosen: Sequence[int]) -> Callable[[], Iterator[datasets.Feeds]]:
    return lambda: pool.only(chosen)


def outputs(run: evaluation.Run, split: Split) -> Any:
    return np.concatenate([next(iter(run(feeds).values())) for feeds in split.batches()])


if __name__ == "__main__":
    main()
