"""The command line at the board: ``python3 rowcol-edge-device.pyz verify|run|profile|doctor|engine BUNDLE``.

Exit codes: 0 good; 1 an arm does not reproduce its golden outputs, or takes more memory than the target grants; 2 bad
input; 3 not comparable; 130 Ctrl-C; 141 the reader of the output went away; 143 SIGTERM. Errors are one line on
stderr. With ``--json`` stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, MeasurementError, MissingDependencyError, RowcolError

if TYPE_CHECKING:
    from pathlib import Path

    from .bundle import Bundle
    from .decode import Prediction
    from .predictor import Predictor
    from .profile import Profile
    from .verify import VerifyReport

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_ROOM_BYTES = 4 << 20
"""A dozen arms with all their samples need less."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_anything()
    try:
        if arguments[:1] == ["_worker"]:
            from .worker import main as worker  # how the profiler starts a fresh process of this same archive

            code: int = worker(arguments[1:])
            return code
        options = _parser().parse_args(arguments)
        code = options.command(options)
        sys.stdout.flush()
        return code
    except RowcolError as e:
        return _fail(str(e), e.exit_code)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("rowcol_edge"):
            raise  # a fault of this program, not of the board
        package = e.name.partition(".")[0]
        return _fail(str(MissingDependencyError("running a bundle", package=package)), RowcolError.exit_code)
    except BrokenPipeError:
        # whatever is still buffered has no reader; without this the interpreter complains when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (OSError, MemoryError) as e:
        return _fail(str(e) or "not enough memory", RowcolError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)


def print_anything() -> None:
    """Have stdout and stderr escape what the locale lacks, a character of a label or a path, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM (timeout, systemd, docker stop, a CI that cancels) cleans up as Ctrl-C does; exit code 143."""
    heeded = False

    def interrupt(*_: object) -> None:
        nonlocal heeded
        if not heeded:  # timeout sends a second one, which must not end the cleaning
            heeded = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if heeded:
            sys.exit(128 + signal.SIGTERM)


