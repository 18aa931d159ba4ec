"""The models of somebody who goes through the command line; see tools/walkthrough.py."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import ResNet, resnet18


def build() -> ResNet:
    """The inspection model: (N, 1, 224, 224) to two logits, good and defective."""
    net = resnet18(num_classes=2)
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return net


def trained() -> ResNet:
    net = build()
    net.load_state_dict({name: value.float() for name, value in load_file("weights.safetensors").items()})
    return net


class WithKind(nn.Module):
    """A picture and the kind of its cell: 1 for monocrystalline, 0 for polycrystalline."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()
        self.kind = nn.Linear(1, 2)
        nn.init.constant_(self.kind.weight, 0.1)
        nn.init.zeros_(self.kind.bias)

    def forward(self, picture: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(picture) + self.kind(kind)
        return logits


def factored() -> ResNet:
    """The model after somebody has split two of its layers."""
    net = trained()
    net.fc = _split(net.fc, nn.Linear(512, 1, bias=False), nn.Linear(1, 2))
    last = net.layer4[1]
    last.conv2 = _split(last.conv2, nn.Conv2d(512, 96, 3, padding=1, bias=False), nn.Conv2d(96, 512, 1))
    return net


def _split(layer: nn.Linear | nn.Conv2d, first: nn.Module, second: nn.Module) -> nn.Sequential:
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        rank = len(first.weight)
        first.weight.copy_((s[:rank, None] * v[:rank]).reshape(first.weight.shape))
        second.weight.copy_(u[:, :rank].reshape(second.weight.shape))
        second.bias.copy_(torch.zeros(len(u)) if layer.bias is None else layer.bias)
    return nn.Sequential(first, second)


class Bessel(nn.Module):
    """An operator that no runtime has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def unsupported() -> ResNet:
    net = trained()
    net.maxpool = nn.Sequential(net.maxpool, Bessel())
    return net


def mean_recall(labels: np.ndarray, outputs: np.ndarray) -> float:
    """A metric of one's own, between 0 and 1."""
    said = outputs.argmax(1)
    return float(np.mean([(said[labels == label] == label).mean() for label in np.unique(labels)]))
