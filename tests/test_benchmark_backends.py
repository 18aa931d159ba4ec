from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def tools(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "tools"))


@pytest.fixture
def benchmark(tools: None) -> ModuleType:
    import benchmark_backends

    return benchmark_backends


def against(verdict: str, ratio: float = 0.5) -> dict[str, Any]:
    return {
        "baseline": "b", "ratio": ratio, "ci_low": ratio - 0.01, "ci_high": ratio + 0.01, "verdict": verdict,
        "evidence": "target",
    }  # fmt: skip


def cell(name: str, drop: float, median_ms: float, *, peer: str = "") -> dict[str, Any]:
    return {
        "name": name, "peer": bool(peer), "precision": "int8", "error": "", "parameters": 10**6, "size_bytes": 10**6,
        "selection_drop_pp": drop,
        "quality": {"metric": "accuracy", "value": 0.9, "n": 400, "flips": 1, "drop_pp": drop, "ci_low_pp": drop - 1,
                    "ci_high_pp": drop + 1},
        "fidelity": {"cosine": 0.99, "relative_error": 0.1, "n": 16}, "median_ns": median_ms * 1e6, "p90_ns": None,
        "block_medians_ns": [median_ms * 1e6] * 6,
        "peak_bytes": 2**26, "to_dense": None, "to_peer": None if peer else against("faster"),
        "to_ours": against(peer) if peer else None,
    }  # fmt: skip


def session(*cells: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "net", "setting": "openvino AVX2", "runtime": "openvino", "runtime_version": "1", "threads": 2,
        "evidence": "proxy", "null": against("no significant difference", 1.0), "cells": list(cells), "warnings": [],
        "properties": {"INFERENCE_PRECISION_HINT": "f32"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "drop", "expected"),
    [
        ("slower", 0.0, None),
        ("no significant difference", 0.0, None),
        ("faster", 0.0, "faster"),
        ("slower", -0.7, "better"),
        ("faster", -0.7, "faster and better"),
    ],
)
def test_another_makers_lead_is_said_with_its_reason(
    benchmark: ModuleType, verdict: str, drop: float, expected: str | None
) -> None:
    found = session(cell("dense@int8", 0.0, 4.0), cell("nncf.quantize", drop, 2.0, peer=verdict))
    benchmark._explain([found], {})
    peer = found["cells"][1]
    assert peer.get("beats_ours") == expected
    assert peer.get("remark") == (expected and "unexplained")
    benchmark._explain([found], {"net / openvino AVX2 / nncf.quantize": "it keeps less"})
    assert peer.get("remark") == (expected and "it keeps less")
    assert "beats_ours" not in found["cells"][0]


def test_a_lead_in_bytes_or_in_the_outputs_is_one_too(benchmark: ModuleType) -> None:
    peer = cell("nncf.quantize", 0.0, 2.0, peer="slower")
    found = session(cell("dense@int8", 0.0, 4.0), {**peer, "size_bytes": 940_000})
    benchmark._explain([found], {})
    assert found["cells"][1]["beats_ours"] == "smaller"
    every = {**peer, "size_bytes": 940_000, "fidelity": {**peer["fidelity"], "relative_error": 0.07}}
    found = session(cell("dense@int8", 0.0, 4.0), {**every, "to_ours": against("faster")})
    benchmark._explain([found], {})
    assert found["cells"][1]["beats_ours"] == "faster, smaller and closer to the original"


def test_another_makers_precision_that_we_do_not_make_is_held_to_all_of_ours(benchmark: ModuleType) -> None:
    other = {**cell("quantize_dynamic", -0.7, 2.0, peer="faster"), "precision": "int8-dynamic"}
    exact = {**cell("dense@fp32", -0.9, 1.0), "precision": "fp32"}  # not quantized: no rival of a quantized file
    found = session(exact, cell("dense@int8", 0.0, 4.0), other)
    benchmark._explain([found], {})
    assert found["cells"][2]["beats_ours"] == "faster and better"


