"""TFLite: what its own backend and files do beyond the contracts."""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import native, targets
from rowcol_edge.backends import load_backend, program_files, tflite_files, tflite_metadata
from rowcol_edge.backends.base import Artifact, QuantSpec, Source
from rowcol_edge.backends.tflite_worker import _outside
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.errors import ConfigError, StageError, UnsupportedOpError
from rowcol_edge.factoring.tied_kernels import TiedKernels
from rowcol_edge.targets import RuntimeSpec

from .conftest import write_source

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]
Make = Callable[..., Artifact]
PRECISIONS = ("fp32", "fp16", "int8", "int8-io", "int8-dynamic")
RECIPE = Preprocess(mode="L", height=16, width=16, mean=(0.5,), std=(0.25,))
SAID = {
    "rowcol_edge.model": "seam",
    "rowcol_edge.arm": "dense@int8",
    "rowcol_edge.contract": "classify",
    "rowcol_edge.labels": json.dumps(["good", "pitted", "rissig – ü"]),
    "rowcol_edge.preprocess": json.dumps(RECIPE.to_dict()),
}


@pytest.fixture
def program(sources: Callable[[Source, str], Path]) -> Path:
    return sources(Source.EXPORTED_PROGRAM, "tokens")


@pytest.fixture
def make(tmp_path: Path, runtime: RuntimeSpec, batches: Batches) -> Make:
    def compiled(source: Path, precision: str, **metadata: str) -> Artifact:
        out = tmp_path / "out" / f"{precision}.tflite"
        out.parent.mkdir(exist_ok=True)
        return load_backend("tflite").compile(source, runtime, QuantSpec(precision), batches, out, metadata)

    return compiled


def test_a_program_keeps_the_names_types_and_sizes_of_its_inputs(program: Path) -> None:
    signature = program_files.signature(program)
    assert [asdict(port) for port in signature.inputs] == [{"name": "x", "dtype": "float32", "shape": (1, 1, 16, 16)}]
    assert (signature.outputs, signature.free_batch) == (("output",), False)


def test_a_file_that_claims_another_precision_is_refused(make: Make, program: Path) -> None:
    made = {precision: tflite_files.read(make(program, precision).path) for precision in PRECISIONS}
    for claimed in made:
        for held, model in made.items():
            if claimed == held:
                tflite_files.check_types(model, claimed)
            else:
                with pytest.raises(StageError, match=f"does not hold what {claimed} claims"):
                    tflite_files.check_types(model, claimed)


def test_notes_count_transposes_and_what_xnnpack_leaves(make: Make, program: Path) -> None:
    [note] = make(program, "int8-io").notes
    counted = tflite_files.operators(tflite_files.read(make(program, "int8-io").path))
    assert note.startswith(f"{counted['TRANSPOSE']} TRANSPOSE operators; ")
    assert f" of {counted.total()} nodes stay outside XNNPACK" in note
    assert "RSQRT" in note  # which XNNPACK does not have in int8
    [note] = make(program, "int8").notes
    assert f"0 of {tflite_files.operators(tflite_files.read(make(program, 'int8').path)).total()} nodes stay" in note


def test_a_node_is_outside_if_it_leads_from_no_inputs_of_a_part_to_its_outputs() -> None:
    def node(index: int, name: str, inputs: list[int], outputs: list[int]) -> dict[str, Any]:
        return {"index": index, "op_name": name, "inputs": inputs, "outputs": outputs}

    chain = [node(0, "ADD", [0], [1]), node(1, "GELU", [1], [2]), node(2, "MUL", [2], [3]), node(3, "SUB", [3], [4])]
    parts = [node(4, "DELEGATE", [0], [1]), node(5, "DELEGATE", [2], [4])]
    assert list(_outside([*chain, *parts])) == ["GELU"]
    assert list(_outside(chain)) == ["ADD", "GELU", "MUL", "SUB"]


