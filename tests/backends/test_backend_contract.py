"""What every backend in the table keeps, whatever it compiles for."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import native
from rowcol_edge.backends import BACKENDS, load_backend, workers
from rowcol_edge.backends.base import Backend, QuantSpec, Source
from rowcol_edge.device.bundle import split_feeds
from rowcol_edge.device.runtimes import ENGINE_BUILDERS, RuntimeOptions, load_runtime
from rowcol_edge.errors import ConfigError, DataError, MissingDependencyError, StageError, TargetError
from rowcol_edge.targets import PRECISIONS, RuntimeSpec, load

from .. import stored
from .conftest import Convolutions, judged, smooth, write_source

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]
Sources = Callable[[Source, str], Path]

ERROR = {
    "fp32": 1e-5, "fp16": 5e-3, "int8": 0.1, "int8-io": 0.2, "int8-dynamic": 0.1,
    "int8-weights": 0.01, "int4-weights": 0.3,
}  # fmt: skip
"""Relative error against the source that a precision may have on the small networks. Of random weights 4 bits lose
about 8 % a layer."""


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param)


def run(name: str, artifact: Path, images: np.ndarray) -> np.ndarray:
    with load_runtime(name).open(artifact, RuntimeOptions(threads=1)) as session:
        assert [(s.name, s.dtype) for s in session.inputs] == [("x", "float32")]
        assert [(s.name, s.dtype) for s in session.outputs] == [("output", "float32")]
        return np.concatenate([session.run(feed)["output"] for feed in split_feeds(session.inputs, {"x": images})])


LINEAR_ONLY = {"onnxruntime": ("int8-dynamic", "int8-weights", "int4-weights")}
"""Precisions of a backend that refuse a convolutional network; its own tests say how."""

CASES = [
    (name, precision, network)
    for name in sorted(BACKENDS)
    for precision in load_backend(name).precisions
    for network in ("convolutions", "tokens")
    if network == "tokens" or precision not in LINEAR_ONLY.get(name, ())
]


def test_another_runtime_stands_in_for_those_that_build_engines_only() -> None:
    assert {name for name in BACKENDS if load_backend(name).host_runtime != name} == ENGINE_BUILDERS


@pytest.mark.parametrize(("name", "precision", "network"), CASES)
def test_an_artifact_is_what_it_says(
    name: str, precision: str, network: str, sources: Sources, request: pytest.FixtureRequest,
    tmp_path: Path, runtime: RuntimeSpec, batches: Batches, unseen: np.ndarray,
) -> None:  # fmt: skip
    backend = load_backend(name)
    source = sources(backend.consumes, network)
    before = source.read_bytes()
    out = tmp_path / f"artifact{backend.suffix}"
    made = backend.compile(source, runtime, judged(precision), batches, out)
    files = [*made.companions, out]
    content = b"".join(path.read_bytes() for path in files)
    assert (made.path, made.precision) == (out, precision)
    assert (made.sha256, made.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert 0 < sum(made.weight_types.values()) < made.size_bytes
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert {path.stem for path in files} == {"artifact"}
    assert source.read_bytes() == before
    expected = run("onnxruntime", request.getfixturevalue(network), unseen)
    error = np.linalg.norm(run(backend.host_runtime, out, unseen) - expected) / np.linalg.norm(expected)
    assert error <= ERROR[precision]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_same_input_gives_the_same_bytes(
    backend: Backend, precision: str, sources: Sources, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    tokens = sources(backend.consumes, "tokens")
    first = backend.compile(tokens, runtime, QuantSpec(precision), batches, tmp_path / f"a{backend.suffix}")
    second = backend.compile(tokens, runtime, QuantSpec(precision), batches, tmp_path / f"b{backend.suffix}")
    assert first.sha256 == second.sha256


METADATA = {"rowcol_edge.arm": "dense@fp32", "rowcol_edge.labels": '["good", "Kratzer <ü> & \\"x\\""]'}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_metadata_is_in_the_file_in_its_formats_own_way(
    backend: Backend, precision: str, sources: Sources, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    tokens = sources(backend.consumes, "tokens")
    paths = [tmp_path / f"{name}{backend.suffix}" for name in "abc"]
    backend.compile(tokens, runtime, QuantSpec(precision), batches, paths[0], METADATA)
    assert stored.metadata(paths[0]) == METADATA
    turned = dict(reversed(METADATA.items()))
    again = backend.compile(tokens, runtime, QuantSpec(precision), batches, paths[1], turned)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    bare = backend.compile(tokens, runtime, QuantSpec(precision), batches, paths[2])
    assert bare.sha256 != again.sha256
    assert bare.weight_types == again.weight_types


def test_a_source_that_is_none_is_refused_and_nothing_is_overwritten(
    backend: Backend, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    (tmp_path / "in.onnx").write_bytes(b"no model")
    out = tmp_path / f"out{backend.suffix}"
    out.write_bytes(b"earlier")
    with pytest.raises(StageError, match=r"reading in\.onnx"):
        backend.compile(tmp_path / "in.onnx", runtime, QuantSpec("int8"), batches, out)
    assert out.read_bytes() == b"earlier"


@pytest.mark.parametrize(("name", "tool"), [("openvino", "openvino"), ("tflite", "litert")])
@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        ("import os; os.abort()", StageError, r"{tool} crashed \(SIGABRT\)"),
        ("sys.exit('the last words')", StageError, "{tool} failed: the last words"),
        ("pass", StageError, "got no file"),
        ("sys.exit(40)", MissingDependencyError, r"rowcol-edge\[{name}\]"),
        ("import time; time.sleep(60)", StageError, r"{tool} took longer than 5 s"),
    ],
)
def test_a_converter_that_fails_or_hangs_is_one_error(
    name: str, tool: str, code: str, error: type[Exception], says: str,
    sources: Sources, tmp_path: Path, runtime: RuntimeSpec, batches: Batches, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def command(_: str, arguments: Sequence[object]) -> list[str]:
        return [sys.executable, "-c", f"import sys; {code}", *map(str, arguments)]

    backend = load_backend(name)
    out = tmp_path / f"out{backend.suffix}"
    out.write_bytes(b"earlier")
    monkeypatch.setattr(native, "_command", command)
    monkeypatch.setattr(workers, "_TIMEOUT_S", 5)
    with pytest.raises(error, match=says.format(name=name, tool=tool)):
        backend.compile(sources(backend.consumes, "convolutions"), runtime, QuantSpec("fp32"), batches, out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {out.name: b"earlier"}


def test_int8_without_calibration_data_is_bad_input(
    backend: Backend, sources: Sources, tmp_path: Path, runtime: RuntimeSpec
) -> None:
    source = sources(backend.consumes, "convolutions")
    with pytest.raises(DataError, match="int8 needs calibration data"):
        backend.compile(source, runtime, QuantSpec("int8"), None, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "calibration batch 0: expected inputs x, got no inputs"),
        ({"y": (1, 1, 16, 16)}, "calibration batch 0: expected inputs x, got y"),
        ({"x": (1, 1, 16, 15)}, r"calibration batch 0, input 'x': expected shape \?×1×16×16, got 1×1×16×15"),
        (None, "calibration data: expected at least one sample, got none"),
    ],
)
def test_calibration_that_misses_an_input_or_does_not_fit_is_bad_input(
    backend: Backend, sources: Sources, tmp_path: Path, runtime: RuntimeSpec,
    feed: dict[str, tuple[int, ...]] | None, message: str,
) -> None:  # fmt: skip
    source, out = sources(backend.consumes, "convolutions"), tmp_path / f"out{backend.suffix}"
    out.write_bytes(b"earlier")
    made = [] if feed is None else [{name: np.zeros(shape, np.float32) for name, shape in feed.items()}]
    with pytest.raises(DataError, match=message):
        backend.compile(source, runtime, QuantSpec("int8"), lambda: iter(made), out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {out.name: b"earlier"}


def test_a_free_batch_is_compiled_or_refused_as_the_backend_says(
    backend: Backend, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    torch.manual_seed(0)
    example = {"x": np.zeros((1, 1, 16, 16), np.float32)}
    source = write_source(backend.consumes, Convolutions(), example, tmp_path, dynamic_batch=True)
    out = tmp_path / f"out{backend.suffix}"
    if not backend.dynamic_batch:
        with pytest.raises(ConfigError, match="expected a fixed batch"):
            backend.compile(source, runtime, QuantSpec("fp32"), batches, out)
        assert not out.exists()
        return
    backend.compile(source, runtime, QuantSpec("fp32"), batches, out)
    with load_runtime(backend.host_runtime).open(out, RuntimeOptions(threads=1)) as session:
        assert session.run({"x": smooth(3, seed=1)})["output"].shape == (3, 3)


class Two(nn.Module):
    """Vibration in thousandths and temperature in hundreds → three values; mixed up, they saturate or vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.vibration, self.heat, self.head = nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, vibration: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.vibration(vibration * 1e3)) + torch.relu(self.heat(heat / 1e2)))


