"""Boards that lack something, and files that do not arrive as they were sent; no network needed."""

from __future__ import annotations

import errno
import io
import json
import resource
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge import targets
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.profile import Profile
from rowcol_edge.errors import (
    BoardError,
    BundleError,
    ConfigError,
    IntegrityError,
    MissingDependencyError,
    RowcolError,
    VerifyError,
)
from rowcol_edge.fleet import board, cargo, outcome, remote
from rowcol_edge.fleet.connection import Connection
from rowcol_edge.package import write_bundle

from ..profiles import make_profile
from .conftest import OPTIONS, Home, Pipe, kill, until

Parts = dict[str, Any]
Say = remote.Say


def profile(bundle: Bundle, **options: Any) -> Profile:
    return remote.profile(bundle, "the pipe", **{**OPTIONS, **options})


def fails(bundle: Bundle, kind: type[RowcolError], **options: Any) -> RowcolError:
    with pytest.raises(kind) as caught:
        profile(bundle, **options)
    assert caught.value.what
    assert caught.value.expected
    assert caught.value.got
    assert "Traceback" not in str(caught.value)
    return caught.value


def test_a_board_without_numpy(pipe: Pipe, home: Home, opened: Bundle, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    home.python(f'exec {tmp_path}/bare/bin/python "$@"')
    error = fails(opened, MissingDependencyError)
    assert error.what == "board lacks numpy"
    assert "python3 -m pip install onnxruntime numpy pillow" in error.hint
    assert home.is_clean()


def test_a_board_without_the_runtime(pipe: Pipe, home: Home, bundle_parts: Parts, tmp_path: Path) -> None:
    # a runtime that nothing here has; the names of real ones depend on the environment of the tests
    changed = replace(bundle_parts["manifest"].runtime, name="tensorrt", install="see NVIDIA", providers=())
    manifest = replace(bundle_parts["manifest"], runtime=changed)
    with Bundle.open(write_bundle(tmp_path / "b", **{**bundle_parts, "manifest": manifest})) as bundle:
        error = fails(bundle, MissingDependencyError)
    assert error.what == "board lacks tensorrt"
    assert "see NVIDIA" in error.hint
    assert home.is_clean()


def test_what_a_board_lacks_is_installed_by_one_line_for_its_shell() -> None:
    spec = next(one for one in targets.load("raspberry-pi-5").runtimes if one.name == "tflite")
    lines = targets.install_lines(spec).splitlines()
    assert len(lines) == 4
    finding = {"level": "stop", "what": "tflite", "found": "not installed", "do": "\n".join(lines)}
    with pytest.raises(MissingDependencyError) as caught:
        outcome.check_doctor("board", {"stdout": json.dumps({"findings": [finding]})})
    line, _, noted = caught.value.hint.removeprefix("install it with: ").partition("  # ")
    assert line == " && ".join(lines[:3])
    assert noted.startswith("then here --board-python rowcol-edge/bin/python3, or python in boards.toml; where ai-edge")
    finding |= {"found": "ai-edge-litert 2.1 does not load", "do": f"install it again:\n{finding['do']}"}
    with pytest.raises(BoardError) as caught_too:
        outcome.check_doctor("board", {"stdout": json.dumps({"findings": [finding]})})
    assert caught_too.value.hint.startswith(f"install it again: {line}  # then here --board-python")
    assert subprocess.run(["sh", "-n", "-c", line], check=False).returncode == 0


def test_a_board_with_an_old_python(pipe: Pipe, home: Home, opened: Bundle) -> None:
    pretend = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"
    home.python(f'exec {sys.executable} -c "{pretend}" "$3"')
    error = fails(opened, BoardError)
    assert (error.expected, error.got) == ("Python 3.10 or newer", "3.9")
    assert home.is_clean()


def test_a_board_whose_python_says_something_else(pipe: Pipe, home: Home, opened: Bundle) -> None:
    home.python("yes hello | head -n 200")
    assert fails(opened, BoardError).expected == "a shell that runs a command"
    home.python("echo; echo rowcol-edge-board 3 12; cat > /dev/null & echo '[]'; exec sleep 5")
    assert fails(opened, BoardError).expected == "an answer of the program sent to it"


ODD = "an answer of the program sent to it"
OPENED = {"folder": "/tmp/x", "fresh": True, "begun": True, "machine": "x86_64"}


@pytest.mark.parametrize("version", ["a b", "", "3", "3 12 1", "-3 12", "9" * 5000 + " 1"])
def test_a_board_that_greets_with_no_version(pipe: Pipe, home: Home, version: str) -> None:
    home.python(f'echo; echo "rowcol-edge-board {version}"; exec cat > /dev/null')
    with pytest.raises(BoardError) as caught:
        Connection(pipe, "python3")
    assert caught.value.expected == ODD
    assert caught.value.got.startswith("b'rowcol-edge-board")


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ("open", "{}"),
        ("open", json.dumps({**OPENED, "folder": 5})),
        ("open", json.dumps({**OPENED, "begun": None})),
        ("open", '{"error": 5}'),
        ("remove", '{"error": "no"}'),
        ("held", '{"size": "3", "sha256": ""}'),
        ("held", "[" * 100_000),
        ("call", '{"code": "0"}'),
        ("follow", "{}"),
        ("follow", '{"at": 1, "end": [1]}'),
        ("follow", '{"at": 1, "end": {"step": "profile", "code": 0}}'),
        ("fetch", '{"size": null, "sha256": ""}'),
    ],
)
def test_a_board_that_answers_otherwise(pipe: Pipe, home: Home, request_: str, answer: str) -> None:
    (home.root / "answer").write_text(f"{answer}\n")
    home.python(f"echo; echo rowcol-edge-board 3 12; cat {home.root}/answer; exec cat > /dev/null")
    with Connection(pipe, "python3") as connection, pytest.raises(BoardError) as caught:
        connection.ask(request_)
    assert caught.value.expected == ODD


