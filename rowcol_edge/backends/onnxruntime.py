"""ONNX Runtime: an ONNX file at one of several precisions, checked for its types and its versions.

- fp16: see `float16`; Min, Max, Range, CumSum, TopK, RoiAlign, NonMaxSuppression, Upsample, LayerNormalization and the
  classic machine-learning operators stay float32.
- int8: see `qdq`.
- int8-dynamic: the linear layers (Gemm, MatMul) in int8 with ranges found at each inference, all else float.
- int8-weights, int4-weights: see `weight_only`.

The quantizer runs in this process, unlike the converters of `openvino` and `tflite`: it is Python code over the library
that runs every artifact here afterwards, so a process of its own would guard against nothing more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..device.versions import is_at_least
from ..errors import MissingDependencyError
from . import calibration as calibrating
from . import onnx_artifacts, onnx_errors, onnx_files, onnx_liveness, onnx_operators, onnx_ties
from .base import BIAS_SAMPLES, ERROR_SAMPLES, Artifact, Calibration, LayerError, QuantSpec, Source, check_precision
from .float16 import half

try:
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
except ModuleNotFoundError as e:
    raise MissingDependencyError("compiling for onnxruntime", package="rowcol-edge[build]") from e

if TYPE_CHECKING:
    from ..targets import RuntimeSpec
    from .operators import OperatorGraph

_BITS = {"int8-weights": 8, "int4-weights": 4}
_OLDEST = {"int8-weights": "1.23.0"}
"""First versions whose CPU has the operators of a precision: before 1.23.0 MatMulNBits takes 4 bits, not 8 (each minor
version from 1.17.0 on was tried)."""

_NEWEST_ONNX = {"1.17": (20, 9), "1.18": (21, 10), "1.21": (22, 10), "1.23": (23, 11), "1.32": (26, 14)}
"""Newest opset and IR version that versions from each on read; 1.17.0, 1.18.1, 1.19.2, 1.20.1, 1.21.1, 1.22.1, 1.23.2
and 1.32.0 were tried."""


class OnnxRuntimeBackend:
    """Compiles ``.onnx`` to ``.onnx``."""

    name = "onnxruntime"
    host_runtime = "onnxruntime"
    consumes = Source.ONNX
    precisions = ("fp32", "fp16", "int8", "int8-dynamic", "int8-weights", "int4-weights")
    suffix = ".onnx"
    dynamic_batch = True

    def newest_onnx(self, oldest: str) -> tuple[int, int]:
        """See `Backend.newest_onnx`."""
        known = [newest for version, newest in _NEWEST_ONNX.items() if is_at_least(oldest, version)]
        return known[-1] if known else next(iter(_NEWEST_ONNX.values()))

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
        onnx_artifacts.check_opset(source, runtime, stage)
        result = _convert(model, source, quant, calibration)
        onnx_ties.merge(result)
        onnx_artifacts.finish(source, result, runtime, quant.precision, stage, metadata, quant.keep_float)
        made = onnx_artifacts.write(result, quant.precision, out)
        corrected = quant.correct_bias and quant.precision == "int8"
        return replace(made, oldest=_OLDEST.get(quant.precision, ""), biases_corrected=corrected)

    def activation_bytes(self, artifact: Path) -> int | None:
        """See `Backend.activation_bytes`."""
        return onnx_liveness.activation_bytes(artifact)

    def operators(self, artifact: Path) -> OperatorGraph | None:
        """See `Backend.operators`."""
        return onnx_operators.operators(artifact)

    def layer_errors(self, model: Path, artifact: Path, calibration: Calibration) -> tuple[LayerError, ...]:
        """See `Backend.layer_errors`; layers are named after the module that holds their weight or bias."""
        from . import qdq

        inputs = onnx_files.inputs(onnx_files.load(model))
        feeds = calibrating.spread(calibration, inputs, ERROR_SAMPLES)
        quantized = onnx_files.load(artifact)
        onnx_ties.separate(quantized)
        return onnx_errors.layer_errors(qdq.prepare(model), quantized, feeds)


BACKEND = OnnxRuntimeBackend()


def _convert(path: Path, source: onnx.ModelProto, quant: QuantSpec, calibration: Calibration | None) -> onnx.ModelProto:
    """A new model at the precision; ``source`` is left as it is."""
    if quant.precision == "int8":
        from . import qdq

        inputs = onnx_files.inputs(source)
        quantized = qdq.quantize(path, quant, calibrating.feeds(calibration, inputs))
        if quant.correct_bias:
            few = calibrating.spread(calibration, inputs, BIAS_SAMPLES)
            quantized = qdq.corrected(path, quantized, few)
        onnx_ties.join_scales(quantized)
        return quantized
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    if quant.precision == "int8-dynamic":
        onnx_ties.separate(copy)
        return _dynamic(copy, quant)
    if quant.precision in _BITS:
        from . import weight_only

        onnx_ties.separate(copy)
        return weight_only.quantize(copy, _BITS[quant.precision])
    return half(copy) if quant.precision == "fp16" else copy


def _dynamic(model: onnx.ModelProto, quant: QuantSpec) -> onnx.ModelProto:
    from . import qdq

    with tempfile.TemporaryDirectory(prefix="rowcol-dynamic-") as work:
        source, prepared, out = (Path(work) / f"{name}.onnx" for name in ("source", "prepared", "dynamic"))
        onnx.save(model, str(source))
        quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        stacks = set(qdq.stacked(graph))
        quantize_dynamic(
            prepared,
            out,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=quant.per_channel,
            reduce_range=quant.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[
                node.name for node in graph.node if node.op_type == "MatMul" and stacks & set(node.input)
            ],
        )
        return onnx.load(str(out))
