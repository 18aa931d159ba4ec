"""How far a student's answers and features are from its teacher's: the loss of `recover`.

A classifier's answers are compared by the Kullback–Leibler divergence of both softened by a temperature, times its
square so that gradients keep their size (Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015).
Every other output by relative squared error about its mean, ‖s − t‖² / ‖t − E t‖², and features by ‖s − t‖² / ‖t‖²:
these are what a few blocks give that both models have under one name (Romero et al., FitNets: hints for thin deep nets,
2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.calling import bind, feed, tensors
from rowcol_edge.datasets import evenly
from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.variation import Variation

Feeds = Mapping[str, NDArray[Any]]

TEMPERATURE = 2.0
FEATURES = 4
"""Blocks whose outputs are compared, at most: evenly from all that match."""
FEATURE_WEIGHT = 3.0
"""Of their mean relative squared error beside that of the outputs."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NONE = 1e-12  # an output that is zero everywhere has no relative error


class Distillation:
    """The loss of a student beside its teacher.

    Attributes:
        features: names of the blocks that are compared.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, samples: Sequence[Feeds], *, classify: bool) -> None:
        """
        Args:
            samples: batches that sizes are taken on; the first sample of the first one is the probe.
            classify: the first output is logits or probabilities of classes, if it is (samples, classes).

        Raises:
            ModelError: the two give other outputs, or none that can be compared.
            DataError: inputs that the teacher does not take.
        """
        self._teacher = teacher
        probe = {name: array[:1] for name, array in samples[0].items()}
        self.features = tuple(_matching(student, teacher, probe))
        self._classify = classify
        self._shares = False
        self._scales: list[float] = []
        self._measure(samples)

    def loss(self, student: nn.Module, feeds: Feeds) -> torch.Tensor:
        """What training makes smaller, on one batch."""
        wanted, known = self._taught(feeds)
        given, made = run(student, feeds, self.features)
        scales = self._scales[len(wanted) :]
        total = self._outputs(given, wanted, TEMPERATURE)
        if scales:
            parts = [_relative(made[n], known[n], s) for n, s in zip(self.features, scales, strict=True)]
            total = total + FEATURE_WEIGHT * torch.stack(parts).mean()
        return total

    @torch.no_grad()
    def distance(self, student: nn.Module, batches: Iterable[Feeds]) -> float:
        """Of the outputs, at temperature 1 and per sample: nats for a classifier, else relative squared error about
        the mean."""
        total, count = 0.0, 0
        for feeds in batches:
            size = _count(feeds)
            wanted, _ = self._taught(feeds, features=False)
            given, _ = run(student, feeds)
            total += float(self._outputs(given, wanted, 1.0).clamp_min(0.0)) * size  # equal ones are rounded below it
            count += size
        return total / max(1, count)

    @torch.no_grad()
    def _taught(self, feeds: Feeds, *, features: bool = True) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        return run(self._teacher, feeds, self.features if features else ())

    def _measure(self, samples: Sequence[Feeds]) -> None:
        """What outputs vary by, the mean squares of features, and whether the first output is probabilities."""
        variation, sums, count = Variation(), [0.0 for _ in self.features], 0
        self._shares = True
        for feeds in samples:
            outputs, features = self._taught(feeds)
            self._shares = self._shares and _are_shares(outputs[0])
            size = _count(feeds)
            variation.add(outputs, size)
            known = zip(sums, self.features, strict=True)
            sums = [total + float(features[name].double().square().mean()) * size for total, name in known]
            count += size
        self._scales = [max(scale, _NONE) for scale in (*variation.means(), *(total / count for total in sums))]

    def _outputs(self, given: list[torch.Tensor], wanted: list[torch.Tensor], temperature: float) -> torch.Tensor:
        parts = []
        for place, (s, t) in enumerate(zip(given, wanted, strict=True)):
            if self._classify and place == 0 and t.dim() == 2:
                parts.append(self._divergence(s, t, temperature))
            else:
                parts.append(_relative(s, t, self._scales[place]))
        return torch.stack(parts).mean()

    def _divergence(self, given: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
        s, t = (self._logs(scores.float(), temperature) for scores in (given, wanted))
        apart = torch.where(t.isneginf(), 0.0, t - s)  # a class that is masked has no share
        return (t.exp() * apart).sum(1).mean() * temperature**2

    def _logs(self, scores: torch.Tensor, temperature: float) -> torch.Tensor:
        if scores.shape[1] == 1:  # one logit decides between two classes
            scores = torch.cat([torch.zeros_like(scores), scores], 1)
        elif self._shares:
            scores = scores.clamp_min(1e-30).log()
        return (scores / temperature).log_softmax(1)


def run(
    model: nn.Module, feeds: Feeds, names: Sequence[str] = ()
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The model's floating outputs in order, and what the named modules gave on the way."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: object) -> None:
            first = next(iter(_floats(result)), None)
            if first is not None:
                found[name] = first

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        args, kwargs = bind(model, feed(model, feeds))
        return _floats(model(*args, **kwargs)), found
    finally:
        for handle in handles:
            handle.remove()


def _count(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def _floats(result: object) -> list[torch.Tensor]:
    return [each for each in tensors(result) if each.is_floating_point()]


def _relative(given: torch.Tensor, wanted: torch.Tensor, scale: float) -> torch.Tensor:
    kind = torch.promote_types(torch.promote_types(given.dtype, wanted.dtype), torch.float32)
    apart = torch.where(given == wanted, 0.0, given.to(kind) - wanted.to(kind))  # infinities of a mask are equal
    return apart.square().mean().div(scale).float()


def _are_shares(scores: torch.Tensor) -> bool:
    if scores.dim() != 2 or scores.shape[1] < 2:
        return False
    return bool((scores >= 0).all()) and torch.allclose(scores.sum(1), torch.ones(len(scores)).to(scores), atol=1e-3)


@torch.no_grad()
def _matching(student: nn.Module, teacher: nn.Module, probe: Feeds) -> list[str]:
    """Up to `FEATURES` blocks that both have under one name and that give the same shape, in the order they are in."""
    there = {name for name, _ in student.named_modules()}
    names = [name for name in _blocks(teacher, "") or _children(teacher) if name in there]
    try:
        outputs, theirs = run(teacher, probe, names)
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {array.shape[1:]}" for name, array in probe.items())
        raise DataError(
            "data to recover on", expected="samples that the original takes", got=f"{shapes}: {error}"
        ) from error
    given, ours = run(student, probe, names)
    got, expected = ([tuple(value.shape) for value in values] for values in (given, outputs))
    if got != expected or not expected:
        raise ModelError(
            "the model to recover and its original",
            expected=f"the same outputs, {expected}" if expected else "an output of floating point numbers",
            got=str(got),
        )
    told = {id(value) for value in outputs}
    same = [
        name for name in names
        if name in ours and name in theirs and ours[name].shape == theirs[name].shape and id(theirs[name]) not in told
    ]  # fmt: skip
    return [same[i] for i in evenly(len(same), FEATURES)] if same else []


def _blocks(module: nn.Module, prefix: str) -> list[str]:
    """Modules of several parts, looked for through containers and wrappers of one part."""
    found = []
    for name, child in module.named_children():
        parts = list(child.children())
        if isinstance(child, _CONTAINERS) or len(parts) == 1:
            found += _blocks(child, f"{prefix}{name}.")
        elif parts:
            found.append(f"{prefix}{name}")
    return found


def _children(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if not isinstance(child, nn.ModuleList | nn.ModuleDict)]
