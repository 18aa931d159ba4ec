"""Running first and second moments of rows, float64.

Rows are widened a chunk at a time and shifted by the mean of the first ones seen, so that a mean far larger than what
varies takes no digits away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_VALUES = 1 << 21  # values at a time: 16 MB


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The sums of some rows, shifted; float64."""

    shift: Tensor  # (groups, size)
    count: int
    total: Tensor  # (groups, size)
    gram: Tensor  # (groups, size, size)


class Sums:
    """Of all rows at a place.

    Memory: ``8 · groups · size²`` bytes, as much again while rows are added, and a chunk of 16 MB.
    """

    __slots__ = ("count", "gram", "shift", "total")

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.total = self.gram = torch.zeros((), dtype=torch.float64)

    def fits(self, part: Part) -> bool:
        """It is shifted as these are, or these are not yet."""
        return self.shift is None or self.shift is part.shift

    def part(self, rows: Tensor) -> Part:
        """The sums of rows (samples, positions, groups, size), shifted as these are."""
        flat = rows.flatten(0, 1)
        groups, size = flat.shape[1:]
        shift = flat.mean(0, dtype=torch.float64) if self.shift is None else self.shift
        first, *others = torch.split(flat, max(1, _CHUNK_VALUES // (groups * size)))
        total, gram = _sums(first, shift)
        for chunk in others:
            more, products = _sums(chunk, shift)
            total += more
            gram += products
        return Part(shift, len(flat), total, gram)

    def add(self, part: Part) -> None:
        """One that `fits`."""
        if self.shift is None:
            self.shift, self.total, self.gram = part.shift, part.total.clone(), part.gram.clone()
        else:
            self.total += part.total
            self.gram += part.gram
        self.count += part.count

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (groups, size) and covariance (groups, size, size), biased; what was summed up is used up."""
        assert self.shift is not None  # something was added
        offset = self.total / self.count
        covariance = self.gram.div_(self.count).sub_(offset.unsqueeze(2) * offset.unsqueeze(1))
        return self.shift + offset, covariance


def _sums(rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.double() - shift  # not in place: it may be the activation itself
    return wide.sum(0), square(wide)


def square(rows: Tensor) -> Tensor:
    """(groups, size, size): of (rows, groups, size) the products of all features, summed over the rows."""
    if rows.shape[1] == 1 and rows.device.type == "cpu":
        matrix = rows[:, 0].numpy()
        return torch.from_numpy(matrix.T @ matrix).unsqueeze(0)  # numpy sees that half of the products are enough
    return torch.einsum("rga,rgb->gab", rows, rows)
