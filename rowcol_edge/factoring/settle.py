"""The gauge of a factored layer, chosen by what int8 makes of it on real inputs: `gauge` says what there is to try."""

from __future__ import annotations

import copy
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
from rowcol_edge.factoring.gauge import Gauge, parts, turn
from rowcol_edge.factoring.places import channel_axis

Array = NDArray[np.float64]

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
GAUGES: tuple[Gauge | None, ...] = (
    None,
    *(Gauge(alpha) for alpha in ALPHAS),
    *(Gauge(alpha, 0) for alpha in ALPHAS),
    *(Gauge(alpha, 0, 0.5) for alpha in ALPHAS),
)
"""What `settle` tries; None is the gauge that a pair has."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What was tried on one pair, and the best of it: relative squared errors of its int8 output, by gauge."""

    chosen: Gauge | None
    errors: tuple[tuple[Gauge | None, float], ...]

    @property
    def error(self) -> float:
        """That of the chosen gauge."""
        return min(error for _, error in self.errors)


def settle(
    pair: nn.Sequential,
    inputs: torch.Tensor,
    *,
    gauges: Sequence[Gauge | None] = GAUGES,
    metric: Array | None = None,
    weight_bits: int = 8,
    per_channel: bool = True,
) -> tuple[nn.Sequential, Settled]:
    """The pair in the gauge of least int8 error, the first of equals, and all that were tried.

    Simulated as runtimes do it: both weights symmetric, the latent asymmetric with one scale for all of it and the
    range it has on ``inputs``; sums and biases exact. Deterministic; the pair is left as it was.

    Args:
        pair: two layers that multiply, no group, nothing in between (``reduce`` and ``expand``).
        inputs: samples of what the pair gets, batch first.
        metric: (out, out), what errors of the output are weighed with; None: the identity.
        weight_bits: 7 where processors saturate (`QuantSpec.reduce_range`).
        per_channel: weights have a scale for each output channel rather than one.

    Raises:
        PlanError: no such pair, or no gauge to try; a centred gauge where the second layer pads.
        DataError: inputs that are not finite, or none.
    """
    first, second = parts(pair)
    if not gauges:
        raise PlanError("gauges", expected="at least one", got="none")
    if not inputs.numel() or not bool(torch.isfinite(inputs).all()):
        raise DataError("inputs of a factored layer", expected="finite samples", got="none, NaN or infinity")
    with torch.no_grad():
        inputs = inputs.detach().to(first.weight.device).float()
        exact = _float(pair)
        wanted, latent = exact(inputs), _rows(exact[0](inputs), first)
        weights = None if metric is None else torch.from_numpy(metric).to(wanted)
        axis = channel_axis(second)
        tried: list[tuple[Gauge | None, float]] = []
        best, least = pair, np.inf
        for gauge in gauges:
            turned = pair if gauge is None else turn(pair, gauge, latent, metric)
            got = _simulate(_float(turned), inputs, weight_bits, per_channel)
            error = _square(got - wanted, axis, weights) / max(_square(wanted, axis, weights), 1e-30)
            tried.append((gauge, error))
            if error < least:
                best, least = turned, error
    chosen = min(tried, key=lambda entry: entry[1])[0]
    return _copied(best) if best is pair else best, Settled(chosen, tuple(tried))


def settle_model(
    model: nn.Module,
    names: Sequence[str],
    samples: Mapping[str, NDArray[Any]],
    *,
    gauges: Sequence[Gauge | None] = GAUGES,
    metrics: Mapping[str, Array] | None = None,
    weight_bits: int = 8,
    per_channel: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[nn.Module, dict[str, Settled]]:
    """A copy of ``model`` whose pairs ``names`` are settled, each on its own inputs in one pass over ``samples``.

    The pairs give what they gave, so that the inputs of one do not depend on the gauges of others. A pair is settled
    while its inputs are there: none are kept. Arguments as in `settle`.

    Raises:
        PlanError, DataError: as `settle`; a name that is no pair of the model, or that the samples do not reach.
    """
    result = copy.deepcopy(model)
    pairs = {name: _named(result, name) for name in names}
    found: dict[str, tuple[nn.Sequential, Settled]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if name not in found:
                assert isinstance(module, nn.Sequential)
                metric = None if metrics is None else metrics.get(name)
                found[name] = settle(
                    module, args[0], gauges=gauges, metric=metric, weight_bits=weight_bits, per_channel=per_channel
                )
                if progress is not None:
                    progress("gauge", len(found), len(pairs))

        return hook

    handles = [pair.register_forward_pre_hook(watch(name)) for name, pair in pairs.items()]
    try:
        with evaluating(result), torch.no_grad():
            args, kwargs = bind(result, feed(result, samples))
            result(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name in pairs:
        if name not in found:
            raise DataError(f"layer {name!r} was not reached by the samples")
        result.set_submodule(name, found[name][0])
    return result, {name: settled for name, (_, settled) in found.items()}


def _named(model: nn.Module, name: str) -> nn.Sequential:
    try:
        pair = model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"no layer {name!r} in the model") from error
    parts(pair, name)
    assert isinstance(pair, nn.Sequential)
    return pair


def _float(pair: nn.Sequential) -> nn.Sequential:
    return _copied(pair).float().eval()


def _copied(pair: nn.Sequential) -> nn.Sequential:
    """Without the hooks that are attached to the pair."""
    return nn.Sequential(OrderedDict(copy.deepcopy(list(pair.named_children())))).train(pair.training)


def _rows(values: torch.Tensor, layer: nn.Linear | _ConvNd) -> Array:
    """(positions, features) of a layer's output, float64."""
    features = values.movedim(channel_axis(layer), -1)
    return np.asarray(features.reshape(-1, features.shape[-1]).double().cpu().numpy())


def _simulate(pair: nn.Sequential, inputs: torch.Tensor, bits: int, per_channel: bool) -> torch.Tensor:
    """What the pair gives with weights of ``bits`` and its latent in 8."""
    first, second = parts(pair)
    for layer in (first, second):
        values = torch.from_numpy(splits.matrix(layer))
        largest = values.abs().amax(1, keepdim=True) if per_channel else values.abs().max()
        scale = (largest / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
        splits.fill(layer, ((values / scale).round() * scale).numpy(), layer.weight)
    result: torch.Tensor = second(_asymmetric(first(inputs)))
    return result


def _asymmetric(values: torch.Tensor) -> torch.Tensor:
    """uint8 with one scale and zero point, zero exact."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = max((high - low) / 255.0, 1e-30)
    zero = round(-low / scale)
    return ((values / scale).round().add(zero).clamp(0, 255) - zero) * scale


def _square(values: torch.Tensor, axis: int, metric: torch.Tensor | None) -> float:
    """Sum of squares, in a metric over the features."""
    if metric is None:
        return float(values.double().square().sum())
    rows = values.movedim(axis, -1)
    return float(((rows @ metric) * rows).double().sum())