def _fail(text: str, code: int) -> int:
    # one line, so that a log or a script can take it whole
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    name = sys.argv[0].rpartition("/")[2]
    parser = argparse.ArgumentParser(
        prog=name if name.endswith(".pyz") else "rowcol-edge-device",
        description="Check, run and measure a rowcol_edge bundle on this machine.",
    )
    commands = parser.add_subparsers(required=True, metavar="verify|run|profile|doctor|engine")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("bundle", metavar="BUNDLE", help="bundle folder or .zip")
    common.add_argument("--json", action="store_true", help="print one JSON document")
    anywhere = argparse.ArgumentParser(add_help=False)
    anywhere.add_argument(
        "--stand-in", action="store_true", help="also where this is another kind of machine than the bundle is for"
    )
    common.add_argument(
        "--threads", type=_count, metavar="N", help="threads of the runtime (default: what the target asks for)"
    )

    verify = commands.add_parser(
        "verify", parents=[common, anywhere], help="check every file and reproduce the golden outputs"
    )
    verify.set_defaults(command=_verify)

    run = commands.add_parser("run", parents=[common, anywhere], help="predict for pictures, .npy, .npz or raw frames")
    run.add_argument("images", metavar="IMAGE", nargs="+")
    run.add_argument("--arm", metavar="NAME", help="default: the bundle's default arm")
    run.set_defaults(command=_run)

    profile = commands.add_parser(
        "profile", parents=[common], help="measure latency, cold start, memory and size of the arms"
    )
    profile.add_argument("--arms", type=arm_names, metavar="A,B", help="default: all arms")
    profile.add_argument("--baseline", metavar="NAME", help="the arm the others are compared with")
    profile.add_argument("--blocks", type=_count, metavar="N", help="fresh processes an arm")
    profile.add_argument("--seconds", type=_seconds, metavar="S", help="time budget in seconds")
    profile.add_argument(
        "--memory", action="store_true", default=None, help="also memory at each stage and by the runtime's settings"
    )
    profile.add_argument(
        "--energy",
        action="store_true",
        default=None,
        help="also the energy of an inference, where the board has rails to read",
    )
    profile.add_argument(
        "--ops",
        action="store_true",
        default=None,
        help="also the time of operators, by layer, against what the machine can do",
    )
    profile.add_argument(
        "--out", metavar="FILE", help="where the JSON goes (default: BUNDLE/profiles/, for a .zip this folder)"
    )
    profile.set_defaults(command=_profile)

    engine = commands.add_parser(
        "engine",
        parents=[common],
        help="build the engines of the arms for this machine (tensorrt); takes minutes, once",
    )
    engine.add_argument("--arms", type=arm_names, metavar="A,B", help="default: all arms")
    engine.set_defaults(command=_engine)

    doctor = commands.add_parser("doctor", help="what this machine has and lacks; needs nothing but Python")
    doctor.add_argument("bundle", metavar="BUNDLE", nargs="?", help="a bundle folder or .zip, to hear what it needs")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(command=_doctor)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a number ≥ 0, not {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a time > 0, not {text}")
    return value


def arm_names(text: str) -> tuple[str, ...]:
    """``A, B`` as ``--arms`` takes it. MeasurementError: no name in it."""
    names = tuple(name for name in (part.strip() for part in text.split(",")) if name)
    if not names:
        raise MeasurementError("arms", expected="at least one arm", got=repr(text))
    return names


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def _verify(options: argparse.Namespace) -> int:
    from .bundle import Bundle
    from .progress import on_stderr
    from .verify import verify

    progress = on_stderr(True) if sys.stderr.isatty() else None  # too short to be worth lines in a log
    with Bundle.open(options.bundle, check=False) as bundle:  # verify checks it itself
        check_machine(bundle, stand_in=options.stand_in)
        report = verify(bundle, threads=options.threads, progress=progress)
    if options.json:
        _print_json(report.to_dict())
    else:
        print(verify_text(report))
    report.raise_if_failed()
    return 0


def verify_text(report: VerifyReport) -> str:
    """A line for the bundle and one an arm, as ``verify`` prints them."""
    lines = [f"{report.bundle}: {report.files} files match the manifest; {report.runtime} {report.runtime_version}"]
    width = max(len(arm.name) for arm in report.arms)
    for arm in report.arms:
        error = arm.reason or f"relative error {arm.relative_error:.2e}"
        labels = "" if arm.labels_same is None else f", {arm.labels_same} of {arm.samples} labels the same"
        state = "ok    " if arm.ok else "FAILED"
        lines.append(f"  {state} {arm.name:{width}}  {error} (tolerance {arm.tolerance:g}){labels}")
    return "\n".join(lines)


def _run(options: argparse.Namespace) -> int:
    answer(
        options.bundle, options.images, options.arm, options.threads, as_json=options.json, stand_in=options.stand_in
    )
    return 0


def answer(
    path: str | Path, images: Sequence[str | Path], arm: str | None, threads: int | None, *, as_json: bool,
    stand_in: bool,
) -> None:  # fmt: skip
    """Print the answer for each file, as the command ``run`` does, and as the build side's command does too."""
    from .bundle import Bundle
    from .predictor import Predictor

    with Bundle.open(path) as bundle:
        check_machine(bundle, stand_in=stand_in)
        with Predictor(bundle, arm=arm, threads=threads) as predictor:
            if as_json:
                _print_json(predictions(predictor, images))
                return
            for image in images:
                print(f"{image}: {prediction_text(predictor.predict(image))}", flush=True)


def check_machine(bundle: Bundle, *, stand_in: bool) -> None:
    """BundleError for a bundle of another kind of machine than this; for a ``stand_in`` it is a line on stderr."""
    from .system import another_machine

    target, machine = bundle.manifest.target, platform.machine()
    wanted = another_machine(target, machine)
    if wanted and not stand_in:
        raise BundleError(
            f"bundle for {target.get('name')}",
            expected=f"a machine of kind {wanted}",
            got=machine,
            hint="do this on the board, or add --stand-in: the files run here too, but outputs may differ a little",
        )
    if wanted:
        print(
            f"warning: {machine} stands in for {wanted} ({target.get('name')}), whose outputs may differ a little",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def predictions(predictor: Predictor, images: Sequence[str | Path]) -> dict[str, Any]:
    """Answers for files, as ``run --json`` prints them."""
    return {
        "bundle": predictor.bundle.manifest.name,
        "digest": predictor.bundle.digest,
        "arm": predictor.arm.name,
        "results": [{"source": str(image), "prediction": predictor.predict(image).to_dict()} for image in images],
    }


def prediction_text(prediction: Prediction) -> str:
    """An answer in one line, as ``run`` prints it."""
    if prediction.contract == "classify":
        return f"{prediction.label} ({prediction.score:.4f})"
    if prediction.contract == "segment":
        return ", ".join(f"{label} {share:.2%}" for label, share in prediction.scores.items())
    if prediction.contract == "anomaly_map":
        return f"{prediction.label or 'score'} ({prediction.score:.6g})"
    if prediction.boxes is not None:
        rows = zip(prediction.box_labels, prediction.boxes.tolist(), strict=True)
        return (
            "; ".join(f"{label} {row[4]:.4f} [{', '.join(f'{x:.1f}' for x in row[:4])}]" for label, row in rows)
            or "nothing found"
        )
    values = [] if prediction.embedding is None else prediction.embedding.tolist()
    return " ".join(f"{value:.6g}" for value in values)


def _profile(options: argparse.Namespace) -> int:
    from .bundle import Bundle
    from .measure import profile
    from .progress import on_stderr
    from .table import profile_table

    # only what was asked for, so that the profiler's defaults stay in one place
    given = {
        key: value
        for key in ("arms", "baseline", "blocks", "seconds", "threads", "memory", "energy", "ops")
        if (value := getattr(options, key)) is not None
    }
    with Bundle.open(options.bundle) as bundle:
        out = profile_path(options.out, bundle, platform.node())
        measured = profile(bundle, progress=on_stderr(sys.stderr.isatty()), **given)
        write_profile(measured, out)
    if options.json:
        _print_json(measured.to_dict())
    else:
        print(profile_table(measured))
    print(f"written to {out}", file=sys.stderr)
    measured.raise_if_over_budget()
    return 0


def _engine(options: argparse.Namespace) -> int:
    from .bundle import Bundle
    from .engines import build_engines

    with Bundle.open(options.bundle) as bundle:
        built = {}
        for name, file in build_engines(bundle, options.arms):
            built[name] = {"path": None if file.path is None else str(file.path), "seconds": file.seconds}
            if not options.json:
                how = f"built in {file.seconds:.0f} s" if file.seconds else "found"
                print(f"{name}: {how}, {file.path or 'not kept'}", flush=True)
    if options.json:
        _print_json({"engines": built})
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import diagnose, read_needs, report

    diagnosis = diagnose(None if options.bundle is None else read_needs(options.bundle))
    if options.json:
        _print_json(diagnosis.to_dict())
    else:
        print(report(diagnosis))
    return RowcolError.exit_code if diagnosis.stopped else 0


def profile_path(out: str | Path | None, bundle: Bundle, machine: str) -> Path:
    """Where the profile goes, by default under a name with ``machine`` in it, which is where it is taken.

    BundleError, before the measurement, if that place cannot be written or is full.
    """
    import re
    import time
    from contextlib import suppress
    from pathlib import Path

    if out is not None:
        path = Path(out)
    else:
        host = re.sub(r"[^A-Za-z0-9.-]+", "-", machine) or "board"
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        folder = bundle.root / "profiles" if bundle.source.is_dir() else Path.cwd()
        path = folder / f"{stamp}-{host}.json"
        if bundle.source.is_dir():
            with suppress(OSError):  # one that cannot be made is refused below
                folder.mkdir(exist_ok=True)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise BundleError(
            str(path),
            expected="a file in a folder that can be written",
            got="neither",
            hint="name another place with --out",
        )
    if path.is_file() or not path.exists():
        check_room(path)
    return path


def check_room(path: Path) -> None:
    """BundleError where there is no room for a profile beside ``path``."""
    import shutil

    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < _ROOM_BYTES:
        raise BundleError(
            str(path),
            expected=f"room for the profile, {_ROOM_BYTES >> 20} MiB",
            got=f"{free_bytes / (1 << 20):.1f} MiB free",
            hint="make room, or name another place with --out",
        )


def write_profile(measured: Profile, path: Path) -> None:
    """Write the profile's JSON in one step.

    BundleError where that fails; what was measured is then kept in a temporary folder, which the error names.
    """
    import tempfile
    from contextlib import suppress
    from pathlib import Path

    from .files import write_whole

    text = measured.to_json()
    try:
        write_whole(path, text)
    except OSError as error:
        hint = "make room, or name another place with --out, and measure again"
        with suppress(OSError):
            kept = Path(tempfile.mkdtemp(prefix="rowcol-edge-")) / path.name
            write_whole(kept, text)
            hint = f"nothing is lost: the profile is kept in {kept}"
        what = "a place that can be written, as it was before the measurement"
        raise BundleError(str(path), expected=what, got=str(error.strerror), hint=hint) from error
