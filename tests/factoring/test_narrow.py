"""Narrowed models: exact where nothing is lost, closest where something is, and the original untouched."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring import ranks
from rowcol_edge.factoring.apply import apply, factored
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from rowcol_edge.factoring.study import Study, study
from tests.couplings import PICTURE, TOKENS, Encoder, Joined, Residual, made

MODELS = {"residual": (Residual, PICTURE), "joined": (Joined, PICTURE), "encoder": (Encoder, TOKENS)}
_STUDIES: dict[str, Study] = {}


def inputs(shape: tuple[int, ...], count: int = 64, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape))


def split(x: np.ndarray) -> Split:
    return scan(Split("calibration", "random", lambda: iter([({"x": x}, None)])))


def studied(name: str) -> Study:
    if name not in _STUDIES:
        kind, shape = MODELS[name]
        _STUDIES[name] = study(made(kind), split(inputs(shape)), classify=True)
    return _STUDIES[name]


def outputs(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(x)).numpy())


def narrowed(known: Study, widths: dict[str, int]) -> nn.Module:
    plan = FactorPlan((), channels=tuple(ChannelPlan(name, width) for name, width in widths.items()))
    return apply(known.folded, plan, known.spaces, channels=known.channels, channel_spaces=known.channel_spaces)


def free(known: Study) -> dict[str, int]:
    return {each.name: each.size for each in known.channels if not each.fixed}


@pytest.mark.parametrize("name", MODELS)
def test_the_full_frames_reproduce_the_channels(name: str) -> None:
    known = studied(name)
    for channel_set in known.channels:
        if channel_set.fixed:
            continue
        space = known.channel_spaces[channel_set.name]
        for read in space.reads:
            product = read.basis @ read.dual.transpose(0, 2, 1)
            np.testing.assert_allclose(product, np.broadcast_to(np.eye(channel_set.size), product.shape), atol=1e-3)
        assert (len(space.losses), space.losses[-1]) == (channel_set.size + 1, 0.0)
        assert np.all(np.diff(space.losses) <= 0)


@pytest.mark.parametrize("name", MODELS)
def test_narrowing_changes_shapes_and_adds_no_layer(name: str) -> None:
    known = studied(name)
    widths = {name: max(1, size // 2) for name, size in free(known).items()}
    model = narrowed(known, widths)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in known.folded.named_modules()]
    assert sum(p.numel() for p in model.parameters()) < 0.6 * known.parameters
    for channel_set in known.channels:
        for slot in channel_set.producers if not channel_set.fixed else ():
            layer = model.get_submodule(slot.name)
            assert layer.weight.shape[0] == channel_set.groups * widths[channel_set.name]
    assert outputs(model, inputs(MODELS[name][1], 3)).shape == (3, 3)


def without_biases(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias = None
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_counts_the_parameters_that_its_model_has(name: str, bias: bool) -> None:
    """Readers of fewer channels have a bias, whether or not they had one."""
    kind, shape = MODELS[name]
    model = made(kind) if bias else without_biases(made(kind))
    known = study(model, split(inputs(shape)), classify=True)
    total, narrowed = float(known.parameters), False
    for share in (0.9, 0.6, 0.3):
        plan = ranks.plan_by_cost(
            known.infos, known.spaces, ranks.parameters, total=total, limit=share * total,
            allocator=known.allocator(1, 1.0), inputs=known.input_spaces,
        )  # fmt: skip
        count = sum(p.numel() for p in factored(known, plan).parameters())
        assert count == known.parameters - plan.saved_parameters
        assert count <= share * total
        narrowed |= bool(plan.channels)
    assert narrowed


def redundant(model: nn.Module, name: str, rank: int) -> nn.Module:
    """The layer gives few different channels, several times over: the others are copies."""
    with torch.no_grad():
        layer = model.get_submodule(name)
        for part in (layer.weight, layer.bias):
            part[rank:] = part[: len(part) - rank]
    return model


@pytest.mark.parametrize(
    ("kind", "shape", "name", "rank"),
    [(Residual, PICTURE, "first", 4), (Joined, PICTURE, "both", 4), (Joined, PICTURE, "left", 3),
     (Encoder, TOKENS, "expand", 20), (Joined, PICTURE, "hidden", 12)],
)  # fmt: skip
def test_copies_of_channels_are_given_up_for_nothing(
    kind: type[nn.Module], shape: tuple[int, ...], name: str, rank: int
) -> None:
    model = redundant(made(kind), name, rank)
    known = study(model, split(inputs(shape)), classify=True)
    unseen = inputs(shape, 20, seed=7)
    kept = narrowed(known, {name: rank})
    np.testing.assert_allclose(outputs(kept, unseen), outputs(model, unseen), atol=1e-4)
    less = narrowed(known, {name: rank - 1})
    assert np.abs(outputs(less, unseen) - outputs(model, unseen)).max() > 1e-3


def test_query_and_key_merge_exactly_at_the_rank_of_their_product() -> None:
    model = made(Encoder)
    with torch.no_grad():
        for head in range(2):  # the keys of each head lie in three directions
            rows = slice(8 * head, 8 * head + 8)
            basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0]
            for part in (model.attention.key.weight, model.attention.key.bias):
                part[rows] = basis @ (basis.T @ part[rows])
    known = study(model, split(inputs(TOKENS)), classify=True)
    unseen = inputs(TOKENS, 20, seed=7)
    np.testing.assert_allclose(
        outputs(narrowed(known, {"attention.query": 3}), unseen), outputs(model, unseen), atol=1e-4
    )
    assert np.abs(outputs(narrowed(known, {"attention.query": 2}), unseen) - outputs(model, unseen)).max() > 1e-4


def test_values_and_output_merge_exactly_at_the_rank_of_their_product() -> None:
    model = made(Encoder)
    with torch.no_grad():
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            basis = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64))[0]
            model.attention.value.weight[rows] = basis @ (basis.T @ model.attention.value.weight[rows])
    known = study(model, split(inputs(TOKENS)), classify=True)
    unseen = inputs(TOKENS, 20, seed=7)
    # the bias of the values may lie outside of the five directions: the mean goes into the output's bias
    np.testing.assert_allclose(
        outputs(narrowed(known, {"attention.value": 5}), unseen), outputs(model, unseen), atol=1e-4
    )


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), data=st.data())
def test_the_original_is_untouched_and_the_result_deterministic(name: str, data: st.DataObject) -> None:
    known = studied(name)
    sizes = free(known)
    widths = {each: data.draw(st.integers(1, size)) for each, size in sizes.items() if data.draw(st.booleans())}
    before = copy.deepcopy(known.folded.state_dict())
    first, second = (narrowed(known, widths) for _ in range(2))
    x = inputs(MODELS[name][1], 5)
    np.testing.assert_array_equal(outputs(first, x), outputs(second, x))
    assert np.isfinite(outputs(first, x)).all()
    assert all(torch.equal(value, before[key]) for key, value in known.folded.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_monotone_and_follow_the_divergence(name: str) -> None:
    """Predicted to first order: of the right size, not exact."""
    known = studied(name)
    x = inputs(MODELS[name][1], 200, seed=3)
    wanted = torch.from_numpy(outputs(known.folded, x)).log_softmax(1)
    for each, size in free(known).items():
        found = []
        for width in (1, max(1, size // 2), size):
            got = torch.from_numpy(outputs(narrowed(known, {each: width}), x)).log_softmax(1)
            found.append(float((wanted.exp() * (wanted - got)).sum(1).mean()))
        losses = known.channel_spaces[each].losses
        predicted = losses[max(1, size // 2)]
        assert all(more >= less for more, less in pairwise(losses))
        assert found[2] == pytest.approx(0.0, abs=1e-6)
        assert found[0] >= 0.5 * found[1]
        if found[1] > 1e-5:
            assert 0.2 < predicted / found[1] < 5.0, each


def test_a_narrowed_layer_can_be_projected_too() -> None:
    known = studied("encoder")
    plan = FactorPlan(
        (LayerPlan("contract", "project", 6), LayerPlan("expand", "project", 7)), channels=(ChannelPlan("expand", 24),)
    )
    model = factored(known, plan)
    assert model.expand.expand.weight.shape == (24, 7)
    assert model.contract.reduce.weight.shape == (6, 24)
    x = inputs(TOKENS, 100, seed=5)
    error = np.square(outputs(model, x) - outputs(known.folded, x)).mean()
    assert error < 0.05 * np.square(outputs(known.folded, x)).mean()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_narrowed_in_their_own_type(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to(kind)
    x = inputs(TOKENS).astype(np.float32)
    known = study(model, split(x), classify=True)
    result = narrowed(known, {"expand": 32, "attention.value": 6})
    assert all(parameter.dtype == kind for parameter in result.parameters())
    with torch.inference_mode():
        wanted, got = (net(torch.from_numpy(x).to(kind)).float() for net in (model, result))
    assert float((wanted - got).square().mean()) < 0.1 * float(wanted.square().mean())


def test_channels_last_stays_channels_last() -> None:
    torch.manual_seed(0)
    model = Residual().eval().to(memory_format=torch.channels_last)
    known = study(model, split(inputs(PICTURE).astype(np.float32)), classify=True)
    result = narrowed(known, {"first": 4})
    assert result.second.weight.is_contiguous(memory_format=torch.channels_last)
    assert result.second.weight.shape == (12, 4, 3, 3)


def test_constant_and_dead_channels_do_no_harm() -> None:
    model = made(Residual)
    with torch.no_grad():
        model.first.weight[2:] = 0.0
        model.first.bias[2:5], model.first.bias[5:] = 0.3, -1.0  # constant, and dead behind the ReLU
    known = study(model, split(inputs(PICTURE)), classify=True)
    result = narrowed(known, {"first": 3})  # second pads nothing, so a constant goes into its bias
    x = inputs(PICTURE, 10, seed=4)
    np.testing.assert_allclose(outputs(result, x), outputs(model, x), atol=1e-4)


def test_one_sample_is_enough_to_do_something_sane() -> None:
    known = study(made(Encoder), split(inputs(TOKENS, 1)), classify=True)
    result = narrowed(known, {name: max(1, size // 2) for name, size in free(known).items()})
    assert np.isfinite(outputs(result, inputs(TOKENS, 8))).all()


def trained_norms(model: nn.Module) -> nn.Module:
    """Scales and shifts as training leaves them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.rand(16) + 0.5)
                module.bias.copy_(torch.randn(16) * 0.3)
    return model


