"""From a module to the file that a backend starts from, step by step.

onnx               module ─ export ─ simplify ─▶ .onnx
exported_program   module ─ export ─▶ .pt2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from . import evaluation
from .backends import program_files
from .backends.base import Source
from .datasets import Feeds
from .device.runtimes import RuntimeOptions
from .export import capture, onnx, simplify
from .export.parity import Outputs
from .targets import RuntimeSpec


@dataclass(frozen=True, slots=True)
class Step:
    """A file on the way; ``run`` gives its outputs for a batch, ``note`` is what a person should know of it."""

    stage: str
    path: Path
    run: Callable[[Feeds], Outputs]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be exported. ``file`` gives a path that nothing else has, for an ending."""

    module: nn.Module
    example: Feeds
    runtime: RuntimeSpec
    dynamic_batch: bool
    file: Callable[[str], Path]


def steps(source: Source, request: Request) -> Iterator[Step]:
    """Make the file; the last step has it. Each is made when it is asked for."""
    return {Source.ONNX: _onnx, Source.EXPORTED_PROGRAM: _program}[source](request)


def key(source: Source, runtime: RuntimeSpec) -> tuple[object, ...]:
    """What tells apart the files made from one module."""
    return (source, runtime.opset, runtime.ir_version) if source is Source.ONNX else (source,)


def _onnx(request: Request) -> Iterator[Step]:
    """onnxruntime runs the files whatever the target's runtime is."""

    opset, ir_version = request.runtime.onnx()
    raw = request.file(".onnx")
    onnx.export(
        request.module,
        request.example,
        raw,
        opset=opset,
        ir_version=ir_version,
        dynamic_batch=request.dynamic_batch,
    )
    yield Step("export", raw, partial(_run, raw))
    simplified = simplify.simplify(raw, request.file(".onnx"))
    note = "" if simplified.applied else f"not simplified: {simplified.reason}"
    yield Step("simplify", simplified.path, partial(_run, simplified.path), note)


def _run(path: Path, feeds: Feeds) -> Outputs:
    with evaluation.opened(path, "onnxruntime", RuntimeOptions()) as run:
        return [run(feeds)]


def _program(request: Request) -> Iterator[Step]:
    captured = capture.program(request.module, request.example, dynamic_batch=request.dynamic_batch)
    inputs = capture.input_names(captured, request.module, list(request.example))
    names = capture.output_names(captured)
    path = request.file(".pt2")
    program_files.write(captured, inputs, names, path)
    run = capture.function(captured, inputs, names)

    def outputs(feeds: Feeds) -> Outputs:
        parts = [run(part) for part in ([feeds] if request.dynamic_batch else _samples(feeds))]
        return [{name: np.concatenate([part[name] for part in parts]) for name in names}]

    yield Step("export", path, outputs)


def _samples(feeds: Feeds) -> Iterator[Feeds]:
    """One sample a feed: what a program of fixed batch takes."""
    count = min(len(array) for array in feeds.values())
    return ({name: array[i : i + 1] for name, array in feeds.items()} for i in range(count))
