"""What the latent channels of a split are worth at the model's own output.

A split at full rank is the layer itself, and its leading channels are the split at a lower rank. So the channels of
full splits in the layers' places are watched in one go, and what each rank loses follows to first order as in
`sensitivity` – for `spatial` too, whose error depends on how neighbouring pixels go together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import sensitivity, splits
from rowcol_edge.factoring.costs import Form, Split
from rowcol_edge.factoring.layers import describe
from rowcol_edge.factoring.places import Place
from rowcol_edge.factoring.projections import project
from rowcol_edge.factoring.sensitivity import Feeds, Frame, Losses
from rowcol_edge.factoring.spaces import LayerSpaces, Progress
from rowcol_edge.factoring.splits import Layer
from rowcol_edge.factoring.standins import put

Array = NDArray[np.float64]


def spatial_losses(
    model: nn.Module,
    samples: Feeds,
    inputs: Mapping[str, LayerSpaces],
    outputs: Mapping[str, LayerSpaces],
    *,
    across_first: bool,
    classify: bool,
    progress: Progress | None = None,
) -> dict[str, Array]:
    """(ranks + 1,) by layer: the predicted loss of its `SPATIAL` split at each rank, falling to 0; the layers are those
    of ``inputs`` that can be split so, without those that no gradient comes back to: what they lose is not known.

    Deterministic; the model is left as it was. Memory: a copy of the model with larger layers, ``8 · rank²`` bytes a
    layer at its full rank, and the activations of 4 samples.

    Args:
        samples: input name → samples, of which the half is used that directions from the other half (see
            `sensitivity.halves`) have not seen.
        inputs, outputs: what `projections.project` would be given, by layer.

    Raises:
        ModelError, MemoryError: as `sensitivity.stream`.
    """
    full: dict[str, nn.Sequential] = {}
    losses: dict[str, Losses] = {}
    watched: dict[Place, Frame] = {}
    for name, taken in inputs.items():
        layer = _layer(model, name)
        rank, _ = describe(name, layer).largest(Form.SPATIAL, across_first=across_first)
        if rank:
            split = Split(Form.SPATIAL, rank, across_first=across_first)
            full[name] = project(layer, split, inputs=taken, outputs=outputs.get(name), name=name)
            losses[name] = Losses()
            watched[Place(f"{name}.expand", given=False, border=True)] = losses[name].at(*_channels(full[name], taken))
    if not full:
        return {}
    whole = copy.deepcopy(model)
    for name, parts in full.items():
        put(whole, whole.get_submodule(name), parts)
    chunks = sensitivity.chunked(sensitivity.halves(samples)[1])
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("spatial splits", done, len(chunks))

    try:
        objective = sensitivity.Objective.of(whole, chunks, classify=classify)
        sensitivity.stream(whole, chunks, watched, objective, advance)
    except sensitivity.NoGradientsError:
        return {}
    return {name: found.by_rank() for name, found in losses.items() if found.samples}


def _layer(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    if not isinstance(layer, splits.Layer):
        raise PlanError(f"layer {name!r}", expected="a linear layer or a convolution", got=type(layer).__name__)
    return layer


def _channels(parts: nn.Sequential, taken: LayerSpaces) -> tuple[Array, Array, Array]:
    """The latent's channels as directions of their own, about the mean that the bias makes good."""
    reduce = parts[0]
    assert isinstance(reduce, splits.Layer)
    values = splits.matrix(reduce)
    mean = values.reshape(len(values), len(taken.mean), -1).sum(axis=2) @ taken.mean
    own = np.eye(len(mean))[None]
    return mean[None], own, own
