"""The steps of tools/walkthrough.py that go through the runtimes: what each makes, runs and refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import walkthrough_pytorch as pytorch
from walkthrough_steps import ARMS, CALIB, MODEL, NAMES, OUT, PYZ, Step, answers, bad, build, installs, manifest

RUNTIMES = ("openvino", "tflite")
"""Those besides onnxruntime that this machine can run."""
VIT = ("build", "sample:fmnist-vit", "--no-dense", "--no-zip", "--metric", "accuracy", "--budget", "drop<=2pp")
SPLITS = (*CALIB, "--select", "select", "--test", "test", *NAMES)
JETSON = "jetson/jetson-orin-nano-{}"


def steps(work: Path) -> Iterator[Step]:
    yield from _building(work)
    yield from _choosing(work)
    yield from _frames(work)
    yield from _boards(work)
    yield from _bad(work)


def _bundle(runtime: str) -> str:
    return f"{runtime}/generic-x86-{runtime}"


def _building(work: Path) -> Iterator[Step]:
    def made(runtime: str) -> Callable[[str], None]:
        def check(_: str) -> None:
            found = manifest(work / _bundle(runtime))
            assert [arm["name"] for arm in found["arms"]] == ARMS
            assert found["runtime"]["name"] == runtime
            for arm in found["arms"]:
                content = (work / _bundle(runtime) / arm["artifact"]).read_bytes()
                for said in ("defective", arm["name"], "plan_digest" if arm["variant"] == "factored" else "preprocess"):
                    assert said.encode() in content, (arm["name"], said)

        return check

    def profiled(out: str) -> None:
        profile = json.loads(out)
        assert (profile["evidence"], profile["null"]["verdict"]) == ("target", "no significant difference")

    def arms(folder: str, precision: str) -> Callable[[str], None]:
        def check(_: str) -> None:
            [arm] = manifest(work / folder)["arms"]
            assert (arm["variant"], arm["precision"]) == ("factored", precision)
            assert arm["quality"]["selection"]["drop_pp"] <= 2.0

        return check

    pictures = pytorch.clear(work)
    escape = ("--metric", "escape@overkill=1%", "--budget", "drop<=1pp", "--out")
    for runtime in RUNTIMES:
        asked = ("build", *MODEL, *SPLITS, "--runtime", runtime, *escape, runtime)
        yield Step(f"build for {runtime}", asked, check=made(runtime), needed=True)
        yield Step(f"build for {runtime} again", asked, says=("unchanged",))
        yield Step(f"verify for {runtime}", ("verify", _bundle(runtime)), says=tuple(ARMS))
        yield Step(f"run for {runtime}", ("run", _bundle(runtime), *pictures, "--json"), check=answers(pictures))
        profile = ("profile", _bundle(runtime), "--blocks", "6", "--seconds", "30", "--json")
        yield Step(f"profile for {runtime}", profile, check=profiled)
    yield Step("compare the runtimes", ("compare", OUT, *map(_bundle, RUNTIMES)), says=("onnxruntime", *RUNTIMES))
    for runtime, precision, *more in (
        ("onnxruntime", "int8-weights"), ("onnxruntime", "int4-weights"),
        ("openvino", "fp16"), ("openvino", "int8", "--accuracy-control"),
        ("tflite", "fp16"), ("tflite", "int8-dynamic"), ("tflite", "int8-io"),
    ):  # fmt: skip
        out = f"vit/{runtime}-{precision}"
        yield Step(
            f"a Transformer, {runtime} {precision}",
            (*VIT, "--runtime", runtime, "--precision", precision, *more, "--out", out),
            check=arms(f"{out}/generic-x86-{runtime}", precision),
        )


def _choosing(work: Path) -> Iterator[Step]:
    def chosen(folder: str, evidence: str, capped: bool) -> Callable[[str], None]:
        def check(_: str) -> None:
            record = manifest(work / folder)["build"]["precision"]
            tried = {candidate["precision"]: candidate for candidate in record["candidates"]}
            assert tried[record["chosen"]]["latency_ns"] > 0
            assert tried[record["chosen"]]["drop_pp"] <= 2.0
            assert all(one["left_out"] or one["latency_ns"] for one in tried.values())
            assert (record["evidence"], bool(record["caps"])) == (evidence, capped)

        return check

    for target, runtime, evidence in (("generic-x86", "onnxruntime", "target"), ("intel-n100", "openvino", "proxy")):
        yield Step(
            f"auto for {target}",
            (*VIT, "--target", target, "--runtime", runtime, "--precision", "auto", "--out", "auto"),
            check=chosen(f"auto/{target}-{runtime}", evidence, evidence == "proxy"), says=("precision",),
        )  # fmt: skip


def _frames(work: Path) -> Iterator[Step]:
    pictures = tuple(pytorch.probabilities(work))

    def same(folder: str) -> Callable[[str], None]:
        def check(out: str) -> None:
            [arm] = [arm for arm in manifest(work / folder)["arms"] if arm["name"] == "dense@fp32"]
            assert len(pictures) == 420
            answers(pytorch.labels(work, arm["threshold"]))(out)

        return check

    for runtime in ("onnxruntime", *RUNTIMES):
        folder = f"frames/generic-x86-{runtime}"
        options = ("--precision", "fp32", "--energy", "0.9999", "--budget", "drop<=5pp", "--no-zip", "--out", "frames")
        yield Step(
            f"frames in the graph, {runtime}",
            ("build", *MODEL, *SPLITS, "--runtime", runtime, "--bake-preprocess", *options),
            check=lambda _, folder=folder: _takes_frames(work / folder), needed=True,
        )  # fmt: skip
        asked = ("run", folder, *pictures, "--arm", "dense@fp32", "--json")
        yield Step(f"frames: labels are PyTorch's, {runtime}", asked, check=same(folder))


def _takes_frames(bundle: Path) -> None:
    [port] = manifest(bundle)["inputs"]
    assert (port["dtype"], port["shape"]) == ("uint8", [1, 224, 224, 1]), port


def _boards(work: Path) -> Iterator[Step]:
    def engine(_: str) -> None:
        folder = work / JETSON.format("tensorrt")
        assert {arm["checked"] for arm in manifest(folder)["arms"]} == {"graph-checked, not run"}
        assert "graph-checked, not run" in (folder / "README.md").read_text(encoding="utf-8")
        for recipe in ("deepstream/config_infer_primary.txt", "deepstream/pipeline.sh", "gstreamer/camera.py"):
            assert "graph-checked, not run" in (folder / "recipes" / recipe).read_text(encoding="utf-8"), recipe

    def thirteen(out: str) -> None:
        found = json.loads(out)["targets"]
        assert len(found) == 13
        assert all(runtime["why"] and runtime["requirements"] for one in found for runtime in one["runtimes"])

    def hashed(_: str) -> None:
        house = next((work / "house").glob("*wheelhouse*"))
        assert list(house.glob("*.whl"))
        assert "sha256" in "".join(p.read_text(encoding="utf-8") for p in house.glob("*.txt"))

    jetson = ("build", *MODEL, *SPLITS, "--target", "jetson-orin-nano", "--energy", "0.998", "--out", "jetson")
    yield Step("build for TensorRT", (*jetson, "--runtime", "tensorrt"), check=engine, needed=True)
    # told to stand in for the Jetson, or both would be refused as bundles of another machine
    engine_here, cuda_here = (("verify", JETSON.format(one), "--stand-in") for one in ("tensorrt", "onnxruntime"))
    yield Step("an engine elsewhere", engine_here, code=2, says=("python3-libnvinfer",))
    yield Step("build for CUDA", (*jetson, "--runtime", "onnxruntime", "--precision", "fp16"), needed=True)
    yield Step("no silent CPU run", cuda_here, code=2, says=("CUDAExecutionProvider",))
    yield Step("all targets", ("targets", "--json"), check=thirteen)
    yield Step("doctor", ("doctor",), says=("onnxruntime", "openvino", "tflite"))
    pi = "raspberry-pi-5"
    yield Step("doctor for a board", ("doctor", pi), says=(f"building for {pi}", "on the board:", *installs(pi)))
    ready = ("building for generic-x86, and running its bundles", "nothing in the way")
    yield Step("doctor for this machine", ("doctor", "generic-x86"), says=ready)
    python = str(work / "board" / "bin" / "python")
    yield Step("a bare board: doctor", (PYZ, "doctor", OUT), python=python, says=("onnxruntime", "free memory"))
    other = (PYZ, "verify", _bundle("openvino"))
    yield Step("a bare board: another runtime", other, python=python, code=2, says=("openvino", "pip install"))
    house = (*VIT, "--target", "raspberry-pi-4", "--runtime", "tflite", "--wheelhouse")
    yield Step("a wheelhouse", (*house, "--out", "house"), check=hashed)


def _bad(work: Path) -> Iterator[Step]:
    def cut(runtime: str) -> Callable[[], None]:
        def before() -> None:
            folder = work / f"cut-{runtime}"
            shutil.copytree(work / (OUT if runtime == "onnxruntime" else _bundle(runtime)), folder)
            arm = folder / manifest(folder)["arms"][0]["artifact"]
            arm.write_bytes(arm.read_bytes()[: arm.stat().st_size // 2])

        return before

    for runtime in RUNTIMES:
        unsupported = build(*CALIB, "--runtime", runtime, model="net.py:unsupported", weights="")
        yield bad(f"an unsupported operator, {runtime}", unsupported, "bessel_j0", r"maxpool\.1")
    yield bad("a free batch for tflite", build(*CALIB, "--runtime", "tflite", "--dynamic-batch"), "batch")
    yield bad(
        "a runtime the board lacks", build(*CALIB, "--target", "jetson-xavier-nx", "--runtime", "openvino"), "tflite"
    )
    yield bad("a precision the board lacks", build(*CALIB, "--target", "raspberry-pi-4", "--precision", "fp16"), "int8")
    yield bad("an opset that is too new", build(*CALIB, "--target", "bad/opset.toml"), "at most 20, which 1.17.0", "21")
    yield bad("an IR version that is too new", build(*CALIB, "--target", "bad/ir.toml"), "ir_version", "13")
    yield bad("int8 without data", build("--precision", "int8"), "calibration data")
    missing = build("--calib", "cells.py:pictures", model="net.py:WithKind", weights="")
    yield bad("data that miss an input", missing, "kind")
    yield bad("a precision of linear layers", build(*CALIB, "--precision", "int8-dynamic"), "convolutions")
    auto = build(*CALIB, "--target", "jetson-orin-nano", "--runtime", "tensorrt", "--precision", "auto")
    yield bad("auto without the device", auto, "tensorrt")
    for runtime in ("onnxruntime", *RUNTIMES):
        yield bad(f"a file cut short, {runtime}", ("verify", f"cut-{runtime}"), "arms/", before=cut(runtime))
    fuzz = str(Path(__file__).with_name("fuzz_artifacts.py"))
    bundles = (OUT, *map(_bundle, RUNTIMES))
    yield Step("damage takes no caller down", (fuzz, *bundles, "--count", "20"), python=sys.executable)
