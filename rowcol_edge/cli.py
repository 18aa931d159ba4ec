"""The command line: arguments, progress, errors with hints, exit codes – no logic.

Exit codes: 0 good, 1 a budget or gate failed, 2 bad input, 3 not comparable, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from . import fleet_cli
from .command import Json
from .command import print_json as _print_json
from .command import progress as _progress
from .device.main import print_anything, sigterm_as_ctrl_c
from .device.manifest import PRECISIONS
from .device.runtimes import RUNTIMES
from .errors import ConfigError, InputError, MissingDependencyError, RowcolError

if TYPE_CHECKING:
    from .report.change import Change
    from .report.compare import ComparisonTable
    from .targets import Target

T = TypeVar("T", "ComparisonTable", "Change")

app = typer.Typer(
    name="rowcol-edge",
    help="Put a PyTorch model on a board: factored, quantized, packaged, and measured against the dense original.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(fleet_cli.app)

#: which extra brings a package that may be missing
_EXTRAS = dict.fromkeys(("torch", "onnx", "onnxscript", "safetensors", "tomli_w", "onnxruntime", "PIL"), "build")

Model = Annotated[str, typer.Argument(help="sample:NAME, package.module:factory, path/file.py:factory or file.pt2")]
BundlePath = Annotated[Path, typer.Argument(help="a bundle folder or .zip")]
ProfilePath = Annotated[Path, typer.Argument(metavar="PROFILE", help="a profile, as in BUNDLE/profiles/")]
StandIn = Annotated[
    bool, typer.Option("--stand-in", help="also where this is another kind of machine than the bundle is for")
]
Weights = Annotated[str | None, typer.Option(help="a .safetensors file, or a checkpoint of plain tensors")]
Calib = Annotated[str | None, typer.Option(help="calibration data: image folder, .npz or module:callable")]
Refit = Annotated[
    bool | None,
    typer.Option("--refit/--no-refit", help="fit the weights to inputs that are already compressed (default: yes)"),
]
CalibSize = Annotated[
    str | None,
    typer.Option(help="how many calibration samples the quantizer gets, a diverse subset, or all (default: 128)"),
]
Select = Annotated[str | None, typer.Option(help="selection data: every choice is judged on these")]
Test = Annotated[str | None, typer.Option(help="test data: reported once")]
Metric = Annotated[
    str | None,
    typer.Option(
        help="accuracy, balanced_accuracy, auroc, escape@overkill=1%, iou (segment), nearest_neighbour (embed), or "
        "module:function (labels, outputs)"
    ),
]
Labels = Annotated[str | None, typer.Option(help="class names in the order of the outputs: good,defective")]
Positive = Annotated[str | None, typer.Option(help="the class whose detection matters: defective")]
Preprocess = Annotated[
    str | None, typer.Option(help="how an image becomes a tensor: mode=L,size=224x224,mean=0.5,std=0.25")
]
Contract = Annotated[
    str | None, typer.Option(help="what the outputs mean: classify (default), segment, anomaly_map, detect or embed")
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="limits: drop<=0.5pp,size<=4MB,params<=0.5x,macs<=0.5x (default: drop<=0.5pp with labelled data)",
    ),
]
Energy = Annotated[float | None, typer.Option(help="keep this share of what each layer gives to the output: 0.999")]
Plan = Annotated[str | None, typer.Option(help="apply this plan file instead of searching for one")]
Recover = Annotated[
    int | None, typer.Option(metavar="EPOCHS", help="then distil the original into the factored model (default: 0)")
]
RecoverData = Annotated[
    str | None, typer.Option(help="inputs to distil on, labels are not used (default: the calibration data)")
]
UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="keep what stages make in ROWCOL_CACHE or ~/.cache/rowcol-edge")
]
Out = Annotated[str | None, typer.Option(help="folder that receives the results (default: dist, of factor: factored)")]


@app.command()
def targets(
    name: Annotated[
        str | None, typer.Argument(help="all that is known of this one, and how its runtimes install")
    ] = None,
    json: Json = False,
) -> None:
    """List the boards and the embedded samples."""
    from . import samples
    from . import targets as boards

    if name is not None:
        _show_target(boards.load(name), json)
        return
    found = [boards.load(name) for name in boards.available()]
    if json:
        _print_json({"targets": [t.to_dict() for t in found], "samples": list(samples.available())})
        return
    from .report import terminal

    terminal.targets(found, [samples.load(name) for name in samples.available()])


def _show_target(target: Target, json: bool) -> None:
    if json:
        _print_json(target.to_dict())
        return
    from .report import terminal

    terminal.target(target)


@app.command()
def doctor(
    target: Annotated[str | None, typer.Argument(help="a board: what building for it needs here and there")] = None,
    json: Json = False,
) -> None:
    """Say what is installed and what is missing, and what to do about it.

    On the board: python3 rowcol-edge-device.pyz doctor [BUNDLE].
    """
    from . import api

    found = api.doctor(target)
    if json:
        _print_json(found.to_dict())
    else:
        from .report import terminal

        terminal.diagnosis(found)
    if found.stopped:
        raise typer.Exit(RowcolError.exit_code)


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    calib: Calib = None,
    preprocess: Preprocess = None,
    plot: Annotated[Path | None, typer.Option(help="an .html file for the spectra of both spaces as charts")] = None,
    json: Json = False,
) -> None:
    """Show what each layer uses of its row and column space.

    With the utilised ranks at 99 and 99.9 %, the spectrum, and what factoring could save.
    """
    from . import api

    with _progress() as progress:
        found = api.inspect(model, weights=weights, calib=calib, preprocess=preprocess, plot=plot, progress=progress)
    if json:
        _print_json(found.to_dict())
        return
    from .report import terminal

    terminal.inspection(found)


@app.command()
def data(
    model: Model,
    weights: Weights = None,
    calib: Calib = None,
    calib_size: CalibSize = None,
    select: Select = None,
    test: Test = None,
    labels: Labels = None,
    preprocess: Preprocess = None,
    json: Json = False,
) -> None:
    """Show what the data splits hold.

    The calibration subset that the quantizer gets, its classes and ranges, near-duplicates, and leakage between splits.
    """
    from . import api

    with _progress() as progress:
        found = api.data(
            model,
            weights=weights, calib=calib, calib_size=calib_size, select=select, test=test, labels=labels,
            preprocess=preprocess, progress=progress,
        )  # fmt: skip
    if json:
        _print_json(found.to_dict())
        return
    from .report import terminal

    terminal.data(found)


@app.command()
def factor(
    model: Model,
    weights: Weights = None,
    calib: Calib = None,
    select: Select = None,
    metric: Metric = None,
    contract: Contract = None,
    labels: Labels = None,
    positive: Positive = None,
    preprocess: Preprocess = None,
    budget: BudgetText = None,
    energy: Energy = None,
    plan: Plan = None,
    refit: Refit = None,
    recover: Recover = None,
    recover_data: RecoverData = None,
    target: Annotated[str, typer.Option(help="the board whose rank multiple is used")] = "generic-x86",
    precision: Annotated[
        str | None, typer.Option(help="what a budget of size is predicted at; build judges the file (default: int8)")
    ] = None,
    out: Out = None,
    cache: UseCache = True,
    json: Json = False,
) -> None:
    """Choose ranks; write the plan and the factored model.

    The files are plan.toml, model.safetensors and model.pt2.
    """
    from . import api

    with _progress() as progress:
        result = api.factor(
            model,
            weights=weights, calib=calib, select=select, metric=metric, contract=contract, labels=labels,
            positive=positive, preprocess=preprocess, budget=budget, energy=energy, plan=plan, refit=refit,
            target=target, precision=precision, out=out or "factored", recover=recover, recover_data=recover_data,
            cache=cache, progress=progress,
        )  # fmt: skip
    if json:
        _print_json(result.to_dict())
        return
    from .report import terminal

    terminal.factored(result)


@app.command()
def build(
    model: Annotated[str | None, typer.Argument(help="the model; may stand in the --config file instead")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="a board, see rowcol-edge targets; say it again for more (default: generic-x86)"),
    ] = None,
    out: Out = None,
    weights: Weights = None,
    runtime: Annotated[
        str | None,
        typer.Option(help=f"one that the target lists: {', '.join(RUNTIMES)} (default: onnxruntime)"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRECISIONS)}, or auto: the fastest one measured (default: int8)")
    ] = None,
    calib: Calib = None,
    calib_size: CalibSize = None,
    select: Select = None,
    test: Test = None,
    metric: Metric = None,
    budget: BudgetText = None,
    energy: Energy = None,
    plan: Plan = None,
    refit: Refit = None,
    recover: Recover = None,
    recover_data: RecoverData = None,
    contract: Contract = None,
    labels: Labels = None,
    positive: Positive = None,
    preprocess: Preprocess = None,
    bake_preprocess: Annotated[
        bool | None,
        typer.Option("--bake-preprocess/--no-bake-preprocess", help="the graph takes uint8 frames, N×height×width×C"),
    ] = None,
    dynamic_batch: Annotated[
        bool | None, typer.Option("--dynamic-batch/--fixed-batch", help="batch of any size")
    ] = None,
    dense: Annotated[bool | None, typer.Option("--dense/--no-dense", help="package the dense arms too")] = None,
    accuracy_control: Annotated[
        bool | None,
        typer.Option(
            "--accuracy-control/--no-accuracy-control",
            help="openvino int8: nncf keeps layers in float until the budget's drop holds",
        ),
    ] = None,
    zip: Annotated[bool | None, typer.Option("--zip/--no-zip", help="also write BUNDLE.zip")] = None,  # noqa: A002
    wheelhouse: Annotated[
        bool | None,
        typer.Option("--wheelhouse/--no-wheelhouse", help="also put the runtime's wheels beside the bundle"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="a rowcol.toml; options given here come on top")] = None,
    force: Annotated[bool, typer.Option("--force", help="build again even if nothing has changed")] = False,
    cache: UseCache = True,
    json: Json = False,
) -> None:
    """Build one bundle per target.

    Factor, export, simplify, quantize, check, judge, package.
    """
    from . import api

    said = {
        "model": model, "target": target, "out": out, "weights": weights, "runtime": runtime, "precision": precision,
        "calib": calib, "calib_size": calib_size, "select": select, "test": test, "metric": metric, "budget": budget,
        "energy": energy, "plan": plan, "refit": refit, "contract": contract, "labels": labels, "positive": positive,
        "preprocess": preprocess, "bake_preprocess": bake_preprocess, "dynamic_batch": dynamic_batch, "dense": dense,
        "zip": zip, "wheelhouse": wheelhouse, "accuracy_control": accuracy_control, "recover": recover,
        "recover_data": recover_data,
    }  # fmt: skip
    given = {key: value for key, value in said.items() if value is not None}
    with _progress() as progress:
        built = api.build_from(config, given, force=force, cache=cache, progress=progress)
    if json:
        _print_json({"bundles": [b.to_dict() for b in built]})
        return
    from .report import terminal

    terminal.built(built)


@app.command()
def profile(
    bundle: BundlePath,
    arms: Annotated[str | None, typer.Option(help="only these arms, separated by commas")] = None,
    baseline: Annotated[str | None, typer.Option(help="the arm the others are compared with")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="fresh processes per arm")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="aim to be done in this time")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="instead of the target's")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="also memory at each stage and by the runtime's settings")
    ] = False,
    energy: Annotated[bool, typer.Option("--energy", help="also the energy of an inference, by rail")] = False,
    ops: Annotated[bool, typer.Option("--ops", help="also the time of operators, by layer, and a roofline")] = False,
    out: Annotated[Path | None, typer.Option(help="where the profile goes; BUNDLE/profiles/ by default")] = None,
    on: Annotated[
        str | None, typer.Option(metavar="BOARD", help="measure there: ssh://[user@]host[:port] or adb:SERIAL")
    ] = None,
    known_hosts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="with --on ssh: keys of hosts, instead of ~/.ssh/known_hosts")
    ] = None,
    board_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="with --on: Python on the board (default: python3)")
    ] = None,
    board_folder: Annotated[
        str | None, typer.Option(metavar="DIR", help="with --on: where on the board (default: its temporary folder)")
    ] = None,
    json: Json = False,
) -> None:
    """Measure every arm of a bundle, on this machine or on a board.

    Paired, interleaved, in fresh processes, with a null arm. Exit code 1, after the profile was written, where the
    default arm takes more memory than the target grants.
    """
    from . import api
    from .device.main import arm_names

    with _progress() as progress:
        measured, path = api.profile_to(
            bundle, out, on=on, board={"known_hosts": known_hosts, "python": board_python, "folder": board_folder},
            arms=None if arms is None else arm_names(arms), baseline=baseline, blocks=blocks, seconds=seconds,
            threads=threads, memory=memory, energy=energy, ops=ops, progress=progress,
        )  # fmt: skip
    if json:
        _print_json(measured.to_dict())
    else:
        from .report import terminal

        terminal.profile(measured, path)
    measured.raise_if_over_budget()


@app.command()
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...|OLD NEW", help="bundles, profiled or not; or two profiles (.json)"),
    ],
    bundle: Annotated[
        list[Path] | None,
        typer.Option(help="with profiles: states their quality; again for more (default: where a profile lies)"),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="with profiles: this differs on purpose; again for more: bundle, host, usable cores, threads, "
            "settings, power mode, clocks held, governor",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table as markdown")] = False,
    json: Json = False,
) -> None:
    """Compare dense and factored arms per target; or two profiles, before and after.

    Bundles: size, quality, latency and memory, with intervals and evidence, of each one's newest profile with the
    target's threads and all arms, if there is one. Two profiles of one target, for instance
    of another build or another version of the runtime: what changed, arm by arm; exit code 3, with all that differs,
    where they were not measured under the same conditions.
    """
    from . import api
    from .report import sessions, terminal

    if sessions.are_profiles(paths):
        change = api.compare_profiles(*paths, bundles=bundle or (), allow=allow or ())
        _print_table(change, terminal.change, markdown, json)
        return
    if bundle or allow:
        raise ConfigError("--bundle, --allow", expected="two profiles to use them for", got="bundles")
    _print_table(api.compare(paths), terminal.comparison, markdown, json)


def _print_table(table: T, show: Callable[[T], None], markdown: bool, json: bool) -> None:
    if json:
        _print_json(table.to_dict())
    elif markdown:
        typer.echo(table.markdown())
    else:
        show(table)


@app.command()
def gate(
    profile: ProfilePath,
    max_latency_ratio: Annotated[
        float | None, typer.Option(metavar="R", help="over the baseline's latency: the upper end of the 95 % interval")
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="PP", help="percentage points lost to the original on the test split, the estimate: 0.5pp"
        ),
    ] = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="N[MB]", help="the arm's file: 4MB")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="N[MB]", help="the peak of its process: 64MiB")] = None,
    arm: Annotated[
        str | None, typer.Option(help="the arm to judge (default: the bundle's default one, if it was measured)")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="the arm of the ratio (default: dense of the same precision, or dense@fp32)")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="what was measured: states the drop (default: the bundle in whose profiles/ the profile lies)"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Hold a profile to limits, for a pipeline.

    One line a gate. Exit code 1 where one is missed, 3 where one cannot be judged.
    """
    from . import api

    found = api.gate(
        profile, arm=arm, baseline=baseline, bundle=bundle, max_latency_ratio=max_latency_ratio, max_drop=max_drop,
        max_bytes=max_bytes, max_memory=max_memory,
    )  # fmt: skip
    if json:
        _print_json(found.to_dict())
    else:
        typer.echo(found.text())
    found.raise_if_failed()


