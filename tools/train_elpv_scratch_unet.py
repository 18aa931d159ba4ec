"""Train sample:elpv-scratch-unet (some minutes); a killed run goes on where it was.

    python -m pip install -e . torch safetensors pillow elpv-dataset
    python tools/train_elpv_scratch_unet.py

Every epoch draws other scratches on the good cells of the training split, and turns and mirrors them. The epoch is
chosen on the selection split; the stored fp16 weights are read back and scored once on the test split.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_small
from rowcol_edge import quality
from train_common import shuffled
from train_small import Recipe, Settings, Step


class ScratchRecipe(Recipe):
    def __init__(self, settings: Settings) -> None:
        super().__init__("elpv-scratch-unet", settings)
        self.cells = list(self.data.good("train"))

    def steps(self, epoch: int) -> int:
        return len(self.cells) // self.settings.batch

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Step]:
        recipe = self.data.preprocess()
        for pick in shuffled(len(self.cells), self.settings.batch, generator):
            drawn = [self.data.scratched(*self.cells[int(i)], view=1 + epoch) for i in pick]
            inputs = torch.from_numpy(np.stack([recipe.image(picture) for picture, _ in drawn]))
            masks = torch.from_numpy(np.stack([mask for _, mask in drawn])[:, None].astype(np.float32))
            turn = int(torch.randint(4, (1,), generator=generator))
            both = torch.rot90(torch.cat([inputs, masks], 1), turn, (2, 3))
            if torch.rand(1, generator=generator) < 0.5:
                both = both.flip(3)
            shift = 0.4 * torch.rand(len(both), 1, 1, 1, generator=generator) - 0.2
            yield both[:, :1] + shift, both[:, 1:]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, and one minus a soft Dice coefficient over the batch: scratches are few pixels."""
        share = outputs.sigmoid()
        dice = 2 * (share * targets).sum() / (share.sum() + targets.sum() + 1.0)
        return F.binary_cross_entropy_with_logits(outputs, targets) + 1 - dice

    def score(self, model: nn.Module, split: str) -> float:
        outputs, masks = self.outputs(model, split)
        return quality.Iou().value(quality.Predictions(outputs, masks, positive=1), 0.5)


if __name__ == "__main__":
    train_small.main("elpv-scratch-unet", "iou", ScratchRecipe, __doc__, epochs=20, lr=4e-3, batch=16)
