"""Prove bundles for Arm boards without one: in arm64 Debian userlands, on an emulated processor of the board's kind.

    python tools/arm64_userland.py make                         # userlands of trixie and bookworm, in .cache/arm64
    python tools/arm64_userland.py prove                        # writes tools/results/arm64.json
    python tools/arm64_userland.py prove BUNDLE... --cpu cortex-a53
    python tools/arm64_userland.py prove-wheelhouse             # writes tools/results/arm64-wheelhouses.json
    python tools/arm64_userland.py prove-wheelhouse WHEELHOUSE BUNDLE

`prove` builds the samples for each target and runtime, then runs `verify` and `run` of each bundle as on the board:
every arm must give its golden outputs within its tolerance. It proves outputs; times under emulation mean nothing, and
none is kept. `prove-wheelhouse` installs what `build --wheelhouse` has put beside a bundle, for each runtime of a
Raspberry Pi 4, in a new environment without network, and verifies the bundle with it. What --targets and --runtimes
leave out stays in the result as it was proven before, if by the same package. Needs debootstrap and qemu-user.
A userland is made once and kept. Exit code 1: something is not proven.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arm64_packages
import arm64_proof
import arm64_root
import rowcol_edge
from benchmark_machine import machine
from rowcol_edge import job, targets
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.table import columns

RESULTS = Path(__file__).parent / "results"
CPUS = {
    "beagley-ai": "cortex-a53",
    "generic-arm64": "cortex-a53",
    "imx8m-plus": "cortex-a53",
    "raspberry-pi-4": "cortex-a72",
    "raspberry-pi-5": "cortex-a76",
    "raspberry-pi-zero-2w": "cortex-a53",
    "rk3588": "cortex-a76",
}
"""The processor of a target, as QEMU_CPU names it; of two kinds the one that does the work."""
REFUSED = {"elpv-resnet18": ("int8-dynamic", "int8-weights", "int4-weights")}
"""Precisions of linear layers, which a sample of convolutions cannot have."""


def main() -> int:
    options = _options()
    code: int = options.command(options)
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="make|prove|prove-wheelhouse")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--suites", type=_names, default=tuple(arm64_root.SUITES), help="default: both")

    commands.add_parser("make", parents=[common], help="make the userlands").set_defaults(command=make)

    proof = commands.add_parser("prove", parents=[common], help="verify and run bundles")
    proof.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="folders; none: build the samples")
    proof.add_argument("--samples", type=_names, default=("fmnist-vit", "elpv-resnet18"))
    proof.add_argument("--targets", type=_names, default=("raspberry-pi-4", "raspberry-pi-5"), help="names or files")
    proof.add_argument("--runtimes", type=_names, default=(), help="default: all that the target lists")
    proof.add_argument("--precisions", type=_names, default=(), help="default: all that the target lists")
    proof.add_argument("--cpu", help="a QEMU_CPU, for targets that this tool does not know")
    proof.add_argument("--oldest", action="store_true", help="also with the oldest versions that targets promise")
    proof.add_argument("--out", type=Path, default=RESULTS / "arm64.json")
    proof.set_defaults(command=prove)

    house = commands.add_parser("prove-wheelhouse", parents=[common], help="install without network, then verify")
    house.add_argument("pair", nargs="*", type=Path, metavar="WHEELHOUSE BUNDLE", help="none: build them")
    house.add_argument("--cpu", help="a QEMU_CPU, for targets that this tool does not know")
    house.add_argument("--out", type=Path, help="default: tools/results/arm64-wheelhouses.json for those built here")
    house.set_defaults(command=prove_wheelhouse)
    options = parser.parse_args()
    if options.command is prove_wheelhouse and len(options.pair) not in (0, 2):
        house.error(f"expected a wheelhouse and a bundle, or nothing, got {len(options.pair)} paths")
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def make(options: argparse.Namespace) -> int:
    for userland in map(arm64_root.ensure, options.suites):
        python = f"Python {userland.suite.python}"
        print(f"{userland.root}: {python}, {_megabytes(userland.root):.0f} MB, made in {userland.made_seconds:.0f} s")
    return 0


def prove(options: argparse.Namespace) -> int:
    userlands = [arm64_root.ensure(name) for name in options.suites]
    bundles = options.bundles or list(_built(options))
    proofs = []
    for i, bundle in enumerate(bundles, start=1):
        for userland in userlands:
            for choice in _choices(bundle, userland, options):
                print(f"bundle {i}/{len(bundles)}: {bundle.name}, {userland.suite.name}, {choice.label}", flush=True)
                found = arm64_proof.proof(bundle, userland, _cpu(bundle, options), choice)
                proofs.append(found)
    print_table(proofs)
    result = {
        **_header(),
        "source": job.own_source(),
        "tools": job.tool_versions(),
        "proofs": proofs,
    }
    _keep(result, options.out)
    return _end(result, options.out)


def _header() -> dict[str, Any]:
    return {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "evidence": "emulated"}


def _keep(result: dict[str, Any], path: Path) -> None:
    """Add an earlier result's proofs for other targets and runtimes, where package and tools are the same."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(earlier.get(key) != result[key] for key in ("source", "tools")):
        return
    done = {(found["target"], found["runtime"]) for found in result["proofs"]}
    others = [found for found in earlier["proofs"] if (found["target"], found["runtime"]) not in done]
    result["proofs"] = sorted([*others, *result["proofs"]], key=lambda found: str(found["target"]))


