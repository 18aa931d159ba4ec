"""Does a bundle do in an arm64 userland what its manifest says? Each question is one command of its device side."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arm64_packages import Choice, installed
from arm64_root import Userland
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.predictor import Predictor
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.device.system import EMULATED

ARCHIVE = "rowcol-edge-device.pyz"

# What the device side itself says of the machine, of the package its runtime comes from, and of what times taken there
# would be worth to the bundle's target.
_WHERE = """
import json, sys
from dataclasses import asdict
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.runtimes import load_runtime
from rowcol_edge.device.system import environment, evidence_for
host = environment()
with Bundle.open(sys.argv[1]) as bundle:
    evidence = evidence_for(bundle.manifest.target, host)
    package = load_runtime(bundle.manifest.runtime.name).package
told = {key: asdict(host)[key] for key in ("machine", "cpu_model", "isa", "emulated", "python", "numpy")}
print(json.dumps({**told, "package": package, "evidence": evidence.level}))
"""


class NotProvenError(Exception):
    """A command of the device side did not end well, or told something else than it had to."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A Python in a userland as some processor: what runs the commands."""

    userland: Userland
    cpu: str
    python: Path
    packages: Path | None = None

    def told(self, *arguments: str | Path, path: Path | None = None) -> Any:
        """The JSON that a command prints. NotProvenError with its last words if it ends otherwise."""
        paths = [str(folder) for folder in (path, self.packages) if folder]
        try:
            done = self.userland.run(self.python, *arguments, cpu=self.cpu, path=":".join(paths))
        except subprocess.TimeoutExpired as e:
            raise NotProvenError(f"no answer within {e.timeout:.0f} s of emulation") from e
        try:
            return json.loads(_once(done.stdout))
        except ValueError as e:
            raise NotProvenError(last_words(done)) from e


def _once(text: str) -> str:
    """Under emulation a guest's output was seen to arrive twice, in one piece after the other."""
    half = len(text) // 2
    return text[:half] if text[:half] == text[half:] else text


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    ending = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"{ending}: {' | '.join(lines[-3:])[:600] or 'nothing said'}"


def proof(bundle: Path, userland: Userland, cpu: str, choice: Choice) -> dict[str, Any]:
    """Where it ran, every arm against its golden outputs, and a picture's answer against this machine's."""
    with Bundle.open(bundle) as opened:
        manifest = opened.manifest
    record: dict[str, Any] = {
        "bundle": manifest.name, "target": manifest.target["name"], "runtime": manifest.runtime.name,
        "suite": userland.suite.name, "cpu": cpu, "choice": choice.label, "requirements": list(choice.requirements),
    }  # fmt: skip
    try:
        guest = Guest(userland, cpu, userland.python, installed(userland, choice.requirements))
        record["environment"] = where(guest, bundle, manifest.target.get("isa", ()))
        report = verified(guest, bundle)
        record |= {"version": report["runtime_version"], "arms": report["arms"]}
        judge(report)
        if manifest.preprocess is not None:
            record["run"] = ran(guest, bundle)
    except NotProvenError as e:
        record["failed"] = str(e)
    return record


def where(guest: Guest, bundle: Path, isa: Sequence[str]) -> dict[str, Any]:
    """The machine as the device side sees it: an emulated one, with the instructions that the target counts on."""
    found: dict[str, Any] = guest.told("-c", _WHERE, bundle, path=bundle / ARCHIVE)
    if found["evidence"] != EMULATED or found["machine"] != "aarch64":
        raise NotProvenError(f"takes itself for {found['evidence']} on {found['machine']}, not for emulated aarch64")
    if lacking := set(isa) - set(found["isa"]):
        raise NotProvenError(f"{guest.cpu} lacks {', '.join(sorted(lacking))}, which the target counts on")
    return found


def verified(guest: Guest, bundle: Path) -> dict[str, Any]:
    """The report of ``verify``, for every arm."""
    report: dict[str, Any] = guest.told(bundle / ARCHIVE, "verify", bundle, "--json")
    return report


def judge(report: dict[str, Any]) -> None:
    """NotProvenError if an arm left its tolerance; it names each of them."""
    failed = [
        f"{arm['name']}: {arm['reason'] or 'relative error {:.4g}'.format(arm['relative_error'])}, "
        f"tolerance {arm['tolerance']:g}"
        for arm in report["arms"]
        if not arm["ok"]
    ]
    if failed:
        raise NotProvenError("; ".join(failed))


def ran(guest: Guest, bundle: Path) -> dict[str, Any]:
    """The answer of ``run`` for the first golden input as a picture. NotProvenError if this machine says another."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        with Bundle.open(bundle) as opened, Predictor(opened) as predictor:
            picture(opened).save(path)
            here = predictor.predict(path)
        there = guest.told(bundle / ARCHIVE, "run", bundle, path, "--json")["results"][0]["prediction"]
    if there["label"] != here.label:
        raise NotProvenError(f"run answers {there['label']} there and {here.label} here")
    return {"label": there["label"], "score": there["score"], "score_difference": abs(there["score"] - here.score)}


def picture(bundle: Bundle) -> Image.Image:
    """The first golden input as the picture it was made from, give or take the rounding of a pixel."""
    inputs, _ = bundle.golden()
    array = inputs[bundle.manifest.inputs[0].name][0]
    if not bundle.manifest.frames:  # a finished tensor: undo what the recipe did
        recipe = Preprocess.from_dict(bundle.manifest.preprocess or {})
        mean, std = (np.array(values)[:, None, None] for values in (recipe.mean, recipe.std))
        array = np.clip(np.rint((array * std + mean) / recipe.scale), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def wheelhouse_proof(wheelhouse: Path, bundle: Path, userland: Userland, cpu: str) -> dict[str, Any]:
    """What a person at a board without network does: a new environment, pip with nothing but the wheelhouse, verify."""
    requirements = wheelhouse / f"requirements-py{userland.suite.python.replace('.', '')}.txt"
    with tempfile.TemporaryDirectory(dir=userland.folder) as folder:
        _well(userland, userland.python, "-m", "venv", folder, cpu=cpu)
        python = Path(folder) / "bin" / "python"
        pip = ("-m", "pip", "install", "--no-index", "--no-cache-dir", "--require-hashes")
        _well(userland, python, *pip, "--find-links", wheelhouse, "--requirement", requirements, cpu=cpu)
        report = verified(Guest(userland, cpu, python), bundle)
        judge(report)
    return {
        "bundle": report["bundle"], "runtime": report["runtime"], "version": report["runtime_version"],
        "suite": userland.suite.name, "cpu": cpu, "arms": report["arms"],
    }  # fmt: skip


def _well(userland: Userland, python: Path, *arguments: str | Path, cpu: str) -> None:
    done = userland.run(python, *arguments, cpu=cpu)
    if done.returncode != 0:
        raise NotProvenError(last_words(done))
