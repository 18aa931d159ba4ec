"""Models whose channels are coupled in every way, small enough to be measured in a moment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """A sum across blocks, an inner channel set in each, a depthwise layer and a gate on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.first, self.second = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 12, 3)
        self.wide, self.depthwise = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.squeeze, self.excite = nn.Conv2d(20, 4, 1), nn.Conv2d(4, 20, 1)
        self.back = nn.Conv2d(20, 12, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x[:, :, 1:-1, 1:-1] + self.second(F.relu(self.first(x))))
        wide = F.relu6(self.depthwise(F.relu6(self.wide(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(wide.mean((2, 3), keepdim=True)))))
        x = x + self.back(wide * gate)
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Joined(nn.Module):
    """A concatenation, and a flattened picture before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 10, 3)
        self.both = nn.Conv2d(16, 8, 3, stride=2)
        self.hidden, self.head = nn.Linear(8 * 9, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        x = F.relu(self.both(x)).flatten(1)
        logits: torch.Tensor = self.head(F.gelu(self.hidden(x)))
        return logits


class Attention(nn.Module):
    """Heads with separate layers; the scale is written out, taken from the width, or torch's own."""

    def __init__(self, scale: str, rotary: bool = False) -> None:
        super().__init__()
        self.scale, self.rotary = scale, rotary
        self.query, self.key, self.value, self.output = (nn.Linear(16, 16) for _ in range(4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if self.rotary:
            q, k = (each * torch.linspace(-1, 1, 8) + each.roll(1, -1) for each in (q, k))
        if self.scale == "torch":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = 8**-0.5 if self.scale == "fixed" else q.shape[-1] ** -0.5
            mixed = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        out: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """A pre-norm block: attention, then an FFN, around a stream that layer norms look at."""

    def __init__(self, scale: str = "torch", rotary: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(16) for _ in range(3))
        self.attention = Attention(scale, rotary)
        self.expand, self.contract = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        logits: torch.Tensor = self.head(self.norm3(x).mean(1))
        return logits


PICTURE, TOKENS = (2, 9, 9), (7, 5)


def made(kind: type[nn.Module], *options: object) -> nn.Module:
    """In eval mode, float64, the same weights every time."""
    torch.manual_seed(0)
    return kind(*options).double().eval()
