"""TensorRT 10: an ONNX file that it accepts, checked on the graph; the engine is built on the board.

An engine fits one version of TensorRT and one kind of GPU only, so the artifact is the ONNX file and
`rowcol_edge.device.runtimes.tensorrt` builds the engine where it runs. While a package is built, onnxruntime runs the
file on the CPU in its place; the package says so ("graph-checked, not run").

- fp32, fp16: the types are those of the file, because the engine is strongly typed: TensorRT may not choose others
  (weak typing, which lets it, is deprecated since 10.12). A float16 file is also half as large, LayerNormalization
  keeps the float32 it needs, and what stands in while building calculates in the same types. See `float16`.
- int8: see `tensorrt_qdq`. What is not int8 stays float32 in the file, since a QuantizeLinear of float16 needs opset
  19; the device side lets TensorRT calculate that part in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError
from . import calibration as calibrating
from . import onnx_artifacts, onnx_errors, onnx_files, onnx_liveness, onnx_operators, onnx_ties, tensorrt_graph
from .base import BIAS_SAMPLES, ERROR_SAMPLES, Artifact, Calibration, LayerError, QuantSpec, Source, check_precision
from .float16 import half

try:
    import onnx

    from . import onnx_bias, tensorrt_qdq
except ModuleNotFoundError as e:
    raise MissingDependencyError("compiling for tensorrt", package="rowcol-edge[build]") from e

if TYPE_CHECKING:
    from ..targets import RuntimeSpec
    from .operators import OperatorGraph


class TensorRtBackend:
    """Compiles ``.onnx`` to ``.onnx``."""

    name = "tensorrt"
    host_runtime = "onnxruntime"
    consumes = Source.ONNX
    precisions = ("fp32", "fp16", "int8")
    suffix = ".onnx"
    dynamic_batch = True

    def newest_onnx(self, oldest: str) -> tuple[int, None]:
        """See `Backend.newest_onnx`. The parser does not look at the IR version."""
        return tensorrt_graph.OPSETS[-1], None

    def compile(
        self,
        model: Path,
        runtime: RuntimeSpec,
        quant: QuantSpec,
        calibration: Calibration | None,
        out: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> Artifact:
        """See `Backend.compile`. StageError also for a graph that TensorRT would refuse; it names the node."""
        check_precision(self, quant)
        source = onnx_files.load(model)
        stage = f"compile {quant.precision}"
        onnx_artifacts.check_opset(source, runtime, stage)
        if quant.precision == "int8":
            feeds = calibrating.feeds(calibration, onnx_files.inputs(source))
            result = tensorrt_qdq.quantize(model, quant, feeds)
            if quant.correct_bias:
                few = calibrating.spread(calibration, onnx_files.inputs(source), BIAS_SAMPLES)
                result = onnx_bias.correct(tensorrt_qdq.prepare(model), result, few)
        else:
            result = onnx.ModelProto()
            result.CopyFrom(source)
            onnx_ties.separate(result)
            if quant.precision == "fp16":
                result = half(result)
        onnx_artifacts.finish(source, result, runtime, quant.precision, stage, metadata, quant.keep_float)
        tensorrt_graph.check(result)
        made = onnx_artifacts.write(result, quant.precision, out)
        return replace(made, biases_corrected=quant.correct_bias and quant.precision == "int8")

    def activation_bytes(self, artifact: Path) -> int | None:
        """See `Backend.activation_bytes`."""
        return onnx_liveness.activation_bytes(artifact)

    def operators(self, artifact: Path) -> OperatorGraph | None:
        """See `Backend.operators`."""
        return onnx_operators.operators(artifact)

    def layer_errors(self, model: Path, artifact: Path, calibration: Calibration) -> tuple[LayerError, ...]:
        """See `Backend.layer_errors`; layers are named after the module that holds their weight or bias."""
        inputs = onnx_files.inputs(onnx_files.load(model))
        feeds = calibrating.spread(calibration, inputs, ERROR_SAMPLES)
        return onnx_errors.layer_errors(tensorrt_qdq.prepare(model), onnx_files.load(artifact), feeds)


BACKEND = TensorRtBackend()
