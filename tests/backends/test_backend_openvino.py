"""OpenVINO: what its own backend and runtime do beyond the contracts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from rowcol_edge.backends import load_backend, openvino_files, openvino_info, openvino_worker
from rowcol_edge.backends import openvino as openvino_backend
from rowcol_edge.backends.base import AccuracyControl, Artifact, QuantSpec, Source
from rowcol_edge.backends.onnx_files import Port
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.errors import BundleError, StageError, UnsupportedOpError
from rowcol_edge.quality import Predictions, metric
from rowcol_edge.targets import RuntimeSpec

from .conftest import judged, write_source

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]
Make = Callable[..., Artifact]
Lost = Callable[..., tuple[float, Artifact]]
"""Percentage points that int8 loses against a float network which puts every sample in its place, and the artifact."""


@pytest.fixture
def make(tmp_path: Path, runtime: RuntimeSpec, batches: Batches) -> Make:
    def compiled(source: Path, precision: str, **quant: bool) -> Artifact:
        spec = QuantSpec(precision, **quant)
        return load_backend("openvino").compile(source, runtime, spec, batches, tmp_path / f"{precision}.xml")

    return compiled


def largest_weight(path: Path) -> int:
    """The largest stored 8-bit weight, without its sign."""
    constants = (op for op in ov.Core().read_model(path).get_ops() if op.get_type_name() == "Constant")
    return max(int(np.abs(c.data.astype(int)).max()) for c in constants if c.get_element_type() == ov.Type.i8)


@pytest.mark.parametrize(("reduce_range", "limit"), [(False, range(100, 129)), (True, range(50, 65))])
def test_weights_keep_to_7_bits_where_products_saturate(
    make: Make, convolutions_program: Path, reduce_range: bool, limit: range
) -> None:
    assert largest_weight(make(convolutions_program, "int8", reduce_range=reduce_range).path) in limit


def test_biases_are_corrected_only_where_it_is_asked_for(make: Make, convolutions_program: Path) -> None:
    plain = make(convolutions_program, "int8")
    content = plain.path.with_suffix(".bin").read_bytes()
    corrected = make(convolutions_program, "int8", correct_bias=True)
    assert (plain.biases_corrected, corrected.biases_corrected) == (False, True)
    assert corrected.path.with_suffix(".bin").read_bytes() != content
    assert not make(convolutions_program, "fp32", correct_bias=True).biases_corrected


def test_a_file_that_claims_another_precision_is_refused(make: Make, tokens_program: Path) -> None:
    made = {precision: make(tokens_program, precision).path for precision in ("fp32", "fp16", "int8")}
    for claimed in made:
        for held, path in made.items():
            if claimed == held:
                openvino_files.check_types(path, claimed)
            else:
                with pytest.raises(StageError, match=f"does not hold what {claimed} claims"):
                    openvino_files.check_types(path, claimed)


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.gelu = nn.Linear(8, 8), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x)
        return self.gelu(nn.functional.scaled_dot_product_attention(x, x, x))


class Shared(nn.Module):
    """Gives one tensor under two names, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"logits": logits, "given": x, "scores": logits, "other": self.other(x)}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_output_has_its_name_though_two_are_one_tensor(
    tmp_path: Path, runtime: RuntimeSpec, precision: str
) -> None:
    torch.manual_seed(0)
    rng, model, out = np.random.default_rng(0), Shared().eval(), tmp_path / "shared.xml"
    samples = [{"x": rng.normal(size=(1, 4)).astype(np.float32)} for _ in range(4)]
    source = write_source(Source.EXPORTED_PROGRAM, model, samples[0], tmp_path)
    load_backend("openvino").compile(source, runtime, judged(precision), lambda: iter(samples), out)
    with load_runtime("openvino").open(out, RuntimeOptions(1)) as session:
        assert [spec.name for spec in session.inputs] == ["x"]
        got = session.run(samples[0])
    assert list(got) == ["logits", "given", "scores", "other"]
    np.testing.assert_array_equal(got["given"], samples[0]["x"])
    np.testing.assert_array_equal(got["logits"], got["scores"])
    for name, tensor in model(torch.from_numpy(samples[0]["x"])).items():
        np.testing.assert_allclose(got[name], tensor.detach(), atol=0.02)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.layer = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(self.gain * torch.tanh(x))
        return result


