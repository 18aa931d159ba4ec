"""Channel sets as the graph couples them, and the reasons of those that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rowcol_edge.factoring import coupling, fold, graph, narrow, opening
from rowcol_edge.factoring.channels import ChannelSet
from tests.couplings import PICTURE, TOKENS, Encoder, Joined, Residual, made


def sets(model: nn.Module, shape: tuple[int, ...]) -> dict[str, ChannelSet]:
    parameter = next(model.parameters())
    example = {"x": torch.randn(2, *shape, dtype=parameter.dtype)}
    traced = graph.trace(model, example)
    folded = fold.fold_batchnorm(model, traced)
    found = narrow.checked(folded, coupling.find(folded, traced, graph.exported(folded, example)), example)
    return {each.name: each for each in found}


def names(slots: object) -> list[str]:
    return [slot.name for slot in slots]  # type: ignore[attr-defined]


def test_a_sum_couples_all_that_is_added() -> None:
    found = sets(made(Residual), PICTURE)
    stream = found["stem"]
    assert names(stream.producers) == ["stem", "second", "back"]
    assert sorted(names(stream.uses)) == ["first", "head", "wide"]
    assert (stream.fixed, stream.linear, stream.size) == ("", False, 12)


def test_a_depthwise_layer_and_a_gate_go_with_the_channels() -> None:
    found = sets(made(Residual), PICTURE)
    wide = found["wide"]
    assert names(wide.producers) == ["wide", "excite"]
    assert names(wide.carriers) == ["depthwise"]
    assert sorted(names(wide.uses)) == ["back", "squeeze"]
    assert found["squeeze"].size == 4
    assert not any(each.fixed for name, each in found.items() if name != "head")
    assert found["head"].fixed == "an output of the model"


def test_the_parts_of_a_concatenation_are_sets_of_their_own() -> None:
    found = sets(made(Joined), PICTURE)
    assert [found[name].uses[0].index.ravel().tolist() for name in ("left", "right")] == [
        list(range(6)),
        list(range(6, 16)),
    ]
    both = found["both"]
    assert both.uses[0].index.shape == (1, 8, 9)  # a flattened 3×3 picture: nine inputs for each channel
    assert both.uses[0].index[0, 1].tolist() == list(range(9, 18))


@pytest.mark.parametrize(("scale", "rescaled"), [("torch", True), ("width", True), ("fixed", False)])
def test_heads_are_narrowed_alike(scale: str, rescaled: bool) -> None:
    found = sets(made(Encoder, scale), TOKENS)
    product, values = found["attention.query"], found["attention.value"]
    assert product.contracted == ("attention.query", "attention.key")
    assert (product.groups, product.size, product.rescale, product.fixed) == (2, 8, rescaled, "")
    assert (values.groups, values.size, values.linear, values.fixed) == (2, 8, True, "")
    assert found["expand"].size == 40
    assert (found["embed"].fixed, found["embed"].norms) == ("", ("norm1", "norm2", "norm3"))


def test_rotary_embeddings_are_named() -> None:
    found = sets(made(Encoder, "torch", True), TOKENS)
    assert found["attention.query"].fixed == "combined with values that no layer gives, as rotary embeddings are"
    assert found["attention.value"].fixed == ""


def test_halves_that_are_turned_against_each_other_are_named_as_rotary() -> None:
    """The frequencies of one half are those of the other, as in Llama and its like."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.query, self.key = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.value, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
            self.register_buffer("frequencies", 0.5 ** torch.arange(4.0))

        def turn(self, x: torch.Tensor) -> torch.Tensor:
            angles = torch.arange(x.shape[1])[:, None] * self.frequencies
            angles = torch.cat([angles, angles], dim=1)[:, None]
            x = x.unflatten(2, (2, 8))
            turned = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
            return (x * angles.cos() + turned * angles.sin()).transpose(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.embed(x))
            scores = self.turn(self.query(x)) @ self.turn(self.key(x)).transpose(2, 3)
            mixed = scores.softmax(3) @ self.value(x).unflatten(2, (2, -1)).transpose(1, 2)
            logits: torch.Tensor = self.head(mixed.transpose(1, 2).flatten(2).mean(1))
            return logits

    found = sets(made(Turned), (5, 8))
    for name in ("query", "key"):
        assert found[name].fixed.endswith(("as rotary embeddings are", "as rotary embeddings do")), found[name].fixed
    assert found["value"].fixed == ""


