"""A saved program as a model with layers: operators that take a weight become modules again.

``torch.export`` keeps parameters but no modules, so a ``.pt2`` has nothing to factor. ``lift`` puts ``nn.Linear``,
convolutions and batch norms back as modules where their parameters say they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_unflatten

from rowcol_edge.errors import ModelError
from rowcol_edge.pt2 import load_program

__all__ = ["lift", "load_program"]

_aten = torch.ops.aten
_DROPOUT_OPS = frozenset((_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default))
_PLAIN: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
_HELD = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))


def lift(program: torch.export.ExportedProgram) -> nn.Module:
    """A module in eval mode with the program's outputs, its layers named as in the model that was exported.

    A layer that was called twice is one module called twice. Operators whose weight is no plain parameter of its own
    holder (the joint projection of ``nn.MultiheadAttention``, say) stay operators. Shapes stay those the program was
    exported for: one without a dynamic batch takes only its own batch size.

    Raises:
        ModelError: the program was exported in training mode.
    """
    source = program.module(check_guards=False)
    assert isinstance(source, fx.GraphModule)
    layers: dict[str, nn.Module] = {}
    for node in list(source.graph.nodes):
        if node.op == "call_function":
            _refuse_training(node)
            if node.target in _BUILDERS:
                _replace(source, node, layers)
    for node in list(source.graph.nodes):
        # Only these: a general dead code elimination would have to know every operator that writes in place.
        if node.op == "get_attr" and not node.users:
            source.graph.erase_node(node)
    _plain_signature(source.graph, program)
    # A new GraphModule: the one of ``module()`` refuses eval() and checks inputs by hooks.
    return fx.GraphModule(source, source.graph, class_name="Lifted").eval()


def _plain_signature(graph: fx.Graph, program: torch.export.ExportedProgram) -> None:
    """``forward(a, b)`` over tensors, outputs built from nodes: not flattened and unflattened by tree specs
    (which cannot be copied without a warning, and hide the names)."""
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    if any(child.num_leaves != 1 or child.num_nodes != 1 for side in in_spec.children() for child in side.children()):
        raise ModelError("the saved program takes nested inputs", expected="tensors", got=str(in_spec))
    graph.set_codegen(fx.graph.CodeGen())
    output = graph.output_node()
    leaves = output.args[0]
    assert isinstance(leaves, list | tuple)
    output.args = (tree_unflatten(list(leaves), out_spec),)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The operator's arguments by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {argument.name: argument.default_value for argument in schema} | given | dict(node.kwargs)


def _refuse_training(node: fx.Node) -> None:
    if node.target is _aten.batch_norm.default:
        arguments = _arguments(node)
        training = arguments["training"] is True and arguments["running_mean"] is not None
    else:
        training = node.target in _DROPOUT_OPS and _arguments(node)["train"] is True
    if training:
        raise ModelError(
            "the saved program was exported in training mode",
            expected="a program of the model in eval mode",
            got=f"{node.target} in training mode",
            hint="call model.eval() before torch.export.export",
        )


def _replace(source: fx.GraphModule, node: fx.Node, layers: dict[str, nn.Module]) -> None:
    """Turns one operator into a call of the module that holds its weight, where there is such a module."""
    arguments = _arguments(node)
    name = _holder(arguments)
    if not name:
        return
    holder = source.get_submodule(name)
    module = layers.get(name)
    fresh = module is None
    if module is None:
        held = {*holder._parameters, *holder._buffers}
        if type(holder) is not nn.Module or holder._modules or not held <= _HELD:
            return
        module = _fill(_BUILDERS[node.target](node, arguments), holder)
    if module is None or not _fits(module, arguments):
        return
    if fresh:
        source.set_submodule(name, module)
        layers[name] = module
    with source.graph.inserting_before(node):
        call = source.graph.call_module(name, (arguments["input"],))
    call.meta = node.meta
    node.replace_all_uses_with(call)
    source.graph.erase_node(node)


def _holder(arguments: Mapping[str, Any]) -> str:
    """Path of the module whose ``weight``, ``bias`` … all tensor arguments are; "" if they have no common one."""
    paths = set()
    for key in ("weight", "bias", "running_mean", "running_var"):
        value = arguments.get(key)
        if value is None:
            continue
        path, _, attribute = value.target.rpartition(".") if value.op == "get_attr" else ("", "", "")
        if attribute != key:
            return ""
        paths.add(path)
    return paths.pop() if len(paths) == 1 else ""


def _fill(module: nn.Module | None, holder: nn.Module) -> nn.Module | None:
    """The module with the holder's own tensors; None if it would be another layer than the holder says."""
    if module is None:
        return None
    for key in ("weight", "bias"):
        value = getattr(holder, key, None)
        if value is not None and not isinstance(value, nn.Parameter):
            return None
        setattr(module, key, value)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(holder, key, None)
        if isinstance(module, _BatchNorm) and value is not None:
            setattr(module, key, value)
    return module


def _fits(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """A second call through the same weight must ask for the same layer (same stride, same bias …)."""
    if (getattr(module, "bias", None) is None) != (arguments["bias"] is None):
        return False
    wanted = ("stride", "padding", "output_padding", "dilation", "groups", "eps")
    return all(_same(getattr(module, key), arguments[key]) for key in wanted if key in arguments)


def _same(have: object, want: object) -> bool:
    return have == _sides(want, len(have)) if isinstance(have, tuple) else have == want


def _sides(value: Any, count: int) -> tuple[int, ...]:
    """torch accepts one number, or a list of one, for all sides."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if len(values) == count else values * count


def _linear(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    features, inputs = arguments["weight"].meta["val"].shape
    return nn.Linear(inputs, features, bias=arguments["bias"] is not None, device="meta")


def _convolution(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    first, second, *kernel = arguments["weight"].meta["val"].shape
    groups, transposed = arguments["groups"], "output_padding" in arguments
    inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
    # A padding may also be "same" or "valid".
    options = {
        key: value if isinstance(value, str) else _sides(value, len(kernel))
        for key in ("stride", "padding", "output_padding", "dilation")
        if (value := arguments.get(key)) is not None
    }
    kind = (_TRANSPOSED if transposed else _PLAIN)[len(kernel)]
    bias = arguments["bias"] is not None
    return kind(inputs, outputs, tuple(kernel), groups=groups, bias=bias, device="meta", **options)


def _batch_norm(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    if arguments["running_mean"] is None or arguments["running_var"] is None:
        return None
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(node.meta["val"].dim(), nn.BatchNorm1d)
    features = arguments["running_mean"].meta["val"].shape[0]
    affine = arguments["weight"] is not None
    return kind(features, eps=arguments["eps"], momentum=arguments["momentum"], affine=affine)


_BUILDERS: dict[Any, Callable[[fx.Node, Mapping[str, Any]], nn.Module | None]] = {
    _aten.linear.default: _linear,
    _aten.conv1d.default: _convolution,
    _aten.conv1d.padding: _convolution,
    _aten.conv2d.default: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.conv_transpose1d.default: _convolution,
    _aten.conv_transpose2d.input: _convolution,
    _aten.batch_norm.default: _batch_norm,
}
