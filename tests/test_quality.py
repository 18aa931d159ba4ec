from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge import quality
from rowcol_edge.errors import ConfigError, DataError
from rowcol_edge.quality import Predictions, metric, paired_drop, paired_interval


def binary(scores: list[float], truth: list[int]) -> Predictions:
    """Logits whose softmax gives exactly these probabilities of class 1."""
    p = np.clip(np.array(scores), 1e-9, 1 - 1e-9)
    return Predictions(np.stack([np.log(1 - p), np.log(p)], axis=1), np.array(truth, np.int64), positive=1)


def test_accuracy_and_balanced_accuracy_differ_on_uneven_classes() -> None:
    predictions = Predictions(np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 1]))
    assert metric("accuracy").value(predictions, None) == 0.75
    assert metric("balanced_accuracy").value(predictions, None) == 0.5


def test_auroc_counts_ties_half() -> None:
    assert metric("auroc").value(binary([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]), None) == pytest.approx(0.875)


def test_auroc_of_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="both classes"):
        metric("auroc").value(binary([0.1, 0.2], [1, 1]), None)


def test_escape_threshold_keeps_overkill_within_its_bound() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0] * 200 + [1] * 100)
    selection = binary(list(np.clip(rng.normal(0.35 + 0.3 * truth, 0.15), 0.001, 0.999)), list(truth))
    escape = metric("escape@overkill=1%")
    threshold = escape.tune(selection)
    assert threshold is not None
    overkill = (selection.scores[~selection.truth] >= threshold).mean()
    assert overkill <= 0.01
    lower = np.nextafter(np.sort(selection.scores[~selection.truth])[-3], 0)  # one good part more is over the bound
    assert (selection.scores[~selection.truth] >= lower).mean() > 0.01
    assert escape.value(selection, threshold) == (selection.scores[selection.truth] < threshold).mean()


def test_escape_falls_when_quality_rises_so_a_rise_is_a_drop() -> None:
    assert metric("escape@overkill=1%").drop(0.10, 0.12) == pytest.approx(2.0)
    assert metric("accuracy").drop(0.90, 0.88) == pytest.approx(2.0)


def test_tuned_threshold_is_best_and_in_the_middle_of_its_plateau() -> None:
    predictions = binary([0.1, 0.2, 0.3, 0.7, 0.8], [0, 0, 0, 1, 1])
    threshold = metric("balanced_accuracy").tune(predictions)
    assert threshold == pytest.approx(0.5)
    assert metric("balanced_accuracy").value(predictions, threshold) == 1.0


def test_an_arm_decides_as_often_for_the_positive_class_as_the_original() -> None:
    rng = np.random.default_rng(3)
    truth = list(rng.integers(0, 2, 200))
    scores = np.clip(rng.normal(0.4 + 0.2 * np.array(truth), 0.2), 0.01, 0.99)
    original, arm = (
        binary(list(scores), truth),
        binary(list(scores**2), truth),
    )  # the arm scores lower, in the same order
    chosen = metric("balanced_accuracy")
    threshold = chosen.tune(original)
    transferred = chosen.transfer(original, threshold, arm)
    assert (original.decisions(threshold) == arm.decisions(transferred)).all()
    assert chosen.transfer(original, None, arm) is None


def test_an_arm_is_tuned_no_further_than_nearby() -> None:
    truth = [0] * 50 + [1] * 50
    original = binary([0.2] * 50 + [0.8] * 50, truth)
    rng = np.random.default_rng(4)
    noise = binary(list(rng.random(100)), truth)  # an arm that knows nothing: its best threshold could be anywhere
    transferred = metric("balanced_accuracy").transfer(original, 0.5, noise)
    assert abs(int((noise.scores >= transferred).sum()) - 50) <= 2


def test_escape_keeps_its_own_bound_on_every_arm() -> None:
    truth = [0] * 100 + [1] * 20
    arm = binary([i / 200 for i in range(100)] + [0.4 + i / 100 for i in range(20)], truth)
    escape = metric("escape@overkill=2%")
    assert escape.transfer(arm, 0.9, arm) == escape.tune(arm)


def test_without_a_positive_class_nothing_is_tuned_and_scores_are_refused() -> None:
    predictions = Predictions(np.eye(3), np.arange(3))
    assert metric("accuracy").tune(predictions) is None
    with pytest.raises(ConfigError, match="positive"):
        _ = predictions.scores


