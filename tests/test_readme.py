from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_every_table_is_that_of_its_result(root: Path) -> None:
    done = subprocess.run([sys.executable, "tools/readme_tables.py", "--check"], cwd=root, check=False)
    assert done.returncode == 0, "run: python tools/readme_tables.py"


def test_commands_and_files_that_the_readme_names_exist(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\btools/[\w./-]+\.(?:py|json)", text)) | set(re.findall(r"`(rowcol_edge/[\w./]+)`", text))
    assert "tools/demo.py" in named
    missing = [path for path in sorted(named) if not (root / path).exists()]
    assert not missing
