"""One kernel in the place of two: the same as one matrix where k = 1, and the one with the least error elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.tied_kernels import TiedKernels, tie_kernels_from_dense, window_moments
from rowcol_edge.factoring.ties import tie_from_dense


def pair(channels: int, hidden: int, size: int = 3) -> tuple[nn.Conv2d, nn.Conv2d]:
    return tuple(  # type: ignore[return-value]
        nn.Conv2d(a, b, size, padding=size // 2, bias=False) for a, b in ((channels, hidden), (hidden, channels))
    )


def arrays(*convs: nn.Conv2d) -> list[np.ndarray]:
    return [conv.weight.detach().double().numpy() for conv in convs]


def varying(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean((0, 2, 3), keepdim=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16))
def test_a_kernel_of_one_tap_is_a_matrix(channels: int, hidden: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(hidden, channels)), rng.normal(size=(channels, hidden))
    x, h = rng.normal(size=(50, channels)), rng.normal(size=(50, hidden))
    c, d = x.T @ x / 50, h.T @ h / 50
    wanted = tie_from_dense(first, second, c, d, relative=True)
    found = tie_kernels_from_dense(first[:, :, None, None], second[:, :, None, None], c, d, tolerance=1e-9)
    assert found.weight[:, :, 0, 0] == pytest.approx(wanted.weight, abs=1e-6)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6, abs=1e-12)


def test_errors_are_those_measured_and_no_other_kernel_has_less() -> None:
    torch.manual_seed(0)
    first, second = pair(3, 4)
    # neighbours that are alike, as pixels are, and a mean that the error leaves out
    x = F.avg_pool2d(torch.randn(40, 3, 14, 14), 3, 1) + 2.0
    inner = nn.ReLU()
    with torch.no_grad():
        h = inner(first(x))
        tie = tie_kernels_from_dense(*arrays(first, second), window_moments(x, 3), window_moments(h, 3), tolerance=1e-7)

        def errors(weight: torch.Tensor) -> tuple[float, float]:
            seen = ((x, weight, first(x)), (h, weight.transpose(0, 1), second(h)))
            off = [(varying(F.conv2d(z, w, padding=1) - y).norm() / varying(y).norm()).item() for z, w, y in seen]
            return off[0], off[1]

        weight = torch.from_numpy(tie.weight).float()
        assert errors(weight) == pytest.approx((tie.first_error, tie.second_error), rel=1e-3)
        least = sum(e**2 for e in errors(weight))
        assert tie.loss == pytest.approx(least, rel=1e-3)
        rivals = [first.weight, second.weight.transpose(0, 1), (first.weight + second.weight.transpose(0, 1)) / 2]
        rivals += [weight + scale * torch.randn_like(weight) for scale in (1e-3, 1e-2, 1e-1)]
        assert all(sum(e**2 for e in errors(rival)) > least - 1e-6 for rival in rivals)
        assert min(sum(e**2 for e in errors(rival)) for rival in rivals[:3]) > 1.05 * least


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_moments_are_those_of_double_precision_whatever_the_mean(mean: float) -> None:
    torch.manual_seed(0)
    x = F.avg_pool2d(torch.randn(20, 3, 8, 8), 3, 1) + mean
    windows = F.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1).numpy()
    assert window_moments(x, 3) == pytest.approx(np.cov(windows, bias=True), rel=1e-9, abs=1e-12 * (1 + mean**2))
    middle = slice(4, None, 9)  # of each window: beside the others it has no zeros from around the map
    inner = x.double().transpose(0, 1).flatten(1).numpy()
    assert window_moments(x, 3)[middle, middle] == pytest.approx(np.cov(inner, bias=True), rel=1e-9)
    assert window_moments(x, 1) == pytest.approx(np.cov(inner, bias=True), rel=1e-9)


def test_channels_that_vary_by_rounding_say_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 2, 8, 8)
    x[:, 1] = 1e4 * (1.0 + 1e-7 * torch.randn(20, 8, 8))
    moments = window_moments(x, 1)
    assert moments[0, 0] == pytest.approx(x[:, 0].double().var(correction=0).item())
    assert np.array_equal(moments != 0, [[True, False], [False, False]])


def test_a_pair_of_one_kernel_calculates_the_same() -> None:
    torch.manual_seed(0)
    first, second = pair(3, 4)
    with torch.no_grad():
        second.weight.copy_(first.weight.transpose(0, 1))
    inner, x = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(5, 3, 8, 8)
    layer, tie = TiedKernels.from_dense(first.eval(), inner, second, x)
    assert tie.first_error < 1e-6
    assert tie.second_error < 1e-6
    assert torch.allclose(layer(x), second(inner(first(x))), atol=1e-5)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 4 * 9 + 2 * 4


def test_what_the_data_say_nothing_of_is_the_mean() -> None:
    first, second = arrays(*pair(2, 3))
    tie = tie_kernels_from_dense(first, second, np.zeros((18, 18)), np.zeros((27, 27)))
    assert np.allclose(tie.weight, (first + second.swapaxes(0, 1)) / 2)
    assert tie.loss == 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"second": np.zeros((2, 2, 3, 3))}, ModelError, "a pair of kernels to tie"),
        ({"inputs": np.zeros((2, 2))}, DataError, "moments of the windows: expected 18×18, got 2×2"),
        ({"hidden": np.full((27, 27), np.nan)}, DataError, "finite"),
        ({"hidden": np.triu(np.ones((27, 27)))}, DataError, "moments of the windows: expected a symmetric matrix"),
        (
            {"inputs": np.diag([-1.0, *[1.0] * 17])},
            DataError,
            "moments of the windows: expected no negative eigenvalue",
        ),
    ],
)
def test_bad_input_is_one_error(change: dict[str, np.ndarray], error: type[Exception], match: str) -> None:
    arguments = {
        "first": np.zeros((3, 2, 3, 3)), "second": np.zeros((2, 3, 3, 3)), "inputs": np.eye(18), "hidden": np.eye(27)
    }  # fmt: skip
    with pytest.raises(error, match=match):
        tie_kernels_from_dense(**(arguments | change))


@pytest.mark.parametrize(
    "other", [{"stride": 2}, {"bias": True}, {"padding": 0}, {"groups": 2}, {"dilation": 2, "padding": 2}]
)
def test_convolutions_that_one_kernel_cannot_replace_are_refused(other: dict[str, int]) -> None:
    arguments = {"padding": 1, "bias": False} | other
    conv = nn.Conv2d(2, 2, 3, **arguments)
    with pytest.raises(ModelError, match="a convolution to tie"):
        TiedKernels.from_dense(conv, nn.ReLU(), conv, torch.randn(1, 2, 8, 8))


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        window_moments(torch.zeros(0, 2, 8, 8), 3)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(0, 2, 8, 8), "at least one sample, got none"),
        (torch.zeros(4, 3, 8, 8), r"\(samples, 2, height, width\), got \(4, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8), r"\(samples, 2, height, width\), got \(2, 8, 8\)"),
        (torch.zeros(4, 2, 8, 8, dtype=torch.int64), "float32 on cpu, got int64 on cpu"),
    ],
)
def test_inputs_that_the_convolutions_do_not_take_are_refused(x: torch.Tensor, got: str) -> None:
    first, second = pair(2, 3)
    with pytest.raises(DataError, match=f"inputs for a tie: expected {got}"):
        TiedKernels.from_dense(first, nn.ReLU(), second, x)
