"""Who opens what: the kinds of modules that hide their layers, how each is known, and what takes its place."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from rowcol_edge.calling import evaluating, quiet, tensors
from rowcol_edge.factoring.attention import DECODING, FusedAttention, HiddenAttention, TorchAttention
from rowcol_edge.factoring.padding import padded

Call = tuple[tuple[Tensor, ...], dict[str, Any]]


class ClosedError(Exception):
    """Why a module stays as it is; never seen outside `opening`."""


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that might be opened, each once, none inside another."""
    inside = "\0"
    for name, module in model.named_modules():
        if not name.startswith(inside) and _kind(module) is not None:
            inside = f"{name}." if name else ""
            yield name, module


def _kind(module: nn.Module) -> Callable[[nn.Module], tuple[nn.Module, list[Call]]] | None:
    """Who can open it."""
    if isinstance(module, nn.MultiheadAttention):
        return _torch
    if isinstance(module, nn.Conv2d):
        return _padding if "static_padding" in module._modules else None
    if isinstance(getattr(module, "qkv", None), nn.Linear) and _heads(module):
        return _fused
    return _hidden if _three(module) and _heads(module) else None


def made(module: nn.Module, held: Counter[int]) -> nn.Module:
    """What computes the same, in float64 on random inputs."""
    for name, part in module.named_modules():
        _check_untouched(part, f"its {name}" if name else "it")
    if any(held[id(parameter)] > 1 for parameter in module.parameters()):
        raise ClosedError("its weight is tied to another module")
    if any(p.is_meta or not p.is_floating_point() for p in module.parameters()):
        raise ClosedError("its weights are not floating point numbers")
    kind = _kind(module)
    assert kind is not None  # outermost gives no others
    new, calls = kind(copy.deepcopy(module))
    new.train(module.training)
    pair = [copy.deepcopy(each).double().cpu() for each in (module, new)]
    for args, kwargs in calls:
        wanted, got = (called(each, args, kwargs) for each in pair)
        if not alike(wanted, got, 1e-6):
            raise ClosedError(f"{type(module).__name__} computes something else than what would take its place")
    return new


def _check_untouched(module: nn.Module, what: str) -> None:
    if parametrize.is_parametrized(module):
        raise ClosedError(f"{what} is parametrized")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        raise ClosedError(f"hooks are attached to {what}")
    if "forward" in vars(module):
        raise ClosedError(f"{what} has a forward of its own")


def holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


# Each kind: what takes its place, and calls to compare the two with


