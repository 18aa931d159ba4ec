"""Go through the command line as a user would, on real data: every command, then every kind of bad input.

    python tools/walkthrough.py                  # all of it, in dist/walkthrough
    python tools/walkthrough.py --parts line     # the line from end to end, with onnxruntime
    python tools/walkthrough.py --only bad run   # the steps whose names hold one of these; what they need comes first

Parts: factoring (spaces, forms, budgets, odd models), line, runtimes, measuring (profiles, reports, gates, sessions, a
board by ssh on loopback, fleets, sweeps). The model is ELPV's, in a user's own file and folders of pictures; what is
measured is the Fashion-MNIST sample. Each step is a command in a process of its own, with the exit code and the words
that it must end with. Ends with exit code 1 if one of them was not as expected.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import walkthrough_data as data
import walkthrough_factoring
import walkthrough_measuring
import walkthrough_runtimes
import walkthrough_steps
from walkthrough_steps import Step

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "factoring": walkthrough_factoring.steps,
    "line": walkthrough_steps.steps,
    "runtimes": walkthrough_runtimes.steps,
    "measuring": walkthrough_measuring.steps,
}
NEEDS = {"runtimes": "line"}
"""The part whose needed steps come before another's."""
_NO_SPECIAL_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Before a command of root's, who could read every file."""
_SHOWN = 160
"""Of a command, in characters."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="dist/walkthrough")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", help="steps with one of these in their names")
    options = parser.parse_args()
    # a shell starts what runs in its background with Ctrl-C ignored, and so would every step be
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = ROOT / options.work
    shutil.rmtree(work, ignore_errors=True)
    started = time.monotonic()
    data.write(work)
    print(f"pictures, models and broken files written to {options.work} in {time.monotonic() - started:.0f} s")
    failed, count = [], 0
    for step in chosen(work, options.parts, options.only):
        count += 1
        began = time.monotonic()
        problems = go(step, work)
        outcome = "FAILED" if problems else "ok"
        print(f"{outcome:6} {time.monotonic() - began:6.1f} s  {step.name:38} {step.command[:_SHOWN]}", flush=True)
        for problem in problems:
            print(f"       {problem}", flush=True)
        failed += [step.name] if problems else []
    print(f"{count} steps in {(time.monotonic() - started) / 60:.0f} min: ", end="")
    print(f"FAILED {', '.join(failed)}" if failed else "all as expected")
    return 1 if failed else 0


def chosen(work: Path, parts: Sequence[str], only: Sequence[str] | None) -> Iterator[Step]:
    needed = {NEEDS.get(part) for part in parts}
    for part in (part for part in PARTS if part in parts or part in needed):
        for step in PARTS[part](work):
            if step.needed or (part in parts and (not only or any(word in step.name for word in only))):
                yield step


def go(step: Step, work: Path) -> list[str]:
    """Run a step; what was not as expected."""
    if step.before is not None:
        step.before()
    kept = tree(work / "out") if step.bad else {}
    process = start(step, work)
    heard = ""
    if step.signal is not None:
        heard = hear(process, step.signal_at)
        time.sleep(step.signal_after)
        process.send_signal(step.signal)
    out, err = process.communicate()
    err = heard + err
    problems = []
    if process.returncode != step.code:
        problems.append(f"exit code {process.returncode}, expected {step.code}")
    if "Traceback" in out + err:
        problems.append("a traceback")
    said = re.sub(r"\s+", " ", out + "\n" + err)
    problems += [f"nowhere in its output: {pattern}" for pattern in step.says if not re.search(pattern, said)]
    if step.bad:
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or not re.search(r"expected:? .*got:? ", said):
            problems.append("not one error with what was expected and what was got")
        if (work / "new").exists():
            problems.append("something was written")
        if tree(work / "out") != kept:
            problems.append("what was there has changed")
    if problems:
        problems.append((out + err)[-600:])
    elif step.check is not None:
        try:
            step.check(out)
        except Exception as e:  # noqa: BLE001 – a check that fails in any way is a finding
            problems.append(f"{type(e).__name__}: {e}")
    return problems


def start(step: Step, work: Path) -> subprocess.Popen[str]:
    program = str(Path(sys.executable).with_name("rowcol-edge")) if step.python is None else step.python
    held = _NO_SPECIAL_RIGHTS if step.locked and os.geteuid() == 0 else ()
    return subprocess.Popen(
        [*held, program, *step.argv],
        cwd=work, env=os.environ | {"ROWCOL_CACHE": str(work / "cache")}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def hear(process: subprocess.Popen[str], words: str) -> str:
    """What a program says of its progress until these words, or until its end."""
    heard = ""
    while words not in heard and process.stderr is not None and (line := process.stderr.readline()):
        heard += line
    return heard


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


if __name__ == "__main__":
    sys.exit(main())
