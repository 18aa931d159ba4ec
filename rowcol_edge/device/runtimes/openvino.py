"""OpenVINO: an IR file (``.xml``) with its weights (``.bin``) beside it, on the CPU, GPU or NPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import BundleError, MissingDependencyError, RowcolError
from ..manifest import TensorSpec
from ..versions import is_at_least
from .base import FeedCheck, Runtime, RuntimeOptions
from .memory import MMAP
from .openvino_profiler import OpenVinoProfiler

try:
    import openvino as ov
except ModuleNotFoundError as e:
    raise MissingDependencyError("running this bundle", package="openvino") from e
except ImportError as e:  # installed, but for another C library or processor
    raise RowcolError(
        "package openvino",
        expected="a version that loads on this machine",
        got=str(e),
        hint="install another version of it or of numpy",
    ) from e

_ERRORS = (RuntimeError, ValueError, TypeError)
"""What openvino raises: pybind11 makes RuntimeError of its own exceptions, and the other two of a wrong argument."""

_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64", "boolean": "bool",
}  # fmt: skip
_PRECISION = "INFERENCE_PRECISION_HINT"
_NO_PRECISION = ("dynamic", "undefined")
"""Values of the hint that leave the choice to the device."""
_INTEGER_KERNELS = "LP_TRANSFORMS_MODE"
"""Whether int8 models get integer kernels: a key of the CPU plugin that is not documented (tried up to 2026.4)."""
_RIGHT_WITHOUT = "2025.4"
"""Before it (2024.6) products of tied int8 weights are wrong without integer kernels, which are kept then."""
_COUNT = "PERF_COUNT"
_CACHE = "CACHE_DIR"
"""Folder of compiled models, which make later starts faster; used only where a target's properties name one."""


class OpenVinoRuntime:
    """Opens ``.xml`` files."""

    name = "openvino"
    package = "openvino"

    def __init__(self) -> None:
        self._core: Any = None

    def version(self) -> str:
        return str(ov.get_version()).partition("-")[0]

    def fulfils(self, oldest: str) -> bool:
        return is_at_least(self.version(), oldest)

    def open(self, artifact: Path, options: RuntimeOptions) -> OpenVinoSession:
        return OpenVinoSession(self._compiled(artifact, options), artifact, self.version())

    def unprofiled(self) -> str:
        return ""

    def open_profiled(self, artifact: Path, options: RuntimeOptions) -> OpenVinoProfiler:
        counting = replace(options, properties={**options.properties, _COUNT: "YES"})
        compiled = self._compiled(artifact, counting)
        return OpenVinoProfiler(OpenVinoSession(compiled, artifact, self.version()), compiled)

    def _compiled(self, artifact: Path, options: RuntimeOptions) -> Any:
        for path in (artifact, artifact.with_suffix(".bin")):
            if not path.is_file():
                raise BundleError(str(path), expected="an IR file with its .bin beside it", got="no such file")
        if self._core is None:
            self._core = ov.Core()  # one a process: every further one starts the plugins again
        device = _device(options.providers)
        offered = self._core.available_devices
        if device not in {name.partition(".")[0] for name in offered} | set(offered):
            raise BundleError(
                f"device {device}",
                expected=f"one that openvino {self.version()} can use here: {', '.join(offered)}",
                got="not available",
                hint="install the device's driver; another device is used only if it is asked for",
            )
        try:
            if not artifact.read_bytes().lstrip().startswith(b"<?xml"):
                raise ValueError("a file that is no XML")  # openvino would try its other readers, which print
            settings = _settings(
                device, replace(options, exact_sums=options.exact_sums and self.fulfils(_RIGHT_WITHOUT))
            )
            model = self._read(artifact, settings.pop(MMAP, None))
            compiled = self._core.compile_model(model, device, settings)
            _check_precision(compiled, device, settings.get(_PRECISION))
        except _ERRORS as e:
            raise BundleError(
                artifact.name,
                expected=f"a model that openvino {self.version()} can load on {device}",
                got=_short(e),
                hint="run verify; if the digests match, this version of openvino does not support the model",
            ) from e
        return compiled

    def _read(self, artifact: Path, mapped: str | None) -> Any:
        """The model; ``mapped`` is for this one alone, although openvino has it as a setting of the whole process."""
        if mapped is None:
            return self._core.read_model(artifact)
        before = self._core.get_property(MMAP)
        self._core.set_property({MMAP: mapped})
        try:
            return self._core.read_model(artifact)
        finally:
            self._core.set_property({MMAP: before})


