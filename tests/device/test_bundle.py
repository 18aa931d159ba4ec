from __future__ import annotations

import gc
import io
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rowcol_edge.device import archive
from rowcol_edge.device.bundle import Bundle, split_feeds
from rowcol_edge.device.digests import sha256_bytes, sha256_file
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.errors import BundleError, IntegrityError

Entry = tuple[zipfile.ZipInfo | str, bytes]


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where zips are unpacked, to see that nothing stays there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def zip_of(path: Path, entries: list[Entry]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in entries:
            packed.writestr(name, data)
    return path


def test_a_folder_opens_and_hands_out_its_parts(bundle: Bundle, bundle_parts: dict[str, Any]) -> None:
    assert bundle.digest == sha256_bytes((bundle.root / "manifest.json").read_bytes())
    assert bundle.artifact("dense@fp32").read_bytes() == bundle_parts["artifacts"]["dense@fp32"].read_bytes()
    inputs, outputs = bundle.golden()
    np.testing.assert_array_equal(inputs["image"], bundle_parts["golden_inputs"]["image"])
    np.testing.assert_array_equal(outputs["output"], bundle_parts["golden_outputs"]["factored@fp32"]["output"])
    assert [feeds["image"].shape for feeds in bundle.feeds(inputs)] == [(1, 1, 5, 6)] * 4


def test_a_zip_opens_like_the_folder_and_leaves_nothing_behind(bundle_path: Path, temporary_folder: Path) -> None:
    with Bundle.open(bundle_path.with_name("bundle.zip")) as bundle:
        assert bundle.digest == Bundle.open(bundle_path).digest
        assert bundle.artifact().is_file()
        assert temporary_folder in bundle.root.parents
    assert list(temporary_folder.iterdir()) == []


def test_a_zip_with_the_manifest_at_the_top_opens_too(bundle_path: Path, tmp_path: Path) -> None:
    flat = Path(shutil.make_archive(str(tmp_path / "flat"), "zip", bundle_path))
    with Bundle.open(flat) as bundle:
        assert bundle.manifest.name == "tiny"


def test_a_dropped_bundle_removes_its_folder(bundle_path: Path, temporary_folder: Path) -> None:
    bundle = Bundle.open(bundle_path.with_name("bundle.zip"))
    assert len(list(temporary_folder.iterdir())) == 1
    del bundle
    gc.collect()
    assert list(temporary_folder.iterdir()) == []


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    moved = path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(moved)


@pytest.mark.parametrize(
    ("change", "got"),
    [(append, "bytes"), (flip, "…"), (Path.unlink, "it is missing"), (link, "a symbolic link")],
    ids=["longer", "one bit", "missing", "link"],
)
def test_a_file_that_changed_is_named(bundle_path: Path, change: Callable[[Path], None], got: str) -> None:
    change(bundle_path / "arms" / "dense@fp32.onnx")
    with pytest.raises(IntegrityError, match=r"arms/dense@fp32\.onnx") as caught:
        Bundle.open(bundle_path)
    assert got in caught.value.got
    assert caught.value.exit_code == 2


def test_without_check_a_changed_file_is_not_noticed_but_a_missing_one_is(bundle_path: Path) -> None:
    append(bundle_path / "README.md")
    (bundle_path / "arms" / "dense@fp32.onnx").unlink()
    bundle = Bundle.open(bundle_path, check=False)
    with pytest.raises(IntegrityError, match="missing"):
        bundle.artifact("dense@fp32")


def test_only_profiles_may_hold_more_than_the_manifest_lists(bundle_path: Path) -> None:
    (bundle_path / "profiles").mkdir()
    (bundle_path / "profiles" / "today.json").write_text("{}")
    Bundle.open(bundle_path)
    (bundle_path / "arms" / "notes.txt").write_text("mine")
    with pytest.raises(IntegrityError, match=r"arms/notes\.txt"):
        Bundle.open(bundle_path)


def test_a_link_in_profiles_is_refused(bundle_path: Path) -> None:
    (bundle_path / "profiles").mkdir()
    (bundle_path / "profiles" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="link"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize("kind", ["nothing", "folder", "text", "truncated"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, bundle_path: Path, temporary_folder: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(bundle_path.with_name("bundle.zip").read_bytes()[:-100])
    with pytest.raises(BundleError, match="thing"):
        Bundle.open(path)
    assert list(temporary_folder.iterdir()) == []


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    "entries",
    [
        [("../escaped", b"")],
        [("/escaped", b"")],
        [("a/../../escaped", b"")],
        [("a\\..\\escaped", b"")],
        [(special("link", stat.S_IFLNK | 0o777), b"/etc/passwd")],
        [(special("pipe", stat.S_IFIFO), b"")],
        [("a", b""), ("a/b", b"")],
        [("notes.txt", b"")],
        [("one/manifest.json", b"{}"), ("two/manifest.json", b"{}")],
    ],
    ids=["up", "absolute", "inner up", "backslash", "link", "pipe", "file as folder", "no manifest", "two bundles"],
)
def test_a_hostile_zip_is_refused_and_writes_nothing(
    tmp_path: Path, temporary_folder: Path, entries: list[Entry]
) -> None:
    with pytest.raises(BundleError):
        Bundle.open(zip_of(tmp_path / "hostile.zip", entries))
    assert list(temporary_folder.iterdir()) == []
    assert not list(tmp_path.rglob("escaped"))


def test_a_zip_with_a_path_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zip_of(tmp_path / "twice.zip", [("manifest.json", b"{}"), ("manifest.json", b"[]")])
    with pytest.raises(BundleError, match="twice"):
        Bundle.open(path)


def test_an_encrypted_zip_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    data = bytearray(zip_of(tmp_path / "plain.zip", [("manifest.json", b"{}")]).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    path = tmp_path / "secret.zip"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="encrypted"):
        Bundle.open(path)


def test_a_zip_that_declares_too_much_is_refused_before_unpacking(
    bundle_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "LIMIT_BYTES", 1000)
    monkeypatch.setattr(archive, "_extract", lambda *_: pytest.fail("must not be reached"))
    with pytest.raises(BundleError, match="at most 1000 bytes"):
        Bundle.open(bundle_path.with_name("bundle.zip"))


def test_a_zip_that_holds_more_than_it_declares_is_refused(tmp_path: Path, temporary_folder: Path) -> None:
    data = bytearray(zip_of(tmp_path / "lying.zip", [("manifest.json", b"x" * 100)]).read_bytes())
    place = data.index(b"PK\x01\x02") + 24  # the unpacked size in the central directory
    data[place : place + 4] = (7).to_bytes(4, "little")
    (tmp_path / "lying.zip").write_bytes(data)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "lying.zip")
    assert list(temporary_folder.iterdir()) == []


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LIMIT_FILES", 2)
    with pytest.raises(BundleError, match="at most 2 entries"):
        Bundle.open(zip_of(tmp_path / "many.zip", [(str(i), b"") for i in range(3)]))


def replace_golden(bundle_path: Path, data: bytes) -> Bundle:
    """A bundle whose golden inputs are other bytes, with a manifest that fits them."""
    path = bundle_path / "golden" / "inputs.npz"
    path.write_bytes(data)
    manifest = json.loads((bundle_path / "manifest.json").read_text())
    entry = next(e for e in manifest["files"] if e["path"] == "golden/inputs.npz")
    entry["sha256"], entry["size_bytes"] = sha256_file(path)
    (bundle_path / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(bundle_path)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npz(image=np.array([{}], dtype=object)), "pickle"),
        (npz(picture=np.zeros((1, 1, 5, 6), np.float32)), "arrays named image"),
        (npz(image=np.zeros((1, 1, 5, 6))), "float64"),
        (npz(image=np.zeros((1, 1, 5, 7), np.float32)), r"\(1, 1, 5, 7\)"),
        (npz(image=np.zeros((1, 5, 6), np.float32)), r"\(1, 5, 6\)"),
        (b"nonsense", "npz"),
        (b"", "npz"),
    ],
    ids=["pickle", "name", "dtype", "size", "rank", "text", "empty"],
)
def test_golden_arrays_that_do_not_fit_are_refused(bundle_path: Path, data: bytes, message: str) -> None:
    bundle = replace_golden(bundle_path, data)
    with pytest.raises(BundleError, match=message):
        bundle.golden()


def test_feeds_cut_every_input_into_its_batches() -> None:
    specs = (TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (None,), "int64"), TensorSpec("t", (), "float32"))
    inputs = {"a": np.arange(12.0).reshape(4, 3), "b": np.arange(2), "t": np.array(0.5)}
    feeds = list(split_feeds(specs, inputs))
    assert [f["a"].tolist() for f in feeds] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert [f["b"].tolist() for f in feeds] == [[0], [1]]
    assert [float(f["t"]) for f in feeds] == [0.5, 0.5]


@pytest.mark.parametrize(("rows_a", "rows_b"), [(3, 1), (4, 3), (0, 0)])
def test_uneven_batches_are_refused(rows_a: int, rows_b: int) -> None:
    specs = (TensorSpec("a", (2,), "float32"), TensorSpec("b", (1,), "float32"))
    with pytest.raises(BundleError, match="whole batches"):
        list(split_feeds(specs, {"a": np.zeros(rows_a), "b": np.zeros(rows_b)}))
