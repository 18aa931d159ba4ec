"""`rowcol-edge fleet` on a real Dask scheduler with workers in processes of their own, some of which are killed."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Semaphore

from rowcol_edge import cli
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.errors import BundleError, SchedulerError
from rowcol_edge.fleet import campaign, cluster, parcels
from rowcol_edge.fleet.boards import Board
from rowcol_edge.fleet.campaign import Scheduler
from rowcol_edge.fleet.gather import FAILED, KEPT, MEASURED

from .conftest import OPTIONS, Home, Sshd, kill, until
from .test_campaign import LOCAL, NET, board, children

# a disk that others use, too, is no failure
pytestmark = pytest.mark.filterwarnings("ignore:Creating scratch directories is taking:UserWarning")


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[LocalCluster]:
    """A scheduler and two workers that have the tags of a target, of a board on their machine, and of builds."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", local_directory=str(tmp_path / "dask"),
        resources={"generic-x86": 1, "here": 1, "build": 1},
    ) as made:  # fmt: skip
        yield made


def scheduler(dask: LocalCluster) -> Scheduler:
    return Scheduler(dask.scheduler_address)


def worker_of(pid: int) -> int:
    """The worker that a job's process was started by."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.system("openssh")
def test_two_boards_and_a_worker_that_is_killed_while_it_measures(
    sshd: Sshd, second_sshd: Sshd, dask: LocalCluster, home: Home, bundle_path: Path, tmp_path: Path, said: list[str]
) -> None:
    seen: dict[str, Any] = {}

    def lose() -> None:
        seen["before"] = home.steps("profile")
        mine = {pid: worker_of(pid) for pid in children()}
        reached = [pid for pid in mine if str(sshd.port).encode() in b"".join(_commands(pid))]
        seen["killed"] = [mine[pid] for pid in reached]
        kill(seen["killed"])
        time.sleep(1.0)
        seen["after"] = home.steps("profile")

    losing = home.during("profile", lose)
    found = campaign.profile(
        [bundle_path], [board("one", sshd), board("two", second_sshd)], out=tmp_path / "results",
        scheduler=scheduler(dask), say=said.append, **OPTIONS,
    )  # fmt: skip
    losing.join()
    assert [(entry.board, entry.state, entry.reason) for entry in found.entries] == [
        ("one", MEASURED, ""), ("two", MEASURED, ""),
    ]  # fmt: skip
    assert len(seen["killed"]) == 1
    assert not Path(f"/proc/{seen['killed'][0]}").exists()
    assert seen["before"] == seen["after"] != []  # the board went on; another worker took up what it did
    assert sshd.home.is_clean()
    assert second_sshd.home.is_clean()
    assert children() == []


def _commands(pid: int) -> list[bytes]:
    """Command lines of a process's children: the ssh that it reaches a board by."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if worker_of(int(entry.name)) == pid:
                    found.append((entry / "cmdline").read_bytes())
            except OSError:
                continue
    return found


def test_two_who_ask_for_one_board_get_it_one_after_the_other(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, said: list[str]
) -> None:
    with Client(dask.scheduler_address) as client:
        lease = Semaphore(1, "rowcol-edge tcp://127.0.0.1", scheduler_rpc=client.scheduler, loop=client.loop)
        assert lease.acquire()

        def over(line: str) -> None:
            said.append(line)
            if "is in use by another run" in line:
                assert children() == []
                lease.release()

        found = campaign.profile(
            [bundle_path], [LOCAL], out=tmp_path / "results", scheduler=scheduler(dask), say=over, **OPTIONS
        )
    assert [entry.state for entry in found.entries] == [MEASURED]
    assert sum("is in use by another run" in line for line in said) == 1


def test_a_job_that_waits_for_its_board_is_not_overdue(
    dask: LocalCluster, bundle_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_SLACK_SECONDS", -100.0)  # whatever has begun is overdue
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.0)
    [job] = campaign.making.profiles([bundle_path], [LOCAL], {"seconds": 600.0, "blocks": 600})
    with Client(dask.scheduler_address) as client:
        lease = Semaphore(1, "rowcol-edge tcp://127.0.0.1", scheduler_rpc=client.scheduler, loop=client.loop)
        assert lease.acquire()
        engine = cluster.Cluster(dask.scheduler_address, {"here": LOCAL}, 100.0, said.append)
        try:
            engine.start(job, "here")
            [waits] = until(lambda: engine.events(0.1))
            assert "is in use by another run" in waits.message["say"]
            assert engine.events(0.1) == []
            lease.release()
            [over] = until(lambda: engine.events(0.1))
            assert over.outcome is not None
            assert "its worker has said nothing" in over.outcome.reason
        finally:
            engine.close()
    until(lambda: not children())


def test_a_job_whose_process_dies_costs_itself_and_no_worker(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, said: list[str]
) -> None:
    killing = threading.Thread(target=lambda: kill(until(children)))
    killing.start()
    found = campaign.profile(
        [bundle_path], [LOCAL], out=tmp_path / "results", scheduler=scheduler(dask), say=said.append, **OPTIONS
    )
    killing.join()
    [entry] = found.entries
    assert (entry.state, entry.attempts) == (FAILED, 1)
    assert "killed by SIGKILL: out of memory?" in entry.reason
    with Client(dask.scheduler_address) as client:
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2


