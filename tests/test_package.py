from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rowcol_edge import swap
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.digests import sha256_file
from rowcol_edge.device.manifest import GRAPH_CHECKED, ArmEntry, Manifest, RuntimeEntry, TensorSpec
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import BundleError
from rowcol_edge.package import board_readme, write_bundle

Parts = dict[str, Any]


def make_parts(folder: Path, name: str = "tiny", weight: bytes = b"weights") -> Parts:
    """The arguments of write_bundle. An artifact is any file: nothing here runs it."""
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = {}
    for arm in ("factored@int8", "dense@int8"):
        artifacts[arm] = folder / f"{arm}.onnx"
        artifacts[arm].write_bytes(arm.encode() + weight)
    arms = tuple(
        ArmEntry(
            name=arm,
            variant=arm.split("@")[0],
            precision="int8",
            artifact=f"arms/{arm}.onnx",
            parameters=1234,
            size_bytes=path.stat().st_size,
            weight_types={"int8": 7},
            tolerance=0.05,
            quality={
                "test": {
                    "metric": "auroc",
                    "value": 0.91,
                    "n": 300,
                    "drop_pp": 0.3,
                    "ci_low_pp": -0.2,
                    "ci_high_pp": 0.8,
                }
            },
            threshold=0.42,
        )
        for arm, path in artifacts.items()
    )
    manifest = Manifest(
        name=name,
        target={"name": "raspberry-pi-5", "title": "Raspberry Pi 5", "match": {"machine": "aarch64"}},
        runtime=RuntimeEntry(
            "onnxruntime", "1.18.1", 18, 9, 4, "python3 -m pip install onnxruntime==1.20 numpy pillow"
        ),
        inputs=(TensorSpec("image", (1, 1, 4, 3), "float32"),),
        outputs=(TensorSpec("output", (1, 2), "float32"),),
        preprocess=Preprocess(mode="L", height=4, width=3, mean=(0.5,), std=(0.25,)).to_dict(),
        contract="classify",
        labels=("good", "defective"),
        positive="defective",
        metric="auroc",
        default_arm="factored@int8",
        arms=arms,
        golden_outputs={arm: f"golden/{arm}.npz" for arm in artifacts},
        created="2026-01-02T03:04:05Z",
    )
    return {
        "manifest": manifest,
        "artifacts": artifacts,
        "golden_inputs": {"image": np.ones((3, 1, 4, 3), np.float32)},
        "golden_outputs": {arm: {"output": np.ones((3, 2), np.float32)} for arm in artifacts},
        "readme": board_readme(manifest),
    }


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return make_parts(tmp_path / "sources")


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p)[0] for p in folder.rglob("*") if p.is_file()}


def refused(out: Path, parts: Parts, match: str) -> BundleError:
    """The error, after making sure that nothing was written."""
    before = tree(out.parent)
    with pytest.raises(BundleError, match=match) as caught:
        write_bundle(out, **parts)
    assert tree(out.parent) == before
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return caught.value


def test_a_bundle_holds_what_it_should(tmp_path: Path, parts: Parts) -> None:
    extra = {"plan.toml": b"rank = 3\n", "notes/why.txt": parts["artifacts"]["dense@int8"]}
    out = write_bundle(tmp_path / "a" / "b" / "bundle", **parts, extra=extra)
    assert sorted(tree(out)) == [
        "README.md",
        "arms/dense@int8.onnx",
        "arms/factored@int8.onnx",
        "golden/dense@int8.npz",
        "golden/factored@int8.npz",
        "golden/inputs.npz",
        "manifest.json",
        "notes/why.txt",
        "plan.toml",
        "rowcol-edge-device.pyz",
    ]
    bundle = Bundle.open(out)
    assert replace(bundle.manifest, files=()) == parts["manifest"]
    inputs, outputs = bundle.golden("dense@int8")
    assert (inputs["image"].shape, outputs["output"].shape) == ((3, 1, 4, 3), (3, 2))
    assert os.access(out / "rowcol-edge-device.pyz", os.X_OK)
    with Bundle.open(out.with_name("bundle.zip")) as zipped:
        assert tree(zipped.root) == tree(out)


