"""ONNX Runtime, 1.17 or newer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import BundleError, MissingDependencyError, RowcolError
from ..manifest import TensorSpec
from ..versions import is_at_least
from .base import FeedCheck, Runtime, RuntimeOptions
from .onnxruntime_providers import Providers, providers

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as _state

    from . import onnxruntime_placement as placement
    from .onnxruntime_profiler import OnnxProfiler
except ModuleNotFoundError as e:
    raise MissingDependencyError("running this bundle", package="onnxruntime") from e
except ImportError as e:  # installed, but for another numpy, C library or processor
    raise RowcolError(
        "package onnxruntime",
        expected="a version that loads on this machine",
        got=str(e),
        hint="install another version of it or of numpy",
    ) from e

_ERRORS: tuple[type[BaseException], ...] = (
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)
"""What onnxruntime raises: its own exceptions share no base class, pybind11 and its Python layer add two more."""

_DTYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}
_NO_INTEGER_KERNELS = "session.disable_quant_qdq"
_FATAL = 4  # the messages reach the user through the exception; the logger would print them a second time


class OnnxRuntime:
    """Opens ``.onnx`` files."""

    name = "onnxruntime"
    package = "onnxruntime"

    def version(self) -> str:
        return str(ort.__version__)

    def fulfils(self, oldest: str) -> bool:
        return is_at_least(self.version(), oldest)

    def open(self, artifact: Path, options: RuntimeOptions) -> OnnxSession:
        return self._opened(artifact, options, "")

    def unprofiled(self) -> str:
        return ""

    def open_profiled(self, artifact: Path, options: RuntimeOptions) -> OnnxProfiler:
        return OnnxProfiler(lambda prefix: self._opened(artifact, options, prefix))

    def _opened(self, artifact: Path, options: RuntimeOptions, profile_prefix: str) -> OnnxSession:
        """With a prefix, the session writes a profile to a file whose name begins so."""
        if not artifact.is_file():
            raise BundleError(str(artifact), expected="a readable .onnx file", got="no such file")
        chosen = providers(options, artifact)
        self._check_offered(chosen, ort.get_available_providers(), options)
        settings = _settings(options, chosen)
        if profile_prefix:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile_prefix
        with placement.recording(settings) if chosen.accelerators else nullcontext():
            asked = [(name, own) if own else name for name, own in chosen.options.items()]
            try:
                session = ort.InferenceSession(str(artifact), settings, providers=asked, enable_fallback=0)
            except _ERRORS as e:
                raise _unreadable(artifact, e, self.version()) from e
            # a provider whose libraries do not load is dropped by onnxruntime with a log line only
            self._check_offered(chosen, session.get_providers(), options)
            opened = OnnxSession(session, artifact)
            if chosen.accelerators:
                _check_used(chosen.accelerators, opened.providers_used(), artifact)
        return opened

    def _check_offered(self, chosen: Providers, offered: list[str], options: RuntimeOptions) -> None:
        missing = [provider for provider in chosen.options if provider not in offered]
        if missing:
            install = f" with: {options.install_line}" if options.install_line else ""
            raise BundleError(
                f"execution provider {missing[0]}",
                expected=f"one that onnxruntime {self.version()} can use here: {', '.join(offered)}",
                got="not available",
                hint=f"install the onnxruntime build that has it{install}; the CPU is used only if it is asked for",
            )


RUNTIME: Runtime = OnnxRuntime()


def _check_used(accelerators: list[str], used: set[str], artifact: Path) -> None:
    """The accelerator that is listed first takes nodes: those after it are there for what it leaves."""
    if accelerators[0] in used:
        return
    raise BundleError(
        f"{artifact.name} on {', '.join(name for name in accelerators if name not in used)}",
        expected="nodes of the model that run there",
        got=f"all of them on {', '.join(sorted(used)) or 'none'}",
        hint="it has no kernels for the model's precision: use another arm, or leave the provider out of the target",
    )


class OnnxSession:
    """One loaded ``.onnx`` file."""

    __slots__ = ("_artifact", "_check", "_output_names", "_session", "inputs", "outputs")

    def __init__(self, session: Any, artifact: Path) -> None:
        self._session = session
        self._artifact = artifact
        self.inputs = tuple(_spec(node, artifact) for node in session.get_inputs())
        self.outputs = tuple(_spec(node, artifact) for node in session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._check = FeedCheck(self.inputs)

    def providers_used(self) -> set[str]:
        """See `onnxruntime_placement`."""
        try:
            return placement.used(self._session, self.inputs)
        except _ERRORS as e:
            raise self._failed(e) from e

    def end_profiling(self) -> Path:
        """The file of the profile, which ends with it."""
        return Path(self._session.end_profiling())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._check(feeds)
        return dict(zip(self._output_names, self.infer(feeds), strict=True))

    def infer(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            outputs: list[np.ndarray] = self._session.run(self._output_names, feeds)
            return outputs
        except _ERRORS as e:
            raise self._failed(e) from e
        except AttributeError as e:
            if self._session is not None:
                raise
            raise BundleError(self._artifact.name, expected="an open session", got="one that was closed") from e

    def close(self) -> None:
        self._session = None

    def _failed(self, error: BaseException) -> BundleError:
        what = f"{self._artifact.name} on onnxruntime {ort.__version__}"
        return BundleError(what, expected="a run on valid inputs", got=_short(error))

    def __enter__(self) -> OnnxSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _settings(options: RuntimeOptions, chosen: Providers) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = _FATAL
    settings.intra_op_num_threads = chosen.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.use_deterministic_compute = options.deterministic
    for key, value in chosen.entries.items():
        settings.add_session_config_entry(key, value)
    if options.exact_sums:
        settings.add_session_config_entry(_NO_INTEGER_KERNELS, "1")
    for name, on in chosen.switches.items():
        setattr(settings, name, on)
    return settings


def _spec(node: Any, artifact: Path) -> TensorSpec:
    if node.type not in _DTYPES:
        raise BundleError(f"{artifact.name}: {node.name}", expected=f"one of {', '.join(_DTYPES)}", got=str(node.type))
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(node.name, shape, _DTYPES[node.type])


def _unreadable(artifact: Path, error: BaseException, version: str) -> BundleError:
    text = str(error)
    if re.search(r"IR version", text) or re.search(r"opset \d+ is under development", text, re.IGNORECASE):
        hint = f"onnxruntime {version} is too old for this file: the bundle's README names the oldest that opens it"
    elif re.search(r"protobuf|No graph|parsing", text, re.IGNORECASE):
        hint = "the file is damaged: copy the bundle again, then run verify"
    else:
        hint = "run verify; if the digests match, this build of onnxruntime does not support the model"
    return BundleError(
        artifact.name, expected=f"a model that onnxruntime {version} can load", got=_short(error), hint=hint
    )


def _short(error: BaseException) -> str:
    """onnxruntime's message without its prefix and the C++ signature in front of the sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:\s*", "", text)
    text = re.sub(r"^/\S+:\d+ .*\) (?=[A-Z])", "", text)
    return text if len(text) <= 240 else text[:239] + "…"
