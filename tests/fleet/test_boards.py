"""boards.toml and SWEEP.toml: what they say, and what is refused before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.device.bundle import Bundle
from rowcol_edge.errors import BundleError, ConfigError, RowcolError, TargetError
from rowcol_edge.fleet import boards, gather, jobs, sweep
from rowcol_edge.fleet.boards import Board
from rowcol_edge.fleet.queueing import Ended, Job, Outcome

from ..profiles import make_profile

GOOD = """
schema = 1
[[boards]]
name = "pi-a"
target = "raspberry-pi-5"
on = "ssh://pi@10.0.0.7"
[[boards]]
name = "pi-b"
target = "raspberry-pi-5"
on = "ssh://pi@10.0.0.8:2222"
python = "venv/bin/python3"
folder = "/var/tmp"
known_hosts = "hosts"
[[boards]]
name = "jetson"
target = "jetson-orin-nano"
on = "adb:0123"
[[boards]]
name = "bench"
target = "intel-n100"
on = "local"
tag = "n100-bench"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("10.0.0.8 ssh-ed25519 AAAA\n")
    (tmp_path / "boards.toml").write_text(GOOD)
    return tmp_path / "boards.toml"


def test_a_file_of_boards(file: Path) -> None:
    a, b, jetson, bench = boards.read(file)
    assert a == Board("pi-a", "raspberry-pi-5", "ssh://pi@10.0.0.7", "raspberry-pi-5")
    assert (b.python, b.folder, b.known_hosts) == ("venv/bin/python3", "/var/tmp", "10.0.0.8 ssh-ed25519 AAAA\n")
    assert (jetson.tag, bench.tag) == ("jetson", "n100-bench")  # a cable ends at one machine
    assert [board.local for board in (a, b, jetson, bench)] == [False, False, False, True]


def test_the_lines_that_start_everything(file: Path) -> None:
    lines = boards.start_lines(boards.read(file), "tcp://host:8786")
    assert lines == [
        "dask scheduler",
        'dask worker tcp://host:8786 --nworkers 2 --nthreads 1 --resources "raspberry-pi-5=1"',
        'dask worker tcp://host:8786 --nthreads 1 --resources "jetson=1"',
        'dask worker tcp://host:8786 --nthreads 1 --resources "n100-bench=1"',
        'dask worker tcp://host:8786 --nthreads 1 --resources "build=1"  # for sweeps',
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("python =", "pyhton ="), "did you mean python"),
        (('name = "pi-a"', 'name = "pi a"'), "letters, digits"),
        (("schema = 1", "schema = 2"), "schema: expected 1, got 2"),
        (('on = "adb:0123"\n', ""), "the key 'on'"),
        (('on = "adb:0123"', 'on = "telnet://x"'), "ssh://[user@]host[:port] or adb:SERIAL"),
        (('on = "adb:0123"', "on = 3"), "text that is not empty"),
        (('name = "pi-b"', 'name = "pi-a"'), "each board once, got pi-a twice"),
        (("ssh://pi@10.0.0.8:2222", "ssh://pi@10.0.0.7"), "each board once, got ssh://pi@10.0.0.7 twice"),
        (("ssh://pi@10.0.0.8:2222", "ssh://10.0.0.7:22"), "each board once, got ssh://10.0.0.7:22 twice"),
        (('"hosts"', '"nowhere"'), "known hosts"),
        (('tag = "n100-bench"', 'python = "python3"'), "a board that is elsewhere"),
        (
            (GOOD, 'schema = 1\n[boards]\nname = "pi-a"\n'),
            "boards: expected at least one [[boards]] table, got {'name'",
        ),
        (('target = "intel-n100"', 'target = "a=b"'), "letters, digits"),
    ],
)
def test_a_file_of_boards_that_is_wrong_says_where(file: Path, change: tuple[str, str], message: str) -> None:
    file.write_text(GOOD.replace(*change, 1))
    with pytest.raises(ConfigError) as raised:
        boards.read(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value) or "of a board" in str(raised.value) or "known hosts" in str(raised.value)