def test_a_board_that_answers_otherwise_ends_a_profile(pipe: Pipe, home: Home, opened: Bundle) -> None:
    home.python("echo; echo rowcol-edge-board 3 12; echo '{}'; exec cat > /dev/null")
    assert fails(opened, BoardError).expected == ODD
    lost = json.dumps({"at": 0, "end": None})  # and no word of why
    home.python(
        f"echo; echo rowcol-edge-board 3 12; printf '%s\\n' '{json.dumps(OPENED)}' '{lost}'; exec cat > /dev/null"
    )
    assert fails(opened, BoardError).got == "it was killed"


def test_a_login_that_prints_is_read_over(pipe: Pipe, home: Home, opened: Bundle) -> None:
    home.python(f'echo "Welcome to the board"; printf "no line end"; exec {sys.executable} "$@"')
    with Connection(pipe, "python3") as connection:
        folder = connection.ask("open", folder="", places=[], need_bytes=0, lease_seconds=60)["folder"]
        connection.ask("remove", folder=folder)
    assert home.is_clean()


def test_a_board_of_another_architecture(pipe: Pipe, home: Home, bundle_parts: Parts, tmp_path: Path) -> None:
    target = {"name": "raspberry-pi-5", "match": {"machine": "riscv64"}}
    manifest = replace(bundle_parts["manifest"], target=target)
    with Bundle.open(write_bundle(tmp_path / "b", **{**bundle_parts, "manifest": manifest})) as bundle:
        error = fails(bundle, BundleError)
    assert error.expected == "a machine of kind riscv64"
    assert home.is_clean()


def test_a_board_without_room(pipe: Pipe, home: Home, opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cargo, "SPARE_BYTES", 1 << 60)
    error = fails(opened, BoardError)
    assert "MiB free" in error.expected
    assert f"{home.tmp}: " in error.got
    assert "--board-folder" in error.hint
    assert home.is_clean()


@pytest.mark.parametrize("blocks", [8, 100])  # the program that is sent first does not fit; the device program does not
def test_a_disk_that_fills_up(pipe: Pipe, home: Home, opened: Bundle, blocks: int) -> None:
    home.python(f'ulimit -f {blocks}; exec {sys.executable} "$@"')
    assert "File too large" in fails(opened, BoardError).got
    assert home.is_clean()


def test_a_folder_that_cannot_be_written(pipe: Pipe, home: Home, opened: Bundle) -> None:
    error = fails(opened, BoardError, folder="/sys")
    assert "a folder that can be written" in error.expected
    assert error.got.startswith("/sys: ")
    assert "No such file" in fails(opened, BoardError, folder="/no/such/folder").got
    assert home.is_clean()


def test_where_the_first_place_cannot_be_written_the_next_is_taken(
    pipe: Pipe, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Home, "variables", {"PATH": f"{home.bin}:/usr/bin:/bin", "TMPDIR": "/sys"})
    with Connection(pipe, "python3") as connection:
        folder = connection.ask("open", folder="", places=[], need_bytes=0, lease_seconds=60)["folder"]
        connection.ask("remove", folder=folder)
    assert folder.startswith(("/tmp/", "/var/tmp/"))
    assert not Path(folder).exists()


