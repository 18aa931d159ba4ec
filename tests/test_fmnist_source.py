"""The committed Fashion-MNIST images are rows of the data set that Debian packages."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

ORIGINALS = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def committed(root: Path) -> dict[str, npt.NDArray[np.generic]]:
    with np.load(root / "sample_models" / "fmnist-vit" / "images.npz", allow_pickle=False) as stored:
        return dict(stored)


def idx(name: str, header: int) -> npt.NDArray[np.uint8]:
    with gzip.open(ORIGINALS / name) as stream:
        return np.frombuffer(stream.read(), np.uint8)[header:]


@pytest.mark.system("dataset-fashion-mnist")
@pytest.mark.parametrize(("split", "part"), [("calibration", "train"), ("selection", "train"), ("test", "t10k")])
def test_the_committed_images_are_the_original_rows(
    committed: dict[str, npt.NDArray[np.generic]], split: str, part: str
) -> None:
    rows = committed[f"{split}_rows"]
    pixels = idx(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    np.testing.assert_array_equal(committed[f"{split}_images"], pixels[rows])
    np.testing.assert_array_equal(committed[f"{split}_labels"], idx(f"{part}-labels-idx1-ubyte.gz", 8)[rows])


def test_the_splits_share_no_row_and_hold_every_class(committed: dict[str, npt.NDArray[np.generic]]) -> None:
    calibration, selection = set(committed["calibration_rows"].tolist()), set(committed["selection_rows"].tolist())
    assert not calibration & selection
    for split in ("calibration", "selection", "test"):
        assert len(set(committed[f"{split}_rows"].tolist())) == len(committed[f"{split}_labels"])
        assert set(committed[f"{split}_labels"].tolist()) == set(range(10))