def put_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles lie where workers do not see them: below a folder in this process's own view."""
    jobs = campaign.making.profiles

    def elsewhere(*arguments: Any, **options: Any) -> Any:
        found = jobs(*arguments, **options)
        for job in found:
            job.work["bundle"] = f"/proc/self/task/{threading.get_native_id()}/root{job.work['bundle']}"
        return found

    monkeypatch.setattr(campaign.making, "profiles", elsewhere)


def test_a_bundle_that_a_worker_does_not_have_is_sent_once(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bundle.open(bundle_path) as bundle:
        digest = bundle.digest
    received = parcels._folder() / f"{digest}.zip"
    received.unlink(missing_ok=True)
    monkeypatch.setattr(parcels, "PIECE_BYTES", 1000)  # of this side, which cuts
    put_elsewhere(monkeypatch)
    try:
        for name, sent in (("first", 1), ("second", 1)):
            found = campaign.profile(
                [bundle_path], [LOCAL], out=tmp_path / name, scheduler=scheduler(dask), say=said.append, **OPTIONS
            )
            assert [entry.state for entry in found.entries] == [MEASURED]
            assert sum("sending" in line for line in said) == sent
        assert received.is_file()
    finally:
        received.unlink(missing_ok=True)


def test_a_piece_that_arrives_changed_is_refused(bundle_path: Path) -> None:
    packed = bundle_path.with_name("bundle.zip").read_bytes()
    with Bundle.open(bundle_path) as bundle:
        digest = bundle.digest
    with pytest.raises(BundleError):
        parcels.receive(digest, "x", 0, packed[:500] + b"?" + packed[501:], True)
    assert not (parcels._folder() / f"{digest}.zip").exists()
    assert not list(parcels._folder().glob(f"{digest}*"))


def test_a_delivery_to_a_full_disk_leaves_nothing(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bundle.open(bundle_path) as bundle:
        digest = bundle.digest
    (parcels._folder() / f"{digest}.zip").unlink(missing_ok=True)
    monkeypatch.setattr(parcels, "PIECE_BYTES", 1000)
    put_elsewhere(monkeypatch)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with Client(dask.scheduler_address) as client:
        client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (2500, most))
    found = campaign.profile(
        [bundle_path], [LOCAL], out=tmp_path / "results", scheduler=scheduler(dask), say=said.append, **OPTIONS
    )
    [entry] = found.entries
    assert entry.state == FAILED
    assert entry.reason.startswith("sending ")
    assert entry.reason.endswith("File too large")
    assert not list(parcels._folder().glob(f"{digest}*"))


def test_a_delivery_that_begins_again_takes_the_place_of_the_first(bundle_path: Path) -> None:
    packed = bundle_path.with_name("bundle.zip").read_bytes()
    with Bundle.open(bundle_path) as bundle:
        digest = bundle.digest
    gone, running = (parcels._folder() / f"{digest}.zip.{name}" for name in ("gone", "running"))
    for path in (gone, running):
        path.write_bytes(b"part")
    os.utime(gone, (time.time() - 7200,) * 2)  # its sender has said nothing for two hours
    try:
        parcels.receive(digest, "x-1", 0, packed[:500], False)
        parcels.receive(digest, "x-1", 0, packed[:700], False)
        assert {path.name for path in parcels._folder().glob(f"{digest}*")} == {f"{digest}.zip.x1", running.name}
        parcels.receive(digest, "x-1", 700, packed[700:], True)
        assert parcels.find("/nowhere", digest) == str(parcels._folder() / f"{digest}.zip")
    finally:
        for path in parcels._folder().glob(f"{digest}*"):
            path.unlink()


def test_a_tag_that_no_worker_has_is_told_and_given_up(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "NO_WORKER_SECONDS", 3.0)
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 1.0)
    lonely = Board("lonely", "generic-x86", "local", "lonely-tag")
    found = campaign.profile(
        [bundle_path], [lonely], out=tmp_path / "results", scheduler=scheduler(dask), say=said.append, **OPTIONS
    )
    line = f'dask worker {dask.scheduler_address} --nthreads 1 --resources "lonely-tag=1"'
    assert said[0] == f"1 job(s) wait for a worker with the tag lonely-tag; start one with: {line}"
    assert found.entries[0].reason == "no worker has had the tag lonely-tag for 3 s"


def test_a_time_limit_ends_a_job_on_a_worker(dask: LocalCluster, bundle_path: Path, tmp_path: Path) -> None:
    slow = {**OPTIONS, "seconds": 600.0, "blocks": 600}
    found = campaign.profile(
        [bundle_path], [LOCAL], out=tmp_path / "results", scheduler=scheduler(dask), limit_seconds=4, **slow
    )
    assert found.entries[0].reason == "not done within 4 s, the time limit of a job"
    until(lambda: not children())


