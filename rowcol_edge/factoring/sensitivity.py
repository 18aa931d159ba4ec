"""What the directions of a layer's output (or input, see `input_spaces`) are worth at the model's own output.

The column space alone says what a layer gives, not what becomes of it: a ReLU may clip it, a mean may average it away,
and layers differ by orders of magnitude in what the model's output makes of an error. Both come from gradients. And of
few rows a covariance says less than it seems to: it is shrunk first (`Moments.shrunk`).

With ``C`` the covariance of a layer's output ``y`` and ``F`` the second moment of the gradient of the loss by ``y``,
the rank-``r`` projector that loses least of ``tr(F (I − P) C (I − P)ᵀ)`` is ``P = F^(−½) U Uᵀ F^(½)``, with ``U`` the
leading eigenvectors of ``F^(½) C F^(½)`` (Eckart–Young in the metric of ``F``; any square root of ``F`` will do). For a
classifier the gradients are those of ``log p(class)`` with classes drawn from the model's own answer, so that ``F`` is
its Fisher matrix and half the squared first-order change is the Kullback–Leibler divergence from the original (Amari,
Natural gradient works efficiently in learning, 1998); at the scores themselves it is known exactly (`answers`).
Otherwise outputs are multiplied with random signs and divided by what they vary by, which gives half the squared
relative error about their mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge import calling, linears
from rowcol_edge.calling import bind, evaluating, feed, tensors
from rowcol_edge.errors import ModelError, RowcolError
from rowcol_edge.factoring import borders, channel_spaces, layouts, splits
from rowcol_edge.factoring.abreast import abreast
from rowcol_edge.factoring.arrivals import frozen, watching
from rowcol_edge.factoring.channel_spaces import ChannelSpaces
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.layouts import Layout
from rowcol_edge.factoring.metrics import Gradients, Metrics
from rowcol_edge.factoring.places import Moments, Place, pointwise
from rowcol_edge.factoring.products import product
from rowcol_edge.factoring.spaces import LayerSpaces, Progress, blended, directions
from rowcol_edge.factoring.variation import Variation

Array = NDArray[np.float64]
Directions = NDArray[np.floating[Any]]
Feeds = Mapping[str, NDArray[Any]]

_AT_ONCE = 4  # samples whose activations are held


class NoGradientsError(Exception):
    """The model runs, but not where gradients are kept; says where and in which words it failed."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """Spaces in the order of their worth, by layer what it gives and what it takes, and by channel set; ``failed``: why
    there are none, where the model cannot be differentiated."""

    layers: dict[str, LayerSpaces] = field(default_factory=dict)
    inputs: dict[str, LayerSpaces] = field(default_factory=dict)
    channels: dict[str, ChannelSpaces] = field(default_factory=dict)
    failed: str = ""


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
    layers: MutableMapping[str, Moments],
    moments: MutableMapping[Place, Moments],
    sets: Sequence[ChannelSet],
    *,
    inputs: Mapping[str, Moments] | None = None,
    known: Mapping[Place, Array] | None = None,
    classify: bool,
    progress: Progress | None = None,
) -> Weighed:
    """Directions in the order of their worth, and what cutting off the others costs at the output.

    Deterministic. The model is left as it was. Layers and sets that no gradient reaches are left out; all are where the
    model cannot be differentiated, or nothing that it gives has a gradient other than zero.

    Memory: ``24 · size²`` bytes a layer and a reader of channels, and the activations of 4 samples, as in training.

    Args:
        samples: input name → samples that directions are found with.
        judges: samples that they are judged on. Moments must not come from these: a wide layer's space that few samples
            filled seems to lose nothing on the same ones.
        layers: of what they give; those that are weighed are taken out, as memory counts.
        moments: at the places where `sets` are read; taken out too.
        inputs: of what layers take (see `input_spaces`); of these gradients are those through each layer alone.
        known: what errors are worth at places where that is known without gradients (see `answers`).
        classify: the first output is logits or probabilities of classes, if it is (samples, classes).

    Raises:
        ModelError, MemoryError: as `stream`.
    """
    parts = [chunked(samples), chunked(judges)]
    total = sum(map(len, parts))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sensitivity", done, total)

    reads = {each.name: channel_spaces.places(each) for each in sets}
    outputs = [Place(name) for name in layers]
    taken = [Place(name, given=False, border=True) for name in inputs or ()]
    laid = layouts.find(
        model, samples, sorted({each.name for found in (outputs, taken, *reads.values()) for each in found})
    )
    metrics = Metrics(model, [*outputs, *taken, *(place for found in reads.values() for place in found)], known)
    try:
        objective = Objective.of(model, parts[0], classify=classify)
        stream(model, parts[0], metrics.watched, objective, advance, laid)
    except NoGradientsError as error:
        return Weighed(failed=str(error))
    most = {place: _rank(model, place) for place in (*outputs, *taken)}
    weighed = _weigh(model, layers, inputs or {}, metrics, most)
    chosen = _choose(model, moments, metrics, sets, reads)
    keys: list[Place | str] = [*weighed, *chosen]
    losses = {key: Losses() for key in keys}
    watched = {place: losses[place].at(*_frame(each, most[place])) for place, each in weighed.items()}
    for name, channels in chosen.items():
        for place, frame in zip(reads[name], channels.reads, strict=True):
            watched[place] = losses[name].at(frame.mean, frame.basis, frame.dual, _matrix(model, place))
    if not watched:  # all gradients are zero: a head of zeros, or a saturated one
        return Weighed()
    stream(model, parts[1], watched, objective, advance, laid)
    judged = {place: replace(each, losses=losses[place].by_rank(len(each.mean))) for place, each in weighed.items()}
    return Weighed(
        {place.name: each for place, each in judged.items() if place.given},
        {place.name: each for place, each in judged.items() if not place.given},
        {name: replace(found, losses=found.by_width(losses[name].by_rank())) for name, found in chosen.items()},
    )


def _weigh(
    model: nn.Module,
    layers: MutableMapping[str, Moments],
    inputs: Mapping[str, Moments],
    metrics: Metrics,
    most: Mapping[Place, int | None],
) -> dict[Place, LayerSpaces]:
    """Directions at the places that a gradient reached."""

    def found(place: Place) -> LayerSpaces | None:
        own = layers[place.name] if place.given else inputs[place.name]
        own = own.shrunk(most[place], lambda: _given(model, place))
        spaces = _directions(place.name, own, metrics.pop(place), most[place])
        if spaces is not None and place.given:
            del layers[place.name]
        return spaces

    every = zip(most, abreast(found, list(most)), strict=True)
    return {place: spaces for place, spaces in every if spaces is not None}


def _choose(
    model: nn.Module,
    moments: MutableMapping[Place, Moments],
    metrics: Metrics,
    sets: Sequence[ChannelSet],
    reads: Mapping[str, Sequence[Place]],
) -> dict[str, ChannelSpaces]:
    """Channels of the sets that a gradient reached through all that read them."""

    def found(each: ChannelSet) -> ChannelSpaces | None:
        read = [moments.pop(place).shrunk() for place in reads[each.name]]
        # behind one of them are only integers, say, or what is detached: not nothing
        told = all(map(metrics.reached, reads[each.name]))
        seen = [metrics.pop(place) for place in reads[each.name]]
        # to a reader with zero weights nothing is worth anything: that holds no one else
        if told and any(map(_usable, seen)) and all(bool(np.isfinite(metric).all()) for metric in seen):
            return channel_spaces.choose(model, each, read, seen)
        return None

    every = zip(sets, abreast(found, sets), strict=True)
    return {each.name: spaces for each, spaces in every if spaces is not None}


def _usable(metric: Array) -> bool:
    return bool(np.isfinite(metric).all()) and float(np.trace(metric.sum(0))) > 0.0


def _frame(spaces: LayerSpaces, rank: int | None) -> tuple[Array, Array, Array]:
    """Mean, basis and dual of the directions that something is in."""
    dual = spaces.basis if spaces.dual is None else spaces.dual
    return spaces.mean[None], spaces.basis[None, :, :rank], dual[None, :, :rank]


def _matrix(model: nn.Module, place: Place) -> Array | None:
    """What a layer does to channels that it takes, if it does so at each position by itself; of one group only."""
    if place.given or place.channels is None or place.channels.shape[::2] != (1, 1):
        return None
    found = pointwise(model.get_submodule(place.name))
    return None if found is None else found.cpu().numpy()[:, place.channels[0, :, 0]]


def _rank(model: nn.Module, place: Place) -> int | None:
    """Most directions that what passes there can have: of what a layer gives, the inputs of one output."""
    layer = model.get_submodule(place.name)
    if not place.given or not isinstance(layer, nn.Linear | _ConvNd):
        return None
    if isinstance(layer, _ConvNd) and (layer.transposed or layer.groups > 1):
        return None
    return layer.weight[0].numel()


def _given(model: nn.Module, place: Place) -> torch.Tensor | None:
    """(out, out): what a layer would give of inputs whose features are all alike."""
    layer = model.get_submodule(place.name)
    if not place.given or not isinstance(layer, nn.Linear | _ConvNd):
        return None
    matrix = torch.from_numpy(splits.matrix(layer))
    return matrix @ matrix.T


def chunked(samples: Feeds) -> list[Feeds]:
    """As many samples at once as activations are held of."""
    count = min(len(array) for array in samples.values())
    return [{n: array[start : start + _AT_ONCE] for n, array in samples.items()} for start in range(0, count, _AT_ONCE)]


class Losses:
    """What directions add to the output to first order, from each rank on, and its mean square over the samples.

    One place has one frame; channels that several layers read are looked at in several, which add up.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._pending: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def at(self, mean: Array, basis: Directions, dual: Directions, matrix: Array | None = None) -> Frame:
        """(groups, size), (groups, size, directions) twice; of a taken place ``matrix`` (out, size) is what the layer
        does to each position, where that is known."""
        return Frame(self, mean, basis, dual, matrix)

    def add(self, added: torch.Tensor) -> None:
        self._pending = added if self._pending is None else self._pending + added

    def flush(self, samples: int) -> None:
        if self._pending is not None:
            cut = self._pending.flip(1).cumsum(1)  # all directions from each rank on, the last one first
            found = cut.square().sum(0)
            self._total = found if self._total is None else self._total + found
            self._pending = None
            self.samples += samples

    def by_rank(self, size: int = 0) -> Array:
        """(directions + 1,), or ``size + 1`` where there could be more: half the mean square of all that the directions
        from each rank on add, falling."""
        assert self._total is not None
        losses = 0.5 * (self._total / max(1, self.samples)).numpy()
        rest = np.zeros(max(1, size + 1 - len(losses)))
        return np.maximum.accumulate(np.concatenate([rest, losses]))[::-1]


