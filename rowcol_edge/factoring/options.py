"""What a layer could become: its splits, each with the loss predicted for it at the model's output. Pure numpy.

Of `column` and `row` every rank is an option, with the loss that was measured for its space. ``both`` cuts down two
spaces at once; its loss is taken for the sum of the two, which a truncated higher-order SVD's error is at most (L. De
Lathauwer et al., A multilinear singular value decomposition, 2000, property 10), and of all pairs of ranks those are
options that no other beats in parameters and loss at once. ``spatial`` is none: what neighbouring pixels lose together
is known only by trying (`latents`); a plan may ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rowcol_edge.factoring.costs import Form, LayerInfo, Split

Array = NDArray[np.float64]
_T = TypeVar("_T")

#: what a layer costs split so; None is the layer as it is
Cost = Callable[[LayerInfo, Split | None], float]

_PAIRS = 16  # ranks of each side that `both` is tried with


class Spectrum(Protocol):
    """What ranks need to know of what a layer gives, or takes (``spaces.LayerSpaces`` is one)."""

    @property
    def eigenvalues(self) -> Array:
        """(size,) descending, ≥ 0."""

    @property
    def constant(self) -> bool:
        """The values do not vary."""

    @property
    def losses(self) -> Array | None:
        """(size + 1,) predicted at the model's output, by rank; None: the share of the variance that is cut off."""


@dataclass(frozen=True, slots=True)
class Option:
    """A split, and what it is predicted to lose."""

    split: Split | None  # None: the layer as it is
    loss: float


class Options:
    """The options of layers at any of their widths.

    Args:
        outputs: layer → what it gives; a layer that is not here, or whose output is constant, has no options.
        inputs: layer → what it takes, of those that `row` and `both` are to be tried for.
        multiple: ranks are multiples of this.
        break_even: share of the break-even rank that a column split may have at most; others may have no more
            parameters than that.
    """

    def __init__(
        self,
        outputs: Mapping[str, Spectrum],
        inputs: Mapping[str, Spectrum],
        multiple: int = 1,
        break_even: float = 1.0,
    ) -> None:
        self.multiple = multiple
        self.break_even = break_even
        # told apart once: it takes all of a space to see that it is constant
        self._outputs, self._inputs = (
            {name: spectrum for name, spectrum in each.items() if not spectrum.constant} for each in (outputs, inputs)
        )
        # made once: a model's widths ask for the same ones again and again
        self._made: dict[tuple[str, Form], dict[int, Option]] = {}
        self._pairs: dict[str, list[tuple[Split, Option]]] = {}

    def of(self, info: LayerInfo, count: int | None = None) -> list[Option]:
        """The layer as it is, then all splits that save enough, or of each form at most ``count`` ranks."""
        found = [Option(None, 0.0)]
        spectrum = self._outputs.get(info.name)
        limit = int(info.break_even * self.break_even)
        if info.skip or spectrum is None or limit < 1:
            return found
        columns, rows = _losses(spectrum), self._rows(info)
        most = info.split_parameters(Split(Form.COLUMN, limit))
        found += self._of_one(info.name, Form.COLUMN, columns, self._ranks(limit, count))
        if rows is None:
            return found
        fitting = (most - info.out_features) // (info.in_features + info.out_features * prod(info.kernel))
        found += self._of_one(info.name, Form.ROW, rows, self._ranks(min(fitting, info.in_features), count))
        if info.takes(Form.BOTH):
            pairs = self._of_both(info, columns, rows)
            fits = [
                (split, option)
                for split, option in pairs
                if split.rank <= info.out_features and (split.taken or 0) <= info.in_features
            ]
            found += [option for split, option in thinned(fits, count) if info.split_parameters(split) <= most]
        return found

    def _ranks(self, most: int, count: int | None) -> Sequence[int]:
        return thinned(range(most // self.multiple * self.multiple, 0, -self.multiple), count)

    def _rows(self, info: LayerInfo) -> Array | None:
        """Losses by rank of the row space; without what they do at the model's output there is no comparing them."""
        found = self._inputs.get(info.name)
        return None if found is None else found.losses

    def _of_one(self, name: str, form: Form, losses: Array, ranks: Sequence[int]) -> list[Option]:
        """Of a form that cuts down one space, the losses by its rank."""
        made = self._made.setdefault((name, form), {})
        for rank in ranks:
            if rank not in made:
                made[rank] = Option(Split(form, rank), float(losses[rank]))
        return [made[rank] for rank in ranks]

    def _of_both(self, info: LayerInfo, columns: Array, rows: Array) -> list[tuple[Split, Option]]:
        """From the dearest down, of the layer at its full width."""
        if info.name not in self._pairs:
            outputs, inputs = len(columns) - 1, len(rows) - 1
            ranks, taken = (np.array(self._ranks(size, _PAIRS), int) for size in (outputs, inputs))
            rank, inner = (each.ravel() for each in np.meshgrid(ranks, taken, indexing="ij"))
            loss = columns[rank] + rows[inner]
            size = inputs * inner + rank * (prod(info.kernel) * inner + outputs)
            order = np.lexsort((loss, size))
            best = loss[order] < np.concatenate([[np.inf], np.minimum.accumulate(loss[order])])[:-1]
            front = order[best][::-1]
            splits = [Split(Form.BOTH, int(rank[place]), int(inner[place])) for place in front]
            self._pairs[info.name] = [
                (split, Option(split, float(lost))) for split, lost in zip(splits, loss[front], strict=True)
            ]
        return self._pairs[info.name]


def kept(eigenvalues: Array) -> Array:
    """kept[r − 1] = fraction of the variance in the first r directions (ones for a zero spectrum)."""
    total = float(eigenvalues.sum())
    return np.minimum(np.cumsum(eigenvalues) / total, 1.0) if total > 0.0 else np.ones_like(eigenvalues)


def thinned(options: Sequence[_T], count: int | None) -> Sequence[_T]:
    """At most so many of them, the first and the last among them."""
    if count is None or len(options) <= count:
        return options
    places = np.unique(np.rint(np.linspace(0, len(options) - 1, count)).astype(int))
    return [options[place] for place in places]


def _losses(spectrum: Spectrum) -> Array:
    if spectrum.losses is not None:
        return spectrum.losses
    return np.concatenate([[1.0], 1.0 - kept(spectrum.eigenvalues)])
