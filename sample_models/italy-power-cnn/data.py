"""ItalyPowerDemand as the installed package `aeon` ships it: 1,096 days of electricity demand in Italy, hour by hour.

A day is 24 numbers, standardised by the archive; it is from October to March or from April to September. Both files of
the archive together are dealt out anew, class by class in the order of the files: the one for training has 67 days.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rowcol_edge.errors import DataError, MissingDependencyError

BATCH = 64
#: of ten days in a row, of one class
PATTERN = ("train", "selection", "train", "test", "train", "calibration", "train", "selection", "train", "test")
SPLITS = tuple(dict.fromkeys(PATTERN))
FILES = ("ItalyPowerDemand_TRAIN.ts", "ItalyPowerDemand_TEST.ts")


@functools.cache
def days() -> tuple[np.ndarray, np.ndarray]:
    """All days (N, 1, 24) float32 in the order of the files, and their classes (N,) int64."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("the series ItalyPowerDemand", package="aeon", hint="--no-deps is enough")
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data" / "ItalyPowerDemand"
    rows = [line for name in FILES for line in _data(folder / name)]
    series, labels = zip(*(line.rsplit(":", 1) for line in rows), strict=True)
    values = np.array([[float(value) for value in text.split(",")] for text in series], np.float32)
    return values[:, None], np.array(labels).astype(np.int64) - 1


def _data(path: Path) -> list[str]:
    """The lines below ``@data`` of a .ts file: ``value,value,...:class``."""
    if not path.is_file():
        raise DataError(str(path), expected="a series file of aeon", got="no such file", hint="reinstall aeon")
    text = path.read_text(encoding="utf-8")
    return [line for line in text.partition("@data")[2].splitlines() if line.strip()]


@functools.cache
def indices(split: str) -> np.ndarray:
    """Rows of one split, classes taking turns as in the files."""
    if split not in SPLITS:
        raise DataError("split", expected=f"one of {SPLITS}", got=repr(split))
    labels = days()[1]
    place = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        place[own] = np.arange(len(own))
    return np.flatnonzero([PATTERN[p % len(PATTERN)] == split for p in place])


def images(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """(series (1, 24), label) pairs."""
    series, labels = days()
    for index in indices(split):
        yield series[index], int(labels[index])


def batches(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs float32 (N, 1, 24), labels int64 (N,)) with N ≤ 64."""
    series, labels = days()
    rows = indices(split)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        yield series[part], labels[part]


def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("train")


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("calibration")


def selection() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("selection")


def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return batches("test")
