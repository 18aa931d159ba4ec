"""Record what a board's /proc and /sys say, as far as the probes of rowcol_edge.device read them, for tests.

    python tools/record_tree.py raspberry-pi-5.json

Whatever the probes open is copied, and nothing else, with what the programs that they ask (`vcgencmd`, `nvpmodel`)
answer. Left out or blotted out are the machine's id, serial numbers, its name, addresses, ids of containers, and what
belongs to this process. Look at the file before you hand it on. It needs a checkout and Python 3.10; nothing is
installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rowcol_edge.device import doctor, system

MARKERS = (".dockerenv", "run/.containerenv")
"""Files that are looked for and not opened."""
PRIVATE = ("etc/machine-id", "proc/self/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"), help="a tree that stands in for this machine's")
    options = parser.parse_args()
    found = record(options.root)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found['files'])} files written to {options.out}: look at it before you hand it on")


def record(root: Path) -> dict[str, Any]:
    """``files``: contents by path below the root, programs as scripts that say the same; ``closed``: not readable."""
    opened, asked = watched(root)
    files: dict[str, str] = {name: "" for name in MARKERS if (root / name).exists()}
    closed = []
    for name in opened:
        try:
            files[name] = blotted((root / name).read_text(encoding="utf-8", errors="replace"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            closed.append(f"{name}: {e.strerror}")
    files |= {name: script(root / name, calls) for name, calls in asked.items() if (root / name).exists()}
    return {"schema": 1, "machine": platform.machine(), "files": dict(sorted(files.items())), "closed": closed}


def watched(root: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
    """What the probes open below the root, and the programs there that they start, with their arguments."""
    opened: dict[str, None] = {}
    asked: dict[str, list[list[str]]] = {}
    watching = True

    def look(event: str, values: tuple[Any, ...]) -> None:
        if not watching or event not in ("open", "subprocess.Popen"):
            return
        path = Path(str(values[0]))
        if not path.is_relative_to(root) or not path.is_absolute():
            return
        name = str(path.relative_to(root))
        if event == "subprocess.Popen":
            asked.setdefault(name, []).append([str(word) for word in values[1][1:]])
        elif name.startswith(("proc/", "sys/", "etc/", "var/lib/")) and not name.startswith(PRIVATE):
            opened[name] = None

    sys.addaudithook(look)  # for good: there is no way to take it away
    host = system.environment(root)
    doctor.memory({}, root)
    watching = False
    assert host.machine
    return list(opened), asked


def blotted(text: str) -> str:
    """Without what names the machine."""
    text = re.sub(r"(?im)^(serial\w*\s*:\s*)\S.*$", r"\g<1>0", text)
    text = re.sub(r"[0-9a-f]{16,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|([0-9a-f]{2}:){5}[0-9a-f]{2}", "0", text)
    return re.sub(rf"\b{re.escape(platform.node())}\b", "host", text) if platform.node() else text


def script(program: Path, calls: list[list[str]]) -> str:
    """A program for a shell that answers these calls as the one there does."""
    lines = ["#!/bin/sh", 'case "$*" in']
    for arguments in calls:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        lines += [f"{shlex.quote(' '.join(arguments))}) cat <<'END'", f"{blotted(done.stdout).rstrip()}", "END", ";;"]
    return "\n".join([*lines, "esac", ""])


if __name__ == "__main__":
    main()
