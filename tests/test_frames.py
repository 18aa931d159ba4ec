"""Preprocessing in the graph: the artifact takes camera frames and decides as the PyTorch model does on tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms
from torchvision.models import resnet18

import rowcol_edge
from rowcol_edge import models, samples, user_code
from rowcol_edge.backends import BACKENDS, load_backend
from rowcol_edge.device.predictor import Predictor
from rowcol_edge.device.preprocess import Frames, Preprocess
from rowcol_edge.errors import ConfigError, DataError
from rowcol_edge.frames import bake

from . import stored
from .device.fake_nvidia import standing_in

RUNTIMES = sorted(name for name in BACKENDS if load_backend(name).host_runtime == name)
"""Those whose own arithmetic is used here: what stands in for another calculates as one of these does."""
RECIPE = Preprocess(mode="RGB", height=12, width=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


class Colours(nn.Module):
    """Three logits of a picture whose brightest channel is to be named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.conv(picture)).mean((2, 3)))
        return logits + 5 * picture.mean((2, 3))


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, 12, 16, 3), one channel brighter, and its number."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 180, (count, 12, 16, 3))
    for i, label in enumerate(labels):
        pixels[i, :, :, label] += 60
    return pixels.astype(np.uint8), labels.astype(np.int64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Calibration as pictures in files, selection as uint8 arrays, test as the tensors that the recipe makes."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "calib").mkdir()
    for i, picture in enumerate(pictures(24, 0)[0]):
        Image.fromarray(picture).save(folder / "calib" / f"{i:03d}.png")
    pixels, labels = pictures(60, 1)
    np.savez(folder / "select.npz", x=pixels, labels=labels)
    pixels, labels = pictures(60, 2)
    np.savez(folder / "test.npz", x=np.stack([RECIPE.pixels(p) for p in pixels]), labels=labels)
    return {"calib": str(folder / "calib"), "select": str(folder / "select.npz"), "test": str(folder / "test.npz")}


def build(model: str | nn.Module, data: dict[str, str], out: Path, **options: Any) -> rowcol_edge.Built:
    given: dict[str, Any] = {"preprocess": RECIPE, "labels": ["r", "g", "b"], "bake_preprocess": True, "zip": False}
    return rowcol_edge.build(model, out=str(out), **data, **{**given, **options})[0]


@pytest.fixture
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with standing_in(request.param, tmp_path / "engines"):
        yield request.param


BAKED = [*product(sorted(BACKENDS), ("fp32", "int8")), ("tflite", "int8-io")]


@pytest.mark.parametrize(("runtime", "precision"), BAKED, indirect=["runtime"])
def test_an_artifact_takes_frames_and_decides_as_the_model(
    runtime: str, precision: str, data: dict[str, str], tmp_path: Path
) -> None:
    net = Colours()
    target = "jetson-orin-nano" if runtime == "tensorrt" else "generic-x86"
    built = build(net, data, tmp_path / "out", target=target, runtime=runtime, precision=precision)
    assert built.manifest.frames
    assert [(s.shape, s.dtype) for s in built.manifest.inputs] == [((1, 12, 16, 3), "uint8")]
    assert rowcol_edge.verify(built.path).ok
    assert built.manifest.arm().quality["test"]["value"] > 0.95
    _check_metadata(built)
    pixels, _ = pictures(30, 3)
    with torch.inference_mode():
        logits = net(torch.from_numpy(np.stack([RECIPE.pixels(p) for p in pixels]))).numpy()
    with Predictor(built.path, arm=f"dense@{precision}") as predictor:
        got = np.concatenate([predictor.run({"picture": p[None]})["output"] for p in pixels])
        assert [predictor.predict(p).label for p in pixels] == [("r", "g", "b")[i] for i in logits.argmax(1)]
    assert np.linalg.norm(got - logits) <= (1e-5 if precision == "fp32" else 0.1) * np.linalg.norm(logits)


def _check_metadata(built: rowcol_edge.Built) -> None:
    """Each arm's file says itself what it is."""
    for arm in built.manifest.arms:
        said = stored.metadata(built.path / arm.artifact)
        assert said["rowcol_edge.arm"] == arm.name
        assert json.loads(said["rowcol_edge.labels"]) == ["r", "g", "b"]
        assert Preprocess.from_dict(json.loads(said["rowcol_edge.preprocess"])) == Preprocess.from_dict(
            RECIPE.to_dict()
        )
        assert json.loads(said["rowcol_edge.frames"]) is True
        assert said.get("rowcol_edge.plan_digest") == arm.plan_digest


def test_every_way_to_hand_over_a_picture_gives_the_same_answer(data: dict[str, str], tmp_path: Path) -> None:
    built = build(Colours(), data, tmp_path, precision="fp32", dense=False)
    pixels = pictures(1, 4)[0][0]
    Image.fromarray(pixels).save(tmp_path / "part.png")
    pixels.tofile(tmp_path / "part.raw")
    np.save(tmp_path / "part.npy", pixels)
    np.savez(tmp_path / "part.npz", picture=pixels[None])
    larger = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
    with Predictor(built.path) as predictor:
        wanted = predictor.predict(pixels).scores
        for name in ("part.png", "part.raw", "part.npy", "part.npz"):
            assert predictor.predict(tmp_path / name).scores == wanted
        assert predictor.predict(Image.fromarray(pixels)).scores == wanted
        assert predictor.predict(pixels[None]).scores == wanted
        assert predictor.predict(larger).scores == predictor.predict(np.asarray(larger)).scores
        np.save(tmp_path / "float.npy", RECIPE.pixels(pixels))
        with pytest.raises(DataError, match=r"a uint8 frame, got float32 \(3, 12, 16\)"):
            predictor.predict(tmp_path / "float.npy")


def test_a_saved_program_is_baked_too(data: dict[str, str], tmp_path: Path) -> None:
    example = (torch.zeros(2, 3, 12, 16),)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Colours().eval(), example, dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "net.pt2")
    built = build(str(tmp_path / "net.pt2"), data, tmp_path / "out", precision="fp32", dynamic_batch=True)
    assert built.manifest.inputs[0].shape == (None, 12, 16, 3)
    assert built.manifest.arm().quality["test"]["flips"] == 0


