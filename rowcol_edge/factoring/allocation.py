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
from rowcol_edge.factoring.options import Cost, Option, Options, thinned

Array = NDArray[np.float64]

_PRICES = 28
_SPAN = 1e-12  # the lowest price is no smaller a share of the highest
_CAREFUL = 0.01  # of all that can be saved: what is cheaper is no trade-off yet
_CLOSER = 3  # prices between the two that save too little and enough
_SWEEPS = 2
_FILLED = 0.05  # of the whole cost: what a step saves too much, in models of few steps
_OPTIONS = 24  # widths of a set that are looked at
_RANKS = 12  # ranks of a layer, in each form
_MEETINGS = 300  # of sets and layers: where there are more, fewer widths are looked at, _FEWEST of them at least
_FEWEST = 8  # steps that a set should have


class Widths:
    """What layers cost where sets are narrower.

    Attributes:
        infos: by layer; what of a set belongs to none (norms, positions that are added) is one more, without MACs.
        sets: those that can be narrowed, by name.
    """

    def __init__(self, infos: Mapping[str, LayerInfo], sets: Sequence[ChannelSet]) -> None:
        self.sets = {each.name: each for each in sets if not each.fixed}
        self._loose = {name: f"{name}: loose" for name, each in self.sets.items() if each.loose}
        self.infos = {**infos, **{own: _loose_info(own, self.sets[name]) for name, own in self._loose.items()}}
        self._gives: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        self._takes: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        self._read: dict[str, set[str]] = defaultdict(set)
        for name, each in self.sets.items():
            for slot in (*each.producers, *each.carriers):
                self._gives[slot.name].append((name, each.size, each.groups))
            for slot in (*each.uses, *each.carriers):
                self._takes[slot.name].append((name, each.size, each.groups * slot.index.shape[2]))
            for slot in each.uses:
                self._read[slot.name].add(name)
        for name, own in self._loose.items():
            self._gives[own].append((name, self.sets[name].size, 1))

    def info(self, name: str, widths: Mapping[str, int]) -> LayerInfo:
        """The layer with the channels that are left; sets without a width keep theirs."""
        info = self.infos[name]
        given, taken = self.lost(name, widths)
        if not given and not taken:
            return info
        groups = info.groups if info.groups == 1 else info.out_features - given
        narrower = (widths.get(each, self.sets[each].size) < self.sets[each].size for each in self._read.get(name, ()))
        return replace(
            info,
            out_features=info.out_features - given,
            in_features=info.in_features - taken,
            groups=groups,
            bias=info.bias or any(narrower),  # a reader takes up the mean of what is gone, see `narrow`
        )

    def lost(self, name: str, widths: Mapping[str, int]) -> tuple[int, int]:
        """Outputs and inputs that the layer has less."""
        return _lost(self._gives.get(name, ()), widths), _lost(self._takes.get(name, ()), widths)

    def layers(self, name: str) -> list[str]:
        """Those that a set's width changes."""
        own = [self._loose[name]] if name in self._loose else []
        return [layer for layer in self.sets[name].layers if layer in self.infos] + own

    def choices(self, name: str, multiple: int) -> list[int]:
        """Widths that a set may have: all, then the multiples below, finer ones in a small set.

        Where layer norms look at the channels they are multiples alone: limited to AVX2, OpenVINO 2026.4 crashes in one
        over a number of channels that 16 does not divide. Where depthwise convolutions pass the channels on, no finer
        ones above the multiple: onnxruntime's int8 kernel takes longer for them than for the next multiple
        (``tools/benchmark_depthwise.py``). Below it they save no time either, but parameters that a budget may need.
        """
        channels = self.sets[name]
        finer = step(channels.size, multiple)
        carriers = (self.infos[slot.name] for slot in channels.carriers if slot.name in self.infos)
        coarse = multiple if channels.norms or any(info.groups > 1 for info in carriers) else finer
        found = [channels.size, *_multiples(channels.size, coarse)]
        return found if channels.norms else [*found, *_multiples(min(channels.size, coarse), finer)]

    def loose(self, widths: Mapping[str, int]) -> int:
        """Parameters saved outside of layers: norms, and what is added to channels."""
        return sum(self.sets[name].loose * (self.sets[name].size - width) for name, width in widths.items())


def _loose_info(name: str, channels: ChannelSet) -> LayerInfo:
    return LayerInfo(name, "loose", channels.loose, channels.size, bias=False, positions=0, skip="no layer")


def _lost(entries: Sequence[tuple[str, int, int]], widths: Mapping[str, int]) -> int:
    return sum((size - widths[name]) * times for name, size, times in entries if name in widths)


