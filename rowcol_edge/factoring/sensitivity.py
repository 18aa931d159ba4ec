"""What the directions of a layer's output are worth at the model's own output.

The column space alone says what a layer gives, not what becomes of it: a ReLU may clip it, a mean may average it away,
and layers differ by orders of magnitude in what the model's output makes of an error. Both come from gradients.

With ``C`` the covariance of a layer's output ``y`` and ``F`` the second moment of the gradient of the loss by ``y``,
the rank-``r`` projector that loses least of ``tr(F (I − P) C (I − P)ᵀ)`` is ``P = F^(−½) U Uᵀ F^(½)``, with ``U`` the
leading eigenvectors of ``F^(½) C F^(½)`` (Eckart–Young in the metric of ``F``; any square root of ``F`` will do). For a
classifier the gradients are those of ``log p(class)`` with classes drawn from the model's own answer, so that ``F`` is
its Fisher matrix and half the squared first-order change is the Kullback–Leibler divergence from the original (Amari,
Natural gradient works efficiently in learning, 1998). Otherwise outputs are multiplied with random signs and divided by
their own size, which gives half the squared relative error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.calling import bind, evaluating, feed
from rowcol_edge.factoring.spaces import LayerSpaces, Progress, channel_axis

Array = NDArray[np.float64]
Feeds = Mapping[str, NDArray[Any]]

SAMPLES = 128
"""Calibration samples that gradients are taken on: half of them for the directions, the others to judge them."""
_AT_ONCE = 4  # samples whose activations are held
_SHRINKAGE = 0.01
"""Share of the mean of ``F``'s diagonal in it: directions are not worthless that few samples give no gradient to."""


def weigh(
    model: nn.Module,
    samples: Feeds,
    spaces: Mapping[str, LayerSpaces],
    *,
    classify: bool,
    progress: Progress | None = None,
) -> dict[str, LayerSpaces]:
    """The spaces with directions in the order of their worth, and what cutting off the others costs at the output.

    Deterministic. The model is left as it was. Spaces are returned as they are where no gradient reaches a layer, or
    where the model cannot be differentiated: then the variance of its own output is all that is known.

    Memory: ``16 · out²`` bytes a layer, and the activations of 4 samples, as in training.

    Args:
        samples: input name → samples; `SAMPLES` of them are enough.
        classify: the first output is logits or probabilities of classes, if it is (samples, classes).
    """
    count = min(len(array) for array in samples.values())
    # every other sample, as data often come sorted by class
    first, second = ({name: array[start::2] for name, array in samples.items()} for start in (0, 1))
    parts = [_chunks(first), _chunks(second if count > 1 else first)]
    total = sum(map(len, parts))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sensitivity", done, total)

    try:
        objective = _Objective(classify=classify)
        moments = {name: _Gradients(space) for name, space in spaces.items()}
        _stream(model, parts[0], moments, objective, advance)
        weighed = {name: _directions(spaces[name], found.mean()) for name, found in moments.items()}
        losses = {name: _Losses(space) for name, space in weighed.items()}
        _stream(model, parts[1], losses, objective, advance)
    except (RuntimeError, NotImplementedError):  # no backward pass through some operator
        return dict(spaces)
    return {
        name: space if space.dual is None else replace(space, losses=losses[name].by_rank())
        for name, space in weighed.items()
    }


def _chunks(samples: Feeds) -> list[Feeds]:
    count = min(len(array) for array in samples.values())
    return [{n: array[start : start + _AT_ONCE] for n, array in samples.items()} for start in range(0, count, _AT_ONCE)]


class _Gradients:
    """``F``: the second moment of the gradients, summed over a sample's positions."""

    needs_values = False

    def __init__(self, spaces: LayerSpaces) -> None:
        self.samples = 0
        self._total = torch.zeros(len(spaces.mean), len(spaces.mean), dtype=torch.float64)

    def add(self, values: torch.Tensor, gradients: torch.Tensor) -> None:
        rows = gradients.flatten(0, 1)
        self._total += rows.T @ rows

    def mean(self) -> Array:
        return np.asarray(self._total.numpy() / max(1, self.samples))


class _Losses:
    """What each direction adds to the output to first order, and the second moments of that over the samples."""

    needs_values = True

    def __init__(self, spaces: LayerSpaces) -> None:
        self.samples = 0
        self._mean = torch.from_numpy(spaces.mean).float()
        self._basis = torch.from_numpy(spaces.basis).float()
        self._dual = self._basis if spaces.dual is None else torch.from_numpy(spaces.dual).float()
        self._total = torch.zeros(len(spaces.mean), len(spaces.mean), dtype=torch.float64)

    def add(self, values: torch.Tensor, gradients: torch.Tensor) -> None:
        added = (((values - self._mean) @ self._dual) * (gradients @ self._basis)).sum(1).double()
        self._total.addmm_(added.T, added)

    def by_rank(self) -> Array:
        """(out + 1,): half the mean square of all that the directions from each rank on add, falling."""
        cut = (self._total / max(1, self.samples)).numpy()[::-1, ::-1]
        losses = 0.5 * cut.cumsum(0).cumsum(1).diagonal()
        return np.maximum.accumulate(np.concatenate([[0.0], losses]))[::-1]


