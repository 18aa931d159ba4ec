from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.files import write_whole
from rowcol_edge.device.main import profile_path
from rowcol_edge.errors import BundleError

LIMITED = """
import resource, sys
from pathlib import Path
from rowcol_edge.device.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as a full disk: what is over it is not written
try:
    write_whole(Path(sys.argv[1]), "x" * 100_000)
except OSError as e:
    sys.exit(f"{e.filename}: {e.strerror}")
"""


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    write_whole(tmp_path / "a.txt", "né\ud800")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "né?"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_disk_that_is_full_leaves_the_old_file_and_names_the_new_one(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, f"{path}: File too large")
    assert path.read_text(encoding="utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there/a.txt")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there/a.txt").read_text(encoding="utf-8") == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    write_whole(pipe, "through it")
    reader.join(30)
    assert got == ["through it"]
    assert pipe.is_fifo()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "text")


def test_a_bundle_in_a_read_only_place_asks_for_another_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    assert not (bundle.root / "profiles").exists()
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(BundleError, match=r"a folder that can be written, got neither – name another place with --out"):
        profile_path(None, bundle, "board")


def test_a_profile_asks_for_room_before_it_is_measured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle.root.parent / "p.json"
    assert profile_path(out, bundle, "board") == out
    monkeypatch.setattr("rowcol_edge.device.main._ROOM_BYTES", 1 << 62)
    with pytest.raises(BundleError, match=r"p.json: expected room for the profile, .* MiB free"):
        profile_path(out, bundle, "board")
    assert profile_path("/dev/null", bundle, "board") == Path("/dev/null")
