"""What a layer costs, dense and factored. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil, prod

from rowcol_edge.errors import PlanError


class Form(StrEnum):
    """Which spaces of a layer a split cuts down; the layers are drawn in `splits`."""

    COLUMN = "column"
    ROW = "row"
    BOTH = "both"
    SPATIAL = "spatial"


@dataclass(frozen=True, slots=True)
class Split:
    """A form and how far it goes."""

    form: Form
    rank: int  # latent channels; of `both` those behind the layer's own kernel
    taken: int | None = None  # of `both` only: latent channels in front of it
    across_first: bool = False  # of `spatial` only: 1×k before k×1

    def __post_init__(self) -> None:
        for what, rank in (("rank", self.rank), ("taken", 1 if self.taken is None else self.taken)):
            if rank < 1:
                raise PlanError(f"{what} of a {self.form} split", expected="at least 1", got=str(rank))
        if (self.taken is not None) != (self.form is Form.BOTH):
            raise PlanError(f"taken of a {self.form} split", expected="a rank for both, else none", got=str(self.taken))
        if self.across_first and self.form is not Form.SPATIAL:
            raise PlanError(f"across_first of a {self.form} split", expected="a spatial split", got="True")


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """Shape, use and cost of one layer.

    The last part of a split has a bias whether or not the layer had one: it takes up the mean of what is cut off.
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
    maps: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # sizes of a convolution's map before and behind it

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

    def takes(self, form: Form) -> bool:
        """Whether the layer can be split so: of a single matrix both would be two splits of one space."""
        if form is Form.BOTH:
            return prod(self.kernel) > 1
        return form is not Form.SPATIAL or (len(self.kernel) == 2 and min(self.kernel) > 1)

    def largest(self, form: Form, *, across_first: bool = False) -> tuple[int, int]:
        """Ranks (``rank``, ``taken``) of the weight itself, beyond which a split only costs more.

        ``taken`` is 0 where the form has only one rank, both are for a form that the layer cannot take.
        """
        taps = prod(self.kernel)
        rows, columns = min(self.in_features, self.out_features * taps), min(self.out_features, self.fan_in)
        if form is Form.COLUMN:
            return columns, 0
        if form is Form.ROW:
            return rows, 0
        if not self.takes(form):
            return 0, 0
        if form is Form.BOTH:
            return columns, rows
        first, second = self.kernel[::-1] if across_first else self.kernel
        return min(self.in_features * first, self.out_features * second), 0

    def check(self, split: Split) -> None:
        """PlanError where the layer cannot be split so: the form, or a rank beyond the space that it cuts down."""
        self._check_form(split.form)
        rank, taken = self.largest(split.form, across_first=split.across_first)
        if split.form is not Form.SPATIAL:
            taken = self.in_features
            rank = taken if split.form is Form.ROW else self.out_features
        for what, found, most in (("rank", split.rank, rank), ("taken", split.taken, taken)):
            if found is not None and found > most:
                raise PlanError(f"layer {self.name!r}: {what}", expected=f"1 to {most}", got=str(found))

    def split_parameters(self, split: Split) -> int:
        """Weight and bias entries of the layers that a split makes.

        Raises:
            PlanError: a form that the layer cannot take.
        """
        return sum(weights for weights, _ in self._parts(split)) + self.out_features

    def split_macs(self, split: Split) -> int:
        """Multiply-accumulates of the layers that a split makes, one sample.

        Raises:
            PlanError: a form that the layer cannot take, or a convolution whose ``maps`` are not known.
        """
        return sum(weights * self._rows(where) for weights, where in self._parts(split))

    def _check_form(self, form: Form) -> None:
        if not self.takes(form):
            raise PlanError(f"layer {self.name!r}: a {form} split", expected=_TAKERS[form], got=self._said)

    def _parts(self, split: Split) -> list[tuple[int, str]]:
        """Of each layer its weights, and what they are applied to: ``taken``, the layer's own inputs; ``given``, its
        outputs; ``own``, what its kernel is applied to; ``down`` or ``across``, maps convolved along one axis only."""
        taken, given, taps, rank = self.in_features, self.out_features, prod(self.kernel), split.rank
        if split.form is Form.COLUMN:
            return [(rank * taken * taps, "own"), (rank * given, "given")]
        if split.form is Form.ROW:
            return [(taken * rank, "taken"), (rank * given * taps, "own")]
        self._check_form(split.form)
        if split.form is Form.BOTH:
            inner = split.taken or 0
            return [(taken * inner, "taken"), (inner * rank * taps, "own"), (rank * given, "given")]
        first, second = self.kernel[::-1] if split.across_first else self.kernel
        where = "across" if split.across_first else "down"
        rows = ("taken", where) if self.outputs is not None else (where, "given")  # transposed: its inputs count
        return [(taken * rank * first, rows[0]), (rank * given * second, rows[1])]

    def _rows(self, where: str) -> int:
        """Rows per sample, see `_parts`."""
        outputs = self.positions if self.outputs is None else self.outputs
        if where in ("own", "given"):
            return self.positions if where == "own" else outputs
        if not self.kernel:
            return self.positions
        if self.outputs is not None and where == "taken":
            return self.positions  # of a transposed convolution these are counted at its input
        if self.maps is None:
            raise PlanError(f"layer {self.name!r}: its cost", expected="the sizes of its maps", got="none")
        before, behind = self.maps
        calls = self.positions // prod(behind if self.outputs is None else before)  # maps a sample
        if where == "taken":
            return calls * prod(before)
        return calls * (behind[0] * before[1] if where == "down" else before[0] * behind[1])

    @property
    def _said(self) -> str:
        return self.kind + (f" {'×'.join(map(str, self.kernel))}" if self.kernel else "")

    @property
    def break_even(self) -> int:
        """Largest rank of a column split with fewer parameters than dense; 0 if there is none.

        From ``r · (in·k² + out) + out < out · (in·k² + bias)``.
        """
        return max(0, ceil((self.parameters - self.out_features) / (self.fan_in + self.out_features)) - 1)


_TAKERS = {
    Form.COLUMN: "any layer",
    Form.ROW: "any layer",
    Form.BOTH: "a convolution whose kernel is larger than 1",
    Form.SPATIAL: "a two-dimensional convolution whose kernel is larger than 1 on both sides",
}