def test_a_factor_of_an_activation_is_no_weight(make: Make, tmp_path: Path, runtime: RuntimeSpec) -> None:
    example = {"x": np.linspace(-1, 1, 16, dtype=np.float32)[None]}
    source = write_source(Source.EXPORTED_PROGRAM, Scaled(), example, tmp_path)
    made = load_backend("openvino").compile(
        source, runtime, QuantSpec("int8"), lambda: iter([example] * 2), tmp_path / "scaled.xml"
    )
    assert made.weight_types["int8"] == 32
    assert openvino_files.float_layers(made.path) == ()


class Pooled(nn.Module):
    """Attention over tokens whose channels are of unlike size, their mean, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 5)
        self.norm.weight.data = torch.logspace(-0.7, 0.7, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(x)
        attended = nn.functional.scaled_dot_product_attention(mixed, mixed, mixed)
        pooled: torch.Tensor = self.head(self.norm(attended + mixed).mean(1))
        return pooled


def test_a_layer_behind_pooled_tokens_is_right_in_int8(runtime: RuntimeSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rng, out = Pooled().eval(), np.random.default_rng(0), tmp_path / "pooled.xml"
    samples = [{"x": rng.normal(size=(1, 7, 24)).astype(np.float32)} for _ in range(16)]
    source = write_source(Source.EXPORTED_PROGRAM, model, samples[0], tmp_path)
    load_backend("openvino").compile(source, runtime, judged("int8"), lambda: iter(samples), out)
    with load_runtime("openvino").open(out, RuntimeOptions(1)) as session, torch.no_grad():
        got = np.concatenate([next(iter(session.run(sample).values())) for sample in samples])
        wanted = np.concatenate([model(torch.from_numpy(sample["x"])).numpy() for sample in samples])
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_an_unsupported_operator_is_named_with_its_module(make: Make, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Sequential(nn.ReLU(), Bessel()))
    source = write_source(Source.EXPORTED_PROGRAM, model, {"x": np.zeros((1, 4), np.float32)}, tmp_path)
    with pytest.raises(
        UnsupportedOpError, match=r"operator aten\.special_bessel_j0\.default of module 1\.1 has no Open"
    ):
        make(source, "fp32")
    assert list(tmp_path.iterdir()) == [source]


def test_attention_and_gelu_stay_whole_and_layers_go_by_their_modules(make: Make, tmp_path: Path) -> None:
    example = {"x": np.zeros((1, 3, 8), np.float32)}
    source = write_source(Source.EXPORTED_PROGRAM, nn.Sequential(Attending()), example, tmp_path)
    names = {node.get_friendly_name() for node in ov.Core().read_model(make(source, "fp32").path).get_ops()}
    assert {"0/ScaledDotProductAttention", "0.gelu/Gelu", "0.project/MatMul"} <= names


def test_quantization_goes_on_without_smoothquant_and_says_so(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nncf

    real, tried = nncf.quantize, []

    def quantize(*arguments: Any, **options: Any) -> Any:
        alphas = options["advanced_parameters"].smooth_quant_alphas
        tried.append(alphas.matmul)
        if alphas.matmul >= 0:
            raise RuntimeError("no smooth way\nat all")
        return real(*arguments, **options)

    monkeypatch.setattr(nncf, "quantize", quantize)
    np.savez(tmp_path / "0.npz", np.zeros((1, 1, 16, 16), np.float32))
    settings = {"reduce_range": False, "correct_bias": False, "keep_float": []}
    job = {"calibration": str(tmp_path), "inputs": ["x"], **settings}
    _, notes = openvino_worker._quantized(ov.Core().read_model(tokens), job)
    assert tried == [0.95, -1]
    assert notes == ["quantized without SmoothQuant, which failed (RuntimeError: no smooth way)"]


def test_quantization_imports_no_torch_only_because_it_is_there(
    make: Make, tokens_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "torch.py").write_text("raise SystemExit('imported, though only because it is there')")
    monkeypatch.setenv("PYTHONPATH", str(slow), prepend=os.pathsep)
    assert make(tokens_program, "int8").path.is_file()


def test_float32_is_calculated_in_float32_unless_asked_otherwise(
    make: Make, tokens: Path, tokens_program: Path, unseen: np.ndarray
) -> None:
    path = make(tokens_program, "fp32").path

    def run(runtime: str, artifact: Path, **properties: str) -> np.ndarray:
        with load_runtime(runtime).open(artifact, RuntimeOptions(properties=properties)) as session:
            return session.run({"x": unseen})["output"]

    exact = run("onnxruntime", tokens)
    np.testing.assert_allclose(run("openvino", path), exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(BundleError, match="load on CPU"):
        run("openvino", path, INFERENCE_PRECISION_HINT="float99")


def test_integer_kernels_stay_where_openvino_is_wrong_without_them(
    make: Make, tokens_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, path = load_runtime("openvino"), make(tokens_program, "fp32").path
    used: list[str | None] = []

    def spy(device: str, options: RuntimeOptions) -> dict[str, str]:
        settings = real(device, options)
        used.append(settings.get("LP_TRANSFORMS_MODE"))
        return settings

    module = sys.modules[type(runtime).__module__]
    real = module._settings
    monkeypatch.setattr(module, "_settings", spy)
    for version in ("2024.6.0", "2025.4.0"):
        monkeypatch.setattr(type(runtime), "version", lambda _, version=version: version)
        runtime.open(path, RuntimeOptions(threads=1, exact_sums=True)).close()
    assert used == [None, "NO"]


RGB = {"mode": "RGB", "scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def port(dtype: str) -> Port:
    return Port("x", dtype, (1, 3, 8, 8))


def test_openvinos_own_tools_find_labels_and_preprocessing_under_their_keys() -> None:
    metadata = {
        "rowcol_edge.contract": "classify",
        "rowcol_edge.labels": '["good", "deep scratch"]',
        "rowcol_edge.preprocess": json.dumps(RGB),
    }
    found = dict(openvino_info.entries(metadata, (port("float32"),)))
    assert found["rowcol_edge", "contract"] == "classify"
    assert found["model_info", "labels"] == "good deep_scratch"
    assert found["model_info", "resize_type"] == "standard"
    assert found["model_info", "reverse_input_channels"] == "YES"
    pixel = np.array([0.0, 10.0, 255.0])
    mean, scale = (np.array(found["model_info", key].split(), float) for key in ("mean_values", "scale_values"))
    np.testing.assert_allclose((pixel - mean) / scale, (pixel * RGB["scale"] - RGB["mean"]) / RGB["std"], rtol=1e-6)
    baked = dict(openvino_info.entries(metadata, (port("uint8"),)))
    assert {("model_info", "mean_values"), ("model_info", "scale_values")}.isdisjoint(baked)
    for other in ({**metadata, "rowcol_edge.contract": "segment"}, {}):
        assert not [path for path, _ in openvino_info.entries(other, (port("float32"),)) if path[0] == "model_info"]


def test_a_precision_that_the_device_does_not_calculate_in_is_refused(
    make: Make, tokens_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runtime = make(tokens_program, "fp32").path, load_runtime("openvino")
    core = ov.Core()

    class Deaf:
        """A device that accepts every hint and calculates in float32."""

        available_devices = ("CPU",)
        read_model = core.read_model

        def compile_model(self, model: Any, device: str, settings: dict[str, str]) -> Any:
            return core.compile_model(model, device, settings | {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(runtime, "_core", Deaf())
    for asked in ({}, {"INFERENCE_PRECISION_HINT": "f32"}, {"INFERENCE_PRECISION_HINT": "dynamic"}):
        runtime.open(path, RuntimeOptions(properties=asked)).close()
    with pytest.raises(
        BundleError, match=r"INFERENCE_PRECISION_HINT on CPU: expected bf16, got f32 – .*ask for \"f32\""
    ):
        runtime.open(path, RuntimeOptions(properties={"INFERENCE_PRECISION_HINT": "bf16"}))


def test_weights_are_mapped_unless_a_target_says_otherwise(
    make: Make, tokens_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runtime = make(tokens_program, "fp32").path, load_runtime("openvino")
    core, mapped = ov.Core(), []

    class Watched:
        available_devices, compile_model = ("CPU",), core.compile_model
        get_property, set_property = core.get_property, core.set_property

        def read_model(self, model: Path) -> Any:
            mapped.append(core.get_property("ENABLE_MMAP"))
            return core.read_model(model)

    monkeypatch.setattr(runtime, "_core", Watched())
    for properties in ({}, {"ENABLE_MMAP": "NO"}, {"ENABLE_MMAP": "YES"}, {}):
        runtime.open(path, RuntimeOptions(properties=properties)).close()
    assert mapped == [True, False, True, True]


def test_one_device_is_asked_for(make: Make, tokens_program: Path) -> None:
    with pytest.raises(BundleError, match="device: expected one, such as CPU, GPU or NPU, got GPU, CPU"):
        load_runtime("openvino").open(make(tokens_program, "fp32").path, RuntimeOptions(providers=("GPU", "CPU")))


def test_compiled_models_are_kept_only_where_a_target_asks_and_never_in_the_bundle(
    make: Make, tokens_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unseen: np.ndarray
) -> None:
    path, runtime = make(tokens_program, "fp32").path, load_runtime("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside = sorted(path.parent.glob("fp32.*"))

    def run(**properties: str) -> np.ndarray:
        with runtime.open(path, RuntimeOptions(properties=properties)) as session:
            return session.run({"x": unseen})["output"]

    expected = run()
    assert not (tmp_path / "cache").exists()
    first = run(CACHE_DIR="rowcol-edge")
    [blob] = (tmp_path / "cache" / "rowcol-edge").iterdir()
    for damage in (blob.read_bytes(), blob.read_bytes()[:100], b""):
        blob.write_bytes(damage)
        np.testing.assert_array_equal(run(CACHE_DIR="rowcol-edge"), first)
    np.testing.assert_array_equal(first, expected)
    assert sorted(path.parent.glob("fp32.*")) == beside
    # openvino would take a model without integer kernels for the same as one with them
    properties = {"CACHE_DIR": "exact"}
    runtime.open(path, RuntimeOptions(properties=properties, exact_sums=True)).close()
    assert not (tmp_path / "cache" / "exact").exists()
    runtime.open(path, RuntimeOptions(properties=properties)).close()
    assert (tmp_path / "cache" / "exact").exists()


@pytest.fixture(scope="module")
def close_calls(tokens: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images that the float network scores nearly alike for class 0; the half that it scores higher is labelled 0."""
    images = np.random.default_rng(7).normal(size=(1500, 1, 16, 16)).astype(np.float32)
    with load_runtime("onnxruntime").open(tokens, RuntimeOptions()) as session:
        outputs = session.run({"x": images})["output"]
    order = np.argsort(Predictions(outputs, np.zeros(1500, np.int64), 0).scores)[730:770]
    labels = np.repeat([1, 0], 20)
    mixed = np.random.default_rng(0).permutation(40)
    return images[order][mixed], labels[mixed]


