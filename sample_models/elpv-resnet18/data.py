"""The ELPV images of the installed package `elpv-dataset`, in the fixed splits of splits.json.

Nothing here is random: a split is always read in the order of its indices. Images are decoded one by one and never
written anywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import DataError, MissingDependencyError

HERE = Path(__file__).resolve().parent
BATCH = 64
SPLITS = ("train", "calibration", "selection", "test")
DEFECTIVE_FROM = 0.5  # a cell with at least this defect probability is labelled 1, "defective"


@functools.cache
def preprocess() -> Preprocess:
    """The recipe of sample.toml, the only place where it is written down."""
    return Preprocess.from_dict(tomllib.loads((HERE / "sample.toml").read_text(encoding="utf-8"))["preprocess"])


@functools.cache
def table() -> tuple[tuple[Path, float, str], ...]:
    """(image file, defect probability, cell type) of all cells, in the order of the dataset's labels.csv."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("the ELPV images", package="elpv-dataset")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    labels = folder / "labels.csv"
    if not labels.is_file():
        raise DataError(
            str(labels), expected="the label file of elpv-dataset", got="no such file", hint="reinstall elpv-dataset"
        )
    with labels.open(encoding="utf-8", newline="") as stream:
        rows = [line.split() for line in stream if line.strip()]
    return tuple((folder / name, float(probability), kind) for name, probability, kind in rows)


def label(index: int) -> int:
    return int(table()[index][1] >= DEFECTIVE_FROM)


@functools.cache
def indices(split: str) -> tuple[int, ...]:
    """The dataset rows of one split."""
    if split not in SPLITS:
        raise DataError("split", expected=f"one of {SPLITS}", got=repr(split))
    return tuple(json.loads((HERE / "splits.json").read_text(encoding="utf-8"))[split])


def images(split: str) -> Iterator[tuple[Any, int]]:
    """(Pillow image, label) pairs as the camera delivered them, 300×300 grey."""
    try:
        from PIL import Image
    except ImportError as e:
        raise MissingDependencyError("reading image files", package="pillow") from e
    for index in indices(split):
        with Image.open(table()[index][0]) as picture:
            yield picture.copy(), label(index)


def batches(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs float32 (N, 1, 224, 224), labels int64 (N,)) with N ≤ 64."""
    recipe = preprocess()
    inputs: list[np.ndarray] = []
    labels: list[int] = []
    for picture, number in images(split):
        inputs.append(recipe.image(picture))
        labels.append(number)
        if len(inputs) == BATCH:
            yield np.stack(inputs), np.asarray(labels, np.int64)
            inputs, labels = [], []
    if inputs:
        yield np.stack(inputs), np.asarray(labels, np.int64)


def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("train")


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("calibration")


def selection() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("selection")


def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("test")
