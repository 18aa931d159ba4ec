"""The embedded samples, under ``sample_models/NAME/sample.toml``: small trained models with their data, and
architectures with random weights and none."""

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

    An architecture alone has neither ``weights``, ``data`` nor ``licence`` (of the weights): all three are None.

    Attributes:
        weights: None where the factory brings them, as of an installed package.
        preprocess: None where inputs are no pictures.
    """

    name: str
    title: str
    description: str
    factory: str
    weights: Path | None
    data: Path | None
    task: str
    labels: tuple[str, ...]
    positive: str | None
    metric: str
    preprocess: Preprocess | None
    packages: tuple[str, ...]
    licence: Path | None

    @property
    def trained(self) -> bool:
        return self.data is not None

    @property
    def alone(self) -> str:
        """What a person should know of an architecture alone; empty for a trained sample."""
        return "" if self.trained else f"sample:{self.name} is an architecture alone, with random weights and no data"


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
    file, _, function = values["factory"].partition(":")
    trained, recipe = "data" in values, values.get("preprocess")
    if "weights" in values and not trained:
        raise ConfigError(f"{name}/sample.toml", expected="data beside the weights", got="weights alone")
    return Sample(
        name=name,
        title=values["title"],
        description=values["description"],
        factory=f"{folder / file}:{function}",
        weights=folder / values["weights"] if "weights" in values else None,
        data=folder / values["data"] if trained else None,
        task=values["task"],
        labels=tuple(values.get("labels", ())),
        positive=values.get("positive"),
        metric=values["metric"],
        preprocess=None if recipe is None else Preprocess.from_dict(recipe),
        packages=tuple(values.get("requires", {}).get("packages", ())),
        licence=folder / "LICENSE-weights.md" if trained else None,
    )
