from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from rowcol_edge.errors import ConfigError, DataError, ModelError, StageError, UnsupportedOpError, WeightsError
from rowcol_edge.export.onnx import export, program

RNG = np.random.default_rng(0)


class Net(nn.Module):
    """Prints while it runs, as users' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        sys.stdout.write("forward\n")
        return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": self.a(left) + self.b(right), "gap": self.a(left) - self.b(right)}


def images(samples: int = 1) -> dict[str, np.ndarray]:
    return {"image": RNG.normal(size=(samples, 1, 8, 8)).astype(np.float32)}


def save(model: nn.Module, example: dict[str, np.ndarray], out: Path, **options: object) -> onnx.ModelProto:
    export(model, example, out, **({"opset": 18, "ir_version": 9} | options))  # type: ignore[arg-type]
    return onnx.load(out)


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def test_the_file_has_the_versions_names_and_outputs_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    model.head.eval()
    proto = save(model, images(), tmp_path / "m.onnx")
    assert capfd.readouterr().out == ""
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (9, [("", 18)])
    assert [v.name for v in proto.graph.input] == ["image"]
    assert shape(proto.graph.input[0]) == [1, 1, 8, 8]
    assert [v.name for v in proto.graph.output] == ["output"]
    assert {"conv.weight", "head.weight"} <= {t.name for t in proto.graph.initializer}
    assert (model.training, model.conv.training, model.head.training) == (True, True, False)
    feeds = images()
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(feeds["image"])).numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", feeds)["output"], expected, rtol=1e-4, atol=1e-6)


def test_the_file_tells_nothing_of_the_machine_that_built_it(tmp_path: Path) -> None:
    save(Net(), images(), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_dynamic_batch_takes_any_number_of_samples(tmp_path: Path) -> None:
    proto = save(Net(), images(1), tmp_path / "m.onnx", dynamic_batch=True)
    assert shape(proto.graph.input[0]) == ["batch", 1, 8, 8]
    assert run(tmp_path / "m.onnx", images(5))["output"].shape == (5, 3)
    assert run(tmp_path / "m.onnx", images(1))["output"].shape == (1, 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_several_inputs_in_any_order_and_a_dict_of_outputs(tmp_path: Path, dynamic: bool) -> None:
    example = {"right": np.ones((1, 5), np.float32), "left": np.ones((1, 4), np.float32)}
    model = TwoInputs().eval()
    save(model, example, tmp_path / "m.onnx", dynamic_batch=dynamic)
    got = run(tmp_path / "m.onnx", example)
    assert list(got) == ["total", "gap"]
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in example.items()})
    np.testing.assert_allclose(got["gap"], expected["gap"].numpy(), rtol=1e-5, atol=1e-6)


class Sentence(nn.Module):
    """Its outputs are called as torch calls what the operators in it return."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        words = self.words(ids) * mask.unsqueeze(-1)
        return {"mul": words.sum(1), "embedding": words.mean(1)}


def test_whole_numbers_go_in_and_an_output_may_be_called_as_an_operator(tmp_path: Path) -> None:
    model = Sentence().eval()
    feeds = {"ids": np.arange(5, dtype=np.int64)[None], "mask": np.int64([[1, 1, 1, 0, 0]])}
    save(model, feeds, tmp_path / "s.onnx")
    with torch.no_grad():
        expected = model(*(torch.from_numpy(array) for array in feeds.values()))
    got = run(tmp_path / "s.onnx", feeds)
    assert list(got) == ["mul", "embedding"]
    assert all(np.allclose(got[name], value.numpy(), atol=1e-6) for name, value in expected.items())


def test_inputs_behind_an_optional_one_go_by_keyword(tmp_path: Path) -> None:
    class Gap(nn.Module):
        def forward(
            self, a: torch.Tensor, mask: torch.Tensor | None = None, *, c: torch.Tensor, b: torch.Tensor
        ) -> torch.Tensor:
            return a + 10 * b + 100 * c

    example = {name: np.full((1, 1), value, np.float32) for name, value in [("c", 3), ("b", 2), ("a", 1)]}
    save(Gap(), example, tmp_path / "m.onnx", dynamic_batch=True)
    assert run(tmp_path / "m.onnx", example)["output"].tolist() == [[321.0]]


