"""OpenVINO: an IR (``.xml`` and ``.bin``) at fp32, fp16 or int8.

- fp16: weights in float16; the target's inference precision says what they are calculated in.
- int8: nncf's post-training quantization, with the transformer's scheme (SmoothQuant, unsigned attention) for a model
  that multiplies activations by activations. Where a target's 8-bit products saturate, weights keep to 7 bits.

Conversion and quantization run in a process of their own. A program is converted once: the float IR is kept beside it,
and every precision starts from there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import calibration as calibrating
from . import openvino_files, openvino_info, openvino_liveness, openvino_operators, program_files, workers
from .base import (
    ERROR_SAMPLES,
    AccuracyControl,
    Artifact,
    Batch,
    Calibration,
    LayerError,
    QuantSpec,
    Source,
    check_precision,
)
from .onnx_files import Port
from .publishing import publish

if TYPE_CHECKING:
    from ..targets import RuntimeSpec
    from .operators import OperatorGraph

_NAMES = workers.Names("openvino", "openvino", "OpenVINO", "openvino")
_CONTROLLED_SHARE = 0.5
"""With accuracy control an int8 file may hold float layers, yet most of its weights are int8."""


class OpenVinoBackend:
    """Compiles ``.pt2`` to ``.xml`` and ``.bin``."""

    name = "openvino"
    host_runtime = "openvino"
    consumes = Source.EXPORTED_PROGRAM
    precisions = ("fp32", "fp16", "int8")
    suffix = ".xml"
    dynamic_batch = True

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
        """See `Backend.compile`. The weights lie in a ``.bin`` of the same name beside ``out``.

        UnsupportedOpError names what openvino cannot convert, and its module.
        """
        check_precision(self, quant)
        signature = program_files.signature(model)
        with tempfile.TemporaryDirectory(prefix="rowcol-openvino-") as work:
            folder = Path(work)
            made = folder / "model.xml"
            job: dict[str, Any] = {
                "model": str(_float_ir(model, signature)),
                "out": str(made),
                "precision": quant.precision,
                "reduce_range": quant.reduce_range,
                "correct_bias": quant.correct_bias,
                "rt_info": openvino_info.entries(metadata or {}, signature.inputs),
                "inputs": [port.name for port in signature.inputs],
                "keep_float": quant.keep_float,
            }
            if quant.precision == "int8":
                job["calibration"] = str(folder / "calibration")
                feeds = calibrating.feeds(calibration, signature.inputs)
                calibrating.spool(feeds, job["inputs"], folder / "calibration")
                if quant.accuracy is not None:
                    job["accuracy"] = _spool_selection(quant.accuracy, signature.inputs, folder / "selection")
            workers.convert("openvino_worker", job, folder, _NAMES)
            least_share = None if quant.accuracy is None else _CONTROLLED_SHARE
            openvino_files.check_types(made, quant.precision, quant.keep_float, least_share=least_share)
            notes = tuple(json.loads(made.with_suffix(".json").read_text(encoding="utf-8")))
            if "accuracy" in job:
                notes = (*notes, _kept(openvino_files.float_layers(made)))
            types = openvino_files.weight_types(made)
            sha256, size_bytes = publish(made, out, (".bin", ".xml"))  # weights first
        return Artifact(
            out, sha256, size_bytes, types, quant.precision, (out.with_suffix(".bin"),), notes,
            biases_corrected=quant.precision == "int8" and quant.correct_bias,
        )  # fmt: skip

    def activation_bytes(self, artifact: Path) -> int | None:
        """See `Backend.activation_bytes`."""
        return openvino_liveness.activation_bytes(artifact)

    def operators(self, artifact: Path) -> OperatorGraph | None:
        """See `Backend.operators`."""
        return openvino_operators.operators(artifact)

    def layer_errors(self, model: Path, artifact: Path, calibration: Calibration) -> tuple[LayerError, ...]:
        """See `Backend.layer_errors`; layers have the names of the IR's operators."""
        signature = program_files.signature(model)
        single = tuple(
            replace(port, shape=port.shape and (port.shape[0] or 1, *port.shape[1:])) for port in signature.inputs
        )
        job = {
            "model": str(_float_ir(model, signature)),
            "artifact": str(artifact.resolve()),
            "inputs": [port.name for port in single],
        }
        feeds = calibrating.spread(calibration, single, ERROR_SAMPLES)
        with tempfile.TemporaryDirectory(prefix="rowcol-openvino-") as work:
            return workers.layer_errors("openvino_errors", job, feeds, Path(work), tool="openvino")


BACKEND = OpenVinoBackend()


def _float_ir(model: Path, signature: program_files.Signature) -> Path:
    """The float conversion of a program, which is made unless it lies there already."""
    path = program_files.beside(model, ".xml")
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(prefix="rowcol-openvino-") as work:
        made = Path(work) / "float.xml"
        names = {"inputs": [port.name for port in signature.inputs], "outputs": list(signature.outputs)}
        workers.convert(
            "openvino_convert", {"program": str(model.resolve()), "out": str(made), **names}, Path(work), _NAMES
        )
        publish(made, path, (".bin", ".xml"))  # weights first
    return path


def _spool_selection(accuracy: AccuracyControl, inputs: tuple[Port, ...], folder: Path) -> dict[str, Any]:
    """The selection split for the other process. ``counts`` says how many samples of each feed are real: those of a
    fixed batch are filled up."""
    names = [port.name for port in inputs]
    size = next((port.shape[0] for port in inputs if port.shape and port.shape[0]), None)
    counts: list[int] = []

    def feeds() -> Iterator[Batch]:
        for batch in accuracy.samples():
            samples = len(batch[names[0]])
            step = size or max(1, samples)
            counts.extend(min(step, samples - start) for start in range(0, samples, step))
            yield from calibrating.feeds(partial(iter, (batch,)), inputs)

    calibrating.spool(feeds(), names, folder)
    return {
        "folder": str(folder), "counts": counts, "labels": accuracy.labels.tolist(), "metric": accuracy.metric,
        "positive": accuracy.positive, "max_drop": accuracy.max_drop_pp / 100.0,
    }  # fmt: skip


def _kept(layers: Sequence[str]) -> str:
    """What accuracy control did, for people."""
    if not layers:
        return "nncf's accuracy control left every layer in int8"
    return f"nncf's accuracy control kept in float32: {', '.join(layers)}"