@pytest.mark.parametrize("scaled", [False, True])
def test_a_stream_that_starts_at_the_input_is_named(scaled: bool) -> None:
    class Raw(nn.Module):
        """No embedding: the width is that of the data, as it comes or as it is scaled."""

        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x - torch.tensor([0.5])) * torch.linspace(1, 2, 16) if scaled else x
            logits: torch.Tensor = self.head(self.encoder(x).mean(1))
            return logits

    found = sets(opening.opened(made(Raw)), (7, 16))
    reason = "combined with the model's own input, as a stream is that starts there"
    assert found["encoder.layers.0.self_attn.out_proj"].fixed == reason
    assert found["encoder.layers.0.self_attn.value"].fixed == ""
    assert found["encoder.layers.0.linear1"].fixed == ""


class Split(nn.Module):
    """What cannot be followed: a chunk, code that knows its sizes, a weight that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.after = nn.Linear(5, 12), nn.Linear(6, 8)
        self.knows, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.loose = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.fused(x).chunk(2, -1)
        x = self.after(F.relu(first) * second) @ self.loose
        x = self.knows(x)
        if x.shape[-1] != 8:
            raise ValueError("eight")
        logits: torch.Tensor = self.last(F.relu(x).mean(1))
        return logits


def test_what_cannot_be_followed_stays_with_its_reason() -> None:
    found = sets(made(Split), TOKENS)
    assert found["fused"].fixed == "channels are cut out of it"
    assert found["after"].fixed
    assert found["knows"].fixed == "the model's code does not do with fewer"


def test_empty_parts_of_a_concatenation_change_nothing() -> None:
    """As torch has it: those of one axis are left out whatever the others are, as caches that nothing is in yet."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(5, 6), nn.Linear(5, 10), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = torch.cat([x.new_zeros(0), F.relu(self.left(x))], 1)
            both = torch.cat([left[..., :0], left, x.new_zeros(0), F.relu(self.right(x))], -1)
            logits: torch.Tensor = self.last(both.mean(1))
            return logits

    found = sets(made(Cached), TOKENS)
    assert {name: each.fixed for name, each in found.items()} == {
        "left": "",
        "right": "",
        "last": "an output of the model",
    }
    assert [found[name].uses[0].index.ravel().tolist() for name in ("left", "right")] == [
        list(range(6)),
        list(range(6, 16)),
    ]