class Frame:
    """Directions at one place."""

    def __init__(self, losses: Losses, mean: Array, basis: Directions, dual: Directions, matrix: Array | None) -> None:
        self._losses = losses
        self.behind = matrix is not None and len(matrix) < basis.shape[1]
        basis = product(matrix.astype(basis.dtype), basis) if matrix is not None and self.behind else basis
        self._mean, self._basis, self._dual = (torch.from_numpy(each).float() for each in (mean, basis, dual))

    def see(self, values: torch.Tensor) -> torch.Tensor:
        """(groups, samples, positions, size), or how much of each direction that is, where it is less work."""
        parts = (values - self._mean).permute(2, 0, 1, 3)
        return parts if self._many(values.shape[1]) else linears.product(parts, self._dual)

    def add(self, seen: torch.Tensor | None, gradients: torch.Tensor) -> None:
        assert seen is not None  # it was asked for
        arrived = gradients.permute(2, 0, 1, 3)
        if self._many(gradients.shape[1]):
            products = self._basis.unsqueeze(1).transpose(2, 3) @ (arrived.transpose(2, 3) @ seen)
            added = (products * self._dual.unsqueeze(1).transpose(2, 3)).sum((0, 3))
        else:
            added = linears.product(arrived, self._basis).mul_(seen).sum((0, 2))
        self._losses.add(added.double())

    def _many(self, positions: int) -> bool:
        """So many that gradients are better multiplied with values before they are with directions."""
        (given, directions), taken = self._basis.shape[1:], self._dual.shape[1]
        return positions * given * taken + given * taken * directions < positions * (given + taken) * directions

    def flush(self, samples: int) -> None:
        self._losses.flush(samples)