def test_arms_that_verify_otherwise_are_an_error_of_their_own(
    pipe: Pipe, home: Home, bundle_parts: Parts, tmp_path: Path
) -> None:
    outputs = bundle_parts["golden_outputs"]
    wrong = {**outputs, "dense@fp32": {"output": outputs["dense@fp32"]["output"] + 1}}
    with Bundle.open(write_bundle(tmp_path / "b", **{**bundle_parts, "golden_outputs": wrong})) as bundle:
        error = fails(bundle, VerifyError)
    assert (error.what, error.expected) == ("board: arm dense@fp32", "a relative error ≤ 1e-05")
    assert "another version of onnxruntime" in error.hint
    assert home.is_clean()


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put another device program in the place of ours: these lines, for which ``step`` is the command."""

    def put(lines: str) -> None:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("__main__.py", f"import subprocess, sys, time\nstep = sys.argv[1]\n{lines}\n")
        monkeypatch.setattr(cargo, "device_archive_bytes", made.getvalue)

    return put


NOTHING_FOUND = "if step == 'doctor': print('{\"findings\": []}')\n"


def test_a_step_that_hangs_is_ended(
    pipe: Pipe, home: Home, opened: Bundle, program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = "if step == 'verify': subprocess.Popen(['sleep', '600']); print('waits', file=sys.stderr); time.sleep(600)"
    program(NOTHING_FOUND + hang)
    monkeypatch.setattr(remote, "STEP_SECONDS", 5.0)
    error = fails(opened, BoardError)
    assert (error.what, error.expected, error.got) == ("verify on board", "an end within 5 s", "waits")
    assert home.is_clean()


def test_a_profile_that_crashes_is_not_one_of_arms_that_are_too_large(
    pipe: Pipe, home: Home, opened: Bundle, program: Callable[[str], None]
) -> None:
    """Though both end by 1, and though one may lie there of an earlier try."""
    earlier = "if step == 'verify': open('profile.json', 'w').write('earlier')\n"
    program(NOTHING_FOUND + earlier + "if step == 'profile': raise KeyError('x')")
    error = fails(opened, BoardError)
    assert (error.what, error.got) == ("profile on board", "KeyError: 'x'")
    assert home.is_clean()


def test_a_keeper_that_was_lost_after_its_last_step_loses_no_profile(
    pipe: Pipe, home: Home, opened: Bundle, program: Callable[[str], None]
) -> None:
    program(NOTHING_FOUND + "if step == 'profile': open('profile.json', 'w').write('content')")
    run = remote._Run(pipe, "python3", [], {}, cargo.Cargo.pack(opened, home.root), {}, None, remote.on_stderr)
    assert run.result() == b"content"
    kill(home.keepers())
    (Path(run._folder) / "result.json").unlink()
    assert run.result() == b"content"
    run.clean()
    assert home.is_clean()


def test_what_arrives_changed_is_refused(
    pipe: Pipe, home: Home, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Connection.send

    def flip(self: Connection, data: bytes) -> None:
        send(self, bytes([data[0] ^ 1]) + data[1:])

    monkeypatch.setattr(Connection, "send", flip)
    assert fails(opened, IntegrityError).what == "device.pyz as it lies on the board"
    assert home.is_clean()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"[]", BundleError),
        (b"{", BundleError),
        (make_profile().to_json().encode()[:-10], BundleError),
        (make_profile().to_json().encode(), IntegrityError),  # of another bundle
    ],
)
def test_a_profile_is_checked(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, data: bytes, kind: type[RowcolError]
) -> None:
    monkeypatch.setattr(remote._Run, "result", lambda _: data)
    with pytest.raises(kind, match="profile from board"):
        remote.profile(opened, "ssh://board", **OPTIONS)


ENDED = {"step": "profile", "code": 0, "told": "", "limit_seconds": 9.0, "profile": True}


class Ended:
    """A run that has ended on a board, with what it wrote."""

    def __init__(self, pipe: Pipe, bundle: Bundle, log: bytes, profile: bytes, say: Say) -> None:
        packed = cargo.Cargo.pack(bundle, pipe.home.root)
        self.run = remote._Run(pipe, "python3", [], {}, packed, {}, None, say)
        with Connection(pipe, "python3") as connection:
            opened = connection.ask("open", folder="", places=[], need_bytes=0, lease_seconds=60)
        folder = Path(opened["folder"])
        (folder / "log").write_bytes(log)
        (folder / "profile.json").write_bytes(profile)
        (folder / "result.json").write_text(json.dumps(ENDED))
        self.run._folder = str(folder)


def test_a_profile_that_arrives_changed_is_refused(
    pipe: Pipe, home: Home, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = Connection.receive
    monkeypatch.setattr(Connection, "receive", lambda self, count: receive(self, count)[:-1] + b"x")
    ended = Ended(pipe, opened, b"", b"content", remote.on_stderr)
    with pytest.raises(IntegrityError, match="profile from board"):
        ended.run.result()
    ended.run.clean()
    assert home.is_clean()


def test_a_signal_to_the_line_that_cleans_leaves_nothing_behind(
    pipe: Pipe, home: Home, opened: Bundle, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``timeout`` sends it to a group of which the line's program is still one."""
    ended = Ended(pipe, opened, b"", b"content", said.append)
    command, lines = Pipe.command, ["kill -TERM $$"]
    monkeypatch.setattr(
        Pipe, "command", lambda self, remote: ["sh", "-c", lines.pop()] if lines else command(self, remote)
    )
    ended.run.clean()
    assert (lines, said) == ([], [])
    assert home.is_clean()


