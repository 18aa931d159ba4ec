from __future__ import annotations

import json
from math import exp

import numpy as np
import pytest

from rowcol_edge.device.decode import Prediction, decide, decode, index_of, probabilities
from rowcol_edge.errors import BundleError, DataError

LABELS = ("good", "defective")


def one(array: object, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"output": np.asarray(array, dtype)}


def test_classify_gives_softmax_probabilities_and_the_most_probable_label() -> None:
    answer = decode("classify", one([[1.0, 3.0, 2.0]]), ("a", "b", "c"))
    total = exp(1) + exp(2) + exp(3)
    assert answer.label == "b"
    assert answer.score == pytest.approx(exp(3) / total)
    assert answer.scores == pytest.approx({"a": exp(1) / total, "b": exp(3) / total, "c": exp(2) / total})


def test_classify_survives_huge_logits_and_float16() -> None:
    assert decode("classify", one([[6e4, -6e4]], "float16"), LABELS).scores == {"good": 1.0, "defective": 0.0}


@pytest.mark.parametrize(
    ("threshold", "label"), [(0.2, "defective"), (0.25, "defective"), (0.2501, "good"), (None, "good")]
)
def test_the_threshold_decides_about_the_positive_label(threshold: float | None, label: str) -> None:
    logits = one([[np.log(0.75), np.log(0.25)]], "float64")
    answer = decode("classify", logits, LABELS, "defective", None if threshold is None else threshold - 1e-12)
    assert answer.label == label
    assert answer.score == pytest.approx(0.25 if label == "defective" else 0.75)


def test_exactly_at_the_threshold_is_positive() -> None:
    assert decode("classify", one([[0.0, 0.0]]), LABELS, "defective", 0.5).label == "defective"


def test_below_the_threshold_the_best_other_label_wins_even_if_the_positive_one_is_more_probable() -> None:
    logits = one(np.log([[0.1, 0.6, 0.3]]))
    assert decode("classify", logits, ("a", "bad", "c"), "bad", 0.7).label == "c"


@pytest.mark.parametrize(("positive", "labels"), [(None, LABELS), ("defective", LABELS), ("defective", LABELS[::-1])])
def test_a_single_logit_speaks_for_the_positive_label(positive: str | None, labels: tuple[str, ...]) -> None:
    answer = decode("classify", one([[2.0]]), labels, positive)
    assert answer.scores["defective"] == pytest.approx(1 / (1 + exp(-2)))
    assert answer.label == "defective"


def test_without_labels_the_index_is_the_label() -> None:
    assert decode("classify", one([[0.0, 1.0, 0.5]])).label == "1"


@pytest.mark.parametrize("shape", [(2, 2), (2,), (1, 2, 1), (1, 0), (1, 3)])
def test_classify_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="classify output"):
        decode("classify", one(np.zeros(shape)), LABELS)


def test_segment_gives_a_label_a_pixel_and_each_share() -> None:
    logits = np.zeros((1, 3, 2, 2), np.float32)
    logits[0, 2, 0, :] = 1
    logits[0, 1, 1, 1] = 1
    answer = decode("segment", one(logits), ("ground", "scratch", "dent"))
    assert answer.map is not None
    assert answer.map.dtype == np.uint8
    assert answer.map.tolist() == [[2, 2], [0, 1]]
    assert answer.scores == {"ground": 0.25, "scratch": 0.25, "dent": 0.5}


def test_segment_with_one_channel_or_a_threshold_decides_by_probability() -> None:
    single = one([[[[-1.0, 1.0]]]])
    assert decode("segment", single, LABELS).to_dict()["map"] == [[0, 1]]
    assert decode("segment", single, LABELS, "defective", 0.2).to_dict()["map"] == [[1, 1]]
    pair = one(np.log([[[[0.6]], [[0.4]]]]))
    assert decode("segment", pair, LABELS, "defective", 0.3).to_dict()["map"] == [[1]]


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 2, 4, 4), (1, 5, 4, 4), (1, 2, 0, 4)])
def test_segment_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="segment output"):
        decode("segment", one(np.zeros(shape)), LABELS)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (1, 2, 3), (1, 1, 1, 2, 3)])
