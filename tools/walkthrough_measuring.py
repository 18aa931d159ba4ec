"""The steps of tools/walkthrough.py that go through what measures, and what reads measurements.

One bundle is profiled here, on a board by ssh that is this machine, and by a fleet; then reports, gates, sessions
beside each other, sweeps, and files that are wrong.
"""

from __future__ import annotations

import csv
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from walkthrough_steps import Step, bad, manifest

BUILD = ("build", "sample:fmnist-vit", "--target", "generic-x86", "--energy", "0.99", "--precision", "fp32")
BUNDLE = "measured/generic-x86-onnxruntime"
ARMS = {"factored@fp32", "dense@fp32"}
SHORT = ("--blocks", "6", "--seconds", "8")
ONE = (*SHORT, "--threads", "1")
BOARD = '[[boards]]\nname = "{}"\ntarget = "generic-x86"\non = "{}"\n'
SWEEP = """\
model = "sample:fmnist-vit"
target = "generic-x86"
runtime = "onnxruntime"
precision = "fp32"
budget = ["params<=0.6x", "params<=0.4x"]
out = "sweep"
"""
_START_SECONDS = 10.0


def steps(work: Path) -> Iterator[Step]:
    yield from _profiles(work)
    yield from _reports(work)
    yield from _gates()
    yield from _sessions(work)
    yield from _fleet(work)
    if shutil.which("ssh-agent") and _sshd():
        with _loopback() as board:
            yield from _by_ssh(work, *board)
    else:
        print("no OpenSSH server here: the steps on a board by ssh are left out", flush=True)
    yield from _bad(work)


