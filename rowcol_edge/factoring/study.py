"""What is known of a model before anything is chosen: its layers, folded batch norms and measured spaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rowcol_edge import calling
from rowcol_edge.datasets import Split
from rowcol_edge.factoring import fold, graph, layers, spaces
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.graph import LayerGraph
from rowcol_edge.factoring.spaces import LayerSpaces, Progress


@dataclass(frozen=True, slots=True)
class Study:
    """A model and all that factoring needs to know of it.

    Attributes:
        folded: the model with its batch norms folded; equal outputs, and what every arm is made from.
        infos: shape, cost and skip reason of each layer, in call order.
        spaces: column spaces of the layers that can be factored.
        parameters: unique parameters of the folded model.
        macs: multiply-accumulates of its layers, one sample.
    """

    folded: nn.Module
    graph: LayerGraph
    infos: Mapping[str, LayerInfo]
    spaces: Mapping[str, LayerSpaces]
    parameters: int
    macs: int


def study(module: nn.Module, calibration: Split, *, row_space: bool = False, progress: Progress | None = None) -> Study:
    """Trace, fold, and stream the calibration split once through the folded model.

    Raises:
        ModelError, UnsupportedOpError: a model that cannot be traced.
        DataError: calibration inputs that the model cannot take, or NaN on the way.
    """
    traced = graph.trace(module, calling.feed(module, calibration.example()))
    folded = fold.fold_batchnorm(module, traced)
    infos = layers.survey(folded, traced)
    names = [name for name, info in infos.items() if not info.skip]
    measured = spaces.collect(folded, _Batches(calibration), names, row_space=row_space, progress=progress)
    return Study(
        folded=folded,
        graph=traced,
        infos=infos,
        spaces=measured,
        parameters=sum(p.numel() for p in folded.parameters()),
        macs=sum(info.macs for info in infos.values()),
    )


class _Batches:
    """A split's batches with their number, so that progress has a total; sized in samples would be wrong."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._count = sum(1 for _ in split.batches())

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return self._split.batches()

    def __len__(self) -> int:
        return self._count
