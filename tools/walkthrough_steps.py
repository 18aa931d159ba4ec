"""The steps of tools/walkthrough.py, in order: later ones use what earlier ones have made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import walkthrough_pytorch as pytorch
from rowcol_edge import resources
from walkthrough_data import RECIPE, WEIGHTS

FACTORED = ("layer4.1.conv2.0", "layer4.1.conv2.1", "fc.0", "fc.1")
"""Layers of the model that somebody has split already."""
ARMS = ["factored@int8", "dense@int8", "dense@fp32"]
NAMES = ("--labels", "good,defective", "--positive", "defective")
CALIB = ("--calib", "calib", "--preprocess", RECIPE)
MODEL = ("net.py:build", "--weights", WEIGHTS)
OUT = "out/generic-x86-onnxruntime"
PYZ = f"{OUT}/rowcol-edge-device.pyz"
PI = "free/raspberry-pi-4-onnxruntime"
STANDS_IN = r"^(?!.*stands in.*stands in).*warning: x86_64 stands in for aarch64 \(raspberry-pi-4\)"
"""Said once."""
ANOTHER_MACHINE = ("machine of kind aarch64", "got:? x86_64", "--stand-in")
"""What a bundle for a board is refused with."""


@dataclass(frozen=True)
class Step:
    """A command and how it must end.

    ``says``: patterns for its output, in which every run of blanks is one. ``check`` gets stdout. ``bad``: there must
    be one typed error, and nothing written. ``python``: the interpreter, where it is not `rowcol-edge` that runs.
    ``needed``: others use what it makes. ``locked``: some of its files may not be read, not by root either.
    ``signal``: is sent so many seconds after those words in its progress.
    """

    name: str
    argv: tuple[str, ...]
    code: int = 0
    says: tuple[str, ...] = ()
    check: Callable[[str], None] | None = None
    before: Callable[[], None] | None = None
    bad: bool = False
    needed: bool = False
    python: str | None = None
    locked: bool = False
    signal: signal.Signals | None = None
    signal_at: str = ""
    signal_after: float = 0.0

    @property
    def command(self) -> str:
        program = "rowcol-edge" if self.python is None else Path(self.python).name
        return shlex.join([program, *self.argv])


def steps(work: Path) -> Iterator[Step]:
    yield from _looking(work)
    yield from _factoring(work)
    yield from _building(work)
    yield from _on_the_board(work)
    yield from _ending(work)
    yield from _bad(work)


def _looking(work: Path) -> Iterator[Step]:
    def spectrum(out: str) -> None:
        layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
        assert len(layers) == 21, len(layers)
        assert 0 < layers["layer4.1.conv2"]["column_rank_99"] < layers["layer4.1.conv2"]["column_rank_999"] < 512
        assert 0 < layers["layer4.1.conv2"]["row_rank_99"] <= layers["layer4.1.conv2"]["row_size"]

    def left(out: str) -> None:
        layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
        for name in FACTORED:
            assert "already factored" in json.dumps(layers[name]), layers[name]

    yield Step("help", ("--help",), says=("inspect", "factor", "build", "profile", "compare", "verify", "run", "demo"))
    yield Step("targets", ("targets",), says=("generic-x86", "raspberry-pi-4", "raspberry-pi-5", "elpv-resnet18"))
    pi = "raspberry-pi-4"
    yield Step("one target", ("targets", pi), says=("asimd", "rank_multiple", *installs(pi)))
    saves = "factoring saves [0-9,]+ parameters"
    yield Step("inspect a sample", ("inspect", "sample:elpv-resnet18"), says=("layer4.1.conv2", saves))
    yield Step("inspect a model of one's own", ("inspect", *MODEL, *CALIB, "--json"), check=spectrum)
    yield Step("an already factored model", ("inspect", "net.py:factored", *CALIB, "--json"), check=left)
    yield Step("data", ("data", *MODEL, *CALIB, "--select", "select", "--test", "test"), says=("near-duplicate",))


def _factoring(work: Path) -> Iterator[Step]:
    common = ("factor", *MODEL, *CALIB, "--select", "select", *NAMES)

    def same(_: str) -> None:
        first, again = (sha256((work / f / "model.safetensors").read_bytes()).hexdigest() for f in ("plan", "again"))
        assert first == again

    def edit() -> None:
        text = (work / "plan" / "plan.toml").read_text(encoding="utf-8")
        edited, count = re.subn(r'(name = "layer4\.1\.conv2".*?rank = )\d+', r"\g<1>48", text, flags=re.DOTALL)
        assert count == 1
        (work / "edited.toml").write_text(edited, encoding="utf-8")

    def edited(_: str) -> None:
        from safetensors import safe_open

        with safe_open(work / "edited" / "model.safetensors", "numpy") as file:
            names = [name for name in file.keys() if "layer4.1.conv2" in name]  # noqa: SIM118 – it is no dict
            sizes = [file.get_slice(name).get_shape()[0] for name in names]
        assert 48 in sizes, sizes

    yield Step("factor", (*common, "--budget", "drop<=0.5pp", "--out", "plan"), says=("written to plan",), needed=True)
    yield Step("apply the plan again", (*common, "--plan", "plan/plan.toml", "--out", "again"), check=same)
    yield Step("apply an edited plan", (*common, "--plan", "edited.toml", "--out", "edited"), check=edited, before=edit)
    yield Step("factor by a parameter budget", (*common, "--budget", "params<=0.4x", "--out", "small"), says=("param",))


def _building(work: Path) -> Iterator[Step]:
    splits = (*CALIB, "--select", "select", "--test", "test", *NAMES)
    cells = ("--calib", "cells.py:calibration", "--select", "cells.py:selection", "--test", "cells.py:test")

    def whole(out: str) -> None:
        made = manifest(work / OUT)
        assert [arm["name"] for arm in made["arms"]] == ARMS
        assert made["metric"] == "escape@overkill=1%"
        assert made["target"]["name"] == "generic-x86"
        for arm in made["arms"]:
            assert 0 < arm["threshold"] < 1
            test = arm["quality"]["test"]
            assert {"value", "drop_pp", "ci_low_pp", "ci_high_pp", "flips"} <= set(test), sorted(test)
        for file in made["files"]:
            content = (work / OUT / file["path"]).read_bytes()
            assert (len(content), sha256(content).hexdigest()) == (file["size_bytes"], file["sha256"]), file
        with zipfile.ZipFile(work / f"{OUT}.zip") as archive:
            assert archive.testzip() is None
        assert "Traceback" not in out

    def arms(folder: str, wanted: list[str]) -> Callable[[str], None]:
        def check(_: str) -> None:
            assert [arm["name"] for arm in manifest(work / folder)["arms"]] == wanted

        return check

    def two_boards(out: str) -> None:
        for board in ("raspberry-pi-4", "raspberry-pi-5"):
            made = manifest(work / f"free/{board}-onnxruntime")
            assert made["inputs"][0]["shape"][0] is None
            assert made["target"]["name"] == board

    def two_inputs(_: str) -> None:
        made = manifest(work / f"two/{Path(OUT).name}")
        assert [port["name"] for port in made["inputs"]] == ["picture", "kind"]
        assert abs(made["arms"][0]["quality"]["selection"]["drop_pp"]) <= 0.5

    def left(_: str) -> None:
        plan = (work / f"left/{Path(OUT).name}/plan.toml").read_text(encoding="utf-8")
        layers = {layer["name"]: layer for layer in tomllib.loads(plan)["layers"]}
        for name in FACTORED:
            assert layers[name]["form"] == "dense", layers[name]
            assert "already factored" in layers[name]["reason"], layers[name]
        assert any(layer["form"] == "project" for layer in layers.values())

    escape = ("--metric", "escape@overkill=1%", "--budget", "drop<=0.5pp,size<=8MB")
    yield Step(
        "build, checkpoint, escape@overkill",
        ("build", "net.py:build", "--weights", "checkpoint.pt", *splits, *escape, "--target", "generic-x86",
         "--out", "out"),
        check=whole, needed=True,
    )  # fmt: skip
    yield Step("build again from rowcol.toml", ("build", "--config", "out/rowcol.toml"), check=whole)
    yield Step(
        "build a .pt2, free batch, two boards",
        ("build", "net.pt2", *splits, "--energy", "0.998", "--target", "raspberry-pi-4", "--target", "raspberry-pi-5",
         "--dynamic-batch", "--out", "free"),
        check=two_boards, needed=True,
    )  # fmt: skip
    yield Step(
        "build a model of two inputs",
        ("build", "net.py:WithKind", *cells, *NAMES, "--metric", "auroc", "--budget", "drop<=0.5pp", "--out", "two"),
        check=two_inputs,
    )  # fmt: skip
    yield Step(
        "build an already factored model",
        ("build", "net.py:factored", *splits, "--energy", "0.99", "--precision", "fp32", "--out", "left"),
        check=left,
    )
    for precision in ("fp32", "fp16", "int8", "int8-dynamic"):
        yield Step(
            f"build a Transformer at {precision}",
            ("build", "sample:fmnist-vit", "--metric", "net.py:mean_recall", "--budget", "drop<=1pp", "--precision",
             precision, "--no-dense", "--out", f"vit-{precision}"),
            check=arms(f"vit-{precision}/{Path(OUT).name}", [f"factored@{precision}"]),
        )  # fmt: skip
    yield Step(
        "a budget that cannot be met",
        ("build", *MODEL, *splits, "--budget", "drop<=0.1pp,size<=0.2MB", "--out", "new"),
        code=1, says=("error: budget size.*expected: .*got: ",), check=lambda _: _absent(work / "new"),
    )  # fmt: skip


def _on_the_board(work: Path) -> Iterator[Step]:
    pictures = pytorch.clear(work)
    board = work / "board"

    def profiled(out: str) -> None:
        profile = json.loads(out)
        assert set(profile["arms"]) == set(ARMS)
        assert (profile["evidence"], profile["null"]["verdict"]) == ("target", "no significant difference")
        for pair in profile["comparisons"]:
            assert pair["ci_low"] <= pair["ratio"] <= pair["ci_high"], pair

    def install() -> None:
        subprocess.run([sys.executable, "-m", "venv", board], check=True)
        requirements = ["numpy", "pillow", "onnxruntime"]
        subprocess.run([board / "bin" / "pip", "install", "-q", *requirements], check=True)

    yield Step("verify", ("verify", OUT), says=tuple(ARMS))
    yield Step("verify the .zip", ("verify", f"{OUT}.zip"), says=tuple(ARMS))
    yield Step("run", ("run", OUT, *pictures, "--json"), check=answers(pictures))
    yield Step("profile", ("profile", OUT, "--blocks", "6", "--seconds", "40", "--json"), check=profiled)
    yield Step("a stand-in for the board: verify", ("verify", PI, "--stand-in"), says=(STANDS_IN, *ARMS))
    # stdout is JSON and nothing else, so that the warning is on stderr
    stood_in = ("run", PI, *pictures, "--stand-in", "--json")
    yield Step("a stand-in for the board: run", stood_in, says=(STANDS_IN,), check=answers(pictures))
    pis = tuple(f"free/{board}-onnxruntime" for board in ("raspberry-pi-4", "raspberry-pi-5"))
    yield Step("compare", ("compare", OUT), says=("factored@int8", "target"))
    yield Step("compare per target", ("compare", *pis), says=("raspberry-pi-4", "raspberry-pi-5"))
    yield Step("compare as markdown", ("compare", OUT, "--markdown"), says=(r"\|.*-{3}.*\|",))
    two = f"two/{Path(OUT).name}"
    yield Step("two metrics are not comparable", ("compare", OUT, two), code=3, says=("metric", "expected: the same"))
    yield Step("not comparable", ("compare", f"vit-fp32/{Path(OUT).name}"), code=3, says=("expected: a dense arm",))
    python = str(board / "bin" / "python")
    yield Step(
        "a bare board: verify", (PYZ, "verify", OUT),
        python=python, before=install, says=tuple(ARMS), needed=True,
    )  # fmt: skip
    lines = tuple(rf"{re.escape(picture)}: {label} \(0\.\d" for picture, label in pictures.items())
    yield Step("a bare board: run", (PYZ, "run", OUT, *pictures), python=python, says=lines)
    refused = bad("a bare board: another machine", (PYZ, "verify", PI), *ANOTHER_MACHINE)
    yield replace(refused, python=python)
    yield Step(
        "a bare board: profile",
        (PYZ, "profile", OUT, "--blocks", "6", "--seconds", "40", "--out", "board.json"),
        python=python,
        check=lambda _: json.loads((work / "board.json").read_text(encoding="utf-8")) and None,
    )


def _ending(work: Path) -> Iterator[Step]:
    build = ("build", *MODEL, *CALIB, *NAMES, "--energy", "0.99", "--no-cache", "--out", "new")
    for name, number, code in (("Ctrl-C", signal.SIGINT, 130), ("a killed build", signal.SIGKILL, -signal.SIGKILL)):
        yield Step(name, build, code=code, signal=number, signal_after=12, check=lambda _: _no_bundle(work / "new"))


def answers(labels: Mapping[str, str]) -> Callable[[str], None]:
    """A check that `run --json` gives these pictures, in their order, these labels."""

    def check(out: str) -> None:
        found = [(result["source"], result["prediction"]["label"]) for result in json.loads(out)["results"]]
        assert [picture for picture, _ in found] == list(labels)
        wrong = [one for one in found if one not in labels.items()]
        assert not wrong, wrong

    return check


def installs(board: str) -> tuple[str, ...]:
    """Patterns for the lines that install each runtime of a board, by its target's file."""
    text = (resources.targets_dir() / f"{board}.toml").read_text(encoding="utf-8")
    venv = "python3 -m venv ~/rowcol-edge . ~/rowcol-edge/bin/activate python3 -m pip install"
    found = []
    for runtime in tomllib.loads(text)["runtimes"]:
        # without quotes a shell would take > for a redirection
        packages = (f'"{one}"' if ">" in one else one for one in runtime["requirements"])
        found.append(re.escape(" ".join([venv, *packages])))
    return tuple(found)


