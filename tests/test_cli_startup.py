"""`rowcol-edge --help` answers at once because nothing heavy is loaded for it; this holds the cause, not the time."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rowcol_edge.device.manifest import PRECISIONS
from rowcol_edge.device.runtimes import RUNTIMES

HEAVY = {"torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "onnxsim", "numpy", "scipy", "PIL", "safetensors"}


def test_importing_the_package_loads_nothing_heavy(python_loads: Callable[[str], set[str]]) -> None:
    loaded = python_loads("import rowcol_edge; dir(rowcol_edge)")
    assert "rowcol_edge" in loaded
    assert not loaded & (HEAVY | {"typer", "rich"})


def test_importing_the_command_line_loads_nothing_heavy(python_loads: Callable[[str], set[str]]) -> None:
    loaded = python_loads("import rowcol_edge.cli")
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_a_fleet_loads_neither_torch_nor_dask_before_it_builds_or_has_a_scheduler(
    python_loads: Callable[[str], set[str]],
) -> None:
    loaded = python_loads("import rowcol_edge.fleet.campaign, rowcol_edge.fleet.boards, rowcol_edge.report.fleet")
    assert "rowcol_edge.fleet.queueing" in loaded
    assert not loaded & (HEAVY - {"numpy"} | {"dask", "distributed", "jinja2"})


def test_listing_targets_loads_neither_torch_nor_a_runtime(python_loads: Callable[[str], set[str]]) -> None:
    loaded = python_loads(
        "import contextlib, io\n"
        "from rowcol_edge.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    app(['targets', '--json'], standalone_mode=False)"
    )
    assert "rowcol_edge.targets" in loaded
    assert not loaded & (HEAVY - {"numpy", "PIL"})


def test_the_help_of_build_names_every_runtime_and_precision(root: Path) -> None:
    command = [sys.executable, "-c", "from rowcol_edge.cli import main; main()", "build", "--help"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    wanted = {*RUNTIMES, *PRECISIONS, "auto"}
    assert wanted <= set(re.findall(r"[\w-]+", shown))


def test_help_names_every_command(root: Path) -> None:
    command = [sys.executable, "-c", "from rowcol_edge.cli import main; main()", "--help"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    wanted = ["targets", "inspect", "factor", "build", "profile", "compare", "verify", "run", "demo"]
    assert [name for name in wanted if f"{name} " not in shown] == []
