from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import typer

from rowcol_edge import cli


def test_every_table_is_that_of_its_result(root: Path) -> None:
    done = subprocess.run([sys.executable, "tools/readme_tables.py", "--check"], cwd=root, check=False)
    assert done.returncode == 0, "run: python tools/readme_tables.py"


def test_commands_and_files_that_the_readme_names_exist(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\btools/[\w./-]+\.(?:py|json)", text)) | set(re.findall(r"`(rowcol_edge/[\w./]+)`", text))
    assert "tools/demo.py" in named
    missing = [path for path in sorted(named) if not (root / path).exists()]
    assert not missing


def test_the_pipeline_of_the_readme_has_commands_and_options_that_exist(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    [pipeline] = re.findall(r"^```yaml\n(jobs:.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"run: (?:>\s+)?(.+(?:\n +--.+)*)", pipeline)
    installed, *commands = [shlex.split(line) for line in lines]
    assert installed[-1] == "rowcol-edge[build,report] @ git+$ROWCOL_EDGE"
    assert [words[:2] for words in commands] == [
        ["rowcol-edge", name] for name in ("build", "profile", "gate", "report")
    ]
    group = typer.main.get_group(cli.app)
    for _, name, *arguments in commands:
        with group.make_context("rowcol-edge", [name]) as context:
            command = group.get_command(context, name)
            assert command is not None
            assert command.make_context(name, [*arguments], parent=context).params
