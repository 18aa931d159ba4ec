"""What a full build costs: ResNet-50 for every runtime, fp32 and int8, all arms, with an empty cache and a full one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rowcol_edge import job

_EVERY_SECONDS = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


def build_cost(runtimes: list[str], work: Path, progress: job.Progress) -> dict[str, Any]:
    """Wall seconds of the commands in all, and the most memory that one of them and its processes held together.

    Measured once for a state of the package: what `work` has of an earlier run of the same is kept.
    """
    result = work / "cost.json"
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    key = {"runtimes": runtimes, "tools": job.tool_versions(), "source": job.own_source()}
    if any(found.get(name) != value for name, value in key.items()):
        shutil.rmtree(work / "cost", ignore_errors=True)
        shutil.rmtree(os.environ["ROWCOL_CACHE"], ignore_errors=True)
        found = dict(key)
        for which in ("first", "second"):
            found[which] = _builds(runtimes, work / "cost" / which, which, progress)
        shutil.rmtree(work / "cost", ignore_errors=True)
        result.write_text(json.dumps(found), encoding="utf-8")
    return found


def _builds(runtimes: list[str], out: Path, which: str, progress: job.Progress) -> dict[str, Any]:
    commands = [(runtime, precision) for runtime in runtimes for precision in ("int8", "fp32")]
    seconds, peak = {}, 0
    models = Path(__file__).with_name("benchmark_models.py").resolve()
    for done, (runtime, precision) in enumerate(commands):
        progress(f"{which} build of ResNet-50", done, len(commands))
        arguments = [
            "build", f"{models}:resnet50", "--calib", f"{models}:calibration", "--budget", "params<=0.5x",
            "--runtime", runtime, "--precision", precision, "--out", str(out / precision),
        ]  # fmt: skip
        began = time.monotonic()
        most = _run([sys.executable, "-m", "rowcol_edge", *arguments])
        seconds[f"{runtime} {precision}"] = round(time.monotonic() - began, 1)
        peak = max(peak, most)
    progress(f"{which} build of ResNet-50", len(commands), len(commands))
    return {"seconds": round(sum(seconds.values()), 1), "by_command": seconds, "peak_bytes": peak}


def _run(command: list[str]) -> int:
    """Peak resident bytes of a process and its descendants, sampled; shared pages count once for each."""
    peak = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_EVERY_SECONDS):
            peak = max(peak, _resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return peak


def _resident(root: int) -> int:
    parents: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # the name may hold spaces and brackets; what follows its last bracket is: state, parent, …, rss in pages
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(folder.name)] = int(fields[1]), int(fields[21]) * _PAGE
    family, size = {root}, 0
    while len(family) != size:
        size = len(family)
        family |= {pid for pid, (parent, _) in parents.items() if parent in family}
    return sum(parents[pid][1] for pid in family if pid in parents)
