"""``python -m rowcol_edge.backends.tflite_worker JOB.json``: litert-torch and ai-edge-quantizer where they may crash.

The job names the captured program, the float file (made from it, unless it is there), the file to write, the precision
and, for static int8, a folder with one ``.npz`` a calibration batch, its arrays in the order of ``inputs``. Notes for
people are written beside the result as ``.json``; so is, in its place, what the converter cannot take.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .workers import NOT_INSTALLED, REFUSED

_OURS = ("ai_edge_litert", "ai_edge_quantizer", "litert_torch")
_STATIC = ("int8", "int8-io")
_WEIGHTED = ("CONV_2D", "CONV_2D_TRANSPOSE", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_NAMES = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}
"""Operators that ai-edge-quantizer calls otherwise than the schema."""
_STAGING = re.compile(r"[\w.<>]*\.(InterpreterModule(Dispatcher)?|UnflattenedModule|_Flat)_?")
"""The classes of the module that a captured program is unfolded to, in the names of tensors."""


def main(job_file: str) -> int:
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    out = Path(job["out"])
    try:
        from . import tflite_files, tflite_metadata, tflite_ties

        refusal = None if Path(job["float"]).is_file() else convert(job)
        if refusal is not None:
            out.with_suffix(".json").write_text(json.dumps(refusal), encoding="utf-8")
            return REFUSED
        content = Path(job["float"]).read_bytes() if job["precision"] == "fp32" else _quantized(job)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in _OURS:
            raise
        return NOT_INSTALLED
    model = tflite_files.unpacked(content)
    if job["precision"] == "int8":
        tflite_files.split_outputs(model)
    if job["precision"] in _STATIC:
        tflite_ties.absorb(model, tflite_files.read(Path(job["float"])))
    if job["precision"] == "fp16":
        tflite_ties.read_half(model)
    tflite_files.add_biases(model)
    said = job["metadata"]
    described = tflite_metadata.described(said, job["inputs"], job["outputs"])
    entries = {tflite_metadata.NAME: described, **{key: text.encode() for key, text in said.items()}}
    tflite_files.add_metadata(model, entries)
    out.write_bytes(tflite_metadata.attached(tflite_files.packed(model), said))
    out.with_suffix(".json").write_text(json.dumps(_notes(out, model)), encoding="utf-8")
    return 0


def convert(job: dict[str, Any]) -> dict[str, str] | None:
    """Write the float file, whole or not at all; where litert-torch cannot, which operator of which module it is."""
    import litert_torch
    import torch

    from . import tflite_files, tflite_ties

    program = torch.export.load(job["program"])
    _make_contiguous(program)
    example = tuple(torch.zeros(port["shape"], dtype=getattr(torch, port["dtype"])) for port in job["ports"])
    try:
        converted = litert_torch.convert(_flat(program), example)
        content = converted.model_content()
    except Exception as e:  # noqa: BLE001 – boundary: the converter raises whatever its lowerings meet
        return _refusal(e)
    model = tflite_files.unpacked(content)
    tflite_files.name_signature(model, job["inputs"], job["outputs"])
    tflite_files.widen_inputs(model, [port["dtype"] for port in job["ports"]])
    _name_tensors(model, job["inputs"], job["outputs"])
    tflite_ties.share(model)
    made = Path(job["float"])
    partial = made.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(tflite_files.packed(model))
    partial.replace(made)
    return None


def _make_contiguous(program: Any) -> None:
    """Lay all weights and constants out row by row, in place: what values stay.

    litert-torch 0.10.0 copies those of another layout to temporary memory, which the next one of that size gets too,
    and knows a constant by its address: it takes that one for the one before (`litert_torch.backend.inline_consts`).
    """
    import torch

    for held in (*program.state_dict.values(), *program.constants.values()):
        if isinstance(held, torch.Tensor):
            held.data = held.data.contiguous()


def _flat(program: Any) -> Any:
    """The program as a module from tensors to tensors, whose modules are those of the model it was captured from."""
    import torch
    from torch.utils import _pytree as pytree

    class _Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.export.unflatten(program)

        def forward(self, *tensors: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(tensors), program.call_spec.in_spec)
            return tuple(pytree.tree_leaves(self.model(*args, **kwargs)))

    return _Flat().eval()


def _refusal(error: BaseException) -> dict[str, str]:
    """The operator and module that were being converted when the error was raised."""
    operator = module = ""
    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("n")
        stack = getattr(node, "meta", {}).get("nn_module_stack")
        if stack:
            operator = str(node.target)  # type: ignore[union-attr]
            module = str(list(stack.values())[-1][0]).removeprefix("model").removeprefix(".")
        trace = trace.tb_next
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return {"operator": operator, "module": module, "error": f"{type(error).__name__}: {lines[0][:200]}"}


def _name_tensors(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names by the model's own modules, such as ``blocks.0.norm;3``, or ``0+1;2`` of those that became one operator,
    and of its inputs and outputs: what recipes and people know a layer by."""
    [graph] = model.subgraphs
    ports = dict(zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True))
    taken: set[str] = set()
    # what operators give comes before constants, which are called after them
    order = sorted(enumerate(graph.tensors), key=lambda entry: model.buffers[entry[1].buffer].data is not None)
    for index, tensor in order:
        *parts, number = tensor.name.decode().split(";")
        if not number.isdigit():
            parts, number = [*parts, number], ""
        places = {_STAGING.sub("", part).strip("/").replace("/", ".") for part in parts} - {"", "model"}
        modules = "+".join(sorted(place.removeprefix("model.") for place in places)) or "model"
        name = ports.get(index) or (f"{modules};{number}" if number else modules)
        while name in taken:
            name += "'"
        taken.add(name)
        tensor.name = name.encode()


