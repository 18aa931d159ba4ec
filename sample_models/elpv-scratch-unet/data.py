"""Good cells of the ELPV images with scratches drawn on them, and where they are.

The cells (defect probability 0) are real, in the splits of `sample:elpv-resnet18`; the scratches are not: up to three
curves a cell, three to six pixels of the original's 300 wide, darker or brighter than what is below them. What is drawn
follows from the number of the cell and of the view alone, so a split is always the same.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import DataError, MissingDependencyError
from rowcol_edge.user_code import import_file

HERE = Path(__file__).resolve().parent
BATCH = 32
SEED = 20243
CLEAN = 0.2  # of the cells have no scratch
_POINTS = 40  # of a curve
_COVERED = 96  # of 255: a pixel that a scratch covers to this share is one of it


@functools.cache
def cells() -> ModuleType:
    """The data module of the sample that owns the splits."""
    return import_file(HERE.parent / "elpv-resnet18" / "data.py", DataError)


@functools.cache
def preprocess() -> Preprocess:
    """The recipe of sample.toml, the only place where it is written down."""
    return Preprocess.from_dict(tomllib.loads((HERE / "sample.toml").read_text(encoding="utf-8"))["preprocess"])


def good(split: str) -> Iterator[tuple[int, Any]]:
    """(row of the dataset, Pillow image) of the cells without a defect."""
    for index, (picture, _) in zip(cells().indices(split), cells().images(split), strict=True):
        if cells().table()[index][1] == 0:
            yield index, picture


def scratched(index: int, picture: Any, view: int = 0) -> tuple[Any, np.ndarray]:
    """(Pillow image with scratches, mask (96, 96) uint8)."""
    try:
        from PIL import Image
    except ImportError as e:
        raise MissingDependencyError("drawing scratches", package="pillow") from e
    recipe, rng = preprocess(), np.random.default_rng([SEED, index, view])
    mask = Image.new("L", picture.size)
    for _ in range(0 if rng.random() < CLEAN else int(rng.integers(1, 4))):
        drawn = _curve(rng, picture.size)
        strength = rng.uniform(25, 80) * (1 if rng.random() < 0.3 else -1)
        share = np.asarray(drawn, np.float32) / 255.0
        pixels = np.asarray(picture.convert("L"), np.float32) + strength * share
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        mask = Image.fromarray(np.maximum(np.asarray(mask), np.asarray(drawn)))
    small = mask.resize((recipe.width, recipe.height), Image.Resampling.BOX)
    return picture, (np.asarray(small) >= _COVERED).astype(np.uint8)


def _curve(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    """A quadratic Bézier curve, white on black, blurred by a pixel."""
    from PIL import Image, ImageDraw, ImageFilter

    start = rng.uniform(0.05, 0.95, 2) * size
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.7) * size[0]
    end = start + length * np.array([np.cos(angle), np.sin(angle)])
    bend = (start + end) / 2 + rng.normal(0, 0.1 * length, 2)
    t = np.linspace(0, 1, _POINTS)[:, None]
    points = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    drawn = Image.new("L", size)
    width = int(rng.integers(3, 7))
    ImageDraw.Draw(drawn).line([tuple(point) for point in points.tolist()], fill=255, width=width, joint="curve")
    return drawn.filter(ImageFilter.GaussianBlur(1))


def images(split: str) -> Iterator[tuple[Any, np.ndarray]]:
    """(Pillow image 300×300, mask (96, 96)) pairs."""
    for index, picture in good(split):
        yield scratched(index, picture)


def batches(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs float32 (N, 1, 96, 96), masks int64 (N, 96, 96)) with N ≤ 32; 1 is a scratch."""
    recipe = preprocess()
    inputs: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for picture, mask in images(split):
        inputs.append(recipe.image(picture))
        masks.append(mask)
        if len(inputs) == BATCH:
            yield np.stack(inputs), np.stack(masks).astype(np.int64)
            inputs, masks = [], []
    if inputs:
        yield np.stack(inputs), np.stack(masks).astype(np.int64)


def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("train")


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("calibration")


def selection() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("selection")


def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("test")