def test_inputs_under_other_names_go_by_position_and_a_tuple_is_numbered(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first, second = inputs
            return first * 2, second + 1

    example = {"input": np.ones((1, 2), np.float32), "length": np.ones((1, 3), np.float32)}
    proto = save(Pair(), example, tmp_path / "m.onnx", dynamic_batch=True)
    assert [v.name for v in proto.graph.input] == ["input", "length"]
    assert [v.name for v in proto.graph.output] == ["output_0", "output_1"]
    assert run(tmp_path / "m.onnx", example)["output_1"].tolist() == [[2.0, 2.0, 2.0]]
    named = save(Pair(), example, tmp_path / "n.onnx", output_names=["map", "score"])
    assert [v.name for v in named.graph.output] == ["map", "score"]
    with pytest.raises(ModelError, match="output names: expected 2 different ones, got map"):
        export(Pair(), example, tmp_path / "o.onnx", opset=18, ir_version=9, output_names=["map"])


def test_a_transformer_layer_exports_without_its_fused_operator(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    feeds = {"tokens": RNG.normal(size=(1, 4, 8)).astype(np.float32)}
    save(model, feeds, tmp_path / "m.onnx")
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(feeds["tokens"])).numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", feeds)["output"], expected, rtol=1e-4, atol=1e-5)


@torch.library.custom_op("rowcol_edge_test::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@strange.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return strange(x)


class Bessel(nn.Module):
    """An operator that the exporter takes apart first; what comes out has no ONNX form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Strange(), r"operator rowcol_edge_test\.strange of module 1\.part \(Strange\) has no ONNX form"),
        (Bessel(), r"operator prims\.bessel_j0 of module 1\.part \(Bessel\) has no ONNX form"),
        (Branching(), r"torch\.export cannot take module 1\.part \(Branching\)"),
    ],
)
def test_what_has_no_onnx_form_is_named_with_its_module(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], part: nn.Module, message: str
) -> None:
    inner = nn.Sequential()
    inner.add_module("part", part)
    model = nn.Sequential(nn.Linear(3, 3), inner)
    with pytest.raises(UnsupportedOpError, match=message):
        export(model, {"x": np.ones((1, 3), np.float32)}, tmp_path / "m.onnx", opset=18, ir_version=9)
    assert list(tmp_path.iterdir()) == []
    said = capfd.readouterr()
    assert said.out == ""
    assert "def forward" not in said.err  # the graph as far as torch came


def test_a_model_that_fixes_its_batch_is_refused_a_free_one(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, -1)

    with pytest.raises(ModelError, match="the model fixes its batch size"):
        export(
            Fixed(), {"x": np.ones((2, 3), np.float32)}, tmp_path / "m.onnx", opset=18, ir_version=9, dynamic_batch=True
        )


def test_over_two_gigabytes_is_refused_before_anything_is_traced_or_written(tmp_path: Path) -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2**15, 2**14 + 2**10, device="meta"))
            self.tied = self.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("traced")

    with pytest.raises(StageError, match=r"an ONNX file ends at 2 GB, got 2,281,701,376 bytes"):
        export(Huge(), {"x": np.ones((1, 1), np.float32)}, tmp_path / "m.onnx", opset=18, ir_version=9)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_cannot_be_reached_is_an_error_not_another_opset(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError, match="expected opset 17, got opset 18"):
        export(Net(), images(), tmp_path / "m.onnx", opset=17, ir_version=8)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(ConfigError, match="opset: expected 17 to 21, got 12"):
        export(Net(), images(), tmp_path / "m.onnx", opset=12, ir_version=8)


def test_a_newer_opset_is_reached(tmp_path: Path) -> None:
    proto = save(Net(), images(), tmp_path / "m.onnx", opset=21, ir_version=10)
    assert (proto.opset_import[0].version, proto.ir_version) == (21, 10)
    assert run(tmp_path / "m.onnx", images())["output"].shape == (1, 3)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"weights head\.weight: expected finite values"):
        export(model, images(), tmp_path / "m.onnx", opset=18, ir_version=9)


def test_bad_inputs_and_outputs_are_named(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"maps": [x, x]}

    def refused(model: nn.Module, example: dict[str, np.ndarray]) -> None:
        export(model, example, tmp_path / "m.onnx", opset=18, ir_version=9)

    with pytest.raises(ModelError, match="expected a tensor, or a flat dict, tuple or list of tensors, got maps: list"):
        refused(Nested(), {"x": np.ones((1, 2), np.float32)})
    with pytest.raises(ModelError, match="forward of Net does not take these inputs: expected inputs named image"):
        refused(Net(), {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)})
    with pytest.raises(DataError, match="example input: expected at least one input"):
        refused(Net(), {})
    with pytest.raises(DataError, match="expected arrays of numbers"):
        refused(Net(), {"image": np.array(["a"])})


def test_program_is_the_captured_model() -> None:
    captured = program(Net(), images(2))
    assert "conv.weight" in captured.state_dict
    assert captured.example_inputs is not None
    assert len(captured.example_inputs[0]) == 1
    assert tuple(captured.module()(torch.from_numpy(images(2)["image"])).shape) == (2, 3)
