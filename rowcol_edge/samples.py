"""The embedded samples: small trained models with their data, under ``sample_models/NAME/sample.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device.preprocess import Preprocess
from .errors import ConfigError, ModelError, did_you_mean
from .resources import samples_dir

_KEYS = {
    "title", "description", "factory", "weights", "data", "task", "labels", "positive", "metric",
    "preprocess", "inputs", "provenance", "requires",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One embedded sample; paths are absolute, ``factory`` is ``FILE.py:function``.

    Attributes:
        weights: None where the factory brings them, as of an installed package.
        preprocess: None where inputs are no pictures.
    """

    name: str
    title: str
    description: str
    factory: str
    weights: Path | None
    data: Path
    task: str
    labels: tuple[str, ...]
    positive: str | None
    metric: str
    preprocess: Preprocess | None
    packages: tuple[str, ...]
    licence: Path


def available() -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in samples_dir().glob("*/sample.toml")))


def load(name: str) -> Sample:
    """The sample of that name.

    Raises:
        ModelError: no such sample; the message names the nearest ones.
        ConfigError: its ``sample.toml`` has unknown or missing keys.
    """
    folder = samples_dir() / name
    if name not in available():
        raise ModelError(
            f"sample:{name}",
            expected=f"one of {', '.join(available())}",
            got="no such sample",
            hint=did_you_mean(f"sample:{name}", [f"sample:{known}" for known in available()]),
        )
    values = tomllib.loads((folder / "sample.toml").read_text(encoding="utf-8"))
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise ConfigError(f"{name}/sample.toml", expected=f"keys out of {sorted(_KEYS)}", got=f"unknown {unknown}")
    try:
        return _sample(name, folder, values)
    except KeyError as e:
        raise ConfigError(f"{name}/sample.toml", expected=f"a key {e}", got="none") from e


def _sample(name: str, folder: Path, values: Mapping[str, Any]) -> Sample:
    weights, recipe = values.get("weights"), values.get("preprocess")
    return Sample(
        name=name,
        title=values["title"],
        description=values["description"],
        factory=str(folder / values["factory"]),
        weights=None if weights is None else folder / weights,
        data=folder / values["data"],
        task=values["task"],
        labels=tuple(values.get("labels", ())),
        positive=values.get("positive"),
        metric=values["metric"],
        preprocess=None if recipe is None else Preprocess.from_dict(recipe),
        packages=tuple(values.get("requires", {}).get("packages", ())),
        licence=folder / "LICENSE-weights.md",
    )
