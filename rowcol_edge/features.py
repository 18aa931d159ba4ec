"""What the dense model itself sees in each sample: its own features, the range of every layer, the class it answers.

One forward pass a split. The features of a sample are what the last layer with weights (linear or convolution, in the
order of the traced graph) takes in, averaged over pixels or tokens; a model without such a layer gives its first
output. Kept are a few kilobytes a sample and never an activation: features wider than `_WIDEST` go through a fixed
random projection, which keeps distances (W. B. Johnson and J. Lindenstrauss, "Extensions of Lipschitz mappings into a
Hilbert space", 1984).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .calling import bind, evaluating, feed
from .datasets import Feeds, Labels, Split
from .device.progress import silent
from .errors import DataError, ModelError
from .export.capture import name_outputs
from .factoring.graph import LayerGraph
from .job import Progress
from .models import OneByOne
from .sketches import Sketches, sketch, stack

_WIDEST = 512

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """A split as the model sees it; ``n`` samples, all arrays in the order of the split.

    Attributes:
        features: (n, at most 512).
        low, high: (n, tensors) smallest and largest value of each tensor of ``tensors`` over one sample.
        tensors: the layers' inputs and outputs, as ``NAME input`` and ``NAME output``.
        classes: (n,) the labels; the model's own answer where there are none; None if it does not classify.
        labelled: ``classes`` are labels.
        sketches: what is left of the inputs, for telling near-duplicates.
    """

    name: str
    features: Floats
    low: Floats
    high: Floats
    tensors: tuple[str, ...]
    classes: Labels | None
    labelled: bool
    sketches: Sketches

    def __len__(self) -> int:
        return len(self.features)


class Observer:
    """Runs splits through one model and keeps what `Observed` holds of them."""

    def __init__(self, model: nn.Module, graph: LayerGraph) -> None:
        called = [(layer.name, model.get_submodule(layer.name)) for layer in graph.layers if layer.own_calls]
        self._model = model
        self._layers = {name: module for name, module in called if isinstance(module, nn.Linear | _ConvNd)}
        self._last = next(reversed(self._layers.values()), None)
        self._batch = 0
        self._features: list[torch.Tensor] = []
        self._ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def split(self, split: Split, progress: Progress = silent) -> Observed:
        """One pass over a split.

        Raises:
            DataError: inputs that the model cannot take.
            ModelError: the model fails on a batch.
        """
        parts, sketched, done = [], [], 0
        for feeds in split.batches():
            if not len(next(iter(feeds.values()))):
                continue
            parts.append(self.batch(feeds))
            sketched.append(sketch(feeds))
            done += len(parts[-1][0])
            progress(f"observe {split.name} data", done, len(split))
        features, low, high = (np.concatenate([part[i] for part in parts]) for i in range(3))
        answers = [part[3] for part in parts]
        known = [answer for answer in answers if answer is not None]
        answered = np.concatenate(known) if len(known) == len(answers) else None
        labels = split.labels if split.labels is not None and split.labels.ndim == 1 else None  # not those of pixels
        return Observed(
            name=split.name,
            features=features,
            low=low,
            high=high,
            tensors=self._tensors,
            classes=answered if labels is None else labels,
            labelled=labels is not None,
            sketches=stack(sketched),
        )

    def batch(self, feeds: Feeds) -> tuple[Floats, Floats, Floats, Labels | None]:
        """Features, smallest values, largest values and answered classes of one batch."""
        count = len(next(iter(feeds.values())))
        if isinstance(self._model, OneByOne) and count > 1:  # its layers are called once a sample
            singles = [self.batch({name: a[i : i + 1] for name, a in feeds.items()}) for i in range(count)]
            features, low, high = (np.concatenate([single[i] for single in singles]) for i in range(3))
            answers = [single[3] for single in singles if single[3] is not None]
            return features, low, high, np.concatenate(answers) if answers else None
        tensors = feed(self._model, feeds)
        self._batch, self._features, self._ranges = count, [], {}
        args, kwargs = bind(self._model, tensors)
        with evaluating(self._model), self._hooks(), torch.inference_mode():
            try:
                output = next(iter(name_outputs(self._model(*args, **kwargs)).values()))
            except (RuntimeError, TypeError, ValueError, IndexError) as e:
                raise ModelError("the model fails on a batch of data", got=str(e)) from e
        seen = _narrow(self._features[-1] if self._features else _pooled(output, 1))
        if not bool(torch.isfinite(seen).all()):
            raise DataError("the model's features hold NaN or infinity", hint="check the weights and the input scaling")
        return _numpy(seen), _numpy(self._edges(0)), _numpy(self._edges(1)), _classes(output)

    @property
    def _tensors(self) -> tuple[str, ...]:
        return tuple(f"{name} {side}" for name in self._layers for side in ("input", "output"))

    def _edges(self, side: int) -> torch.Tensor:
        """(batch, tensors): the smallest (0) or largest (1) values; 0 where a layer was not reached this time."""
        nothing = torch.zeros(self._batch)
        edges = [self._ranges.get(name, (nothing, nothing))[side].float().cpu() for name in self._tensors]
        return torch.stack(edges, 1) if edges else torch.zeros(self._batch, 0)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._watch(name)) for name, module in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if module is self._last:
                self._features.append(_pooled(args[0], -1 if isinstance(module, nn.Linear) else 1, self._batch))
            for side, value in (("input", args[0]), ("output", output)):
                rows = _rows(value, self._batch)
                low, high = rows.amin(1), rows.amax(1)
                if (known := self._ranges.get(f"{name} {side}")) is not None:  # a layer that is called several times
                    low, high = torch.minimum(known[0], low), torch.maximum(known[1], high)
                self._ranges[f"{name} {side}"] = low, high

        return hook


def _rows(value: torch.Tensor, batch: int) -> torch.Tensor:
    """(batch, everything of one sample); a tensor that all samples share is repeated."""
    if value.dim() and value.shape[0] % batch == 0:
        return value.reshape(batch, -1)
    return value.reshape(1, -1).expand(batch, -1)


def _pooled(value: torch.Tensor, channels: int, batch: int | None = None) -> torch.Tensor:
    """(batch, channels), averaged over all other axes."""
    if value.dim() < 3 and batch in (None, value.shape[0]):
        return value.reshape(len(value), -1)
    moved = value if channels == -1 else value.movedim(channels, -1)
    rows = _rows(moved, batch or len(value))
    return rows.reshape(len(rows), -1, moved.shape[-1]).mean(1)


def _narrow(features: torch.Tensor) -> torch.Tensor:
    width = features.shape[1]
    if width <= _WIDEST:
        return features.float()
    fixed = torch.Generator().manual_seed(0)
    projection = torch.randn(width, _WIDEST, generator=fixed) / _WIDEST**0.5
    narrowed: torch.Tensor = features.float() @ projection.to(features.device)
    return narrowed


def _classes(output: torch.Tensor) -> Labels | None:
    """The classes a classifier answers; one logit decides between two."""
    if output.dim() != 2 or not output.is_floating_point():
        return None
    decided = output[:, 0] > 0 if output.shape[1] == 1 else output.argmax(1)
    answers: Labels = decided.long().cpu().numpy()
    return answers


def _numpy(tensor: torch.Tensor) -> Floats:
    return tensor.detach().float().cpu().numpy()
