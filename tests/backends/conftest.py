"""Two small networks as backends start from them: one of convolutions with a residual, one of tokens with attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import targets
from rowcol_edge.backends import program_files
from rowcol_edge.backends.base import QuantSpec, Source
from rowcol_edge.export import capture
from rowcol_edge.export.onnx import export
from rowcol_edge.targets import RuntimeSpec

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]


class Convolutions(nn.Module):
    """Conv → ReLU → (Conv → ReLU → Conv) + itself → ReLU → a low-rank pair → mean → Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.head(torch.relu(self.up(self.down(x))).mean((2, 3)))


class Tokens(nn.Module):
    """Patches → class token and positions → one attention block with a low-rank projection → Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 32) * 0.1), nn.Parameter(torch.randn(1, 17, 32) * 0.1)
        self.n1, self.n2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 32))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(samples, -1, -1), x], 1) + self.pos
        q, k, v = self.qkv(self.n1(x)).reshape(samples, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(samples, 17, 32))
        x = x + self.down(nn.functional.gelu(self.up(self.n2(x))))
        return self.head(x[:, 0])


RUNTIME = RuntimeSpec(
    name="onnxruntime",
    oldest="1.17.0",
    opset=18,
    ir_version=9,
    providers=("CPUExecutionProvider",),
    precisions=("fp32", "fp16", "int8", "int8-dynamic"),
    requirements=("onnxruntime",),
    why="",
)


def judged(precision: str) -> QuantSpec:
    """For files whose outputs are judged here: int8 that x86-64 processors without VNNI do not saturate either."""
    return QuantSpec.for_target(precision, targets.load("generic-x86"))


@pytest.fixture(scope="session")
def runtime() -> RuntimeSpec:
    return RUNTIME


def _exported(model: nn.Module, out: Path, *, dynamic_batch: bool) -> Path:
    example = {"x": np.zeros((1, 1, 16, 16), np.float32)}
    export(model, example, out, opset=RUNTIME.opset, ir_version=RUNTIME.ir_version, dynamic_batch=dynamic_batch)
    return out


NETWORKS: dict[str, type[nn.Module]] = {"convolutions": Convolutions, "tokens": Tokens}


def _captured(network: type[nn.Module], folder: Path, *, dynamic_batch: bool = False) -> Path:
    torch.manual_seed(0)
    example = {"x": np.zeros((1, 1, 16, 16), np.float32)}
    return write_source(Source.EXPORTED_PROGRAM, network(), example, folder, dynamic_batch=dynamic_batch)


def write_source(
    consumes: Source, model: nn.Module, example: dict[str, np.ndarray], folder: Path, *, dynamic_batch: bool = False
) -> Path:
    """The file of a model that a backend starts from."""
    if consumes is Source.ONNX:
        out = folder / "net.onnx"
        export(model, example, out, opset=RUNTIME.opset, ir_version=RUNTIME.ir_version, dynamic_batch=dynamic_batch)
        return out
    captured = capture.program(model, example, dynamic_batch=dynamic_batch)
    inputs = capture.input_names(captured, model, list(example))
    out = folder / "net.pt2"
    program_files.write(captured, inputs, capture.output_names(captured), out)
    return out


@pytest.fixture(scope="session")
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Source, str], Path]:
    """The file of ``convolutions`` or ``tokens`` that a backend starts from; programs have a fixed batch."""
    made: dict[str, Path] = {}

    def source(consumes: Source, network: str) -> Path:
        if consumes is Source.ONNX:
            path: Path = request.getfixturevalue(network)
            return path
        if network not in made:
            made[network] = _captured(NETWORKS[network], tmp_path_factory.mktemp(network))
        return made[network]

    return source


@pytest.fixture(scope="session")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return _exported(Convolutions(), tmp_path_factory.mktemp("onnx") / "convolutions.onnx", dynamic_batch=False)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return _exported(Tokens(), tmp_path_factory.mktemp("onnx") / "tokens.onnx", dynamic_batch=True)


@pytest.fixture(scope="session")
def convolutions_program(sources: Callable[[Source, str], Path]) -> Path:
    return sources(Source.EXPORTED_PROGRAM, "convolutions")


@pytest.fixture(scope="session")
def tokens_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a free batch, as ``tokens`` has."""
    return _captured(Tokens, tmp_path_factory.mktemp("tokens"), dynamic_batch=True)


def smooth(samples: int, seed: int) -> np.ndarray:
    """Images with most of their energy in the low frequencies, (samples, 1, 16, 16) float32."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(samples, 1, 4, 4)).repeat(4, axis=2).repeat(4, axis=3)
    return (coarse + 0.3 * rng.normal(size=(samples, 1, 16, 16))).astype(np.float32)


@pytest.fixture(scope="session")
def unseen() -> np.ndarray:
    """Images that no calibration has seen."""
    return smooth(12, seed=99)


@pytest.fixture(scope="session")
def batches() -> Batches:
    def start() -> Iterator[dict[str, np.ndarray]]:
        for seed in range(4):
            yield {"x": smooth(5, seed)}

    return start