def test_what_a_board_says_steers_no_terminal(pipe: Pipe, home: Home, opened: Bundle, said: list[str]) -> None:
    ended = Ended(pipe, opened, b"\x1b[2Jboo \xff\n", b"content", said.append)
    assert ended.run.result() == b"content"
    ended.run.clean()
    assert said == ["board: [2Jboo �"]
    assert home.is_clean()


def test_options_that_are_wrong_are_told_before_anything_is_copied(opened: Bundle) -> None:
    with pytest.raises(BundleError, match=r"did you mean dense@fp32\?"):
        remote.profile(opened, "ssh://board", arms=("dense@fp3",))
    with pytest.raises(BundleError):
        remote.profile(opened, "ssh://board", baseline="nothing")
    with pytest.raises(ConfigError, match="got evidence"):
        remote.profile(opened, "ssh://board", evidence="proxy")


def test_folders_that_nobody_waits_for_are_swept(pipe: Pipe, home: Home) -> None:
    dead, fresh, foreign = home.tmp / f"{board.PREFIX}dead", home.tmp / f"{board.PREFIX}new", home.tmp / "other"
    for folder, lease in ((dead, "0"), (fresh, "900"), (foreign, "0")):
        folder.mkdir()
        (folder / "lease").write_text(lease)
    with Connection(pipe, "python3") as connection:
        folder = connection.ask("open", folder="", places=[], need_bytes=0, lease_seconds=60)["folder"]
        assert set(home.left) == {fresh, foreign, Path(folder)}
        connection.ask("remove", folder=folder)


def test_a_run_is_gone_on_with_once_its_line_has_ended_and_then_removed_by_whoever_has_it(
    pipe: Pipe, home: Home
) -> None:
    asked = {"folder": "", "places": [], "need_bytes": 0, "lease_seconds": 60, "run": "same"}
    with Connection(pipe, "python3") as first, Connection(pipe, "python3") as second:
        one = first.ask("open", **asked, who="first\n1")
        other = second.ask("open", **asked, who="second\n2")
        assert one["fresh"]
        assert other["fresh"]  # for a line works on the other
        assert one["folder"] != other["folder"]
        second.ask("remove", folder=other["folder"], who="second\n2")
    with Connection(pipe, "python3") as third, Connection(pipe, "python3") as late:
        again = third.ask("open", **asked, who="third\n3")
        assert (again["folder"], again["fresh"]) == (one["folder"], False)
        late.ask("remove", folder=one["folder"], who="first\n1")
        assert [str(path) for path in home.left] == [one["folder"]]
        third.ask("remove", folder=one["folder"], who="third\n3")
    assert home.is_clean()


def test_a_board_that_hears_nothing_more_cleans_itself(pipe: Pipe, home: Home) -> None:
    with Connection(pipe, "python3") as connection:
        connection.ask("open", folder="", places=[], need_bytes=0, lease_seconds=1)
        assert len(home.left) == 1
    until(home.is_clean)


def test_a_link_in_the_place_of_a_lost_folder_is_not_followed(pipe: Pipe, home: Home, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    link = home.tmp / f"{board.PREFIX}x"
    link.symlink_to(precious)
    with Connection(pipe, "python3") as connection:
        opened = connection.ask("open", folder=str(link), places=[], need_bytes=0, lease_seconds=60)
        assert opened["fresh"]
        assert opened["folder"] != str(link)
        connection.ask("remove", folder=opened["folder"])
    assert list(precious.iterdir()) == []


def test_a_disk_here_that_is_full_while_the_cargo_is_packed_is_named(opened: Bundle, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # Python ignores the signal: a write is an error
    try:
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            cargo.Cargo.pack(opened, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
