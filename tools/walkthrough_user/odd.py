"""Models and data of the inspection line that are not what one hopes for; see tools/walkthrough.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import ResNet

sys.path.insert(0, str(Path(__file__).parent))

from cells import calibration
from net import trained

LETTERS = 128
_LENGTH = 64


def few() -> Iterator[dict[str, np.ndarray]]:
    """64 pictures."""
    return ({"x": feeds["picture"]} for feeds, _ in islice(calibration(), 2))


def one() -> Iterator[dict[str, np.ndarray]]:
    return ({"x": feeds["x"][:1]} for feeds in islice(few(), 1))


def three() -> Iterator[dict[str, np.ndarray]]:
    return ({"x": feeds["x"][:3]} for feeds in islice(few(), 1))


def copies() -> Iterator[dict[str, np.ndarray]]:
    """Four pictures, each there eight times."""
    return ({"x": np.repeat(feeds["x"][:4], 8, axis=0)} for feeds in islice(few(), 1))


def hole() -> Iterator[dict[str, np.ndarray]]:
    """One pixel of one picture is no number."""
    for feeds in few():
        pixels = feeds["x"].copy()
        pixels[5, 0, 100, 100] = np.nan
        yield {"x": pixels}


def flat() -> Iterator[dict[str, np.ndarray]]:
    """A camera with its cap on."""
    return ({"x": np.zeros_like(feeds["x"])} for feeds in few())


def noise() -> Iterator[dict[str, np.ndarray]]:
    """For models whose weights are random too."""
    yield {"x": np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)}


def dead() -> ResNet:
    """A quarter of the channels never fires, another always gives the same."""
    net = trained()
    norm = net.layer4[0].bn1
    with torch.no_grad():
        norm.weight[:256] = 0.0
        norm.bias[:128], norm.bias[128:256] = -1.0, 0.5
    return net


def zeros() -> ResNet:
    net = trained()
    nn.init.zeros_(net.layer4[1].conv2.weight)
    return net


def deficient() -> ResNet:
    """The weights of one layer span 20 of their 512 directions."""
    net = trained()
    weight = net.layer4[1].conv2.weight
    with torch.no_grad():
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weight.copy_((u[:, :20] * s[:20] @ v[:20]).view_as(weight))
    return net


def unused() -> ResNet:
    net = trained()
    net.spare = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    return net


def last() -> nn.Module:
    return trained().to(memory_format=torch.channels_last)


def half() -> nn.Module:
    return trained().half()


def bfloat() -> nn.Module:
    return trained().bfloat16()


def double() -> nn.Module:
    return trained().double()


def twice() -> ResNet:
    net = trained()
    net.layer4[1].conv2 = net.layer4[1].conv1
    return net


def tied() -> ResNet:
    net = trained()
    net.layer4[1].conv2.weight = net.layer4[1].conv1.weight
    return net


class Louder(nn.Conv2d):
    """Not what a convolution computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.25 * super().forward(x)


def subclass() -> ResNet:
    net = trained()
    net.layer4[1].conv2.__class__ = Louder
    return net


def parametrized() -> ResNet:
    net = trained()
    parametrizations.weight_norm(net.layer4[1].conv2)
    return net


def hooked() -> ResNet:
    """Weight norm as it was before parametrizations."""
    net = trained()
    nn.utils.weight_norm(net.layer4[1].conv2)
    return net


def masked() -> ResNet:
    """Somebody pruned and left the masks in."""
    net = trained()
    prune.l1_unstructured(net.layer4[1].conv2, "weight", 0.25)
    return net


class NextLetter(nn.Module):
    """(N, length) letters to the scores of the next one; the last layer reads the embeddings' matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(LETTERS, 48)
        self.mix = nn.Conv1d(48, 96, 9)
        self.hidden = nn.Linear(96, 48)
        self.answer = nn.Linear(48, LETTERS, bias=False)
        self.answer.weight = self.embed.weight

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.mix(self.embed(letters).transpose(1, 2))).amax(2)
        scores: torch.Tensor = self.answer(torch.relu(self.hidden(x)))
        return scores


def next_letter() -> NextLetter:
    torch.manual_seed(0)
    return NextLetter()


def text() -> Iterator[dict[str, np.ndarray]]:
    """Out of this interpreter's own words."""
    import this

    letters = np.frombuffer(this.s.encode("ascii"), np.uint8).astype(np.int64)
    rows = np.stack([letters[start : start + _LENGTH] for start in range(0, len(letters) - _LENGTH, 3)])
    for start in range(0, len(rows), 32):
        yield {"letters": rows[start : start + 32]}
