"""The row space each layer uses: `spaces` and `sensitivity` for what a layer takes instead of what it gives.

The records are the same, `LayerSpaces` with ``y`` read as the input ``x`` (features or channels at one position).
Gradients are those that arrive through the layer itself, ``Wᵀ g``: what else reads the same tensor does not see that
the layer takes less of it.

A convolution that pads with zeros has those in its row space too: of the share ``1 − s`` of its taps that read one
(`splits.coverage`) the projection about the mean makes ``(I − P) E[x]``, while it is exact inside. What is decomposed
is ``cov(x) + (1 − s)/s · E[x] E[x]ᵀ``, the second moment of what goes wrong, per input that is read, if a direction is
cut off. Where that is more than without a mean (``s ≤ ½``: transposed convolutions, most of whose taps reach other
outputs) it is ``E[xxᵀ]``, with a mean of 0 in the record.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rowcol_edge.factoring.places import Moments


def with_border(moments: Moments, coverages: Sequence[float]) -> Moments:
    """What was measured inside, with what the border adds; ``coverages``: share of taps that read an input, by call."""
    share = float(np.mean(coverages))
    if share == 1.0:
        return moments
    about_mean = share > 0.5
    weight = (1.0 - share) / share if about_mean else 1.0
    square = moments.mean.unsqueeze(2) * moments.mean.unsqueeze(1)
    mean = moments.mean if about_mean else torch.zeros_like(moments.mean)
    return Moments(mean, moments.covariance + weight * square, moments.samples)
