"""The public functions; the command line says the same with the same words."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from . import config
from .config import Options
from .device.progress import silent
from .errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from .cache import Cache
    from .coverage import DataReport
    from .device.bundle import Bundle
    from .device.doctor import Diagnosis
    from .device.profile import Profile
    from .device.verify import VerifyReport
    from .inspection import Inspection
    from .job import Progress
    from .models import LoadedModel
    from .pipeline import Built, Factored
    from .report.change import Change
    from .report.compare import ComparisonTable
    from .report.figures import Figures
    from .report.gate import GateReport

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEMO_PROFILE_SECONDS = 25.0
#: how the command line says the ways to a board
_REACH = {"known_hosts": "--known-hosts", "python": "--board-python", "folder": "--board-folder"}


def _outside_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` as it works outside of `torch.inference_mode`, also for who calls it there: what is made in that
    mode can be neither traced nor trained."""

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        torch = sys.modules.get("torch")  # what has not been imported is in no mode
        with contextlib.nullcontext() if torch is None else torch.inference_mode(False):
            return function(*args, **kwargs)

    return called


@_outside_inference_mode
def build(
    model: str | nn.Module,
    *,
    force: bool = False,
    cache: bool = True,
    progress: Progress = silent,
    **options: Unpack[Options],
) -> list[Built]:
    """Build one bundle per target.

    Args:
        model: ``sample:NAME``, ``package.module:factory``, ``path/file.py:factory``, a ``.pt2``, or a module (which is
            copied, never changed).
        force: build again even if nothing has changed.
        cache: keep what the stages make in the user's cache folder, and use what lies there; see `rowcol_edge.cache`.
        progress: called with a label, the steps done and the steps in all.
        options: what to build, see `rowcol_edge.config.BuildOptions`.

    Raises:
        RowcolError: see `rowcol_edge.errors`; nothing is left half-written.
    """
    from . import pipeline

    return pipeline.build(*_asked(model, options), force=force, cache=_cache(cache), progress=progress)


def _cache(wanted: bool) -> Cache | None:
    from .cache import Cache

    return Cache.of_user() if wanted else None


def _asked(model: str | nn.Module, options: Options) -> tuple[config.BuildOptions, LoadedModel | None]:
    """Checked options, and the model where it came as a module."""
    if isinstance(model, str):
        return config.make({**options, "model": model}), None
    from . import models

    weights = options.get("weights")
    loaded = models.load(model, None if weights is None else os.fspath(weights))
    return config.make({**options, "model": f"{type(model).__module__}:{type(model).__qualname__}"}), loaded


@_outside_inference_mode
def build_from(
    path: Path | None,
    options: dict[str, Any],
    *,
    force: bool = False,
    cache: bool = True,
    progress: Progress = silent,
) -> list[Built]:
    """Build from a `rowcol.toml` (the one in this folder if no model is named), with options on top."""
    from . import pipeline

    if path is None and "model" not in options and Path("rowcol.toml").is_file():
        path = Path("rowcol.toml")
    made = config.read(path, options) if path is not None else config.make(options)
    return pipeline.build(made, force=force, cache=_cache(cache), progress=progress)


@_outside_inference_mode
def factor(
    model: str | nn.Module, *, cache: bool = True, progress: Progress = silent, **options: Unpack[Options]
) -> Factored:
    """Choose ranks and rewrite the model; with ``out`` also write plan.toml, weights and the factored ``.pt2``.

    Args:
        options: as for `build`; ``target`` only gives the rank multiple, ``precision`` what a budget in bytes is
            predicted at.
    """
    from . import pipeline

    out = options.pop("out", None)
    return pipeline.factor(
        *_asked(model, options), out=None if out is None else Path(out), cache=_cache(cache), progress=progress
    )


@_outside_inference_mode
def inspect(
    model: str | nn.Module,
    *,
    weights: str | None = None,
    calib: str | None = None,
    preprocess: Any = None,
    plot: str | Path | None = None,
    progress: Progress = silent,
) -> Inspection:
    """How much of its row space and column space each layer uses on real inputs, and what factoring could save.

    Args:
        plot: an ``.html`` file that receives the spectra of both spaces of every layer as charts.
    """
    from . import datasets, inspection, job, models
    from .report import spectra

    if plot is not None:
        spectra.check(Path(plot))
    loaded = models.load(model, weights)
    options = config.make({"model": loaded.reference, "preprocess": preprocess})
    recipe = options.preprocess or (loaded.sample.preprocess if loaded.sample else None)
    if calib is not None:
        loaded = job.with_inputs(loaded, calib)
    split = datasets.load(calib, "calibration", loaded.inputs, sample=loaded.sample, preprocess=recipe)
    if split is None:
        raise DataError(
            "calibration data",
            expected="some real inputs",
            got=(loaded.sample and loaded.sample.alone) or "none",
            hint="--calib FOLDER, .npz or module:callable",
        )
    found = inspection.inspect(loaded, split, progress)
    if plot is not None:
        spectra.write(found, Path(plot))
    return found