RUNTIME: Runtime = OpenVinoRuntime()


class OpenVinoSession:
    """One loaded ``.xml`` file."""

    __slots__ = ("_artifact", "_check", "_names", "_request", "_version", "inputs", "outputs")

    def __init__(self, compiled: Any, artifact: Path, version: str) -> None:
        self._artifact = artifact
        self._version = version
        self.inputs = tuple(_spec(port, artifact) for port in compiled.inputs)
        self.outputs = tuple(_spec(port, artifact) for port in compiled.outputs)
        self._names = [spec.name for spec in self.outputs]
        self._check = FeedCheck(self.inputs)
        self._request = compiled.create_infer_request()

    def profiled(self) -> Sequence[Any]:
        """What a model that was compiled to count says of the operators of the last run."""
        return list(self._request.profiling_info)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._check(feeds)
        return dict(zip(self._names, self.infer(feeds), strict=True))

    def infer(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self._request is None:
            raise BundleError(self._artifact.name, expected="an open session", got="one that was closed")
        try:
            # outputs are copied: the request's own buffers are written again by the next run
            results = self._request.infer(
                {name: np.ascontiguousarray(array) for name, array in feeds.items()}, share_inputs=True
            )
            return [np.array(value) for value in results.values()]
        except _ERRORS as e:
            raise BundleError(
                f"{self._artifact.name} on openvino {self._version}", expected="a run on valid inputs", got=_short(e)
            ) from e

    def close(self) -> None:
        self._request = None

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _device(providers: Sequence[str]) -> str:
    if len(providers) > 1:
        got = ", ".join(providers)
        raise BundleError(
            "device", expected="one, such as CPU, GPU or NPU", got=got, hint="openvino runs a model on one"
        )
    return providers[0] if providers else "CPU"


def _check_precision(compiled: Any, device: str, wanted: str | None) -> None:
    """BundleError where the device calculates in another precision than it was told to: plugins accept a hint that
    the hardware cannot follow."""
    if wanted is None or wanted in _NO_PRECISION:
        return
    used = compiled.get_property(_PRECISION).get_type_name()
    if used != wanted:
        raise BundleError(
            f"{_PRECISION} on {device}",
            expected=wanted,
            got=used,
            hint=f'this {device} cannot calculate in {wanted}: build for a target whose properties ask for "{used}"',
        )


def _settings(device: str, options: RuntimeOptions) -> dict[str, str]:
    settings = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        # where a processor has bfloat16, openvino's own default calculates a float32 model in it
        settings |= {"NUM_STREAMS": "1", _PRECISION: "f32"}
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = str(options.threads)
        if options.exact_sums:
            settings[_INTEGER_KERNELS] = "NO"
    settings |= options.properties
    if options.exact_sums:
        settings.pop(_CACHE, None)  # it takes a model with integer kernels and one without for the same
    if _CACHE in settings:
        settings[_CACHE] = str(_cache_folder(settings[_CACHE]))
    return settings


def _cache_folder(text: str) -> Path:
    """``~`` is the user's home; a relative path lies in the user's cache folder, never beside the bundle's files."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base, text if not text.startswith("~") else Path(text).expanduser()).expanduser()


def _spec(port: Any, artifact: Path) -> TensorSpec:
    dtype = port.element_type.get_type_name()
    if dtype not in _DTYPES:
        raise BundleError(f"{artifact.name}: {port.any_name}", expected=f"one of {', '.join(_DTYPES)}", got=dtype)
    shape = port.partial_shape
    if shape.rank.is_dynamic:
        raise BundleError(f"{artifact.name}: {port.any_name}", expected="a known number of dimensions", got=str(shape))
    return TensorSpec(port.any_name, tuple(d.get_length() if d.is_static else None for d in shape), _DTYPES[dtype])


def _short(error: BaseException) -> str:
    """openvino's message without the places in its source."""
    text = str(error)
    text = re.sub(r"Exception from \S+:\s*", "", text)
    text = re.sub(r"Check '.*?' failed at \S+:\s*", "", text, flags=re.DOTALL)
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:239] + "…"