def prove_wheelhouse(options: argparse.Namespace) -> int:
    pairs = [tuple(path.resolve() for path in options.pair)] if options.pair else list(_housed())
    proofs = []
    for wheelhouse, bundle in pairs:
        for userland in map(arm64_root.ensure, options.suites):
            print(f"{wheelhouse}: {userland.suite.name}, venv, pip --no-index, verify", flush=True)
            try:
                found = arm64_proof.wheelhouse_proof(wheelhouse, bundle, userland, _cpu(bundle, options))
            except arm64_proof.NotProvenError as e:
                found = {"bundle": bundle.name, "suite": userland.suite.name, "failed": str(e)}
            proofs.append(found)
            print(f"  {found.get('failed') or 'installed and verified: ' + found['runtime'] + ' ' + found['version']}")
    out = options.out or (None if options.pair else RESULTS / "arm64-wheelhouses.json")
    return _end({**_header(), "proofs": proofs}, out)


def _housed() -> Iterator[tuple[Path, Path]]:
    """What `build --wheelhouse` makes of the small sample for each runtime of a board: the wheels, and their bundle."""
    for runtime in targets.load("raspberry-pi-4").runtimes:
        print(f"building fmnist-vit with a wheelhouse for raspberry-pi-4, {runtime.name}", flush=True)
        [built] = rowcol_edge.build(
            "sample:fmnist-vit", target="raspberry-pi-4", runtime=runtime.name, precision="int8", energy=0.98,
            zip=False, wheelhouse=True, out=str(arm64_root.CACHE / "housed"), force=True,
        )  # fmt: skip
        yield Path(str(built.wheelhouse)).resolve(), Path(built.path).resolve()


def _built(options: argparse.Namespace) -> Iterator[Path]:
    """Bundles of the samples, built by today's code. By an energy: what is proven is not the search."""
    for target in map(targets.load, options.targets):
        for runtime in [s.name for s in target.runtimes if not options.runtimes or s.name in options.runtimes]:
            for sample in options.samples:
                offered = [p for p in target.runtime(runtime).precisions if p not in REFUSED.get(sample, ())]
                for precision in options.precisions or offered:
                    print(f"building {sample} for {target.name}, {runtime}, {precision}", flush=True)
                    out = arm64_root.CACHE / "bundles" / f"{sample}-{precision}"
                    [built] = rowcol_edge.build(
                        f"sample:{sample}", target=_file_or_name(target.name, options), runtime=runtime,
                        precision=precision, energy=0.98, zip=False, out=str(out), force=True,
                    )  # fmt: skip
                    yield Path(built.path)


def _file_or_name(name: str, options: argparse.Namespace) -> str:
    return next(given for given in options.targets if given == name or Path(given).stem == name)


def _choices(bundle: Path, userland: arm64_root.Userland, options: argparse.Namespace) -> list[arm64_packages.Choice]:
    with Bundle.open(bundle, check=False) as opened:
        name, runtime = opened.manifest.target["name"], opened.manifest.runtime.name
    spec = targets.load(next((given for given in options.targets if Path(given).stem == name), name)).runtime(runtime)
    return arm64_packages.choices(spec, userland.suite, oldest=options.oldest)


def _cpu(bundle: Path, options: argparse.Namespace) -> str:
    with Bundle.open(bundle, check=False) as opened:
        name = opened.manifest.target["name"]
    cpu = options.cpu or CPUS.get(name)
    if cpu is None:
        sys.exit(f"{name}: which processor is that? Name it with --cpu; `qemu-aarch64 -cpu help` lists them")
    return str(cpu)


def print_table(proofs: list[dict[str, Any]]) -> None:
    """A line an arm, and one with the reason for what is not proven."""
    print("\nOutputs on emulated Arm processors. Evidence: emulated; it proves outputs, never times.\n")
    rows = [("bundle", "as", "Debian", "runtime", "arm", "relative error", "tolerance", "labels")]
    for found in proofs:
        runtime = f"{found['runtime']} {found.get('version', '?')} ({found['choice']})"
        place = (found["bundle"], found["cpu"], found["suite"], runtime)
        for arm in found.get("arms", []):
            labels = f"{arm['labels_same']}/{arm['samples']}" if arm["labels_same"] is not None else "–"
            error = arm["reason"] if arm["relative_error"] is None else f"{arm['relative_error']:.2e}"
            rows.append((*place, arm["name"], error, f"{arm['tolerance']:g}", labels))
            place = ("",) * len(place)
        if "failed" in found:
            rows.append((*place, "NOT PROVEN", "", "", ""))
    print("\n".join(columns(rows, (False,) * 5 + (True,) * 3)))
    for found in proofs:
        if "failed" in found:
            print(f"not proven: {found['bundle']}, {found['cpu']}, {found['suite']}: {found['failed']}")


def _end(result: dict[str, Any], out: Path | None) -> int:
    proofs = result["proofs"]
    failed = sum("failed" in found for found in proofs)
    if out is not None:
        whole = json.dumps({**result, "failed": failed}, indent=1, ensure_ascii=False)
        out.write_text(whole + "\n", encoding="utf-8")
        print(f"written to {out}")
    print(f"{len(proofs) - failed} of {len(proofs)} proven")
    return 1 if failed else 0


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
