"""TFLite: a ``.tflite`` file, opened by ai-edge-litert or, where only that loads, by tflite-runtime 2.14 or newer.

Providers are delegates: ``CPU`` is the interpreter's own kernels with XNNPACK; any other is the name or path of an
external delegate's library, such as ``libvx_delegate.so``, and the runtime's properties are its options, but for
``model_content``, see :mod:`.memory`. With a
delegate but without ``CPU`` the delegate must take part of the model, and what it leaves runs without XNNPACK.

Inputs and outputs that the file holds as int8 or uint8 with a scale (precision ``int8-io``) are float32 here: a
session quantizes and dequantizes them by the tensor's own scale and zero point.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import BundleError, MeasurementError, MissingDependencyError, RowcolError
from ..manifest import DTYPES, TensorSpec
from ..versions import WITH_NUMPY_2, is_at_least
from . import seal
from .base import FeedCheck, OperatorProfiler, Runtime, RuntimeOptions
from .memory import CONTENT, ON

try:
    try:
        import ai_edge_litert as _package
        from ai_edge_litert import interpreter as lite
    except ImportError as e:  # not installed, or for another C library
        try:
            import tflite_runtime as _package
            from tflite_runtime import interpreter as lite
        except ModuleNotFoundError:
            raise e from None
except ModuleNotFoundError as e:
    if e.name != "ai_edge_litert":
        raise
    raise MissingDependencyError("running this bundle", package="ai-edge-litert") from e
except ImportError as e:  # installed, but for another numpy, C library or processor
    raise RowcolError(
        "package ai-edge-litert or tflite-runtime",
        expected="a version that loads on this machine",
        got=str(e).strip().splitlines()[-1],
        hint="tflite-runtime 2.14 needs 'numpy<2'; ai-edge-litert takes any",
    ) from e

_PACKAGE = str(_package.__name__).replace("_", "-")
_OLD = _PACKAGE == "tflite-runtime" and not is_at_least(_package.__version__, WITH_NUMPY_2)
if _OLD and is_at_least(np.__version__, "2"):  # it loads, and fails at the first array
    raise RowcolError(
        "package numpy",
        expected=f"numpy before 2, which tflite-runtime {_package.__version__} was built for",
        got=np.__version__,
        hint="python -m pip install 'numpy<2', or ai-edge-litert in place of tflite-runtime",
    )
_ERRORS = (RuntimeError, ValueError, TypeError)
"""What the interpreter raises."""
_CPU = "CPU"
_UNPROFILED = f"{_PACKAGE} {_package.__version__} gives its interpreter no profiler in Python"


class TfliteRuntime:
    """Opens ``.tflite`` files."""

    name = "tflite"
    package = _PACKAGE

    def version(self) -> str:
        return str(_package.__version__)

    def fulfils(self, oldest: str) -> bool:
        """``oldest`` counts as tflite-runtime and TensorFlow do; ai-edge-litert counts anew from 1.0, which followed
        TensorFlow 2.17: each of its versions is newer than every tflite-runtime."""
        return self.package == "ai-edge-litert" or is_at_least(self.version(), oldest)

    def open(self, artifact: Path, options: RuntimeOptions) -> TfliteSession:
        if not artifact.is_file():
            raise BundleError(str(artifact), expected="a readable .tflite file", got="no such file")
        if found := seal.damage(artifact):
            raise BundleError(
                artifact.name,
                expected="the .tflite file as it was built",
                got=found,
                hint="the file is damaged: copy the bundle again, then run verify",
            )
        delegates = [_delegate(name, options) for name in options.providers if name != _CPU]
        of_delegates = [key for key in options.properties if key != CONTENT]
        if of_delegates and not delegates:
            raise BundleError(
                f"property {of_delegates[0]}",
                expected="a delegate, whose options the properties are",
                got=f"the {_CPU} alone",
            )
        own = not delegates or _CPU in options.providers
        kernels = lite.OpResolverType
        try:
            content = options.properties.get(CONTENT) == ON
            interpreter = lite.Interpreter(
                model_path=None if content else str(artifact),
                model_content=artifact.read_bytes() if content else None,
                num_threads=options.threads or None,
                experimental_delegates=delegates or None,
                experimental_op_resolver_type=kernels.AUTO if own else kernels.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
            interpreter.allocate_tensors()
        except _ERRORS as e:
            raise BundleError(
                artifact.name,
                expected=f"a model that {self.package} {self.version()} can load",
                got=_short(e),
                hint="run verify; if the digests match, this version does not support the model",
            ) from e
        if not own and not _delegated(interpreter):
            raise BundleError(
                f"delegate {options.providers[0]}",
                expected=f"one that takes operators of {artifact.name}",
                got="it takes none",
                hint=f"name {_CPU} beside it if the processor may run them",
            )
        return TfliteSession(interpreter, artifact, f"{self.package} {self.version()}")

    def unprofiled(self) -> str:
        return _UNPROFILED

    def open_profiled(self, artifact: Path, options: RuntimeOptions) -> OperatorProfiler:
        raise MeasurementError(f"operators of {self.name}", expected="a profiler", got=_UNPROFILED)


RUNTIME: Runtime = TfliteRuntime()


@dataclass(frozen=True, slots=True)
class _Port:
    """A tensor of the interpreter and how it looks from outside; ``scale`` 0 where both are the same."""

    index: int
    spec: TensorSpec
    dtype: np.dtype[Any]
    scale: float
    zero: int

    def quantized(self, array: np.ndarray) -> np.ndarray:
        limits = np.iinfo(self.dtype)
        values: np.ndarray = np.clip(np.rint(array / self.scale) + self.zero, limits.min, limits.max).astype(self.dtype)
        return values

    def dequantized(self, array: np.ndarray) -> np.ndarray:
        values: np.ndarray = (array.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)
        return values


class TfliteSession:
    """One loaded ``.tflite`` file. A free batch is set by the feeds; another size than before costs an allocation."""

    __slots__ = (
        "_artifact",
        "_check",
        "_free",
        "_in",
        "_interpreter",
        "_names",
        "_out",
        "_runtime",
        "inputs",
        "outputs",
    )

    def __init__(self, interpreter: Any, artifact: Path, runtime: str) -> None:
        self._interpreter = interpreter
        self._artifact = artifact
        self._runtime = runtime
        self._in, self._out = _ports(interpreter, artifact)
        self.inputs = tuple(port.spec for port in self._in)
        self.outputs = tuple(port.spec for port in self._out)
        self._names = [spec.name for spec in self.outputs]
        self._check = FeedCheck(self.inputs)
        self._free = any(None in spec.shape for spec in self.inputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._check(feeds)
        return dict(zip(self._names, self.infer(feeds), strict=True))

    def infer(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        interpreter = self._interpreter
        if interpreter is None:
            raise BundleError(self._artifact.name, expected="an open session", got="one that was closed")
        try:
            if self._free:
                self._resize(feeds)
            for port in self._in:
                array = feeds[port.spec.name]
                interpreter.set_tensor(port.index, port.quantized(array) if port.scale else array)
            interpreter.invoke()
            # get_tensor copies: the interpreter's own memory is written again by the next run
            outputs = [interpreter.get_tensor(port.index) for port in self._out]
            return [p.dequantized(a) if p.scale else a for p, a in zip(self._out, outputs, strict=True)]
        except _ERRORS as e:
            raise BundleError(
                f"{self._artifact.name} on {self._runtime}", expected="a run on valid inputs", got=_short(e)
            ) from e

    def _resize(self, feeds: Mapping[str, np.ndarray]) -> None:
        now = {detail["index"]: tuple(detail["shape"]) for detail in self._interpreter.get_input_details()}
        changed = [port for port in self._in if feeds[port.spec.name].shape != now[port.index]]
        for port in changed:
            self._interpreter.resize_tensor_input(port.index, feeds[port.spec.name].shape, strict=True)
        if changed:
            self._interpreter.allocate_tensors()

    def close(self) -> None:
        self._interpreter = None

    def __enter__(self) -> TfliteSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ports(interpreter: Any, artifact: Path) -> tuple[tuple[_Port, ...], tuple[_Port, ...]]:
    """Inputs and outputs in the model's order, by the names of its signature."""
    signatures = list(interpreter.get_signature_list())
    if len(signatures) != 1:
        raise BundleError(artifact.name, expected="one signature", got=", ".join(signatures) or "none")
    runner = interpreter.get_signature_runner(signatures[0])
    inputs = _named(interpreter.get_input_details(), runner.get_input_details(), artifact)
    return inputs, _named(interpreter.get_output_details(), runner.get_output_details(), artifact)