@pytest.fixture
def lost(tmp_path: Path, runtime: RuntimeSpec) -> Lost:
    def compiled(
        program: Path, batches: Batches, samples: np.ndarray, labels: np.ndarray, judged_by: str,
        max_drop_pp: float | None = None,
    ) -> tuple[float, Artifact]:  # fmt: skip
        def selection() -> Iterator[dict[str, np.ndarray]]:
            for start in range(0, len(samples), 15):
                yield {"x": samples[start : start + 15]}

        judge = metric(judged_by)
        control = None if max_drop_pp is None else AccuracyControl(selection, labels, judged_by, 0, max_drop_pp)
        spec = QuantSpec("int8", accuracy=control)
        made = load_backend("openvino").compile(program, runtime, spec, batches, tmp_path / "out.xml")
        with load_runtime("openvino").open(made.path, RuntimeOptions(threads=1)) as session:
            found = Predictions(session.run({"x": samples})["output"], labels, 0)
        return judge.drop(float(judge.higher_is_better), judge.value(found, None)), made

    return compiled


@pytest.mark.parametrize("judged_by", ["auroc", "escape@overkill=10%"])
def test_accuracy_control_obeys_the_drop_and_a_result_that_is_no_longer_int8_is_refused(
    lost: Lost, tokens_program: Path, batches: Batches, close_calls: tuple[np.ndarray, np.ndarray], judged_by: str
) -> None:
    given = (tokens_program, batches, *close_calls, judged_by)
    free, plain = lost(*given)
    assert free > 5.0
    assert plain.notes == ()
    held, made = lost(*given, 100.0)
    assert held == pytest.approx(free)
    assert made.notes == ("nncf's accuracy control left every layer in int8",)
    with pytest.raises(StageError, match=r"expected 50% of the weights of .* in int8, got 0\.0%"):
        lost(*given, 0.0)