def _torch(module: nn.Module) -> tuple[nn.Module, list[Call]]:
    assert isinstance(module, nn.MultiheadAttention)
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise ClosedError(f"{type(module).__name__} has a forward of its own")
    if module._parameters.get("bias_k") is not None or module.add_zero_attn:
        raise ClosedError("it adds keys and values of its own (add_bias_kv, add_zero_attn)")
    held = module._parameters
    fused, bias, out = held.get("in_proj_weight"), held.get("in_proj_bias"), _plain(module.out_proj)
    weights = [held[f"{letter}_proj_weight"] for letter in "qkv"] if fused is None else [fused] * 3
    layers: dict[str, nn.Module] = {
        name: _linear(weight, bias, place, None if fused is None else place)
        for place, (name, weight) in enumerate(zip(_PARTS, weights, strict=True))
    }
    layers["out_proj"] = _linear(out.weight, out.bias)
    scale = module.head_dim**-0.5
    new = TorchAttention(layers, module.num_heads, scale, module.dropout, batch_first=module.batch_first)
    new.embed_dim, new.kdim, new.vdim, new.head_dim = module.embed_dim, module.kdim, module.vdim, module.head_dim
    shapes = ((2, 5, module.embed_dim), (2, 7, module.kdim), (2, 7, module.vdim))
    sides = tuple(_noise(*(shape if module.batch_first else (shape[1], shape[0], shape[2]))) for shape in shapes)
    hidden, padded_out = torch.zeros(5, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    hidden[:, -2:], padded_out[1, :3] = True, True
    masks = {"attn_mask": hidden, "key_padding_mask": padded_out}
    return new, [(sides, {}), (sides, {"need_weights": False, **masks})]


def _fused(module: nn.Module) -> tuple[nn.Module, list[Call]]:
    """One weight for all three, as in timm's vision Transformers."""
    taken = _signature(module, {"attn_mask", "is_causal"}, first=None)
    fused, proj, heads = module.qkv, getattr(module, "proj", None), _heads(module)
    parts = ("qkv", "proj", "q_norm", "k_norm", "norm", "attn_drop", "proj_drop")
    _check_alone(module, parts)
    if not isinstance(proj, nn.Linear):
        raise ClosedError("it has no output layer of the name proj")
    assert isinstance(fused, nn.Linear)
    if fused.out_features % (3 * heads) or proj.in_features * 3 != fused.out_features:
        raise ClosedError("its queries, keys and values are not of one width")
    weight, bias = _plain(fused).weight, fused.bias
    layers: dict[str, nn.Module] = {name: _linear(weight, bias, place, place) for place, name in enumerate(_PARTS)}
    layers["proj"] = _plain(proj)
    norms = [getattr(module, name, None) or nn.Identity() for name in ("q_norm", "k_norm", "norm")]
    scale = _scale(module, fused.out_features // 3 // heads)
    drop = getattr(module, "proj_drop", None) or nn.Identity()
    new = FusedAttention(layers, heads, scale, _dropout(module), norms, drop)
    x = _noise(2, 5, fused.in_features)
    calls: list[Call] = [((x,), {})]
    if "attn_mask" in taken:
        calls.append(((x,), {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)}))
    if "is_causal" in taken:
        calls.append(((x,), {"is_causal": True}))
    return new, calls


def _hidden(module: nn.Module) -> tuple[nn.Module, list[Call]]:
    """Layers of their own and head sizes in the code, as in BERT and its like."""
    taken = _signature(module, {"attention_mask", "output_attentions", "encoder_attention_mask", *DECODING})
    names = _three(module) or _PARTS
    kinds = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if kinds not in ("sdpa", "eager", None):
        raise ClosedError(f"its attention is computed by {kinds!r}")
    outputs = tuple(n for n in ("out_proj", "o_proj", "out_lin") if isinstance(getattr(module, n, None), nn.Linear))
    _check_alone(module, (*names, *outputs, "dropout", "attention_dropout"))
    layers = {name: _plain(module.get_submodule(name)) for name in (*names, *outputs)}
    first = layers[names[0]]
    if any(layers[name].weight.shape != first.weight.shape for name in names):
        raise ClosedError("its queries, keys and values are not of one width")
    x = _noise(2, 5, first.in_features)
    calls: list[Call] = [((x,), {})]
    if "attention_mask" in taken:
        added = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
        added[..., -2:] = -1e4
        calls = [((x,), {"attention_mask": None}), ((x,), {"attention_mask": added})]
    result = called(copy.deepcopy(module).double().cpu(), *calls[0])
    if not isinstance(result, tuple) or len(result) not in (1, 2):
        raise ClosedError("it does not return what is mixed and the weights as a pair")
    heads = _heads(module)
    weights = len(result) == 2 and isinstance(result[1], Tensor)
    scale = _scale(module, first.out_features // heads)
    new = HiddenAttention(layers, heads, scale, _dropout(module), weights=weights, pair=len(result) == 2)
    return new, calls


def _padding(module: nn.Module) -> tuple[nn.Module, list[Call]]:
    assert isinstance(module, nn.Conv2d)
    new = padded(module)
    if isinstance(new, str):
        raise ClosedError(new)
    size = [2 + dilation * (kernel - 1) + 2 * stride for kernel, stride, dilation in _sizes(module)]
    return new, [((_noise(2, module.in_channels, *size),), {})]


def _sizes(module: nn.Conv2d) -> Iterator[tuple[int, int, int]]:
    return zip(module.kernel_size, module.stride, module.dilation, strict=True)


# What they are read from

_PARTS = ("query", "key", "value")
_THREES = (_PARTS, ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
_TURNS = ("rotary", "rope", "sinusoidal", "position_embeddings", "freqs")


def _three(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of separate projections in a module whose code says how wide a head is."""
    if not any(isinstance(getattr(module, name, None), int) for name in ("attention_head_size", "head_dim")):
        return None
    return next((t for t in _THREES if all(isinstance(getattr(module, n, None), nn.Linear) for n in t)), None)


def _heads(module: nn.Module) -> int:
    counts = (getattr(module, name, None) for name in ("num_attention_heads", "num_heads", "n_heads"))
    return next((count for count in counts if isinstance(count, int)), 0)


def _scale(module: nn.Module, width: int) -> float:
    found = (getattr(module, name, None) for name in ("scaling", "scale"))
    return next((scale for scale in found if isinstance(scale, float)), width**-0.5)


def _dropout(module: nn.Module) -> float:
    """Of the weights; it plays a part in training only."""
    for name in ("attn_drop", "dropout", "attention_dropout", "dropout_prob"):
        found = getattr(module, name, None)
        if isinstance(found, nn.Dropout):
            return float(found.p)
        if isinstance(found, float):
            return found
    return 0.0


def _signature(module: nn.Module, known: set[str], first: str | None = "hidden_states") -> set[str]:
    """Names that its forward takes behind the first."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    everything = [*names, *(name for name, _ in module.named_children())]
    if any(turn in name for name in everything for turn in _TURNS):
        raise ClosedError("rotary embeddings lie between its layers and their product")
    if not names or (first is not None and names[0] != first):
        raise ClosedError(f"its forward takes {names[0]!r} first" if names else "its forward names no input")
    other = [name for name in names[1:] if name not in known]
    if other:
        raise ClosedError(f"its forward takes {other[0]!r}")
    return set(names[1:])


def _check_alone(module: nn.Module, names: Sequence[str]) -> None:
    """It holds nothing but these."""
    for name, child in module.named_children():
        if name not in names and any(True for _ in (*child.parameters(), *child.buffers())):
            raise ClosedError(f"it also holds {name} ({type(child).__name__})")
    own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    if own:
        raise ClosedError(f"it also holds {own[0]}")


def _plain(module: nn.Module) -> nn.Linear:
    if type(module) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise ClosedError(f"its layer is a {type(module).__name__}")
    assert isinstance(module, nn.Linear)
    return module


def _linear(
    weight: Tensor | None, bias: Tensor | None, bias_part: int | None = None, weight_part: int | None = None
) -> nn.Linear:
    """A layer of these, or of one third of them; whether it takes a gradient stays."""
    assert weight is not None
    rows = _third(weight, weight_part)
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
    layer.weight = rows
    if bias is not None:
        layer.bias = _third(bias, bias_part)
    return layer


def _third(value: Tensor, part: int | None) -> nn.Parameter:
    taken = value.detach() if part is None else value.detach().chunk(3)[part]
    return nn.Parameter(taken.clone(), requires_grad=value.requires_grad)


# Comparing


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def called(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        with evaluating(module), torch.no_grad(), quiet():
            return module(*args, **kwargs)
    except Exception as error:  # boundary: the user's own code meets inputs it may not expect
        raise ClosedError(f"{type(module).__name__} cannot be tried by itself: {type(error).__name__}") from error


def alike(wanted: object, got: object, rounding: float) -> bool:
    one, other = tensors(wanted), tensors(got)
    return len(one) == len(other) and all(map(partial(_close, rounding=rounding), one, other))


def _close(wanted: Tensor, got: Tensor, rounding: float) -> bool:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    size = float(wanted.nan_to_num(0.0, 0.0, 0.0).abs().max()) if wanted.numel() else 0.0  # less the masked ones
    return torch.allclose(got, wanted, rtol=0.0, atol=rounding * max(size, 1e-30), equal_nan=True)
