"""Attention whose code names no sizes: separate projections, heads as wide as the weights make them, a fixed scale.

`opening` puts these in the place of modules that compute the same from one fused weight, or whose code says how wide a
head is. Queries and keys may have another width than values, and a narrower head needs no other scale. What a module is
called with and what it returns stay those of the module in whose place it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowcol_edge.errors import ModelError


class Attention(nn.Module):
    """Multi-head attention over (N, tokens, features).

    Args:
        layers: query, key, value and where there is one the output, each under the name it gets as a submodule.
        heads: into how many parts queries, keys and values are split.
        scale: what products of query and key are multiplied with.
        dropout: probability that a weight is dropped in training.
    """

    def __init__(self, layers: Mapping[str, nn.Module], heads: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.places = tuple(layers)
        self.num_heads = heads
        self.scale = scale
        self.dropout_p = dropout

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, scale={self.scale:.6g}, dropout={self.dropout_p:g}"

    def projected(self, place: int, x: Tensor) -> Tensor:
        """Queries (place 0), keys (1) or values (2) of ``x``: (N, heads, tokens, width)."""
        given: Tensor = self.get_submodule(self.places[place])(x)
        return torch.unflatten(given, -1, (self.num_heads, -1)).transpose(1, 2)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """(N, tokens, heads · width of the values); a mask that is bool is true where a query may look."""
        dropout = self.dropout_p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)

    def weighed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `mixed` gives, and the weights (N, heads, queries, keys); the mask is added."""
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, self.dropout_p, self.training)
        return torch.matmul(weights, value).transpose(1, 2).flatten(2), weights

    def given(self, mixed: Tensor) -> Tensor:
        """Through the output layer, if there is one."""
        if len(self.places) < 4:
            return mixed
        output: Tensor = self.get_submodule(self.places[3])(mixed)
        return output


class TorchAttention(Attention):
    """Called as ``nn.MultiheadAttention`` is; its fused path, for which Transformer layers ask, is closed."""

    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self, layers: Mapping[str, nn.Module], heads: int, scale: float, dropout: float, *, batch_first: bool
    ) -> None:
        super().__init__(layers, heads, scale, dropout)
        self.batch_first = batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ModelError("is_causal without attn_mask", hint="hand over the mask that it says something of")
        batched, sides = query.dim() == 3, [query, key, value]
        if not batched:
            sides = [x.unsqueeze(0) for x in sides]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            sides = [x.transpose(0, 1) for x in sides]
        q, k, v = (self.projected(place, x) for place, x in enumerate(sides))
        # as torch has it: the hint stands for the mask where nothing else needs one
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            mixed, weights = self.weighed(q, k, v, mask)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = self.mixed(q, k, v, mask, causal)
        output = self.given(mixed)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks as one that is added, in (N, heads, queries, keys) or what broadcasts to it."""
        parts = []
        if attn_mask is not None:
            added = _added(attn_mask, query)
            parts.append(added if added.dim() == 2 else torch.unflatten(added, 0, (-1, self.num_heads)))
        if padding is not None:
            parts.append(_added(padding, query)[:, None, None])
        return sum(parts[1:], parts[0]) if parts else None


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """torch's bool masks are true where a query must not look."""
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))


class FusedAttention(Attention):
    """Called as timm's ``Attention`` is: ``x`` (N, tokens, features) → the same.

    Args:
        norms: what queries, keys and all that is mixed go through.
        drop: behind the output.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        heads: int,
        scale: float,
        dropout: float,
        norms: Sequence[nn.Module],
        drop: nn.Module,
    ) -> None:
        super().__init__(layers, heads, scale, dropout)
        self.q_norm, self.k_norm, self.norm = norms
        self.proj_drop = drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = (self.projected(place, x) for place in range(3))
        mixed = self.mixed(self.q_norm(q), self.k_norm(k), v, None if is_causal else attn_mask, is_causal)
        output: Tensor = self.proj_drop(self.given(self.norm(mixed)))
        return output


class HiddenAttention(Attention):
    """Called as the self-attention of BERT-like encoders is: hidden states and a mask by name.

    Args:
        weights: the pair that it returns holds the weights and not None.
        pair: it returns a pair; otherwise what is mixed alone, in a tuple.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], heads: int, scale: float, dropout: float, *, weights: bool, pair: bool
    ) -> None:
        super().__init__(layers, heads, scale, dropout)
        self.weights = weights
        self.pair = pair

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more: object, **options: object
    ) -> tuple[Tensor] | tuple[Tensor, Tensor | None]:
        asked = [name for name in DECODING if _is_set(options.get(name))]
        if asked or any(map(_is_set, more)):
            got = ", ".join(asked) or "more arguments by position"
            raise ModelError("an opened self-attention", expected="hidden states and their mask", got=got)
        q, k, v = (self.projected(place, hidden_states) for place in range(3))
        if self.weights:
            mixed, weights = self.weighed(q, k, v, attention_mask)
            return self.given(mixed), weights
        output = self.given(self.mixed(q, k, v, attention_mask))
        return (output, None) if self.pair else (output,)


def _is_set(value: object) -> bool:
    return value is not None and value is not False


DECODING = (
    "cache", "past_key_value", "past_key_values", "head_mask", "encoder_hidden_states", "key_value_states",
    "position_bias", "is_causal", "softcap",
)  # fmt: skip
"""Arguments of such modules that decoders and cross-attention use."""
