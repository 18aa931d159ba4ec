"""Channels of published architectures with random weights: which sets are found, and narrowing what nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from rowcol_edge.factoring import coupling, fold, graph, narrow, opening
from rowcol_edge.factoring.channels import ChannelSet

OUTPUT, POST_NORM = "an output of the model", "what a layer norm gives is added to, as in post-norm Transformers"


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=5)


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=5)


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(width_mult=0.35, num_classes=5)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # of zeros at first
    return model


def timm_vit() -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=5)


def timm_mobilenet() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("mobilenetv3_small_050", num_classes=5)
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            self.bert = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
            self.head = nn.Linear(32, 5)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.bert(input_ids=ids).last_hidden_state[:, 0])
            return logits

    return Encoder()


@dataclass(frozen=True)
class Case:
    """``sets``: how many can be narrowed; ``fixed``: the reasons of the others; ``holds``: members of some of them."""

    make: Callable[[], nn.Module]
    example: dict[str, Tensor]
    sets: int
    fixed: list[str]
    holds: dict[str, dict[str, int]] = field(default_factory=dict)


def pictures(side: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


CASES = {
    # eight blocks, and the sum that each of four stages adds to
    "resnet18": Case(resnet18, pictures(32), 8 + 4, [OUTPUT], {"conv1": {"producers": 3, "uses": 4}}),
    # two sets in each of sixteen blocks, the sums, and the stem
    "resnet50": Case(resnet50, pictures(32), 2 * 16 + 4 + 1, [OUTPUT], {"layer1.0.conv3": {"producers": 4}}),
    "mobilenet": Case(mobilenet, pictures(32), 25, [OUTPUT], {"features.2.conv.0.0": {"carriers": 1, "uses": 1}}),
    # what ten blocks widen to, nine gates; the stem, what blocks give to the next, and the two layers at the end
    "timm mobilenet": Case(
        timm_mobilenet, pictures(32), 10 + 9 + 7, [OUTPUT], {"blocks.2.0.conv_pw": {"carriers": 1, "uses": 2}}
    ),
    # queries with keys, values, and the hidden layer of two blocks; the stream
    "timm": Case(timm_vit, pictures(32), 2 * 3 + 1, [OUTPUT], {"patch_embed.proj": {"norms": 5, "uses": 9}}),
    "torchvision": Case(torchvision_vit, pictures(32), 2 * 3 + 1, [OUTPUT], {"conv_proj": {"norms": 5, "sizes": 1}}),
    "bert": Case(bert, {"ids": torch.arange(16).reshape(2, 8)}, 2 * 3, [OUTPUT, POST_NORM]),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_of_real_models(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # scales of one and shifts of zero
    traced = graph.trace(model, case.example)
    model = opening.opened(fold.fold_batchnorm(model, traced), case.example)
    found = narrow.checked(model, coupling.find(model, *graph.traced(model, case.example)), case.example)
    free = [each for each in found if not each.fixed]
    assert (len(free), sorted({each.fixed for each in found if each.fixed})) == (case.sets, sorted(case.fixed))
    by_name = {each.name: each for each in found}
    for each, parts in case.holds.items():
        assert {part: len(getattr(by_name[each], part)) for part in parts} == parts
    narrowings = [narrow.plain(model, each, each.size // 2) for each in free]
    before = outputs(model, case.example)
    for each in narrowings:
        unread(model, each)
    wanted, got = (outputs(some, case.example) for some in (model, narrow.narrow(model, narrowings)))
    # the directions of a stream are kept in float32
    rounding = 1e-5 if any(each.norms for each in free) else 1e-10
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=rounding * float(wanted.abs().max()))
    assert float((wanted - before).abs().max()) > 1e-3 * float(before.abs().max())  # they were read before


def outputs(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(**example)
    return result


@torch.no_grad()
def unread(model: nn.Module, each: narrow.Narrowing) -> None:
    """In place: nobody reads the channels that ``each`` does not keep; of a stream or of those turned, directions."""
    channels: ChannelSet = each.channels
    if channels.norms or channels.turned:
        for slot in channels.producers:
            layer = model.get_submodule(slot.name)
            for rows, take in zip(torch.from_numpy(slot.index[:, :, 0]), torch.from_numpy(each.take), strict=True):
                inside = take.T @ take
                layer.weight[rows] = torch.tensordot(inside, layer.weight[rows], 1)
                layer.bias[rows] = inside @ layer.bias[rows]
        for slot in channels.parameters:
            inside, parameter = torch.from_numpy(each.take[0].T @ each.take[0]), model.get_parameter(slot.name)
            parameter.copy_(torch.tensordot(parameter, inside, ([slot.axis], [0])).movedim(-1, slot.axis))
        return
    for slot in channels.uses:
        model.get_submodule(slot.name).weight[:, torch.from_numpy(slot.index[:, each.width :].ravel())] = 0.0
