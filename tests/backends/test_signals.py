"""One-dimensional and transposed convolutions, factored, from torch to every runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.backends import BACKENDS, load_backend
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import collect
from rowcol_edge.targets import RuntimeSpec

from .conftest import write_source

RANKS = {"down": 6, "up": 6, "flat": 8, "wide": 5}
ERROR = {"fp32": 1e-5, "int8": 0.1}


class Signals(nn.Module):
    """A signal of two channels → three values, by way of both kinds of transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 16, 5, stride=2, padding=2)
        self.up = nn.ConvTranspose1d(16, 16, 4, stride=2, padding=1)
        self.flat = nn.Conv2d(16, 16, 3, padding=1)
        self.wide = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(torch.relu(self.down(x)))).reshape(-1, 16, 4, 8)
        return self.head(torch.relu(self.wide(torch.relu(self.flat(x)))).mean((2, 3)))


def waves(samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    phase = np.arange(32) * rng.uniform(0.05, 1.0, (samples, 2, 1)) + rng.uniform(0, 6, (samples, 2, 1))
    return (np.sin(phase) + 0.1 * rng.normal(size=phase.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def factored() -> nn.Module:
    torch.manual_seed(0)
    model = Signals().eval()
    plan = FactorPlan(tuple(LayerPlan(name, "project", rank) for name, rank in RANKS.items()))
    return apply(model, plan, collect(model, [{"x": waves(64, seed=1)}], list(RANKS)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_factored_signal_net_computes_the_same(
    name: str, precision: str, factored: nn.Module, tmp_path: Path, runtime: RuntimeSpec
) -> None:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        for seed in range(2, 6):
            yield {"x": waves(5, seed)}

    backend, out = load_backend(name), tmp_path / f"artifact{load_backend(name).suffix}"
    source = write_source(backend.consumes, factored, {"x": np.zeros((1, 2, 32), np.float32)}, tmp_path)
    backend.compile(source, runtime, QuantSpec(precision), batches, out)
    unseen = waves(12, seed=9)
    with torch.no_grad():
        wanted = factored(torch.from_numpy(unseen)).numpy()
    with load_runtime(backend.host_runtime).open(out, RuntimeOptions(threads=1)) as session:
        got = np.concatenate([session.run({"x": unseen[i : i + 1]})["output"] for i in range(len(unseen))])
    assert np.linalg.norm(got - wanted) <= ERROR[precision] * np.linalg.norm(wanted)
