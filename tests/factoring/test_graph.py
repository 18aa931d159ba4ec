"""Layers, calls, pairs – read from small models whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rowcol_edge.errors import ModelError, UnsupportedOpError
from rowcol_edge.factoring.graph import BatchNormPair, FactoredPair, trace


class Net(nn.Module):
    """conv → bn → relu → conv, a linear layer called twice, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.shared = nn.Linear(8, 8)
        self.unused = nn.Linear(4, 4)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.bn1(self.conv1(image))))
        x = self.shared(torch.relu(self.shared(x.mean((2, 3)))))
        return x * scale


def test_calls_order_and_positions() -> None:
    graph = trace(Net(), {"scale": torch.ones(2, 1), "image": torch.randn(2, 1, 9, 9)})
    assert [layer.name for layer in graph.layers] == ["conv1", "bn1", "conv2", "shared", "unused"]
    by_name = {layer.name: layer for layer in graph.layers}
    assert by_name["conv1"].positions == 81
    assert by_name["conv2"].positions == 16
    assert (by_name["shared"].calls, by_name["shared"].own_calls, by_name["shared"].positions) == (2, 2, 2)
    assert (by_name["unused"].calls, by_name["unused"].own_calls) == (0, 0)
    assert graph.batchnorms == (BatchNormPair("conv1", "bn1"),)
    assert graph.layer("nothing") is None


def test_a_transposed_convolution_works_at_its_inputs() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.ConvTranspose1d(3, 4, 4, stride=3))
    layers = trace(model, {"input": torch.randn(5, 2, 11)}).layers
    assert [(layer.positions, layer.outputs) for layer in layers] == [(5, 5), (5, 16)]
    layers = trace(nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2)), {"input": torch.randn(2, 3, 4, 5)}).layers
    assert [(layer.positions, layer.outputs) for layer in layers] == [(20, 80)]


def test_batch_norm_over_positions_is_no_pair() -> None:
    class Unbatched(nn.Module):
        """Its batch norm takes (channels, positions) for (samples, features)."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x[0]))[None]

    assert trace(Unbatched(), {"x": torch.randn(1, 2, 5)}).batchnorms == ()
    batched = nn.Sequential(nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5))
    assert trace(batched, {"input": torch.randn(1, 2, 5)}).batchnorms == (BatchNormPair("0", "1"),)


def test_training_flags_and_hooks_are_put_back() -> None:
    model = Net().train()
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    trace(model, {"image": torch.randn(2, 1, 9, 9), "scale": torch.ones(1)})
    assert model.training
    assert model.conv1.training
    assert not model.bn1.training
    assert torch.equal(model.bn1.running_mean, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batchnorm_with_another_reader_is_no_pair() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + self.bn(y)

    assert trace(Two(), {"x": torch.randn(1, 1, 3, 3)}).batchnorms == ()


def test_linear_batchnorm_needs_features_on_the_channel_axis() -> None:
    flat = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    assert trace(flat, {"input": torch.randn(2, 4)}).batchnorms == (BatchNormPair("0", "1"),)
    tokens = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))  # normalises the 6 tokens, not the 6 features
    assert trace(tokens, {"input": torch.randn(2, 6, 4)}).batchnorms == ()


@pytest.mark.parametrize(
    ("layers", "shape", "rank"),
    [
        ([nn.Linear(32, 4), nn.Linear(4, 32)], (2, 32), 4),
        ([nn.Linear(32, 4), nn.Dropout(0.5), nn.Linear(4, 32)], (2, 32), 4),
        ([nn.Linear(32, 24), nn.Linear(24, 32)], (2, 32), 0),  # above break-even
        ([nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 32)], (2, 32), 0),
        ([nn.Conv2d(16, 4, 3), nn.Conv2d(4, 16, 1)], (2, 16, 5, 5), 4),
        ([nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 16, 1)], (2, 16, 5, 5), 4),
        ([nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 3)], (2, 16, 5, 5), 4),
        ([nn.Conv2d(16, 4, 3), nn.Conv2d(4, 16, 3)], (2, 16, 5, 5), 0),  # no single convolution equals the two
        ([nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1)], (2, 16, 5, 5), 0),  # depthwise separable
        ([nn.Conv1d(16, 4, 3), nn.Conv1d(4, 16, 1)], (2, 16, 9), 4),
        ([nn.ConvTranspose1d(16, 4, 3, stride=2), nn.Conv1d(4, 16, 1)], (2, 16, 9), 4),
        ([nn.ConvTranspose2d(16, 4, 3, stride=2), nn.Conv2d(4, 16, 1)], (2, 16, 5, 5), 4),
        ([nn.Conv2d(16, 4, 1), nn.ConvTranspose2d(4, 16, 3, stride=2)], (2, 16, 5, 5), 4),
        ([nn.ConvTranspose2d(16, 4, 3, stride=2), nn.Conv2d(4, 16, 1, stride=2)], (2, 16, 5, 5), 0),  # two strides
        ([nn.Conv2d(16, 4, 3), nn.ConvTranspose2d(4, 16, 3)], (2, 16, 5, 5), 0),
    ],
)
def test_already_factored(layers: list[nn.Module], shape: tuple[int, ...], rank: int) -> None:
    graph = trace(nn.Sequential(*layers), {"input": torch.randn(shape)})
    expected = (FactoredPair("0", str(len(layers) - 1), rank),) if rank else ()
    assert graph.factored == expected


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_layer_whose_weight_is_computed_is_called_and_keeps_its_batch_norm(norm: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Conv1d(3, 8, 3)), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3)).eval()
    graph = trace(model, {"input": torch.randn(2, 3, 9)})
    assert [layer.name for layer in graph.layers] == ["0", "1", "3"]
    layer = graph.layers[0]
    assert (layer.calls, layer.own_calls, layer.positions, layer.elsewhere) == (1, 1, 7, "")
    assert (graph.batchnorms, graph.couplings) == ((), ())  # what is written into such a weight does not stay there


def test_attention_projection_is_seen_but_not_called() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    layer = trace(Attention(), {"x": torch.randn(2, 3, 8)}).layer("attention.out_proj")
    assert layer is not None
    assert (layer.calls, layer.own_calls) == (1, 0)


def test_what_export_cannot_take_names_the_module() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    model = nn.Sequential(nn.Linear(3, 3), Branch())
    with pytest.raises(UnsupportedOpError, match="module '1'"):
        trace(model, {"input": torch.randn(2, 3)})


def test_wrong_example() -> None:
    with pytest.raises(ModelError, match="module '0'"):
        trace(nn.Sequential(nn.Linear(3, 3)), {"input": torch.randn(2, 4)})
    with pytest.raises(ModelError, match="does not take these inputs"):
        trace(nn.Linear(3, 3), {"a": torch.randn(2, 3), "b": torch.randn(2, 3)})
