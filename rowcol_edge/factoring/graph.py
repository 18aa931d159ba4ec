"""Which layers a model calls, how often, in what order, and which belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn
from torch.export.graph_signature import ExportGraphSignature
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.calling import Calls, bind, evaluating, quiet, watching
from rowcol_edge.errors import ModelError, RowcolError, UnsupportedOpError
from rowcol_edge.factoring import norms

_aten = torch.ops.aten
_LAYER_OPS = frozenset(
    (
        _aten.linear.default,
        *(getattr(getattr(_aten, f"conv{d}d"), overload) for d in (1, 2, 3) for overload in ("default", "padding")),
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.conv_transpose3d.input,
    )
)
_NORM_OPS = frozenset((_aten.batch_norm.default,))
_DROPOUT_OPS = frozenset((_aten.dropout.default, _aten.feature_dropout.default))
_RELU_OPS = frozenset((_aten.relu.default, _aten.relu_.default))
_SAME_OPS = frozenset((_aten.clone.default, _aten.contiguous.default, _aten.alias.default, _aten.detach.default))


@dataclass(frozen=True, slots=True)
class GraphLayer:
    """One ``nn.Linear``, convolution or batch norm and how the model uses it."""

    name: str  # first name of the module in ``named_modules``
    calls: int  # operators that take its weight
    own_calls: int  # of these, through the module's own ``forward``
    elsewhere: str  # "weight" or "bias" if that also feeds another operator, else ""
    positions: int  # rows the weight is applied to (inputs of a transposed convolution), per sample, summed over calls
    outputs: int  # rows it gives, counted alike
    second: bool  # its features are the second axis of its output, on which a batch norm acts
    resized: bool  # called with an output size beside its input
    consumer: str = ""  # the layer that alone takes its output, with nothing in between
    maps: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # sizes of a convolution's map before and behind it,
    # if it is called once


@dataclass(frozen=True, slots=True)
class BatchNormPair:
    """A layer and the batch norm that is the only reader of its output."""

    layer: str
    norm: str


@dataclass(frozen=True, slots=True)
class FactoredPair:
    """Two consecutive layers through a bottleneck of ``rank`` features: already factored."""

    first: str
    second: str
    rank: int


@dataclass(frozen=True, slots=True)
class Coupling:
    """Two consecutive layers with at most a ReLU in between: a channel's scale passes from one to the other."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """Layers in call order (never-called ones last), foldable batch norms, already factored pairs, couplings."""

    layers: tuple[GraphLayer, ...]
    batchnorms: tuple[BatchNormPair, ...]
    factored: tuple[FactoredPair, ...]
    couplings: tuple[Coupling, ...] = ()

    def layer(self, name: str) -> GraphLayer | None:
        """The layer of that name, None if the model has none."""
        return next((layer for layer in self.layers if layer.name == name), None)


def trace(model: nn.Module, example: Mapping[str, torch.Tensor]) -> LayerGraph:
    """What `traced` reads."""
    return traced(model, example)[0]


def traced(model: nn.Module, example: Mapping[str, torch.Tensor]) -> tuple[LayerGraph, torch.export.ExportedProgram]:
    """Traces one forward pass with ``torch.export`` (eval mode, no gradient); the model is left as it was.

    Args:
        model: any module that ``torch.export`` takes.
        example: input name → tensor, batch first.

    Raises:
        ModelError: the model fails on the example itself.
        UnsupportedOpError: ``torch.export`` cannot take it; names the innermost module.
    """
    args, kwargs = bind(model, example)
    with evaluating(model), torch.no_grad():
        with watching(model) as calls:
            try:
                model(*args, **kwargs)
            except RowcolError:
                raise
            except Exception as error:  # boundary: the user's own code runs here and may raise anything
                shapes = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in example.items())
                raise ModelError(
                    f"the model fails on the example input, in module {calls.innermost or type(model).__name__!r}",
                    expected="samples that its forward takes",
                    got=f"{shapes}: {_first_line(error)}",
                    hint=_hint(error),
                ) from error
        program = _export(model, args, kwargs)
    return _Reader(model, program, calls, _batch_size(example)).read(), program