def _profile(work: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((work / name).read_text(encoding="utf-8"))
    return read


def _measured(work: Path, name: str) -> Callable[[str], None]:
    def check(_: str) -> None:
        found = _profile(work, name)
        assert set(found["arms"]) == ARMS
        assert found["digest"] == sha256((work / BUNDLE / "manifest.json").read_bytes()).hexdigest()
        for pair in found["comparisons"]:
            assert pair["ci_low"] <= pair["ratio"] <= pair["ci_high"], pair

    return check


def _profiles(work: Path) -> Iterator[Step]:
    def everything(_: str) -> None:
        found = _profile(work, "all.json")
        for name, arm in found["arms"].items():
            assert arm["footprints"], name
            assert sum(layer["ns"] for layer in found["operators"]["arms"][name]["layers"]) > 0
            assert arm["energy"] or found["energy_note"], name
        assert found["operators"]["comparisons"]

    yield Step("build what is measured", (*BUILD, "--out", "measured"), needed=True)
    asked = ("profile", BUNDLE, *SHORT, "--memory", "--ops", "--energy", "--out", "all.json")
    yield Step("profile with memory, ops and energy", asked, check=everything, says=("energy",), needed=True)
    for name, more in (("old", ONE), ("new", ONE), ("threads", (*SHORT, "--threads", "2"))):
        file = f"{name}.json"
        asked = ("profile", BUNDLE, *more, "--out", file)
        yield Step(f"profile, {name} session", asked, check=_measured(work, file), needed=True)


def _reports(work: Path) -> Iterator[Step]:
    def written(_: str) -> None:
        page = (work / "report.html").read_text(encoding="utf-8")
        assert page.count("<svg") > 4, page.count("<svg")
        for word in (*ARMS, "Memory over time", "head"):
            assert word in page, word
        figures = _profile(work, "report.json")
        [profile] = figures["profiles"]
        assert profile["layers"]
        assert profile["operators"]["arms"].keys() == ARMS
        with (work / "report.csv").open(newline="", encoding="utf-8") as file:
            assert {row["arm"] for row in csv.DictReader(file)} == ARMS

    def apart(_: str) -> None:
        notes = _profile(work, "two.json")["notes"]
        assert any("differ in threads: 1 (old.json), 2 (threads.json)" in note for note in notes), notes

    formats = ("--out", "report.html", "--json", "report.json", "--csv", "report.csv")
    yield Step("report, with JSON and CSV", ("report", "all.json", "--bundle", BUNDLE, *formats), check=written)
    two = ("report", "old.json", "threads.json", "--out", "two.html", "--json", "two.json")
    yield Step("report of two that do not go side by side", two, check=apart)


def _gates() -> Iterator[Step]:
    gate = ("gate", "all.json", "--bundle", BUNDLE)
    limits = ("--max-latency-ratio", "50", "--max-drop", "50pp", "--max-bytes", "1GB", "--max-memory", "8GiB")
    held = ("held: latency", "held: .*drop", "held: file", "held: peak memory")
    yield Step("gates that hold", (*gate, *limits), says=held)
    yield Step("a gate that is missed", (*gate, "--max-bytes", "1KB"), code=1, says=("missed: file",))
    unknown = ("gate", "all.json", "--max-drop", "50pp")
    yield Step("a gate that cannot be judged", unknown, code=3, says=("drop",))


def _sessions(work: Path) -> Iterator[Step]:
    def both(out: str) -> None:
        assert {arm["arm"] for arm in json.loads(out)["arms"]} == ARMS

    yield Step("what changed between two sessions", ("compare", "old.json", "new.json", "--json"), check=both)
    other = ("compare", "old.json", "threads.json")
    yield Step("sessions that must not be compared", other, code=3, says=("threads",))
    yield Step("unless that is meant", (*other, "--allow", "threads"), says=("threads",))


def _fleet(work: Path) -> Iterator[Step]:
    def local() -> None:
        (work / "boards.toml").write_text(f"schema = 1\n{BOARD.format('here', 'local')}", encoding="utf-8")

    def swept() -> None:
        (work / "SWEEP.toml").write_text(SWEEP, encoding="utf-8")

    def built(_: str) -> None:
        cells = _profile(work, "sweep/sweep.json")["cells"]
        assert [cell["state"] for cell in cells] == ["built", "built"], cells
        assert cells[0]["parameters"] > cells[1]["parameters"]
        for cell in cells:
            assert manifest(work / cell["path"])["arms"][0]["name"] == "factored@fp32"

    boards = ("--boards", "boards.toml")
    asked = ("fleet", "profile", BUNDLE, *boards, *SHORT, "--out", "fleet")
    yield Step("a fleet of this machine", asked, before=local, check=_states(work, "fleet", ["measured"]))
    yield Step("a fleet again", asked, check=_states(work, "fleet", ["kept"]))
    yield Step("what to start for a fleet", ("fleet", "workers", *boards), says=("dask scheduler", "dask worker"))
    yield Step("a sweep", ("fleet", "sweep", "SWEEP.toml"), before=swept, check=built)
    yield Step("a sweep again", ("fleet", "sweep", "SWEEP.toml"), says=("unchanged",))


def _states(work: Path, folder: str, wanted: list[str]) -> Callable[[str], None]:
    def check(_: str) -> None:
        entries = _profile(work, f"{folder}/fleet.json")["entries"]
        assert [entry["state"] for entry in entries] == wanted, entries
        for entry in entries:
            _measured(work, f"{folder}/{entry['file']}")("")
        assert "<svg" in (work / folder / "report.html").read_text(encoding="utf-8")

    return check


def _by_ssh(work: Path, address: str, known_hosts: Path) -> Iterator[Step]:
    def two() -> None:
        reach = f'python = "{sys.executable}"\nknown_hosts = "{known_hosts}"\n'
        text = f"schema = 1\n{BOARD.format('by-ssh', address)}{reach}{BOARD.format('here', 'local')}"
        (work / "both.toml").write_text(text, encoding="utf-8")

    on = ("--on", address, "--board-python", sys.executable)
    known = ("--known-hosts", str(known_hosts))
    asked = ("profile", BUNDLE, *ONE, *on, *known, "--out", "board.json")
    yield Step("profile on a board by ssh", asked, check=_measured(work, "board.json"))
    fleet = ("fleet", "profile", BUNDLE, "--boards", "both.toml", *SHORT, "--out", "both")
    yield Step("a fleet with a board by ssh", fleet, before=two, check=_states(work, "both", ["measured"] * 2))
    (known_hosts.parent / "nobody").touch()
    stranger = ("profile", BUNDLE, *on, "--known-hosts", str(known_hosts.parent / "nobody"), "--out", "none.json")
    yield bad("a board whose key is not on record", stranger, "host key")


def _bad(work: Path) -> Iterator[Step]:
    def broken() -> None:
        text = (work / "old.json").read_text(encoding="utf-8")
        (work / "cut.json").write_text(text[: len(text) // 2], encoding="utf-8")
        values = json.loads(text)
        (work / "schema.json").write_text(json.dumps(values | {"schema": 99}), encoding="utf-8")

    def tampered() -> None:
        shutil.copytree(work / BUNDLE, work / "tampered-measured")
        arm = next(path for path in sorted((work / "tampered-measured" / "arms").iterdir()) if path.is_file())
        content = bytearray(arm.read_bytes())
        content[len(content) // 2] ^= 1
        arm.write_bytes(content)

    def sealed() -> None:
        (work / "sealed").mkdir(mode=0o555, exist_ok=True)

    def misspelt() -> None:
        text = BOARD.format("here", "local").replace("target", "targte")
        (work / "misspelt.toml").write_text(f"schema = 1\n{text}", encoding="utf-8")
        (work / "misspelt-sweep.toml").write_text(SWEEP.replace("budget", "budgets"), encoding="utf-8")

    schema = "schema: expected 3 or 4, got 99|schema expected: 3 or 4 got: 99"
    for name, options in (("report", ("--out", "none.html")), ("gate", ("--max-bytes", "1MB"))):
        yield bad(f"{name} of a profile cut short", (name, "cut.json", *options), r"cut\.json", before=broken)
        yield bad(f"{name} of another schema", (name, "schema.json", *options), schema, before=broken)
    yield bad("compare with a profile cut short", ("compare", "old.json", "cut.json"), r"cut\.json", before=broken)
    yield bad("compare with another schema", ("compare", "old.json", "schema.json"), schema, before=broken)
    digest = ("arms/", "sha256|digest")
    asked = ("profile", "tampered-measured", *ONE, "--out", "none.json")
    yield bad("profile of a tampered bundle", asked, *digest, before=tampered)
    beside = ("report", "old.json", "--bundle", "tampered-measured", "--out", "none.html")
    yield bad("report beside a tampered bundle", beside, *digest)
    denied = "[Pp]ermission denied|can be written"
    for name, argv in (
        ("profile", ("profile", BUNDLE, *ONE, "--out", "sealed/none.json")),
        ("report", ("report", "old.json", "--out", "sealed/none.html")),
        ("fleet", ("fleet", "profile", BUNDLE, "--boards", "boards.toml", "--out", "sealed/fleet")),
    ):
        yield Step(
            f"bad: {name} into a folder that is read-only", argv, code=2, says=(denied,), before=sealed, locked=True,
            check=lambda _: _empty(work / "sealed"),
        )  # fmt: skip
    misspelled = ("fleet", "profile", BUNDLE, "--boards", "misspelt.toml")
    yield bad("a misspelt key of a board", misspelled, "did you mean target", before=misspelt)
    yield bad("a misspelt key of a sweep", ("fleet", "sweep", "misspelt-sweep.toml"), "did you mean budget")
    yield bad("an address that is none", ("profile", BUNDLE, "--on", "raspberrypi.local"), "ssh://")


def _empty(folder: Path) -> None:
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------- a board that is this machine


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def _loopback() -> Iterator[tuple[str, Path]]:
    """An sshd of its own on loopback, with keys of its own in an agent: its address, and the file of its host key."""
    with tempfile.TemporaryDirectory(prefix="walkthrough-ssh-") as made, socket.socket() as free:
        folder = Path(made)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        kind, key, *_ = (folder / "host.pub").read_text(encoding="utf-8").split()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n", encoding="utf-8")
        (folder / "config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n",
            encoding="utf-8",
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # what its service makes
        agent, before = str(folder / "agent"), os.environ.get("SSH_AUTH_SOCK")
        programs = (["ssh-agent", "-D", "-a", agent], [str(_sshd()), "-D", "-f", str(folder / "config")])
        running = [subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in programs]
        try:
            os.environ["SSH_AUTH_SOCK"] = agent
            add = ["ssh-add", "-q", str(folder / "user")]
            _until(lambda: subprocess.run(add, capture_output=True, check=False).returncode == 0)
            _until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}", folder / "known_hosts"
        finally:
            if before is None:
                os.environ.pop("SSH_AUTH_SOCK", None)
            else:
                os.environ["SSH_AUTH_SOCK"] = before
            for process in running:
                process.terminate()
                process.wait()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the sshd of the walkthrough does not start")
        time.sleep(0.1)
