"""The models of `benchmark_backends.py`, as a user names them, and their data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PHOTOS = {"calibration": 32, "test": 16}
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True, slots=True)
class Model:
    """``options`` are those of `rowcol_edge.build`; ``transformer`` is what NNCF's user says of the model."""

    name: str
    title: str
    options: dict[str, Any]
    transformer: bool
    source: str


def resnet50() -> nn.Module:
    """torchvision's ResNet-50 with random weights, always the same."""
    from torchvision.models import resnet50 as make

    torch.manual_seed(0)
    return make(weights=None)


def deit_small() -> nn.Module:
    """timm's DeiT-S with random weights, always the same."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("deit_small_patch16_224", pretrained=False)


def calibration() -> Iterator[np.ndarray]:
    return _photos("calibration", seed=0)


def test() -> Iterator[np.ndarray]:
    return _photos("test", seed=1)


def _photos(part: str, seed: int) -> Iterator[np.ndarray]:
    """(8, 3, 224, 224) crops of the two photos that scikit-learn brings."""
    from sklearn.datasets import load_sample_images

    pictures, random = load_sample_images().images, np.random.default_rng(seed)
    for _ in range(PHOTOS[part] // 8):
        crops = [_crop(pictures[random.integers(len(pictures))], random) for _ in range(8)]
        yield np.ascontiguousarray(((np.stack(crops) / np.float32(255) - _MEAN) / _STD).transpose(0, 3, 1, 2))


def _crop(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    top, left = (random.integers(size - 224) for size in picture.shape[:2])
    return picture[top : top + 224, left : left + 224].astype(np.float32)


def models(work: Path) -> dict[str, Model]:
    """By name; what has to be made first (MiniLM's weights and splits) is made in ``work``."""
    import minilm  # here, because a build imports this file for its factories, without its neighbours

    here = Path(__file__).resolve()
    data = work / "minilm"

    def imagenet(name: str, title: str, transformer: bool) -> Model:
        options = {
            "model": f"{here}:{name}", "calib": f"{here}:calibration", "budget": "params<=0.5x",
        }  # fmt: skip
        return Model(name, title, options, transformer, "random weights; crops of scikit-learn's sample photos")

    found = [
        Model("elpv-resnet18", "ELPV ResNet-18", {"model": "sample:elpv-resnet18"}, False, "embedded sample"),
        Model("fmnist-vit", "Fashion-MNIST ViT", {"model": "sample:fmnist-vit"}, True, "embedded sample"),
        Model(
            "minilm", "MiniLM-L6 with a text classifier",
            {
                "model": f"{here.parent / 'minilm.py'}:build",
                "weights": str(data / "weights.safetensors"),
                "calib": str(data / "calibration.npz"),
                "select": str(data / "selection.npz"),
                "test": str(data / "test.npz"),
                "labels": list(minilm.SECTIONS),
            },
            True, "tools/minilm.py",
        ),
        imagenet("resnet50", "ResNet-50", False),
        imagenet("deit_small", "DeiT-S", True),
    ]  # fmt: skip
    return {model.name: model for model in found}
