"""Convolutions that pad in a forward of their own, as plain layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def padded(module: nn.Conv2d) -> nn.Module | str:
    """What a convolution with a ``static_padding`` computes: one ``nn.Conv2d`` where both sides get the same, else
    ``nn.Sequential(pad=…, conv=…)``; or why there is no such thing. It takes the parameters over."""
    found = module.static_padding
    before = getattr(found, "padding", None) if type(found) is nn.ZeroPad2d else _nothing(found)
    if before is None:
        return f"its static_padding is a {type(found).__name__}"
    own = module.padding
    if isinstance(own, str) or module.padding_mode != "zeros":
        return "it pads in another way besides"
    left, right, top, bottom = before
    # lists in some such classes
    kernel, stride, dilation = ((pair[0], pair[1]) for pair in (module.kernel_size, module.stride, module.dilation))
    symmetric = left == right and top == bottom
    conv = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        kernel,
        stride,
        (own[0] + top, own[1] + left) if symmetric else (own[0], own[1]),
        dilation,
        module.groups,
        module.bias is not None,
        device="meta",
    )
    conv.weight = module.weight
    conv.bias = module.bias
    if symmetric:
        return conv
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((left, right, top, bottom)), conv=conv))


def _nothing(module: object) -> tuple[int, int, int, int] | None:
    """An identity, whoever wrote it."""
    same = isinstance(module, nn.Module) and type(module).__name__ == "Identity" and not any(module.parameters())
    return (0, 0, 0, 0) if same else None