@_outside_inference_mode
def data(model: str | nn.Module, *, progress: Progress = silent, **options: Unpack[Options]) -> DataReport:
    """What the splits hold: the calibration subset and what it covers, near-duplicates, leakage between splits.

    Args:
        options: as for `build`; those that name the model and the data are used.
    """
    from . import coverage, job

    return coverage.of_job(job.prepare(*_asked(model, options), progress, judges=False), progress)


def profile(
    bundle: Bundle | str | Path,
    *,
    on: str | None = None,
    board: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Profile:
    """Measure the arms of a bundle.

    Args:
        on: a board, ``ssh://[user@]host[:port]`` or ``adb:SERIAL``; this machine if not given.
        board: how it is reached: ``known_hosts``, ``python`` and ``folder``, see `rowcol_edge.fleet.remote.profile`.
        progress: called with a label, the steps done and the steps in all.
        options: ``arms``, ``baseline``, ``blocks``, ``seconds``, ``threads``, ``memory``, ``energy`` and ``ops``, see
            `rowcol_edge.device.measure.profile`.
    """
    from .device.bundle import Bundle

    if not isinstance(bundle, Bundle):
        with Bundle.open(bundle) as opened:
            return profile(opened, on=on, board=board, progress=progress, **options)
    given = {key: value for key, value in options.items() if value is not None}
    reach = {key: value for key, value in (board or {}).items() if value is not None}
    if on is not None:
        from .device.schedule import time_budget
        from .fleet import remote

        time_budget(given.get("seconds"))  # before anything is sent
        return remote.profile(bundle, on, **reach, progress=progress, **given)
    if reach:
        raise ConfigError(
            ", ".join(_REACH.get(name, name) for name in reach),
            expected="a board to use it for",
            got="none",
            hint="name it with --on",
        )
    from .device.measure import profile as measure

    return measure(bundle, progress=progress, **given)


def doctor(target: str | None = None) -> Diagnosis:
    """What the build side has and lacks on this machine, in general or for one target."""
    from . import readiness, targets

    return readiness.diagnose(None if target is None else targets.load(target))


def compare(bundles: Sequence[Bundle | str | Path]) -> ComparisonTable:
    """Dense against factored over bundles: sizes, quality and, where they were profiled, latency and memory."""
    from .device.bundle import Bundle
    from .report.compare import compare as make

    return make([b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles])


def compare_profiles(
    old: str | Path, new: str | Path, *, bundles: Sequence[str | Path] = (), allow: Sequence[str] = ()
) -> Change:
    """Before and after: the change of each arm from one profile to another, two sessions under the same conditions.

    Args:
        bundles: those that were measured, for quality; a profile in the ``profiles/`` of its bundle needs none.
        allow: conditions that differ on purpose, see `rowcol_edge.report.sessions.ALLOWED`.

    Raises:
        NotComparableError: names every condition that differs.
    """
    from .report import sessions

    return sessions.compare(Path(old), Path(new), bundles=[Path(path) for path in bundles], allow=allow)


def gate(
    profile: str | Path,
    *,
    arm: str | None = None,
    baseline: str | None = None,
    bundle: str | Path | None = None,
    **limits: Any,
) -> GateReport:
    """Hold an arm of a profile to limits; see `rowcol_edge.report.gate.gate`.

    Args:
        limits: ``max_latency_ratio``, ``max_drop`` (``"0.5pp"``), ``max_bytes`` (``"4MB"``) and ``max_memory``
            (``"64MiB"``), at least one of them.
    """
    from .report.gate import Limits
    from .report.gate import gate as judge

    where = None if bundle is None else Path(bundle)
    return judge(Path(profile), Limits.parse(**limits), arm=arm, baseline=baseline, bundle=where)


def write_report(
    profiles: Sequence[str | Path],
    *,
    bundles: Sequence[str | Path] = (),
    out: str | Path = "report.html",
    json: str | Path | None = None,
    csv: str | Path | None = None,
) -> Figures:
    """Show profiles as one HTML page that loads nothing, and return what it shows.

    Args:
        profiles: their files.
        bundles: those that were measured, for quality and plan; a profile in a bundle's ``profiles/`` needs none.
        out: the page; a file that is there is replaced in one step, as ``json`` and ``csv`` are.
        json: the same figures, see `rowcol_edge.report.figures`.
        csv: one row an arm and profile.

    Raises:
        ConfigError: a file that would be written is one that is read, or the same as another.
    """
    from .device.files import write_whole
    from .report import page, reading

    page.check()
    _check_apart([out, json, csv], [*profiles, *bundles])
    found = reading.load([Path(path) for path in profiles], [Path(path) for path in bundles])
    for path, text in ((out, page.page(found)), (json, found.json()), (csv, found.csv())):
        if path is not None:
            write_whole(Path(path), text)
    return found


def _check_apart(written: Sequence[str | Path | None], read: Sequence[str | Path]) -> None:
    """ConfigError where one of the files to be written is another of them, or one that is read."""
    seen = {Path(path).resolve(): "read" for path in read}
    for path in written:
        if path is None or (Path(path).exists() and not Path(path).is_file()):
            continue  # two may go to one device
        if known := seen.get(Path(path).resolve()):
            raise ConfigError(str(path), expected="a file for this alone", got=f"one that is also {known}")
        seen[Path(path).resolve()] = "written"


def verify(bundle: Bundle | str | Path, *, progress: Progress = silent) -> VerifyReport:
    """Check every digest and run the golden inputs through every arm."""
    from .device.bundle import Bundle
    from .device.verify import verify as check

    if isinstance(bundle, Bundle):
        return check(bundle, progress=progress)
    with Bundle.open(bundle, check=False) as opened:  # verify checks it itself
        return check(opened, progress=progress)


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made: the bundle, its profile, the comparison and one prediction."""

    built: Built
    profile: Profile
    table: ComparisonTable
    image: str
    truth: str
    prediction: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.built.path),
            "reused": self.built.reused,
            "comparison": self.table.to_dict(),
            "image": self.image,
            "truth": self.truth,
            "prediction": self.prediction,
            "seconds": self.seconds,
        }


def profile_to(
    bundle: str | Path, out: Path | None, *, on: str | None = None, progress: Progress = silent, **options: Any
) -> tuple[Profile, Path]:
    """`profile`, and its JSON file: ``out``, or a new one in the bundle's ``profiles/`` where `compare` finds it."""
    from .device.bundle import Bundle
    from .device.main import profile_path, write_profile

    with Bundle.open(bundle) as opened:
        # before the measurement, so that a place that cannot be written costs no time
        path = profile_path(out, opened, on or platform.node())
        measured = profile(opened, on=on, progress=progress, **options)
        write_profile(measured, path)
    return measured, path


def demo(sample: str, *, target: str, out: str, progress: Progress = silent) -> Demo:
    """The whole line on an embedded sample: build (or keep what is unchanged), profile, compare, run one image."""
    from . import samples, user_code
    from .device.bundle import Bundle
    from .device.predictor import Predictor

    data = samples.load(sample).data
    if data is None:
        raise ModelError(
            f"sample:{sample}",
            expected="a trained sample with data",
            got=samples.load(sample).alone,
            hint="rowcol-edge build",
        )
    started = time.monotonic()
    task = samples.load(sample).task
    if task != "classify":
        raise ConfigError(
            f"sample:{sample}",
            expected="a sample that classifies",
            got=f"contract {task}",
            hint=f"rowcol-edge build sample:{sample}, then profile the bundle",
        )
    built = build(f"sample:{sample}", target=target, out=out, progress=progress)[0]
    measured, _ = profile_to(built.path, None, seconds=_DEMO_PROFILE_SECONDS, progress=progress)
    images = user_code.resolve(f"{data}:images", DataError, "data")
    picture, truth = next(iter(images("test")))
    with Bundle.open(built.path) as bundle, Predictor(bundle) as predictor:
        prediction = predictor.predict(picture)
        labels = bundle.manifest.labels
    return Demo(
        built=built,
        profile=measured,
        table=compare([built.path]),
        image=f"test image 0 of sample:{sample}",
        truth=labels[int(truth)],
        prediction=prediction.to_dict(),
        seconds=time.monotonic() - started,
    )