def test_metadata_says_what_the_convention_has_places_for(make: Make, program: Path) -> None:
    made = make(program, "int8", **SAID)
    stored = tflite_files.metadata(tflite_files.read(made.path))
    assert {key: stored[key].decode() for key in SAID} == SAID
    described = stored["TFLITE_METADATA"]
    assert described[4:8] == b"M001"
    for text in ("seam", "arm dense@int8, contract classify", "x", "output", "labels.txt"):
        assert text.encode() + b"\0" in described
    # pixels of 0 to 255 are normalized by (x − 127.5) ÷ 63.75
    for number in (127.5, 63.75):
        assert np.float32(number).tobytes() in described
    with zipfile.ZipFile(made.path) as archive:
        assert archive.read("labels.txt").decode().splitlines() == ["good", "pitted", "rissig – ü"]


def test_metadata_reads_back_by_the_schema() -> None:
    """Slots of metadata_schema.fbs: model 0 name, 3 graphs; graph 2 inputs, 3 outputs; tensor 0 name, 3 content."""
    table = Table.root(tflite_metadata.described(SAID, ["x"], ["output"]))
    graph = table.tables(3)[0]
    [x], [output] = graph.tables(2), graph.tables(3)
    assert (table.text(0), x.text(0), output.text(0)) == ("seam", "x", "output")
    content = x.table(3)
    assert content.byte(0) == 2  # ImageProperties
    image = content.table(1)
    assert image.byte(0) == 2  # GRAYSCALE
    assert (image.table(1).number(0), image.table(1).number(1)) == (16, 16)
    unit = x.tables(4)[0]
    assert unit.byte(0) == 1  # NormalizationOptions
    file = output.tables(6)[0]
    assert (file.text(0), file.byte(2)) == ("labels.txt", 2)  # TENSOR_AXIS_LABELS


def test_buffers_are_aligned_for_vector_instructions(make: Make, program: Path) -> None:
    content = make(program, "fp32").path.read_bytes()
    model = tflite_files.read(make(program, "fp32").path)
    sizes = [buffer.data for buffer in model.buffers if buffer.data is not None and len(buffer.data) > 64]
    assert sizes
    for data in sizes:
        assert content.index(bytes(data)) % 16 == 0


def test_every_int8_linear_layer_has_a_bias(make: Make, tmp_path: Path, runtime: RuntimeSpec) -> None:
    model = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16))
    example = {"x": np.linspace(-1, 1, 16, dtype=np.float32)[None]}
    source = write_source(Source.EXPORTED_PROGRAM, model, example, tmp_path)
    out = tmp_path / "biased.tflite"
    load_backend("tflite").compile(source, runtime, QuantSpec("int8"), lambda: iter([example] * 2), out)
    held = tflite_files.read(out)
    [graph] = held.subgraphs
    linear = [layer for layer in graph.operators if tflite_files.kind(held, layer) == "FULLY_CONNECTED"]
    assert [len(layer.inputs) for layer in linear] == [3, 3]
    given, weight, bias = (graph.tensors[index] for index in linear[0].inputs)
    values = held.buffers[bias.buffer].data.view(np.int32)
    assert values.tolist() == [0] * 4
    assert list(bias.shape) == [4]
    assert bias.quantization.scale.tolist() == (weight.quantization.scale * given.quantization.scale).tolist()


