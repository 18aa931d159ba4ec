"""TFLite: a ``.tflite`` file at fp32, fp16 or one of three kinds of int8, made by litert-torch without TensorFlow.

- fp16: weights in float16, calculated in float32.
- int8: ranges from calibration, weights per channel; inputs and outputs stay float32, and so does all of a transformer
  that holds no weights.
- int8-io: everything int8, for accelerators that take integers only; the device side still takes and gives float32.
- int8-dynamic: weights in int8, ranges of activations found at each inference; all else float32.

Conversion and quantization (ai-edge-quantizer) run in a process of their own. A program is converted once: the float
file is kept beside it, and every precision starts from there. The file ends in a checksum (see `seal`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device.versions import is_at_least
from ..errors import ConfigError
from . import calibration as calibrating
from . import program_files, workers
from .base import Artifact, Calibration, LayerError, QuantSpec, Source, check_precision
from .publishing import publish

if TYPE_CHECKING:
    from ..targets import RuntimeSpec
    from .operators import OperatorGraph

_PER_CHANNEL = "2.15"
"""tflite-runtime, which ends at 2.14, takes the first scale of a linear layer's weight for all of its channels where it
finds the ranges of activations itself: int8-dynamic then has one scale a tensor."""
_ERROR_SAMPLES = 16
_NAMES = workers.Names("tflite", "litert", "TFLite", "litert-torch and ai-edge-quantizer")


class TfliteBackend:
    """Compiles ``.pt2`` to ``.tflite``."""

    name = "tflite"
    host_runtime = "tflite"
    consumes = Source.EXPORTED_PROGRAM
    precisions = ("fp32", "fp16", "int8", "int8-io", "int8-dynamic")
    suffix = ".tflite"
    dynamic_batch = False

    def newest_onnx(self, oldest: str) -> None:
        """See `Backend.newest_onnx`."""

    def compile(
        self,
        model: Path,
        runtime: RuntimeSpec,
        quant: QuantSpec,
        calibration: Calibration | None,
        out: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> Artifact:
        """See `Backend.compile`. UnsupportedOpError names what litert-torch cannot convert, and its module;
        ConfigError: a program whose batch is free.

        The spec's other choices do not apply: weights and activations are signed, a scale for each output channel, and
        XNNPACK widens 8-bit values to 16 bits before it multiplies, so that nothing saturates.
        """
        check_precision(self, quant)
        signature = program_files.signature(model)
        if signature.free_batch:
            raise ConfigError(
                "tflite with a dynamic batch",
                expected="a fixed batch: litert-torch fixes sizes while it converts",
                got="a free one",
                hint="build it without --dynamic-batch",
            )
        with tempfile.TemporaryDirectory(prefix="rowcol-tflite-") as work:
            folder = Path(work)
            made = folder / "model.tflite"
            job: dict[str, Any] = {
                **_job(model, signature),
                "out": str(made),
                "precision": quant.precision,
                "keep_float": quant.keep_float,
                "linear_per_channel": is_at_least(runtime.oldest, _PER_CHANNEL),
                "metadata": dict(sorted((metadata or {}).items())),
            }
            if quant.precision in ("int8", "int8-io"):
                job["calibration"] = str(folder / "calibration")
                feeds = calibrating.feeds(calibration, signature.inputs)
                calibrating.spool(feeds, job["inputs"], folder / "calibration")
            workers.convert("tflite_worker", job, folder, _NAMES)
            # imported only now: without the packages the worker has said so
            from . import tflite_files

            compiled = tflite_files.read(made)
            tflite_files.check_types(compiled, quant.precision, quant.keep_float)
            notes = tuple(json.loads(made.with_suffix(".json").read_text(encoding="utf-8")))
            types = tflite_files.weight_types(compiled)
            sha256, size_bytes = publish(made, out)
        return Artifact(out, sha256, size_bytes, types, quant.precision, notes=notes)

    def activation_bytes(self, artifact: Path) -> int | None:
        """See `Backend.activation_bytes`."""
        from . import tflite_liveness

        return tflite_liveness.activation_bytes(artifact)

    def operators(self, artifact: Path) -> OperatorGraph | None:
        """See `Backend.operators`."""
        from . import tflite_operators

        return tflite_operators.operators(artifact)

    def layer_errors(self, model: Path, artifact: Path, calibration: Calibration) -> tuple[LayerError, ...]:
        """See `Backend.layer_errors`; a layer has the name of its output in the file."""
        from . import tflite_files

        signature = program_files.signature(model)
        compiled = tflite_files.read(artifact)
        job = {
            **_job(model, signature),
            "artifact": str(artifact.resolve()),
            "static": not tflite_files.is_dynamic(compiled),
            "linear_per_channel": tflite_files.linear_per_channel(compiled),
            "keep_float": [],
        }
        feeds = calibrating.spread(calibration, signature.inputs, _ERROR_SAMPLES)
        with tempfile.TemporaryDirectory(prefix="rowcol-tflite-") as work:
            return workers.layer_errors("tflite_errors", job, feeds, Path(work), tool="litert")


BACKEND = TfliteBackend()


def _job(model: Path, signature: program_files.Signature) -> dict[str, Any]:
    """What both workers know of the program."""
    return {
        "program": str(model.resolve()),
        "float": str(program_files.beside(model, ".tflite")),
        "ports": [asdict(port) for port in signature.inputs],
        "inputs": [port.name for port in signature.inputs],
        "outputs": list(signature.outputs),
    }
