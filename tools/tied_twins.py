"""The tied twins of the two shipped samples: the same architectures with one weight in the place of each pair.

A Transformer block has one matrix for its FFN, and two for its attention as in HaLViT: query and output, key and value.
A ResNet block whose two 3×3 convolutions are of one shape has one kernel. Everything else is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rowcol_edge.factoring.tied_kernels import TiedKernels
from rowcol_edge.factoring.ties import Tie, TiedAttention, TiedFeedForward

Ties = dict[str, Tie]


class TiedTransformerBlock(nn.Module):
    """Pre-norm, as the sample's: (N, tokens, width) → the same."""

    def __init__(
        self, norm1: nn.Module, attention: TiedAttention, norm2: nn.Module, feed_forward: TiedFeedForward
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feed_forward = norm1, attention, norm2, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class TiedResidualBlock(nn.Module):
    """A basic block without a projection: (N, channels, H, W) → the same."""

    def __init__(self, pair: TiedKernels, norm: nn.Module) -> None:
        super().__init__()
        self.pair, self.norm = pair, norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.pair(x)) + x)


def transformer(dense: Any, images: Tensor | None) -> tuple[Any, Ties]:
    """The twin of `sample:fmnist-vit`, tied from the dense weights by what ``images`` make of them, or with random tied
    matrices where there are none."""
    twin, ties = copy.deepcopy(dense), {}
    names = [f"blocks.{number}.{part}" for number in range(len(twin.blocks)) for part in ("attention", "expand")]
    seen = {} if images is None else inputs_of(dense, names, images)
    for number, block in enumerate(twin.blocks):
        own, attention = f"blocks.{number}", block.attention
        width, hidden = block.expand.in_features, block.expand.out_features
        if images is None:
            mixing = TiedAttention(width, attention.heads, bias=True)
            forward = TiedFeedForward(width, hidden)
        else:
            mixing, outer, inner = TiedAttention.from_dense(
                attention.query, attention.key, attention.value, attention.output, attention.heads,
                seen[f"{own}.attention"],
            )  # fmt: skip
            forward, pair = TiedFeedForward.from_dense(block.expand, block.contract, seen[f"{own}.expand"])
            ties |= {f"{own}.attention.query, output": outer, f"{own}.attention.key, value": inner}
            ties[f"{own}.expand, contract"] = pair
        twin.blocks[number] = TiedTransformerBlock(block.norm1, mixing, block.norm2, forward)
    return twin, ties


def residual(dense: nn.Module, images: Tensor | None, names: Iterable[str]) -> tuple[nn.Module, Ties]:
    """The twin of `sample:elpv-resnet18`, whose blocks ``names`` are tied: from the dense kernels by what ``images``
    make of them, or with the first random kernel for both where there are none."""
    twin, ties, names = copy.deepcopy(dense), {}, list(names)
    seen = {} if images is None else inputs_of(dense, names, images)
    for name in names:
        block: Any = twin.get_submodule(name)
        inner = nn.Sequential(block.bn1, nn.ReLU())
        if images is None:
            pair = TiedKernels(block.conv1.weight, inner)
        else:
            pair, ties[f"{name}.conv1, conv2"] = TiedKernels.from_dense(block.conv1, inner, block.conv2, seen[name])
        twin.set_submodule(name, TiedResidualBlock(pair, block.bn2))
    return twin, ties


def inputs_of(model: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """What the layers of these names take when the model, in eval mode, sees ``images``."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        for name in names
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return seen