def test_layers_keep_their_names_and_the_caller_keeps_the_model(data: dict[str, str], tmp_path: Path) -> None:
    net = Colours()
    built = build(net, data, tmp_path, precision="fp32", energy=0.9)
    assert not net._forward_pre_hooks
    assert 'name = "conv"' in (built.path / "plan.toml").read_text()


def test_grey_frames_may_lack_the_channel_axis() -> None:
    recipe = Frames(mode="L", height=4, width=5, mean=(0.0,), std=(1.0,))
    frame = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(recipe.frame(frame), frame[:, :, None])
    assert recipe.shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (np.zeros((8, 3, 12, 15), np.float32), r"frames \(12, 16, 3\) in uint8, or .*\(3, 12, 16\), got \(3, 12, 15\)"),
        (np.random.default_rng(0).normal(size=(8, 3, 12, 16)).astype(np.float32), "the preprocess makes of 8-bit"),
        (np.full((8, 3, 12, 16), 9.0, np.float32), "pixel values such as"),
    ],
)
def test_data_that_no_camera_delivers_are_refused(tensors: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x=tensors)
    with pytest.raises(DataError, match=message):
        build(Colours(), {"calib": str(tmp_path / "calib.npz")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_needs_a_recipe_and_one_input(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got no preprocess"):
        build(Colours(), {"calib": data["select"]}, tmp_path / "out", preprocess=None)

    class Two(nn.Module):
        def forward(self, picture: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return picture + other

    with pytest.raises(ConfigError, match="inputs picture, other"):
        bake(models.load(Two()), Frames.from_dict(RECIPE.to_dict()))


def test_another_recipe_is_another_model(data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path / "cache"))
    pixels = pictures(4, 5)[0]

    def outputs(recipe: Preprocess, out: str) -> np.ndarray:
        options = {"precision": "fp32", "dense": False, "energy": 1.0, "preprocess": recipe}
        built = build(Colours(), {"calib": data["select"]}, tmp_path / out, **options)
        with Predictor(built.path) as predictor:
            return np.concatenate([predictor.run({"picture": p[None]})["output"] for p in pixels])

    other = replace(RECIPE, std=(0.05, 0.05, 0.05))
    first, second = outputs(RECIPE, "a"), outputs(other, "b")
    with torch.inference_mode():
        for recipe, got in ((RECIPE, first), (other, second)):
            wanted = Colours()(torch.from_numpy(np.stack([recipe.pixels(p) for p in pixels]))).numpy()
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def elpv(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few cells of each split as files: what a build is judged on does not matter here."""
    folder = tmp_path_factory.mktemp("elpv")
    sample = samples.load("elpv-resnet18")
    pictures = user_code.resolve(f"{sample.data}:images", DataError, "data")
    splits = {"calib": "calibration", "select": "selection", "test": "test"}
    for role, split in splits.items():
        for number, (picture, label) in enumerate(islice(pictures(split), 16)):
            name = folder / role / sample.labels[int(label)] / f"{number:03d}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            picture.save(name)
    return {role: str(folder / role) for role in splits}


@pytest.fixture(scope="module")
def elpv_scores() -> list[tuple[Image.Image, float]]:
    """Each picture of ELPV's whole test split, and how defective PyTorch holds it to be: with torchvision's network and
    transforms and the numbers of sample.toml, nothing of ours."""
    sample = samples.load("elpv-resnet18")
    net = resnet18(num_classes=2)
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    net.load_state_dict({name: weight.float() for name, weight in load_file(sample.weights).items()})
    net.eval()
    recipe = transforms.Compose([
        transforms.Grayscale(), transforms.Resize((224, 224)), transforms.ToTensor(),
        transforms.Normalize([0.6], [0.16]),
    ])  # fmt: skip
    pictures = user_code.resolve(f"{sample.data}:images", DataError, "data")
    with torch.inference_mode():
        return [(picture, net(recipe(picture)[None]).softmax(1)[0, 1].item()) for picture, _ in pictures("test")]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_elpv_labels_are_those_of_the_pytorch_model_on_the_whole_test_split(
    runtime: str, elpv: dict[str, str], elpv_scores: list[tuple[Image.Image, float]], tmp_path: Path
) -> None:
    built = rowcol_edge.build(
        "sample:elpv-resnet18", out=str(tmp_path), runtime=runtime, precision="fp32", bake_preprocess=True, energy=1.0,
        dense=False, calib_size=8, zip=False, **elpv,
    )[0]  # fmt: skip
    with Predictor(built.path) as predictor:
        threshold = predictor.arm.threshold
        predicted = [predictor.predict(picture) for picture, _ in elpv_scores]
    scores = [score for _, score in elpv_scores]
    wanted = [score >= threshold for score in scores]
    assert [prediction.label == "defective" for prediction in predicted] == wanted
    np.testing.assert_allclose([prediction.scores["defective"] for prediction in predicted], scores, atol=1e-4)
    assert (len(wanted), any(wanted), all(wanted)) == (420, True, False)
