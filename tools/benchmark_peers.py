"""What a user would do today without this project: the runtimes' own quantizers, as their makers document them.

    python tools/benchmark_peers.py SPEC.json      # one peer, in a process that `benchmark_backends.py` starts

All start from the dense PyTorch model, with the same calibration data, one sample at a time.

- onnxruntime: `torch.onnx.export`, `quant_pre_process` (without symbolic shapes where these fail), `quantize_static`
  with its defaults, which its guide calls the first choice (QDQ, S8S8, a scale per tensor), or `quantize_dynamic` with
  its own (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
- openvino: `openvino.convert_model`, then `nncf.quantize` with its defaults, and `model_type` TRANSFORMER for a
  Transformer ("Basic Quantization Flow" of OpenVINO's documentation).
- tflite: `litert_torch.convert`, then ai-edge-quantizer's recipes `static_wi8_ai8` and `dynamic_wi8_afp32`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Task:
    """A dense model with its data, and where the artifact goes."""

    module: nn.Module
    inputs: tuple[str, ...]
    samples: Feeds
    transformer: bool
    out: Path

    def each(self) -> Iterator[Feeds]:
        """Calibration samples one by one."""
        for i in range(len(next(iter(self.samples.values())))):
            yield {name: self.samples[name][i : i + 1] for name in self.inputs}

    @property
    def example(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in next(self.each()).values())


@dataclass(frozen=True, slots=True)
class Peer:
    """``precision`` names ours that it is set beside."""

    name: str
    runtime: str
    precision: str
    suffix: str
    make: Callable[[Task], None]


def ort_static(task: Task) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = task.each()

        def get_next(self) -> Feeds | None:
            return next(self.feeds, None)

    quantize_static(_onnx(task), task.out, Reader())


def ort_dynamic(task: Task) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_onnx(task), task.out)


def _onnx(task: Task) -> Path:
    from onnxruntime.quantization import quant_pre_process

    exported, prepared = task.out.with_suffix(".exported.onnx"), task.out.with_suffix(".prepared.onnx")
    torch.onnx.export(
        task.module, task.example, exported, dynamo=True, input_names=list(task.inputs), external_data=False
    )
    try:
        quant_pre_process(exported, prepared)
    except TypeError:  # what its symbolic shape inference ends with on the mask of a text model
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
    return prepared


def nncf_quantize(task: Task) -> None:
    import nncf
    import openvino as ov

    model = ov.convert_model(task.module, example_input=task.example)
    # sizes that the converter leaves free would cost the peer time
    model.reshape(
        {port: list(array.shape) for port, array in zip(model.inputs, next(task.each()).values(), strict=True)}
    )
    dataset = nncf.Dataset(list(task.each()), lambda feeds: list(feeds.values()))
    quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER if task.transformer else None)
    # the converter may leave inputs and outputs without names, by which our device side feeds and reads them
    names = [*task.inputs, *(f"output_{i}" for i in range(len(quantized.outputs)))]
    for port, name in zip([*quantized.inputs, *quantized.outputs], names, strict=True):
        port.get_tensor().set_names({name})
    ov.save_model(quantized, task.out)


def edge_static(task: Task) -> None:
    from ai_edge_quantizer import recipe

    quantizer = _edge(task, recipe.static_wi8_ai8())
    names = [f"args_{i}" for i in range(len(task.inputs))]
    # litert-torch narrows token ids to int32
    narrow = [[v.astype(np.int32) if v.dtype == np.int64 else v for v in feeds.values()] for feeds in task.each()]
    data = [dict(zip(names, feeds, strict=True)) for feeds in narrow]
    result = quantizer.calibrate({"serving_default": data})
    quantizer.quantize(result).export_model(task.out)
    _seal(task.out)


def edge_dynamic(task: Task) -> None:
    from ai_edge_quantizer import recipe

    _edge(task, recipe.dynamic_wi8_afp32()).quantize().export_model(task.out)
    _seal(task.out)


def _seal(path: Path) -> None:
    """Append the checksum without which our device side opens no TFLite file; the runtime does not read that far."""
    from rowcol_edge.backends import tflite_metadata

    path.write_bytes(tflite_metadata.attached(path.read_bytes(), {}))


def _edge(task: Task, recipe: Any) -> Any:
    import litert_torch
    from ai_edge_quantizer import quantizer

    converted = task.out.with_suffix(".float.tflite")
    litert_torch.convert(task.module, task.example).export(str(converted))
    return quantizer.Quantizer(str(converted), recipe)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("quantize_static", "onnxruntime", "int8", ".onnx", ort_static),
        Peer("quantize_dynamic", "onnxruntime", "int8-dynamic", ".onnx", ort_dynamic),
        Peer("nncf.quantize", "openvino", "int8", ".xml", nncf_quantize),
        Peer("static_wi8_ai8", "tflite", "int8", ".tflite", edge_static),
        Peer("dynamic_wi8_afp32", "tflite", "int8-dynamic", ".tflite", edge_dynamic),
    )
}


def main(spec: Path) -> None:
    from rowcol_edge import models

    said = json.loads(spec.read_text(encoding="utf-8"))
    loaded = models.load(said["model"], said["weights"])
    with np.load(said["calibration"], allow_pickle=False) as arrays:
        samples = {name: arrays[name] for name in loaded.inputs}
    task = Task(loaded.module, loaded.inputs, samples, said["transformer"], Path(said["out"]))
    with torch.no_grad():
        PEERS[said["peer"]].make(task)
    for leftover in task.out.parent.glob(f"{task.out.stem}.*"):
        if leftover.suffixes[-2:-1] and leftover.suffixes[-2] in (".exported", ".prepared", ".float"):
            leftover.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