def test_anomaly_map_scores_by_its_maximum(shape: tuple[int, ...]) -> None:
    scores = one(np.arange(6).reshape(shape))
    if len(shape) == 5:
        with pytest.raises(BundleError, match="anomaly_map output"):
            decode("anomaly_map", scores)
        return
    answer = decode("anomaly_map", scores, threshold=5.0)
    assert answer.to_dict() == {
        "contract": "anomaly_map",
        "label": "anomalous",
        "score": 5.0,
        "map": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
    }
    assert decode("anomaly_map", scores, threshold=5.1).label == "normal"
    assert decode("anomaly_map", scores, LABELS, "defective", 5.1).label == "good"
    assert decode("anomaly_map", scores).label is None


def test_detect_sorts_by_score_and_drops_what_is_below_the_threshold() -> None:
    rows = [[0, 0, 1, 1, 0.3, 0], [1, 1, 2, 2, 0.9, 1], [2, 2, 3, 3, 0.5, 1]]
    answer = decode("detect", one([rows]), LABELS, threshold=0.5)
    assert answer.box_labels == ("defective", "defective")
    assert [box["box"] for box in answer.to_dict()["boxes"]] == [[1, 1, 2, 2], [2, 2, 3, 3]]
    assert decode("detect", one(rows)).box_labels == ("1", "1", "0")


def test_detect_finds_nothing_in_no_rows() -> None:
    assert decode("detect", one(np.zeros((0, 6))), LABELS).to_dict()["boxes"] == []


@pytest.mark.parametrize("rows", [[[0, 0, 1, 1, 0.3]], [[0, 0, 1, 1, 0.3, 2]], [[0, 0, 1, 1, 0.3, -1]]])
def test_detect_refuses_other_rows(rows: list[list[float]]) -> None:
    with pytest.raises(BundleError, match="detect output"):
        decode("detect", one(rows), LABELS)


def test_embed_is_a_unit_vector() -> None:
    answer = decode("embed", one([[3.0, 4.0]]))
    assert answer.to_dict()["embedding"] == pytest.approx([0.6, 0.8])
    with pytest.raises(DataError, match="all zeros"):
        decode("embed", one([0.0, 0.0]))
    with pytest.raises(BundleError, match="one sample at a time"):
        decode("embed", one(np.ones((2, 3))))


@pytest.mark.parametrize("contract", ["classify", "segment", "anomaly_map", "detect", "embed"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_decided_from_nan(contract: str, value: float) -> None:
    with pytest.raises(DataError, match="NaN or Inf"):
        decode(contract, one([[0.0, value]]), LABELS)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(BundleError, match="contract"):
        decode("guess", one([[0.0, 1.0]]))
    with pytest.raises(BundleError, match="at least one"):
        decode("classify", {})
    with pytest.raises(BundleError, match="numbers"):
        decode("classify", {"output": np.array([["a", "b"]])})


def test_only_the_first_output_is_read() -> None:
    outputs = {"output": np.array([[0.0, 1.0]]), "features": np.full((4, 4), np.nan)}
    assert decode("classify", outputs, LABELS).label == "defective"


def test_every_answer_is_json() -> None:
    answers = [
        decode("classify", one([[0.0, 1.0]]), LABELS),
        decode("segment", one(np.zeros((1, 2, 2, 2))), LABELS),
        decode("anomaly_map", one(np.zeros((1, 2, 2)))),
        decode("detect", one([[0, 0, 1, 1, 0.5, 1]]), LABELS),
        decode("embed", one([1.0, 2.0])),
    ]
    for answer in answers:
        assert isinstance(answer, Prediction)
        assert json.loads(json.dumps(answer.to_dict(), allow_nan=False))["contract"] == answer.contract


@pytest.mark.parametrize("threshold", [None, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("positive", [None, "0", "1"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_one_sample_is_decided_as_many_are(width: int, positive: str | None, threshold: float | None) -> None:
    logits = np.random.default_rng(width).normal(size=(50, width), scale=3).astype(np.float32)
    names = [str(i) for i in range(max(width, 2))]
    place = index_of(positive, names)
    shares = probabilities(logits, place)
    chosen = decide(shares, place, threshold)
    for row, share, index in zip(logits, shares, chosen, strict=True):
        answer = decode("classify", one(row[None]), names, positive, threshold)
        assert answer.label == names[index]
        assert list(answer.scores.values()) == pytest.approx(share.tolist(), rel=1e-12)
