"""What is known of a model before anything is chosen: its layers, folded batch norms and measured spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from rowcol_edge import calling
from rowcol_edge.cache import Arrays
from rowcol_edge.datasets import Split, evenly
from rowcol_edge.factoring import (
    answers,
    borders,
    channel_spaces,
    coupling,
    fold,
    graph,
    input_spaces,
    layers,
    narrow,
    opening,
    refit,
    sensitivity,
    spaces,
    splits,
    standins,
)
from rowcol_edge.factoring.allocation import Allocator, Widths
from rowcol_edge.factoring.channel_spaces import ChannelSpaces
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.graph import LayerGraph
from rowcol_edge.factoring.options import Options
from rowcol_edge.factoring.places import Place
from rowcol_edge.factoring.spaces import LayerSpaces, Progress

_T = TypeVar("_T")

#: returns what the function makes, or what it made in another build
Keep = Callable[[Callable[[], Arrays]], Arrays]


_GRADIENTS, _GRADIENT_MACS = (24, 64), 112e9
"""Samples that spaces are weighed with, and as many again, but not more than a quarter of all, that they are judged on
and do not come from: the more, the less a model calculates for each."""
_JUDGES = 16  # where it is too much for the most of both: what judges costs twice what weighs
_ROUNDING = 1e-6  # of its largest value, by which an output that does not vary may differ
_FAILED = "without gradients"
_ROWS, _POSITIONS = 16384, (64, 1024)  # pixels or tokens of all samples that spaces come from, and of each


@dataclass(frozen=True)
class Study:
    """A model and all that factoring needs to know of it.

    Attributes:
        dense: the model with its batch norms folded; equal outputs, and what the dense arms are made from.
        folded: that one with modules that hide their layers opened (see `opening`), which is what is factored; the
            same where there are none.
        closed: modules that hide their layers and stay so, with the reason.
        infos: shape, cost and skip reason of each layer, in call order.
        spaces: column spaces of the layers that can be factored, measured when the first is asked for: a build that
            finds its plan and its files in the cache needs none.
        input_spaces: row spaces of the convolutions that `row` and `both` may split (see `options`); none where nothing
            was weighed.
        channel_spaces: what the channels of each set are worth, by its name; none where nothing was weighed.
        parameters: unique parameters of the folded model.
        macs: multiply-accumulates of its layers, one sample.
        classify: its first output is a classifier's.
        given: calibration samples.
        different: of these, those that differ from each other.
        spread: so many calibration samples, or all, spread evenly over them.
        second_passes: what came of those that were asked for, by the digest of their plan; None where nothing could be
            fitted or judged.
        made: a factored model that was judged and will be asked for, by the digest of its plan (see `keep`).
        tried: that of the last plan that `balance` chose, before any second pass, by that plan's digest.
    """

    dense: nn.Module
    folded: nn.Module
    closed: Mapping[str, str]
    graph: LayerGraph
    infos: Mapping[str, LayerInfo]
    spaces: Mapping[str, LayerSpaces]
    input_spaces: Mapping[str, LayerSpaces]
    channel_spaces: Mapping[str, ChannelSpaces]
    parameters: int
    macs: int
    classify: bool
    given: int
    different: int
    spread: Callable[[int], Mapping[str, np.ndarray[Any, Any]]]
    _coupled: Callable[[], tuple[ChannelSet, ...]]
    _failed: Callable[[], str]
    second_passes: dict[str, refit.SecondPass | None] = field(default_factory=dict)
    made: dict[str, nn.Module] = field(default_factory=dict)
    tried: dict[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def channels(self) -> tuple[ChannelSet, ...]:
        """Sets of channels, in call order; those that must stay as they are with the reason."""
        return self._coupled()

    @property
    def without_gradients(self) -> str:
        """Where and why the model, which runs without gradients, cannot be differentiated; ``""`` if it can."""
        return self._failed()

    @cached_property
    def trial_samples(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Calibration samples to try plans on, 24 to 64 by the model's cost, spread evenly over all."""
        return self.spread(_gradients(self.macs))

    def samples(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Calibration samples for a second pass."""
        return self.spread(refit.affordable(self.infos))

    def keep(self, digest: str, model: nn.Module) -> None:
        """For whoever asks first (`apply.factored`): a second pass may take minutes. One at a time."""
        self.made.clear()
        self.made[digest] = model

    @cached_property
    def varies(self) -> bool:
        """Whether the model gives other outputs for some of `samples` than for the first of them."""
        first: list[torch.Tensor] = []
        for chunk in sensitivity.chunked(self.samples()):
            outputs = _outputs(self.folded, chunk)
            first = first or [output[:1] for output in outputs]
            if not all(map(_same, outputs, first)):
                return True
        return False

    def allocator(self, multiple: int, break_even: float, factor: float = 1.0) -> Allocator | None:
        """Proposes widths, each of which counts ``factor`` times what it loses; None where no set can be narrowed or
        nothing was weighed."""
        widths = {name: space.losses for name, space in self.channel_spaces.items()}
        if not widths:
            return None
        options = Options(self.spaces, self.input_spaces, multiple, break_even)
        return Allocator(Widths(self.infos, self.channels), options, widths, factor)


def study(
    module: nn.Module,
    calibration: Split,
    *,
    classify: bool | None = None,
    row_space: bool = False,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Study:
    """Trace, fold and open. The first look at ``spaces`` streams the calibration split once through the folded model.

    Args:
        classify: weigh the spaces by what the model's output makes of them, which is a classifier's or another's; None:
            leave them as they are measured.
        row_space: measure that of the inputs too.

    Raises:
        ModelError, UnsupportedOpError: a model that cannot be traced.
        DataError: calibration inputs that the model cannot take, or (at the first look) NaN on the way.
        ModelError, MemoryError: at the first look, as `sensitivity.stream`.
    """
    example = calling.feed(module, calibration.example())
    traced, first = graph.traced(module, example)
    program: torch.export.ExportedProgram | None = None if traced.batchnorms else first
    dense = fold.fold_batchnorm(module, traced)
    if traced.batchnorms and not opening.same_whole(module, dense, example):
        traced = replace(traced, batchnorms=())  # its code reads a norm that was folded
        dense, program = fold.fold_batchnorm(module, traced), first
    found = opening.open_all(dense, example)
    folded = found.model
    if found.names:
        # the batch norms are folded by now: what is known of them is known from the first look
        opened, program = graph.traced(folded, example)
        traced = replace(opened, batchnorms=traced.batchnorms)
    infos = layers.survey(folded, traced)
    names = [name for name, info in infos.items() if not info.skip]
    for name, reason in standins.refused(folded, names, example).items():
        infos[name] = replace(infos[name], skip=reason)
        names.remove(name)
    count = _gradients(sum(info.macs for info in infos.values()))
    judges = min(count if count == _GRADIENTS[1] else _JUDGES, len(calibration) // 4)

    @cache
    def coupled() -> tuple[ChannelSet, ...]:
        sets = coupling.find(folded, traced, program or graph.exported(folded, example))
        return narrow.checked(folded, sets, example)

    def measured() -> Arrays:
        # gradients are needed, whatever the caller who looks first is in
        with torch.inference_mode(False), calling.channels_last(folded, example):
            if classify is None:
                batches = _Batches(calibration)
                return spaces.to_arrays(spaces.collect(folded, batches, names, row_space=row_space, progress=progress))
            kernels = [name for name in names if math.prod(infos[name].kernel) > 1]
            return _weighed(
                folded, calibration, names, kernels, coupled(), (count, judges), classify=classify, progress=progress
            )

    @cache
    def known() -> _Known:
        return _Known.from_arrays(keep(measured) if keep else measured())

    return Study(
        dense=dense,
        folded=folded,
        closed=found.closed,
        graph=traced,
        infos=infos,
        spaces=_WhenAsked(names, lambda: known().outputs),
        input_spaces=_WhenMeasured(lambda: known().inputs),
        channel_spaces=_WhenMeasured(lambda: known().channels),
        parameters=sum(p.numel() for p in folded.parameters()),
        macs=sum(info.macs for info in infos.values()),
        classify=bool(classify),
        given=len(calibration),
        different=len(set(calibration.sample_digests)),
        spread=calibration.spread,
        _coupled=coupled,
        _failed=lambda: known().failed,
    )


@torch.no_grad()
def _outputs(model: nn.Module, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    args, kwargs = calling.bind(model, calling.feed(model, feeds))
    with calling.evaluating(model):
        found = calling.tensors(model(*args, **kwargs))
    return [each.double() for each in found if each.dim() and each.numel()]


def _same(output: torch.Tensor, first: torch.Tensor) -> bool:
    """But for rounding, as a batch's samples are not all rounded alike."""
    if output.shape[1:] != first.shape[1:]:
        return False
    return bool((output - first).abs().max() <= _ROUNDING * first.abs().max())


def _gradients(macs: int) -> int:
    """Samples for a model of so many multiply-accumulates."""
    return max(_GRADIENTS[0], min(_GRADIENTS[1], int(_GRADIENT_MACS / max(1, macs))))


def _weighed(
    folded: nn.Module,
    calibration: Split,
    names: Sequence[str],
    kernels: Sequence[str],
    sets: Sequence[ChannelSet],
    counts: tuple[int, int],
    *,
    classify: bool,
    progress: Progress | None,
) -> Arrays:
    """Spaces, row spaces of ``kernels`` and channel spaces in one pass over most samples, weighed with the first of
    ``counts`` of them and judged on the second of others; where those are none, on the same."""
    free = [each for each in sets if not each.fixed]
    if not names and not free:
        return {}
    count, held_out = counts
    judges = evenly(len(calibration), held_out).tolist()
    pool = sorted(set(range(len(calibration))) - set(judges))
    outputs = {name: Place(name) for name in names}
    # the readers of a narrowed stream see it through a layer norm: what is left to them is not a part of what they took
    behind_norms = {slot.name for each in free if each.norms for slot in each.uses}
    inputs = {name: Place(name, given=False) for name in kernels if name not in behind_norms}
    reads = [place for each in free for place in channel_spaces.places(each)]
    batches = _Batches(calibration, pool)
    most = max(_POSITIONS[0], min(_POSITIONS[1], _ROWS // len(pool)))
    places = [*outputs.values(), *inputs.values(), *reads]
    scores, seen = answers.given_by(folded, calibration.example(), names) if classify else None, answers.Answers()
    with borders.coverages({name: cast(splits.Layer, folded.get_submodule(name)) for name in inputs}) as coverages:
        moments = spaces.measure(
            folded, batches, places, max_positions=most, given=seen.see if scores else None, progress=progress
        )
    taken = {n: input_spaces.with_border(moments.pop(place), coverages[n]) for n, place in inputs.items()}
    layers = {name: moments.pop(place) for name, place in outputs.items()}
    given, judged = calibration.spread(count, pool), calibration.spread(count, judges or pool)
    weighed = sensitivity.weigh_all(
        folded, given, judged, layers, moments, free, inputs=taken, classify=classify, progress=progress,
        known={Place(scores): seen.fisher()} if scores else None,
    )  # fmt: skip
    # of a layer that no gradient reaches the variance of its own output is all that is known
    rest = {name: spaces.decompose(name, left) for name, left in layers.items()}
    found = {name: weighed.layers.get(name) or rest[name] for name in names}
    return _Known(found, weighed.inputs, weighed.channels, weighed.failed).to_arrays()


@dataclass(frozen=True, slots=True)
class _Known:
    """What was measured, as arrays for a file."""

    outputs: dict[str, LayerSpaces]
    inputs: dict[str, LayerSpaces]
    channels: dict[str, ChannelSpaces]
    failed: str

    def to_arrays(self) -> Arrays:
        parts = {
            "": spaces.to_arrays(self.outputs),
            "inputs/": spaces.to_arrays(self.inputs),
            "channels/": channel_spaces.to_arrays(self.channels),
        }
        found = {prefix + key: array for prefix, arrays in parts.items() for key, array in arrays.items()}
        return found | ({_FAILED: np.frombuffer(self.failed.encode(), np.uint8)} if self.failed else {})

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> _Known:
        parts: dict[str, Arrays] = {"": {}, "inputs/": {}, "channels/": {}}
        for key, array in arrays.items():
            if key == _FAILED:
                continue
            prefix = next((each for each in ("inputs/", "channels/") if key.startswith(each)), "")
            parts[prefix][key.removeprefix(prefix)] = array
        outputs, inputs = spaces.from_arrays(parts[""]), spaces.from_arrays(parts["inputs/"])
        failed = arrays[_FAILED].tobytes().decode() if _FAILED in arrays else ""
        return cls(outputs, inputs, channel_spaces.from_arrays(parts["channels/"]), failed)


class _WhenMeasured(Mapping[str, _T]):
    """Spaces by name, measured at the first look."""

    def __init__(self, measure: Callable[[], dict[str, _T]]) -> None:
        self._measure = measure

    def __getitem__(self, name: str) -> _T:
        return self._measure()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measure())

    def __len__(self) -> int:
        return len(self._measure())


class _WhenAsked(Mapping[str, LayerSpaces]):
    """Spaces by layer, of which the names are known before they are measured."""

    def __init__(self, names: Sequence[str], measure: Callable[[], dict[str, LayerSpaces]]) -> None:
        self._names = names
        self._measured = cache(measure)

    def __getitem__(self, name: str) -> LayerSpaces:
        return self._measured()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Batches:
    """A split's batches, or those of some of its samples, with their number, so that progress has a total."""

    def __init__(self, split: Split, places: Sequence[int] | None = None) -> None:
        self._split = split
        self._places = range(len(split)) if places is None else places
        self._count = sum(1 for _ in self)

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return (dict(batch) for batch in self._split.only(self._places))

    def __len__(self) -> int:
        return self._count