def bad(name: str, argv: tuple[str, ...], *says: str, before: Callable[[], None] | None = None) -> Step:
    """A step that must be refused."""
    return Step(f"bad: {name}", argv, code=2, says=says, bad=True, before=before)


def build(*options: str, model: str = "net.py:build", weights: str = WEIGHTS) -> tuple[str, ...]:
    """A build that should write nothing."""
    return ("build", model, *(("--weights", weights) if weights else ()), *options, "--out", "new")


def _bad(work: Path) -> Iterator[Step]:
    def calib(path: str) -> tuple[str, ...]:
        return build("--calib", path, "--preprocess", RECIPE)

    def overlapping() -> None:
        shutil.copytree(work / "select", work / "overlapping")
        first = min((work / "calib" / "good").iterdir())
        shutil.copy(first, work / "overlapping" / "good" / "copy.png")

    def tampered() -> None:
        shutil.copytree(work / OUT, work / "tampered")
        arm = next(path for path in sorted((work / "tampered" / "arms").iterdir()) if path.is_file())
        content = bytearray(arm.read_bytes())
        content[len(content) // 2] ^= 1
        arm.write_bytes(content)

    yield bad("no model file", build(*CALIB, model="nowhere.py:build"), "nowhere.py")
    yield bad("no factory", build(*CALIB, model="net.py:biuld"), "biuld", "did you mean build")
    yield bad("no weights file", build(*CALIB, weights="none.safetensors"), "none.safetensors")
    yield bad("weights cut short", build(*CALIB, weights="bad/cut.safetensors"), "cut.safetensors")
    denied = "Permission denied"
    yield replace(
        bad("weights that may not be read", build(*CALIB, weights="bad/locked.safetensors"), denied), locked=True
    )
    yield replace(bad("a picture that may not be read", calib("bad/locked"), r"a\.png"), locked=True)
    yield bad("keys that do not fit", build(*CALIB, weights="bad/other_names.safetensors"), r"fc\.weight", r"head\.")
    yield bad("a shape that does not fit", build(*CALIB, weights="bad/other_shape.safetensors"), r"fc\.weight")
    yield bad("NaN in weights", build(*CALIB, weights="bad/nan.safetensors"), r"layer1\.0\.conv1\.weight", "NaN")
    harmless = "safetensors|weights_only|plain tensors"
    yield bad("a pickle as weights", build(*CALIB, weights="bad/harm.pt"), harmless)
    yield bad("a pickle as data", calib("bad/harm.npz"), "pickle|object")
    yield bad("no data", calib("none"), "none")
    yield bad("data that are no archive", calib("bad/garbage.npz"), r"garbage\.npz")
    yield bad("a picture that is none", calib("bad/picture"), r"a\.png")
    yield bad("an empty folder", calib("bad/empty"), "empty")
    yield bad("a callable without batches", build("--calib", "cells.py:nothing"), "cells.py:nothing")
    yield bad("Inf in data", calib("bad/inf.npz"), "NaN or Inf|finite")
    yield bad("a wrong shape", calib("bad/shape.npz"), "200")
    yield bad("a wrong dtype", calib("bad/dtype.npz"), "complex64")
    splits = build(*CALIB, "--select", "overlapping", *NAMES)
    yield bad("splits that overlap", splits, "calibration", "selection", before=overlapping)
    yield bad("an unknown target", build(*CALIB, "--target", "rasberry-pi-4"), "did you mean raspberry-pi-4")
    board = build(*CALIB, "--target", "bad/board.toml")
    yield bad("an unknown key in a target", board, "rank_multipel", "did you mean rank_multiple")
    yield bad("an unknown key in rowcol.toml", ("build", "--config", "bad/rowcol.toml"), "modell", "did you mean model")
    unsupported = build(*CALIB, model="net.py:unsupported", weights="")
    yield bad("an unsupported operator", unsupported, "bessel_j0", r"maxpool\.1")
    yield bad("an unknown metric", build(*CALIB, "--select", "select", "--metric", "acuracy"), "accuracy")
    yield bad("a budget that is none", build(*CALIB, "--budget", "drop<0.5"), "drop")
    yield bad("a bundle that was changed", ("verify", "tampered"), "arms/", "sha256|digest", before=tampered)
    yield bad("running a changed bundle", ("run", "tampered", "net.py"), "arms/|picture")
    yield bad("a bundle of another machine", ("verify", PI), *ANOTHER_MACHINE)
    yield bad("running one of another machine", ("run", PI, *pytorch.clear(work)), *ANOTHER_MACHINE)
    yield bad("a manifest of another schema", ("verify", "bad/manifest"), "schema")
    yield bad("no bundle", ("profile", "calib"), r"manifest\.json")
    yield Step("nothing of a pickle has run", ("--help",), check=lambda _: _absent(work / "harmed"))


def manifest(folder: Path) -> dict[str, Any]:
    """That of a bundle."""
    read: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return read


def _absent(path: Path) -> None:
    assert not path.exists(), path


def _no_bundle(folder: Path) -> None:
    assert not list(folder.glob("*/manifest.json")) if folder.exists() else True, list(folder.iterdir())
