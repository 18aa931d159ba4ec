"""An ONNX file becomes a TensorRT engine, with visible progress.

The network is strongly typed: the engine calculates in the types of the file. A file with quantizers is float32
beside them and would be slow in that; it is parsed weakly typed, where TensorRT may calculate the rest in float16.
TF32, which rounds the factors of float32 products to 10 bits, is off unless it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import BundleError, MissingDependencyError, RowcolError, did_you_mean

try:
    import tensorrt as trt
except ModuleNotFoundError as e:
    raise MissingDependencyError(
        "running this bundle",
        package="tensorrt",
        install="sudo apt-get install python3-libnvinfer",
        hint="that is JetPack's; a virtual environment sees it if it was made with --system-site-packages",
    ) from e
except ImportError as e:  # the bindings are there, the libraries are not
    raise RowcolError(
        "package tensorrt",
        expected="a version that loads on this machine",
        got=str(e),
        hint="on JetPack: sudo apt-get install tensorrt python3-libnvinfer",
    ) from e

__all__ = ["Log", "Settings", "build", "made", "trt"]

Progress = Callable[[str, int, int], None]

_MAX_BATCH = 8
_FEW_STEPS = 10
"""Phases with fewer steps end too soon to be worth a line of their own."""


@dataclass(frozen=True)
class Settings:
    """What the builder may be told, by the target's ``properties``: ``max_batch`` (where the batch is free), ``tf32``
    (0 or 1), ``builder_optimization_level`` (0 to 5) and ``workspace_mib``."""

    max_batch: int = _MAX_BATCH
    tf32: int = 0
    builder_optimization_level: int = 3
    workspace_mib: int = 0

    @classmethod
    def of(cls, properties: Mapping[str, str]) -> Settings:
        """BundleError: a property that is not one of these, or no number."""
        known = cls.__dataclass_fields__
        for key, value in properties.items():
            if key not in known:
                hint = did_you_mean(key, known)
                raise BundleError(f"property {key}", expected=f"one of {', '.join(known)}", got="no such", hint=hint)
            if not value.isascii() or not value.isdigit():
                raise BundleError(f"property {key}", expected="a whole number", got=repr(value))
        return cls(**{key: int(value) for key, value in properties.items()})

    def to_key(self) -> dict[str, str]:
        return {name: str(getattr(self, name)) for name in self.__dataclass_fields__}


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says of errors: its calls answer only that they failed."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self.errors.append(" ".join(msg.split()))

    def text(self) -> str:
        text = " | ".join(self.errors[-3:]) or "no reason given"
        return text if len(text) <= 400 else text[:399] + "…"


def build(
    model: bytes, name: str, settings: Settings, timings: bytes, log: Log, progress: Progress
) -> tuple[bytes, bytes]:
    """(engine, timings of kernels) of an ONNX file's content; takes minutes.

    BundleError: TensorRT does not read the file or finds no engine for it, with its reasons.
    """
    builder = made(trt.Builder, log)
    network, parser = _parsed(builder, model, name, log, strongly_typed=True)
    config = builder.create_builder_config()
    if _quantized(network):
        network, parser = _parsed(builder, model, name, log, strongly_typed=False)
        config.set_flag(trt.BuilderFlag.INT8)
        config.set_flag(trt.BuilderFlag.FP16)
    _configure(builder, network, config, settings)
    cache = config.create_timing_cache(timings)
    config.set_timing_cache(cache, ignore_mismatch=False)
    monitor = _Monitor(name, progress)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    monitor.end()
    del parser  # it owns the weights until the engine is built
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise BundleError(
            name,
            expected=f"an engine from TensorRT {trt.__version__}",
            got=log.text(),
            hint="is there enough free memory? building takes several times what running takes",
        )
    return bytes(serialized), bytes(config.get_timing_cache().serialize())


def made(kind: Any, log: Log) -> Any:
    """A trt.Builder or trt.Runtime; BundleError where TensorRT finds no GPU it can use."""
    try:
        return kind(log)
    except TypeError as e:  # what the bindings make of a null pointer
        raise BundleError(
            f"tensorrt {trt.__version__}",
            expected="a GPU that it can use",
            got=log.text(),
            hint="is its driver loaded?",
        ) from e


def _parsed(builder: Any, model: bytes, name: str, log: Log, *, strongly_typed: bool) -> tuple[Any, Any]:
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strongly_typed else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        text = " | ".join(" ".join(error.split()) for error in errors[:3]) or log.text()
        raise BundleError(
            name,
            expected=f"a model that TensorRT {trt.__version__} can read",
            got=text if len(text) <= 400 else text[:399] + "…",
            hint="run verify; if the digests match, this version of TensorRT does not support the model",
        )
    return network, parser


def _quantized(network: Any) -> bool:
    return any(network.get_layer(i).type == trt.LayerType.QUANTIZE for i in range(network.num_layers))


def _configure(builder: Any, network: Any, config: Any, settings: Settings) -> None:
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    config.builder_optimization_level = settings.builder_optimization_level
    if settings.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if not any(-1 in tuple(tensor.shape) for tensor in inputs):
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        one, most = (
            tuple(batch if size == -1 else size for size in tuple(tensor.shape)) for batch in (1, settings.max_batch)
        )
        profile.set_shape(tensor.name, one, one, most)
    config.add_optimization_profile(profile)


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Reports the phases of a build; called from several threads. Ctrl-C ends the build instead of the callback."""

    def __init__(self, name: str, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._name = name
        self._progress = progress
        self._steps: dict[str, int] = {}
        self._lock = threading.Lock()
        self.interrupted = False

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            if parent_phase is None or num_steps >= _FEW_STEPS:
                self._steps[phase_name] = num_steps
        self._report(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._report(phase_name, step + 1)
        return not self.interrupted

    def phase_finish(self, phase_name: str) -> None:
        self._report(phase_name, self._steps.get(phase_name, 0))
        with self._lock:
            self._steps.pop(phase_name, None)

    def end(self) -> None:
        """Phases that never finished, because the build failed, leave no half line."""
        for phase in list(self._steps):
            self.phase_finish(phase)

    def _report(self, phase: str, done: int) -> None:
        try:
            steps = self._steps.get(phase)
            if steps:
                self._progress(f"{self._name}: building the engine, {phase}", min(done, steps), steps)
        except KeyboardInterrupt:
            self.interrupted = True
