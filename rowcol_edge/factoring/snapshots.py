"""Training that was stopped goes on where its last whole epoch ended: safetensors and JSON in the cache, no pickle."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rowcol_edge import cache as caching
from rowcol_edge.cache import Cache

SCHEMA = 1
"""Part of every key. History: 1 – first version."""
_TENSORS, _SAID = "tensors.safetensors", "said.json"

Tensors = dict[str, torch.Tensor]


def state(module: nn.Module) -> Tensors:
    """Copies of the parameters and buffers, each once however many modules share it."""
    return {name: value.detach().clone().contiguous() for name, value in _values(module)}


@torch.no_grad()
def restore(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `state` took, in the types and memory formats that the module has."""
    for name, value in _values(module):
        value.copy_(tensors[name])


def fits(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether they are of such a module, by name and shape."""
    wanted = {name: value.shape for name, value in _values(module)}
    return wanted == {name: tensor.shape for name, tensor in tensors.items()}


def _values(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    # complex tables, which safetensors may not hold, are constants
    both = [*module.named_parameters(), *module.named_buffers()]
    return [(name, value) for name, value in both if not value.is_complex()]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Snapshots of one training, by epoch; ``key`` is a digest of all that decides it.

    A cache that is too small or cannot be written keeps none: then a run that is killed begins anew.
    """

    cache: Cache
    key: str

    def save(self, epoch: int, tensors: Tensors, said: Mapping[str, Any]) -> None:
        """Keep this epoch, then forget the one before: a kill between leaves both."""

        def write(folder: Path) -> None:
            save_file(tensors, folder / _TENSORS)
            (folder / _SAID).write_text(json.dumps(said), encoding="utf-8")

        self.cache.put(self._of(epoch), write)
        if epoch:
            self.cache.drop(self._of(epoch - 1))

    def newest(self, epochs: int) -> tuple[Tensors, dict[str, Any]] | None:
        """The last epoch that was kept and is whole; None if there is none."""
        for epoch in range(epochs, -1, -1):
            with tempfile.TemporaryDirectory(prefix="rowcol-snapshot-") as work:
                into = Path(work) / "entry"
                if not self.cache.restored(self._of(epoch), into):
                    continue
                try:
                    return load_file(into / _TENSORS), json.loads((into / _SAID).read_text(encoding="utf-8"))
                except (SafetensorError, OSError, ValueError):
                    continue  # not what this version writes
        return None

    def clear(self, epochs: int) -> None:
        """Forget all of them."""
        for epoch in range(epochs + 1):
            self.cache.drop(self._of(epoch))

    def _of(self, epoch: int) -> str:
        return caching.key(["snapshot", SCHEMA, self.key, epoch])
