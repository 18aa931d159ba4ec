"""How good a model is, judged the way an inspection line is judged.

A `Metric` turns labels and raw outputs into one number. Where one class is the *positive* one (the defect), the
original's decision threshold is tuned on the selection split, and an arm's near the point where it decides as often for
the positive class as the original does there: tuned freely it would follow the noise of a few hundred samples and flip
decisions that the arm did not change. Thresholds stand in the manifest; the test split changes none of them.

Differences between an arm and the dense original are paired (the same samples), so their interval is that of a paired
difference: Newcombe's hybrid score interval (method 10) where the metric counts decisions, a stratified paired
bootstrap elsewhere.

Sources: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
data", Statistics in Medicine 17 (1998); G. Y. Zou and A. Donner, "Construction of confidence limits about effect
measures", Statistics in Medicine 27 (2008), for adding up the classes of a balanced accuracy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import user_code
from .device.decode import decide, probabilities
from .errors import ConfigError, DataError, did_you_mean

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_Z95 = 1.959963984540054
_RESAMPLES = 2000
_NEARBY = 0.02  # of the samples: how far an arm may go from the original's number of positive decisions
_MOST_THRESHOLDS = 2000  # finer steps than this cannot be told apart on a selection split


@dataclass(frozen=True, slots=True)
class Predictions:
    """Raw outputs of one arm on one split.

    Attributes:
        outputs: what the model returned, (samples, …); (samples, classes) logits for a classifier.
        labels: the true class of each sample, (samples,), or of each pixel, (samples, height, width).
        positive: index of the class whose detection matters (the defect), or None.
    """

    outputs: npt.NDArray[np.floating]
    labels: Ints
    positive: int | None = None

    def __post_init__(self) -> None:
        if len(self.outputs) != len(self.labels):
            raise DataError("labels", expected=f"one per sample ({len(self.outputs)})", got=str(len(self.labels)))

    @property
    def scores(self) -> Floats:
        """Probability of the positive class, (samples,) or (samples, height, width)."""
        if self.positive is None:
            raise ConfigError(
                "metric",
                expected="a positive class",
                got="none was named",
                hint="name it: --positive CLASS, such as defective",
            )
        return np.asarray(probabilities(np.asarray(self.outputs), self.positive)[:, self.positive], np.float64)

    @property
    def truth(self) -> npt.NDArray[np.bool_]:
        """Whether each sample or pixel is positive, in the shape of the labels."""
        return np.asarray(self.labels == self.positive)

    def decisions(self, threshold: float | None) -> Ints:
        """The class each sample or pixel is given, by the rule that the board decides with."""
        shares = probabilities(np.asarray(self.outputs), self.positive)
        return np.asarray(decide(shares, self.positive, threshold), np.int64)

    def correct(self, threshold: float | None) -> npt.NDArray[np.bool_]:
        return np.asarray(self.decisions(threshold) == self.labels)

    def take(self, index: Ints) -> Predictions:
        return Predictions(self.outputs[index], self.labels[index], self.positive)


class Metric:
    """One number for a set of predictions. Subclasses say which way is better and how a threshold is tuned.

    ``contract`` is that of the models it judges; empty for any.
    """

    name = "metric"
    contract = "classify"
    higher_is_better = True

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        raise TypeError(f"{type(self).__name__} must define value()")

    def tune(self, selection: Predictions) -> float | None:
        """The decision threshold for this metric, from the selection split only."""
        if selection.positive is None:
            return None
        scores = selection.scores
        candidates = _midpoints(scores)
        values = np.array([self.value(selection, float(t)) for t in candidates])
        best = np.flatnonzero(values >= values.max() - 1e-12)
        return float(candidates[best[len(best) // 2]])  # the middle of the plateau is the most robust choice

    def transfer(self, reference: Predictions, threshold: float | None, selection: Predictions) -> float | None:
        """An arm's threshold on the selection split: the best one among those that call about as many samples positive
        as the original does (`_NEARBY` of all more or fewer), the nearest to that number where several are best."""
        if threshold is None:
            return None
        scores = np.sort(selection.scores)[::-1]
        edges = np.concatenate([[scores[0] + 1e-9], (scores[:-1] + scores[1:]) / 2.0, [scores[-1] - 1e-9]])
        count = int((reference.scores >= threshold).sum())
        reach = math.ceil(_NEARBY * len(scores))
        near = sorted(range(max(0, count - reach), min(len(scores), count + reach) + 1), key=lambda c: abs(c - count))
        sign = 1.0 if self.higher_is_better else -1.0
        best = max(near, key=lambda c: sign * self.value(selection, float(edges[c])))  # max keeps the first of equals
        return float(edges[best])

    def drop(self, reference: float, value: float) -> float:
        """How much worse ``value`` is than ``reference``; positive is worse (percentage points)."""
        change = reference - value if self.higher_is_better else value - reference
        return change * 100.0

    def interval(self, reference: Predictions, other: Predictions, thresholds: Thresholds) -> tuple[float, float]:
        """95 % interval of the paired drop, by a bootstrap that resamples within classes."""
        rng = np.random.default_rng(0)
        groups = [np.flatnonzero(reference.labels == c) for c in np.unique(reference.labels)]
        drops = np.empty(_RESAMPLES)
        for i in range(_RESAMPLES):
            index = np.concatenate([rng.choice(g, size=len(g)) for g in groups])
            drops[i] = self.drop(
                self.value(reference.take(index), thresholds[0]), self.value(other.take(index), thresholds[1])
            )
        low, high = np.quantile(drops, [0.025, 0.975])
        return float(low), float(high)


Thresholds = tuple[float | None, float | None]


class Accuracy(Metric):
    """Share of right decisions."""

    name = "accuracy"

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        return float(predictions.correct(threshold).mean())

    def interval(self, reference: Predictions, other: Predictions, thresholds: Thresholds) -> tuple[float, float]:
        low, high = paired_interval(reference.correct(thresholds[0]), other.correct(thresholds[1]))
        return low * 100.0, high * 100.0


class BalancedAccuracy(Metric):
    """Mean over the classes of the share of that class that is decided rightly (mean recall)."""

    name = "balanced_accuracy"

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        correct = predictions.correct(threshold)
        return float(np.mean([correct[group].mean() for group in self._groups(predictions)]))

    def interval(self, reference: Predictions, other: Predictions, thresholds: Thresholds) -> tuple[float, float]:
        before, after = reference.correct(thresholds[0]), other.correct(thresholds[1])
        groups = self._groups(reference)
        below = above = total = 0.0
        for group in groups:
            difference = float(before[group].mean() - after[group].mean())
            low, high = paired_interval(before[group], after[group])
            total += difference / len(groups)
            below += ((difference - low) / len(groups)) ** 2
            above += ((high - difference) / len(groups)) ** 2
        return (total - math.sqrt(below)) * 100.0, (total + math.sqrt(above)) * 100.0

    @staticmethod
    def _groups(predictions: Predictions) -> list[Ints]:
        return [np.flatnonzero(predictions.labels == c) for c in np.unique(predictions.labels)]


class Auroc(Metric):
    """Area under the ROC curve: the chance that a defect scores above a good part (ties count half)."""

    name = "auroc"

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        truth, scores = predictions.truth, predictions.scores
        positives, negatives = int(truth.sum()), int((~truth).sum())
        if not positives or not negatives:
            raise DataError("auroc", expected="samples of both classes", got=f"{positives} positive, {negatives} other")
        _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]  # mid-ranks, so that ties count half
        return float((ranks[truth].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))

    def tune(self, selection: Predictions) -> float | None:
        return BalancedAccuracy().tune(selection)  # the area needs no threshold, the board that decides does


class Escape(Metric):
    """Escape rate (share of defects let through) at a threshold that keeps overkill (good parts rejected) in bounds."""

    higher_is_better = False

    def __init__(self, overkill: float) -> None:
        self.overkill = overkill
        self.name = f"escape@overkill={overkill * 100:g}%"

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        truth = predictions.truth
        if not truth.any():
            raise DataError(self.name, expected="at least one positive sample", got="none")
        limit = self.tune(predictions) if threshold is None else threshold
        return float((predictions.scores[truth] < limit).mean())

    def tune(self, selection: Predictions) -> float:
        """Lowest threshold whose overkill on the selection split stays within the bound."""
        good = np.sort(selection.scores[~selection.truth])
        if not len(good):
            raise DataError(self.name, expected="samples that are not positive", got="none")
        allowed = math.floor(self.overkill * len(good) + 1e-9)
        # with `allowed` good parts at or above the threshold, it lies just above the next lower one
        return float(np.nextafter(good[len(good) - allowed - 1], np.inf))

    def transfer(self, reference: Predictions, threshold: float | None, selection: Predictions) -> float:
        return self.tune(selection)  # the bound on overkill has to hold for the arm itself

    def interval(self, reference: Predictions, other: Predictions, thresholds: Thresholds) -> tuple[float, float]:
        defects = np.flatnonzero(reference.truth)
        before, after = reference.correct(thresholds[0])[defects], other.correct(thresholds[1])[defects]
        low, high = paired_interval(before, after)  # escapes rise where right decisions fall
        return low * 100.0, high * 100.0


class Iou(Metric):
    """Intersection over union of the pixels of the positive class, all pictures of a split together; of each class, and
    their mean, where none is positive."""

    name = "iou"
    contract = "segment"

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        return float(_ratio(self._counts(predictions, threshold).sum(axis=0)))

    def tune(self, selection: Predictions) -> float | None:
        if selection.positive is None:
            return None
        edges, values = self._curve(selection)
        return float(edges[values.argmax()])

    def transfer(self, reference: Predictions, threshold: float | None, selection: Predictions) -> float | None:
        """As for classes, but `_NEARBY` is a share of the pixels that the original calls positive: they are few."""
        if threshold is None:
            return None
        count = int((reference.scores >= threshold).sum())
        edges, values = self._curve(selection)
        reach = math.ceil(_NEARBY * count)
        first = max(0, count - reach)
        near = values[first : count + reach + 1]
        best = np.flatnonzero(near >= near.max() - 1e-12) + first
        return float(edges[best[np.abs(best - count).argmin()]])

    def interval(self, reference: Predictions, other: Predictions, thresholds: Thresholds) -> tuple[float, float]:
        """By a bootstrap over pictures: pixels of one picture are not independent."""
        before, after = (self._counts(p, t) for p, t in zip((reference, other), thresholds, strict=True))
        rng = np.random.default_rng(0)
        drops = np.empty(_RESAMPLES)
        for i in range(_RESAMPLES):
            index = rng.integers(len(before), size=len(before))
            drops[i] = self.drop(_ratio(before[index].sum(axis=0)), _ratio(after[index].sum(axis=0)))
        low, high = np.quantile(drops, [0.025, 0.975])
        return float(low), float(high)

    @staticmethod
    def _counts(predictions: Predictions, threshold: float | None) -> Ints:
        """(samples, classes, 2): pixels in the intersection and in the union."""
        decided, truth = predictions.decisions(threshold), predictions.labels
        if decided.shape != truth.shape:
            raise DataError("labels", expected=f"one per pixel, {decided.shape}", got=str(truth.shape))
        classes = max(predictions.outputs.shape[1], 2)
        sought = range(classes) if predictions.positive is None else [predictions.positive]
        pairs = [((decided == c) & (truth == c), (decided == c) | (truth == c)) for c in sought]
        return np.array([[part.sum(axis=(1, 2)) for part in pair] for pair in pairs]).transpose(2, 0, 1)

    @staticmethod
    def _curve(predictions: Predictions) -> tuple[Floats, Floats]:
        """Thresholds that call 0, 1, 2 … pixels positive, and the ratio at each; -1 where equal scores allow none."""
        scores, truth = predictions.scores.ravel(), predictions.truth.ravel()
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
        hits = np.concatenate([[0], np.cumsum(truth[order])])
        union = truth.sum() + np.arange(len(scores) + 1) - hits
        edges = np.concatenate([[scores[0] + 1e-9], (scores[:-1] + scores[1:]) / 2.0, [scores[-1] - 1e-9]])
        apart = np.concatenate([[True], scores[:-1] > scores[1:], [True]])
        return edges, np.where(apart, hits / np.maximum(union, 1), -1.0)


def _ratio(counts: npt.NDArray[Any]) -> float:
    """Mean over the classes of intersection over union, of (classes, 2) pixels; a class that is nowhere is left out."""
    present = counts[counts[:, 1] > 0]
    return float((present[:, 0] / present[:, 1]).mean()) if len(present) else 1.0


class NearestNeighbour(Metric):
    """Share of samples whose nearest other one, by the cosine of their vectors, is of the same class."""

    name = "nearest_neighbour"
    contract = "embed"

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        return float(self._hits(predictions).mean())

    def tune(self, selection: Predictions) -> float | None:
        return None

    def interval(self, reference: Predictions, other: Predictions, thresholds: Thresholds) -> tuple[float, float]:
        low, high = paired_interval(self._hits(reference), self._hits(other))
        return low * 100.0, high * 100.0

    @staticmethod
    def _hits(predictions: Predictions) -> npt.NDArray[np.bool_]:
        vectors = np.asarray(predictions.outputs, np.float64)
        if vectors.ndim != 2 or len(vectors) < 2:
            raise DataError("nearest_neighbour", expected="vectors of two samples or more", got=str(vectors.shape))
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        near = vectors @ vectors.T
        np.fill_diagonal(near, -np.inf)
        return np.asarray(predictions.labels[near.argmax(axis=1)] == predictions.labels)


class Custom(Metric):
    """``function(labels, outputs) -> float``: a score from 0 to 1, higher is better, so that a drop is in points."""

    contract = ""

    def __init__(self, reference: str, function: Callable[..., Any]) -> None:
        self.name = reference
        self.function = function

    def value(self, predictions: Predictions, threshold: float | None) -> float:
        what = f"metric {self.name}(labels, outputs)"
        value = user_code.call(self.function, ConfigError, what, predictions.labels, predictions.outputs)
        try:
            value = float(value)
        except (TypeError, ValueError) as e:
            raise ConfigError(what, expected="a number", got=type(value).__name__) from e
        if not 0.0 <= value <= 1.0:
            raise ConfigError(what, expected="a score from 0 to 1, higher is better", got=str(value))
        return value

    def tune(self, selection: Predictions) -> float | None:
        return None if selection.positive is None else BalancedAccuracy().tune(selection)


_ESCAPE = re.compile(r"escape@overkill=(\d+(?:\.\d+)?)%?")


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: for a name that is neither a built-in metric nor an importable ``module:function``.
    """
    built_in: dict[str, type[Metric]] = {m.name: m for m in (Accuracy, BalancedAccuracy, Auroc, Iou, NearestNeighbour)}
    if name in built_in:
        return built_in[name]()
    escape = _ESCAPE.fullmatch(name)
    if escape:
        overkill = float(escape[1]) / 100.0
        if not 0.0 <= overkill < 1.0:
            raise ConfigError("metric", expected="an overkill from 0 % to below 100 %", got=name)
        return Escape(overkill)
    if ":" in name:
        return Custom(name, user_code.resolve(name, ConfigError, "metric"))
    raise ConfigError(
        "metric",
        expected=f"{', '.join(built_in)}, escape@overkill=1% or module:function",
        got=repr(name),
        hint=did_you_mean(name, [*built_in, "escape@overkill=1%"]),
    )