def _quantized(job: dict[str, Any]) -> bytes:
    from ai_edge_quantizer import quantizer

    chosen = recipe(job)
    made = quantizer.Quantizer(job["float"], chosen)
    found = ranges(job, chosen) if job["precision"] in _STATIC else None
    return bytes(made.quantize(found, enable_progress_bar=False, enable_progress_report=False).quantized_model)


def recipe(job: dict[str, Any]) -> Any:
    """ai-edge-quantizer's recipe for the precision, less the layers that stay float.

    int8 of a transformer quantizes the operators that hold weights and leaves the rest in float: 8 bits for a residual
    stream and a LayerNorm cost accuracy, and XNNPACK has no int8 form of the reciprocal square root, Softmax and GELU,
    so that they fall back to slow kernels. int8-io is for accelerators that take integers only.

    A weight that layers share, be it transposed, has one scale: a scale a channel would be one of the other's inputs.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping, recipe_manager
    from ai_edge_quantizer import recipe as recipes
    from ai_edge_quantizer.qtyping import QuantGranularity

    algorithm, kind = algorithm_manager.AlgorithmName, qtyping.TFLOperationName
    manager, precision = recipe_manager.RecipeManager(), job["precision"]
    if precision == "fp16":
        manager.add_weight_only_config(".*", kind.ALL_SUPPORTED, num_bits=16, algorithm_key=algorithm.FLOAT_CASTING)
    elif precision == "int8-dynamic":
        manager.load_quantization_recipe(recipes.dynamic_wi8_afp32())
        manager.add_dynamic_config(".*", kind.FULLY_CONNECTED, 8, _granularity("FULLY_CONNECTED", job))
    elif precision == "int8" and _is_transformer(Path(job["float"])):
        for operator in _WEIGHTED:
            manager.add_static_config(".*", kind[operator], activation_num_bits=8, weight_num_bits=8)
    else:
        manager.load_quantization_recipe(recipes.static_wi8_ai8())
    if precision != "fp16":
        for layer, operator in _tied(Path(job["float"])).items():
            if precision == "int8-dynamic":
                manager.add_dynamic_config(_scope(layer), kind[operator], 8, QuantGranularity.TENSORWISE)
            else:
                manager.add_static_config(_scope(layer), kind[operator], 8, 8, QuantGranularity.TENSORWISE)
    if precision == "int8":
        for operator in (kind.INPUT, kind.OUTPUT):
            manager.add_quantization_config(".*", operator, algorithm_key=algorithm.NO_QUANTIZE)
    for layer in job["keep_float"]:
        manager.add_quantization_config(_scope(layer), kind.ALL_SUPPORTED, algorithm_key=algorithm.NO_QUANTIZE)
    return manager.get_quantization_recipe()


def alone(layer: str, operator: str, job: dict[str, Any]) -> Any:
    """The recipe that quantizes one layer."""
    from ai_edge_quantizer import qtyping, recipe_manager

    manager, kind = recipe_manager.RecipeManager(), qtyping.TFLOperationName[_NAMES.get(operator, operator)]
    tied = layer in _tied(Path(job["float"]))
    if job["static"]:
        whole = qtyping.QuantGranularity.TENSORWISE if tied else qtyping.QuantGranularity.CHANNELWISE
        manager.add_static_config(_scope(layer), kind, 8, 8, whole)
    else:
        granularity = qtyping.QuantGranularity.TENSORWISE if tied else _granularity(operator, job)
        manager.add_dynamic_config(_scope(layer), kind, 8, granularity)
    return manager.get_quantization_recipe()


def _granularity(operator: str, job: dict[str, Any]) -> Any:
    from ai_edge_quantizer.qtyping import QuantGranularity

    whole = operator == "FULLY_CONNECTED" and not job["linear_per_channel"]
    return QuantGranularity.TENSORWISE if whole else QuantGranularity.CHANNELWISE


def _scope(layer: str) -> str:
    """ai-edge-quantizer's pattern for the operator whose output is called so."""
    return f"^{re.escape(layer)};$"


