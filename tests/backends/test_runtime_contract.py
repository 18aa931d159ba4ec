"""What every runtime in the table keeps, on artifacts that its own backend made.

TensorRT, which needs its GPU, has stand-ins for what it calls: of it only this project's own part is tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import QuantSpec
from rowcol_edge.device.bundle import split_feeds
from rowcol_edge.device.manifest import TensorSpec
from rowcol_edge.device.runtimes import RUNTIMES, RuntimeOptions, Session, load_runtime
from rowcol_edge.device.runtimes.memory import VARIANTS
from rowcol_edge.errors import BundleError, DataError
from rowcol_edge.targets import RuntimeSpec

from ..device.fake_nvidia import standing_in
from .conftest import write_source

PICTURE = np.random.default_rng(0).normal(size=(1, 1, 5, 6)).astype(np.float32)
SCALE = np.full((1, 1), 2.0, np.float32)
OPTIONS = RuntimeOptions(threads=1)
FIXED_BATCH = {name for name in RUNTIMES if not load_backend(name).dynamic_batch}
"""Runtimes whose backend cannot leave a batch free."""


class TwoInputs(nn.Module):
    """A picture and a scale, to two numbers and one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, (5, 6))

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(image).mean((2, 3)) * scale
        return y, y.sum(1, keepdim=True)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return TwoInputs().eval()


# a runtime that another one stands in for, by the word of its backend, cannot be installed here
INSTALLABLE = [name for name in sorted(RUNTIMES) if load_backend(name).host_runtime == name]


@pytest.fixture(scope="module", params=sorted(RUNTIMES))
def name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with standing_in(request.param, tmp_path_factory.mktemp("engines")):
        yield request.param


@pytest.fixture(scope="module")
def artifact(
    name: str, net: nn.Module, runtime: RuntimeSpec, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], Path]:
    """The net compiled for the runtime, with a free batch (where there is one) or a fixed one."""

    def make(dynamic: bool) -> Path:
        work = tmp_path_factory.mktemp(name)
        backend = load_backend(name)
        example = {"image": PICTURE, "scale": SCALE}
        source = write_source(backend.consumes, net, example, work, dynamic_batch=dynamic and name not in FIXED_BATCH)
        return backend.compile(source, runtime, QuantSpec("fp32"), None, work / f"made{backend.suffix}").path

    return make


@pytest.fixture(scope="module")
def free(artifact: Callable[[bool], Path]) -> Path:
    return artifact(True)


@pytest.fixture
def session(name: str, free: Path) -> Iterator[Session]:
    with load_runtime(name).open(free, OPTIONS) as opened:
        yield opened


def test_it_says_what_it_is(name: str) -> None:
    runtime = load_runtime(name)
    assert runtime.name == name
    assert runtime.package
    assert all(part.isdigit() for part in runtime.version().split(".")[:2])
    assert runtime.fulfils(runtime.version())


def test_inputs_and_outputs_keep_names_sizes_and_types(name: str, session: Session) -> None:
    batch = 1 if name in FIXED_BATCH else None
    assert session.inputs == (
        TensorSpec("image", (batch, 1, 5, 6), "float32"),
        TensorSpec("scale", (batch, 1), "float32"),
    )
    assert [(spec.name, spec.shape[1:], spec.dtype) for spec in session.outputs] == [
        ("output_0", (2,), "float32"),
        ("output_1", (1,), "float32"),
    ]


