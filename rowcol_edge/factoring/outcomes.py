"""What a model gives, and how far another's is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.calling import bind, feed, tensors
from rowcol_edge.factoring.variation import Variation
from rowcol_edge.linears import convolved

Feeds = Mapping[str, NDArray[Any]]


def outcome(model: nn.Module, samples: Feeds) -> list[torch.Tensor]:
    """Its floating-point outputs, float64, in whatever mode the model is."""
    args, kwargs = bind(model, feed(model, samples))
    with torch.no_grad(), convolved():
        return [value.double() for value in tensors(model(*args, **kwargs)) if value.is_floating_point()]


class Departure:
    """Kullback–Leibler divergence of a classifier's answers, in nats; of other outputs half the relative squared error
    about their mean. Batch by batch."""

    def __init__(self, *, classify: bool) -> None:
        self._classify = classify
        self._variation, self._samples = Variation(), 0
        self._divergence, self._answers = 0.0, 0
        self._squares: list[float] = []  # by output but the answers

    def add(self, wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor], where: torch.Tensor) -> None:
        """A batch.

        Args:
            wanted, got: what two models give, at least one output.
            where: (samples,) bool: those that count, if an output has them along its first axis.
        """

        def judged(output: torch.Tensor) -> torch.Tensor:
            return output[where] if output.dim() and len(output) == len(where) else output

        pairs = [(judged(a), judged(b)) for a, b in zip(wanted, got, strict=True)]
        first, second = pairs[0]
        if self._classify and first.dim() == 2 and first.shape[1] > 1:
            logs, others = first.log_softmax(1), second.log_softmax(1)
            apart = torch.where(logs.isneginf(), 0.0, logs - others)  # a class that is masked has no share
            self._divergence += float((logs.exp() * apart).sum())
            self._answers += len(first)
            pairs = pairs[1:]
        samples = int(where.sum())
        self._samples += samples
        self._variation.add([output for output, _ in pairs], samples)
        squares = [float(torch.where(a == b, 0.0, a - b).square().sum()) for a, b in pairs]
        self._squares = [sum(each) for each in zip_longest(self._squares, squares, fillvalue=0.0)]

    @property
    def value(self) -> float:
        """Of all batches."""
        found = self._divergence / max(1, self._answers)
        for square, varied in zip(self._squares, self._variation.squares(), strict=True):
            found += 0.5 * square / (varied * self._samples)
        return found