def exported(model: nn.Module, example: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """The model's graph in eval mode, with the example's sizes; UnsupportedOpError as `trace`."""
    args, kwargs = bind(model, example)
    with evaluating(model), torch.no_grad():
        return _export(model, args, kwargs)


def weight_owners(model: nn.Module, program: torch.export.ExportedProgram) -> dict[str, str]:
    """Placeholder → the layer or norm whose weight or running statistic it is."""
    kinds = nn.Linear | _ConvNd | _BatchNorm | nn.LayerNorm
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    owner = {id(tensor): name for name, module in reversed(modules.items()) for tensor in _tensors(module)}
    return _owners(_stored(model, program.graph_signature), owner)


def computed(module: nn.Module) -> str:
    """``weight`` or ``bias``, the first that is no parameter: computed by a parametrization or a hook, so that what is
    put there does not stay, or a buffer."""
    found = (key for key in ("weight", "bias") if key not in module._parameters and hasattr(module, key))
    return next(found, "")


def inside(node: fx.Node) -> str:
    """Path of the innermost module whose forward called the operator, ``""`` for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def _export(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    with watching(model) as calls, quiet():
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:  # boundary: torch.export documents no closed set of errors
            raise UnsupportedOpError(
                f"torch.export cannot take module {calls.innermost or type(model).__name__!r}",
                expected="a forward without data-dependent control flow or unregistered operators",
                got=_first_line(error),
                hint="rewrite that module with plain torch operators",
            ) from error


def _hint(error: Exception) -> str:
    """Against what made a model fail: its weights and inputs are float32, another type can only be its own code's."""
    if any(kind in str(error) for kind in ("Half", "BFloat16", "Double")):
        return "it is worked on in float32: let its code cast to the type of a weight (x.to(layer.weight.dtype))"
    return "hand over what it was trained on: floats scaled as then, or pictures with --preprocess"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _batch_size(example: Mapping[str, torch.Tensor]) -> int:
    sizes = [value.shape[0] for value in example.values() if value.dim()]
    return max(1, sizes[0]) if sizes else 1


class _Reader:
    """Reads one exported graph against the module tree. Nodes are tied to modules by parameter, never by node name."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, calls: Calls, batch: int) -> None:
        self.program = program
        self.placeholders: dict[str, fx.Node] = {
            node.name: node for node in program.graph.nodes if node.op == "placeholder"
        }
        self.own_calls = calls.counts
        self.resized = calls.more
        self.batch = batch
        kinds = nn.Linear | _ConvNd | _BatchNorm
        self.modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
        owner = {id(tensor): name for name, module in reversed(self.modules.items()) for tensor in _tensors(module)}
        self.tensors = _stored(model, program.graph_signature)
        self.owners = _owners(self.tensors, owner)
        # Parametrizations and hooks compute these weights: no parameter tells whose they are.
        first = {module: name for name, module in model.named_modules()}
        self.computed = {
            path: first[module]
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear | _ConvNd) and module._parameters.get("weight") is None
        }
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            name = self._module_of(node)
            if name:
                self.nodes.setdefault(name, []).append(node)

    def _module_of(self, node: fx.Node) -> str:
        if node.op != "call_function" or (node.target not in _LAYER_OPS and node.target not in _NORM_OPS):
            return ""
        indices = (1, 2, 3) if node.target in _NORM_OPS else (1,)
        for value in (node.args[i] for i in indices if i < len(node.args)):
            name = self.owners.get(value.name, "") if isinstance(value, fx.Node) else ""
            if name and isinstance(self.modules[name], _BatchNorm) == (node.target in _NORM_OPS):
                return name
        return self.computed.get(inside(node), "") if node.target in _LAYER_OPS else ""

    def read(self) -> LayerGraph:
        names = [*self.nodes, *(name for name in self.modules if name not in self.nodes)]
        layers = tuple(self._layer(name) for name in names)
        held = {name for name, module in self.modules.items() if computed(module)}
        once = {
            layer.name: layer
            for layer in layers
            if layer.calls == layer.own_calls == 1 and not layer.elsewhere and layer.name not in held
        }
        pairs = tuple(
            BatchNormPair(layer.name, layer.consumer)
            for layer in once.values()
            if layer.consumer in once and self._foldable(layer, layer.consumer)
        )
        factored = self._factored(once, {pair.layer: pair.norm for pair in pairs})
        return LayerGraph(layers, pairs, factored, self._couplings(once))

    def _layer(self, name: str) -> GraphLayer:
        nodes = self.nodes.get(name, [])
        module = self.modules[name]
        given = [node.meta["val"] for node in nodes]
        positions = outputs = self._rows(given, _features(module))
        if isinstance(module, _ConvNd) and module.transposed:
            taken = [cast(fx.Node, node.args[0]).meta["val"] for node in nodes]
            positions = self._rows(taken, module.in_channels)
        bias = module._parameters.get("bias")
        elsewhere = {
            "bias" if tensor is bias else "weight"
            for placeholder, tensor in self.tensors.items()
            if self.owners.get(placeholder) == name or tensor is bias
            if not self.placeholders[placeholder].users.keys() <= set(nodes)
        }
        return GraphLayer(
            name=name,
            calls=len(nodes),
            own_calls=self.own_calls.get(name, 0),
            elsewhere=max(elsewhere, default=""),
            positions=positions,
            outputs=outputs,
            second=bool(given) and all(value.dim() == 2 + _spatial_axes(module) for value in given),
            resized=name in self.resized,
            consumer=self._consumer(nodes[0]) if len(nodes) == 1 else "",
            maps=_maps(nodes[0], module) if len(nodes) == 1 else None,
        )

    def _rows(self, values: Iterable[torch.Tensor], features: int) -> int:
        """Positions per sample, summed over calls."""
        return sum(math.prod(value.shape) // (features * self.batch) for value in values)

    def _couplings(self, once: Mapping[str, GraphLayer]) -> tuple[Coupling, ...]:
        behind = {name: self._consumer(self.nodes[name][0], _SAME_OPS | _RELU_OPS) for name in once}
        return tuple(
            Coupling(first, second)
            for first, second in behind.items()
            if second in once and _coupled(self.modules[first], self.modules[second])
        )

    def _consumer(self, node: fx.Node, through: frozenset[object] = _SAME_OPS) -> str:
        """The layer that alone reads ``node``, looking through operators that do nothing in eval mode."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.args and user.args[0] is node and sum(value is node for value in user.all_input_nodes) == 1:
                name = self._module_of(user)
                if name:
                    return name
                idle = user.target in through or (user.target in _DROPOUT_OPS and user.args[2] is False)
                if user.op == "call_function" and idle:
                    node = user
                    continue
            return ""
        return ""

    def _foldable(self, layer: GraphLayer, norm: str) -> bool:
        module, batchnorm = self.modules[layer.name], self.modules[norm]
        # The kernel of a grouped transposed convolution holds the output channels of each group in one place.
        grouped = isinstance(module, _ConvNd) and module.transposed and module.groups != 1
        same = isinstance(batchnorm, _BatchNorm) and _features(module) == batchnorm.num_features
        return layer.second and not grouped and same and norms.rest(batchnorm, module) is not None

    def _factored(self, once: Mapping[str, GraphLayer], norm_of: Mapping[str, str]) -> tuple[FactoredPair, ...]:
        found = []
        for name, layer in once.items():
            # A batch norm that can be folded is no nonlinearity: the two layers still multiply.
            second = once[norm_of[name]].consumer if name in norm_of else layer.consumer
            rank = _bottleneck(self.modules[name], self.modules[second]) if second in once else 0
            if rank:
                found.append(FactoredPair(name, second, rank))
        return tuple(found)


def _features(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, _ConvNd) else cast(_BatchNorm, module).num_features


def _spatial_axes(module: nn.Module) -> int:
    return len(module.kernel_size) if isinstance(module, _ConvNd) else 0


def _maps(node: fx.Node, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if not isinstance(module, _ConvNd):
        return None
    axes = len(module.kernel_size)
    before, behind = (tuple(map(int, n.meta["val"].shape[-axes:])) for n in (cast(fx.Node, node.args[0]), node))
    if module.padding_mode != "zeros":  # the operator gets what an operator before it has padded
        both = module._reversed_padding_repeated_twice[::-1]
        before = tuple(size - sum(both[2 * axis : 2 * axis + 2]) for axis, size in enumerate(before))
    return before, behind


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    named = {**module._parameters, **(module._buffers if isinstance(module, _BatchNorm) else {})}
    wanted = (named.get(key) for key in ("weight", "running_mean", "running_var"))
    return [tensor for tensor in wanted if tensor is not None]


def _stored(model: nn.Module, signature: ExportGraphSignature) -> dict[str, torch.Tensor]:
    """Placeholder name → the parameter or buffer."""
    found = {}
    for placeholder, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        path, _, attribute = target.rpartition(".")
        tensor = getattr(model.get_submodule(path), attribute, None)
        if tensor is not None:
            found[placeholder] = tensor
    return found


def _owners(stored: Mapping[str, torch.Tensor], owner: Mapping[int, str]) -> dict[str, str]:
    """Placeholder name → name of the module that holds the parameter or buffer as its weight."""
    return {placeholder: owner[id(tensor)] for placeholder, tensor in stored.items() if id(tensor) in owner}


def _coupled(first: nn.Module, second: nn.Module) -> bool:
    """Is each output channel of the first an input channel of the second?"""
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.out_features == second.in_features
    convolutions = isinstance(first, _ConvNd) and isinstance(second, _ConvNd)
    return convolutions and not first.transposed and not second.transposed and first.out_channels == second.in_channels


def _bottleneck(first: nn.Module, second: nn.Module) -> int:
    """Width of the bottleneck if the two together are smaller than the layer they multiply to, else 0."""
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        weights, dense = first.weight.numel() + second.weight.numel(), first.in_features * second.out_features
        return first.out_features if weights < dense else 0
    if not isinstance(first, _ConvNd) or not isinstance(second, _ConvNd) or first.groups != 1 or second.groups != 1:
        return 0
    if _spatial_axes(first) != _spatial_axes(second):
        return 0
    if not (_absorbed(first, second) or _absorbed(second, first) or _apart(first, second)):
        return 0
    taps = math.prod(first.kernel_size) * math.prod(second.kernel_size)
    weights, dense = first.weight.numel() + second.weight.numel(), first.in_channels * second.out_channels * taps
    return first.out_channels if weights < dense else 0


def _absorbed(pointwise: _ConvNd, other: _ConvNd) -> bool:
    """Could the other's kernel hold both, because the first is nothing but a matrix over the channels?

    A stride of its own has no place in a transposed convolution.
    """
    plain = pointwise.padding in ("valid", "same") or not any((*pointwise.padding, *pointwise.output_padding))
    strides = (pointwise.transposed or other.transposed) and math.prod(pointwise.stride) != 1
    return math.prod(pointwise.kernel_size) == 1 and plain and not strides


def _apart(first: _ConvNd, second: _ConvNd) -> bool:
    """Does each axis belong to one of the two, as in k×1 and 1×k? A kernel of both sides holds them then."""
    if first.transposed or second.transposed or first.padding_mode != second.padding_mode:
        return False

    def idle(layer: _ConvNd, axis: int) -> bool:
        pads = layer._reversed_padding_repeated_twice[::-1][2 * axis : 2 * axis + 2]
        return layer.kernel_size[axis] == layer.stride[axis] == 1 and not any(pads)

    return all(idle(first, axis) or idle(second, axis) for axis in range(_spatial_axes(first)))
