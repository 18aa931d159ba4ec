"""A captured program as OpenVINO's float model, which keeps attention and GELU whole: from ONNX at the opset of most
boards they would come as the several operators that the format has for them.

Runs in the workers' process: openvino and torch may crash there without harm.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any


def convert(job: dict[str, Any]) -> dict[str, str] | None:
    """Write the float IR, whole or not at all; where openvino cannot, which operator of which module it is.

    The job names the captured ``program``, the IR file ``float``, and its ``inputs`` and ``outputs`` in their order.
    """
    import openvino as ov
    import torch
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    program = torch.export.load(job["program"])
    decoder = TorchFXPythonDecoder.from_exported_program(program, dynamic_shapes=False)
    graph = decoder.fx_gm.graph
    modules = {node.name: module for node in graph.nodes if (module := _module(node))}
    try:
        model = ov.convert_model(decoder)
    except Exception as e:  # noqa: BLE001 – boundary: the front end raises whatever its translators meet
        return _refusal(e, graph)
    for ports, names in ((model.inputs, job["inputs"]), (model.outputs, job["outputs"])):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    _name_layers(model, modules)
    made = Path(job["float"])
    partial = made.with_name(f"{os.getpid()}-{made.name}")
    ov.save_model(model, partial, compress_to_fp16=False)
    for suffix in (".bin", ".xml"):  # weights first: the file is there when its .xml is
        partial.with_suffix(suffix).replace(made.with_suffix(suffix))
    return None


def _name_layers(model: Any, modules: dict[str, str]) -> None:
    """Names by the model's own modules, such as ``blocks.0.attention/MatMul``: what people know a layer by."""
    taken: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        module = modules.get(node.get_friendly_name().partition("/")[0])
        if module is None or node.get_type_name() in ("Constant", "Parameter", "Result"):
            continue
        name = f"{module}/{node.get_type_name()}"
        taken[name] += 1
        node.set_friendly_name(name if taken[name] == 1 else f"{name}_{taken[name]}")


def _module(node: Any) -> str:
    """The innermost module a node of the captured graph comes from; empty for the model itself."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    return "" if path == kind else str(path)  # torch notes its own additions under one name twice


def _refusal(error: BaseException, graph: Any) -> dict[str, str]:
    """The first operator that openvino names, and the module it is in."""
    text = str(error)
    found = re.search(r"No conversion rule found for operations: ([\w.:]+)", text)
    operator = found[1] if found else ""
    module = next((_module(node) for node in graph.nodes if str(node.target) == operator), "")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Check '")]
    return {"operator": operator, "module": module, "error": (lines or [type(error).__name__])[-1][:200]}