def test_a_stream_is_narrowed_to_the_directions_it_uses() -> None:
    """What the stream's writers give lies in nine directions and the mean: eleven channels hold it."""
    model = trained_norms(made(Encoder))
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(16, 9, dtype=torch.float64))[0]
        basis = torch.linalg.qr(basis - basis.mean(0))[0]  # without a mean
        for layer in (model.embed, model.attention.output, model.contract):
            layer.weight.copy_(basis @ (basis.T @ layer.weight) + torch.randn(1, layer.in_features).double() * 0.2)
            layer.bias.copy_(basis @ (basis.T @ layer.bias) + 0.5)
    known = study(model, split(inputs(TOKENS)), classify=True)
    stream = next(each for each in known.channels if each.name == "embed")
    assert (stream.fixed, stream.norms) == ("", ("norm1", "norm2", "norm3"))
    unseen = inputs(TOKENS, 20, seed=7)
    result = narrowed(known, {"embed": 10})
    assert (result.norm1.normalized_shape, result.embed.weight.shape) == ((10,), (10, 5))
    np.testing.assert_allclose(outputs(result, unseen), outputs(model, unseen), atol=1e-4)
    assert np.abs(outputs(narrowed(known, {"embed": 8}), unseen) - outputs(model, unseen)).max() > 1e-2


def test_a_stream_of_a_post_norm_block_stays() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm1, self.norm2 = nn.Linear(5, 16), nn.LayerNorm(16), nn.LayerNorm(16)
            self.expand, self.contract, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm1(self.embed(x))
            x = self.norm2(x + self.contract(torch.relu(self.expand(x))))
            logits: torch.Tensor = self.head(x.mean(1))
            return logits

    known = study(made(PostNorm), split(inputs(TOKENS)), classify=True)
    reasons = {each.name: each.fixed for each in known.channels}
    assert "post-norm" in reasons["embed"]
    assert reasons["contract"]
    assert reasons["expand"] == ""
