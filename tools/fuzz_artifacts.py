"""Damage artifacts in many ways, and see that no runtime takes its caller down with it.

    python tools/fuzz_artifacts.py [BUNDLE ...] [--count N] [--seed S] [--seconds T]

Without a bundle it builds those of sample:fmnist-vit at int8 for every runtime that runs here. Each damaged file is
opened and run in a process of its own. A file that still opens and runs is none to worry about here: the digests of
the bundle refuse it before. Exit code 1: something crashed, hung, or raised an error that is not rowcol_edge's own.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rowcol_edge
from rowcol_edge import targets
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.predictor import runtime_options
from rowcol_edge.device.runtimes import Runtime, RuntimeOptions, load_runtime
from rowcol_edge.errors import RowcolError

TYPED, RAN, UNTYPED, CRASHED, HUNG = "typed error", "opened and ran", "other error", "crashed", "hung"
OUTCOMES = (TYPED, RAN, UNTYPED, CRASHED, HUNG)
BAD = (UNTYPED, CRASHED, HUNG)
_CODES = {10: TYPED, 0: RAN, 11: UNTYPED}
_HEAD_BYTES = 4096
_MEMORY_BYTES = 16 << 30
"""A size that was damaged may ask for more than there is: then it is refused, and not the machine brought down."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a runtime opens, and the feeds of one run."""

    runtime: str
    path: Path
    options: RuntimeOptions
    feeds: Mapping[str, np.ndarray]


def fuzz(artifact: Artifact, file: Path, count: int, seed: int, seconds: float) -> Counter[str]:
    """Outcomes of ``count`` damaged copies of ``file``, one of the artifact's own; what is bad is told on stderr."""
    runtime, whole = load_runtime(artifact.runtime), file.read_bytes()
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="rowcol-fuzz-") as work:
        for own in files(artifact.path):
            shutil.copy(own, work)
        opened, victim = Path(work) / artifact.path.name, Path(work) / file.name
        if (outcome := _attempt(runtime, opened, artifact, seconds)) != RAN:
            raise SystemExit(f"{file}: {outcome}, and nothing was damaged yet")
        for number in range(count):
            kind, content = damaged(whole, number, seed)
            victim.write_bytes(content)
            outcome = _attempt(runtime, opened, artifact, seconds)
            found[outcome] += 1
            if outcome in BAD:
                print(
                    f"{artifact.runtime} {file.name}: {kind}, seed {seed}, number {number}: {outcome}", file=sys.stderr
                )
    return found


def files(artifact: Path) -> list[Path]:
    """The artifact and what lies beside it under the same name."""
    return sorted(artifact.parent.glob(f"{artifact.stem}.*"))


def damaged(whole: bytes, number: int, seed: int) -> tuple[str, bytes]:
    """One of four kinds in turn: a flipped bit, one near the beginning, eight changed bytes, a file cut short."""
    dice = random.Random(f"{seed} {number}")
    content = bytearray(whole)
    match number % 4:
        case 0:
            kind = "a flipped bit"
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        case 1:
            kind = "a flipped bit near the beginning"
            content[dice.randrange(min(len(content), _HEAD_BYTES))] ^= 1 << dice.randrange(8)
        case 2:
            kind = "eight changed bytes"
            for place in dice.sample(range(len(content)), 8):
                content[place] ^= dice.randrange(1, 256)
        case _:
            kind = "cut short"
            del content[dice.randrange(len(content)) :]
    return kind, bytes(content)


def _attempt(runtime: Runtime, opened: Path, artifact: Artifact, seconds: float) -> str:
    """Open and run in a child, so that the runtime is imported once. SIGALRM ends native code too."""
    child = os.fork()
    if child == 0:
        os._exit(_child(runtime, opened, artifact, seconds))
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return _CODES.get(os.WEXITSTATUS(status), CRASHED)
    return HUNG if os.WTERMSIG(status) == signal.SIGALRM else CRASHED


def _child(runtime: Runtime, opened: Path, artifact: Artifact, seconds: float) -> int:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        with runtime.open(opened, artifact.options) as session:
            session.run(artifact.feeds)
    except (RowcolError, MemoryError):  # the command lines answer both in one line
        return 10
    except BaseException:  # noqa: BLE001 – whatever it is, it is what must not happen
        return 11
    return 0


def artifacts(bundle: Bundle) -> Iterator[Artifact]:
    """One an arm."""
    runtime = bundle.manifest.runtime.name
    for arm in bundle.manifest.arms:
        inputs, _ = bundle.golden(arm)
        yield Artifact(runtime, bundle.artifact(arm), runtime_options(bundle, 1), next(bundle.feeds(inputs)))


def built(work: Path) -> Iterator[Path]:
    """By an energy, not a budget: what is tried is the files."""
    for runtime in targets.load("generic-x86").runtimes:
        print(f"building sample:fmnist-vit for {runtime.name}", file=sys.stderr)
        [made] = rowcol_edge.build("sample:fmnist-vit", runtime=runtime.name, energy=0.98, zip=False, out=str(work))
        yield made.path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", metavar="BUNDLE", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=80, help="damaged copies of each file (default 80)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="a run that takes longer hangs (default 20)")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    begin = time.monotonic()
    print(" | ".join(["runtime", "file", *OUTCOMES]))
    with tempfile.TemporaryDirectory(prefix="rowcol-fuzz-") as work:
        for path in options.bundles or built(Path(work)):
            with Bundle.open(path) as bundle:
                for artifact in artifacts(bundle):
                    for file in files(artifact.path):
                        found = fuzz(artifact, file, options.count, options.seed, options.seconds)
                        print(" | ".join([artifact.runtime, file.name, *(str(found[o]) for o in OUTCOMES)]), flush=True)
                        total += found
    print(" | ".join(["all", "", *(str(total[outcome]) for outcome in OUTCOMES)]))
    print(f"{total.total()} damaged files, seed {options.seed}, {time.monotonic() - begin:.0f} s")
    return 1 if any(total[outcome] for outcome in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
