from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rowcol_edge
from rowcol_edge import cache, evaluation, models, pipeline, search
from rowcol_edge.backends.onnxruntime import BACKEND
from rowcol_edge.cache import Cache
from rowcol_edge.device.manifest import Manifest
from rowcol_edge.errors import ConfigError
from rowcol_edge.export import onnx
from rowcol_edge.factoring import spaces
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.resources import targets_dir
from rowcol_edge.search import Choice, Trial

from .nets import outlier_net, small_net, write_splits


class Counter:
    """A stage that counts how often it runs."""

    def __init__(self, content: bytes = b"made") -> None:
        self.content = content
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "file.bin").write_bytes(self.content)


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def get(store: Cache, key: str, make: Callable[[Path], None], place: Path) -> bytes:
    into = place / f"{key}-{time.monotonic_ns()}"
    store.get(key, into, make)
    return (into / "file.bin").read_bytes()


def test_a_stage_runs_once(store: Cache, tmp_path: Path) -> None:
    make = Counter()
    assert [get(store, "a", make, tmp_path) for _ in range(3)] == [b"made"] * 3
    assert make.calls == 1
    get(store, "b", make, tmp_path)
    assert make.calls == 2


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    make = Counter()
    get(Cache(None), "a", make, tmp_path)
    get(Cache(None), "a", make, tmp_path)
    assert make.calls == 2
    assert Cache(None).text("a", lambda: "text") == "text"


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "file.bin").write_bytes(b"mode"),
        lambda entry: (entry / "file.bin").write_bytes(b""),
        lambda entry: (entry / "file.bin").unlink(),
        lambda entry: (entry / "digests.json").unlink(),
        lambda entry: (entry / "digests.json").write_text("{"),
        lambda entry: (entry / "digests.json").write_text("[]"),
        lambda entry: (entry / "digests.json").write_text("{}"),
        lambda entry: (entry / "digests.json").write_text('{"file.bin": 3, "more.bin": null}'),
    ],
)
def test_a_damaged_entry_is_made_anew(store: Cache, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    make = Counter()
    get(store, "a", make, tmp_path)
    assert store.folder is not None
    damage(store.folder / "a")
    assert get(store, "a", make, tmp_path) == b"made"
    assert make.calls == 2
    get(store, "a", make, tmp_path)
    assert make.calls == 2


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    store = Cache(tmp_path / "cache", limit_bytes=3500)
    assert store.folder is not None
    a, b, c, d = (cache.key(name) for name in "abcd")
    for age, key in enumerate((a, b, c)):
        get(store, key, Counter(b"x" * 1000), tmp_path)
        os.utime(store.folder / key, (1000 + age, 1000 + age))
    get(store, a, Counter(), tmp_path)  # used again
    get(store, d, Counter(b"x" * 1000), tmp_path)
    assert {path.name for path in store.folder.iterdir()} == {a, c, d}
    get(store, cache.key("huge"), Counter(b"x" * 4000), tmp_path)
    assert {path.name for path in store.folder.iterdir()} == {a, c, d}


def test_a_stage_that_fails_leaves_no_entry(store: Cache, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "file.bin").write_bytes(b"half")
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        store.get("a", tmp_path / "into", fails)
    assert get(store, "a", Counter(), tmp_path) == b"made"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    make = Counter()
    store = Cache(tmp_path / "file" / "cache")
    assert [get(store, "a", make, tmp_path) for _ in range(2)] == [b"made"] * 2
    assert make.calls == 2


def test_a_cache_that_can_only_be_read_is_used(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Counter()
    get(store, "a", make, tmp_path)

    def refused(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refused)
    assert get(store, "a", make, tmp_path) == b"made"
    assert make.calls == 1


def test_arrays_keep_names_types_and_values(store: Cache) -> None:
    made = {"file": np.arange(6, dtype=np.int64).reshape(2, 3), "a/b": np.float16([[1.5]]), "": np.float64(2.5)}
    for _ in range(2):
        found = store.arrays("a", lambda: made)
        assert list(found) == list(made)
        assert all(np.array_equal(found[n], made[n]) and found[n].dtype == made[n].dtype for n in made)


def test_the_environment_says_where_and_how_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROWCOL_CACHE", "off")
    assert Cache.of_user().folder is None
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path))
    monkeypatch.setenv("ROWCOL_CACHE_BYTES", "1000")
    assert Cache.of_user() == Cache(tmp_path, 1000)
    monkeypatch.setenv("ROWCOL_CACHE_BYTES", "4GB")
    with pytest.raises(ConfigError, match="number of bytes"):
        Cache.of_user()
    monkeypatch.delenv("ROWCOL_CACHE_BYTES")
    monkeypatch.delenv("ROWCOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache.of_user() == Cache(tmp_path / "xdg" / "rowcol-edge")


HAMMER = """
import sys
from pathlib import Path
from rowcol_edge.cache import Cache

folder, place, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = Cache(folder, limit_bytes=250_000)  # three of the four entries
for i in range(60):
    key = "abcd"[i * stride % 4]
    content, into = key.encode() * 80_000, place / str(i)
    store.get(key, into, lambda made: (made / "file.bin").write_bytes(content))
    assert (into / "file.bin").read_bytes() == content
"""


def test_two_builds_at_once_never_see_half_an_entry(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", HAMMER, tmp_path / "cache", tmp_path / stride, stride])
        for stride in ("1", "3")
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


HANG = """
import sys, time
from pathlib import Path
from rowcol_edge import cache

copied = cache._copied

def hanging(source, target):
    copied(source, target)
    print("copied", flush=True)
    time.sleep(600)

cache._copied = hanging
cache.Cache(Path(sys.argv[1])).get("a", Path(sys.argv[2]), lambda made: (made / "file.bin").write_bytes(b"made"))
"""


def test_a_killed_write_leaves_nothing_that_is_read_and_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Cache(tmp_path / "cache")
    assert store.folder is not None
    command = [sys.executable, "-c", HANG, store.folder, tmp_path / "killed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "copied\n"
        worker.kill()
    assert [path.name[:9] for path in store.folder.iterdir()] == [".writing-"]
    make = Counter()
    assert get(store, "a", make, tmp_path) == b"made"
    assert make.calls == 1
    monkeypatch.setattr(cache, "_ABANDONED_SECONDS", -1.0)
    get(store, "b", make, tmp_path)
    assert sorted(path.name for path in store.folder.iterdir()) == ["a", "b"]


# ---- what a build takes from it


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_splits(tmp_path_factory.mktemp("splits"))


class Stages(dict[str, int]):
    """How often each stage ran since the last look."""

    def look(self) -> dict[str, int]:
        found = {name: count for name, count in self.items() if count}
        self.clear()
        return found


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stages:
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path / "cache"))
    counted = Stages()

    def count(place: Any, name: str, stage: str) -> None:
        function = getattr(place, name)

        def counting(*arguments: Any, **keywords: Any) -> Any:
            counted[stage] = counted.get(stage, 0) + 1
            return function(*arguments, **keywords)

        monkeypatch.setattr(place, name, counting)

    count(spaces, "measure", "spaces")
    count(search, "choose", "search")
    count(onnx, "export", "export")
    count(type(BACKEND), "compile", "compile")
    return counted


@pytest.fixture
def options(splits: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Every stage once."""
    return {
        "out": tmp_path / "out", "energy": 0.95, "precision": "fp32", "dense": False, "zip": False, "positive": "1",
        "labels": ["0", "1"], **splits,
    }  # fmt: skip


ONCE = {"spaces": 1, "search": 1, "export": 1, "compile": 1}


def build(net: torch.nn.Module, options: dict[str, Any], **changes: Any) -> Manifest:
    return rowcol_edge.build(net, **{**options, **changes})[0].manifest


def test_another_precision_and_another_target_take_what_has_not_changed(
    net: torch.nn.Module, options: dict[str, Any], stages: Stages, tmp_path: Path
) -> None:
    board = tmp_path / "board.toml"  # whose files this machine judges as it should, also without VNNI
    described = (targets_dir() / "raspberry-pi-5.toml").read_text(encoding="utf-8")
    board.write_text(described.replace("int8_saturates = false", "int8_saturates = true"), encoding="utf-8")
    searched = {**options, "energy": None, "budget": "drop<=2pp", "precision": "int8", "dense": True}
    first = build(net, searched)
    assert stages.look() == {"spaces": 1, "search": 1, "export": 2, "compile": 3}
    second = build(net, searched, precision="fp16")
    assert stages.look() == {"compile": 2}
    assert first.arm("dense@fp32") == second.arm("dense@fp32")
    assert first.build["trials"] == second.build["trials"]
    third = build(net, searched, target=str(board))  # another processor quantizes in another way
    assert stages.look() == {"compile": 3}
    assert third.arm("dense@fp32").size_bytes == first.arm("dense@fp32").size_bytes


def test_the_same_build_into_another_folder_runs_no_stage_and_makes_the_same_bundle(
    net: torch.nn.Module, options: dict[str, Any], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(net, options)
    assert stages.look() == ONCE

    def judged_again(*arguments: Any) -> None:
        raise AssertionError("predictions are kept too")

    monkeypatch.setattr(evaluation, "load_runtime", judged_again)
    second = build(net, options, out=tmp_path / "again")
    assert stages.look() == {}
    assert first.arms == second.arms
    assert first.build["stages"] == second.build["stages"]
    assert rowcol_edge.verify(tmp_path / "again" / "generic-x86-onnxruntime").ok


def test_without_the_cache_every_stage_runs_again(
    net: torch.nn.Module, options: dict[str, Any], stages: Stages
) -> None:
    build(net, options)
    assert stages.look() == ONCE
    build(net, options, force=True, cache=False)
    assert stages.look() == ONCE
    build(net, options, force=True)
    assert stages.look() == {}


def test_a_changed_weight_datum_or_option_is_noticed(
    net: torch.nn.Module, options: dict[str, Any], stages: Stages, tmp_path: Path
) -> None:
    build(net, options)
    assert stages.look() == ONCE
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-3
    build(other, options)
    assert stages.look() == ONCE
    build(net, options, energy=1.0)
    assert stages.look() == {"search": 1, "export": 1, "compile": 1}
    with np.load(options["calib"]) as stored:
        arrays = dict(stored)
    arrays["x"][0, 0, 0, 0] += 1e-3
    np.savez(tmp_path / "calib.npz", **arrays)
    build(net, options, calib=str(tmp_path / "calib.npz"))
    assert stages.look() == ONCE


def test_the_errors_of_layers_are_found_once(
    splits: dict[str, str], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"calib": splits["calib"], "energy": 1.0, "precision": "int8", "dense": False, "zip": False}
    [first] = rowcol_edge.build(outlier_net(), out=tmp_path / "a", target="raspberry-pi-5", **options)
    assert first.manifest.arms[0].kept_float == ("reader",)

    def found_again(*arguments: Any) -> None:
        raise AssertionError("errors of layers are kept too")

    monkeypatch.setattr(type(BACKEND), "layer_errors", found_again)
    [second] = rowcol_edge.build(outlier_net(), out=tmp_path / "b", target="raspberry-pi-5", **options)
    assert second.manifest.arms == first.manifest.arms


def test_a_build_that_fails_leaves_what_it_had_made(
    net: torch.nn.Module, options: dict[str, Any], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **keywords: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.bundling, "write", fails)
        with pytest.raises(OSError, match="full"):
            build(net, options)
    assert stages.look() == ONCE
    build(net, options)
    assert stages.look() == {}


def test_a_damaged_artifact_in_the_cache_is_compiled_again(
    net: torch.nn.Module, options: dict[str, Any], stages: Stages, tmp_path: Path
) -> None:
    first = build(net, options)
    stages.look()
    (artifact,) = (tmp_path / "cache").glob("*/artifact.onnx")
    artifact.write_bytes(artifact.read_bytes()[:-100] + bytes(100))
    second = build(net, options, out=tmp_path / "again")
    assert stages.look() == {"compile": 1}
    assert first.arms == second.arms


def test_a_choice_comes_back_as_it_was() -> None:
    layers = (LayerPlan("a.b", "project", 16, 1 / 3, 10, 5, 100, 50), LayerPlan("c", reason="small"))
    choice = Choice((FactorPlan(layers, 16, "energy=0.99", "net"),), (Trial("dense", 1, 2, None, 0.1 + 0.2),))
    assert Choice.from_json(choice.to_json()) == choice


def test_a_helper_or_a_constant_beside_the_model_decides_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(name: str, constant: float, factor: float) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "helper_of_net.py").write_text(f"def scaled(x):\n    return {factor} * x\n")
        (folder / "net.py").write_text(
            f"import torch\nfrom helper_of_net import scaled\nK = {constant}\n\nclass Net(torch.nn.Module):\n"
            "    def forward(self, x):\n        return scaled(x) + K\n\ndef build():\n    return Net()\n"
        )
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            found = models.load(f"{folder / 'net.py'}:build").digest
        del sys.modules["helper_of_net"]
        return found

    first = digest("a", 1.0, 1.0)
    assert digest("same", 1.0, 1.0) == first
    assert len({first, digest("constant", 3.0, 1.0), digest("helper", 1.0, 2.0)}) == 3


def test_what_is_not_an_entry_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x" * 100)
    kept = Cache(tmp_path, limit_bytes=10)
    kept.text(cache.key("a"), lambda: "short")
    kept.text(cache.key("b"), lambda: "short too")
    assert (tmp_path / "photos" / "a.png").is_file()
