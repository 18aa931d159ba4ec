"""The column space (and, to look at, the row space) each layer uses on real inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from rowcol_edge.calling import bind, evaluating, feed
from rowcol_edge.errors import DataError, ModelError, RowcolError
from rowcol_edge.factoring.layers import SUPPORTED, base
from rowcol_edge.factoring.places import Moments, Place, channel_axis, derived, rows, sources
from rowcol_edge.factoring.products import product
from rowcol_edge.factoring.sums import Part, Sums
from rowcol_edge.linears import convolved

Progress = Callable[[str, int, int], None]
Array = NDArray[np.float64]

_SHRINKAGE = 0.01
"""Share of its prior in a metric."""
_LEAST = 1e-5  # of the mean, so that a metric can be inverted
_ROUNDING = 1e-12
_NOISE = 1e-12  # variance over squared size that float32 activations may have for being rounded


@dataclass(frozen=True, slots=True, eq=False)
class LayerSpaces:
    """Second moments of one layer's output over the calibration inputs; arrays float64 but the metric.

    ``cov(y) = basis · diag(eigenvalues) · basisᵀ`` with ``y`` the layer's output (bias included) at one position, and
    ``eigenvalues`` the variances of ``dualᵀ (y − mean)``. `sensitivity` turns both to what the model's output makes of
    them, and of few rows shrinks the covariance first.
    """

    name: str
    eigenvalues: Array  # (out,) descending, ≥ 0
    basis: Array  # (out, directions) in columns; without a dual orthonormal, the largest entry of each positive
    mean: Array  # (out,) E[y]
    samples: int  # rows counted (images × pixels or tokens); fewer than `out` of them cannot fill the space
    row_eigenvalues: Array | None = None  # (in,) of cov(x) over features or input channels; zeros if x is constant
    dual: Array | None = None  # (out, directions), dualᵀ · basis = I; None: the basis itself
    losses: Array | None = None  # (out + 1,) predicted at the model's output, by rank, falling to 0; None: not known
    metric: NDArray[np.float32] | None = None  # (out, out), where directions are fewer than outputs; see `worth`

    @property
    def variance(self) -> float:
        """Total output variance, the trace of its covariance."""
        return float(np.einsum("ij,ij->j", self.basis, self.basis) @ self.eigenvalues[: self.basis.shape[1]])

    @property
    def rank(self) -> int:
        """Directions that vary."""
        return int(np.count_nonzero(self.eigenvalues))

    @property
    def covariance(self) -> Array:
        """(out, out) cov(y)."""
        basis = self.basis[:, : self.rank]
        return product(basis * self.eigenvalues[: self.rank], basis.T)

    @property
    def worth(self) -> Array:
        """(out, out) ``F``, what squared errors of the output are worth."""
        if self.metric is not None:
            return self.metric.astype(np.float64)
        dual = self.basis if self.dual is None else self.dual
        return product(dual, dual.T)

    @property
    def constant(self) -> bool:
        """The output does not vary: its variance is rounding noise beside its size."""
        return _is_constant(self.variance, self.mean)


def _is_constant(variance: float, mean: Array) -> bool:
    return variance <= _NOISE * float(mean @ mean)


def directions(
    covariance: Array, metric: Array, prior: Array | None = None, rank: int | None = None
) -> tuple[Array, Array, Array]:
    """(values, basis, dual): directions in the order of what they are worth, ``covariance = basis · values · basisᵀ``.

    The projector ``basis_r · dual_rᵀ`` loses least of ``tr(metric (I − P) covariance (I − P)ᵀ)``: Eckart–Young in the
    metric, see `sensitivity`.

    Args:
        prior: what a metric of few samples is blended with; None: all directions alike.
        rank: that of the covariance at most; up to half of its size only so many directions are looked for, which saves
            most of the time and memory.
    """
    seen, root = torch.from_numpy(covariance), root_of(torch.from_numpy(blended(metric, prior)))
    values, vectors = _leading(seen, root, len(seen) if rank is None else rank)
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors *= torch.where(peaks < 0, -1.0, 1.0)  # a sign per column makes the factors reproducible
    basis = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return values.clamp_(min=0.0).numpy(), basis.numpy(), (root @ vectors).numpy()


def root_of(metric: torch.Tensor) -> torch.Tensor:
    """``metric = root · rootᵀ``, lower triangular."""
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(metric)
    if int(failed):  # rounding has made it indefinite
        sizes, axes = torch.linalg.eigh(metric)
        factor = torch.linalg.qr((axes * sizes.clamp_(min=_ROUNDING * float(sizes[-1])).sqrt()).T).R.T
    return factor


def _leading(covariance: torch.Tensor, root: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, falling, and eigenvectors of ``rootᵀ · covariance · root``, those of its range only where that is
    small.

    As many random combinations of its columns span the range (N. Halko, P. Martinsson and J. Tropp, Finding structure
    with randomness, 2011): nothing is left over, but values below 1e-10 of the largest are not told from zero.
    """
    size = len(covariance)
    if rank > size // 2:
        values, vectors = torch.linalg.eigh(root.T @ (covariance @ root))
        return values.flip(0), vectors.flip(1)
    random = torch.randn(size, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = torch.linalg.qr(root.T @ (covariance @ random)).Q
    part = root @ inside
    values, vectors = torch.linalg.eigh(part.T @ (covariance @ part))
    return torch.cat([values.flip(0), values.new_zeros(size - rank)]), inside @ vectors.flip(1)


def blended(metric: Array, prior: Array | None = None) -> Array:
    """A metric that few samples gave, with a share of what is known without any: directions are not worthless that no
    gradient came to, unless the prior says so."""
    mean = max(float(np.trace(metric)) / len(metric), 1e-300)
    found = (1.0 - _SHRINKAGE) * metric
    diagonal, least = np.einsum("ii->i", found), 1.0
    if prior is not None and np.trace(prior) > 0.0:
        found += _SHRINKAGE * mean * (len(prior) / float(np.trace(prior))) * prior
        least = _LEAST
    diagonal += _SHRINKAGE * mean * least
    return found


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

    Runs in eval mode without gradients; hooks are removed also after an error and the model is left as it was. Sums are
    float64, see `sums`. Of more than ``max_positions`` pixels or tokens that many are used, spread evenly and the same
    for every sample: neighbours say nearly the same.

    Memory: ``8 · out²`` bytes a layer (``row_space`` adds ``8 · in²``), as much again for the largest, and a chunk of
    16 MB; no activation is held. The decomposition at the end needs ``16 · out²`` more for one layer at a time.

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
    given: Callable[[object], None] | None = None,
    progress: Progress | None = None,
) -> dict[Place, Moments]:
    """Mean and covariance at each place, in one pass; otherwise as `collect`. ``given`` is called with what the model
    gives of each batch.

    A tensor that several layers read is multiplied once. What a plain linear layer gives is not looked at where it
    takes no more features: ``cov(W x + b) = W cov(x) Wᵀ``.

    Memory: ``8 · groups · size²`` bytes a place, as much again for the largest, and a chunk of 16 MB.
    """
    watched = {place.name: submodule(model, place.name) for place in places}
    found = sources(watched, places)
    sums = {source: Sums() for source in found.values()}
    total = len(batches) if isinstance(batches, Sized) else 0
    with evaluating(model), _hooks(watched, sums, max_positions):
        done = 0
        for done, batch in enumerate(batches, start=1):
            args, kwargs = bind(model, tensors := feed(model, batch))
            try:
                # not inference mode, in which tensors do not count their changes
                with torch.no_grad(), convolved():
                    result = model(*args, **kwargs)
            except (RowcolError, MemoryError):
                raise
            except Exception as error:  # boundary: the user's own code runs here and may raise anything
                shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
                raise ModelError("the model fails on a calibration batch", got=f"{shapes}: {error}") from error
            _finite(sums)
            if given is not None:
                given(result)
            if progress is not None:
                progress("calibration", done, max(total, done))
    if not done:
        raise DataError("calibration data", expected="at least one batch", got="none")
    for place, entry in sums.items():
        if not entry.count:
            raise DataError(f"layer {place.name!r} was not reached by any calibration batch")
    measured = {source: Moments(*entry.moments(), entry.count) for source, entry in sums.items()}
    return {place: derived(watched[place.name], place, source, measured[source]) for place, source in found.items()}


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


