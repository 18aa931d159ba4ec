"""The ELPV images in the splits of `sample:elpv-resnet18`, as one grey channel; training takes good cells only.

Calibration, selection and test hold good and defective cells: what a line delivers, and what ranges have to cover.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import DataError
from rowcol_edge.user_code import import_file

HERE = Path(__file__).resolve().parent


@functools.cache
def cells() -> ModuleType:
    """The data module of the sample that owns the splits."""
    return import_file(HERE.parent / "elpv-resnet18" / "data.py", DataError)


def preprocess() -> Preprocess:
    recipe: Preprocess = cells().preprocess()
    return recipe


def images(split: str) -> Iterator[tuple[Any, int]]:
    """(Pillow image, label) pairs; of ``train`` the good cells."""
    pairs = zip(cells().indices(split), cells().images(split), strict=True)
    yield from (pair for index, pair in pairs if split != "train" or cells().table()[index][1] == 0)


def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells with a defect probability of 0."""
    good = np.array([cells().table()[index][1] == 0 for index in cells().indices("train")])
    start = 0
    for inputs, labels in cells().batches("train"):
        kept = good[start : start + len(labels)]
        start += len(labels)
        yield inputs[kept], labels[kept]


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return cells().batches("calibration")


def selection() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return cells().batches("selection")


def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return cells().batches("test")
