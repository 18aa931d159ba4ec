"""How much a model's outputs vary over the samples: what their errors are measured in where they are no classes.

About their own mean: a pressure around 100,000 Pa that varies by 1 Pa would otherwise seem to lose nothing, whatever it
loses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: a standard deviation below this share of the size is rounding in single precision, and the output is a constant
_ROUNDING = 4 * torch.finfo(torch.float32).eps
_LEAST = 1e-30


class Variation:
    """Of a model's outputs in its own order, which come batch by batch."""

    def __init__(self) -> None:
        self._outputs: list[_Output] = []

    def add(self, outputs: Sequence[torch.Tensor], samples: int) -> None:
        """What the model makes of so many samples."""
        if not self._outputs:
            self._outputs = [_Output() for _ in outputs]
        for known, output in zip(self._outputs, outputs, strict=True):
            known.add(output.detach(), samples)

    def squares(self) -> list[float]:
        """By output: the mean over the samples of the squared distance from the mean, summed over what a sample has.

        From zero instead, where there is no telling: of a single sample, of a constant, and of what has not the samples
        along its first axis or differs in shape from batch to batch.
        """
        return [known.square() for known in self._outputs]

    def means(self) -> list[float]:
        """The same, of one element instead of all that a sample has."""
        return [known.square() * known.samples / max(1, known.elements) for known in self._outputs]


class _Output:
    def __init__(self) -> None:
        self.samples = self.elements = 0
        self._square = 0.0
        self._whole = True  # it has the samples along its first axis, and always one shape
        self._near: torch.Tensor | None = None  # close to the mean: differences from it lose no digits
        self._sum: torch.Tensor | float = 0.0  # of these differences
        self._apart = 0.0  # and of their squares

    def add(self, output: torch.Tensor, samples: int) -> None:
        values = output.double().masked_fill(~output.isfinite(), 0.0)  # scores that are masked
        self.samples += samples
        self.elements += values.numel()
        self._square += float(values.square().sum())
        shape = values.shape[1:] if self._near is None else self._near.shape
        self._whole = self._whole and values.dim() > 0 and values.shape == (samples, *shape)
        if not self._whole:
            return
        if self._near is None:
            self._near = values.mean(0)
        apart = values - self._near
        self._sum = self._sum + apart.sum(0)
        self._apart += float(apart.square().sum())

    def square(self) -> float:
        size = self._square / max(1, self.samples)
        if self._whole and self.samples > 1:
            about = float(torch.as_tensor(self._sum).square().sum()) / self.samples
            varied = (self._apart - about) / (self.samples - 1)
            if varied > _ROUNDING**2 * size:
                return max(varied, _LEAST)
        return max(size, _LEAST)
