"""The two samples whose tied twins are trained: their networks, what a step sees, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import update_bn

import elpv_cells as cells
import tied_twins
import train_fmnist_vit as fmnist
from rowcol_edge import quality
from rowcol_edge.errors import ModelError
from rowcol_edge.user_code import import_file
from train_common import ROOT, load_half, reduced, shuffled


@dataclass(frozen=True)
class Budget:
    """What dense and tied have alike. Phases: (tokens kept, epochs) of the Transformer, (pixels, epochs) of the CNN."""

    phases: tuple[tuple[int, int], ...]
    lr: float


@dataclass(frozen=True)
class Settings:
    """``images``: how many of the training pictures are used (0: all); ``fitted``: of these, how many ties see."""

    budgets: dict[str, Budget]
    images: int
    fitted: int = 512
    tested: int = 0  # the first so many of the pictures of selection and test; 0: all
    blocks: int = 5  # how many of the CNN's blocks are tied
    seed: int = 0
    restart: float = 0.6
    decay: float = 0.05
    average: float = 0.98
    batch: int = 32


class Sample:
    """One of the two samples: its networks, what a step sees, what is asked of them. A subclass fills in the rest."""

    name = ""
    metrics: tuple[str, ...] = ()  # the first one chooses the epoch
    positive: int | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = ROOT / "sample_models" / self.name
        self.data: Any = import_file(self.folder / "data.py", ModelError)

    def dense(self, start: str) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        model: nn.Module = import_file(self.folder / "model.py", ModelError).build()
        return load_half(model, self.folder / "weights.safetensors") if start == "trained" else model

    def network(self, arm: str, start: str) -> tuple[nn.Module, tied_twins.Ties]:
        """An arm as its training starts."""
        dense = self.dense(start)
        model, ties = (dense, {}) if arm == "dense" else self.twin(dense, self.fitted() if start == "trained" else None)
        if start == "trained":
            update_bn(self.fitted().split(self.settings.batch), model)  # nothing without batch norms
        return self.laid_out(model), ties

    def laid_out(self, model: nn.Module) -> nn.Module:
        """In the memory format that a CPU is fastest with."""
        return model

    def twin(self, dense: nn.Module, images: Tensor | None) -> tuple[nn.Module, tied_twins.Ties]:
        raise TypeError(f"{type(self).__name__} must define twin()")

    def fitted(self) -> Tensor:
        """The pictures that ties and batch norms are fitted to."""
        raise TypeError(f"{type(self).__name__} must define fitted()")

    def count(self) -> int:
        """How many pictures are trained on."""
        raise TypeError(f"{type(self).__name__} must define count()")

    def losses(self, model: nn.Module, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The loss of every step of an epoch."""
        raise TypeError(f"{type(self).__name__} must define losses()")

    def split(self, name: str) -> tuple[Tensor, np.ndarray]:
        """Inputs and labels of selection or test."""
        raise TypeError(f"{type(self).__name__} must define split()")

    def predictions(self, model: nn.Module, split: str) -> quality.Predictions:
        inputs, labels = self.split(split)
        model.eval()
        with torch.no_grad():
            outputs = torch.cat([model(x) for x in inputs.split(64)]).numpy()
        return quality.Predictions(outputs, labels.astype(np.int64), self.positive)


class Garments(Sample):
    name = "fmnist-vit"
    metrics = ("accuracy",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        pixels, labels = self.data.arrays("train")
        chosen = np.random.default_rng(settings.seed).permutation(len(labels))[: settings.images or None]
        self.inputs = fmnist.normalised(self.data, pixels[chosen])
        self.targets = torch.from_numpy(labels[chosen].astype(np.int64))

    def twin(self, dense: nn.Module, images: Tensor | None) -> tuple[nn.Module, tied_twins.Ties]:
        return tied_twins.transformer(dense, images)

    def fitted(self) -> Tensor:
        return self.inputs[: self.settings.fitted]

    def count(self) -> int:
        return len(self.targets)

    def losses(self, model: Any, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        for pick in shuffled(self.count(), self.settings.batch, generator):
            # the fused attention's backward is slower than plain matrix products on a CPU
            with reduced(), sdpa_kernel(SDPBackend.MATH):
                tokens = model.tokens(fmnist.augment(self.inputs[pick], generator))
                if size < tokens.shape[1]:
                    tokens = fmnist.some(tokens, size, generator)
                logits = model.classify(tokens)
            yield F.cross_entropy(logits.float(), self.targets[pick], label_smoothing=0.05)

    def split(self, name: str) -> tuple[Tensor, np.ndarray]:
        pixels, labels = self.data.original("t10k") if name == "test" else self.data.arrays(name)
        kept = slice(self.settings.tested or None)
        return fmnist.normalised(self.data, pixels[kept]), labels[kept]


class Cells(Sample):
    name = "elpv-resnet18"
    metrics = ("auroc", "balanced_accuracy")
    positive = 1
    blocks = ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")  # the others widen: no pair

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        [self.pixels] = {pixels for budget in settings.budgets.values() for pixels, _ in budget.phases}
        self.splits: dict[str, cells.Split] = {}
        for name, most in (("train", settings.images), ("selection", settings.tested), ("test", settings.tested)):
            found = cells.read(self.data, name, -(-most // self.data.BATCH) or None)
            self.splits[name] = replace(found, inputs=cells.resized(found.inputs, self.pixels))

    def twin(self, dense: nn.Module, images: Tensor | None) -> tuple[nn.Module, tied_twins.Ties]:
        return tied_twins.residual(dense, images, self.blocks[: self.settings.blocks])

    def laid_out(self, model: nn.Module) -> nn.Module:
        fast: nn.Module = cells.fast_module(model)
        return fast

    def fitted(self) -> Tensor:
        return self.splits["train"].inputs[: self.settings.fitted]

    def count(self) -> int:
        return len(self.splits["train"].labels)

    def losses(self, model: nn.Module, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        train, views = self.splits["train"], cells.Views(generator)
        for pick in shuffled(self.count(), self.settings.batch, generator):
            with reduced():
                logits = model(cells.fast(views(train.inputs[pick])))
            y = train.targets[pick]
            yield F.cross_entropy(logits.float(), torch.stack([1 - y, y], 1))

    def split(self, name: str) -> tuple[Tensor, np.ndarray]:
        return self.splits[name].inputs, self.splits[name].labels


SETTINGS = {
    "fmnist-vit": Settings(
        {"trained": Budget(((24, 3), (49, 1)), 1e-3), "scratch": Budget(((24, 5), (49, 1)), 1.5e-3)},
        images=10240, batch=128,
    ),
    "elpv-resnet18": Settings(
        {"trained": Budget(((96, 5),), 5e-4), "scratch": Budget(((96, 6),), 1e-3)}, images=0
    ),
}  # fmt: skip
SAMPLES: dict[str, type[Sample]] = {"fmnist-vit": Garments, "elpv-resnet18": Cells}