def _named(details: list[Any], signature: Mapping[str, Any], artifact: Path) -> tuple[_Port, ...]:
    names: dict[int, list[str]] = {}
    for name, detail in signature.items():
        names.setdefault(detail["index"], []).append(name)
    if sorted(names) != sorted({detail["index"] for detail in details}):
        raise BundleError(artifact.name, expected="a name for each input and output", got=", ".join(signature))
    # two outputs that are one tensor have a name each
    return tuple(_port(detail, names[detail["index"]].pop(0), artifact) for detail in details)


def _port(detail: Mapping[str, Any], name: str, artifact: Path) -> _Port:
    dtype = np.dtype(detail["dtype"])
    scale, zero = detail["quantization"]
    if dtype.name not in DTYPES:
        raise BundleError(f"{artifact.name}: {name}", expected=f"one of {', '.join(DTYPES)}", got=dtype.name)
    shape = tuple(None if size < 0 else int(size) for size in detail["shape_signature"])
    scale = float(scale) if dtype.kind in "iu" else 0.0
    return _Port(detail["index"], TensorSpec(name, shape, "float32" if scale else dtype.name), dtype, scale, int(zero))


def _delegate(library: str, options: RuntimeOptions) -> Any:
    """BundleError for a library that is not there, is no delegate, or refuses its options."""
    try:
        # lite's own loader leaves half an object behind when this fails
        if not hasattr(ctypes.CDLL(library), "tflite_plugin_create_delegate"):
            raise ValueError("a library that is no TFLite delegate")
        return lite.load_delegate(library, {key: value for key, value in options.properties.items() if key != CONTENT})
    except (OSError, *_ERRORS) as e:
        raise BundleError(
            f"delegate {library}",
            expected=f"{_CPU}, or the library of a delegate that loads here",
            got=_short(e),
            hint="install the board's delegate; the CPU is used only if it is asked for",
        ) from e


def _delegated(interpreter: Any) -> bool:
    return any(operator["op_name"] == "DELEGATE" for operator in interpreter._get_ops_details())


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:239] + "…"
