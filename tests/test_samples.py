"""The shipped samples: splits, weights, licences, and the figures that are claimed for them."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rowcol_edge import quality, samples
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import DataError, MissingDependencyError

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "sample_models"

needs_sounds = pytest.mark.system("asterisk-core-sounds")
needs_aeon, needs_minilm = pytest.mark.system("aeon"), pytest.mark.system("minilm")
TRAINED = (
    "elpv-resnet18",
    "fmnist-vit",
    "elpv-padim",
    "elpv-scratch-unet",
    pytest.param("italy-power-cnn", marks=needs_aeon),
    pytest.param("spoken-language-cnn", marks=needs_sounds),
)
SPLITS = ("train", "calibration", "selection", "test")


def module(sample: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{sample}_{name}".replace("-", "_"), SAMPLES / sample / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def settings(sample: str) -> dict[str, Any]:
    return tomllib.loads((SAMPLES / sample / "sample.toml").read_text(encoding="utf-8"))


def result(sample: str) -> dict[str, Any]:
    return json.loads((ROOT / "tools" / "results" / f"{sample}.json").read_text(encoding="utf-8"))


def trained(sample: str) -> torch.nn.Module:
    model = module(sample, "model").build()
    state = {
        k: v.float() if v.is_floating_point() else v
        for k, v in load_file(SAMPLES / sample / "weights.safetensors").items()
    }
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def guesses(model: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(inputs)).argmax(1).numpy()


@torch.no_grad()
def predictions(sample: str, split: str) -> quality.Predictions:
    """First output of the shipped weights on a split, and the labels."""
    model = trained(sample)
    pairs = [(model(torch.from_numpy(x)), y) for x, y in getattr(module(sample, "data"), split)()]
    outputs = [next(iter(y.values())) if isinstance(y, dict) else y for y, _ in pairs]
    positive = samples.load(sample).positive
    index = None if positive is None else samples.load(sample).labels.index(positive)
    return quality.Predictions(torch.cat(outputs).numpy(), np.concatenate([y for _, y in pairs]), index)


@pytest.mark.parametrize("sample", TRAINED)
class TestEverySample:
    def test_settings_are_complete(self, sample: str) -> None:
        got = settings(sample)
        keys = {"title", "description", "factory", "weights", "data", "task", "labels", "metric"}
        assert keys <= set(got)
        assert got["factory"] == "model.py:build"
        if "preprocess" in got:
            assert list(got["inputs"].values()) == [list(Preprocess.from_dict(got["preprocess"]).shape)]
        assert quality.metric(got["metric"]).contract == got["task"]
        assert (ROOT / got["provenance"]["script"]).is_file()
        assert (ROOT / got["provenance"]["result"]).is_file()

    def test_weights_are_finite_and_stored_as_half(self, sample: str) -> None:
        state = load_file(SAMPLES / sample / "weights.safetensors")
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
        assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())

    def test_weights_load_strictly_and_give_one_logit_per_label(self, sample: str) -> None:
        model, got = trained(sample), settings(sample)
        ((name, shape),) = got["inputs"].items()
        with torch.no_grad():
            logits = model(**{name: torch.zeros(2, *shape)})
        logits = next(iter(logits.values())) if isinstance(logits, dict) else logits
        classes = 1 if sample in ("elpv-padim", "elpv-scratch-unet") else len(got["labels"])  # one decides between two
        assert logits.shape == (2, classes, *(shape[1:] if got["task"] == "segment" else []))
        assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("split", SPLITS[1:])
    def test_batches(self, sample: str, split: str) -> None:
        data = module(sample, "data")
        shape = tuple(next(iter(settings(sample)["inputs"].values())))
        inputs, labels = next(getattr(data, split)())
        assert (inputs.dtype, labels.dtype) == (np.float32, np.int64)
        assert inputs.shape[1:] == shape
        assert 1 <= len(inputs) == len(labels) <= 64
        assert np.isfinite(inputs).all()
        assert abs(float(inputs.mean())) < 1
        again, same = next(getattr(data, split)())
        assert np.array_equal(inputs, again)
        assert np.array_equal(labels, same)

    def test_images_are_what_the_batches_were_made_of(self, sample: str) -> None:
        data, recipe = module(sample, "data"), samples.load(sample).preprocess
        picture, label = next(iter(data.images("test")))
        inputs, labels = next(data.test())
        if recipe is not None:
            picture = recipe.pixels(picture) if isinstance(picture, np.ndarray) else recipe.image(picture)
        assert np.array_equal(picture, inputs[0])
        assert np.array_equal(label, labels[0])

    def test_licence_is_stated(self, sample: str) -> None:
        text = (SAMPLES / sample / "LICENSE-weights.md").read_text(encoding="utf-8")
        wanted = {
            "elpv-resnet18": ("CC BY-NC-SA 4.0", "Deitsch", "Buerhop-Lutz", "commercially"),
            "fmnist-vit": ("MIT", "Zalando"),
            "elpv-padim": ("CC BY-NC-SA 4.0", "Deitsch", "Buerhop-Lutz", "commercially", "EfficientNet-Lite0"),
            "elpv-scratch-unet": ("CC BY-NC-SA 4.0", "Deitsch", "Buerhop-Lutz", "commercially", "synthetic"),
            "italy-power-cnn": ("Apache-2.0", "aeon", "Dau"),
            "spoken-language-cnn": ("CC BY-SA 3.0", "Allison Smith", "June Wallack", "Carlo Flora", "Maxim"),
        }[sample]
        assert all(word in text for word in wanted)

    def test_an_unknown_split_is_named(self, sample: str) -> None:
        with pytest.raises(DataError, match="nonsense"):
            list(module(sample, "data").images("nonsense"))


def test_binaries_stay_small_and_no_elpv_image_is_there() -> None:
    files = [p for p in SAMPLES.rglob("*") if p.is_file() and p.suffix not in {".py", ".toml", ".json", ".md", ".pyc"}]
    assert sum(p.stat().st_size for p in files) <= 30_000_000
    assert not [p for p in files if p.suffix in {".png", ".jpg", ".tif"}]
    assert not [file for folder in SAMPLES.glob("elpv-*") for file in folder.glob("*.np*")]


@pytest.mark.parametrize("sample", samples.available())
def test_every_sample_is_known_and_has_a_licence(sample: str) -> None:
    loaded = samples.load(sample)
    if loaded.alone:  # an architecture with random weights
        assert (loaded.weights, loaded.data, loaded.licence) == (None, None, None)
        return
    assert loaded.licence is not None
    assert loaded.data is not None
    assert loaded.licence.is_file()
    assert loaded.data.is_file()
    assert loaded.weights is None or loaded.weights.is_file()


class TestElpv:
    def test_splits_cover_everything_once(self) -> None:
        data = module("elpv-resnet18", "data")
        parts = [data.indices(split) for split in SPLITS]
        assert sorted(i for part in parts for i in part) == list(range(2624)) == list(range(len(data.table())))
        assert [len(part) for part in parts] == [1574, 210, 420, 420]

    def test_splits_are_stratified(self) -> None:
        data = module("elpv-resnet18", "data")
        whole = Counter((probability, kind) for _, probability, kind in data.table())
        assert len(whole) == 8
        for split in SPLITS:
            part = Counter(data.table()[i][1:] for i in data.indices(split))
            share = len(data.indices(split)) / 2624
            assert all(abs(part[stratum] - share * count) < 1.5 for stratum, count in whole.items())

    def test_no_picture_is_in_two_splits(self) -> None:
        data = module("elpv-resnet18", "data")
        assert len({path.read_bytes() for path, _, _ in data.table()}) == 2624

    def test_labels_follow_the_probability(self) -> None:
        data = module("elpv-resnet18", "data")
        labels = np.array([data.label(i) for i in range(2624)])
        assert labels.sum() == 106 + 715

    def test_a_missing_package_gives_the_install_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = module("elpv-resnet18", "data")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match="pip install 'elpv-dataset'"):
            next(data.selection())

    def test_the_shipped_weights_recognise_defects(self) -> None:
        inputs, labels = next(module("elpv-resnet18", "data").selection())
        guess = guesses(trained("elpv-resnet18"), inputs)
        assert float((guess == labels).mean()) > 0.75
        assert 0 < guess.sum() < len(guess)

    def test_the_shipped_weights_are_as_good_as_their_record(self) -> None:
        model, hits, total = trained("elpv-resnet18"), 0, 0
        for inputs, labels in module("elpv-resnet18", "data").test():
            hits, total = hits + int((guesses(model, inputs) == labels).sum()), total + len(labels)
        # two images may fall the other way on another processor
        assert hits / total == pytest.approx(
            result("samples")["elpv-resnet18"]["student"]["test"]["accuracy"], abs=2.1 / total
        )

    def test_the_student_is_no_worse_than_the_probe(self) -> None:
        got = result("samples")["elpv-resnet18"]
        for figure in ("accuracy", "auc"):
            assert got["student"]["test"][figure] >= got["probe"]["test"][figure]


class TestFashionMnist:
    def test_committed_splits_are_disjoint_and_balanced(self) -> None:
        data = module("fmnist-vit", "data")
        with np.load(data.HERE / "images.npz", allow_pickle=False) as stored:
            assert not set(stored["calibration_rows"]) & set(stored["selection_rows"])
            counts = {split: np.bincount(stored[f"{split}_labels"], minlength=10) for split in SPLITS[1:]}
        assert [int(c.sum()) for c in counts.values()] == [128, 400, 400]
        assert all(c.max() - c.min() <= 1 for c in counts.values())
        assert (data.HERE / "images.npz").stat().st_size < 700_000

    def test_no_picture_is_in_two_splits(self) -> None:
        data = module("fmnist-vit", "data")
        pictures = [picture.tobytes() for split in SPLITS[1:] for picture, _ in data.images(split)]
        assert len(set(pictures)) == len(pictures) == 928

    def test_missing_training_files_give_a_hint(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
        with pytest.raises(DataError, match="dataset-fashion-mnist"):
            next(module("fmnist-vit", "data").train())

    def test_training_leaves_the_held_out_images_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = module("fmnist-vit", "data")
        pixels = np.zeros((60_000, 28, 28), np.uint8)
        with np.load(data.HERE / "images.npz", allow_pickle=False) as stored:
            held_out = np.concatenate([stored["calibration_rows"], stored["selection_rows"]])
        pixels[held_out] = 1
        monkeypatch.setattr(data, "original", lambda part: (pixels, np.zeros(60_000, np.uint8)))
        got, labels = data.arrays("train")
        assert len(got) == len(labels) == 60_000 - 528
        assert not got.any()

    def test_accuracy_is_the_recorded_one(self) -> None:
        model = trained("fmnist-vit")
        right = [guesses(model, inputs) == labels for inputs, labels in module("fmnist-vit", "data").test()]
        accuracy = float(np.concatenate(right).mean())
        assert accuracy == pytest.approx(result("fmnist-vit")["test_accuracy"], abs=0.01)
        assert result("fmnist-vit")["test_all_accuracy"] >= 0.90


class TestElpvPadim:
    def test_training_sees_good_cells_only(self) -> None:
        data = module("elpv-padim", "data")
        cells = data.cells()
        good = [i for i in cells.indices("train") if cells.table()[i][1] == 0]
        first, labels = next(data.train())
        assert not labels.any()
        whole, _ = next(cells.batches("train"))
        kept = [place for place, i in enumerate(cells.indices("train")[: len(whole)]) if i in set(good)]
        assert np.array_equal(first, whole[kept])
        assert len(good) == result("elpv-padim")["splits"]["train"] == 905

    def test_area_is_the_recorded_one(self) -> None:
        got = quality.metric("auroc").value(predictions("elpv-padim", "test"), None)
        assert got == pytest.approx(result("elpv-padim")["test_auroc"], abs=0.002)
        assert got > 0.8

    def test_the_score_is_the_largest_distance_of_the_heatmap(self) -> None:
        model = trained("elpv-padim")
        x = torch.from_numpy(next(module("elpv-padim", "data").test())[0][:4])
        with torch.no_grad():
            got = model(x)
        assert got["heatmap"].shape == (4, 1, 14, 14)
        largest = got["heatmap"].flatten(1).amax(1, keepdim=True)
        assert torch.allclose(got["score"], (largest - model.decide[0]) / model.decide[1])

    def test_whitening_gives_mahalanobis_distances(self) -> None:
        """Against a covariance that is inverted, at one place of a model fitted to random features."""
        model = module("elpv-padim", "model").build()
        rng = np.random.default_rng(0)
        root = rng.normal(size=(64, 64))
        covariance = root @ root.T / 64 + np.eye(64)
        values, vectors = np.linalg.eigh(covariance)
        whiten = (vectors / np.sqrt(values)) @ vectors.T
        mean, x = rng.normal(size=64), rng.normal(size=(1, 64, 14, 14))
        with torch.no_grad():
            model.whiten.weight[64 * 15 : 64 * 16].copy_(torch.from_numpy(whiten)[:, :, None, None])
            model.whiten.bias[64 * 15 : 64 * 16].copy_(torch.from_numpy(-whiten @ mean))
            got = model.distances(torch.from_numpy(x).float())[0, 15]
        apart = x[0, :, 1, 1] - mean
        assert float(got) == pytest.approx(np.sqrt(apart @ np.linalg.inv(covariance) @ apart / 64), rel=1e-4)


class TestElpvScratchUnet:
    def test_what_is_drawn_follows_from_the_cell_alone(self) -> None:
        data = module("elpv-scratch-unet", "data")
        cells = [cell for cell, _ in zip(data.good("test"), range(4), strict=False)]
        first, again = ([data.scratched(*cell, view) for cell in cells for view in range(4)] for _ in range(2))
        for (picture, mask), (same, also) in zip(first, again, strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(same))
            assert np.array_equal(mask, also)
        assert len({mask.tobytes() for _, mask in first}) > 8  # all differ but for those without a scratch

    def test_the_picture_changes_where_the_mask_says_so(self) -> None:
        data = module("elpv-scratch-unet", "data")
        drawn = 0
        for (index, picture), _ in zip(data.good("selection"), range(20), strict=False):
            changed, mask = data.scratched(index, picture)
            moved = np.abs(np.asarray(changed, np.float32) - np.asarray(picture.convert("L"), np.float32))
            assert bool(mask.any()) == bool((moved > 0).any())
            if mask.any():
                assert moved.max() > 10
                assert mask.mean() < 0.1
                # each marked pixel stands for about 3×3 of the original, where something has changed
                rows, columns = np.nonzero(mask)
                boxes = [
                    moved[r * 25 // 8 : r * 25 // 8 + 4, c * 25 // 8 : c * 25 // 8 + 4]
                    for r, c in zip(rows, columns, strict=True)
                ]
                assert all(box.max() > 0 for box in boxes)
            drawn += bool(mask.any())
        assert 10 <= drawn < 20

    def test_only_good_cells_are_drawn_on(self) -> None:
        data = module("elpv-scratch-unet", "data")
        table = data.cells().table()
        assert all(table[index][1] == 0 for split in SPLITS for index, _ in data.good(split))

    def test_iou_is_the_recorded_one(self) -> None:
        got = quality.metric("iou").value(predictions("elpv-scratch-unet", "test"), 0.5)
        assert got == pytest.approx(result("elpv-scratch-unet")["test_iou"], abs=0.01)
        assert got > 0.6

    def test_its_decoder_has_transposed_convolutions(self) -> None:
        layers = [m for m in trained("elpv-scratch-unet").modules() if isinstance(m, torch.nn.ConvTranspose2d)]
        assert len(layers) == 3


@needs_aeon
class TestItalyPowerCnn:
    def test_splits_cover_everything_once_and_are_stratified(self) -> None:
        data = module("italy-power-cnn", "data")
        parts = [data.indices(split) for split in SPLITS]
        assert sorted(np.concatenate(parts).tolist()) == list(range(1096))
        series, labels = data.days()
        assert len(np.unique(series.reshape(1096, -1), axis=0)) == 1096  # no day is there twice
        assert all(abs(labels[part].mean() - labels.mean()) < 0.01 for part in parts)

    def test_winter_evenings_are_the_first_label(self) -> None:
        """The archive numbers its classes only: lamps are lit at seven in winter."""
        series, labels = module("italy-power-cnn", "data").days()
        evening = [series[labels == label, 0, 18:20].mean() for label in (0, 1)]
        assert evening[0] > evening[1] + 0.5

    def test_accuracy_is_the_recorded_one(self) -> None:
        got = quality.metric("accuracy").value(predictions("italy-power-cnn", "test"), None)
        assert got == pytest.approx(result("italy-power-cnn")["test_accuracy"], abs=0.01)
        assert got > 0.95


def test_a_missing_series_package_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    data = module("italy-power-cnn", "data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install 'aeon'"):
        next(data.selection())


def test_missing_sounds_give_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASTERISK_SOUNDS", str(tmp_path))
    with pytest.raises(DataError, match="asterisk-core-sounds"):
        next(module("spoken-language-cnn", "data").selection())


@needs_sounds
class TestSpokenLanguageCnn:
    def test_a_prompt_is_in_one_split_whatever_the_language(self) -> None:
        data = module("spoken-language-cnn", "data")
        assert data.split_of("vm-goodbye.wav") == data.split_of("vm-goodbye.wav")
        counts = {split: np.bincount([label for _, label in data.images(split)], minlength=5) for split in SPLITS}
        assert all(count.min() > 50 for count in counts.values())
        total = sum(int(count.sum()) for count in counts.values())
        assert 0.5 < counts["train"].sum() / total < 0.7
        seconds = [part.tobytes() for split in SPLITS[1:] for part, _ in data.images(split)]
        assert len(set(seconds)) == len(seconds)

    def test_loudness_says_nothing(self) -> None:
        inputs, _ = next(module("spoken-language-cnn", "data").test())
        assert np.allclose(np.sqrt((inputs**2).mean((1, 2))), 1.0, atol=1e-3)

    def test_accuracy_is_the_recorded_one(self) -> None:
        got = quality.metric("accuracy").value(predictions("spoken-language-cnn", "test"), None)
        assert got == pytest.approx(result("spoken-language-cnn")["test_accuracy"], abs=0.01)
        assert got > 0.9


@needs_minilm
class TestMiniLM:
    def test_no_sentence_is_in_two_splits(self) -> None:
        data = module("minilm", "data")
        every = [text for split in SPLITS[1:] for text in data.texts(split)[0]]
        assert len(set(every)) == len(every) == 8 * (16 + 25 + 25)
        with pytest.raises(DataError, match="nonsense"):
            data.texts("nonsense")

    def test_embeddings_have_length_1_and_know_the_subject(self) -> None:
        model, data = module("minilm", "model").build().eval(), module("minilm", "data")
        with torch.no_grad():
            pairs = [
                (model(**{k: torch.from_numpy(v) for k, v in feeds.items()})["embedding"].numpy(), labels)
                for feeds, labels in data.selection()
            ]
        vectors, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-4)
        assert (
            quality.metric("nearest_neighbour").value(quality.Predictions(vectors, labels), None) > 0.6
        )  # chance: 1/8