@pytest.mark.parametrize(
    "name", ["acuracy", "escape@overkill=200%", "no.such.module:f", "json:nothing", "json:decoder"]
)
def test_a_metric_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        metric(name)


def test_custom_metric_is_called_with_labels_and_outputs() -> None:
    custom = quality.Custom("here:f", lambda labels, outputs: float((outputs.argmax(1) == labels).mean()))
    assert custom.value(Predictions(np.eye(3), np.array([0, 1, 0])), None) == pytest.approx(2 / 3)


@pytest.mark.parametrize("value", [float("nan"), 2.0, -0.1, "good", None])
def test_a_custom_metric_that_is_no_score_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="metric here:f"):
        quality.Custom("here:f", lambda labels, outputs: value).value(Predictions(np.eye(2), np.arange(2)), None)


def test_a_custom_metric_that_raises_is_named() -> None:
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        quality.Custom("here:f", lambda labels, outputs: 1 / 0).value(Predictions(np.eye(2), np.arange(2)), None)


def test_one_logit_decides_between_two_classes() -> None:
    predictions = Predictions(np.array([[-2.0], [3.0], [0.5]]), np.array([0, 1, 0]), positive=1)
    assert predictions.decisions(None).tolist() == [0, 1, 1]
    assert predictions.decisions(0.7).tolist() == [0, 1, 0]


def test_a_threshold_among_many_classes_decides_as_the_board_does() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]))
    predictions = Predictions(logits, np.array([1, 0]), positive=2)
    assert predictions.decisions(0.4).tolist() == [1, 0]
    assert predictions.decisions(0.3 - 1e-9).tolist() == [2, 2]


def test_newcombe_interval_agrees_with_a_calculation_by_hand() -> None:
    """36/12/2/0 of 50 pairs: Wilson limits 0.8654–0.9890 and 0.6259–0.8570, φ = −24/√(48·12·38·2) = −0.1147."""
    before = np.array([True] * 36 + [True] * 12 + [False] * 2)
    after = np.array([True] * 36 + [False] * 12 + [True] * 2)
    low, high = paired_interval(before, after)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-4)


def test_no_flip_still_leaves_an_interval() -> None:
    same = np.array([True] * 380 + [False] * 40)
    low, high = paired_interval(same, same)
    assert low < 0 < high


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=80))
def test_interval_holds_the_estimate_and_mirrors(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    low, high = paired_interval(a, b)
    assert low <= a.mean() - b.mean() <= high
    mirrored = paired_interval(b, a)
    assert (-mirrored[1], -mirrored[0]) == pytest.approx((low, high))


def test_interval_covers_in_simulation() -> None:
    rng = np.random.default_rng(1)
    n, hits, runs = 200, 0, 600
    for _ in range(runs):
        before = rng.random(n) < 0.88
        after = np.where(rng.random(n) < 0.06, ~before, before)  # 6 % of the decisions flip
        truth = 0.88 - (0.88 * 0.94 + 0.12 * 0.06)
        low, high = paired_interval(before, after)
        hits += low <= truth <= high
    assert hits / runs >= 0.93


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "auroc", "escape@overkill=5%"])
def test_paired_drop_of_a_model_with_itself_is_zero(name: str) -> None:
    rng = np.random.default_rng(2)
    truth = list(rng.integers(0, 2, 120))
    one = binary(list(np.clip(rng.normal(0.4 + 0.2 * np.array(truth), 0.2), 0.01, 0.99)), truth)
    chosen = metric(name)
    threshold = chosen.tune(one)
    found = paired_drop(chosen, one, one, (threshold, threshold))
    assert (found.drop, found.flips, found.flips_bad) == (0.0, 0, 0)
    assert found.low <= 0.0 <= found.high


def test_flips_count_changed_decisions_and_the_spoiled_ones() -> None:
    truth = [0, 0, 1, 1]
    before, after = binary([0.1, 0.2, 0.9, 0.8], truth), binary([0.1, 0.7, 0.2, 0.8], truth)
    found = paired_drop(metric("accuracy"), before, after, (0.5, 0.5))
    assert (found.flips, found.flips_bad) == (2, 2)
    assert found.drop == pytest.approx(50.0)


