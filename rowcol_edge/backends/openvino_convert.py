"""``python -m rowcol_edge.backends.openvino_convert JOB.json``: a captured program as OpenVINO's float model.

Attention and GELU stay whole, which from ONNX come as several operators each (GELU below opset 20). The job names the
``program``, the IR to write as ``out``, and its ``inputs`` and ``outputs`` in the program's order. What openvino cannot
take is written instead, as ``.json``.

A process of its own also for the sake of its names: openvino numbers what has none, over all that a process has made.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .workers import NOT_INSTALLED, REFUSED


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        import openvino as ov
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    except ModuleNotFoundError as e:
        if e.name != "openvino":
            raise
        return NOT_INSTALLED
    import torch

    program, out = torch.export.load(job["program"]), Path(job["out"])
    parted = _part_outputs(program)
    decoder = TorchFXPythonDecoder.from_exported_program(program, dynamic_shapes=False)
    graph = decoder.fx_gm.graph
    try:
        model = ov.convert_model(decoder)
    except Exception as e:  # noqa: BLE001 – boundary: the front end raises whatever its translators meet
        out.with_suffix(".json").write_text(json.dumps(_refusal(e, graph)), encoding="utf-8")
        return REFUSED
    _keep_axes(model)
    _pass_on(model, parted)
    for ports, names in ((model.inputs, job["inputs"]), (model.outputs, job["outputs"])):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    _name_layers(model, {node.name: _module(node) for node in graph.nodes})
    ov.save_model(model, out, compress_to_fp16=False)
    return 0


def _keep_axes(model: Any) -> None:
    """Let reductions keep the axes that they reduce and a Squeeze take them away: openvino fuses a scale and a
    quantizer behind a reduction into it, and calculates them wrongly where the reduced axes are gone (2026.4)."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name().startswith("Reduce") and not node.get_attributes()["keep_dims"]:
            readers = node.output(0).get_target_inputs()
            node.set_attribute("keep_dims", True)
            node.validate_and_infer_types()
            squeezed = ops.squeeze(node, node.input_value(1))
            for reader in readers:
                reader.replace_source_output(squeezed.output(0))
    model.validate_nodes_and_infer_types()


def _part_outputs(program: Any) -> list[int]:
    """Give each output a node of its own, as it has a name of its own; the places of those that were an input or
    another output as well, which openvino's front end cannot name."""
    import torch

    graph, taken, parted = program.graph_module.graph, set(), []
    end = graph.output_node()
    [outputs] = end.args
    own = list(outputs)
    for place, node in enumerate(outputs):
        if node in taken or node.op == "placeholder":
            with graph.inserting_before(end):
                own[place] = graph.call_function(torch.ops.aten.mul.Scalar, (node, 1))
            own[place].meta = dict(node.meta)
            parted.append(place)
        taken.add(node)
    end.args = (tuple(own),)
    return parted


def _pass_on(model: Any, places: Sequence[int]) -> None:
    """Those outputs unchanged: what `_part_outputs` multiplies is not to be quantized."""
    from openvino import opset13 as ops

    for place in places:
        result = model.get_results()[place]
        given = result.input_value(0).get_node().input_value(0)
        result.input(0).replace_source_output(ops.convert(given, given.get_element_type()).output(0))


def _name_layers(model: Any, modules: Mapping[str, str]) -> None:
    """Names by the model's own modules, such as ``blocks.0.attention/MatMul``: what people know a layer by."""
    taken: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("Parameter", "Result"):  # whose names are those of the inputs and outputs
            continue
        module = modules.get(node.get_friendly_name().partition("/")[0], "")
        name = f"{module}/{kind}" if module else kind
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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
