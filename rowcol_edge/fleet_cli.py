"""``rowcol-edge fleet``: arguments of the commands for many boards and many builds – no logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import Json, print_json, progress

if TYPE_CHECKING:
    from .fleet.campaign import Scheduler

app = typer.Typer(
    name="fleet",
    help="Many boards and many builds: here, or on the workers of a Dask scheduler.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Boards = Annotated[Path, typer.Option(metavar="FILE", help="the boards: name, target and address of each")]
Address = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="ADDRESS", help="a Dask scheduler, tcp://host:8786 (default: do it from here)"),
]
Ca = Annotated[Path | None, typer.Option(metavar="FILE", help="tls://: the authority that signed all certificates")]
Cert = Annotated[Path | None, typer.Option(metavar="FILE", help="tls://: this client's certificate")]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="tls://: its key")]
Limit = Annotated[float | None, typer.Option(min=1, metavar="SECONDS", help="end a job that takes longer")]


@app.command()
def profile(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="bundle folders or .zip files")],
    boards: Boards = Path("boards.toml"),
    scheduler: Address = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="receives profiles, table and page")] = Path("fleet"),
    once: Annotated[
        bool, typer.Option("--once", help="each bundle on one board of its target, whichever is free first")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="also what lies in --out already")] = False,
    arms: Annotated[str | None, typer.Option(help="only these arms of each bundle, separated by commas")] = None,
    baseline: Annotated[str | None, typer.Option(help="the arm the others are compared with")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="fresh processes per arm")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="aim to be done in this time, on each board")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="instead of the target's")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="also memory at each stage and by the runtime's settings")
    ] = False,
    energy: Annotated[bool, typer.Option("--energy", help="also the energy of an inference, by rail")] = False,
    ops: Annotated[bool, typer.Option("--ops", help="also the time of operators, by layer, and a roofline")] = False,
    retries: Annotated[int, typer.Option(min=0, help="how often a board that was lost is tried again")] = 2,
    limit: Limit = None,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    json: Json = False,
) -> None:
    """Measure bundles on every board of their target.

    One at a time on each board. Profiles are written as they come, and the same command again keeps them. Exit code 1
    where a board measured nothing, or a default arm takes more memory than its target grants.
    """
    from .device.main import arm_names
    from .fleet import boards as listed
    from .fleet import campaign
    from .report import fleet

    with progress() as report:
        found = campaign.profile(
            bundles, listed.read(boards), out=out, scheduler=_scheduler(scheduler, tls_ca, tls_cert, tls_key),
            once=once, again=again, retries=retries, limit_seconds=limit or campaign.PROFILE_SECONDS, progress=report,
            arms=None if arms is None else arm_names(arms), baseline=baseline, blocks=blocks, seconds=seconds,
            threads=threads, memory=memory or None, energy=energy or None, ops=ops or None,
        )  # fmt: skip
    if json:
        print_json(found.to_dict())
    else:
        fleet.profiles(found)
    # after the results, which a full disk must not cost, and beside them
    if said := fleet.write_page(found, bundles):
        typer.echo(said, err=True)
    found.raise_if_incomplete()


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="a rowcol.toml in which five keys may be lists")],
    scheduler: Address = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="receives the bundles and sweep.json (default: the file's)"),
    ] = None,
    limit: Limit = None,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    json: Json = False,
) -> None:
    """Build models × targets × runtimes × precisions × budgets.

    The file is a rowcol.toml in which model, target, runtime, precision and budget may be lists. What is built already
    is kept. Exit code 1 where a build failed.
    """
    from .fleet import campaign
    from .fleet import sweep as sweeps
    from .report import fleet

    asked = sweeps.read(file, out)
    with progress() as report:
        found = campaign.sweep(
            asked, scheduler=_scheduler(scheduler, tls_ca, tls_cert, tls_key),
            limit_seconds=limit or campaign.BUILD_SECONDS, progress=report,
        )  # fmt: skip
    if json:
        print_json(found.to_dict())
    else:
        fleet.sweep(found)
    found.raise_if_incomplete()


@app.command()
def workers(
    boards: Boards = Path("boards.toml"),
    scheduler: Annotated[str, typer.Option(metavar="ADDRESS", help="where they find it")] = "tcp://SCHEDULER:8786",
) -> None:
    """Print the lines that start a scheduler and its workers.

    One worker for each board, on a machine that reaches it, and any number that build.
    """
    from .fleet import boards as listed

    typer.echo("\n".join(listed.start_lines(listed.read(boards), scheduler)))


def _scheduler(address: str | None, ca: Path | None, cert: Path | None, key: Path | None) -> Scheduler | None:
    from .fleet.campaign import Scheduler

    return Scheduler.asked(address, ca, cert, key)
