"""How well the data cover what the model does: a diverse calibration subset, its classes and ranges, and leakage.

The subset is chosen by the k-center rule on the model's own features: begin with the most typical sample, then take
the one farthest from all taken, again and again (T. F. Gonzalez, "Clustering to minimize the maximum intercluster
distance", 1985; as a coreset: O. Sener and S. Savarese, "Active learning for convolutional neural networks", 2018).
Seeking out the samples that set the extremes of the layers' ranges instead helps a convolutional network and harms a
Transformer, as tools/benchmark_calibration.py measures; this rule is never far from the better of the two.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from . import calling, duplicates
from .config import ALL
from .device.progress import silent
from .duplicates import Pair, Thresholds
from .evaluation import HELD
from .factoring import fold, graph
from .factoring.graph import LayerGraph
from .features import Floats, Observed, Observer
from .job import Job, Progress
from .sketches import Likeness, stack

_WORST = 20  # pairs that are listed one by one

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SplitClasses:
    """A split: samples a class, by labels or by the model's own answers; empty where it does not classify."""

    name: str
    samples: int
    labelled: bool
    classes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "labelled": self.labelled, "classes": dict(self.classes)}


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the splits hold.

    Attributes:
        splits: classes of each split.
        chosen: places of the calibration subset in its pool, ascending.
        subset: its classes.
        ranges: layer tensor → share of the pool's range that the subset spans.
        pairs: near-duplicates, the most alike first.
        limits: what counted as one; None where only one sample was there.
    """

    splits: tuple[SplitClasses, ...]
    chosen: tuple[int, ...]
    subset: SplitClasses
    ranges: Mapping[str, float]
    pairs: tuple[Pair, ...]
    limits: Thresholds

    @property
    def narrowest(self) -> tuple[str, float] | None:
        """The tensor whose range the subset covers least; None for a model without layers."""
        return min(self.ranges.items(), key=lambda item: item[1], default=None)

    def leaks(self) -> dict[tuple[str, str], list[Pair]]:
        """Near-duplicates across two splits."""
        return {names: pairs for names, pairs in self._by_split().items() if names[0] != names[1]}

    def repeats(self) -> dict[str, list[Pair]]:
        """Near-duplicates inside a split."""
        return {names[0]: pairs for names, pairs in self._by_split().items() if names[0] == names[1]}

    def _by_split(self) -> dict[tuple[str, str], list[Pair]]:
        found: dict[tuple[str, str], list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault((pair.first, pair.second), []).append(pair)
        return found

    def notes(self) -> list[str]:
        """What a person should know, a sentence each."""
        said = []
        for (first, second), pairs in self.leaks().items():
            worst = pairs[0]
            said.append(
                f"leakage: {len(pairs)} near-duplicate(s) between {first} and {second}, e.g. {first} "
                f"{worst.first_index} and {second} {worst.second_index} (likeness {worst.likeness:.2f})"
            )
        pool = self.splits[0]
        if missing := [name for name in pool.classes if name not in self.subset.classes]:
            said.append(f"calibration: no sample of class {', '.join(missing)} among the {len(self.chosen)} chosen")
        seen = {name for split in self.splits for name in split.classes}
        if absent := sorted(seen - set(pool.classes)):
            said.append(f"calibration: no sample of class {', '.join(absent)}, which other splits hold")
        return said

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """What `to_json` wrote."""
        values = json.loads(text)
        return cls(
            splits=tuple(SplitClasses(**split) for split in values["splits"]),
            chosen=tuple(values["chosen"]),
            subset=SplitClasses(**values["subset"]),
            ranges=values["ranges"],
            pairs=tuple(Pair(**pair) for pair in values["pairs"]),
            limits=Thresholds(**values["limits"]),
        )

    def to_dict(self) -> dict[str, Any]:
        narrowest = self.narrowest
        return {
            "splits": {split.name: split.to_dict() for split in self.splits},
            "calibration": {
                **self.subset.to_dict(),
                "pool": self.splits[0].samples,
                "chosen": list(self.chosen),
                "ranges": dict(self.ranges),
                "narrowest": None if narrowest is None else {"tensor": narrowest[0], "share": narrowest[1]},
            },
            "near_duplicates": {
                "cosine": self.limits.cosine,
                "likeness": self.limits.likeness,
                "ratio": self.limits.ratio,
                "between": {" and ".join(names): len(pairs) for names, pairs in self.leaks().items()},
                "inside": {name: len(pairs) for name, pairs in self.repeats().items()},
                "worst": [pair.to_dict() for pair in _worst(self.pairs)],
            },
        }


def of_job(job: Job, progress: Progress = silent) -> DataReport:
    """The report on a job's splits, with its model traced and folded first."""
    traced = graph.trace(job.model.module, calling.feed(job.model.module, job.calibration.example()))
    return survey(job, fold.fold_batchnorm(job.model.module, traced), traced, progress)


