"""TensorRT 10, on a Jetson or another NVIDIA GPU: opens an ONNX file through an engine that is built on the board.

Building takes minutes, once: the engine is kept (see `engine_cache`). ``python3 rowcol-edge-device.pyz engine BUNDLE``
does it ahead of time; otherwise the first opening does.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import BundleError, DataError
from .. import progress
from ..cuda import Cuda
from ..manifest import TensorSpec
from ..versions import is_at_least
from .base import EngineFile, FeedCheck, Runtime, RuntimeOptions
from .engine_cache import EngineCache, EngineKey, warn_unkept
from .tensorrt_build import Log, Settings, build, made, trt
from .tensorrt_profiler import LayerTimes, TensorRtProfiler

_DTYPES = {
    trt.float32: "float32", trt.float16: "float16", trt.int8: "int8", trt.int32: "int32", trt.int64: "int64",
    trt.uint8: "uint8", trt.bool: "bool",
}  # fmt: skip


class TensorRtRuntime:
    """Opens ``.onnx`` files."""

    name = "tensorrt"
    package = "tensorrt"

    def version(self) -> str:
        return str(trt.__version__)

    def fulfils(self, oldest: str) -> bool:
        return is_at_least(self.version(), oldest)

    def open(self, artifact: Path, options: RuntimeOptions) -> TensorRtSession:
        cuda = self._cuda(artifact, options)
        log = Log()
        runtime, engine, _ = self._engine(artifact, options, cuda, log)
        return TensorRtSession(runtime, engine, cuda, artifact, log)

    def build_engine(self, artifact: Path, options: RuntimeOptions) -> EngineFile:
        """Build an artifact's engine, or find it in the cache."""
        _, _, found = self._engine(artifact, options, self._cuda(artifact, options), Log())
        return found

    def _cuda(self, artifact: Path, options: RuntimeOptions) -> Cuda:
        if not self.version().startswith("10."):
            raise BundleError("package tensorrt", expected="version 10", got=self.version())
        if not artifact.is_file():
            raise BundleError(str(artifact), expected="a readable .onnx file", got="no such file")
        device = options.providers[0] if options.providers else "cuda:0"
        match = re.fullmatch(r"cuda:(\d+)", device)
        if match is None:
            raise BundleError(f"device {device}", expected="a GPU such as cuda:0", got="not available")
        return Cuda(int(match.group(1)))

    def _engine(self, artifact: Path, options: RuntimeOptions, cuda: Cuda, log: Log) -> tuple[Any, Any, EngineFile]:
        """(runtime, engine, its file): from the cache if it is there and TensorRT takes it, else built."""
        model, stem, settings = artifact.read_bytes(), artifact.stem, Settings.of(options.properties)
        trt.init_libnvinfer_plugins(log, "")
        runtime = made(trt.Runtime, log)
        cache = EngineCache()
        key = EngineKey(
            hashlib.sha256(model).hexdigest(), self.version(), cuda.name(), cuda.capability(), settings.to_key()
        )
        kept = cache.load(stem, key)
        if kept is not None and (engine := runtime.deserialize_cuda_engine(kept)) is not None:
            return runtime, engine, EngineFile(cache.path(stem, key), 0.0)
        begin = time.monotonic()
        built, timings = build(model, stem, settings, cache.timings(key), log, progress.on_stderr(sys.stderr.isatty()))
        seconds = time.monotonic() - begin
        engine = runtime.deserialize_cuda_engine(built)
        if engine is None:
            raise BundleError(artifact.name, expected=f"an engine that TensorRT {self.version()} loads", got=log.text())
        return runtime, engine, EngineFile(_keep(cache, stem, key, built, timings), seconds)

    def unprofiled(self) -> str:
        return ""

    def open_profiled(self, artifact: Path, options: RuntimeOptions) -> TensorRtProfiler:
        return TensorRtProfiler(self.open(artifact, options))


RUNTIME: Runtime = TensorRtRuntime()


