"""Fashion-MNIST: calibration, selection and test images from images.npz, training images from a Debian package.

images.npz holds 128 calibration and 400 selection images of the 60,000 training images (which the training leaves out)
and 400 of the 10,000 test images, the same number of each class give or take one, with their row numbers in the
original files. The rest is read from Debian's dataset-fashion-mnist.
"""

from __future__ import annotations

import functools
import gzip
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import DataError

HERE = Path(__file__).resolve().parent
BATCH = 64
COMMITTED = ("calibration", "selection", "test")
ORIGINALS = Path("/usr/share/datasets/fashion-mnist")  # FASHION_MNIST names another folder


@functools.cache
def preprocess() -> Preprocess:
    """The recipe of sample.toml, the only place where it is written down."""
    return Preprocess.from_dict(tomllib.loads((HERE / "sample.toml").read_text(encoding="utf-8"))["preprocess"])


def original(part: str) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, 28, 28) uint8 and labels (N,) uint8 of `part`, "train" or "t10k", from the gzipped IDX files."""
    folder = Path(os.environ.get("FASHION_MNIST", ORIGINALS))
    pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz", header=16)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    if pixels.size != labels.size * 28 * 28:
        raise DataError(str(folder), expected=f"{labels.size} images of 28×28", got=f"{pixels.size} pixels")
    return pixels.reshape(-1, 28, 28), labels


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.is_file():
        hint = "apt-get install dataset-fashion-mnist (Debian), or set FASHION_MNIST to the folder of the .gz files"
        raise DataError(str(path), expected="a Fashion-MNIST file", got="no such file", hint=hint)
    with gzip.open(path) as stream:
        data = np.frombuffer(stream.read(), np.uint8)
    return data[header:]


@functools.cache
def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) uint8 and labels (N,) uint8 of a split."""
    with np.load(HERE / "images.npz", allow_pickle=False) as stored:
        if split in COMMITTED:
            return stored[f"{split}_images"], stored[f"{split}_labels"]
        held_out = np.concatenate([stored["calibration_rows"], stored["selection_rows"]])
    if split != "train":
        raise DataError("split", expected=f"one of {('train', *COMMITTED)}", got=repr(split))
    pixels, labels = original("train")
    return np.delete(pixels, held_out, axis=0), np.delete(labels, held_out)


def images(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8 picture (28, 28), label) pairs."""
    pixels, labels = arrays(split)
    for picture, label in zip(pixels, labels, strict=True):
        yield picture, int(label)


def batches(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs float32 (N, 1, 28, 28), labels int64 (N,)) with N ≤ 64."""
    recipe = preprocess()
    pixels, labels = arrays(split)
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        yield np.stack([recipe.pixels(picture) for picture in pixels[part]]), labels[part].astype(np.int64)


def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("train")


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("calibration")


def selection() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("selection")


def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("test")
