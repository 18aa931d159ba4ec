"""How narrow each set of channels should be beside how low each rank: one price for everything that is saved.

Lagrangian allocation (H. Everett, Generalized Lagrange multiplier method, 1963): at a price λ every layer takes the
rank and every set the width with the least ``loss + λ · cost``. Ranks of different layers do not meet; widths do, since
what a layer costs depends on the channels that it takes and gives: they are gone through one by one until none changes
any more, from the widths of the price before. Pure numpy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.costs import LayerInfo

Array = NDArray[np.float64]

#: what a layer costs at a rank; 0 is the dense layer
Cost = Callable[[LayerInfo, int], float]

_PRICES = np.geomspace(1e-7, 1e3, 41)
_SWEEPS = 2
_OPTIONS = 24  # widths of a set, and ranks of a layer, that are looked at
_MEETINGS = 300  # of sets and layers: where there are more, fewer widths are looked at, _FEWEST of them at least
_FEWEST = 8  # steps that a set should have


class Widths:
    """What layers cost where sets are narrower."""

    def __init__(self, infos: Mapping[str, LayerInfo], sets: Sequence[ChannelSet]) -> None:
        self.infos = infos
        self.sets = {each.name: each for each in sets if not each.fixed}
        self._gives: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        self._takes: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for name, each in self.sets.items():
            for slot in (*each.producers, *each.carriers):
                self._gives[slot.name].append((name, each.size, each.groups))
            for slot in (*each.uses, *each.carriers):
                self._takes[slot.name].append((name, each.size, each.groups * slot.index.shape[2]))

    def info(self, name: str, widths: Mapping[str, int]) -> LayerInfo:
        """The layer with the channels that are left; sets without a width keep theirs."""
        info = self.infos[name]
        given, taken = self.lost(name, widths)
        if not given and not taken:
            return info
        groups = info.groups if info.groups == 1 else info.out_features - given
        return replace(
            info, out_features=info.out_features - given, in_features=info.in_features - taken, groups=groups
        )

    def lost(self, name: str, widths: Mapping[str, int]) -> tuple[int, int]:
        """Outputs and inputs that the layer has less."""
        return _lost(self._gives.get(name, ()), widths), _lost(self._takes.get(name, ()), widths)

    def layers(self, name: str) -> list[str]:
        """Those that a set's width changes."""
        return [layer for layer in self.sets[name].layers if layer in self.infos]

    def loose(self, widths: Mapping[str, int]) -> int:
        """Parameters saved outside of layers: norms, and what is added to channels."""
        return sum(self.sets[name].loose * (self.sets[name].size - width) for name, width in widths.items())


def _lost(entries: Sequence[tuple[str, int, int]], widths: Mapping[str, int]) -> int:
    return sum((size - widths[name]) * times for name, size, times in entries if name in widths)


def step(size: int, multiple: int) -> int:
    """Widths are multiples of this: the rank multiple, or what gives a small set some choice."""
    while multiple > 1 and size < _FEWEST * multiple:
        multiple = multiple // 2
    return max(1, multiple)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a model's options lose: by rank of a layer (it stays dense if it is not here), by width of a set."""

    ranks: Mapping[str, Array]  # layer → (out + 1,)
    widths: Mapping[str, Array]  # set → (size + 1,)


