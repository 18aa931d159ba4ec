from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import DataError, MissingDependencyError

GREY = Preprocess(mode="L", height=2, width=3, mean=(0.5,), std=(0.25,))
COLOUR = Preprocess(mode="RGB", height=2, width=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
FRAME = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


def test_pixels_follow_the_formula_bit_for_bit() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    mean, std = np.asarray(COLOUR.mean, np.float32), np.asarray(COLOUR.std, np.float32)
    expected = ((frame.astype(np.float32) * np.float32(COLOUR.scale) - mean) / std).transpose(2, 0, 1)
    tensor = COLOUR.pixels(frame)
    np.testing.assert_array_equal(tensor, expected)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous


def test_a_frame_of_the_right_size_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    np.testing.assert_array_equal(GREY.frame(FRAME), GREY.pixels(FRAME))
    np.testing.assert_array_equal(GREY.frame(FRAME[:, :, None]), GREY.pixels(FRAME))
    with pytest.raises(MissingDependencyError, match="pip install 'pillow'"):
        GREY.frame(np.zeros((4, 4), np.uint8))


def test_a_frame_of_another_size_or_mode_goes_through_pillow() -> None:
    assert GREY.frame(np.full((20, 30, 1), 51, np.uint8)).ravel() == pytest.approx([(0.2 - 0.5) / 0.25] * 6)
    assert GREY.frame(np.full((2, 3, 3), 255, np.uint8)).ravel() == pytest.approx([2.0] * 6)
    assert COLOUR.frame(FRAME).shape == (3, 2, 3)


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3), (2,), (1, 1, 2, 3)])
def test_frames_of_other_kinds_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="camera frame"):
        GREY.frame(np.zeros(shape, np.uint8))


def test_a_frame_that_is_not_uint8_is_refused() -> None:
    with pytest.raises(DataError, match="uint8"):
        GREY.frame(np.zeros((2, 3), np.uint16))


def test_files_of_every_kind_give_the_same_tensor(tmp_path: Path) -> None:
    Image.fromarray(FRAME).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", FRAME)
    np.save(tmp_path / "tensor.npy", GREY.pixels(FRAME).astype(np.float64))
    FRAME.tofile(tmp_path / "a.raw")
    for name in ("a.png", "a.npy", "tensor.npy", "a.raw"):
        np.testing.assert_allclose(GREY.file(tmp_path / name), GREY.pixels(FRAME), rtol=1e-6)


def bad_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / kind
    if kind == "text.png":
        path.write_text("no picture")
    elif kind == "cut.png":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "deep.png":
        Image.fromarray(np.full((2, 3), 40_000, np.uint16)).save(path)
    elif kind == "pickled.npy":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif kind == "archive.npy":
        with path.open("wb") as file:
            np.savez(file, a=FRAME)
    elif kind == "nan.npy":
        np.save(path, np.full((1, 2, 3), np.nan, np.float32))
    elif kind == "shape.npy":
        np.save(path, np.zeros((1, 3, 2), np.float32))
    elif kind == "empty.npy":
        path.write_bytes(b"")
    elif kind == "short.raw":
        path.write_bytes(b"12345")
    elif kind == "folder.png":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing.png", "text.png", "cut.png", "deep.png", "folder.png", "pickled.npy", "archive.npy", "nan.npy",
     "shape.npy", "empty.npy", "short.raw"],
)  # fmt: skip
def test_a_bad_file_is_one_error_that_names_it(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=kind) as caught:
        GREY.file(bad_file(tmp_path, kind))
    assert caught.value.expected
    assert caught.value.got


def test_a_picture_is_resized_and_converted() -> None:
    tensor = GREY.image(Image.new("RGB", (30, 20), (255, 255, 255)))
    assert tensor.shape == GREY.shape
    assert tensor.ravel() == pytest.approx([2.0] * 6)


def test_dict_round_trip() -> None:
    assert Preprocess.from_dict(COLOUR.to_dict()) == COLOUR
    assert Preprocess.from_dict({"mode": "L", "mean": [0], "std": [1]}) == Preprocess(mode="L", mean=(0,), std=(1,))


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "CMYK"}, {"resample": "best"}, {"mean": [0.0]}, {"mean": 0.5}, {"std": [0.0, 1.0, 1.0]},
        {"height": 0}, {"height": "224"}, {"width": True}, {"scale": float("nan")}, {"scale": None},
        {"mean": [0, 0, "x"]}, {"colour": 1},
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="preprocess"):
        Preprocess.from_dict(values)
