"""What a build is asked to do: the same words in `rowcol.toml`, on the command line and in Python."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from .budgets import Budgets
from .device import manifest
from .device.files import write_whole
from .device.manifest import CONTRACTS
from .device.preprocess import Preprocess
from .errors import ConfigError, did_you_mean

PRECISIONS = (*manifest.PRECISIONS, "auto")
ALL = "all"
DEFAULT_BUDGET = "drop<=0.5pp"
_HEADER = "# Repeats this build, from the folder it ran in: rowcol-edge build --config rowcol.toml\n"


class Options(TypedDict, total=False):
    """The fields of `BuildOptions` as the Python functions take them; None means not said."""

    target: str | os.PathLike[str] | Sequence[str] | None
    out: str | os.PathLike[str] | None
    weights: str | os.PathLike[str] | None
    runtime: str | None
    precision: str | None
    calib: str | os.PathLike[str] | None
    calib_size: int | str | None
    select: str | os.PathLike[str] | None
    test: str | os.PathLike[str] | None
    metric: str | None
    budget: str | None
    energy: float | None
    plan: str | os.PathLike[str] | None
    recover: int | None
    recover_data: str | os.PathLike[str] | None
    contract: str | None
    labels: str | Sequence[str] | None
    positive: str | None
    preprocess: str | Preprocess | Mapping[str, Any] | None
    bake_preprocess: bool | None
    dynamic_batch: bool | None
    dense: bool | None
    accuracy_control: bool | None
    refit: bool | None
    zip: bool | None
    wheelhouse: bool | None


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """One build. Paths are kept as the user wrote them, relative to where the command runs.

    Attributes:
        model: ``sample:NAME``, ``package.module:factory``, ``path/file.py:factory`` or a ``.pt2``.
        target: names of targets (or paths of their TOML files); one bundle for each.
        precision: of the packaged arms; ``auto`` takes the fastest measured one within the budget.
        calib, select, test: where the three splits come from; a sample brings its own.
        calib_size: how many of the calibration samples the quantizer gets, a diverse subset; ``all`` for every one.
        metric: how quality is judged; None with unlabelled data.
        budget: ``drop<=0.5pp,size<=4MB,…``; the default holds where labels and a metric are there.
        energy: keep this share of what each layer gives to the model's output instead of searching.
        plan: apply this plan file instead of searching.
        refit: fit the weights once more, to inputs that are already compressed; None for yes, or as a plan file says.
        recover: epochs of distillation from the original that a factored arm gets; 0 for none.
        recover_data: inputs to distil on, labelled or not; the calibration data where none are named.
        bake_preprocess: the graph takes camera frames, uint8 (N, height, width, channels), and normalises them itself.
        contract: what the outputs mean: classify, segment, anomaly_map, detect or embed.
        accuracy_control: have the quantizer itself keep layers in float until the budget's drop holds (openvino, int8).
        dense: also package the dense arms.
        wheelhouse: also put the runtime's wheels, for the target's Pythons, beside the bundle.
    """

    model: str
    target: tuple[str, ...] = ("generic-x86",)
    out: str = "dist"
    weights: str | None = None
    runtime: str = "onnxruntime"
    precision: str = "int8"
    calib: str | None = None
    calib_size: int | str = 128
    select: str | None = None
    test: str | None = None
    metric: str | None = None
    budget: str | None = None
    energy: float | None = None
    plan: str | None = None
    refit: bool | None = None
    recover: int = 0
    recover_data: str | None = None
    contract: str | None = None
    labels: tuple[str, ...] = ()
    positive: str | None = None
    preprocess: Preprocess | None = None
    bake_preprocess: bool = False
    dynamic_batch: bool = False
    dense: bool = True
    accuracy_control: bool = False
    zip: bool = True
    wheelhouse: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                "precision",
                expected=f"one of {', '.join(PRECISIONS)}",
                got=repr(self.precision),
                hint=did_you_mean(self.precision, PRECISIONS),
            )
        if self.contract is not None and self.contract not in CONTRACTS:
            raise ConfigError("contract", expected=f"one of {', '.join(CONTRACTS)}", got=repr(self.contract))
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ConfigError("energy", expected="a share in (0, 1]", got=str(self.energy))
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError("labels", expected="names that differ", got=", ".join(self.labels))
        if self.positive is not None and self.labels and self.positive not in self.labels:
            raise ConfigError(
                "positive",
                expected=f"one of the labels {', '.join(self.labels)}",
                got=repr(self.positive),
                hint=did_you_mean(self.positive, self.labels),
            )
        if not self.target:
            raise ConfigError("target", expected="at least one target", got="none")
        chosen = [n for n in ("plan", "energy") if getattr(self, n) is not None]
        if len(chosen) > 1:
            raise ConfigError("plan", expected="a plan file or an energy", got="both")
        if self.plan is not None and self.refit is not None:
            hint = "set refit in the plan file"
            raise ConfigError("refit", expected="a search: a plan file says itself", got="a plan file", hint=hint)
        if self.recover_data is not None and not self.recover:
            hint = "say how many epochs: --recover 3"
            raise ConfigError("recover_data", expected="epochs of recovery besides", got="none", hint=hint)
        Budgets.parse(self.budget or "")

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, as `rowcol.toml` holds it."""
        values: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("model", "target", "out") or value != option.default:
                values[option.name] = value.to_dict() if isinstance(value, Preprocess) else value
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