class Uneven(nn.Module):
    """`hurt` sees one feature a thousand times as large as those that decide, of which 8 bits then leave nothing.

    `never` holds most of the weights and of the outputs' size, and decides nothing: a class that never wins. To whom
    ranks layers by the outputs alone, it is the first one to put right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.hurt, self.never = nn.Linear(16, 64), nn.Linear(64, 2), nn.Linear(16, 128)
        with torch.no_grad():
            self.wide.weight[0] *= 1000
            self.hurt.weight[:, 0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        never = -100 * torch.relu(self.never(torch.relu(x))).sum(1, keepdim=True)
        return torch.cat([self.hurt(torch.relu(self.wide(x))), never], 1)


def test_accuracy_control_keeps_some_layers_in_float_names_them_and_holds_the_drop(lost: Lost, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Uneven().eval()
    samples = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    with torch.inference_mode():
        scores = net(torch.from_numpy(samples)).softmax(1)[:, 0].numpy()
    labels = (scores < np.median(scores)).astype(np.int64)  # the float network puts every sample in its place
    program = write_source(Source.EXPORTED_PROGRAM, net, {"x": samples[:1]}, tmp_path, dynamic_batch=True)
    given = (program, lambda: iter([{"x": samples}]), samples, labels, "auroc")
    free, _ = lost(*given)
    held, made = lost(*given, 5.0)
    assert held <= 5.0 < free
    nodes = [node for node in ov.Core().read_model(made.path).get_ops() if node.get_type_name() == "MatMul"]
    kept = {n.get_friendly_name() for n in nodes if n.input_value(1).get_node().get_type_name() == "Constant"}
    assert kept == {"hurt/MatMul"}
    assert made.notes == ("nncf's accuracy control kept in float32: hurt/MatMul",)


def test_accuracy_control_counts_the_samples_of_a_filled_up_batch_once(tmp_path: Path) -> None:
    batches = [{"x": np.arange(n, dtype=np.float32)[:, None]} for n in (5, 2)]
    accuracy = AccuracyControl(lambda: iter(batches), np.arange(7) % 2, "accuracy", None, 1.0)
    job = openvino_backend._spool_selection(accuracy, (Port("x", "float32", (4, 1)),), tmp_path / "selection")
    assert job["counts"] == [4, 1, 2]
    seen: list[np.ndarray] = []

    def feed(path: Path) -> dict[str, np.ndarray]:
        with np.load(path) as arrays:
            return {"x": arrays["arr_0"]}

    def model(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        seen.append(inputs["x"])
        return [np.concatenate([np.zeros_like(inputs["x"]), np.ones_like(inputs["x"])], axis=1)]

    judge = openvino_worker._judge(job, feed)
    files = sorted((tmp_path / "selection").glob("*.npz"))
    assert judge(model, files[:1]) == (0.0, None)
    value, _ = judge(model, files)
    assert [len(array) for array in seen] == [4, 4, 4]
    assert value == pytest.approx(2.0 + 3 / 7)
