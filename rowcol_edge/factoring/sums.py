"""Running first and second moments of rows, float64.

Rows are widened a chunk at a time and shifted by the mean of the first ones seen, so that a mean far larger than what
varies takes no digits away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_VALUES = 1 << 21  # values at a time: 16 MB
_BLOCK = 96  # features that are multiplied with all before them at once: nearly half of the products are the others'


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The sums of some rows, shifted; float64."""

    shift: Tensor  # (groups, size)
    count: int
    total: Tensor  # (groups, size)
    gram: Tensor  # (groups, size, size)


class Sums:
    """Of all rows at a place.

    Memory: ``8 · groups · size²`` bytes, as much again while a part is added, and a chunk of 16 MB.
    """

    __slots__ = ("count", "gram", "shared", "shift", "total")

    def __init__(self) -> None:
        self.count = 0
        self.shared = False  # parts of it were added elsewhere too
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
        total, gram = shift.new_zeros(groups, size), shift.new_zeros(groups, size, size)
        _add(flat, shift, total, gram)
        return Part(shift, len(flat), total, gram)

    def extend(self, rows: Tensor) -> None:
        """By rows, without a part of their own; not the first ones."""
        assert self.shift is not None
        flat = rows.flatten(0, 1)
        _add(flat, self.shift, self.total, self.gram)
        self.count += len(flat)

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
        covariance = symmetric(self.gram).div_(self.count).sub_(offset.unsqueeze(2) * offset.unsqueeze(1))
        return self.shift + offset, covariance


def _add(flat: Tensor, shift: Tensor, total: Tensor, gram: Tensor) -> None:
    groups, size = flat.shape[1:]
    chunks = torch.split(flat, max(1, _CHUNK_VALUES // (groups * size)))
    wide = shift.new_empty(chunks[0].shape)
    for chunk in chunks:
        moved = torch.sub(chunk, shift, out=wide[: len(chunk)])
        total += moved.sum(0)
        add_products(gram, moved)


def add_products(gram: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Adds to (groups, size, size) the products of all features of (rows, groups, size), summed over the rows and
    multiplied with ``scale``; above the diagonal's blocks nothing: `symmetric` fills that in."""
    size = rows.shape[2]
    parts = rows.permute(1, 2, 0)
    for start in range(0, size, _BLOCK):
        block = slice(start, start + _BLOCK)
        seen = slice(0, start + _BLOCK)
        gram[:, block, seen].baddbmm_(parts[:, block], parts[:, seen].transpose(1, 2), alpha=scale)


def symmetric(gram: Tensor) -> Tensor:
    """In place, what is below the diagonal above it as well."""
    size = gram.shape[1]
    for start in range(_BLOCK, size, _BLOCK):
        block = slice(start, start + _BLOCK)
        gram[:, :start, block] = gram[:, block, :start].transpose(1, 2)
    return gram
