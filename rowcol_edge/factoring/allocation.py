"""How narrow each set of channels should be beside how low each rank: one price for everything that is saved.

Lagrangian allocation (H. Everett, Generalized Lagrange multiplier method, 1963): at a price λ every layer takes the
rank and every set the width with the least ``loss + λ · cost``. Ranks of different layers do not meet; widths do, since
what a layer costs depends on the channels that it takes and gives: they are gone through one by one until none changes
any more, from the widths of the price before. Pure numpy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.options import Cost, Options, thinned

Array = NDArray[np.float64]

_PRICES = 28
_SPAN = 1e-12  # the lowest price is no smaller a share of the highest
_CAREFUL = 0.01  # of all that can be saved: what is cheaper is no trade-off yet
_CLOSER = 3  # prices between the two that save too little and enough
_SWEEPS = 2
_OPTIONS = 24  # widths of a set that are looked at
_RANKS = 12  # ranks of a layer, in each form
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


def step(size: int, multiple: int, *, normed: bool = False) -> int:
    """Widths are multiples of this: the rank multiple, or what gives a small set some choice.

    Not so where layer norms look at the channels: limited to AVX2, OpenVINO 2026.4 crashes in one over a number of
    channels that 16 does not divide.
    """
    while not normed and multiple > 1 and size < _FEWEST * multiple:
        multiple = multiple // 2
    return max(1, multiple)


def _choices(size: int, multiple: int) -> list[int]:
    """All channels, and the multiples below."""
    return [size, *range((size - 1) // multiple * multiple, 0, -multiple)]


class Allocator:
    """Widths from careful to bold, for any cost."""

    def __init__(self, widths: Widths, options: Options, losses: Mapping[str, Array]) -> None:
        """``losses``: set → (size + 1,), predicted by width; a set that is not here keeps its channels."""
        self.widths = widths
        self._layers = options
        self._losses = losses
        self._paths: dict[Cost, _Path] = {}
        self._touched = {name: widths.layers(name) for name in widths.sets}
        meetings = sum(map(len, self._touched.values()))
        count = max(_FEWEST, min(_OPTIONS, _OPTIONS * _MEETINGS // max(1, meetings)))
        self._options = {
            name: thinned(_choices(each.size, step(each.size, options.multiple, normed=bool(each.norms))), count)
            for name, each in widths.sets.items()
            if name in losses
        }

    def candidates(self, cost: Cost, total: float, limit: float) -> list[dict[str, int]]:
        """A few sets of widths that may be best where the whole cost falls from ``total`` to ``limit``, all full among
        them; only narrowed sets have a width."""
        path = self._paths.get(cost)
        if path is None:
            path = self._paths[cost] = _Path(self._bought(cost), self._settled)
        found: list[dict[str, int]] = [{}]
        for widths in path.around(total - limit):
            narrowed = {name: width for name, width in widths.items() if width < self.widths.sets[name].size}
            if narrowed not in found:
                found.append(narrowed)
        return found

    def _bought(self, cost: Cost) -> _Layers:
        found = {name: self._losses[name] for name in self._options}
        return _Layers(self.widths, self._layers, cost, {name: (self._options[name], found[name]) for name in found})

    def lost(self, widths: Mapping[str, int]) -> float:
        """Predicted for the widths alone."""
        return sum(float(self._losses[name][width]) for name, width in widths.items())

    def _settled(self, layers: _Layers, price: float, start: Mapping[str, int]) -> dict[str, int]:
        """Widths that none alone can better at this price."""
        widths = {name: start.get(name, self.widths.sets[name].size) for name in self._options}
        for _ in range(_SWEEPS):
            before = dict(widths)
            for name, options in self._options.items():
                widths[name] = self._best(name, options, widths, layers, price)
            if widths == before:
                break
        return widths

    def _best(
        self, name: str, options: Sequence[int], widths: dict[str, int], layers: _Layers, price: float
    ) -> int:  # fmt: skip
        losses, touched = self._losses[name], self._touched[name]
        trial = dict(widths)
        best, least = widths[name], np.inf
        for width in options:
            trial[name] = width
            value = float(losses[width]) + sum(layers.value(layer, trial, price) for layer in touched)
            if value < least:
                best, least = width, value
        return best


class _Path:
    """Widths by price, from careful to bold."""

    def __init__(self, layers: _Layers, settle: Callable[[_Layers, float, Mapping[str, int]], dict[str, int]]) -> None:
        self._layers = layers
        self._settle = settle
        self._steps: list[_Step] = []
        widths: Mapping[str, int] = {}
        for price in layers.prices.tolist():
            self._steps.append(self._at(price, widths))
            widths = self._steps[-1].widths

    def around(self, saving: float) -> list[dict[str, int]]:
        """Widths at prices that save about so much."""
        place = next((i for i, step in enumerate(self._steps) if step.saved >= saving), len(self._steps) - 1)
        found = self._steps[max(0, place - 2) : place + 3]
        careful, bold = self._steps[max(0, place - 1)], self._steps[place]
        for _ in range(_CLOSER):
            between = self._at((careful.price * bold.price) ** 0.5, careful.widths)
            found.append(between)
            careful, bold = (careful, between) if between.saved >= saving else (between, bold)
        return [step.widths for step in found]

    def _at(self, price: float, start: Mapping[str, int]) -> _Step:
        widths = self._settle(self._layers, price, start)
        return _Step(price, self._layers.saved(widths, price), widths)


@dataclass(frozen=True, slots=True)
class _Step:
    price: float
    saved: float  # of the whole cost
    widths: dict[str, int]


def _prices(options: Iterable[tuple[Array, Array]]) -> Array:
    """(prices,) rising, from one at which hardly anything pays to one at which all does: losses may be of any size.

    Args:
        options: what each choice saves, the first one nothing, and what it loses.
    """
    found = [np.zeros((3, 0))]
    for saved, lost in options:
        order = np.argsort(saved, kind="stable")
        saved, lost = saved[order], lost[order]
        steps = np.diff(saved)
        trades = (steps > 0.0) & (lost[1:] > 0.0)
        found.append(
            np.stack([lost[1:] / saved[1:].clip(1e-300), np.diff(lost) / steps.clip(1e-300), steps])[:, trades]
        )
    paid, marginal, weights = np.concatenate(found, axis=1)
    if not len(paid):
        return np.zeros(1)  # whatever saves something is free
    highest = max(float(paid.max()), float(marginal.max()))
    order = np.argsort(paid, kind="stable")
    careful = np.searchsorted(np.cumsum(weights[order]), _CAREFUL * weights.sum())
    return np.geomspace(max(0.5 * float(paid[order][careful]), _SPAN * highest), 2.0 * highest, _PRICES)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The options of a layer at its channels, and the best of them by price."""

    costs: Array
    losses: Array
    best: dict[float, tuple[float, float]]  # price → the least loss + λ · cost, and the cost of the option that has it

    def at(self, price: float) -> tuple[float, float]:
        found = self.best.get(price)
        if found is None:
            values = self.losses + price * self.costs
            place = int(values.argmin())
            found = self.best[price] = float(values[place]), float(self.costs[place])
        return found


