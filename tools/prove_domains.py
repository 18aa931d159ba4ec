"""Every domain through every runtime: each sample from the command line to a bundle, and the bundle through its own
device program.

    python tools/prove_domains.py                                     # writes tools/results/domains.json
    python tools/prove_domains.py --samples minilm --runtimes tflite  # these cells again, the others stay as they are

A cell is two builds, fp32 and int8, of plans with half of the parameters, searched on few samples: it says whether a
model comes through, not how good it can be. Nothing is timed. The error of an arm is that of its file's outputs
against the dense PyTorch model's. A build that is refused, or a bundle that its device program does not verify, stands
there with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark_machine import machine
from rowcol_edge import cli, datasets, job, models

SAMPLES = (
    "elpv-resnet18", "fmnist-vit", "elpv-padim", "elpv-scratch-unet", "italy-power-cnn", "spoken-language-cnn",
    "minilm",
)  # fmt: skip
RUNTIMES = ("onnxruntime", "openvino", "tflite")
PRECISIONS = ("fp32", "int8")
TARGET = "generic-x86"
BUDGET = "params<=0.5x"
BUDGETS = {
    # three quarters are one matrix for each of 196 places (a grouped convolution, which stays): half of the others
    "elpv-padim": "params<=0.88x",
    # half are token embeddings, which stay: half of the others
    "minilm": "params<=0.75x",
}
ARMS = ("dense@fp32", "factored@fp32", "dense@int8", "factored@int8")
_SPLITS = {"calibration": "calib", "selection": "select", "test": "test"}

Row = dict[str, Any]


def main() -> int:
    options = _options()
    os.environ["ROWCOL_CACHE"] = str(options.work / "cache")
    for sample in options.samples:
        data = few(sample, options.count, options.work / sample)
        for runtime in options.runtimes:
            made = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "tools": job.tool_versions()}
            row = {**prove(sample, runtime, data, options.work), "samples_per_split": options.count, **made}
            rows = _known(options.out) | {(sample, runtime): row}  # another of these may have written meanwhile
            _write(rows.values(), options.out)
            print(line(row), flush=True)
    rows = _known(options.out)
    print(f"\n{table(rows.values())}\nwritten to {options.out}")
    return 0 if all(passed(row) for row in rows.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", default=list(SAMPLES), choices=SAMPLES)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--count", type=int, default=48, help="samples of each split")
    parser.add_argument("--work", type=Path, default=Path("dist/domains"), help="the bundles, and what stages keep")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "domains.json")
    return parser.parse_args()


def few(sample: str, count: int, folder: Path) -> dict[str, str]:
    """``count`` samples of each split, spread evenly over it, as files; by the option that takes them."""
    loaded = models.load(f"sample:{sample}")
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, option in _SPLITS.items():
        split = datasets.load(None, name, loaded.inputs, sample=loaded.sample)
        assert split is not None  # all of SAMPLES have data
        arrays = split.spread(count)
        if split.labels is not None:
            arrays["labels"] = split.labels[datasets.evenly(len(split), count)]
        np.savez(folder / f"{name}.npz", **arrays)
        found[option] = str(folder / f"{name}.npz")
    return found


def prove(sample: str, runtime: str, data: Mapping[str, str], work: Path) -> Row:
    """One cell: both builds, and what their bundles say of themselves."""
    budget = BUDGETS.get(sample, BUDGET)
    row: Row = {
        "sample": sample, "runtime": runtime, "budget": budget, "source": job.own_source(),
        "arms": {}, "errors": {}, "notes": [],
    }  # fmt: skip
    for precision in PRECISIONS:
        out = work / sample / precision
        arguments = [
            "build", f"sample:{sample}", "--target", TARGET, "--runtime", runtime, "--precision", precision,
            "--budget", budget, "--out", str(out), *(word for key in data for word in (f"--{key}", data[key])),
        ]  # fmt: skip
        shutil.rmtree(out / f"{TARGET}-{runtime}", ignore_errors=True)  # a bundle of another run proves nothing
        code, said = _command(arguments)
        if code:
            row["errors"][precision] = _error(said, work)
            continue
        bundle = out / f"{TARGET}-{runtime}"
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        row["metric"] = manifest["metric"]
        row["notes"] += [note for note in manifest["build"]["notes"] if note not in row["notes"]]
        row["arms"] |= read(manifest)
        device = [sys.executable, "-I", str(bundle / "rowcol-edge-device.pyz"), "verify", str(bundle)]
        checked = subprocess.run(device, capture_output=True, text=True, check=False)
        if checked.returncode:
            row["errors"][f"verify {precision}"] = _error(checked.stdout + checked.stderr, work)
    return row


def read(manifest: Mapping[str, Any]) -> dict[str, Row]:
    """The arms of a bundle, by name."""
    stages = manifest["build"]["stages"]
    return {
        arm["name"]: {
            "parameters": arm["parameters"],
            "size_bytes": arm["size_bytes"],
            "selection": arm["quality"]["selection"]["value"],
            "test": arm["quality"]["test"]["value"],
            "error": stages[arm["name"]][-1]["relative_error"],
            "kept_float": len(arm["kept_float"]),
        }
        for arm in manifest["arms"]
    }


def _command(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code of a command and what it says to stderr; in this process, which has loaded torch already."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            cli.run_command(list(arguments))
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
        except Exception as error:  # noqa: BLE001 – a traceback is what this script is there to find
            return 1, f"error: {type(error).__name__}: {error}"
    return 0, said.getvalue()


def _error(said: str, work: Path) -> str:
    """The last lines from ``error:`` on; where there are none, the last line."""
    lines = [" ".join(part.split()) for part in said.replace(str(work), "WORK").splitlines() if part.strip()]
    begins = [place for place, text in enumerate(lines) if text.startswith("error:")]
    return "; ".join(lines[begins[-1] :] if begins else lines[-1:])


def passed(row: Row) -> bool:
    """Every arm was built, and every bundle verified."""
    return not row["errors"] and set(row["arms"]) == set(ARMS)


def _known(path: Path) -> dict[tuple[str, str], Row]:
    """Cells that were proven before; each names the command, the machine and the source that made it."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["sample"], row["runtime"]): row for row in rows}


def _write(rows: Iterable[Row], out: Path) -> None:
    """After each cell: what a command that is stopped has proven stays."""
    ordered = sorted(rows, key=lambda row: (SAMPLES.index(row["sample"]), RUNTIMES.index(row["runtime"])))
    result = {"target": TARGET, "rows": ordered}
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    said = "; ".join(f"{where}: {what}" for where, what in row["errors"].items())
    return f"{row['sample']}, {row['runtime']}: {said or ', '.join(row['arms'])}"


def table(rows: Iterable[Row]) -> str:
    """A row for each cell; of each arm its quality on the test split, the bytes of its file and its error."""
    head = ["sample", "runtime", *ARMS, "bundles"]
    lines = [f"| {' | '.join(head)} |", f"| ---|---|{'--:|' * len(ARMS)}---|"]
    for row in rows:
        arms = [_cell(row["arms"].get(name)) for name in ARMS]
        said = "; ".join(f"{where}: {what}" for where, what in row["errors"].items()) or "verified"
        lines.append(f"| {' | '.join([row['sample'], row['runtime'], *arms, said])} |")
    return "\n".join(lines)


def _cell(arm: Row | None) -> str:
    if arm is None:
        return "–"
    return f"{100 * arm['test']:.1f} %, {arm['size_bytes'] / 1e6:.2f} MB, {arm['error']:.1e}"


if __name__ == "__main__":
    sys.exit(main())
