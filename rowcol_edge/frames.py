"""Preprocessing in the graph: a model that takes camera frames, and splits that hold frames.

A frame is uint8 (height, width, channels). The normalisation goes in front of the model's own forward, not around it:
every stage – spaces, export, calibration, judging – meets one model with one kind of input, its layers under the names
they have without it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from . import datasets
from .datasets import Feeds, Labels, Split
from .device.preprocess import Preprocess
from .errors import ConfigError, DataError
from .models import LoadedModel

_BETWEEN = 0.05
"""How far from a whole pixel value float32 may leave one that was scaled and is scaled back."""


def bake(model: LoadedModel, recipe: Preprocess) -> LoadedModel:
    """The model for frames of the recipe's size; its module is a copy.

    Raises:
        ConfigError: a model with several inputs.
    """
    if len(model.inputs) != 1:
        raise ConfigError(
            "bake_preprocess", expected="a model with one input, a picture", got=f"inputs {', '.join(model.inputs)}"
        )
    module, normalize = copy.deepcopy(model.module), _normalizer(recipe)
    if isinstance(module, fx.GraphModule):  # torch.export runs its graph and none of its hooks
        (frames,) = (node for node in module.graph.nodes if node.op == "placeholder")
        with module.graph.inserting_after(frames):
            tensor = module.graph.call_function(normalize, (frames,))
        frames.replace_all_uses_with(tensor, lambda user: user is not tensor)
        module.recompile()
    else:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(map(normalize, args)), {name: normalize(value) for name, value in kwargs.items()}

        module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    digest = hashlib.sha256(json.dumps([model.digest, recipe.to_dict()]).encode()).hexdigest()
    return replace(model, module=module, digest=digest)


def _normalizer(recipe: Preprocess) -> Callable[[torch.Tensor], torch.Tensor]:
    """The recipe's arithmetic: uint8 (N, H, W, C) → float32 (N, C, H, W)."""
    factor, offset = (torch.from_numpy(step) for step in recipe.steps)

    def normalize(frames: torch.Tensor) -> torch.Tensor:
        # first of all the type: TensorRT takes uint8 from a Cast only
        return frames.float().permute(0, 3, 1, 2) * factor + offset

    return normalize


def of_tensors(split: Split, recipe: Preprocess) -> Split:
    """The split with frames in place of the tensors that the recipe made of them; one that holds frames as it is.

    Raises:
        DataError: tensors of another shape, or with values that no pixel gives.
    """
    ((name, (shape, dtype)),) = split.specs.items()
    if dtype == "uint8" and shape == recipe.frame_shape:
        return split
    planes = (recipe.channels, recipe.height, recipe.width)
    if dtype != "float32" or shape != planes:
        raise DataError(
            f"{split.name} data {split.reference}: input {name}",
            expected=f"frames {recipe.frame_shape} in uint8, or what the preprocess makes of them: {planes}",
            got=f"{shape}, {dtype}",
            hint="hand over pictures, or leave --bake-preprocess out",
        )
    tensors = split.source

    def source() -> Iterable[tuple[Feeds, Labels | None]]:
        for feeds, labels in tensors():
            yield {name: _frames(feeds[name], recipe, split)}, labels

    return datasets.scan(Split(split.name, split.reference, source, label_names=split.label_names))


def _frames(tensors: npt.NDArray[Any], recipe: Preprocess, split: Split) -> npt.NDArray[np.uint8]:
    """float32 (N, C, H, W) → uint8 (N, H, W, C)."""
    factor, offset = recipe.steps
    pixels = (tensors.astype(np.float64) - offset) / factor
    whole = np.rint(pixels)
    if np.abs(pixels - whole).max() > _BETWEEN or whole.min() < 0 or whole.max() > 255:
        raise DataError(
            f"{split.name} data {split.reference}",
            expected="tensors that the preprocess makes of 8-bit pictures",
            got=f"pixel values such as {pixels.flat[np.abs(pixels - np.clip(whole, 0, 255)).argmax()]:.2f}",
            hint="hand over the pictures themselves, correct --preprocess, or leave --bake-preprocess out",
        )
    return np.ascontiguousarray(whole.astype(np.uint8).transpose(0, 2, 3, 1))
