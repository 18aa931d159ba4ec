"""From a model's raw outputs to an answer, as the manifest's contract says.

| contract | outputs[0], one sample | answer |
|---|---|---|
| ``classify`` | logits (1, C); or (1, 1): one logit for the positive label | label, each label's probability |
| ``segment`` | logits (1, C, H, W); or (1, 1, H, W) as above | label index a pixel, each label's share |
| ``anomaly_map`` | scores (1, 1, H, W) or (1, H, W), higher is worse | map, its maximum, label by the threshold |
| ``detect`` | rows x1, y1, x2, y2, score, class: (N, 6) or (1, N, 6) | boxes, best first |
| ``embed`` | a vector (1, D) or (D,) | the vector divided by its length |

Outputs are logits, never probabilities: softmax (or sigmoid) is applied here. With a positive label and a threshold,
the answer is the positive label exactly if its probability is ≥ the threshold, otherwise the most probable of the other
labels; without a threshold it is the most probable label. The positive label of a single logit is the last of the two
unless the manifest says otherwise. Only the first output is read; the others are there for :meth:`Predictor.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isfinite
from typing import Any

import numpy as np

from ..errors import BundleError, DataError

_Answer = Callable[[np.ndarray], "Prediction"]
_Whole = Callable[[np.ndarray, tuple[str, ...], "str | None", "float | None"], "Prediction"]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """An answer; which fields are set depends on the contract.

    ``score`` is the label's probability (classify) or the anomaly score; ``scores`` gives each label its probability
    (classify) or its share of the pixels (segment). ``map`` is (H, W): label indices (segment) or anomaly scores.
    ``boxes`` is (N, 6) float32.
    """

    contract: str
    label: str | None = None
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    map: np.ndarray | None = None
    boxes: np.ndarray | None = None
    box_labels: tuple[str, ...] = ()
    embedding: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; only the fields of the contract, arrays as nested lists."""
        values: dict[str, Any] = {"contract": self.contract}
        if self.label is not None:
            values["label"] = self.label
        if self.score is not None:
            values["score"] = self.score
        if self.scores:
            values["scores"] = dict(self.scores)
        if self.map is not None:
            values["map"] = self.map.tolist()
        if self.boxes is not None:
            values["boxes"] = [
                {"box": row[:4], "score": row[4], "label": label}
                for row, label in zip(self.boxes.tolist(), self.box_labels, strict=True)
            ]
        if self.embedding is not None:
            values["embedding"] = self.embedding.tolist()
        return values


def decoder(
    contract: str, labels: Sequence[str] = (), positive: str | None = None, threshold: float | None = None
) -> Callable[[np.ndarray], Prediction]:
    """What turns one sample's first output into the answer.

    Raises:
        BundleError: no such contract. When it is called: an output that does not fit the contract.
        DataError: when it is called: NaN or Inf in the output.
    """
    if contract not in _DECODERS:
        raise BundleError("contract", expected=f"one of {', '.join(_DECODERS)}", got=repr(contract))
    answer = _DECODERS[contract](tuple(labels), positive, threshold)

    def decode(array: np.ndarray) -> Prediction:
        if array.dtype.kind not in "fiu":
            raise BundleError(f"{contract} output", expected="numbers", got=str(array.dtype))
        return answer(array)

    return decode