class Embedding(nn.Module):
    """Gives what its head reads as well; ``normalised`` as a transformer's is, which stays float around its layers."""

    def __init__(self, *, normalised: bool) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8) if normalised else nn.Identity()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        embedding = self.norm(self.one(x) + self.other(x))
        return {"logits": self.head(embedding), "embedding": embedding}


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("precision", ["int8", "int8-io"])
def test_an_output_that_the_model_itself_reads_is_given_as_asked(
    tmp_path: Path, runtime: RuntimeSpec, normalised: bool, precision: str
) -> None:
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), Embedding(normalised=normalised).eval()
    samples = [{"x": rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(8)]
    source = write_source(Source.EXPORTED_PROGRAM, model, samples[0], tmp_path)
    out = tmp_path / "embedding.tflite"
    load_backend("tflite").compile(source, runtime, QuantSpec(precision), lambda: iter(samples), out)
    with load_runtime("tflite").open(out, RuntimeOptions(1)) as session:
        assert {spec.name: spec.dtype for spec in session.outputs} == {"logits": "float32", "embedding": "float32"}
        got = [session.run(sample) for sample in samples]
    wanted = model(torch.from_numpy(np.concatenate([sample["x"] for sample in samples])))
    for name, tensor in wanted.items():
        array = np.concatenate([outputs[name] for outputs in got])
        assert np.linalg.norm(array - tensor.detach().numpy()) < 0.05 * np.linalg.norm(tensor.detach().numpy())


def test_a_dynamic_batch_is_refused(make: Make, tmp_path: Path) -> None:
    example = {"x": np.zeros((1, 4), np.float32)}
    source = write_source(Source.EXPORTED_PROGRAM, nn.Linear(4, 2), example, tmp_path, dynamic_batch=True)
    with pytest.raises(ConfigError, match=r"expected a fixed batch.* build it without --dynamic-batch"):
        make(source, "fp32")
    assert list((tmp_path / "out").iterdir()) == []


def test_zero_points_are_written_once_for_all_tensors_with_as_many(make: Make, tmp_path: Path) -> None:
    """Weights have one for each channel, all of them zero."""
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())))
    source = write_source(Source.EXPORTED_PROGRAM, model, {"x": np.zeros((1, 64), np.float32)}, tmp_path)

    def calibration() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)}

    out = tmp_path / "made.tflite"
    load_backend("tflite").compile(
        source, targets.load("generic-x86").runtime("tflite"), QuantSpec("int8"), calibration, out
    )
    found = tflite_files.read(out)
    points = [tensor.quantization.zeroPoint for tensor in found.subgraphs[0].tensors if tensor.quantization is not None]
    channels = [each for each in points if each is not None and len(each) == 64]
    assert len(channels) == 8  # of weights and biases
    assert all(bool((each == 0).all()) for each in channels)
    plain = flatbuffers.Builder(1024)
    plain.Finish(found.Pack(plain), file_identifier=b"TFL3")
    assert len(tflite_files.packed(found)) < len(plain.Output()) - 6 * 8 * 64


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0(x)


def test_an_unsupported_operator_is_named_with_its_module(make: Make, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Bessel())
    source = write_source(Source.EXPORTED_PROGRAM, model, {"x": np.zeros((1, 4), np.float32)}, tmp_path)
    with pytest.raises(UnsupportedOpError, match=r"operator aten\.i0\.default of module 1 has no TFLite form"):
        make(source, "fp32")
    assert list((tmp_path / "out").iterdir()) == []


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.block(torch.relu(self.first(x))))}


def test_layers_go_by_their_modules_or_by_the_output_they_give(make: Make, tmp_path: Path) -> None:
    source = write_source(Source.EXPORTED_PROGRAM, Named(), {"x": np.zeros((1, 16), np.float32)}, tmp_path)
    model = tflite_files.read(make(source, "fp32").path)
    [graph] = model.subgraphs
    layers = [op for op in graph.operators if tflite_files.kind(model, op) == "FULLY_CONNECTED"]
    assert [graph.tensors[op.outputs[0]].name.partition(b";")[0] for op in layers] == [b"first", b"block.0", b"logits"]


def test_the_layer_that_quantization_hurts_can_stay_in_float(
    make: Make, program: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches
) -> None:
    backend = load_backend("tflite")
    made = make(program, "int8")
    held = tflite_files.int8_layers(tflite_files.read(made.path))
    errors = backend.layer_errors(program, made.path, batches)
    assert {layer.name for layer in errors} == set(held)
    assert [layer.error for layer in errors] == sorted((layer.error for layer in errors), reverse=True)
    assert all(0 < layer.error < 0.1 for layer in errors)  # of one layer, where the whole network has 0.06
    kept = QuantSpec("int8", keep_float=(errors[0].name,))
    mixed = backend.compile(program, runtime, kept, batches, tmp_path / "mixed.tflite")
    assert set(tflite_files.int8_layers(tflite_files.read(mixed.path))) == set(held) - {errors[0].name}
    assert mixed.weight_types["float32"] > made.weight_types["float32"]


