"""Channel sets: the channels inside a model that can be made fewer, and all layers that give or take them.

``narrow`` makes a layer's output, and with it the next layer's input, narrower: no operator is added. `coupling` finds
the sets. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where a set's channels lie along one axis of a layer or parameter.

    Attributes:
        name: the layer, or the parameter.
        index: (groups, size, taps): place of each channel; more than one tap behind a flattened picture.
        axis: of a parameter; −1 for a layer.
    """

    name: str
    index: Index
    axis: int = -1


@dataclass(frozen=True, eq=False)
class ChannelSet:
    """Channels that get fewer together.

    Attributes:
        name: that of the layer that first gives them.
        size: channels of each group, which all keep the same number; the groups are the heads of an attention.
        producers: layers that give them; carriers: depthwise convolutions and batch norms that pass them on;
            uses: layers that mix them; parameters: what is added to or multiplied with them.
        norms: layer norms that alone look at them before their uses: the stream of a Transformer.
        linear: nothing but linear operators lies between producers and uses, so that they may be rotated.
        contracted: (query, key): nobody reads them but the product of the two.
        rescale: the model's code divides that product by the root of the width it finds.
        sizes: (module, attribute) where the model's code keeps the number of channels, to reshape by.
        loose: parameters for each channel (of every group together) that belong to no layer: norms, what is added.
        fixed: why they stay as they are, ``""`` if they need not.
    """

    name: str
    groups: int
    size: int
    producers: tuple[Slot, ...]
    carriers: tuple[Slot, ...] = ()
    uses: tuple[Slot, ...] = ()
    parameters: tuple[Slot, ...] = ()
    norms: tuple[str, ...] = ()
    normed: Mapping[str, int] = field(default_factory=dict)  # use → place of its norm
    linear: bool = False
    contracted: tuple[str, str] | None = None
    rescale: bool = False
    sizes: tuple[tuple[str, str], ...] = ()
    loose: int = 0
    fixed: str = ""

    @property
    def turned(self) -> bool:
        """Its channels are combined anew, not picked: one reader alone says which combinations."""
        return self.linear and not self.norms and (self.contracted is not None or len(self.uses) == 1)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Everything that changes with it, each once."""
        return tuple(dict.fromkeys(slot.name for slot in (*self.producers, *self.carriers, *self.uses)))