def first(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output that is decoded. BundleError: there is none."""
    for array in outputs.values():
        return array
    raise BundleError("outputs", expected="at least one", got="none")


def decode(
    contract: str,
    outputs: Mapping[str, np.ndarray],
    labels: Sequence[str] = (),
    positive: str | None = None,
    threshold: float | None = None,
) -> Prediction:
    """One sample's outputs → the answer; see :func:`decoder`."""
    return decoder(contract, labels, positive, threshold)(first(outputs))


def probabilities(logits: np.ndarray, positive: int | None) -> np.ndarray:
    """Logits (N, C, …) → probabilities (N, C, …) float64 by softmax; C = 1 is one logit for the positive of two labels
    (the second, unless ``positive`` is 0) → C = 2."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:
        # a pair of logits (0, z) has the softmax (1 - sigmoid(z), sigmoid(z))
        pair = (np.zeros_like(logits), logits)
        logits = np.concatenate(pair[::-1] if positive == 0 else pair, axis=1)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def decide(probability: np.ndarray, positive: int | None, threshold: float | None) -> np.ndarray:
    """Probabilities (N, C, …) → label indices (N, …), by the rule in the module's docstring."""
    if positive is None or threshold is None:
        return np.asarray(probability.argmax(axis=1))
    others = probability.copy()
    others[:, positive] = -1.0
    return np.where(probability[:, positive] >= threshold, positive, others.argmax(axis=1))


def index_of(positive: str | None, labels: Sequence[str]) -> int | None:
    """Place of the positive label; None where there is none."""
    return labels.index(positive) if positive is not None and positive in labels else None


def _names(count: int, labels: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The label of each of ``count`` classes; a model without labels gets its indices."""
    if not labels:
        return tuple(str(i) for i in range(max(count, 2)))
    if len(labels) != (2 if count == 1 else count):
        raise BundleError(what, expected=f"one class for each of {len(labels)} labels", got=f"{count}")
    return labels


def _classifier(labels: tuple[str, ...], positive: str | None, threshold: float | None) -> _Answer:
    """`probabilities` and `decide` for one row, in plain Python: with the caches cold after a run, the calls of numpy
    take longer than the arithmetic on a handful of numbers."""

    def classify(array: np.ndarray) -> Prediction:
        if array.ndim != 2 or array.shape[0] != 1 or not array.shape[1]:
            raise _shape("classify", "logits (1, classes)", array)
        logits = array[0].tolist()
        if not isfinite(sum(logits)):
            raise _not_finite("classify")
        names = labels if len(labels) == len(logits) else _names(len(logits), labels, "classify output")
        sought = positive if positive in names and threshold is not None else None
        if len(logits) == 1:
            logits = [*logits, 0.0] if positive == names[0] else [0.0, *logits]
        peak = max(logits)
        weights = [exp(logit - peak) for logit in logits]
        total = sum(weights)
        scores = {name: weight / total for name, weight in zip(names, weights, strict=True)}
        if sought is not None and threshold is not None and scores[sought] >= threshold:
            label = sought
        else:
            label = max((name for name in names if name != sought), key=scores.__getitem__)
        return Prediction("classify", label=label, score=scores[label], scores=scores)

    return classify


def _segment(array: np.ndarray, labels: tuple[str, ...], positive: str | None, threshold: float | None) -> Prediction:
    if array.ndim != 4 or array.shape[0] != 1 or not array.size:
        raise _shape("segment", "logits (1, classes, height, width)", array)
    names = _names(array.shape[1], labels, "segment output")
    if threshold is None and array.shape[1] > 1:
        indices = array[0].argmax(axis=0)  # softmax keeps the order, so it can be left out
    else:
        place = index_of(positive, names)
        indices = decide(probabilities(array, place), place, threshold)[0]
    shares = np.bincount(indices.ravel(), minlength=len(names)) / indices.size
    small = indices.astype(np.uint8 if len(names) <= 256 else np.int32)
    return Prediction("segment", scores=dict(zip(names, shares.tolist(), strict=True)), map=small)


def _anomaly_map(
    array: np.ndarray, labels: tuple[str, ...], positive: str | None, threshold: float | None
) -> Prediction:
    if array.ndim not in (3, 4) or not array.size or any(size != 1 for size in array.shape[:-2]):
        raise _shape("anomaly_map", "scores (1, 1, height, width) or (1, height, width)", array)
    scores = array.reshape(array.shape[-2:]).astype(np.float32)
    score = float(scores.max())
    label = None
    if threshold is not None:
        bad = positive or (labels[1] if len(labels) == 2 else "anomalous")
        good = next((name for name in labels if name != bad), "normal")
        label = bad if score >= threshold else good
    return Prediction("anomaly_map", label=label, score=score, map=scores)


def _detect(array: np.ndarray, labels: tuple[str, ...], positive: str | None, threshold: float | None) -> Prediction:
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.shape[1] != 6:
        raise _shape("detect", "rows x1, y1, x2, y2, score, class: (N, 6)", array)
    boxes = array.astype(np.float32)
    if threshold is not None:
        boxes = boxes[boxes[:, 4] >= threshold]
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    classes = boxes[:, 5].astype(np.int64)
    if labels and classes.size and not 0 <= classes.min() <= classes.max() < len(labels):
        raise BundleError(
            "detect output", expected=f"classes 0 to {len(labels) - 1}", got=f"{classes.min()} to {classes.max()}"
        )
    names = tuple(labels[i] if labels else str(i) for i in classes.tolist())
    return Prediction("detect", boxes=boxes, box_labels=names)


def _embed(array: np.ndarray, labels: tuple[str, ...], positive: str | None, threshold: float | None) -> Prediction:
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or not array.size:
        raise _shape("embed", "a vector (1, D) or (D,)", array)
    vector = array.astype(np.float64)
    length = float(np.sqrt(vector @ vector))
    if not length:
        raise DataError("embed output", expected="a vector with a direction", got="all zeros")
    return Prediction("embed", embedding=(vector / length).astype(np.float32))


def _not_finite(contract: str) -> DataError:
    return DataError(
        f"{contract} output",
        expected="finite values",
        got="NaN or Inf",
        hint="check the input, or use an arm of higher precision",
    )


def _shape(contract: str, expected: str, array: np.ndarray) -> BundleError:
    hint = "decode one sample at a time" if array.ndim and array.shape[0] > 1 and contract != "detect" else ""
    return BundleError(f"{contract} output", expected=expected, got=str(array.shape), hint=hint)


def _checked(decode: _Whole, contract: str) -> Callable[[tuple[str, ...], str | None, float | None], _Answer]:
    """A decoder of whole arrays, which must be finite."""

    def bound(labels: tuple[str, ...], positive: str | None, threshold: float | None) -> _Answer:
        def answer(array: np.ndarray) -> Prediction:
            if not np.isfinite(array).all():
                raise _not_finite(contract)
            return decode(array, labels, positive, threshold)

        return answer

    return bound


_DECODERS = {
    "classify": _classifier,
    "segment": _checked(_segment, "segment"),
    "anomaly_map": _checked(_anomaly_map, "anomaly_map"),
    "detect": _checked(_detect, "detect"),
    "embed": _checked(_embed, "embed"),
}