@pytest.mark.parametrize(("oldest", "per_channel"), [("2.14.0", False), ("2.15.0", True)])
def test_layer_errors_are_of_the_scales_that_the_file_has(
    program: Path, tmp_path: Path, runtime: RuntimeSpec, batches: Batches, oldest: str, per_channel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    backend, out = load_backend("tflite"), tmp_path / "a.tflite"
    backend.compile(program, replace(runtime, oldest=oldest), QuantSpec("int8-dynamic"), batches, out)
    assert tflite_files.linear_per_channel(tflite_files.read(out)) == per_channel
    asked: list[dict[str, Any]] = []
    run = native.run

    def watched(module: str, arguments: list[Path], **more: Any) -> str:
        asked.append(json.loads(arguments[0].read_text()))
        return run(module, arguments, **more)

    monkeypatch.setattr(native, "run", watched)
    assert len(backend.layer_errors(program, out, batches)) == len(tflite_files.int8_layers(tflite_files.read(out)))
    assert [job["linear_per_channel"] for job in asked] == [per_channel]


class Turned(nn.Module):
    """Layers of one size whose weights do not lie in memory row by row: parameters, buffers and plain constants."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(32, 32).t()) for _ in range(4)])
        self.register_buffer("held", torch.randn(32, 32).t())
        self.constant = torch.randn(32, 32).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in (*self.parts, self.held, self.constant):
            x = torch.tanh(nn.functional.linear(x, weight))
        return x


def convolutions_channels_last() -> nn.Module:
    layers = [part for _ in range(6) for part in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def tied_kernels() -> nn.Module:
    tied = [TiedKernels(torch.randn(16, 16, 3, 3) / 12, nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*tied).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("network", "shape"),
    [(Turned, (1, 32)), (convolutions_channels_last, (1, 16, 8, 8)), (tied_kernels, (1, 16, 8, 8))],
)
def test_weights_in_any_memory_layout_stay_with_their_layers(
    make: Make, tmp_path: Path, network: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = network().eval()
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    [name] = inspect.signature(model.forward).parameters
    out = make(write_source(Source.EXPORTED_PROGRAM, model, {name: x}, tmp_path), "fp32").path
    with load_runtime("tflite").open(out, RuntimeOptions(1)) as session, torch.no_grad():
        [got] = session.run({name: x}).values()
        wanted = model(torch.from_numpy(x)).numpy()
    assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted)


class Table:
    """Just enough of flatbuffers to read a table by its slots."""

    def __init__(self, content: bytes, start: int) -> None:
        self.content, self.start = content, start

    @classmethod
    def root(cls, content: bytes) -> Table:
        return cls(content, int.from_bytes(content[:4], "little"))

    def _int(self, at: int, size: int = 4, signed: bool = False) -> int:
        return int.from_bytes(self.content[at : at + size], "little", signed=signed)

    def _slot(self, slot: int) -> int:
        vtable = self.start - self._int(self.start, signed=True)
        offset = self._int(vtable + 4 + 2 * slot, 2) if 4 + 2 * slot < self._int(vtable, 2) else 0
        assert offset, f"no slot {slot}"
        return self.start + offset

    def _offset(self, slot: int) -> int:
        return self._slot(slot) + self._int(self._slot(slot))

    def table(self, slot: int) -> Table:
        return Table(self.content, self._offset(slot))

    def tables(self, slot: int) -> list[Table]:
        at = self._offset(slot)
        return [Table(self.content, at + 4 + 4 * i + self._int(at + 4 + 4 * i)) for i in range(self._int(at))]

    def text(self, slot: int) -> str:
        at = self._offset(slot)
        return self.content[at + 4 : at + 4 + self._int(at)].decode()

    def byte(self, slot: int) -> int:
        return self.content[self._slot(slot)]

    def number(self, slot: int) -> int:
        return self._int(self._slot(slot))
