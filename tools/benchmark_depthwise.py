"""Whether widths want to be multiples of something where depthwise convolutions read them.

    python tools/benchmark_depthwise.py       # writes tools/results/depthwise.json, eight minutes
    python tools/benchmark_depthwise.py --precisions int8 fp32 --kernels 3 5 --out widths.json

Eight depthwise convolutions in a row over a picture of 28×28, of random weights: files of one runtime, precision and
kernel take short turns (see `benchmark_turns`), a null arm among them. `ratio` is the time beside that of 128 channels,
`per_channel` the same for each channel: above one where a kernel does not like the width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmark_machine import machine, settle
from benchmark_turns import take_turns
from int8_files import RUNTIMES, TARGET, compiled
from markdown_table import interval
from rowcol_edge import datasets, job, targets
from rowcol_edge.device import stats, system
from rowcol_edge.device.profile import NULL
from rowcol_edge.device.worker import TIME, Request

WIDTHS = (8, 16, 32, 96, 100, 104, 112, 120, 128)
PRECISIONS = ("int8", "fp32")
_BASELINE = 128
_LAYERS, _SIZE = 8, 28
_SAMPLES = 64
_RESULTS = Path(__file__).parent / "results" / "depthwise.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["int8"])
    parser.add_argument("--kernels", nargs="+", type=int, default=[3])
    parser.add_argument("--rounds", type=int, default=stats.MIN_ROUNDS, help="fresh processes for each file")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args()
    if options.rounds < stats.MIN_ROUNDS:
        parser.error(f"--rounds {options.rounds}: an interval needs {stats.MIN_ROUNDS}")
    said = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "source": job.own_source()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rowcol-depthwise-") as folder:
        for cell in itertools.product(options.runtimes, options.precisions, options.kernels):
            rows.append(measured(*cell, options.rounds, Path(folder)))
            print(line(rows[-1]), flush=True)
    found = said | {"tools": job.tool_versions(), "layers": _LAYERS, "size": _SIZE, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


def measured(runtime: str, precision: str, kernel: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Files of every width, beside that of the widest."""
    target = targets.load(TARGET)
    spec = target.runtime(runtime)
    requests: dict[str, Request] = {}
    for width in WIDTHS:
        place = folder / f"{runtime}-{precision}-{kernel}-{width}"
        place.mkdir()
        path, example = _file(width, runtime, precision, kernel, place)
        requests[str(width)] = Request(
            mode=TIME, arm=str(width), runtime=runtime, artifact=str(path), golden_inputs=str(example),
            batch={"x": 1}, threads=target.threads, providers=spec.providers, properties=spec.properties,
        )  # fmt: skip
    requests[NULL] = requests[str(_BASELINE)]
    settle()
    evidence = system.evidence_for(target.to_dict(), system.environment()).level
    judged = take_turns(requests, str(_BASELINE), rounds).judged(evidence)
    ratios: dict[str, dict[str, Any]] = {}
    for each in judged.comparisons:
        assert each.ratio is not None  # rounds are enough for an interval
        ratios[each.arm] = {
            "ratio": each.ratio, "ci_low": each.ci_low, "ci_high": each.ci_high,
            "per_channel": each.ratio * _BASELINE / int(each.arm),
        }  # fmt: skip
    null = {"ratio": judged.null.ratio, "ci_low": judged.null.ci_low, "ci_high": judged.null.ci_high}
    return {
        "runtime": runtime, "precision": precision, "kernel": kernel, "evidence": evidence, "widths": ratios,
        "null": null, "warnings": list(judged.warnings),
    }  # fmt: skip


def _file(width: int, runtime: str, precision: str, kernel: int, folder: Path) -> tuple[Path, Path]:
    """A network of that width, and an input for it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) for _ in range(_LAYERS)]
    pictures = np.random.default_rng(0).standard_normal((_SAMPLES, width, _SIZE, _SIZE), np.float32)
    np.savez(folder / "samples.npz", x=pictures)
    np.savez(folder / "input.npz", x=pictures[:1])
    network = nn.Sequential(*layers).eval()
    calibration = datasets.load(str(folder / "samples.npz"), "calibration", ["x"])
    assert calibration is not None
    [(_, path)] = compiled(network, [runtime], datasets.scan(calibration), folder, precision=precision)
    return path, folder / "input.npz"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    found = "  ".join(f"{width}: {each['per_channel']:.2f}" for width, each in row["widths"].items())
    kernel = f"{row['kernel']}×{row['kernel']}"
    return f"{row['runtime']:12} {row['precision']:5} {kernel}  {found}  null {interval(row['null'])}"


if __name__ == "__main__":
    main()
