"""A sweep: builds of models × targets × runtimes × precisions × budgets, written as one file.

The file is a ``rowcol.toml`` in which those five may be lists. Each combination is an ordinary build with a folder of
its own below ``out``, so that what has not changed is kept and what builds share is taken from the cache.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import config, targets
from ..device.files import write_whole
from ..device.runtimes import RUNTIMES
from ..errors import ConfigError, FleetError, did_you_mean
from .jobs import identity
from .queueing import DONE, Ended, Job

SCHEMA = 1
"""Of ``sweep.json``. History: 1 – first version."""
AXES = ("model", "target", "runtime", "precision", "budget")
BUILT, UNCHANGED, FAILED, LEFT_OUT = "built", "unchanged", "failed", "not offered"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination and what became of it. ``reason``: why it failed, or is not offered by its target.

    Of the default arm: ``size_bytes`` of its file, ``dense_bytes`` of the dense one at its precision, ``drop_pp`` with
    its interval on ``split``; None where it is not known.
    """

    model: str
    target: str
    runtime: str
    precision: str
    budget: str
    state: str = ""
    reason: str = ""
    seconds: float = 0.0
    path: str = ""
    arm: str = ""
    size_bytes: int | None = None
    dense_bytes: int | None = None
    parameters: int | None = None
    drop_pp: float | None = None
    drop_low_pp: float | None = None
    drop_high_pp: float | None = None
    split: str = ""

    @property
    def name(self) -> str:
        parts = (self.model, self.target, self.runtime, self.precision, self.budget)
        return " ".join(filter(None, parts))


@dataclass(frozen=True, slots=True)
class Sweep:
    """The cells in order, and the job of each that is to be built, by its place among them."""

    out: Path
    cells: tuple[Cell, ...]
    jobs: dict[int, Job]

    def write(self, cells: Iterable[Cell]) -> Sweep:
        """The same with what became of its cells, and ``sweep.json``."""
        found = replace(self, cells=tuple(cells))
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / "sweep.json", json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "cells": [asdict(cell) for cell in self.cells]}

    def raise_if_incomplete(self) -> None:
        failed = [cell for cell in self.cells if cell.state == FAILED]
        if failed:
            raise FleetError(
                f"{len(failed)} of {len(self.jobs)} builds failed", expected="all of them built",
                got="; ".join(f"{cell.name}: {cell.reason}" for cell in failed[:3]),
                hint="repeat the command when that is put right: it keeps what was built",
            )  # fmt: skip


def read(path: Path, out: Path | None = None) -> Sweep:
    """The sweep of a file. ConfigError, TargetError: what no build could take, before anything is built."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(str(path), expected="a readable file of a sweep", got=e.strerror or str(e)) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(str(path), expected="valid TOML", got=str(e)) from e
    axes = [_axis(path, key, values.pop(key, None)) for key in AXES]
    folder = out or Path(str(values.pop("out", "sweep")))
    values.pop("out", None)
    cells, jobs = [], {}
    for combination in itertools.product(*axes):
        said = {key: value for key, value in zip(AXES, combination, strict=True) if value is not None}
        options = config.make({**values, **said}, str(path))
        cell = Cell(options.model, options.target[0], options.runtime, options.precision, options.budget or "")
        reason = _not_offered(cell)
        if reason:
            cells.append(replace(cell, state=LEFT_OUT, reason=reason))
            continue
        key = identity(values, said)
        own = str(folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', cell.name).strip('-')[:80]}-{key[:8]}")
        work = {"kind": "build", "options": {**values, **said, "out": own}, "folder": str(Path.cwd())}
        jobs[len(cells)] = Job(key, cell.name, work)
        cells.append(cell)
    return Sweep(folder, tuple(cells), jobs)


def became(cell: Cell, ended: Ended) -> Cell:
    """A cell with what its build gave."""
    cell = replace(cell, seconds=round(ended.seconds, 1))
    if ended.outcome.state != DONE:
        return replace(cell, state=FAILED, reason=ended.outcome.reason)
    built: Mapping[str, Any] = ended.outcome.result
    arms = {arm["name"]: arm for arm in built["manifest"]["arms"]}
    arm = arms[built["manifest"]["default_arm"]]
    split = next((name for name in ("test", "selection") if "drop_pp" in arm["quality"].get(name, {})), "")
    quality = arm["quality"].get(split, {})
    return replace(
        cell,
        state=UNCHANGED if built["reused"] else BUILT,
        path=built["path"],
        arm=arm["name"],
        size_bytes=arm["size_bytes"],
        dense_bytes=arms.get(f"dense@{arm['precision']}", {}).get("size_bytes"),
        parameters=arm["parameters"],
        drop_pp=quality.get("drop_pp"),
        drop_low_pp=quality.get("ci_low_pp"),
        drop_high_pp=quality.get("ci_high_pp"),
        split=split,
    )


def _axis(path: Path, key: str, value: Any) -> list[str | None]:
    values = [None] if value is None else value if isinstance(value, list) else [value]
    if not values or not all(item is None or isinstance(item, str) for item in values):
        raise ConfigError(f"{path}: {key}", expected="a text or a list of texts", got=repr(value))
    if len(set(values)) != len(values):
        raise ConfigError(f"{path}: {key}", expected="each value once", got=repr(value))
    return values


def _not_offered(cell: Cell) -> str:
    """Why a target cannot be built for like that; empty if it can. TargetError, ConfigError: no such thing."""
    if cell.runtime not in RUNTIMES:
        hint = did_you_mean(cell.runtime, RUNTIMES)
        raise ConfigError("runtime", expected=f"one of {', '.join(RUNTIMES)}", got=repr(cell.runtime), hint=hint)
    offered = {spec.name: spec.precisions for spec in targets.load(cell.target).runtimes}
    if cell.runtime not in offered:
        return f"{cell.target} has {', '.join(offered)}"
    if cell.precision not in (*offered[cell.runtime], "auto"):
        return f"{cell.runtime} there: {', '.join(offered[cell.runtime])}"
    return ""
