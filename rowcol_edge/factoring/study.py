"""What is known of a model before anything is chosen: its layers, folded batch norms and measured spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import nn

from rowcol_edge import calling
from rowcol_edge.cache import Arrays
from rowcol_edge.datasets import Split
from rowcol_edge.factoring import fold, graph, layers, sensitivity, spaces
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.graph import LayerGraph
from rowcol_edge.factoring.spaces import LayerSpaces, Progress

#: returns what the function makes, or what it made in another build
Keep = Callable[[Callable[[], Arrays]], Arrays]


@dataclass(frozen=True, slots=True)
class Study:
    """A model and all that factoring needs to know of it.

    Attributes:
        folded: the model with its batch norms folded; equal outputs, and what every arm is made from.
        infos: shape, cost and skip reason of each layer, in call order.
        spaces: column spaces of the layers that can be factored, measured when the first is asked for: a build that
            finds its plan and its files in the cache needs none.
        parameters: unique parameters of the folded model.
        macs: multiply-accumulates of its layers, one sample.
    """

    folded: nn.Module
    graph: LayerGraph
    infos: Mapping[str, LayerInfo]
    spaces: Mapping[str, LayerSpaces]
    parameters: int
    macs: int


def study(
    module: nn.Module,
    calibration: Split,
    *,
    classify: bool | None = None,
    row_space: bool = False,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Study:
    """Trace and fold. The first look at ``spaces`` streams the calibration split once through the folded model.

    Args:
        classify: weigh the spaces by what the model's output makes of them, which is a classifier's or another's; None:
            leave them as they are measured.
        row_space: measure that of the inputs too.

    Raises:
        ModelError, UnsupportedOpError: a model that cannot be traced.
        DataError: calibration inputs that the model cannot take, or (at the first look) NaN on the way.
    """
    traced = graph.trace(module, calling.feed(module, calibration.example()))
    folded = fold.fold_batchnorm(module, traced)
    infos = layers.survey(folded, traced)
    names = [name for name, info in infos.items() if not info.skip]

    def measured() -> Arrays:
        found = spaces.collect(folded, _Batches(calibration), names, row_space=row_space, progress=progress)
        if classify is not None and found:
            samples = calibration.spread(sensitivity.SAMPLES)
            found = sensitivity.weigh(folded, samples, found, classify=classify, progress=progress)
        return spaces.to_arrays(found)

    def known() -> dict[str, LayerSpaces]:
        return spaces.from_arrays(keep(measured) if keep else measured())

    return Study(
        folded=folded,
        graph=traced,
        infos=infos,
        spaces=_WhenAsked(names, known),
        parameters=sum(p.numel() for p in folded.parameters()),
        macs=sum(info.macs for info in infos.values()),
    )


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
    """A split's batches with their number, so that progress has a total; sized in samples would be wrong."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._count = sum(1 for _ in split.batches())

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return self._split.batches()

    def __len__(self) -> int:
        return self._count
