"""Converters in a process of their own: a job goes there as a file, and its crash comes back as an error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import native
from ..errors import StageError, UnsupportedOpError
from . import calibration as calibrating
from .base import Batch, LayerError, worst_first

_TIMEOUT_S = 1800.0


def run(
    worker: str, job: Mapping[str, Any], folder: Path, *, tool: str, exit_codes: Mapping[int, str] | None = None
) -> str:
    """Run a module of this package on a job, which is written to ``folder``; what it gives back is `native.run`'s."""
    written = folder / "job.json"
    written.write_text(json.dumps(job), encoding="utf-8")
    module = f"{__package__}.{worker}"
    return native.run(module, [written], tool=tool, timeout_s=_TIMEOUT_S, exit_codes=exit_codes)


def refusal(made: Path, form: str, tool: str) -> StageError | UnsupportedOpError:
    """What ``tool`` cannot take: a worker has written ``operator``, ``module`` and ``error`` in place of the file."""
    said = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
    if not said["operator"]:
        what = f"conversion to {form}"
        return StageError(what, expected=f"a model that {tool} can convert", got=said["error"])
    return UnsupportedOpError(
        f"operator {said['operator']} of module {said['module'] or 'the model itself'} has no {form} form",
        expected=f"operators that {tool} can convert",
        got=said["error"],
        hint="replace it in that module by plain torch operators",
    )


def layer_errors(
    worker: str, job: Mapping[str, Any], feeds: Iterable[Batch], folder: Path, *, tool: str
) -> tuple[LayerError, ...]:
    """What a worker finds on ``feeds``, of which it reads the arrays in the order of the job's ``inputs``."""
    found = folder / "errors.json"
    calibrating.spool(feeds, job["inputs"], folder / "calibration")
    whole = {**job, "calibration": str(folder / "calibration"), "out": str(found)}
    if failure := run(worker, whole, folder, tool=tool):
        raise StageError("layer errors", expected=f"a model that {tool} can run", got=failure)
    names, errors = json.loads(found.read_text(encoding="utf-8"))
    return worst_first(LayerError(name, error) for name, error in zip(names, errors, strict=True))
