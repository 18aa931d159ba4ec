"""Gradients where they arrive: what a backward pass brings to the places that are watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rowcol_edge.factoring.layouts import Layout
from rowcol_edge.factoring.places import Place, rows


class Watcher(Protocol):
    """Is told of one place."""

    @property
    def behind(self) -> bool:
        """Of a taken place it wants what arrives behind the layer, not what the layer makes of that."""

    def see(self, values: Tensor) -> Tensor | None:
        """On the way forward: of (samples, positions, groups, size), float32, what it wants to have when the gradients
        arrive."""

    def add(self, seen: Tensor | None, gradients: Tensor) -> None:
        """On the way back."""


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients of activations only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def watching(
    model: nn.Module, watchers: Mapping[Place, Watcher], laid: Mapping[str, Layout] | None = None
) -> Iterator[None]:
    """What is given is watched behind the layer; what is taken on a way of the layer's own, so that the gradient that
    comes back is what arrives through this layer alone. ``laid``: where samples lie, where not along the first axis."""
    layers: dict[str, _Layer] = {}
    for place, watcher in watchers.items():
        if place.name not in layers:
            layers[place.name] = _Layer(model.get_submodule(place.name), (laid or {}).get(place.name, Layout()))
        layers[place.name].add(place, watcher)
    try:
        for each in layers.values():
            each.attach()
        yield
    finally:
        for each in layers.values():
            each.detach()


_Seen = list[tuple[Place, Watcher, Tensor | None]]


class _Layer:
    """The watchers of one layer."""

    def __init__(self, layer: nn.Module, layout: Layout) -> None:
        self._layer = layer
        self._layout = layout
        self._taken: list[tuple[Place, Watcher]] = []
        self._behind: list[tuple[Place, Watcher]] = []
        self._given: list[tuple[Place, Watcher]] = []
        self._waiting: _Seen = []
        self._handles: list[RemovableHandle] = []

    def add(self, place: Place, watcher: Watcher) -> None:
        own = self._given if place.given else self._behind if watcher.behind else self._taken
        own.append((place, watcher))

    def attach(self) -> None:
        if self._taken or self._behind:
            self._handles.append(self._layer.register_forward_pre_hook(self._before, with_kwargs=True))
        if self._given or self._behind:
            self._handles.append(self._layer.register_forward_hook(self._after))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = args[0] if args else kwargs["input"]
        self._waiting = self._see(value, self._behind)
        if not self._taken:
            return None
        value = self._watched(value, self._see(value, self._taken), given=False)
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "input": value})

    def _after(self, _: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        seen, self._waiting = [*self._waiting, *self._see(result, self._given)], []
        return self._watched(result, seen, given=True)

    def _see(self, value: Tensor, watchers: list[tuple[Place, Watcher]]) -> _Seen:
        with torch.no_grad():
            return [(place, each, each.see(self._rows(value, place))) for place, each in watchers]

    def _rows(self, values: Tensor, place: Place) -> Tensor:
        """(samples, positions, groups, size), float32."""
        return self._layout.by_sample(rows(self._layout.first(values), self._layer, place).float())

    def _watched(self, value: Tensor, seen: _Seen, *, given: bool) -> Tensor:
        if not torch.is_grad_enabled():  # a part that the model itself keeps out: none will arrive
            return value
        if not value.requires_grad:  # the first layer on its way: gradients begin here
            value = value.detach().requires_grad_().clone()  # what follows may work in place, and on no leaf
        elif not given:
            value = value.view_as(value)
        elif value._is_view():  # a hook on its gradient is lost where what follows works in place
            value = value.clone()

        def arrived(gradients: Tensor) -> None:
            for place, watcher, kept in seen:
                side = Place(place.name) if given and not place.given else place
                watcher.add(kept, self._rows(gradients, side))

        value.register_hook(arrived)  # type: ignore[no-untyped-call]
        return value
