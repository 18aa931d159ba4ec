"""Stand-ins for the ``tensorrt`` module (10.3) and for libcudart: their calls, their answers and their complaints.

Neither needs a GPU, so nothing that passes here proves that TensorRT takes a model. The names, signatures and return
values are those of the Python bindings of TensorRT 10.3 (tools/check_tensorrt_api.py holds the calls against the real
ones) and of the CUDA runtime API; memory "on the GPU" is memory of this process, and an "engine" runs its ONNX file in
onnxruntime. Misuse that TensorRT answers with False, None or a crash is an error here too.
"""

from __future__ import annotations

import base64
import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}


class Libcudart:
    """C functions (through ctypes' own calling) over buffers of this process; `calls` lists what was called."""

    def __init__(self, devices: int = 1, name: bytes = b"Orin", capability: tuple[int, int] = (8, 7)) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self._kept: list[Any] = []
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        out, number = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)

        def count(to: Any) -> None:
            to[0] = devices

        def attribute(to: Any, which: int, device: int) -> None:
            to[0] = capability[{75: 0, 76: 1}[which]]

        def properties(to: int, device: int) -> None:
            ctypes.memmove(to, name + b"\0", len(name) + 1)

        def malloc(to: Any, size_bytes: int) -> None:
            buffer = ctypes.create_string_buffer(size_bytes)
            self.memory[ctypes.addressof(buffer)] = buffer
            to[0] = ctypes.addressof(buffer)

        def free(address: int) -> None:
            del self.memory[address]

        def copy(to: int, source: int, size_bytes: int, kind: int, stream: int) -> None:
            assert stream in self.streams
            device = {1: to, 2: source}[kind]
            assert size_bytes <= len(self.memory[device]), "more than was allocated"
            ctypes.memmove(to, source, size_bytes)

        def create(to: Any) -> None:
            to[0] = 1000 + len(self.streams)
            self.streams.add(to[0])

        self._add("cudaGetDeviceCount", count, number)
        self._add("cudaSetDevice", lambda device: None, integer)
        self._add("cudaDeviceGetAttribute", attribute, number, integer, integer)
        self._add("cudaGetDeviceProperties", properties, pointer, integer)
        self._add("cudaMalloc", malloc, out, size)
        self._add("cudaFree", free, pointer)
        self._add("cudaMemcpyAsync", copy, pointer, pointer, size, integer, pointer)
        self._add("cudaStreamCreate", create, out)
        self._add("cudaStreamSynchronize", lambda stream: None, pointer)
        self._add("cudaStreamDestroy", self.streams.discard, pointer)
        text = ctypes.create_string_buffer(b"out of memory")
        self._kept.append(text)
        self.cudaGetErrorString = ctypes.CFUNCTYPE(ctypes.c_void_p, integer)(lambda code: ctypes.addressof(text))

    def _add(self, name: str, action: Callable[..., Any], *types: Any) -> None:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.fail:
                return self.fail[name]
            try:
                action(*arguments)
            except Exception as e:  # noqa: BLE001 - ctypes would only print it
                self.calls.append(f"misuse: {e!r}")
                return 1
            return 0

        setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(call))


