"""What is opened computes the same, and its channels can be made fewer; what is not says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rowcol_edge.calling import evaluating
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import ModelError
from rowcol_edge.factoring import coupling, narrow
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.graph import traced
from rowcol_edge.factoring.opening import open_all, opened, reasons
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study, study
from tests.closed_modules import (
    Attention,
    Encoder,
    LinAttention,
    RotarySelfAttention,
    Scaled,
    SelfAttention,
    StaticPadding,
    TurnedAttention,
)

EXACT = 1e-12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ran(module: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor | None]:
    with torch.no_grad():
        result = module.eval()(*args, **kwargs)
    return list(result) if isinstance(result, tuple) else [result]


def same(module: nn.Module, new: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Equal outputs in float64, None where the other has None."""
    wanted, got = ran(module, *args, **kwargs), ran(new, *args, **kwargs)
    assert [one is None for one in wanted] == [one is None for one in got]
    for one, other in zip(wanted, got, strict=True):
        if one is not None and other is not None:
            assert one.shape == other.shape
            assert float((one - other).abs().max()) < EXACT * max(1.0, float(one.abs().max()))


def randomised(module: nn.Module) -> nn.Module:
    """Biases that are not zero, in float64."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


# torch's own


@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    sizes=st.tuples(st.none() | st.integers(1, 9), st.none() | st.integers(1, 9)),
    bias=st.booleans(),
    batch_first=st.booleans(),
    tokens=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    weights=st.sampled_from([{"need_weights": False}, {}, {"average_attn_weights": False}]),
    masks=st.tuples(*[st.sampled_from(["", "bool", "float"])] * 2),
    deep=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_call_of_torchs_attention(
    heads: int,
    width: int,
    sizes: tuple[int | None, int | None],
    bias: bool,
    batch_first: bool,
    tokens: tuple[int, int],
    weights: dict[str, bool],
    masks: tuple[str, str],
    deep: bool,
) -> None:
    total, (queries, keys) = heads * width, tokens
    module = nn.MultiheadAttention(
        total, heads, bias=bias, batch_first=batch_first, kdim=sizes[0], vdim=sizes[1], dropout=0.1
    )
    new = opened(randomised(module))
    assert new is not module
    sides = [double(3, n, w) for n, w in ((queries, total), (keys, sizes[0] or total), (keys, sizes[1] or total))]
    sides = sides if batch_first else [side.transpose(0, 1) for side in sides]
    shapes = {"attn_mask": ((3 * heads,) if deep else ()) + (queries, keys), "key_padding_mask": (3, keys)}
    given_masks: dict[str, Tensor] = {}
    for (name, shape), kind in zip(shapes.items(), masks, strict=True):
        if kind == "float":
            given_masks[name] = double(*shape)
        elif kind:
            hidden = torch.rand(shape) < 0.4
            hidden[..., 0] = False  # a query that sees nothing gives NaN in both
            given_masks[name] = hidden
    if len({mask.dtype for mask in given_masks.values()}) > 1:
        given_masks.pop("key_padding_mask")  # torch warns that their types should match
    same(module, new, *sides, **given_masks, **weights)


def test_self_attention_through_torchs_fused_path_and_without_samples() -> None:
    module = randomised(nn.MultiheadAttention(12, 4, batch_first=True))
    new = opened(module)
    x, hidden = double(2, 5, 12), torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    same(module, new, x, x, x)
    same(module, new, x, x, x, key_padding_mask=padding)
    same(module, new, x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)
    same(module, new, x, x, x, attn_mask=hidden, is_causal=True)
    same(module, new, x[0], x[0], x[0], key_padding_mask=padding[1], average_attn_weights=False)
    with pytest.raises(ModelError, match="is_causal without attn_mask"):
        new(x, x, x, is_causal=True)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_of_torch_works_on(activation: str, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        12, 4, 20, activation=activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    for number, each in enumerate(model.parameters()):
        nn.init.normal_(each, std=0.2 + 0.01 * number)
    x, padding = double(2, 5, 12), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    found = open_all(model, {"src": x})
    assert found.names == ("layers.0.self_attn", "layers.1.self_attn")
    assert not found.closed
    for new in (found.model, copy.deepcopy(found.model)):
        same(model, new, x)
        same(model, new, x, mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64))
        with evaluating(model):  # torch's nested tensors warn of themselves
            same(model, new, x, src_key_padding_mask=padding)
    with evaluating(found.model), torch.no_grad():
        program = torch.export.export(found.model, (x,), strict=False)
    assert torch.allclose(program.module()(x), ran(model, x)[0], atol=EXACT)


def test_a_decoder_of_torch_works_on() -> None:
    layer = nn.TransformerDecoderLayer(12, 3, 20, dtype=torch.float64)
    model = nn.TransformerDecoder(layer, 2).eval()
    target, memory = double(4, 2, 12), double(6, 2, 12)
    found = open_all(model, {"tgt": target, "memory": memory})
    assert found.names[:2] == ("layers.0.self_attn", "layers.0.multihead_attn")
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    same(model, found.model, target, memory, tgt_mask=mask)
    same(model, found.model, target, memory, tgt_mask=mask, tgt_is_causal=True)


def test_a_block_of_torchvision_works_on() -> None:
    from torchvision.models.vision_transformer import EncoderBlock

    model = EncoderBlock(3, 12, 20, 0.0, 0.0).double().eval()
    x = double(2, 5, 12)
    found = open_all(model, {"input": x})
    assert found.names == ("self_attention",)
    same(model, found.model, x)


# timm's


@given(
    heads=st.integers(1, 4),
    width=st.integers(2, 6),
    bias=st.booleans(),
    norms=st.booleans(),
    fused=st.booleans(),
    tokens=st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_every_call_of_a_fused_attention(
    heads: int, width: int, bias: bool, norms: bool, fused: bool, tokens: int
) -> None:
    module = randomised(Attention(heads * width, heads, bias=bias, norms=norms, fused=fused))
    new = opened(module)
    assert isinstance(new.query, nn.Linear)
    assert new.query.weight.shape == (heads * width, heads * width)
    x = double(2, tokens, heads * width)
    same(module, new, x)
    same(module, new, x, is_causal=True)
    same(module, new, x, attn_mask=torch.eye(tokens, dtype=torch.bool) | (torch.rand(tokens, tokens) < 0.5))


# transformers'


@given(heads=st.integers(1, 4), width=st.integers(1, 6), kind=st.sampled_from(["sdpa", "eager"]), output=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_call_of_a_self_attention(heads: int, width: int, kind: str, output: bool) -> None:
    kinds: list[Callable[..., SelfAttention]] = [SelfAttention, LinAttention]
    for make in kinds:
        module = randomised(make(heads * width, heads, kind=kind, output="out_lin" if output else ""))
        new = opened(module)
        assert new is not module
        assert set(dict(new.named_parameters())) == set(dict(module.named_parameters()))
        x, mask = double(2, 5, heads * width), torch.zeros(2, 1, 1, 5, dtype=torch.float64)
        mask[1, ..., 3:] = torch.finfo(torch.float64).min
        same(module, new, x)
        same(module, new, x, mask)
        same(module, new, x, attention_mask=mask, cache=None, position_ids=torch.arange(5))


def test_what_a_decoder_asks_for_is_refused() -> None:
    new = opened(SelfAttention(8, 2).eval())
    with pytest.raises(ModelError, match="got cache"):
        new(torch.randn(1, 3, 8), cache=object())
    with pytest.raises(ModelError, match="by position"):
        new(torch.randn(1, 3, 8), None, object())


# Convolutions


@pytest.mark.parametrize(
    ("padding", "kind"),
    [(nn.ZeroPad2d((1, 1, 2, 2)), nn.Conv2d), (nn.ZeroPad2d((0, 1, 0, 1)), nn.Sequential), (nn.Identity(), nn.Conv2d)],
)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2, "bias": False}])
def test_convolutions_that_pad(padding: nn.Module, kind: type[nn.Module], options: dict[str, Any]) -> None:
    module = StaticPadding(4, 6, 3, padding, **options).double()
    new = opened(module)
    assert type(new) is kind
    same(module, new, double(2, 4, 9, 8))


# Why others stay


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def hooked() -> nn.Module:
    module = nn.MultiheadAttention(8, 2)
    module.out_proj.register_forward_hook(lambda *_: None)
    return module


def replaced() -> nn.Module:
    module = Attention(8, 2)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def parametrized() -> nn.Module:
    module = Attention(8, 2)
    parametrize.register_parametrization(module.qkv, "weight", Doubled())
    return module


def gated() -> nn.Module:
    module = Attention(8, 2)
    module.gate = nn.Linear(8, 8)
    return module


def other_layer() -> nn.Module:
    module = SelfAttention(8, 2)
    module.query = type("LoraLinear", (nn.Linear,), {})(8, 8)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn"),
        (lambda: OwnForward(8, 2), "OwnForward has a forward of its own"),
        (hooked, "hooks are attached to its out_proj"),
        (replaced, "it has a forward of its own"),
        (parametrized, "its qkv is parametrized"),
        (gated, r"it also holds gate \(Linear\)"),
        (other_layer, "its layer is a LoraLinear"),
        (lambda: TurnedAttention(8, 2), "rotary embeddings"),
        (lambda: RotarySelfAttention(8, 2), "rotary embeddings"),
        (lambda: Scaled(8, 2), "Scaled computes something else"),
        (lambda: SelfAttention(8, 2, causal=True), "SelfAttention computes something else"),
        (lambda: SelfAttention(8, 2, kind="flash_attention_2"), "its attention is computed by 'flash_attention_2'"),
        (lambda: StaticPadding(2, 2, 3, nn.ReflectionPad2d(1)), "its static_padding is a ReflectionPad2d"),
        (lambda: StaticPadding(2, 2, 3, nn.ZeroPad2d(1), padding_mode="reflect"), "pads in another way besides"),
    ],
)
def test_reasons(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"part": make()})
    found = open_all(model)
    assert found.model is model
    assert not found.names
    assert set(found.closed) == {"part"}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons(model)["part"])


def test_a_tied_weight_stays_and_a_module_with_two_names_is_opened_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(8, 2), Attention(8, 2)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.second(self.first(x)))

    model, x = Twice().double().eval(), double(2, 4, 8)
    found = open_all(model, {"x": x})
    assert found.names == ("first", "second")
    assert found.model.first is found.model.again
    same(model, found.model, x)
    model.second.qkv.weight = model.first.qkv.weight
    assert set(reasons(model).values()) == {"its weight is tied to another module"}


def test_what_the_model_does_with_it_decides() -> None:
    class Reads(nn.Module):
        """Looks into its attention."""

        def __init__(self) -> None:
            super().__init__()
            self.attention, self.unused = Attention(8, 2), Attention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x) + self.attention.qkv.weight.mean()

    model = Reads().eval()
    found = open_all(model, {"x": torch.randn(2, 4, 8)})
    assert found.model is model
    assert dict(found.closed) == {
        "unused": "never called",
        "attention": "the model gives other outputs with it opened",
    }

    class Windows(Attention):
        """Plain attention for few tokens only."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) if x.shape[1] < 8 else x

    windows = nn.Sequential(Windows(8, 2)).eval()
    assert open_all(windows, {"input": torch.randn(2, 4, 8)}).names == ("0",)
    assert reasons(windows, {"input": torch.randn(2, 9, 8)}) == {"0": "Windows gives something else in the model"}