def survey(job: Job, model: nn.Module, traced: LayerGraph, progress: Progress = silent) -> DataReport:
    """One pass of every split through the folded model, then the choice and the comparisons.

    Raises:
        DataError, ModelError: inputs that the model cannot take.
    """
    observer = Observer(model, traced)
    observed = [observer.split(split, progress) for split in job.splits]
    progress("compare samples", 0, 2)
    pool = observed[0]
    chosen = choose(pool.features, _subset_size(job, len(pool)))
    likeness = Likeness.of(stack([split.sketches for split in observed]))
    centre = np.concatenate([split.features for split in observed]).mean(axis=0)
    limits = duplicates.thresholds(observer, job.calibration, pool, likeness, centre)
    progress("compare samples", 1, 2)
    pairs = duplicates.find(observed, limits, likeness, centre)
    progress("compare samples", 2, 2)
    return DataReport(
        splits=tuple(_classes(split, job.labels) for split in observed),
        chosen=tuple(int(i) for i in chosen),
        subset=_classes(pool, job.labels, chosen),
        ranges=_ranges(pool, chosen),
        pairs=pairs,
        limits=limits,
    )


def _subset_size(job: Job, pool: int) -> int:
    """As many as were asked for; without a selection split some must be left to judge the quantized outputs on."""
    left = 0 if job.selection is not None else min(HELD, pool // 4)
    wanted = pool if job.options.calib_size == ALL else int(job.options.calib_size)
    return min(wanted, pool - left)


def choose(features: Floats, size: int) -> Ints:
    """Places of ``size`` samples that cover the features, ascending; of all where there are no more."""
    count = len(features)
    if count <= size:
        return np.arange(count)
    centred = features - features.mean(axis=0)
    taken = [int((centred**2).sum(axis=1).argmin())]
    distances = np.full(count, np.inf)
    while len(taken) < size:
        distances = np.minimum(distances, ((centred - centred[taken[-1]]) ** 2).sum(axis=1))
        distances[taken] = -1.0  # once is enough where all that is left equals what was taken
        taken.append(int(distances.argmax()))
    return np.sort(np.array(taken))


def _classes(split: Observed, labels: Sequence[str], chosen: Ints | None = None) -> SplitClasses:
    answers = split.classes if split.classes is None or chosen is None else split.classes[chosen]
    counted = Counter() if answers is None else Counter(int(answer) for answer in answers)
    names = {labels[c] if c < len(labels) else str(c): n for c, n in sorted(counted.items())}
    return SplitClasses(split.name, len(split) if chosen is None else len(chosen), split.labelled, names)


def _ranges(pool: Observed, chosen: Ints) -> dict[str, float]:
    whole = pool.high.max(axis=0) - pool.low.min(axis=0)
    part = pool.high[chosen].max(axis=0) - pool.low[chosen].min(axis=0)
    shares = np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), 1.0)
    return {name: round(float(share), 4) for name, share in zip(pool.tensors, shares, strict=True)}


def _worst(pairs: Sequence[Pair]) -> list[Pair]:
    """The few that are listed: leakage before repetition."""
    return sorted(pairs, key=lambda pair: pair.first == pair.second)[:_WORST]