class HostMemory:
    """IHostMemory: a buffer."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.nbytes = len(content)

    def __bytes__(self) -> bytes:
        return self._content


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


def make(version: str = "10.3.0", gpu: str = "Orin", phases: int = 12) -> ModuleType:  # noqa: C901 - a module
    """A module as ``import tensorrt as trt`` gives it; `trt.told` records what the builder was told."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.told = SimpleNamespace(
        builds=0, flags=set(), typing=[], profiles=[], timings=[], loads=0, level=None, workspace=None, broken="",
        interrupt=False, order=[], layers={},
    )  # fmt: skip

    class ILogger:
        class Severity(Enum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3
            VERBOSE = 4

    class IProgressMonitor:
        pass

    class IProfiler:
        pass

    class Flag(Enum):
        FP16, INT8, TF32 = range(3)

    class DataType(Enum):
        FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64 = range(7)

    trt.ILogger, trt.IProgressMonitor, trt.BuilderFlag, trt.IProfiler = ILogger, IProgressMonitor, Flag, IProfiler
    trt.float32, trt.float16, trt.int8, trt.int32 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32
    trt.bool, trt.uint8, trt.int64 = DataType.BOOL, DataType.UINT8, DataType.INT64
    trt.TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    trt.LayerType = Enum("LayerType", ["CONVOLUTION", "QUANTIZE", "OTHER"])
    trt.MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    trt.init_libnvinfer_plugins = lambda logger, namespace: trt.told.order.append("plugins") or True
    by_name = {
        "float32": trt.float32, "float16": trt.float16, "int64": trt.int64, "uint8": trt.uint8,
    }  # fmt: skip

    def complain(logger: Any, text: str) -> None:
        assert isinstance(logger, ILogger)
        logger.log(ILogger.Severity.ERROR, text)
        logger.log(ILogger.Severity.WARNING, "a warning that nobody needs")

    class Network:
        def __init__(self, flags: int) -> None:
            self.strongly_typed = bool(flags & 1 << 1)
            trt.told.typing.append(self.strongly_typed)
            self.model: onnx.ModelProto | None = None
            self._inputs: list[Any] = []

        def fill(self, model: onnx.ModelProto) -> None:
            self.model = model
            for value in model.graph.input:
                shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
                self._inputs.append(SimpleNamespace(name=value.name, shape=shape))
            self.num_inputs = len(self._inputs)
            self.num_layers = len(model.graph.node)

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_layer(self, index: int) -> Any:
            assert self.model is not None
            op = self.model.graph.node[index].op_type
            return SimpleNamespace(type=trt.LayerType.QUANTIZE if op == "QuantizeLinear" else trt.LayerType.OTHER)

    class OnnxParser:
        def __init__(self, network: Network, logger: ILogger) -> None:
            self._network, self._logger, self._errors = network, logger, list[ParserError]()

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

        def parse(self, model: bytes, path: str | None = None) -> bool:
            try:
                proto = onnx.ModelProto.FromString(model)
                onnx.checker.check_model(proto)
            except Exception:  # noqa: BLE001 - whatever is wrong with the bytes
                self._errors.append(ParserError("ModelImporter.cpp:\n Failed to parse serialized model"))
                return False
            if trt.told.broken == "parse":
                self._errors.append(ParserError("In node 3 (importFoo): UNSUPPORTED_NODE: no importer"))
                return False
            self._network.fill(proto)
            return True

    class Config:
        def __init__(self) -> None:
            self.flags = {Flag.TF32}
            self.builder_optimization_level = 3
            self.progress_monitor: Any = None
            self.profiles: list[dict[str, Any]] = []
            self._cache: Any = None

        def set_flag(self, flag: Flag) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Flag) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, size_bytes: int) -> None:
            trt.told.workspace = size_bytes

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

        def create_timing_cache(self, content: bytes) -> Any:
            trt.told.timings.append(bytes(content))
            return SimpleNamespace(content=bytes(content), serialize=lambda: HostMemory(bytes(content) + b"t"))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
            self.shapes[name] = [list(least), list(best), list(most)]

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
            told = trt.told
            assert not (network.strongly_typed and config.flags & {Flag.FP16, Flag.INT8}), "TensorRT refuses this"
            dynamic = any(-1 in network.get_input(i).shape for i in range(network.num_inputs))
            if dynamic != bool(config.profiles):
                complain(self._logger, "network has dynamic or shape inputs, but no optimization profile")
                return None
            told.builds, told.flags, told.profiles = told.builds + 1, config.flags, config.profiles
            told.level = config.builder_optimization_level
            monitor = config.progress_monitor
            assert isinstance(monitor, IProgressMonitor)
            monitor.phase_start("Building Engine", None, phases)
            monitor.phase_start("Optimizing", "Building Engine", 3)
            for step in range(phases):
                if told.interrupt and step == 2:
                    monitor._progress = raise_interrupt  # a Ctrl-C while the callback runs
                if not monitor.step_complete("Building Engine", step):
                    return None
            monitor.phase_finish("Optimizing")
            if told.broken == "build":
                complain(self._logger, "Error Code 10: Could not find any implementation for node /conv")
                return None
            monitor.phase_finish("Building Engine")
            assert network.model is not None
            engine = {
                "version": version, "gpu": gpu, "profiles": config.profiles,
                "model": base64.b64encode(network.model.SerializeToString()).decode(),
            }  # fmt: skip
            return HostMemory(json.dumps(engine).encode())

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            if trt.told.broken == "gpu":
                complain(logger, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            trt.told.loads += 1
            try:
                parts = json.loads(content)
            except ValueError:
                complain(self._logger, "Error Code 1: Serialization (Magic tag does not match)")
                return None
            if (parts["version"], parts["gpu"]) != (version, gpu) or trt.told.broken == "deserialize":
                complain(self._logger, "Error Code 6: The engine plan file is not compatible with this version")
                return None
            return Engine(parts)

    class Engine:
        def __init__(self, parts: dict[str, Any]) -> None:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            self.session = ort.InferenceSession(
                base64.b64decode(parts["model"]), options, providers=["CPUExecutionProvider"]
            )
            self.profiles = parts["profiles"]
            self.nodes = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
            self.incoming = {node.name for node in self.session.get_inputs()}
            self.num_io_tensors = len(self.nodes)

        def get_tensor_name(self, index: int) -> str:
            return list(self.nodes)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self.incoming else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return by_name[TYPES[self.nodes[name].type]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(size if isinstance(size, int) else -1 for size in self.nodes[name].shape)

        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            return [tuple(shape) for shape in self.profiles[index][name]]

        def create_execution_context(self) -> Any:
            return None if trt.told.broken == "context" else Context(self)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine
            self._addresses: dict[str, int] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}
            self.profiler: Any = None

        def set_input_shape(self, name: str, shape: Any) -> bool:
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            shape = self._shapes.get(name) or self._engine.get_tensor_shape(name)
            batch = next(iter(self._shapes.values()), (-1,))[0]
            return (batch, *shape[1:]) if shape and shape[0] == -1 else shape

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            if trt.told.broken == "execute" or set(self._addresses) != set(self._engine.nodes):
                return False
            feeds = {name: self._view(name).copy() for name in self._engine.incoming}
            names = [name for name in self._engine.nodes if name not in self._engine.incoming]
            for name, array in zip(names, self._engine.session.run(names, feeds), strict=True):
                self._view(name)[...] = array
            if self.profiler is not None:
                assert isinstance(self.profiler, IProfiler)
                for name, ms in trt.told.layers.items():
                    self.profiler.report_layer_time(name, ms)
            return True

        def _view(self, name: str) -> np.ndarray:
            dtype = np.dtype(TYPES[self._engine.nodes[name].type])
            shape = self.get_tensor_shape(name)
            raw = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
            return np.frombuffer(raw, dtype).reshape(shape)

    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    return trt


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def installed(monkeypatch: Any, module: ModuleType, library: Libcudart) -> Iterator[Any]:
    """Both in place of the real ones, for `rowcol_edge.device.runtimes.tensorrt` freshly imported."""
    import sys

    from rowcol_edge.device import cuda
    from rowcol_edge.device.runtimes import load_runtime

    folder = "rowcol_edge.device.runtimes"
    own = (f"{folder}.tensorrt", f"{folder}.tensorrt_build", f"{folder}.tensorrt_profiler")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda, "_load", lambda: library)
    for name in own:
        sys.modules.pop(name, None)
    try:
        yield load_runtime("tensorrt")
    finally:
        for name in own:
            sys.modules.pop(name, None)


@contextmanager
def standing_in(runtime: str, engines: Path) -> Iterator[None]:
    """Both in place for ``runtime`` tensorrt, with its engines in a folder; for another one nothing is changed."""
    if runtime != "tensorrt":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWCOL_ENGINE_CACHE", str(engines))
        with installed(patch, make(), Libcudart()):
            yield