def test_the_same_parts_give_the_same_bytes(tmp_path: Path, parts: Parts) -> None:
    first = write_bundle(tmp_path / "one" / "bundle", **parts)
    second = write_bundle(tmp_path / "two" / "bundle", **parts)
    assert tree(first.parent) == tree(second.parent)


def test_no_zip_if_not_wanted(tmp_path: Path, parts: Parts) -> None:
    out = write_bundle(tmp_path / "out" / "bundle", **parts)
    write_bundle(out, **parts, zip_too=False)
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle"]  # not the older one's either


def test_golden_arrays_of_any_name_and_rank_survive(tmp_path: Path, parts: Parts) -> None:
    specs = (TensorSpec("file", (None,), "int64"), TensorSpec("a/b", (1, 2), "float16"), TensorSpec("t", (), "float32"))
    arrays = {"file": np.arange(3), "a/b": np.ones((3, 2), np.float16), "t": np.array(0.5, np.float32)}
    manifest = replace(parts["manifest"], inputs=specs, preprocess=None)
    out = write_bundle(tmp_path / "bundle", **{**parts, "manifest": manifest, "golden_inputs": arrays})
    inputs, _ = Bundle.open(out).golden()
    for name, array in arrays.items():
        np.testing.assert_array_equal(inputs[name], array)


def test_a_newer_bundle_takes_the_place_of_an_older_one_and_keeps_its_measurements(
    tmp_path: Path, parts: Parts
) -> None:
    out = write_bundle(tmp_path / "out" / "bundle", **parts)
    (out / "profiles").mkdir()
    (out / "profiles" / "monday.json").write_text("{}")
    older = Bundle.open(out).digest
    write_bundle(out, **make_parts(tmp_path / "newer", name="newer", weight=b"other weights"))
    bundle = Bundle.open(out)
    assert bundle.manifest.name == "newer"
    assert bundle.digest != older
    assert (out / "profiles" / "monday.json").read_text() == "{}"
    with Bundle.open(out.with_name("bundle.zip")) as zipped:
        assert zipped.digest == bundle.digest
        assert not (zipped.root / "profiles").exists()
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle", "bundle.zip"]


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link", "notes", "zip", "other manifest"])
def test_nothing_that_is_not_a_bundle_is_overwritten(tmp_path: Path, parts: Parts, kind: str) -> None:
    out = tmp_path / "out" / "bundle"
    out.parent.mkdir()
    if kind == "file":
        out.write_text("mine")
    elif kind in ("folder", "empty folder"):
        out.mkdir()
        if kind == "folder":
            (out / "thesis.txt").write_text("mine")
    elif kind == "link":
        out.symlink_to(write_bundle(tmp_path / "elsewhere", **parts))
    elif kind == "notes":
        (write_bundle(out, **parts) / "notes.txt").write_text("mine")
    elif kind == "zip":
        out.with_name("bundle.zip").write_text("mine")
    elif kind == "other manifest":
        out.mkdir()
        (out / "manifest.json").write_text('{"name": "a web app"}')
    refused(out, parts, "notes.txt" if kind == "notes" else "bundle")