def test_flags_and_types_stay() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.3).to(torch.bfloat16)
    module.in_proj_weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    new = opened(module)
    assert new.training
    assert new.dropout_p == 0.3
    flags = {name: parameter.requires_grad for name, parameter in new.named_parameters()}
    assert flags == {
        **{f"{name}.{part}": part == "bias" for name in ("query", "key", "value") for part in ("weight", "bias")},
        "out_proj.weight": True,
        "out_proj.bias": True,
    }
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    for parameter in new.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert opened(module.eval()).training is False


def test_a_model_without_such_modules_is_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    found = open_all(model)
    assert found.model is model
    assert (found.names, dict(found.closed)) == ((), {})


# What it is for

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "torch": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: {"src": torch.randn(2, 6, 12)},
    ),
    "timm": (
        lambda: Encoder([Attention(12, 3), Attention(12, 3, fused=False)], 12),
        lambda: {"image": torch.randn(2, 1, 8, 8)},
    ),
    "transformers": (
        lambda: Encoder([SelfAttention(12, 3, output="o"), SelfAttention(12, 3, kind="eager", output="o")], 12),
        lambda: {"image": torch.randn(2, 1, 8, 8)},
    ),
}


def sets_of(model: nn.Module, example: dict[str, Tensor]) -> tuple[ChannelSet, ...]:
    found = coupling.find(model, *traced(model, example))
    return narrow.checked(model, found, example)


