"""Batches of the ELPV sample's pictures with the kind of each cell, for a model that takes both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rowcol_edge import samples, user_code
from rowcol_edge.errors import DataError

Batches = Iterator[tuple[dict[str, np.ndarray], np.ndarray]]


def _own(name: str) -> Any:
    return user_code.resolve(f"{samples.load('elpv-resnet18').data}:{name}", DataError, "data")


def _read(split: str) -> Batches:
    kinds = np.array([[kind == "mono"] for _, _, kind in _own("table")()], np.float32)
    places = list(_own("indices")(split))
    for pictures, labels in _own("batches")(split):
        here, places = places[: len(labels)], places[len(labels) :]
        yield {"picture": pictures, "kind": kinds[here]}, labels


def calibration() -> Batches:
    return _read("calibration")


def selection() -> Batches:
    return _read("selection")


def test() -> Batches:
    return _read("test")


def pictures() -> Iterator[dict[str, np.ndarray]]:
    """Without the kinds."""
    return ({"picture": feeds["picture"]} for feeds, _ in calibration())


def nothing() -> Batches:
    return iter(())
