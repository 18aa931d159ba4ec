"""What the directions of a layer's output (or input, see `input_spaces`) are worth at the model's own output.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.calling import bind, evaluating, feed
from rowcol_edge.factoring import channel_spaces
from rowcol_edge.factoring.channel_spaces import ChannelSpaces
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.spaces import LayerSpaces, Moments, Place, Progress, directions, rows

Array = NDArray[np.float64]
Feeds = Mapping[str, NDArray[Any]]

SAMPLES = 64
"""Calibration samples whose gradients directions are found with."""
_AT_ONCE = 4  # samples whose activations are held


@dataclass(frozen=True, slots=True)
class Weighed:
    """Spaces in the order of their worth, by layer and by channel set."""

    layers: dict[str, LayerSpaces]
    channels: dict[str, ChannelSpaces]


def weigh(
    model: nn.Module,
    samples: Feeds,
    spaces: Mapping[str, LayerSpaces],
    *,
    classify: bool,
    given: bool = True,
    progress: Progress | None = None,
) -> dict[str, LayerSpaces]:
    """`weigh_all` of layers only, one half of the samples for the directions and the other to judge them."""
    parts = halves(samples)
    return weigh_all(model, *parts, spaces, {}, (), classify=classify, given=given, progress=progress).layers


def halves(samples: Feeds) -> tuple[Feeds, Feeds]:
    """Those that directions are found with, and those that they are judged on; a single sample is both."""
    count = min(len(array) for array in samples.values())
    # every other sample, as data often come sorted by class
    first, second = ({name: array[start::2] for name, array in samples.items()} for start in (0, 1))
    return first, second if count > 1 else first


def weigh_all(
    model: nn.Module,
    samples: Feeds,
    judges: Feeds,
    spaces: Mapping[str, LayerSpaces],
    moments: Mapping[Place, Moments],
    sets: Sequence[ChannelSet],
    *,
    classify: bool,
    given: bool = True,
    progress: Progress | None = None,
) -> Weighed:
    """The spaces with directions in the order of their worth, and what cutting off the others costs at the output.

    Deterministic. The model is left as it was. Spaces are returned as they are where no gradient reaches a layer, or
    where the model cannot be differentiated: then the variance of its own output is all that is known, and there are no
    channel spaces.

    Memory: ``16 · size²`` bytes a layer and a reader of channels, and the activations of 4 samples, as in training.

    Args:
        samples: input name → samples that directions are found with.
        judges: samples that they are judged on. Spaces must not come from these: a wide layer's space that few samples
            filled seems to lose nothing on the same ones.
        moments: at the places where `sets` are read.
        classify: the first output is logits or probabilities of classes, if it is (samples, classes).
        given: ``spaces`` are of what layers give; False: of what they take, and gradients those through each alone.
    """
    parts = [chunked(samples), chunked(judges)]
    total = sum(map(len, parts))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sensitivity", done, total)

    places = {name: Place(name, given) for name in spaces}
    reads = {each.name: channel_spaces.places(each) for each in sets}
    try:
        objective = Objective(classify=classify)
        gradients = {
            place: Gradients() for place in (*places.values(), *(p for found in reads.values() for p in found))
        }
        stream(model, parts[0], gradients, objective, advance)
        weighed = {name: _directions(spaces[name], gradients[place].mean()[0]) for name, place in places.items()}
        chosen = {
            each.name: channel_spaces.choose(model, each, [moments[p] for p in reads[each.name]], metrics)
            for each in sets
            if (metrics := [gradients[p].mean() for p in reads[each.name]]) and all(map(_usable, metrics))
        }
        losses = {name: Losses() for name in (*places, *(_key(name) for name in chosen))}
        watched = {place: losses[name].at(*_frame(weighed[name])) for name, place in places.items()}
        for name, found in chosen.items():
            for place, read in zip(reads[name], found.reads, strict=True):
                watched[place] = losses[_key(name)].at(read.mean, read.basis, read.dual)
        stream(model, parts[1], watched, objective, advance)
    except (RuntimeError, NotImplementedError):  # no backward pass through some operator
        return Weighed(dict(spaces), {})
    layers = {
        name: space if space.dual is None else replace(space, losses=losses[name].by_rank())
        for name, space in weighed.items()
    }
    channels = {
        name: replace(found, losses=found.by_width(losses[_key(name)].by_rank())) for name, found in chosen.items()
    }
    return Weighed(layers, channels)


def _key(name: str) -> str:
    return f"channels {name}"


def _usable(metric: Array) -> bool:
    return bool(np.isfinite(metric).all()) and float(np.trace(metric.sum(0))) > 0.0


def _frame(spaces: LayerSpaces) -> tuple[Array, Array, Array]:
    dual = spaces.basis if spaces.dual is None else spaces.dual
    return spaces.mean[None], spaces.basis[None], dual[None]


def chunked(samples: Feeds) -> list[Feeds]:
    """As many samples at once as activations are held of."""
    count = min(len(array) for array in samples.values())
    return [{n: array[start : start + _AT_ONCE] for n, array in samples.items()} for start in range(0, count, _AT_ONCE)]


class Gradients:
    """``F``: the second moment of the gradients, summed over a sample's positions."""

    needs_values = False

    def __init__(self) -> None:
        self.samples = 0
        self._total: torch.Tensor | None = None

    def add(self, values: torch.Tensor, gradients: torch.Tensor) -> None:
        """Both (samples, positions, groups, size)."""
        wide = gradients.flatten(0, 1).transpose(0, 1)
        found = (wide.transpose(1, 2) @ wide).double()
        self._total = found if self._total is None else self._total + found

    def flush(self, samples: int) -> None:
        self.samples += samples

    def mean(self) -> Array:
        """(groups, size, size)"""
        if self._total is None:
            return np.zeros((1, 1, 1))
        return np.asarray(self._total.cpu().numpy() / max(1, self.samples))