@pytest.mark.parametrize("name", ["torch", "timm", "transformers"])
def test_queries_and_values_can_be_made_narrower(name: str) -> None:
    make, feed = MODELS[name]
    model, example = make().eval(), feed()
    if name == "transformers":
        for block in model.blocks:  # an output layer beside the module, as BERT has it
            block.attn = nn.Sequential(block.attn, First(), block.attn.o)
            block.attn[0].output = ""
            del block.attn[0].o
    closed = sets_of(model, example)
    assert not any(each.contracted and not each.fixed for each in closed)
    found = open_all(model, example)
    assert len(found.names) == 2
    sets = sets_of(found.model, example)
    free = [each for each in sets if not each.fixed and each.groups == 3]
    assert [each.size for each in free] == [4] * 4
    assert sum(each.contracted is not None for each in free) == 2
    assert not any(each.rescale for each in free)
    with torch.no_grad():
        narrower = narrow.narrow(found.model, [narrow.plain(found.model, each, 2) for each in free])
        assert ran(narrower, *example.values())[0].shape == ran(model, *example.values())[0].shape  # type: ignore[union-attr]
    query = next(each.contracted[0] for each in free if each.contracted)
    assert narrower.get_submodule(query).out_features == 6


class First(nn.Module):
    """Of a pair."""

    def forward(self, pair: tuple[Tensor, Tensor | None]) -> Tensor:
        return pair[0]


