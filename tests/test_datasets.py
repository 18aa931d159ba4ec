from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rowcol_edge import datasets
from rowcol_edge.datasets import Split
from rowcol_edge.device.npz import read_npz
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import BundleError, ConfigError, DataError, SplitError

GREY = Preprocess("L", 8, 8, mean=(0.5,), std=(0.5,))


def images(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def loaded(reference: str, name: str = "selection", inputs: tuple[str, ...] = ("x",), **more: Any) -> Split:
    split = datasets.load(reference, name, inputs, **more)
    assert split is not None
    return split


def test_a_folder_has_a_class_per_subfolder(tmp_path: Path) -> None:
    split = loaded(str(images(tmp_path, {"bad": 3, "good": 40})), preprocess=GREY)
    assert split.label_names == ("bad", "good")
    assert split.labels is not None
    assert split.labels.tolist() == [0] * 3 + [1] * 40
    shapes = [b["x"].shape for b in split.batches()]
    assert shapes == [(32, 1, 8, 8), (11, 1, 8, 8)]
    assert split.take(35)["x"].shape == (35, 1, 8, 8)
    everything = split.take(len(split))["x"]
    np.testing.assert_array_equal(split.spread(3)["x"], everything[[0, round((len(split) - 1) / 2), len(split) - 1]])
    np.testing.assert_array_equal(split.spread(2, [4, 5, 9])["x"], everything[[4, 9]])


def test_label_order_given_by_the_user_wins(tmp_path: Path) -> None:
    split = loaded(str(images(tmp_path, {"bad": 1, "good": 2})), preprocess=GREY, labels=("good", "bad"))
    assert split.labels is not None
    assert split.labels.tolist() == [1, 0, 0]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    assert loaded(str(images(tmp_path, {"": 4})), preprocess=GREY).labels is None


def test_a_subfolder_that_is_no_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ugly"):
        datasets.load(str(images(tmp_path, {"ugly": 1})), "test", ("x",), preprocess=GREY, labels=("good", "bad"))


def test_a_class_takes_the_images_of_folders_below_it(tmp_path: Path) -> None:
    images(tmp_path, {"bad/line1": 2, "bad/line2": 1, "good": 2})
    split = loaded(str(tmp_path), preprocess=GREY)
    assert split.labels is not None
    assert split.labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("classes", "says"), [({"good": 1, "": 2}, "2 beside the subfolders"), ({"good": 1, "bad": 0}, "none in bad")]
)
def test_images_that_would_be_left_out_are_refused(tmp_path: Path, classes: dict[str, int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        datasets.load(str(images(tmp_path, classes)), "selection", ("x",), preprocess=GREY)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        datasets.load(str(tmp_path), "calibration", ("x",), preprocess=GREY)
    with pytest.raises(DataError, match="no such file or folder"):
        datasets.load(str(tmp_path / "nothing"), "calibration", ("x",))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    images(tmp_path, {"a": 1})
    (tmp_path / "a" / "z.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"z\.png"):
        datasets.load(str(tmp_path), "test", ("x",), preprocess=GREY)


def test_images_need_a_preprocess(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--preprocess"):
        datasets.load(str(images(tmp_path, {"a": 1})), "test", ("x",))


def test_npz_with_two_inputs_and_labels(tmp_path: Path) -> None:
    a, b = np.zeros((5, 3), np.float32), np.arange(5, dtype=np.int64)[:, None]
    np.savez(tmp_path / "d.npz", ids=b, pixels=a, labels=np.arange(5))
    split = loaded(str(tmp_path / "d.npz"), inputs=("pixels", "ids"))
    batch = next(split.batches())
    assert list(batch) == ["pixels", "ids"]
    assert batch["ids"].dtype == np.int64
    assert len(split) == 5


def test_npz_with_a_mask_for_each_picture(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).integers(0, 2, (40, 6, 6))
    np.savez(tmp_path / "d.npz", x=np.arange(40 * 36, dtype=np.float32).reshape(40, 1, 6, 6), labels=masks)
    split = loaded(str(tmp_path / "d.npz"))
    assert split.labels is not None
    assert np.array_equal(split.labels, masks)


def test_npz_of_camera_frames_goes_through_the_preprocess(tmp_path: Path) -> None:
    frames = np.full((2, 8, 8), 255, np.uint8)
    np.savez(tmp_path / "d.npz", images=frames)
    assert np.allclose(next(loaded(str(tmp_path / "d.npz"), preprocess=GREY).batches())["x"], 1.0)


def test_a_pickled_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="never pickled"):
        datasets.load(str(tmp_path / "d.npz"), "test", ("x",))


def damaged(path: Path) -> Path:
    """A compressed archive whose content was changed."""
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32))
    content = bytearray(path.read_bytes())
    for i in range(200, 260):
        content[i] ^= 0x5A
    path.write_bytes(content)
    return path


def test_a_changed_npz_is_refused_on_both_sides(tmp_path: Path) -> None:
    path = damaged(tmp_path / "d.npz")
    for error in (DataError, BundleError):
        with pytest.raises(error, match=r"d\.npz"):
            read_npz(path, error)


def test_an_npz_with_other_content_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3), np.float32))
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("labels", b"good, bad")
    with pytest.raises(DataError, match="labels: expected an array"):
        datasets.load(str(tmp_path / "d.npz"), "test", ("x",))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no zip", b"garbage"])
