"""The gauges of a factored layer, chosen by what int8 makes of it on real inputs: `gauge` says what there is to try."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.calling import bind, evaluating, feed
from rowcol_edge.errors import DataError, PlanError
from rowcol_edge.factoring import splits
from rowcol_edge.factoring.gauge import Gauge, Pair
from rowcol_edge.factoring.layers import base
from rowcol_edge.factoring.places import channel_axis
from rowcol_edge.factoring.splits import Layer
from rowcol_edge.factoring.standins import put

Array = NDArray[np.float64]

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
GAUGES: tuple[Gauge | None, ...] = (
    None,
    *(Gauge(alpha) for alpha in ALPHAS),
    *(Gauge(alpha, 0) for alpha in ALPHAS),
    *(Gauge(0.5, seed) for seed in range(1, 8)),
)
"""What `settle` tries; None is the gauge that the layers have.

Half of the unevenness to either side is the best of all exponents for a latent that is normally distributed and rotated
(the product of what the latent's channels and the weights behind them amount to is least there), and was nearly always
chosen on both samples: so more rotations are tried with it, as ranges and weights are even by chance only.
"""
SAMPLES = 16
"""Calibration inputs that are enough to choose by."""
_POSITIONS = 8192  # pixels or tokens that a layer is judged on, as whole samples


@dataclass(frozen=True, slots=True)
class Settled:
    """The gauges of a factored layer, one between each two of its parts.

    Attributes:
        chosen: None where they stay as they were.
        before, error: relative squared error of the int8 output as it was, and in the chosen gauges.
    """

    chosen: tuple[Gauge | None, ...]
    before: float
    error: float

    def __str__(self) -> str:
        return "; ".join("as it was" if gauge is None else str(gauge) for gauge in self.chosen)


def settle(
    parts: nn.Sequential,
    inputs: torch.Tensor,
    *,
    gauges: Sequence[Gauge | None] = GAUGES,
    metric: Array | None = None,
    weight_bits: int = 8,
) -> tuple[nn.Sequential, Settled]:
    """The parts of a layer in the gauges of least int8 error, the first of equals; of three parts the first gauge is
    chosen first.

    Simulated as runtimes do it: weights symmetric with a scale for each output channel, a latent asymmetric in 8 bits
    with one scale for all of it and the range it has on ``inputs``; sums and biases exact. Deterministic; ``parts`` is
    left as it was.

    Args:
        parts: layers that multiply, no group, nothing in between (``reduce``, ``core``, ``expand``).
        inputs: samples of what the first gets, batch first.
        metric: (out, out), what errors of the output are weighed with; None: the identity.
        weight_bits: 7 where processors saturate (`QuantSpec.reduce_range`).

    Raises:
        PlanError: no such parts, or no gauge to try.
        DataError: inputs that are not finite, or none.
    """
    layers = list(_parts(parts))
    if not gauges:
        raise PlanError("gauges", expected="at least one", got="none")
    if not inputs.numel() or not bool(torch.isfinite(inputs).all()):
        raise DataError("inputs of a factored layer", expected="finite samples", got="none, NaN or infinity")
    with torch.no_grad():
        inputs = inputs.detach().to(layers[0].weight.device).float()
        judge = _Judge(layers, inputs, metric, weight_bits)
        before = error = judge.error(layers, inputs)
        exact = arrives = inputs
        chosen: list[Gauge | None] = []
        for place in range(len(layers) - 1):
            first, second, *rest = layers[place:]
            latent = _rows(_float(first)(exact), first)
            known = Pair(first, second, latent, _worth(layers[place + 1 :], metric))
            error, found = np.inf, gauges[0]
            for gauge in gauges:
                pair = (first, second) if gauge is None else known.turned(gauge)
                tried = judge.error([*pair, *rest], arrives)
                if tried < error:
                    error, found, layers[place : place + 2] = tried, gauge, pair
            chosen.append(found)
            exact, arrives = _float(layers[place])(exact), in8bits(judge.simulated(layers[place : place + 1], arrives))
    named = zip((name for name, _ in parts.named_children()), layers, strict=True)
    made = nn.Sequential(OrderedDict((name, copy.deepcopy(layer)) for name, layer in named))
    return made.train(parts.training), Settled(tuple(chosen), before, error)


class _Judge:
    """Simulates int8 and weighs its errors."""

    def __init__(self, layers: Sequence[Layer], inputs: torch.Tensor, metric: Array | None, bits: int) -> None:
        self._bits, self._axis = bits, channel_axis(layers[-1])
        self._wanted = inputs
        for layer in layers:
            self._wanted = _float(layer)(self._wanted)
        self._metric = None if metric is None else torch.from_numpy(metric).to(self._wanted)
        self._size = max(self._square(self._wanted), 1e-30)

    def error(self, layers: Sequence[Layer], inputs: torch.Tensor) -> float:
        """Relative squared error of what the layers, the last ones of all, give."""
        return self._square(self.simulated(layers, inputs) - self._wanted) / self._size

    def simulated(self, layers: Sequence[Layer], values: torch.Tensor) -> torch.Tensor:
        """What the layers give, that between them in 8 bits of the range that it has."""
        for place, layer in enumerate(layers):
            values = in8bits(values) if place else values
            values = quantized(layer, self._bits)(values)
        return values

    def _square(self, values: torch.Tensor) -> float:
        """Sum of squares, in the metric over the features."""
        if self._metric is None:
            return float(values.double().square().sum())
        rows = values.movedim(self._axis, -1).flatten(0, -2)
        return float(((rows.T @ rows) * self._metric).double().sum())


def quantized(layer: Layer, bits: int) -> Layer:
    """A copy in float32 whose weights are integers of ``bits`` times a scale for each output channel."""
    made, values = _float(layer), splits.matrix(layer)
    scale = np.maximum(np.abs(values).max(1, keepdims=True) / (2 ** (bits - 1) - 1), 1e-30)
    splits.fill(made, np.round(values / scale) * scale, made.weight)
    return made


def in8bits(values: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Values in uint8 with one scale and zero point, zero exact, for the range that ``like`` has (or they have)."""
    like = values if like is None else like
    least, most = torch.aminmax(like)
    low, high = min(float(least), 0.0), max(float(most), 0.0)
    scale = max((high - low) / 255.0, 1e-30)
    zero = round(-low / scale)
    return (values / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)


def _worth(layers: Sequence[Layer], metric: Array | None) -> Array | None:
    """What errors of the first one's output are weighed with, where those of different positions are independent."""
    for layer in reversed(layers[1:]):
        taps = splits.taps(layer)
        weighed = taps if metric is None else np.einsum("op,prt->ort", metric, taps, optimize=True)
        metric = np.einsum("ort,ost->rs", taps, weighed, optimize=True)
    return metric


def _rows(values: torch.Tensor, layer: Layer) -> Array:
    """(positions, features) of what a layer gives, float64."""
    features = values.movedim(channel_axis(layer), -1)
    return np.asarray(features.reshape(-1, features.shape[-1]).double().cpu().numpy())


def settle_model(
    model: nn.Module,
    names: Sequence[str],
    samples: Mapping[str, NDArray[Any]],
    *,
    gauges: Sequence[Gauge | None] = GAUGES,
    metrics: Mapping[str, Array] | None = None,
    weight_bits: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[nn.Module, dict[str, Settled]]:
    """A copy of ``model`` whose factored layers ``names`` are settled, each on its own inputs, in one pass over
    ``samples``; of more than 8192 positions so many whole samples, spread evenly, and at least one.

    The layers give what they gave, so that the inputs of one do not depend on the gauges of others. A layer is settled
    while its inputs are there: none are kept. Arguments as in `settle`.

    Raises:
        PlanError, DataError: as `settle`; a name that is no such layer, or that the samples do not reach.
    """
    result = copy.deepcopy(model)
    layers = {name: _named(result, name) for name in names}
    found: dict[str, tuple[nn.Sequential, Settled]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> None:
            if name not in found:
                assert isinstance(module, nn.Sequential)
                metric = None if metrics is None else metrics.get(name)
                found[name] = settle(
                    module,
                    _few(args[0] if args else kwargs["input"], module),
                    gauges=gauges,
                    metric=metric,
                    weight_bits=weight_bits,
                )
                if progress is not None:
                    progress("gauge", len(found), len(layers))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(result), torch.no_grad():
            args, kwargs = bind(result, feed(result, samples))
            result(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if name not in found:
            raise DataError(f"layer {name!r} was not reached by the samples")
        put(result, layer, found[name][0])
    return result, {name: settled for name, (_, settled) in found.items()}


def _named(model: nn.Module, name: str) -> nn.Sequential:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"no layer {name!r} in the model") from error
    _parts(layer, name)
    assert isinstance(layer, nn.Sequential)
    return layer


def _few(inputs: torch.Tensor, parts: nn.Sequential) -> torch.Tensor:
    positions = inputs[:1].movedim(channel_axis(parts[0]), -1)[..., 0].numel()
    count = min(len(inputs), max(1, _POSITIONS // max(1, positions)))
    return inputs[torch.arange(count) * len(inputs) // count]


def _float(layer: Layer) -> Layer:
    """A copy, without the hooks that are attached to it."""
    return copy.deepcopy(layer).float().eval()


def _parts(layer: nn.Module, name: str = "") -> tuple[Layer, ...]:
    """The layers that a factored one is made of, each of which takes what the one before gives; PlanError for anything
    else."""
    what = f"layer {name!r}" if name else "a factored layer"
    found = tuple(layer.children()) if isinstance(layer, nn.Sequential) else ()
    layers = tuple(each for each in found if isinstance(each, Layer) and base(each) is not None)
    if len(found) < 2 or len(layers) < len(found):
        got = type(layer).__name__ + (f" of {', '.join(type(each).__name__ for each in found)}" if found else "")
        raise PlanError(what, expected="two or three linear layers or convolutions in a row", got=got)
    for first, second in itertools.pairwise(layers):
        given = first.out_features if isinstance(first, nn.Linear) else first.out_channels
        taken = second.in_features if isinstance(second, nn.Linear) else second.in_channels
        grouped = any(isinstance(each, _ConvNd) and each.groups != 1 for each in (first, second))
        if given != taken or grouped or channel_axis(first) != channel_axis(second):
            raise PlanError(what, expected="layers without groups that multiply", got=f"{first}, {second}")
    return layers
