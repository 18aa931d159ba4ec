"""What a layer costs, dense and factored. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """Shape, use and cost of one layer.

    The factored form is the column split of ``project``: ``W (out × in·k²) ≈ B (out × r) · A (r × in·k²)``, the second
    part with a bias whether or not the layer had one (it takes up the mean of what is cut off).
    """

    name: str
    kind: str  # a value of layers.SUPPORTED; any other kind is reported, never factored
    in_features: int  # input channels of a convolution
    out_features: int  # output channels of a convolution
    kernel: tuple[int, ...] = ()  # () for a linear layer
    groups: int = 1
    bias: bool = True
    positions: int = 1  # rows the weight is applied to, per sample (pixels, tokens), summed over calls
    outputs: int | None = None  # rows it gives where that is another number: a transposed convolution; None = positions
    calls: int = 1
    skip: str = ""  # why it must stay dense; "" = it may be factored

    @property
    def fan_in(self) -> int:
        """Inputs of one output: ``in / groups · k²``."""
        size = self.in_features // self.groups
        for side in self.kernel:
            size *= side
        return size

    @property
    def parameters(self) -> int:
        """Weight and bias entries of the dense layer."""
        return self.out_features * (self.fan_in + int(self.bias))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer, one sample.

        A transposed convolution spreads each input over its kernel, so its inputs count.
        """
        return self.out_features * self.fan_in * self.positions

    def factored_parameters(self, rank: int) -> int:
        """Weight and bias entries at this rank."""
        return rank * (self.fan_in + self.out_features) + self.out_features

    def factored_macs(self, rank: int) -> int:
        """Multiply-accumulates at this rank, one sample.

        The first part strides, so both see the same positions; of a transposed convolution the second sees more.
        """
        outputs = self.positions if self.outputs is None else self.outputs
        return rank * (self.fan_in * self.positions + self.out_features * outputs)

    @property
    def break_even(self) -> int:
        """Largest rank with fewer parameters than dense; 0 if there is none.

        From ``r · (in·k² + out) + out < out · (in·k² + bias)``.
        """
        return max(0, ceil((self.parameters - self.out_features) / (self.fan_in + self.out_features)) - 1)
