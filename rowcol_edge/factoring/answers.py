"""What errors of a classifier's own scores are worth: its Fisher matrix at its output, exactly.

``E[diag(p) − p pᵀ]`` over the samples, ``p`` the answer's probabilities (Amari, Natural gradient works efficiently in
learning, 1998). Gradients of drawn classes tend to it (see `sensitivity`), but a few dozen of them do not show most of
a thousand classes, and scores need no way back through the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.calling import bind, evaluating, feed, tensors

Feeds = Mapping[str, NDArray[Any]]


class Answers:
    """Scores of classes as they come, (samples, classes)."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._samples = 0

    def see(self, result: object) -> None:
        """What the model gives of a batch; its first tensor are the scores."""
        shares = tensors(result)[0].double().softmax(1)
        added = shares.sum(0).diag() - shares.T @ shares
        self._total = added if self._total is None else self._total + added
        self._samples += len(shares)

    def fisher(self) -> NDArray[np.float64]:
        """(classes, classes)"""
        assert self._total is not None
        return (self._total / self._samples).cpu().numpy()


def given_by(model: nn.Module, sample: Feeds, names: Sequence[str]) -> str | None:
    """The layer whose output is all that the model gives, scores of classes (samples, classes); None where there is
    none among ``names``."""
    found: list[tuple[str, torch.Tensor, int]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, result, name=name: found.append((name, result, result._version))
        )
        for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():  # not inference mode, in which tensors do not count their changes
            args, kwargs = bind(model, feed(model, sample))
            given = tensors(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if len(given) != 1 or given[0].dim() != 2 or given[0].shape[1] < 2:
        return None
    return next((name for name, result, version in found if result is given[0] and result._version == version), None)
