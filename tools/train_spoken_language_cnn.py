"""Train sample:spoken-language-cnn (some minutes); a killed run goes on where it was.

    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav
    python -m pip install -e . torch safetensors
    python tools/train_spoken_language_cnn.py

A step sees a random second of each of its prompts, at a random speed and loudness, with noise. The epoch is chosen on
the selection split; the stored fp16 weights are read back and scored once on the test split.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_small
from train_common import shuffled
from train_small import Recipe, Settings, Step


class SpeechRecipe(Recipe):
    def __init__(self, settings: Settings) -> None:
        super().__init__("spoken-language-cnn", settings)
        self.prompts = self.data.prompts("train")

    def steps(self, epoch: int) -> int:
        return len(self.prompts) // self.settings.batch

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Step]:
        for pick in shuffled(len(self.prompts), self.settings.batch, generator):
            chosen = [self.prompts[int(i)] for i in pick]
            views = torch.stack([self.view(torch.from_numpy(sound), generator) for sound, _ in chosen])
            noise = 0.1 * torch.rand(len(views), 1, 1, generator=generator)
            views = views + noise * torch.randn(views.shape, generator=generator)
            yield views, torch.tensor([label for _, label in chosen])

    def view(self, sound: Tensor, generator: torch.Generator) -> Tensor:
        """A random second, up to 8 % faster or slower: speed changes the pitch of a voice too."""
        rate: int = self.data.RATE
        taken = int(rate * (0.92 + 0.16 * float(torch.rand(1, generator=generator))))
        if len(sound) < taken:
            sound = F.pad(sound, (0, taken - len(sound)))
        start = int(torch.randint(len(sound) - taken + 1, (1,), generator=generator))
        part = F.interpolate(sound[None, None, start : start + taken], size=rate, mode="linear", align_corners=False)
        return part[0] / part.square().mean().sqrt().clamp(min=self.data.QUIET)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=0.05)

    def score(self, model: nn.Module, split: str) -> float:
        outputs, labels = self.outputs(model, split)
        return float(np.mean(outputs.argmax(1) == labels))


if __name__ == "__main__":
    train_small.main("spoken-language-cnn", "accuracy", SpeechRecipe, __doc__, epochs=40)