def changed(parts: Parts, key: str, value: Any) -> Parts:
    return {**parts, key: value}


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("artifacts", {}, "one for each arm"),
        ("golden_outputs", {"dense@int8": {}}, "one for each arm"),
        ("golden_inputs", {"image": np.full((1, 1, 4, 3), np.nan, np.float32)}, "NaN"),
        ("golden_inputs", {"image": np.array([{}], dtype=object)}, "objects"),
        ("golden_inputs", {"image": np.ones((3, 1, 4, 4), np.float32)}, "float32"),
        ("golden_inputs", {"image": np.ones((0, 1, 4, 3), np.float32)}, "whole batches"),
        ("golden_inputs", {"picture": np.ones((3, 1, 4, 3), np.float32)}, "arrays named image"),
        ("extra", {"../up": b""}, "inside the bundle"),
        ("extra", {"README.md": b""}, "free path"),
        ("extra", {"manifest.json": b""}, "free path"),
        ("extra", {"profiles/x": b""}, "free path"),
        ("extra", {"plan.toml": Path("no/such/plan")}, "no such file"),
    ],
)
def test_parts_that_do_not_fit_write_nothing(tmp_path: Path, parts: Parts, key: str, value: Any, match: str) -> None:
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out" / "bundle", changed(parts, key, value), match)


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path: Path, parts: Parts) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "bundle"
    refused(out, changed(parts, "manifest", replace(parts["manifest"], default_arm="dense@fp32")), "default_arm")
    refused(out, changed(parts, "manifest", replace(parts["manifest"], build={"x": float("inf")})), "finite")
    refused(out, changed(parts, "manifest", replace(parts["manifest"], golden_inputs="../x.npz")), "golden_inputs")
    wrong = tuple(replace(arm, size_bytes=1) for arm in parts["manifest"].arms)
    refused(out, changed(parts, "manifest", replace(parts["manifest"], arms=wrong)), "size_bytes of factored@int8")


def test_external_weights_count_as_the_arms_size(tmp_path: Path, parts: Parts) -> None:
    manifest = parts["manifest"]
    arms = tuple(replace(arm, size_bytes=arm.size_bytes + 5 * (arm.name == "dense@int8")) for arm in manifest.arms)
    extra = {"arms/dense@int8.onnx.data": b"12345"}
    out = write_bundle(tmp_path / "b", **changed(parts, "manifest", replace(manifest, arms=arms)), extra=extra)
    assert (out / "arms" / "dense@int8.onnx.data").read_bytes() == b"12345"


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path, parts: Parts) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="can be written"):
        write_bundle(tmp_path / "file" / "bundle", **parts)


