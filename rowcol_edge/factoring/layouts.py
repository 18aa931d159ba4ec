"""Where the samples of a batch lie in what a layer gives: mostly along its first axis, but a model may lay out tokens
first, or make several of one, as windows or the frames of a clip."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rowcol_edge.calling import bind, evaluating, feed
from rowcol_edge.factoring.places import channel_axis

_COUNTS = (2, 3)  # samples in the two batches that are compared; not one, whose axis code may take away


@dataclass(frozen=True, slots=True)
class Layout:
    """``axis`` holds ``each`` entries a sample, one sample after the other; with other axes ``positions`` rows of
    features a sample."""

    axis: int = 0
    each: int = 1
    positions: int = 1

    def first(self, values: Tensor) -> Tensor:
        """With that axis in front."""
        return values.movedim(self.axis, 0) if self.axis else values

    def by_sample(self, rows: Tensor) -> Tensor:
        """(samples, positions, …) of (entries, positions, …)."""
        return rows if self.each == 1 else rows.reshape(-1, self.each * rows.shape[1], *rows.shape[2:])


def find(model: nn.Module, samples: Mapping[str, NDArray[Any]], names: Sequence[str]) -> dict[str, Layout]:
    """By layer, from what becomes of its shape when there is one sample more. Layers are left out where that does not
    tell; all are where there are too few samples, or where the model does not take so few."""
    if min(len(array) for array in samples.values()) < max(_COUNTS):
        return {}
    seen = []
    for count in _COUNTS:
        shapes: dict[str, tuple[torch.Size, int]] = {}
        args, kwargs = bind(model, feed(model, {name: array[:count] for name, array in samples.items()}))
        try:
            with evaluating(model), torch.no_grad(), _noting(model, names, shapes):
                model(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):  # as code meets a number that it does not expect
            return {}
        seen.append(shapes)
    pairs = {name: (few, seen[1][name]) for name, few in seen[0].items() if name in seen[1]}
    found = {name: _layout(few, more, size) for name, ((few, size), (more, _)) in pairs.items()}
    return {name: layout for name, layout in found.items() if layout is not None}


def _layout(few: torch.Size, more: torch.Size, features: int) -> Layout | None:
    if len(few) != len(more):
        return None
    axes = [axis for axis, sizes in enumerate(zip(few, more, strict=True)) if sizes[0] != sizes[1]]
    if len(axes) != 1:
        return None
    each, rest = divmod(few[axes[0]], _COUNTS[0])
    if rest or more[axes[0]] != each * _COUNTS[1]:
        return None
    return Layout(axes[0], each, few.numel() // (features * _COUNTS[0]))


@contextlib.contextmanager
def _noting(model: nn.Module, names: Sequence[str], shapes: dict[str, tuple[torch.Size, int]]) -> Iterator[None]:
    """What each layer gives first: its shape, and how many of it are features."""
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple[Any, ...], result: Tensor, name: str = name) -> None:
            last = module[-1] if isinstance(module, nn.Sequential) else module  # of a split
            shapes.setdefault(name, (result.shape, result.shape[channel_axis(last)]))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
