"""What every backend looks like from above: a model in, one artifact out. None of them inherits another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..device.manifest import PRECISIONS
from ..errors import ConfigError, StageError, did_you_mean

if TYPE_CHECKING:
    from ..targets import RuntimeSpec, Target
    from .operators import OperatorGraph

Batch = dict[str, npt.NDArray[Any]]
"""Input name → array with the samples on the first axis."""

Calibration = Callable[[], Iterator[Batch]]
"""Starts a new pass over the calibration batches, in the same order each time."""

ERROR_SAMPLES = 32
"""Calibration samples that are enough to tell a layer that quantization hurts from others."""

BIAS_SAMPLES = 64
"""Calibration samples for the mean error of a channel."""


_DESCRIPTION = "description.json"


class Source(Enum):
    """What a backend starts from."""

    ONNX = "onnx"
    """An ``.onnx`` file, exported at the target's opset and simplified."""

    EXPORTED_PROGRAM = "exported_program"
    """A ``.pt2`` file of ``torch.export``, from which the same ONNX file was made."""


ACCURACY_CONTROL = ("openvino",)
"""Backends whose quantizer can judge its own result and bring layers back to float."""


@dataclass(frozen=True, slots=True, eq=False)
class AccuracyControl:
    """What a quantizer judges its result by: the selection split and the job's metric."""

    samples: Calibration
    labels: npt.NDArray[np.int64]
    """One a sample, in the order of ``samples``."""
    metric: str
    """Name of a built-in metric (`rowcol_edge.quality.metric`): it is computed in another process."""
    positive: int | None
    max_drop_pp: float
    """How much worse than float the result may be, in percentage points."""


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How to quantize, in words that all runtimes share.

    Weights are symmetric (zero point 0), activations are not, biases are int32 at input scale × weight scale; a backend
    whose runtime wants it otherwise says so.
    """

    precision: str
    """One of `PRECISIONS`."""

    per_channel: bool = True
    """A scale for each output channel of a weight, rather than one a tensor."""

    reduce_range: bool = False
    """Weights keep to 7 bits: for processors whose 8-bit products saturate when added in pairs."""

    signed_activations: bool = False
    """int8 activations rather than uint8. onnxruntime fuses uint8 × int8 on x86-64 and has its better kernels for
    int8 × int8 on Arm; the wrong one leaves most convolutions in float."""

    keep_float: tuple[str, ...] = ()
    """Layers that stay in float, by the names of `Backend.layer_errors`; int8 precisions only."""

    correct_bias: bool = False
    """Take the mean error of each channel out of its bias; tflite ignores it."""

    accuracy: AccuracyControl | None = None
    """For int8 by one of `ACCURACY_CONTROL`: keep layers in float until the drop holds."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                "precision",
                expected=f"one of {', '.join(PRECISIONS)}",
                got=repr(self.precision),
                hint=did_you_mean(self.precision, PRECISIONS),
            )

    @classmethod
    def for_target(cls, precision: str, target: Target) -> QuantSpec:
        """The choices that onnxruntime's quantization guide gives for the target's processor."""
        return cls(
            precision,
            reduce_range=target.int8_saturates,
            signed_activations=target.match["machine"] in ("aarch64", "arm64"),
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled model, checked to hold the types that its precision claims; digest and size are over all its files."""

    path: Path
    sha256: str
    size_bytes: int
    weight_types: dict[str, int]
    """Bytes of constants by numpy dtype name."""
    precision: str
    companions: tuple[Path, ...] = ()
    """Further files that belong to it, beside it and of the same stem."""
    notes: tuple[str, ...] = ()
    """What a person should know of how it was made."""
    oldest: str = ""
    """Oldest version of the runtime that opens it, where the precision asks for more than targets usually promise."""

    biases_corrected: bool = False
    """Whether `QuantSpec.correct_bias` was followed."""

    def describe(self, folder: Path) -> None:
        """Write beside its files, which lie in ``folder``, all else that is known of it."""
        said = asdict(self) | {"path": self.path.name, "companions": [path.name for path in self.companions]}
        (folder / _DESCRIPTION).write_text(json.dumps(said), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """The artifact that `describe` left there, or in a folder whose files were copied to this one."""
        said = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        said["path"] = folder / said["path"]
        said["companions"] = tuple(folder / name for name in said["companions"])
        said["notes"] = tuple(said["notes"])
        return cls(**said)


@dataclass(frozen=True, slots=True)
class LayerError:
    """What quantization does to one layer: ``error`` is ‖a-b‖₂/‖b‖₂ of its outputs on calibration data, against float.

    ``name`` is the backend's own, as `QuantSpec.keep_float` takes it.
    """

    name: str
    error: float


def worst_first(errors: Iterable[LayerError]) -> tuple[LayerError, ...]:
    """StageError where an error is not finite."""
    found = sorted(errors, key=lambda layer: (-layer.error, layer.name))
    if not all(math.isfinite(layer.error) for layer in found):
        raise StageError("layer errors", expected="finite activations on the calibration data", got="NaN or infinity")
    return tuple(found)


class Backend(Protocol):
    """Compiles a model for one runtime."""

    @property
    def name(self) -> str:
        """Name of the runtime, as targets and manifests say it."""
        ...

    @property
    def consumes(self) -> Source: ...

    @property
    def suffix(self) -> str:
        """Ending of its artifacts."""
        ...

    @property
    def precisions(self) -> tuple[str, ...]: ...

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes a model whose batch is free."""
        ...

    def newest_onnx(self, oldest: str) -> tuple[int, int | None] | None:
        """Newest opset and IR version that this version of the runtime reads, None for any; None alone where `compile`
        tells, or converts the file."""
        ...

    @property
    def host_runtime(self) -> str:
        """The runtime that runs its artifacts while building: its own, or one that stands in for it."""
        ...

    def compile(
        self,
        model: Path,
        runtime: RuntimeSpec,
        quant: QuantSpec,
        calibration: Calibration | None,
        out: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Write the artifact to ``out``, in one step, after all checks.

        Inputs and outputs keep their names, shapes and types; inside, weights have the type of the precision.
        ``metadata`` is stored in the file by its format's convention.

        Raises:
            DataError: calibration is needed and missing, empty, not finite, or does not fit the inputs.
            StageError: the result is invalid, or does not hold the types it claims. Nothing is written.
        """
        ...

    def activation_bytes(self, artifact: Path) -> int | None:
        """The memory of the activations of one inference by the graph, for one sample; None where the file does not
        tell. See `liveness`."""
        ...

    def operators(self, artifact: Path) -> OperatorGraph | None:
        """What it is made of, by the names that its runtime's own profiler has; None where the file does not tell."""
        ...

    def layer_errors(self, model: Path, artifact: Path, calibration: Calibration) -> tuple[LayerError, ...]:
        """Of an int8 artifact that was compiled from ``model``, worst first."""
        ...


def check_precision(backend: Backend, quant: QuantSpec) -> None:
    """ConfigError for a precision the backend does not have."""
    if quant.precision not in backend.precisions:
        raise ConfigError(
            f"precision of backend {backend.name}",
            expected=f"one of {', '.join(backend.precisions)}",
            got=quant.precision,
        )


def is_finite(array: npt.NDArray[Any]) -> bool:
    """No NaN and no infinity; whole numbers always are."""
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
