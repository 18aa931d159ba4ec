"""Boards that are this machine: behind a real sshd on loopback, or at the end of a pipe."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.profile import Profile
from rowcol_edge.errors import BoardError, RowcolError, UnreachableError
from rowcol_edge.fleet import remote
from rowcol_edge.fleet.keeper import MARK

from ..device.conftest import bundle_parts, bundle_path  # noqa: F401 – fixtures

TESTS = "ROWCOL_EDGE_TESTS"
"""A variable of all that the tests start: their process."""
OPTIONS: dict[str, Any] = {"arms": ("dense@fp32",), "blocks": 6, "seconds": 2.0, "threads": 1}
"""A run of a few seconds."""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def processes(wanted: Callable[[Path], bool]) -> list[int]:
    """Ids of the processes whose folder in /proc is wanted."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted(entry):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def until(condition: Callable[[], Any], seconds: float = 150.0) -> Any:
    """What the condition gives once it gives something."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value


@dataclass
class Home:
    """What a board has: programs in ``bin``, a temporary folder ``tmp``; a run leaves its traces nowhere else."""

    root: Path
    bin: Path = field(init=False)
    tmp: Path = field(init=False)

    def __post_init__(self) -> None:
        self.bin, self.tmp = self.root / "bin", self.root / "tmp"
        self.tmp.mkdir(parents=True)
        self.python(f'exec {sys.executable} "$@"')

    def python(self, text: str) -> None:
        """What its ``python3`` does."""
        script(self.bin / "python3", text)

    @property
    def variables(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "TMPDIR": str(self.tmp)}

    @property
    def python3(self) -> str:
        """By its path: the user's shell may have a PATH of its own."""
        return str(self.bin / "python3")

    @property
    def left(self) -> list[Path]:
        return list(self.tmp.iterdir())

    def running(self) -> list[int]:
        """Everything that was started for a folder in ``tmp``."""
        mark = f"{MARK}={self.tmp}/".encode()
        return processes(lambda entry: mark in (entry / "environ").read_bytes())

    def steps(self, name: str) -> list[int]:
        """Processes of the device program that carry out a step; not what they start, which has their command line
        from fork to exec."""
        words = f"device.pyz\0{name}\0".encode()
        mine = set(self.running())
        found = processes(lambda entry: int(entry.name) in mine and words in (entry / "cmdline").read_bytes())
        return [pid for pid in found if parent(pid) not in found]

    def keepers(self) -> list[int]:
        mine = set(self.running())
        return processes(lambda entry: int(entry.name) in mine and b"keeper.py" in (entry / "cmdline").read_bytes())

    def during(self, step: str, happens: Callable[[], Any]) -> threading.Thread:
        """Let something happen once a step of the run is under way."""

        def wait() -> None:
            until(lambda: self.steps(step), 60)
            happens()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    def is_clean(self) -> bool:
        return not self.left and not self.running()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "board")
    yield made
    kill(made.running())


@dataclass(frozen=True)
class Pipe:
    """A board without a network: its shell is started here."""

    home: Home
    name = "board"
    package = "sh"

    def command(self, remote: str) -> list[str]:
        return ["env", "-i", *(f"{k}={v}" for k, v in self.home.variables.items()), "/bin/sh", "-c", remote]

    def failure(self, code: int, told: str) -> RowcolError:
        kind = UnreachableError if code == 255 else BoardError
        return kind(self.name, got=told)


@pytest.fixture
def pipe(home: Home, monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Any address leads to it."""
    made = Pipe(home)
    monkeypatch.setattr("rowcol_edge.fleet.remote.parse", lambda address, known_hosts: made)
    return made


@dataclass
class Sshd:
    """An sshd of its own, with keys of its own, for the user who runs the tests."""

    folder: Path
    home: Home
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def profile(self, opened: Bundle, **options: Any) -> Profile:
        """A short profile over this sshd."""
        reach = {"known_hosts": self.known_hosts, "python": self.home.python3}
        return remote.profile(opened, self.address, **{**reach, **OPTIONS, **options})

    def new_host_key(self) -> None:
        for name in ("host_key", "host_key.pub"):
            (self.folder / name).unlink(missing_ok=True)
        new_key(self.folder / "host_key")

    def know_host_key(self) -> None:
        kind, key, *_ = (self.folder / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def start(self) -> None:
        variables = " ".join(f'"{k}={v}"' for k, v in self.home.variables.items())
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            f"SetEnv {variables}\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # what its service makes
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None
        log = (self.folder / "sshd.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [program, "-D", "-e", "-f", str(self.folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log
            )
        until(self._listens)

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "sshd.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def sessions(self) -> list[int]:
        """Processes of sshd that carry connections."""
        assert self.process is not None
        parents = {pid: parent(pid) for pid in processes(lambda entry: _name(entry).startswith("sshd"))}
        family = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return sorted(family - {self.process.pid})

    def drop(self) -> None:
        """Every line breaks; the board goes on."""
        kill(self.sessions())

    def stop(self) -> None:
        if self.process is not None:
            sessions = self.sessions()
            self.process.kill()
            self.process.wait()
            kill(sessions)
            self.process = None

    def reboot(self) -> None:
        """All processes end; what lies on the disk stays."""
        self.stop()
        until(lambda: not kill(self.home.running()) and not self.home.running())


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(entry: Path) -> str:
    return (entry / "comm").read_text()


def new_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def sshd(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """For tests marked `system("openssh")`. The user's key comes from ssh-agent, as it does for people."""
    folder = tmp_path / "ssh"
    folder.mkdir()
    made = Sshd(folder, home, _free_port())
    new_key(folder / "user_key")
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    made.new_host_key()
    made.know_host_key()
    keys = folder / "agent"
    holder = subprocess.Popen(["ssh-agent", "-D", "-a", str(keys)], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(keys))
        # the socket is there before somebody listens to it; by 2 it says that nobody does
        until(lambda: subprocess.run(["ssh-add", "-l"], capture_output=True, check=False).returncode != 2)
        subprocess.run(["ssh-add", "-q", str(folder / "user_key")], check=True)
        made.start()
        yield made
    finally:
        made.stop()
        holder.kill()
        holder.wait()


@pytest.fixture
def second_sshd(sshd: Sshd, tmp_path: Path) -> Iterator[Sshd]:
    """Another board, with a home and host key of its own, which lets the same user in."""
    folder = tmp_path / "ssh-2"
    folder.mkdir()
    made = Sshd(folder, Home(tmp_path / "board-2"), _free_port())
    shutil.copy(sshd.folder / "authorized_keys", folder)
    made.new_host_key()
    made.know_host_key()
    try:
        made.start()
        yield made
    finally:
        made.stop()
        kill(made.home.running())


@pytest.fixture
def said() -> list[str]:
    """What a run has told; hand its ``append`` over as ``say``."""
    return []


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests start can be told from what others start meanwhile."""
    monkeypatch.setenv(TESTS, str(os.getpid()))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowcol_edge.fleet.remote.RECONNECT_SECONDS", 20.0)
    monkeypatch.setattr("rowcol_edge.fleet.remote.CLEAN_SECONDS", 5.0)


@pytest.fixture
def opened(bundle_path: Path) -> Iterator[Bundle]:  # noqa: F811 – the fixture
    with Bundle.open(bundle_path) as found:
        yield found