def _keep(cache: EngineCache, stem: str, key: EngineKey, engine: bytes, timings: bytes) -> Path | None:
    try:
        cache.store_timings(key, timings)
        return cache.store(stem, key, engine)
    except OSError as e:
        warn_unkept(e)
        return None


class TensorRtSession:
    """An engine with its buffers on the GPU, which hold the largest batch."""

    __slots__ = (
        "_artifact", "_buffers", "_check", "_context", "_cuda", "_engine", "_log", "_most", "_runtime", "_shapes",
        "_stream", "inputs", "outputs",
    )  # fmt: skip

    def __init__(self, runtime: Any, engine: Any, cuda: Cuda, artifact: Path, log: Log) -> None:
        self._runtime, self._engine, self._cuda, self._artifact, self._log = runtime, engine, cuda, artifact, log
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        specs = {name: _spec(engine, name, artifact) for name in names}
        incoming = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(specs[name] for name in incoming)
        self.outputs = tuple(specs[name] for name in names if name not in incoming)
        self._check = FeedCheck(self.inputs)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise self._failed("memory on the GPU for the engine")
        self._most: dict[str, tuple[int, ...]] = {
            name: tuple(engine.get_tensor_profile_shape(name, 0)[2]) for name in incoming if None in specs[name].shape
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stream = 0
        self._buffers: dict[str, int] = {}
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def report_to(self, times: LayerTimes) -> None:
        """Each run from now on, which waits for the report."""
        self._context.profiler = times

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._check(feeds)
        return dict(zip((spec.name for spec in self.outputs), self.infer(feeds), strict=True))

    def infer(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self._context is None:
            raise BundleError(self._artifact.name, expected="an open session", got="one that was closed")
        arrays = [np.ascontiguousarray(feeds[spec.name]) for spec in self.inputs]
        for spec, array in zip(self.inputs, arrays, strict=True):
            if spec.name in self._most:
                self._reshape(spec.name, array.shape)
            self._cuda.upload(self._buffers[spec.name], array, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise self._failed("a run on valid inputs")
        outputs = []
        for spec in self.outputs:
            output = np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            self._cuda.download(output, self._buffers[spec.name], self._stream)
            outputs.append(output)
        self._cuda.synchronize(self._stream)
        return outputs

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        while self._buffers:
            self._cuda.free(self._buffers.popitem()[1])
        if self._stream:
            self._cuda.destroy(self._stream)
            self._stream = 0

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _allocate(self) -> None:
        self._stream = self._cuda.stream()
        for name, shape in self._most.items():
            self._reshape(name, shape)
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if -1 in shape:
                raise BundleError(
                    f"{self._artifact.name}: {spec.name}", expected="a size known before the run", got=str(shape)
                )
            size_bytes = max(1, math.prod(shape) * np.dtype(spec.dtype).itemsize)
            self._buffers[spec.name] = self._cuda.allocate(size_bytes)
            if not self._context.set_tensor_address(spec.name, self._buffers[spec.name]):
                raise self._failed(f"a buffer for {spec.name}")

    def _reshape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) == shape:
            return
        most = self._most[name][0]
        if not 1 <= shape[0] <= most:
            hint = "a larger max_batch among the target's properties builds an engine for more"
            raise DataError(f"input {name!r}", expected=f"a batch of 1 to {most}", got=str(shape[0]), hint=hint)
        if not self._context.set_input_shape(name, shape):
            raise self._failed(f"the shape {shape} for {name}")
        self._shapes[name] = shape

    def _failed(self, expected: str) -> BundleError:
        return BundleError(
            f"{self._artifact.name} on tensorrt {trt.__version__}", expected=expected, got=self._log.text()
        )


def _spec(engine: Any, name: str, artifact: Path) -> TensorSpec:
    dtype = engine.get_tensor_dtype(name)
    if dtype not in _DTYPES:
        known = ", ".join(_DTYPES.values())
        raise BundleError(f"{artifact.name}: {name}", expected=f"one of {known}", got=str(dtype))
    shape = tuple(None if size == -1 else int(size) for size in tuple(engine.get_tensor_shape(name)))
    return TensorSpec(name, shape, _DTYPES[dtype])
