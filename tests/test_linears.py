"""Linear layers as convolutions: the same numbers and gradients, and only where that is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rowcol_edge import linears

LARGE = (4, 197, 96), 256  # shape of the input, outputs: 19 million multiply-accumulates


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that convolutions were given, on a processor with AVX-512 or as if on one."""
    seen: list[torch.Size] = []
    plain = torch.mkldnn_convolution

    def spy(rows: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(rows.shape)
        return plain(rows, *rest)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "mkldnn_convolution", spy)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "axes exchanged"])
def test_a_large_layer_gives_the_same_and_passes_the_same_back(
    convolutions: list[torch.Size], bias: bool, turned: bool
) -> None:
    torch.manual_seed(0)
    shape, size = LARGE
    layer = nn.Linear(shape[-1], size, bias=bias)
    values = torch.randn(shape).transpose(0, 1) if turned else torch.randn(shape)

    def calculated() -> tuple[torch.Tensor, ...]:
        leaf = values.clone().requires_grad_()
        given = layer(leaf.transpose(0, 1).contiguous().transpose(0, 1))
        given.square().sum().backward()
        gradients = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
        layer.zero_grad()
        return given.detach(), *(each for each in gradients if each is not None)

    expected = calculated()
    with linears.convolved():
        found = calculated()
    assert convolutions == [torch.Size((1, shape[-1], 1, shape[0] * shape[1]))]
    assert found[0].is_contiguous()  # code may `view` it
    for given, wanted in zip(found, expected, strict=True):
        assert given.shape == wanted.shape
        assert torch.allclose(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", [(1024, 96), (4, 256, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_arrive_at_what_is_given_also_where_code_goes_on_in_place(
    convolutions: list[torch.Size], shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 256, bias=bias).requires_grad_(False)
    values, arrived = torch.randn(shape, requires_grad=True), []
    with linears.convolved():
        given = layer(values * 1.0)
        given.register_hook(arrived.append)
        given.relu_().square().sum().backward()
    assert len(convolutions) == len(arrived) == 1
    torch.testing.assert_close(arrived[0], 2.0 * layer(values.detach()).relu(), rtol=1e-4, atol=1e-4)


def test_layers_of_a_saved_program_are_calculated_so_too(convolutions: list[torch.Size]) -> None:
    shape, size = LARGE
    layer = nn.Linear(shape[-1], size).eval()
    program = torch.export.export(layer, (torch.randn(shape),)).module()
    values = torch.randn(shape)
    with torch.no_grad(), linears.convolved():
        given = program(values)
    assert len(convolutions) == 1
    assert torch.allclose(given, layer(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "weight"),
    [
        (torch.randn(4, 197, 96, dtype=torch.float64), torch.randn(256, 96, dtype=torch.float64)),
        (torch.randn(4, 197, 96, dtype=torch.bfloat16), torch.randn(256, 96, dtype=torch.bfloat16)),
        (torch.randn(2, 8, 96), torch.randn(256, 96)),
        (torch.randn(0, 96), torch.randn(256, 96)),
        (torch.randn(4096), torch.randn(4096, 4096)),
        (torch.randn(16, 1024), torch.randn(1024, 1024)),
    ],
    ids=["double", "half", "small", "empty", "one row", "few rows"],
)
def test_what_would_gain_nothing_stays(
    convolutions: list[torch.Size], values: torch.Tensor, weight: torch.Tensor
) -> None:
    with linears.convolved():
        given = F.linear(values, weight)
    assert not convolutions
    assert torch.equal(given, F.linear(values, weight))


def test_a_bias_of_another_shape_is_broadcast_as_ever(convolutions: list[torch.Size]) -> None:
    shape, size = LARGE
    values, weight = torch.randn(shape), torch.randn(size, shape[-1])
    for bias in (torch.randn(1), torch.randn(1, size)):
        with linears.convolved():
            assert torch.equal(F.linear(values, weight, bias), F.linear(values, weight, bias))
    assert not convolutions


@pytest.mark.parametrize("kind", ["a column", "one for all"])
def test_a_bias_that_lies_apart_is_read_where_it_lies(convolutions: list[torch.Size], kind: str) -> None:
    shape, size = LARGE
    torch.manual_seed(0)
    values, weight, table = torch.randn(shape), torch.randn(size, shape[-1]), torch.randn(size, 3)
    bias = {"a column": table[:, 1], "one for all": table[0, :1].expand(size)}[kind]
    wanted = F.linear(values, weight) + bias.contiguous()
    with linears.convolved():
        found = F.linear(values, weight, bias)
    assert len(convolutions) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's own; its kind goes by the Python
def test_derivatives_on_the_way_forward_are_those_of_the_layer(convolutions: list[torch.Size]) -> None:
    shape, size = LARGE
    layer, values = nn.Linear(shape[-1], size), torch.randn(shape)
    with linears.convolved():
        _, along = torch.func.jvp(layer, (values,), (torch.ones_like(values),))
    assert not convolutions
    torch.testing.assert_close(along[0, 0], layer.weight.sum(dim=1))


def test_a_type_of_its_own_autocast_and_a_switch_are_respected(
    convolutions: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(torch.Tensor):
        """Has a way of its own to be multiplied, as quantized weights do."""

    shape, size = LARGE
    values, weight = torch.randn(shape), torch.randn(size, shape[-1])
    with linears.convolved():
        F.linear(values, weight.as_subclass(Own))
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(values, weight).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with linears.convolved():
        F.linear(values, weight)
    assert not convolutions


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_may_be_calculated_again_on_the_way_back(convolutions: list[torch.Size], reentrant: bool) -> None:
    shape, size = LARGE
    layer = nn.Sequential(nn.Linear(shape[-1], size), nn.ReLU())
    values = torch.randn(shape, requires_grad=True)
    layer(values).square().sum().backward()
    wanted, values.grad = values.grad, None
    with linears.convolved():
        checkpoint(layer, values, use_reentrant=reentrant).square().sum().backward()
    assert wanted is not None
    torch.testing.assert_close(values.grad, wanted, rtol=1e-4, atol=1e-3)


def test_the_number_of_threads_changes_no_digit(convolutions: list[torch.Size]) -> None:
    values, weight = torch.randn(788, 384), torch.randn(384, 384)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with linears.convolved():
                found.append(F.linear(values, weight))
    finally:
        torch.set_num_threads(before)
    assert len(convolutions) == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_processors_are_left_alone(convolutions: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    shape, size = LARGE
    with linears.convolved():
        F.linear(torch.randn(shape), torch.randn(size, shape[-1]))
    assert not convolutions


def test_an_error_is_that_of_the_layer(convolutions: list[torch.Size]) -> None:
    with linears.convolved(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        F.linear(torch.randn(4, 197, 95), torch.randn(256, 96))


def test_directions_of_one_group_and_of_several(convolutions: list[torch.Size]) -> None:
    for groups in (1, 3):
        rows, matrices = torch.randn(groups, 4, 197, 96), torch.randn(groups, 96, 256)
        with linears.convolved():
            found = linears.product(rows, matrices)
        assert torch.allclose(found, torch.einsum("gspi,gij->gspj", rows, matrices), rtol=1e-4, atol=1e-4)
    assert len(convolutions) == 1
