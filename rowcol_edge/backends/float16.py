"""float16 inside, float32 at the inputs and outputs: what every backend that writes ONNX means by fp16."""

from __future__ import annotations

from ..errors import MissingDependencyError

try:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
except ModuleNotFoundError as e:
    raise MissingDependencyError("converting to float16", package="rowcol-edge[build]") from e

_FLOAT32 = (*DEFAULT_OP_BLOCK_LIST, "LayerNormalization")
"""LayerNormalization in float16 gives wrong numbers from the second run of a session on, on the CPU of onnxruntime 1.17
and 1.18 (seen with a ViT of fixed batch; https://github.com/microsoft/onnxruntime/issues/27768); in TensorRT its sum of
squares may overflow."""


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float16, but for the operators that must stay float32; ``model`` itself is changed."""
    # The exporter lists constants here too, and the converter would cast those that stay float32 to float32. It infers
    # the others again itself.
    del model.graph.value_info[:]
    converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=_FLOAT32)
    return converted
