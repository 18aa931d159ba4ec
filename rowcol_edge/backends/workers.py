"""Converters in a process of their own: a job goes there as a file, and its crash comes back as an error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import native
from ..errors import MissingDependencyError, StageError, UnsupportedOpError
from . import calibration as calibrating
from .base import Batch, LayerError, worst_first

_TIMEOUT_S = 1800.0
NOT_INSTALLED, REFUSED = 40, 41
"""Exit codes by which a worker says that its packages are missing, or what its converter cannot take."""
_MISSING, _REFUSED = "not installed", "refused"


def run(
    worker: str, job: Mapping[str, Any], folder: Path, *, tool: str, exit_codes: Mapping[int, str] | None = None
) -> str:
    """Run a module of this package on a job, which is written to ``folder``; what it gives back is `native.run`'s."""
    written = folder / "job.json"
    written.write_text(json.dumps(job), encoding="utf-8")
    module = f"{__package__}.{worker}"
    return native.run(module, [written], tool=tool, timeout_s=_TIMEOUT_S, exit_codes=exit_codes)


@dataclass(frozen=True, slots=True)
class Names:
    """What a conversion's errors call its extra, the tool whose process it is, its format, and what converts."""

    extra: str
    tool: str
    form: str
    converters: str


def convert(worker: str, job: Mapping[str, Any], folder: Path, names: Names) -> None:
    """Run a converter, which writes the job's ``out``.

    MissingDependencyError: its packages are not installed. UnsupportedOpError: an operator that it cannot take.
    StageError: any other failure.
    """
    made = Path(job["out"])
    own = {NOT_INSTALLED: _MISSING, REFUSED: _REFUSED}
    failure = run(worker, job, folder, tool=names.tool, exit_codes=own)
    if failure == _MISSING:
        raise MissingDependencyError(f"compiling for {names.extra}", package=f"rowcol-edge[{names.extra}]")
    if failure == _REFUSED:
        raise _refusal(json.loads(made.with_suffix(".json").read_text(encoding="utf-8")), names)
    if failure or not made.is_file():
        raise StageError(
            f"compile {job.get('precision', 'float')}",
            expected=f"a model that {names.converters} can convert",
            got=failure or "no file",
            hint="the program itself is valid: torch runs it",
        )


def _refusal(said: Mapping[str, str], names: Names) -> StageError | UnsupportedOpError:
    """Of what a worker has written in place of the file: ``operator``, ``module`` and ``error``."""
    if not said["operator"]:
        what = f"conversion to {names.form}"
        return StageError(what, expected=f"a model that {names.converters} can convert", got=said["error"])
    return UnsupportedOpError(
        f"operator {said['operator']} of module {said['module'] or 'the model itself'} has no {names.form} form",
        expected=f"operators that {names.converters} can convert",
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