def _stream(
    model: nn.Module,
    chunks: Iterable[Feeds],
    watched: Mapping[str, _Gradients] | Mapping[str, _Losses],
    objective: _Objective,
    advance: Callable[[], None],
) -> None:
    """One backward pass a chunk; RuntimeError where there is none."""
    with evaluating(model), _frozen(model), _hooks(model, watched):
        for chunk in chunks:
            args, kwargs = bind(model, feed(model, chunk))
            with torch.enable_grad():
                objective(model(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]
            for entry in watched.values():
                entry.samples += min(len(array) for array in chunk.values())
            advance()


class _Objective:
    """The number whose gradients are taken: summed over the samples of a batch, each of which counts by itself."""

    def __init__(self, *, classify: bool) -> None:
        self._classify = classify
        self._random = torch.Generator().manual_seed(0)
        self._squares: dict[int, float] = {}
        self._samples = 0

    def __call__(self, result: Any) -> torch.Tensor:
        """RuntimeError where no output has a gradient."""
        values = list(result.values()) if isinstance(result, Mapping) else result
        outputs = [values] if isinstance(values, torch.Tensor) else [v for v in values if isinstance(v, torch.Tensor)]
        outputs = [output.float() for output in outputs if output.requires_grad]
        if not outputs:
            raise RuntimeError("no output has a gradient")
        if self._classify and outputs[0].dim() == 2 and outputs[0].shape[1] > 1:
            return self._drawn(outputs[0])
        self._samples += len(outputs[0])
        return torch.stack([self._relative(place, output) for place, output in enumerate(outputs)]).sum()

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """log p of classes drawn from the model's own answer."""
        given = scores.detach()
        shares = bool((given >= 0).all()) and torch.allclose(given.sum(1), torch.ones(len(given)), atol=1e-3)
        logs = scores.clamp_min(1e-30).log() if shares else scores.log_softmax(1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=self._random)
        return logs.gather(1, drawn).sum()

    def _relative(self, place: int, output: torch.Tensor) -> torch.Tensor:
        """With random signs, in units of the output's size over all samples so far."""
        self._squares[place] = self._squares.get(place, 0.0) + float(output.detach().square().sum())
        signs = torch.randint(0, 2, output.shape, generator=self._random).to(output) * 2 - 1
        size = max(self._squares[place] / self._samples, 1e-30) ** 0.5
        return (signs * output).sum().div(size)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Gradients of activations only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _hooks(model: nn.Module, watched: Mapping[str, _Gradients] | Mapping[str, _Losses]) -> Iterator[None]:
    handles = []
    try:
        for name, entry in watched.items():
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_hook(_observer(channel_axis(layer), entry)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(channels: int, entry: _Gradients | _Losses) -> Callable[..., torch.Tensor]:
    def rows(values: torch.Tensor) -> torch.Tensor:
        """(samples, positions, features)"""
        if channels == -1:
            return values.reshape(len(values), -1, values.shape[-1]).float()
        return values.flatten(2).transpose(1, 2).float()

    def hook(module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        # what follows may work in place: on no leaf, and not on what is needed later
        values = result.detach().clone() if entry.needs_values else result.detach()
        if not result.requires_grad:  # the first layer on its way: gradients begin here
            result = result.detach().requires_grad_().clone()
        result.register_hook(  # type: ignore[no-untyped-call]
            lambda gradients: entry.add(rows(values), rows(gradients))
        )
        return result

    return hook


def _directions(spaces: LayerSpaces, gradients: Array) -> LayerSpaces:
    """Basis and dual in the order of what they are worth; as they are where no gradient came."""
    mean = float(np.trace(gradients)) / len(gradients)
    if mean <= 0.0 or not np.isfinite(gradients).all():
        return spaces
    shrunk = (1.0 - _SHRINKAGE) * gradients + _SHRINKAGE * mean * np.eye(len(gradients))
    root = np.linalg.cholesky(shrunk)  # F = root · rootᵀ
    covariance = (spaces.basis * spaces.eigenvalues) @ spaces.basis.T
    values, vectors = np.linalg.eigh(root.T @ covariance @ root)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(len(vectors))]
    vectors = vectors * np.where(peaks < 0, -1.0, 1.0)
    return replace(spaces, eigenvalues=values, dual=root @ vectors, basis=np.linalg.solve(root.T, vectors))
