"""A small vision Transformer for 28×28 grey pictures: 49 patches, six blocks, 0.68 M parameters.

Every weight matrix is a plain ``nn.Linear`` or ``nn.Conv2d``, with separate query, key and value projections.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, (N, tokens, width) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm block: attention, then a GELU MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class VisionTransformer(nn.Module):
    """(N, 1, 28, 28) float32 → (N, 10) logits; the tokens are averaged before the head."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads, 4 * width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.tokens(image))

    def tokens(self, image: Tensor) -> Tensor:
        return self.patch(image).flatten(2).transpose(1, 2) + self.position

    def classify(self, x: Tensor) -> Tensor:
        """Any number of tokens (N, tokens, width) → logits: training may leave some out."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build() -> nn.Module:
    """The architecture with random weights."""
    return VisionTransformer()
