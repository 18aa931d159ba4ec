"""Networks of tied layers: vision Transformers and the ResNet-50 of HaLViT, with random weights.

Source: O. C. Koyun and B. U. Töreyin, "HaLViT: Half of the Weights are Enough", CVPR Workshops 2024. ResNet-50 follows
its authors' published counts to the parameter: stages 3 and 4 have one matrix each, for all of their bottlenecks.

The paper's Transformers are known here by their sizes alone. Those below have these sizes and the geometry of DeiT
(H. Touvron et al., "Training data-efficient image transformers", ICML 2021): 16×16 patches, a class token, learned
positions, twelve blocks; the hidden width is the multiple of 16 that meets the size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rowcol_edge.factoring.ties import TiedAttention, TiedFeedForward, tied_bottleneck

_PATCH = 16
_IMAGE = 224
_EXPANSION = 4


class Block(nn.Module):
    """Pre-norm: tied attention, then a tied FFN."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = TiedAttention(width, heads)
        self.feed_forward = TiedFeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """(N, 3, image, image) → (N, classes), or (N, width) where ``classes`` is 0."""

    def __init__(
        self, width: int, hidden: int, heads: int, depth: int = 12, classes: int = 1000, image: int = _IMAGE
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, _PATCH, _PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (image // _PATCH) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def tiny(classes: int = 1000) -> VisionTransformer:
    """HaLViT-Tiny's size: 11.1 M parameters with 1,000 classes."""
    return VisionTransformer(width=384, hidden=1472, heads=6, classes=classes)


def small(classes: int = 1000) -> VisionTransformer:
    """HaLViT-Small's size: 43.0 M parameters with 1,000 classes."""
    return VisionTransformer(width=768, hidden=2960, heads=12, classes=classes)


class Bottleneck(nn.Module):
    """The dense bottleneck of a ResNet (K. He et al., CVPR 2016), its stride in the 3×3 convolution."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = _EXPANSION * inner
        self.reduce = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.spatial = nn.Sequential(_spatial(inner, stride), nn.BatchNorm2d(inner), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class TiedStage(nn.Module):
    """A ResNet stage whose bottlenecks ``WᵀG_n(Wx)`` share one ``W``.

    It doubles the channels and halves the size of the map. What stands before the first bottleneck widens its input by
    a depthwise 3×3 convolution beside it; another one makes the shortcut's smaller map.
    """

    def __init__(self, channels: int, inner: int, depth: int) -> None:
        super().__init__()
        out = _EXPANSION * inner
        more = out - channels
        self.widen = nn.Sequential(
            nn.Conv2d(channels, more, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(more), nn.GELU()
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(out, out, 3, stride=2, padding=1, groups=out, bias=False),
            nn.BatchNorm2d(out),
            nn.BatchNorm2d(out),
        )
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(inner, out, 1, 1), mode="fan_out"))
        self.inner = nn.ModuleList([_inner(inner, 2 if n == 0 else 1) for n in range(depth)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(out) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.widen(x), x], 1)
        shortcut = self.shortcut(x)
        for inner, norm in zip(self.inner, self.norms, strict=True):
            x = shortcut = torch.relu(norm(tied_bottleneck(x, self.weight, inner)) + shortcut)
        return x


class ResNet50(nn.Module):
    """(N, 3, H, W) → (N, classes), or (N, 2048) where ``classes`` is 0; the last two stages are tied."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.stage1 = _dense_stage(64, 64, depth=3, stride=1)
        self.stage2 = _dense_stage(256, 128, depth=4, stride=2)
        self.stage3 = TiedStage(512, 256, depth=6)
        self.stage4 = TiedStage(1024, 512, depth=3)
        self.head = nn.Linear(2048, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def resnet50(classes: int = 1000) -> ResNet50:
    """HaLViT's ResNet-50: 13.466 M parameters, 15.515 M with a classifier of 1,000 classes."""
    return ResNet50(classes)


def _dense_stage(channels: int, inner: int, depth: int, stride: int) -> nn.Sequential:
    out = _EXPANSION * inner
    first = Bottleneck(channels, inner, stride)
    return nn.Sequential(first, *[Bottleneck(out, inner, 1) for _ in range(depth - 1)])


def _inner(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), _spatial(channels, stride), nn.BatchNorm2d(channels), nn.ReLU()
    )


def _spatial(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
