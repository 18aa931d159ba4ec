"""What `inspect` shows: how much of its row space and column space each layer uses, and what factoring could save.

Row space: directions of the layer's input that carry energy (spectrum of the input covariance; over channels for a
convolution). Column space: directions of its output that carry energy (spectrum of the output covariance).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from .datasets import Split
from .device.progress import silent
from .factoring import ranks
from .factoring.channels import ChannelSet
from .factoring.costs import LayerInfo
from .factoring.layers import base, computes_alike, stored
from .factoring.spaces import LayerSpaces, collect, utilised_rank
from .factoring.study import Study, study
from .job import Progress
from .models import LoadedModel
from .search import BREAK_EVEN, DEFAULT_ENERGY

_ENERGIES = (0.99, 0.999)
_SPECTRUM_POINTS = 16
_CURVE_POINTS = 24
_WIDEST = 4096  # of layers that cannot be factored, such as a vocabulary's: spectra take the cube of it

#: (rank, share of the variance in that many leading directions), ranks rising to all directions; () for no variance
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One layer. Ranks are how many directions hold 99 % and 99.9 % of the variance; None where nothing was measured.

    ``row_curve`` and ``column_curve`` are the spectra, at the utilised ranks and at others, closest where curves bend.
    ``row_spectrum`` and ``column_spectrum`` are the shares of the variance in the first 1/16, 2/16, … of the
    directions. ``rows`` are those measured: of fewer rows than directions, ranks say little. A layer that stays as it
    is whatever the plan is ``fixed``, with the reason (else ``""``), and has no break-even rank.
    """

    name: str
    kind: str
    shape: str
    parameters: int
    macs: int
    row_size: int
    row_rank_99: int | None
    row_rank_999: int | None
    column_size: int
    column_rank_99: int | None
    column_rank_999: int | None
    row_spectrum: tuple[float, ...]
    column_spectrum: tuple[float, ...]
    row_curve: Curve
    column_curve: Curve
    rows: int | None
    break_even: int
    saves_parameters: int
    note: str
    fixed: str = ""

    @property
    def measured_thinly(self) -> bool:
        """Fewer rows than directions: they cannot fill the space whatever the layer does."""
        return self.rows is not None and self.rows <= max(self.row_size, self.column_size)


@dataclass(frozen=True, slots=True)
class ChannelUse:
    """A set of channels that can only get fewer together: how many (of each of ``groups``), in which layers, and why
    they must stay, ``""`` if they need not."""

    name: str
    size: int
    groups: int
    layers: tuple[str, ...]
    fixed: str


@dataclass(frozen=True, slots=True)
class MatrixElsewhere:
    """A matrix or kernel that no layer of the list holds, such as embeddings or one that is used as ``W`` and ``Wᵀ``:
    its name, its module's class, its parameters. It stays as it is."""

    name: str
    kind: str
    parameters: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's layers and what they use; ``closed``: modules whose layers cannot be seen, with the reason."""

    model: str
    samples: int
    parameters: int
    macs: int
    saves_parameters: int
    batchnorms_folded: int
    layers: tuple[LayerUse, ...]
    channels: tuple[ChannelUse, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)
    elsewhere: tuple[MatrixElsewhere, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: LoadedModel, calibration: Split, progress: Progress = silent) -> Inspection:
    """Measure the spaces of every layer on the calibration split; savings are those at 99.9 % of output variance.

    Layers that cannot be factored are looked at in a pass of their own, a grouped convolution as a whole; not those
    that are not called, that compute something of their own or that are wider than 4,096.
    """
    known = study(model.module, calibration, row_space=True, progress=progress)
    plan = ranks.plan_by_energy(known.infos, known.spaces, DEFAULT_ENERGY, break_even=BREAK_EVEN, model=model.name)
    saves = {layer.name: layer.parameters_before - layer.parameters_after for layer in plan.layers}
    reasons = {layer.name: layer.reason for layer in plan.layers}
    fixed = _fixed(known, calibration, progress)
    layers = tuple(
        _use(
            info,
            stored(known.folded.get_submodule(name)),
            known.spaces.get(name) or fixed.get(name),
            saves[name],
            reasons[name],
        )
        for name, info in known.infos.items()
    )
    return Inspection(
        model=model.reference,
        samples=len(calibration),
        parameters=known.parameters,
        macs=known.macs,
        saves_parameters=plan.saved_parameters,
        batchnorms_folded=len(known.graph.batchnorms),
        layers=layers,
        channels=_channels(known.channels),
        closed=dict(known.closed),
        elsewhere=_elsewhere(known.folded, known.infos),
    )


