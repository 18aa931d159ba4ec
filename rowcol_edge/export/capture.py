"""A model as a ``torch.export`` program, and the names its inputs and outputs go by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..calling import bind, evaluating, places_of, quiet
from ..errors import DataError, ModelError, RowcolError, UnsupportedOpError

_TURNS = ("t.", "numpy_T", "permute.", "transpose.")
"""Operators of torch, less their namespace, that turn a matrix over."""


def program(
    model: nn.Module, example: Mapping[str, npt.NDArray[Any]], *, dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """Capture the model in eval mode; its own flags are put back.

    Args:
        example: input name → array with the samples on the first axis.
        dynamic_batch: leave the first size of every input free. Else the program has the example's.

    Raises:
        UnsupportedOpError: something torch.export cannot follow; names the module.
        ModelError: the model does not take these inputs, or fixes the batch size that should be free.
    """
    tensors = _tensors(example)
    if dynamic_batch:
        # torch.export takes a size of 1 for a constant, so it has to see at least two samples.
        tensors = {n: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() and len(t) == 1 else t for n, t in tensors.items()}
    args, kwargs = bind(model, tensors)
    with evaluating(model), torch.no_grad(), quiet():
        try:
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=_free_batch(tensors) if dynamic_batch else None, strict=False
            )
        except RowcolError:
            raise
        except Exception as e:  # boundary: user code runs here, and torch.export documents no closed set of errors
            raise _capture_error(e, model, dynamic_batch=dynamic_batch) from e


def input_names(captured: torch.export.ExportedProgram, model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names in the order of the program's own inputs, which is that of ``forward``, not of the batch."""
    places = places_of(model, names)
    spec = captured.call_spec.in_spec
    if spec is None:
        return [*places, *(name for name in names if name not in places)]
    _, keywords = pytree.tree_unflatten(range(spec.num_leaves), spec)
    return [*places, *sorted(keywords, key=keywords.__getitem__)]


def output_names(captured: torch.export.ExportedProgram) -> list[str]:
    """Names of the program's outputs, in its own order; see `name_outputs`."""
    spec = captured.call_spec.out_spec
    if spec is None:
        return ["output"]
    indices = name_outputs(pytree.tree_unflatten(range(spec.num_leaves), spec), kind=int)
    return sorted(indices, key=indices.__getitem__)


def tied_parameters(captured: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Names of the matrices that the program uses both as they are and transposed."""
    parameters = {**captured.graph_signature.inputs_to_parameters, **captured.graph_signature.inputs_to_buffers}
    found = []
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.name in parameters and node.meta["val"].dim() > 1:
            turned = [user for user in node.users if str(user.target).partition(".")[2].startswith(_TURNS)]
            if turned and len(node.users) > 1:
                found.append(parameters[node.name])
    return tuple(found)


def function(
    captured: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Mapping[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]:
    """The program as a function of named arrays; ``inputs`` and ``outputs`` are the names in its own order."""
    module, spec = captured.module(), captured.call_spec.in_spec
    assert spec is not None

    def run(feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        tensors = _tensors(feeds)
        args, kwargs = pytree.tree_unflatten([tensors[name] for name in inputs], spec)
        with torch.no_grad():
            values = pytree.tree_leaves(module(*args, **kwargs))
        return {name: value.detach().cpu().numpy() for name, value in zip(outputs, values, strict=True)}

    return run


def name_outputs(value: Any, kind: type = torch.Tensor) -> dict[str, Any]:
    """What a model returns, by name: ``output`` for one tensor, a dict's own keys, ``output_0``… for a tuple or list.

    Raises:
        ModelError: anything else, such as a nested structure or a tuple that holds None.
    """
    if isinstance(value, kind):
        return {"output": value}
    if isinstance(value, Mapping):
        named = {str(name): item for name, item in value.items()}
    elif isinstance(value, (tuple, list)):
        named = {f"output_{i}": item for i, item in enumerate(value)}
    else:
        named = {}
    wrong = next((f"{name}: {type(item).__name__}" for name, item in named.items() if not isinstance(item, kind)), "")
    if wrong or not named:
        raise ModelError(
            "the model's output",
            expected="a tensor, or a flat dict, tuple or list of tensors",
            got=wrong or type(value).__name__,
            hint="wrap the model in a module that returns only the tensors the device needs",
        )
    return named


def _tensors(example: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
    if not example:
        raise DataError("example input", expected="at least one input", got="none")
    try:
        # A copy: arrays may be read-only (memory mapped), which torch warns about.
        return {name: torch.from_numpy(np.array(array)) for name, array in example.items()}
    except TypeError as e:
        raise DataError("example input", expected="arrays of numbers", got=str(e)) from e


def _free_batch(tensors: Mapping[str, torch.Tensor]) -> Any:
    """The first size, under one name, for every input that holds as many samples as the first one."""
    samples = next((len(t) for t in tensors.values() if t.dim()), 0)
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    batch = torch.export.Dim("batch")
    for tensor in tensors.values():
        if tensor.dim() and len(tensor) == samples:
            shapes[tensor] = {0: batch}
    return shapes


def _capture_error(error: Exception, model: nn.Module, *, dynamic_batch: bool) -> ModelError:
    text = str(error)
    if dynamic_batch and "batch" in text and "specialized" in text:
        return ModelError(
            "the model fixes its batch size",
            expected="a forward that takes any number of samples",
            got=next((line.strip(" -") for line in text.splitlines() if "specialized" in line), "")[:160],
            hint="read the size as x.shape[0], not len(x), or build it with a fixed batch",
        )
    return UnsupportedOpError(
        f"torch.export cannot take module {_culprit(error, model)}",
        expected="a forward without data-dependent control flow, made of torch operators",
        got=first_line(error),
        hint="rewrite that module with plain torch operators",
    )


def _culprit(error: BaseException, model: nn.Module) -> str:
    """Name and type of the innermost module that was running when the error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found: nn.Module = model
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = owner
        trace = trace.tb_next
    return f"{names[id(found)] or 'the model itself'} ({type(found).__name__})"


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for the ``got`` of another."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
