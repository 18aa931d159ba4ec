"""The column space (and, to look at, the row space) each layer uses on real inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
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


def channel_axis(layer: nn.Module) -> int:
    """Where features are in a layer's output: the last axis, or before the spatial ones, batched or not."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def _is_constant(variance: float, mean: Array) -> bool:
    return variance <= _NOISE * float(mean @ mean)


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
        DataError: no batch, NaN or infinity in an input or in a layer's output, a layer that was never reached.
    """
    watched = {name: _submodule(model, name) for name in names}
    outputs = {name: _Moments() for name in watched}
    inputs = {name: _Moments() for name in watched} if row_space else {}
    total = len(batches) if isinstance(batches, Sized) else 0
    with evaluating(model), _hooks(watched, outputs, inputs, max_positions):
        done = 0
        for done, batch in enumerate(batches, start=1):
            args, kwargs = bind(model, tensors := feed(model, batch))
            try:
                with torch.inference_mode():
                    model(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
                raise ModelError("the model fails on a calibration batch", got=f"{shapes}: {error}") from error
            _finite(outputs)
            if progress is not None:
                progress("calibration", done, max(total, done))
    if not done:
        raise DataError("calibration data", expected="at least one batch", got="none")
    spaces = {}
    for count, name in enumerate(watched, start=1):
        row = inputs.pop(name, None)
        spaces[name] = _decompose(name, outputs.pop(name), row)
        if progress is not None:
            progress("spectra", count, len(watched))
    return spaces


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


def _submodule(model: nn.Module, name: str) -> nn.Module:
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


class _Moments:
    """Running count, sum and Gram matrix of rows, all shifted by the mean of the first rows seen."""

    __slots__ = ("count", "gram", "shift", "total")

    def __init__(self) -> None:
        self.count = 0
        self.shift: torch.Tensor | None = None
        self.total = torch.zeros(0, dtype=torch.float64)
        self.gram = torch.zeros(0, dtype=torch.float64)

    def add(self, values: torch.Tensor, channels: int, limit: int) -> None:
        """``values``: a layer's input or output, features on axis ``channels`` (−1 linear, −2 or −3 convolution)."""
        if channels == -1:
            maps = (
                values.flatten(1, -2).transpose(1, 2) if values.dim() > 2 else values.reshape(-1, values.shape[-1], 1)
            )
        else:
            maps = values.reshape(-1, *values.shape[channels:]).flatten(2)
        if maps.shape[2] > limit:
            maps = maps.index_select(2, spread(maps.shape[2], limit).to(maps.device))
        features = maps.shape[1]
        rows = maps.transpose(1, 2).reshape(-1, features)
        if self.shift is None:
            self.shift = rows.mean(dim=0, dtype=torch.float64)
            self.total = torch.zeros(features, dtype=torch.float64, device=values.device)
            self.gram = torch.zeros(features, features, dtype=torch.float64, device=values.device)
        step = max(1, _CHUNK_VALUES // features)
        for start in range(0, rows.shape[0], step):
            wide = rows[start : start + step].double().sub_(self.shift)
            self.total += wide.sum(dim=0)
            self.gram.addmm_(wide.T, wide)
        self.count += rows.shape[0]

    def covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and (biased) covariance."""
        assert self.shift is not None  # the caller has checked count > 0
        offset = self.total / self.count
        return self.shift + offset, self.gram.div_(self.count).sub_(torch.outer(offset, offset))


@contextlib.contextmanager
def _hooks(
    watched: Mapping[str, nn.Module], outputs: Mapping[str, _Moments], inputs: Mapping[str, _Moments], limit: int
) -> Iterator[None]:
    handles = []
    try:
        for name, module in watched.items():
            observer = _observer(module, outputs[name], inputs.get(name), limit)
            handles.append(module.register_forward_hook(observer, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(layer: nn.Module, output: _Moments, row: _Moments | None, limit: int) -> Callable[..., None]:
    channels = channel_axis(layer)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        output.add(result, channels, limit)
        if row is not None:
            row.add(args[0] if args else kwargs["input"], channels, limit)

    return hook


def _finite(outputs: Mapping[str, _Moments]) -> None:
    for name, moments in outputs.items():
        # A sum is finite only if every value was: float64 does not overflow from sums of narrower types.
        if moments.count and not bool(torch.isfinite(moments.total).all()):
            what = f"the output of layer {name!r} holds NaN or infinity"
            raise DataError(what, hint="check the weights and the input scaling")


@torch.inference_mode()
def _decompose(name: str, output: _Moments, row: _Moments | None) -> LayerSpaces:
    if not output.count:
        raise DataError(f"layer {name!r} was not reached by any calibration batch")
    mean, covariance = output.covariance()
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors.flip(1).cpu().numpy()
    peaks = basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])]
    row_values = None
    if row is not None:
        row_mean, row_covariance = row.covariance()
        row_values = torch.linalg.eigvalsh(row_covariance).flip(0).clamp_(min=0).cpu().numpy()
        if _is_constant(float(row_values.sum()), row_mean.cpu().numpy()):
            row_values = np.zeros_like(row_values)
    return LayerSpaces(
        name=name,
        eigenvalues=values.flip(0).clamp_(min=0).cpu().numpy(),
        # A sign per column makes the factors reproducible.
        basis=basis * np.where(peaks < 0, -1.0, 1.0),
        mean=mean.cpu().numpy(),
        samples=output.count,
        row_eigenvalues=row_values,
    )