def test_models_that_were_not_asked_for_stay(benchmark: ModuleType, tmp_path: Path) -> None:
    def result(name: str, source: str, build: dict[str, int] | None) -> dict[str, Any]:
        found = {**session(cell("dense@int8", 0.0, 4.0)), "model": name}
        said = {"machine": {"isa": ("avx2",)}, "tools": {}, "source": source, "models": {name: {"title": name}}}
        return {**said, "build": build, "sessions": [found]}

    path = tmp_path / "backends.json"
    benchmark._keep(first := result("a", "1", {"seconds": 1}), path)
    assert list(first["models"]) == ["a"]
    path.write_text(json.dumps(first))
    benchmark._keep(second := result("b", "1", None), path)
    assert list(second["models"]) == [s["model"] for s in second["sessions"]] == ["b", "a"]
    assert second["build"] == {"seconds": 1}
    benchmark._keep(again := result("a", "1", None), path)
    assert len(again["sessions"]) == 1
    benchmark._keep(other := result("b", "2", None), path)
    assert list(other["models"]) == ["b"]
    path.write_text(json.dumps(again))
    elsewhere = result("a", "1", None)
    elsewhere["sessions"][0]["setting"] = "tflite"
    benchmark._keep(elsewhere, path)
    assert [s["setting"] for s in elsewhere["sessions"]] == ["tflite", "openvino AVX2"]


def test_files_are_found_again_as_long_as_nothing_has_changed(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def files(model: Any, target: Any, spec: Any, work: Path, progress: Any) -> list[Any]:
        made.append(model.name)
        (tmp_path / "a.onnx").write_text("x")
        return [
            benchmark.File("dense@int8", peer=False, precision="int8", path=str(tmp_path / "a.onnx"), batch={"x": 1}),
            benchmark.File("peer", peer=True, precision="int8", error="it crashed"),
        ]

    monkeypatch.setattr(benchmark, "files", files)
    model, target = benchmark.models(tmp_path)["fmnist-vit"], benchmark.targets.load("generic-x86")

    def built() -> list[Any]:
        return benchmark._built(model, target, target.runtimes[0], tmp_path, None)

    assert built() == built()
    assert made == ["fmnist-vit"]
    (tmp_path / "a.onnx").unlink()
    built()
    monkeypatch.setattr(benchmark.job, "own_source", lambda: "another")
    built()
    assert len(made) == 3


def test_the_tables_show_every_file_and_every_reason(benchmark: ModuleType) -> None:
    broken = {"name": "dense@fp16", "peer": False, "precision": "fp16", "error": "it crashed"}
    cells = [cell("dense@int8", 0.0, 4.0), cell("factored@int8", 0.9, 3.0), cell("nncf", 0.0, 2.0, peer="faster")]
    found = session(*cells, broken)
    benchmark._explain([found], {"net / openvino AVX2 / nncf": "it fuses more"})
    result = {
        "machine": {"cpu_model": "CPU", "cores_usable": 2}, "command": "python x", "build": None,
        "models": {"net": {"title": "A net", "source": "random"}}, "sessions": [found],
    }  # fmt: skip
    every = benchmark.long_table(result)
    assert all(text in every for text in ("`dense@int8`", "`factored@int8`", "*nncf*", "it fuses more", "it crashed"))
    assert "2 threads, INFERENCE_PRECISION_HINT=f32, evidence **proxy**" in every
    import benchmark_backends_table

    short = benchmark_backends_table.short_table(result)
    assert "`dense@int8` 4.00 ms" in short  # the factored one is faster, but over half a point worse
    assert "*nncf* 2.00 ms" in short
    assert "it fuses more" in short
    assert "proxy" in short
    assert "6 rounds" in short
    assert benchmark_backends_table._held([cell("factored@int8", 0.5000000000000004, 1.0)])  # as a build judges
    assert "†" not in short
    cells[2]["block_medians_ns"] = [2e6, 2e6, 2e6, 2e6, 3e6, 3e6]
    short = benchmark_backends_table.short_table(result)
    assert "† | proxy" in short
    assert "† Processes of the same file differ" in short


def test_no_text_of_minilm_stands_in_two_splits(tools: None) -> None:
    import minilm

    texts = {s: [f"{s} {i}" for i in range(sum(minilm.SPLITS.values()) + 5)] for s in minilm.SECTIONS}
    parts = minilm._splits(texts)
    every = [text for found, _ in parts.values() for text in found]
    assert len(every) == len(set(every)) == sum(minilm.SPLITS.values()) * len(minilm.SECTIONS)
    assert all(text.startswith(minilm.SECTIONS[label]) for found, labels in parts.values()
               for text, label in zip(found, labels, strict=True))  # fmt: skip
    with pytest.raises(minilm.DataError, match="section fonts"):
        minilm._splits({**texts, "fonts": []})