def paired_interval(
    before: Sequence[bool] | npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    """95 % interval of the difference of two paired proportions, ``mean(before) − mean(after)`` (Newcombe's method 10).

    Unlike a bootstrap it stays honest where no decision flipped: the interval does not collapse to a point.
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    n = len(first)
    if not n:
        raise DataError("paired interval", expected="at least one sample", got="none")
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (l1, u1), (l2, u2) = _wilson(p1, n), _wilson(p2, n)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    if product == 0:
        phi = 0.0
    else:  # a positive correlation is taken with continuity correction, as the source advises
        phi = (max(cross - n / 2.0, 0.0) if cross > 0 else float(cross)) / math.sqrt(product)
    low = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    high = (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2
    return p1 - p2 - math.sqrt(max(low, 0.0)), p1 - p2 + math.sqrt(max(high, 0.0))


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """How much worse an arm is than the dense original on the same samples (percentage points)."""

    drop: float
    low: float
    high: float
    flips: int | None
    flips_bad: int | None


def paired_drop(metric: Metric, reference: Predictions, other: Predictions, thresholds: Thresholds) -> PairedDrop:
    """Drop, its 95 % interval, how many decisions differ, and how many of those went from right to wrong."""
    drop = metric.drop(metric.value(reference, thresholds[0]), metric.value(other, thresholds[1]))
    low, high = metric.interval(reference, other, thresholds)
    if reference.outputs.ndim != 2 or metric.contract not in ("classify", ""):
        return PairedDrop(drop, low, high, None, None)  # nothing is decided here
    flipped = reference.decisions(thresholds[0]) != other.decisions(thresholds[1])
    spoiled = reference.correct(thresholds[0]) & ~other.correct(thresholds[1])
    return PairedDrop(drop, low, high, int(flipped.sum()), int(spoiled.sum()))


def _wilson(p: float, n: int) -> tuple[float, float]:
    centre = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n)) / (1 + _Z95**2 / n)
    return centre - half, centre + half


def _midpoints(scores: Floats) -> Floats:
    """Every threshold that can change a decision: between neighbouring scores, and one outside each end."""
    distinct = np.unique(scores)
    if len(distinct) > _MOST_THRESHOLDS:
        distinct = np.unique(np.quantile(distinct, np.linspace(0.0, 1.0, _MOST_THRESHOLDS)))
    return np.concatenate([[distinct[0] - 1e-9], (distinct[1:] + distinct[:-1]) / 2.0, [distinct[-1] + 1e-9]])
