"""From a converted ONNX model to an artifact: cleaned, checked for versions, ports and types, written in one step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError, StageError
from . import onnx_files
from .base import Artifact
from .weight_types import check_types, weight_types

try:
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
except ModuleNotFoundError as e:
    raise MissingDependencyError("writing ONNX files", package="rowcol-edge[build]") from e

if TYPE_CHECKING:
    from ..targets import RuntimeSpec


def check_opset(source: onnx.ModelProto, runtime: RuntimeSpec, stage: str) -> None:
    """StageError unless the model was exported for this runtime."""
    opset, _ = runtime.onnx()
    if onnx_files.opset(source) != opset:
        raise StageError(stage, expected=f"a model at opset {opset}", got=f"one at opset {onnx_files.opset(source)}")


def finish(
    source: onnx.ModelProto, result: onnx.ModelProto, runtime: RuntimeSpec, precision: str, stage: str,
    metadata: Mapping[str, str] | None = None, kept_float: Collection[str] = (),
) -> onnx.ModelProto:  # fmt: skip
    """``result`` cleaned and checked, in place, against the model it was made of.

    Raises:
        StageError: invalid, another opset, other inputs or outputs, or not the types that the precision claims.
    """
    _clean(result)
    for key, value in sorted((metadata or {}).items()):
        result.metadata_props.add(key=key, value=value)
    opset, ir_version = runtime.onnx()
    onnx_files.check(result, stage, opset_version=opset, ir_version=ir_version)
    changed = onnx_files.difference(source, result)
    if changed:
        raise StageError(stage, expected="the inputs and outputs of the model", got=changed)
    check_types(result, precision, kept_float)
    return result


def write(result: onnx.ModelProto, precision: str, out: Path) -> Artifact:
    """Write the finished model; nothing is left behind if that fails."""
    sha256, size_bytes = onnx_files.write(result, out)
    return Artifact(out, sha256, size_bytes, weight_types(result), precision)


def _clean(model: onnx.ModelProto) -> None:
    """Drop notes, and the shapes of inner tensors: converters leave stale ones, and a runtime finds them itself.

    The converters append their nodes at the end, where ONNX wants them in the order they run.
    """
    ONNXModel(model).topological_sort()
    onnx_files.strip(model)
    for graph in onnx_files.graphs(model.graph):
        del graph.value_info[:]
