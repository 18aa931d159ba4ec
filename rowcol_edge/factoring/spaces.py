"""The column space (and, to look at, the row space) each layer uses on real inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.calling import bind, evaluating, feed
from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.layers import SUPPORTED, base

Progress = Callable[[str, int, int], None]
Array = NDArray[np.float64]

_CHUNK_VALUES = 1 << 21  # activation values widened to float64 at a time: 16 MB
_SHRINKAGE = 0.01
"""Share of its prior in a metric."""
_LEAST = 1e-5  # of the mean, so that a metric can be inverted
_ROUNDING = 1e-12
_NOISE = 1e-12  # variance over squared size that float32 activations may have for being rounded


@dataclass(frozen=True, slots=True, eq=False)
class LayerSpaces:
    """Second moments of one layer's output over the calibration inputs; all arrays float64.

    ``cov(y) = basis · diag(eigenvalues) · basisᵀ`` with ``y`` the layer's output (bias included) at one position, and
    ``eigenvalues`` the variances of ``dualᵀ (y − mean)``. `sensitivity` turns both to what the model's output makes of
    them.
    """

    name: str
    eigenvalues: Array  # (out,) descending, ≥ 0
    basis: Array  # (out, out), directions in columns; without a dual orthonormal, the largest entry of each positive
    mean: Array  # (out,) E[y]
    samples: int  # rows counted (images × pixels or tokens); fewer than `out` of them cannot fill the space
    row_eigenvalues: Array | None = None  # (in,) of cov(x) over features or input channels; zeros if x is constant
    dual: Array | None = None  # (out, out), dualᵀ · basis = I; None: the basis itself
    losses: Array | None = None  # (out + 1,) predicted at the model's output, by rank, falling to 0; None: not known

    @property
    def variance(self) -> float:
        """Total output variance, the trace of its covariance."""
        return float(np.square(self.basis).sum(axis=0) @ self.eigenvalues)

    @property
    def constant(self) -> bool:
        """The output does not vary: its variance is rounding noise beside its size."""
        return _is_constant(self.variance, self.mean)


@dataclass(frozen=True, slots=True)
class Place:
    """Where values are looked at: what a layer gives or takes.

    Attributes:
        name: of the layer.
        given: its output; False: its input.
        channels: (groups, size, taps): the features to look at, each group by itself; None: all, as one group.
    """

    name: str
    given: bool = True
    channels: NDArray[np.int64] | None = field(default=None, compare=False)
    key: str = ""  # tells places of one layer apart


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """First and second moments at a place, float64, on the model's device."""

    mean: torch.Tensor  # (groups, size)
    covariance: torch.Tensor  # (groups, size, size), biased
    samples: int  # rows counted

    def numpy(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        return self.mean.cpu().numpy(), self.covariance.cpu().numpy()


def rows(values: torch.Tensor, layer: nn.Module, place: Place, limit: int | None = None) -> torch.Tensor:
    """(samples, positions, groups, size) of what a layer takes or gives.

    Of more than ``limit`` positions that many, spread evenly. A value without a batch axis is one sample.
    """
    axis = channel_axis(layer)
    if axis == -1:
        maps = values.flatten(1, -2) if values.dim() > 2 else values.reshape(-1, 1, values.shape[-1])
    else:
        maps = values.reshape(-1, *values.shape[axis:]).flatten(2).transpose(1, 2)
    if limit is not None and maps.shape[1] > limit:
        maps = maps.index_select(1, spread(maps.shape[1], limit).to(maps.device))
    if place.channels is None:
        return maps.unsqueeze(2)
    groups, size, taps = place.channels.shape
    index = torch.from_numpy(place.channels.transpose(2, 0, 1).reshape(-1)).to(maps.device)
    if taps == groups == 1 and size == maps.shape[2] and bool((index == torch.arange(size)).all()):
        return maps.unsqueeze(2)
    return maps.index_select(2, index).reshape(maps.shape[0], -1, groups, size)


def channel_axis(layer: nn.Module) -> int:
    """Where features are in a layer's output: the last axis, or before the spatial ones, batched or not."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def _is_constant(variance: float, mean: Array) -> bool:
    return variance <= _NOISE * float(mean @ mean)


def directions(covariance: Array, metric: Array, prior: Array | None = None) -> tuple[Array, Array, Array]:
    """(values, basis, dual): directions in the order of what they are worth, ``covariance = basis · values · basisᵀ``.

    The projector ``basis_r · dual_rᵀ`` loses least of ``tr(metric (I − P) covariance (I − P)ᵀ)``: Eckart–Young in the
    metric, see `sensitivity`.

    Args:
        prior: what a metric of few samples is blended with; None: all directions alike.
    """
    sizes, axes = np.linalg.eigh(blended(metric, prior))
    sizes = np.sqrt(np.maximum(sizes, _ROUNDING * float(sizes[-1])))
    root = axes * sizes  # metric = root · rootᵀ; a Cholesky factor does not exist where rounding makes it indefinite
    values, vectors = np.linalg.eigh(root.T @ covariance @ root)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(len(vectors))]
    vectors = vectors * np.where(peaks < 0, -1.0, 1.0)
    return values, (axes / sizes) @ vectors, root @ vectors


def blended(metric: Array, prior: Array | None = None) -> Array:
    """A metric that few samples gave, with a share of what is known without any: directions are not worthless that no
    gradient came to, unless the prior says so."""
    mean = max(float(np.trace(metric)) / len(metric), 1e-300)
    even = np.eye(len(metric))
    if prior is not None and np.trace(prior) > 0.0:
        prior = prior * (len(prior) / float(np.trace(prior)))
        even = prior + _LEAST * even
    return np.asarray((1.0 - _SHRINKAGE) * metric + _SHRINKAGE * mean * even)


def utilised_rank(eigenvalues: Array, energy: float = 0.99) -> int:
    """Fewest leading eigenvalues whose sum is at least ``energy`` of the total; 0 for a zero spectrum."""
    total = float(eigenvalues.sum())
    if total <= 0.0:
        return 0
    kept = np.cumsum(eigenvalues) / total
    # The last cumulated value may end a few ulp under 1.
    return min(int(np.searchsorted(kept, energy * (1 - 1e-14))) + 1, len(eigenvalues))


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, np.ndarray]],
    names: Sequence[str],
    *,
    row_space: bool = False,
    max_positions: int = 1024,
    progress: Progress | None = None,
) -> dict[str, LayerSpaces]:
    """Streams the batches through the model and accumulates sums and Gram matrices of the named layers' outputs.

    Runs in eval mode under ``inference_mode``; hooks are removed also after an error and the model is left as it was.
    Sums are float64, shifted by the first batch's mean. Of more than ``max_positions`` pixels or tokens that many
    are used, spread evenly and the same for every sample: neighbours say nearly the same.

    Memory: ``8 · out²`` bytes a layer (``row_space`` adds ``8 · in²``) plus one 16 MB chunk; no activation is held. The
    decomposition at the end needs ``16 · out²`` more for one layer at a time.

    Raises:
        ModelError: no such layer, or the model fails on a batch.
        DataError: no batch, NaN or infinity in an input or in what a layer gives, or takes if that is looked
            at; a layer that was never reached.
    """
    outputs = {name: Place(name) for name in names}
    inputs = {name: Place(name, given=False) for name in names} if row_space else {}
    places = [*outputs.values(), *inputs.values()]
    found = measure(model, batches, places, max_positions=max_positions, progress=progress)
    spaces = {}
    for count, (name, place) in enumerate(outputs.items(), start=1):
        row = found.pop(inputs[name]) if name in inputs else None
        spaces[name] = decompose(name, found.pop(place), row)
        if progress is not None:
            progress("spectra", count, len(outputs))
    return spaces


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, np.ndarray]],
    places: Sequence[Place],
    *,
    max_positions: int = 1024,
    progress: Progress | None = None,
) -> dict[Place, Moments]:
    """Mean and covariance at each place, in one pass; otherwise as `collect`.

    Memory: ``8 · groups · size²`` bytes a place and a chunk of 16 MB.
    """
    watched = {place.name: submodule(model, place.name) for place in places}
    sums = {place: _Sums() for place in places}
    total = len(batches) if isinstance(batches, Sized) else 0
    with evaluating(model), _hooks(watched, sums, max_positions):
        done = 0
        for done, batch in enumerate(batches, start=1):
            args, kwargs = bind(model, tensors := feed(model, batch))
            try:
                with torch.inference_mode():
                    model(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
                raise ModelError("the model fails on a calibration batch", got=f"{shapes}: {error}") from error
            _finite(sums)
            if progress is not None:
                progress("calibration", done, max(total, done))
    if not done:
        raise DataError("calibration data", expected="at least one batch", got="none")
    for place, entry in sums.items():
        if not entry.count:
            raise DataError(f"layer {place.name!r} was not reached by any calibration batch")
    return {place: sums.pop(place).moments() for place in places}


def to_arrays(spaces: Mapping[str, LayerSpaces]) -> dict[str, NDArray[Any]]:
    """All numbers, by ``field layer``, for a file."""
    return {
        f"{field} {name}": np.asarray(value)
        for name, space in spaces.items()
        for field in _FIELDS
        if (value := getattr(space, field)) is not None
    }


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, LayerSpaces]:
    """What `to_arrays` was given."""
    found: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        field, _, name = key.partition(" ")
        found.setdefault(name, {})[field] = array if array.ndim else int(array)
    return {name: LayerSpaces(name=name, **values) for name, values in found.items()}


_FIELDS = tuple(field.name for field in fields(LayerSpaces) if field.name != "name")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name; ModelError where there is none whose spaces can be looked at."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"no layer {name!r} in the model") from error
    if base(module) is None:
        kinds = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise ModelError(f"layer {name!r}", expected=f"one of {kinds}", got=type(module).__name__)
    return module


def spread(positions: int, count: int) -> torch.Tensor:
    """``count`` distinct positions out of ``positions``, spread evenly and always the same ones.

    A stride coprime to ``positions`` visits every column and row of a map alike, where a plain stride would see only
    some columns.
    """
    step = max(1, positions // count)
    while math.gcd(step, positions) != 1:
        step += 1
    return torch.arange(count) * step % positions


class _Sums:
    """Running count, sum and Gram matrix of rows, all shifted by the mean of the first rows seen."""

    __slots__ = ("count", "gram", "shift", "total")

    def __init__(self) -> None:
        self.count = 0
        self.shift: torch.Tensor | None = None
        self.total = torch.zeros(0, dtype=torch.float64)
        self.gram = torch.zeros(0, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """``values``: (samples, positions, groups, size)."""
        groups, size = values.shape[2:]
        flat = values.reshape(-1, groups, size)
        if self.shift is None:
            self.shift = flat.mean(dim=0, dtype=torch.float64)
            self.total = torch.zeros(groups, size, dtype=torch.float64, device=values.device)
            self.gram = torch.zeros(groups, size, size, dtype=torch.float64, device=values.device)
        step = max(1, _CHUNK_VALUES // (groups * size))
        for start in range(0, len(flat), step):
            wide = flat[start : start + step].double() - self.shift  # not in place: it may be the activation itself
            self.total += wide.sum(dim=0)
            if groups == 1:
                self.gram[0].addmm_(wide[:, 0].T, wide[:, 0])
            else:
                self.gram += torch.einsum("rga,rgb->gab", wide, wide)
        self.count += len(flat)

    @torch.inference_mode()
    def moments(self) -> Moments:
        assert self.shift is not None  # the caller has checked count > 0
        offset = self.total / self.count
        covariance = self.gram.div_(self.count).sub_(offset.unsqueeze(2) * offset.unsqueeze(1))
        return Moments(self.shift + offset, covariance, self.count)


@contextlib.contextmanager
def _hooks(watched: Mapping[str, nn.Module], sums: Mapping[Place, _Sums], limit: int) -> Iterator[None]:
    handles = []
    try:
        for place, entry in sums.items():
            observer = _observer(place, entry, limit)
            handles.append(watched[place.name].register_forward_hook(observer, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(place: Place, entry: _Sums, limit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        taken = args[0] if args else kwargs["input"]
        entry.add(rows(result if place.given else taken, module, place, limit))

    return hook


def _finite(sums: Mapping[Place, _Sums]) -> None:
    for place, entry in sums.items():
        # A sum is finite only if every value was: float64 does not overflow from sums of narrower types.
        if entry.count and not bool(torch.isfinite(entry.total).all()):
            what = f"the {'output' if place.given else 'input'} of layer {place.name!r} holds NaN or infinity"
            raise DataError(what, hint="check the weights and the input scaling")


@torch.inference_mode()
def decompose(name: str, output: Moments, row: Moments | None = None) -> LayerSpaces:
    """The spaces of a layer from the moments of its output and, to look at, of its input."""
    values, vectors = torch.linalg.eigh(output.covariance[0])
    basis = vectors.flip(1).cpu().numpy()
    peaks = basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])]
    row_values = None
    if row is not None:
        row_values = torch.linalg.eigvalsh(row.covariance[0]).flip(0).clamp_(min=0).cpu().numpy()
        if _is_constant(float(row_values.sum()), row.mean[0].cpu().numpy()):
            row_values = np.zeros_like(row_values)
    return LayerSpaces(
        name=name,
        eigenvalues=values.flip(0).clamp_(min=0).cpu().numpy(),
        # A sign per column makes the factors reproducible.
        basis=basis * np.where(peaks < 0, -1.0, 1.0),
        mean=output.mean[0].cpu().numpy(),
        samples=output.samples,
        row_eigenvalues=row_values,
    )
