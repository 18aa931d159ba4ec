"""``python -m rowcol_edge.backends.tflite_errors JOB.json``: what quantization does to each layer of a TFLite file.

Each layer that the artifact holds in int8 is cut out of the float model and quantized by itself; it gets what the float
model gives to it, and its output is held against that of the float model. So a layer answers for its own weights and
the ranges of its own input and output. One sample's activations are held at a time.

The job is that of `tflite_worker`, with the artifact, and in ``out`` the JSON file for names and errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import tflite_files, tflite_worker


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if not Path(job["float"]).is_file():  # where the artifact came from the cache
        tflite_worker.convert(job)
    kinds = tflite_files.int8_layers(tflite_files.read(Path(job["artifact"])))
    precision = "int8" if job["static"] else "int8-dynamic"
    ranges = tflite_worker.ranges(job, tflite_worker.recipe(job | {"precision": precision})) if job["static"] else None
    layers = [_Layer(name, kind, job, ranges, Path(job_file).parent) for name, kind in kinds.items()]
    original = _Watched(Path(job["float"]).read_bytes(), job["inputs"])
    names = list(dict.fromkeys(name for layer in layers for name in (layer.given, layer.name)))
    sums = np.zeros((len(layers), 2))
    for path in sorted(Path(job["calibration"]).glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            floats = original.values([arrays[f"arr_{i}"] for i in range(len(job["inputs"]))], names)
        for total, layer in zip(sums, layers, strict=True):
            a, b = layer.output(floats), floats[layer.name]
            total += np.square(a - b).sum(), np.square(b).sum()
    errors = np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float32).tiny))
    Path(job["out"]).write_text(json.dumps([list(kinds), errors.tolist()]), encoding="utf-8")
    return 0


class _Layer:
    """One layer of the float model, quantized as it is in the artifact; ``given`` is the tensor it takes."""

    def __init__(self, name: str, kind: str, job: Mapping[str, Any], ranges: Any, folder: Path) -> None:
        from ai_edge_quantizer import quantizer

        model, self.given = tflite_files.single_layer(tflite_files.read(Path(job["float"])), name)
        path = folder / "layer.tflite"
        path.write_bytes(tflite_files.packed(model))
        made = quantizer.Quantizer(str(path), tflite_worker.alone(name, kind, dict(job)))
        known = {key: ranges[key] for key in (self.given, name)} if ranges is not None else None
        quantized = made.quantize(known, enable_progress_bar=False, enable_progress_report=False).quantized_model
        self.name, self._model = name, _Watched(bytes(quantized), [self.given])

    def output(self, floats: Mapping[str, Any]) -> Any:
        return self._model.values([floats[self.given]], [self.name])[self.name]


class _Watched:
    """A model whose inner tensors can be read after a run."""

    def __init__(self, content: bytes, inputs: Sequence[str]) -> None:
        from ai_edge_litert import interpreter as lite

        self._interpreter = lite.Interpreter(
            model_content=content,
            num_threads=2,
            experimental_preserve_all_tensors=True,
            # a delegate keeps what lies inside its parts to itself
            experimental_op_resolver_type=lite.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        self._interpreter.allocate_tensors()
        [key] = self._interpreter.get_signature_list()
        details = self._interpreter.get_signature_runner(key).get_input_details()
        self._inputs = [details[name] for name in inputs]
        self._tensors = {detail["name"]: detail for detail in self._interpreter.get_tensor_details()}

    def values(self, given: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        """The tensors of these names for one sample, as real numbers."""
        for detail, array in zip(self._inputs, given, strict=True):
            self._interpreter.set_tensor(detail["index"], array.astype(detail["dtype"]))
        self._interpreter.invoke()
        found = {}
        for name in names:
            detail = self._tensors[name]
            scale, zero = detail["quantization"]
            value = self._interpreter.get_tensor(detail["index"]).astype(np.float64)
            found[name] = (value - zero) * scale if scale else value
        return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
