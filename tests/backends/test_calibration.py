"""What backends calibrate on, cut and spread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rowcol_edge.backends.base import Batch
from rowcol_edge.backends.calibration import spread
from rowcol_edge.backends.onnx_files import Port
from rowcol_edge.errors import DataError

FREE, ONE = (Port("x", "float32", (None, 1)),), (Port("x", "float32", (1, 1)),)


def batches() -> Iterator[Batch]:
    """Ten samples in batches of four, four and two."""
    values = np.arange(10, dtype=np.float32)[:, None]
    yield from ({"x": values[start : start + 4]} for start in range(0, 10, 4))


@pytest.mark.parametrize(("count", "wanted"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (99, [*range(10)])])
def test_samples_are_from_all_of_the_data(count: int, wanted: list[int]) -> None:
    assert [x for feed in spread(batches, FREE, count) for x in feed["x"].ravel().tolist()] == wanted
    assert [int(feed["x"][0, 0]) for feed in spread(batches, ONE, count)] == wanted


def test_they_are_checked_as_all_feeds_are() -> None:
    with pytest.raises(DataError, match="expected inputs y"):
        list(spread(batches, (Port("y", "float32", (None, 1)),), 3))
    with pytest.raises(DataError, match="int8 needs calibration data"):
        list(spread(None, FREE, 3))
    with pytest.raises(DataError, match="at least one sample, got none"):
        list(spread(lambda: iter(()), FREE, 3))
