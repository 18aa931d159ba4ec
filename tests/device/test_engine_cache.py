from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.device.runtimes.engine_cache import EngineCache, EngineKey

KEY = EngineKey("a" * 64, "10.3.0", "Orin", "8.7", {"max_batch": "8"})


def test_an_engine_comes_back_and_nothing_else_lies_there(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "new" / "engines")
    assert cache.load("arm", KEY) is None
    path = cache.store("arm", KEY, b"engine")
    assert cache.load("arm", KEY) == b"engine"
    assert path.name == f"arm-{KEY.digest}.engine"
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".json")])
    assert json.loads(path.with_suffix(".json").read_text())["gpu"] == "Orin"
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "b" * 64},
        {"version": "10.4.0"},
        {"gpu": "Orin NX"},
        {"capability": "8.9"},
        {"settings": {"max_batch": "1"}},
    ],
)
def test_an_engine_fits_what_it_was_built_for_only(tmp_path: Path, change: dict[str, object]) -> None:
    cache = EngineCache(tmp_path)
    cache.store("arm", KEY, b"engine")
    assert cache.load("arm", replace(KEY, **change)) is None


@pytest.mark.parametrize("content", [b"engin", b"enginf", b""])
def test_an_engine_cut_short_or_changed_is_not_there(tmp_path: Path, content: bytes) -> None:
    cache = EngineCache(tmp_path)
    cache.store("arm", KEY, b"engine").write_bytes(content)
    assert cache.load("arm", KEY) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"engine_sha256": 3}'])
def test_a_damaged_note_beside_it_is_like_no_engine(tmp_path: Path, text: str) -> None:
    cache = EngineCache(tmp_path)
    cache.store("arm", KEY, b"engine").with_suffix(".json").write_text(text)
    assert cache.load("arm", KEY) is None


def test_timings_are_shared_by_models_on_one_gpu_and_version(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    assert cache.timings(KEY) == b""
    cache.store_timings(KEY, b"timings")
    assert cache.timings(replace(KEY, model_sha256="b" * 64)) == b"timings"
    assert cache.timings(replace(KEY, version="10.4.0")) == b""


def test_the_folder_is_the_users_or_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ROWCOL_ENGINE_CACHE", raising=False)
    assert EngineCache().folder == tmp_path / "rowcol-edge" / "engines"
    monkeypatch.setenv("ROWCOL_ENGINE_CACHE", str(tmp_path / "own"))
    assert EngineCache().folder == tmp_path / "own"
