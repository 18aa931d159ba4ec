"""PyTorch → ONNX at the opset and IR version that the target's oldest runtime reads."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import nn

from ..backends import onnx_files
from ..calling import evaluating
from ..errors import ConfigError, ModelError, StageError, UnsupportedOpError, WeightsError
from .capture import first_line, input_names, program, tied_parameters
from .capture import output_names as captured_names

__all__ = ["OPSETS", "export", "program"]

OPSETS = range(17, 22)
"""Opsets that can be asked for. torch writes 18 and converts from there: up always, down only where it can."""

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch notes the modules that a node comes from, from the outermost on, as a Python list."""
_CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")
"""Loggers that report a conversion which did not work; `export` raises for it."""


def export(
    model: nn.Module,
    example: Mapping[str, npt.NDArray[Any]],
    out: Path,
    *,
    opset: int,
    ir_version: int,
    dynamic_batch: bool = False,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write the model as one ONNX file, after the full ONNX check, in one step.

    Inputs are named as in ``example``; outputs ``output`` (one tensor), by their keys (dict), ``output_0``… (tuple),
    or as ``output_names`` says. The model is not changed.

    Args:
        example: input name → array with the samples on the first axis.
        dynamic_batch: leave the first size free (named ``batch``), else it is the example's.

    Raises:
        UnsupportedOpError: an operator that has no ONNX form; names it and the module.
        ModelError: the model does not take the inputs, fixes its batch size, or returns no flat set of tensors.
        WeightsError: a parameter holds NaN or infinity.
        StageError: over 2 GB, the opset cannot be reached, or the result is not valid. Nothing is written.
    """
    if opset not in OPSETS:
        raise ConfigError("opset", expected=f"{OPSETS[0]} to {OPSETS[-1]}", got=str(opset))
    check_size(model)
    _check_finite(model)
    captured = program(model, example, dynamic_batch=dynamic_batch)
    names = _output_names(captured, output_names)
    proto = _convert(model, captured, opset, input_names(captured, model, list(example)), names)
    onnx_files.strip(proto)
    if dynamic_batch:
        _name_batch(proto)
    onnx_files.check(proto, "export", opset_version=opset, ir_version=ir_version)
    _check_signature(proto, set(example), names)
    onnx_files.write(proto, out)


def check_size(model: nn.Module) -> None:
    """Needs nothing traced: a parameter that two modules share counts once.

    Raises:
        StageError: over 2 GB.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    size_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    if size_bytes > onnx_files.LIMIT_BYTES:
        raise StageError(
            "export",
            expected=f"at most {onnx_files.LIMIT_BYTES:,} bytes of weights: an ONNX file ends at 2 GB",
            got=f"{size_bytes:,} bytes",
            hint="package its factored arm alone (--no-dense), or hand over a smaller model",
        )


def _convert(
    model: nn.Module, captured: torch.export.ExportedProgram, opset: int, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    tied = tied_parameters(captured)
    with _quiet(), evaluating(model), torch.no_grad():
        try:
            converted = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                external_data=False,
                optimize=not tied,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as e:
            raise _conversion_error(e, captured) from e
        if converted is None:
            raise StageError("export", expected="an ONNX model from torch.onnx.export", got="nothing")
        if tied:
            with _aside(converted, tied):
                converted.optimize()
        _free_names(converted, {*inputs, *outputs})
        proto = converted.model_proto
        _name_nodes(proto)
        return proto


@contextlib.contextmanager
def _aside(converted: torch.onnx.ONNXProgram, tied: Sequence[str]) -> Iterator[None]:
    """Tied weights stand as inputs, which no rewrite folds, once for each of their uses, into what follows them."""
    graph = converted.model.graph
    held = {}
    for name in tied:
        if name in graph.initializers:
            value = graph.initializers.pop(name)
            held[name], value.const_value = value.const_value, None
            graph.inputs.append(value)
    yield
    graph = converted.model.graph  # the rewrites may have made another
    for value in [value for value in graph.inputs if value.name in held]:
        graph.inputs.remove(value)
        value.const_value = held[str(value.name)]
        graph.initializers[str(value.name)] = value


def _free_names(converted: torch.onnx.ONNXProgram, names: set[str]) -> None:
    """Rename inner values that are called as an input or output is: torch names them after their operators, such as
    ``embedding``."""
    for node in converted.model.graph.all_nodes():
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                value.name = f"{value.name}_within"


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Names by the model's own modules, such as ``blocks.0.attention/MatMul``: what people know a layer by, and what
    the times of operators are put together by."""
    taken: Counter[str] = Counter()
    for node in proto.graph.node:
        noted = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
        *modules, _ = ast.literal_eval(noted) or [""]  # the last one is the operator itself
        name = f"{modules[-1]}/{node.op_type}" if modules and modules[-1] else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def _name_batch(proto: onnx.ModelProto) -> None:
    """The free size by its name: torch.export knows it as a symbol such as ``s40``."""
    symbols = {value.type.tensor_type.shape.dim[0].dim_param for value in proto.graph.input if _rank(value)} - {""}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b") if symbols else None
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if pattern and size.dim_param:
                size.dim_param = pattern.sub("batch", size.dim_param)


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _output_names(captured: torch.export.ExportedProgram, wanted: Sequence[str] | None) -> list[str]:
    own = captured_names(captured)
    if wanted is None:
        return own
    if len(wanted) != len(own) or len(set(wanted)) != len(own):
        raise ModelError("output names", expected=f"{len(own)} different ones", got=", ".join(wanted) or "none")
    return list(wanted)


def _check_finite(model: nn.Module) -> None:
    """Parameters only: a buffer may hold the infinities of an attention mask."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise WeightsError(f"weights {name}", expected="finite values", got="NaN or infinity")


def _check_signature(proto: onnx.ModelProto, inputs: set[str], outputs: list[str]) -> None:
    got_in = [port.name for port in onnx_files.inputs(proto)]
    got_out = [port.name for port in onnx_files.outputs(proto)]
    if set(got_in) != inputs or got_out != outputs:
        raise StageError(
            "export",
            expected=f"inputs {', '.join(sorted(inputs))} and outputs {', '.join(outputs)}",
            got=f"{', '.join(got_in)} and {', '.join(got_out)}",
        )


def _conversion_error(error: Exception, captured: torch.export.ExportedProgram) -> UnsupportedOpError | StageError:
    """torch names the operator somewhere in the chain of causes; the program knows which module called it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    found = re.search(r"OpOverload\(op='([\w.]+)'", text) or re.search(r"target=torch\.ops\.([\w.]+)", text)
    if found is None:
        return StageError("export", expected="a model that torch.onnx can convert", got=first_line(chain[-1]))
    operator = found.group(1)
    return UnsupportedOpError(
        f"operator {operator} of module {_module_of(operator, captured, chain)} has no ONNX form",
        expected="operators that torch.onnx can convert",
        got=first_line(chain[-1]),
        hint="replace it in that module by plain torch operators",
    )


def _module_of(operator: str, captured: torch.export.ExportedProgram, chain: Sequence[BaseException]) -> str:
    """Name and type of the module that the failed node belongs to, else of the first that calls the operator.

    The exporter takes operators apart before it converts them: then the program does not hold the one it stopped at.
    """
    calling = [n for n in captured.graph.nodes if n.op == "call_function" and str(n.target).startswith(operator)]
    for node in (*_failed_nodes(chain), *calling):
        if stack := node.meta.get("nn_module_stack"):
            name, kind = list(stack.values())[-1]
            return f"{name or 'the model itself'} ({str(kind).rsplit('.', 1)[-1]})"
    return "(unknown)"


def _failed_nodes(chain: Sequence[BaseException]) -> Iterator[torch.fx.Node]:
    """The nodes that the exporter worked on when it raised."""
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(node := frame.f_locals.get("node"), torch.fx.Node):
                yield node


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's progress lines off stdout and its reports of failed conversions off stderr: those are raised."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _CHATTY)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