def test_ranges_of_several_inputs_are_not_mixed_up(backend: Backend, tmp_path: Path, runtime: RuntimeSpec) -> None:
    torch.manual_seed(0)
    net = Two().eval()
    rng = np.random.default_rng(0)

    def feed() -> dict[str, np.ndarray]:
        values = {"heat": 1e2 * rng.uniform(-1, 1, (1, 24)), "vibration": 1e-3 * rng.uniform(-1, 1, (1, 24))}
        return {name: array.astype(np.float32) for name, array in values.items()}

    seen, fresh = [feed() for _ in range(32)], [feed() for _ in range(16)]
    example = {name: np.zeros((1, 24), np.float32) for name in ("vibration", "heat")}
    source = write_source(backend.consumes, net, example, tmp_path)
    out = tmp_path / f"out{backend.suffix}"
    backend.compile(source, runtime, judged("int8"), lambda: iter(seen), out)
    with load_runtime(backend.host_runtime).open(out, RuntimeOptions(threads=1)) as session, torch.inference_mode():
        got = np.concatenate([session.run(values)["output"] for values in fresh])
        wanted = np.concatenate([net(**{k: torch.from_numpy(v) for k, v in values.items()}) for values in fresh])
    assert np.linalg.norm(got - wanted) <= ERROR["int8"] * np.linalg.norm(wanted)


