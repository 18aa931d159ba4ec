"""Showing results needs no build: the extra `report` alone does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..profiles import make_profile
from .test_page import rich_profile, written

BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxruntime", "tomli_w", "safetensors", "PIL", "distributed"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from rowcol_edge.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["report", "bundle/profiles/0.json", "--out", "r.html", "--json", "r.json"], 0, ""),
        (["gate", "bundle/profiles/0.json", "--max-drop", "5pp", "--max-bytes", "4MB"], 1, "1 of 3 missed"),  # memory
        (["compare", "bundle/profiles/0.json", "later.json"], 0, ""),
        (["compare", "bundle"], 0, ""),
    ],
    ids=["report", "gate", "compare profiles", "compare bundles"],
)
def test_without_the_packages_of_a_build(
    tmp_path: Path, root: Path, arguments: list[str], code: int, said: str
) -> None:
    written(tmp_path, rich_profile())  # a bundle with a plan
    (tmp_path / "later.json").write_text(make_profile(created="2026-03-03T00:00:00Z").to_json(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stderr.strip().endswith(said) if said else done.stderr == ""
    assert done.stdout or (tmp_path / "r.html").stat().st_size > 10_000
