"""Small models and data for tests, deterministic and quick to build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rowcol_edge import models
from rowcol_edge.resources import targets_dir


class SmallNet(nn.Module):
    """Convolutions with batch norm, a residual add and a linear head: what an inspection net is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 64, 3, stride=2, padding=1)
        self.more = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x))
        x = torch.relu(self.more(x)) + x
        return self.head(x.mean(dim=(2, 3)))


class Dense(nn.Module):
    """Linear layers and a GELU on the pictures of `frames`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(256, 128), nn.Linear(128, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(nn.functional.gelu(self.first(x.flatten(1))))
        return logits


def small_net() -> SmallNet:
    """The same weights every time; its second class is the brighter half of `frames`."""
    torch.manual_seed(0)
    net = SmallNet()
    frames_, labels = frames(256, seed=99)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.from_numpy(frames_)), torch.from_numpy(labels)).backward()
        optimizer.step()
    return net.eval()


def frames(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright stripe in half of the pictures: (count, 1, 16, 16) float32 and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pictures = rng.normal(0, 1, (count, 1, 16, 16))
    for i in np.flatnonzero(labels):
        pictures[i, 0, rng.integers(0, 16)] += 1.5
    return pictures.astype(np.float32), labels.astype(np.int64)


def write_splits(folder: Path, count: int = 80) -> dict[str, str]:
    """calibration, selection and test as .npz files, by option name."""
    found = {}
    for seed, name in enumerate(("calib", "select", "test")):
        pictures, labels = frames(count, seed)
        np.savez(folder / f"{name}.npz", x=pictures, labels=labels)
        found[name] = str(folder / f"{name}.npz")
    return found


def short_vit(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """`sample:fmnist-vit` with two of its six blocks, and what a build is told of it, for tests of a file's format: all
    operators of a Transformer, fewer of each. By an energy, not a budget: there is nothing to search."""
    loaded = models.load("sample:fmnist-vit")
    assert loaded.sample is not None
    assert loaded.sample.data is not None
    assert loaded.sample.preprocess is not None
    loaded.module.blocks = loaded.module.blocks[:2]
    recipe, splits = loaded.sample.preprocess, {}
    with np.load(loaded.sample.data.with_name("images.npz"), allow_pickle=False) as stored:
        for option, part, count in (("calib", "calibration", 16), ("select", "selection", 100), ("test", "test", 100)):
            pictures, labels = (stored[f"{part}_{kind}"][:count] for kind in ("images", "labels"))
            normal = (pictures[:, None] * np.float32(recipe.scale) - recipe.mean[0]) / recipe.std[0]
            splits[option] = str(folder / f"{part}.npz")
            np.savez(splits[option], image=normal.astype(np.float32), labels=labels.astype(np.int64))
    options = {"labels": list(loaded.sample.labels), "metric": "accuracy", "preprocess": recipe}
    return loaded.module, {**options, **splits, "energy": 0.98, "zip": False, "out": str(folder / "bundles")}


def widened_target(folder: Path, name: str, precision: str) -> str:
    """The file of a target that also lists this precision for each of its runtimes."""
    lines = (targets_dir() / f"{name}.toml").read_text(encoding="utf-8").splitlines(keepends=True)
    path = folder / f"{name}.toml"
    wider = [
        line if f'"{precision}"' in line else line.replace("precisions = [", f'precisions = ["{precision}", ')
        for line in lines
    ]
    path.write_text("".join(wider), encoding="utf-8")
    return str(path)


class UnevenNet(nn.Module):
    """Three convolutions, the middle one depthwise, through ReLU, whose channels differ by orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv2d(16, 16, 1, bias=False)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.first(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def uneven_net() -> UnevenNet:
    torch.manual_seed(3)
    net, scale = UnevenNet().eval(), torch.logspace(-2, 1.5, 16)
    with torch.no_grad():
        net.first.weight.mul_(scale.view(-1, 1, 1, 1))
        net.first.bias.mul_(scale)
        net.depthwise.weight.div_(scale.view(-1, 1, 1, 1))
    return net


class OutlierNet(nn.Module):
    """What ``reader`` gets has one channel thousands of times as strong as the others, and it listens to all of them:
    with one scale for all of them, int8 loses the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.reader = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.more = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(16, 2, bias=False)
        self.register_buffer("gain", torch.ones(16, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.reader(x * self.gain + x))  # a product alone would be folded into the weights
        for layer in self.more:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def outlier_net() -> OutlierNet:
    torch.manual_seed(1)
    net = OutlierNet().eval()
    with torch.no_grad():
        net.gain[0] = 5000.0
        net.reader.weight[:, 0] /= 5000.0
        net.reader.weight *= 4.0
    return net