@app.command()
def report(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE...", help="profiles, as in BUNDLE/profiles/")],
    bundle: Annotated[
        list[Path] | None,
        typer.Option(help="states quality and plan; say it again for more (default: where a profile lies)"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="the page")] = Path("report.html"),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="the same figures as JSON")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="one row an arm and profile")] = None,
) -> None:
    """Show profiles as one HTML page that loads nothing.

    Verdict in words, arms, latency distribution, memory, trade-offs, plan, environment.
    """
    from . import api

    api.write_report(profiles, bundles=bundle or (), out=out, json=json, csv=csv)


@app.command()
def verify(bundle: BundlePath, stand_in: StandIn = False, json: Json = False) -> None:
    """Check digests and run the golden inputs through every arm."""
    from . import api
    from .device.bundle import Bundle
    from .device.main import check_machine, verify_text

    with Bundle.open(bundle, check=False) as opened:  # verify checks it itself
        check_machine(opened, stand_in=stand_in)
        with _progress() as progress:
            report = api.verify(opened, progress=progress)
    if json:
        _print_json(report.to_dict())
    else:
        typer.echo(verify_text(report))
    report.raise_if_failed()


@app.command()
def run(
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(help="image, .npy or raw frame")],
    arm: Annotated[str | None, typer.Option(help="an arm of the bundle; its default otherwise")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="instead of the target's")] = None,
    stand_in: StandIn = False,
    json: Json = False,
) -> None:
    """Run the packaged model on images."""
    from .device.main import answer

    answer(bundle, images, arm, threads, as_json=json, stand_in=stand_in)