@pytest.mark.parametrize(("data", "message"), [(b"10.0.0.8 \xff\n", "text in UTF-8"), (None, "a readable file")])
def test_host_keys_that_cannot_be_read_are_refused(file: Path, data: bytes | None, message: str) -> None:
    if data is None:
        (file.parent / "hosts").unlink()
        (file.parent / "hosts").symlink_to("/proc/self/mem")  # a file that says no to whoever reads it
    else:
        (file.parent / "hosts").write_bytes(data)
    with pytest.raises(ConfigError, match=f"known hosts: expected {message}, got .*hosts"):
        boards.read(file)


def test_a_file_of_boards_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a file of boards"):
        boards.read(tmp_path / "boards.toml")


def board(name: str, target: str = "generic-x86") -> Board:
    return Board(name, target, f"ssh://{name}", target)


def test_every_bundle_meets_every_board_of_its_target(bundle_path: Path) -> None:
    fleet = [board("a"), board("b"), board("c", "raspberry-pi-5")]
    found = jobs.profiles([bundle_path], fleet, {"seconds": 3.0, "blocks": None})
    assert [job.places for job in found] == [("a",), ("b",)]
    assert [job.label for job in found] == ["tiny on a", "tiny on b"]
    with Bundle.open(bundle_path) as bundle:
        assert {job.work["digest"] for job in found} == {bundle.digest}
    json.dumps([job.work for job in found])  # it goes to another process, or machine
    [pooled] = jobs.profiles([bundle_path], fleet, {}, once=True)
    assert pooled.places == ("a", "b")


def test_a_job_is_known_by_all_that_decides_its_result(bundle_path: Path) -> None:
    def ids(board: Board, **options: object) -> str:
        return jobs.profiles([bundle_path], [board], options)[0].id

    assert ids(board("a")) == ids(board("a"), blocks=None)
    assert len({ids(board("a")), ids(board("b")), ids(board("a"), blocks=6), ids(board("a"), seconds=6)}) == 4
    a, bench = board("a"), Board("bench", "generic-x86", "local", "bench")
    assert len({ids(a), ids(replace(a, python="venv/bin/python3")), ids(replace(a, folder="/mnt/ssd"))}) == 3
    assert ids(a) == ids(replace(a, tag="near", known_hosts="a"))  # it is the same board
    assert ids(bench) != ids(replace(bench, tag="bench-2"))  # and this another machine


def test_a_kept_profile_is_of_the_board_that_it_was_taken_on(bundle_path: Path, tmp_path: Path) -> None:
    with Bundle.open(bundle_path) as bundle:
        digest = bundle.digest
    [job] = jobs.profiles([bundle_path], [board("a"), board("x--a")], {}, once=True)
    measured = replace(make_profile(), digest=digest)
    for number, place in enumerate(job.places):
        for name in ("net", "net--int8"):
            folder = gather.Folder(tmp_path / f"{number}-{name}")
            named = replace(job, work={**job.work, "name": name})
            folder.keep(Ended(named, place, Outcome("done", measured.to_json()), 1, 1.0))
            kept = folder.kept(job)
            assert kept is not None
            assert (kept.state, kept.board) == (gather.KEPT, place)