class Allocator:
    """Widths from careful to bold, for any cost."""

    def __init__(self, widths: Widths, rates: Rates, multiple: int, break_even: float) -> None:
        self.widths = widths
        self._rates = rates
        self._multiple = multiple
        self._break_even = break_even
        self._paths: dict[Cost, list[tuple[float, dict[str, int]]]] = {}
        self._touched = {name: widths.layers(name) for name in widths.sets}
        meetings = sum(map(len, self._touched.values()))
        count = max(_FEWEST, min(_OPTIONS, _OPTIONS * _MEETINGS // max(1, meetings)))
        self._options = {
            name: _thinned(range(each.size, 0, -step(each.size, multiple)), count)
            for name, each in widths.sets.items()
            if name in rates.widths
        }

    def candidates(self, cost: Cost, total: float, limit: float) -> list[dict[str, int]]:
        """A few sets of widths that may be best where the whole cost falls from ``total`` to ``limit``, all full among
        them; only narrowed sets have a width."""
        path = self._paths.get(cost)
        if path is None:
            path = self._paths[cost] = self._path(cost)
        found: list[dict[str, int]] = [{}]
        place = next((i for i, (saved, _) in enumerate(path) if total - saved <= limit), len(path) - 1)
        for _, widths in path[max(0, place - 2) : place + 3]:
            narrowed = {name: width for name, width in widths.items() if width < self.widths.sets[name].size}
            if narrowed not in found:
                found.append(narrowed)
        return found

    def lost(self, widths: Mapping[str, int]) -> float:
        """Predicted for the widths alone."""
        return sum(float(self._rates.widths[name][width]) for name, width in widths.items())

    def _path(self, cost: Cost) -> list[tuple[float, dict[str, int]]]:
        """For each price what is saved in all, and the widths."""
        layers = _Layers(self.widths, self._rates, cost, self._multiple, self._break_even)
        widths = {name: self.widths.sets[name].size for name in self._options}
        path = []
        for price in _PRICES:
            for _ in range(_SWEEPS):
                before = dict(widths)
                for name, options in self._options.items():
                    widths[name] = self._best(name, options, widths, layers, float(price))
                if widths == before:
                    break
            path.append((layers.saved(widths, float(price)), dict(widths)))
        return path

    def _best(
        self, name: str, options: Sequence[int], widths: dict[str, int], layers: _Layers, price: float
    ) -> int:  # fmt: skip
        losses = self._rates.widths[name]
        touched = self._touched[name]
        best, least = widths[name], np.inf
        for width in options:
            trial = {**widths, name: width}
            value = float(losses[width]) + sum(layers.value(layer, trial, price) for layer in touched)
            if value < least:
                best, least = width, value
        return best


class _Layers:
    """``min over ranks of loss + λ · cost`` of a layer at its channels; costs are looked up once."""

    def __init__(self, widths: Widths, rates: Rates, cost: Cost, multiple: int, break_even: float) -> None:
        self._widths = widths
        self._rates = rates
        self._cost = cost
        self._multiple = multiple
        self._break_even = break_even
        self._known: dict[tuple[str, int, int], tuple[Array, Array]] = {}
        self._values: dict[tuple[str, int, int, float], tuple[float, float]] = {}

    def value(self, name: str, widths: Mapping[str, int], price: float) -> float:
        return self._entry(name, widths, price)[0]

    def saved(self, widths: Mapping[str, int], price: float) -> float:
        """Of the whole model's cost, against all dense and full."""
        infos = self._widths.infos
        return sum(self._cost(infos[name], 0) - self._entry(name, widths, price)[1] for name in infos)

    def _entry(self, name: str, widths: Mapping[str, int], price: float) -> tuple[float, float]:
        key = (name, *self._widths.lost(name, widths), price)
        found = self._values.get(key)
        if found is None:
            costs, losses = self._table(name, self._widths.info(name, widths))
            values = losses + price * costs
            best = int(values.argmin())
            found = self._values[key] = (float(values[best]), float(costs[best]))
        return found

    def _table(self, name: str, info: LayerInfo) -> tuple[Array, Array]:
        key = (name, info.in_features, info.out_features)
        if key not in self._known:
            ranks = [0]
            losses = self._rates.ranks.get(name)
            if losses is not None and not info.skip:
                limit = int(info.break_even * self._break_even)
                ranks += _thinned(range(limit // self._multiple * self._multiple, 0, -self._multiple))
            costs = np.array([self._cost(info, rank) for rank in ranks])
            lost = np.array([0.0 if rank == 0 or losses is None else float(losses[rank]) for rank in ranks])
            self._known[key] = (costs, lost)
        return self._known[key]


def _thinned(options: range, count: int = _OPTIONS) -> list[int]:
    """At most so many of them, the first and the last among them."""
    if len(options) <= count:
        return list(options)
    places = np.unique(np.rint(np.linspace(0, len(options) - 1, count)).astype(int))
    return [options[place] for place in places]