@pytest.fixture
def studied() -> Study:
    model = Encoder([Attention(12, 3), Attention(12, 3)], 12).eval()
    images = np.random.default_rng(0).normal(size=(48, 1, 8, 8)).astype(np.float32)
    split = scan(Split("calibration", "random", lambda: iter([({"image": images}, None)])))
    return study(model, split, classify=True)


def test_a_study_opens_what_it_factors_and_leaves_the_dense_model_closed(studied: Study) -> None:
    assert isinstance(studied.dense.get_submodule("blocks.0.attn"), Attention)
    assert "blocks.0.attn.query" in studied.infos
    assert "blocks.0.attn.qkv" not in studied.infos
    assert not studied.closed
    assert studied.parameters == sum(parameter.numel() for parameter in studied.dense.parameters())
    assert factored(studied, FactorPlan(())) is studied.dense
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(ran(studied.dense, x)[0], ran(studied.folded, x)[0], atol=1e-5)


def test_full_width_reproduces_the_model(studied: Study) -> None:
    free = [each for each in studied.channels if not each.fixed and each.groups == 3]
    assert len(free) == 4
    full = [narrow.narrowing(each, studied.channel_spaces[each.name], each.size) for each in free]
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(ran(narrow.narrow(studied.folded, full), x)[0], ran(studied.dense, x)[0], atol=1e-4)


def test_a_study_of_convolutions_that_pad_knows_their_batch_norms() -> None:
    model = nn.Sequential(
        StaticPadding(1, 8, 3, nn.ZeroPad2d((0, 1, 0, 1)), stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        StaticPadding(8, 6, 3, nn.ZeroPad2d(1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    ).eval()
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    images = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)
    known = study(model, scan(Split("calibration", "random", lambda: iter([({"input": images}, None)]))))
    assert len(known.graph.batchnorms) == 1
    assert list(known.infos) == ["0.conv", "3", "6"]
    assert [each.name for each in known.channels if not each.fixed] == ["0.conv", "3"]
    x = torch.from_numpy(images)
    assert torch.allclose(ran(known.folded, x)[0], ran(model, x)[0], atol=1e-5)