Watched = Mapping[Place, Gradients | Frame]


def stream(
    model: nn.Module,
    chunks: Iterable[Feeds],
    watched: Watched,
    objective: Objective,
    advance: Callable[[], None],
    laid: Mapping[str, Layout] | None = None,
) -> None:
    """One backward pass a chunk.

    Raises:
        NoGradientsError: there is none.
        MemoryError: not enough for the activations of a chunk.
        ModelError: the model fails in another way than torch does.
    """
    inside, bordered = ({p: each for p, each in watched.items() if p.border is border} for border in (False, True))
    padded = borders.padded(model, [place.name for place in bordered])
    with (
        evaluating(model), frozen(model), watching(model, inside, laid), padded, watching(model, bordered, laid),
        calling.watching(model) as calls,
    ):  # fmt: skip
        for chunk in chunks:
            args, kwargs = bind(model, feed(model, chunk))
            count = min(len(array) for array in chunk.values())
            with _telling(calls), torch.enable_grad(), linears.convolved():
                objective(model(*args, **kwargs), count).backward()  # type: ignore[no-untyped-call]
            for entry in watched.values():
                entry.flush(count)
            advance()


@contextlib.contextmanager
def _telling(calls: calling.Calls) -> Iterator[None]:
    try:
        yield
    except (RowcolError, NoGradientsError, MemoryError):
        raise
    except Exception as error:  # boundary: the user's own code runs here and may raise anything
        raise _failed(error, calls) from error