@app.command()
def demo(
    sample: Annotated[str, typer.Option(help="which embedded sample")] = "elpv-resnet18",
    target: Annotated[str, typer.Option(help="which board")] = "generic-x86",
    out: Annotated[str, typer.Option(help="folder that receives the bundle")] = "dist/demo",
    json: Json = False,
) -> None:
    """Build, profile, compare and run an embedded sample."""
    from . import api

    with _progress() as progress:
        shown = api.demo(sample, target=target, out=out, progress=progress)
    if json:
        _print_json(shown.to_dict())
        return
    from .report import terminal

    terminal.demo(shown)


def main() -> None:
    """Entry point: turns every outcome into an exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 – the package installs on 3.10 for its device side
        typer.echo(
            "error: rowcol-edge needs Python 3.11 or newer; on a board use the bundle's rowcol-edge-device.pyz",
            err=True,
        )
        sys.exit(2)
    with sigterm_as_ctrl_c():
        run_command(sys.argv[1:])


def run_command(arguments: list[str]) -> None:
    """Run one command; always ends in SystemExit. Usage errors and Ctrl-C are typer's own: 2 and 130."""
    print_anything()
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # package.module:factory means the user's folder, as with python -m
    try:
        app(args=arguments)
    except RowcolError as e:
        _print_error(e)
        sys.exit(e.exit_code)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        _print_error(InputError(f"{where}{e.strerror or e}", hint="check the path, its rights and the free space"))
        sys.exit(2)
    except MemoryError as e:
        _print_error(InputError(str(e) or "not enough memory", hint="fewer calibration data, or a larger machine"))
        sys.exit(2)
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        _print_error(
            MissingDependencyError(f"this command needs {missing}", package=f"rowcol-edge[{_EXTRAS[missing]}]")
        )
        sys.exit(2)


def _print_error(error: RowcolError) -> None:
    lines = [f"error: {error.what}"]
    for label, text in (("expected", error.expected), ("got", error.got), ("hint", error.hint)):
        if text:
            lines.append(f"  {label + ':':<10}{text}")
    typer.echo("\n".join(lines), err=True)