@pytest.mark.parametrize("samples", [1, 3])
def test_outputs_are_those_of_pytorch(name: str, session: Session, net: nn.Module, samples: int) -> None:
    rng = np.random.default_rng(samples)
    feeds = {
        "scale": rng.normal(size=(samples, 1)).astype(np.float32),
        "image": rng.normal(size=(samples, 1, 5, 6)).astype(np.float32),
    }
    with torch.no_grad():
        expected = net(torch.from_numpy(feeds["image"]), torch.from_numpy(feeds["scale"]))
    runs = [session.run(part) for part in (split_feeds(session.inputs, feeds) if name in FIXED_BATCH else [feeds])]
    assert list(runs[0]) == ["output_0", "output_1"]
    outputs = {key: np.concatenate([run[key] for run in runs]) for key in runs[0]}
    for got, wanted in zip(outputs.values(), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_settings_that_trade_memory_for_time_change_no_output(name: str, free: Path) -> None:
    def outputs(properties: dict[str, str]) -> dict[str, np.ndarray]:
        with load_runtime(name).open(free, RuntimeOptions(threads=1, properties=properties)) as opened:
            return opened.run({"image": PICTURE, "scale": SCALE})

    expected = outputs({})
    for properties in VARIANTS.get(name, {}).values():
        for key, array in outputs(properties).items():
            np.testing.assert_allclose(array, expected[key], rtol=1e-6, atol=1e-7)


def test_outputs_stay_when_the_session_runs_again(session: Session) -> None:
    first = session.run({"image": PICTURE, "scale": SCALE})["output_0"]
    before = first.copy()
    session.run({"image": 5 * PICTURE, "scale": SCALE})
    np.testing.assert_array_equal(first, before)


def test_the_memory_of_an_input_may_be_used_again(session: Session) -> None:
    """As a camera loop does that fills one array again and again."""
    picture = PICTURE.copy()
    first = session.run({"image": picture, "scale": SCALE})["output_0"]
    before = first.copy()
    picture *= 5
    np.testing.assert_array_equal(first, before)
    second = session.run({"image": picture, "scale": SCALE})["output_0"]
    np.testing.assert_array_equal(second, session.run({"image": 5 * PICTURE, "scale": SCALE})["output_0"])
    assert not np.array_equal(first, second)


def test_a_strided_array_is_fine(session: Session) -> None:
    wide = np.random.default_rng(0).normal(size=(1, 1, 5, 12)).astype(np.float32)
    strided = session.run({"image": wide[:, :, :, ::2], "scale": SCALE})["output_0"]
    plain = session.run({"image": wide[:, :, :, ::2].copy(), "scale": SCALE})["output_0"]
    np.testing.assert_array_equal(strided, plain)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no 'image', no 'scale'"),
        ({"image": PICTURE}, "no 'scale'"),
        ({"picture": PICTURE, "scale": SCALE}, "an unexpected 'picture'"),
        ({"image": PICTURE.astype(np.float64), "scale": SCALE}, r"expected float32 [?1]×1×5×6, got float64 1×1×5×6"),
        ({"image": PICTURE[0], "scale": SCALE}, "got float32 1×5×6"),
        ({"image": PICTURE[:, :, :, :5], "scale": SCALE}, "got float32 1×1×5×5"),
        ({"image": PICTURE.tolist(), "scale": SCALE}, "a numpy array, got list"),
    ],
)
def test_feeds_that_do_not_fit_are_named(session: Session, feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        session.run(feeds)


def test_a_fixed_batch_is_checked(name: str, artifact: Callable[[bool], Path]) -> None:
    with load_runtime(name).open(artifact(False), OPTIONS) as session:
        assert session.run({"image": PICTURE, "scale": SCALE})["output_0"].shape == (1, 2)
        with pytest.raises(DataError, match="expected float32 1×1×5×6"):
            session.run({"image": PICTURE.repeat(2, 0), "scale": SCALE.repeat(2, 0)})


def test_a_closed_session_says_so(session: Session) -> None:
    session.close()
    with pytest.raises(BundleError, match="closed"):
        session.run({"image": PICTURE, "scale": SCALE})


def copied(source: Path, folder: Path) -> Path:
    """The artifact and what lies beside it under the same name."""
    for path in source.parent.glob(f"{source.stem}.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / source.name


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_an_artifact_cut_short_is_one_error(name: str, free: Path, tmp_path: Path, keep: float) -> None:
    copy = copied(free, tmp_path)
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole))])
        with pytest.raises(BundleError, match=path.stem):
            load_runtime(name).open(copy, OPTIONS)
        path.write_bytes(whole)
    load_runtime(name).open(copy, OPTIONS).close()


# what may crash is a runtime's native code, of which a stand-in has none
@pytest.mark.parametrize("name", INSTALLABLE, indirect=True)
def test_no_damage_takes_the_caller_down(name: str, free: Path, tmp_path: Path, root: Path) -> None:
    """The tool's own loop, in a fresh interpreter: it forks, which a process with threads must not."""
    np.savez(tmp_path / "feeds.npz", image=PICTURE, scale=SCALE)
    code = (
        "import json, sys, numpy as np, fuzz_artifacts as tool; from pathlib import Path\n"
        "artifact = tool.Artifact(sys.argv[1], Path(sys.argv[2]), tool.RuntimeOptions(1), dict(np.load(sys.argv[3])))\n"
        "files = tool.files(artifact.path)\n"
        "print(json.dumps([tool.fuzz(artifact, file, 24, seed=0, seconds=60) for file in files]))"
    )
    command = [sys.executable, "-c", code, name, free, tmp_path / "feeds.npz"]
    done = subprocess.run(command, cwd=root / "tools", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len(found) == len(list(free.parent.glob(f"{free.stem}.*")))
    for outcomes in found:
        assert sum(outcomes.values()) == 24
        assert set(outcomes) <= {"typed error", "opened and ran"}
        assert outcomes["typed error"] > 0


def test_another_file_or_none_is_one_error(name: str, free: Path, tmp_path: Path) -> None:
    copy = copied(free, tmp_path)
    copy.write_bytes(b"no model at all")
    with pytest.raises(BundleError, match=copy.stem):
        load_runtime(name).open(copy, OPTIONS)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(BundleError, match="no such file"):
        load_runtime(name).open(copy, OPTIONS)


def test_a_device_that_is_not_there_is_refused(name: str, free: Path) -> None:
    with pytest.raises(BundleError, match="Abacus"):
        load_runtime(name).open(free, RuntimeOptions(providers=("Abacus",)))
