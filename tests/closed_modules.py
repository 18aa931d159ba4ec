"""Modules that hide their layers, written as timm, transformers and efficientnet-lite-pytorch have them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """timm's, fused or not."""

    def __init__(self, dim: int, heads: int, *, bias: bool = True, norms: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.scale, self.fused_attn = self.head_dim**-0.5, fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if norms else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if norms else nn.Identity()
        self.attn_drop = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(dim) if norms else nn.Identity()
        self.gate: nn.Module | None = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        samples, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if is_causal:
                scores = scores + scores.new_full((tokens, tokens), float("-inf")).triu_(1)
            elif attn_mask is not None:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            x = self.attn_drop(scores.softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(samples, tokens, -1))
        if self.gate is not None:
            x = x * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(x))


class TurnedAttention(Attention):
    """timm's with rotary embeddings."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if rope is None else x * rope)


class Scaled(Attention):
    """Another temperature than it says."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * 1.01


class SelfAttention(nn.Module):
    """BERT's: head sizes in the code."""

    names = ("query", "key", "value")

    def __init__(self, width: int, heads: int, *, kind: str = "sdpa", causal: bool = False, output: str = "") -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=kind)
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.scaling = self.attention_head_size**-0.5
        for name in self.names:
            self.add_module(name, nn.Linear(width, width))
        if output:
            self.add_module(output, nn.Linear(width, width))
        self.output, self.is_causal = output, causal
        self.dropout = nn.Dropout(0.1)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cache: object = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (getattr(self, name)(hidden_states).view(shape).transpose(1, 2) for name in self.names)
        weights = None
        if self.config._attn_implementation == "eager":
            scores = torch.matmul(q, k.transpose(2, 3)) * self.scaling
            weights = F.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
            mixed = torch.matmul(F.dropout(weights, self.dropout.p, self.training), v)
        else:
            causal = self.is_causal and attention_mask is None
            mixed = F.scaled_dot_product_attention(q, k, v, attention_mask, 0.0, causal, scale=self.scaling)
        mixed = mixed.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return getattr(self, self.output)(mixed) if self.output else mixed, weights


class LinAttention(SelfAttention):
    """DistilBERT's names."""

    names = ("q_lin", "k_lin", "v_lin")


class RotarySelfAttention(SelfAttention):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, sinusoidal_pos: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden_states, attention_mask)


class StaticPadding(nn.Conv2d):
    """A convolution that pads by itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int, before: nn.Module, **options: object) -> None:
        super().__init__(inputs, outputs, kernel, **options)  # type: ignore[arg-type]
        self.stride = list(self.stride)  # type: ignore[assignment]
        self.static_padding = before

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class EncoderBlock(nn.Module):
    """An attention, whatever it is called with, between norms."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(self.norm1(x))
        x = x + (mixed[0] if isinstance(mixed, tuple) else mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    """Patches of (N, 1, 8, 8), blocks, a head."""

    def __init__(self, attentions: list[nn.Module], width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.blocks = nn.Sequential(*(EncoderBlock(each, width) for each in attentions))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patch(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))