def test_a_rename_that_fails_leaves_the_older_bundle(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_bundle(tmp_path / "out" / "bundle", **parts)
    before = tree(out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == out and ".building-" in self.name:
            raise OSError("no more")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(BundleError, match="no more"):
        write_bundle(out, **make_parts(tmp_path / "newer", name="newer"))
    assert tree(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_package import make_parts
from rowcol_edge.package import write_bundle

# every call by which the disk changes, counted; the process dies in front of the one that is asked for
count = 0
def mortal(name):
    real = getattr(os, name)
    def call(*a, **k):
        global count
        count += 1
        if count == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(os, name, call)
parts = make_parts(Path(sys.argv[3]), name="newer", weight=b"newer weights")
for name in ("mkdir", "rename", "replace", "unlink", "chmod", "fsync"):
    mortal(name)
write_bundle(Path(sys.argv[2]), **parts)
print(count)
"""


def build_in_a_process(out: Path, sources: Path, kill_at: int) -> str:
    """A build of "newer" that dies in front of its n-th change of the disk; what it printed, nothing if it died."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(out), str(sources), str(kill_at)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == (-9 if kill_at else 0), done.stderr
    return done.stdout


@pytest.mark.parametrize("before", ["nothing", "an older bundle"])
def test_a_killed_build_leaves_the_old_bundle_the_new_one_or_none(tmp_path: Path, before: str) -> None:
    def prepared(name: str) -> Path:
        out = tmp_path / name / "bundle"
        if before == "an older bundle":
            write_bundle(out, **make_parts(tmp_path / "older", name="older"))
        return out

    sources = tmp_path / "sources"
    total = int(build_in_a_process(prepared("whole"), sources, 0))
    left = {}
    # now and then while it builds, everywhere while it renames
    for kill_at in sorted({*range(1, total, 9), *range(total - 7, total + 1)}):
        out = prepared(str(kill_at))
        build_in_a_process(out, sources, kill_at)
        left[kill_at] = Bundle.open(out).manifest.name if out.exists() else "none"  # open checks every digest
        archive = out.with_name("bundle.zip")
        if out.exists() and archive.exists():
            with Bundle.open(archive) as zipped:
                assert zipped.digest == Bundle.open(out).digest
        write_bundle(out, **make_parts(tmp_path / "next", name="next"))
        assert sorted(path.name for path in out.parent.iterdir()) == ["bundle", "bundle.zip"]
        assert Bundle.open(out).manifest.name == "next"
    assert set(left.values()) <= ({"older", "none", "newer"} if before != "nothing" else {"none", "newer"})
    assert left[1] == ("older" if before != "nothing" else "none")
    assert left[total] == "newer"


def test_a_kill_between_the_renames_is_repaired_even_by_a_build_that_fails(tmp_path: Path, parts: Parts) -> None:
    out = write_bundle(tmp_path / "out" / "bundle", **parts)
    before = tree(out)
    out.rename(out.with_name(".bundle.replaced-0123"))
    out.with_name(".bundle.building-4567").mkdir()
    with pytest.raises(BundleError, match="whole batches"):
        write_bundle(out, **changed(parts, "golden_inputs", {"image": np.ones((0, 1, 4, 3), np.float32)}))
    assert tree(out) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle", "bundle.zip"]


def test_two_builds_into_one_folder_wait_for_each_other(tmp_path: Path, parts: Parts) -> None:
    order: list[str] = []

    def second() -> None:
        write_bundle(tmp_path / "bundle", **parts, zip_too=False)
        order.append("second")

    with swap.locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_the_readme_is_for_the_person_at_the_board(parts: Parts) -> None:
    text = board_readme(parts["manifest"])
    for part in (
        "# tiny for Raspberry Pi 5",
        "python3 -m pip install onnxruntime==1.20 numpy pillow",
        "python3 rowcol-edge-device.pyz verify .",
        "python3 rowcol-edge-device.pyz run . part.png",
        "python3 rowcol-edge-device.pyz profile .",
        "`factored@int8` (default) | 20 B",
        "auroc 0.9100 (n = 300) | 0.30 pp [-0.20, 0.80]",
        "oldest version that opens these files is **1.18.1**",
        "resized to 3 × 4",
        "`defective` when its probability is at least 0.42 (`factored@int8`), 0.42 (`dense@int8`)",
        "| 130 | interrupted",
        "| 143 | ended by SIGTERM",
    ):
        assert part in text, part


def test_the_readme_says_what_never_ran_and_how_the_engine_is_built(parts: Parts) -> None:
    manifest = parts["manifest"]
    assert "graph-checked" not in board_readme(manifest)
    assert "## The engine" not in board_readme(manifest)
    arms = tuple(replace(arm, checked=GRAPH_CHECKED) for arm in manifest.arms)
    text = board_readme(replace(manifest, arms=arms, runtime=replace(manifest.runtime, name="tensorrt")))
    assert "`factored@int8` (default, graph-checked, not run) |" in text
    assert "*graph-checked, not run*: this arm has not run on tensorrt" in text
    assert "    python3 rowcol-edge-device.pyz engine ." in text


@pytest.mark.parametrize("contract", ["segment", "anomaly_map", "detect", "embed"])
def test_the_readme_fits_every_contract(parts: Parts, contract: str) -> None:
    arms = tuple(replace(arm, quality={}, threshold=None) for arm in parts["manifest"].arms)
    manifest = replace(
        parts["manifest"],
        contract=contract,
        arms=arms,
        preprocess=None,
        labels=(),
        positive=None,
        target={"name": "t", "match": {}},
    )
    text = board_readme(manifest)
    assert "# tiny for t" in text
    assert "run . part.npz" in text
    assert "Threshold" not in text
    assert "| – | – |" in text


def test_npz_files_load_with_plain_numpy(tmp_path: Path, parts: Parts) -> None:
    out = write_bundle(tmp_path / "b", **parts)
    with np.load(io.BytesIO((out / "golden" / "inputs.npz").read_bytes()), allow_pickle=False) as arrays:
        assert arrays["image"].shape == (3, 1, 4, 3)
    with zipfile.ZipFile(out / "golden" / "inputs.npz") as archive:
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)