def test_an_operator_called_in_an_unforeseen_way_pins_what_it_takes() -> None:
    class Unforeseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.picked, self.free, self.last = (
                nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            )  # fmt: skip
            self.slope = nn.Parameter(torch.rand(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.prelu(self.flat(x).flatten(), self.slope).reshape(-1, 7, 8)  # one axis: no channels are told apart
            x = self.picked(x)
            size = F.relu(x[x > 0]).sum()  # of as many as the data tells
            logits: torch.Tensor = self.last(F.relu(self.free(F.relu(x))).mean(1)) * size
            return logits

    fixed = {name: each.fixed for name, each in sets(made(Unforeseen), TOKENS).items()}
    assert fixed["flat"] == "read by prelu"
    assert fixed["picked"].startswith("read by ")
    assert fixed["free"] == ""


def test_a_layer_norm_over_pixels_is_no_stream() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.tokens, self.last = nn.LayerNorm(7), nn.Linear(7, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.last(F.relu(self.tokens(self.norm(x.transpose(1, 2)))).mean(1))
            return logits

    found = sets(made(Mixer), TOKENS)
    assert (found["tokens"].fixed, found["tokens"].size) == ("", 12)


class Kept(nn.Module):
    """The code reshapes by widths that it keeps. Nine is also how large its pictures are, and twelve is in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.width, self.shape = 9, 9, (-1, 12, 81)
        self.first, self.second = nn.Conv2d(2, 9, 1), nn.Conv1d(9, 12, 1)
        self.pooled, self.last = Pooled(10), nn.Linear(10, 3)
        self.third = nn.Conv1d(12, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.side:
            raise ValueError("another picture")
        x = F.relu(self.first(x)).reshape(len(x), self.width, -1)
        x = F.relu(self.second(x)).reshape(self.shape)
        x = F.relu(self.third(x))
        if x.shape[1] != self.pooled.width:
            raise ValueError("another width")
        logits: torch.Tensor = self.last(self.pooled(x))
        return logits


class Pooled(nn.Module):
    """Two modules of two kinds know the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.inner = width, Inner(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.inner(x).mean(2)
        return pooled


class Inner(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, self.channels, x.shape[-1])


def test_widths_that_the_code_keeps_change_with_the_channels() -> None:
    model = made(Kept)
    found = sets(model, PICTURE)
    assert {name: (each.fixed, each.sizes) for name, each in found.items()} == {
        "first": ("", (("", "width"),)),
        "second": ("the model's code does not do with fewer", ()),
        "third": ("", (("pooled", "width"), ("pooled.inner", "channels"))),
        "last": ("an output of the model", ()),
    }
    chosen = [found["first"], found["third"]]
    result = narrow.narrow(model, [narrow.plain(model, each, 4) for each in chosen])
    assert (result.width, result.side, result.pooled.width, result.pooled.inner.channels) == (4, 9, 4, 4)
    assert (model.width, model.pooled.width, model.pooled.inner.channels) == (9, 10, 10)
    assert result(torch.randn(2, *PICTURE).double()).shape == (2, 3)


class Held(nn.Module):
    """Layers whose weights belong to somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))
        self.twice, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x)))))))
        return logits


def test_layers_that_cannot_be_replaced_hold_their_channels() -> None:
    found = sets(made(Held), TOKENS)
    assert found["twice"].fixed.endswith("shared: called 2 times")
    assert found["first"].fixed == "given by first: its weight is parametrized"
    assert all(each.fixed for each in found.values())


def test_a_stream_of_tied_embeddings_stays_with_the_name_of_its_layer() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.told = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.told.weight = self.words.weight
            self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.expand, self.contract = nn.Linear(16, 40), nn.Linear(40, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids)
            x = x + self.contract(F.gelu(self.expand(self.norm1(x))))
            logits: torch.Tensor = self.told(self.norm2(x))
            return logits

    model, example = Words().eval(), {"ids": torch.arange(12).reshape(2, 6)}
    found = coupling.find(model, *graph.traced(model, example))
    fixed = {each.name: each.fixed for each in found}
    assert fixed["contract"] == "read by told: its weight is tied to another module"
    assert fixed["expand"] == ""


def test_a_linear_bottleneck_is_factored_already_and_can_still_get_narrower() -> None:
    """Two inverted residuals where nothing is added, as in `sample:elpv-padim`: no nonlinearity lies between them."""
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.ReLU6(), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 24, 1), nn.ReLU6(),
        nn.Conv2d(24, 24, 3, groups=24), nn.ReLU6(), nn.Conv2d(24, 6, 1),
    )  # fmt: skip
    example = {"input": torch.randn(2, *PICTURE)}
    traced = graph.trace(model, example)
    assert traced.factored == (graph.FactoredPair("2", "3", 4),)
    first, second = (model.get_submodule(name) for name in ("2", "3"))
    both = nn.Conv2d(12, 24, 1)
    with torch.no_grad():
        both.weight.copy_((second.weight.flatten(1) @ first.weight.flatten(1))[:, :, None, None])
        both.bias.copy_(second.weight.flatten(1) @ first.bias + second.bias)
        x = torch.randn(2, 12, 5, 5)
        torch.testing.assert_close(second(first(x)), both(x))
    found = {each.name: each for each in coupling.find(model, traced, graph.exported(model, example))}
    assert (found["2"].size, found["2"].linear, found["2"].fixed) == (4, True, "")


class Between(nn.Module):
    """A layer, an operator and the layer that reads what it makes of the channels."""

    def __init__(self, made: Callable[[Between, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.made = made
        self.first, self.one, self.last = nn.Conv2d(2, 12, 3), nn.Conv2d(2, 1, 3), nn.Conv2d(12, 3, 1)
        self.map, self.number = nn.Parameter(torch.rand(1, 1, 7, 7) + 1.0), nn.Parameter(torch.rand(()) + 1.0)
        self.row, self.words = nn.Parameter(torch.rand(7) + 1.0), nn.Parameter(torch.randn(1, 5, 49))
        self.along, self.each = nn.Linear(7, 5), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.made(self, self.first(x))
        pictures: torch.Tensor = self.last(y[..., None, None] if y.dim() == 2 else y)
        return pictures


@pytest.mark.parametrize(
    ("made", "linear"),
    [
        (lambda m, y: y, True),
        (lambda m, y: y.mean((2, 3)), True),
        (lambda m, y: y.sum(3, keepdim=True), True),
        (lambda m, y: y.amax((2, 3)), False),
        (lambda m, y: y.amin(2, keepdim=True), False),
        (lambda m, y: y * m.map, True),
        (lambda m, y: y / m.map, True),
        (lambda m, y: y * 2 / m.number, True),
        (lambda m, y: m.map / (y + y), False),
        (lambda m, y: torch.div(y, 0.25, rounding_mode="floor"), False),
        (lambda m, y: torch.div(y, m.map, rounding_mode="trunc"), False),
        (lambda m, y: y + y * m.map - y.mean((2, 3), keepdim=True), True),
        (lambda m, y: y + m.map, False),
        (lambda m, y: m.row - y, False),
        (lambda m, y: y + m.number, False),
        (lambda m, y: y + m.one.weight.sum(), False),
        (lambda m, y: y + 1.0, False),
        (lambda m, y: y + y.sum(1, keepdim=True), False),
        (lambda m, y: (y * 4).to(torch.int32).to(torch.float32), False),
        (lambda m, y: y.to(torch.float64).to(torch.float32), True),
        (lambda m, y: F.pad(y, (1, 1, 1, 1)), True),
        (lambda m, y: F.pad(y, (1, 1, 1, 1), value=5.0), False),
        (lambda m, y: nn.ConstantPad2d(1, -2.0)(y), False),
        (lambda m, y: F.pad(y, (1, 1), "constant", 3.0), False),
        (lambda m, y: F.pad(y, (0, 0, 0, 0, 1, -1)), False),
        (lambda m, y: y.roll(1, 3), True),
        (lambda m, y: m.along(y), False),
        (lambda m, y: m.each(y.reshape(-1, 1, 7, 7)).reshape(-1, 12, 7, 7), False),
        (lambda m, y: F.layer_norm(y, (7,)), False),
        (lambda m, y: F.layer_norm(y, (7, 7), m.map[0, 0]), False),
        (lambda m, y: y @ m.map, True),
        (lambda m, y: y @ y.transpose(2, 3), False),
        (lambda m, y: F.scaled_dot_product_attention(y.flatten(2), m.words, m.words).unflatten(2, (7, 7)), False),
        (lambda m, y: F.scaled_dot_product_attention(y, m.map, m.map), False),
    ],
)
def test_channels_are_turned_only_where_what_lies_between_turns_with_them(
    made: Callable[[Between, torch.Tensor], torch.Tensor], linear: bool
) -> None:
    torch.manual_seed(0)
    model, example = Between(made).eval(), {"x": torch.randn(2, *PICTURE)}
    found = {each.name: each for each in coupling.find(model, *graph.traced(model, example))}["first"]
    assert (found.linear and not found.fixed) == linear
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    with torch.no_grad():
        y = model.first(example["x"])
        before, behind = (made(model, torch.einsum("dc,nchw->ndhw", turn, y)), made(model, y))
        behind = torch.einsum("dc,nc...->nd...", turn, behind)
    assert torch.allclose(before, behind, atol=1e-4) == linear


@pytest.mark.parametrize("linear", [True, False])
def test_what_is_thought_to_turn_with_the_channels_is_tried(linear: bool) -> None:
    model, example = Between(lambda m, y: y if linear else y + m.map).eval(), {"x": torch.randn(2, *PICTURE)}
    found = coupling.find(model, *graph.traced(model, example))
    claimed = [replace(each, linear=True) for each in found]
    [first] = [each for each in narrow.checked(model, claimed, example) if each.name == "first"]
    assert (first.linear, first.fixed) == (linear, "")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_does_not_hide_what_turns_with_the_channels(kind: torch.dtype) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(2, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pictures: torch.Tensor = self.last(torch.sin(3000.0 * self.second(self.first(x))))
            return pictures

    torch.manual_seed(0)
    model, example = Steep().eval().to(kind), {"x": torch.randn(2, *PICTURE).to(kind)}
    found = narrow.checked(model, coupling.find(model, *graph.traced(model, example)), example)
    assert {each.name: (each.turned, each.fixed) for each in found}["first"] == (True, "")


@pytest.mark.parametrize("channels", [3, 4, 6, 8, 12, 40])
def test_widths_are_tried_that_differ_from_set_to_set(channels: int) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, channels, 3), nn.Conv2d(2, channels, 3)
            self.last = nn.Conv2d(2 * channels, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count = self.first.weight.shape[0]  # the code's idea of how many both give
            second = self.second(x).flatten(2).reshape(len(x), count, 7, 7)
            pictures: torch.Tensor = self.last(torch.cat([self.first(x).relu(), second.relu()], 1))
            return pictures

    model, example = Same().eval(), {"x": torch.randn(2, *PICTURE)}
    found = narrow.checked(model, coupling.find(model, *graph.traced(model, example)), example)
    reasons = {each.name: each.fixed for each in found}
    assert reasons["first"] == reasons["second"] == "the model's code does not do with fewer"


def test_channels_that_one_batch_norm_takes_stay_alike() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 12, 3), nn.Conv2d(12, 12, 3)
            self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.first, self.second):
                x = F.relu(self.norm(layer(x)))
            pictures: torch.Tensor = self.last(x)
            return pictures

    found = sets(made(Again), PICTURE)["first"]
    assert (names(found.producers), names(found.carriers)) == (["first", "second"], ["norm"])
    assert (names(found.uses), found.fixed, found.loose) == (["second", "last"], "", 2)


def test_parameters_and_norms_go_with_their_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(8)
            self.gamma = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pictures: torch.Tensor = self.second(self.norm(F.relu(self.first(x)) * self.gamma))
            return pictures

    found = sets(made(Scaled), PICTURE)["first"]
    assert (names(found.carriers), names(found.parameters), found.loose) == (["norm"], ["gamma"], 3)
    assert found.fixed == ""
