"""What stands in for a layer of a model."""

from __future__ import annotations

from torch import nn


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In place: ``new`` wherever ``old`` is registered, under whatever names."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