def step(size: int, multiple: int) -> int:
    """What gives a small set some choice: the rank multiple, or a part of it."""
    while multiple > 1 and size < _FEWEST * multiple:
        multiple = multiple // 2
    return max(1, multiple)


def _multiples(size: int, multiple: int) -> range:
    """Those below the size, from the widest down."""
    return range((size - 1) // multiple * multiple, 0, -multiple)


class Allocator:
    """Widths from careful to bold, for any cost."""

    def __init__(self, widths: Widths, options: Options, losses: Mapping[str, Array], factor: float = 1.0) -> None:
        """``losses``: set → (size + 1,), predicted by width; a set that is not here keeps its channels. They count
        ``factor`` times beside those of ranks (see `balance`)."""
        self.widths = widths
        self.options = options
        self.factor = factor
        self._losses = losses
        self._counted = {name: factor * found for name, found in losses.items()}
        self._paths: dict[Cost, _Path] = {}
        self._known: _Known = {}
        self._touched = {name: widths.layers(name) for name in widths.sets}
        meetings = sum(map(len, self._touched.values()))
        count = max(_FEWEST, min(_OPTIONS, _OPTIONS * _MEETINGS // max(1, meetings)))
        self._options = {
            name: thinned(widths.choices(name, options.multiple), count) for name in widths.sets if name in losses
        }

    def candidates(self, cost: Cost, total: float, limit: float) -> list[dict[str, int]]:
        """A few sets of widths that may be best where the whole cost falls from ``total`` to ``limit``, all full among
        them; only narrowed sets have a width."""
        path = self._paths.get(cost)
        if path is None:
            path = self._paths[cost] = _Path(self._bought(cost), self._settled)
        found: list[dict[str, int]] = [{}]
        for widths in (*path.around(total - limit), *path.filled(total - limit, self._counted)):
            narrowed = {name: width for name, width in widths.items() if width < self.widths.sets[name].size}
            if narrowed not in found:
                found.append(narrowed)
        return found

    def _bought(self, cost: Cost) -> _Layers:
        found = {name: self._counted[name] for name in self._options}
        sets = {name: (self._options[name], found[name]) for name in found}
        return _Layers(self.widths, self.options, cost, sets, self._known)

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

    def _best(self, name: str, options: Sequence[int], widths: Mapping[str, int], layers: _Layers, price: float) -> int:
        values = np.zeros(len(options))
        for layer in self._touched[name]:
            values += layers.values(layer, name, options, widths, price)
        return options[int((self._counted[name][list(options)] + values).argmin())]


class _Path:
    """Widths by price, from careful to bold."""

    def __init__(self, layers: _Layers, settle: Callable[[_Layers, float, Mapping[str, int]], dict[str, int]]) -> None:
        self._layers = layers
        self._settle = settle
        self._steps: list[_Step] = []
        self._prices = layers.prices.tolist()
        self._between: tuple[_Step, _Step]  # known when `around` was asked

    def around(self, saving: float) -> list[dict[str, int]]:
        """Widths at prices that save about so much."""
        place = next((i for i in range(len(self._prices)) if self._step(i).saved >= saving), len(self._prices) - 1)
        found = [self._step(i) for i in range(max(0, place - 2), min(place + 3, len(self._prices)))]
        self._between = careful, bold = self._step(max(0, place - 1)), self._step(place)
        for _ in range(_CLOSER):
            between = self._at((careful.price * bold.price) ** 0.5, careful.widths)
            found.append(between)
            self._between = careful, bold = (careful, between) if between.saved >= saving else (between, bold)
        return [step.widths for step in found]

    def filled(self, saving: float, losses: Mapping[str, Array]) -> Iterator[dict[str, int]]:
        """After `around`: widths behind a step that saves far more than it should, of which sets get back what fits,
        the dearest first: a small model has few steps."""
        careful, bold = self._between
        if bold.saved - saving <= _FILLED * self._layers.dense:
            return
        for price in (careful.price, bold.price):
            widths = dict(bold.widths)
            if self._layers.saved(widths, price) < saving:
                continue
            for name in sorted(widths, key=lambda name: -losses[name][widths[name]]):
                for width in self._layers.options(name):
                    if width <= widths[name]:
                        break
                    if self._layers.saved(trial := {**widths, name: width}, price) >= saving:
                        widths = trial
                        break
            yield widths

    def _step(self, place: int) -> _Step:
        """At the price at that place; each begins with the widths of the price before."""
        for price in self._prices[len(self._steps) : place + 1]:
            self._steps.append(self._at(price, self._steps[-1].widths if self._steps else {}))
        return self._steps[place]

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


class _Entry:
    """The options of a layer at its channels, and the best of them by price."""

    __slots__ = ("_costs", "_losses", "_taken", "_values")

    def __init__(self, costs: Array, losses: Array, prices: Array) -> None:
        """``prices``: those that will be asked for, all at once: one by one would take most of the time."""
        values = losses + prices[:, None] * costs
        places = values.argmin(axis=1)
        self._values: list[float] = values[np.arange(len(prices)), places].tolist()
        self._taken: list[float] = costs[places].tolist()
        self._costs, self._losses = costs, losses

    def at(self, price: float, place: int | None) -> tuple[float, float]:
        """The least ``loss + λ · cost``, and the cost of the option that has it; ``place``: that of the price."""
        if place is not None:
            return self._values[place], self._taken[place]
        values = self._losses + price * self._costs
        best = int(values.argmin())
        return float(values[best]), float(self._costs[best])


#: of a layer, and the widths of the sets that it meets: its channels and its options
_Known = dict[tuple[str, tuple[int, ...]], tuple[LayerInfo, list[Option]]]


def _worth(info: LayerInfo, options: Sequence[Option], cost: Cost) -> tuple[Array, Array]:
    """Costs and losses of a layer's options."""
    found = np.array([(cost(info, option.split), option.loss) for option in options])
    return found[:, 0], found[:, 1]


class _Layers:
    """``min over forms and ranks of loss + λ · cost`` of layers at their channels; options are looked up once."""

    def __init__(
        self,
        widths: Widths,
        options: Options,
        cost: Cost,
        sets: Mapping[str, tuple[Sequence[int], Array]],
        known: _Known,
    ) -> None:
        """``sets``: those whose widths are asked about, with these from the widest down, and the losses by width;
        ``known``: what is the same for any cost."""
        self._widths = widths
        self._options = options
        self._cost = cost
        self._known = known
        self.dense = sum(cost(info, None) for info in widths.infos.values())
        self.prices = _prices([*self._of_layers(), *self._of_sets(sets)])
        self._widest = {name: options for name, (options, _) in sets.items()}
        self._sets: dict[str, list[str]] = {name: [] for name in widths.infos}
        for each in sets:
            for layer in widths.layers(each):
                self._sets[layer].append(each)
        self._entries: dict[str, dict[tuple[int, ...], _Entry]] = {name: {} for name in widths.infos}
        self._places = {price: place for place, price in enumerate(self.prices.tolist())}

    def _of_layers(self) -> Iterator[tuple[Array, Array]]:
        """What each layer's options save and lose, the layer as it is first."""
        for info in self._widths.infos.values():
            costs, losses = _worth(info, self._options.of(info, _RANKS), self._cost)
            yield costs[0] - costs, losses

    def _of_sets(self, sets: Mapping[str, tuple[Sequence[int], Array]]) -> Iterator[tuple[Array, Array]]:
        """The same of each set's widths, its layers as they are."""
        for name, (widths, losses) in sets.items():
            layers = self._widths.layers(name)
            costs = [sum(self._cost(self._widths.info(each, {name: w}), None) for each in layers) for w in widths]
            yield costs[0] - np.array(costs), losses[list(widths)]

    def options(self, name: str) -> Sequence[int]:
        """Widths of a set, from the widest down."""
        return self._widest[name]

    def values(
        self, layer: str, name: str, options: Iterable[int], widths: Mapping[str, int], price: float
    ) -> list[float]:
        """The least ``loss + λ · cost`` of a layer for each of these widths of one set, beside those of the others."""
        sets, place = self._sets[layer], self._places.get(price)
        key = [widths[each] for each in sets]
        own = sets.index(name)
        found = []
        for width in options:
            key[own] = width
            found.append(self._entry(layer, tuple(key)).at(price, place)[0])
        return found

    def saved(self, widths: Mapping[str, int], price: float) -> float:
        """Of the whole model's cost, against all dense and full."""
        place, total = self._places.get(price), self.dense
        for name, sets in self._sets.items():
            total -= self._entry(name, tuple([widths[each] for each in sets])).at(price, place)[1]
        return total

    def _entry(self, name: str, key: tuple[int, ...]) -> _Entry:
        entry = self._entries[name].get(key)
        if entry is None:
            known = self._known.get((name, key))
            if known is None:
                info = self._widths.info(name, dict(zip(self._sets[name], key, strict=True)))
                known = self._known[name, key] = info, self._options.of(info, _RANKS)
            entry = self._entries[name][key] = _Entry(*_worth(*known, self._cost), self.prices)
        return entry
