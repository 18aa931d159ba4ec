"""Raspberry Pi bundles in arm64 userlands, as a Pi 4 and a Pi 5: the short form of `tools/arm64_userland.py prove`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rowcol_edge
from rowcol_edge import targets, wheelhouse
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.preprocess import Preprocess

from .nets import write_splits

TOOL = "tools/arm64_userland.py"


def tool(root: Path, *arguments: str | Path, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"ROWCOL_CACHE": str(cache)} if cache else {})
    command = [sys.executable, TOOL, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both boards' bundles hold the same files: the second board's are taken from what the first one's build made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tools(root: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules behind the tool."""
    monkeypatch.syspath_prepend(str(root / "tools"))
    import arm64_packages
    import arm64_proof
    import arm64_root

    return SimpleNamespace(packages=arm64_packages, proof=arm64_proof, root=arm64_root)


def small(out: Path, **options: str) -> Path:
    """A bundle of two linear layers for a Raspberry Pi."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    [built] = rowcol_edge.build(
        net, labels=["plain", "striped"], metric="accuracy", energy=0.98, zip=False, out=str(out / "bundles"),
        **options, **write_splits(out),
    )  # fmt: skip
    return Path(built.path)


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("net"), target="raspberry-pi-5", runtime="onnxruntime")


@pytest.mark.system("arm64-userland")
@pytest.mark.parametrize(
    ("target", "suite", "cpu", "opened_by"),
    [
        ("raspberry-pi-4", "bookworm", "Cortex-A72", {"ai-edge-litert", "tflite-runtime"}),
        ("raspberry-pi-5", "trixie", "Cortex-A76", {"ai-edge-litert"}),  # whose Python the other has no wheels for
    ],
)
def test_every_runtime_gives_its_golden_outputs_on_the_board(
    root: Path, tmp_path: Path, cache: Path, target: str, suite: str, cpu: str, opened_by: set[str]
) -> None:
    out = tmp_path / "arm64.json"
    done = tool(
        root, "prove", "--samples", "fmnist-vit", "--targets", target, "--suites", suite, "--precisions", "int8",
        "--out", out, cache=cache,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    proofs = json.loads(out.read_text(encoding="utf-8"))["proofs"]
    assert {proof["runtime"] for proof in proofs} == {"onnxruntime", "openvino", "tflite"}
    used = {proof["environment"]["package"] for proof in proofs if proof["runtime"] == "tflite"}
    assert used == opened_by
    for proof in proofs:
        assert [arm["name"] for arm in proof["arms"]] == ["factored@int8", "dense@int8", "dense@fp32"]
        assert all(arm["ok"] and arm["relative_error"] <= arm["tolerance"] for arm in proof["arms"])
        assert proof["run"]["score_difference"] < 0.05
        where = proof["environment"]
        assert (where["evidence"], where["cpu_model"]) == ("emulated", cpu)
        assert ("asimddp" in where["isa"]) == (target == "raspberry-pi-5")  # the dot-product instructions


@pytest.mark.system("arm64-userland")
def test_tflite_quantized_at_each_inference_is_right_in_both_packages(root: Path, tmp_path: Path) -> None:
    bundle = small(tmp_path, target="raspberry-pi-4", runtime="tflite", precision="int8-dynamic")
    done = tool(root, "prove", bundle, "--suites", "bookworm", "--out", tmp_path / "arm64.json")
    assert done.returncode == 0, done.stdout + done.stderr
    proofs = json.loads((tmp_path / "arm64.json").read_text(encoding="utf-8"))["proofs"]
    assert {proof["environment"]["package"] for proof in proofs} == {"ai-edge-litert", "tflite-runtime"}
    assert all(arm["ok"] for proof in proofs for arm in proof["arms"])


@pytest.mark.system("arm64-userland")
def test_a_wheelhouse_is_all_that_a_board_needs(root: Path, tmp_path: Path, small_bundle: Path) -> None:
    target = targets.load("raspberry-pi-5")
    made = wheelhouse.collect(target, target.runtime("onnxruntime"), tmp_path / "wheelhouse", lambda *_: None)
    done = tool(root, "prove-wheelhouse", made, small_bundle, "--suites", "trixie")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installed and verified: onnxruntime" in done.stdout


def test_an_answer_that_arrives_twice_is_one(tools: SimpleNamespace) -> None:
    said = '{"machine": "aarch64"}\n'
    assert tools.proof._once(said * 2) == tools.proof._once(said) == said
    assert tools.proof._once(said + "{}") == said + "{}"
    assert tools.proof._once("") == ""


def test_proofs_that_were_not_asked_for_stay(tools: SimpleNamespace, tmp_path: Path) -> None:
    import arm64_userland

    def result(source: str, *proofs: tuple[str, str, str]) -> dict[str, Any]:
        found = [{"target": target, "runtime": runtime, "version": version} for target, runtime, version in proofs]
        return {"source": source, "tools": {}, "proofs": found}

    path = tmp_path / "arm64.json"
    arm64_userland._keep(first := result("1", ("pi-5", "tflite", "a"), ("pi-4", "tflite", "a")), path)
    assert len(first["proofs"]) == 2
    path.write_text(json.dumps(first))
    arm64_userland._keep(second := result("1", ("pi-4", "tflite", "b")), path)
    assert [(found["target"], found["version"]) for found in second["proofs"]] == [("pi-4", "b"), ("pi-5", "a")]
    arm64_userland._keep(other := result("2", ("pi-4", "tflite", "c")), path)
    assert len(other["proofs"]) == 1


def test_a_board_that_is_not_emulated_arm_proves_nothing(tools: SimpleNamespace, small_bundle: Path) -> None:
    class ThisMachine:
        def run(self, python: Path, *arguments: str, cpu: str, path: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [python, *arguments], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
            )

    guest = tools.proof.Guest(ThisMachine(), "cortex-a72", Path(sys.executable))
    with pytest.raises(tools.proof.NotProvenError, match="not for emulated aarch64"):
        tools.proof.where(guest, small_bundle, ())
    with pytest.raises(tools.proof.NotProvenError, match=r"exit code 2: error: .*expected a machine of kind aarch64"):
        tools.proof.verified(guest, small_bundle)


def test_an_arm_outside_its_tolerance_is_not_proven(tools: SimpleNamespace) -> None:
    good = {"name": "dense@fp32", "ok": True, "reason": "", "relative_error": 1e-7, "tolerance": 0.001}
    bad = {"name": "dense@int8", "ok": False, "reason": "", "relative_error": 0.5, "tolerance": 0.1}
    tools.proof.judge({"arms": [good]})
    with pytest.raises(tools.proof.NotProvenError, match=r"dense@int8: relative error 0\.5, tolerance 0\.1$"):
        tools.proof.judge({"arms": [good, bad]})


@pytest.mark.parametrize(("mode", "frames"), [("L", False), ("RGB", False), ("RGB", True)])
def test_the_picture_is_the_one_the_golden_input_was_made_from(tools: SimpleNamespace, mode: str, frames: bool) -> None:
    channels = {"L": 1, "RGB": 3}[mode]
    recipe = Preprocess(mode=mode, height=9, width=7, mean=(0.4,) * channels, std=(0.2,) * channels)
    frame = np.random.default_rng(0).integers(0, 256, (9, 7, channels), np.uint8)
    golden = frame if frames else recipe.pixels(frame)
    manifest = SimpleNamespace(
        frames=frames, preprocess=recipe.to_dict(), inputs=[TensorSpec("image", golden.shape, str(golden.dtype))]
    )
    bundle = SimpleNamespace(manifest=manifest, golden=lambda: ({"image": golden[None]}, {}))
    assert np.array_equal(np.asarray(tools.proof.picture(bundle)).reshape(frame.shape), frame)


def test_what_is_installed_is_what_the_target_says(tools: SimpleNamespace) -> None:
    spec = targets.load("raspberry-pi-5").runtime("onnxruntime")
    suites = tools.root.SUITES
    [first, oldest] = tools.packages.choices(spec, suites["bookworm"], oldest=True)
    assert first.requirements == ("onnxruntime>=1.17", "numpy", "pillow")
    assert oldest.requirements == ("onnxruntime==1.17.0", "numpy", "pillow", "numpy<2")
    # its wheels end before this Python
    assert [choice.label for choice in tools.packages.choices(spec, suites["trixie"], oldest=True)] == ["first"]
    assert [c.label for c in tools.packages.choices(replace(spec, oldest="1.18.0"), suites["bookworm"])] == ["first"]


def test_a_missing_program_is_named_by_its_package(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.root.os, "geteuid", lambda: 1000)
    there = {"debootstrap": "/usr/sbin/debootstrap", "qemu-aarch64": "/usr/bin/qemu-aarch64"}
    monkeypatch.setattr(tools.root.shutil, "which", lambda program, path=None: there.get(program))
    with pytest.raises(SystemExit, match=r"are missing: apt-get install dpkg fakeroot$"):
        tools.root.ensure("trixie")
    monkeypatch.setattr(tools.root.os, "geteuid", lambda: 0)
    assert tools.root.lacking() == ["dpkg"]


def test_a_killed_run_leaves_nothing_that_counts(tools: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    (tools.root.fresh(folder) / "half").touch()
    assert not folder.exists()
    (tools.root.fresh(folder) / "whole").touch()
    tools.root.finish(folder)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not tools.root.partial(folder).exists()