def read(path: Path, overrides: Mapping[str, Any]) -> BuildOptions:
    """Options from a `rowcol.toml`, with what was said on the command line on top.

    Raises:
        ConfigError: unreadable file, unknown key (names the nearest known one), wrong type or value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(str(path), expected="a readable rowcol.toml", got=e.strerror or str(e)) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(str(path), expected="valid TOML", got=str(e)) from e
    return make({**values, **overrides}, str(path))


def make(values: Mapping[str, Any], where: str = "options") -> BuildOptions:
    """Options from plain values, each checked for its name and type; None means not said."""
    known = {option.name: option for option in fields(BuildOptions)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: key {key!r}", expected="a known key", got="an unknown one", hint=hint)
        if value is not None:
            checked[key] = _checked(key, value, where)
    if "model" not in checked:
        raise ConfigError(f"{where}: model", expected="a model reference", got="none", hint="e.g. sample:elpv-resnet18")
    return BuildOptions(**checked)


def write(options: BuildOptions, path: Path) -> None:
    """Write the `rowcol.toml` that repeats this build, in one step; a file that a person wrote is left alone."""
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(_HEADER.encode())):
        return
    import tomli_w  # a command that only shows results does not need it

    write_whole(path, _HEADER + tomli_w.dumps(options.to_dict()))


def parse_preprocess(text: str) -> Preprocess:
    """``mode=RGB,size=224x224,mean=0.485/0.456/0.406,std=…,scale=…,resample=…`` as written on the command line."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if not separator:
            raise ConfigError("preprocess", expected="key=value pairs separated by commas", got=repr(part))
        try:
            if key == "size":
                height, _, width = value.lower().partition("x")
                values["height"], values["width"] = int(height), int(width)
            elif key in ("mean", "std"):
                values[key] = tuple(float(v) for v in value.split("/"))
            elif key == "scale":
                numerator, _, denominator = value.partition("/")
                values[key] = float(numerator) / float(denominator or 1.0)
            else:
                values[key] = int(value) if key in ("height", "width") else value
        except (ValueError, ZeroDivisionError) as e:
            raise ConfigError(
                f"preprocess {key}", expected="numbers, e.g. size=224x224, mean=0.5", got=repr(value)
            ) from e
    channels = 1 if values.get("mode") == "L" else 3
    values.setdefault("mean", (0.0,) * channels)
    values.setdefault("std", (1.0,) * channels)
    return Preprocess.from_dict(values)


_TUPLES = ("target", "labels")
_FLAGS = ("accuracy_control", "refit", "bake_preprocess", "dynamic_batch", "dense", "zip", "wheelhouse")


def _checked(key: str, value: Any, where: str) -> Any:
    """A value of the right type, lists made tuples; the error names the key."""
    if key == "preprocess":
        return _checked_preprocess(value, where)
    if key in _TUPLES:
        if isinstance(value, (str, os.PathLike)):
            value = os.fspath(value)
            return tuple(v.strip() for v in value.split(",") if v.strip())
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise _wrong(key, "a list of names", value, where)
    if key in _FLAGS:
        if not isinstance(value, bool):
            raise _wrong(key, "true or false", value, where)
        return value
    if key == "calib_size":
        return _checked_size(value, where)
    if key in ("recover", "energy"):
        return _checked_number(key, value, where)
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong(key, "text", value, where)
    return os.fspath(value)


def _checked_number(key: str, value: Any, where: str) -> int | float:
    if key == "recover":
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _wrong(key, "a number of epochs from 0", value, where)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(key, "a number", value, where)
    return float(value)


def _checked_size(value: Any, where: str) -> int | str:
    if value == ALL:
        return ALL
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong("calib_size", f"a number of samples from 1, or {ALL}", value, where)
    return value


def _checked_preprocess(value: Any, where: str) -> Preprocess:
    if isinstance(value, str):
        return parse_preprocess(value)
    if isinstance(value, Mapping):
        return Preprocess.from_dict(value)
    if isinstance(value, Preprocess):
        return value
    raise _wrong("preprocess", "a table or key=value text", value, where)


def _wrong(key: str, expected: str, value: Any, where: str) -> ConfigError:
    return ConfigError(f"{where}: {key}", expected=expected, got=f"{type(value).__name__} {value!r}")
