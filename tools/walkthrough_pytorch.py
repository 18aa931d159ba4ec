"""What PyTorch says of the pictures of tools/walkthrough.py: torchvision's model and transforms, nothing of ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import models, transforms

from walkthrough_data import WEIGHTS

CLEAR = (0.1, 0.9)
"""A probability outside has the same label at every arm's threshold; they are between 0.2 and 0.5."""


@cache
def probabilities(work: Path) -> dict[str, float]:
    """That of a defect, for each picture of the test split."""
    net = models.resnet18(num_classes=2)
    net.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    net.load_state_dict({name: value.float() for name, value in load_file(work / WEIGHTS).items()})
    net.eval()
    recipe = transforms.Compose([
        transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize([0.6], [0.16]),
    ])  # fmt: skip
    found = {}
    with torch.inference_mode():
        for path in sorted((work / "test").rglob("*.png")):
            with Image.open(path) as image:
                logits = net(recipe(image.convert("L"))[None])
            found[str(path.relative_to(work))] = float(logits.softmax(1)[0, 1])
    return found


def labels(work: Path, threshold: float) -> dict[str, str]:
    """Of each picture of the test split."""
    return {
        picture: "defective" if probability >= threshold else "good"
        for picture, probability in probabilities(work).items()
    }


def clear(work: Path) -> dict[str, str]:
    """The first two pictures of each label that no quantized or factored arm may see otherwise."""
    low, high = CLEAR
    good = [picture for picture, probability in probabilities(work).items() if probability <= low][:2]
    defective = [picture for picture, probability in probabilities(work).items() if probability >= high][:2]
    assert len(good) == len(defective) == 2, (good, defective)
    return dict.fromkeys(good, "good") | dict.fromkeys(defective, "defective")
