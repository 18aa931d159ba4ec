from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import rowcol_edge
from rowcol_edge import config, coverage, datasets, evaluation, job, models
from rowcol_edge.cli import app
from rowcol_edge.coverage import DataReport
from rowcol_edge.datasets import Split
from rowcol_edge.errors import ConfigError
from rowcol_edge.factoring import graph
from rowcol_edge.features import Observer
from rowcol_edge.sketches import Likeness, sketch

from .nets import frames, small_net


def textures(count: int, seed: int, size: int = 48) -> np.ndarray:
    """Noise with the spectrum of natural pictures: amplitude falls as the frequency rises."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.normal(0, 1, (count, size, size)))
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    pictures = np.fft.irfft2(spectrum / (radius + 0.03), s=(size, size))
    return (pictures / pictures.std())[:, None].astype(np.float32)


def save(folder: Path, **splits: np.ndarray) -> dict[str, Any]:
    for name, array in splits.items():
        np.savez(folder / f"{name}.npz", x=array)
    return {name: str(folder / f"{name}.npz") for name in splits}


def jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture[0] * 40 + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=70)
    return ((np.asarray(Image.open(buffer), np.float32) - 128) / 40)[None]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saved again": jpeg,
    "moved": lambda x: np.pad(x, ((0, 0), (1, 0), (0, 0)), mode="edge")[:, :-1],
    "mirrored": lambda x: x[:, :, ::-1],
    "brighter": lambda x: x * 1.2 + 0.3,
}


class Pooled(nn.Module):
    """Features that do not change much when a picture does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 32, 5, stride=2)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-6)
        mirrored = torch.relu(self.conv(x)) + torch.relu(self.conv(x.flip(3)))
        return self.head(mirrored.mean(dim=(2, 3)))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_in_another_split_is_found(change: str, tmp_path: Path) -> None:
    calib, test = textures(40, 0), textures(40, 1)
    test[7] = CHANGES[change](calib[11])
    report = rowcol_edge.data(Pooled(), **save(tmp_path, calib=calib, test=test))
    found = [(p.first, p.first_index, p.second, p.second_index) for p in report.pairs]
    assert found == [("calibration", 11, "test", 7)]
    assert report.notes()[0].startswith(
        "leakage: 1 near-duplicate(s) between calibration and test, e.g. calibration 11"
    )


def test_unrelated_samples_raise_no_alarm(tmp_path: Path) -> None:
    report = rowcol_edge.data(Pooled(), **save(tmp_path, calib=textures(60, 0), select=textures(60, 1)))
    assert report.pairs == ()
    assert report.notes() == []


def test_a_repeated_sample_inside_a_split_is_counted_but_is_no_leak(tmp_path: Path) -> None:
    calib = textures(40, 0)
    calib[30] = calib[3]
    report = rowcol_edge.data(Pooled(), **save(tmp_path, calib=calib))
    assert {name: len(pairs) for name, pairs in report.repeats().items()} == {"calibration": 1}
    assert report.leaks() == {}


@pytest.mark.parametrize("frames_of_it", [10, 30])
def test_a_burst_of_one_part_over_two_splits_is_found(frames_of_it: int, tmp_path: Path) -> None:
    rng, half = np.random.default_rng(0), frames_of_it // 2
    calib, test = textures(40, 0), textures(40, 1)
    burst = calib[:1] + rng.normal(0, 0.02, (frames_of_it, *calib.shape[1:])).astype(np.float32)
    calib[:half], test[:half] = burst[:half], burst[half:]
    report = rowcol_edge.data(Pooled(), **save(tmp_path, calib=calib, test=test))
    found = {(p.first, p.first_index, p.second, p.second_index) for p in report.pairs}
    wanted = {("calibration", i, "test", j) for i in range(half) for j in range(half)}
    wanted |= {(split, i, split, j) for split in ("calibration", "test") for j in range(half) for i in range(j)}
    assert found == wanted


