"""A split as training takes it: some samples held out, the others shuffled anew each epoch."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rowcol_edge.datasets import Split, evenly

Feeds = dict[str, NDArray[Any]]

_HELD, _SHARE = 64, 8  # held out: so many samples, or an eighth of them where that is less
_CHUNK_BYTES = 2**29  # samples that are shuffled together


class Batches:
    """Training batches by torch's random numbers; ``held`` are in batches of their own, ``steps`` those of an epoch."""

    def __init__(self, samples: Split, batch: int) -> None:
        count = len(samples)
        held = evenly(count, min(_HELD, max(1, count // _SHARE)))
        rest = np.setdiff1d(np.arange(count), held)
        self._samples, self._batch = samples, batch
        self._places = rest if len(rest) else held  # of one sample there is nothing to hold out
        self.held = list(samples.only(held.tolist()))
        self.steps = math.ceil(len(self._places) / batch)

    def epoch(self) -> Iterator[Feeds]:
        """Each training sample once."""
        chunk: list[Feeds] = []
        size = 0
        for feeds in self._samples.only(self._places.tolist()):
            chunk.append(feeds)
            size += sum(array.nbytes for array in feeds.values())
            # cut where batches end, so that an epoch has as many steps as was said
            if size > _CHUNK_BYTES and (whole := length(chunk) // self._batch * self._batch):
                chunk = yield from self._shuffled(chunk, whole)
                size = 0
        if chunk:
            yield from self._shuffled(chunk, length(chunk))

    def _shuffled(self, chunk: list[Feeds], count: int) -> Generator[Feeds, None, list[Feeds]]:
        """Batches of the first ``count`` samples; returns the others."""
        rows = [(part, row) for part, feeds in enumerate(chunk) for row in range(len(next(iter(feeds.values()))))]
        order = torch.randperm(count).tolist()
        for start in range(0, count, self._batch):
            picked = [rows[i] for i in order[start : start + self._batch]]
            yield {name: np.stack([chunk[part][name][row] for part, row in picked]) for name in chunk[0]}
        if count == len(rows):
            return []
        part, row = rows[count]
        return [{name: array[row:] for name, array in chunk[part].items()}, *chunk[part + 1 :]]


def length(chunk: Sequence[Feeds]) -> int:
    """Samples in all batches."""
    return sum(len(next(iter(feeds.values()))) for feeds in chunk)