def test_jobs_that_cannot_be_done_are_refused(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target generic-x86, got boards of generic-arm64"):
        jobs.profiles([bundle_path], [board("a", "generic-arm64")], {})
    with pytest.raises(ConfigError, match="each one once"):
        jobs.profiles([bundle_path, bundle_path.with_name("bundle.zip")], [board("a")], {})
    with pytest.raises(ConfigError, match="options of a profile"):
        jobs.profiles([bundle_path], [board("a")], {"block": 3})
    with pytest.raises(BundleError):
        jobs.profiles([bundle_path], [board("a")], {"arms": ("nothing@fp32",)})
    with pytest.raises(BundleError, match=r"a bundle folder or \.zip"):
        jobs.profiles([tmp_path / "nothing"], [board("a")], {})


SWEEP = """
model = ["sample:fmnist-vit", "net.py:build"]
target = ["generic-x86", "jetson-xavier-nx"]
runtime = ["onnxruntime", "openvino"]
precision = ["fp32", "int8"]
budget = "params<=0.5x"
calib_size = 16
"""


def swept(tmp_path: Path, text: str = SWEEP) -> sweep.Sweep:
    (tmp_path / "sweep.toml").write_text(text)
    return sweep.read(tmp_path / "sweep.toml")


def test_a_sweep_is_every_combination_that_its_targets_offer(tmp_path: Path) -> None:
    found = swept(tmp_path)
    assert len(found.cells) == 16
    left_out = [cell for cell in found.cells if cell.state == sweep.LEFT_OUT]
    assert {(cell.target, cell.runtime) for cell in left_out} == {("jetson-xavier-nx", "openvino")}
    assert left_out[0].reason == "jetson-xavier-nx has onnxruntime, tflite"
    assert len(found.jobs) == 12
    options = [job.work["options"] for job in found.jobs.values()]
    assert {option["calib_size"] for option in options} == {16}
    assert len({option["out"] for option in options}) == 12  # none writes over another's
    assert all(option["out"].startswith("sweep/") for option in options)
    again = swept(tmp_path)
    assert [job.work for job in again.jobs.values()] == [job.work for job in found.jobs.values()]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("calib_size", "calib_sise"), ConfigError, "did you mean calib_size"),
        (('"jetson-xavier-nx"', '"jetson-xavier"'), TargetError, "jetson-xavier-nx"),
        (('"openvino"', '"openvinno"'), ConfigError, "did you mean openvino"),
        (('"int8"', '"int9"'), ConfigError, "did you mean int8"),
        (('"params<=0.5x"', '["params<=0.5x", 3]'), ConfigError, "a text or a list of texts"),
        (('["fp32", "int8"]', '["fp32", "fp32"]'), ConfigError, "each value once"),
        (('["fp32", "int8"]', "[]"), ConfigError, "a text or a list of texts"),
        (("model =", "modell ="), ConfigError, "model"),
    ],
)
def test_a_sweep_that_is_wrong_says_so_before_anything_is_built(
    tmp_path: Path, change: tuple[str, str], error: type[RowcolError], message: str
) -> None:
    with pytest.raises(error) as raised:
        swept(tmp_path, SWEEP.replace(*change, 1))
    assert message in str(raised.value)


def test_what_became_of_a_cell() -> None:
    cell = sweep.Cell("net.py:build", "generic-x86", "onnxruntime", "int8", "")
    quality = {"test": {"value": 0.9, "drop_pp": 0.2, "ci_low_pp": -0.1, "ci_high_pp": 0.5}}
    arms = [
        {"name": "factored@int8", "precision": "int8", "size_bytes": 10, "parameters": 4, "quality": quality},
        {"name": "dense@int8", "precision": "int8", "size_bytes": 30, "parameters": 9, "quality": {}},
    ]
    built = {"path": "x", "reused": True, "manifest": {"arms": arms, "default_arm": "factored@int8"}}
    job = Job("1", "1", {})
    done = sweep.became(cell, Ended(job, "", Outcome("done", built), 1, 2.0))
    assert (done.state, done.size_bytes, done.dense_bytes) == (sweep.UNCHANGED, 10, 30)
    assert (done.drop_pp, done.split) == (0.2, "test")
    failed = sweep.became(cell, Ended(job, "", Outcome("failed", reason="no such file"), 1, 2.0))
    assert (failed.state, failed.reason) == (sweep.FAILED, "no such file")
