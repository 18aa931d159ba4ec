"""Set everything up and run the main job on an embedded sample: `python3 tools/demo.py [options of the demo]`."""

from __future__ import annotations

import os
import sys

import _venv


def main() -> None:
    python = _venv.ensure(["build", "samples"])
    program = python.with_name("rowcol-edge")
    os.execve(program, [str(program), "demo", *sys.argv[1:]], _venv.environment())


if __name__ == "__main__":
    main()
