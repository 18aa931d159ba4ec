"""Calibration batches as the exported model takes them: checked one by one, cut to its batch size, never collected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .base import Batch, Calibration, is_finite
from .onnx_files import Port


def feeds(calibration: Calibration | None, inputs: tuple[Port, ...]) -> Iterator[Batch]:
    """Checked feeds for ``inputs``; one batch is held at a time.

    An input with a fixed first size gets that many samples a feed; the last feed of a batch is filled up with samples
    of that batch, which no range notices.

    Raises:
        DataError: no calibration, no batch in it, a missing or unknown input, another dtype or shape, NaN or infinity.
    """
    if calibration is None:
        raise DataError("int8 needs calibration data", expected="batches of real inputs", got="none")
    empty = True
    for number, batch in enumerate(calibration()):
        _check(batch, inputs, number)
        for feed in _cut(batch, inputs):
            empty = False
            yield feed
    if empty:
        raise DataError("calibration data", expected="at least one sample", got="none")


def spool(feeds: Iterable[Batch], names: Sequence[str], folder: Path) -> None:
    """One ``.npz`` a batch: the other process reads them one at a time, so that no memory holds them all."""
    folder.mkdir()
    for number, feed in enumerate(feeds):
        np.savez(folder / f"{number:06d}.npz", *(feed[name] for name in names))


def spread(calibration: Calibration | None, inputs: tuple[Port, ...], count: int) -> Iterator[Batch]:
    """`feeds` of ``count`` samples, or all, spread evenly over the calibration data: these often come sorted by class.

    The data are read twice.
    """
    if calibration is None:
        return feeds(None, inputs)
    sizes = [_samples(batch) for batch in calibration()]
    ends = np.cumsum(sizes)
    places = np.unique(np.linspace(0, sum(sizes) - 1, min(count, sum(sizes))).round())

    def few() -> Iterator[Batch]:
        for batch, size, end in zip(calibration(), sizes, ends, strict=True):
            here = (places[(places >= end - size) & (places < end)] - (end - size)).astype(np.intp)
            if len(here):
                yield {name: array[here] if array.ndim else array for name, array in batch.items()}

    return feeds(few, inputs)


def _samples(batch: Batch) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)


def _check(batch: Mapping[str, npt.NDArray[Any]], inputs: tuple[Port, ...], number: int) -> None:
    names = [port.name for port in inputs]
    if set(batch) != set(names):
        raise DataError(
            f"calibration batch {number}", expected=f"inputs {', '.join(names)}", got=", ".join(batch) or "no inputs"
        )
    for port in inputs:
        array = batch[port.name]
        what = f"calibration batch {number}, input {port.name!r}"
        if str(array.dtype) != port.dtype:
            raise DataError(what, expected=port.dtype, got=str(array.dtype))
        if port.shape is not None and not _fits(array.shape, port.shape):
            raise DataError(what, expected=f"shape {_text((None, *port.shape[1:]))}", got=_text(array.shape))
        if not is_finite(array):
            raise DataError(what, expected="finite values", got="NaN or infinity", hint="clean the data first")
    if len({len(batch[port.name]) for port in inputs if port.shape}) > 1:
        sizes = ", ".join(f"{name} {len(batch[name])}" for name in names)
        raise DataError(f"calibration batch {number}", expected="the same number of samples for each input", got=sizes)


def _fits(shape: tuple[int, ...], port: tuple[int | None, ...]) -> bool:
    """All sizes but the first, which counts samples."""
    return len(shape) == len(port) and all(b is None or a == b for a, b in zip(shape[1:], port[1:], strict=True))


def _cut(batch: Batch, inputs: tuple[Port, ...]) -> Iterator[Batch]:
    fixed = {port.shape[0] for port in inputs if port.shape and port.shape[0]}
    samples = next((len(batch[port.name]) for port in inputs if port.shape), 1)
    if not fixed:
        if samples:
            yield batch
        return
    size = fixed.pop()
    for start in range(0, samples, size):
        index = np.arange(start, start + size) % samples
        yield {port.name: batch[port.name][index] if port.shape else batch[port.name] for port in inputs}


def _text(shape: tuple[int | None, ...]) -> str:
    return "×".join("?" if size is None else str(size) for size in shape) or "scalar"