class _Layers:
    """``min over forms and ranks of loss + λ · cost`` of layers at their channels; options are looked up once."""

    def __init__(
        self, widths: Widths, options: Options, cost: Cost, sets: Mapping[str, tuple[Sequence[int], Array]]
    ) -> None:
        """``sets``: those whose widths are asked about, with these from the widest down, and the losses by width."""
        self._widths = widths
        self._options = options
        self._cost = cost
        self.dense = sum(cost(info, None) for info in widths.infos.values())
        self.prices = _prices([*self._of_layers(), *self._of_sets(sets)])
        self._sets: dict[str, list[str]] = {name: [] for name in widths.infos}
        for each in sets:
            for layer in widths.layers(each):
                self._sets[layer].append(each)
        self._entries: dict[str, dict[tuple[int, ...], _Entry]] = {name: {} for name in widths.infos}

    def _of_layers(self) -> Iterator[tuple[Array, Array]]:
        """What each layer's options save and lose, the layer as it is first."""
        for info in self._widths.infos.values():
            found = self._options.of(info, _RANKS)
            costs = np.array([self._cost(info, option.split) for option in found])
            yield costs[0] - costs, np.array([option.loss for option in found])

    def _of_sets(self, sets: Mapping[str, tuple[Sequence[int], Array]]) -> Iterator[tuple[Array, Array]]:
        """The same of each set's widths, its layers as they are."""
        for name, (widths, losses) in sets.items():
            layers = self._widths.layers(name)
            costs = [sum(self._cost(self._widths.info(each, {name: w}), None) for each in layers) for w in widths]
            yield costs[0] - np.array(costs), losses[list(widths)]

    def value(self, name: str, widths: Mapping[str, int], price: float) -> float:
        return self._entry(name, widths).at(price)[0]

    def saved(self, widths: Mapping[str, int], price: float) -> float:
        """Of the whole model's cost, against all dense and full."""
        return self.dense - sum(self._entry(name, widths).at(price)[1] for name in self._entries)

    def _entry(self, name: str, widths: Mapping[str, int]) -> _Entry:
        key = tuple([widths[each] for each in self._sets[name]])
        entries = self._entries[name]
        if key not in entries:
            info = self._widths.info(name, widths)
            found = self._options.of(info, _RANKS)
            costs = np.array([self._cost(info, option.split) for option in found])
            entries[key] = entry = _Entry(costs, np.array([option.loss for option in found]), {})
            values = entry.losses + self.prices[:, None] * costs  # all at once: one by one would take most of the time
            best = values.argmin(axis=1).tolist()
            pairs = zip(values.min(axis=1).tolist(), costs[best].tolist(), strict=True)
            entry.best.update(zip(self.prices.tolist(), pairs, strict=True))
        return entries[key]
