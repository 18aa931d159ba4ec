"""ONNX Runtime: an ONNX file at fp32, fp16, int8 or int8-dynamic, checked for its types and its versions.

- fp16: weights and activations in float16, inputs and outputs stay float32. The converter is onnxruntime's own; the
  operators of its DEFAULT_OP_BLOCK_LIST (Min, Max, Range, CumSum, TopK, RoiAlign, NonMaxSuppression, Upsample and
  the classic machine-learning ones) and LayerNormalization stay float32.
- int8: see `qdq`.
- int8-dynamic: the linear layers (Gemm, MatMul) in int8 with ranges found at each inference, all else float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError, StageError
from . import calibration as calibrating
from . import onnx_files
from .base import Artifact, Calibration, QuantSpec, Source, check_precision
from .weight_types import check_types, weight_types

try:
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
except ModuleNotFoundError as e:
    raise MissingDependencyError("compiling for onnxruntime", package="rowcol-edge[build]") from e

if TYPE_CHECKING:
    from ..targets import RuntimeSpec


_FLOAT32 = (*DEFAULT_OP_BLOCK_LIST, "LayerNormalization")
"""LayerNormalization in float16 gives wrong numbers from the second run of a session on, on the CPU of onnxruntime 1.17
and 1.18 (seen with a ViT of fixed batch; https://github.com/microsoft/onnxruntime/issues/27768)."""


class OnnxRuntimeBackend:
    """Compiles ``.onnx`` to ``.onnx``."""

    name = "onnxruntime"
    host_runtime = "onnxruntime"
    consumes = Source.ONNX
    precisions = ("fp32", "fp16", "int8", "int8-dynamic")
    suffix = ".onnx"

    def compile(
        self,
        model: Path,
        runtime: RuntimeSpec,
        quant: QuantSpec,
        calibration: Calibration | None,
        out: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> Artifact:
        """See `Backend.compile`. The artifact keeps the runtime's opset and IR version and has no external data."""
        check_precision(self, quant)
        source = onnx_files.load(model)
        stage = f"compile {quant.precision}"
        opset, ir_version = runtime.onnx()
        _check_opset(source, opset, stage)
        result = _convert(model, source, quant, calibration)
        _clean(result)
        onnx_files.check(result, stage, opset_version=opset, ir_version=ir_version)
        changed = onnx_files.difference(source, result)
        if changed:
            raise StageError(stage, expected="the inputs and outputs of the model", got=changed)
        check_types(result, quant.precision)
        sha256, size_bytes = onnx_files.write(result, out)
        return Artifact(out, sha256, size_bytes, weight_types(result), quant.precision)


BACKEND = OnnxRuntimeBackend()


def _check_opset(source: onnx.ModelProto, opset: int, stage: str) -> None:
    if onnx_files.opset(source) != opset:
        raise StageError(stage, expected=f"a model at opset {opset}", got=f"one at opset {onnx_files.opset(source)}")


def _convert(path: Path, source: onnx.ModelProto, quant: QuantSpec, calibration: Calibration | None) -> onnx.ModelProto:
    """A new model at the precision; ``source`` is left as it is."""
    if quant.precision == "int8":
        from . import qdq

        return qdq.quantize(path, quant, calibrating.feeds(calibration, onnx_files.inputs(source)))
    if quant.precision == "int8-dynamic":
        return _dynamic(path, quant)
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    return _half(copy) if quant.precision == "fp16" else copy


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    # The exporter lists constants here too, and the converter would cast those that stay float32 to float32. It infers
    # the others again itself.
    del model.graph.value_info[:]
    converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=_FLOAT32)
    return converted


def _dynamic(source: Path, quant: QuantSpec) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="rowcol-dynamic-") as work:
        prepared, out = Path(work) / "prepared.onnx", Path(work) / "dynamic.onnx"
        quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            out,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=quant.per_channel,
            reduce_range=quant.reduce_range,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(out))


def _clean(model: onnx.ModelProto) -> None:
    """Drop notes, and the shapes of inner tensors: converters leave stale ones, and a runtime finds them itself.

    The converters append their nodes at the end, where ONNX wants them in the order they run.
    """
    ONNXModel(model).topological_sort()
    onnx_files.strip(model)
    for graph in onnx_files.graphs(model.graph):
        del graph.value_info[:]
