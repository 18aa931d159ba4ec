"""What errors at a place are worth: the second moments of the gradients that arrive there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.factoring.places import Place, single, spread
from rowcol_edge.factoring.products import product
from rowcol_edge.factoring.sums import add_products, symmetric

Array = NDArray[np.float64]

_POSITIONS = 64  # of a sample, at which gradients are multiplied


class Gradients:
    """``F``: the second moment of the gradients, summed over a sample's positions.

    Of more than 64 positions that many are used, spread evenly, and count for all.
    """

    behind = False

    def __init__(self) -> None:
        self.samples = 0
        self._total: torch.Tensor | None = None

    def see(self, values: torch.Tensor) -> None:
        """Nothing."""

    def add(self, seen: torch.Tensor | None, gradients: torch.Tensor) -> None:
        """(samples, positions, groups, size)."""
        positions = gradients.shape[1]
        if positions > _POSITIONS:
            gradients = gradients.index_select(1, spread(positions, _POSITIONS).to(gradients.device))
        if self._total is None:
            size = gradients.shape[3]
            self._total = gradients.new_zeros(gradients.shape[2], size, size)
        add_products(self._total, gradients.flatten(0, 1), max(1.0, positions / _POSITIONS))

    def flush(self, samples: int) -> None:
        self.samples += samples

    @property
    def arrived(self) -> bool:
        """Whether one arrived, be it zero."""
        return self._total is not None

    def mean(self) -> Array:
        """(groups, size, size)"""
        if self._total is None:
            return np.zeros((1, 1, 1))
        return np.asarray(symmetric(self._total).double().cpu().numpy() / max(1, self.samples))


class Metrics:
    """``F`` at each place: what arrives through a layer that treats all positions alike follows from what arrives
    behind it, ``Wᵀ F W``."""

    def __init__(self, model: nn.Module, places: Iterable[Place], known: Mapping[Place, Array] | None = None) -> None:
        """``known``: (size, size) at places where that is known without gradients; which are watched all the same, as
        gradients begin where the first watcher is (see `arrivals`)."""
        places = list(places)
        self._known = dict(known or {})
        behind = {place.name: Place(place.name) for place in places if place.given and place.channels is None}
        self._matrices: dict[str, torch.Tensor] = {}
        for place in places:
            matrix = None if place.given else single(model.get_submodule(place.name))
            if place.name in behind and matrix is not None:
                self._matrices[place.name] = matrix
        self.watched: dict[Place, Gradients] = {}
        self._sources: dict[Place, Place] = {}
        for place in places:
            found = place.name in behind and (place.given or place.name in self._matrices)
            self._sources[place] = source = behind[place.name] if found else place
            self.watched.setdefault(source, Gradients())
        self._asked = Counter(self._sources.values())
        self._counting = Lock()

    def pop(self, place: Place) -> Array:
        """(groups, size, size), of each place once, by any thread: what no other place needs any more is let go."""
        found, source = self[place], self._sources[place]
        with self._counting:
            self._asked[source] -= 1
            if not self._asked[source]:
                del self.watched[source]
                self._known.pop(source, None)
        return found

    def reached(self, place: Place) -> bool:
        """Whether a gradient arrived there, or where what arrives follows from; not after `pop`."""
        return self.watched[self._sources[place]].arrived

    def __getitem__(self, place: Place) -> Array:
        """(groups, size, size)"""
        source = self._sources[place]
        found = self._known[source][None] if source in self._known else self.watched[source].mean()
        if not found.any() and place.channels is not None:  # nothing arrived: the outputs do not hang on it
            size = place.channels.shape[1]
            return np.zeros((len(place.channels), size, size))
        matrix = None if place.given or not source.given else self._matrices[place.name].cpu().numpy()
        if matrix is not None and found.shape[1] == len(matrix):
            found = product(matrix.T, found[0], matrix)[None]
        if place.channels is None or source is place:
            return found
        taps = place.channels.transpose(2, 0, 1)
        return np.asarray(sum(found[0][tap[:, :, None], tap[:, None, :]] for tap in taps))