def _channels(sets: Iterable[ChannelSet]) -> tuple[ChannelUse, ...]:
    """Each once: a layer that is called several times gives its channels as often, which stay each time."""
    found: dict[tuple[str, int, int, str], tuple[str, ...]] = {}
    for each in sets:
        key = each.name, each.size, each.groups, each.fixed
        found[key] = tuple(dict.fromkeys((*found.get(key, ()), *each.layers)))
    return tuple(ChannelUse(name, size, groups, layers, fixed) for (name, size, groups, fixed), layers in found.items())


def _fixed(known: Study, calibration: Split, progress: Progress) -> Mapping[str, LayerSpaces]:
    """The spaces of layers that stay as they are."""
    names = [
        name
        for name, info in known.infos.items()
        if info.skip and max(info.in_features, info.out_features) <= _WIDEST
        if (layer := known.graph.layer(name)) is not None and layer.own_calls
        if _computes_as_its_kind(known.folded.get_submodule(name))
    ]
    if not names:
        return {}
    return collect(known.folded, calibration.batches(), names, row_space=True, progress=progress)


def _computes_as_its_kind(layer: nn.Module) -> bool:
    """Features are where those of its kind are."""
    own = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    kind = base(layer)
    return not own and kind is not None and (type(layer).forward is kind.forward or computes_alike(layer, kind))


def _elsewhere(model: nn.Module, layers: Iterable[str]) -> tuple[MatrixElsewhere, ...]:
    held = {id(parameter) for name in layers for parameter in model.get_submodule(name).parameters()}
    return tuple(
        MatrixElsewhere(name, type(model.get_submodule(name.rpartition(".")[0])).__name__, parameter.numel())
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in held
    )


def _use(info: LayerInfo, parameters: int, measured: LayerSpaces | None, saves: int, note: str) -> LayerUse:
    row = measured.row_eigenvalues if measured else None
    column = measured.eigenvalues if measured else None
    if column is not None and measured is not None and measured.constant:
        column = np.zeros_like(column)  # rounding noise uses no direction
    kernel = "×".join(str(k) for k in info.kernel)
    row_rank_99, row_rank_999 = _ranks(row)
    column_rank_99, column_rank_999 = _ranks(column)
    return LayerUse(
        name=info.name,
        kind=info.kind,
        shape=f"{info.out_features}×{info.in_features}" + (f" {kernel}" if kernel else ""),
        parameters=parameters,
        macs=info.macs,
        row_size=info.in_features,
        row_rank_99=row_rank_99,
        row_rank_999=row_rank_999,
        column_size=info.out_features,
        column_rank_99=column_rank_99,
        column_rank_999=column_rank_999,
        row_spectrum=_spectrum(row),
        column_spectrum=_spectrum(column),
        row_curve=_curve(row),
        column_curve=_curve(column),
        rows=measured.samples if measured else None,
        break_even=0 if info.skip else info.break_even,
        saves_parameters=saves,
        note=note,
        fixed=info.skip,
    )


def _ranks(eigenvalues: npt.NDArray[np.float64] | None) -> tuple[int | None, int | None]:
    if eigenvalues is None:
        return None, None
    first, second = (utilised_rank(eigenvalues, energy) for energy in _ENERGIES)
    return first, second


def _spectrum(eigenvalues: npt.NDArray[np.float64] | None) -> tuple[float, ...]:
    if eigenvalues is None or eigenvalues.sum() <= 0:
        return ()
    kept = np.concatenate([[0.0], np.cumsum(eigenvalues) / eigenvalues.sum()])
    at = np.linspace(0, len(eigenvalues), _SPECTRUM_POINTS + 1)[1:]
    return tuple(float(v) for v in np.interp(at, np.arange(len(kept)), kept))


def _curve(eigenvalues: npt.NDArray[np.float64] | None) -> Curve:
    if eigenvalues is None or eigenvalues.sum() <= 0:
        return ()
    size = len(eigenvalues)
    # A spectrum bends at its first directions; evenly spaced ranks follow it where it does not fall at all.
    used = [utilised_rank(eigenvalues, energy) for energy in _ENERGIES]
    spaced = np.concatenate([np.geomspace(1, size, _CURVE_POINTS), np.linspace(1, size, _CURVE_POINTS), used])
    kept = np.minimum(np.cumsum(eigenvalues) / eigenvalues.sum(), 1.0)
    return tuple((int(rank), float(kept[rank - 1])) for rank in np.unique(np.rint(spaced).astype(int)))
