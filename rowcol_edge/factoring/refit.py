"""The second pass: weights fitted to inputs that are already compressed, layer after layer.

Spaces are measured on the original, where every layer sees what it was trained on. In the factored model it sees
``x̂``, what the factored layers before it make of that. So each layer is fitted once more, in the order they are called,
to give on ``x̂`` what the original's layer gives (of that what is kept):

    min over Δ of  E‖y − (W + Δ) x̂ − b‖² + ρ ‖Δ‖²

(asymmetric reconstruction: X. Zhang, J. Zou, K. He and J. Sun, Accelerating very deep convolutional networks for
classification and detection, 2016, section 3.2; the ridge pulls towards the weights that the spaces gave). Of a layer
in parts the last is fitted. ``ρ`` is the one that does best on samples that the fit has not seen; a layer that
nothing does better for keeps its weights, and so does the whole model where its output does not come a fifth closer to
the original's, or is no floating-point number that could come closer.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.calling import evaluating
from rowcol_edge.factoring import layouts, splits
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.layouts import Layout
from rowcol_edge.factoring.outcomes import Departure, Feeds, outcome
from rowcol_edge.factoring.places import Place, rows, spread
from rowcol_edge.factoring.spaces import Progress

Array = NDArray[np.float64]

_SAMPLES = (16, 512)  # every fourth is left to judge
_BYTES = 256 * 2**20  # of the largest activation of all samples
_ROWS = (2048, 12288)  # positions of all samples that a layer is fitted to: twice its inputs, within this
_FAN_IN = 2400  # a layer with more inputs keeps its weights: its fit would cost more than all others
_RIDGES = (1e-4, 1e-2, 1.0)  # shares of the mean variance of the inputs
_BETTER = 0.999  # of a layer's error on unseen samples
_GAIN = 0.8
"""Of the whole model's: calibration samples are often those that it was trained on, and what gains less there was seen
to lose on the selection split of the Fashion-MNIST sample."""
_NOTHING = 1e-12  # a loss that is rounding


@dataclass(frozen=True, slots=True)
class SecondPass:
    """What came of it: the model's loss without and with it, on samples that no layer was fitted to.

    Nats for a classifier, half the relative squared error about the mean for other outputs.
    """

    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < _GAIN * self.before

    @property
    def note(self) -> str:
        """In one line."""
        if self.kept:
            said = "kept"
        elif self.before <= _NOTHING:
            said = "not kept, as there was nothing to gain"
        else:
            said = f"not kept, as it does not take away {1 - _GAIN:.0%} of the loss"
        return f"{said}: {self.before:.2e} → {self.after:.2e} on inputs that no layer was fitted to"


@dataclass(slots=True)
class _Fit:
    """One layer: how many positions of each sample are looked at, and what the original gives there."""

    name: str
    take: Array | None  # (kept outputs, outputs); None: all
    positions: int
    layout: Layout
    wanted: torch.Tensor | None = None  # (samples, positions, kept outputs)


def refit(
    original: nn.Module,
    model: nn.Module,
    samples: Feeds,
    names: Sequence[str],
    kept: Mapping[str, Array],
    *,
    classify: bool,
    progress: Progress | None = None,
    told: Callable[[SecondPass], None] | None = None,
) -> nn.Module:
    """A copy of ``model`` whose layers are fitted to ``original``; one of the two as it was where that is no better.

    Deterministic. Memory: a forward pass of all samples, ``4 · rows · out`` bytes a layer for what the original gives,
    of at most 12,288 rows, and of one layer at a time ``20 · rows · inputs`` for what an output is made from, of at
    most 2,400 inputs.

    Args:
        samples: input name → calibration samples.
        names: layers to fit, in call order; in ``model`` each is a layer, or the parts of its split in sequence.
        kept: layer → (kept outputs, outputs), where it gives fewer than the original's.
        told: gets what came of it, where there was something to fit and to judge.
    """
    count = min(len(array) for array in samples.values())
    fitted = copy.deepcopy(model)
    laid, there = (layouts.find(each, samples, names) for each in (original, model))
    fits = [
        _Fit(name, kept.get(name), _positions(size, count), laid[name])
        for name in names
        # of the others it is not known which rows are of samples that are left to judge, or channels that got fewer are
        # among their samples or positions
        if name in laid and laid[name] == there.get(name)
        # one channel left of a depthwise layer looks like a plain one, but what it gives is not chosen by itself
        if getattr(original.get_submodule(name), "groups", 1) == 1
        if (size := _fan_in(fitted.get_submodule(name))) is not None
    ]
    unseen = torch.arange(count) % 4 == 3
    if not bool(unseen.any()) or not fits:
        return model
    with evaluating(original), _wanted(original, fits):
        reference = outcome(original, samples)
    if not reference:
        return model
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("second pass", done, len(fits))

    with evaluating(fitted), _fitting(fitted, fits, unseen, advance):
        after = outcome(fitted, samples)
    with evaluating(model):
        before = outcome(model, samples)
    losses = []
    for got in (before, after):
        departure = Departure(classify=classify)
        departure.add(reference, got, unseen)
        losses.append(departure.value)
    found = SecondPass(*losses)
    if told is not None:
        told(found)
    return fitted if found.kept else model


def affordable(infos: Mapping[str, LayerInfo]) -> int:
    """Samples that a second pass should be given: all are in memory at once, a layer at a time."""
    largest = max((4 * info.out_features * (info.outputs or info.positions) for info in infos.values()), default=1)
    return max(_SAMPLES[0], min(_SAMPLES[1], _BYTES // max(1, largest)))


def _fan_in(layer: nn.Module) -> int | None:
    """Inputs of one output of the part that is fitted; None where it keeps its weights."""
    part = _part(layer)
    if isinstance(part, nn.Linear):
        size = part.in_features
    elif isinstance(part, _ConvNd) and part.groups == 1 and len(part.kernel_size) <= 2:
        size = part.in_channels * int(np.prod(part.kernel_size))
    else:
        return None
    return size if size <= _FAN_IN else None


def _part(layer: nn.Module) -> nn.Module:
    return layer.get_submodule("expand") if isinstance(layer, nn.Sequential) else layer


def _positions(size: int, samples: int) -> int:
    return max(1, -(-min(max(2 * size, _ROWS[0]), _ROWS[1]) // samples))


@contextlib.contextmanager
def _wanted(original: nn.Module, fits: Sequence[_Fit]) -> Iterator[None]:
    """What the original gives, of that what is kept."""
    handles = []
    for fit in fits:

        def behind(module: nn.Module, args: tuple[Any, ...], result: torch.Tensor, fit: _Fit = fit) -> None:
            found = _rows(result, module, Place(fit.name), fit)
            fit.wanted = found if fit.take is None else found @ torch.from_numpy(fit.take).to(found).T

        handles.append(original.get_submodule(fit.name).register_forward_hook(behind))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _fitting(
    model: nn.Module, fits: Sequence[_Fit], unseen: torch.Tensor, advance: Callable[[], None]
) -> Iterator[None]:
    handles = []
    for fit in fits:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fit: _Fit = fit) -> None:
            part, taken = _part(module), args[0] if args else kwargs["input"]
            if isinstance(module, nn.Sequential):
                taken = module[:-1](taken)
            assert fit.wanted is not None
            _solve(part, _inputs(part, taken, fit), fit.wanted, unseen)
            fit.wanted = None
            advance()

        handles.append(model.get_submodule(fit.name).register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(values: torch.Tensor, layer: nn.Module, place: Place, fit: _Fit) -> torch.Tensor:
    """(samples, positions, features)"""
    found = rows(fit.layout.first(values), layer, place, _limit(fit))[:, :, 0]
    return fit.layout.by_sample(found)


def _limit(fit: _Fit) -> int:
    return -(-fit.positions // fit.layout.each)


def _inputs(layer: nn.Module, taken: torch.Tensor, fit: _Fit) -> torch.Tensor:
    """(samples, positions, inputs of one output), at the positions where `_rows` looks at the output."""
    if isinstance(layer, nn.Linear):
        return _rows(taken, layer, Place(fit.name, given=False), fit)
    assert isinstance(layer, _ConvNd)
    axes = len(layer.kernel_size)
    stride = (1,) * axes if layer.transposed else layer.stride
    found = []
    for sample in fit.layout.first(taken):
        padded = _spread_out(layer, sample[None]) if layer.transposed else _padded(layer, sample[None])
        patches = padded[0]  # a view, as all patches of a picture are k² times its size
        for axis, taps, dilation, step in zip(
            range(1, axes + 1), layer.kernel_size, layer.dilation, stride, strict=True
        ):
            patches = patches.unfold(axis, dilation * (taps - 1) + 1, step)[..., ::dilation]
        sizes = patches.shape[1 : axes + 1]
        index = spread(math.prod(sizes), min(math.prod(sizes), _limit(fit)))
        picked = patches.movedim(0, axes)[torch.unravel_index(index, sizes)]
        if layer.transposed:  # its first tap reads the last input
            picked = picked.flip(*range(2, axes + 2))
        found.append(picked.flatten(1))
    return fit.layout.by_sample(torch.stack(found))


def _padded(layer: _ConvNd, maps: torch.Tensor) -> torch.Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(maps, layer._reversed_padding_repeated_twice, mode)


def _spread_out(layer: _ConvNd, maps: torch.Tensor) -> torch.Tensor:
    """The maps on which a plain convolution with the kernel turned round gives what a transposed one gives."""
    sides = []
    for axis, stride in enumerate(layer.stride, 2):
        padding = layer.padding[axis - 2]
        assert isinstance(padding, int)  # a transposed one knows no words for it
        before = layer.dilation[axis - 2] * (layer.kernel_size[axis - 2] - 1) - padding
        sides.append((before, before + layer.output_padding[axis - 2]))
        between = torch.zeros_like(maps).unsqueeze(axis + 1)
        between = torch.cat([maps.unsqueeze(axis + 1), *[between] * (stride - 1)], axis + 1).flatten(axis, axis + 1)
        maps = between.narrow(axis, 0, between.shape[axis] - stride + 1)
    return F.pad(maps, [count for side in reversed(sides) for count in side])


@torch.no_grad()
def _solve(layer: nn.Module, taken: torch.Tensor, wanted: torch.Tensor, unseen: torch.Tensor) -> None:
    """Changes weight and bias where that does better on the unseen samples."""
    assert isinstance(layer, nn.Linear | _ConvNd)
    weight = torch.from_numpy(splits.matrix(layer))
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    seen = ~unseen
    inputs, outputs = taken[seen].flatten(0, 1).double(), wanted[seen].flatten(0, 1).double()
    missing = outputs - inputs @ weight.T - bias
    if layer.bias is None:  # nothing takes up a mean
        mean, shift = torch.zeros_like(weight[0]), torch.zeros_like(bias)
    else:
        mean, shift = inputs.mean(0), missing.mean(0)
    inputs, missing = inputs - mean, missing - shift
    gram, cross = inputs.T @ inputs / len(inputs), inputs.T @ missing / len(inputs)
    size = float(gram.diagonal().mean())
    if size <= 0.0 or not bool(torch.isfinite(gram).all()):
        return
    tests, truth = taken[unseen].flatten(0, 1).double(), wanted[unseen].flatten(0, 1).double()
    best, least = None, float((truth - tests @ weight.T - bias).square().sum())
    if least <= 1e-10 * float(truth.square().sum()):
        return  # nothing before it has changed
    for ridge in _RIDGES:
        factor, info = torch.linalg.cholesky_ex(gram + ridge * size * torch.eye(len(gram), dtype=torch.float64))
        if int(info):
            continue
        change = torch.cholesky_solve(cross, factor).T
        moved = bias + shift - change @ mean
        error = float((truth - tests @ (weight + change).T - moved).square().sum())
        if error < _BETTER * least:
            best, least = (change, moved), error
    if best is not None:
        change, moved = best
        splits.fill(layer, (weight + change).numpy(), layer.weight)
        if layer.bias is not None:
            layer.bias.copy_(moved.to(layer.bias))
