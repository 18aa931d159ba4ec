from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import rowcol_edge
from rowcol_edge import targets, wheelhouse
from rowcol_edge.errors import BundleError, StageError
from rowcol_edge.targets import Target

from .made_wheels import make_wheel
from .nets import SmallNet, write_splits

HERE = f"3.{sys.version_info[1]}"
GLIBC = platform.libc_ver()[1].replace(".", "_")
PLATFORM = f"manylinux_{GLIBC}_{platform.machine()}"


@pytest.fixture
def board(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a target like this machine, whose runtime comes as made-up wheels from a folder of its own."""
    index = tmp_path / "index"
    make_wheel(index, "onnxruntime", "1.17.0", requires=["flat"])
    for name in ("numpy", "pillow", "flat"):
        make_wheel(index, name)
    make_wheel(index, "only-elsewhere", "1.0", "cp39-cp39-win_amd64")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    text = (root / "targets" / "generic-x86.toml").read_text(encoding="utf-8")
    head, _, rest = text.partition("\n[[runtimes]]\n")
    runtime = rest.partition("\n[[runtimes]]\n")[0].replace("requirements =", f'find_links = "{index}"\nrequirements =')
    lines = [line for line in head.splitlines() if not line.startswith(("pythons", "platform ="))]
    head = "\n".join(lines).replace('machine = "x86_64"', f'machine = "{platform.machine()}"')
    head = head.replace("schema = 2", f'schema = 2\npythons = ["{HERE}"]\nplatform = "{PLATFORM}"')
    path = tmp_path / "my-board.toml"
    path.write_text(f"{head}\n[[runtimes]]\n{runtime}\n", encoding="utf-8")
    return path


@pytest.fixture
def target(board: Path) -> Target:
    return targets.load(str(board))


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


Make = Callable[[], Path]


@pytest.fixture
def make(target: Target, tmp_path: Path) -> Make:
    """A wheelhouse in its place."""

    def run() -> Path:
        out = tmp_path / "out" / "bundle-wheelhouse"
        work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
        wheelhouse.put(wheelhouse.collect(target, target.runtimes[0], work, silent), out)
        return out

    return run


def test_it_holds_the_wheels_their_digests_and_what_to_type(make: Make) -> None:
    out = make()
    requirements = f"requirements-py{HERE.replace('.', '')}.txt"
    assert {path.name for path in out.iterdir()} == {
        "README.md", "wheelhouse.json", requirements, "flat-1.0-py3-none-any.whl", "numpy-1.0-py3-none-any.whl",
        "onnxruntime-1.17.0-py3-none-any.whl", "pillow-1.0-py3-none-any.whl",
    }  # fmt: skip
    pins = (out / requirements).read_text(encoding="utf-8").splitlines()[1:]
    assert [pin.split()[0] for pin in pins] == ["flat==1.0", "numpy==1.0", "onnxruntime==1.17.0", "pillow==1.0"]
    digest = hashlib.sha256((out / "flat-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    assert pins[0] == f"flat==1.0 --hash=sha256:{digest}"
    listed = json.loads((out / "wheelhouse.json").read_text(encoding="utf-8"))
    assert set(listed["files"]) == {path.name for path in out.iterdir()} - {"wheelhouse.json"}
    assert listed["files"]["flat-1.0-py3-none-any.whl"]["sha256"] == digest
    assert wheelhouse.install_command(HERE) in (out / "README.md").read_text(encoding="utf-8")


def test_pip_installs_from_it_without_an_index(make: Make, tmp_path: Path) -> None:
    out = make()
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    command = wheelhouse.install_command(HERE).split()[1:]
    subprocess.run([python, *command, "--quiet"], cwd=out, check=True)
    told = subprocess.run(
        [python, "-c", "import flat, onnxruntime; print(onnxruntime.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "1.17.0"
    (out / "flat-1.0-py3-none-any.whl").write_bytes(b"another")
    spoiled = subprocess.run(
        [python, *command, "--force-reinstall"], cwd=out, capture_output=True, text=True, check=False
    )
    assert spoiled.returncode != 0


def test_it_is_current_until_the_target_or_a_file_changes(make: Make, target: Target, board: Path) -> None:
    out = make()
    assert wheelhouse.is_current(out, target, target.runtimes[0])
    board.write_text(board.read_text().replace('"numpy", "pillow"]', '"numpy"]'))
    other = targets.load(str(board))
    assert not wheelhouse.is_current(out, other, other.runtimes[0])
    with (out / "numpy-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"x")
    assert not wheelhouse.is_current(out, target, target.runtimes[0])
    (out / "numpy-1.0-py3-none-any.whl").unlink()
    assert not wheelhouse.is_current(out, target, target.runtimes[0])
    assert not wheelhouse.is_current(out.with_name("none"), target, target.runtimes[0])


def test_an_older_one_is_replaced_and_nothing_else_is(make: Make) -> None:
    out = make()
    (out / "README.md").write_text("changed")
    make()
    assert (out / "README.md").read_text() != "changed"
    (out / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"older wheelhouse, got a folder with another file: mine\.txt"):
        make()
    assert (out / "mine.txt").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_is_no_wheelhouse_is_left_alone(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "bundle-wheelhouse"
    folder.mkdir(parents=True)
    with pytest.raises(BundleError, match="got something else"):
        make()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(BundleError, match="got something else"):
        make()


def test_an_alternative_stands_in_where_the_first_choice_has_no_wheel(board: Path, tmp_path: Path) -> None:
    text = board.read_text().replace('"onnxruntime>=1.17"', '"only-elsewhere"')
    board.write_text(text)
    target = targets.load(str(board))
    with pytest.raises(StageError, match="expected a wheel of only-elsewhere, got none"):
        wheelhouse.collect(target, target.runtimes[0], tmp_path / "first", silent)
    other = f'[[runtimes.alternatives]]\npythons = ["{HERE}"]\nrequirements = ["onnxruntime"]\nwhy = "elsewhere"\n'
    board.write_text(f"{text}\n{other}")
    target = targets.load(str(board))
    made = wheelhouse.collect(target, target.runtimes[0], tmp_path / "second", silent)
    assert (made / "onnxruntime-1.17.0-py3-none-any.whl").is_file()
    assert not (made / "downloads").exists()


def test_no_alternative_stands_in_for_a_network_that_fails(
    board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f'[[runtimes.alternatives]]\npythons = ["{HERE}"]\nrequirements = ["other"]\nwhy = "elsewhere"\n'
    board.write_text(f"{board.read_text()}\n{other}")
    asked: list[Sequence[str]] = []

    def fail(packages: Sequence[str], *_: object, **__: object) -> None:
        asked.append(packages)
        raise StageError("wheels", expected="a package index that answers", got="no connection to one")

    monkeypatch.setattr(wheelhouse, "download", fail)
    target = targets.load(str(board))
    with pytest.raises(StageError, match="no connection"):
        wheelhouse.collect(target, target.runtimes[0], tmp_path / "out", silent)
    assert len(asked) == 1


def test_a_build_puts_it_beside_the_bundle_and_keeps_it(
    board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(**options: object) -> rowcol_edge.pipeline.Built:
        [built] = rowcol_edge.build(
            net, target=str(board), precision="fp32", energy=0.95, dense=False, zip=False,
            labels=["plain", "striped"], metric="accuracy", out=str(tmp_path / "dist"), **splits, **options,
        )  # fmt: skip
        return built

    net, splits = SmallNet().eval(), write_splits(tmp_path)
    assert build().wheelhouse is None
    built = build(wheelhouse=True)
    assert built.wheelhouse == built.path.with_name("my-board-onnxruntime-wheelhouse")
    assert (built.wheelhouse / "onnxruntime-1.17.0-py3-none-any.whl").is_file()
    readme = (built.path / "README.md").read_text(encoding="utf-8")
    assert "the folder `my-board-onnxruntime-wheelhouse`" in readme
    assert wheelhouse.install_command(HERE) in readme
    assert rowcol_edge.verify(built.path).ok
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(wheelhouse, "download", None)  # nothing is to be downloaded again
    again = build(wheelhouse=True)
    assert (again.reused, again.wheelhouse) == (True, built.wheelhouse)


def test_a_missing_wheel_ends_the_build_before_anything_is_written(board: Path, tmp_path: Path) -> None:
    board.write_text(board.read_text().replace('"onnxruntime>=1.17"', '"only-elsewhere"'))
    with pytest.raises(StageError, match="only-elsewhere"):
        rowcol_edge.build(
            SmallNet().eval(), target=str(board), precision="fp32", energy=0.95, labels=["plain", "striped"],
            metric="accuracy", out=str(tmp_path / "dist"), wheelhouse=True, **write_splits(tmp_path),
        )  # fmt: skip
    assert not (tmp_path / "dist").exists()
