"""How much a model's outputs vary over the samples: what their errors are measured in where they are no classes.

About their own mean: a pressure around 100,000 Pa that varies by 1 Pa would otherwise seem to lose nothing, whatever it
loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch

#: a standard deviation below this many units in the last place of what varies is rounding: it is a constant
_ROUNDING = 4.0
_LEAST = 1e-30


class Variation:
    """Of a model's outputs in its own order, which come batch by batch. What is infinite (a mask) does not count."""

    def __init__(self) -> None:
        self._outputs: list[_Output] = []

    def add(self, outputs: Sequence[torch.Tensor], samples: int) -> None:
        """What the model makes of so many samples."""
        for known, output in zip_longest(self._outputs[: len(outputs)], outputs):
            if known is None:
                known = _Output()
                self._outputs.append(known)
            known.add(output.detach(), samples)

    def squares(self) -> list[float]:
        """By output: the mean over the samples of the squared distance from the mean, summed over what a sample has.

        The mean is that of each element, along the first axis that is always as long as there are samples. Where there
        is no telling (a single sample, no such axis, another shape from batch to batch) it is that of all elements
        together, and zero for a constant.
        """
        return [max(known.square(), _LEAST) for known in self._outputs]

    def means(self) -> list[float]:
        """The same, of one element instead of all that a sample has."""
        return [max(known.square() * known.samples / max(1, known.elements), _LEAST) for known in self._outputs]


class _Output:
    def __init__(self) -> None:
        self.samples = self.elements = 0
        self._all = _Sums()
        self._along: dict[int, _Sums] | None = None  # by axis that may be that of the samples

    def add(self, output: torch.Tensor, samples: int) -> None:
        self.samples += samples
        self.elements += output.numel()
        self._all.add(output.reshape(-1))
        axes = [axis for axis, size in enumerate(output.shape) if size == samples]
        if self._along is None:
            self._along = {axis: _Sums() for axis in axes}
        first = {axis: output.movedim(axis, 0) for axis in axes if axis in self._along}
        self._along = {axis: self._along[axis] for axis, values in first.items() if self._along[axis].fits(values)}
        for axis, sums in self._along.items():
            sums.add(first[axis])

    def square(self) -> float:
        """Per sample."""
        varied = next((sums.varied() for sums in (self._along or {}).values()), 0.0)
        return (varied or self._all.varied() or self._all.size()) / max(1, self.samples)


class _Sums:
    """Of finite numbers along the first axis."""

    def __init__(self) -> None:
        self._near: torch.Tensor | None = None  # close to the mean: differences from it lose no digits
        self._count, self._sum, self._squares = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self._step = 0.0  # of the coarsest type that a number came in, relative

    def fits(self, output: torch.Tensor) -> bool:
        return self._near is None or self._near.shape == output.shape[1:]

    def add(self, output: torch.Tensor) -> None:
        self._step = max(self._step, torch.finfo(output.dtype).eps)
        finite, values = output.isfinite(), output.double()
        values = values.masked_fill(~finite, 0.0)
        count = finite.sum(0)
        if self._near is None:
            self._near = values.sum(0) / count.clamp_min(1)
        apart = (values - self._near).masked_fill(~finite, 0.0)
        self._count = self._count + count
        self._sum = self._sum + apart.sum(0)
        self._squares = self._squares + apart.square().sum(0)

    def varied(self) -> float:
        """Squared distances from the mean, summed; without bias, and without what is rounding."""
        if self._near is None:
            return 0.0
        count = self._count.clamp_min(1)
        mean = self._near + self._sum / count
        variance = (self._squares - self._sum.square() / count) / (count - 1).clamp_min(1)
        told = (self._count > 1) & (variance > (_ROUNDING * self._step * mean).square())
        return float((variance * self._count)[told].sum())

    def size(self) -> float:
        """Squared distances from zero, summed."""
        if self._near is None:
            return 0.0
        near = self._near
        return float((self._squares + 2 * near * self._sum + self._count * near.square()).sum())
