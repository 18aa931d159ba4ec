"""``python -m rowcol_edge.backends.tflite_errors JOB.json``: what quantization does to each layer of a TFLite file.

For each layer that the artifact holds in int8, ai-edge-quantizer makes a model with this layer alone in int8, and its
output is held against that of the float model: a layer answers for its own weights and the ranges of its own input and
output. Float activations are kept in files, one sample's at a time in memory.

The job is that of `tflite_worker`, with the artifact, and in ``out`` the JSON file for names and errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import tflite_files, tflite_worker


def main(job_file: str) -> int:
    from ai_edge_quantizer import quantizer

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folder, samples = Path(job_file).parent, sorted(Path(job["calibration"]).glob("*.npz"))
    if not Path(job["float"]).is_file():  # where the artifact came from the cache
        tflite_worker.convert(job)
    layers = tflite_files.int8_layers(tflite_files.read(Path(job["artifact"])))
    precision = "int8" if job["static"] else "int8-dynamic"
    ranges = tflite_worker.ranges(job, tflite_worker.recipe(job | {"precision": precision})) if job["static"] else None
    original = _Watched(Path(job["float"]).read_bytes(), job["inputs"])
    for path in samples:
        np.savez(folder / f"float-{path.name}", *original.values(path, list(layers)))
    errors = []
    for number, (name, kind) in enumerate(layers.items()):
        alone = quantizer.Quantizer(job["float"], tflite_worker.alone(name, kind, job))
        made = alone.quantize(ranges, enable_progress_bar=False, enable_progress_report=False).quantized_model
        watched = _Watched(bytes(made), job["inputs"])
        sums = np.zeros(2)
        for path in samples:
            [a] = watched.values(path, [name])
            with np.load(folder / f"float-{path.name}", allow_pickle=False) as arrays:
                b = arrays[f"arr_{number}"]
            sums += np.square(a - b).sum(), np.square(b).sum()
        errors.append(float(np.sqrt(sums[0] / max(sums[1], np.finfo(np.float32).tiny))))
    Path(job["out"]).write_text(json.dumps([list(layers), errors]), encoding="utf-8")
    return 0


class _Watched:
    """A model whose inner tensors can be read after a run."""

    def __init__(self, content: bytes, inputs: list[str]) -> None:
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
        self._inputs = [details[name]["index"] for name in inputs]
        self._tensors = {detail["name"]: detail for detail in self._interpreter.get_tensor_details()}

    def values(self, path: Path, names: list[str]) -> Iterator[Any]:
        """The tensors for the sample in a file, as real numbers."""
        with np.load(path, allow_pickle=False) as arrays:
            for number, index in enumerate(self._inputs):
                self._interpreter.set_tensor(index, arrays[f"arr_{number}"])
        self._interpreter.invoke()
        for name in names:
            detail = self._tensors[name]
            scale, zero = detail["quantization"]
            value = self._interpreter.get_tensor(detail["index"]).astype(np.float64)
            yield (value - zero) * scale if scale else value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