def _is_transformer(path: Path) -> bool:
    """Whether the model normalizes what it calculates, or multiplies it with itself."""
    from . import tflite_files

    model = tflite_files.read(path)
    counts = tflite_files.operators(model)
    return counts["RSQRT"] > 0 or counts["BATCH_MATMUL"] > list(_tied(path).values()).count("BATCH_MATMUL")


def _tied(path: Path) -> dict[str, str]:
    from . import tflite_files, tflite_ties

    return tflite_ties.layers(tflite_files.read(path))


def ranges(job: dict[str, Any], chosen: Any) -> Any:
    """Lowest and highest value of each tensor over the calibration batches, one of which is held at a time."""
    import numpy as np
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(chosen)
    watched = calibrator.Calibrator(job["float"], num_threads=2, qsv_update_func=qsv_utils.min_max_update)
    [key] = watched.get_signature_list()
    for path in sorted(Path(job["calibration"]).glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            feed = {name: arrays[f"arr_{i}"] for i, name in enumerate(job["inputs"])}
        watched.calibrate({key: [feed]}, manager)
    return watched.get_model_qsvs()


def _notes(path: Path, model: Any) -> list[str]:
    """How many TRANSPOSE operators there are, and which nodes XNNPACK leaves to the interpreter's own kernels."""
    from collections import Counter

    from ai_edge_litert import __version__, interpreter

    from . import tflite_files

    transposes, total = tflite_files.operators(model)["TRANSPOSE"], tflite_files.operators(model).total()
    opened = interpreter.Interpreter(model_path=str(path), num_threads=1)
    opened.allocate_tensors()
    outside = Counter(_outside(opened._get_ops_details()))
    kinds = ", ".join(f"{count} {kind}" for kind, count in outside.most_common())
    stay = f"{outside.total()} of {total} nodes stay outside XNNPACK of ai-edge-litert {__version__}"
    return [f"{transposes} TRANSPOSE operators; {stay}{f': {kinds}' if kinds else ''}"]


def _outside(operators: list[dict[str, Any]]) -> Iterator[str]:
    """Names of the operators in no delegated part: one that leads from a part's inputs to its outputs is in it."""
    makers = {index: node for node in operators if node["op_name"] != "DELEGATE" for index in node["outputs"]}
    inside: set[int] = set()
    for part in (node for node in operators if node["op_name"] == "DELEGATE"):
        given, pending = set(part["inputs"]), list(part["outputs"])
        while pending:
            index = pending.pop()
            if index not in given and index in makers and makers[index]["index"] not in inside:
                inside.add(makers[index]["index"])
                pending.extend(makers[index]["inputs"])
    return (node["op_name"] for node in makers.values() if node["index"] not in inside)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
