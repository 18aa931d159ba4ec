"""What every runtime looks like from above: open an artifact, run it. None of them holds a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from ...errors import DataError
from ..manifest import TensorSpec


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """``threads`` 0 and no ``providers`` leave the choice to the runtime (the CPU).

    ``properties`` are settings in the runtime's own words, such as openvino's ``INFERENCE_PRECISION_HINT``.
    ``install_line`` is how the runtime is installed here, where that is known: for errors. ``exact_sums`` calculates
    static int8 in float, for a machine whose 8-bit products saturate where those of the target do not.
    """

    threads: int = 0
    providers: tuple[str, ...] = ()
    properties: dict[str, str] = field(default_factory=dict)
    deterministic: bool = False
    install_line: str = ""
    exact_sums: bool = False


class Session(Protocol):
    """An opened artifact. Inputs and outputs are arrays by name, of the shapes and dtypes of the specs."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """DataError for feeds that do not fit, BundleError if the runtime fails on feeds that do."""
        ...

    def infer(self, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """The outputs in their order, for feeds that are known to fit: nothing is checked here."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class OperatorRuns:
    """An operator as the runtime ran it. ``name`` is the runtime's own; ``origins`` are names that may stand in the
    file, of which it was made. ``runs_ns`` holds a time an inference."""

    name: str
    kind: str
    origins: tuple[str, ...]
    runs_ns: tuple[int, ...]


class OperatorProfiler(Protocol):
    """An opened artifact with the runtime's own profiler on, which slows it."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> object: ...

    def operators(self) -> tuple[OperatorRuns, ...]:
        """Of all inferences since it was opened, in the order they ran; after it there are no more.

        MeasurementError: the runtime left no record of them, or not a whole one.
        """
        ...

    def __enter__(self) -> OperatorProfiler: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Runtime(Protocol):
    """``name`` is the manifest's, ``package`` what pip installs."""

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str: ...

    def version(self) -> str: ...

    def fulfils(self, oldest: str) -> bool:
        """Is what is installed the oldest version that a bundle was made for, or newer?"""
        ...

    def open(self, artifact: Path, options: RuntimeOptions) -> Session:
        """BundleError for a file the runtime cannot read or a provider it does not have."""
        ...

    def unprofiled(self) -> str:
        """Why the times of single operators cannot be had here; empty where they can."""
        ...

    def open_profiled(self, artifact: Path, options: RuntimeOptions) -> OperatorProfiler:
        """As ``open``. MeasurementError: its profiler cannot work here."""
        ...


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine that was built on this machine; ``path`` is None where it could not be kept, ``seconds`` 0 where an
    earlier one was found."""

    path: Path | None
    seconds: float


class EngineBuilder(Runtime, Protocol):
    """A runtime that builds an engine for this machine out of an artifact and keeps it."""

    def build_engine(self, artifact: Path, options: RuntimeOptions) -> EngineFile:
        """BundleError as for ``open``."""
        ...


class FeedCheck:
    """Do feeds fit the inputs? Built once a session: a call on good feeds costs a microsecond an input."""

    __slots__ = ("_known", "_specs")

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self._specs = specs
        self._known = [(spec.name, np.dtype(spec.dtype), spec.shape) for spec in specs]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> None:
        """DataError names the input that is missing, unexpected or of another dtype or shape."""
        if len(feeds) != len(self._known):
            raise self._names(feeds)
        for name, dtype, shape in self._known:
            array = feeds.get(name)
            if array is None:
                raise self._names(feeds)
            if not isinstance(array, np.ndarray):
                raise DataError(f"input {name!r}", expected="a numpy array", got=type(array).__name__)
            if array.dtype != dtype or not (array.shape == shape or fits(array.shape, shape)):
                raise DataError(
                    f"input {name!r}",
                    expected=f"{dtype} {shape_text(shape)}",
                    got=f"{array.dtype} {shape_text(array.shape)}",
                )

    def _names(self, feeds: Mapping[str, np.ndarray]) -> DataError:
        names = [spec.name for spec in self._specs]
        missing = [name for name in names if name not in feeds]
        unexpected = [name for name in feeds if name not in names]
        got = [f"no {name!r}" for name in missing] + [f"an unexpected {name!r}" for name in unexpected]
        return DataError("inputs", expected=", ".join(names), got=", ".join(got))


def fits(shape: tuple[int, ...], spec: tuple[int | None, ...]) -> bool:
    """Does a shape agree with a spec in every size that is not free?"""
    return len(shape) == len(spec) and all(b is None or a == b for a, b in zip(shape, spec, strict=True))


def shape_text(shape: tuple[int | None, ...]) -> str:
    return "×".join("?" if size is None else str(size) for size in shape) or "scalar"
