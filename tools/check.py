"""Set everything up and run every check: `python3 tools/check.py [arguments of pytest]`.

ruff, mypy, import-linter, vermin (the device side keeps to Python 3.10) and pytest, each even if one before it failed.
Needs pip only; tests that need more are named in one line at the end; ROWCOL_REQUIRE_SYSTEM=1 makes that a failure.
"""

from __future__ import annotations

import subprocess
import sys
import time

import _venv

CHECKS: dict[str, list[str]] = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import-linter": ["lint-imports", "--no-logo", "--cache-dir", ".cache/imports"],
    "vermin": [
        *("vermin", "--target=3.10-", "--no-tips", "--violations", "--eval-annotations"),
        *("rowcol_edge/device", "rowcol_edge/errors.py", "rowcol_edge/fleet/board.py", "rowcol_edge/fleet/keeper.py"),
    ],
    # in the order of tests/conftest.py, whose long modules come first
    "pytest": ["pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", "--durations=40", *sys.argv[1:]],
}


def main() -> int:
    python = _venv.ensure(["build", "fleet", "openvino", "report", "samples", "tflite"], ["dev", "data"])
    results = {}
    for name, (program, *arguments) in CHECKS.items():
        print(f"── {name} ──", flush=True)
        started = time.monotonic()
        command = [str(python.with_name(program)), *arguments]
        # a pytest worker has one core: threads of its own would only stand in the way of the other's
        environment = _venv.environment() | ({"OMP_NUM_THREADS": "1"} if name == "pytest" else {})
        code = subprocess.run(command, cwd=_venv.ROOT, env=environment, check=False).returncode
        results[name] = (code, time.monotonic() - started)
    failed = [name for name, (code, _) in results.items() if code != 0]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, (_, seconds) in results.items())
    print(f"{times}: {'FAILED ' + ', '.join(failed) if failed else 'all good'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
