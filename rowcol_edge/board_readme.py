"""The README inside a bundle, for the person at the board."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import wheelhouse
from .device.manifest import GRAPH_CHECKED, RUN, ArmEntry, Manifest, TensorSpec
from .device.preprocess import Preprocess
from .device.runtimes import ENGINE_BUILDERS
from .device_archive import DEVICE_ARCHIVE_NAME
from .recipes import LABEL, left_out
from .recipes import files as recipes

_CONTRACTS = {
    "classify": "one label for a picture, with the probability of each label",
    "segment": "one label for each pixel",
    "anomaly_map": "an anomaly score for each pixel; the picture's score is the highest of them",
    "detect": "boxes, each with a score and a label",
    "embed": "a vector of length 1 that stands for the input",
}

#: what a runtime calls the places it can run in
_DEVICES = {"onnxruntime": "an execution provider", "tflite": "a delegate"}
#: what is to be said of the oldest version
_VERSIONS = {"tflite": " of tflite-runtime, and any of ai-edge-litert, which counts anew from 1.0"}


def board_readme(manifest: Manifest) -> str:
    """Markdown: what the bundle is, how to install, check, run and measure it, and what to do when something fails."""
    sections = [
        _title(manifest),
        _install(manifest),
        _commands(manifest),
        *_engine(manifest),
        _arms(manifest),
        _input(manifest),
        _output(manifest),
        *_recipes(manifest),
        _exit_codes(),
        _troubleshooting(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _title(manifest: Manifest) -> str:
    title = manifest.target.get("title") or manifest.target["name"]
    return (
        f"# {manifest.name} for {title}\n\n"
        f"A trained model, ready to run on {title} with {manifest.runtime.name}. It answers with "
        f"{_CONTRACTS[manifest.contract]}. Built {manifest.created}; target `{manifest.target['name']}`."
    )


def _install(manifest: Manifest) -> str:
    return (
        "## Install, once\n\n"
        f"Python 3.10 or newer, and:\n\n```sh\n{manifest.runtime.install}\n```\n\n"
        "Nothing else: the program that checks, runs and measures is the file "
        f"`{DEVICE_ARCHIVE_NAME}` beside this one. Pillow is needed for image files only." + _offline(manifest)
    )


def _offline(manifest: Manifest) -> str:
    """What stands in for pip's line where the board has no network, if the build made it."""
    if not manifest.build.get("options", {}).get("wheelhouse"):
        return ""
    folder = wheelhouse.place(Path(f"{manifest.target['name']}-{manifest.runtime.name}"))
    lines = [f"{wheelhouse.install_command(python)}  # Python {python}" for python in manifest.target["pythons"]]
    return (
        f"\n\nWithout a network: the folder `{folder}`, made beside this one, holds these packages as wheels. In it, "
        "instead of the line with `pip install`:\n\n```sh\n" + "\n".join(lines) + "\n```"
    )


def _commands(manifest: Manifest) -> str:
    example = "part.png" if manifest.preprocess else "part.npz"
    return (
        "## Use\n\nIn this folder:\n\n"
        f"    python3 {DEVICE_ARCHIVE_NAME} verify .\n"
        f"    python3 {DEVICE_ARCHIVE_NAME} run . {example}\n"
        f"    python3 {DEVICE_ARCHIVE_NAME} profile .\n\n"
        "- `verify` compares every file with the manifest and reproduces the recorded outputs here. Do it first.\n"
        "- `run` answers for one or more inputs.\n"
        "- `profile` measures latency, cold start, memory and size of the arms against each other and writes the "
        "result to `profiles/`. Let nothing else run meanwhile. With `--memory` also memory at each stage and what the "
        "runtime's settings save, with `--energy` the energy of an inference, where the board has rails to read, with "
        "`--ops` the time of each layer.\n\n"
        "`--json` prints JSON instead of text, `--arm NAME` (run) and `--arms A,B` (profile) choose arms, "
        "`--threads N` sets the number of threads, `--help` lists the rest."
    )


def _engine(manifest: Manifest) -> list[str]:
    if manifest.runtime.name not in ENGINE_BUILDERS:
        return []
    text = (
        "## The engine\n\n"
        f"{manifest.runtime.name} runs an engine that is built on this board, for its GPU and its version. That takes "
        "minutes, once; the first command that opens an arm does it and shows its progress. Ahead of time:\n\n"
        f"    python3 {DEVICE_ARCHIVE_NAME} engine .\n\n"
        "Engines are kept in `~/.cache/rowcol-edge/engines`, or where `ROWCOL_ENGINE_CACHE` says, and can be deleted "
        "at any time."
    )
    return [text]


def _recipes(manifest: Manifest) -> list[str]:
    paths, missing = sorted(recipes(manifest)), left_out(manifest)
    if not paths and not missing:
        return []
    made = [f"Pipelines around this model, {LABEL}:\n", *(f"- `{path}`" for path in paths)] if paths else []
    why = "; ".join(missing)
    said = [("\n" if made else "") + f"{why[0].upper()}{why[1:]}."] if missing else []
    return ["\n".join(["## Recipes\n", *made, *said])]