def _failed(error: Exception, calls: calling.Calls) -> Exception:
    """What an error of a model is that runs where no gradients are kept."""
    where = f"in module {calls.innermost or 'the model itself'!r}" if calls.stack else "on the way back"
    words = f"{type(error).__name__} {where}: {(str(error).splitlines() or [''])[0]}"
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return MemoryError(
            f"not enough memory for the activations of {_AT_ONCE} samples, which gradients need: {words}"
        )
    if isinstance(error, RuntimeError):  # of which NotImplementedError is one: no backward pass through some operator
        return NoGradientsError(words)
    return ModelError("the model where gradients are kept", expected="a forward that runs as without them", got=words)


class Objective:
    """The number whose gradients are taken: summed over the samples of a batch, each of which counts by itself."""

    def __init__(self, *, classify: bool, squares: Sequence[float] = ()) -> None:
        """
        Args:
            classify: the first output is logits or probabilities of classes, if it is (samples, classes).
            squares: by floating output, what it varies by (`Variation.squares`); of classes it is not asked for, and
                what is not among them is measured by itself, when it comes.
        """
        self._classify = classify
        self._random = torch.Generator().manual_seed(0)
        self._squares = squares

    @classmethod
    def of(cls, model: nn.Module, chunks: Iterable[Feeds], *, classify: bool) -> Objective:
        """With what the outputs vary by on these samples: a forward pass, unless there are only classes.

        Raises:
            NoGradientsError, ModelError, MemoryError: as `stream`.
        """
        plain, found = cls(classify=classify), Variation()
        with evaluating(model), torch.no_grad(), calling.watching(model) as calls:
            for chunk in chunks:
                args, kwargs = bind(model, feed(model, chunk))
                count = min(len(array) for array in chunk.values())
                with _telling(calls):
                    outputs = _floating(model(*args, **kwargs))
                    if all(plain._classes(place, output, count) is not None for place, output in enumerate(outputs)):
                        return plain
                    found.add(outputs, count)
        return cls(classify=classify, squares=found.squares())

    def __call__(self, result: Any, samples: int) -> torch.Tensor:
        """Of what the model makes of so many samples; NoGradientsError where no output has a gradient."""
        outputs = _floating(result)
        if not any(output.requires_grad for output in outputs):
            raise NoGradientsError("outputs are integers, detached or made under torch.no_grad()")
        found = []
        for place, output in enumerate(outputs):
            if output.requires_grad:
                scores = self._classes(place, output, samples)
                found.append(self._relative(place, output, samples) if scores is None else self._drawn(scores.float()))
        return torch.stack(found).sum()

    def _classes(self, place: int, output: torch.Tensor, samples: int) -> torch.Tensor | None:
        """Scores of classes (samples, classes); None where it is something else."""
        if not self._classify or place:
            return None
        if output.dim() == 1 and samples == 1:  # squeezed
            output = output[None]
        return output if output.dim() == 2 and output.shape[1] > 1 else None

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """log p of classes drawn from the model's own answer."""
        given = scores.detach()
        shares = bool((given >= 0).all()) and torch.allclose(given.sum(1), torch.ones(len(given)), atol=1e-3)
        logs = scores.clamp_min(1e-30).log() if shares else scores.log_softmax(1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=self._random)
        return logs.gather(1, drawn).sum()

    def _relative(self, place: int, output: torch.Tensor, samples: int) -> torch.Tensor:
        """With random signs, in units of what the output varies by."""
        if place < len(self._squares):
            square = self._squares[place]
        else:
            alone = Variation()
            alone.add([output], samples)
            [square] = alone.squares()
        output = output.float().masked_fill(~output.isfinite(), 0.0)  # scores that are masked
        signs = torch.randint(0, 2, output.shape, generator=self._random).to(output) * 2 - 1
        return (signs * output).sum().div(square**0.5)


def _floating(result: object) -> list[torch.Tensor]:
    return [output for output in tensors(result) if output.is_floating_point()]


def _directions(name: str, moments: Moments, gradients: Array, rank: int | None) -> LayerSpaces | None:
    """Basis and dual in the order of what they are worth; None where no gradient came."""
    mean, covariance = (each[0] for each in moments.numpy())
    if gradients.shape[1] != len(mean) or not _usable(gradients):
        return None
    values, basis, dual = directions(covariance, gradients[0], rank=rank)
    metric = None if basis.shape[1] == len(mean) else blended(gradients[0]).astype(np.float32)
    return LayerSpaces(name, values, basis, mean, moments.samples, dual=dual, metric=metric)