class Losses:
    """What each direction adds to the output to first order, and the second moments of that over the samples.

    One place has one frame; channels that several layers read are looked at in several, which add up.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._pending: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def at(self, mean: Array, basis: Array, dual: Array) -> Frame:
        """(groups, size), (groups, size, directions) twice."""
        return Frame(self, mean, basis, dual)

    def add(self, added: torch.Tensor) -> None:
        self._pending = added if self._pending is None else self._pending + added

    def flush(self, samples: int) -> None:
        if self._pending is not None:
            found = self._pending.T @ self._pending
            self._total = found if self._total is None else self._total + found
            self._pending = None
            self.samples += samples

    def by_rank(self) -> Array:
        """(directions + 1,): half the mean square of all that the directions from each rank on add, falling."""
        assert self._total is not None
        cut = (self._total / max(1, self.samples)).numpy()[::-1, ::-1]
        losses = 0.5 * cut.cumsum(0).cumsum(1).diagonal()
        return np.maximum.accumulate(np.concatenate([[0.0], losses]))[::-1]


class Frame:
    """Directions at one place."""

    needs_values = True

    def __init__(self, losses: Losses, mean: Array, basis: Array, dual: Array) -> None:
        self._losses = losses
        self._mean, self._basis, self._dual = (torch.from_numpy(each).float() for each in (mean, basis, dual))

    def add(self, values: torch.Tensor, gradients: torch.Tensor) -> None:
        count = len(values)
        # (groups, samples · positions, size)
        seen = (values - self._mean).flatten(0, 1).transpose(0, 1) @ self._dual
        seen *= gradients.flatten(0, 1).transpose(0, 1) @ self._basis
        self._losses.add(seen.reshape(len(seen), count, -1, seen.shape[-1]).sum((0, 2)).double())

    def flush(self, samples: int) -> None:
        self._losses.flush(samples)


Watched = Mapping[Place, Gradients] | Mapping[Place, Frame]


def stream(
    model: nn.Module, chunks: Iterable[Feeds], watched: Watched, objective: Objective, advance: Callable[[], None]
) -> None:
    """One backward pass a chunk; RuntimeError where there is none."""
    with evaluating(model), _frozen(model), _hooks(model, watched):
        for chunk in chunks:
            args, kwargs = bind(model, feed(model, chunk))
            with torch.enable_grad():
                objective(model(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]
            count = min(len(array) for array in chunk.values())
            for entry in watched.values():
                entry.flush(count)
            advance()


class Objective:
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
def _hooks(model: nn.Module, watched: Watched) -> Iterator[None]:
    """What is given is watched behind the layer; what is taken on a way of the layer's own, so that the gradient that
    comes back is what arrives through this layer alone."""
    handles = []
    given, taken = ({p: entry for p, entry in watched.items() if p.given is side} for side in (True, False))
    try:
        for place, entry in given.items():
            layer = model.get_submodule(place.name)

            def behind(
                module: nn.Module, args: tuple[Any, ...], result: torch.Tensor, seen: Any = ((place, entry),)
            ) -> torch.Tensor:
                return _watch(result, module, seen)

            handles.append(layer.register_forward_hook(behind))
        for name in dict.fromkeys(place.name for place in taken):
            seen = tuple((place, entry) for place, entry in taken.items() if place.name == name)

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Any = seen
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                if args:
                    return (_watch(args[0], module, seen), *args[1:]), kwargs
                return args, {**kwargs, "input": _watch(kwargs["input"], module, seen)}

            handles.append(model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(value: torch.Tensor, layer: nn.Module, seen: Iterable[tuple[Place, Gradients | Frame]]) -> torch.Tensor:
    # what follows may work in place: on no leaf, and not on what is needed later
    kept = value.detach().clone() if any(entry.needs_values for _, entry in seen) else value.detach()
    if not value.requires_grad:  # the first layer on its way: gradients begin here
        value = value.detach().requires_grad_()
    value = value.clone()

    def arrived(gradients: torch.Tensor) -> None:
        for place, entry in seen:
            entry.add(rows(kept, layer, place).float(), rows(gradients, layer, place).float())

    value.register_hook(arrived)  # type: ignore[no-untyped-call]
    return value


def _directions(spaces: LayerSpaces, gradients: Array) -> LayerSpaces:
    """Basis and dual in the order of what they are worth; as they are where no gradient came."""
    if gradients.shape[0] != len(spaces.mean) or not _usable(gradients[None]):
        return spaces
    covariance = (spaces.basis * spaces.eigenvalues) @ spaces.basis.T
    values, basis, dual = directions(covariance, gradients)
    return replace(spaces, eigenvalues=values, dual=dual, basis=basis)