def _arms(manifest: Manifest) -> str:
    rows = [
        "## Arms\n\nThe same model in several forms. `run` takes the default one unless told otherwise.\n",
        "| arm | size | parameters | quality (test) | drop |",
        "|---|---:|---:|---:|---:|",
    ]
    rows += [_arm_row(manifest, arm) for arm in manifest.arms]
    if any(arm.checked == GRAPH_CHECKED for arm in manifest.arms):
        rows.append(
            f"\n*{GRAPH_CHECKED}*: this arm has not run on {manifest.runtime.name} and this kind of board yet. Its "
            "graph was checked; its quality and recorded outputs come from a CPU that stood in. `verify` is the first "
            "run: start with it."
        )
    kept = [f"- `{arm.name}` keeps in float: {_list(arm.kept_float)}." for arm in manifest.arms if arm.kept_float]
    if kept:
        rows += ["\nQuantizing these layers hurt most, so they stayed as they were:\n", *kept]
    return "\n".join(rows)


def _arm_row(manifest: Manifest, arm: ArmEntry) -> str:
    remarks = ["default"] * (arm.name == manifest.default_arm) + [arm.checked] * (arm.checked != RUN)
    name = f"`{arm.name}`" + (f" ({', '.join(remarks)})" if remarks else "")
    test: Mapping[str, Any] = arm.quality.get("test", {})
    quality = f"{test['metric']} {test['value']:.4f} (n = {test['n']})" if test else "–"
    drop = "–" if test.get("drop_pp") is None else f"{test['drop_pp']:.2f} pp"
    if test.get("ci_low_pp") is not None and test.get("ci_high_pp") is not None:
        drop += f" [{test['ci_low_pp']:.2f}, {test['ci_high_pp']:.2f}]"
    return f"| {name} | {_size(arm.size_bytes)} | {arm.parameters:,} | {quality} | {drop} |"


def _input(manifest: Manifest) -> str:
    lines = ["## Input\n", *(f"- `{spec.name}`: {_spec(spec)}" for spec in manifest.inputs)]
    if manifest.preprocess is not None:
        recipe = Preprocess.from_dict(manifest.preprocess)
        formula = (
            f"`(pixel × {recipe.scale:.6g} − mean) ÷ std` with mean {_list(recipe.mean)} and std {_list(recipe.std)}"
        )
        lines.append(
            f"\nImage files are converted to {'grey' if recipe.channels == 1 else recipe.mode} and resized to "
            f"{recipe.width} × {recipe.height} (width × height, {recipe.resample}). "
            + (
                f"The model takes these pixels as they are: it calculates {formula} itself. "
                if manifest.frames
                else f"They become {formula}. "
            )
            + "A `.raw` or `.bin` file is a frame of exactly that size, one byte a channel, row by row; a `.npy` is "
            f"such a frame (uint8){'' if manifest.frames else ' or the finished float tensor'}."
        )
    else:
        lines.append("\nInputs are arrays: a `.npz` that holds one under each name above.")
    return "\n".join(lines)


def _output(manifest: Manifest) -> str:
    lines = ["## Output\n", *(f"- `{spec.name}`: {_spec(spec)}" for spec in manifest.outputs)]
    if manifest.labels:
        lines.append(f"\nLabels, in the order of the outputs: {', '.join(f'`{label}`' for label in manifest.labels)}.")
    thresholds = [f"{arm.threshold:.6g} (`{arm.name}`)" for arm in manifest.arms if arm.threshold is not None]
    if thresholds and manifest.positive is not None and manifest.contract in ("classify", "segment"):
        lines.append(f"\nThe answer is `{manifest.positive}` when its probability is at least {', '.join(thresholds)}.")
    elif thresholds:
        lines.append(f"\nDecision threshold on the score: {', '.join(thresholds)}.")
    if thresholds:
        lines.append("The threshold was found on samples of its own, not on those of the test column above.")
    return "\n".join(lines)


def _exit_codes() -> str:
    return (
        "## Exit codes\n\n"
        "| code | meaning |\n|---:|---|\n"
        "| 0 | good |\n"
        "| 1 | an arm computes something else here than where it was built |\n"
        "| 2 | bad input: a file, an option, a damaged bundle, a missing package; stderr says what to do |\n"
        "| 3 | measurements that cannot be compared |\n"
        "| 130 | interrupted with Ctrl-C |\n"
        "| 143 | ended by SIGTERM, which cleans up as Ctrl-C does |"
    )


def _troubleshooting(manifest: Manifest) -> str:
    runtime = manifest.runtime
    onnx = runtime.name == "onnxruntime"  # other runtimes open files of their own
    versions = f" (opset {runtime.opset}, IR version {runtime.ir_version})" if onnx else _VERSIONS.get(runtime.name, "")
    device = _DEVICES.get(runtime.name, "a device")
    return (
        "## When something fails\n\n"
        f"- *{runtime.name} is too old*: the oldest version that opens these files is **{runtime.oldest}**"
        f"{versions}. Run the install line above again.\n"
        "- *a digest or size does not match*: the copy is incomplete or a file was edited. Copy the bundle again; keep "
        "your own files out of this folder (`profiles/` is the one exception).\n"
        "- *verify reports FAILED for one arm*: this board computes that precision differently. Use another arm "
        "(`run . IMAGE --arm NAME`) and report the numbers that `verify . --json` prints.\n"
        f"- *{device} is not available*: the bundle asks for "
        f"{_list(runtime.providers) or 'the CPU'}; install the {runtime.name} build that has it.\n"
        "- *a .zip does not unpack*: `/tmp` may be small; unzip it where there is space and open the folder."
    )


def _spec(spec: TensorSpec) -> str:
    shape = " × ".join("N" if size is None else str(size) for size in spec.shape) or "one number"
    return f"{spec.dtype}, {shape}"


def _list(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)


def _size(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"
