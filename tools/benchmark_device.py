"""What the device side costs by itself: start-up over the runtime's import, and the runner over a bare runtime call.

    python tools/benchmark_device.py BUNDLE      # writes tools/results/device.json

Everything is interleaved: bare and own calls take turns, and so do the processes whose start is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmark_machine import machine
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.predictor import Predictor
from rowcol_edge.device.system import another_machine

RESULT = Path(__file__).parent / "results" / "device.json"
_AT_MS = 10.0

_START = """
import sys, time
a = time.perf_counter()
import numpy, onnxruntime
b = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import rowcol_edge.device.main as main, rowcol_edge.device.predictor, rowcol_edge.device.verify
main._parser()
c = time.perf_counter()
print(b - a, c - b)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--starts", type=int, default=15)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5, help="predictors opened for each arm")
    options = parser.parse_args()
    with Bundle.open(options.bundle) as bundle:
        if wanted := another_machine(bundle.manifest.target, platform.machine()):
            parser.error(f"a bundle for {wanted}: a machine that stands in for it may calculate in float")
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "start": start(bundle.root / "rowcol-edge-device.pyz", options.starts),
            "runner": {
                arm.name: runner(bundle, arm.name, options.calls, options.repeats) for arm in bundle.manifest.arms
            },
        }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: result[k] for k in ("start", "runner")}, indent=1))


def start(archive: Path, count: int) -> dict[str, float]:
    """Medians of fresh isolated processes, in ms."""
    pairs = []
    for _ in range(count):
        done = subprocess.run(
            [sys.executable, "-I", "-c", _START, str(archive)], capture_output=True, text=True, check=True
        )
        pairs.append([float(v) * 1e3 for v in done.stdout.split()])
    runtime, own = zip(*pairs, strict=True)
    return {"runtime_import_ms": statistics.median(runtime), "own_ms": statistics.median(own), "own_max_ms": max(own)}


def runner(bundle: Bundle, arm: str, calls: int, repeats: int) -> dict[str, Any]:
    """A uint8 frame through `Predictor.predict` against the bare session on the finished tensor, taking turns.

    `repeats` predictors, each opened anew; the figures are the medians over their own, with the lowest and the highest.
    """
    found = [_runner(bundle, arm, calls) for _ in range(repeats)]
    extra = sorted(own - bare for bare, own in found)
    return {
        "bare_ms": statistics.median(bare for bare, _ in found),
        "extra_ms": statistics.median(extra),
        "extra_low_ms": extra[0],
        "extra_high_ms": extra[-1],
        "extra_at_10_ms": statistics.median(extra) / _AT_MS,
    }


def _runner(bundle: Bundle, arm: str, calls: int) -> tuple[float, float]:
    """(bare, bare + the median of the paired differences) in ms."""
    with Predictor(bundle, arm=arm) as predictor:
        spec = bundle.manifest.inputs[0]
        assert predictor.preprocess is not None
        recipe = predictor.preprocess
        frame = np.random.default_rng(0).integers(0, 256, (recipe.height, recipe.width, recipe.channels), np.uint8)
        # the very session the runner uses: two of them in one process would wait for each other's threads
        bare = predictor._session._session  # type: ignore[attr-defined]
        feeds = {spec.name: recipe.pixels(frame)[None]}
        names = [output.name for output in bundle.manifest.outputs]
        times: dict[str, list[float]] = {"bare": [], "own": []}
        for i in range(calls + 20):
            for which in ("bare", "own") if i % 2 else ("own", "bare"):
                began = time.perf_counter_ns()
                if which == "bare":
                    bare.run(names, feeds)
                else:
                    predictor.predict(frame)
                if i >= 20:
                    times[which].append((time.perf_counter_ns() - began) / 1e6)
    typical = statistics.median(times["bare"])
    return typical, typical + statistics.median(o - b for o, b in zip(times["own"], times["bare"], strict=True))


if __name__ == "__main__":
    main()
