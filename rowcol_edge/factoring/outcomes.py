"""What a model gives, and what another loses against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.calling import bind, feed, tensors
from rowcol_edge.factoring.variation import Variation

Feeds = Mapping[str, NDArray[Any]]


def outcome(model: nn.Module, samples: Feeds) -> list[torch.Tensor]:
    """Its floating-point outputs, float64, in whatever mode the model is."""
    args, kwargs = bind(model, feed(model, samples))
    with torch.no_grad():
        return [value.double() for value in tensors(model(*args, **kwargs)) if value.is_floating_point()]


def loss(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor], where: torch.Tensor, *, classify: bool) -> float:
    """Kullback–Leibler divergence of a classifier's answers, in nats; of other outputs half the relative squared error
    about their mean.

    Args:
        wanted, got: what two models give, at least one output.
        where: (samples,) bool: those that count, if an output has them along its first axis.
    """

    def judged(output: torch.Tensor) -> torch.Tensor:
        return output[where] if output.dim() and len(output) == len(where) else output

    pairs = [(judged(a), judged(b)) for a, b in zip(wanted, got, strict=True)]
    samples, variation = int(where.sum()), Variation()
    found, (first, second) = 0.0, pairs[0]
    if classify and first.dim() == 2 and first.shape[1] > 1:
        logs, others = first.log_softmax(1), second.log_softmax(1)
        apart = torch.where(logs.isneginf(), 0.0, logs - others)  # a class that is masked has no share
        found, pairs = float((logs.exp() * apart).sum(1).mean()), pairs[1:]
    variation.add([output for output, _ in pairs], samples)
    for (output, other), square in zip(pairs, variation.squares(), strict=True):
        found += 0.5 * float(torch.where(output == other, 0.0, output - other).square().sum()) / (square * samples)
    return found