@contextlib.contextmanager
def _hooks(watched: Mapping[str, nn.Module], sums: Mapping[Place, Sums], limit: int) -> Iterator[None]:
    handles = []
    try:
        known: _Known = WeakTensorKeyDictionary()
        for place, entry in sums.items():
            observer = _observer(place, entry, limit, known)
            handles.append(watched[place.name].register_forward_hook(observer, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


#: what was found of the tensors that are still there, and for whom, by where their features are and how often they were
#: changed
_Known = MutableMapping[torch.Tensor, dict[tuple[int, int], tuple[Part, Sums]]]


def _observer(place: Place, entry: Sums, limit: int, known: _Known) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        values = result if place.given else (args[0] if args else kwargs["input"])
        if entry.count and not entry.shared:
            entry.extend(rows(values, module, place, limit))
            return
        if place.channels is not None:
            entry.add(entry.part(rows(values, module, place, limit)))
            return
        found, key = known.setdefault(values, {}), (channel_axis(module), values._version)
        if key in found and entry.fits(found[key][0]):
            entry.shared = found[key][1].shared = True
        else:
            found[key] = entry.part(rows(values, module, place, limit)), entry
        entry.add(found[key][0])

    return hook


def _finite(sums: Mapping[Place, Sums]) -> None:
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