def test_a_damaged_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError) as caught:
        datasets.load(str(tmp_path / "d.npz"), "test", ("x",))
    assert "allow_pickle" not in caught.value.got  # numpy's advice for what it does not know


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.array([[1.0, np.nan]], np.float32)}, "NaN"),
        ({"x": np.array([[1.0, np.inf]], np.float32)}, "NaN or Inf"),
        ({"x": np.zeros((3, 2), np.float32), "labels": np.zeros(2, np.int64)}, "one per sample"),
        ({"x": np.zeros((2, 2), np.float32), "labels": np.zeros((3, 4, 4), np.int64)}, "one per sample"),
        ({"x": np.zeros((2, 2), np.float32), "labels": np.zeros((2, 4), np.int64)}, "one per sample"),
        ({"x": np.zeros((2, 2), np.float32), "labels": np.array([0.0, 1.0])}, "whole numbers"),
        ({"x": np.zeros((2, 2), np.float32), "labels": np.array([-1, 1])}, "from 0"),
        ({"x": np.array(["a", "b"])}, "numbers"),
        ({"x": np.zeros((0, 2), np.float32)}, "at least one sample"),
        ({"x": np.zeros((2, 2), np.float32), "y2": np.zeros((2, 2), np.float32)}, "inputs"),
        (dict.fromkeys(("a", "b"), np.zeros((2, 2), np.float32)), r"expected inputs \['x'\], got \['a', 'b'\]"),
        ({"y": np.zeros(2, np.int64)}, r"expected inputs \['x'\], got none – .* label, y are taken as labels"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=says):
        datasets.load(str(tmp_path / "d.npz"), "test", ("x",))


def test_a_callable_yields_batches_any_number_of_times(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for i in range(3):\n"
        "        yield {'b': np.full((2, 1), i), 'a': np.full((2, 4), i, np.float64)}, np.array([0, 1])\n"
        "def ragged():\n"
        "    yield np.zeros((2, 3), np.float32)\n"
        "    yield np.zeros((2, 4), np.float32)\n"
    )
    split = loaded(f"{tmp_path / 'mine.py'}:batches", inputs=("a", "b"))
    assert len(split) == 6
    assert [list(b) for b in split.batches()] == [["a", "b"]] * 3
    assert next(split.batches())["a"].dtype == np.float32
    with pytest.raises(DataError, match="samples of shape"):
        datasets.load(f"{tmp_path / 'mine.py'}:ragged", "test", ("x",))
    with pytest.raises(DataError, match="callable nothing"):
        datasets.load(f"{tmp_path / 'mine.py'}:nothing", "test", ("x",))


def test_a_large_split_is_read_again_instead_of_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_CACHE_BYTES", 10)
    np.savez(tmp_path / "d.npz", x=np.arange(80, dtype=np.float32).reshape(40, 2))
    split = loaded(str(tmp_path / "d.npz"))
    assert split._cache is None
    assert sum(len(b["x"]) for b in split.batches()) == sum(len(b["x"]) for b in split.batches()) == 40


def test_a_source_that_shuffles_is_found_out_when_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_CACHE_BYTES", 10)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "passes = []\n"
        "def batches():\n"
        "    passes.append(1)\n"
        "    yield np.random.default_rng(len(passes)).normal(size=(4, 3)), np.arange(4)\n"
    )
    split = loaded(f"{tmp_path / 'mine.py'}:batches")
    with pytest.raises(DataError, match="the same samples in the same order"):
        list(split.batches())


def test_splits_that_share_a_sample_are_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x[:4])
    np.savez(tmp_path / "b.npz", x=x[3:])
    first, second = loaded(str(tmp_path / "a.npz"), "calibration"), loaded(str(tmp_path / "b.npz"))
    with pytest.raises(SplitError, match="1 shared sample"):
        datasets.check_disjoint([first, second])
    datasets.check_disjoint([first])


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2), np.float32), labels=np.array([0, 1]))
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 2), np.float32), labels=np.array([1, 1]))
    assert loaded(str(tmp_path / "a.npz")).digest == loaded(str(tmp_path / "a.npz")).digest
    assert loaded(str(tmp_path / "a.npz")).digest != loaded(str(tmp_path / "b.npz")).digest


def test_splits_of_other_shapes_or_classes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4), np.float32))
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 5), np.float32))
    first, second = loaded(str(tmp_path / "a.npz"), "calibration"), loaded(str(tmp_path / "b.npz"), "test")
    with pytest.raises(DataError, match="as the calibration data"):
        datasets.check_alike([first, second])
    images(tmp_path / "one", {"a": 1, "b": 1, "c": 1})
    images(tmp_path / "two", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="--labels"):
        datasets.class_names([str(tmp_path / "one"), None, str(tmp_path / "two")])
    assert datasets.class_names([str(tmp_path / "one"), "x.npz"]) == ("a", "b", "c")


def test_batches_of_a_data_loader_and_half_precision_are_taken(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(
        "import torch\n"
        "def batches():\n"
        "    return torch.utils.data.DataLoader("
        "torch.utils.data.TensorDataset(torch.zeros(4, 3).half().requires_grad_(), torch.arange(4)), batch_size=2)\n"
        "def broken():\n"
        "    yield [1]\n"
        "    raise OSError('camera gone')\n"
        "def nothing():\n"
        "    return 7\n"
    )
    split = loaded(f"{tmp_path / 'loader.py'}:batches")
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1, 2, 3]
    assert next(split.batches())["x"].dtype == np.float32
    for name in ("broken", "nothing"):
        with pytest.raises(DataError):
            datasets.load(f"{tmp_path / 'loader.py'}:{name}", "test", ("x",))