def test_the_subset_takes_the_samples_farthest_apart() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(4) * 100, 25, axis=0)
    chosen = coverage.choose((centres + rng.normal(0, 1, (100, 4))).astype(np.float32), 4)
    assert sorted(chosen // 25) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [5, 100])
def test_a_small_pool_is_used_whole(size: int) -> None:
    assert coverage.choose(np.zeros((5, 3), np.float32), size).tolist() == [0, 1, 2, 3, 4]


def test_equal_features_still_give_different_samples() -> None:
    assert len(set(coverage.choose(np.ones((9, 3), np.float32), 4).tolist())) == 4


def test_batches_hold_the_chosen_samples_in_order() -> None:
    split = datasets.scan(Split("calibration", "", lambda: ((({"x": b}), None) for b in np.arange(12.0).reshape(3, 4))))
    got = [b["x"].tolist() for b in split.only((1, 2, 9))]
    assert got == [[1, 2], [9]]


def test_classes_ranges_and_the_record(tmp_path: Path) -> None:
    pictures, labels = frames(60, 0)
    np.savez(tmp_path / "calib.npz", x=pictures, labels=labels)
    report = rowcol_edge.data(small_net(), calib=str(tmp_path / "calib.npz"), calib_size=6, labels=["plain", "striped"])
    record = report.to_dict()
    assert record["splits"]["calibration"]["classes"] == {"plain": 30, "striped": 30}
    assert record["calibration"]["samples"] == len(report.chosen) == 6
    assert sum(report.subset.classes.values()) == 6
    assert set(report.ranges) == {f"{n} {s}" for n in ("stem", "body", "more", "head") for s in ("input", "output")}
    name, share = report.narrowest or ("", 0.0)
    assert 0 < share == min(report.ranges.values()) < 1
    assert name in report.ranges
    np.savez(tmp_path / "select.npz", x=frames(4, 1)[0])
    whole = rowcol_edge.data(
        small_net(), calib=str(tmp_path / "calib.npz"), select=str(tmp_path / "select.npz"), calib_size="all"
    )
    assert set(whole.ranges.values()) == {1.0}


@pytest.mark.parametrize("size", [128, "all"])
def test_without_a_selection_split_what_judges_is_of_every_class_and_no_range_is_from_it(
    tmp_path: Path, size: int | str
) -> None:
    pictures, labels = frames(160, 0)
    order = np.argsort(labels, kind="stable")  # as folders are read
    np.savez(tmp_path / "calib.npz", x=pictures[order], labels=labels[order])
    asked = config.make({"model": "tests.nets:small_net", "calib": str(tmp_path / "calib.npz"), "calib_size": size})
    prepared = job.prepare(asked)
    report = coverage.of_job(prepared)
    assert len(report.chosen) == 128
    assert min(report.subset.classes.values()) > 40
    ranges, held = evaluation.held_out(prepared, report.chosen)
    calibrated = np.concatenate([batch["x"] for batch in ranges()])
    assert len(calibrated) == report.subset.samples == 128
    assert len(held["x"]) == 32
    known = {picture.tobytes(): label for picture, label in zip(pictures, labels, strict=True)}
    counts = np.bincount([known[picture.tobytes()] for picture in held["x"]], minlength=2)
    assert counts.min() >= 4
    assert not {p.tobytes() for p in held["x"]} & {p.tobytes() for p in calibrated}


def test_three_samples_have_to_do_for_both(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x=frames(3, 0)[0])
    asked = config.make({"model": "tests.nets:small_net", "calib": str(tmp_path / "calib.npz")})
    prepared = job.prepare(asked)
    ranges, held = evaluation.held_out(prepared, coverage.of_job(prepared).chosen)
    assert sum(len(batch["x"]) for batch in ranges()) == len(held["x"]) == 3


def test_without_labels_the_models_own_answers_count(tmp_path: Path) -> None:
    pictures, _ = frames(20, 0)
    report = rowcol_edge.data(small_net(), **save(tmp_path, calib=pictures))
    assert not report.splits[0].labelled
    assert sum(report.splits[0].classes.values()) == 20


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 8)
        self.mix = nn.Linear(8 + 4, 5)

    def forward(self, tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.cat([self.words(tokens).mean(1), numbers], 1))


def test_tokens_and_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens, numbers = rng.integers(0, 50, (80, 60)), rng.normal(0, 1, (80, 4)).astype(np.float32)
    tokens[70], numbers[70] = tokens[5], numbers[5] * 1.0001
    for name, part in (("calib", slice(40)), ("select", slice(40, 80))):
        np.savez(tmp_path / f"{name}.npz", tokens=tokens[part], numbers=numbers[part])
    report = rowcol_edge.data(TwoInputs(), calib=str(tmp_path / "calib.npz"), select=str(tmp_path / "select.npz"))
    assert [(p.first_index, p.second, p.second_index) for p in report.pairs] == [(5, "selection", 30)]


class NoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Deaf(nn.Module):
    """Its features are the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)[:, :4] * 0)


@pytest.mark.parametrize("model", [NoLayer, Deaf])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_odd_models_and_tiny_pools(model: type[nn.Module], count: int, tmp_path: Path) -> None:
    report = rowcol_edge.data(model(), **save(tmp_path, calib=textures(count, 0)))
    assert isinstance(report, DataReport)
    assert len(report.chosen) == count - count // 4  # the others judge what is quantized
    assert report.pairs == ()


def test_features_are_the_input_of_the_last_layer_and_narrow() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 46 * 46, 3))
    from rowcol_edge.factoring.graph import trace

    batch = {"input": textures(3, 0)}
    observer = Observer(model, trace(model, {"input": torch.from_numpy(batch["input"])}))
    features, low, high, classes = observer.batch(batch)
    assert features.shape == (3, 512)
    assert classes is not None
    assert low.shape == high.shape == (3, 4)
    assert np.allclose(low[:, 0], batch["input"].min(axis=(1, 2, 3)))
    assert np.allclose(high[:, 0], batch["input"].max(axis=(1, 2, 3)))


def test_a_saved_program_for_single_samples_sees_what_the_model_sees(tmp_path: Path) -> None:
    model, pictures = Pooled(), textures(5, 0)
    torch.export.save(torch.export.export(model, (torch.from_numpy(pictures[:1]),)), tmp_path / "one.pt2")
    seen = []
    for loaded in (models.load(model).module, models.load(str(tmp_path / "one.pt2")).module):
        name = models.input_names(loaded)[0]
        traced = graph.trace(loaded, {name: torch.from_numpy(pictures[:1])})
        seen.append(Observer(loaded, traced).batch({name: pictures}))
    for whole, single in zip(*seen, strict=True):
        np.testing.assert_allclose(single, whole, rtol=1e-4, atol=1e-5)
    assert np.ptp(seen[1][0], axis=0).max() > 0.01  # no sample stands for its whole batch


def test_a_large_pool_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref[np.ndarray]] = []
    held: list[int] = []
    done: list[int] = []

    def source() -> Iterator[tuple[dict[str, np.ndarray], None]]:
        for seed in range(20):
            pictures = textures(16, seed)
            given.append(weakref.ref(pictures))
            held.append(sum(batch() is not None for batch in given))
            yield {"x": pictures}, None

    monkeypatch.setattr(datasets, "_CACHE_BYTES", 0)
    split = datasets.scan(Split("calibration", "", source))
    model = Pooled()
    observed = Observer(model, graph.trace(model, {"x": torch.from_numpy(textures(1, 0))})).split(
        split, lambda _label, count, _total: done.append(count)
    )
    assert done == list(range(16, 321, 16))
    assert len(held) == 2 * 20  # a pass that checks the samples and one through the model
    assert max(held) <= 2  # the new batch, and the one before it until its place is taken
    kept = observed.features.nbytes + observed.low.nbytes * 2 + sum(a.nbytes for a in observed.sketches.values())
    assert kept < 8192 * len(observed)


@pytest.mark.parametrize("flip", [(), (2,), (3,), (2, 3)])
def test_likeness_is_one_for_a_picture_and_its_mirror_images(flip: tuple[int, ...]) -> None:
    pictures = textures(10, 0)
    likeness, at = Likeness.of(sketch({"x": pictures})), np.arange(10)
    same = likeness.pairs(sketch({"x": pictures}), sketch({"x": np.flip(pictures, flip)}), at, at)
    other = likeness.pairs(sketch({"x": pictures}), sketch({"x": pictures}), at, (at + 1) % 10)
    assert same.min() > 0.995
    assert other.max() < 0.6


@pytest.mark.parametrize("size", [0, -1, "some", True, 1.5])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(ConfigError, match="calib_size"):
        config.make({"model": "sample:fmnist-vit", "calib_size": size})


def test_the_size_in_words_and_numbers() -> None:
    assert config.make({"model": "m:f", "calib_size": "64"}).calib_size == 64
    assert config.make({"model": "m:f", "calib_size": "all"}).calib_size == "all"
    assert config.make({"model": "m:f"}).calib_size == 128


def test_the_command(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["data", "sample:fmnist-vit", "--calib-size", "32"])
    assert shown.exit_code == 0, shown.output
    assert "quantizer gets" in shown.output
    assert "Near-duplicates" in shown.output
