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

_MOST = 4096  # classes: beyond, a matrix of them takes as long as the network and gigabytes


class Answers:
    """Scores of classes as they come, (samples, classes).

    Memory: ``8 · classes²`` bytes, twice that while more come.
    """

    def __init__(self) -> None:
        self._shares = self._products = torch.zeros((), dtype=torch.float64)
        self._samples = 0

    def see(self, result: object) -> None:
        """What the model gives of a batch; its first tensor are the scores."""
        shares = tensors(result)[0].double().softmax(1)
        self._shares = self._shares + shares.sum(0)
        self._products = shares.T @ shares + self._products
        self._samples += len(shares)

    def fisher(self) -> NDArray[np.float64]:
        """(classes, classes); once, as what was summed up is used up."""
        found = self._products.neg_()
        found.diagonal().add_(self._shares)
        return np.asarray(found.div_(self._samples).cpu().numpy())


def given_by(model: nn.Module, sample: Feeds, names: Sequence[str]) -> str | None:
    """The layer whose output is all that the model gives, scores (samples, classes) of up to 4,096 classes; None where
    there is none among ``names``."""
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
    count = min(len(array) for array in sample.values())
    if len(given) != 1 or given[0].dim() != 2 or len(given[0]) != count or not 2 <= given[0].shape[1] <= _MOST:
        return None
    return next((name for name, result, version in found if result is given[0] and result._version == version), None)
