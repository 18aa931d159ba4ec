"""Which layers others can stand in for. A split layer is called as the one it replaces, and has nothing else of it: no
weight whose type the model's code might ask for, no sizes. The exported graph does not show that: it is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rowcol_edge.calling import bind
from rowcol_edge.factoring.openers import ClosedError, alike, called

_ROUNDING = 1e-4


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In place: ``new`` wherever ``old`` is registered, under whatever names."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def refused(model: nn.Module, names: Sequence[str], example: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Layers of these that nothing can stand in for → why. The model is left as it was.

    It runs once as it is and once with something in place of all these layers; where that fails, with halves of them.

    Args:
        names: layers that it calls.
    """
    args, kwargs = bind(model, example)

    def ran() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return called(model, args, kwargs)

    wanted = ran()

    def found(some: Sequence[str]) -> dict[str, str]:
        standins = {name: _Standin(model.get_submodule(name)) for name in some}
        try:
            for standin in standins.values():
                put(model, standin.layer, standin)
            same = alike(wanted, ran(), _ROUNDING)
        except ClosedError:
            same = False
        finally:
            for standin in standins.values():
                put(model, standin, standin.layer)
        if not same and len(some) > 1:
            return found(some[: len(some) // 2]) | found(some[len(some) // 2 :])
        return {name: reason for name, standin in standins.items() if (reason := standin.reason(same=same))}

    return found(names) if names else {}


class _Standin(nn.Module):
    """Calls the layer, and remembers whether it was called and what else of the layer was asked for."""

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.asked = ""
        self.called = False

    def reason(self, *, same: bool) -> str:
        """Why it cannot stand here, ``""`` if it can; ``same``: the model gave with it what it gives without."""
        if self.asked:
            return f"the model's code reads its {self.asked}"
        if not same:
            return "the model's code takes nothing else in its place"
        return "" if self.called else "the model's code calls it by a reference that nothing else can be put in"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.layer, name)
            self.asked = self.asked or name
            return value