def test_what_is_interrupted_here_ends_on_its_worker(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Thread(target=lambda: until(children) and os.kill(os.getpid(), signal.SIGINT))
    started.start()
    slow = {**OPTIONS, "seconds": 600.0, "blocks": 600}
    with pytest.raises(KeyboardInterrupt):
        campaign.profile([bundle_path], [LOCAL], out=tmp_path / "results", scheduler=scheduler(dask), **slow)
    started.join()
    until(lambda: not children())


def test_a_scheduler_that_goes_is_one_error_and_loses_nothing(
    dask: LocalCluster, bundle_path: Path, tmp_path: Path, said: list[str]
) -> None:
    """Of two boards with one worker: the first is measured and written, during the second the scheduler goes."""
    other = Board("other", "generic-x86", "local", "build")
    out = tmp_path / "results"

    def over(line: str) -> None:
        said.append(line)
        if line.startswith("1/2"):
            until(children)
            threading.Thread(target=dask.close).start()

    with pytest.raises(SchedulerError, match="is gone") as raised:
        campaign.profile([bundle_path], [LOCAL, other], out=out, scheduler=scheduler(dask), say=over, **OPTIONS)
    assert "repeat the command" in raised.value.hint
    assert len(list((out / "profiles").glob("*.json"))) == 1
    one, other_one = json.loads((out / "fleet.json").read_text())["entries"]
    assert {one["state"], other_one["state"]} == {MEASURED, FAILED}
    assert "is gone" in one["reason"] + other_one["reason"]
    until(lambda: not children())
    found = campaign.profile([bundle_path], [LOCAL, other], out=out, say=said.append, **OPTIONS)
    assert sorted(entry.state for entry in found.entries) == [KEPT, MEASURED]


def test_a_scheduler_that_has_forgotten_its_jobs_is_gone_too(
    dask: LocalCluster, bundle_path: Path, said: list[str]
) -> None:
    """As it is where it was started anew so quickly that the line seems to hold."""
    [job] = campaign.making.profiles([bundle_path], [LOCAL], {"seconds": 600.0, "blocks": 600})
    engine = cluster.Cluster(dask.scheduler_address, {"here": LOCAL}, 100.0, said.append)
    try:
        engine.start(job, "here")
        until(children)
        engine._placed[job.id].future.cancel()
        with pytest.raises(SchedulerError, match="is gone"):
            until(lambda: engine.events(0.1) and False)
    finally:
        engine.close()
    until(lambda: not children())


def test_a_scheduler_that_goes_before_results_are_fetched_is_gone(
    dask: LocalCluster, bundle_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = campaign.making.profiles([bundle_path], [LOCAL], {"arms": ("dense@fp32",), "blocks": 600})
    engine = cluster.Cluster(dask.scheduler_address, {"here": LOCAL}, 0.1, said.append)
    gather = engine._client.gather

    def too_late(*arguments: Any, **options: Any) -> Any:
        dask.close()
        return gather(*arguments, **options)

    monkeypatch.setattr(engine._client, "gather", too_late)
    try:
        engine.start(job, "here")
        with pytest.raises(SchedulerError, match="is gone"):
            until(lambda: engine.events(0.1) and False)
    finally:
        engine.close()


def test_a_scheduler_that_is_not_there(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2.0)
    (tmp_path / "boards.toml").write_text('schema = 1\n[[boards]]\nname = "a"\ntarget = "generic-x86"\non = "local"\n')
    command = ["fleet", "profile", str(bundle_path), "--boards", str(tmp_path / "boards.toml")]
    with pytest.raises(SystemExit) as ended:
        cli.run_command([*command, "--out", str(tmp_path / "results"), "--scheduler", "tcp://127.0.0.1:1"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert "error: scheduler tcp://127.0.0.1:1" in told
    assert "  hint:     start one with: dask scheduler" in told
    assert not any("Traceback" in line for line in told)


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "something that says b'SSH-2.0-'"),
        (b"", "something that hangs up"),
        (None, "something that says nothing for 1 s"),
    ],
)
def test_what_listens_there_is_no_scheduler(
    words: bytes | None, got: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            line, _ = server.accept()
            with line:
                line.sendall(words) if words is not None else over.wait(30)

        over = threading.Event()
        listener = threading.Thread(target=answer)
        listener.start()
        try:
            with pytest.raises(SchedulerError) as raised:
                cluster.Cluster(f"tcp://127.0.0.1:{server.getsockname()[1]}", {}, 100.0, said.append)
        finally:
            over.set()
            listener.join()
    assert raised.value.got == got
    assert "dashboard" in raised.value.hint


def test_a_sweep_on_workers(
    dask: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from rowcol_edge.fleet import sweep

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "sweep.toml").write_text(
        'model = ["net.py:build", "net.py:broken"]\nprecision = ["fp32", "int8-dynamic"]\nbudget = "params<=0.9x"\n'
        'calib = "net.py:data"\nzip = false\n'
    )
    found = campaign.sweep(sweep.read(Path("sweep.toml")), scheduler=scheduler(dask), say=said.append)
    assert [cell.state for cell in found.cells] == ["built", "built", "failed", "failed"]
    assert all(Path(cell.path, "manifest.json").is_file() for cell in found.cells[:2])
    assert "this net is broken" in found.cells[2].reason
