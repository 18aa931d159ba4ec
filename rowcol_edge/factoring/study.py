"""What is known of a model before anything is chosen: its layers, folded batch norms and measured spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from torch import nn

from rowcol_edge import calling
from rowcol_edge.cache import Arrays
from rowcol_edge.datasets import Split, evenly
from rowcol_edge.factoring import (
    channel_spaces,
    coupling,
    fold,
    graph,
    layers,
    narrow,
    opening,
    refit,
    sensitivity,
    spaces,
)
from rowcol_edge.factoring.allocation import Allocator, Rates, Widths
from rowcol_edge.factoring.channel_spaces import ChannelSpaces
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.graph import LayerGraph
from rowcol_edge.factoring.spaces import LayerSpaces, Place, Progress

#: returns what the function makes, or what it made in another build
Keep = Callable[[Callable[[], Arrays]], Arrays]


JUDGES = 64
"""Calibration samples at most, and a quarter of them at most, that spaces are judged on and do not come from."""


@dataclass(frozen=True)
class Study:
    """A model and all that factoring needs to know of it.

    Attributes:
        dense: the model with its batch norms folded; equal outputs, and what the dense arms are made from.
        folded: that one with modules that hide their layers opened (see `opening`), which is what is factored; the
            same where there are none.
        closed: modules that hide their layers and stay so, with the reason.
        infos: shape, cost and skip reason of each layer, in call order.
        spaces: column spaces of the layers that can be factored, measured when the first is asked for: a build that
            finds its plan and its files in the cache needs none.
        channel_spaces: what the channels of each set are worth, by its name; none where nothing was weighed.
        parameters: unique parameters of the folded model.
        macs: multiply-accumulates of its layers, one sample.
        classify: its first output is a classifier's.
        samples: calibration samples for a second pass.
    """

    dense: nn.Module
    folded: nn.Module
    closed: Mapping[str, str]
    graph: LayerGraph
    infos: Mapping[str, LayerInfo]
    spaces: Mapping[str, LayerSpaces]
    channel_spaces: Mapping[str, ChannelSpaces]
    parameters: int
    macs: int
    classify: bool
    samples: Callable[[], Mapping[str, np.ndarray[Any, Any]]]
    _coupled: Callable[[], tuple[ChannelSet, ...]]

    @cached_property
    def channels(self) -> tuple[ChannelSet, ...]:
        """Sets of channels, in call order; those that must stay as they are with the reason."""
        return self._coupled()

    def allocator(self, multiple: int, break_even: float) -> Allocator | None:
        """Proposes widths; None where no set can be narrowed or nothing was weighed."""
        widths = {name: space.losses for name, space in self.channel_spaces.items()}
        if not widths:
            return None
        ranks = {n: space.losses for n, space in self.spaces.items() if space.losses is not None and not space.constant}
        return Allocator(Widths(self.infos, self.channels), Rates(ranks, widths), multiple, break_even)


def study(
    module: nn.Module,
    calibration: Split,
    *,
    classify: bool | None = None,
    row_space: bool = False,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Study:
    """Trace, fold and open. The first look at ``spaces`` streams the calibration split once through the folded model.

    Args:
        classify: weigh the spaces by what the model's output makes of them, which is a classifier's or another's; None:
            leave them as they are measured.
        row_space: measure that of the inputs too.

    Raises:
        ModelError, UnsupportedOpError: a model that cannot be traced.
        DataError: calibration inputs that the model cannot take, or (at the first look) NaN on the way.
    """
    example = calling.feed(module, calibration.example())
    traced = graph.trace(module, example)
    dense = fold.fold_batchnorm(module, traced)
    found = opening.open_all(dense, example)
    folded = found.model
    if found.names:
        # the batch norms are folded by now: what is known of them is known from the first look
        traced = replace(graph.trace(folded, example), batchnorms=traced.batchnorms)
    infos = layers.survey(folded, traced)
    names = [name for name, info in infos.items() if not info.skip]

    @cache
    def coupled() -> tuple[ChannelSet, ...]:
        return narrow.checked(folded, coupling.find(folded, traced, example), example)

    def measured() -> Arrays:
        if classify is None:
            batches = _Batches(calibration)
            return spaces.to_arrays(spaces.collect(folded, batches, names, row_space=row_space, progress=progress))
        return _weighed(folded, calibration, names, coupled(), classify=classify, progress=progress)

    @cache
    def known() -> tuple[dict[str, LayerSpaces], dict[str, ChannelSpaces]]:
        arrays = keep(measured) if keep else measured()
        sets = {key.removeprefix(_CHANNELS): array for key, array in arrays.items() if key.startswith(_CHANNELS)}
        rest = {key: array for key, array in arrays.items() if not key.startswith(_CHANNELS)}
        return spaces.from_arrays(rest), channel_spaces.from_arrays(sets)

    return Study(
        dense=dense,
        folded=folded,
        closed=found.closed,
        graph=traced,
        infos=infos,
        spaces=_WhenAsked(names, lambda: known()[0]),
        channel_spaces=_WhenMeasured(lambda: known()[1]),
        parameters=sum(p.numel() for p in folded.parameters()),
        macs=sum(info.macs for info in infos.values()),
        classify=bool(classify),
        samples=lambda: calibration.spread(refit.affordable(infos)),
        _coupled=coupled,
    )


def _weighed(
    folded: nn.Module,
    calibration: Split,
    names: Sequence[str],
    sets: Sequence[ChannelSet],
    *,
    classify: bool,
    progress: Progress | None,
) -> Arrays:
    """Spaces and channel spaces in one pass over most samples, judged on the others."""
    free = [each for each in sets if not each.fixed]
    if not names and not free:
        return {}
    judges = evenly(len(calibration), min(JUDGES, len(calibration) // 4)).tolist()
    pool = sorted(set(range(len(calibration))) - set(judges))
    outputs = {name: Place(name) for name in names}
    reads = [place for each in free for place in channel_spaces.places(each)]
    batches = _Batches(calibration, pool)
    moments = spaces.measure(folded, batches, [*outputs.values(), *reads], progress=progress)
    found = {}
    for count, (name, place) in enumerate(outputs.items(), start=1):
        found[name] = spaces.decompose(name, moments.pop(place))
        if progress is not None:
            progress("spectra", count, len(outputs))
    samples = calibration.spread(sensitivity.SAMPLES, pool)
    judged = calibration.spread(JUDGES, judges or pool)
    weighed = sensitivity.weigh_all(folded, samples, judged, found, moments, free, classify=classify, progress=progress)
    arrays = spaces.to_arrays(weighed.layers)
    return arrays | {_CHANNELS + key: array for key, array in channel_spaces.to_arrays(weighed.channels).items()}


_CHANNELS = "channels/"


class _WhenMeasured(Mapping[str, ChannelSpaces]):
    """Channel spaces by set, measured at the first look."""

    def __init__(self, measure: Callable[[], dict[str, ChannelSpaces]]) -> None:
        self._measure = measure

    def __getitem__(self, name: str) -> ChannelSpaces:
        return self._measure()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measure())

    def __len__(self) -> int:
        return len(self._measure())


class _WhenAsked(Mapping[str, LayerSpaces]):
    """Spaces by layer, of which the names are known before they are measured."""

    def __init__(self, names: Sequence[str], measure: Callable[[], dict[str, LayerSpaces]]) -> None:
        self._names = names
        self._measured = cache(measure)

    def __getitem__(self, name: str) -> LayerSpaces:
        return self._measured()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Batches:
    """A split's batches, or those of some of its samples, with their number, so that progress has a total."""

    def __init__(self, split: Split, places: Sequence[int] | None = None) -> None:
        self._split = split
        self._places = range(len(split)) if places is None else places
        self._count = sum(1 for _ in self)

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return (dict(batch) for batch in self._split.only(self._places))

    def __len__(self) -> int:
        return self._count