def masks(shares: np.ndarray, truth: np.ndarray, positive: int | None = 1) -> Predictions:
    """One logit a pixel, (N, 1, H, W), whose sigmoid gives these shares."""
    p = np.clip(shares, 1e-9, 1 - 1e-9)
    return Predictions(np.log(p / (1 - p))[:, None], truth.astype(np.int64), positive)


def test_iou_adds_up_the_pixels_of_all_pictures() -> None:
    truth = np.zeros((2, 2, 4), np.int64)
    truth[0, 0] = 1  # 4 pixels, of which 3 are found; and one that is none
    shares = np.zeros((2, 2, 4))
    shares[0, 0, :3] = shares[1, 1, 0] = 0.9
    assert metric("iou").value(masks(shares, truth), 0.5) == pytest.approx(3 / 5)
    both = (3 / 5 + 11 / 13) / 2
    assert metric("iou").value(masks(shares, truth, positive=None), None) == pytest.approx(both)


def test_iou_of_nothing_found_where_nothing_is_is_perfect() -> None:
    assert metric("iou").value(masks(np.zeros((1, 3, 3)), np.zeros((1, 3, 3))), 0.5) == 1.0


def test_iou_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((3, 6, 6)) < 0.3
    predictions = masks(np.clip(rng.normal(0.3 + 0.3 * truth, 0.2).round(2), 0.01, 0.99), truth)  # rounded: with ties
    iou = metric("iou")
    best = max(iou.value(predictions, float(t)) for t in np.linspace(0.0, 1.0, 401))
    assert iou.value(predictions, iou.tune(predictions)) == pytest.approx(best)


def test_iou_threshold_of_an_arm_stays_near_the_pixels_that_the_original_finds() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((4, 20, 20)) < 0.2
    shares = np.clip(rng.normal(0.3 + 0.3 * truth, 0.15), 0.01, 0.99)
    iou, original = metric("iou"), masks(shares, truth)
    moved = masks(shares**2, truth)  # the same order, other numbers
    threshold = iou.tune(original)
    found = iou.transfer(original, threshold, moved)
    assert threshold is not None
    assert found is not None
    count, other = (int((p.scores >= t).sum()) for p, t in ((original, threshold), (moved, found)))
    assert abs(other - count) <= np.ceil(0.02 * count)
    assert iou.value(moved, found) >= iou.value(original, threshold) - 1e-12
    assert iou.transfer(original, None, moved) is None


def test_iou_interval_holds_the_drop_and_counts_no_flips() -> None:
    rng = np.random.default_rng(2)
    truth = rng.random((30, 8, 8)) < 0.3
    good, bad = (masks(np.clip(rng.normal(0.3 + 0.4 * truth, sd), 0.01, 0.99), truth) for sd in (0.1, 0.3))
    drop = paired_drop(metric("iou"), good, bad, (0.5, 0.5))
    assert 0 < drop.low < drop.drop < drop.high
    assert drop.flips is None
    same = paired_drop(metric("iou"), good, good, (0.5, 0.5))
    assert (same.drop, same.low, same.high) == (0.0, 0.0, 0.0)


def test_iou_refuses_labels_of_another_size() -> None:
    with pytest.raises(DataError, match="one per pixel"):
        metric("iou").value(masks(np.zeros((1, 4, 4)), np.zeros((1, 2, 2))), 0.5)


def test_nearest_neighbour_goes_by_direction_and_leaves_the_sample_itself_out() -> None:
    vectors = np.array([[1.0, 0.1], [9.0, 1.0], [0.0, 1.0], [0.2, 5.0], [1.0, 0.2]])
    near = metric("nearest_neighbour")
    assert near.value(Predictions(vectors, np.array([0, 0, 1, 1, 1])), None) == pytest.approx(4 / 5)
    assert near.value(Predictions(vectors * [[3], [1], [2], [1], [7]], np.array([0, 0, 1, 1, 1])), None) == 4 / 5
    with pytest.raises(DataError, match="two samples"):
        near.value(Predictions(vectors[:1], np.array([0])), None)


def test_nearest_neighbour_has_a_paired_interval_and_no_decisions_to_flip() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    vectors = np.eye(3)[labels] + rng.normal(0, 0.2, (60, 3))
    noisy = vectors + rng.normal(0, 0.6, (60, 3))
    drop = paired_drop(metric("nearest_neighbour"), *(Predictions(v, labels) for v in (vectors, noisy)), (None, None))
    assert drop.low < drop.drop < drop.high
    assert drop.drop > 0
    assert drop.flips is None