@pytest.mark.parametrize("signed", [False, True])
def test_sums_are_exact_on_every_machine_where_that_is_asked_for(
    backend: Backend, signed: bool, tmp_path: Path, runtime: RuntimeSpec
) -> None:
    net = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)[:, None].expand(8, 64))
    rng = np.random.default_rng(0)
    feeds = [{"input": rng.uniform(0.9, 1, (1, 64)).astype(np.float32)} for _ in range(8)]
    source = write_source(backend.consumes, net.eval(), {"input": feeds[0]["input"]}, tmp_path)
    out = tmp_path / f"out{backend.suffix}"
    # two products of nearly 255 x 127 are more than 16 bits hold
    backend.compile(source, runtime, QuantSpec("int8", signed_activations=signed), lambda: iter(feeds), out)
    options = RuntimeOptions(threads=1, exact_sums=True)
    with load_runtime(backend.host_runtime).open(out, options) as session, torch.inference_mode():
        for values in feeds:
            wanted = net(torch.from_numpy(values["input"])).numpy()
            np.testing.assert_allclose(session.run(values)["output"], wanted, rtol=0.02)


class Words(nn.Module):
    """Token ids and their mask, as text models take them: int64."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask.unsqueeze(-1).to(torch.float32)
        return self.head((self.table(ids) * kept).sum(1) / kept.sum(1))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_token_ids_keep_their_type(backend: Backend, precision: str, tmp_path: Path, runtime: RuntimeSpec) -> None:
    torch.manual_seed(0)
    net = Words().eval()
    rng = np.random.default_rng(0)
    feeds = [{"ids": rng.integers(0, 50, (1, 7)), "mask": rng.integers(0, 2, (1, 7)) | np.eye(1, 7, dtype=np.int64)}
             for _ in range(16)]  # fmt: skip
    source = write_source(backend.consumes, net, feeds[0], tmp_path)
    out = tmp_path / f"out{backend.suffix}"
    backend.compile(source, runtime, judged(precision), lambda: iter(feeds), out)
    with load_runtime(backend.host_runtime).open(out, RuntimeOptions(threads=1)) as session, torch.inference_mode():
        assert [(spec.name, spec.dtype) for spec in session.inputs] == [("ids", "int64"), ("mask", "int64")]
        got = np.concatenate([session.run(values)["output"] for values in feeds])
        wanted = np.concatenate([net(**{k: torch.from_numpy(v) for k, v in values.items()}) for values in feeds])
    assert np.linalg.norm(got - wanted) <= ERROR[precision] * np.linalg.norm(wanted)


def test_what_it_says_of_itself(backend: Backend) -> None:
    assert isinstance(backend.consumes, Source)
    assert set(backend.precisions) <= set(PRECISIONS)
    assert backend.name in BACKENDS


def test_an_unknown_backend_or_precision_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"got 'onnxrutime' – did you mean onnxruntime\?"):
        load_backend("onnxrutime")
    with pytest.raises(ConfigError, match=r"got 'int8-dynamics' – did you mean int8-dynamic"):
        QuantSpec("int8-dynamics")


def test_a_target_decides_how_to_quantize() -> None:
    x86, board = load("generic-x86"), load("raspberry-pi-4")
    assert QuantSpec.for_target("int8", x86) == QuantSpec("int8", reduce_range=True, signed_activations=False)
    assert QuantSpec.for_target("int8", board) == QuantSpec("int8", reduce_range=False, signed_activations=True)
    with_vnni = replace(x86, int8_saturates=False)
    assert not QuantSpec.for_target("int8", with_vnni).reduce_range
